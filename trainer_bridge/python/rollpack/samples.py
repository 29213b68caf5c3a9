"""Samples rebuilt from a batch of either layout: what the engine drew, one object a sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rollpack.columns import Columns
from rollpack.errors import DataLoss
from rollpack.schema import Array

_FINISH_REASONS = ("stop", "length", "abort")
_OPTIONAL = ("logprobs", "scaled_logprobs", "support_logmass", "entropy", "ref_log_prob")


@dataclass(frozen=True, eq=False)
class Sample:
    """One response to one prompt; n = its response tokens. Logprobs are natural logarithms.

    Attributes:
        request_id: the submit that asked for it.
        prompt_index: the prompt's place in that submit.
        prompt_id: its text; an integer id comes back as its digits (7 and "7" are one id).
        sample_index: 0 to group_size - 1.
        group_size: samples of this prompt.
        prompt_ids: i32 (packed) or i64 (padded) [p].
        response_ids: i32 or i64 [n], the stop token included.
        rollout_log_probs: f32 [n], of the kind that rollout.logprobs_mode names.
        weight_versions: i32 [n], the version each token was drawn from; None in the padded layout.
        finish_reason: "stop", "length" or "abort".
        stop_token_id: the token that ended it, None if none did.
        temperature: what it was sampled at.
        logprobs: f32 [n], like the three below only where bridge.columns names it.
        scaled_logprobs: f32 [n].
        support_logmass: f32 [n].
        entropy: f32 [n].
        ref_log_prob: f32 [n], of the reference policy at the sample's temperature, where
            reference_model.path names one.
    """

    request_id: int
    prompt_index: int
    prompt_id: str
    sample_index: int
    group_size: int
    prompt_ids: Array
    response_ids: Array
    rollout_log_probs: Array
    weight_versions: Array | None
    finish_reason: str
    stop_token_id: int | None
    temperature: float
    logprobs: Array | None = None
    scaled_logprobs: Array | None = None
    support_logmass: Array | None = None
    entropy: Array | None = None
    ref_log_prob: Array | None = None


def read_samples(columns: Columns, num_samples: int, *, copy: bool) -> Iterator[Sample]:
    """Yield each sample of a batch.

    Args:
        columns: all columns of one batch; without a column `cu_seqlens` it is padded.
        num_samples: S.
        copy: False gives views on the batch's memory.

    Raises:
        DataLoss: a finish_reason that this version does not know.
    """
    for index in range(num_samples):
        cut = _packed_cut if "cu_seqlens" in columns else _padded_cut
        parts = cut(columns, index)
        if copy:
            parts = {name: array.copy() for name, array in parts.items()}
        stop_token_id = int(columns["stop_token_id"][index])
        reason = int(columns["finish_reason"][index])
        if reason >= len(_FINISH_REASONS):
            raise DataLoss(field=f"finish_reason[{index}]", value=str(reason), allowed="0, 1 or 2")
        yield Sample(
            request_id=int(columns["request_id"][index]),
            prompt_index=int(columns["prompt_index"][index]),
            prompt_id=_prompt_id(columns, index),
            sample_index=int(columns["sample_index"][index]),
            group_size=int(columns["group_size"][index]),
            finish_reason=_FINISH_REASONS[reason],
            stop_token_id=None if stop_token_id < 0 else stop_token_id,
            temperature=float(columns["temperature"][index]),
            prompt_ids=parts["prompt_ids"],
            response_ids=parts["response_ids"],
            rollout_log_probs=parts["rollout_log_probs"],
            weight_versions=parts.get("weight_versions"),
            logprobs=parts.get("logprobs"),
            scaled_logprobs=parts.get("scaled_logprobs"),
            support_logmass=parts.get("support_logmass"),
            entropy=parts.get("entropy"),
            ref_log_prob=parts.get("ref_log_prob"),
        )


def _prompt_id(columns: Columns, index: int) -> str:
    begin, end = columns["prompt_id_starts"][index : index + 2]
    return columns["prompt_id_bytes"][begin:end].tobytes().decode("utf-8")


def _packed_cut(columns: Columns, index: int) -> dict[str, Array]:
    begin, end = (int(edge) for edge in columns["cu_seqlens"][index : index + 2])
    response = slice(begin + int(columns["prompt_lens"][index]), end)
    parts = {name: columns[name][response] for name in _OPTIONAL if name in columns}
    parts["prompt_ids"] = columns["input_ids"][begin : response.start]
    parts["response_ids"] = columns["input_ids"][response]
    for name in ("rollout_log_probs", "weight_versions"):
        parts[name] = columns[name][response]
    return parts


def _padded_cut(columns: Columns, index: int) -> dict[str, Array]:
    prompts = columns["prompts"]
    response = slice(0, int(columns["response_lens"][index]))
    parts = {name: columns[name][index, response] for name in _OPTIONAL if name in columns}
    prompt_begin = prompts.shape[1] - int(columns["prompt_lens"][index])
    parts["prompt_ids"] = prompts[index, prompt_begin:]
    parts["response_ids"] = columns["responses"][index, response]
    parts["rollout_log_probs"] = columns["rollout_log_probs"][index, response]
    return parts
