"""Slots of shared memory as the client maps them, and the life of one filling of a slot.

A slot is mapped private and writable: an in-place write copies that page for this process alone, so
it reaches neither the engine nor another client. A slot goes back to the server once its batch was
released and no array on it lives, whichever comes last.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from rollpack.errors import DataLoss

Bytes = npt.NDArray[np.uint8]


class Slot:
    """One memfd of the server, mapped for as long as anything uses it."""

    def __init__(self, index: int, fd: int, slot_bytes: int) -> None:
        """Check and map one descriptor; the caller still owns `fd`.

        Raises:
            DataLoss: the memory is smaller than the server says, or could shrink under the map,
                which would kill this process on access.
        """
        self.index = index
        self.num_bytes = slot_bytes
        where = f"slot {index}"
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise DataLoss(
                f"it is no memfd: {error.strerror}", field=where, allowed="a sealed memfd"
            ) from error
        if not seals & fcntl.F_SEAL_SHRINK:
            raise DataLoss(
                field=where, value=f"seals {seals:#x}", allowed="a memfd sealed against shrinking"
            )
        size = os.fstat(fd).st_size
        if size < slot_bytes or slot_bytes <= 0:
            raise DataLoss(
                field=where, value=f"{size} bytes", allowed=f"at least slot_bytes = {slot_bytes}"
            )
        self._map = mmap.mmap(
            fd, slot_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )

    def view(self, num_bytes: int) -> Bytes:
        """A new array on the first `num_bytes` bytes, u8 [num_bytes], writable, private."""
        return np.frombuffer(self._map, np.uint8, num_bytes)

    def drop_private_pages(self, num_bytes: int) -> None:
        """Forget what this process wrote into the first `num_bytes` bytes."""
        self._map.madvise(mmap.MADV_DONTNEED, 0, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)


class Lease:
    """One filling of a slot in this client's hands, from next_batch to its release message.

    Attributes:
        batch_seq: the batch's number.
        name: how errors call it.
        released: the trainer has said that it is done with the batch.
        ended: the client has closed, so that the slot is the server's whatever the trainer does.
    """

    def __init__(
        self, slot: Slot, num_bytes: int, batch_seq: int, give_back: Callable[[], None]
    ) -> None:
        """Hold the first `num_bytes` bytes of `slot`; `give_back` sends the release message."""
        self.released = False
        self.ended = False
        self.batch_seq = batch_seq
        self.name = f"batch {batch_seq}"
        self._slot = slot
        self._num_bytes = num_bytes
        self._give_back = give_back
        self._memory: weakref.ref[Bytes] | None = None

    def memory(self) -> Bytes:
        """The array every view of the batch is based on, u8 [num_bytes]; call it once."""
        memory = self._slot.view(self._num_bytes)
        self._memory = weakref.ref(memory)
        # NumPy and torch keep the base of a view alive, so the base dies after the last view.
        weakref.finalize(memory, self._last_view_died).atexit = False
        return memory

    def end(self) -> None:
        """Give live views pages of their own, because the server may now fill the slot again."""
        self.ended = True
        memory = self._memory() if self._memory else None
        if memory is not None:
            memory[:: mmap.PAGESIZE] |= 0  # a write, though of the same bytes, copies the page

    def _last_view_died(self) -> None:
        if self.released:
            self._slot.drop_private_pages(self._num_bytes)
            self._give_back()
