"""Weight updates: the manifest, the bytes, the seals and what happens when one is refused."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import resource
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import rollpack
import torch
from rollpack.lending import Readers
from rollpack.weights import PHASES_AHEAD, write_chunks

from fake_server import FakeServer, Message, refusal, weights_reply

Sent = tuple[Message, bytes]
Lent = dict[str, tuple[str, list[int], bytes]]


@pytest.fixture
def received(server: FakeServer) -> Iterator[list[Sent]]:
    """Every update_weights request and the bytes of its chunk."""
    requests: list[Sent] = []

    def take(request: Message, fds: list[int]) -> Message:
        data = b""
        if fds:
            data = os.pread(fds[0], request["bytes"], 0)
            seals = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS)
            for name in ("SHRINK", "GROW", "WRITE", "SEAL"):
                assert seals & getattr(fcntl, f"F_SEAL_{name}"), name
            assert os.fstat(fds[0]).st_size == request["bytes"]
        requests.append((request, data))
        return weights_reply(request["version"]) if request["phase"] == "commit" else {}

    server.handlers["update_weights"] = take
    yield requests


@pytest.fixture
def lending(server: FakeServer) -> Iterator[tuple[rollpack.Client, list[Message], Lent]]:
    """A client whose memory the server reads, its requests, and what was lent: read at once."""
    requests: list[Message] = []
    found: Lent = {}

    def take(request: Message, fds: list[int]) -> Message:
        requests.append(request)
        for entry in request.get("tensors", ()) if request.get("lent") else ():
            data = ctypes.string_at(entry["address"], entry["bytes"])
            found[entry["name"]] = (entry["dtype"], entry["shape"], data)
        return weights_reply(request["version"]) if request["phase"] == "commit" else {}

    server.handlers["update_weights"] = take
    server.hello["reads_memory"] = True
    with rollpack.connect(server.path) as connected:
        yield connected, requests, found


def tensors(received: list[Sent]) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (dtype, shape, bytes) of all chunks, checksums compared."""
    found = {}
    for request, data in received:
        for entry in request.get("tensors", ()):
            piece = data[entry["offset"] : entry["offset"] + entry["bytes"]]
            assert len(piece) == entry["bytes"]
            assert zlib.crc32(piece) == entry["crc32"]
            assert entry["name"] not in found
            found[entry["name"]] = (entry["dtype"], entry["shape"], piece)
    return found


