"""Random models of all four families, with the odd sizes that real ones do not have."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

VOCAB_SIZE = 307  # a prime: no tile, block or lane width divides it
MAX_POSITIONS = 640

# 6 query heads on 3 key heads of 20: 120 columns of heads beside a hidden size of 90.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 90, "intermediate_size": 70, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20,
    "max_position_embeddings": MAX_POSITIONS, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A recipe: the family's model_type, its config fields, and whether to write old rope keys."""

    family: str
    fields: dict[str, Any]
    has_old_rope_keys: bool = False
    seed: int = 0

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """Writes a Hugging Face folder with bf16 weights. Returns: the folder."""
        config = transformers.AutoConfig.for_model(self.family, **{**_SIZES, **self.fields})
        torch.manual_seed(self.seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomize(model)
        model.to(torch.bfloat16).save_pretrained(folder)
        if self.has_old_rope_keys:
            _write_old_rope_keys(folder / "config.json")
        return folder


def _randomize(model: torch.nn.Module) -> None:
    """Draws weights of a size that makes every one matter; the usual 0.02 gives flat logits."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scale = 1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5
                if model.config.tie_word_embeddings and "embed" in name:
                    scale = 0.3
                weight.normal_(0.0, scale)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0.0, 0.5)


def _write_old_rope_keys(path: pathlib.Path) -> None:
    """Says the same as transformers before 5 did: rope_theta and rope_scaling at top level."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    path.write_text(json.dumps(config, indent=2))


MODELS = {
    "llama-untied": TinyModel("llama", {"rope_parameters": _PLAIN}, seed=1),
    "llama-biases-tied-llama3": TinyModel(
        "llama", {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True,
                  "tie_word_embeddings": True}, seed=2),
    "llama-linear": TinyModel(
        "llama", {"rope_parameters": _LINEAR, "num_attention_heads": 3}, seed=3),
    "llama-old-llama3": TinyModel(
        "llama", {"rope_parameters": _LLAMA3}, has_old_rope_keys=True, seed=4),
    "llama-old-plain-one-key-head": TinyModel(
        "llama", {"rope_parameters": _PLAIN, "num_key_value_heads": 1}, has_old_rope_keys=True,
        seed=5),
    "qwen2-tied": TinyModel(
        "qwen2", {"rope_parameters": _PLAIN, "hidden_size": 120, "tie_word_embeddings": True},
        seed=6),
    "qwen2-windows": TinyModel(
        "qwen2", {"rope_parameters": _PLAIN, "hidden_size": 120, "use_sliding_window": True,
                  "sliding_window": 33, "max_window_layers": 1}, seed=7),
    "qwen3-untied": TinyModel("qwen3", {"rope_parameters": _PLAIN}, seed=8),
    "qwen3-biases-tied": TinyModel(
        "qwen3", {"rope_parameters": _PLAIN, "attention_bias": True, "tie_word_embeddings": True},
        seed=9),
    "mistral-window-7": TinyModel(
        "mistral", {"rope_parameters": _PLAIN, "sliding_window": 7}, seed=10),
    "mistral-no-window": TinyModel(
        "mistral", {"rope_parameters": _PLAIN, "sliding_window": None}, seed=11),
}
