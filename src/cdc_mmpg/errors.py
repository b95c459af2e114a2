"""Errors that state what is wrong, where, and what to do; each class sets the exit code of the command line."""

from collections.abc import Sequence


def format_names(names: Sequence[str], rest: str = "", shown: int = 20) -> str:
    """Return up to `shown` names, one a line, then the number of the others and `rest`, which says where they are."""
    more = f"\n  and {len(names) - shown} more{rest}" if len(names) > shown else ""
    return "".join(f"\n  {name}" for name in names[:shown]) + more


class CDCError(ValueError):
    """Base of the errors below: a problem with the input or the environment, never a bug."""

    exit_code = 1


class ConfigError(CDCError):
    """Invalid argument or configuration file."""

    exit_code = 2


class DataError(CDCError):
    """Unusable dataset, annotation or clip."""

    exit_code = 3


class CheckpointError(CDCError):
    """Weights that cannot be read or belong to another model."""

    exit_code = 4


class DivergedError(CDCError):
    """Training loss that is not a finite number."""

    exit_code = 6
