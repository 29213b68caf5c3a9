"""One connection to a server: requests out, replies matched by id, one thread that moves bytes.

A thread of its own does all socket work, so that a KeyboardInterrupt in the trainer never tears a
frame, and so that a finalizer may send from wherever the garbage collector runs it: posting only
appends to a deque and writes an eventfd, it takes no lock.
"""

from __future__ import annotations

import array
import contextlib
import copy
import errno
import itertools
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

from rollpack.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RollpackError,
    Unavailable,
    WrongProcess,
    error_from_map,
)
from rollpack.wire import FrameReader, encode_frame

_MAX_PATH_BYTES = 107  # sun_path of Linux without its terminating zero
_CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Reply:
    """One reply that said ok; the descriptors belong to whoever holds it."""

    fields: dict[str, Any]
    fds: list[int]


def open_socket(path: str, timeout_s: float) -> socket.socket:
    """Connect to the server at `path`, waiting until it listens.

    Raises:
        InvalidArgument: the path is longer than a socket address holds.
        NotFound: no socket is there within `timeout_s`.
        Unavailable: a socket is there but nobody listens on it.
        FailedPrecondition: its server runs as another user.
    """
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise InvalidArgument(
            "use a shorter path, or one relative to the working directory",
            field="socket",
            value=path,
            allowed=f"at most {_MAX_PATH_BYTES} bytes",
        )
    deadline = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            sock.connect(path)
            _check_peer(sock, path)
            return sock
        except OSError as error:
            sock.close()
            if time.monotonic() >= deadline:
                raise _connect_error(path, timeout_s, error) from error
            time.sleep(0.02)
        except RollpackError:
            sock.close()
            raise


def _connect_error(path: str, timeout_s: float, error: OSError) -> RollpackError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(
            f"no server made it within {timeout_s:g} s; start `rollpack serve`, or name its socket "
            "by argument or ROLLPACK_SOCKET",
            field="socket",
            value=path,
        )
    return Unavailable(
        f"no server answers there: {error.strerror or error}", field="socket", value=path
    )


