"""One sequence, one answer: samples of SmolLM2 are the same bytes however they are computed: 36 of
them, 200 with ROLLPACK_FULL=1."""

from __future__ import annotations

import itertools
import json
import pathlib
import random
import time
from typing import Any

import pytest
import rollpack
from engine_process import (
    IS_FULL,
    MODEL,
    Config,
    generate,
    run_well,
    score,
    write_config,
    write_jsonl,
)

NUM_PROMPTS, NUM_SAMPLES = (50, 4) if IS_FULL else (12, 3)
BASE: Config = {
    "model": {"path": MODEL},
    "rollout": {"n": NUM_SAMPLES, "temperature": 1.0, "seed": 5, "response_length": 6},
    "engine": {"batching": "continuous", "max_num_seqs": 64, "max_num_batched_tokens": 2048,
               "num_threads": 1, "kv_cache_memory": "256MiB"}}


def _case(name: str, num_ranks: int = 0, **engine: Any) -> Any:
    return pytest.param(engine, num_ranks, id=name)


# Each value of every axis at least once, and combinations likely to interfere.
CASES = [
    _case("two-threads", num_threads=2),
    _case("one-at-a-time", max_num_seqs=1, num_threads=2),
    _case("few-seqs-few-tokens", max_num_seqs=7, max_num_batched_tokens=64),
    _case("fewer-tokens-than-seqs", max_num_batched_tokens=20, num_threads=2),
    _case("no-cache-whole-prompts", enable_prefix_caching=False, enable_chunked_prefill=False),
    _case("two-ranks", num_ranks=2),
    _case("three-ranks-few-tokens", num_ranks=3, max_num_batched_tokens=64),
    _case("two-ranks-private-weights", num_ranks=2, share_weights="off"),
    _case("left-padded", batching="left_padded", num_threads=2),
    _case("left-padded-few-seqs-two-ranks", num_ranks=2, batching="left_padded", max_num_seqs=7),
    _case("length-sorted-few-tokens", batching="length_sorted", max_num_batched_tokens=70),
    _case("prepacked", batching="prepacked", num_threads=2),
    _case("prepacked-few-seqs-few-tokens-two-ranks", num_ranks=2, batching="prepacked",
          max_num_seqs=7, max_num_batched_tokens=20),
]
if IS_FULL:
    CASES += [
        _case(f"{batching}-{seqs}-seqs-{tokens}-tokens-{threads}-threads-{ranks}-ranks", ranks,
              batching=batching, max_num_seqs=seqs, max_num_batched_tokens=tokens,
              num_threads=threads)
        for batching, seqs, tokens, threads, ranks in itertools.product(
            ("continuous", "prepacked", "left_padded"), (1, 7, 64), (64, 2048), (1, 2), (1, 2, 3))]
    CASES += [_case(f"{size}-ranks-one-model", size, tensor_model_parallel_size=size)
              for size in (2, 3, 4)]


