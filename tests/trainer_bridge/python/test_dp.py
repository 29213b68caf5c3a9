"""Data-parallel trainers on the real server: shares, their rows, deaths of ranks, and arguments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import rollpack

from real_server import Start

PARITY = 16  # what the fake service says of its model
LIMIT = 40
PROMPTS = [[p % 60] * (1 + (7 * p) % 20) for p in range(12)]


def cost(batch: rollpack.Batch) -> int:
    lengths = batch["prompt_lens"].astype(int) + batch["response_lens"]
    return int((lengths * (lengths + PARITY)).sum())


def shares(start: Start, size: int, order: list[int], **options: bool) -> list[list[list[tuple]]]:
    """The samples of each rank, row by row, when ranks ask in `order`; checks what all promise."""
    server = start("--max-tokens-per-row", str(LIMIT))
    ranks = [
        rollpack.connect(server.path, dp_rank=rank, dp_size=size, **options) for rank in range(size)
    ]
    ranks[order[0]].submit(PROMPTS, n=4)
    laid_out: list[list[list[tuple]]] = [[] for _ in range(size)]
    costs = []
    for rank in order:
        with ranks[rank].next_batch(12, order="canonical", timeout_s=20) as batch:
            assert (batch.step, batch.num_groups, batch.num_complete_groups) == (1, 12, 12)
            costs.append(cost(batch))
            keys = list(zip(batch["prompt_index"].tolist(), batch["sample_index"].tolist()))
            for row in batch.rows():
                assert 0 < len(row["input_ids"]) <= LIMIT
                laid_out[rank].append([keys[s] for s in row.samples])
            del row
    assert len({len(rows) for rows in laid_out}) == 1  # equally many micro-batches
    everything = sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(laid_out)))
    assert everything == [(p, s) for p in range(12) for s in range(4)]
    assert max(costs) < 1.05 * np.mean(costs) or options
    for client in ranks:
        client.close()
    return laid_out


def test_shares_are_balanced_and_the_same_whoever_asks_first(start: Start) -> None:
    first = shares(start, 3, [0, 1, 2])
    assert shares(start, 3, [2, 0, 1]) == first
    assert shares(start, 3, [1, 2, 0]) == first


def test_whole_groups_stay_on_one_rank(start: Start) -> None:
    for rank, rows in enumerate(split := shares(start, 2, [1, 0], whole_groups=True)):
        mine = {prompt for row in rows for prompt, _ in row}
        others = {prompt for row in split[1 - rank] for prompt, _ in row}
        assert not mine & others


def test_steps_go_on_when_a_rank_is_restarted(start: Start) -> None:
    server = start()
    one = rollpack.connect(server.path, dp_rank=0, dp_size=2)
    two = rollpack.connect(server.path, dp_rank=1, dp_size=2)
    one.submit([[p] for p in range(8)], n=2)
    lost = one.next_batch(4, timeout_s=20)
    lost_bytes = {name: column.copy() for name, column in lost.columns.items()}
    lost._lease = None  # it dies
    del lost
    one.close()
    for step in (1, 2):
        with two.next_batch(4, timeout_s=20) as batch:
            assert batch.step == step
    with rollpack.connect(server.path, dp_rank=0, dp_size=2) as again:
        with again.next_batch(4, timeout_s=20) as batch:
            assert batch.step == 1
            for name, column in lost_bytes.items():
                np.testing.assert_array_equal(batch[name], column)
        with again.next_batch(4, timeout_s=20) as batch:
            assert batch.step == 2
    two.close()


def test_a_state_of_a_rank_is_resumed_by_the_same_rank(start: Start) -> None:
    server = start()
    one = rollpack.connect(server.path, dp_rank=0, dp_size=2)
    with rollpack.connect(server.path, dp_rank=1, dp_size=2) as two:
        one.submit([[p] for p in range(8)], n=2)
        batch = one.next_batch(4, timeout_s=20)
        state = one.state_dict([batch])
        batch._lease = None
        del batch
        one.close()
        with rollpack.connect(server.path, dp_rank=0, dp_size=2, resume=state) as again:
            for client, steps in ((again, [2]), (two, [1, 2])):
                for step in steps:
                    with client.next_batch(4, timeout_s=20) as batch:
                        assert batch.step == step


def test_an_empty_share_has_empty_rows(start: Start) -> None:
    server = start()
    with (
        rollpack.connect(server.path, dp_rank=0, dp_size=2) as one,
        rollpack.connect(server.path, dp_rank=1, dp_size=2) as two,
    ):
        one.submit([[5]], n=1)
        with two.next_batch(1, timeout_s=20) as batch:
            assert (batch.num_samples, batch.num_rows, batch.layout) == (0, 1, "packed")
            (row,) = batch.rows()
            assert (row.input_ids.size, row.max_seqlen, row.cu_seqlens.tolist()) == (0, 0, [0])
            assert list(batch.samples()) == []
            assert batch.view("trl")["prompt_ids"].shape == (0, 0)
            assert row.view("nemo_rl")["token_mask"].shape == (0, 0)
            assert batch.view("flash_attn_varlen")["cu_seqlens"].tolist() == [0]
            del row
        with one.next_batch(1, timeout_s=20) as batch:
            assert batch.num_samples == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dp_rank": 0}, "dp_size = None: expected dp_rank and dp_size together"),
        ({"dp_size": 2}, "dp_rank = None: expected dp_rank and dp_size together"),
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank = 2: expected 0 or more, below dp_size = 2"),
        ({"whole_groups": True}, "whole_groups = True: expected dp_rank and dp_size with it"),
    ],
)
def test_a_rank_that_makes_no_sense_is_refused(options: dict, text: str) -> None:
    with pytest.raises(rollpack.InvalidArgument, match=text):
        rollpack.connect("nowhere", **options)


def test_ranks_of_another_split_are_refused(start: Start) -> None:
    server = start()
    with rollpack.connect(server.path, dp_rank=0, dp_size=2):
        text = r"dp_size = dp_size 4 \(hello\): expected dp_size 2; 1 clients are ranks of it"
        with pytest.raises(rollpack.FailedPrecondition, match=text):
            rollpack.connect(server.path, dp_rank=0, dp_size=4)


def test_groups_come_in_canonical_order_or_as_soon_as_enough_are_ready(start: Start) -> None:
    server = start("--sample-ms", "5")
    with rollpack.connect(server.path) as client:
        client.submit([[p] for p in range(6)], n=2)
        seen: list[int] = []
        while len(seen) < 6:
            with client.next_batch(6, min_ready=1, order="canonical", timeout_s=20) as batch:
                assert 1 <= batch.num_groups <= 6
                seen += batch["prompt_index"].tolist()[::2]
        assert seen == list(range(6))
        with pytest.raises(rollpack.InvalidArgument, match="order = 'random': expected completion"):
            client.next_batch(order="random")
        with pytest.raises(rollpack.InvalidArgument, match="min_ready"):
            client.next_batch(2, min_ready=3)


def test_the_first_groups_are_taken_and_the_rest_aborted(start: Start) -> None:
    server = start("--sample-ms", "5")
    with rollpack.connect(server.path) as client:
        request = client.submit([[p] for p in range(10)], n=2)
        with client.next_batch(3, timeout_s=20) as batch:
            assert batch.num_complete_groups == batch.num_groups == 3
        num_aborted = client.abort(request)
        assert num_aborted > 0
        with client.next_batch(7, timeout_s=20) as rest:
            assert rest.num_groups == 7
            assert (rest["finish_reason"] == 2).sum() == num_aborted
            assert rest.num_complete_groups < 7
            for sample in rest.samples():
                assert len(sample.response_ids) == len(sample.rollout_log_probs)
            del sample


def test_staleness_is_reported_and_bounded(start: Start) -> None:
    from real_server import TENSOR_SHAPES

    weights = {name: np.ones(shape, "f4") for name, shape in TENSOR_SHAPES.items()}
    server = start("--max-version-lag", "1")
    with rollpack.connect(server.path) as client:
        client.submit([[1], [2]], n=1)
        with client.next_batch(1, timeout_s=20) as batch:
            assert batch.version_lag == 0
        while client.stats()["num_finished_groups"] < 1:
            pass
        client.update_weights(weights, 1)
        client.submit([[3]], n=1)
        with client.next_batch(2, timeout_s=20) as batch:
            assert (batch.version_lag, batch.num_samples) == (1, 2)
        client.submit([[4]], n=1)
        while client.stats()["num_finished_groups"] < 1:
            pass
        client.update_weights(weights, 2)
        client.update_weights(weights, 3)
        batch = client.next_batch(timeout_s=20)
        (failed,) = batch.failed
        assert str(failed.error).startswith(
            "weight_version = 1 (bridge.max_version_lag): expected 2 or later, 1 behind the"
        )
        assert client.stats()["num_stale_samples"] == 1
