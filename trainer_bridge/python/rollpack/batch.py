"""Batches as the trainer sees them: arrays on a slot, micro-batches of them, and samples.

The columns of both layouts are listed in trainer_bridge/README.md.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from rollpack.batch_file import write_batch_file
from rollpack.columns import Columns
from rollpack.errors import DataLoss, FailedPrecondition, RollpackError, Unsupported, error_from_map
from rollpack.samples import Sample, read_samples
from rollpack.schema import Array, Column, check_crc32, read_columns, read_header
from rollpack.slots import Lease
from rollpack.views import LayoutView, Padding, Source, make_view

if TYPE_CHECKING:
    import torch

_TOKEN_COLUMNS = frozenset({"input_ids", "position_ids", "segment_ids"})
# Neither a token's nor a sample's, though their length may happen to equal the number of samples.
_BATCH_COLUMNS = frozenset({"cu_seqlens", "row_starts", "prompt_id_bytes", "prompt_id_starts"})


@dataclass(frozen=True)
class FailedSample:
    """A sample that ended in an error instead of tokens."""

    request_id: int
    prompt_index: int
    prompt_id: str | int
    sample_index: int
    group_size: int
    error: RollpackError


@dataclass(frozen=True)
class Row:
    """One micro-batch of the packed layout: consecutive samples, no pads; views, nothing copied.

    Attributes:
        index: m, the row's number in its batch.
        samples: the numbers of its samples in the batch.
        columns: per-token columns cut to the row's t tokens, per-sample ones to its s samples.
        cu_seqlens: i32 [s + 1], from 0, as flash-attention's varlen call takes it.
        max_seqlen: tokens of its longest sample.
        pad_token_id: what `view` writes into pads unless told otherwise.
    """

    index: int
    samples: range
    columns: Columns
    cu_seqlens: Array
    max_seqlen: int
    pad_token_id: int = 0

    def __getitem__(self, name: str) -> Array:
        """A column of the row, read-only."""
        return self.columns[name]

    def __getattr__(self, name: str) -> Array:
        """`row.input_ids` for `row["input_ids"]`."""
        return _column_attribute(self, self.__dict__["columns"], name)

    def torch(self) -> dict[str, torch.Tensor]:
        """The row's columns and cu_seqlens as tensors, without a copy of the columns."""
        tensors = self.columns.torch()
        tensors["cu_seqlens"] = Columns({"cu_seqlens": self.cu_seqlens}).torch("cu_seqlens")
        return tensors

    def view(
        self,
        name: str,
        *,
        pad_to_multiple_of: int = 1,
        prompt_width: int | None = None,
        response_width: int | None = None,
        width: int | None = None,
        pad_token_id: int | None = None,
    ) -> LayoutView:
        """The row as another trainer lays out a micro-batch; as Batch.view."""
        pad = self.pad_token_id if pad_token_id is None else pad_token_id
        padding = Padding(pad_to_multiple_of, prompt_width, response_width, width, pad)
        return make_view(name, Source(self.columns.writable, self.cu_seqlens), padding)


