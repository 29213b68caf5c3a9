"""`rollpack bench` as a user runs it: its one JSON object, and batching modes side by side."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from typing import Any

import pytest
from engine_process import BINARY, write_config, write_jsonl

PROMPTS = [9, 40, 3, 17, 33, 5, 21, 12]
RESPONSES = [[4, 1], [3], [6, 2], [1], [5], [2], [3], [7]]
KEYS = {
    "batching", "wall_s", "passes_s", "prompt_tokens", "response_tokens", "response_tokens_per_s",
    "tokens_computed", "num_steps", "num_preemptions", "time_to_first_token_s",
    "inter_token_latency_s", "peak_memory_bytes", "peak_kv_bytes", "peak_activation_bytes",
    "weight_bytes", "peak_flops", "read_bandwidth_bytes_per_s", "limits_drift", "roofline_share",
    "step_roofline_share", "backend", "num_ranks", "num_threads", "counters"}
WHOLE = {"prompt_tokens", "response_tokens", "tokens_computed", "num_steps", "num_preemptions",
         "peak_memory_bytes", "peak_kv_bytes", "peak_activation_bytes", "weight_bytes"}


@pytest.fixture
def files(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A configuration and a workload."""
    config = write_config(tmp_path / "config.yaml", {
        "model": {"path": tiny_model},
        "engine": {"kv_cache_memory": "16MiB", "num_threads": 1, "max_num_seqs": 4,
                   "max_num_batched_tokens": 32}})
    workload = write_jsonl(tmp_path / "workload.jsonl", [
        {"prompt_tokens": prompt, "response_tokens": responses}
        for prompt, responses in zip(PROMPTS, RESPONSES, strict=True)])
    return config, workload


def _bench(files: tuple[pathlib.Path, pathlib.Path], *arguments: Any,
           num_ranks: int = 0) -> tuple[dict[str, Any], str]:
    """Runs it. Returns: the object on stdout, the text on stderr."""
    config, workload = files
    command = [BINARY, "bench", "--config", config, "--workload", workload, *arguments]
    if num_ranks:
        command = ["mpirun", "-n", num_ranks, "--bind-to", "none", "--oversubscribe", *command]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1",
                   "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 1, lines
    return json.loads(lines[0]), done.stderr


def _check_report(report: dict[str, Any], num_passes: int) -> None:
    assert report.keys() >= KEYS
    for key in WHOLE:
        assert isinstance(report[key], int), key
    assert report["prompt_tokens"] == sum(PROMPTS)
    assert report["response_tokens"] == sum(map(sum, RESPONSES))
    assert len(report["passes_s"]) == num_passes and min(report["passes_s"]) == report["wall_s"]
    assert 0 < report["roofline_share"] < 1
    assert 0 < report["step_roofline_share"]  # a tiny model lies in caches, faster than memory
    assert 0 <= report["limits_drift"] < 1
    for key in ("time_to_first_token_s", "inter_token_latency_s"):
        assert 0 < report[key]["p50"] <= report[key]["p99"] < report["wall_s"]
    assert report["peak_kv_bytes"] > 0
    assert report["peak_memory_bytes"] > report["weight_bytes"] + report["peak_kv_bytes"]


@pytest.mark.parametrize("num_ranks", [0, 2])
def test_bench_measures_one_mode_and_profiles_its_ops(
        num_ranks: int, files: tuple[pathlib.Path, pathlib.Path]) -> None:
    report, text = _bench(files, "--repeat", 2, "--profile", num_ranks=num_ranks)
    _check_report(report, num_passes=2)
    assert report["batching"] == "continuous"
    profile = report["profile"]
    shares = {op["op"]: op["share_of_time"] for op in profile["ops"]}
    assert {"embed", "rms_norm", "linear qkv", "linear o", "linear gate_up", "linear down",
            "rope_append", "attention", "lm_head"} <= shares.keys()
    rest = [profile[key] for key in ("between_ops", "handing_steps_over", "outside_of_steps")]
    assert all(share >= 0 for share in rest)
    assert sum(shares.values()) + sum(rest) == pytest.approx(1)
    assert "linear gate_up" in text and "outside of steps" in text
    # No pad, a prompt once a group in every pass, and the last token of a sample is not computed. A
    # sample that starts after its siblings computes the prompt's last token once more; one that
    # begins like another group's finds those tokens.
    needed = sum(PROMPTS) + report["response_tokens"] - sum(map(len, RESPONSES))
    found = report["counters"]["prefix_cache_hits"]
    assert report["tokens_computed"] <= needed + len(RESPONSES)
    assert report["tokens_computed"] + found >= needed
    assert found < len(PROMPTS), "no pass may find another's prompts"


def test_bench_compares_batching_modes(files: tuple[pathlib.Path, pathlib.Path]) -> None:
    modes = ["left_padded", "length_sorted", "prepacked", "continuous"]
    report, text = _bench(files, "--compare", ",".join(modes), "--profile")
    assert [line["batching"] for line in report["comparison"]] == modes
    assert [mode["batching"] for mode in report["modes"]] == modes
    for line, mode in zip(report["comparison"], report["modes"], strict=True):
        _check_report(mode, num_passes=1)
        assert line["wall_s"] == mode["wall_s"]
        assert line["tokens_computed"] == mode["tokens_computed"]
        # Every linear layer computes what the mode computes, pads included.
        rows = {op["op"]: op["rows"] for op in mode["profile"]["ops"]}
        num_layers = rows["linear qkv"] // mode["tokens_computed"]
        assert num_layers >= 1
        for name in ("linear qkv", "linear o", "linear gate_up", "linear down"):
            assert rows[name] == num_layers * mode["tokens_computed"], (name, mode["batching"])
        for baseline in ("left_padded", "length_sorted"):
            gain = line[f"over_{baseline}"]
            assert gain["share_of_bound"] == pytest.approx(gain["gain"] / gain["bound"])
        assert mode["batching"] in text
    computed = [line["tokens_computed"] for line in report["comparison"]]
    assert computed[0] > computed[1] > computed[3] and computed[0] > computed[2] > computed[3]
    assert report["comparison"][0]["over_left_padded"]["gain"] == 1
    # Caches are emptied between modes: only tokens that prompts begin with in common are found.
    assert report["modes"][3]["counters"]["prefix_cache_hits"] < len(PROMPTS)


def test_bench_refuses_a_mode_it_does_not_know(
        files: tuple[pathlib.Path, pathlib.Path]) -> None:
    config, workload = files
    done = subprocess.run([str(BINARY), "bench", "--config", str(config), "--workload",
                           str(workload), "--compare", "continuous,packed"],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "packed" in done.stderr and "prepacked" in done.stderr
