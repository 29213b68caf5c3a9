"""Worker processes that die at each named point, one replacement after the other, under load.

One job sees many deaths: rank 1 dies at the first point of a list, the replacement that is started
for it (rank 3, the first after those of mpirun) at the second, and so on; ranks 0 and 2 live.
Rounds of the same prompts go on until all have died, each with an update to the same tensors under
a new version: every round has the bytes of the undisturbed one, whatever befell it.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import time
from collections.abc import Iterator

import pytest
import rollpack
from engine_process import IS_FULL, Job
from recovery_rig import (
    Samples,
    end_well,
    faults,
    num_open_fds,
    prompts_of,
    take_rest,
    wait_and_connect,
    wait_for_stats,
    wait_for_workers,
    write_server_config,
)
from safetensors.torch import load_file

PROMPTS = prompts_of(16)
NUM_SAMPLES, RESPONSE_LENGTH = 2, 24
NUM_RANKS = 3
ACTIONS = ("kill", "segv", "abort", "exit")

# Points and visits. A replacement visits the points of weights once while it catches up, and then
# once in every round's update; it is given groups once or twice a round. Those that die while they
# join have drawn no sample, and after three such in a row no other is started: between them stand
# those that live through a round or more.
PRIVATE = [("step_begun", 40), ("worker_connected", 1), ("groups_taken", 5), ("weights_begun", 1),
           ("layer_run", 150), ("weights_begun", 4), ("worker_loaded", 1), ("step_computed", 40),
           ("weights_staged", 1), ("sample_cut_off", 9), ("weights_checked", 4),
           ("weights_switched", 4), ("sample_sent", 9)]
# Where ranks share one packed set nobody but rank 0 packs.
SHARED = [("step_begun", 30), ("weights_checked", 1), ("sample_cut_off", 5), ("worker_loaded", 1),
          ("groups_taken", 5), ("weights_switched", 4), ("worker_connected", 1),
          ("weights_checked", 4), ("layer_run", 90), ("sample_sent", 5), ("step_computed", 30)]


def _config(folder: pathlib.Path, tmp_path: pathlib.Path, **engine: str) -> pathlib.Path:
    return write_server_config(folder, tmp_path, n=NUM_SAMPLES, response_length=RESPONSE_LENGTH,
                               **engine)


def _take_round(client: rollpack.Client) -> Samples:
    return take_rest(client, {}, len(PROMPTS) * NUM_SAMPLES)


@pytest.fixture(scope="module")
def undisturbed(small_model: pathlib.Path,
                tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """A round that nothing befalls."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    with rollpack.launch(_config(small_model, tmp_path)) as client:
        client.submit(PROMPTS)
        return _take_round(client)


def _deaths_in(log: str) -> str:
    return "\n".join(line for line in log.splitlines() if "is current" not in line)[-4000:]


