"""Exactly once: what a checkpoint's state says was consumed is not delivered again."""

from __future__ import annotations

import asyncio
import gc
import json

import pytest
import rollpack
from rollpack import aio

from fake_server import FakeServer, encode_batch, packed_columns, refusal
from real_server import Start

PROMPTS = [[p + 1] for p in range(4)]


def prompts_of(batch: rollpack.Batch) -> list[int]:
    return batch["prompt_index"].tolist()


def test_a_batch_in_the_state_is_passed_over_and_one_that_is_not_comes_again(start: Start) -> None:
    server = start()
    client = rollpack.connect(server.path)
    client.submit(PROMPTS, n=1)
    first, second = client.next_batch(1, timeout_s=20), client.next_batch(1, timeout_s=20)
    assert (prompts_of(first), prompts_of(second)) == ([0], [1])
    state = json.loads(json.dumps(client.state_dict([first])))  # plain values, as a checkpoint is
    assert state == {"instance": client.info.instance, "consumed": [1]}
    first._lease = second._lease = None  # the trainer dies here
    del first, second
    client.close()
    with rollpack.connect(server.path, resume=state) as again:
        seen = []
        for _ in range(3):
            with again.next_batch(1, timeout_s=20) as batch:
                seen += prompts_of(batch)
        assert seen == [1, 2, 3]
        assert again.stats()["num_batches_redelivered"] == 2
        assert again.stats()["num_slots_in_use"] == 0
        assert again.state_dict()["consumed"] == []


def test_without_the_state_it_is_delivered_twice(start: Start) -> None:
    server = start()
    for _ in range(2):
        with rollpack.connect(server.path) as client:
            if not client.stats()["num_batches_delivered"]:
                client.submit(PROMPTS[:1], n=1)
            batch = client.next_batch(timeout_s=20)
            assert prompts_of(batch) == [0]
            batch._lease = None
            del batch


def test_a_state_survives_a_second_crash_before_its_batch_came(start: Start) -> None:
    server = start()
    client = rollpack.connect(server.path)
    client.submit(PROMPTS[:1], n=1)
    batch = client.next_batch(timeout_s=20)
    state = client.state_dict([batch])
    batch._lease = None
    del batch
    client.close()
    with rollpack.connect(server.path, resume=state) as crashed_at_once:
        later = crashed_at_once.state_dict()
    assert later == state
    with rollpack.connect(server.path, resume=[later, state]) as third:
        with pytest.raises(rollpack.DeadlineExceeded):
            third.next_batch(timeout_s=0.2)
        assert third.stats()["num_batches_left_behind"] == 0


def test_a_state_of_another_life_of_the_server_counts_for_nothing(start: Start) -> None:
    with rollpack.connect(start().path) as client:
        client.submit(PROMPTS[:1], n=1)
        with client.next_batch(timeout_s=20) as batch:
            state = client.state_dict([batch])
    assert state["consumed"] == [1]
    with rollpack.connect(start().path, resume=state) as client:
        client.submit(PROMPTS[:1], n=1)
        with client.next_batch(timeout_s=20) as batch:
            assert batch.batch_seq == 1


def test_a_released_batch_is_listed_until_the_server_confirms_it(
    server: FakeServer, client: rollpack.Client
) -> None:
    server.handlers["next_batch"] = lambda request, fds: server.deliver(
        0, encode_batch(packed_columns(), batch_seq=5)
    )
    server.handlers["release"] = lambda request, fds: None  # it dies before it answers
    batch = client.next_batch()
    assert client.state_dict()["consumed"] == []
    view = batch["input_ids"]
    batch.release()
    assert client.state_dict()["consumed"] == [5]  # though a view keeps the slot
    del view
    gc.collect()
    assert client.state_dict()["consumed"] == [5]
    server.handlers["stats"] = lambda request, fds: {"stats": {}}
    client.stats()
    assert server.verbs()[-2:] == ["release", "stats"]
    assert client.state_dict()["consumed"] == [5]


def test_a_refused_release_stays_listed(server: FakeServer, client: rollpack.Client) -> None:
    server.handlers["next_batch"] = lambda request, fds: server.deliver(
        0, encode_batch(packed_columns())
    )
    server.handlers["release"] = lambda request, fds: refusal("failed_precondition")
    server.handlers["stats"] = lambda request, fds: {"stats": {}}
    client.next_batch().release()
    client.stats()
    assert client.state_dict()["consumed"] == [1]


def test_the_asyncio_client_resumes_alike(start: Start) -> None:
    server = start()

    async def run() -> None:
        async with await aio.connect(server.path) as client:
            await client.submit(PROMPTS[:2], n=1)
            batch = await client.next_batch(1, timeout_s=20)
            state = client.state_dict([batch])
            batch._lease = None
            del batch
        async with await aio.connect(server.path, resume=state) as client:
            with await client.next_batch(1, timeout_s=20) as batch:
                assert prompts_of(batch) == [1]

    asyncio.run(run())


@pytest.mark.parametrize("state", [3, {"consumed": [1]}, [{"instance": "a"}], ["x"]])
def test_what_is_no_state_is_refused(state: object) -> None:
    with pytest.raises((rollpack.InvalidArgument, TypeError), match="resume|iterable"):
        rollpack.connect("nowhere", resume=state)
