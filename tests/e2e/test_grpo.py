"""Reinforcement learning end to end: the example's own training step on a tiny random model."""

from __future__ import annotations

import pathlib
import sys
import time

import numpy as np
import rollpack
import torch
from engine_process import ROOT, write_config
from tiny_models import VOCAB_SIZE, TinyModel

sys.path.insert(0, str(ROOT / "examples"))
from rl.policy import Policy, group_advantages  # noqa: E402

NUM_STEPS = 40
WANTED = np.arange(VOCAB_SIZE) % 4 == 0  # a quarter of the vocabulary
PROMPTS = [[3, 5, 7], [11, 13], [17, 19, 23, 29], [31]]


def test_grpo_raises_the_reward_of_a_random_model(tmp_path: pathlib.Path) -> None:
    start = time.monotonic()
    torch.manual_seed(0)
    folder = TinyModel("llama", {"num_hidden_layers": 2}, seed=3).write(tmp_path / "model")
    config = write_config(tmp_path / "config.yaml", {
        "model": {"path": folder},
        "rollout": {"n": 8, "response_length": 16, "ignore_eos": True},
        "engine": {"kv_cache_memory": "32MiB", "num_threads": 1},
        "bridge": {"slots": 2, "slot_bytes": "1MiB", "max_tokens_per_row": 256}})
    policy = Policy(folder, num_trained_layers=2, learning_rate=3e-3)
    rewards = []
    with rollpack.launch(config, num_ranks=2) as client:
        for step in range(NUM_STEPS):
            client.submit(PROMPTS, sampling={"seed": step})
            with client.next_batch(num_groups=len(PROMPTS)) as batch:
                sampled = batch.loss_mask == 1
                assert (batch.weight_versions[sampled] == step).all()
                hits = WANTED[batch.input_ids] & sampled
                sums = np.add.reduceat(hits, batch.cu_seqlens[:-1], dtype=np.float32)
                reward = sums / batch.response_lens
                report = policy.train_step(
                    batch, group_advantages(reward.astype(np.float32), batch.prompt_index))
            # Trainer and engine agree on the weights; stale or misplaced ones would be far off.
            assert report.probs_diff["training/rollout_probs_diff_mean"] < 0.02
            rewards.append(reward.mean())
            assert client.update_weights(policy.weights(), version=step + 1) == step + 1
    first, last = np.mean(rewards[:5]), np.mean(rewards[-5:])
    assert last > first + 0.25, f"{first} -> {last}"
    assert time.monotonic() - start < 60
