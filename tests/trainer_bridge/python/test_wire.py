"""Frames and descriptors, byte by byte."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
import rollpack
from rollpack.wire import MAX_FRAME_BYTES, FrameReader, encode_frame

_PACKAGE = Path(rollpack.__file__).parents[1]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def send_with_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def test_a_frame_is_a_little_endian_length_and_one_map() -> None:
    data = encode_frame({"verb": "abort", "id": 1, "request_id": None})
    assert data[:4] == (len(data) - 4).to_bytes(4, "little")
    assert msgpack.unpackb(data[4:]) == {"verb": "abort", "id": 1, "request_id": None}


def test_numpy_scalars_are_sent_as_plain_numbers() -> None:
    data = encode_frame({"n": np.int32(4), "top_p": np.float64(0.5), "on": np.bool_(True)})
    assert msgpack.unpackb(data[4:]) == {"n": 4, "top_p": 0.5, "on": True}


def test_a_value_without_an_encoding_is_refused_by_its_verb() -> None:
    with pytest.raises(rollpack.InvalidArgument, match="submit: set cannot be sent"):
        encode_frame({"verb": "submit", "prompts": {1}})


def test_a_frame_beyond_16_mib_is_refused_with_its_size() -> None:
    with pytest.raises(rollpack.InvalidArgument, match="submit = 1677.* bytes: expected at most"):
        encode_frame({"verb": "submit", "data": bytes(MAX_FRAME_BYTES)})


def test_frames_are_found_whatever_the_cuts_of_the_stream(pair) -> None:
    ours, theirs = pair
    reader = FrameReader()
    stream = encode_frame({"id": 1}) + encode_frame({"id": 2, "x": b"y" * 500})
    seen = []
    for byte in stream:
        theirs.send(bytes([byte]))
        assert reader.receive(ours)
        seen += [message["id"] for message, _ in reader.frames()]
    assert seen == [1, 2]


def test_joined_messages_keep_their_descriptors_apart(pair) -> None:
    ours, theirs = pair
    read_end, write_end = os.pipe()
    theirs.send(encode_frame({"id": 1}))
    send_with_fds(theirs, encode_frame({"id": 2, "num_fds": 1}), [read_end])
    send_with_fds(theirs, encode_frame({"id": 3, "num_fds": 1}), [write_end])
    os.close(read_end)
    os.close(write_end)
    reader = FrameReader()
    frames = []
    while len(frames) < 3:
        reader.receive(ours)
        frames += reader.frames()
    (_, none), (_, [got_read]), (_, [got_write]) = frames
    assert none == []
    assert not os.get_inheritable(got_read)
    os.write(got_write, b"through")
    assert os.read(got_read, 7) == b"through"
    os.close(got_read)
    os.close(got_write)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\0\0\0\0", "frame length = 0: expected 1 to 16777216 bytes"),
        (b"\1\0\0\1", "frame length = 16777217: expected 1 to 16777216 bytes"),
        (frame(b"\xc1"), "reply: not a MessagePack map"),
        (frame(b"\x80\x80"), "reply: not a MessagePack map"),
        (frame(b"\x82\xa1a\x01\xa1a\x02"), "reply: not a MessagePack map: a key is repeated"),
        (frame(b"\x93\x01\x02\x03"), "reply = list: expected a map"),
        (frame(b"\x91" * 2000), "reply: not a MessagePack map"),
        (encode_frame({"id": 1, "num_fds": 1}), "num_fds = 1: expected at most 0, which came"),
        (encode_frame({"id": 1, "num_fds": -1}), "num_fds = -1: expected at most 0, which came"),
        (encode_frame({"id": 1, "num_fds": "x"}), "num_fds = x: expected at most 0, which came"),
    ],
)
def test_a_broken_frame_is_data_loss_that_says_what_broke(pair, data: bytes, text: str) -> None:
    ours, theirs = pair
    theirs.send(data)
    reader = FrameReader()
    reader.receive(ours)
    with pytest.raises(rollpack.DataLoss) as error:
        list(reader.frames())
    assert text in str(error.value)


def test_descriptors_that_no_frame_claims_are_an_error_and_closed(pair) -> None:
    ours, theirs = pair
    read_end, write_end = os.pipe()
    send_with_fds(theirs, encode_frame({"id": 1}), [write_end])
    os.close(write_end)
    reader = FrameReader()
    reader.receive(ours)
    with pytest.raises(rollpack.DataLoss, match="num_fds = 0: expected 1, which came"):
        list(reader.frames())
    reader.close()
    assert os.read(read_end, 1) == b""  # no writer is left
    os.close(read_end)


def test_descriptors_lost_for_want_of_room_are_an_error_naming_the_limit() -> None:
    code = f"""
        import os, resource, socket, sys
        sys.path[:0] = [{str(_PACKAGE)!r}, {str(Path(__file__).parent)!r}]
        import rollpack
        from rollpack.wire import FrameReader, encode_frame
        from test_wire import send_with_fds
        ours, theirs = socket.socketpair()
        fds = [os.dup(0) for _ in range(8)]
        send_with_fds(theirs, encode_frame({{"num_fds": 8}}), fds)
        limit = max(fds) + 4
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        before = len(os.listdir("/proc/self/fd"))
        try:
            FrameReader().receive(ours)
        except rollpack.ResourceExhausted as error:
            assert len(os.listdir("/proc/self/fd")) == before
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert run.stdout.startswith("ulimit -n = "), run.stderr
    assert "descriptors were lost" in run.stdout
