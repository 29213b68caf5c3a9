"""Whether the server may read this process's memory, where tensors lie that it is to pack."""

from __future__ import annotations

import ctypes
import pathlib
import secrets
import threading
from typing import Any

import numpy as np

_PR_SET_PTRACER = 0x59616D61
_PTRACE_SCOPE = pathlib.Path("/proc/sys/kernel/yama/ptrace_scope")
_NUM_WORDS = 4


class MemoryProbe:
    """Some words that nobody can know without reading them here; kept until the server has looked.

    Attributes:
        fields: of the hello request.
    """

    def __init__(self) -> None:
        """Draw the words."""
        self._words = np.frombuffer(bytearray(secrets.token_bytes(4 * _NUM_WORDS)), "<i4")
        self.fields: dict[str, Any] = {
            "address": self._words.ctypes.data,
            "value": self._words.tobytes(),
        }


class Readers:
    """Processes of the same user that may read this one's memory, as far as it has a say in that.

    Where the Yama security module lets only a process's parents do so (ptrace_scope 1), a process
    can name one more, the last it named. Elsewhere there is nothing to name.
    """

    def __init__(self, names_one: bool) -> None:
        """`names_one`: whether a reader has to be named, and only one can be."""
        self._names_one = names_one
        self._lock = threading.Lock()
        self._pid = 0
        self._num_uses = 0

    def begin(self, server_pid: int) -> bool:
        """Let process `server_pid` read until end(); False where another one does so now."""
        if not self._names_one:
            return True
        with self._lock:
            if self._num_uses > 0 and self._pid != server_pid:
                return False
            if self._num_uses == 0:
                ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(server_pid), 0, 0, 0)
            self._pid = server_pid
            self._num_uses += 1
            return True

    def end(self) -> None:
        """End what begin() allowed. The name itself stays until the next."""
        if self._names_one:
            with self._lock:
                self._num_uses -= 1


def _yama_names_one() -> bool:
    try:
        return _PTRACE_SCOPE.read_text().strip() == "1"
    except OSError:  # no Yama
        return False


READERS = Readers(_yama_names_one())
