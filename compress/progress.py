"""One observer for everything that takes time. Passes and targets report to it; the command line draws it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Task(Protocol):
    """A running task."""

    def advance(self, steps: int = 1) -> None:
        """Say that `steps` more steps are done."""
        ...


class Observer(Protocol):
    """Told when a task begins and ends. `total` is the number of steps, or None where it is unknown."""

    def begin(self, what: str, total: int | None) -> Task: ...

    def end(self, task: Task) -> None: ...


class _Silent:
    def advance(self, steps: int = 1) -> None:
        del steps

    def begin(self, what: str, total: int | None) -> Task:
        del what, total
        return self

    def end(self, task: Task) -> None:
        del task


SILENT: Observer = _Silent()


@contextmanager
def task(observer: Observer, what: str, total: int | None = None) -> Iterator[Task]:
    """Run a block as one task of `observer`."""
    running = observer.begin(what, total)
    try:
        yield running
    finally:
        observer.end(running)


def track(observer: Observer, what: str, items: Iterable[T]) -> Iterator[T]:
    """Yield `items`, one step of `observer` each."""
    total = len(items) if isinstance(items, Sized) else None
    with task(observer, what, total) as running:
        for item in items:
            yield item
            running.advance()
