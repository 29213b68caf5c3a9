"""A server of scripted answers, for what a real one never does: wrong versions, broken frames,
silence, death in the middle of a request. What a real server does is tested against a real one.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

SLOT_BYTES = 1 << 16
SLOT_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_CONTROL_BYTES = socket.CMSG_SPACE(16 * 4)

Message = dict[str, Any]
# Takes a request and its descriptors; returns the reply's fields, or None to stay silent.
Handler = Callable[[Message, list[int]], "Message | None"]


def encode_batch(
    columns: dict[str, np.ndarray],
    *,
    batch_seq: int = 1,
    generation: int = 1,
    schema_version: int = 1,
    magic: bytes = b"RPKBATCH",
    alignments: dict[str, int] | None = None,
) -> bytearray:
    """The bytes of a batch, written from the table in batch_schema.h."""
    entry_offset = 64
    offset = 64 + 128 * len(columns)
    table, body = bytearray(), bytearray()
    for name, values in columns.items():
        padding = -offset % 64
        body += bytes(padding)
        offset += padding
        shape = list(values.shape) + [0] * (4 - values.ndim)
        table += struct.pack(
            "<48s8sII4QQQ16x",
            name.encode(),
            values.dtype.str.encode(),
            values.ndim,
            (alignments or {}).get(name, 0),
            *shape,
            offset,
            values.nbytes,
        )
        body += values.tobytes()
        offset += values.nbytes
    assert len(table) == 64 + 128 * len(columns) - entry_offset
    rest = bytes(table + body)
    header = struct.pack(
        "<8sIIQQQI20x",
        magic,
        schema_version,
        len(columns),
        batch_seq,
        generation,
        64 + len(rest),
        zlib.crc32(rest),
    )
    return bytearray(header + rest)


def packed_columns(num_samples: int = 3, num_rows: int = 2) -> dict[str, np.ndarray]:
    """A packed batch of samples of 2 prompt tokens and 1, 2, .. response tokens, seed fixed."""
    rng = np.random.default_rng(7)
    response_lens = np.arange(1, num_samples + 1, dtype="<i4")
    prompt_lens = np.full(num_samples, 2, "<i4")
    lens = prompt_lens + response_lens
    cu_seqlens = np.concatenate([[0], np.cumsum(lens)]).astype("<i4")
    num_tokens = int(cu_seqlens[-1])
    positions = np.concatenate([np.arange(n) for n in lens]).astype("<i4")
    mask = (positions >= 2).astype("|u1")
    logprobs = -rng.random(num_tokens, dtype="f4")
    logprobs[mask == 0] = np.nan
    ids = [f"prompt-{index}".encode() for index in range(num_samples)]
    return {
        "input_ids": rng.integers(0, 100, num_tokens).astype("<i4"),
        "position_ids": positions,
        "segment_ids": np.repeat(np.arange(num_samples), lens).astype("<i4"),
        "cu_seqlens": cu_seqlens,
        "row_starts": np.linspace(0, num_samples, num_rows + 1).astype("<i4"),
        "loss_mask": mask,
        "rollout_log_probs": logprobs,
        "weight_versions": np.where(mask, 4, -1).astype("<i4"),
        "request_id": np.full(num_samples, 1, "<i8"),
        "prompt_index": np.arange(num_samples, dtype="<i4"),
        "prompt_id_bytes": np.frombuffer(b"".join(ids), "|u1"),
        "prompt_id_starts": np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype("<i4"),
        "sample_index": np.zeros(num_samples, "<i4"),
        "group_size": np.ones(num_samples, "<i4"),
        "prompt_lens": prompt_lens,
        "response_lens": response_lens,
        "finish_reason": np.zeros(num_samples, "|u1"),
        "stop_token_id": np.full(num_samples, 5, "<i4"),
        "temperature": np.ones(num_samples, "<f4"),
    }


def weights_reply(version: int) -> Message:
    """What a commit and get_weight_version say."""
    return {"weight_version": version, "weights_hash": f"{version:016x}", "packing_ms": 1.5,
            "pause_ms": 0.25}


class FakeServer:
    """Answers each verb by its handler; one thread, one client at a time."""

    def __init__(self, path: str, *, num_slots: int = 2, seals: int = SLOT_SEALS) -> None:
        self.path = path
        self.requests: list[Message] = []
        self.slots = [_memfd(seals) for _ in range(num_slots)]
        self.hello: Message = {
            "protocol_version": 1,
            "schema_version": 1,
            "config": {"bridge": {"layout": "packed"}},
            "eos_token_ids": np.array([2, 7], "<i4").tobytes(),
            "pad_token_id": 0,
            "vocab_size": 100,
            "fingerprint": "fake",
            "instance": "a life",
            "attention_parity_tokens": 16,
            "weight_version": 0,
            "num_slots": num_slots,
            "slot_bytes": SLOT_BYTES,
        }
        self.handlers: dict[str, Handler] = {"release": lambda message, fds: {}}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._connection: socket.socket | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def deliver(self, slot: int, batch: bytes, /, **fields: Any) -> Message:
        """Write a batch into a slot; returns a next_batch reply that tells of it."""
        os.pwrite(self.slots[slot], batch, 0)
        batch_seq, generation = struct.unpack_from("<QQ", batch, 16)
        (crc32,) = struct.unpack_from("<I", batch, 40)
        reply = {
            "slot": slot,
            "generation": generation,
            "batch_seq": batch_seq,
            "bytes": len(batch),
            "crc32": crc32,
            "num_samples": 3,
            "num_groups": 3,
            "failed": [],
        }
        return {**reply, **fields}

    def send(self, data: bytes) -> None:
        """Send bytes that need not be a frame."""
        self._connection.sendall(data)

    def hang_up(self) -> None:
        """End the connection as a dying process does."""
        self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends a thread that accepts
        self._listener.close()
        if self._connection is not None:
            self._connection.close()
        for fd in self.slots:
            os.close(fd)

    def verbs(self) -> list[str]:
        return [request["verb"] for request in self.requests]

    def _serve(self) -> None:
        while True:
            try:
                self._connection, _ = self._listener.accept()
                while (request := self._read()) is not None:
                    self._answer(*request)
            except OSError:
                if self._listener.fileno() < 0:
                    return

    def _read(self) -> tuple[Message, list[int]] | None:
        fds = array.array("i")
        head, ancillary, _, _ = self._connection.recvmsg(4, _CONTROL_BYTES)
        for _, _, payload in ancillary:
            fds.frombytes(payload)
        if len(head) < 4:
            return None
        body = self._connection.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)
        return msgpack.unpackb(body), list(fds)

    def _answer(self, request: Message, fds: list[int]) -> None:
        self.requests.append(request)
        if request["verb"] == "hello":
            frame = encode_reply(request, {**self.hello, "num_fds": len(self.slots)})
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.slots))
            self._connection.sendmsg([frame], [rights])
            return
        try:
            reply = self.handlers[request["verb"]](request, fds)
        except BaseException:
            self.hang_up()  # the client's call fails at once, next to the handler's own traceback
            raise
        finally:
            for fd in fds:
                os.close(fd)
        if reply is not None:
            self._connection.sendall(encode_reply(request, reply))


def encode_reply(request: Message, fields: Message) -> bytes:
    """A frame that answers a request; a field `error` makes it a refusal."""
    body = msgpack.packb({"id": request["id"], "ok": "error" not in fields, **fields})
    return len(body).to_bytes(4, "little") + body


def refusal(code: str, **parts: str) -> Message:
    """A reply that refuses."""
    names = ("field", "value", "origin", "allowed", "message")
    return {"error": {"code": code, **{name: parts.get(name, "") for name in names}}}


def _memfd(seals: int) -> int:
    fd = os.memfd_create("slot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, SLOT_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
