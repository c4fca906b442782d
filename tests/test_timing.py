"""Timing: alternating processes, ratios round by round, and processes that fail."""

import json
import os
import sys
from pathlib import Path

import pytest

from compress import timing
from compress.errors import ModelpressError, UsageError
from compress.memory import give_back
from compress.timing import Spread, Timings, Variant, measure

FAKES = """
import os, sys, time

class Clock:
    now = 0.0

def known(seconds, log, threads):
    '''A call that takes `seconds` by the clock of its process, and prints, as libraries do.'''
    with open(log, "a") as file:
        file.write(f"{seconds} {threads} {os.environ['OMP_NUM_THREADS']}\\n")
    time.perf_counter = lambda: Clock.now
    def call():
        print("noise")
        os.system("echo more noise")
        Clock.now += seconds
    return call

def counting(log, threads):
    def call():
        with open(log, "a") as file:
            file.write("call\\n")
    return call

def crash(threads):
    raise RuntimeError("no such kernel: MatMulNothing")

def die(threads):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "log"


def known(name: str, seconds: float, log: Path) -> Variant:
    return Variant(name, "fakes:known", {"seconds": seconds, "log": str(log)})


def test_each_round_goes_over_all_variants_and_every_second_one_backwards(fakes: Path) -> None:
    variants = [known("slow", 0.5, fakes), known("fast", 0.125, fakes)]
    timings = measure(variants, rounds=3, calls=2, baseline="slow", threads=3)
    order = fakes.read_text().split("\n")[:-1]
    assert order == ["0.5 3 3", "0.125 3 3", "0.125 3 3", "0.5 3 3", "0.5 3 3", "0.125 3 3"]
    assert timings.rounds == {"slow": (0.5, 0.5, 0.5), "fast": (0.125, 0.125, 0.125)}
    assert timings.speedup("fast") == Spread(4.0, 4.0, 4.0)
    assert (timings.calls, timings.threads, timings.baseline) == (2, 3, "slow")


def test_warms_up_before_it_times(fakes: Path) -> None:
    measure([Variant("a", "fakes:counting", {"log": str(fakes)})], rounds=1, calls=5, baseline="a")
    assert fakes.read_text().count("call") == timing.WARMUP + 5


def test_ratios_are_taken_round_by_round() -> None:
    # The machine is twice as slow in the second round: the ratio of medians would be 1.5 / 0.5 = 3.
    timings = Timings("base", 1, 2, {"base": (1.0, 2.0, 1.5), "own": (0.25, 0.5, 0.5)})
    assert timings.speedup("own") == Spread(median=4.0, low=3.0, high=4.0)
    assert timings.seconds("own") == Spread(median=0.5, low=0.25, high=0.5)
    assert timings.speedup("base") == Spread(1.0, 1.0, 1.0)


def test_a_crash_shows_the_last_lines_and_the_command_to_repeat_it(fakes: Path) -> None:
    with pytest.raises(ModelpressError) as caught:
        measure([Variant("broken", "fakes:crash")], rounds=1, calls=1, baseline="broken")
    assert caught.value.fact.startswith(
        "Timing 'broken' failed: its process ended with status 1. Last lines:\n"
    )
    assert caught.value.fact.endswith("RuntimeError: no such kernel: MatMulNothing")
    job = json.dumps({"maker": "fakes:crash", "arguments": {}, "calls": 1, "threads": 2})
    assert caught.value.remedy == f"See it alone: {sys.executable} -m compress.timing <<< '{job}'"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_process_is_named_by_its_signal(fakes: Path) -> None:
    with pytest.raises(ModelpressError, match="Timing 'big' failed: its process was killed by SIGKILL"):
        measure([Variant("big", "fakes:die")], rounds=1, calls=1, baseline="big")


@pytest.mark.parametrize(
    ("names", "rounds", "message"),
    [
        (["a", "b"], 1, "The baseline 'base' is none of the variants ['a', 'b']."),
        (["base", "base"], 1, "Two variants have the same name: ['base', 'base']."),
        (["base"], 0, "Nothing to time: 0 rounds of 1 calls."),
    ],
)
def test_wrong_arguments_are_refused_at_once(names: list[str], rounds: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        measure([Variant(name, "fakes:crash") for name in names], rounds, 1, "base")
    assert caught.value.fact == message


def test_free_memory_goes_back_before_processes_are_timed() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    kept = []
    rows = [bytearray(60_000) for _ in range(4_000)]  # below the size from which glibc maps blocks one by one
    kept.append(bytearray(60_000))  # a block at the end keeps the heap from shrinking by itself
    held = resident()
    del rows
    give_back()
    assert held - resident() > 200e6
