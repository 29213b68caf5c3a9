"""A server left alone with its faults: workers and trainers killed, weights updated, for as long as
told.

    .venv/bin/python tests/e2e/soak.py --minutes 60

A worker dies every --kill-s seconds (60), weights are updated every --update-s (20, to the same
tensors under a new version), the trainer is killed every --trainer-s (300) and another goes on from
its journal. Every sample must have the bytes that its prompt had before the first fault. Prints a
table of what happened; the exit status is 0 when nothing was lost, came twice or had other bytes.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import rollpack
from engine_process import Job
from recovery_rig import (
    MODEL,
    end_well,
    prompts_of,
    resident_bytes,
    socket_of,
    wait_and_connect,
    write_server_config,
)
from safetensors.torch import load_file
from soak_trainer import digests_of, learned_from

# Without ids of their own, so that one list may be under way several times.
PROMPTS = [prompt["input_ids"] for prompt in prompts_of(24)]
NUM_SAMPLES, RESPONSE_LENGTH, NUM_RANKS = 4, 48, 3
MAX_OPEN = 4 * len(PROMPTS) * NUM_SAMPLES
TRAINER = pathlib.Path(__file__).parent / "soak_trainer.py"
MIB = 1 << 20


@dataclass
class Counts:
    """What happened, and what may not have."""

    minutes: float = 0
    worker_kills: int = 0
    trainer_kills: int = 0
    updates: int = 0
    accepted: int = 0
    lost: int = 0
    twice: int = 0
    wrong_bytes: int = 0
    requeued_groups: int = 0
    replacements: int = 0
    redelivered_batches: int = 0
    memory_mib: float = 0
    memory_mib_per_minute: float = 0
    sizes: list[tuple[float, int]] = field(default_factory=list, repr=False)

    def is_clean(self) -> bool:
        """Whether every sample came once, and right."""
        return self.lost == self.twice == self.wrong_bytes == 0

    def table(self) -> str:
        """One line a count."""
        rows = [(name.replace("_", " "), value) for name, value in vars(self).items()
                if name != "sizes"]
        return "".join(f"| {name} | {value if isinstance(value, int) else round(value, 2)} |\n"
                       for name, value in rows)


class Soak:
    """One server, its client and its trainer."""

    def __init__(self, folder: pathlib.Path, job: Job, client: rollpack.Client) -> None:
        """Learns from the undisturbed server what samples must look like."""
        self.job, self.client = job, client
        self.journal = folder / "journal"
        self.socket = str(socket_of(folder))
        self.tensors = load_file(folder / "model" / "model.safetensors")
        self.counts = Counts()
        self.draw = random.Random(1)
        self.trainer: subprocess.Popen[bytes] | None = None
        self.version = 0
        client.submit(PROMPTS)
        self.right: dict[str, str] = {}
        while len(self.right) < len(PROMPTS) * NUM_SAMPLES:
            with client.next_batch(timeout_s=60) as batch:
                self.right.update({name: digest for _, name, digest in digests_of(batch)})

    def start_trainer(self) -> None:
        """Starts a trainer, which takes up the journal."""
        self.trainer = subprocess.Popen(
            [sys.executable, TRAINER, self.socket, str(self.journal)])

    def kill_trainer(self) -> None:
        """Kills it; it may be anywhere between two batches or in one."""
        assert self.trainer is not None
        assert self.trainer.poll() is None, "the trainer ended by itself"
        self.trainer.kill()
        self.trainer.wait()
        self.counts.trainer_kills += 1

    def kill_worker(self) -> None:
        """Kills a rank other than 0; at most one is on its way at a time."""
        ranks = {rank: pid for rank, pid in self.job.rank_pids().items() if rank > 0}
        os.kill(ranks[self.draw.choice(sorted(ranks))], signal.SIGKILL)
        self.counts.worker_kills += 1

    def update(self) -> None:
        """Switches to the same numbers under a new version."""
        self.version += 1
        self.client.update_weights(self.tensors, self.version)
        self.counts.updates += 1

    def submit(self) -> None:
        """Keeps the server full."""
        stats = self.client.stats()
        if stats["num_open_samples"] + stats["num_samples_held"] > MAX_OPEN:
            return
        self.client.submit(PROMPTS)
        self.counts.accepted += len(PROMPTS) * NUM_SAMPLES

    def run(self, seconds: float, every: dict[str, float]) -> None:
        """Lets things happen, each so often, and waits until what was accepted has come."""
        acts = {"kill": self.kill_worker, "update": self.update, "trainer": self.restart_trainer}
        start = time.monotonic()
        due = {name: start + period / 2 for name, period in every.items()}
        pid = self.job.rank_pids()[0]
        self.start_trainer()
        while (now := time.monotonic()) < start + seconds:
            self.submit()
            for name, act in acts.items():
                if now >= due[name]:
                    due[name] += every[name]
                    act()
            self.counts.sizes.append((now - start, resident_bytes(pid)))
            time.sleep(0.05)
        self.counts.minutes = (time.monotonic() - start) / 60
        self.settle()

    def restart_trainer(self) -> None:
        """One dies, another goes on."""
        self.kill_trainer()
        self.start_trainer()

    def settle(self) -> None:
        """Waits until nothing is owed any more, and counts."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            stats = self.client.stats()
            if not (stats["num_open_samples"] or stats["num_samples_held"]
                    or stats["num_slots_in_use"]):
                break
            time.sleep(0.1)
        assert self.trainer is not None
        self.trainer.kill()
        self.trainer.wait()
        learned = learned_from(self.journal)
        times = collections.Counter((request, name) for request, name, _ in learned)
        counts = self.counts
        counts.lost = counts.accepted - len(times)
        counts.twice = sum(count - 1 for count in times.values())
        counts.wrong_bytes = sum(self.right[name] != digest for _, name, digest in learned)
        counts.requeued_groups = int(stats["num_groups_requeued"])
        counts.replacements = int(stats["num_replacements"])
        counts.redelivered_batches = int(stats["num_batches_redelivered"])
        warm = [size for size in counts.sizes if size[0] > counts.minutes * 60 / 5]
        if len(warm) > 2:
            at, size = np.array(warm).T
            counts.memory_mib = float(size[-1]) / MIB
            counts.memory_mib_per_minute = float(np.polyfit(at / 60, size / MIB, 1)[0])


def soak(folder: pathlib.Path, seconds: float, every: dict[str, float]) -> Counts:
    """Runs a server in `folder` with its faults. Returns: what happened."""
    config = write_server_config(MODEL.write(folder / "model"), folder, n=NUM_SAMPLES,
                                 response_length=RESPONSE_LENGTH)
    with (Job(["serve", "--config", config], num_ranks=NUM_RANKS, recovers=True) as job,
          wait_and_connect(job, folder) as client):
        run = Soak(folder, job, client)
        try:
            run.run(seconds, every)
        finally:
            if run.trainer is not None:
                run.trainer.kill()
        end_well(job, client)
    return run.counts


def main() -> int:
    """Reads the command line, soaks, prints."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kill-s", type=float, default=60)
    parser.add_argument("--update-s", type=float, default=20)
    parser.add_argument("--trainer-s", type=float, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        counts = soak(pathlib.Path(folder), arguments.minutes * 60,
                      {"kill": arguments.kill_s, "update": arguments.update_s,
                       "trainer": arguments.trainer_s})
    print(counts.table(), end="")
    return 0 if counts.is_clean() else 1


if __name__ == "__main__":
    sys.exit(main())
