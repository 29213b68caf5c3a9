"""Drafts change no byte of any file, and come true on text that repeats itself."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import pytest
import rollpack
from engine_process import MODEL, Config, run_well, write_config, write_jsonl

BASE: Config = {
    "model": {"path": MODEL},
    "rollout": {"n": 2, "seed": 9, "response_length": 48},
    "engine": {"num_threads": 2, "kv_cache_memory": "256MiB"}}


def _prompts() -> list[dict[str, Any]]:
    """Few sequences, so that `auto` drafts; one list of tokens says everything twice."""
    prompts: list[dict[str, Any]] = [
        {"prompt_id": "twice", "input_ids": [*range(500, 530), *range(500, 515)]},
        {"prompt_id": "short", "input_ids": [504]},
        {"prompt_id": "stops", "input_ids": [28, 198, 28, 198, 28],
         "sampling": {"stop_token_ids": [198, 28], "min_tokens": 11}},
        {"prompt_id": "top-k", "input_ids": [1000, 1001, 1000, 1001, 1000],
         "sampling": {"top_k": 20, "response_length": 31}}]
    return prompts


def _generate(folder: pathlib.Path, prompts: pathlib.Path, temperature: float,
              **engine: Any) -> bytes:
    config = write_config(folder / "config.yaml", BASE, {
        "rollout": {"temperature": temperature}, "engine": engine})
    run_well("generate", "--config", config, "--prompts", prompts, "--output",
             folder / "samples.jsonl")
    return (folder / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_no_byte(temperature: float, tmp_path: pathlib.Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", _prompts())
    expected = _generate(tmp_path, prompts, temperature, speculation="off")
    assert len(expected.splitlines()) == 2 * len(_prompts())
    for engine in ({"speculation": "on"}, {"speculation": "on", "num_speculative_tokens": 13},
                   {"speculation": "auto", "max_num_seqs": 2},
                   {"speculation": "on", "max_num_batched_tokens": 7, "num_threads": 1}):
        assert _generate(tmp_path, prompts, temperature, **engine) == expected, engine


def test_greedy_drafts_come_true(tmp_path: pathlib.Path) -> None:
    prompt = {"prompt_id": "twice", "input_ids": _prompts()[0]["input_ids"], "n": 1}
    responses, stats = {}, {}
    for speculation in ("off", "auto"):
        config = write_config(tmp_path / "config.yaml", BASE, {
            "rollout": {"temperature": 0.0, "response_length": 120, "ignore_eos": True},
            "engine": {"speculation": speculation}})
        with rollpack.launch(config) as client:
            responses[speculation] = client.generate([prompt])[0].response_ids.tolist()
            deadline = time.monotonic() + 10
            while (told := client.stats())["num_samples"] < 1:  # a second old at times
                assert time.monotonic() < deadline
                time.sleep(0.05)
            stats[speculation] = told
    assert responses["auto"] == responses["off"]
    assert stats["off"]["num_drafts"] == 0
    accepted = stats["auto"]["num_accepted_tokens"]
    assert 0 < accepted <= stats["auto"]["num_draft_tokens"], json.dumps(stats["auto"])
    # Every token that came true is a step less.
    assert stats["auto"]["num_steps"] == stats["off"]["num_steps"] - accepted
