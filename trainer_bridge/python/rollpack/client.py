"""The trainer's side of the bridge: requests out, batches in, weights out.

One Client is one connection. It may be used from several threads, e.g. a trainer and a background
loop that takes batches; after a fork only the parent's works. `rollpack.aio` has the same calls for
asyncio.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rollpack.batch import Batch
from rollpack.hello import ServerInfo
from rollpack.inbox import end_connection
from rollpack.prompts import Prompt, Sampling, ScoredSequence, ScoreSequence, TokenIds
from rollpack.samples import Sample
from rollpack.session import Mode, Opening, Order, Session, State, opening
from rollpack.sleeping import SleepState, Tag
from rollpack.weights import CHUNK_BYTES, Weights, WeightVersion


def connect(
    socket: str | os.PathLike[str] | None = None,
    *,
    timeout_s: float = 10.0,
    dp_rank: int | None = None,
    dp_size: int | None = None,
    whole_groups: bool = False,
    resume: State | Sequence[State] | None = None,
) -> Client:
    """Connect to a running server.

    Args:
        socket: path of its socket, {host} in it standing for this host's name; None takes
            ROLLPACK_SOCKET, else run/rollpack.sock.
        timeout_s: longest wait for the server to listen and to answer, seconds.
        dp_rank: this process's rank in a data-parallel trainer. Each step is then split over the
            ranks, balanced by what samples cost the model, and this client gets its rank's share.
        dp_size: how many ranks there are; all must say the same.
        whole_groups: do not split a group between ranks; all must say the same.
        resume: what `Client.state_dict` returned when the checkpoint was saved from which the
            trainer goes on, or a list of those of several clients. Batches that it says were
            consumed are not delivered again.

    Raises:
        NotFound: no socket is there.
        Unavailable: nobody answers on it.
        Unsupported: client and server speak different versions; names both.
        DeadlineExceeded: a server listens but does not say hello.
        InvalidArgument: dp_rank, dp_size or resume is not what it must be.
        FailedPrecondition: the server splits steps for other ranks; names theirs.
    """
    return Client(opening(socket, timeout_s, dp_rank, dp_size, whole_groups, resume))


class Client:
    """A connection to a rollpack server. Every call raises RollpackError or a class of it.

    Attributes:
        info: what the server said of itself: config, eos_token_ids, num_slots and more.
        socket_path: where it is connected.
        verify: whether the checksum of every batch is compared.
    """

    info: ServerInfo

    def __init__(self, how: Opening) -> None:
        """Connect and say hello; `rollpack.connect` and `rollpack.launch` are the usual ways."""
        self.socket_path = how.socket_path
        self.verify = how.verify
        self._session = Session(how)
        self._connection = self._session.connection
        self._finalizer = weakref.finalize(
            self, end_connection, self._connection, self._session.leases
        )
        self.info = self._session.info

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
            FailedPrecondition: `sleep(level=2)` has dropped the weights; send all of them first.
        """
        return self._session.run(self._session.submit(prompts, n, sampling, timeout_s))

    def next_batch(
        self,
        num_groups: int | None = None,
        *,
        min_ready: int | None = None,
        order: Order = "completion",
        timeout_s: float = 60.0,
    ) -> Batch:
        """Wait for finished groups and return them as a batch on shared memory, without a copy.

        Args:
            num_groups: groups of the batch; None takes as many finished ones as fit, at least one.
            min_ready: do not wait for all num_groups: that many are enough, up to num_groups come.
            order: "completion", as groups finish, or "canonical", by request and prompt, each group
                waiting for those before it, so that the same requests give the same batches.
            timeout_s: longest wait, seconds; 0 looks once.

        Returns:
            The batch, to be released. If this call was interrupted before and its batch came all
            the same, that batch comes first. A data-parallel rank gets its share of the next step,
            which whichever rank asked first has formed, with its arguments.

        Raises:
            DeadlineExceeded: not that many groups finished in time.
            InvalidArgument: num_groups or min_ready is not positive, or the order unknown. Where
                num_groups do not fit a slot, the first ones that do are returned instead.
            DataLoss: the batch's bytes are not those that were written.
        """
        call = self._session.next_batch(num_groups, min_ready, order, timeout_s, self.verify)
        return self._session.run(call)

    def batches(
        self,
        num_groups: int | None = None,
        *,
        min_ready: int | None = None,
        order: Order = "completion",
        timeout_s: float = 60.0,
    ) -> Iterator[Batch]:
        """Yield batches without end; asking for the next one releases the one before.

        A batch whose loop body raised, or after which the loop was left, is not released: it is
        delivered again to the next client, unless you call its `release()`.

        Args:
            num_groups: as in `next_batch`.
            min_ready: as in `next_batch`.
            order: as in `next_batch`.
            timeout_s: longest wait for each, seconds.

        Raises:
            DeadlineExceeded: no batch came in time; as `next_batch`.
        """
        while True:
            batch = self.next_batch(
                num_groups, min_ready=min_ready, order=order, timeout_s=timeout_s
            )
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
        return self._session.run(
            self._session.generate(prompts, n, sampling, timeout_s, self.verify)
        )

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
            FailedPrecondition: the engines sleep, or have no weights.
            DeadlineExceeded: not done in time.
        """
        return self._session.run(self._session.score(sequences, timeout_s))

    def abort(self, request_id: int | None = None, *, timeout_s: float = 60.0) -> int:
        """End a request's samples, or all; what they have comes as partial samples.

        Returns:
            How many samples were still open.

        Raises:
            NotFound: there is no such request.
        """
        return self._session.run(self._session.abort(request_id, timeout_s))

    def pause(self, mode: Mode = "keep", *, timeout_s: float = 300.0) -> None:
        """Stop generating; `resume` goes on.

        Args:
            mode: "keep" holds samples in flight as they are, "wait" finishes them first, "abort"
                hands them back as partial samples.
            timeout_s: longest wait until generation stands, seconds.

        Raises:
            InvalidArgument: another mode.
        """
        self._session.run(self._session.pause(mode, timeout_s))

    def resume(self, *, timeout_s: float = 60.0) -> None:
        """Go on generating after `pause`."""
        self._session.run(self._session.resume(timeout_s))

    def sleep(
        self, level: int = 1, *, mode: Mode = "keep", timeout_s: float = 300.0
    ) -> SleepState:
        """Have all ranks give their memory back to the system until `wake_up`.

        Generation stands still meanwhile. What is submitted waits; finished batches can be taken.
        The engines sleep on when this client goes: the next one may wake them. A step of a trainer
        that shares their devices:

            engine.sleep(level=2)                     # the optimizer has the memory
            engine.wake_up(tags=["weights"])
            engine.update_weights(model.state_dict(), version)
            engine.wake_up(tags=["kv_cache"])

        Args:
            level: 1 drops keys and values, and keeps the weights: in host memory where a device
                computes, where they are on the CPU. 2 drops both; nothing is generated, and
                `submit` refused, until `update_weights` has brought all tensors.
            mode: what becomes of samples in flight: "keep" holds them, and they go on from the
                tokens they have after `wake_up`, with the same tokens as undisturbed; "wait"
                finishes them first; "abort" hands them back as partial samples.
            timeout_s: longest wait until all ranks sleep, seconds.

        Returns:
            What sleeps, and the bytes that are held all the same.

        Raises:
            InvalidArgument: another level or mode.
            FailedPrecondition: a weight update is under way.
            ResourceExhausted: the host has no room for the weights of a device; call `wake_up`.
            DeadlineExceeded: not in time; they fall asleep all the same.
        """
        return self._session.run(self._session.sleep(level, mode, timeout_s))

    def wake_up(
        self, tags: Iterable[Tag] | None = None, *, timeout_s: float = 300.0
    ) -> SleepState:
        """Have all ranks take memory again that they gave back; generation goes on with the last.

        Args:
            tags: of "weights" and "kv_cache" what to take; None takes both. What is awake already
                stays as it is.
            timeout_s: longest wait until all ranks have it, seconds.

        Returns:
            What still sleeps, and the bytes that are held.

        Raises:
            InvalidArgument: another tag.
            ResourceExhausted: others have the memory; it sleeps on, free some and call again.
            DeadlineExceeded: not in time; they wake up all the same.
        """
        return self._session.run(self._session.wake_up(tags, timeout_s))

    def update_weights(
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
            chunk_bytes: tensors are sent in pieces of about this size, four of them at once.
            copy: send copies, in shared memory, with a checksum each. Otherwise, wherever
                `info.reads_memory`, the tensors of a mapping are packed out of this process's
                memory: nothing may write into them until the call returns. Pairs are always copied,
                each before the next is asked for.

        Returns:
            The version that is current now, with the hash of the packed weights and the time for
            which generation stood still.

        Raises:
            InvalidArgument: a tensor is missing, unknown or of another shape or dtype; names it. Or
                base_version is not the current one.
            DataLoss: a tensor's bytes are not those that were sent.
            FailedPrecondition: another update is under way; the weights sleep; or base_version
                after `sleep(level=2)`, which takes all tensors.
        """
        call = self._session.update_weights(
            weights, version, mode, base_version, timeout_s, chunk_bytes, copy
        )
        return self._session.run(call)

    def get_weight_version(self, *, timeout_s: float = 60.0) -> WeightVersion:
        """The version that new tokens are drawn from; as `update_weights` returns it."""
        return self._session.run(self._session.get_weight_version(timeout_s))

    def report_probs_diff(
        self, probs_diff: Mapping[str, float], *, timeout_s: float = 60.0
    ) -> None:
        """Tell the server how far the trainer's probabilities are from the engine's.

        They are among its metrics then, beside what the engine says of itself.

        Args:
            probs_diff: what `rollpack.metrics.rollout_probs_diff` returned.
            timeout_s: longest wait, seconds.

        Raises:
            InvalidArgument: a number of it is missing, not finite or out of range; names it.
        """
        self._session.run(self._session.report_probs_diff(probs_diff, timeout_s))

    def stats(self, *, timeout_s: float = 60.0) -> dict[str, float]:
        """Counters and gauges by name, e.g. "num_running_seqs"."""
        return self._session.run(self._session.stats(timeout_s))

    def health(self, *, timeout_s: float = 10.0) -> str:
        """Return "ok", or raise why the engine can make no more samples."""
        return self._session.run(self._session.health(timeout_s))

    def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """Ask the whole server to end; other clients lose it too."""
        self._session.run(self._session.shutdown(timeout_s))

    def state_dict(self, consumed: Iterable[Batch] = ()) -> dict[str, Any]:
        """What a checkpoint of the trainer must hold for every batch to count exactly once.

        Save it together with the weights, then release what it lists, and pass it to
        `connect(resume=...)` when the trainer starts again from that checkpoint:

            state = {"model": model.state_dict(), "rollpack": client.state_dict([batch])}
            torch.save(state, path)
            batch.release()

        Batches that are delivered again though they are listed are released and passed over. It is
        small: what the server has confirmed never comes again and is not listed.

        Args:
            consumed: batches that the checkpoint includes and that are not released yet.

        Returns:
            {"instance": str, "consumed": [batch_seq]}, plain values. It counts for the life of the
            server that it was made in, or of its journal where it has one.
        """
        return self._session.inbox.state(consumed)

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
