"""Calls timed on a GPU: as CUDA graphs, so that no time is Python's, and in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

WARM_UP = 5
CALLS = 20
"""Timed calls of a variant in one round."""


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """`call` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rounds_of(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds a call, by variant, one a round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(WARM_UP):
                call()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / CALLS)
    return times


def lines(times: Mapping[str, Sequence[float]]) -> list[str]:
    """A line a variant: the median, and how many times as fast as the first it is (and the extremes of all rounds)."""
    base = next(iter(times.values()))
    found = []
    for name, own in times.items():
        ratios = [first / one for first, one in zip(base, own, strict=True)]
        found.append(
            f"{name:24} {median(own):8.4f} {median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return found