def _die_one_after_the_other(deaths: list[tuple[str, int, str]], sharing: str,
                             model: pathlib.Path, tmp_path: pathlib.Path, undisturbed: Samples,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    doomed = [1, *range(NUM_RANKS, NUM_RANKS + len(deaths) - 1)]
    monkeypatch.setenv("ROLLPACK_FAULT", faults(
        (*death, rank) for death, rank in zip(deaths, doomed, strict=True)))
    tensors = load_file(model / "model.safetensors")
    some = {name: tensor for name, tensor in tensors.items() if "layers.1" in name}
    config = _config(model, tmp_path, share_weights=sharing)
    deadline = time.monotonic() + 20 + 8 * len(deaths)
    with (Job(["serve", "--config", config], num_ranks=NUM_RANKS, recovers=True) as job,
          wait_and_connect(job, tmp_path) as client):
        fds = num_open_fds(job.rank_pids()[0])
        client.submit(PROMPTS)
        assert _take_round(client) == undisturbed
        version = 0
        while (stats := client.stats())["num_worker_deaths"] < len(deaths):
            assert time.monotonic() < deadline, (stats, _deaths_in(job.stderr))
            client.submit(PROMPTS)
            version += 1
            is_whole = version % 4 == 1
            assert client.update_weights(tensors if is_whole else some, version,
                                         base_version=None if is_whole else version - 1) == version
            assert _take_round(client) == undisturbed, f"round {version}"
        wait_for_workers(client, NUM_RANKS, num_deaths=len(deaths))
        client.submit(PROMPTS)
        assert _take_round(client) == undisturbed
        stats = client.stats()
        assert stats["num_worker_deaths"] == len(deaths)
        assert stats["num_replacements"] == len(deaths)
        assert stats["num_groups_convicted"] == stats["num_open_samples"] == 0
        for rank in doomed:
            assert f"rank {rank} = " in job.stderr  # "gone", or "no progress for 5.1 s"
        # A worker has three; updates are kept for who joins later: a whole one, four partial ones.
        assert num_open_fds(job.rank_pids()[0]) <= fds + 8 < fds + 3 * len(deaths)
        end_well(job, client)


@pytest.mark.parametrize(("points", "sharing"), [(PRIVATE, "off"), (SHARED, "on")],
                         ids=["private", "shared"])
def test_a_death_at_every_point_changes_no_byte(
        points: list[tuple[str, int]], sharing: str, small_model: pathlib.Path,
        tmp_path: pathlib.Path, undisturbed: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    deaths = [(point, count, ACTIONS[index % len(ACTIONS)])
              for index, (point, count) in enumerate(points)]
    _die_one_after_the_other(deaths, sharing, small_model, tmp_path, undisturbed, monkeypatch)


@pytest.mark.skipif(not IS_FULL, reason="a sweep of minutes")
@pytest.mark.parametrize("seed", range(50))
def test_deaths_at_points_drawn_by_seed_change_no_byte(
        seed: int, small_model: pathlib.Path, tmp_path: pathlib.Path, undisturbed: Samples,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """50 jobs of 11 or 13 deaths: with those above 624."""
    draw = random.Random(seed)
    deaths = []
    for point, count in (PRIVATE, SHARED)[seed % 2]:
        # Who catches up is sent five updates at most, and is to live through a round.
        low = 6 if point.startswith("weights_") else max(4, count // 2)
        visit = draw.randint(low, 2 * count) if count > 1 else count
        # Who stands still while it loads is given half an hour.
        can_stop = not point.startswith("worker_") and draw.random() < 0.1
        deaths.append((point, visit, "stop" if can_stop else draw.choice(ACTIONS)))
    _die_one_after_the_other(deaths, ("off", "on")[seed % 2], small_model, tmp_path, undisturbed,
                             monkeypatch)


# ---- zombies: ranks that were given up, could not be killed, and go on

ZOMBIE_LEASE_S = 2.0
NUM_ZOMBIE_ROUNDS = 25 if IS_FULL else 1
ZOMBIES_A_ROUND = 4


@pytest.fixture
def unkillable(small_model: pathlib.Path, tmp_path: pathlib.Path,
               monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A server of five ranks, of which rank 0 cannot kill the others."""
    monkeypatch.setenv("ROLLPACK_FAULT", "worker_given_up:0:skip@0")
    # Long: ranks say how many samples they run once a second, and are to be stopped in their midst.
    config = write_server_config(small_model, tmp_path, n=NUM_SAMPLES, response_length=800,
                                 lease_s=ZOMBIE_LEASE_S)
    with Job(["serve", "--config", config], num_ranks=1 + ZOMBIES_A_ROUND, recovers=True) as job:
        yield job


def test_a_zombies_samples_are_dropped_and_counted(
        unkillable: Job, small_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    prompts = prompts_of(40)
    count = len(prompts) * NUM_SAMPLES
    with wait_and_connect(unkillable, tmp_path) as client:
        client.submit(prompts)
        undisturbed = take_rest(client, {}, count)
        num_dead = num_dropped = 0
        for _ in range(NUM_ZOMBIE_ROUNDS):
            # Those just started draw a sample first: three in a row that had none end replacement.
            client.submit(prompts)
            assert take_rest(client, {}, count) == undisturbed
            wait_for_stats(client, lambda stats: stats["num_running_seqs"] == 0)
            client.submit(prompts)
            wait_for_stats(client, lambda stats: stats["num_running_seqs"] > 2 * ZOMBIES_A_ROUND)
            pids = unkillable.rank_pids()
            stopped = [pids[rank] for rank in sorted(pids)[-ZOMBIES_A_ROUND:]]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            num_dead += ZOMBIES_A_ROUND
            wait_for_stats(client, lambda stats, dead=num_dead: stats["num_worker_deaths"] >= dead)
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            assert take_rest(client, {}, count) == undisturbed
            # Each of them had samples under way; what they yet say comes late.
            num_dropped += ZOMBIES_A_ROUND
            stats = wait_for_stats(
                client, lambda stats, dropped=num_dropped:
                stats["num_late_samples_dropped"] >= dropped)
            num_dropped = int(stats["num_late_samples_dropped"])
            wait_for_workers(client, 1 + ZOMBIES_A_ROUND, num_deaths=num_dead)
            for pid in stopped:
                os.kill(pid, signal.SIGKILL)
        assert client.stats()["num_groups_convicted"] == 0
        end_well(unkillable, client)
