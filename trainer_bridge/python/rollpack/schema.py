"""The bytes of a batch, read by its own table: trainer_bridge/contract/batch_schema.h in Python.

Header and table are copied out and checked before a column is looked at. What a batch's table does
not say, this file does not know: layouts and column names live in batch.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from rollpack.errors import DataLoss, Unsupported

SCHEMA_VERSION = 1
_MAGIC = b"RPKBATCH"
_HEADER = struct.Struct("<8sIIQQQI20x")
_ENTRY = struct.Struct("<48s8sII4QQQ16x")
_COLUMN_ALIGNMENT = 64
_ALIGNMENTS = ("none", "token", "predictor")
_DTYPES = ("<i4", "<i8", "<f4", "|u1")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Header:
    """The header's fields, as batch_schema.h names them."""

    schema_version: int
    num_columns: int
    batch_seq: int
    generation: int
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Column:
    """One column: a writable array on the batch's memory, and what its entries are about.

    Attributes:
        array: the values, with the dtype and shape that the table states.
        alignment: "token" (entry t is about token t), "predictor" (about token t + 1) or "none".
    """

    array: Array
    alignment: str


def read_header(memory: npt.NDArray[np.uint8], where: str) -> Header:
    """Check and return the header.

    Args:
        memory: u8 [bytes], the whole batch.
        where: how errors name the batch.

    Raises:
        DataLoss: no batch begins here, or it has another size.
        Unsupported: the batch has another schema version; names both.
    """
    if memory.nbytes < _HEADER.size:
        raise DataLoss(
            field=where, value=f"{memory.nbytes} bytes", allowed=f"at least {_HEADER.size}"
        )
    magic, *numbers = _HEADER.unpack(memory[: _HEADER.size].tobytes())
    header = Header(*numbers)
    if magic != _MAGIC:
        raise DataLoss(field=f"{where}: magic", value=repr(magic), allowed=repr(_MAGIC))
    check_schema_version(header.schema_version, where)
    if header.bytes != memory.nbytes:
        raise DataLoss(field=f"{where}: bytes", value=str(header.bytes), allowed=str(memory.nbytes))
    return header


def check_schema_version(version: object, where: str) -> None:
    """Refuse a schema that this package does not read.

    Raises:
        Unsupported: names both versions.
    """
    if version != SCHEMA_VERSION:
        raise Unsupported(
            "install the rollpack package of the server's version",
            field=f"{where}: schema_version",
            value=str(version),
            allowed=str(SCHEMA_VERSION),
        )


def check_crc32(memory: npt.NDArray[np.uint8], header: Header, where: str) -> None:
    """Compare the checksum of all bytes after the header.

    Raises:
        DataLoss: the bytes are not those that were written.
    """
    crc32 = isal_zlib.crc32(memory[_HEADER.size :].data)
    if crc32 != header.crc32:
        raise DataLoss(field=f"{where}: crc32", value=str(crc32), allowed=str(header.crc32))


def stamped_header(memory: npt.NDArray[np.uint8]) -> bytes:
    """The header of a batch with the checksum of what lies behind it now."""
    magic, *numbers = _HEADER.unpack(memory[: _HEADER.size].tobytes())
    numbers[-1] = isal_zlib.crc32(memory[_HEADER.size :].data)
    return _HEADER.pack(magic, *numbers)


def read_columns(memory: npt.NDArray[np.uint8], num_columns: int, where: str) -> dict[str, Column]:
    """Return the columns by name, in the table's order, as views on `memory`.

    Raises:
        DataLoss: an entry of the table contradicts itself, another one or the size of the batch.
    """
    table_end = _HEADER.size + num_columns * _ENTRY.size
    if table_end > memory.nbytes:
        raise DataLoss(
            field=f"{where}: num_columns",
            value=str(num_columns),
            allowed=f"a table within {memory.nbytes} bytes",
        )
    columns: dict[str, Column] = {}
    for entry in _ENTRY.iter_unpack(memory[_HEADER.size : table_end].tobytes()):
        name = _text(entry[0])
        if not name or name in columns:
            raise DataLoss("it is empty or repeated", field=f"{where}: column name", value=name)
        columns[name] = _read_column(memory, table_end, entry, f"{where}: column {name}")
    return columns


def _read_column(
    memory: npt.NDArray[np.uint8], table_end: int, entry: tuple[Any, ...], where: str
) -> Column:
    _, dtype_bytes, ndim, alignment, *shape, offset, num_bytes = entry
    code = _text(dtype_bytes)
    if code not in _DTYPES:
        raise DataLoss(field=f"{where}: dtype", value=code, allowed=" or ".join(_DTYPES))
    if alignment >= len(_ALIGNMENTS):
        raise DataLoss(field=f"{where}: alignment", value=str(alignment), allowed="0, 1 or 2")
    if not 1 <= ndim <= len(shape):
        raise DataLoss(field=f"{where}: ndim", value=str(ndim), allowed="1 to 4")
    dtype = np.dtype(code)
    expected_bytes = dtype.itemsize
    for extent in shape[:ndim]:
        expected_bytes *= extent
    if num_bytes != expected_bytes:
        raise DataLoss(
            field=f"{where}: bytes", value=str(num_bytes), allowed=f"{expected_bytes} by its shape"
        )
    end = offset + num_bytes
    if offset < table_end or offset % _COLUMN_ALIGNMENT or end > memory.nbytes:
        raise DataLoss(
            field=f"{where}: offset",
            value=str(offset),
            allowed=f"a multiple of {_COLUMN_ALIGNMENT} from {table_end} with {num_bytes} bytes "
            f"before {memory.nbytes}",
        )
    array = memory[offset:end].view(dtype).reshape(shape[:ndim])
    return Column(array, _ALIGNMENTS[alignment])


def _text(padded: bytes) -> str:
    return padded.partition(b"\0")[0].decode("utf-8", "replace")
