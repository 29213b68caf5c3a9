"""Both layouts read with NumPy alone, from the batch's own table, and rebuilt into the samples.

The C++ binary write_example_batch writes the batch and says in JSON what went in; nothing here
knows the C++ structs or the Python client.
"""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]
Sample = dict[str, Any]

HEADER = np.dtype(
    {
        "names": ["magic", "schema_version", "num_columns", "batch_seq", "generation", "bytes",
                  "crc32"],
        "formats": ["S8", "<u4", "<u4", "<u8", "<u8", "<u8", "<u4"],
        "offsets": [0, 8, 12, 16, 24, 32, 40],
        "itemsize": 64,
    }
)  # fmt: skip
ENTRY = np.dtype(
    {
        "names": ["name", "dtype", "ndim", "alignment", "shape", "offset", "bytes"],
        "formats": ["S48", "S8", "<u4", "<u4", ("<u8", 4), "<u8", "<u8"],
        "offsets": [0, 48, 56, 60, 64, 96, 104],
        "itemsize": 128,
    }
)
VALUES = ("logprobs", "scaled_logprobs", "support_logmass", "entropy")
SAMPLE_COLUMNS = {
    "request_id": "<i8",
    "prompt_index": "<i4",
    "sample_index": "<i4",
    "group_size": "<i4",
    "finish_reason": "|u1",
    "stop_token_id": "<i4",
    "temperature": "<f4",
}


class Batch:
    """A batch file and what was said to be in it."""

    def __init__(self, memory: bytes, described: dict[str, Any]) -> None:
        """Read header and table; columns are views by name."""
        self.memory = memory
        self.header = np.frombuffer(memory, HEADER, count=1)[0]
        self.entries = np.frombuffer(
            memory, ENTRY, count=int(self.header["num_columns"]), offset=HEADER.itemsize
        )
        self.columns: dict[str, Array] = {}
        for entry in self.entries:
            shape = [int(extent) for extent in entry["shape"][: entry["ndim"]]]
            column = np.frombuffer(
                memory, entry["dtype"].decode(), count=int(np.prod(shape)), offset=entry["offset"]
            ).reshape(shape)
            assert column.nbytes == entry["bytes"]
            self.columns[entry["name"].decode()] = column
        self.described = described
        self.samples: list[Sample] = described["samples"]

    def __getitem__(self, name: str) -> Array:
        """A column."""
        return self.columns[name]

    def sample_of(self, s: int) -> Sample:
        """What went in as the sample that the batch has at place `s`."""
        key = ("request_id", "prompt_index", "sample_index")
        found = [each for each in self.samples if all(each[k] == self[k][s] for k in key)]
        assert len(found) == 1
        return found[0]


def make_batch(folder: Path, layout: str, num_samples: int, seed: int) -> Batch:
    """Run the binary and read its two files."""
    build = Path(os.environ["ROLLPACK_BUILD_DIR"])
    batch_file, json_file = folder / "batch.bin", folder / "samples.json"
    subprocess.run(
        [build / "tests/trainer_bridge/write_example_batch", layout, str(num_samples), str(seed),
         batch_file, json_file],
        check=True,
        timeout=60,
    )  # fmt: skip
    return Batch(batch_file.read_bytes(), json.loads(json_file.read_text()))


CASES = [(1, 1), (3, 2), (50, 3), (200, 4)]  # (samples, seed)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} samples")
def packed(tmp_path: Path, request: pytest.FixtureRequest) -> Batch:
    """A packed batch."""
    return make_batch(tmp_path, "packed", *request.param)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} samples")
def padded(tmp_path: Path, request: pytest.FixtureRequest) -> Batch:
    """A padded batch."""
    return make_batch(tmp_path, "padded", *request.param)


