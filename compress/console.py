"""What the command line draws: progress on standard error, results on standard output, errors last."""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from compress.errors import ModelpressError
from compress.progress import Observer, Task

WORTH_SAYING = 2.0
"""Seconds after which a task is worth a line that stays."""
FILE_WIDTH = 140
"""Columns of tables that are written to a file or a pipe, which has no width of its own."""


def output() -> Console:
    """Standard output."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)


def errors() -> Console:
    """Standard error. Lines are never broken there, so that paths can be copied."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


@dataclass
class _Bar:
    """A task as a bar of a `rich` display."""

    progress: Progress
    what: str
    number: Any
    begun: float = field(default_factory=time.monotonic)

    def advance(self, steps: int = 1) -> None:
        self.progress.advance(self.number, steps)


@dataclass(frozen=True)
class _Bars:
    """Draws tasks as bars; those that took long leave a line."""

    progress: Progress

    def begin(self, what: str, total: int | None) -> Task:
        return _Bar(self.progress, what, self.progress.add_task(what, total=total))

    def end(self, task: Task) -> None:
        assert isinstance(task, _Bar)
        self.progress.remove_task(task.number)
        seconds = time.monotonic() - task.begun
        if seconds >= WORTH_SAYING:
            self.progress.console.print(Text(f"{task.what}: {seconds:.1f} s", style="dim"))


@dataclass
class _Line:
    """A task as a line when it has run for a while, and another when it ends."""

    what: str
    console: Console
    begun: float = field(default_factory=time.monotonic)
    timer: threading.Timer = field(init=False)

    def __post_init__(self) -> None:
        self.timer = threading.Timer(WORTH_SAYING, self.console.print, [Text(f"{self.what} ...")])
        self.timer.daemon = True
        self.timer.start()

    def advance(self, steps: int = 1) -> None:
        del steps


@dataclass(frozen=True)
class _Lines:
    """Says of tasks that take long when they go on and when they end, for logs."""

    console: Console

    def begin(self, what: str, total: int | None) -> Task:
        del total
        return _Line(what, self.console)

    def end(self, task: Task) -> None:
        assert isinstance(task, _Line)
        task.timer.cancel()
        seconds = time.monotonic() - task.begun
        if seconds >= WORTH_SAYING:
            self.console.print(Text(f"{task.what}: {seconds:.1f} s"))


@contextmanager
def progress() -> Iterator[Observer]:
    """An observer that draws on standard error: bars on a terminal, a few lines elsewhere."""
    console = errors()
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as drawn:
        yield _Bars(drawn)


def hush() -> None:
    """Turn off the warnings, logs and progress bars of torch and transformers for this process."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("torch", "onnxscript", "onnx_ir", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def show_error(error: ModelpressError) -> None:
    """Print the fact, where it happened, and what to do about it."""
    console = errors()
    console.print(Text("error: ", style="bold red"), Text(error.fact), sep="")
    for note in getattr(error, "__notes__", ()):
        console.print(Text(note))
    if error.remedy:
        console.print(Text(error.remedy, style="bold"))
