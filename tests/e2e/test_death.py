"""Ranks, mpirun and servers that are killed or asked to end, in the middle of their work."""

from __future__ import annotations

import os
import pathlib
import signal
import time

import pytest
import rollpack
from engine_process import (
    MODEL,
    Config,
    Job,
    read_jsonl,
    shared_files,
    wait_for_no_new_files,
    write_config,
    write_jsonl,
)

END_S = 5.0  # for a whole job after a rank died


@pytest.fixture
def base() -> Config:
    """Long work: far more than any test waits for."""
    return {"model": {"path": MODEL},
            "rollout": {"n": 8, "response_length": 4000, "ignore_eos": True},
            "engine": {"kv_cache_memory": "1GiB", "num_threads": 1},
            "bridge": {"slots": 2, "slot_bytes": "16MiB"}}


def _start_generating(base: Config, tmp_path: pathlib.Path, num_ranks: int) -> Job:
    config = write_config(tmp_path / "config.yaml", base)
    prompts = write_jsonl(tmp_path / "in.jsonl", [{"input_ids": [5, 6, 7]} for _ in range(16)])
    job = Job(["generate", "--config", config, "--prompts", prompts, "--output",
               tmp_path / "out.jsonl"], num_ranks=num_ranks)
    _wait_until_under_way(job, num_ranks)
    return job


def _wait_until_under_way(job: Job, num_ranks: int) -> None:
    """Waits until the model is loaded and all ranks have met; then a second for some samples."""
    job.wait_until(lambda: "KV pages" in job.stderr and len(job.rank_pids()) == max(1, num_ranks))
    job.wait_until(lambda: not any("/rollpack" in name for name in shared_files()))
    time.sleep(1)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_the_job_and_is_named(victim: int, base: Config,
                                                 tmp_path: pathlib.Path) -> None:
    with _start_generating(base, tmp_path, num_ranks=3) as job:
        os.kill(job.rank_pids()[victim], signal.SIGKILL)
        start = time.monotonic()
        assert job.wait(timeout_s=30) != 0
        assert time.monotonic() - start < END_S
        assert f"rank {victim}" in job.stderr
        assert job.wait_for_no_process() == []
    assert not (tmp_path / "out.jsonl").exists()


def test_a_killed_mpirun_leaves_no_process(base: Config, tmp_path: pathlib.Path) -> None:
    with _start_generating(base, tmp_path, num_ranks=2) as job:
        job.signal(signal.SIGKILL)
        job.wait(timeout_s=30)
        assert job.wait_for_no_process() == []
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("num_ranks", [0, 2])
def test_a_signal_hands_back_partial_samples(number: int, num_ranks: int, base: Config,
                                             tmp_path: pathlib.Path) -> None:
    with _start_generating(base, tmp_path, num_ranks=num_ranks) as job:
        job.signal(number)
        start = time.monotonic()
        status = job.wait(timeout_s=30)
        assert time.monotonic() - start < 2.0
        assert status == 128 + number if num_ranks == 0 else status != 0
        assert job.wait_for_no_process() == []
    samples = read_jsonl(tmp_path / "out.jsonl")
    assert {sample["finish_reason"] for sample in samples} == {"abort"}
    assert any(sample["response_ids"] for sample in samples)
    keys = [(sample["prompt_id"], sample["sample_index"]) for sample in samples]
    assert keys == sorted(set(keys))


def test_serve_ends_within_a_second_of_a_signal(base: Config, tmp_path: pathlib.Path) -> None:
    socket = tmp_path / "s" / "rollpack.sock"
    config = write_config(tmp_path / "config.yaml", base, {"bridge": {"socket": socket}})
    with Job(["serve", "--config", config], num_ranks=2) as job:
        job.wait_until(socket.exists)
        with rollpack.connect(socket) as client:
            client.submit([[5, 6, 7]], n=8)
            time.sleep(0.5)
            job.signal(signal.SIGTERM)
            start = time.monotonic()
            job.wait(timeout_s=30)
            assert time.monotonic() - start < 2.0
            with pytest.raises(rollpack.Unavailable):
                client.health()
        assert job.wait_for_no_process() == []
    assert not socket.exists()


def test_a_killed_rank_reaches_the_client_as_an_error(base: Config, tmp_path: pathlib.Path) -> None:
    socket = tmp_path / "s" / "rollpack.sock"
    config = write_config(tmp_path / "config.yaml", base, {"bridge": {"socket": socket}})
    with Job(["serve", "--config", config], num_ranks=2) as job:
        job.wait_until(socket.exists)
        with rollpack.connect(socket) as client:
            client.submit([[5, 6, 7]], n=8)
            os.kill(job.rank_pids()[1], signal.SIGKILL)
            start = time.monotonic()
            with pytest.raises(rollpack.RollpackError):
                client.next_batch(timeout_s=30)
            assert time.monotonic() - start < END_S
        assert job.wait(timeout_s=30) != 0
        assert "rank 1" in job.stderr