def check_frame(batch: Batch) -> None:
    """Header, checksum, and columns that lie aligned, in order, without overlap."""
    assert batch.header["magic"] == b"RPKBATCH"
    assert batch.header["schema_version"] == 1
    assert batch.header["batch_seq"] == batch.described["batch_seq"]
    assert batch.header["generation"] == batch.described["generation"]
    assert batch.header["bytes"] == len(batch.memory)
    assert batch.header["crc32"] == zlib.crc32(batch.memory[64:]) == batch.described["crc32"]
    end = HEADER.itemsize + ENTRY.itemsize * len(batch.entries)
    for entry in batch.entries:
        assert entry["offset"] % 64 == 0
        assert end <= entry["offset"] < end + 64
        assert not any(batch.memory[end : entry["offset"]])
        end = entry["offset"] + entry["bytes"]
    assert end == len(batch.memory)


def check_sample_columns(batch: Batch) -> None:
    """Every column with one entry a sample."""
    num_samples = len(batch.samples)
    for name, dtype in SAMPLE_COLUMNS.items():
        assert batch[name].dtype == dtype and batch[name].shape == (num_samples,)
    starts = batch["prompt_id_starts"]
    assert starts.dtype == "<i4" and starts.shape == (num_samples + 1,)
    for s in range(num_samples):
        sample = batch.sample_of(s)
        for name in SAMPLE_COLUMNS:
            assert batch[name][s] == sample[name], name
        prompt_id = batch["prompt_id_bytes"][starts[s] : starts[s + 1]].tobytes().decode()
        assert prompt_id == sample["prompt_id"]
        assert batch["prompt_lens"][s] == len(sample["prompt_ids"])
        assert batch["response_lens"][s] == len(sample["response_ids"])


def rollout_log_probs(sample: Sample) -> Array:
    """processed_logprobs, in f32."""
    scaled = np.array(sample["scaled_logprobs"], np.float32)
    return scaled - np.array(sample["support_logmass"], np.float32)


def expected_versions(sample: Sample) -> Array:
    """Version spans, expanded to one entry a response token."""
    versions = np.full(len(sample["response_ids"]), -1, np.int32)
    for first_token, version in sample["weight_versions"]:
        versions[first_token:] = version
    return versions


def test_packed_frame_and_sample_columns(packed: Batch) -> None:
    check_frame(packed)
    check_sample_columns(packed)


def test_padded_frame_and_sample_columns(padded: Batch) -> None:
    check_frame(padded)
    check_sample_columns(padded)
    in_order = [padded.sample_of(s) for s in range(len(padded.samples))]
    assert in_order == padded.samples


def test_packed_tokens_are_the_samples(packed: Batch) -> None:
    cu_seqlens = packed["cu_seqlens"]
    num_tokens = int(cu_seqlens[-1])
    for name in ("input_ids", "position_ids", "segment_ids", "weight_versions"):
        assert packed[name].dtype == "<i4" and packed[name].shape == (num_tokens,)
    assert packed["loss_mask"].dtype == "|u1"
    lengths = np.diff(cu_seqlens)
    assert (packed["segment_ids"] == np.repeat(np.arange(len(lengths)), lengths)).all()
    for s in range(len(packed.samples)):
        sample = packed.sample_of(s)
        prompt, response = sample["prompt_ids"], sample["response_ids"]
        tokens = slice(cu_seqlens[s], cu_seqlens[s + 1])
        assert packed["input_ids"][tokens].tolist() == prompt + response
        assert packed["position_ids"][tokens].tolist() == list(range(len(prompt) + len(response)))
        assert packed["loss_mask"][tokens].tolist() == [0] * len(prompt) + [1] * len(response)
        versions = packed["weight_versions"][tokens]
        assert (versions[: len(prompt)] == -1).all()
        assert (versions[len(prompt) :] == expected_versions(sample)).all()


