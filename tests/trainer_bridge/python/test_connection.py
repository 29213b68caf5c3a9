"""What a trainer sees when the server is absent, silent, old, broken or dead."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rollpack
from rollpack.errors import error_from_map

from fake_server import (
    FakeServer,
    encode_batch,
    encode_reply,
    packed_columns,
    refusal,
    weights_reply,
)


def in_child(check: Callable[[], object]) -> str:
    """Fork, run `check` in the child and return the text of what it raised or returned."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = repr(check())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write_end, text.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def test_an_absent_server_is_named_with_the_ways_to_find_one(tmp_path: Path) -> None:
    with pytest.raises(rollpack.NotFound) as error:
        rollpack.connect(tmp_path / "none.sock", timeout_s=0.05)
    assert f"socket = {tmp_path}/none.sock: no server made it within 0.05 s" in str(error.value)
    assert "ROLLPACK_SOCKET" in str(error.value)


def test_a_socket_nobody_listens_on_is_unavailable(tmp_path: Path) -> None:
    path = str(tmp_path / "stale")
    socket.socket(socket.AF_UNIX).bind(path)
    with pytest.raises(rollpack.Unavailable, match="no server answers there: Connection refused"):
        rollpack.connect(path, timeout_s=0.05)


def test_a_path_beyond_107_bytes_is_refused_before_it_is_tried() -> None:
    with pytest.raises(rollpack.InvalidArgument, match="expected at most 107 bytes; use a shorter"):
        rollpack.connect("/tmp/" + "x" * 103)


def test_connect_finds_the_socket_by_environment(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLPACK_SOCKET", server.path)
    with rollpack.connect() as client:
        assert client.info.config == {"bridge": {"layout": "packed"}}
        assert client.info.eos_token_ids == (2, 7)
        assert client.info.num_slots == 2


def test_host_in_a_path_is_this_hosts_name(tmp_path: Path) -> None:
    server = FakeServer(str(tmp_path / f"{socket.gethostname()}.s"))
    with rollpack.connect(tmp_path / "{host}.s") as client:
        assert client.socket_path == server.path
    server.close()


def test_connect_waits_for_a_server_that_starts_later(tmp_path: Path) -> None:
    started: list[FakeServer] = []
    path = str(tmp_path / "s")
    timer = threading.Timer(0.2, lambda: started.append(FakeServer(path)))
    timer.start()
    with rollpack.connect(path, timeout_s=10) as client:
        assert client.info.fingerprint == "fake"
    started[0].close()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("protocol_version", 2, "protocol_version = 2"),
        ("schema_version", 9, "schema_version = 9"),
    ],
)
def test_another_version_is_refused_naming_both(
    server: FakeServer, name: str, value: int, text: str
) -> None:
    server.hello[name] = value
    with pytest.raises(rollpack.Unsupported) as error:
        rollpack.connect(server.path)
    assert text in str(error.value)
    assert "expected 1; install the rollpack package of the server's version" in str(error.value)


def test_a_hello_without_a_field_is_data_loss_naming_it(server: FakeServer) -> None:
    del server.hello["vocab_size"]
    with pytest.raises(rollpack.DataLoss, match="hello: vocab_size .*it is absent"):
        rollpack.connect(server.path)


def test_a_slot_that_could_shrink_is_refused(tmp_path: Path) -> None:
    server = FakeServer(str(tmp_path / "s"), seals=0)
    with pytest.raises(rollpack.DataLoss, match="slot 0 = seals 0x0: expected a memfd sealed"):
        rollpack.connect(server.path)
    server.close()


def test_a_slot_smaller_than_slot_bytes_is_refused(server: FakeServer) -> None:
    server.hello["slot_bytes"] = 1 << 20
    with pytest.raises(rollpack.DataLoss, match="slot 0 = 65536 bytes: expected at least slot"):
        rollpack.connect(server.path)


def test_a_failed_hello_leaves_no_descriptor_behind(server: FakeServer) -> None:
    server.hello["schema_version"] = 9
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(rollpack.Unsupported):
            rollpack.connect(server.path)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < before + 10  # 20 leaks of 2 slots would be 40