def _prompts() -> list[dict[str, Any]]:
    """Lengths 1 to 60; some begin alike, some have their own limits and truncation."""
    draw = random.Random(7)
    shared = [draw.randrange(3, 49152) for _ in range(40)]
    prompts = []
    for index in range(NUM_PROMPTS):
        own = [draw.randrange(3, 49152) for _ in range(draw.randrange(1, 21))]
        ids = shared[:draw.choice([16, 17, 40])] + own if index % 3 == 0 else own
        prompt: dict[str, Any] = {"prompt_id": f"p{index}", "input_ids": ids}
        if index % 5 == 1:
            prompt["sampling"] = {"temperature": 0.7, "top_k": 40, "response_length": 9}
        elif index % 5 == 2:
            prompt["sampling"] = {"top_p": 0.9, "min_p": 0.01, "response_length": 3}
        elif index % 5 == 3:
            prompt["sampling"] = {"temperature": 0.0}
        prompts.append(prompt)
    return prompts


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The file that every case reads."""
    return write_jsonl(tmp_path_factory.mktemp("in") / "prompts.jsonl", _prompts())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, prompts: pathlib.Path) -> pathlib.Path:
    """What the base configuration writes."""
    folder = tmp_path_factory.mktemp("base")
    samples = generate(write_config(folder / "config.yaml", BASE), prompts,
                       folder / "samples.jsonl")
    assert len(samples) == NUM_PROMPTS * NUM_SAMPLES
    assert all(sample["finish_reason"] in ("stop", "length") for sample in samples)
    # Samples of one group must differ, or equal files would say little.
    assert len({tuple(sample["response_ids"]) for sample in samples}) > NUM_PROMPTS * 2
    return folder / "samples.jsonl"


@pytest.mark.parametrize(("engine", "num_ranks"), CASES)
def test_generation_gives_the_same_file(engine: dict[str, Any], num_ranks: int,
                                        prompts: pathlib.Path, expected: pathlib.Path,
                                        tmp_path: pathlib.Path) -> None:
    config = write_config(tmp_path / "config.yaml", BASE, {"engine": engine})
    run_well("generate", "--config", config, "--prompts", prompts, "--output",
             tmp_path / "samples.jsonl", num_ranks=num_ranks)
    assert (tmp_path / "samples.jsonl").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(("engine", "num_ranks"), [
    _case("few-tokens", max_num_batched_tokens=64, num_threads=2),
    _case("two-ranks", num_ranks=2),
    _case("left-padded", batching="left_padded", max_num_seqs=7),
    _case("prepacked", batching="prepacked", max_num_seqs=7, max_num_batched_tokens=64)])
def test_scores_are_the_bits_of_generation(engine: dict[str, Any], num_ranks: int,
                                           expected: pathlib.Path, tmp_path: pathlib.Path) -> None:
    by_id = {prompt["prompt_id"]: prompt for prompt in _prompts()}
    samples = [json.loads(line) for line in expected.read_text().splitlines()]
    sequences = [
        {"id": f"{sample['prompt_id']}/{sample['sample_index']}",
         "input_ids": by_id[sample["prompt_id"]]["input_ids"],
         "response_ids": sample["response_ids"],
         "temperature": by_id[sample["prompt_id"]].get("sampling", {}).get("temperature", 1.0)}
        for sample in samples]
    config = write_config(tmp_path / "config.yaml", BASE, {"engine": engine})
    scored = score(config, write_jsonl(tmp_path / "in.jsonl", sequences), tmp_path / "out.jsonl",
                   num_ranks=num_ranks)
    for sample, result in zip(samples, scored, strict=True):
        for key in ("logprobs", "scaled_logprobs"):
            assert result[key] == sample[key], f"{result['id']}: {key}"


COLUMNS = ["logprobs", "scaled_logprobs", "support_logmass"]


def _bits(samples: list[rollpack.Sample]) -> list[bytes]:
    return [b"".join(getattr(sample, name).tobytes() for name in ("response_ids", *COLUMNS))
            for sample in samples]


def _settled_stats(client: rollpack.Client, num_samples: int) -> dict[str, float]:
    """What the server says once it has counted that many samples: it may be a second behind."""
    deadline = time.monotonic() + 10
    while (stats := client.stats())["num_samples"] < num_samples:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return stats


def _draw_long(folder: pathlib.Path, kv_cache_memory: str) -> tuple[list[bytes], float]:
    """Draws long responses. Returns: each sample as bits, and how often one was preempted."""
    config = write_config(folder / "config.yaml", BASE, {
        "rollout": {"response_length": 40, "ignore_eos": True},
        "engine": {"kv_cache_memory": kv_cache_memory, "num_threads": 2},
        "bridge": {"columns": COLUMNS}})
    prompts = [{"prompt_id": f"p{index}", "input_ids": [100 + index] * (5 + index)}
               for index in range(8)]
    with rollpack.launch(config) as client:
        samples = client.generate(prompts)
        stats = _settled_stats(client, len(samples))
    return _bits(samples), stats["num_preemptions"]


def test_preempted_samples_are_the_same(tmp_path: pathlib.Path) -> None:
    # 22.5 KiB a token: 24 sequences of about 50 tokens need 26 MiB, and start within 10.
    roomy, num_preemptions = _draw_long(tmp_path, "64MiB")
    assert num_preemptions == 0
    tight, num_preemptions = _draw_long(tmp_path, "10MiB")
    assert num_preemptions > 0
    assert len(roomy) == 8 * NUM_SAMPLES and tight == roomy


def _converse(folder: pathlib.Path, *, caches: bool) -> tuple[list[bytes], list[dict[str, float]]]:
    """Asks, asks on from each response, scores, and asks the first prompts again.

    Returns: all samples and logprobs as bits, and the counters after each round of samples.
    """
    config = write_config(folder / "config.yaml", BASE, {
        "rollout": {"response_length": 10, "ignore_eos": True},
        "engine": {"enable_prefix_caching": caches, "num_threads": 2},
        "bridge": {"columns": COLUMNS}})
    draw = random.Random(3)
    prompts = [{"prompt_id": f"p{index}", "n": 3,
                "input_ids": [draw.randrange(3, 49152) for _ in range(5 + 11 * index)]}
               for index in range(6)]
    stats = []
    with rollpack.launch(config) as client:
        samples = client.generate(prompts)
        stats.append(_settled_stats(client, len(samples)))
        turns = [{"prompt_id": f"turn{index}", "n": 2,
                  "input_ids": [*sample.prompt_ids, *sample.response_ids, 11, 12, 13]}
                 for index, sample in enumerate(samples)]
        samples += client.generate(turns)
        stats.append(_settled_stats(client, len(samples)))
        scored = [result.logprobs.tobytes() for result in client.score(samples)]
        before = client.stats()["prefix_cache_hits"]
        samples += client.generate(prompts)
        stats.append(_settled_stats(client, len(samples)))
    assert before >= stats[1]["prefix_cache_hits"]
    stats[2]["prefix_cache_hits"] -= before
    return _bits(samples) + scored, stats


def test_cold_and_warm_prefixes_are_the_same(tmp_path: pathlib.Path) -> None:
    warm, stats = _converse(tmp_path, caches=True)
    cold, cold_stats = _converse(tmp_path, caches=False)
    assert len(warm) == 3 * 6 + 2 * 18 + 3 * 6 + (3 * 6 + 2 * 18) and warm == cold
    assert warm[:18] == warm[54:72], "the same prompts, cold and warm"
    num_prompts = [5 + 11 * index for index in range(6)]
    # A turn finds all of the last one that has keys (its last token was never fed back), a prompt
    # asked again all but the token whose logits it needs.
    num_asked_on = stats[1]["prefix_cache_hits"] - stats[0]["prefix_cache_hits"]
    assert num_asked_on == sum(3 * (length + 9) for length in num_prompts)
    assert stats[2]["prefix_cache_hits"] == sum(length - 1 for length in num_prompts)
    assert cold_stats[2]["prefix_cache_queries"] == 0
    assert stats[2]["num_rows_computed"] < 0.7 * cold_stats[2]["num_rows_computed"]
