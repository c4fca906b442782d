"""`python -m benchmarks TABLE --data DIR`: measure a table, and write it as JSON, Markdown and a picture."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from benchmarks.machine import require_packages
from benchmarks.plot import draw
from benchmarks.results import markdown
from compress.console import hush, show_error
from compress.errors import ModelpressError

TABLES = ("minilm", "language", "vision")
"""Modules of this package with `run(data, model, cache, rounds, calls, threads) -> Table` and its `PACKAGES`.

One that has a function `draw(table, file)` draws its picture by that.
"""


def main() -> int:
    arguments = _parse()
    try:
        _measure(arguments)
    except ModelpressError as error:
        show_error(error)
        return error.exit_status
    return 0


def _measure(arguments: argparse.Namespace) -> None:
    module = import_module(f"benchmarks.{arguments.table}")
    require_packages(module.PACKAGES)
    hush()
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = module.run(
        data=arguments.data,
        model=arguments.model,
        cache=arguments.out / "cache",
        rounds=arguments.rounds,
        calls=arguments.calls,
        threads=arguments.threads,
    )
    into = arguments.out / arguments.table
    into.with_suffix(".json").write_text(json.dumps(asdict(table), indent=2) + "\n", encoding="utf-8")
    into.with_suffix(".md").write_text(markdown(table), encoding="utf-8")
    getattr(module, "draw", draw)(table, into.with_suffix(".png"))
    print(f"\n{markdown(table)}\nWritten to {into}.json, .md and .png.")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, required=True, help="folder with the evaluation data")
    parser.add_argument("--model", type=Path, help="folder of the model, where no package brings it")
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), help="folder for artifacts and results"
    )
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds over all variants")
    parser.add_argument("--calls", type=int, default=10, help="timed calls a process")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
