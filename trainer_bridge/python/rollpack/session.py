"""What a client of either kind does on its connection: the protocol's calls, without the waiting.

Each call is a generator. It posts requests, yields what it waits for, and is sent the reply, or has
the error thrown into it: `Client` waits on its thread, `AsyncClient` awaits.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from socket import gethostname
from typing import Any, Literal, TypeVar

from rollpack.batch import Batch
from rollpack.connection import Connection, Reply, open_socket
from rollpack.errors import FailedPrecondition, InvalidArgument, RollpackError, Unavailable
from rollpack.generation import RequestSamples
from rollpack.hello import DpRank, ServerInfo, hello_fields, read_hello
from rollpack.inbox import REPLY_GRACE_S, BatchWish, Inbox, Pending, Steps, end_connection
from rollpack.lending import READERS, MemoryProbe
from rollpack.metrics import report_fields
from rollpack.prompts import (
    Prompt,
    Sampling,
    ScoredSequence,
    ScoreSequence,
    TokenIds,
    decode_scores,
    encode_prompts,
    encode_sequences,
)
from rollpack.samples import Sample
from rollpack.sleeping import SleepState, Tag, checked_level, checked_tags
from rollpack.slots import Lease, Slot
from rollpack.weights import (
    PHASES_AHEAD,
    Chunk,
    LentChunk,
    Weights,
    WeightVersion,
    lend_chunks,
    write_chunks,
)

DEFAULT_SOCKET = "run/rollpack.sock"

Mode = Literal["keep", "wait", "abort"]
Order = Literal["completion", "canonical"]
_MODES = ("keep", "wait", "abort")
_ORDERS = ("completion", "canonical")
State = Mapping[str, Any]

T = TypeVar("T")


@dataclass(frozen=True)
class Opening:
    """How a connection is opened; the arguments of `connect`."""

    socket_path: str
    timeout_s: float = 10.0
    verify: bool = True
    describe_server: Callable[[], str] | None = None
    dp: DpRank | None = None
    resume: Sequence[State] = ()


def opening(
    socket: str | os.PathLike[str] | None,
    timeout_s: float,
    dp_rank: int | None,
    dp_size: int | None,
    whole_groups: bool,
    resume: State | Sequence[State] | None,
) -> Opening:
    """Check and gather the arguments of `connect`.

    Raises:
        InvalidArgument: one of dp_rank and dp_size without the other, or a rank that is not below
            the size; `resume` is not what state_dict() returned.
    """
    path = os.fspath(socket or os.environ.get("ROLLPACK_SOCKET") or DEFAULT_SOCKET)
    # As bridge.socket has it, so that trainers of every host may name it alike.
    path = path.replace("{host}", gethostname())
    dp = DpRank.checked(dp_rank, dp_size, whole_groups)
    states = [resume] if isinstance(resume, Mapping) else list(resume or ())
    for state in states:
        if not isinstance(state, Mapping) or not {"instance", "consumed"} <= set(state):
            raise InvalidArgument(
                field="resume",
                value=type(state).__name__,
                allowed="what Client.state_dict() returned, or a list of those",
            )
    return Opening(path, timeout_s, dp=dp, resume=tuple(states))


class Session:
    """One connection after hello, and the calls that can be made on it.

    Attributes:
        connection: the socket and its thread.
        info: what the server said of itself.
        inbox: batches on their way in.
    """

    def __init__(self, opening: Opening) -> None:
        """Connect and say hello; blocks.

        Raises:
            RollpackError: as `rollpack.connect`.
        """
        # Not a bound method: a cycle would keep a dropped client until the next collection.
        self._explain = functools.partial(_with_servers_end, opening.describe_server)
        path = opening.socket_path
        self.connection = Connection(open_socket(path, opening.timeout_s), path)
        self._abandoned: set[int] = set()
        # Held during an update: the server tells a client's updates apart by their versions alone,
        # and what one sends ahead of its replies must not become part of another.
        self._updating = threading.Lock()
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        try:
            self.info, slots = self._say_hello(opening)
            self.inbox = Inbox(
                self.connection, slots, self.info, self.leases, self._explain, opening.resume
            )
        except BaseException:
            end_connection(self.connection, self.leases)
            raise

    def _say_hello(self, opening: Opening) -> tuple[ServerInfo, list[Slot]]:
        probe = MemoryProbe()
        is_readable = READERS.begin(self.connection.server_pid)
        try:
            fields = hello_fields(opening.dp, probe if is_readable else None)
            future = self.connection.post("hello", fields)
            reply = self.wait(Pending(future, "hello", opening.timeout_s))
        finally:
            if is_readable:
                READERS.end()
        try:
            return read_hello(reply.fields, reply.fds, self.connection.peer)
        finally:
            for fd in reply.fds:
                os.close(fd)

    def wait(self, pending: Pending) -> Reply:
        """Wait for a reply on this thread; raises as Connection.wait."""
        try:
            return self.connection.wait(pending.future, pending.verb, pending.timeout_s)
        except Unavailable as error:
            raise self._explain(error) from None

    def explained(self, error: RollpackError) -> RollpackError:
        """An error that ended a wait, with the server's end where that is why."""
        return self._explain(error) if isinstance(error, Unavailable) else error

    def run(self, steps: Steps[T]) -> T:
        """Make a call, waiting on this thread."""
        try:
            pending = next(steps)
            while True:
                try:
                    reply = self.wait(pending)
                except BaseException as error:
                    pending = steps.throw(error)
                else:
                    pending = steps.send(reply)
        except StopIteration as end:
            result: T = end.value
            return result

    # The calls. Arguments, results and errors are those of Client's methods of the same names.

    def submit(
        self,
        prompts: Iterable[Prompt | TokenIds],
        n: int | None,
        sampling: Sampling | None,
        timeout_s: float,
    ) -> Steps[int]:
        """See Client.submit."""
        encoded = encode_prompts(prompts, n, sampling)
        fields = yield from self._request("submit", {"prompts": encoded}, timeout_s)
        return int(fields["request_id"])

    def next_batch(
        self, num_groups: int | None, min_ready: int | None, order: Order, timeout_s: float,
        verify: bool,
    ) -> Steps[Batch]:  # fmt: skip
        """See Client.next_batch."""
        if order not in _ORDERS:
            raise InvalidArgument(field="order", value=repr(order), allowed=" or ".join(_ORDERS))
        return (
            yield from self.inbox.take(BatchWish(num_groups, min_ready, order), timeout_s, verify)
        )

    def generate(
        self,
        prompts: Iterable[Prompt | TokenIds],
        n: int | None,
        sampling: Sampling | None,
        timeout_s: float,
        verify: bool,
    ) -> Steps[list[Sample]]:
        """See Client.generate."""
        deadline = time.monotonic() + timeout_s
        encoded = encode_prompts(prompts, n, sampling)
        if not encoded:
            return []
        fields = yield from self._request("submit", {"prompts": encoded}, timeout_s)
        request_id = int(fields["request_id"])
        samples = RequestSamples(request_id, len(encoded))
        try:
            while not samples.are_complete:
                left_s = max(0.0, deadline - time.monotonic())
                batch = yield from self.inbox.take(BatchWish(), left_s, verify)
                self._keep_if_foreign(batch, samples.other_requests(batch))
                with batch:
                    samples.add(batch)
        except BaseException:
            yield from self._abandon(request_id)
            raise
        return samples.result()

    def _keep_if_foreign(self, batch: Batch, other_requests: set[int]) -> None:
        foreign = sorted(other_requests - self._abandoned)
        if foreign:
            self.inbox.put_back(batch)
            raise FailedPrecondition(
                "take their batches with next_batch() first",
                field="generate",
                value=f"samples of request {', '.join(map(str, foreign))}",
                allowed="no other request to be under way",
            )

    def _abandon(self, request_id: int) -> Steps[None]:
        """End a request that no one waits for; later generate() calls pass over its samples."""
        self._abandoned.add(request_id)
        if self.connection.is_open:
            with contextlib.suppress(RollpackError):
                yield from self._request("abort", {"request_id": request_id}, REPLY_GRACE_S)

    def score(
        self, sequences: Iterable[ScoreSequence | Sample], timeout_s: float
    ) -> Steps[list[ScoredSequence]]:
        """See Client.score."""
        deadline = time.monotonic() + timeout_s
        parts, ids = encode_sequences(sequences)
        futures = [self._post("score", {"sequences": part}) for part in parts]
        results: list[dict[str, Any]] = []
        for future in futures:
            left_s = max(0.0, deadline - time.monotonic())
            reply = yield Pending(future, "score", left_s)
            results += reply.fields["results"]
        return decode_scores(results, ids)

    def abort(self, request_id: int | None, timeout_s: float) -> Steps[int]:
        """See Client.abort."""
        fields = yield from self._request("abort", {"request_id": request_id}, timeout_s)
        return int(fields["num_aborted"])

    def pause(self, mode: Mode, timeout_s: float) -> Steps[None]:
        """See Client.pause."""
        yield from self._request("pause", {"mode": _checked_mode(mode)}, timeout_s)

    def resume(self, timeout_s: float) -> Steps[None]:
        """See Client.resume."""
        yield from self._request("resume", {}, timeout_s)

    def sleep(self, level: int, mode: Mode, timeout_s: float) -> Steps[SleepState]:
        """See Client.sleep."""
        request = {"level": checked_level(level), "mode": _checked_mode(mode)}
        return SleepState.from_reply((yield from self._request("sleep", request, timeout_s)))

    def wake_up(self, tags: Iterable[Tag] | None, timeout_s: float) -> Steps[SleepState]:
        """See Client.wake_up."""
        request = {"tags": checked_tags(tags)}
        return SleepState.from_reply((yield from self._request("wake_up", request, timeout_s)))

    def update_weights(
        self,
        weights: Weights,
        version: int,
        mode: Mode,
        base_version: int | None,
        timeout_s: float,
        chunk_bytes: int,
        copy: bool,
    ) -> Steps[WeightVersion]:
        """See Client.update_weights."""
        mode = _checked_mode(mode)
        if not self._updating.acquire(blocking=False):
            raise FailedPrecondition(
                "one update of a client at a time",
                field="update_weights",
                value=f"version {version}",
                allowed="the end of the update under way first",
            )
        # Pairs may share a buffer that is filled anew for each; a mapping's tensors are all there.
        can_lend = self.info.reads_memory and not copy and isinstance(weights, Mapping)
        lends = can_lend and READERS.begin(self.connection.server_pid)
        try:
            chunks = (lend_chunks if lends else write_chunks)(weights, chunk_bytes)
            return (yield from self._send_update(chunks, version, mode, base_version, timeout_s))
        finally:
            if lends:
                READERS.end()
            self._updating.release()

    def _send_update(
        self,
        chunks: Iterable[Chunk | LentChunk],
        version: int,
        mode: Mode,
        base_version: int | None,
        timeout_s: float,
    ) -> Steps[WeightVersion]:
        deadline = time.monotonic() + timeout_s

        def pending(future: Future[Reply]) -> Pending:
            return Pending(future, "update_weights", max(0.0, deadline - time.monotonic()))

        begin: dict[str, Any] = {"phase": "begin", "version": version}
        if base_version is not None:
            begin["base_version"] = base_version
        # What is ready is sent ahead of the replies before it: ranks begin when their step ends,
        # which is time enough to write the first chunks. A chunk is kept until its reply.
        in_flight = deque([(self._post("update_weights", begin), None)])
        try:
            for chunk in chunks:
                future = self._post("update_weights", chunk.request(version), chunk.fds)
                in_flight.append((future, chunk))
                if len(in_flight) == PHASES_AHEAD:
                    yield pending(in_flight[0][0])
                    in_flight.popleft()
            while in_flight:
                yield pending(in_flight[0][0])
                in_flight.popleft()
            commit = {"phase": "commit", "version": version, "mode": mode}
            reply = yield pending(self._post("update_weights", commit))
            return WeightVersion.from_reply(reply.fields)
        except BaseException:
            yield from self._cancel_update(version)
            raise

    def _cancel_update(self, version: int) -> Steps[None]:
        """Take an unfinished update back; a server that refused it has done so already."""
        if self.connection.is_open:
            with contextlib.suppress(RollpackError):
                fields = {"phase": "cancel", "version": version}
                yield from self._request("update_weights", fields, REPLY_GRACE_S)

    def get_weight_version(self, timeout_s: float) -> Steps[WeightVersion]:
        """See Client.get_weight_version."""
        fields = yield from self._request("get_weight_version", {}, timeout_s)
        return WeightVersion.from_reply(fields)

    def report_probs_diff(self, probs_diff: Mapping[str, float], timeout_s: float) -> Steps[None]:
        """See Client.report_probs_diff."""
        yield from self._request("report_probs_diff", report_fields(probs_diff), timeout_s)

    def stats(self, timeout_s: float) -> Steps[dict[str, float]]:
        """See Client.stats."""
        fields = yield from self._request("stats", {}, timeout_s)
        return dict(fields["stats"])

    def health(self, timeout_s: float) -> Steps[str]:
        """See Client.health."""
        fields = yield from self._request("health", {}, timeout_s)
        return str(fields["status"])

    def shutdown(self, timeout_s: float) -> Steps[None]:
        """See Client.shutdown."""
        yield from self._request("shutdown", {}, timeout_s)

    def _post(
        self, verb: str, fields: dict[str, Any], fds: tuple[int, ...] | list[int] = ()
    ) -> Future[Reply]:
        try:
            return self.connection.post(verb, fields, fds)
        except Unavailable as error:
            raise self._explain(error) from None

    def _request(
        self, verb: str, fields: dict[str, Any], timeout_s: float
    ) -> Generator[Pending, Reply, dict[str, Any]]:
        reply = yield Pending(self._post(verb, fields), verb, timeout_s)
        return reply.fields


def _with_servers_end(describe: Callable[[], str] | None, error: Unavailable) -> Unavailable:
    if describe and error.field == "server":
        error.message = f"{error.message}; {describe()}"
    return error


def _checked_mode(mode: Mode) -> Mode:
    if mode not in _MODES:
        raise InvalidArgument(field="mode", value=repr(mode), allowed=" or ".join(_MODES))
    return mode
