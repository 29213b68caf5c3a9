"""A batch as a file: the bytes of its slot, framed as contract/batch_schema.h says."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rollpack.schema import stamped_header


def write_batch_file(path: str | os.PathLike[str], memory: npt.NDArray[np.uint8]) -> None:
    """Write a batch to `path`, whole or not at all: to a temporary beside it, then renamed.

    Args:
        path: the file; one that is there is replaced.
        memory: u8 [bytes], the whole batch; its checksum is renewed.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    header = stamped_header(memory)
    try:
        with open(temporary, "xb") as file:
            file.write(header)
            file.write(memory[len(header) :].data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
