"""A bridge on every host: trainers get at their own host what they asked for there.

Hosts are network namespaces of this machine; where it lets none be made, these tests are skipped.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import rollpack
from engine_process import Job
from hosts import Hosts, why_impossible
from recovery_rig import (
    MODEL,
    Samples,
    end_well,
    prompts_of,
    take,
    take_rest,
    wait_for_stats,
    write_server_config,
)

WHY_IMPOSSIBLE = why_impossible()
pytestmark = pytest.mark.skipif(bool(WHY_IMPOSSIBLE),
                                reason=f"no network namespaces here: {WHY_IMPOSSIBLE}")

PROMPTS = prompts_of(16)
NUM_SAMPLES, RESPONSE_LENGTH = 3, 160
COUNT = len(PROMPTS) * NUM_SAMPLES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The model of all servers here."""
    return MODEL.write(tmp_path_factory.mktemp("models") / "small")


def _write_config(folder: pathlib.Path, tmp_path: pathlib.Path, max_num_seqs: int = 16,
                  **bridge: str) -> pathlib.Path:
    return write_server_config(folder, tmp_path, n=NUM_SAMPLES, response_length=RESPONSE_LENGTH,
                               lease_s=3.0, max_num_seqs=max_num_seqs, bridge=bridge)


@pytest.fixture(scope="module")
def undisturbed(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What one rank with one bridge makes of the prompts."""
    config = _write_config(folder, tmp_path_factory.mktemp("undisturbed"))
    with rollpack.launch(config) as client:
        client.submit(PROMPTS)
        return take_rest(client, {}, COUNT)


@pytest.fixture
def hosts(tmp_path: pathlib.Path) -> Iterator[Hosts]:
    """Two hosts with nothing running on them."""
    with Hosts(tmp_path) as hosts:
        yield hosts


def _serve(hosts: Hosts, folder: pathlib.Path, tmp_path: pathlib.Path, max_num_seqs: int = 16,
           launcher: Sequence[str] = (), **settings: object) -> Job:
    """Starts four ranks, or what `launcher` starts; `settings` are of the section `cluster`."""
    config = _write_config(folder, tmp_path, max_num_seqs, endpoints="per_node",
                           socket=str(tmp_path / "s" / "{host}.sock"))
    for path in _sockets(hosts, tmp_path):
        path.unlink(missing_ok=True)  # of a job that was killed
    options = [part for name, value in settings.items()
               for part in ("--set", f"cluster.{name}={value}")]
    return Job(["serve", "--config", config, *options],
               launcher=launcher or hosts.launcher(num_ranks=4))


def _sockets(hosts: Hosts, tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return [tmp_path / "s" / f"{name}.sock" for name in hosts.names]


def _connect(job: Job, hosts: Hosts, tmp_path: pathlib.Path,
             states: Sequence[dict[str, Any] | None] = ()) -> list[rollpack.Client]:
    """Connects one trainer to each host's bridge; `states`: what they go on from."""
    paths = _sockets(hosts, tmp_path)
    job.wait_until(lambda: all(path.exists() for path in paths))
    return [rollpack.connect(path, resume=state)
            for path, state in zip(paths, states or [None] * len(paths), strict=True)]


def _slots_of(pid: int) -> set[int]:
    """The memory of slots that a process has, by inode."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            path = f"/proc/{pid}/fd/{name}"
            if os.readlink(path).startswith("/memfd:rollpack-slot"):
                found.add(os.stat(path).st_ino)
    return found


def _contents(batch: rollpack.Batch) -> list[bytes]:
    return [batch[name].tobytes()
            for name in ("input_ids", "cu_seqlens", "request_id", "rollout_log_probs")]


def test_each_host_gets_what_it_asked_for(hosts: Hosts, folder: pathlib.Path,
                                          tmp_path: pathlib.Path, undisturbed: Samples) -> None:
    with _serve(hosts, folder, tmp_path) as job:
        here, there = _connect(job, hosts, tmp_path)
        with here, there:
            there.submit(PROMPTS)
            assert take_rest(there, {}, COUNT) == undisturbed
            here.submit(PROMPTS[:8])
            there.submit(PROMPTS[8:])
            mine, theirs = take_rest(here, {}, COUNT // 2), take_rest(there, {}, COUNT // 2)
            assert len({*mine, *theirs}) == COUNT
            assert {**mine, **theirs} == undisturbed
            pids = job.rank_pids()
            slots = [_slots_of(pids[rank]) for rank in range(4)]
            assert len(slots[0]) == len(slots[2]) == 2
            assert not slots[0] & slots[2], "each host has its own"
            assert not slots[1] and not slots[3]
            there.submit(PROMPTS[:4])
            path = _sockets(hosts, tmp_path)[1]
            with (rollpack.connect(path, dp_rank=0, dp_size=2) as first,
                  rollpack.connect(path, dp_rank=1, dp_size=2) as second):
                shares = [rank.next_batch(num_groups=4, timeout_s=60) for rank in (first, second)]
                assert [share.num_samples for share in shares] == [2 * NUM_SAMPLES] * 2
                samples: Samples = {}
                for share in shares:
                    take(share, samples)
                assert samples == {key: undisturbed[key] for key in samples}
            with pytest.raises(rollpack.FailedPrecondition) as refused:
                there.update_weights({}, version=1)
            assert f"{hosts.names[0]}.sock, on {hosts.names[0]}" in str(refused.value)
            end_well(job, here)


def test_samples_stay_on_their_host_and_a_trainer_that_stands_still_holds_up_no_other(
        hosts: Hosts, folder: pathlib.Path, tmp_path: pathlib.Path, undisturbed: Samples) -> None:
    mine, theirs = PROMPTS[:8], PROMPTS[8:]
    num_theirs = len(theirs) * NUM_SAMPLES
    with _serve(hosts, folder, tmp_path, max_num_seqs=4) as job:
        here, there = _connect(job, hosts, tmp_path)
        with here:
            here.submit(mine)
            # This host's ranks never run out of work, so they leave the other's alone.
            more = here.submit([{**prompt, "prompt_id": f"more {index}"}
                                for index, prompt in enumerate(PROMPTS * 6)])
            there.submit(theirs)
            batch = there.next_batch(num_groups=len(theirs), order="canonical", timeout_s=60)
            # What stays does not cross the link: rank 0 hears of it, and never has it.
            assert there.stats()["num_samples_kept_on_nodes"] == num_theirs
            # That trainer stands still with all it asked for; this one has what is its own.
            here.abort(more)
            here_samples = take_rest(here, {}, (len(mine) + 6 * len(PROMPTS)) * NUM_SAMPLES)
            # It goes away, and another gets the same.
            held = _contents(batch)
            there.close()
            with rollpack.connect(_sockets(hosts, tmp_path)[1]) as next_trainer:
                again = next_trainer.next_batch(timeout_s=60)
                assert _contents(again) == held
                there_samples: Samples = {}
                take(again, there_samples)
            taken = {**here_samples, **there_samples}
            assert {key: taken[key] for key in undisturbed} == undisturbed
            end_well(job, here)


def test_the_loss_of_a_bridge_ends_what_its_host_asked_for_and_nothing_else(
        hosts: Hosts, folder: pathlib.Path, tmp_path: pathlib.Path, undisturbed: Samples) -> None:
    with _serve(hosts, folder, tmp_path) as job:
        here, there = _connect(job, hosts, tmp_path)
        with here, there:
            there.submit([{**prompt, "prompt_id": f"lost {index}"}
                          for index, prompt in enumerate(PROMPTS)])
            here.submit(PROMPTS)
            os.kill(job.rank_pids()[2], signal.SIGKILL)
            with pytest.raises(ConnectionError):
                there.next_batch(num_groups=len(PROMPTS), timeout_s=60)
            assert take_rest(here, {}, COUNT) == undisturbed
            stats = wait_for_stats(here, lambda stats: stats["num_open_samples"] == 0)
            assert (stats["num_workers"], stats["num_worker_deaths"]) == (3, 1)
            end_well(job, here)


def test_samples_of_a_third_host_do_not_pass_rank_0s(
        folder: pathlib.Path, tmp_path: pathlib.Path, undisturbed: Samples) -> None:
    with (Hosts(tmp_path, num_hosts=3) as hosts,
          _serve(hosts, folder, tmp_path, max_num_seqs=4,
                 launcher=hosts.launcher(num_ranks=3, map_by="node")) as job):
        here, there, third = _connect(job, hosts, tmp_path)
        with here, there, third:
            # Rank 0 has its own host's work and never runs out of it, so what the second host asks
            # for is made there and on the third.
            here.pause("keep")
            here.submit([{"prompt_id": "first", "input_ids": [5]}], n=32)
            there.submit(PROMPTS)
            more = here.submit([{**prompt, "prompt_id": f"more {index}"}
                                for index, prompt in enumerate(PROMPTS * 8)])
            here.resume()
            num_bytes_before = hosts.num_bytes_sent()
            assert take_rest(there, {}, COUNT) == undisturbed
            num_bytes = hosts.num_bytes_sent() - num_bytes_before
            stats = here.stats()
            assert stats["num_samples_sent_to_nodes"] == 0
            assert stats["num_samples_straight_to_nodes"] > 0
            assert (stats["num_samples_straight_to_nodes"]
                    + stats["num_samples_kept_on_nodes"]) == COUNT
            # A response's token is an id and three floats, 16 bytes; what rank 0 says of a sample
            # takes less than that of a whole one.
            assert num_bytes < COUNT * RESPONSE_LENGTH * 16
            here.abort(more)
            # That host's bridge, idle, stands still.
            os.kill(job.rank_pids()[1], signal.SIGSTOP)
            lost = wait_for_stats(here, lambda stats: stats["num_node_bridges"] == 1)
            assert lost["num_worker_deaths"] == 1
            third.submit(PROMPTS)
            assert take_rest(third, {}, COUNT) == undisturbed
            os.kill(job.rank_pids()[1], signal.SIGCONT)
            end_well(job, here)


def test_a_job_that_was_killed_goes_on_at_each_host(
        hosts: Hosts, folder: pathlib.Path, tmp_path: pathlib.Path, undisturbed: Samples) -> None:
    samples: list[Samples] = [{}, {}]
    states: list[dict[str, Any]] = []
    with _serve(hosts, folder, tmp_path, journal=tmp_path / "journal") as job:
        clients = _connect(job, hosts, tmp_path)
        for client, prompts, taken in zip(clients, (PROMPTS[:8], PROMPTS[8:]), samples,
                                          strict=True):
            client.submit(prompts)
            take(client.next_batch(num_groups=2, order="canonical", timeout_s=60), taken)
            states.append(client.state_dict())
        held = clients[1].next_batch(num_groups=3, order="canonical", timeout_s=60)
        contents = _contents(held)
        job.kill()
    assert job.wait_for_no_process() == []
    with _serve(hosts, folder, tmp_path, journal=tmp_path / "journal") as job:
        here, there = _connect(job, hosts, tmp_path, states)
        with here, there:
            again = there.next_batch(timeout_s=60)
            assert _contents(again) == contents
            take(again, samples[1])
            for client, taken in zip((here, there), samples, strict=True):
                assert take_rest(client, taken, COUNT // 2).keys().isdisjoint(
                    samples[client is here])
                with pytest.raises(rollpack.DeadlineExceeded):
                    client.next_batch(timeout_s=0)
            assert {**samples[0], **samples[1]} == undisturbed
            end_well(job, here)
