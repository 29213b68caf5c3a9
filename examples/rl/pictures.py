"""Two pictures of a run: its reward, and what one packed batch looks like."""

from __future__ import annotations

import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

_SHOWN_TOKENS = 420  # of a row; more become too thin to see


def draw_reward(path: pathlib.Path, rewards: list[float], accuracy: tuple[float, float],
                title: str) -> None:
    """Draws mean reward by step, and greedy accuracy before and after."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = np.arange(1, len(rewards) + 1)
    axes.plot(steps, rewards, color="0.75", marker=".", label="mean reward of the step")
    smooth = [np.mean(rewards[max(0, i - 4):i + 1]) for i in range(len(rewards))]
    axes.plot(steps, smooth, color="C0", linewidth=2, label="mean of the last 5")
    axes.plot([0, len(rewards)], accuracy, "D", color="C1", label="greedy accuracy")
    axes.set(xlabel="step", ylim=(-0.03, 1.03), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_batch(path: pathlib.Path, columns: dict[str, np.ndarray]) -> None:
    """Draws the first tokens of a packed row, one band a column.

    Args:
        path: PNG to write.
        columns: segment_ids, position_ids, loss_mask, rollout_log_probs, all [T], and row_starts
            and cu_seqlens, as in the batch.
    """
    num_samples, num_tokens = len(columns["cu_seqlens"]) - 1, len(columns["segment_ids"])
    end = int(columns["cu_seqlens"][columns["row_starts"][1]])
    shown = slice(0, min(end, _SHOWN_TOKENS))
    probs = np.exp(columns["rollout_log_probs"][shown])  # NaN on prompts, which stay white
    bands = [
        ("segment_ids\n(sample)", columns["segment_ids"][shown] % 10, "tab10", 0, 9),
        ("position_ids", columns["position_ids"][shown], "viridis", 0, None),
        ("prompt | response\n(loss_mask)", columns["loss_mask"][shown], "Blues", -0.4, 1.2),
        ("probability of the\nsampled token", probs, "magma", 0, 1),
    ]
    figure, axes = plt.subplots(len(bands), 1, figsize=(11, 4), sharex=True, layout="constrained")
    edges = columns["cu_seqlens"][columns["cu_seqlens"] <= shown.stop]
    for ax, (name, values, colors, low, high) in zip(axes, bands, strict=True):
        ax.imshow(values[None, :], aspect="auto", interpolation="nearest", cmap=colors, vmin=low,
                  vmax=high, extent=(0, shown.stop, 0, 1))
        ax.vlines(edges, 0, 1, color="white", linewidth=1)
        ax.set_yticks([0.5], [name])
        ax.tick_params(axis="y", length=0)
    axes[-1].set_xlabel("token of the row")
    figure.suptitle(f"one packed batch: {num_samples} samples, {num_tokens} tokens, no pads; "
                    f"row 1 of {len(columns['row_starts']) - 1}, first {shown.stop} tokens")
    figure.savefig(path, dpi=150)
    plt.close(figure)
