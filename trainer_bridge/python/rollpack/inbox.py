"""Batches on their way in: asked for, opened on their slot, and kept when nobody could take them.

A batch whose wait was interrupted still comes; it is kept and handed out first. A batch that a
saved state says was consumed is given back at once: that is what makes delivery exactly once.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from rollpack.batch import Batch
from rollpack.connection import Connection, Reply
from rollpack.errors import DataLoss, DeadlineExceeded, RollpackError, Unavailable
from rollpack.hello import ServerInfo
from rollpack.slots import Lease, Slot

REPLY_GRACE_S = 5.0  # beyond a wait that the server itself limits

T = TypeVar("T")


@dataclass(frozen=True)
class Pending:
    """A reply that a call waits for."""

    future: Future[Reply]
    verb: str
    timeout_s: float


Steps = Generator[Pending, Reply, T]


@dataclass(frozen=True)
class BatchWish:
    """What a next_batch asks for; see Client.next_batch."""

    num_groups: int | None = None
    min_ready: int | None = None
    order: str = "completion"

    def fields(self, timeout_s: float) -> dict[str, Any]:
        """The request's fields; what is not asked for is left out."""
        fields: dict[str, Any] = {"num_groups": self.num_groups}
        if self.min_ready is not None:
            fields["min_ready"] = self.min_ready
        if self.order != "completion":
            fields["order"] = self.order
        return {**fields, "timeout_ms": max(0, round(timeout_s * 1000))}


class Inbox:
    """The batches of one connection, and the slots this client holds."""

    def __init__(
        self,
        connection: Connection,
        slots: list[Slot],
        info: ServerInfo,
        leases: weakref.WeakSet[Lease],
        explain: Callable[[Unavailable], Unavailable],
        resume: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Start empty.

        Args:
            connection: where batches are asked for.
            slots: the server's, by index.
            info: what the server said of itself.
            leases: receives the lease of every batch, for `end_connection`.
            explain: adds to the error of a connection that broke.
            resume: what `state` returned to clients before this one; those of another life of the
                server mean other batches and do not count.
        """
        self._connection = connection
        self._slots = slots
        self._info = info
        self._leases = leases
        self._explain = explain
        self._undelivered: deque[Reply | Batch] = deque()
        # Batches that were consumed, and of whose release the server has not yet told.
        self._consumed: set[int] = set()
        for state in resume:
            if state["instance"] == info.instance:
                self._consumed.update(map(int, state["consumed"]))

    def take(self, wish: BatchWish, timeout_s: float, verify: bool) -> Steps[Batch]:
        """Return the next batch; arguments and errors are those of Client.next_batch."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                reply = self._undelivered.popleft()
            except IndexError:
                reply = yield from self._wait(wish, max(0.0, deadline - time.monotonic()))
            try:
                if isinstance(reply, Batch):
                    return reply
                if self._is_consumed(reply.fields):
                    self._release(_handed_over(reply.fields))
                    continue
                return self._open(reply, verify)
            except KeyboardInterrupt:
                self._undelivered.append(reply)
                raise

    def put_back(self, batch: Batch) -> None:
        """Keep a batch for a later `take`."""
        self._undelivered.append(batch)

    def state(self, consumed: Iterable[Batch]) -> dict[str, Any]:
        """What `resume` takes: the batches that were released, and `consumed` as well.

        A batch whose release the server has confirmed never comes again and is left out.
        """
        seqs = set(self._consumed)
        seqs.update(lease.batch_seq for lease in list(self._leases) if lease.released)
        seqs.update(batch.batch_seq for batch in consumed if batch.batch_seq)
        return {"instance": self._info.instance, "consumed": sorted(seqs)}

    def _wait(self, wish: BatchWish, timeout_s: float) -> Steps[Reply]:
        try:
            future = self._connection.post("next_batch", wish.fields(timeout_s))
        except Unavailable as error:
            raise self._explain(error) from None
        try:
            reply = yield Pending(future, "next_batch", timeout_s + REPLY_GRACE_S)
        except BaseException as error:
            future.add_done_callback(self._keep)
            if isinstance(error, DeadlineExceeded):
                self._name_held_slots(error)
            raise
        return reply

    def _name_held_slots(self, error: DeadlineExceeded) -> None:
        held = sorted(lease.name for lease in self._leases)
        if len(held) == len(self._slots):
            error.message += (
                f"; this client holds all {len(held)} slots ({', '.join(held)}): "
                "call release() and drop the arrays on them"
            )

    def _keep(self, future: Future[Reply]) -> None:
        if future.exception() is None:
            self._undelivered.append(future.result())

    def _is_consumed(self, fields: dict[str, Any]) -> bool:
        batch_seq = fields.get("batch_seq", 0)
        return batch_seq != 0 and batch_seq in self._consumed

    def _open(self, reply: Reply, verify: bool) -> Batch:
        fields = reply.fields
        pad = self._info.pad_token_id
        if fields.get("slot") is None:
            if fields.get("batch_seq"):  # of a server with a journal: told once for all
                self._release(_handed_over(fields))
            return Batch(fields, None, verify=verify, pad_token_id=pad)
        index, slot_bytes = fields["slot"], self._info.slot_bytes
        if not 0 <= index < len(self._slots) or not 0 < fields["bytes"] <= slot_bytes:
            raise DataLoss(
                field="next_batch",
                value=f"slot {index}, {fields['bytes']} bytes",
                allowed=f"a slot below {len(self._slots)}, at most {slot_bytes} bytes",
            )
        handed_over = _handed_over(fields)
        lease = Lease(
            self._slots[index],
            fields["bytes"],
            fields["batch_seq"],
            _release_message(weakref.ref(self), handed_over),
        )
        self._leases.add(lease)
        return Batch(fields, lease, verify=verify, pad_token_id=pad)

    def _release(self, handed_over: dict[str, int]) -> None:
        """Send a slot back. It runs wherever the last view dies, and must not raise there."""
        batch_seq = handed_over["batch_seq"]
        self._consumed.add(batch_seq)
        if self._connection.is_open:
            with contextlib.suppress(RollpackError):  # it ended: the server takes the slot itself
                future = self._connection.post("release", handed_over)
                future.add_done_callback(_forget_when_confirmed(self._consumed, batch_seq))


def end_connection(connection: Connection, leases: weakref.WeakSet[Lease]) -> None:
    """Close, and leave the views that still live as they are."""
    if connection.is_open:
        for lease in list(leases):
            lease.end()
    connection.close()


def _handed_over(fields: Mapping[str, Any]) -> dict[str, int]:
    return {name: fields[name] for name in ("slot", "generation", "batch_seq")}


def _release_message(inbox: weakref.ref[Inbox], handed_over: dict[str, int]) -> Callable[[], None]:
    def send() -> None:
        alive = inbox()
        if alive is not None:
            alive._release(handed_over)

    return send


def _forget_when_confirmed(consumed: set[int], batch_seq: int) -> Callable[[Future[Reply]], None]:
    def confirmed(future: Future[Reply]) -> None:
        if future.exception() is None:
            consumed.discard(batch_seq)

    return confirmed
