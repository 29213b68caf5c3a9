"""The first reply of a server: versions, what it is, and the slots its batches will come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollpack.errors import DataLoss, Unsupported
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
        num_slots: batches that can be out at once, over all clients.
        slot_bytes: size of a slot.
    """

    config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vocab_size: int
    fingerprint: str
    num_slots: int
    slot_bytes: int


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
            num_slots=fields["num_slots"],
            slot_bytes=fields["slot_bytes"],
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
