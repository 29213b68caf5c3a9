"""The first reply of a server: versions, what it is, and the slots its batches will come in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollpack.errors import DataLoss, InvalidArgument, Unsupported
from rollpack.lending import MemoryProbe
from rollpack.schema import check_schema_version
from rollpack.slots import Slot

PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself; fixed for its life.

    Attributes:
        config: the resolved configuration, by section, e.g. config["rollout"]["n"].
        eos_token_ids: ids that end a response.
        pad_token_id: written into pads, never read.
        vocab_size: V; token ids are below it.
        fingerprint: equal fingerprints give equal bits.
        instance: names this life of the server, or its journal where it has one; batch_seq counts
            from 1 in each.
        attention_parity_tokens: sequence length whose attention costs as much as its linear layers,
            what samples are balanced by over data-parallel ranks.
        num_slots: batches that can be out at once, over all clients.
        slot_bytes: size of a slot.
        awaited_weight_version: after a restart from a journal, the weight version without which
            nothing is generated until `Client.resume`, as of hello; None: nothing is awaited.
        reads_memory: weights are packed out of this process's memory, where they lie.
    """

    config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vocab_size: int
    fingerprint: str
    instance: str
    attention_parity_tokens: int
    num_slots: int
    slot_bytes: int
    awaited_weight_version: int | None = None
    reads_memory: bool = False


@dataclass(frozen=True)
class DpRank:
    """Which rank of a data-parallel trainer a client is.

    Attributes:
        rank: 0 to size - 1.
        size: how many share each step.
        whole_groups: no group is split between ranks.
    """

    rank: int
    size: int
    whole_groups: bool = False

    @classmethod
    def checked(cls, rank: int | None, size: int | None, whole_groups: bool) -> DpRank | None:
        """The rank that `connect` was told, None where it was told none.

        Raises:
            InvalidArgument: one of rank and size without the other, or out of range.
        """
        if rank is None and size is None:
            if whole_groups:
                raise InvalidArgument(
                    field="whole_groups", value="True", allowed="dp_rank and dp_size with it"
                )
            return None
        if rank is None or size is None:
            missing = "dp_rank" if rank is None else "dp_size"
            raise InvalidArgument(
                field=missing, value="None", allowed="dp_rank and dp_size together"
            )
        if size < 1 or not 0 <= rank < size:
            raise InvalidArgument(
                field="dp_rank", value=str(rank), allowed=f"0 or more, below dp_size = {size}"
            )
        return cls(rank, size, whole_groups)


def hello_fields(dp: DpRank | None, probe: MemoryProbe | None) -> dict[str, Any]:
    """The fields of a hello of this process."""
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "client": f"python, pid {os.getpid()}",
    }
    if probe is not None:
        fields["probe"] = probe.fields
    if dp is not None:
        fields |= {"dp_rank": dp.rank, "dp_size": dp.size, "whole_groups": dp.whole_groups}
    return fields


def read_hello(
    fields: Mapping[str, Any], fds: Sequence[int], peer: str
) -> tuple[ServerInfo, list[Slot]]:
    """Check the reply and map the slots.

    Args:
        fields: the reply.
        fds: the slots' descriptors, in order; the caller closes them.
        peer: how errors name the server.

    Raises:
        Unsupported: another protocol or schema version; names both.
        DataLoss: a field is absent, or the slots are not what the reply says.
    """
    if fields.get("protocol_version") != PROTOCOL_VERSION:
        raise Unsupported(
            "install the rollpack package of the server's version",
            field="protocol_version",
            value=str(fields.get("protocol_version")),
            origin=peer,
            allowed=str(PROTOCOL_VERSION),
        )
    check_schema_version(fields.get("schema_version"), peer)
    try:
        info = ServerInfo(
            config=fields["config"],
            eos_token_ids=tuple(np.frombuffer(fields["eos_token_ids"], "<i4").tolist()),
            pad_token_id=fields["pad_token_id"],
            vocab_size=fields["vocab_size"],
            fingerprint=fields["fingerprint"],
            instance=fields["instance"],
            attention_parity_tokens=fields["attention_parity_tokens"],
            num_slots=fields["num_slots"],
            slot_bytes=fields["slot_bytes"],
            awaited_weight_version=fields.get("awaited_weight_version"),
            reads_memory=fields.get("reads_memory", False),
        )
    except KeyError as error:
        raise DataLoss("it is absent", field=f"hello: {error.args[0]}", origin=peer) from error
    if len(fds) != info.num_slots:
        raise DataLoss(
            field="hello: num_fds",
            value=str(len(fds)),
            origin=peer,
            allowed=f"{info.num_slots} slots",
        )
    return info, [Slot(index, fd, info.slot_bytes) for index, fd in enumerate(fds)]
