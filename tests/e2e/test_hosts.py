"""Ranks on two hosts: the same samples as on one, and what becomes of them when the link is lost.

Hosts are network namespaces of this machine; where it lets none be made, these tests are skipped.
"""

from __future__ import annotations

import pathlib
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
import rollpack
import torch
from engine_process import Job
from hosts import Hosts, why_impossible
from recovery_rig import (
    MODEL,
    Samples,
    prompts_of,
    take,
    take_rest,
    wait_and_connect,
    wait_for_stats,
    write_server_config,
)
from safetensors.torch import load_file

WHY_IMPOSSIBLE = why_impossible()
pytestmark = pytest.mark.skipif(bool(WHY_IMPOSSIBLE),
                                reason=f"no network namespaces here: {WHY_IMPOSSIBLE}")

PROMPTS = prompts_of(40)
# Long enough for ranks to be in the midst of them when the link is cut.
NUM_SAMPLES, RESPONSE_LENGTH = 4, 160
LEASE_S = 3.0
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The model of all servers here."""
    return MODEL.write(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def new_weights(folder: pathlib.Path) -> Tensors:
    """What the model is updated to."""
    return {name: tensor * 0.5 for name, tensor in load_file(folder / "model.safetensors").items()}


def _write_config(folder: pathlib.Path, tmp_path: pathlib.Path, **engine: str) -> pathlib.Path:
    return write_server_config(folder, tmp_path, n=NUM_SAMPLES, response_length=RESPONSE_LENGTH,
                               lease_s=LEASE_S, max_num_seqs=16, **engine)


@pytest.fixture(scope="module")
def undisturbed(folder: pathlib.Path, new_weights: Tensors,
                tmp_path_factory: pytest.TempPathFactory) -> dict[int, Samples]:
    """What one rank on one host makes of the prompts, by weight version."""
    config = _write_config(folder, tmp_path_factory.mktemp("undisturbed"))
    with rollpack.launch(config) as client:
        first = _take_all(client)
        client.update_weights(new_weights, version=1)
        return {0: first, 1: _take_all(client)}


@pytest.fixture
def hosts(tmp_path: pathlib.Path) -> Iterator[Hosts]:
    """Two hosts with nothing running on them."""
    with Hosts(tmp_path) as hosts:
        yield hosts


def _serve(hosts: Hosts, folder: pathlib.Path, tmp_path: pathlib.Path, **engine: str) -> Job:
    config = _write_config(folder, tmp_path, **engine)
    return Job(["serve", "--config", config], launcher=hosts.launcher(num_ranks=4))


def _take_rest(client: rollpack.Client, into: Samples) -> Samples:
    return take_rest(client, into, len(PROMPTS) * NUM_SAMPLES)


def _take_all(client: rollpack.Client) -> Samples:
    client.submit(PROMPTS)
    return _take_rest(client, {})


def _remote_ranks(job: Job, hosts: Hosts) -> list[int]:
    return [rank for rank, pid in job.rank_pids().items() if hosts.is_on_another(pid)]


def _wait_for_deaths(client: rollpack.Client, count: int) -> dict[str, float]:
    """Waits out leases: one that held nothing at the cut owes its first answer only afterwards."""
    return wait_for_stats(client, lambda stats: stats["num_worker_deaths"] >= count,
                          timeout_s=2 * LEASE_S + 3)


def _wait_until_remote_ranks_have_ended(job: Job, hosts: Hosts) -> None:
    deadline = time.monotonic() + 2 * LEASE_S + 3
    while _remote_ranks(job, hosts):
        assert time.monotonic() < deadline, "they do not notice that they were cut off"
        time.sleep(0.05)


def _end_well(job: Job, client: rollpack.Client) -> None:
    client.shutdown()
    job.wait(timeout_s=30)
    assert job.rank_0_status == "0"


@pytest.mark.parametrize("sharing", ["off", "on"])
def test_two_hosts_make_the_samples_of_one(
        sharing: str, hosts: Hosts, folder: pathlib.Path, tmp_path: pathlib.Path,
        new_weights: Tensors, undisturbed: dict[int, Samples]) -> None:
    with (_serve(hosts, folder, tmp_path, share_weights=sharing) as job,
          wait_and_connect(job, tmp_path) as client):
        assert sorted(_remote_ranks(job, hosts)) == [2, 3]
        assert _take_all(client) == undisturbed[0]
        before = hosts.num_bytes_sent()
        client.update_weights(new_weights, version=1)
        num_bytes = sum(tensor.nbytes for tensor in new_weights.values())
        assert num_bytes < hosts.num_bytes_sent() - before < 1.5 * num_bytes, "once a host"
        assert _take_all(client) == undisturbed[1]
        # Scores are shared out over the ranks in turn.
        scores = client.score([{"input_ids": [5, 6], "response_ids": [7, 8]}] * 8)
        assert len({row.logprobs.tobytes() for row in scores}) == 1
        stats = client.stats()
        assert (stats["num_workers"], stats["num_worker_deaths"]) == (4, 0)
        _end_well(job, client)
        assert job.wait_for_no_process() == []


def test_weights_leave_rank_0_once_however_many_hosts_there_are(
        folder: pathlib.Path, tmp_path: pathlib.Path, new_weights: Tensors,
        undisturbed: dict[int, Samples]) -> None:
    config = _write_config(folder, tmp_path)
    with (Hosts(tmp_path, num_hosts=4) as hosts,
          Job(["serve", "--config", config], launcher=hosts.launcher(num_ranks=5, map_by="node"))
          as job, wait_and_connect(job, tmp_path) as client):
        assert sorted(_remote_ranks(job, hosts)) == [1, 2, 3]
        before = hosts.num_bytes_sent()
        client.update_weights(new_weights, version=1)
        num_bytes = sum(tensor.nbytes for tensor in new_weights.values())
        assert num_bytes < hosts.num_bytes_sent() - before < 1.5 * num_bytes
        assert _take_all(client) == undisturbed[1]
        assert client.stats()["num_workers"] == 5
        _end_well(job, client)


def test_a_host_that_is_cut_off_in_mid_sample_costs_nothing_but_time(
        hosts: Hosts, folder: pathlib.Path, tmp_path: pathlib.Path, new_weights: Tensors,
        undisturbed: dict[int, Samples]) -> None:
    with _serve(hosts, folder, tmp_path) as job, wait_and_connect(job, tmp_path) as client:
        samples: Samples = {}
        client.submit(PROMPTS)
        take(client.next_batch(num_groups=1, timeout_s=60), samples)  # all ranks are at work
        # Cutting takes up to a second beside ranks at work, in which they could end it.
        client.pause("keep")
        hosts.cut()
        client.resume()
        assert _take_rest(client, samples) == undisturbed[0]
        stats = _wait_for_deaths(client, 2)
        assert (stats["num_workers"], stats["num_worker_deaths"]) == (2, 2)
        assert stats["num_groups_requeued"] > 0
        hosts.mend()  # what the lost ranks have yet to say comes too late
        client.update_weights(new_weights, version=1)
        assert _take_all(client) == undisturbed[1]
        _wait_until_remote_ranks_have_ended(job, hosts)
        _end_well(job, client)


@pytest.mark.parametrize("sharing", ["off", "on"])
def test_a_host_that_is_cut_off_in_mid_update_does_not_stop_it(
        sharing: str, hosts: Hosts, folder: pathlib.Path, tmp_path: pathlib.Path,
        new_weights: Tensors, undisturbed: dict[int, Samples]) -> None:
    with (_serve(hosts, folder, tmp_path, share_weights=sharing) as job,
          wait_and_connect(job, tmp_path) as client):
        num_bytes = sum(tensor.nbytes for tensor in new_weights.values())
        try:
            hosts.slow_down(num_bytes // 4)  # four seconds of sending
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no slow network here: {error.stderr}")
        before = hosts.num_bytes_sent()
        update = threading.Thread(
            target=lambda: client.update_weights(new_weights, version=1, timeout_s=60))
        update.start()
        while hosts.num_bytes_sent() - before < num_bytes // 4:
            time.sleep(0.02)
        assert update.is_alive(), "in the middle of it"
        hosts.cut()
        update.join(timeout=60)
        assert client.get_weight_version() == 1
        assert _take_all(client) == undisturbed[1]
        stats = _wait_for_deaths(client, 2)
        assert (stats["num_workers"], stats["num_worker_deaths"]) == (2, 2)
        # mpirun would wait for ever for its word from the other host.
        _end_well(job, client)
        _wait_until_remote_ranks_have_ended(job, hosts)


def test_ranks_that_cannot_reach_rank_0_are_named(hosts: Hosts, folder: pathlib.Path,
                                                  tmp_path: pathlib.Path) -> None:
    config = _write_config(folder, tmp_path)
    with Job(["serve", "--config", config, "--set", "cluster.interface=lo"],
             launcher=hosts.launcher(num_ranks=3)) as job:
        job.wait(timeout_s=45)
        assert job.rank_0_status == "1"
        assert f"rank 2 on {hosts.names[1]} = cannot reach rank 0" in job.stderr
        assert "127.0.0.1" in job.stderr
        assert "cluster.interface" in job.stderr
