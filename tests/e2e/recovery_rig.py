"""A server under faults: what it is asked for, what comes out, what it may not leave behind."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import rollpack
from engine_process import Config, Job, write_config
from tiny_models import TinyModel

# Steps of milliseconds.
MODEL = TinyModel("llama", {"hidden_size": 330, "intermediate_size": 800, "num_hidden_layers": 4,
                            "head_dim": 32}, seed=3)
LEASE_S = 5.0  # a starved machine may keep a rank from its CPU for a second or two
Key = tuple[str, int]
Samples = dict[Key, tuple[bytes, bytes]]


def prompts_of(count: int) -> list[dict[str, Any]]:
    """Returns prompts p0, p1, .. of three tokens each."""
    return [{"prompt_id": f"p{index}", "input_ids": [7 + index % 300, 50, 3 * index % 300]}
            for index in range(count)]


def write_server_config(folder: pathlib.Path, tmp_path: pathlib.Path, *, n: int,
                        response_length: int, lease_s: float = LEASE_S,
                        bridge: Mapping[str, Any] | None = None,
                        **engine: str | int) -> pathlib.Path:
    """Writes the configuration of a server of `folder`'s model, whose socket is under tmp_path."""
    layers: Config = {
        "model": {"path": folder},
        "rollout": {"n": n, "response_length": response_length, "ignore_eos": True},
        "engine": {"kv_cache_memory": "64MiB", "num_threads": 1, "max_num_seqs": 32, **engine},
        "bridge": {"slots": 2, "slot_bytes": "16MiB", "socket": socket_of(tmp_path),
                   **(bridge or {})},
        "cluster": {"lease_s": lease_s}}
    return write_config(tmp_path / "config.yaml", layers)


def socket_of(tmp_path: pathlib.Path) -> pathlib.Path:
    """Returns where the server of write_server_config(.., tmp_path) listens."""
    return tmp_path / "s" / "rollpack.sock"


def connect(tmp_path: pathlib.Path) -> rollpack.Client:
    """Connects to that server."""
    return rollpack.connect(socket_of(tmp_path))


def wait_and_connect(job: Job, tmp_path: pathlib.Path) -> rollpack.Client:
    """Likewise, once it listens."""
    job.wait_until(socket_of(tmp_path).exists)
    return connect(tmp_path)


def take(batch: rollpack.Batch, into: Samples) -> None:
    """Adds a batch's samples to those that came before; none may have come already."""
    with batch:
        assert not batch.failed, [failed.error for failed in batch.failed]
        for sample in batch.samples():
            key = (str(sample.prompt_id), sample.sample_index)
            assert key not in into, "a sample came twice"
            into[key] = (sample.response_ids.tobytes(), sample.rollout_log_probs.tobytes())


def take_rest(client: rollpack.Client, into: Samples, count: int) -> Samples:
    """Takes batches until `into` holds `count` samples, and returns it."""
    while len(into) < count:
        take(client.next_batch(timeout_s=60), into)
    return into


def wait_for_stats(client: rollpack.Client, happened: Callable[[dict[str, float]], bool],
                   timeout_s: float = 30.0) -> dict[str, float]:
    """Waits until the statistics say that something has happened, and returns them."""
    deadline = time.monotonic() + timeout_s
    while not happened(stats := client.stats()):
        assert time.monotonic() < deadline, stats
        time.sleep(0.02)
    return stats


def wait_for_workers(client: rollpack.Client, count: int, num_deaths: int = 1) -> None:
    """Waits until `num_deaths` were noticed and `count` workers are there."""
    wait_for_stats(client, lambda stats: stats["num_worker_deaths"] >= num_deaths
                   and stats["num_workers"] >= count)


def end_well(job: Job, client: rollpack.Client) -> None:
    """Asks the server to end; rank 0 must say that all went well, and no process may be left."""
    client.shutdown()
    job.wait(timeout_s=30)
    assert job.rank_0_status == "0"
    assert job.wait_for_no_process() == []


def num_open_fds(pid: int) -> int:
    """Returns how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    """Returns how much of a process lies in memory."""
    pages = pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def faults(entries: Iterable[tuple[str, int, str, int]]) -> str:
    """Returns ROLLPACK_FAULT for (point, count, action, rank)."""
    return ",".join(f"{point}:{count}:{action}@{rank}" for point, count, action, rank in entries)
