"""Batches: the table is checked, views share the slot's memory, and a slot outlives its views."""

from __future__ import annotations

import gc
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import rollpack
import torch

from fake_server import FakeServer, Message, encode_batch, packed_columns, refusal

PADDED = {
    "prompts": np.array([[0, 0, 5], [6, 7, 8]], "<i8"),
    "responses": np.array([[1, 2], [3, 0]], "<i8"),
    "input_ids": np.array([[0, 0, 5, 1, 2], [6, 7, 8, 3, 0]], "<i8"),
    "attention_mask": np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], "<i8"),
    "position_ids": np.array([[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]], "<i8"),
    "response_mask": np.array([[1, 1], [1, 0]], "<i8"),
    "rollout_log_probs": np.array([[-0.5, -0.25], [-1.0, 0.0]], "<f4"),
    "entropy": np.array([[0.5, 0.75], [1.5, 0.0]], "<f4"),
    "request_id": np.array([1, 1], "<i8"),
    "prompt_index": np.array([0, 1], "<i4"),
    "prompt_id_bytes": np.frombuffer("é7".encode(), "|u1"),
    "prompt_id_starts": np.array([0, 2, 3], "<i4"),
    "sample_index": np.array([0, 0], "<i4"),
    "group_size": np.array([1, 1], "<i4"),
    "prompt_lens": np.array([1, 3], "<i4"),
    "response_lens": np.array([2, 1], "<i4"),
    "finish_reason": np.array([1, 0], "|u1"),
    "stop_token_id": np.array([-1, 3], "<i4"),
    "temperature": np.array([1.0, 0.5], "<f4"),
}


def serve(server: FakeServer, batch: bytes, **fields: object) -> None:
    """Make next_batch hand out these bytes in slot 0."""
    server.handlers["next_batch"] = lambda request, fds: server.deliver(0, batch, **fields)


def rewritten(batch: bytearray, change: Callable[[bytearray], None]) -> bytes:
    """A batch with some bytes changed and a checksum that fits."""
    change(batch)
    struct.pack_into("<I", batch, 40, zlib.crc32(batch[64:]))
    return bytes(batch)


def test_every_column_arrives_with_its_dtype_shape_and_values(
    server: FakeServer, client: rollpack.Client
) -> None:
    columns = packed_columns()
    serve(server, encode_batch(columns))
    with client.next_batch() as batch:
        assert list(batch.columns) == list(columns)
        for name, expected in columns.items():
            assert batch[name].dtype == expected.dtype
            np.testing.assert_array_equal(batch[name], expected)
            np.testing.assert_array_equal(getattr(batch, name), expected)
        assert batch.layout == "packed"
        assert (batch.num_samples, batch.num_groups, batch.num_rows) == (3, 3, 2)
        assert batch.max_seqlen == 5
        assert "input_ids" in dir(batch)
        assert repr(batch).startswith("<batch 1: 3 samples of 3 groups, 0 failed, packed, ")


def test_alignment_says_what_an_entry_is_about(server: FakeServer, client: rollpack.Client) -> None:
    columns = packed_columns()
    serve(server, encode_batch(columns, alignments={"loss_mask": 1, "rollout_log_probs": 2}))
    with client.next_batch() as batch:
        assert batch.alignment("loss_mask") == "token"
        assert batch.alignment("rollout_log_probs") == "predictor"
        assert batch.alignment("row_starts") == "none"


def test_an_unknown_column_is_an_error_naming_those_there_are(
    server: FakeServer, client: rollpack.Client
) -> None:
    serve(server, encode_batch({"loss_mask": np.ones(2, "|u1"), "x": np.ones(2, "<f4")}))
    with client.next_batch() as batch:
        with pytest.raises(KeyError, match="column = rewards: expected one of loss_mask, x"):
            batch["rewards"]
        with pytest.raises(AttributeError, match="Batch has no attribute or column 'rewards'"):
            batch.rewards  # noqa: B018
        assert not hasattr(batch, "_private")


def test_rows_are_slices_with_lengths_as_flash_attention_takes_them(
    server: FakeServer, client: rollpack.Client
) -> None:
    columns = packed_columns(num_samples=5, num_rows=2)
    alignments = dict.fromkeys(("loss_mask", "rollout_log_probs", "weight_versions"), 1)
    serve(server, encode_batch(columns, alignments=alignments), num_samples=5)
    with client.next_batch() as batch:
        rows = list(batch.rows())
        assert [row.samples for row in rows] == [range(0, 2), range(2, 5)]
        for row in rows:
            begin = columns["cu_seqlens"][row.samples.start]
            end = columns["cu_seqlens"][row.samples.stop]
            for name in ("input_ids", "position_ids", "segment_ids", *alignments):
                np.testing.assert_array_equal(row[name], columns[name][begin:end])
                assert np.shares_memory(row[name], batch[name])
            np.testing.assert_array_equal(
                row.temperature, columns["temperature"][row.samples.start : row.samples.stop]
            )
            assert row.cu_seqlens.dtype == np.int32
            assert row.cu_seqlens[0] == 0
            assert row.cu_seqlens[-1] == len(row.input_ids)
            assert row.max_seqlen == np.diff(row.cu_seqlens).max()
            assert "prompt_id_bytes" not in row.columns
            tensors = row.torch()
            assert tensors["cu_seqlens"].dtype == torch.int32
            assert tensors["input_ids"].tolist() == row.input_ids.tolist()
        del rows, row, tensors


