"""launch(): a server starts with its trainer and ends with it, however the trainer ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rollpack
from rollpack.launcher import find_binary

_TESTS = Path(__file__).parent
_PACKAGE = Path(rollpack.__file__).parents[1]

# What stands for the program: it takes the same arguments and speaks the same protocol.
_SERVE = """
    import os, signal, sys, threading
    sys.path.insert(0, {tests!r})
    from fake_server import FakeServer
    overrides = dict(pair.split("=", 1) for flag, pair in zip(sys.argv, sys.argv[1:])
                     if flag == "--set")
    open({log!r}, "a").write(f"{{os.getpid()}} {{' '.join(sys.argv[1:])}}\\n")
    server = FakeServer(overrides["bridge.socket"])
    is_over = threading.Event()
    server.handlers["health"] = lambda request, fds: {{"status": "ok"}}
    server.handlers["shutdown"] = lambda request, fds: is_over.set() or {{}}
    {before_ready}
    print("a line before", flush=True)
    print("ready", flush=True)
    print("a line after", file=sys.stderr, flush=True)
    {after_ready}
    is_over.wait()
    open({log!r}, "a").write("was asked to end\\n")
"""


class Program:
    """A script in the program's place, with what it noted of its runs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rollpack"
        self.log = folder / "log"
        self.config = folder / "config.yaml"
        self.config.write_text("model: {}\n")

    def write(self, *, before_ready: str = "pass", after_ready: str = "pass") -> None:
        code = textwrap.dedent(_SERVE).format(
            tests=str(_TESTS), log=str(self.log), before_ready=before_ready, after_ready=after_ready
        )
        self.path.write_text(f"#!{sys.executable}\n{code}")
        self.path.chmod(0o700)

    def launch(self, **arguments: object) -> rollpack.Client:
        return rollpack.launch(self.config, binary=self.path, **{"timeout_s": 60, **arguments})

    def pid(self) -> int:
        return int(self.log.read_text().split()[0])

    def has_ended(self) -> bool:
        try:
            os.kill(self.pid(), 0)
        except ProcessLookupError:
            return True
        return Path(f"/proc/{self.pid()}/stat").read_text().split()[2] == "Z"


@pytest.fixture
def program(tmp_path: Path) -> Program:
    made = Program(tmp_path)
    made.write()
    return made


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within 20 s."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_the_server_serves_and_is_asked_to_end(
    program: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    with program.launch() as client:
        assert client.health() == "ok"
        socket_path = Path(client.socket_path)
        assert socket_path.parent.stat().st_mode & 0o777 == 0o700
        assert not program.has_ended()
    assert program.has_ended()
    assert "was asked to end" in program.log.read_text()
    assert not socket_path.parent.exists()
    out, err = capfd.readouterr()
    assert out == ""
    assert sorted(err.splitlines()) == ["a line after", "a line before"]


def test_settings_reach_the_command_line(program: Program) -> None:
    settings = {"rollout.n": 4, "rollout.ignore_eos": True, "rollout.stop_token_ids": [1, 2]}
    with program.launch(set=settings):
        arguments = program.log.read_text()
    assert f"serve --config {program.config} --set rollout.n=4 --set rollout.ignore_eos=true " in (
        arguments
    )
    assert "--set rollout.stop_token_ids=[1, 2] --set bridge.socket=/" in arguments


def test_a_socket_of_ones_own_is_used(program: Program, tmp_path: Path) -> None:
    with program.launch(set=[f"bridge.socket={tmp_path}/own"]) as client:
        assert client.socket_path == f"{tmp_path}/own"


