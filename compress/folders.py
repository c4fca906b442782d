"""Output folders, and files, that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import DiskFull, OutputError


def require_free(into: Path, force: bool) -> None:
    """Raise `OutputError` if `into` exists and `force` is not given, or if its parent cannot be written."""
    if into.exists() and not into.is_dir():
        raise OutputError(f"The output {into} is a file.", "Name a folder that does not exist yet.")
    if into.exists() and any(into.iterdir()) and not force:
        raise OutputError(
            f"The output folder {into} exists and is not empty.",
            "Name another one, or pass --force (in Python: force=True) to replace it.",
        )
    _require_writable(into)


@contextmanager
def new_file(into: Path, force: bool = False) -> Iterator[Path]:
    """Yield a path beside `into` to write a file to, which is renamed to `into` when the block ends well.

    Raises `OutputError` before the block where `into` is taken and `force` is not given, or cannot be written, and
    `DiskFull` in place of the system's error.
    """
    if into.is_dir():
        raise OutputError(f"The output {into} is a folder.", "Name a file.")
    if into.exists() and not force:
        raise OutputError(f"The output {into} exists.", "Name another file, or pass --force to replace it.")
    _require_writable(into, "file")
    partial = partial_of(into)
    try:
        with disk_errors(partial):
            yield partial
            partial.replace(into)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(into: Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `into`, renamed to `into` when the block ends well and removed when it fails."""
    with kept_folder(into, force) as partial:
        empty(partial)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def kept_folder(into: Path, force: bool = False) -> Iterator[Path]:
    """Yield `into.partial`, renamed to `into` when the block ends well, and kept for the next run when it fails.

    Raises `OutputError` before the block where `into` is taken, cannot be written, or another run works on it, and
    `DiskFull` in place of the system's error.
    """
    into, partial = Path(into).resolve(), partial_of(into)
    require_free(into, force)
    try:
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(into, error) from error
    with _lock(partial), disk_errors(partial):
        yield partial
        _replace(partial, into)


def partial_of(into: Path) -> Path:
    """Where the work on `into` is until it is whole."""
    into = Path(into).resolve()
    return into.with_name(into.name + ".partial")


def empty(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Remove everything in `folder` but the entries named in `keep`."""
    for entry in folder.iterdir():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn "no space left" inside the block into `DiskFull`, whatever library met it."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        raise DiskFull(
            f"The disk is full: no room for {folder} ({_megabytes_free(folder)} MB free).",
            "Free some space or name another output folder; finished passes are kept and will not run again.",
        ) from error


_WORDS_OF_A_FULL_DISK = ("No space left on device", "problem writing element", "requested and")


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # Libraries in Rust and C++ pass on the system's words, not its number; numpy has its own words.
        if full or any(words in str(error) for words in _WORDS_OF_A_FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def _megabytes_free(folder: Path) -> int:
    return shutil.disk_usage(folder).free // 2**20


def _replace(partial: Path, into: Path) -> None:
    old = into.with_name(into.name + ".replaced")
    if into.exists():
        into.rename(old)
    partial.rename(into)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _lock(partial: Path) -> Iterator[None]:
    """Hold `partial` for this process. The kernel releases the lock when the process ends, however it ends."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(
            f"Another run is writing {partial}.", "Wait for it, stop it, or name another output folder."
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _require_writable(into: Path, kind: str = "folder") -> None:
    """Make the folder that `into` is to stand in. Raises `OutputError` if nothing can be written there."""
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(into, error, kind) from error
    if not os.access(into.parent, os.W_OK):
        raise _unwritable(into, PermissionError(errno.EACCES, os.strerror(errno.EACCES)), kind)


def _unwritable(into: Path, error: OSError, kind: str = "folder") -> OutputError:
    return OutputError(
        f"The output {kind} {into} cannot be written: {error.strerror}.",
        f"Name a {kind} that you may write to.",
    )
