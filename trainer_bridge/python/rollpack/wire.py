"""Frames of the bridge protocol: a u32 little-endian length, one MessagePack map, descriptors.

Descriptors come with `recvmsg` and MSG_CMSG_CLOEXEC, because `socket.recv_fds` ignores its flags in
Python 3.11 and would leave them to every child process. Format: trainer_bridge/README.md.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np

from rollpack.errors import DataLoss, InvalidArgument, ResourceExhausted

MAX_FRAME_BYTES = 16 << 20
_MAX_FDS = 253  # SCM_MAX_FD: what Linux lets one message carry
_LENGTH_BYTES = 4
_RECEIVE_BYTES = 1 << 18


def encode_frame(message: dict[str, Any]) -> bytes:
    """Encode one request; NumPy scalars are sent as the numbers they hold.

    Raises:
        InvalidArgument: a value has no MessagePack form, or the frame would pass 16 MiB.
    """
    try:
        body: bytes = msgpack.packb(message, use_bin_type=True, default=_plain_number)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(str(error), field=str(message.get("verb"))) from error
    if len(body) > MAX_FRAME_BYTES:
        raise InvalidArgument(
            "split it over several calls",
            field=str(message.get("verb")),
            value=f"{len(body)} bytes",
            allowed=f"at most {MAX_FRAME_BYTES} bytes a request",
        )
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def _plain_number(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")


def decode_body(body: bytes) -> dict[str, Any]:
    """Decode the MessagePack map of one reply.

    Raises:
        DataLoss: it is not one map with distinct text keys.
    """
    try:
        message = msgpack.unpackb(body, raw=False, object_pairs_hook=_distinct_keys)
    except ValueError as error:  # every error of msgpack's unpacker is one
        raise DataLoss(f"not a MessagePack map: {error}", field="reply") from error
    if not isinstance(message, dict):
        raise DataLoss(field="reply", value=type(message).__name__, allowed="a map")
    return message


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    if len(decoded) != len(pairs):
        raise ValueError("a key is repeated")
    return decoded


class FrameReader:
    """Cuts a byte stream into frames and gives each its descriptors, in order.

    The kernel may join a plain message with the one behind it, so that descriptors arrive with
    bytes that precede their own frame; it never joins two messages that both carry descriptors.
    """

    def __init__(self) -> None:
        """Start with nothing received."""
        self._bytes = bytearray()
        self._fds: deque[int] = deque()

    def receive(self, sock: socket.socket) -> bool:
        """Take what one `recvmsg` gives; False at the end of the stream.

        Raises:
            ResourceExhausted: the kernel had descriptors for us and could not install them.
            BlockingIOError: nothing is there.
        """
        space = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
        data, ancillary, flags, _ = sock.recvmsg(_RECEIVE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            self.close()
            raise ResourceExhausted(
                "descriptors were lost on their way; raise the limit and connect again",
                field="ulimit -n",
                value=_open_file_limit(),
            )
        self._bytes += data
        return bool(data)

    def frames(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Yield each complete frame received so far, with the descriptors that are now its owner's.

        Raises:
            DataLoss: a length, a map or a number of descriptors breaks the protocol.
        """
        while len(self._bytes) >= _LENGTH_BYTES:
            length = int.from_bytes(self._bytes[:_LENGTH_BYTES], "little")
            if not 1 <= length <= MAX_FRAME_BYTES:
                raise DataLoss(
                    field="frame length", value=str(length), allowed=f"1 to {MAX_FRAME_BYTES} bytes"
                )
            end = _LENGTH_BYTES + length
            if len(self._bytes) < end:
                return
            message = decode_body(bytes(self._bytes[_LENGTH_BYTES:end]))
            del self._bytes[:end]
            yield message, self._take_fds(message.get("num_fds", 0))
        if not self._bytes and self._fds:
            raise DataLoss(
                field="num_fds", value="0", allowed=f"{len(self._fds)}, which came with the frame"
            )

    def _take_fds(self, num_fds: object) -> list[int]:
        if not isinstance(num_fds, int) or not 0 <= num_fds <= len(self._fds):
            raise DataLoss(
                field="num_fds", value=str(num_fds), allowed=f"at most {len(self._fds)}, which came"
            )
        return [self._fds.popleft() for _ in range(num_fds)]

    def close(self) -> None:
        """Close descriptors that no frame has claimed."""
        while self._fds:
            os.close(self._fds.popleft())


def _open_file_limit() -> str:
    import resource

    return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
