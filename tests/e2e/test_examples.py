"""The examples as a user starts them, for a few steps."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

from engine_process import BINARY, MODEL, ROOT

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def _run_example(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ROLLPACK_BINARY": str(BINARY)}
    environment.pop("ROLLPACK_SOCKET", None)
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, "--model", MODEL, *map(str, arguments)],
        capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_grpo_trains_and_draws(tmp_path: pathlib.Path) -> None:
    done = _run_example("grpo.py", "--steps", 2, "--out", tmp_path)
    steps = re.findall(r"^step +(\d+) +reward ([\d.]+) .* rollout_probs_diff_mean ([\d.]+)$",
                       done.stdout, re.MULTILINE)
    assert [int(step) for step, _, _ in steps] == [1, 2]
    assert all(0 < float(reward) < 1 for _, reward, _ in steps)
    # bf16 in another order of summation: thousandths. A wrong mask or weight: tenths.
    assert all(float(diff) < 0.02 for _, _, diff in steps)
    assert "greedy accuracy" in done.stdout
    for name in ("reward.png", "batch.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG_MAGIC)


def test_padding_shows_that_only_right_padding_changes_what_follows() -> None:
    done = _run_example("padding.py")
    assert done.stdout.count("the same tokens, the same logprob bits") == 3
    right = re.findall(r"right-padded +(.*)", done.stdout)
    alone = re.findall(r"alone  +(.*)", done.stdout)
    assert [a == b for a, b in zip(right, alone, strict=True)] == [False, False, True]