def test_samples_are_rebuilt_from_the_packed_layout(
    server: FakeServer, client: rollpack.Client
) -> None:
    columns = packed_columns()
    serve(server, encode_batch({**columns, "entropy": columns["rollout_log_probs"]}))
    with client.next_batch() as batch:
        samples = list(batch.samples(copy=True))
    assert [sample.prompt_id for sample in samples] == ["prompt-0", "prompt-1", "prompt-2"]
    for index, sample in enumerate(samples):
        begin, end = columns["cu_seqlens"][index : index + 2]
        np.testing.assert_array_equal(sample.prompt_ids, columns["input_ids"][begin : begin + 2])
        np.testing.assert_array_equal(sample.response_ids, columns["input_ids"][begin + 2 : end])
        expected = columns["rollout_log_probs"][begin + 2 : end]
        np.testing.assert_array_equal(sample.rollout_log_probs, expected)
        np.testing.assert_array_equal(sample.entropy, expected)
        assert np.isfinite(sample.rollout_log_probs).all()
        assert sample.weight_versions.tolist() == [4] * (index + 1)
        assert (sample.finish_reason, sample.stop_token_id) == ("stop", 5)
        assert sample.logprobs is None


def test_samples_are_rebuilt_from_the_padded_layout_by_their_lengths(
    server: FakeServer, client: rollpack.Client
) -> None:
    serve(server, encode_batch(PADDED), num_samples=2)
    with client.next_batch() as batch:
        assert batch.layout == "padded"
        assert batch.max_seqlen == 4
        assert batch.num_rows == 0
        with pytest.raises(rollpack.Unsupported, match="bridge.layout = padded: slice its columns"):
            next(batch.rows())
        first, second = batch.samples(copy=True)
    assert (first.prompt_ids.tolist(), first.response_ids.tolist()) == ([5], [1, 2])
    assert (second.prompt_ids.tolist(), second.response_ids.tolist()) == ([6, 7, 8], [3])
    assert first.rollout_log_probs.tolist() == [-0.5, -0.25]
    assert second.entropy.tolist() == [1.5]
    assert (first.prompt_id, second.prompt_id) == ("é", "7")
    assert (first.finish_reason, first.stop_token_id) == ("length", None)
    assert (second.finish_reason, second.stop_token_id) == ("stop", 3)
    assert first.weight_versions is None
    assert second.temperature == 0.5


def test_a_sample_without_response_tokens_is_legal(
    server: FakeServer, client: rollpack.Client
) -> None:
    columns = packed_columns(num_samples=1, num_rows=1)
    columns["response_lens"] = np.zeros(1, "<i4")
    columns["cu_seqlens"] = np.array([0, 2], "<i4")
    serve(server, encode_batch(columns), num_samples=1)
    with client.next_batch() as batch:
        (sample,) = batch.samples(copy=True)
    assert sample.response_ids.size == 0
    assert sample.prompt_ids.size == 2


def test_tensors_share_the_slot_and_warn_of_nothing(
    server: FakeServer, client: rollpack.Client
) -> None:
    serve(server, encode_batch(packed_columns()))
    batch = client.next_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = batch.torch("input_ids")
        all_of_them = batch.torch()
    assert one.data_ptr() == batch.input_ids.ctypes.data == all_of_them["input_ids"].data_ptr()
    one[0] = 77
    assert batch.input_ids[0] == 77
    assert set(all_of_them) == set(batch.columns)
    batch.release()


def test_arrays_are_marked_read_only(server: FakeServer, client: rollpack.Client) -> None:
    serve(server, encode_batch(packed_columns()))
    with client.next_batch() as batch:
        with pytest.raises(ValueError, match="read-only"):
            batch.input_ids[0] = 1
        with pytest.raises(TypeError):
            batch.columns["input_ids"] = batch.input_ids


def test_a_write_reaches_no_other_client_and_is_gone_after_release(
    server: FakeServer, client: rollpack.Client
) -> None:
    columns = packed_columns()
    serve(server, encode_batch(columns))
    batch = client.next_batch()
    batch.torch("input_ids").fill_(-1)
    with open(f"/proc/self/fd/{server.slots[0]}", "rb") as slot:
        assert encode_batch(columns)[64:] == slot.read()[64 : batch.num_bytes]
    batch.release()
    with client.next_batch() as again:
        np.testing.assert_array_equal(again.input_ids, columns["input_ids"])


