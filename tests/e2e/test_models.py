"""Every family, odd sizes included, against transformers: log-probabilities of given responses."""

from __future__ import annotations

import pathlib
import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_process import MODEL, score, write_config, write_jsonl
from tiny_models import MODELS, VOCAB_SIZE

# f32 against f32: a logprob is a sum of some thousand products of size 1 in another order, a few
# 1e-6 each way a layer; 2e-4 leaves room for the largest logits and misses no wrong formula.
F32_TOLERANCE = 2e-4
# bf16 rounds the same tensors in both; rollpack keeps the residual stream in f32 and must not be
# further from the truth than transformers.
BF16_FACTOR = 1.1


def _sequences(vocab_size: int, seed: int) -> list[dict[str, Any]]:
    """Prompt and response lengths around windows (7, 33), pages (16) and key chunks (256)."""
    draw = random.Random(seed)
    lengths = [(1, 1), (1, 15), (6, 2), (7, 9), (15, 18), (31, 3), (33, 40), (100, 30), (250, 60)]
    return [{"id": f"s{index}", "temperature": [1.0, 0.7, 1.6][index % 3],
             "input_ids": [draw.randrange(vocab_size) for _ in range(num_prompt)],
             "response_ids": [draw.randrange(vocab_size) for _ in range(num_response)]}
            for index, (num_prompt, num_response) in enumerate(lengths)]


def _truth(folder: pathlib.Path, dtype: torch.dtype,
           sequences: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
    """What transformers gives, one sequence at a time, without a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager")
    results = []
    for sequence in sequences:
        ids = torch.tensor(sequence["input_ids"] + sequence["response_ids"])
        first = len(sequence["input_ids"])
        with torch.inference_mode():
            logits = model(ids[None], use_cache=False).logits[0, first - 1:-1].double()
        scaled = torch.log_softmax(logits / sequence["temperature"], -1)
        sampled = ids[first:, None]
        results.append({
            "logprobs": torch.log_softmax(logits, -1).gather(1, sampled).squeeze(1).numpy(),
            "scaled_logprobs": scaled.gather(1, sampled).squeeze(1).numpy(),
            "entropy": -(scaled.exp() * scaled).sum(-1).numpy()})
    return results


def _score(folder: pathlib.Path, dtype: str, sequences: list[dict[str, Any]],
           tmp_path: pathlib.Path) -> list[dict[str, Any]]:
    config = write_config(tmp_path / f"{dtype}.yaml", {
        "model": {"path": folder, "dtype": dtype},
        "engine": {"kv_cache_memory": "64MiB", "num_threads": 1}})
    path = write_jsonl(tmp_path / "sequences.jsonl", sequences)
    return score(config, path, tmp_path / f"{dtype}.jsonl")


def _differences(ours: list[dict[str, Any]], truth: list[dict[str, np.ndarray]],
                 key: str) -> np.ndarray:
    return np.concatenate([np.abs(np.array(mine[key]) - right[key])
                           for mine, right in zip(ours, truth, strict=True)])


@pytest.fixture(params=[*MODELS, "smollm2-135m"])
def folder(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """A model of each kind."""
    if request.param == "smollm2-135m":
        return MODEL
    return MODELS[request.param].write(tmp_path / "model")


def test_scores_equal_those_of_transformers(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    is_large = folder == MODEL
    sequences = _sequences(49152 if is_large else VOCAB_SIZE, seed=1)
    truth = _truth(folder, torch.float32, sequences)

    ours = _score(folder, "float32", sequences, tmp_path)
    assert [result["id"] for result in ours] == [sequence["id"] for sequence in sequences]
    for key in ("logprobs", "scaled_logprobs", "entropy"):
        worst = _differences(ours, truth, key).max()
        assert worst <= F32_TOLERANCE, f"{key}: {worst}"

    theirs = _truth(folder, torch.bfloat16, sequences)
    ours = _score(folder, "bfloat16", sequences, tmp_path)
    our_mean = _differences(ours, truth, "logprobs").mean()
    their_mean = _differences(theirs, truth, "logprobs").mean()
    assert our_mean <= BF16_FACTOR * their_mean, f"ours {our_mean}, transformers {their_mean}"


def test_a_changed_weight_changes_the_scores(tmp_path: pathlib.Path) -> None:
    # The comparison above must be able to fail: one element of one norm moves the logprobs.
    from safetensors.torch import load_file, save_file

    folder = MODELS["qwen3-untied"].write(tmp_path / "model")
    sequences = _sequences(VOCAB_SIZE, seed=2)[:4]
    truth = _truth(folder, torch.float32, sequences)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_norm.weight"][3] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ours = _score(folder, "float32", sequences, tmp_path)
    assert _differences(ours, truth, "logprobs").max() > F32_TOLERANCE
