"""A build told in tables: what each step changed and how far it moved the outputs; what each artifact gained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.manifest import Manifest, Verdict
from compress.report import Caution, Step

if TYPE_CHECKING:
    from rich.table import Table


def tables(manifest: Manifest) -> list[Table]:
    """The steps, the artifacts, what was left alone and why, and the warnings, as rich tables."""
    found = [steps_table(manifest.steps)] if manifest.steps else []
    if manifest.verdicts:
        found.append(artifacts_table(manifest))
    if any(step.skips for step in manifest.steps):
        found.append(skips_table(manifest.steps))
    if manifest.warnings:
        found.append(warnings_table(manifest.warnings))
    return found


def steps_table(steps: Sequence[Step]) -> Table:
    """One row a pass: changes, parity on the example before and after it, bytes, seconds."""
    table = _table("Steps", ("pass", "effect", "changed", "left alone", "moved outputs by", "size", "time"))
    for step in steps:
        table.add_row(
            step.name,
            step.effect,
            _counted([change.what for change in step.changes]),
            str(len(step.skips)),
            f"{step.parity.relative:.1e} (cosine {step.parity.cosine:.4f})",
            f"{megabytes(step.bytes_before)} -> {megabytes(step.bytes_after)} MB",
            "resumed" if step.resumed else f"{step.seconds:.1f} s",
        )
    return table


def artifacts_table(manifest: Manifest) -> Table:
    """One row an artifact, beside the same export of the uncompressed model."""
    shape = " x ".join(str(size) for size in manifest.shape.values())
    table = _table(
        f"Artifacts, against the same export uncompressed ({shape})",
        ("target", "proof", "size", "time of one call", "speed", "lowest cosine", manifest.metric or ""),
    )
    for verdict in manifest.verdicts:
        table.add_row(
            verdict.artifact.target,
            f"{verdict.artifact.parity.relative:.1e}",
            f"{megabytes(verdict.baseline_bytes)} -> {megabytes(verdict.bytes)} MB",
            _times(verdict),
            _speed(verdict),
            f"{verdict.parity.cosine:.4f}" if verdict.parity else "cannot run here",
            _scores(verdict),
        )
    return table


def skips_table(steps: Sequence[Step]) -> Table:
    """What the passes left alone, one row a reason."""
    table = _table("Left alone", ("pass", "modules", "why"))
    for step in steps:
        reasons: dict[str, list[str]] = {}
        for skip in step.skips:
            reasons.setdefault(skip.why, []).append(skip.target)
        for why, targets in reasons.items():
            more = f" and {len(targets) - 2} more" if len(targets) > 2 else ""
            table.add_row(step.name, ", ".join(targets[:2]) + more, why)
    return table


def warnings_table(warnings: Sequence[Caution]) -> Table:
    """One row a warning."""
    table = _table("Warnings", ("what", "what to do"))
    for warning in warnings:
        table.add_row(warning.fact, warning.remedy)
    return table


def megabytes(count: int) -> str:
    """Bytes as megabytes (10^6), one decimal."""
    return f"{count / 1e6:.1f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _counted(what: Sequence[str]) -> str:
    return ", ".join(f"{count} x {one}" for one, count in Counter(what).items()) or "nothing"


def _times(verdict: Verdict) -> str:
    if verdict.seconds is None or verdict.baseline_seconds is None:
        return "cannot run here"
    return f"{verdict.baseline_seconds.median * 1e3:.1f} -> {verdict.seconds.median * 1e3:.1f} ms"


def _speed(verdict: Verdict) -> str:
    speed = verdict.speedup
    return f"{speed.median:.2f} x ({speed.low:.2f} to {speed.high:.2f})" if speed else "not measured"


def _scores(verdict: Verdict) -> str:
    if verdict.score is None or verdict.baseline_score is None:
        return ""
    return f"{verdict.baseline_score:.3f} -> {verdict.score:.3f}"