def test_replies_are_matched_by_id_in_any_order(
    server: FakeServer, client: rollpack.Client
) -> None:
    held = []

    def hold_first(request: dict, fds: list[int]) -> None:
        held.append(request)
        if len(held) == 2:
            for each in reversed(held):
                reply = weights_reply(each["id"])
                server.send(encode_reply(each, reply))

    server.handlers["get_weight_version"] = hold_first
    results: dict[str, int] = {}

    def ask(name: str) -> None:
        results[name] = client.get_weight_version()

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
        while len(held) < len(results) + 1 and thread is threads[0]:
            time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert sorted(results.values()) == sorted(request["id"] for request in held)


def test_a_refusal_becomes_the_typed_error_with_all_its_parts(
    server: FakeServer, client: rollpack.Client
) -> None:
    server.handlers["submit"] = lambda request, fds: refusal(
        "would_block", field="queue", value="4096", origin="submit", allowed="4095", message="wait"
    )
    with pytest.raises(rollpack.WouldBlock) as error:
        client.submit([[1, 2]])
    assert str(error.value) == "queue = 4096 (submit): expected 4095; wait"
    assert (error.value.code, error.value.value) == ("would_block", "4096")


@pytest.mark.parametrize(
    ("code", "kind", "base"),
    [
        ("invalid_argument", rollpack.InvalidArgument, ValueError),
        ("unsupported", rollpack.Unsupported, Exception),
        ("not_found", rollpack.NotFound, Exception),
        ("failed_precondition", rollpack.FailedPrecondition, Exception),
        ("resource_exhausted", rollpack.ResourceExhausted, Exception),
        ("would_block", rollpack.WouldBlock, Exception),
        ("deadline_exceeded", rollpack.DeadlineExceeded, TimeoutError),
        ("data_loss", rollpack.DataLoss, Exception),
        ("unavailable", rollpack.Unavailable, ConnectionError),
        ("non_finite", rollpack.NonFinite, ArithmeticError),
        ("internal", rollpack.Internal, Exception),
        ("a code of next year", rollpack.Internal, Exception),
    ],
)
def test_each_code_has_a_class_that_survives_pickling(code: str, kind: type, base: type) -> None:
    error = error_from_map({"code": code, "field": "f", "message": "m"})
    assert type(error) is kind
    assert isinstance(error, base)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is kind
        assert str(twin) == "f: m"


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"field": "f", "value": "v", "origin": "o", "allowed": "a"}, "f = v (o): expected a"),
        ({"allowed": "a", "message": "m"}, "expected a; m"),
        ({"field": "f", "message": "m"}, "f: m"),
        ({"value": "v", "origin": "o"}, "v (o)"),
        ({"message": "m"}, "m"),
    ],
)
def test_error_texts_are_those_of_the_engine(parts: dict[str, str], text: str) -> None:
    assert str(error_from_map({"code": "internal", **parts})) == text


def test_a_silent_server_ends_in_a_deadline_that_names_it(
    server: FakeServer, client: rollpack.Client
) -> None:
    server.handlers["health"] = lambda request, fds: None
    begin = time.monotonic()
    with pytest.raises(rollpack.DeadlineExceeded) as error:
        client.health(timeout_s=0.2)
    assert time.monotonic() - begin < 5
    assert f"health = 0.2 s (server at {server.path}, pid {os.getpid()})" in str(error.value)


def test_a_late_reply_is_dropped_and_the_connection_goes_on(
    server: FakeServer, client: rollpack.Client
) -> None:
    late = []
    server.handlers["health"] = lambda request, fds: late.append(request)
    with pytest.raises(rollpack.DeadlineExceeded):
        client.health(timeout_s=0.05)
    server.send(encode_reply(late[0], {"status": "ok"}))
    server.handlers["health"] = lambda request, fds: {"status": "ok"}
    assert client.health() == "ok"


def test_a_server_that_dies_while_we_wait_is_an_error_not_a_hang(
    server: FakeServer, client: rollpack.Client
) -> None:
    server.handlers["next_batch"] = lambda request, fds: server.hang_up()
    with pytest.raises(rollpack.Unavailable, match=f"server = server at {server.path}.*went away"):
        client.next_batch(timeout_s=60)
    with pytest.raises(rollpack.Unavailable, match="went away"):
        client.health()


def test_every_waiting_thread_learns_of_the_servers_death(
    server: FakeServer, client: rollpack.Client
) -> None:
    for verb in ("health", "stats"):
        server.handlers[verb] = lambda request, fds: None
    errors: list[BaseException] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except rollpack.RollpackError as error:
            errors.append(error)

    threads = [threading.Thread(target=wait, args=(c,)) for c in (client.health, client.stats)]
    for thread in threads:
        thread.start()
    while len(server.verbs()) < 3:
        time.sleep(0.001)
    server.hang_up()
    for thread in threads:
        thread.join(10)
    assert [type(error) for error in errors] == [rollpack.Unavailable] * 2
    assert errors[0] is not errors[1]  # tracebacks of two threads do not mix


