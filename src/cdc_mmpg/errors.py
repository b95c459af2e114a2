"""Errors that say what is wrong, where, and what to do; each kind has the exit code of the command line."""

from collections.abc import Sequence


def listing(names: Sequence[str], rest: str = "", shown: int = 20) -> str:
    """Names, a line each; of many the first ones, and the number of the others with where they are."""
    more = f"\n  and {len(names) - shown} more{rest}" if len(names) > shown else ""
    return "".join(f"\n  {name}" for name in names[:shown]) + more


class CDCError(ValueError):
    """Base of the errors below: a fault of the input or the surroundings, never of the code."""

    exit_code = 1


class ConfigError(CDCError):
    """An argument or a configuration file asks for something impossible."""

    exit_code = 2


class DataError(CDCError):
    """A dataset, an annotation or a clip cannot be used as it is."""

    exit_code = 3


class CheckpointError(CDCError):
    """A file of weights cannot be read, or belongs to another model."""

    exit_code = 4


class DivergedError(CDCError):
    """Training produced a loss that is not a number."""

    exit_code = 6
