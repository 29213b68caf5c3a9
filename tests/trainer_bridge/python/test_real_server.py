"""Batches of the real server: every column, private writes, slots that wait for their views."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import rollpack
import torch

from real_server import RESPONSE_LENGTH, Start, logprobs, response

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5]]
OPTIONAL = ("logprobs", "scaled_logprobs", "support_logmass", "entropy")
ALL_COLUMNS = ("--columns", ",".join(OPTIONAL))


def take_samples(client: rollpack.Client, num_groups: int) -> list[rollpack.Sample]:
    """Copies of the next groups' samples, by prompt and sample index."""
    samples: list[rollpack.Sample] = []
    left = num_groups
    while left:
        with client.next_batch(timeout_s=20) as batch:
            samples += batch.samples(copy=True)
            left -= batch.num_groups
    return sorted(samples, key=lambda sample: (sample.prompt_index, sample.sample_index))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_samples_of_both_layouts_are_rebuilt_exactly(start: Start, layout: str) -> None:
    server = start("--layout", layout, *ALL_COLUMNS)
    with rollpack.connect(server.path) as client:
        request_id = client.submit(PROMPTS, n=3, sampling={"temperature": 0.5})
        samples = take_samples(client, len(PROMPTS))
    assert [(s.prompt_index, s.sample_index) for s in samples] == [
        (p, s) for p in range(3) for s in range(3)
    ]
    for sample in samples:
        prompt = PROMPTS[sample.prompt_index]
        assert sample.prompt_ids.tolist() == prompt
        assert sample.response_ids.tolist() == response(prompt, sample.sample_index)
        for name in ("rollout_log_probs", "logprobs", "scaled_logprobs"):
            assert getattr(sample, name).tolist() == logprobs()
        assert sample.support_logmass is not None and sample.entropy is not None
        assert sample.support_logmass.tolist() == [0.0] * RESPONSE_LENGTH
        assert sample.entropy.tolist() == [1.0] * RESPONSE_LENGTH
        if layout == "packed":
            assert sample.weight_versions is not None
            assert sample.weight_versions.tolist() == [0] * RESPONSE_LENGTH
        assert (sample.request_id, sample.group_size) == (request_id, 3)
        assert (sample.prompt_id, sample.temperature) == (str(sample.prompt_index), 0.5)
        assert (sample.finish_reason, sample.stop_token_id) == ("length", None)


def one_batch(client: rollpack.Client, prompts: list[list[int]], n: int = 1) -> rollpack.Batch:
    client.submit(prompts, n=n)
    return client.next_batch(len(prompts), timeout_s=20)


def test_packed_columns_have_the_values_the_samples_give(start: Start) -> None:
    server = start("--max-tokens-per-row", "16")
    with rollpack.connect(server.path) as client, one_batch(client, PROMPTS) as batch:
        order = batch["prompt_index"].tolist()
        sequences = [PROMPTS[p] + response(PROMPTS[p], 0) for p in order]
        lens = [len(sequence) for sequence in sequences]
        assert batch["input_ids"].tolist() == sum(sequences, [])
        assert batch["cu_seqlens"].tolist() == [0, *np.cumsum(lens)]
        assert batch["position_ids"].tolist() == [t for n in lens for t in range(n)]
        assert batch["segment_ids"].tolist() == [s for s, n in enumerate(lens) for _ in range(n)]
        mask = np.array([t >= len(PROMPTS[p]) for p, n in zip(order, lens) for t in range(n)])
        np.testing.assert_array_equal(batch["loss_mask"], mask)
        np.testing.assert_array_equal(batch["rollout_log_probs"][mask], logprobs() * 3)
        assert np.isnan(batch["rollout_log_probs"][~mask]).all()
        np.testing.assert_array_equal(batch["weight_versions"], np.where(mask, 0, -1))
        assert batch.num_rows == 3  # 11, 9 and 13 tokens do not share a row of 16
        for row, sequence in zip(batch.rows(), sequences):
            assert row["input_ids"].tolist() == sequence
            assert row.cu_seqlens.tolist() == [0, len(sequence)]
        assert batch["prompt_lens"].tolist() == [len(PROMPTS[p]) for p in order]
        assert batch["response_lens"].tolist() == [RESPONSE_LENGTH] * 3
        assert batch["finish_reason"].tolist() == [1] * 3
        assert batch["stop_token_id"].tolist() == [-1] * 3
        dtypes = {name: column.dtype.str for name, column in batch.columns.items()}
        assert dtypes["input_ids"] == dtypes["weight_versions"] == "<i4"
        assert (dtypes["request_id"], dtypes["loss_mask"]) == ("<i8", "|u1")


def test_padded_columns_have_the_values_the_samples_give(start: Start) -> None:
    server = start("--layout", "padded")
    with rollpack.connect(server.path) as client:
        client.submit(PROMPTS, n=1, sampling={"stop_token_ids": [20]})
        with client.next_batch(3, timeout_s=20) as batch:
            for index, p in enumerate(batch["prompt_index"].tolist()):
                left = 5 - len(PROMPTS[p])
                answer = response(PROMPTS[p], 0)
                if 20 in answer:  # only the first prompt's: 18, 19, 20
                    answer = answer[: answer.index(20) + 1]
                right = RESPONSE_LENGTH - len(answer)
                mask = [0] * left + [1] * (len(PROMPTS[p]) + len(answer)) + [0] * right
                assert batch["prompts"][index].tolist() == [0] * left + PROMPTS[p]
                assert batch["responses"][index].tolist() == answer + [0] * right
                assert batch["attention_mask"][index].tolist() == mask
                assert batch["response_mask"][index].tolist() == mask[5:]
                positions = np.maximum(np.cumsum(mask) - 1, 0)
                assert batch["position_ids"][index].tolist() == positions.tolist()
                wanted = logprobs(len(answer)) + [0.0] * right
                assert batch["rollout_log_probs"][index].tolist() == wanted
                assert batch["finish_reason"][index] == (0 if right else 1)
                assert batch["stop_token_id"][index] == (20 if right else -1)
            whole = np.concatenate([batch["prompts"], batch["responses"]], axis=1)
            np.testing.assert_array_equal(batch["input_ids"], whole)
            assert batch["input_ids"].dtype == np.int64


