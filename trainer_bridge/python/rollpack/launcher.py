"""Starting a server for a trainer, and making sure that it ends with it.

The server is a child of one thread that lives as long as the child does: Linux ties
PR_SET_PDEATHSIG to the thread that forked. So whatever ends the trainer, SIGKILL included, also
ends the server.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from rollpack.client import Client
from rollpack.errors import DeadlineExceeded, InvalidArgument, NotFound, RollpackError, Unavailable
from rollpack.session import Opening

_NUM_TAIL_LINES = 20
_SHUTDOWN_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 5.0

# Runs between fork and exec in place of preexec_fn, which may deadlock in a threaded process.
_DIE_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {signal.SIGTERM.value})  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def launch(
    config: str | os.PathLike[str],
    *,
    num_ranks: int = 1,
    set: Mapping[str, object] | Iterable[str] | None = None,
    binary: str | os.PathLike[str] | None = None,
    mpirun: str = "mpirun",
    timeout_s: float = 300.0,
) -> Client:
    """Start `rollpack serve`, wait until it is ready and connect to it.

    Several ranks run under `mpirun --enable-recovery`: a rank that dies does not end the others.
    The server ends when the client is closed, at exit, and when this process dies in any other way.
    Its output goes to stderr. Unless `set` names bridge.socket, the socket lies in a private
    temporary directory, so that several trainers may launch at once.

    Args:
        config: YAML file of the server.
        num_ranks: ranks; 1 runs the binary without mpirun.
        set: keys that override the file's, {"rollout.n": 8} or ["rollout.n=8"].
        binary: the rollpack program; None takes ROLLPACK_BINARY, the PATH, build/rollout/rollpack.
        mpirun: the launcher of several ranks.
        timeout_s: longest start, seconds; it includes reading the weights.

    Returns:
        A client, whose `close()` also stops the server.

    Raises:
        NotFound: there is no such program or configuration.
        Unavailable: the server ended before it was ready; has its exit code and last lines.
        DeadlineExceeded: it was not ready in time.
    """
    if num_ranks < 1:
        raise InvalidArgument(field="num_ranks", value=str(num_ranks), allowed="at least 1")
    overrides = _overrides(set)
    program = find_binary(binary)
    if not Path(config).is_file():
        raise NotFound("no such file", field="config", value=os.fspath(config))
    with contextlib.ExitStack() as on_error:
        directory = tempfile.mkdtemp(prefix="rollpack-")
        on_error.callback(shutil.rmtree, directory, ignore_errors=True)
        socket_path = overrides.setdefault(
            "bridge.socket", os.path.join(directory, "rollpack.sock")
        )
        command = [program, "serve", "--config", os.fspath(config)]
        for key, value in overrides.items():
            command += ["--set", f"{key}={value}"]
        if num_ranks > 1:
            ranks = ["-n", str(num_ranks)]
            command = [
                _program("mpirun", mpirun),
                "--enable-recovery",
                "--bind-to",
                "none",
                "--oversubscribe",
                *ranks,
                *command,
            ]
        server = ServerProcess(command, os.path.join(directory, "status"))
        on_error.callback(server.stop)
        server.wait_until_ready(timeout_s)
        client = LaunchedClient(socket_path, server, directory)
        on_error.pop_all()
        return client


class LaunchedClient(Client):
    """A client that owns its server."""

    def __init__(self, socket_path: str, server: ServerProcess, directory: str) -> None:
        """Connect to a server that is ready; its end and its directory's come with `close()`."""
        super().__init__(Opening(socket_path, describe_server=server.describe_end))
        # Finalizers run youngest first at exit: the server is asked before the connection ends.
        self._stop = weakref.finalize(
            self, _stop_server, os.getpid(), self._connection, self._finalizer, server, directory
        )

    def close(self) -> None:
        """Stop the server: the shutdown verb, then SIGTERM, then SIGKILL."""
        stop = getattr(self, "_stop", None)  # absent when hello failed
        if stop is not None:
            stop()
        super().close()


def _stop_server(
    owner_pid: int, connection: Any, end_connection: Any, server: ServerProcess, directory: str
) -> None:
    if os.getpid() != owner_pid:  # a forked child's copy of the finalizer
        return
    if connection.is_open:
        with contextlib.suppress(RollpackError):
            connection.request("shutdown", {}, _SHUTDOWN_TIMEOUT_S)
            server.wait(_STOP_TIMEOUT_S)
    end_connection()
    server.stop()
    shutil.rmtree(directory, ignore_errors=True)


