"""Time things side by side: one variant a process, in alternating rounds, with ratios taken round by round.

Two runtimes in one process disturb each other (an idle thread pool keeps spinning on the cores), and a shared
machine drifts from minute to minute. So every figure comes from a fresh process that loads one variant alone;
a round goes over all variants, every second round in reverse order; and a variant is compared with its own
round's baseline only. `python -m compress.timing` is that process: it reads a job from its standard input.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.errors import ModelpressError, UsageError
from compress.memory import give_back
from compress.processes import alone
from compress.progress import SILENT, Observer, track

WARMUP = 3
_LAST_LINES = 15


@dataclass(frozen=True)
class Variant:
    """Something to time: `maker` ("module:function") makes, in a process of its own, the call to be timed.

    The function is called with `arguments` (JSON values) and with `threads=`, the number of threads that the
    call may use, and returns a callable without arguments.
    """

    name: str
    maker: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """The median of a figure over the rounds, with its lowest and highest value."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float]) -> Spread:
        values = tuple(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Timings:
    """Seconds of one call, for each variant one value a round: the median over the round's calls."""

    baseline: str
    calls: int
    threads: int
    rounds: Mapping[str, tuple[float, ...]]

    def seconds(self, name: str) -> Spread:
        """Seconds of one call of the variant `name`."""
        return Spread.over(self.rounds[name])

    def speedup(self, name: str) -> Spread:
        """How many times as fast as the baseline `name` is, over the ratios of each round."""
        pairs = zip(self.rounds[self.baseline], self.rounds[name], strict=True)
        return Spread.over(base / own for base, own in pairs)


def measure(
    variants: Sequence[Variant],
    rounds: int,
    calls: int,
    baseline: str,
    *,
    threads: int = 2,
    observer: Observer = SILENT,
) -> Timings:
    """Time `calls` calls of every variant in each of `rounds` alternating rounds, one fresh process each.

    Raises `UsageError` if `baseline` names no variant or a name occurs twice, and `ModelpressError` with the
    last lines of its standard error if a variant's process fails.
    """
    _check(variants, rounds, calls, baseline)
    give_back()
    turns = [variant for turn in range(rounds) for variant in (variants[::-1] if turn % 2 else variants)]
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for variant in track(observer, f"time {len(variants)} variants in {rounds} rounds", turns):
        seconds[variant.name].append(statistics.median(_run(variant, calls, threads)))
    return Timings(baseline, calls, threads, {name: tuple(own) for name, own in seconds.items()})


def _check(variants: Sequence[Variant], rounds: int, calls: int, baseline: str) -> None:
    names = [variant.name for variant in variants]
    if baseline not in names:
        raise UsageError(f"The baseline {baseline!r} is none of the variants {names}.", "Name one of them.")
    if len(set(names)) < len(names):
        raise UsageError(f"Two variants have the same name: {names}.", "Give each a name of its own.")
    if rounds < 1 or calls < 1:
        raise UsageError(
            f"Nothing to time: {rounds} rounds of {calls} calls.", "Ask for one or more of each."
        )


def _run(variant: Variant, calls: int, threads: int) -> list[float]:
    """Seconds of each call of `variant`, timed in a fresh process."""
    job = {"maker": variant.maker, "arguments": dict(variant.arguments), "calls": calls, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "compress.timing"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=_environment(threads),
        check=False,
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
        raise ModelpressError(
            f"Timing {variant.name!r} failed: its process {_ending(done.returncode)}. Last lines:\n{last}",
            f"See it alone: {sys.executable} -m compress.timing <<< {shlex.quote(json.dumps(job))}",
        )
    return json.loads(done.stdout)


def _environment(threads: int) -> dict[str, str]:
    """The child imports what this process can, alone, and its OpenMP and BLAS pools have `threads` threads."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**alone(os.environ), "PYTHONPATH": path, **dict.fromkeys(pools, str(threads))}


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"


def _work(job: Mapping[str, Any]) -> list[float]:
    """What the fresh process does: make the call, warm it up, time it."""
    module, _, function = job["maker"].partition(":")
    make = getattr(importlib.import_module(module), function)
    call = make(**job["arguments"], threads=job["threads"])
    for _ in range(WARMUP):
        call()
    return [_timed(call) for _ in range(job["calls"])]


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _main() -> None:
    # Libraries print to standard output as they please: it is kept for the answer, theirs goes to the errors.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(_work(json.load(sys.stdin)), answer)
    answer.close()


if __name__ == "__main__":
    _main()