def test_a_write_into_a_view_reaches_no_other_client(start: Start) -> None:
    server = start("--slots", "1")
    first = rollpack.connect(server.path)
    batch = one_batch(first, PROMPTS)
    tokens, before = batch.torch("input_ids"), batch["input_ids"].tolist()
    tokens.fill_(63)
    assert batch["input_ids"].tolist() == [63] * len(before)
    with pytest.raises(ValueError, match="read-only"):
        batch["input_ids"][0] = 1
    first.close()  # not released: the next client gets the same filling of the same slot
    with rollpack.connect(server.path) as second, second.next_batch(timeout_s=20) as again:
        assert again.batch_seq == batch.batch_seq
        assert again["input_ids"].tolist() == before
    assert tokens.tolist() == [63] * len(before)
    batch.release()


def test_own_writes_are_gone_when_the_slot_is_filled_again(start: Start) -> None:
    server = start("--slots", "1")
    with rollpack.connect(server.path) as client:
        for _ in range(3):
            with one_batch(client, [[5, 6, 7]]) as batch:
                assert batch["input_ids"].tolist() == [5, 6, 7, *response([5, 6, 7], 0)]
                batch.torch("input_ids").fill_(1)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_slot_returns_only_once_its_last_view_is_gone(start: Start, kind: str) -> None:
    server = start("--slots", "2")
    with rollpack.connect(server.path) as client:
        batch = one_batch(client, [[5, 6, 7]])
        view = batch["input_ids"] if kind == "numpy" else batch.torch("input_ids")
        batch.release()
        for value in range(20):  # the other slot serves them all
            with one_batch(client, [[value, value]]) as other:
                assert other["input_ids"][0] == value
        assert view.tolist() == [5, 6, 7, *response([5, 6, 7], 0)]
        held = one_batch(client, [[1]])
        client.submit([[2]], n=1)
        with pytest.raises(rollpack.DeadlineExceeded, match=r"holds all 2 slots \(batch 1, batch"):
            client.next_batch(timeout_s=0.2)
        del view
        gc.collect()
        with client.next_batch(timeout_s=20) as freed:
            assert freed["input_ids"][0] == 2
        held.release()


HOLDER = """
import sys, time, zlib
sys.path.insert(0, sys.argv[1])
import rollpack
client = rollpack.connect(sys.argv[2])
client.submit([[3, 1, 4], [1, 5]], n=4)
batch = client.next_batch(2, timeout_s=20)
data = b"".join(column.tobytes() for column in batch.columns.values())
print(batch.batch_seq, zlib.crc32(data), flush=True)
batch.torch("input_ids").zero_() if sys.argv[3] == "write" else None
time.sleep(60)
"""


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_killed_clients_batch_comes_again_with_the_same_bytes(start: Start, what: str) -> None:
    server = start()
    package = str(Path(rollpack.__file__).parents[1])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, package, server.path, what],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    batch_seq, crc32 = map(int, holder.stdout.readline().split())
    time.sleep(0.1)
    holder.send_signal(signal.SIGKILL)
    holder.wait(10)
    holder.stdout.close()
    with rollpack.connect(server.path) as client, client.next_batch(timeout_s=20) as batch:
        assert batch.batch_seq == batch_seq
        assert zlib.crc32(b"".join(c.tobytes() for c in batch.columns.values())) == crc32
        assert batch.num_samples == 8


def test_every_hand_over_is_whole_and_comes_once(start: Start) -> None:
    num_batches = 10_000
    server = start("--slots", "3")
    with rollpack.connect(server.path) as client:
        assert client.verify
        seqs, held = [], None
        for first in range(0, num_batches, 500):
            client.submit([[i % 60, i // 60 % 60] for i in range(first, first + 500)], n=1)
            for i in range(first, first + 500):
                with client.next_batch(1, timeout_s=20) as batch:
                    prompt = [i % 60, i // 60 % 60]
                    assert batch["input_ids"].tolist() == prompt + response(prompt, 0)
                    seqs.append(batch.batch_seq)
                    if i % 2:
                        held = (prompt, batch["input_ids"])
                if held:
                    assert held[1][:2].tolist() == held[0]
        assert seqs == list(range(1, num_batches + 1))


def test_two_clients_share_the_batches_without_loss(start: Start) -> None:
    server = start()
    with rollpack.connect(server.path) as one, rollpack.connect(server.path) as two:
        one.submit([[i] for i in range(40)], n=2)
        seen: list[int] = []
        for client in (one, two) * 20:
            with client.next_batch(1, timeout_s=20) as batch:
                seen += batch["prompt_index"].tolist()
        assert sorted(seen) == sorted([*range(40)] * 2)
        with pytest.raises(rollpack.DeadlineExceeded):
            two.next_batch(timeout_s=0)


def test_tensors_and_arrays_are_the_same_memory(start: Start) -> None:
    server = start()
    with rollpack.connect(server.path) as client, one_batch(client, PROMPTS) as batch:
        for name, column in batch.columns.items():
            tensor = batch.torch(name)
            assert tensor.data_ptr() == column.__array_interface__["data"][0], name
        assert batch.torch("input_ids").dtype == torch.int32
