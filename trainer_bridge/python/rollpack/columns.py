"""A read-only mapping from column names to arrays, which also hands out torch tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, overload

from rollpack.errors import NotFound, Unsupported
from rollpack.schema import Array

if TYPE_CHECKING:
    import torch


class Columns(Mapping[str, Array]):
    """Columns by name; nothing is copied.

    NumPy arrays are marked read-only, as a guard against mistakes. Tensors are writable: torch has
    no read-only tensors, and a write stays in this process.
    """

    def __init__(self, writable: dict[str, Array]) -> None:
        """Wrap writable arrays."""
        self._writable = writable

    def __getitem__(self, name: str) -> Array:
        """The column as a read-only array.

        Raises:
            KeyError: there is no such column; names those there are.
        """
        view = self._find(name).view()
        view.flags.writeable = False
        return view

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the batch's table."""
        return iter(self._writable)

    def __len__(self) -> int:
        """How many columns there are."""
        return len(self._writable)

    @overload
    def torch(self, name: str) -> torch.Tensor: ...
    @overload
    def torch(self, name: None = None) -> dict[str, torch.Tensor]: ...
    def torch(self, name: str | None = None) -> torch.Tensor | dict[str, torch.Tensor]:
        """One column, or all of them by name, as tensors on the same memory.

        Raises:
            KeyError: there is no such column.
            Unsupported: torch is not installed.
        """
        try:
            import torch
        except ImportError as error:
            raise Unsupported(
                "install torch, or use the NumPy arrays", field="torch", value="not installed"
            ) from error
        if name is not None:
            return torch.from_numpy(self._find(name))
        return {each: torch.from_numpy(array) for each, array in self._writable.items()}

    @property
    def writable(self) -> dict[str, Array]:
        """The arrays as tensors share them: a write stays in this process."""
        return self._writable

    def _find(self, name: str) -> Array:
        try:
            return self._writable[name]
        except KeyError:
            raise NoSuchColumn(field="column", value=name, allowed=self._names()) from None

    def _names(self) -> str:
        return (
            "one of " + ", ".join(self._writable) if self._writable else "none: it has no samples"
        )


class NoSuchColumn(NotFound, KeyError):
    """A column that the batch does not have."""
