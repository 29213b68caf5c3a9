"""Ranks that are lost in the middle of their work: the job goes on, with the same samples.

Open MPI's own word counts for nothing here (it returns 0 whatever became of the ranks): what rank 0
says of its end in ROLLPACK_STATUS_FILE does.
"""

from __future__ import annotations

import os
import pathlib
import signal
import time
from collections.abc import Iterator

import pytest
import rollpack
from engine_process import Job, write_config
from recovery_rig import (
    LEASE_S,
    Samples,
    connect,
    end_well,
    prompts_of,
    socket_of,
    take,
    take_rest,
    wait_and_connect,
    wait_for_workers,
    write_server_config,
)
from safetensors.torch import load_file

PROMPTS = prompts_of(60)  # seconds of work in all
NUM_SAMPLES = 4


def _write_config(folder: pathlib.Path, tmp_path: pathlib.Path, **engine: str) -> pathlib.Path:
    return write_server_config(folder, tmp_path, n=NUM_SAMPLES, response_length=100, **engine)


def _take_rest(client: rollpack.Client, into: Samples) -> Samples:
    return take_rest(client, into, len(PROMPTS) * NUM_SAMPLES)


def _take_all(client: rollpack.Client) -> Samples:
    client.submit(PROMPTS)
    return _take_rest(client, {})


@pytest.fixture(scope="module")
def undisturbed(small_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What one rank makes of the prompts, left in peace."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    config = _write_config(small_model, tmp_path)
    with rollpack.launch(config) as client:
        return _take_all(client)


@pytest.fixture
def job(small_model: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Job]:
    """A server of three ranks that survives deaths."""
    config = _write_config(small_model, tmp_path)
    with Job(["serve", "--config", config], num_ranks=3, recovers=True) as job:
        job.wait_until(socket_of(tmp_path).exists)
        yield job
        assert job.wait_for_no_process() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_lost_rank_costs_nothing_but_time(number: int, job: Job, tmp_path: pathlib.Path,
                                            undisturbed: Samples) -> None:
    doomed = job.rank_pids()[1]
    with connect(tmp_path) as client:
        client.submit(PROMPTS)
        batch = client.next_batch(timeout_s=60)
        os.kill(doomed, number)  # at once: it is to have work left
        start = time.monotonic()
        samples: Samples = {}
        take(batch, samples)
        while client.stats()["num_worker_deaths"] < 1:
            assert time.monotonic() - start < LEASE_S + 3
            time.sleep(0.02)
        assert len(samples) < len(PROMPTS) * NUM_SAMPLES, "it was lost in the middle"
        assert _take_rest(client, samples) == undisturbed
        stats = client.stats()
        assert stats["num_worker_deaths"] == 1
        assert stats["num_groups_requeued"] > 0
        assert 1 not in job.rank_pids(), "a rank that was given up is killed"
        wait_for_workers(client, 3)
        end_well(job, client)


def test_both_ranks_and_a_replacement_are_lost(
        job: Job, tmp_path: pathlib.Path, undisturbed: Samples) -> None:
    with connect(tmp_path) as client:
        client.submit(PROMPTS)
        samples: Samples = {}
        for rank in (2, 1):
            take(client.next_batch(timeout_s=60), samples)
            os.kill(job.rank_pids()[rank], signal.SIGKILL)
        wait_for_workers(client, 3, num_deaths=2)
        assert sorted(job.rank_pids()) == [0, 3, 4]
        assert _take_rest(client, samples) == undisturbed
        # Others than the prompts that were with both: a third loss would convict those.
        client.submit(PROMPTS)
        samples = {}
        take(client.next_batch(timeout_s=60), samples)
        os.kill(job.rank_pids()[3], signal.SIGKILL)
        assert _take_rest(client, samples) == undisturbed
        wait_for_workers(client, 3, num_deaths=3)
        assert client.score([{"input_ids": [1, 2], "response_ids": [3]}] * 5)
        end_well(job, client)


@pytest.mark.parametrize("sharing", ["off", "on"])
def test_a_replacement_has_the_current_weights(
        sharing: str, small_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = _write_config(small_model, tmp_path, share_weights=sharing)
    tensors = load_file(small_model / "model.safetensors")
    new = {name: tensor * 0.5 for name, tensor in tensors.items()}
    part = {name: tensor * 0.9 for name, tensor in tensors.items() if "layers.1" in name}
    with (Job(["serve", "--config", config], num_ranks=2, recovers=True) as job,
          wait_and_connect(job, tmp_path) as client):
        client.update_weights(new, version=1)
        client.update_weights(part, version=2, base_version=1)
        undisturbed = _take_all(client)
        os.kill(job.rank_pids()[1], signal.SIGKILL)
        wait_for_workers(client, 2)
        assert _take_all(client) == undisturbed
        per_rank = client.score([{"input_ids": [5, 6], "response_ids": [7, 8]}] * 4)
        assert len({row.logprobs.tobytes() for row in per_rank}) == 1, "ranks take turns"
        client.update_weights(tensors, version=3)
        assert client.get_weight_version() == 3
        end_well(job, client)


def test_a_lost_rank_0_ends_the_job(job: Job, tmp_path: pathlib.Path) -> None:
    with connect(tmp_path) as client:
        client.submit(PROMPTS)
        os.kill(job.rank_pids()[0], signal.SIGKILL)
        with pytest.raises(rollpack.Unavailable):
            _take_rest(client, {})
    job.wait(timeout_s=30)
    assert job.rank_0_status == "running", "it could not say how it ended"


def test_a_start_that_fails_is_told_by_the_status_file(tmp_path: pathlib.Path) -> None:
    config = write_config(tmp_path / "config.yaml", {"model": {"path": tmp_path / "none"}})
    with Job(["serve", "--config", config], num_ranks=2, recovers=True) as job:
        job.wait(timeout_s=30)
        assert job.rank_0_status == "1"
        assert "not_found" in job.stderr
        assert job.wait_for_no_process() == []
