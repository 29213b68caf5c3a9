"""The error of kernels/base/error.h in Python: one class a code, the same one-line text.

An error names the field, its value, where the value came from and what is allowed. Where Python
has a class of the same meaning (TimeoutError, ConnectionError, ValueError), ours is one of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class RollpackError(Exception):
    """What went wrong, in the six parts that every surface of rollpack prints.

    Attributes:
        code: the error's name in the protocol, e.g. "invalid_argument".
        field: what is wrong, e.g. "prompts[3].input_ids".
        value: its value, as the user wrote it.
        origin: where the value came from, e.g. "configs/quickstart.yaml:12".
        allowed: what would be right, e.g. "an integer from 1 to 65536".
        message: what happened or what to do, one sentence.
    """

    code: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str = "",
        *,
        field: str = "",
        value: str = "",
        origin: str = "",
        allowed: str = "",
    ) -> None:
        """Keep the parts; an empty one is left out of the text."""
        super().__init__(message)
        self.message = message
        self.field = field
        self.value = value
        self.origin = origin
        self.allowed = allowed

    def __str__(self) -> str:
        """One line: "{field} = {value} ({origin}): expected {allowed}; {message}"."""
        text = self.field
        if self.value:
            text += (" = " if text else "") + self.value
        if self.origin:
            text += f" ({self.origin})" if text else self.origin
        if self.allowed:
            text += (": " if text else "") + "expected " + self.allowed
        if self.message:
            text += ("; " if self.allowed else ": " if text else "") + self.message
        return text


class InvalidArgument(RollpackError, ValueError):
    """The caller's value is wrong."""

    code = "invalid_argument"


class Unsupported(RollpackError):
    """Right in itself, but not built or not possible here."""

    code = "unsupported"


class NotFound(RollpackError):
    """A file, tensor, request or slot that does not exist."""

    code = "not_found"


class FailedPrecondition(RollpackError):
    """The right call in the wrong state."""

    code = "failed_precondition"


class ResourceExhausted(RollpackError):
    """Memory, pages or descriptors ran out; names what would be needed."""

    code = "resource_exhausted"


class WouldBlock(RollpackError):
    """Queues are full: try again after taking results."""

    code = "would_block"


class DeadlineExceeded(RollpackError, TimeoutError):
    """A wait ran out of time."""

    code = "deadline_exceeded"


class DataLoss(RollpackError):
    """A checksum, seal or size does not hold."""

    code = "data_loss"


class Unavailable(RollpackError, ConnectionError):
    """The server is gone or shutting down, or this client is closed."""

    code = "unavailable"


class WrongProcess(Unavailable):
    """A forked child used its parent's connection; it belongs to the process that opened it."""


class NonFinite(RollpackError, ArithmeticError):
    """A NaN or infinity where numbers are promised."""

    code = "non_finite"


class Internal(RollpackError):
    """An invariant of rollpack's own is broken."""


_BY_CODE: dict[str, type[RollpackError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        Unsupported,
        NotFound,
        FailedPrecondition,
        ResourceExhausted,
        WouldBlock,
        DeadlineExceeded,
        DataLoss,
        Unavailable,
        NonFinite,
        Internal,
    )
}


def error_from_map(parts: Mapping[str, Any]) -> RollpackError:
    """Build the typed error of a reply.

    Args:
        parts: {code, field, value, origin, allowed, message}, strings; a code that this version
            does not know becomes Internal, as in C++.
    """
    texts = {name: str(parts.get(name, "")) for name in ("field", "value", "origin", "allowed")}
    error_class = _BY_CODE.get(str(parts.get("code", "")), Internal)
    return error_class(str(parts.get("message", "")), **texts)
