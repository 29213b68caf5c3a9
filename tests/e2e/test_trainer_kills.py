"""Trainers that are killed between delivery, step, checkpoint and acknowledgement."""

from __future__ import annotations

import json
import pathlib
import random
import signal
import subprocess
import sys

from doomed_trainer import PHASES
from engine_process import IS_FULL, Job
from recovery_rig import (
    end_well,
    num_open_fds,
    prompts_of,
    wait_and_connect,
    wait_for_stats,
    write_server_config,
)

NUM_KILLS = 204 if IS_FULL else 6
NUM_PROMPTS = 3 * NUM_KILLS + 12
SCRIPT = pathlib.Path(__file__).parent / "doomed_trainer.py"


def _train(*arguments: object) -> int:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], timeout=120,
                          check=False).returncode


def _learned(folder: pathlib.Path) -> dict[str, str]:
    return json.loads((folder / "checkpoint.json").read_text())["learned"]


def test_each_sample_is_learned_from_once_whenever_the_trainer_dies(
        small_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = write_server_config(small_model, tmp_path, n=2, response_length=12)
    folders = [tmp_path / "undisturbed", tmp_path / "disturbed"]
    draw = random.Random(7)
    with (Job(["serve", "--config", config]) as job,
          wait_and_connect(job, tmp_path) as client):
        socket = tmp_path / "s" / "rollpack.sock"
        pid = job.rank_pids()[0]
        for folder in folders:
            folder.mkdir()
        client.submit(prompts_of(NUM_PROMPTS))
        assert _train(socket, folders[0]) == 0
        wait_for_stats(client, lambda stats: stats["num_clients"] == 1)
        fds = num_open_fds(pid)
        client.submit(prompts_of(NUM_PROMPTS))
        for kill in range(NUM_KILLS):
            phase = PHASES[kill % len(PHASES)]
            assert _train(socket, folders[1], draw.randint(1, 3), phase) == -signal.SIGKILL
        assert _train(socket, folders[1]) == 0
        stats = wait_for_stats(client, lambda stats: stats["num_clients"] == 1)
        assert stats["num_slots_in_use"] == stats["num_samples_held"] == 0
        assert stats["num_batches_redelivered"] > 0
        assert num_open_fds(pid) == fds
        end_well(job, client)
    undisturbed, learned = map(_learned, folders)
    assert len(undisturbed) == 2 * NUM_PROMPTS
    assert learned == undisturbed
    # What came more than once came under the same number, with the same samples.
    deliveries: dict[int, dict[str, str]] = {}
    lines = (folders[1] / "deliveries").read_text().splitlines()
    for line in lines:
        seq, digests = json.loads(line)
        assert deliveries.setdefault(seq, digests) == digests
    assert len(lines) > len(deliveries), "a batch came again"
    names = [name for digests in deliveries.values() for name in digests]
    assert len(names) == len(set(names)) == 2 * NUM_PROMPTS, "under one number each"
