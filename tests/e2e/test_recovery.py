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
from engine_process import Config, Job, shared_files, wait_for_no_new_files, write_config
from safetensors.torch import load_file
from tiny_models import TinyModel

# Steps of milliseconds and seconds of work in all.
MODEL = TinyModel("llama", {"hidden_size": 330, "intermediate_size": 800, "num_hidden_layers": 4,
                            "head_dim": 32}, seed=3)
PROMPTS = [{"prompt_id": f"p{index}", "input_ids": [7 + index, 50, 3 * index % 300]}
           for index in range(60)]
NUM_SAMPLES, RESPONSE_LENGTH = 4, 100
LEASE_S = 5.0  # a starved machine may keep a rank from its CPU for a second or two
Key = tuple[str, int]
Samples = dict[Key, tuple[bytes, bytes]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The model of all servers here."""
    return MODEL.write(tmp_path_factory.mktemp("models") / "small")


def _write_config(folder: pathlib.Path, tmp_path: pathlib.Path, **engine: str) -> pathlib.Path:
    layers: Config = {
        "model": {"path": folder},
        "rollout": {"n": NUM_SAMPLES, "response_length": RESPONSE_LENGTH, "ignore_eos": True},
        "engine": {"kv_cache_memory": "64MiB", "num_threads": 1, "max_num_seqs": 32,
                   **engine},
        "bridge": {"slots": 2, "slot_bytes": "16MiB", "socket": tmp_path / "s" / "rollpack.sock"},
        "cluster": {"lease_s": LEASE_S}}
    return write_config(tmp_path / "config.yaml", layers)


def _take(batch: rollpack.Batch, into: Samples) -> None:
    with batch:
        assert not batch.failed
        for sample in batch.samples():
            key = (str(sample.prompt_id), sample.sample_index)
            assert key not in into, "a sample came twice"
            into[key] = (sample.response_ids.tobytes(), sample.rollout_log_probs.tobytes())


def _take_rest(client: rollpack.Client, into: Samples) -> Samples:
    while len(into) < len(PROMPTS) * NUM_SAMPLES:
        _take(client.next_batch(timeout_s=60), into)
    return into


def _take_rest_of(client: rollpack.Client) -> Samples:
    client.submit(PROMPTS)
    return _take_rest(client, {})


@pytest.fixture(scope="module")
def undisturbed(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What one rank makes of the prompts, left in peace."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    config = _write_config(folder, tmp_path)
    with rollpack.launch(config) as client:
        client.submit(PROMPTS)
        return _take_rest(client, {})


@pytest.fixture
def job(folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Job]:
    """A server of three ranks that survives deaths."""
    config = _write_config(folder, tmp_path)
    with Job(["serve", "--config", config], num_ranks=3, recovers=True) as job:
        job.wait_until((tmp_path / "s" / "rollpack.sock").exists)
        yield job
        assert job.wait_for_no_process() == []


def _wait_and_connect(job: Job, tmp_path: pathlib.Path) -> rollpack.Client:
    job.wait_until((tmp_path / "s" / "rollpack.sock").exists)
    return _connect(tmp_path)


def _wait_for_workers(client: rollpack.Client, count: int, num_deaths: int = 1) -> None:
    """Waits until `num_deaths` were noticed and `count` workers are there."""
    deadline = time.monotonic() + 30
    while ((stats := client.stats())["num_worker_deaths"] < num_deaths
           or stats["num_workers"] < count):
        assert time.monotonic() < deadline, client.stats()
        time.sleep(0.02)


def _connect(tmp_path: pathlib.Path) -> rollpack.Client:
    return rollpack.connect(tmp_path / "s" / "rollpack.sock")


def _end_well(job: Job, client: rollpack.Client) -> None:
    client.shutdown()
    job.wait(timeout_s=30)
    assert job.rank_0_status == "0"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_lost_rank_costs_nothing_but_time(number: int, job: Job, tmp_path: pathlib.Path,
                                            undisturbed: Samples) -> None:
    with _connect(tmp_path) as client:
        client.submit(PROMPTS)
        samples: Samples = {}
        _take(client.next_batch(timeout_s=60), samples)
        os.kill(job.rank_pids()[1], number)
        start = time.monotonic()
        while client.stats()["num_worker_deaths"] < 1:
            assert time.monotonic() - start < LEASE_S + 3
            time.sleep(0.02)
        assert len(samples) < len(PROMPTS) * NUM_SAMPLES, "it was lost in the middle"
        assert _take_rest(client, samples) == undisturbed
        stats = client.stats()
        assert stats["num_worker_deaths"] == 1
        assert stats["num_groups_requeued"] > 0
        assert 1 not in job.rank_pids(), "a rank that was given up is killed"
        _wait_for_workers(client, 3)
        _end_well(job, client)


def test_both_ranks_and_a_replacement_are_lost(
        job: Job, tmp_path: pathlib.Path, undisturbed: Samples) -> None:
    with _connect(tmp_path) as client:
        client.submit(PROMPTS)
        samples: Samples = {}
        for rank in (2, 1):
            _take(client.next_batch(timeout_s=60), samples)
            os.kill(job.rank_pids()[rank], signal.SIGKILL)
        _wait_for_workers(client, 3, num_deaths=2)
        assert sorted(job.rank_pids()) == [0, 3, 4]
        os.kill(job.rank_pids()[3], signal.SIGKILL)
        assert _take_rest(client, samples) == undisturbed
        _wait_for_workers(client, 3, num_deaths=3)
        assert client.score([{"input_ids": [1, 2], "response_ids": [3]}] * 5)
        _end_well(job, client)


@pytest.mark.parametrize("sharing", ["off", "on"])
def test_a_replacement_has_the_current_weights(
        sharing: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = _write_config(folder, tmp_path, share_weights=sharing)
    tensors = load_file(folder / "model.safetensors")
    new = {name: tensor * 0.5 for name, tensor in tensors.items()}
    part = {name: tensor * 0.9 for name, tensor in tensors.items() if "layers.1" in name}
    with (Job(["serve", "--config", config], num_ranks=2, recovers=True) as job,
          _wait_and_connect(job, tmp_path) as client):
        client.update_weights(new, version=1)
        client.update_weights(part, version=2, base_version=1)
        undisturbed = _take_rest_of(client)
        os.kill(job.rank_pids()[1], signal.SIGKILL)
        _wait_for_workers(client, 2)
        assert _take_rest_of(client) == undisturbed
        per_rank = client.score([{"input_ids": [5, 6], "response_ids": [7, 8]}] * 4)
        assert len({row.logprobs.tobytes() for row in per_rank}) == 1, "ranks take turns"
        client.update_weights(tensors, version=3)
        assert client.get_weight_version() == 3
        _end_well(job, client)


def test_a_lost_rank_0_ends_the_job(job: Job, tmp_path: pathlib.Path) -> None:
    with _connect(tmp_path) as client:
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
