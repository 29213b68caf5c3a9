"""Batches on their way in: asked for, opened on their slot, and kept when nobody could take them.

A batch whose wait was interrupted still comes; it is kept and handed out first.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from rollpack.batch import Batch
from rollpack.connection import Connection, Reply
from rollpack.errors import DataLoss, DeadlineExceeded, RollpackError, Unavailable
from rollpack.slots import Lease, Slot

REPLY_GRACE_S = 5.0  # beyond a wait that the server itself limits


class Inbox:
    """The batches of one connection, and the slots this client holds."""

    def __init__(
        self,
        connection: Connection,
        slots: list[Slot],
        slot_bytes: int,
        pad_token_id: int,
        leases: weakref.WeakSet[Lease],
        explain: Callable[[Unavailable], Unavailable],
    ) -> None:
        """Start empty.

        Args:
            connection: where batches are asked for.
            slots: the server's, by index.
            slot_bytes: size of each.
            pad_token_id: for the views of batches that pad.
            leases: receives the lease of every batch, for `end_connection`.
            explain: adds to the error of a connection that broke.
        """
        self._connection = connection
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._pad_token_id = pad_token_id
        self._leases = leases
        self._explain = explain
        self._undelivered: deque[Reply | Batch] = deque()

    def take(self, num_groups: int | None, timeout_s: float, *, verify: bool) -> Batch:
        """Return the next batch; arguments and errors are those of Client.next_batch."""
        try:
            reply = self._undelivered.popleft()
        except IndexError:
            reply = self._wait(num_groups, timeout_s)
        try:
            return reply if isinstance(reply, Batch) else self._open(reply, verify)
        except KeyboardInterrupt:
            self._undelivered.append(reply)
            raise

    def put_back(self, batch: Batch) -> None:
        """Keep a batch for a later `take`."""
        self._undelivered.append(batch)

    def _wait(self, num_groups: int | None, timeout_s: float) -> Reply:
        fields = {"num_groups": num_groups, "timeout_ms": max(0, round(timeout_s * 1000))}
        try:
            future = self._connection.post("next_batch", fields)
        except Unavailable as error:
            raise self._explain(error) from None
        try:
            return self._connection.wait(future, "next_batch", timeout_s + REPLY_GRACE_S)
        except BaseException as error:
            future.add_done_callback(self._keep)
            if isinstance(error, DeadlineExceeded):
                self._name_held_slots(error)
            if isinstance(error, Unavailable):
                raise self._explain(error) from None
            raise

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

    def _open(self, reply: Reply, verify: bool) -> Batch:
        fields = reply.fields
        if fields.get("slot") is None:
            return Batch(fields, None, verify=verify, pad_token_id=self._pad_token_id)
        index = fields["slot"]
        if not 0 <= index < len(self._slots) or not 0 < fields["bytes"] <= self._slot_bytes:
            raise DataLoss(
                field="next_batch",
                value=f"slot {index}, {fields['bytes']} bytes",
                allowed=f"a slot below {len(self._slots)}, at most {self._slot_bytes} bytes",
            )
        handed_over = {name: fields[name] for name in ("slot", "generation", "batch_seq")}
        lease = Lease(
            self._slots[index],
            fields["bytes"],
            f"batch {fields['batch_seq']}",
            _release_message(self._connection, handed_over),
        )
        self._leases.add(lease)
        return Batch(fields, lease, verify=verify, pad_token_id=self._pad_token_id)


def end_connection(connection: Connection, leases: weakref.WeakSet[Lease]) -> None:
    """Close, and leave the views that still live as they are."""
    if connection.is_open:
        for lease in list(leases):
            lease.end()
    connection.close()


def _release_message(connection: Connection, handed_over: dict[str, int]) -> Callable[[], None]:
    """What sends a slot back. It runs wherever the last view dies, and must not raise there."""

    def send() -> None:
        if connection.is_open:
            with contextlib.suppress(RollpackError):  # it ended: the server takes the slot itself
                connection.post("release", handed_over)

    return send