def test_several_ranks_run_under_mpirun(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpirun = tmp_path / "mpirun"
    environment = tmp_path / "environment"
    mpirun.write_text(
        f"""#!/bin/sh
{{ echo "$@"; env | grep OMPI; }} >{environment}
shift 6
exec "$@"
"""
    )
    mpirun.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with program.launch(num_ranks=3, mpirun=str(mpirun)) as client:
        assert client.health() == "ok"
    arguments, *variables = environment.read_text().splitlines()
    assert arguments.startswith(
        f"--enable-recovery --bind-to none --oversubscribe -n 3 {program.path} serve"
    )
    assert "OMPI_ALLOW_RUN_AS_ROOT=1" in variables
    assert "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1" in variables


def test_a_server_that_dies_during_start_leaves_its_code_and_last_words(program: Program) -> None:
    program.write(before_ready="sys.exit('model.path = nowhere: no such folder')")
    with pytest.raises(rollpack.Unavailable) as error:
        program.launch()
    assert f"server = {program.path} serve --config {program.config}" in str(error.value)
    assert "it ended before it was ready; exit code 1; its last lines:" in str(error.value)
    assert "model.path = nowhere: no such folder" in str(error.value)


@pytest.mark.parametrize(
    ("status", "how"), [("running", "its first rank was killed"), ("3", "exit code 3")]
)
def test_the_end_of_the_first_rank_counts_and_not_that_of_mpirun(
    status: str, how: str, program: Program
) -> None:
    program.write(
        before_ready=f"open(os.environ['ROLLPACK_STATUS_FILE'], 'w').write('{status}'); sys.exit(0)"
    )
    with pytest.raises(rollpack.Unavailable, match=f"before it was ready; {how}; it wrote nothing"):
        program.launch()


def test_a_server_killed_by_a_signal_is_described_by_its_name(program: Program) -> None:
    program.write(before_ready="os.kill(os.getpid(), signal.SIGABRT)")
    with pytest.raises(rollpack.Unavailable, match="killed by SIGABRT; it wrote nothing"):
        program.launch()


def test_a_server_that_is_not_ready_in_time_is_ended(program: Program) -> None:
    program.write(before_ready="print('reading', flush=True); threading.Event().wait()")
    with pytest.raises(rollpack.DeadlineExceeded) as error:
        program.launch(timeout_s=3)
    assert "launch = 3 s (" in str(error.value)
    assert "the server is not ready; its last lines:\n  reading" in str(error.value)
    assert program.has_ended()


def test_a_program_that_cannot_be_executed_dies_with_the_reason(program: Program) -> None:
    program.path.write_text("#!/nowhere/interpreter\n")
    with pytest.raises(rollpack.Unavailable, match="No such file or directory"):
        program.launch()


def test_a_server_that_ignores_polite_requests_is_killed(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollpack.launcher._STOP_TIMEOUT_S", 0.3)
    program.write(
        after_ready="signal.signal(signal.SIGTERM, signal.SIG_IGN); threading.Event().wait()"
    )
    client = program.launch()
    begin = time.monotonic()
    client.close()
    assert time.monotonic() - begin < 10
    assert program.has_ended()
    assert "was asked to end" not in program.log.read_text()


def test_a_server_that_dies_while_it_serves_is_described_by_the_next_call(
    program: Program,
) -> None:
    program.write(after_ready=f"open({str(program.log)!r}, 'a').write('has said all')")
    with program.launch() as client:
        deadline = time.monotonic() + 30
        while "has said all" not in program.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(program.pid(), signal.SIGKILL)
        with pytest.raises(rollpack.Unavailable) as error:
            client.next_batch(timeout_s=60)
    assert "it went away; killed by SIGKILL; its last lines:" in str(error.value)
    assert "a line after" in str(error.value)


def trainer(program: Program, then: str) -> subprocess.Popen[str]:
    """Start a trainer in a process of its own that launches the program and says so."""
    code = f"""
        import os, signal, sys, threading
        sys.path.insert(0, {str(_PACKAGE)!r})
        import rollpack
        client = rollpack.launch({str(program.config)!r}, binary={str(program.path)!r})
        print("launched", flush=True)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code) + then],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGABRT"])
def test_a_trainer_that_is_killed_takes_its_server_with_it(program: Program, name: str) -> None:
    process = trainer(program, "threading.Event().wait()")
    assert process.stdout.readline() == "launched\n"
    assert not program.has_ended()
    process.send_signal(signal.Signals[name])
    process.communicate(timeout=60)
    assert eventually(program.has_ended)


@pytest.mark.parametrize("then", ["pass", "sys.exit(3)", "raise ValueError", "del client"])
def test_a_trainer_that_ends_asks_its_server_to_end(program: Program, then: str) -> None:
    process = trainer(program, then)
    process.communicate(timeout=60)
    assert program.has_ended()
    assert "was asked to end" in program.log.read_text()


def test_a_server_outlives_the_thread_that_launched_it(program: Program) -> None:
    launched: list[rollpack.Client] = []
    thread = threading.Thread(target=lambda: launched.append(program.launch()))
    thread.start()
    thread.join(60)
    (client,) = launched
    time.sleep(0.5)
    assert client.health() == "ok"
    client.close()


def test_a_forked_childs_exit_leaves_the_server_alone(program: Program) -> None:
    process = trainer(
        program,
        "pid = os.fork()\n"
        "if pid == 0: sys.exit()\n"
        "os.waitpid(pid, 0)\n"
        "print(client.health(), flush=True)",
    )
    out, err = process.communicate(timeout=60)
    assert out == "launched\nok\n", err


def test_the_program_is_found_by_variable_path_or_build_folder(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("ROLLPACK_BINARY", raising=False)
    with pytest.raises(rollpack.NotFound, match="rollpack = not on the PATH: expected a program"):
        find_binary()
    built = tmp_path / "build" / "rollout" / "rollpack"
    built.parent.mkdir(parents=True)
    built.symlink_to(program.path)
    assert find_binary() == "./build/rollout/rollpack"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary() == str(program.path)
    monkeypatch.setenv("ROLLPACK_BINARY", str(built))
    assert find_binary() == str(built)
    assert find_binary(program.path) == str(program.path)
    monkeypatch.setenv("ROLLPACK_BINARY", "/nowhere/rollpack")
    with pytest.raises(rollpack.NotFound, match="ROLLPACK_BINARY = /nowhere/rollpack: no such pr"):
        find_binary()


def test_what_is_wrong_with_a_launch_is_said_before_anything_starts(program: Program) -> None:
    with pytest.raises(rollpack.NotFound, match="config = /nowhere.yaml: no such file"):
        rollpack.launch("/nowhere.yaml", binary=program.path)
    with pytest.raises(rollpack.NotFound, match="binary = /nowhere: no such program"):
        rollpack.launch(program.config, binary="/nowhere")
    with pytest.raises(rollpack.NotFound, match="mpirun = /nowhere: no such program"):
        program.launch(num_ranks=2, mpirun="/nowhere")
    with pytest.raises(rollpack.InvalidArgument, match="num_ranks = 0: expected at least 1"):
        program.launch(num_ranks=0)
    with pytest.raises(rollpack.InvalidArgument, match="set = rollout.n: expected"):
        program.launch(set=["rollout.n"])
    assert not program.log.exists()
