"""How far the trainer's probabilities are from those the tokens were drawn with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rollpack.errors import InvalidArgument, NonFinite

# A NumPy array or a torch tensor.
ArrayLike = Any


def rollout_probs_diff(
    rollout_log_probs: ArrayLike, trainer_log_probs: ArrayLike, mask: ArrayLike
) -> dict[str, float]:
    """Compare the probabilities of the sampled tokens, under verl's metric names.

    Args:
        rollout_log_probs: the engine's logprobs, f32, any shape, natural log.
        trainer_log_probs: the trainer's for the same tokens and temperature, same shape.
        mask: same shape, nonzero on the tokens to compare; other entries are never read.

    Returns:
        training/rollout_probs_diff_mean, _max, _std: of |p_rollout - p_trainer|; the deviation is
            the sample's (n - 1), 0 for one token.
        rollout_corr/k3_kl: mean of r - log r - 1, r = p_trainer / p_rollout; estimates
            KL(rollout || trainer) in nats, never below 0.

    Raises:
        InvalidArgument: shapes differ, or the mask selects no token.
        NonFinite: a selected logprob is NaN or infinite; names the first.

    Source: verl's debug metrics; k3 is J. Schulman, Approximating KL Divergence (2020).
    """
    rollout, trainer, selected = (
        _to_numpy(x) for x in (rollout_log_probs, trainer_log_probs, mask)
    )
    if not rollout.shape == trainer.shape == selected.shape:
        raise InvalidArgument(
            field="rollout_log_probs, trainer_log_probs, mask",
            value=f"shapes {rollout.shape}, {trainer.shape}, {selected.shape}",
            allowed="one shape",
        )
    selected = selected.astype(bool)
    if not selected.any():
        raise InvalidArgument(field="mask", value="all 0", allowed="at least one selected token")
    rollout = _finite(rollout, selected, "rollout_log_probs")
    trainer = _finite(trainer, selected, "trainer_log_probs")
    diff = np.abs(np.exp(rollout) - np.exp(trainer))
    log_ratio = trainer - rollout
    return {
        "training/rollout_probs_diff_mean": float(diff.mean()),
        "training/rollout_probs_diff_max": float(diff.max()),
        "training/rollout_probs_diff_std": float(diff.std(ddof=1)) if diff.size > 1 else 0.0,
        "rollout_corr/k3_kl": float((np.expm1(log_ratio) - log_ratio).mean()),
    }


# Names of the protocol's numbers -> those of rollout_probs_diff.
_REPORTED = {
    "mean": "training/rollout_probs_diff_mean",
    "max": "training/rollout_probs_diff_max",
    "std": "training/rollout_probs_diff_std",
    "k3_kl": "rollout_corr/k3_kl",
}


def report_fields(probs_diff: Mapping[str, float]) -> dict[str, float]:
    """Returns what a report to the server carries of `rollout_probs_diff`'s numbers.

    Raises:
        InvalidArgument: one of them is missing or no number; names it.
    """
    fields = {}
    for field, name in _REPORTED.items():
        try:
            fields[field] = float(probs_diff[name])
        except (KeyError, TypeError, ValueError):
            raise InvalidArgument(
                field=f"probs_diff[{name!r}]",
                value=repr(probs_diff.get(name)),
                allowed="a number, as rollout_probs_diff() returns it",
            ) from None
    return fields


def _to_numpy(values: ArrayLike) -> npt.NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)


def _finite(
    values: npt.NDArray[Any], selected: npt.NDArray[np.bool_], name: str
) -> npt.NDArray[np.float64]:
    bad = np.argwhere(selected & ~np.isfinite(values))
    if bad.size:
        index = tuple(int(i) for i in bad[0])
        raise NonFinite(
            field=f"{name}{list(index)}",
            value=str(values[index]),
            allowed="a finite number where the mask is set",
        )
    return values[selected].astype(np.float64)
