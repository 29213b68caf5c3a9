"""The trainer's side of the bridge: requests out, batches in, weights out.

One Client is one connection. It may be used from several threads, e.g. a trainer and a background
loop that takes batches; after a fork only the parent's works.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Literal

from rollpack.batch import Batch
from rollpack.connection import Connection, Reply, open_socket
from rollpack.errors import (
    FailedPrecondition,
    InvalidArgument,
    RollpackError,
    Unavailable,
)
from rollpack.generation import RequestSamples
from rollpack.hello import PROTOCOL_VERSION, ServerInfo, read_hello
from rollpack.inbox import REPLY_GRACE_S, Inbox, end_connection
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
from rollpack.slots import Lease, Slot
from rollpack.weights import CHUNK_BYTES, Tensor, write_chunks

DEFAULT_SOCKET = "run/rollpack.sock"

Mode = Literal["keep", "wait", "abort"]
_MODES = ("keep", "wait", "abort")


def connect(socket: str | os.PathLike[str] | None = None, *, timeout_s: float = 10.0) -> Client:
    """Connect to a running server.

    Args:
        socket: path of its socket; None takes ROLLPACK_SOCKET, else run/rollpack.sock.
        timeout_s: longest wait for the server to listen and to answer, seconds.

    Raises:
        NotFound: no socket is there.
        Unavailable: nobody answers on it.
        Unsupported: client and server speak different versions; names both.
        DeadlineExceeded: a server listens but does not say hello.
    """
    path = os.fspath(socket or os.environ.get("ROLLPACK_SOCKET") or DEFAULT_SOCKET)
    return Client(path, timeout_s=timeout_s)


class Client:
    """A connection to a rollpack server. Every call raises RollpackError or a class of it.

    Attributes:
        info: what the server said of itself: config, eos_token_ids, num_slots and more.
        socket_path: where it is connected.
    """

    def __init__(
        self,
        socket_path: str,
        *,
        timeout_s: float = 10.0,
        verify: bool = True,
        describe_server: Callable[[], str] | None = None,
    ) -> None:
        """Connect and say hello; `rollpack.connect` and `rollpack.launch` are the usual ways.

        Args:
            socket_path: the server's socket.
            timeout_s: longest wait for it, seconds.
            verify: compare the checksum of every batch.
            describe_server: asked for the server's end when the connection breaks.
        """
        self.socket_path = socket_path
        self.verify = verify
        # Not a bound method: a cycle would keep a dropped client until the next collection.
        self._explain = functools.partial(_with_servers_end, describe_server)
        self._connection = Connection(open_socket(socket_path, timeout_s), socket_path)
        self._abandoned: set[int] = set()
        leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._finalizer = weakref.finalize(self, end_connection, self._connection, leases)
        try:
            self.info, slots = self._say_hello(timeout_s)
            self._inbox = Inbox(
                self._connection,
                slots,
                self.info.slot_bytes,
                self.info.pad_token_id,
                leases,
                self._explain,
            )
        except BaseException:
            self.close()
            raise

    def _say_hello(self, timeout_s: float) -> tuple[ServerInfo, list[Slot]]:
        hello = {"protocol_version": PROTOCOL_VERSION, "client": f"python, pid {os.getpid()}"}
        reply = self._wait(self._connection.post("hello", hello), "hello", timeout_s)
        try:
            return read_hello(reply.fields, reply.fds, self._connection.peer)
        finally:
            for fd in reply.fds:
                os.close(fd)

    def submit(
        self,
        prompts: Iterable[Prompt | TokenIds],
        *,
        n: int | None = None,
        sampling: Sampling | None = None,
        timeout_s: float = 60.0,
    ) -> int:
        """Ask for samples and return at once; they come with `next_batch`.

        Args:
            prompts: for each its token ids, or a map {input_ids, prompt_id, n, sampling}.
            n: samples a prompt; None takes the configuration's.
            sampling: keys for every prompt that does not set them itself.
            timeout_s: longest wait for the server to accept, seconds.

        Returns:
            request_id, which every sample of these prompts carries.

        Raises:
            InvalidArgument: names the prompt and the field; nothing was accepted.
            WouldBlock: queues are full; take batches, then try again.
        """
        encoded = encode_prompts(prompts, n, sampling)
        return int(self._request("submit", {"prompts": encoded}, timeout_s)["request_id"])

    def next_batch(self, num_groups: int | None = None, *, timeout_s: float = 60.0) -> Batch:
        """Wait for finished groups and return them as a batch on shared memory, without a copy.

        Args:
            num_groups: groups of the batch; None takes as many finished ones as fit, at least one.
            timeout_s: longest wait, seconds; 0 looks once.

        Returns:
            The batch, to be released. If this call was interrupted before and its batch came all
            the same, that batch comes first.

        Raises:
            DeadlineExceeded: not that many groups finished in time.
            InvalidArgument: num_groups is not positive. Where that many do not fit a slot, the
                first ones that do are returned instead.
            DataLoss: the batch's bytes are not those that were written.
        """
        return self._inbox.take(num_groups, timeout_s, verify=self.verify)

    def batches(self, num_groups: int | None = None, *, timeout_s: float = 60.0) -> Iterator[Batch]:
        """Yield batches without end; asking for the next one releases the one before.

        A batch whose loop body raised, or after which the loop was left, is not released: it is
        delivered again to the next client, unless you call its `release()`.

        Args:
            num_groups: as in `next_batch`.
            timeout_s: longest wait for each, seconds.

        Raises:
            DeadlineExceeded: no batch came in time; as `next_batch`.
        """
        while True:
            batch = self.next_batch(num_groups, timeout_s=timeout_s)
            yield batch
            batch.release()
            del batch  # this frame's reference would keep the slot through the next wait

    def __iter__(self) -> Iterator[Batch]:
        """`for batch in client` is `client.batches()`."""
        return self.batches()

    def generate(
        self,
        prompts: Iterable[Prompt | TokenIds],
        *,
        n: int | None = None,
        sampling: Sampling | None = None,
        timeout_s: float = 600.0,
    ) -> list[Sample]:
        """Submit prompts and collect all their samples in one call.

        Do not mix it with batches of other requests that are still to come.

        Args:
            prompts: as in `submit`.
            n: as in `submit`.
            sampling: as in `submit`.
            timeout_s: longest time for everything, seconds; on expiry the request is aborted.

        Returns:
            Copies, ordered by prompt and then by sample_index.

        Raises:
            SamplesFailed: some samples ended in errors; it holds these and the others.
            DeadlineExceeded: not all came in time.
            FailedPrecondition: samples of another request came; they stay for `next_batch`.
            InvalidArgument, WouldBlock: as in `submit`.
        """
        deadline = time.monotonic() + timeout_s
        encoded = encode_prompts(prompts, n, sampling)
        if not encoded:
            return []
        fields = {"prompts": encoded}
        request_id = self._request("submit", fields, timeout_s)["request_id"]
        samples = RequestSamples(request_id, len(encoded))
        try:
            while not samples.are_complete:
                batch = self.next_batch(timeout_s=max(0.0, deadline - time.monotonic()))
                self._keep_if_foreign(batch, samples.other_requests(batch))
                with batch:
                    samples.add(batch)
        except BaseException:
            self._abandon(request_id)
            raise
        return samples.result()

    def _keep_if_foreign(self, batch: Batch, other_requests: set[int]) -> None:
        foreign = sorted(other_requests - self._abandoned)
        if foreign:
            self._inbox.put_back(batch)
            raise FailedPrecondition(
                "take their batches with next_batch() first",
                field="generate",
                value=f"samples of request {', '.join(map(str, foreign))}",
                allowed="no other request to be under way",
            )

    def _abandon(self, request_id: int) -> None:
        """End a request that no one waits for; later generate() calls pass over its samples."""
        self._abandoned.add(request_id)
        if self._connection.is_open:
            with contextlib.suppress(RollpackError):
                self._connection.request("abort", {"request_id": request_id}, REPLY_GRACE_S)

    def score(
        self, sequences: Iterable[ScoreSequence | Sample], *, timeout_s: float = 600.0
    ) -> list[ScoredSequence]:
        """Compute the logprobs of given responses under the current weights.

        Args:
            sequences: maps {input_ids, response_ids, temperature, id}, or samples.
            timeout_s: longest wait, seconds.

        Returns:
            One result a sequence, in their order; the same bits generation gave.

        Raises:
            InvalidArgument: names the sequence and the field.
            DeadlineExceeded: not done in time.
        """
        deadline = time.monotonic() + timeout_s
        parts, ids = encode_sequences(sequences)
        futures = [self._post("score", {"sequences": part}) for part in parts]
        results: list[dict[str, Any]] = []
        for future in futures:
            left_s = max(0.0, deadline - time.monotonic())
            results += self._wait(future, "score", left_s).fields["results"]
        return decode_scores(results, ids)

    def abort(self, request_id: int | None = None, *, timeout_s: float = 60.0) -> int:
        """End a request's samples, or all; what they have comes as partial samples.

        Returns:
            How many samples were still open.

        Raises:
            NotFound: there is no such request.
        """
        return int(self._request("abort", {"request_id": request_id}, timeout_s)["num_aborted"])

    def pause(self, mode: Mode = "keep", *, timeout_s: float = 300.0) -> None:
        """Stop generating; `resume` goes on.

        Args:
            mode: "keep" holds samples in flight as they are, "wait" finishes them first, "abort"
                hands them back as partial samples.
            timeout_s: longest wait until generation stands, seconds.

        Raises:
            InvalidArgument: another mode.
        """
        self._request("pause", {"mode": _checked_mode(mode)}, timeout_s)

    def resume(self, *, timeout_s: float = 60.0) -> None:
        """Go on generating after `pause`."""
        self._request("resume", {}, timeout_s)

    def update_weights(
        self,
        weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        version: int,
        mode: Mode = "keep",
        *,
        base_version: int | None = None,
        timeout_s: float = 600.0,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> int:
        """Send new weights; all of them become current at once, or the old ones stay.

        Args:
            weights: a state_dict, or (name, tensor) pairs, torch or NumPy; float32, float16 or
                bfloat16. Rounded as a file's would be; `module.` and `_orig_mod.` are stripped.
            version: the number that tokens drawn from these weights carry.
            mode: what becomes of samples in flight: "keep" goes on under the new weights, "wait"
                finishes them under the old, "abort" hands them back as partial samples.
            base_version: the version that is current. Given, `weights` may be some of the tensors
                (layers that a merged adapter changed, say); the others stay as they are in it.
            timeout_s: longest time for the whole update, seconds.
            chunk_bytes: shared memory sent at a time; two such pieces exist at once.

        Returns:
            The version that is current now.

        Raises:
            InvalidArgument: a tensor is missing, unknown or of another shape or dtype; names it. Or
                base_version is not the current one.
            DataLoss: a tensor's bytes are not those that were sent.
            FailedPrecondition: another update is under way.
        """
        deadline = time.monotonic() + timeout_s
        mode = _checked_mode(mode)

        def left_s() -> float:
            return max(0.0, deadline - time.monotonic())

        begin: dict[str, Any] = {"phase": "begin", "version": version}
        if base_version is not None:
            begin["base_version"] = base_version
        self._request("update_weights", begin, left_s())
        try:
            in_flight: Future[Reply] | None = None
            for chunk in write_chunks(weights, chunk_bytes):
                posted = self._post("update_weights", chunk.request(version), [chunk.fd])
                if in_flight is not None:  # the server checks one while the next is written
                    self._wait(in_flight, "update_weights", left_s())
                in_flight = posted
            if in_flight is not None:
                self._wait(in_flight, "update_weights", left_s())
            commit = {"phase": "commit", "version": version, "mode": mode}
            return int(self._request("update_weights", commit, left_s())["weight_version"])
        except BaseException:
            self._cancel_update(version)
            raise

    def _cancel_update(self, version: int) -> None:
        """Take an unfinished update back; a server that refused it has done so already."""
        if self._connection.is_open:
            with contextlib.suppress(RollpackError):
                fields = {"phase": "cancel", "version": version}
                self._connection.request("update_weights", fields, REPLY_GRACE_S)

    def get_weight_version(self, *, timeout_s: float = 60.0) -> int:
        """The version that new tokens are drawn from."""
        return int(self._request("get_weight_version", {}, timeout_s)["weight_version"])

    def stats(self, *, timeout_s: float = 60.0) -> dict[str, float]:
        """Counters and gauges by name, e.g. "num_running_seqs"."""
        return dict(self._request("stats", {}, timeout_s)["stats"])

    def health(self, *, timeout_s: float = 10.0) -> str:
        """Return "ok", or raise why the engine can make no more samples."""
        return str(self._request("health", {}, timeout_s)["status"])

    def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """Ask the whole server to end; other clients lose it too."""
        self._request("shutdown", {}, timeout_s)

    def close(self) -> None:
        """End the connection; a second call does nothing.

        Arrays that still live stay as they are. Batches that were not released are delivered again
        to the next client.
        """
        self._finalizer()

    def __enter__(self) -> Client:
        """The client itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Where it is connected."""
        state = "" if self._connection.is_open else ", closed"
        return f"<rollpack.Client: {self._connection.peer}{state}>"

    def _post(
        self, verb: str, fields: dict[str, Any], fds: tuple[int, ...] | list[int] = ()
    ) -> Future[Reply]:
        try:
            return self._connection.post(verb, fields, fds)
        except Unavailable as error:
            raise self._explain(error) from None

    def _wait(self, future: Future[Reply], verb: str, timeout_s: float) -> Reply:
        try:
            return self._connection.wait(future, verb, timeout_s)
        except Unavailable as error:
            raise self._explain(error) from None

    def _request(self, verb: str, fields: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        return self._wait(self._post(verb, fields), verb, timeout_s).fields


def _with_servers_end(describe: Callable[[], str] | None, error: Unavailable) -> Unavailable:
    if describe and error.field == "server":
        error.message = f"{error.message}; {describe()}"
    return error


def _checked_mode(mode: Mode) -> Mode:
    if mode not in _MODES:
        raise InvalidArgument(field="mode", value=repr(mode), allowed=" or ".join(_MODES))
    return mode
