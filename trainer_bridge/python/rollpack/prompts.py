"""What a trainer passes in, as the protocol wants it: token ids become little-endian i32 bytes.

Only what would be lost in the encoding is checked here; everything else is the server's to judge,
so that there is one list of sampling keys and one text for each mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from rollpack.errors import DataLoss, InvalidArgument
from rollpack.samples import Sample

_MAX_TOKEN_ID = 2**31 - 1
# Room for a reply of three f32 a response token within one frame.
_MAX_SCORE_BYTES = 12 << 20

TokenIds = Sequence[int] | npt.NDArray[np.integer]


class Sampling(TypedDict, total=False):
    """Sampling keys a prompt may override; what is absent comes from the configuration."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    response_length: int
    min_tokens: int
    stop_token_ids: TokenIds
    ignore_eos: bool


class Prompt(TypedDict, total=False):
    """A prompt with what belongs to it; only input_ids is needed."""

    prompt_id: str | int
    input_ids: TokenIds
    n: int
    sampling: Sampling


class ScoreSequence(TypedDict, total=False):
    """A response to be scored after its prompt; `id` is its index where absent."""

    id: str | int
    input_ids: TokenIds
    response_ids: TokenIds
    temperature: float


@dataclass(frozen=True, eq=False)
class ScoredSequence:
    """The logprobs of a given response, n tokens, natural logarithm.

    Attributes:
        id: as given.
        logprobs: f32 [n], temperature 1.
        scaled_logprobs: f32 [n], at the sequence's temperature.
        entropy: f32 [n], of the scaled distribution, in nats.
    """

    id: str | int
    logprobs: npt.NDArray[np.float32]
    scaled_logprobs: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]


def encode_prompts(
    prompts: Iterable[Prompt | TokenIds], n: int | None, sampling: Sampling | None
) -> list[dict[str, Any]]:
    """Encode the prompts of one submit.

    Args:
        prompts: token ids, or maps that hold them; `n` and `sampling` of a map go before the ones
            given here for all.
        n: samples a prompt; None leaves it to the configuration.
        sampling: keys for every prompt.

    Raises:
        InvalidArgument: names the prompt and the field.
    """
    encoded = []
    for index, prompt in enumerate(_each(prompts, "prompts")):
        where = f"prompts[{index}]"
        fields: dict[str, Any] = dict(prompt) if isinstance(prompt, Mapping) else {}
        ids = fields.get("input_ids") if isinstance(prompt, Mapping) else prompt
        fields["input_ids"] = encode_ids(ids, f"{where}.input_ids")
        if n is not None:
            fields.setdefault("n", n)
        own_sampling = fields.get("sampling") or {}
        if not isinstance(own_sampling, Mapping):
            raise InvalidArgument(
                field=f"{where}.sampling", value=_short(own_sampling), allowed="a map"
            )
        merged = {**(sampling or {}), **own_sampling}
        if "stop_token_ids" in merged:
            field = f"{where}.sampling.stop_token_ids"
            merged["stop_token_ids"] = encode_ids(merged["stop_token_ids"], field)
        if merged:
            fields["sampling"] = merged
        encoded.append(fields)
    return encoded


def encode_sequences(
    sequences: Iterable[ScoreSequence | Sample],
) -> tuple[list[list[dict[str, Any]]], list[str | int]]:
    """Encode sequences to be scored, in parts that fit one frame each.

    Returns:
        The parts, in which a sequence's id is its index over all, and the ids as given.

    Raises:
        InvalidArgument: names the sequence and the field.
    """
    parts: list[list[dict[str, Any]]] = []
    ids: list[str | int] = []
    room = 0
    for index, sequence in enumerate(_each(sequences, "sequences")):
        if isinstance(sequence, Sample):
            sequence = {
                "input_ids": sequence.prompt_ids,
                "response_ids": sequence.response_ids,
                "temperature": sequence.temperature,
            }
        if not isinstance(sequence, Mapping):
            raise InvalidArgument(
                field=f"sequences[{index}]",
                value=_short(sequence),
                allowed="a map with input_ids and response_ids, or a Sample",
            )
        ids.append(sequence.get("id", index))
        fields = {**sequence, "id": index}
        for name in ("input_ids", "response_ids"):
            fields[name] = encode_ids(sequence.get(name), f"sequences[{index}].{name}")
        cost = len(fields["input_ids"]) + 3 * len(fields["response_ids"]) + 256
        if not parts or cost > room:
            parts.append([])
            room = _MAX_SCORE_BYTES
        parts[-1].append(fields)
        room -= cost
    return parts, ids


def decode_scores(
    results: Iterable[Mapping[str, Any]], ids: list[str | int]
) -> list[ScoredSequence]:
    """Put the results of all parts into the order of the sequences.

    Raises:
        DataLoss: a sequence has no result, or two.
    """
    by_index = {result["id"]: result for result in results}
    if sorted(by_index) != list(range(len(ids))):
        raise DataLoss(
            field="score results", value=str(len(by_index)), allowed=f"one for each of {len(ids)}"
        )
    return [
        ScoredSequence(
            id=ids[index],
            logprobs=_floats(by_index[index]["logprobs"]),
            scaled_logprobs=_floats(by_index[index]["scaled_logprobs"]),
            entropy=_floats(by_index[index]["entropy"]),
        )
        for index in range(len(ids))
    ]


def encode_ids(ids: object, field: str) -> bytes:
    """Encode token ids as little-endian i32.

    Args:
        ids: a list, array or tensor of integers, [n].
        field: how an error names it.

    Raises:
        InvalidArgument: not one-dimensional, not integers, or outside 0 .. 2^31 - 1.
    """
    try:
        array = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)
    except ValueError:  # rows of different lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidArgument(
            "a single prompt is a list of one list" if array.ndim == 0 else "",
            field=field,
            value=_short(ids),
            allowed="a one-dimensional list of integer token ids",
        )
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= _MAX_TOKEN_ID:
        wrong = array[(array < 0) | (array > _MAX_TOKEN_ID)][0]
        raise InvalidArgument(
            field=field, value=str(wrong), allowed=f"token ids from 0 to {_MAX_TOKEN_ID}"
        )
    return array.astype("<i4").tobytes()


def _each(items: Iterable[Any], field: str) -> Iterable[Any]:
    if isinstance(items, (Mapping, str, bytes)):
        raise InvalidArgument(
            "put it into a list", field=field, value=_short(items), allowed="a list"
        )
    return items


def _floats(data: bytes) -> npt.NDArray[np.float32]:
    return np.frombuffer(data, "<f4")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
