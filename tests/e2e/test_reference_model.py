"""A frozen policy beside the live one: its log-probabilities come with every batch."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import rollpack
from engine_process import Config, write_config
from safetensors.torch import load_file
from tiny_models import MODELS

PROMPTS = [{"prompt_id": f"p{index}", "input_ids": [7 + index, 50, 3 * index]}
           for index in range(6)]


def _config(folder: pathlib.Path, model: str, reference: pathlib.Path | str) -> pathlib.Path:
    layers: Config = {
        "model": {"path": MODELS[model].write(folder / "live")},
        "rollout": {"n": 3, "response_length": 12, "temperature": 0.8},
        "engine": {"kv_cache_memory": "16MiB", "num_threads": 1},
        "reference_model": {"path": reference, "kv_cache_memory": "8MiB"},
        "bridge": {"slots": 2, "slot_bytes": "4MiB", "columns": ["scaled_logprobs"]}}
    return write_config(folder / "config.yaml", layers)


def _draw(client: rollpack.Client) -> list[rollpack.Sample]:
    samples = client.generate(PROMPTS)
    assert len(samples) == 18
    return samples


def test_the_reference_stays_where_the_policy_started(tmp_path: pathlib.Path) -> None:
    start = MODELS["qwen2-tied"].write(tmp_path / "start")
    config = _config(tmp_path, "qwen2-tied", start)
    weights = {name: tensor * 1.25 for name, tensor
               in load_file(start / "model.safetensors").items()}
    with rollpack.launch(config, num_ranks=2) as client:
        for sample in _draw(client):
            assert sample.ref_log_prob is not None and sample.scaled_logprobs is not None
            assert sample.ref_log_prob.tobytes() == sample.scaled_logprobs.tobytes()
        client.update_weights(weights, version=1)
        moved = _draw(client)
        client.update_weights(load_file(start / "model.safetensors"), version=2)
        for sample, scored in zip(moved, client.score(moved), strict=True):
            assert sample.ref_log_prob is not None and sample.scaled_logprobs is not None
            assert np.array_equal(sample.ref_log_prob, scored.scaled_logprobs)
            assert not np.array_equal(sample.ref_log_prob, sample.scaled_logprobs)


def test_a_reference_of_another_vocabulary_is_refused(tmp_path: pathlib.Path) -> None:
    other = MODELS["llama-untied"].write(tmp_path / "other")
    config = _config(tmp_path, "qwen2-tied", other)
    text = (other / "config.json").read_text().replace('"vocab_size": ', '"vocab_size": 9')
    (other / "config.json").write_text(text)
    with pytest.raises(rollpack.RollpackError, match="reference_model.path"):
        rollpack.launch(config)