def test_a_reply_to_nothing_ends_the_connection_with_its_reason(
    server: FakeServer, client: rollpack.Client
) -> None:
    server.handlers["health"] = lambda request, fds: server.send(
        encode_reply({"id": 999}, {"status": "ok"})
    )
    with pytest.raises(rollpack.DataLoss, match="reply id = 999"):
        client.health()


def test_a_refused_frame_ends_the_connection_with_the_servers_words(
    server: FakeServer, client: rollpack.Client
) -> None:
    answer = refusal("invalid_argument", field="frame", message="depth beyond 16")
    server.handlers["health"] = lambda request, fds: server.send(encode_reply({"id": 0}, answer))
    with pytest.raises(rollpack.InvalidArgument, match="frame: depth beyond 16"):
        client.health()


def test_a_closed_client_says_so(server: FakeServer) -> None:
    client = rollpack.connect(server.path)
    client.close()
    client.close()
    with pytest.raises(rollpack.Unavailable, match="this client is closed"):
        client.stats()


def test_a_dropped_client_ends_its_connection_and_thread(server: FakeServer) -> None:
    # By identity: threads of earlier tests may end at any time.
    before = set(threading.enumerate())
    client = rollpack.connect(server.path)
    (thread,) = (t for t in set(threading.enumerate()) - before if t.name == "rollpack")
    del client
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_forked_child_gets_a_clear_error_and_the_parent_goes_on(
    server: FakeServer, client: rollpack.Client
) -> None:
    server.handlers["health"] = lambda request, fds: {"status": "ok"}
    text = in_child(client.health)
    assert text.startswith("WrongProcess: client = server at ")
    assert f"the connection belongs to process {os.getpid()}, from which this one, " in text
    assert client.health() == "ok"


def test_a_forked_child_may_open_a_connection_of_its_own(
    server: FakeServer, client: rollpack.Client, tmp_path: Path
) -> None:
    second = FakeServer(str(tmp_path / "second"))

    def connect_again() -> str:
        with rollpack.connect(second.path) as own:
            return own.info.fingerprint

    assert in_child(connect_again) == "'fake'"
    second.close()


def test_a_forked_child_holds_no_copy_of_the_socket(server: FakeServer) -> None:
    client = rollpack.connect(server.path)
    ready, release = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(release[1])
        os.write(ready[1], b"x")
        os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    client.close()
    again = rollpack.connect(server.path, timeout_s=10)  # served once the first saw its end
    again.close()
    os.close(release[1])
    os.waitpid(pid, 0)
    for fd in (*ready, release[0]):
        os.close(fd)


def test_a_forked_childs_exit_leaves_the_slot_with_the_parent(
    server: FakeServer, client: rollpack.Client
) -> None:
    batch = encode_batch(packed_columns())
    server.handlers["next_batch"] = lambda request, fds: server.deliver(0, batch)
    held = client.next_batch()
    assert in_child(held.release) == "None"
    assert "release" not in server.verbs()
    assert held["segment_ids"][0] == 0
    held.release()


def test_an_interrupted_wait_loses_no_batch(server: FakeServer, client: rollpack.Client) -> None:
    late = []
    server.handlers["next_batch"] = lambda request, fds: late.append(request)
    main_thread = threading.main_thread().ident
    timer = threading.Timer(0.2, signal.pthread_kill, [main_thread, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        client.next_batch()
    batch = encode_batch(packed_columns(), batch_seq=41)
    server.send(encode_reply(late[0], server.deliver(0, batch)))
    server.handlers["health"] = lambda request, fds: {"status": "ok"}
    assert client.health() == "ok"  # its reply comes after the batch's
    with client.next_batch() as found:
        assert found.batch_seq == 41


def test_many_threads_share_one_client(server: FakeServer, client: rollpack.Client) -> None:
    server.handlers["abort"] = lambda request, fds: {"num_aborted": request["request_id"]}
    wrong = []

    def ask(first: int) -> None:
        for value in range(first, first + 200):
            if client.abort(value) != value:
                wrong.append(value)

    threads = [threading.Thread(target=ask, args=(1000 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert len(server.requests) == 801
