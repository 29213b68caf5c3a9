"""A model that several ranks hold together: the same files as one rank writes, under mpirun; sizes
that cannot be are refused; a replica that loses a rank ends, and loses nothing."""

from __future__ import annotations

import pathlib
import random
from typing import Any

import pytest
from engine_process import (
    IS_FULL,
    Config,
    Job,
    generate,
    run,
    score,
    write_config,
    write_jsonl,
)
from recovery_rig import (
    end_well,
    faults,
    prompts_of,
    take_rest,
    wait_and_connect,
    wait_for_stats,
    write_server_config,
)

BASE: Config = {
    "rollout": {"n": 3, "seed": 5, "response_length": 12},
    "engine": {"num_threads": 1, "kv_cache_memory": "16MiB", "max_num_seqs": 16}}


def _prompts() -> list[dict[str, Any]]:
    """Some are truncated, some greedy, some may not end at once."""
    draw = random.Random(3)
    ways: list[dict[str, Any]] = [
        {}, {"top_k": 9}, {"top_p": 0.8, "temperature": 0.7}, {"temperature": 0.0}, {"min_p": 0.05},
        {"min_tokens": 6, "stop_token_ids": [5, 9, 11]}]
    return [{"prompt_id": f"p{index}", "sampling": ways[index % len(ways)],
             "input_ids": [draw.randrange(3, 300) for _ in range(draw.randrange(1, 40))]}
            for index in range(12)]


def _sizes() -> list[Any]:
    """(ranks, of one model): 2 and two replicas of 2; with ROLLPACK_FULL=1 3 and 4 as well."""
    sizes = [(2, 2), (4, 2)] + ([(3, 3), (4, 4), (6, 3)] if IS_FULL else [])
    return [pytest.param(ranks, size, id=f"{ranks}-ranks-{size}-a-model") for ranks, size in sizes]


@pytest.mark.parametrize(("num_ranks", "size"), _sizes())
def test_files_are_those_of_one_rank(num_ranks: int, size: int, tiny_model: pathlib.Path,
                                     tmp_path: pathlib.Path) -> None:
    model: Config = {"model": {"path": tiny_model}}
    prompts = write_jsonl(tmp_path / "prompts.jsonl", _prompts())
    alone = write_config(tmp_path / "alone.yaml", BASE, model)
    several = write_config(tmp_path / "several.yaml", BASE, model,
                           {"engine": {"tensor_model_parallel_size": size}})
    wanted = generate(alone, prompts, tmp_path / "wanted.jsonl")
    generate(several, prompts, tmp_path / "got.jsonl", num_ranks=num_ranks)
    assert (tmp_path / "got.jsonl").read_bytes() == (tmp_path / "wanted.jsonl").read_bytes()
    inputs = {prompt["prompt_id"]: prompt["input_ids"] for prompt in _prompts()}
    sequences = write_jsonl(tmp_path / "sequences.jsonl", [
        {"id": index, "input_ids": inputs[sample["prompt_id"]],
         "response_ids": sample["response_ids"]} for index, sample in enumerate(wanted[:9])])
    score(alone, sequences, tmp_path / "wanted.out")
    score(several, sequences, tmp_path / "got.out", num_ranks=num_ranks)
    assert (tmp_path / "got.out").read_bytes() == (tmp_path / "wanted.out").read_bytes()


def test_a_size_that_does_not_divide_the_ranks_is_refused(tiny_model: pathlib.Path,
                                                          tmp_path: pathlib.Path) -> None:
    config = write_config(tmp_path / "config.yaml", BASE,
                          {"model": {"path": tiny_model},
                           "engine": {"tensor_model_parallel_size": 2}})
    prompts = write_jsonl(tmp_path / "prompts.jsonl", _prompts()[:1])
    for num_ranks in (0, 3):
        job = run("generate", "--config", config, "--prompts", prompts, "--output",
                  tmp_path / "samples.jsonl", num_ranks=num_ranks)
        assert job.status != 0
        assert "engine.tensor_model_parallel_size = 2: expected a divisor of the number of ranks" \
            in job.stderr


# A follower dies in a layer: its replica ends, the other one makes all samples.
def test_a_replica_that_loses_a_rank_loses_no_sample(small_model: pathlib.Path,
                                                     tmp_path: pathlib.Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_server_config(small_model, tmp_path, n=4, response_length=40,
                                 tensor_model_parallel_size=2)
    prompts = prompts_of(24)
    with Job(["serve", "--config", config], num_ranks=2, recovers=True) as job:
        client = wait_and_connect(job, tmp_path)
        client.submit(prompts)
        wanted = take_rest(client, {}, 96)
        end_well(job, client)
    monkeypatch.setenv("ROLLPACK_FAULT", faults([("layer_run", 60, "kill", 3)]))
    with Job(["serve", "--config", config], num_ranks=4, recovers=True) as job:
        client = wait_and_connect(job, tmp_path)
        client.submit(prompts)
        got = take_rest(client, {}, 96)
        stats = wait_for_stats(client, lambda stats: stats["num_worker_deaths"] == 1)
        assert stats["num_workers"] == 1
        assert stats["communication_s"] > 0
        end_well(job, client)
    assert got == wanted
    assert "is missing" in job.stderr or "gone" in job.stderr
