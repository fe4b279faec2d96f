"""Every error a user can meet, each with a way out. Knows nothing of what raises it.

TenfoldError
├── UsageError            wrong argument, wrong path, wrong input          exit code 2
│   ├── ConfigError       a config.json value is missing, unknown or impossible
│   ├── CheckpointError   a weight file is missing, damaged or not what the config asks for
│   ├── InputError        the text, file or message cannot be used
│   ├── StoreError        a folder, file or id of the disk store cannot be used
│   └── ContextTooLong    the prompt does not fit the model's or the session's context
└── RunError              right request, could not be done                  exit code 1
    ├── BackendMissing    the backend asked for is not on this machine
    └── DoesNotFit        memory, disk or context are too small for the request
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "BackendMissing",
    "CheckpointError",
    "ConfigError",
    "ContextTooLong",
    "DoesNotFit",
    "InputError",
    "RunError",
    "StoreError",
    "TenfoldError",
    "UsageError",
    "disk_errors",
]


class TenfoldError(Exception):
    """Base of all errors meant for the user; `exit_code` is what the CLI returns."""

    exit_code = 1


class UsageError(TenfoldError):
    """The request itself is wrong: argument, path or input."""

    exit_code = 2


class ConfigError(UsageError):
    """A `config.json` value is missing, unknown or impossible."""


class CheckpointError(UsageError):
    """A weight file is missing, damaged or not what the config asks for."""


class InputError(UsageError):
    """A text, file or message that cannot be used."""


class StoreError(UsageError):
    """A folder, file or id of the disk store that cannot be used."""


class ContextTooLong(UsageError):
    """More tokens than the model's or the session's context holds."""


class RunError(TenfoldError):
    """The request was right but could not be carried out."""


class BackendMissing(RunError):
    """The backend that was asked for is not available on this machine."""


class DoesNotFit(RunError):
    """Memory, disk or context are too small for the request."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk answers while a checkpoint is read becomes one sentence."""
    try:
        yield
    except OSError as exc:
        raise CheckpointError(
            f"{exc.filename or path} cannot be read: {exc.strerror or exc}; check the disk it is on, then try again"
        ) from exc