class Batch:
    """A batch on a slot of shared memory; made by Client.next_batch.

    Its arrays stay as they are for as long as they live. The slot can be filled again once
    `release()` was called and the last array or tensor on it is gone. Leaving `with batch:`
    releases.

    Attributes:
        batch_seq: counts batches from 1; 0 for a batch that only reports failures.
        num_samples: S.
        num_groups: whole groups in it, those that failed included; of a data-parallel rank, the
            groups of the step, which all ranks share.
        num_complete_groups: of these, those without a failed or aborted sample.
        version_lag: how many weight versions old the oldest token was when the batch was delivered.
        step: counts the steps of data-parallel ranks from 1; 0 for a client that is none. Batches
            of one step belong together, on whatever rank.
        failed: samples that ended in an error, none of which has tokens here.
        num_bytes: size in the slot.
        pad_token_id: what `view` writes into pads unless told otherwise.
    """

    _lease: Lease | None = None

    def __init__(
        self,
        reply: dict[str, Any],
        lease: Lease | None,
        *,
        verify: bool,
        pad_token_id: int = 0,
    ) -> None:
        """Check and open a delivered batch.

        Args:
            reply: the fields of a next_batch reply.
            lease: what holds its slot; None where the reply only lists failures.
            verify: compare the checksum, at about 1 GB/s.
            pad_token_id: what `view` writes into pads unless told otherwise.

        Raises:
            DataLoss: header, table or checksum contradict the reply or each other.
            Unsupported: another schema version.
        """
        self.batch_seq = int(reply.get("batch_seq") or 0) if lease else 0
        self.num_samples = int(reply.get("num_samples") or 0)
        self.num_groups = int(reply.get("num_groups") or 0)
        self.num_complete_groups = int(reply.get("num_complete_groups") or 0)
        self.version_lag = int(reply.get("version_lag") or 0)
        self.step = int(reply.get("step") or 0)
        self.failed: Sequence[FailedSample] = tuple(map(_failed_sample, reply.get("failed") or ()))
        self.num_bytes = int(reply.get("bytes") or 0) if lease else 0
        self.pad_token_id = pad_token_id
        self._name = f"batch {self.batch_seq}"
        self._columns: dict[str, Column] | None = {}
        self._memory: Array | None = None
        if lease is not None:
            memory = lease.memory()
            self._columns = _open(memory, reply, self._name, verify)
            self._memory = memory
        self._lease = lease

    @property
    def columns(self) -> Columns:
        """All columns by name.

        Raises:
            FailedPrecondition: the batch was released.
        """
        return Columns({name: column.array for name, column in self._opened().items()})

    def __getitem__(self, name: str) -> Array:
        """A column, read-only; KeyError where there is none of that name."""
        return self.columns[name]

    def __getattr__(self, name: str) -> Array:
        """`batch.input_ids` for `batch["input_ids"]`."""
        if name.startswith("_"):
            raise AttributeError(name)
        return _column_attribute(self, self.columns, name)

    def __dir__(self) -> list[str]:
        """Attributes and columns."""
        return [*super().__dir__(), *(self._columns or ())]

    def __repr__(self) -> str:
        """What it holds, in one line."""
        state = "released" if self._columns is None else self.layout
        return (
            f"<{self._name}: {self.num_samples} samples of {self.num_groups} groups, "
            f"{len(self.failed)} failed, {state}, {self.num_bytes} bytes>"
        )

    @overload
    def torch(self, name: str) -> torch.Tensor: ...
    @overload
    def torch(self, name: None = None) -> dict[str, torch.Tensor]: ...
    def torch(self, name: str | None = None) -> torch.Tensor | dict[str, torch.Tensor]:
        """One column, or all by name, as tensors on the slot's memory, without a copy.

        Writing into a tensor is allowed and private to this process.

        Raises:
            KeyError: there is no such column.
            FailedPrecondition: the batch was released.
            Unsupported: torch is not installed.
        """
        return self.columns.torch(name)

    @property
    def layout(self) -> str:
        """What the columns say: "packed", "padded", or "empty" where nothing but failures came."""
        columns = self._opened()
        if not columns:
            return "empty"
        return "packed" if "cu_seqlens" in columns else "padded"

    def alignment(self, name: str) -> str:
        """What entry t of a column is about: "token" t, "predictor" of token t + 1, or "none".

        Raises:
            KeyError: there is no such column.
        """
        self.columns[name]
        return self._opened()[name].alignment

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sample, prompt and response, without pads."""
        if not self.num_samples:
            return 0
        return int((self["prompt_lens"] + self["response_lens"]).max())

    @property
    def num_rows(self) -> int:
        """M, the number of micro-batches that `rows()` yields."""
        return len(self["row_starts"]) - 1 if self.layout == "packed" else 0

    def rows(self) -> Iterator[Row]:
        """Yield the micro-batches, each of whole samples and at most max_tokens_per_row tokens.

        Raises:
            Unsupported: the batch is padded; slice its columns [B, ..] instead.
        """
        if self.layout == "padded":
            raise Unsupported(
                "slice its columns, or set bridge.layout: packed",
                field="bridge.layout",
                value="padded",
            )
        for index in range(self.num_rows):
            yield self._row(index)

    def _row(self, index: int) -> Row:
        first, last = (int(start) for start in self["row_starts"][index : index + 2])
        cu_seqlens = self["cu_seqlens"][first : last + 1]
        tokens = slice(int(cu_seqlens[0]), int(cu_seqlens[-1]))
        columns: dict[str, Array] = {}
        for name, column in self._opened().items():
            if column.alignment != "none" or name in _TOKEN_COLUMNS:
                columns[name] = column.array[tokens]
            elif name not in _BATCH_COLUMNS:
                columns[name] = column.array[first:last]
        lengths = np.diff(cu_seqlens)
        return Row(
            index=index,
            samples=range(first, last),
            columns=Columns(columns),
            cu_seqlens=cu_seqlens - cu_seqlens[0],
            max_seqlen=int(lengths.max(initial=0)),
            pad_token_id=self.pad_token_id,
        )

    def view(
        self,
        name: str,
        *,
        pad_to_multiple_of: int = 1,
        prompt_width: int | None = None,
        response_width: int | None = None,
        width: int | None = None,
        pad_token_id: int | None = None,
    ) -> LayoutView:
        """The batch under the names, shapes and paddings that another trainer expects.

        Rows are samples, in the batch's order, so that its other columns ("finish_reason",
        "prompt_index", ..) fit them. What lies in the slot as the view wants it is handed out on
        shared memory, the rest is a copy: `view.copied` names those. The whole table is in
        trainer_bridge/README.md.

        Args:
            name: "verl", "trl", "openrlhf", "nemo_rl" or "flash_attn_varlen".
            pad_to_multiple_of: widths that are not fixed are rounded up to a multiple of this.
            prompt_width: columns P of prompts (verl, trl); None takes the longest prompt, or those
                that the padded layout has.
            response_width: columns R of responses, likewise.
            width: columns of whole sequences (openrlhf, nemo_rl); None takes the longest.
            pad_token_id: written into pads; None takes the server's.

        Raises:
            InvalidArgument: there is no such view; an option that it does not have; a width that
                the longest does not fit.
            FailedPrecondition: the batch was released, or only reports failures.
        """
        columns = {each: column.array for each, column in self._opened().items()}
        if not columns:
            raise FailedPrecondition(
                field=self._name, value="failures alone", allowed="a batch with columns"
            )
        pad = self.pad_token_id if pad_token_id is None else pad_token_id
        padding = Padding(pad_to_multiple_of, prompt_width, response_width, width, pad)
        return make_view(name, Source(columns, columns.get("cu_seqlens")), padding)

    def samples(self, *, copy: bool = False) -> Iterator[Sample]:
        """Yield the samples one by one, in the batch's order.

        Args:
            copy: False gives views, which keep the slot from going back while they live.

        Raises:
            FailedPrecondition: the batch was released.
        """
        return read_samples(self.columns, self.num_samples, copy=copy)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the batch to a file: the bytes of its slot, which `rollpack inspect` draws.

        What is saved is what this process sees, its in-place writes included, under a checksum that
        fits. The file appears whole or not at all.

        Args:
            path: the file; one that is there is replaced.

        Raises:
            FailedPrecondition: the batch was released, or only reports failures.
            OSError: the file cannot be written.
        """
        self._opened()
        if self._memory is None:
            raise FailedPrecondition(
                field=self._name, value="failures alone", allowed="a batch with columns"
            )
        write_batch_file(path, self._memory)

    def release(self) -> None:
        """Say that the trainer is done with the batch; a second call does nothing.

        The batch's own access ends here. The server hears of it once no view lives, and only then
        counts the batch as taken: one that was not released is delivered again after a crash.
        """
        if self._lease is not None:
            self._lease.released = True
        self._lease = None
        self._memory = None
        self._columns = None  # the last reference to the memory, unless a view lives

    def __enter__(self) -> Batch:
        """The batch itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Release, also after an exception."""
        self.release()

    def __del__(self) -> None:
        """Warn of a batch that was forgotten: nothing acknowledges it but `release()`."""
        if self._lease is not None and not self._lease.ended:
            warnings.warn(
                f"{self._name} was dropped without release(): its slot stays taken, and the batch "
                "will be delivered again once this client is gone",
                ResourceWarning,
                stacklevel=2,
            )

    def _opened(self) -> dict[str, Column]:
        if self._columns is None:
            raise FailedPrecondition("take what you need before release()", field=self._name)
        return self._columns


def _open(memory: Any, reply: dict[str, Any], name: str, verify: bool) -> dict[str, Column]:
    header = read_header(memory, name)
    for field in ("generation", "batch_seq", "crc32"):
        if getattr(header, field) != reply.get(field):
            raise DataLoss(
                "the slot does not hold what was handed over",
                field=f"{name}: {field}",
                value=str(getattr(header, field)),
                allowed=str(reply.get(field)),
            )
    if verify:
        check_crc32(memory, header, name)
    return read_columns(memory, header.num_columns, name)


def _failed_sample(parts: dict[str, Any]) -> FailedSample:
    return FailedSample(
        request_id=parts["request_id"],
        prompt_index=parts["prompt_index"],
        prompt_id=parts["prompt_id"],
        sample_index=parts["sample_index"],
        group_size=parts["group_size"],
        error=error_from_map(parts["error"]),
    )


def _column_attribute(owner: object, columns: Columns, name: str) -> Array:
    try:
        return columns[name]
    except KeyError:
        raise AttributeError(
            f"{type(owner).__name__} has no attribute or column {name!r}"
        ) from None