def test_packed_values_score_their_own_token_and_are_nan_elsewhere(packed: Batch) -> None:
    assert np.isnan(packed["rollout_log_probs"][packed["loss_mask"] == 0]).all()
    for s in range(len(packed.samples)):
        sample = packed.sample_of(s)
        first = packed["cu_seqlens"][s] + packed["prompt_lens"][s]
        response = slice(first, packed["cu_seqlens"][s + 1])
        expected = rollout_log_probs(sample)
        np.testing.assert_array_equal(packed["rollout_log_probs"][response], expected)
        for name in VALUES:
            assert np.isnan(packed[name][packed["loss_mask"] == 0]).all()
            np.testing.assert_array_equal(packed[name][response], np.float32(sample[name]))


def test_packed_rows_hold_whole_samples_under_the_cap(packed: Batch) -> None:
    row_starts, cu_seqlens = packed["row_starts"], packed["cu_seqlens"]
    assert row_starts[0] == 0 and row_starts[-1] == len(packed.samples)
    assert (np.diff(row_starts) > 0).all()
    tokens_of_rows = np.diff(cu_seqlens[row_starts])
    assert tokens_of_rows.max() <= packed.described["max_tokens_per_row"]
    assert tokens_of_rows.sum() == cu_seqlens[-1]


def test_padded_ids_masks_and_positions_follow_from_the_lengths(padded: Batch) -> None:
    num_rows, pad_id = len(padded.samples), padded.described["pad_token_id"]
    prompt_width = max(len(sample["prompt_ids"]) for sample in padded.samples)
    response_width = max(len(sample["response_ids"]) for sample in padded.samples)
    prompts = np.full((num_rows, prompt_width), pad_id)
    responses = np.full((num_rows, response_width), pad_id)
    prompt_mask = np.zeros_like(prompts)
    response_mask = np.zeros_like(responses)
    for b, sample in enumerate(padded.samples):
        num_prompt, num_response = len(sample["prompt_ids"]), len(sample["response_ids"])
        prompts[b, prompt_width - num_prompt :] = sample["prompt_ids"]
        prompt_mask[b, prompt_width - num_prompt :] = 1
        responses[b, :num_response] = sample["response_ids"]
        response_mask[b, :num_response] = 1
    attention_mask = np.concatenate([prompt_mask, response_mask], axis=1)
    expected = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": np.concatenate([prompts, responses], axis=1),
        "attention_mask": attention_mask,
        "position_ids": np.maximum(attention_mask.cumsum(axis=1) - 1, 0),
        "response_mask": response_mask,
    }
    for name, column in expected.items():
        assert padded[name].dtype == "<i8", name
        np.testing.assert_array_equal(padded[name], column, err_msg=name)


def test_padded_values_score_their_own_token_and_are_zero_on_pads(padded: Batch) -> None:
    for name in ("rollout_log_probs", *VALUES):
        expected = np.zeros(padded["responses"].shape, np.float32)
        for b, sample in enumerate(padded.samples):
            values = rollout_log_probs(sample) if name == "rollout_log_probs" else sample[name]
            expected[b, : len(sample["response_ids"])] = values
        assert padded[name].dtype == "<f4"
        np.testing.assert_array_equal(padded[name], expected, err_msg=name)


def test_alignment_is_token_for_columns_of_tokens_and_none_for_the_rest(
    packed: Batch, padded: Batch
) -> None:
    of_tokens = {
        "input_ids", "position_ids", "segment_ids", "loss_mask", "weight_versions",
        "rollout_log_probs", "prompts", "responses", "attention_mask", "response_mask", *VALUES,
    }  # fmt: skip
    for batch in (packed, padded):
        for entry in batch.entries:
            assert entry["alignment"] == (entry["name"].decode() in of_tokens), entry["name"]


def test_the_same_arguments_write_the_same_file(tmp_path: Path) -> None:
    first = make_batch(tmp_path, "packed", 20, 9)
    assert make_batch(tmp_path, "packed", 20, 9).memory == first.memory
    assert make_batch(tmp_path, "packed", 20, 10).memory != first.memory
