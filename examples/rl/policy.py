"""The trainer's side: a transformers model, logprobs of a packed row, and one GRPO step.

Only the last layers learn. They compute in bf16, as the rollout engine does, and an f32 master copy
takes the updates: with a learning rate of 5e-5 most of them are below half a bf16 step and would be
rounded away.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import rollpack
import rollpack.metrics
import torch
import transformers

CLIP = 0.2           # PPO: ratios are cut at 1 - CLIP and 1 + CLIP
MAX_GRAD_NORM = 1.0
EPSILON = 1e-4       # added to a group's standard deviation


def group_advantages(rewards: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
    """Compares each sample with its group: (r - mean) / (std + EPSILON).

    Args:
        rewards: f32 [S].
        prompt_index: i32 [S], equal for the samples of one group.

    Returns:
        f32 [S]; 0 throughout a group whose samples all got the same.

    Source: DeepSeekMath (arXiv:2402.03300), section 4.1.2, outcome supervision.
    """
    advantages = np.zeros_like(rewards)
    for index in np.unique(prompt_index):
        group = prompt_index == index
        deviation = rewards[group] - rewards[group].mean()
        advantages[group] = deviation / (rewards[group].std(ddof=1) + EPSILON)
    return advantages


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one training step did: the loss and rollout_probs_diff's numbers."""

    loss: float
    probs_diff: dict[str, float]


class Policy:
    """A causal language model of which the last `num_trained_layers` layers learn."""

    def __init__(self, folder: pathlib.Path, num_trained_layers: int, learning_rate: float) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model.requires_grad_(False)
        layers = self.model.model.layers[-num_trained_layers:]
        self._computed = [weight.requires_grad_() for weight in layers.parameters()]
        self._masters = [weight.detach().float() for weight in self._computed]
        self._optimizer = torch.optim.AdamW(self._masters, lr=learning_rate, weight_decay=0.0)
        # Logits are f32 sums of bf16 products in the engine; bf16 logits here would be up to 0.06
        # away from them. The head is frozen, so one f32 copy serves for good.
        self._head = self.model.get_output_embeddings().weight.detach().float()

    def response_logprobs(self, row: rollpack.batch.Row) -> torch.Tensor:
        """Computes log p(token) for the sampled tokens of a packed row, at temperature 1.

        Args:
            row: t tokens; position_ids restart in each sample and segment_ids tell samples apart.

        Returns:
            f32 [loss_mask.sum()], in the row's order.
        """
        columns = row.torch()
        input_ids, segments = columns["input_ids"].long(), columns["segment_ids"]
        # Causal inside a sample, blind across samples. A boolean [1, 1, t, t] mask is used as it
        # is; left to itself, transformers may take the row for one long sequence.
        visible = (segments[:, None] == segments[None, :]).tril()
        hidden = self.model.model(
            input_ids=input_ids[None], position_ids=columns["position_ids"].long()[None],
            attention_mask=visible[None, None], use_cache=False).last_hidden_state[0]
        sampled = columns["loss_mask"].nonzero().squeeze(1)
        # The hidden state of the token before predicts a token; only those rows meet the head.
        logits = hidden[sampled - 1].float() @ self._head.T
        return torch.log_softmax(logits, dim=-1).gather(1, input_ids[sampled, None]).squeeze(1)

    def train_step(self, batch: rollpack.Batch, advantages: np.ndarray) -> StepReport:
        """One optimizer step on a packed batch: clipped policy gradient, mean over tokens.

        Args:
            batch: packed; its rows are the micro-batches.
            advantages: f32 [S], one a sample of the batch.

        Source: GRPO (arXiv:2402.03300) without its KL term; token mean as DAPO (2503.14476).
        """
        num_tokens = int(batch.loss_mask.sum())
        loss_sum, ours, theirs = 0.0, [], []
        for row in batch.rows():
            logprobs = self.response_logprobs(row)
            mask = row.loss_mask.astype(bool)
            drawn_with = torch.from_numpy(row.rollout_log_probs[mask])
            advantage = torch.from_numpy(advantages[row.segment_ids[mask]])
            ratio = torch.exp(logprobs - drawn_with)
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.minimum(ratio * advantage, clipped * advantage).sum() / num_tokens
            if advantage.any():
                loss.backward()
            loss_sum += loss.item()
            ours.append(logprobs.detach())
            theirs.append(drawn_with)
        self._apply_gradients()
        trainer, rollout = torch.cat(ours), torch.cat(theirs)
        return StepReport(loss_sum, rollpack.metrics.rollout_probs_diff(
            rollout, trainer, torch.ones_like(trainer)))

    def _apply_gradients(self) -> None:
        """Moves the masters by one AdamW step and rounds them into the weights that compute.

        Without gradients (every group tied) nothing moves, not even by momentum.
        """
        if self._computed[0].grad is None:
            return
        for master, weight in zip(self._masters, self._computed, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._masters, MAX_GRAD_NORM)
        self._optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self._masters, self._computed, strict=True):
                weight.copy_(master)
                master.grad = None

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns all tensors by their checkpoint names, bf16; a tied head is its embedding."""
        tensors = self.model.state_dict()
        if self.model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        return tensors
