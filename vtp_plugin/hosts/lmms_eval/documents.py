"""Which document of which task the host asks its model about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Fetched:
    """The documents (task, number) that the host fetched for its next calls of the model.

    A host fetches the documents of a batch and calls the model once, or fetches them all and calls it once for each;
    it may fetch one twice, and it may call the model again for the same document.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[str, Any]] = []
        self.last: list[tuple[str, Any]] = []  # what the last call was for
        self.called = False  # since the last fetch

    def note(self, document: tuple[str, Any]) -> None:
        """The host fetched a document; what waited before an earlier call was never asked about."""
        self.waiting = [document] if self.called else [*self.waiting, document]
        self.called = False

    def take(self, count: int) -> list[tuple[str, Any]]:
        """The documents of a call with so many prompts; not as many if that is unknown."""
        if len(self.waiting) != count:
            self.waiting = list(dict.fromkeys(self.waiting)) or self.last
        self.last, self.waiting, self.called = self.waiting[:count], self.waiting[count:], True
        return self.last


class Documents(dict):
    """The host's `task_dict`, noting which documents it is asked for: task -> split -> document number."""

    def __init__(self, tasks: Mapping[str, Any], fetched: Fetched) -> None:
        super().__init__(tasks)
        self.fetched = fetched

    def __getitem__(self, task: str) -> Any:
        return Noted(super().__getitem__(task), lambda split: Noted(split, None, self.fetched, task))


class Noted:
    """An object whose items are passed on, after being noted or wrapped."""

    def __init__(self, inner: Any, wrap: Callable | None, fetched: Fetched | None = None, task: str = "") -> None:
        self._inner, self._wrap, self._fetched, self._task = inner, wrap, fetched, task

    def __getitem__(self, key: Any) -> Any:
        value = self._inner[key]
        if self._fetched is not None:
            self._fetched.note((self._task, key))
        return self._wrap(value) if self._wrap else value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Any:
        return iter(self._inner)
