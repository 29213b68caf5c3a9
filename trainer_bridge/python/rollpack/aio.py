"""The client for asyncio: the calls of rollpack.Client, awaited.

async with await rollpack.aio.connect() as client:
    await client.submit(prompts, n=8)
    with await client.next_batch(len(prompts)) as batch:
        ...

Nothing blocks the event loop: replies come from the connection's own thread, and what works on
large memory (checksums of batches, copying weights) runs in the loop's default executor. Batches,
samples and errors are those of the plain client.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from rollpack.batch import Batch
from rollpack.connection import Reply
from rollpack.errors import RollpackError
from rollpack.hello import ServerInfo
from rollpack.inbox import Pending, Steps, end_connection
from rollpack.prompts import Prompt, Sampling, ScoredSequence, ScoreSequence, TokenIds
from rollpack.samples import Sample
from rollpack.session import Mode, Opening, Order, Session, State, opening
from rollpack.sleeping import SleepState, Tag
from rollpack.weights import CHUNK_BYTES, Weights, WeightVersion

T = TypeVar("T")


async def connect(
    socket: str | os.PathLike[str] | None = None,
    *,
    timeout_s: float = 10.0,
    dp_rank: int | None = None,
    dp_size: int | None = None,
    whole_groups: bool = False,
    resume: State | Sequence[State] | None = None,
) -> AsyncClient:
    """Connect to a running server; arguments and errors are those of `rollpack.connect`."""
    how = opening(socket, timeout_s, dp_rank, dp_size, whole_groups, resume)
    return AsyncClient(await asyncio.to_thread(Session, how), how)


class AsyncClient:
    """A connection to a rollpack server; made by `connect`, and used on any event loop.

    Every method is that of `rollpack.Client`, with its arguments, results and errors. A call that
    is cancelled leaves nothing behind: a batch that comes all the same is kept for the next
    `next_batch`, an unfinished weight update is cancelled.

    Attributes:
        info: what the server said of itself.
        socket_path: where it is connected.
        verify: whether the checksum of every batch is compared.
    """

    info: ServerInfo

    def __init__(self, session: Session, how: Opening) -> None:
        """Take over a session that said hello; `rollpack.aio.connect` is the usual way."""
        self.socket_path = how.socket_path
        self.verify = how.verify
        self._session = session
        self._finalizer = weakref.finalize(self, end_connection, session.connection, session.leases)
        self.info = session.info

    async def submit(
        self,
        prompts: Iterable[Prompt | TokenIds],
        *,
        n: int | None = None,
        sampling: Sampling | None = None,
        timeout_s: float = 60.0,
    ) -> int:
        """Ask for samples and return once they are accepted; as Client.submit."""
        return await self._run(self._session.submit(prompts, n, sampling, timeout_s))

    async def next_batch(
        self,
        num_groups: int | None = None,
        *,
        min_ready: int | None = None,
        order: Order = "completion",
        timeout_s: float = 60.0,
    ) -> Batch:
        """Wait for finished groups and return them as a batch; as Client.next_batch."""
        call = self._session.next_batch(num_groups, min_ready, order, timeout_s, self.verify)
        return await self._run(call, aside=True)

    async def batches(
        self,
        num_groups: int | None = None,
        *,
        min_ready: int | None = None,
        order: Order = "completion",
        timeout_s: float = 60.0,
    ) -> AsyncIterator[Batch]:
        """Yield batches without end, each released before the next; as Client.batches."""
        while True:
            batch = await self.next_batch(
                num_groups, min_ready=min_ready, order=order, timeout_s=timeout_s
            )
            yield batch
            batch.release()
            del batch  # this frame's reference would keep the slot through the next wait

    def __aiter__(self) -> AsyncIterator[Batch]:
        """`async for batch in client` is `client.batches()`."""
        return self.batches()

    async def generate(
        self,
        prompts: Iterable[Prompt | TokenIds],
        *,
        n: int | None = None,
        sampling: Sampling | None = None,
        timeout_s: float = 600.0,
    ) -> list[Sample]:
        """Submit prompts and collect all their samples; as Client.generate."""
        call = self._session.generate(prompts, n, sampling, timeout_s, self.verify)
        return await self._run(call, aside=True)

    async def score(
        self, sequences: Iterable[ScoreSequence | Sample], *, timeout_s: float = 600.0
    ) -> list[ScoredSequence]:
        """Compute the logprobs of given responses; as Client.score."""
        return await self._run(self._session.score(sequences, timeout_s))

    async def abort(self, request_id: int | None = None, *, timeout_s: float = 60.0) -> int:
        """End a request's samples, or all; as Client.abort."""
        return await self._run(self._session.abort(request_id, timeout_s))

    async def pause(self, mode: Mode = "keep", *, timeout_s: float = 300.0) -> None:
        """Stop generating; as Client.pause."""
        await self._run(self._session.pause(mode, timeout_s))

    async def resume(self, *, timeout_s: float = 60.0) -> None:
        """Go on generating after `pause`."""
        await self._run(self._session.resume(timeout_s))

    async def sleep(
        self, level: int = 1, *, mode: Mode = "keep", timeout_s: float = 300.0
    ) -> SleepState:
        """Have all ranks give their memory back until `wake_up`; as Client.sleep."""
        return await self._run(self._session.sleep(level, mode, timeout_s))

    async def wake_up(
        self, tags: Iterable[Tag] | None = None, *, timeout_s: float = 300.0
    ) -> SleepState:
        """Have all ranks take their memory again; as Client.wake_up."""
        return await self._run(self._session.wake_up(tags, timeout_s))

    async def update_weights(
        self,
        weights: Weights,
        version: int,
        mode: Mode = "keep",
        *,
        base_version: int | None = None,
        timeout_s: float = 600.0,
        chunk_bytes: int = CHUNK_BYTES,
        copy: bool = False,
    ) -> WeightVersion:
        """Send new weights, read and copied in the executor; as Client.update_weights."""
        call = self._session.update_weights(
            weights, version, mode, base_version, timeout_s, chunk_bytes, copy
        )
        return await self._run(call, aside=True)

    async def get_weight_version(self, *, timeout_s: float = 60.0) -> WeightVersion:
        """The version that new tokens are drawn from."""
        return await self._run(self._session.get_weight_version(timeout_s))

    async def report_probs_diff(
        self, probs_diff: Mapping[str, float], *, timeout_s: float = 60.0
    ) -> None:
        """Tell the server how far the trainer's probabilities are; as Client.report_probs_diff."""
        await self._run(self._session.report_probs_diff(probs_diff, timeout_s))

    async def stats(self, *, timeout_s: float = 60.0) -> dict[str, float]:
        """Counters and gauges by name."""
        return await self._run(self._session.stats(timeout_s))

    async def health(self, *, timeout_s: float = 10.0) -> str:
        """Return "ok", or raise why the engine can make no more samples."""
        return await self._run(self._session.health(timeout_s))

    async def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """Ask the whole server to end; other clients lose it too."""
        await self._run(self._session.shutdown(timeout_s))

    def state_dict(self, consumed: Iterable[Batch] = ()) -> dict[str, Any]:
        """What a checkpoint must hold for every batch to count once; as Client.state_dict."""
        return self._session.inbox.state(consumed)

    async def close(self) -> None:
        """End the connection; as Client.close."""
        await asyncio.to_thread(self._finalizer)

    async def __aenter__(self) -> AsyncClient:
        """The client itself."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close."""
        await self.close()

    def __repr__(self) -> str:
        """Where it is connected."""
        connection = self._session.connection
        state = "" if connection.is_open else ", closed"
        return f"<rollpack.aio.AsyncClient: {connection.peer}{state}>"

    async def _run(self, steps: Steps[T], *, aside: bool = False) -> T:
        """Make a call; `aside` where it reads or writes much memory between its waits."""
        act = functools.partial(next, steps)
        while True:
            done, value = await self._aside(act) if aside else _outcome(act)
            if done:
                return cast(T, value)
            try:
                act = functools.partial(steps.send, await self._reply(value))
            except BaseException as error:
                act = functools.partial(steps.throw, error)

    async def _aside(self, act: Callable[[], Pending]) -> tuple[bool, Any]:
        """Take one step of a call in the executor. A step is short and is not interrupted."""
        step = asyncio.ensure_future(asyncio.to_thread(_outcome, act))
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError as error:
            done, value = await step
            if not done:
                return False, _Cancelled(error)
            if isinstance(value, Batch):
                self._session.inbox.put_back(value)
            raise

    async def _reply(self, pending: Pending | _Cancelled) -> Reply:
        if isinstance(pending, _Cancelled):
            raise pending.error
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()

        def tell(_: Future[Reply]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
                loop.call_soon_threadsafe(lambda: arrived.done() or arrived.set_result(None))

        # Not asyncio.wrap_future: cancelling the wait must not cancel what it waits for, or a batch
        # that comes all the same would be lost with its slot.
        pending.future.add_done_callback(tell)
        await asyncio.wait([arrived], timeout=pending.timeout_s)
        connection = self._session.connection
        try:
            if not pending.future.done():
                raise connection.no_answer(pending.verb, pending.timeout_s)
            return connection.wait(pending.future, pending.verb, 0.0)
        except RollpackError as error:
            raise self._session.explained(error) from None


@dataclass(frozen=True)
class _Cancelled:
    """Stands for the reply that a call has no longer to wait for, because it was cancelled."""

    error: asyncio.CancelledError


def _outcome(act: Callable[[], Pending]) -> tuple[bool, Any]:
    """What a step of a call ended in: (True, result), or (False, what it waits for)."""
    try:
        return False, act()
    except StopIteration as end:  # which no executor could hand on
        return True, end.value