class ServerProcess:
    """A server, or the mpirun of one, with the last lines it wrote."""

    def __init__(self, command: list[str], status_path: str) -> None:
        """Start it.

        Args:
            command: program and arguments.
            status_path: file for the exit status of its first rank; mpirun returns 0 whatever
                became of the ranks.

        Raises:
            Unavailable: it cannot be started.
        """
        self._command = command
        self._status_path = status_path
        self._tail: deque[str] = deque(maxlen=_NUM_TAIL_LINES)
        self._news: queue.SimpleQueue[str | OSError] = queue.SimpleQueue()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run, name="rollpack-server", daemon=True)
        self._thread.start()
        started = self._news.get()
        if isinstance(started, OSError):
            raise Unavailable(str(started), field="server", value=shlex.join(command)) from started

    def _run(self) -> None:
        shim = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        try:
            process = subprocess.Popen(
                shim + self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**_environment(), "ROLLPACK_STATUS_FILE": self._status_path},
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches the trainer, which then stops the server
            )
        except OSError as error:
            self._news.put(error)
            return
        self._process = process
        self._news.put("started")
        reader = threading.Thread(target=self._forward, args=(process.stderr,), daemon=True)
        reader.start()
        self._forward(process.stdout)
        process.wait()
        reader.join(1.0)
        self._news.put("ended")

    def _forward(self, stream: IO[str] | None) -> None:
        assert stream is not None
        is_stdout = stream is self._started().stdout
        for line in stream:
            if is_stdout and line.strip() == "ready":
                self._news.put("ready")
                continue
            self._tail.append(line.rstrip("\n"))
            with contextlib.suppress(OSError, ValueError):  # our own stderr is closed
                sys.stderr.write(line)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait for the line `ready`.

        Raises:
            Unavailable: the server ended first.
            DeadlineExceeded: neither came in time.
        """
        try:
            news = self._news.get(timeout=timeout_s)
        except queue.Empty:
            raise DeadlineExceeded(
                f"the server is not ready; {self._last_lines()}",
                field="launch",
                value=f"{timeout_s:g} s",
                origin=shlex.join(self._command),
            ) from None
        if news != "ready":
            raise Unavailable(
                f"it ended before it was ready; {self.describe_end()}",
                field="server",
                value=shlex.join(self._command),
            )

    def wait(self, timeout_s: float) -> bool:
        """Wait for the process to end; whether it did."""
        try:
            self._started().wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """End the process: SIGTERM, and SIGKILL to its group where that does not help."""
        process = self._started()
        if process.poll() is None:
            process.terminate()
            if not self.wait(_STOP_TIMEOUT_S):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(
                        process.pid, signal.SIGKILL
                    )  # start_new_session: its pid is the group
                self.wait(_STOP_TIMEOUT_S)
        self._thread.join(_STOP_TIMEOUT_S)

    def describe_end(self) -> str:
        """How the process ended, with its last lines, for an error's text."""
        if not self.wait(1.0):
            return "its process still runs"
        self._thread.join(1.0)  # the last lines may still be in the pipe
        return f"{self._how_it_ended()}; {self._last_lines()}"

    def _how_it_ended(self) -> str:
        try:
            status = Path(self._status_path).read_text(encoding="ascii").strip()
        except OSError:  # it ended before it could write
            status = ""
        code = self._started().returncode
        if status.isdigit():
            return f"exit code {status}"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if status == "running" and code == 0:
            return "its first rank was killed"
        return f"exit code {code}"

    def _last_lines(self) -> str:
        return "its last lines:\n  " + "\n  ".join(self._tail) if self._tail else "it wrote nothing"

    def _started(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process


def find_binary(binary: str | os.PathLike[str] | None = None) -> str:
    """Find the rollpack program: argument, ROLLPACK_BINARY, PATH, ./build/rollout/rollpack.

    Raises:
        NotFound: none of them is a program.
    """
    if binary is not None:
        return _program("binary", os.fspath(binary))
    if "ROLLPACK_BINARY" in os.environ:
        return _program("ROLLPACK_BINARY", os.environ["ROLLPACK_BINARY"])
    found = shutil.which("rollpack") or shutil.which("./build/rollout/rollpack")
    if found is None:
        raise NotFound(
            "build it, then name it by argument or ROLLPACK_BINARY",
            field="rollpack",
            value="not on the PATH",
            allowed="a program, or build/rollout/rollpack in the working directory",
        )
    return found


def _program(field: str, name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise NotFound("no such program", field=field, value=name)
    return found


def _overrides(pairs: Mapping[str, object] | Iterable[str] | None) -> dict[str, str]:
    if isinstance(pairs, Mapping):
        return {key: _yaml_text(value) for key, value in pairs.items()}
    overrides = {}
    for pair in pairs or ():
        key, separator, value = pair.partition("=")
        if not separator:
            raise InvalidArgument(field="set", value=pair, allowed='"section.key=value"')
        overrides[key] = value
    return overrides


def _yaml_text(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_yaml_text, value)) + "]"
    return str(value)


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    if os.geteuid() == 0:
        environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return environment
