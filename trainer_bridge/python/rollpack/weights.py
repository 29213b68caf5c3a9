"""Weights on their way to the engine: some tensors at a time, with a manifest.

A chunk holds whole tensors and at most `chunk_bytes`, or one tensor that is larger. It is lent: the
engine packs its tensors out of this process's memory, where they lie. Or it is a memfd of this
process. Tensors are written into it with pwrite, since a memfd that is mapped writable cannot be
sealed, and then sealed against every change, so that what the engine checks is what it uses.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from isal import isal_zlib

from rollpack.errors import InvalidArgument, ResourceExhausted
from rollpack.slots import Bytes

CHUNK_BYTES = 64 << 20
PHASES_AHEAD = 4  # what lies ready is taken between two steps; the server allows no more
_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3; os has no name for it
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_TENSOR_ALIGNMENT = 64
_DTYPES = ("float32", "float16", "bfloat16")

# A torch tensor or a NumPy array; bfloat16 arrays are those of the package ml_dtypes.
Tensor = Any


class WeightVersion(int):
    """A version of the weights: the number itself, and what the engine says of it.

    Attributes:
        weights_hash: of the packed weights, 16 hex digits; every rank has said that it uses them.
            Equal hashes under equal fingerprints mean equal weights.
        packing_ms: longest time for which a rank's steps waited for the update's tensors to be
            rounded and packed, ms; 0 where it had nothing to do.
        pause_ms: likewise, for all else until steps went on. The prefill of live samples, which
            follows, is last_update_prefill_ms in `stats`.
    """

    weights_hash: str
    packing_ms: float
    pause_ms: float

    @classmethod
    def from_reply(cls, fields: Mapping[str, Any]) -> WeightVersion:
        """Read it from the reply of a commit or of get_weight_version."""
        version = cls(fields["weight_version"])
        version.weights_hash = str(fields["weights_hash"])
        version.packing_ms = float(fields["packing_ms"])
        version.pause_ms = float(fields["pause_ms"])
        return version


@dataclass
class Chunk:
    """Some tensors of an update, sealed and ready to be sent.

    Attributes:
        fd: the sealed memfd; whoever sends it closes it.
        num_bytes: its size.
        manifest: name, dtype, shape, offset, bytes and crc32 of each tensor, for the protocol.
    """

    fd: int
    num_bytes: int = 0
    manifest: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fds(self) -> list[int]:
        """What goes along with the request."""
        return [self.fd]

    def request(self, version: int) -> dict[str, Any]:
        """The fields of its update_weights request."""
        return {
            "phase": "chunk",
            "version": version,
            "bytes": self.num_bytes,
            "tensors": self.manifest,
        }


@dataclass
class LentChunk:
    """Some tensors of an update that lie in this process's memory, unchanged until the reply.

    Attributes:
        num_bytes: of its tensors.
        manifest: name, dtype, shape, bytes and address of each tensor, for the protocol.
        arrays: u8 [bytes] of each tensor, which keep the memory.
    """

    num_bytes: int = 0
    manifest: list[dict[str, Any]] = field(default_factory=list)
    arrays: list[Bytes] = field(default_factory=list)

    @property
    def fds(self) -> list[int]:
        """What goes along with the request."""
        return []

    def request(self, version: int) -> dict[str, Any]:
        """The fields of its update_weights request."""
        return {"phase": "chunk", "version": version, "lent": True, "tensors": self.manifest}


Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def lend_chunks(
    weights: Mapping[str, Tensor], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[LentChunk]:
    """Say where tensors lie, in the order given; those of a device and those with gaps are copied.

    Args:
        weights: a state_dict; float32, float16 or bfloat16, any shape.
        chunk_bytes: size at which a chunk is closed.

    Raises:
        InvalidArgument: a tensor of another dtype; names it.
    """
    chunk = LentChunk()
    for name, tensor in weights.items():
        dtype, shape, data = _tensor_bytes(name, tensor)
        if chunk.manifest and chunk.num_bytes + data.nbytes > chunk_bytes:
            yield chunk
            chunk = LentChunk()
        chunk.num_bytes += data.nbytes
        chunk.arrays.append(data)
        chunk.manifest.append(
            {
                "name": name,
                "dtype": dtype,
                "shape": shape,
                "bytes": data.nbytes,
                "address": data.ctypes.data,
            }
        )
    if chunk.manifest:
        yield chunk


def write_chunks(weights: Weights, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Write tensors into chunks, one chunk at a time, in the order given.

    Of a mapping, tensors larger than a chunk come last: while they are written, those before them
    are packed.

    Args:
        weights: a state_dict or (name, tensor) pairs; float32, float16 or bfloat16, any shape.
        chunk_bytes: size at which a chunk is closed.

    Raises:
        InvalidArgument: a tensor of another dtype; names it.
        ResourceExhausted: no memory, or `ulimit -f` is below the chunk's size.
    """
    if isinstance(weights, Mapping):
        pairs = weights.items()
        weights = sorted(pairs, key=lambda pair: getattr(pair[1], "nbytes", 0) > chunk_bytes)
    chunk: Chunk | None = None
    try:
        for name, tensor in weights:
            dtype, shape, array = _tensor_bytes(name, tensor)
            data = memoryview(array)
            if chunk is not None and _next_offset(chunk) + len(data) > chunk_bytes:
                full, chunk = chunk, None
                yield _seal(full)
            if chunk is None:
                chunk = Chunk(_new_memfd())
            offset = _next_offset(chunk)
            _write(chunk.fd, data, offset, name)
            chunk.num_bytes = offset + len(data)
            chunk.manifest.append(
                {
                    "name": name,
                    "dtype": dtype,
                    "shape": shape,
                    "offset": offset,
                    "bytes": len(data),
                    "crc32": isal_zlib.crc32(data),
                }
            )
        if chunk is not None:
            full, chunk = chunk, None
            yield _seal(full)
    finally:
        if chunk is not None:
            os.close(chunk.fd)


def _next_offset(chunk: Chunk) -> int:
    return -(-chunk.num_bytes // _TENSOR_ALIGNMENT) * _TENSOR_ALIGNMENT


def _tensor_bytes(name: str, tensor: Tensor) -> tuple[str, list[int], Bytes]:
    """Return dtype, shape and the elements as u8 [bytes], row-major, little-endian."""
    shape = [int(extent) for extent in tensor.shape]
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise InvalidArgument(
            field=f"weights[{name!r}].dtype", value=dtype, allowed=" or ".join(_DTYPES)
        )
    if hasattr(tensor, "detach"):
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy()  # NumPy has no bfloat16 of its own
    else:
        data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    return dtype, shape, data


def _new_memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("rollpack-weights", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create("rollpack-weights", flags)


def _write(fd: int, data: memoryview, offset: int, name: str) -> None:
    num_written = 0
    while num_written < len(data):
        try:
            num_written += os.pwrite(fd, data[num_written:], offset + num_written)
        except OSError as error:
            hint = "raise `ulimit -f`" if error.errno == errno.EFBIG else "free memory"
            raise ResourceExhausted(
                f"{error.strerror}; {hint}, or pass a smaller chunk_bytes",
                field=f"weights[{name!r}]",
                value=f"{len(data)} bytes at offset {offset} of a chunk",
            ) from error


def _seal(chunk: Chunk) -> Chunk:
    # Tensors without elements write nothing, and the server maps at least a byte.
    chunk.num_bytes = max(1, chunk.num_bytes)
    os.ftruncate(chunk.fd, chunk.num_bytes)
    fcntl.fcntl(chunk.fd, fcntl.F_ADD_SEALS, _SEALS)
    return chunk
