"""Engines that give their memory back between steps of the trainer, and take it again."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pathlib
import signal
import time
from collections.abc import Iterator

import pytest
import rollpack
from engine_process import Job
from recovery_rig import (
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
from scrape import health, port_of, scrape_until
from tiny_models import TinyModel

# Weights of 36 MB, so that their memory can be told from all else.
WIDE = TinyModel("llama", {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4,
                           "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
                 seed=4)
PROMPTS = prompts_of(40)
NUM_SAMPLES = 3
MIB = 1 << 20


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random Llama whose weights are most of what a rank holds."""
    return WIDE.write(tmp_path_factory.mktemp("models") / "wide")


def _config(model: pathlib.Path, tmp_path: pathlib.Path, **engine: str | int) -> pathlib.Path:
    return write_server_config(model, tmp_path, n=NUM_SAMPLES, response_length=60, **engine)


def _resident(pid: int) -> int:
    """Memory of a process, shared memory that it maps included."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no memory")


def _shared_weights(pid: int) -> list[str]:
    """Weights of a process in shared memory: mapped, or open as a descriptor."""
    found = [line for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()
             if "rollpack-weights" in line]
    for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            continue
        if "rollpack-weights" in target:
            found.append(target)
    return found


@pytest.fixture(scope="module")
def undisturbed(wide_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What one rank makes of the prompts, always awake."""
    with rollpack.launch(_config(wide_model, tmp_path_factory.mktemp("undisturbed"))) as client:
        client.submit(PROMPTS)
        return take_rest(client, {}, len(PROMPTS) * NUM_SAMPLES)


@pytest.fixture(params=["on", "off"])
def job(request: pytest.FixtureRequest, wide_model: pathlib.Path,
        tmp_path: pathlib.Path) -> Iterator[Job]:
    """A server of two ranks, with one copy of the weights or one each, that survives deaths."""
    config = _config(wide_model, tmp_path, share_weights=request.param)
    with Job(["serve", "--config", config], num_ranks=2, recovers=True) as job:
        job.wait_until(socket_of(tmp_path).exists)
        yield job


def test_memory_goes_and_comes_back_and_no_bit_changes(
        job: Job, tmp_path: pathlib.Path, wide_model: pathlib.Path, undisturbed: Samples) -> None:
    weights = load_file(wide_model / "model.safetensors")
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    assert num_bytes > 30 * MIB
    pids = job.rank_pids()
    samples: Samples = {}
    with connect(tmp_path) as client:
        client.submit(PROMPTS[:30])
        take(client.next_batch(timeout_s=60), samples)
        awake = {rank: _resident(pid) for rank, pid in pids.items()}
        state = client.sleep()
        assert (state.asleep, state.needs_weights) == (("weights", "kv_cache"), False)
        held = state.held_bytes
        num_steps = client.stats()["num_steps"]
        client.submit(PROMPTS[30:])  # waits
        with pytest.raises(rollpack.FailedPrecondition, match="score = while asleep"):
            client.score([{"input_ids": [1], "response_ids": [2]}])
        time.sleep(0.2)
        assert client.stats()["num_steps"] == num_steps
        woken = client.wake_up(["kv_cache"])
        assert woken.asleep == ("weights",) and woken.held_bytes >= held + 2 * 60 * MIB
        assert client.wake_up().is_awake
        take_rest(client, samples, len(PROMPTS) * NUM_SAMPLES)
        assert samples == undisturbed

        state = client.sleep(level=2)
        asleep = {rank: _resident(pid) for rank, pid in pids.items()}
        for rank, pid in pids.items():
            assert asleep[rank] < awake[rank] - num_bytes + 4 * MIB, (rank, awake, asleep)
            assert _shared_weights(pid) == []
        assert state.held_bytes < held - num_bytes + 4 * MIB
        with pytest.raises(rollpack.FailedPrecondition, match="a whole update_weights"):
            client.submit(PROMPTS)
        with pytest.raises(rollpack.FailedPrecondition, match="while the weights sleep"):
            client.update_weights(weights, version=1)
        client.wake_up(["weights"])
        with pytest.raises(rollpack.FailedPrecondition, match="send all tensors"):
            client.update_weights({}, version=1, base_version=0)
        client.update_weights(weights, version=1)
        state = client.wake_up(["kv_cache"])
        assert state.is_awake and state.held_bytes >= held
        client.submit(PROMPTS)
        assert take_rest(client, {}, len(PROMPTS) * NUM_SAMPLES) == undisturbed
        for rank, pid in pids.items():
            assert _resident(pid) > asleep[rank] + num_bytes // 2
        end_well(job, client)


def _sleep_and_die(socket: pathlib.Path) -> None:
    client = rollpack.connect(socket)
    client.submit(PROMPTS)
    client.sleep(level=2, mode="wait")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_trainers_successor_wakes_the_job_and_a_lost_rank_is_replaced(
        job: Job, tmp_path: pathlib.Path, wide_model: pathlib.Path, undisturbed: Samples) -> None:
    trainer = multiprocessing.get_context("spawn").Process(
        target=_sleep_and_die, args=(socket_of(tmp_path),))
    trainer.start()
    trainer.join(60)
    assert trainer.exitcode == -signal.SIGKILL
    with connect(tmp_path) as client:
        assert client.stats()["is_asleep"] == 1
        samples: Samples = {}
        os.kill(job.rank_pids()[1], signal.SIGKILL)
        wait_for_workers(client, 1)
        assert sorted(job.rank_pids()) == [0], "nobody loads a model while the job sleeps"
        client.wake_up(["weights"])
        client.update_weights(load_file(wide_model / "model.safetensors"), version=1)
        assert client.wake_up().is_awake
        take_rest(client, samples, len(PROMPTS) * NUM_SAMPLES)
        assert samples == undisturbed
        wait_for_workers(client, 2)
        assert client.sleep(level=1).asleep and client.wake_up().is_awake
        end_well(job, client)


def test_ranks_of_one_replica_sleep_together_and_everybody_is_told(
        small_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = write_server_config(small_model, tmp_path, n=2, response_length=40,
                                 tensor_model_parallel_size=2)
    config.write_text(config.read_text() + "metrics:\n  port: 0\n")
    prompts = prompts_of(12)
    with Job(["serve", "--config", config], num_ranks=2, recovers=True) as job:
        client = wait_and_connect(job, tmp_path)
        port = port_of(client)
        client.submit(prompts)
        wanted = take_rest(client, {}, 24)
        client.submit(prompts)
        before = [_resident(pid) for pid in job.rank_pids().values()]

        async def sleep() -> rollpack.SleepState:
            async with await rollpack.aio.connect(socket_of(tmp_path)) as other:
                with pytest.raises(rollpack.InvalidArgument, match="level = 3"):
                    await other.sleep(3)
                return await other.sleep(2)

        state = asyncio.run(sleep())
        assert state.asleep == ("weights", "kv_cache") and state.needs_weights
        for pid, resident in zip(job.rank_pids().values(), before, strict=True):
            assert _resident(pid) < resident
        scrape_until(port, lambda metrics: metrics.labelled("engine_sleep_state", "sleep_state")
                     == {"awake": 0, "weights_offloaded": 0, "discard_all": 1})
        assert health(port)[1]["status"] == "asleep"
        samples: Samples = {}
        with pytest.raises(rollpack.DeadlineExceeded, match="wake_up"):
            while True:  # what had ended before
                take(client.next_batch(timeout_s=0), samples)
        assert not client.wake_up().is_awake
        client.update_weights(load_file(small_model / "model.safetensors"), version=1)
        assert take_rest(client, samples, 24) == wanted
        end_well(job, client)