def test_what_fills_a_chunk_alone_comes_last_of_a_mapping_and_in_its_place_of_pairs() -> None:
    state = {"big": np.ones(64, np.float32), "a": np.ones(8, np.float32),
             "b": np.ones(2, np.float32)}

    def order(weights: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> list[list[str]]:
        chunks = list(write_chunks(weights, chunk_bytes=128))
        for chunk in chunks:
            os.close(chunk.fd)
        return [[entry["name"] for entry in chunk.manifest] for chunk in chunks]

    assert order(state) == [["a", "b"], ["big"]]
    assert order(iter(state.items())) == [["big"], ["a", "b"]]


def torch_state() -> dict[str, torch.Tensor]:
    """Tensors of every dtype and kind."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(5, 6, generator=generator)
    return {
        "f32": values,
        "f16": values.half(),
        "bf16": values.bfloat16(),
        "transposed": values.bfloat16().t(),
        "parameter": torch.nn.Parameter(values[0]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
    }


def assert_bits(found: Lent, state: Mapping[str, torch.Tensor]) -> None:
    """What arrived is the tensors, in their order."""
    assert list(found) == list(state)
    for name, (dtype, shape, data) in found.items():
        tensor = state[name].detach()
        assert f"torch.{dtype}" == str(tensor.dtype)
        assert shape == list(tensor.shape)
        bits = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert data == bytes(bits.tolist())


def test_torch_tensors_arrive_bit_for_bit(client: rollpack.Client, received: list[Sent]) -> None:
    state = torch_state()
    assert client.update_weights(state, version=3) == 3
    assert [request["phase"] for request, _ in received] == ["begin", "chunk", "commit"]
    assert received[-1][0]["mode"] == "keep"
    assert_bits(tensors(received), state)


def test_a_mapping_is_lent_to_a_server_that_reads_memory(
    lending: tuple[rollpack.Client, list[Message], Lent],
) -> None:
    client, requests, found = lending
    assert client.info.reads_memory
    state = torch_state()
    assert client.update_weights(state, version=3, chunk_bytes=200) == 3
    assert_bits(found, state)
    chunks = [request for request in requests if request["phase"] == "chunk"]
    assert [len(chunk["tensors"]) for chunk in chunks] == [2, 5]
    assert all(chunk["lent"] and "bytes" not in chunk for chunk in chunks)
    (entry,) = (entry for entry in chunks[0]["tensors"] if entry["name"] == "f32")
    assert entry["address"] == state["f32"].data_ptr(), "no copy is made"


def test_pairs_are_copied_as_is_what_should_be(
    lending: tuple[rollpack.Client, list[Message], Lent],
) -> None:
    client, requests, found = lending
    state = {"a": np.ones(3, np.float32)}
    client.update_weights(iter(state.items()), 1)
    client.update_weights(state, 2, copy=True)
    chunks = [request for request in requests if request["phase"] == "chunk"]
    assert [chunk["bytes"] for chunk in chunks] == [12, 12]
    assert not found


def test_where_one_reader_can_be_named_a_second_server_gets_copies_meanwhile(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = Readers(names_one=True)
    monkeypatch.setattr("rollpack.session.READERS", readers)
    server.hello["reads_memory"] = True
    kinds = []

    def take(request: Message, fds: list[int]) -> Message:
        if request["phase"] == "chunk":
            kinds.append("lent" if "lent" in request else "copied")
        return weights_reply(request["version"]) if request["phase"] == "commit" else {}

    server.handlers["update_weights"] = take
    with rollpack.connect(server.path) as client:
        assert "probe" in server.requests[0]
        state = {"a": np.ones(3, np.float32)}
        client.update_weights(state, 1)
        assert readers.begin(os.getppid())  # another server's update is under way
        client.update_weights(state, 2)
        assert not readers.begin(os.getpid())
        readers.end()
        client.update_weights(state, 3)
    assert kinds == ["lent", "copied", "lent"]


def test_what_is_lent_lives_until_the_reply_and_no_longer(
    server: FakeServer, lending: tuple[rollpack.Client, list[Message], Lent]
) -> None:
    client, _, _ = lending
    lent: list[weakref.ref[np.ndarray]] = []

    class Copies(dict[str, np.ndarray]):
        """Makes each tensor when it is asked for, as one on a device is copied."""

        def items(self) -> Any:
            for name in self:
                array = np.full(64, len(lent), np.float32)
                lent.append(weakref.ref(array))
                yield name, array

    def take(request: Message, fds: list[int]) -> Message:
        gc.collect()
        for entry in request.get("tensors", ()):
            (value,) = set(np.frombuffer(ctypes.string_at(entry["address"], 256), "<f4").tolist())
            assert value == int(entry["name"])
        if request["phase"] == "chunk":
            alive = sum(reference() is not None for reference in lent)
            # A chunk more has been made where its client waits to post it.
            assert 1 <= alive <= PHASES_AHEAD + 1
        return weights_reply(request["version"]) if request["phase"] == "commit" else {}

    server.handlers["update_weights"] = take
    names = Copies({str(index): np.zeros(0) for index in range(12)})
    assert client.update_weights(names, 1, chunk_bytes=256) == 1
    gc.collect()
    assert not any(reference() is not None for reference in lent)


def test_numpy_arrays_and_pairs_are_taken_too(
    client: rollpack.Client, received: list[Sent]
) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    client.update_weights(((name, array.T) for name in ("a", "b")), 1, mode="wait")
    assert tensors(received)["b"] == ("float32", [3, 2], np.ascontiguousarray(array.T).tobytes())
    assert received[-1][0]["mode"] == "wait"


def test_chunks_stay_within_their_bound_and_keep_tensors_whole(
    client: rollpack.Client, received: list[Sent]
) -> None:
    state = {
        f"t{index}": np.full(size, index, np.float32) for index, size in enumerate([9, 9, 60, 1])
    }
    client.update_weights(state, 1, chunk_bytes=128)
    chunks = [request for request, _ in received if request["phase"] == "chunk"]
    assert [[entry["name"] for entry in chunk["tensors"]] for chunk in chunks] == [
        ["t0", "t1"],
        ["t3"],
        ["t2"],
    ]
    assert [chunk["bytes"] for chunk in chunks] == [100, 4, 240]
    assert all(entry["offset"] % 64 == 0 for chunk in chunks for entry in chunk["tensors"])


def test_tensors_without_elements_alone_make_a_chunk(
    client: rollpack.Client, received: list[Sent]
) -> None:
    client.update_weights({"empty": np.zeros((0, 4), np.float32)}, 1)
    assert tensors(received) == {"empty": ("float32", [0, 4], b"")}


def test_a_sealed_chunk_can_be_neither_written_nor_resized() -> None:
    (chunk,) = write_chunks({"a": np.ones(3, np.float32)})
    for change in (
        lambda: os.pwrite(chunk.fd, b"x", 0),
        lambda: os.truncate(chunk.fd, 4),
        lambda: os.truncate(chunk.fd, 400),
        lambda: mmap.mmap(chunk.fd, 12, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        lambda: fcntl.fcntl(chunk.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ):
        with pytest.raises(OSError) as error:
            change()
        assert error.value.errno in (errno.EPERM, errno.EACCES)
    os.close(chunk.fd)


@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.int8])
def test_a_tensor_of_another_dtype_is_refused_by_name_and_the_update_is_taken_back(
    client: rollpack.Client, received: list[Sent], dtype: type
) -> None:
    with pytest.raises(rollpack.InvalidArgument) as error:
        client.update_weights({"model.norm.weight": np.ones(3, dtype)}, 2)
    assert (
        f"weights['model.norm.weight'].dtype = {np.dtype(dtype)}: expected float32 or float16 or "
        "bfloat16" in str(error.value)
    )
    assert [request["phase"] for request, _ in received] == ["begin", "cancel"]


def test_an_error_of_the_iterable_takes_the_update_back(
    client: rollpack.Client, received: list[Sent]
) -> None:
    def broken() -> Iterator[tuple[str, np.ndarray]]:
        yield "a", np.ones(64, np.float32)
        raise OSError("the checkpoint is gone")

    gc.collect()  # what earlier tests left
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="the checkpoint is gone"):
        client.update_weights(broken(), 2)
    assert received[-1][0]["phase"] == "cancel"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_refused_chunk_raises_the_servers_words_and_sends_nothing_after(
    server: FakeServer, client: rollpack.Client
) -> None:
    phases = []

    def refuse(request: Message, fds: list[int]) -> Message:
        phases.append(request["phase"])
        if request["phase"] == "chunk":
            return refusal("invalid_argument", field="weights['x']", message="not in the model")
        return {} if request["phase"] == "begin" else refusal("failed_precondition")

    server.handlers["update_weights"] = refuse
    with pytest.raises(rollpack.InvalidArgument, match=r"weights\['x'\]: not in the model"):
        client.update_weights({"x": np.ones(3, np.float32)}, 2)
    assert phases == ["begin", "chunk", "cancel"]


def test_chunks_go_ahead_of_the_reply_to_begin_and_a_refused_begin_is_what_is_raised(
    client: rollpack.Client, server: FakeServer
) -> None:
    phases: list[str] = []

    def take(request: Message, fds: list[int]) -> Message:
        phases.append(request["phase"])
        for _ in fds:
            return refusal("failed_precondition", field="update_weights", value="chunk")
        if request["phase"] == "cancel":
            return refusal("failed_precondition", field="update_weights", value="cancel")
        return refusal("invalid_argument", field="version", value="3")

    server.handlers["update_weights"] = take
    state = {f"t{index}": np.ones(16, np.float32) for index in range(9)}
    with pytest.raises(rollpack.InvalidArgument) as error:
        client.update_weights(state, 3, chunk_bytes=64)
    assert error.value.field == "version"
    # No more than the server takes, whether or not the refusal was seen in the midst of them.
    assert phases[0] == "begin" and phases[-1] == "cancel"
    assert phases[1:-1] == ["chunk"] * (PHASES_AHEAD - 1)


def test_a_second_update_of_a_client_is_refused_and_the_first_goes_through(
    client: rollpack.Client, received: list[Sent]
) -> None:
    def weights() -> Iterator[tuple[str, np.ndarray]]:
        yield "a", np.ones(4, np.float32)
        for version in (1, 2):
            with pytest.raises(rollpack.FailedPrecondition) as error:
                client.update_weights({"b": np.ones(4, np.float32)}, version)
            assert error.value.value == f"version {version}"
        yield "c", np.ones(4, np.float32)

    assert client.update_weights(weights(), 1) == 1
    assert [request["version"] for request, _ in received] == [1, 1, 1]
    assert list(tensors(received)) == ["a", "c"]
    assert client.update_weights({"b": np.ones(4, np.float32)}, 2) == 2


def test_a_wrong_mode_is_refused_before_a_byte_is_sent(
    client: rollpack.Client, received: list[Sent]
) -> None:
    with pytest.raises(rollpack.InvalidArgument, match="mode = 'now': expected keep or wait or ab"):
        client.update_weights({}, 2, mode="now")
    assert received == []


def test_a_file_size_limit_is_named() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(rollpack.ResourceExhausted) as error:
            list(write_chunks({"big": np.ones(1024, np.float32)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "weights['big'] = 4096 bytes at offset 0 of a chunk" in str(error.value)
    assert "raise `ulimit -f`" in str(error.value)