def _check_peer(sock: socket.socket, path: str) -> None:
    _, uid, _ = peer_credentials(sock)
    if uid != os.getuid():
        raise FailedPrecondition(
            field="socket",
            value=path,
            origin=f"its server runs as uid {uid}",
            allowed=f"a server of uid {os.getuid()}",
        )


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of the process that listens; pid is 0 across pid namespaces."""
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return pid, uid, gid


class Connection:
    """Sends requests and hands each reply to the Future that waits for it. Thread-safe."""

    def __init__(self, sock: socket.socket, path: str) -> None:
        """Take over a connected socket and start the thread that serves it."""
        pid = peer_credentials(sock)[0]
        self.server_pid = pid
        self.peer = f"server at {path}" + (f", pid {pid}" if pid else "")
        sock.setblocking(False)
        self._sock = sock
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Closed with this object and not with the connection: a thread in post() may still write
        # to it, and by then the number could be another file's.
        weakref.finalize(self, os.close, self._wake_fd).atexit = False
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[Reply]] = {}
        self._outbox: deque[_Outgoing] = deque()
        self._reader = FrameReader()
        self._closing = False
        self._end: RollpackError | None = None
        self._owner_pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="rollpack", daemon=True)
        _connections.add(self)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """True until the client closes or the server goes."""
        return self._end is None and not self._closing

    def post(self, verb: str, fields: dict[str, Any], fds: Sequence[int] = ()) -> Future[Reply]:
        """Queue one request and return at once.

        Args:
            verb: one of the protocol's verbs.
            fields: the request's other keys.
            fds: descriptors to send along; they are closed once sent, or when sending fails.

        Raises:
            Unavailable: the connection has ended; says why.
            InvalidArgument: a field cannot be encoded.
        """
        request_id = next(self._ids)
        message = {"verb": verb, "id": request_id, **fields}
        if fds:
            message["num_fds"] = len(fds)
        try:
            self._require_open()
            outgoing = _Outgoing(encode_frame(message), list(fds))
        except RollpackError:
            _close_all(fds)
            raise
        future: Future[Reply] = Future()
        self._waiting[request_id] = future
        self._outbox.append(outgoing)
        if self._end is not None:  # the thread ended between the check and the append
            outgoing.close_fds()
            self._waiting.pop(request_id, None)
            self._require_open()
        self._wake()
        return future

    def wait(self, future: Future[Reply], verb: str, timeout_s: float) -> Reply:
        """Wait for the reply of a posted request.

        Raises:
            DeadlineExceeded: no reply came in time.
            RollpackError: the server's error, or Unavailable when it went away.
        """
        try:
            return future.result(timeout_s)
        except RollpackError as error:
            raise copy.copy(error) from None  # one error may end many waits, on many threads
        except FutureTimeoutError:
            raise self.no_answer(verb, timeout_s) from None

    def no_answer(self, verb: str, timeout_s: float) -> DeadlineExceeded:
        """The error of a wait that ran out of time."""
        return DeadlineExceeded(
            "the server did not answer", field=verb, value=f"{timeout_s:g} s", origin=self.peer
        )

    def request(self, verb: str, fields: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Post, wait and return the reply's fields; raises as `post` and `wait` do."""
        return self.wait(self.post(verb, fields), verb, timeout_s).fields

    def close(self) -> None:
        """Send what is queued, end the connection and the thread; a second call does nothing."""
        if os.getpid() != self._owner_pid or self._end is not None:
            return
        self._closing = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():  # the server does not read: leave what is queued unsent
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _require_open(self) -> None:
        if self._end is not None:
            raise copy.copy(self._end)
        if self._closing:
            raise _closed(self.peer)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # From here on: the connection's own thread.

    def _run(self) -> None:
        end: RollpackError = _closed(self.peer)
        try:
            poller = select.poll()
            poller.register(self._wake_fd, select.POLLIN)
            while not self._closing or self._outbox:
                want = select.POLLIN | (select.POLLOUT if self._outbox else 0)
                poller.register(self._sock, want)
                poller.poll()
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
                self._send_queued()
                self._receive()
        except RollpackError as error:
            end = error
        except (ConnectionResetError, BrokenPipeError):
            end = Unavailable("it went away", field="server", value=self.peer)
        except OSError as error:
            end = Unavailable(f"the connection broke: {error}", field="server", value=self.peer)
        finally:
            self._finish(end)

    def _send_queued(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._outbox:
                if self._outbox[0].send(self._sock):
                    self._outbox.popleft()

    def _receive(self) -> None:
        try:
            is_alive = self._reader.receive(self._sock)
        except BlockingIOError:
            return
        for message, fds in self._reader.frames():
            self._deliver(message, fds)
        if not is_alive:
            raise Unavailable("it went away", field="server", value=self.peer)

    def _deliver(self, message: dict[str, Any], fds: list[int]) -> None:
        error = None if message.get("ok") is True else error_from_map(message.get("error") or {})
        future = self._waiting.pop(message.get("id", 0), None)
        if future is None or not future.set_running_or_notify_cancel():
            _close_all(fds)
            if future is None:
                raise error or DataLoss(
                    field="reply id", value=str(message.get("id")), origin=self.peer
                )
        elif error is not None:
            _close_all(fds)
            future.set_exception(error)
        else:
            future.set_result(Reply(message, fds))

    def _finish(self, end: RollpackError) -> None:
        self._end = end
        self._sock.close()
        self._reader.close()
        while self._outbox:
            self._outbox.popleft().close_fds()
        while self._waiting:
            _, future = self._waiting.popitem()
            if future.set_running_or_notify_cancel():
                future.set_exception(end)

    def _abandon_in_child(self) -> None:
        """After fork: close our copies, so that the server sees EOF when the parent goes."""
        if self._end is not None:
            return
        self._end = WrongProcess(
            f"the connection belongs to process {self._owner_pid}, from which this one, "
            f"{os.getpid()}, was forked; open one here with rollpack.connect()",
            field="client",
            value=self.peer,
        )
        self._sock.close()
        self._waiting.clear()
        self._reader.close()
        for outgoing in self._outbox:
            outgoing.close_fds()


class _Outgoing:
    """A frame on its way out; its descriptors ride on its first byte."""

    def __init__(self, frame: bytes, fds: list[int]) -> None:
        self._rest = memoryview(frame)
        self._fds = fds

    def send(self, sock: socket.socket) -> bool:
        """Send as much as fits; True when all is sent.

        Raises:
            BlockingIOError: the socket is full.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._fds))]
        num_sent = sock.sendmsg([self._rest], rights if self._fds else [], socket.MSG_NOSIGNAL)
        self.close_fds()
        self._rest = self._rest[num_sent:]
        return not self._rest

    def close_fds(self) -> None:
        _close_all(self._fds)
        self._fds = []


def _closed(peer: str) -> RollpackError:
    return Unavailable("this client is closed", field="client", value=peer)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for connection in list(_connections):
        connection._abandon_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
