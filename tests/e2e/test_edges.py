"""Edges of requests: pads that are tokens, shortest and longest prompts, stop rules, bad input."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import rollpack
from engine_process import Config, generate, read_jsonl, run, score, write_config, write_jsonl

EOS = 2  # of the tiny model, and its pad id


@pytest.fixture
def base(tiny_model: pathlib.Path) -> Config:
    """A configuration that starts in a fraction of a second."""
    return {"model": {"path": tiny_model},
            "rollout": {"n": 2, "prompt_length": 40, "response_length": 60},
            "engine": {"kv_cache_memory": "32MiB", "num_threads": 1},
            "bridge": {"slots": 2, "slot_bytes": "4MiB"}}


def _generate(tmp_path: pathlib.Path, prompts: list[dict[str, Any]], *layers: Config,
              name: str = "run") -> list[dict[str, Any]]:
    config = write_config(tmp_path / f"{name}.yaml", *layers)
    return generate(config, write_jsonl(tmp_path / f"{name}.in.jsonl", prompts),
                    tmp_path / f"{name}.out.jsonl")


PAD_PROMPTS = [  # of different lengths, with the pad id at both ends and inside
    {"prompt_id": "a", "input_ids": [EOS, EOS, 7, 8]},
    {"prompt_id": "b", "input_ids": [5, EOS, 6, EOS]},
    {"prompt_id": "c", "input_ids": [EOS]},
    {"prompt_id": "d", "input_ids": list(range(10, 45))}]


def test_pad_ids_in_prompts_and_responses_are_tokens(base: Config, tmp_path: pathlib.Path) -> None:
    goes_on: Config = {"rollout": {"ignore_eos": True, "n": 8, "response_length": 250}}
    samples = _generate(tmp_path, PAD_PROMPTS, base, goes_on)
    assert any(EOS in sample["response_ids"][:-1] for sample in samples), "none was sampled"
    padded = _generate(tmp_path, PAD_PROMPTS, base, goes_on,
                       {"engine": {"batching": "left_padded"}}, name="padded")
    assert padded == samples
    alone = [sample for prompt in PAD_PROMPTS
             for sample in _generate(tmp_path, [prompt], base, goes_on, name="alone")]
    assert alone == samples


def test_padded_layout_masks_by_length_not_by_id(base: Config, tmp_path: pathlib.Path) -> None:
    config = write_config(tmp_path / "config.yaml", base, {
        "rollout": {"ignore_eos": True, "n": 8, "response_length": 200},
        "bridge": {"layout": "padded"}})
    with rollpack.launch(config) as client:
        prompts = [{**prompt, "sampling": {"response_length": 50 + 50 * index}}
                   for index, prompt in enumerate(PAD_PROMPTS)]
        client.submit(prompts)
        with client.next_batch(num_groups=len(prompts)) as batch:
            inside = np.arange(batch.responses.shape[1]) < batch.response_lens[:, None]
            assert (batch.responses[inside] == EOS).any(), "no pad id was sampled"
            assert np.array_equal(batch.response_mask, inside.astype(np.int64))
            num_prompt = batch.prompts.shape[1]
            left = np.arange(num_prompt) >= num_prompt - batch.prompt_lens[:, None]
            mask = np.concatenate([left, inside], axis=1).astype(np.int64)
            assert np.array_equal(batch.attention_mask, mask)
            positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
            assert np.array_equal(batch.position_ids, positions)
            assert (batch.responses[~inside] == EOS).all() and (batch.prompts[~left] == EOS).all()
            assert (batch.rollout_log_probs[~inside] == 0).all()


def test_stop_rules(base: Config, tmp_path: pathlib.Path) -> None:
    stops = list(range(100, 120))
    prompts = [{"prompt_id": name, "input_ids": [9, 8, 7], "n": 40, "sampling": sampling}
               for name, sampling in {
                   "stops": {"stop_token_ids": stops},
                   "no-eos": {"stop_token_ids": stops, "ignore_eos": True},
                   "late": {"stop_token_ids": stops, "min_tokens": 30},
                   "none": {"ignore_eos": True}}.items()]
    samples = _generate(tmp_path, prompts, base)
    for sample in samples:
        ids, name = sample["response_ids"], sample["prompt_id"]
        enders = {"stops": {EOS, *stops}, "late": {EOS, *stops}, "no-eos": set(stops),
                  "none": set()}[name]
        assert not enders & set(ids[:-1]), "it went on after a stop token"
        if sample["finish_reason"] == "stop":
            assert ids[-1] == sample["stop_token_id"] and ids[-1] in enders
        else:
            assert sample["finish_reason"] == "length" and len(ids) == 60
        assert len(ids) >= (31 if name == "late" else 1)
        assert len(sample["logprobs"]) == len(ids)
        # Mass that min_tokens took away shows, and only before it is reached.
        cut = np.array(sample["support_logmass"]) < 0
        assert cut[:30].all() and not cut[30:].any() if name == "late" else not cut.any()
    reasons = {(sample["prompt_id"], sample["finish_reason"]) for sample in samples}
    assert {("stops", "stop"), ("no-eos", "stop"), ("late", "stop"), ("none", "length")} <= reasons
    assert ("none", "stop") not in reasons


def test_prompts_of_one_token_and_at_the_limit(base: Config, tmp_path: pathlib.Path) -> None:
    prompts = [{"prompt_id": 0, "input_ids": [5]}, {"prompt_id": 1, "input_ids": [5] * 40}]
    samples = _generate(tmp_path, prompts, base, {"engine": {"max_num_batched_tokens": 7}})
    assert [sample["prompt_id"] for sample in samples] == [0, 0, 1, 1]
    assert all(sample["response_ids"] for sample in samples)


@pytest.mark.parametrize("overflow", ["error", "skip", "truncate_left"])
def test_a_prompt_one_over_the_limit(overflow: str, base: Config, tmp_path: pathlib.Path) -> None:
    long = [*range(50, 91)]  # 41 tokens where 40 are allowed
    config = write_config(tmp_path / "config.yaml", base,
                          {"rollout": {"prompt_overflow": overflow}})
    prompts = write_jsonl(tmp_path / "in.jsonl", [{"prompt_id": "long", "input_ids": long},
                                                  {"prompt_id": "cut", "input_ids": long[1:]}])
    job = run("generate", "--config", config, "--prompts", prompts, "--output",
              tmp_path / "out.jsonl")
    if overflow == "error":
        assert job.status in (1, 2)
        for part in ("41 tokens", "rollout.prompt_length", "40", "in.jsonl:1"):
            assert part in job.stderr
        return
    samples = read_jsonl(tmp_path / "out.jsonl")
    if overflow == "skip":
        # The long prompt's samples are typed failures; the other's are there.
        assert job.status == 1
        assert [("error" in sample) for sample in samples] == [True, True, False, False]
        assert samples[0]["error"]["field"] == "input_ids"
        assert "40" in samples[0]["error"]["allowed"]
        return
    assert job.status == 0
    scored = score(config, write_jsonl(tmp_path / "s.jsonl", [
        {"input_ids": long[1:], "response_ids": sample["response_ids"]} for sample in samples]),
        tmp_path / "scored.jsonl")
    for sample, result in zip(samples, scored, strict=True):
        assert sample["logprobs"] == result["logprobs"], "not the last 40 tokens were used"


def test_sequences_end_at_the_models_last_position(base: Config, tmp_path: pathlib.Path) -> None:
    # max_position_embeddings is 640: 600 + 60 do not fit, and the sample ends with "length".
    samples = _generate(tmp_path, [{"input_ids": [3] * 600}], base,
                        {"rollout": {"prompt_length": 600, "ignore_eos": True}})
    assert [(len(sample["response_ids"]), sample["finish_reason"]) for sample in samples] == [
        (40, "length")] * 2


def test_a_request_beyond_the_kv_cache_names_the_bytes(base: Config,
                                                       tmp_path: pathlib.Path) -> None:
    config = write_config(tmp_path / "config.yaml", base, {"engine": {"kv_cache_memory": "32KiB"}})
    prompts = write_jsonl(tmp_path / "in.jsonl", [{"input_ids": [5] * 40, "n": 1}])
    job = run("generate", "--config", config, "--prompts", prompts, "--output",
              tmp_path / "out.jsonl")
    assert job.status == 1
    for part in ("engine.kv_cache_memory", "at least", "bytes"):
        assert part in job.stderr + (tmp_path / "out.jsonl").read_text() if (
            tmp_path / "out.jsonl").exists() else job.stderr


# Of use and configuration: exit status 2. Of files that are read later: 1.
BAD_COMMANDS = {
    "no-command": (2, [], ["subcommand"]),
    "unknown-command": (2, ["train"], ["train"]),
    "no-prompts": (2, ["generate", "--config", "CONFIG"], ["--prompts"]),
    "unknown-option": (2, ["config", "--config", "CONFIG", "--fast"], ["--fast"]),
    "no-such-config": (2, ["config", "--config", "none.yaml"], ["none.yaml"]),
    "unknown-key": (2, ["config", "--config", "CONFIG", "--set", "engine.max_num_seq=3"],
                    ["engine.max_num_seq", "did you mean max_num_seqs", "--set"]),
    "bad-value": (2, ["config", "--config", "CONFIG", "--set", "rollout.top_p=1.5"],
                  ["rollout.top_p", "1.5", "--set"]),
    "bad-pair": (2, ["config", "--config", "CONFIG", "--set", "rollout.top_p"],
                 ["rollout.top_p"]),
    "no-such-model": (1, ["generate", "--config", "CONFIG", "--set", "model.path=none",
                          "--prompts", "IN", "--output", "OUT"], ["none/config.json"]),
    "no-such-prompts": (1, ["generate", "--config", "CONFIG", "--prompts", "none.jsonl",
                            "--output", "OUT"], ["--prompts", "none.jsonl"]),
    "no-such-folder": (1, ["generate", "--config", "CONFIG", "--prompts", "IN", "--output",
                           "none/out.jsonl"], ["--output", "none/out.jsonl"]),
}


@pytest.mark.parametrize(("status", "arguments", "parts"), BAD_COMMANDS.values(),
                         ids=BAD_COMMANDS)
def test_bad_commands_say_what_is_wrong(status: int, arguments: list[str], parts: list[str],
                                        base: Config, tmp_path: pathlib.Path) -> None:
    config = write_config(tmp_path / "config.yaml", base)
    prompts = write_jsonl(tmp_path / "in.jsonl", [{"input_ids": [5]}])
    output = tmp_path / "out.jsonl"
    names = {"CONFIG": config, "IN": prompts, "OUT": output}
    job = run(*[names.get(argument, argument) for argument in arguments])
    assert job.status == status, job.stderr
    for part in parts:
        assert part in job.stderr, job.stderr
    assert not output.exists()


BAD_PROMPTS = {
    "empty": ('{"input_ids": []}', ["input_ids", "at least one"]),
    "unknown-id": ('{"input_ids": [307]}', ["307", "306"]),
    "negative-id": ('{"input_ids": [-1]}', ["-1"]),
    "float-id": ('{"input_ids": [1.5]}', ["1.5"]),
    "unknown-key": ('{"input_ids": [1], "max_tokens": 3}', ["max_tokens"]),
    "stop-strings": ('{"input_ids": [1], "stop": ["x"]}', ["stop", "stop_token_ids"]),
    "unknown-sampling": ('{"input_ids": [1], "sampling": {"beams": 2}}', ["sampling.beams"]),
    "bad-temperature": ('{"input_ids": [1], "sampling": {"temperature": -1}}',
                        ["sampling.temperature", "-1"]),
    "not-json": ('{"input_ids": [1]', ["in.jsonl:2"]),
    "repeated-id": ('{"prompt_id": "0", "input_ids": [1]}', ["prompt_id", "in.jsonl:1"]),
}


@pytest.mark.parametrize(("line", "parts"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_name_their_line(line: str, parts: list[str], base: Config,
                                     tmp_path: pathlib.Path) -> None:
    config = write_config(tmp_path / "config.yaml", base)
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"input_ids": [5]}\n' + line + "\n")
    job = run("generate", "--config", config, "--prompts", prompts, "--output",
              tmp_path / "out.jsonl")
    assert job.status in (1, 2), job.stderr
    for part in [*parts, "in.jsonl:2"]:
        assert part in job.stderr, job.stderr
    assert not (tmp_path / "out.jsonl").exists()
