"""The table of ratios, from reports as processes print them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import compare
import workload


def _ours(passes_s: list[float], **changes: Any) -> dict[str, Any]:
    """A report of rollpack: 100 tokens that take 2 s at least, 2.5 s in its own steps."""
    wall_s = min(passes_s)
    return {"engine": "rollpack", "passes_s": passes_s, "wall_s": wall_s, "peak_flops": 1e12,
            "read_bandwidth_bytes_per_s": 5e10, "response_tokens": 100,
            "roofline_share": 2 / wall_s, "step_roofline_share": 2.5 / wall_s, **changes}


def _cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines()[2:]]


def test_passes_are_compared_within_a_round_and_medians_shown() -> None:
    # The machine is half as fast in the second round: ratios do not move.
    peer = "OpenVINO GenAI 1"
    rounds = [{"rollpack": _ours([5 * slow, 4 * slow, 8 * slow]),
               "openvino": {"engine": peer, "passes_s": [10 * slow, 12 * slow, 10 * slow]}}
              for slow in (1, 2, 1)]
    assert _cells(compare.table(rounds, [])) == [
        ["rollpack", "20", "25", "50 %", "1"],
        [peer, "10", "10", "20 %", "2.00 / 2.50"],
        ["limit: the workload's FLOP at 1000 GFLOP/s", "", "50", "100 %", ""],
        ["limit of rollpack's steps, reading at 50 GB/s besides", "", "40", "80 %", ""]]


def test_the_limit_is_the_best_that_any_round_measured() -> None:
    quiet, busy = _ours([5, 4]), _ours([5, 4], peak_flops=5e11, roofline_share=1.0)
    assert _cells(compare.table([{"rollpack": busy}, {"rollpack": quiet}], []))[1][2] == "50"


def test_a_peer_without_numbers_keeps_its_line() -> None:
    broken = [{"rollpack": _ours([5, 4]), "vllm": None}]
    lines = _cells(compare.table(broken, ["llamacpp"]))
    assert ["llama.cpp", "not measured", "not measured", "", ""] in lines
    assert ["vLLM CPU", "not measured", "not measured", "", ""] in lines


def test_passes_ask_for_the_same_lengths_with_prompts_of_their_own(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "workload.jsonl"
    file.write_text(json.dumps({"prompt_tokens": 9, "response_tokens": [3, 5]}) + "\n")
    first, second = (workload.load(str(file), seed) for seed in (0, 1))
    assert [s.response_tokens for s in first] == [s.response_tokens for s in second] == [3, 5]
    assert first[0].prompt_ids == first[1].prompt_ids != second[0].prompt_ids
    assert all(len(s.prompt_ids) == 9 for s in first + second)