def released(server: FakeServer) -> list[Message]:
    return [request for request in server.requests if request["verb"] == "release"]


def settle(server: FakeServer, client: rollpack.Client) -> None:
    """Wait until the server has read all that was sent before."""
    server.handlers["health"] = lambda request, fds: {"status": "ok"}
    client.health()


def test_release_tells_the_server_which_filling_is_over(
    server: FakeServer, client: rollpack.Client
) -> None:
    serve(server, encode_batch(packed_columns(), batch_seq=6, generation=3))
    batch = client.next_batch()
    settle(server, client)
    assert released(server) == []
    batch.release()
    batch.release()
    settle(server, client)
    (message,) = released(server)
    assert (message["slot"], message["generation"], message["batch_seq"]) == (0, 3, 6)
    with pytest.raises(rollpack.FailedPrecondition, match="batch 6: take what you need before rel"):
        batch["input_ids"]


@pytest.mark.parametrize(
    "take",
    [
        lambda batch: batch["input_ids"],
        lambda batch: batch.torch("input_ids"),
        lambda batch: batch.torch("input_ids")[1:].view(-1),
        lambda batch: memoryview(batch["input_ids"]),
        lambda batch: batch["input_ids"][1:3].reshape(1, -1),
        lambda batch: np.asarray(batch.torch("rollout_log_probs")),
        lambda batch: next(batch.rows()),
        lambda batch: next(batch.samples()).response_ids,
        lambda batch: batch.columns,
    ],
)
def test_the_slot_goes_back_only_when_the_last_view_is_gone(
    server: FakeServer, client: rollpack.Client, take: Callable[[rollpack.Batch], object]
) -> None:
    serve(server, encode_batch(packed_columns()))
    with client.next_batch() as batch:
        view = take(batch)
    del batch
    gc.collect()
    settle(server, client)
    assert released(server) == []
    assert view is not None
    del view
    gc.collect()
    settle(server, client)
    assert len(released(server)) == 1


def test_a_view_outlives_the_client_unchanged_while_the_server_reuses_the_slot(
    server: FakeServer,
) -> None:
    columns = packed_columns()
    client = rollpack.connect(server.path)
    serve(server, encode_batch(columns))
    with client.next_batch() as batch:
        view = batch["input_ids"]
    client.close()
    other = {name: np.zeros_like(values) for name, values in columns.items()}
    server.deliver(0, encode_batch(other))
    np.testing.assert_array_equal(view, columns["input_ids"])


def test_a_batch_dropped_without_release_warns_and_keeps_its_slot(
    server: FakeServer, client: rollpack.Client
) -> None:
    serve(server, encode_batch(packed_columns(), batch_seq=8))
    batch = client.next_batch()
    with pytest.warns(ResourceWarning, match=r"batch 8 was dropped without release\(\)"):
        del batch
        gc.collect()
    settle(server, client)
    assert released(server) == []


def test_a_deadline_says_when_this_client_holds_every_slot(
    server: FakeServer, client: rollpack.Client
) -> None:
    replies = [
        server.deliver(slot, encode_batch(packed_columns(), batch_seq=slot + 1)) for slot in (0, 1)
    ]
    late = refusal("deadline_exceeded", field="next_batch", message="no group in 10 ms")
    server.handlers["next_batch"] = lambda request, fds: replies.pop(0) if replies else late
    batches = [client.next_batch(), client.next_batch()]
    with pytest.raises(rollpack.DeadlineExceeded) as error:
        client.next_batch(timeout_s=0.01)
    assert "holds all 2 slots (batch 1, batch 2): call release()" in str(error.value)
    for batch in batches:
        batch.release()
    with pytest.raises(rollpack.DeadlineExceeded) as error:
        client.next_batch(timeout_s=0.01)
    assert str(error.value) == "next_batch: no group in 10 ms"


def test_iterating_releases_the_batch_before(server: FakeServer, client: rollpack.Client) -> None:
    sequence = iter(range(1, 9))
    server.handlers["next_batch"] = lambda request, fds: server.deliver(
        0, encode_batch(packed_columns(), batch_seq=next(sequence))
    )
    seen = []
    for batch in client:
        settle(server, client)
        assert [message["batch_seq"] for message in released(server)] == seen
        seen.append(batch.batch_seq)
        if len(seen) == 3:
            break
    assert seen == [1, 2, 3]
    batch.release()


