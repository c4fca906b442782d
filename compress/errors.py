"""Every error that modelpress raises on purpose.

    ModelpressError            1  something outside the recipe and the model failed
    ├── Interrupted          130  Ctrl-C or SIGTERM
    ├── DiskFull               1  no room for the output
    ├── UsageError             2  the arguments are wrong
    │   ├── RecipeError        2  the recipe is wrong (with file and line)
    │   ├── DataError          2  calibration, training or evaluation data is missing or unfit
    │   └── OutputError        2  the output folder exists or cannot be written
    ├── Unsuitable             3  a pass or a target cannot serve this model
    │   ├── NothingToDo        3  a pass matched nothing
    │   ├── ModelError         3  a model folder is missing, corrupt or not finite
    │   ├── MissingPackage     3  a target's package is not installed
    │   ├── WrongDevice        3  an artifact is for another device than this machine has
    │   └── Unproved           3  an output is not finite, of another shape, or too far from what it must equal
    └── NotAccepted            4  everything was built, but the recipe's `accept` is not met

The number is the exit status of the command line. A message has two parts: the fact, with real names, shapes
and values, and the remedy, which says what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class ModelpressError(Exception):
    """Base of all deliberate errors: a `fact` and a `remedy`, each one or more full sentences."""

    exit_status: ClassVar[int] = 1

    def __init__(self, fact: str, remedy: str = "") -> None:
        super().__init__(f"{fact}\n{remedy}" if remedy else fact)
        self.fact = fact
        self.remedy = remedy


class Interrupted(ModelpressError):
    """The user or the system stopped the run."""

    exit_status = 130


class DiskFull(ModelpressError):
    """The file system has no room for the output."""


class UsageError(ModelpressError):
    """The arguments are wrong."""

    exit_status = 2


class RecipeError(UsageError):
    """The recipe is wrong."""


class DataError(UsageError):
    """Calibration, training or evaluation data is missing or unfit."""


class OutputError(UsageError):
    """The output folder exists already or cannot be written."""


class Unsuitable(ModelpressError):
    """A pass or a target cannot serve this model."""

    exit_status = 3


class NothingToDo(Unsuitable):
    """A pass matched nothing, and the recipe does not say `allow_empty: true`."""


class ModelError(Unsuitable):
    """A model folder is missing, corrupt, or holds weights that are not finite."""


class MissingPackage(Unsuitable):
    """A package that a target or a data source needs is not installed; the remedy is the pip command."""


class WrongDevice(Unsuitable):
    """An artifact is for another device than this machine has."""


class Unproved(Unsuitable):
    """An output is not finite, has another shape, or is too far from what it must equal."""


class NotAccepted(ModelpressError):
    """Everything was built and proved, but the recipe's `accept` is not met."""

    exit_status = 4
