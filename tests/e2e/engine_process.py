"""Runs the rollpack program as a user does, alone or under mpirun, and sees what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BINARY = pathlib.Path(os.environ.get("ROLLPACK_BINARY", ROOT / "build" / "rollout" / "rollpack"))
MODEL = pathlib.Path(os.environ.get("ROLLPACK_MODEL", ROOT / "models" / "smollm2-135m"))
IS_FULL = os.environ.get("ROLLPACK_FULL", "0") == "1"

_MARK = "ROLLPACK_TEST_MARK"
Config = Mapping[str, Mapping[str, Any]]


def write_config(path: pathlib.Path, *layers: Config) -> pathlib.Path:
    """Writes a configuration; of two layers that set a key the later wins."""
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, fields in layer.items():
            merged.setdefault(section, {}).update(fields)
    # Strings unquoted, as people write them: 64MiB, not "64MiB".
    path.write_text("".join(
        f"{section}:\n" + "".join(
            f"  {key}: {value if isinstance(value, (str, pathlib.Path)) else json.dumps(value)}\n"
            for key, value in fields.items())
        for section, fields in merged.items()))
    return path


def write_jsonl(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> pathlib.Path:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Job:
    """A started program, in a process group of its own and marked, so that no child gets lost."""

    def __init__(self, arguments: Iterable[Any], *, num_ranks: int = 0,
                 recovers: bool = False, launcher: Iterable[str] = ()) -> None:
        """Starts it; num_ranks 0: without mpirun; recovers: deaths of ranks do not end it.

        `launcher`: what stands before the program, instead of all that.
        """
        self._mark = uuid.uuid4().hex
        command = [str(BINARY), *map(str, arguments)]
        if launcher:
            command = [*launcher, *command]
        elif num_ranks:
            command = ["mpirun", *(["--enable-recovery"] if recovers else []), "-n",
                       str(num_ranks), "--bind-to", "none", "--oversubscribe", *command]
        self._folder = tempfile.TemporaryDirectory(prefix="status-")
        self._status_path = pathlib.Path(self._folder.name) / "status"
        environment = {**os.environ, _MARK: self._mark, "OMPI_ALLOW_RUN_AS_ROOT": "1",
                       "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                       "ROLLPACK_STATUS_FILE": str(self._status_path)}
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log,
            env=environment, start_new_session=True)
        self.status: int | None = None  # set by run()

    @property
    def stderr(self) -> str:
        """What it has written so far."""
        # Opened anew: the descriptor itself shares its position with the program's.
        path = pathlib.Path(f"/proc/self/fd/{self._log.fileno()}")
        return path.read_text(errors="replace")

    @property
    def rank_0_status(self) -> str:
        """What rank 0 says of its end: "running" or its exit status."""
        return self._status_path.read_text().strip()

    def signal(self, number: int) -> None:
        """Sends a signal to the program, or to its mpirun, alone."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 120.0) -> int:
        """Waits for its end. Returns: the exit status.

        Raises: AssertionError with its output when it does not end in time.
        """
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {timeout_s} s:\n{self.stderr[-4000:]}") from None
        return self._process.returncode

    def rank_pids(self) -> dict[int, int]:
        """Returns the pid of each living rank, by rank; alone it is rank 0."""
        ranks = {}
        for pid in self.living_pids():
            environment = _environment_of(pid)
            if _program_of(pid) == str(BINARY.resolve()):
                # A replacement is told "PARENT RANK ..".
                joined = environment.get("ROLLPACK_JOIN", "").split()
                rank = joined[1] if joined else environment.get("OMPI_COMM_WORLD_RANK", 0)
                ranks[int(rank)] = pid
        return ranks

    def living_pids(self) -> list[int]:
        """Returns the processes that descend from this job, orphans too, zombies not."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if _environment_of(pid).get(_MARK) == self._mark]

    def wait_for_no_process(self, timeout_s: float = 5.0) -> list[int]:
        """Waits until none of its processes lives. Returns: those that still do."""
        deadline = time.monotonic() + timeout_s
        while (living := self.living_pids()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return living

    def wait_until(self, happened: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Waits for something that happens while it runs.

        Raises: AssertionError with its output when it ends before, or when time is up.
        """
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert self._process.poll() is None, f"it ended:\n{self.stderr[-4000:]}"
            assert time.monotonic() < deadline, f"not in {timeout_s} s:\n{self.stderr[-4000:]}"
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends whatever of it still lives; for clean-up."""
        for pid in self.living_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._process.wait(timeout=30)


def _environment_of(pid: int) -> dict[str, str]:
    try:
        entries = pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:  # ended, or not ours to read
        return {}
    return dict(entry.split("=", 1) for entry in entries.split("\0") if "=" in entry)


def _program_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except OSError:
        return ""


def run(*arguments: Any, num_ranks: int = 0, timeout_s: float = 120.0) -> Job:
    """Runs the program to its end. Returns: the ended job; see `status` and `stderr`."""
    with Job(arguments, num_ranks=num_ranks) as job:
        job.status = job.wait(timeout_s)
        left = job.wait_for_no_process()
    assert not left, f"processes {left} outlived {arguments}"
    return job


def run_well(*arguments: Any, num_ranks: int = 0, timeout_s: float = 120.0) -> Job:
    """As run(), and the exit status must be 0."""
    job = run(*arguments, num_ranks=num_ranks, timeout_s=timeout_s)
    assert job.status == 0, f"exit status {job.status} of {arguments}:\n{job.stderr[-4000:]}"
    return job


def generate(config: pathlib.Path, prompts: pathlib.Path, output: pathlib.Path, *,
             num_ranks: int = 0, timeout_s: float = 120.0) -> list[dict[str, Any]]:
    """Runs `rollpack generate`. Returns: its samples."""
    run_well("generate", "--config", config, "--prompts", prompts, "--output", output,
             num_ranks=num_ranks, timeout_s=timeout_s)
    return read_jsonl(output)


def score(config: pathlib.Path, sequences: pathlib.Path, output: pathlib.Path, *,
          num_ranks: int = 0, timeout_s: float = 120.0) -> list[dict[str, Any]]:
    """Runs `rollpack score`. Returns: one result a sequence."""
    run_well("score", "--config", config, "--sequences", sequences, "--output", output,
             num_ranks=num_ranks, timeout_s=timeout_s)
    return read_jsonl(output)


def shared_files() -> set[str]:
    """Returns what a job could leave behind in shared memory and in the temporary directory."""
    temporary = pathlib.Path(os.environ.get("TMPDIR", "/tmp"))
    return {str(path) for path in [*pathlib.Path("/dev/shm").glob("*"),
                                   *temporary.glob("rollpack*")]}


def wait_for_no_new_files(before: set[str], timeout_s: float = 3.0) -> set[str]:
    """Waits until nothing is there that was not before. Returns: what still is."""
    deadline = time.monotonic() + timeout_s
    while (new := shared_files() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return new
