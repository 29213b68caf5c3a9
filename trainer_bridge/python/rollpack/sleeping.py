"""What the engines' memory is: in place, or given back until wake_up()."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rollpack.errors import InvalidArgument

Tag = Literal["weights", "kv_cache"]
_TAGS = ("weights", "kv_cache")
_LEVELS = (1, 2)


@dataclass(frozen=True)
class SleepState:
    """What `sleep` and `wake_up` leave behind.

    Attributes:
        asleep: of "weights" and "kv_cache", what sleeps.
        needs_weights: whether sleep(level=2) has dropped the weights and no whole update has come
            since: until then nothing is generated.
        held_bytes: what all ranks still have of weights, KV pages and buffers, bytes.
    """

    asleep: tuple[Tag, ...]
    needs_weights: bool
    held_bytes: int

    @property
    def is_awake(self) -> bool:
        """Whether samples can be generated."""
        return not self.asleep and not self.needs_weights

    @classmethod
    def from_reply(cls, fields: Mapping[str, Any]) -> SleepState:
        """Read it from the reply of sleep or wake_up."""
        return cls(
            tuple(fields["asleep"]), bool(fields["needs_weights"]), int(fields["held_bytes"])
        )


def checked_level(level: int) -> int:
    """Return the level.

    Raises:
        InvalidArgument: it is neither 1 nor 2.
    """
    if level not in _LEVELS or isinstance(level, bool):
        raise InvalidArgument(field="level", value=repr(level), allowed="1 or 2")
    return level


def checked_tags(tags: Iterable[Tag] | None) -> list[Tag] | None:
    """Return the tags as a list, None standing for all.

    Raises:
        InvalidArgument: one is unknown, or there is none.
    """
    if tags is None:
        return None
    names = [tags] if isinstance(tags, str) else list(tags)
    unknown = [name for name in names if name not in _TAGS]
    if unknown or not names:
        raise InvalidArgument(
            field="tags",
            value=repr(unknown[0]) if unknown else "[]",
            allowed='a list of "weights" and "kv_cache", or None for both',
        )
    return names