def test_failures_are_listed_with_typed_errors_also_without_a_slot(
    server: FakeServer, client: rollpack.Client
) -> None:
    error = refusal("non_finite", field="logits", value="nan")["error"]
    failed = {
        "request_id": 1,
        "prompt_index": 4,
        "prompt_id": 7,
        "sample_index": 0,
        "group_size": 1,
        "error": error,
    }
    reply = {"slot": None, "num_samples": 0, "num_groups": 1, "failed": [failed]}
    server.handlers["next_batch"] = lambda request, fds: reply
    with client.next_batch() as batch:
        (only,) = batch.failed
        assert (only.prompt_index, only.prompt_id) == (4, 7)
        assert isinstance(only.error, rollpack.NonFinite)
        assert str(only.error) == "logits = nan"
        assert list(batch.samples()) == list(batch.rows()) == []
        assert (batch.layout, batch.max_seqlen) == ("empty", 0)
        with pytest.raises(KeyError, match="expected none: it has no samples"):
            batch["input_ids"]
    settle(server, client)
    assert released(server) == []


def overwrite(position: int, code: str, value: object) -> Callable[[bytearray], None]:
    return lambda batch: struct.pack_into(code, batch, position, value)


ENTRY = 64  # the first column's: input_ids, i32 [T]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (overwrite(0, "8s", b"RPKBATCX"), "batch 1: magic = b'RPKBATCX': expected b'RPKBATCH'"),
        (overwrite(12, "<I", 1000), "batch 1: num_columns = 1000: expected a table within"),
        (overwrite(ENTRY, "8s", b"\0"), "batch 1: column name: it is empty or repeated"),
        (overwrite(ENTRY + 128, "13s", b"input_ids"), "column name = input_ids: it is empty or r"),
        (overwrite(ENTRY + 48, "8s", b"|O"), "column input_ids: dtype = |O: expected <i4 or <i8"),
        (overwrite(ENTRY + 48, "8s", b">i4"), "column input_ids: dtype = >i4: expected <i4"),
        (overwrite(ENTRY + 56, "<I", 5), "column input_ids: ndim = 5: expected 1 to 4"),
        (overwrite(ENTRY + 56, "<I", 0), "column input_ids: ndim = 0: expected 1 to 4"),
        (overwrite(ENTRY + 60, "<I", 3), "column input_ids: alignment = 3: expected 0, 1 or 2"),
        (overwrite(ENTRY + 64, "<Q", 1 << 60), "column input_ids: bytes = 48: expected 46116860"),
        (overwrite(ENTRY + 96, "<Q", 64), "column input_ids: offset = 64: expected a multiple"),
        (overwrite(ENTRY + 96, "<Q", 1 << 40), "column input_ids: offset = 1099511627776: expec"),
        (overwrite(ENTRY + 96, "<Q", 2497), "column input_ids: offset = 2497: expected a multiple"),
    ],
)
def test_a_table_that_contradicts_itself_is_data_loss(
    server: FakeServer, client: rollpack.Client, change: Callable[[bytearray], None], text: str
) -> None:
    serve(server, rewritten(encode_batch(packed_columns()), change))
    with pytest.raises(rollpack.DataLoss) as error:
        client.next_batch()
    assert text in str(error.value)


def test_a_flipped_bit_is_data_loss_unless_checks_are_off(
    server: FakeServer, client: rollpack.Client
) -> None:
    batch = encode_batch(packed_columns())
    batch[-1] ^= 1
    serve(server, bytes(batch))
    with pytest.raises(rollpack.DataLoss, match="batch 1: crc32 = "):
        client.next_batch()
    client.verify = False
    with client.next_batch() as found:
        assert found.num_samples == 3


@pytest.mark.parametrize("name", ["generation", "batch_seq", "crc32"])
def test_a_slot_that_holds_another_filling_is_data_loss(
    server: FakeServer, client: rollpack.Client, name: str
) -> None:
    serve(server, bytes(encode_batch(packed_columns())), **{name: 99})
    with pytest.raises(rollpack.DataLoss, match=f"{name} = .*: expected 99; the slot does not"):
        client.next_batch()


def test_a_batch_of_another_schema_is_refused_naming_both(
    server: FakeServer, client: rollpack.Client
) -> None:
    serve(server, bytes(encode_batch(packed_columns(), schema_version=2)))
    with pytest.raises(rollpack.Unsupported, match="batch 1: schema_version = 2: expected 1"):
        client.next_batch()


@pytest.mark.parametrize("fields", [{"slot": 2}, {"slot": -1}, {"bytes": 1 << 20}, {"bytes": 0}])
def test_a_reply_beyond_the_slots_is_data_loss(
    server: FakeServer, client: rollpack.Client, fields: dict[str, int]
) -> None:
    serve(server, bytes(encode_batch(packed_columns())), **fields)
    with pytest.raises(rollpack.DataLoss, match="expected a slot below 2, at most 65536 bytes"):
        client.next_batch()
