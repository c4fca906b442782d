"""How a command ends: the one place that turns exceptions into a message and an exit status."""

from __future__ import annotations

import errno
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from compress.console import errors, show_error
from compress.errors import DiskFull, ModelpressError

DEFECT = (
    "This is a defect of modelpress, not of your input. Please report it with the lines above,"
    " the command, and the output of `modelpress --version`."
)


def status_of(command: Callable[[], object], debug: bool) -> int:
    """Run `command` and give its exit status, with what went wrong as the last thing on standard error.

    `debug` prints the traceback of deliberate errors too. SIGTERM ends the command as Ctrl-C does.
    """
    try:
        with _terminated_as_interrupted():
            command()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except Exception as error:  # noqa: BLE001 - all errors end here
        return _told(error, debug)
    return 0


def _told(error: Exception, debug: bool) -> int:
    told = _deliberate(error)
    if told is None or debug:
        traceback.print_exception(error)
    if told is None:
        errors().print(f"{type(error).__name__}: {error}\n{DEFECT}", markup=False)
        return 1
    show_error(told)
    return told.exit_status


def _deliberate(error: Exception) -> ModelpressError | None:
    if isinstance(error, ModelpressError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return DiskFull(f"The disk is full{where}.", "Free some space, or name another output folder.")
    return None


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on SIGTERM inside the block, so that half-made output is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
