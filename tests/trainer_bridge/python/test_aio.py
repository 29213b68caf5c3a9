"""The asyncio client: the plain one's calls, awaited, and what cancelling and forking leave."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import rollpack
from rollpack import aio

from fake_server import FakeServer, encode_batch, packed_columns, weights_reply
from real_server import TENSOR_SHAPES, Start, logprobs, response
from test_connection import in_child

PROMPTS = [[5, 6, 7], [1], [9, 8, 7]]


def on_real_server(
    start: Start, check: Callable[[aio.AsyncClient], Awaitable[None]], *arguments: str
) -> None:
    server = start(*arguments)

    async def run() -> None:
        async with await aio.connect(server.path) as client:
            await check(client)

    asyncio.run(run())


def test_every_verb_is_awaited(start: Start) -> None:
    async def check(client: aio.AsyncClient) -> None:
        request_id = await client.submit(PROMPTS, n=2)
        with await client.next_batch(3, timeout_s=20) as batch:
            assert (batch.num_groups, batch.num_complete_groups) == (3, 3)
            assert set(batch["request_id"].tolist()) == {request_id}
        drawn = await client.generate(PROMPTS, n=2, sampling={"temperature": 0.5})
        assert [s.response_ids.tolist() for s in drawn[:2]] == [
            response([5, 6, 7], i) for i in (0, 1)
        ]
        (scored,) = await client.score([drawn[0]])
        assert scored.logprobs.tolist() == logprobs()
        weights = {name: np.ones(shape, "f4") for name, shape in TENSOR_SHAPES.items()}
        assert await client.update_weights(weights, 3, chunk_bytes=64) == 3
        assert await client.get_weight_version() == 3
        assert (await client.stats())["num_clients"] == 1
        await client.report_probs_diff(rollpack.metrics.rollout_probs_diff([-1.0], [-1.0], [1]))
        assert (await client.stats())["probs_diff_max"] == 0
        assert await client.health() == "ok"
        await client.pause("keep")
        await client.submit([[3]], n=2)
        assert await client.abort() == 2
        await client.resume()
        assert (await client.sleep(2)).needs_weights
        assert (await client.wake_up(["weights"])).asleep == ("kv_cache",)
        with await client.next_batch(timeout_s=20) as batch:
            assert batch["finish_reason"].tolist() == [2, 2]
            assert batch.num_complete_groups == 0
        assert repr(client).startswith("<rollpack.aio.AsyncClient: server at ")
        await client.shutdown()

    on_real_server(start, check)


def test_errors_are_those_of_the_plain_client(start: Start) -> None:
    async def check(client: aio.AsyncClient) -> None:
        with pytest.raises(rollpack.InvalidArgument, match="input_ids = 64"):
            await client.submit([[64]])
        with pytest.raises(rollpack.InvalidArgument, match="mode = 'now': expected keep or wait"):
            await client.pause("now")
        begun = time.monotonic()
        with pytest.raises(rollpack.DeadlineExceeded, match="0 finished groups after 50 ms"):
            await client.next_batch(timeout_s=0.05)
        assert time.monotonic() - begun < 5

    on_real_server(start, check)


def test_an_update_that_fails_is_cancelled(start: Start) -> None:
    async def check(client: aio.AsyncClient) -> None:
        with pytest.raises(rollpack.InvalidArgument, match="missing"):
            await client.update_weights({"lm_head.weight": np.ones((8, 4), "f4")}, 1)
        weights = {name: np.ones(shape, "f4") for name, shape in TENSOR_SHAPES.items()}
        assert await client.update_weights(weights, 2) == 2

    on_real_server(start, check)


def test_batches_are_iterated_while_other_calls_go_on(start: Start) -> None:
    async def check(client: aio.AsyncClient) -> None:
        await client.submit([[p] for p in range(6)], n=1)
        seen: list[int] = []
        async for batch in client.batches(2, timeout_s=20):
            seen += batch["prompt_index"].tolist()
            assert await client.health() == "ok"
            if len(seen) == 6:
                batch.release()
                break
            del batch
        assert sorted(seen) == list(range(6))
        many = await asyncio.gather(*(client.stats() for _ in range(20)))
        assert len(many) == 20

    on_real_server(start, check)


def test_the_loop_runs_on_while_a_call_waits(start: Start) -> None:
    async def check(client: aio.AsyncClient) -> None:
        waiting = asyncio.ensure_future(client.next_batch(1, timeout_s=20))
        ticks = 0
        while not waiting.done():
            ticks += 1
            if ticks == 5:
                await client.submit([[1]], n=1)
            await asyncio.sleep(0.01)
        waiting.result().release()
        assert ticks >= 5

    on_real_server(start, check)


def test_a_batch_whose_wait_was_cancelled_comes_first(
    server: FakeServer,
) -> None:
    may_answer = threading.Event()

    def next_batch(request: dict, fds: list[int]) -> dict:
        assert may_answer.wait(10)
        return server.deliver(0, encode_batch(packed_columns(), batch_seq=7))

    server.handlers["next_batch"] = next_batch

    async def run() -> None:
        async with await aio.connect(server.path) as client:
            waiting = asyncio.ensure_future(client.next_batch())
            while "next_batch" not in server.verbs():
                await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            may_answer.set()
            server.handlers["next_batch"] = lambda request, fds: pytest.fail("asked again")
            while not client._session.inbox._undelivered:
                await asyncio.sleep(0.01)
            with await client.next_batch() as batch:
                assert batch.batch_seq == 7

    asyncio.run(run())


def test_a_batch_that_is_being_opened_when_its_wait_is_cancelled_is_kept(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.handlers["next_batch"] = lambda request, fds: server.deliver(
        0, encode_batch(packed_columns())
    )
    opening, go_on = threading.Event(), threading.Event()
    original = rollpack.inbox.Batch.__init__

    def slow(self: rollpack.Batch, *arguments: object, **named: object) -> None:
        opening.set()
        assert go_on.wait(10)
        original(self, *arguments, **named)

    monkeypatch.setattr(rollpack.inbox.Batch, "__init__", slow)

    async def run() -> None:
        async with await aio.connect(server.path) as client:
            waiting = asyncio.ensure_future(client.next_batch())
            await asyncio.to_thread(opening.wait, 10)
            waiting.cancel()
            await asyncio.sleep(0)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with await client.next_batch() as batch:
                assert batch.num_samples == 3
            assert server.verbs().count("next_batch") == 1

    asyncio.run(run())


def test_a_cancelled_update_is_taken_back(server: FakeServer) -> None:
    answered: list[str] = []

    def update(request: dict, fds: list[int]) -> dict | None:
        answered.append(request["phase"])
        return None if request["phase"] == "commit" else weights_reply(1)

    server.handlers["update_weights"] = update

    async def run() -> None:
        async with await aio.connect(server.path) as client:
            updating = asyncio.ensure_future(client.update_weights({"a": np.ones(2, "f4")}, 1))
            while "commit" not in answered:
                await asyncio.sleep(0.01)
            updating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await updating
            assert answered[-1] == "cancel"

    asyncio.run(run())


def test_a_forked_child_is_told_whose_connection_it_is(server: FakeServer) -> None:
    server.handlers["health"] = lambda request, fds: {"status": "ok"}
    clients: list[aio.AsyncClient] = []

    async def connect() -> None:
        clients.append(await aio.connect(server.path))

    asyncio.run(connect())
    (client,) = clients
    text = in_child(lambda: asyncio.run(client.health()))
    assert text.startswith("WrongProcess: client = server at "), text
    assert "the connection belongs to process" in text
    assert asyncio.run(client.health()) == "ok"  # on another loop
    asyncio.run(client.close())


def test_a_dropped_client_ends_its_connection(server: FakeServer) -> None:
    async def run() -> None:
        client = await aio.connect(server.path)
        connection = client._session.connection
        del client
        gc.collect()
        assert not connection.is_open

    asyncio.run(run())
