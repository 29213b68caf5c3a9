"""Layouts of other trainers, by name: verl, TRL, OpenRLHF, NeMo RL, flash-attention's varlen call.

Each has the columns of a batch under the names and in the shapes and paddings it expects. What lies
in the slot as a view wants it is handed out as it is, on shared memory; the rest is one copy, made
here. Masks come from lengths: a pad id is written, never read. Which columns each view has, and
which are copies, is tabled in trainer_bridge/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rollpack.columns import Columns
from rollpack.errors import InvalidArgument
from rollpack.schema import Array

_VALUES = (
    "rollout_log_probs",
    "logprobs",
    "scaled_logprobs",
    "support_logmass",
    "entropy",
    "ref_log_prob",
)
_LENGTH = 1  # finish_reason of a response that was cut by its limit


@dataclass(frozen=True)
class Padding:
    """How wide a view that pads is; None: as wide as it must be.

    Attributes:
        pad_to_multiple_of: widths are rounded up to a multiple of this.
        prompt_width: P of verl and trl.
        response_width: R of verl and trl.
        width: T of openrlhf, S of nemo_rl.
        pad_token_id: written into pads.
    """

    pad_to_multiple_of: int = 1
    prompt_width: int | None = None
    response_width: int | None = None
    width: int | None = None
    pad_token_id: int = 0

    def widen(self, field: str, needed: int) -> int:
        """The width that the option `field` gives to samples of `needed` columns.

        Raises:
            InvalidArgument: a fixed width is smaller than that.
        """
        fixed: int | None = getattr(self, field)
        if fixed is None:
            return -(-needed // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if fixed < needed:
            raise InvalidArgument(
                field=field,
                value=str(fixed),
                allowed=f"at least {needed}, the longest of the batch",
            )
        return fixed


@dataclass(frozen=True)
class Source:
    """Samples to be laid out, of a whole batch or of one of its rows.

    Attributes:
        columns: writable arrays by name, of either layout.
        cu_seqlens: i32 [B + 1] from 0 where the columns are packed, None where they are padded.
    """

    columns: Mapping[str, Array]
    cu_seqlens: Array | None

    @property
    def prompt_lens(self) -> Array:
        """Tokens of each prompt, i64 [B]."""
        return self.columns["prompt_lens"].astype(np.int64)

    @property
    def response_lens(self) -> Array:
        """Tokens of each response, i64 [B]."""
        return self.columns["response_lens"].astype(np.int64)

    @property
    def names_of_values(self) -> list[str]:
        """Columns with one f32 a response token."""
        return [name for name in _VALUES if name in self.columns]

    def tokens(self) -> Array:
        """Prompt and response of each sample, one behind the other, [T]; a copy if padded."""
        ids = self.columns["input_ids"]
        if self.cu_seqlens is not None:
            return ids
        prompt_width = self.columns["prompts"].shape[1]
        return ids[_real(self.prompt_lens, self.response_lens, prompt_width, ids.shape[1])]

    def is_response(self) -> Array:
        """Which of `tokens()` were sampled, bool [T]."""
        lengths = np.stack([self.prompt_lens, self.response_lens], axis=1).ravel()
        return np.repeat(np.tile([False, True], len(self.prompt_lens)), lengths)

    def values(self, name: str) -> Array:
        """A value of each response token, f32, sample after sample; a copy."""
        column = self.columns[name]
        if self.cu_seqlens is not None:
            return column[self.is_response()]
        return column[_left(self.response_lens, column.shape[1])]


class LayoutView(Columns):
    """A batch, or a row of one, as another trainer lays it out: arrays by its names for them.

    Attributes:
        name: the view's, e.g. "verl".
        copied: the arrays that are copies; all others lie on the slot's shared memory.
        max_seqlen: tokens of the longest sample, without pads.
    """

    def __init__(
        self,
        name: str,
        shared: dict[str, Array],
        copied: dict[str, Array],
        *,
        max_seqlen: int,
        predictor_aligned: frozenset[str] = frozenset(),
    ) -> None:
        """Hold arrays that are writable, as torch shares them."""
        super().__init__({**shared, **copied})
        self.name = name
        self.copied = frozenset(copied)
        self.max_seqlen = max_seqlen
        self._predictor_aligned = predictor_aligned

    def alignment(self, name: str) -> str:
        """What entry t of an array with one a token is about: "token" t, or "predictor" of t + 1.

        Raises:
            KeyError: there is no such array.
        """
        self[name]
        return "predictor" if name in self._predictor_aligned else "token"

    def __repr__(self) -> str:
        """Its arrays and their shapes."""
        shapes = ", ".join(f"{name} {list(self[name].shape)}" for name in self)
        return f"<{self.name} view: {shapes}>"


def make_view(name: str, source: Source, padding: Padding) -> LayoutView:
    """Lay out samples as the trainer `name` expects them.

    Raises:
        InvalidArgument: there is no such view; an option is not one of its, or is out of range.
    """
    if name not in _VIEWS:
        raise InvalidArgument(field="view", value=repr(name), allowed="one of " + ", ".join(_VIEWS))
    build, options = _VIEWS[name]
    for option in ("pad_to_multiple_of", "prompt_width", "response_width", "width"):
        value, default = getattr(padding, option), getattr(Padding, option)
        if value == default:
            continue
        if option not in options:
            raise InvalidArgument(
                field=option,
                value=str(value),
                origin=f"view {name}",
                allowed="one of " + ", ".join(options) if options else "no option: it has no pads",
            )
        if value < 1:
            raise InvalidArgument(field=option, value=str(value), allowed="1 or more")
    return build(source, padding)


def _verl(source: Source, padding: Padding) -> LayoutView:
    names = ("prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask")
    shared, copied = _two_sided(source, padding)
    return _named("verl", source, shared, copied, {name: name for name in names})


def _trl(source: Source, padding: Padding) -> LayoutView:
    names = {
        "prompts": "prompt_ids",
        "prompt_mask": "prompt_mask",
        "responses": "completion_ids",
        "response_mask": "completion_mask",
        "rollout_log_probs": "sampling_per_token_logps",
    }
    shared, copied = _two_sided(source, padding)
    return _named("trl", source, shared, copied, names)


def _named(
    view: str,
    source: Source,
    shared: dict[str, Array],
    copied: dict[str, Array],
    names: dict[str, str],
) -> LayoutView:
    """Keep the arrays that a view has, under its names; values it has no name for keep ours."""
    names = {**{name: name for name in source.names_of_values}, **names}
    parts = [
        {new: arrays[old] for old, new in names.items() if old in arrays}
        for arrays in (shared, copied)
    ]
    return LayoutView(view, *parts, max_seqlen=_max_seqlen(source))


def _two_sided(source: Source, padding: Padding) -> tuple[dict[str, Array], dict[str, Array]]:
    """Prompts padded on the left, responses on the right: what is on shared memory, what is not."""
    prompt_lens, response_lens = source.prompt_lens, source.response_lens
    if source.cu_seqlens is None and _is_as_wide(source, padding):
        shared = dict(source.columns)
        prompt_width = shared["prompts"].shape[1]
        shared["prompt_mask"] = shared["attention_mask"][:, :prompt_width]
        return shared, {}
    prompt_width = padding.widen("prompt_width", int(prompt_lens.max(initial=0)))
    response_width = padding.widen("response_width", int(response_lens.max(initial=0)))
    tokens, is_response = source.tokens(), source.is_response()
    prompt_mask = _right(prompt_lens, prompt_width)
    response_mask = _left(response_lens, response_width)
    pad = padding.pad_token_id
    prompts = _scatter(prompt_mask, tokens[~is_response], pad, np.int64)
    responses = _scatter(response_mask, tokens[is_response], pad, np.int64)
    attention_mask = np.concatenate([prompt_mask, response_mask], axis=1).astype(np.int64)
    copied = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": np.concatenate([prompts, responses], axis=1),
        "attention_mask": attention_mask,
        "position_ids": np.maximum(attention_mask.cumsum(axis=1) - 1, 0),
        "response_mask": response_mask.astype(np.int64),
        "prompt_mask": prompt_mask.astype(np.int64),
    }
    for name in source.names_of_values:
        copied[name] = _scatter(response_mask, source.values(name), 0.0, np.float32)
    return {}, copied


def _is_as_wide(source: Source, padding: Padding) -> bool:
    """Whether a padded batch has the widths that are asked for, so that nothing is to be moved."""
    multiple = padding.pad_to_multiple_of
    for name, fixed in (("prompts", padding.prompt_width), ("responses", padding.response_width)):
        width = source.columns[name].shape[1]
        if width != fixed if fixed is not None else width % multiple:
            return False
    return True


def _openrlhf(source: Source, padding: Padding) -> LayoutView:
    right = _right_padded(source, padding)
    copied = {
        "sequences": right.pop("input_ids"),
        "attention_mask": right.pop("attention_mask"),
        # Entry t - 1 is about the action that samples token t.
        "action_mask": right.pop("is_response")[:, 1:],
        **{name: values[:, 1:] for name, values in right.items()},
    }
    predictor_aligned = frozenset({"action_mask", *right})
    copied["response_length"] = source.response_lens
    copied["total_length"] = source.prompt_lens + source.response_lens
    copied["truncated"] = source.columns["finish_reason"] == _LENGTH
    return LayoutView(
        "openrlhf", {}, copied, max_seqlen=_max_seqlen(source), predictor_aligned=predictor_aligned
    )


def _nemo_rl(source: Source, padding: Padding) -> LayoutView:
    right = _right_padded(source, padding)
    lengths = source.prompt_lens + source.response_lens
    copied = {
        "input_ids": right.pop("input_ids"),
        "input_lengths": lengths,
        "token_mask": right.pop("is_response").astype(np.int64),
        "sample_mask": np.ones(len(lengths), np.int64),
        "generation_logprobs": right.pop("rollout_log_probs"),
        "generation_lengths": source.response_lens,
        "unpadded_sequence_lengths": lengths,
        "truncated": source.columns["finish_reason"] == _LENGTH,
    }
    del right["attention_mask"]
    return LayoutView("nemo_rl", {}, {**copied, **right}, max_seqlen=_max_seqlen(source))


def _right_padded(source: Source, padding: Padding) -> dict[str, Array]:
    """Prompt and response together, all pads on the right; values 0 but on sampled tokens."""
    lengths = source.prompt_lens + source.response_lens
    width = padding.widen("width", int(lengths.max(initial=0)))
    real = _left(lengths, width)
    is_response = real & ~_left(source.prompt_lens, width)
    right = {
        "input_ids": _scatter(real, source.tokens(), padding.pad_token_id, np.int64),
        "attention_mask": real.astype(np.int64),
        "is_response": is_response,
    }
    for name in source.names_of_values:
        right[name] = _scatter(is_response, source.values(name), 0.0, np.float32)
    return right


_VARLEN = ("input_ids", "position_ids", "segment_ids", "loss_mask", "weight_versions")


def _flash_attn_varlen(source: Source, padding: Padding) -> LayoutView:
    del padding  # nothing is padded
    shared: dict[str, Array] = {}
    copied: dict[str, Array] = {}
    if source.cu_seqlens is not None:
        names = (*_VARLEN, *source.names_of_values)
        shared = {name: source.columns[name] for name in names if name in source.columns}
        is_in_slot = source.cu_seqlens is source.columns.get("cu_seqlens")
        (shared if is_in_slot else copied)["cu_seqlens"] = source.cu_seqlens
    else:
        lengths = source.prompt_lens + source.response_lens
        is_response = source.is_response()
        cu_seqlens = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        segment_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        copied = {
            "input_ids": source.tokens().astype(np.int32),
            "position_ids": np.arange(len(segment_ids), dtype=np.int32) - cu_seqlens[segment_ids],
            "segment_ids": segment_ids,
            "loss_mask": is_response.astype(np.uint8),
            "cu_seqlens": cu_seqlens,
        }
        for name in source.names_of_values:
            copied[name] = _scatter(is_response, source.values(name), np.nan, np.float32)
    return LayoutView("flash_attn_varlen", shared, copied, max_seqlen=_max_seqlen(source))


_Build = Callable[[Source, Padding], LayoutView]
_VIEWS: dict[str, tuple[_Build, tuple[str, ...]]] = {
    "verl": (_verl, ("pad_to_multiple_of", "prompt_width", "response_width")),
    "trl": (_trl, ("pad_to_multiple_of", "prompt_width", "response_width")),
    "openrlhf": (_openrlhf, ("pad_to_multiple_of", "width")),
    "nemo_rl": (_nemo_rl, ("pad_to_multiple_of", "width")),
    "flash_attn_varlen": (_flash_attn_varlen, ()),
}


def _max_seqlen(source: Source) -> int:
    return int((source.prompt_lens + source.response_lens).max(initial=0))


def _left(lengths: Array, width: int) -> Array:
    """True on the first lengths[b] of `width` columns, bool [B, width]."""
    real: Array = np.arange(width) < lengths[:, None]
    return real


def _right(lengths: Array, width: int) -> Array:
    """True on the last lengths[b] of `width` columns, bool [B, width]."""
    real: Array = np.arange(width) >= width - lengths[:, None]
    return real


def _real(prompt_lens: Array, response_lens: Array, prompt_width: int, width: int) -> Array:
    """True on the tokens of the padded layout's rows, bool [B, width]."""
    column = np.arange(width)
    begin = (prompt_width - prompt_lens)[:, None]
    real: Array = (column >= begin) & (column < prompt_width + response_lens[:, None])
    return real


def _scatter(real: Array, values: Array, pad: float, dtype: type) -> Array:
    """Put `values`, sample after sample, where `real` is True, and `pad` elsewhere."""
    out = np.full(real.shape, pad, dtype)
    out[real] = values
    return out
