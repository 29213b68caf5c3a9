"""Products by Intel's AMX: bits of their own, which no batch, rank or draft changes."""

from __future__ import annotations

import ctypes
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import rollpack
from engine_process import MODEL, Config, run, run_well, write_config, write_jsonl

# The processor has it, and the system lets a process that asks use its tiles (ARCH_REQ_XCOMP_PERM).
HAS_AMX = ("amx_bf16" in pathlib.Path("/proc/cpuinfo").read_text()
           and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)
BASE: Config = {
    "model": {"path": MODEL},
    "rollout": {"n": 3, "seed": 4, "response_length": 40, "ignore_eos": True},
    "engine": {"num_threads": 2, "kv_cache_memory": "256MiB", "cpu_amx": True},
    "bridge": {"columns": ["logprobs"]}}
PROMPTS = [{"prompt_id": f"p{index}", "input_ids": [500 + index, *range(28, 30 + 3 * index)]}
           for index in range(6)]


def _generate(folder: pathlib.Path, num_ranks: int = 0, **engine: Any) -> bytes:
    config = write_config(folder / "config.yaml", BASE, {"engine": engine})
    prompts = write_jsonl(folder / "prompts.jsonl", PROMPTS)
    run_well("generate", "--config", config, "--prompts", prompts, "--output",
             folder / "samples.jsonl", num_ranks=num_ranks)
    return (folder / "samples.jsonl").read_bytes()


@pytest.mark.skipif(not HAS_AMX, reason="no AMX here")
def test_batches_ranks_and_drafts_change_no_byte(tmp_path: pathlib.Path) -> None:
    expected = _generate(tmp_path)
    assert len(expected.splitlines()) == 3 * len(PROMPTS)
    for engine in ({"max_num_seqs": 1}, {"batching": "left_padded"}, {"num_threads": 1},
                   {"speculation": "on"}, {"max_num_batched_tokens": 7}):
        assert _generate(tmp_path, **engine) == expected, engine
    assert _generate(tmp_path, num_ranks=2, num_threads=1) == expected
    assert _generate(tmp_path, num_ranks=2, tensor_model_parallel_size=2) == expected


@pytest.mark.skipif(not HAS_AMX, reason="no AMX here")
def test_scores_are_near_those_without_it_and_the_fingerprint_tells_them_apart(
        tmp_path: pathlib.Path) -> None:
    samples, scores, fingerprints = [], [], []
    for amx in (True, False):
        config = write_config(tmp_path / "config.yaml", BASE, {"engine": {"cpu_amx": amx}})
        with rollpack.launch(config) as client:
            fingerprints.append(client.info.fingerprint)
            samples = samples or client.generate(PROMPTS)
            scores.append([scored.logprobs for scored in client.score(samples)])
    assert fingerprints == ["cpu-v1 bfloat16 amx-v1", "cpu-v1 bfloat16"]
    assert all(np.array_equal(sample.logprobs, scored)
               for sample, scored in zip(samples, scores[0], strict=True)), "drawn as scored"
    with_amx, without = np.concatenate(scores[0]), np.concatenate(scores[1])
    assert not np.array_equal(with_amx, without)
    # What rounding to bfloat16 between layers makes of sums in another order; transformers in
    # bfloat16 is as far from itself in float32.
    assert np.abs(with_amx - without).mean() < 0.02


@pytest.mark.parametrize("overrides", [
    pytest.param({"model": {"dtype": "float32"}}, id="float32"),
    pytest.param({"engine": {"backend": "reference"}}, id="reference"),
    pytest.param({}, id="without", marks=pytest.mark.skipif(HAS_AMX, reason="AMX is here"))])
def test_where_it_cannot_be_used_it_is_refused_by_name(overrides: Config,
                                                       tmp_path: pathlib.Path) -> None:
    config = write_config(tmp_path / "config.yaml", BASE, overrides)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    job = run("generate", "--config", config, "--prompts", prompts, "--output",
              tmp_path / "samples.jsonl")
    assert job.wait() == 1
    assert re.search(r"engine\.cpu_amx = true.*: expected false", job.stderr)
