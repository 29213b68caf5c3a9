"""rollout_probs_diff against values worked out by hand and against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import rollpack
import torch
from rollpack.metrics import rollout_probs_diff

from real_server import Start

NAN = math.nan


def test_values_are_those_worked_out_by_hand() -> None:
    rollout = np.log(np.array([0.5, 0.25, 0.125], np.float64))
    trainer = np.log(np.array([0.25, 0.25, 0.25], np.float64))
    metrics = rollout_probs_diff(rollout, trainer, np.ones(3))
    # Differences 1/4, 0, 1/8: mean 1/8, deviation sqrt((1/64 + 1/64 + 0) / 2) = 1/8.
    assert metrics["training/rollout_probs_diff_mean"] == pytest.approx(0.125)
    assert metrics["training/rollout_probs_diff_max"] == pytest.approx(0.25)
    assert metrics["training/rollout_probs_diff_std"] == pytest.approx(0.125)
    # r - log r - 1 for r = 1/2, 1, 2; the logarithms cancel, so the sum is 1/2.
    assert metrics["rollout_corr/k3_kl"] == pytest.approx(0.5 / 3)


def test_numpy_and_torch_of_either_precision_agree() -> None:
    rng = np.random.default_rng(5)
    rollout = np.log(rng.random((4, 9), np.float32))
    trainer = (rollout + rng.normal(0, 0.01, rollout.shape)).astype(np.float32)
    mask = rng.integers(0, 2, rollout.shape)
    expected = rollout_probs_diff(rollout, trainer, mask)
    tensors = (torch.tensor(rollout, requires_grad=True), torch.tensor(trainer))
    assert rollout_probs_diff(*tensors, torch.tensor(mask, dtype=torch.bool)) == expected
    diff = (tensors[0].double().exp() - tensors[1].double().exp()).abs()[torch.tensor(mask) > 0]
    assert expected["training/rollout_probs_diff_std"] == pytest.approx(diff.std().item())
    bfloat16 = torch.tensor(rollout).bfloat16()
    assert rollout_probs_diff(bfloat16, bfloat16, mask)["training/rollout_probs_diff_max"] == 0


def test_entries_outside_the_mask_are_never_read() -> None:
    metrics = rollout_probs_diff(
        np.array([NAN, -1.0, np.inf]), np.array([0.0, -1.0, NAN]), np.array([0, 1, 0], np.uint8)
    )
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize(
    ("rollout", "trainer", "mask", "kind", "text"),
    [
        ([0.0], [0.0, 0.0], [1], rollpack.InvalidArgument, r"shapes \(1,\), \(2,\), \(1,\)"),
        ([0.0], [0.0], [0], rollpack.InvalidArgument, "mask = all 0: expected at least one"),
        ([[0.0, NAN]], [[0.0, 0.0]], [[1, 1]], rollpack.NonFinite, r"rollout_log_probs\[0, 1\] = "),
        ([0.0], [-np.inf], [1], rollpack.NonFinite, r"trainer_log_probs\[0\] = -inf: expected a"),
    ],
)
def test_what_cannot_be_compared_is_an_error(
    rollout: list, trainer: list, mask: list, kind: type, text: str
) -> None:
    with pytest.raises(kind, match=text):
        rollout_probs_diff(np.array(rollout), np.array(trainer), np.array(mask))


def test_a_report_reaches_the_servers_numbers_and_the_latest_stands(start: Start) -> None:
    with rollpack.connect(start().path) as client, rollpack.connect(start().path) as other:
        before = client.stats()
        assert before["num_probs_diff_reports"] == 0
        assert "probs_diff_mean" not in before  # nothing unknown is 0
        for trainer in ([0.5, 0.25], [0.25, 0.25]):
            diff = rollout_probs_diff(np.log([0.5, 0.5]), np.log(trainer), [1, 1])
            client.report_probs_diff(diff)
        stats = client.stats()
        assert stats["num_probs_diff_reports"] == 2
        assert stats["probs_diff_mean"] == diff["training/rollout_probs_diff_mean"]
        assert stats["probs_diff_max"] == pytest.approx(0.25)
        assert stats["probs_diff_std"] == 0
        assert stats["probs_diff_k3_kl"] == pytest.approx(math.log(2) - 0.5)
        assert other.stats()["num_probs_diff_reports"] == 0  # another server's


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"rollout_corr/k3_kl": None}, r"probs_diff\['rollout_corr/k3_kl'\] = None"),
        ({"training/rollout_probs_diff_max": 1.5}, r"max = 1.5 \(.*\): expected a number from 0"),
        ({"training/rollout_probs_diff_mean": NAN}, "mean"),
        ({"training/rollout_probs_diff_std": -0.5}, "std = -0.5"),
    ],
)
def test_a_bad_report_is_refused_by_name_and_changes_nothing(
    start: Start, changed: dict[str, float], text: str
) -> None:
    diff = {**rollout_probs_diff([-1.0], [-1.0], [1]), **changed}
    with rollpack.connect(start().path) as client:
        with pytest.raises(rollpack.InvalidArgument, match=text):
            client.report_probs_diff(diff)
        assert client.stats()["num_probs_diff_reports"] == 0
