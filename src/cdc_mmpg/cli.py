"""The command line: `python -m cdc_mmpg.cli fit --config DATASET.yaml --config METHOD.yaml ...` trains and tests.

Several commands with `--` between them run one after another in one process: of small ones the imports take longest.

Lightning's own (see its documentation), with three additions: what the dataset fixes is handed to the model, a run
that was stopped goes on where it was, and a finished one leaves `results.json`. Lightning is imported late: refusing
a wrong path or finding a run finished takes no time.
"""

import errno
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from cdc_mmpg.errors import CDCError, CheckpointError, ConfigError, DataError
from cdc_mmpg.files import expand_home
from cdc_mmpg.launchers import check_environment, find_launch, requeue
from cdc_mmpg.results import RESUME, find_dataset_config, fingerprint, read_results
from cdc_mmpg.signals import REQUEUE, Stopped, drop_terminal, ignore_stop_signals, stop_signals
from cdc_mmpg.terminal import end_without_output, escape_controls, find_lost_output, print_error, protect_output

# What a full disk, a quota or a read-only place says, and what else a system refuses, wherever in a run.
REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
                  errno.ESTALE, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (see `errors`; 128 + the signal's number when stopped by one)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    log_to_terminal()
    for _, command in groupby(arguments, lambda argument: argument != "--"):
        if (own := list(command)) != ["--"]:
            leave_on_signals()
            sys.argv[1:] = own  # Lightning starts its other processes with these: they end with the command
            if code := exit_code(partial(_run, own)):
                return code
    return 0


def _run(arguments: Sequence[str]) -> None:
    """One command."""
    if not _is_finished(arguments):
        check_paths(arguments)
        check_environment()
        find_launch().check_arguments({name: option(arguments, f"trainer.{name}") for name in ("devices", "num_nodes")})
        from cdc_mmpg.experiment import Experiment  # noqa: PLC0415  imports torch and Lightning: 10 s

        Experiment(arguments)


def exit_code(function: Callable[[], None]) -> int:
    """Run a program that is `function` and return its exit code.

    A fault of its input is one message on the standard error. Its output is safe in any encoding (`terminal`), and a
    reader that leaves (`| head`) ends it quietly, with 141.
    """
    protect_output()
    os.environ["MPLBACKEND"] = "agg"  # figures are files, and a backend that is not there stops every import of it
    try:
        function()
    except Stopped as error:  # said last, when no progress bar draws any more
        how = "type the same command again to go on"
        if error.number == REQUEUE:
            leads = find_launch().rank == 0 if error.leads is None else error.leads
            how = requeue() if leads else "the first process asks SLURM to start the job again"
        logging.getLogger("cdc_mmpg").warning("stopped by %s; %s", signal.Signals(error.number).name, how)
        return 128 + error.number
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:
        lost = find_lost_output() if isinstance(error, OSError) else None
        if lost:
            return end_without_output(lost)
        ours = _cause(error)
        if ours is None:
            raise
        print_error(f"{type(ours).__name__}: {ours}")
        for child in multiprocessing.active_children():  # one that hangs would be waited for
            child.kill()
        return ours.exit_code
    lost = find_lost_output()  # what was still buffered
    return end_without_output(lost) if lost else 0


def _cause(error: BaseException | None) -> CDCError | None:
    """What of our own lies behind an error: the parser wraps what a class raises into errors of its own."""
    while error is not None:
        if isinstance(error, CDCError):
            if not str(error).startswith("Caught "):
                return error
            # A loader process hands its error over with its own traceback in the text.
            return type(error)(str(error).strip().rpartition(f"{type(error).__name__}: ")[2])
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader"):
            return DataError(f"a process that loads batches hung or was killed: {error}")
        if trouble := _explain_machine(error):
            return trouble
        error = error.__cause__ or error.__context__
    return None


class PlainFormatter(logging.Formatter):
    """Messages without control characters: they name files and words that others chose."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's message."""
        return escape_controls(super().format(record))


def _explain_machine(error: BaseException) -> CDCError | None:
    """Return what the machine has run out of, refuses or has ended, as an error of ours; None of another error."""
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error):  # torch's, which need not be here
        reason = str(error).strip().partition("\n")[0].partition(" Of the allocated")[0]
        return ConfigError(
            f"the GPU's memory does not do: {reason} Take a smaller batch and as many more for a step "
            "(ARGS=--data.init_args.per_device=64), PRECISION=bf16-mixed, or end "
            "what else runs there"
        )
    if type(error).__name__ == "DistBackendError" or "Connection closed by peer" in str(error):
        return CDCError("another process of this run has ended: its own message says why")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return ConfigError(
            "the machine's memory does not do: take a smaller batch and as many more for a step "
            "(ARGS=--data.init_args.per_device=64), fewer loader processes "
            "(--data.init_args.num_workers=1), or end what else runs here"
        )
    if isinstance(error, OSError) and error.errno in REFUSED_WRITES:
        return CDCError(
            f"{error.filename or 'a file'}: cannot be written ({error.strerror}): make room, or make the place "
            "writable, and type the same command again"
        )
    return None


def log_to_terminal() -> None:
    """Our own messages, and of Lightning's the warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    for name in ("cdc_mmpg", "data_modules"):
        # Of several processes the first one speaks; a rank without a number of processes is not of this command.
        other = os.environ.get("LOCAL_RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"
        logging.getLogger(name).setLevel(logging.ERROR if other else logging.INFO)
    for name, level in (("lightning.pytorch", logging.WARNING), ("lightning.fabric", logging.WARNING),
                        ("huggingface_hub", logging.ERROR)):  # fmt: skip
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = False


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value given to `--name=value` or `--name value`."""
    values = [after for before, after in zip(arguments, [*arguments[1:], ""], strict=True) if before == f"--{name}"]
    values += [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"--{name}=")]
    return values[-1] if values else None


def leave_on_signals() -> None:
    """End with 128 + the signal's number, cleaning up."""
    for number in stop_signals():
        signal.signal(number, _leave)


def _leave(number: int, frame: object) -> None:
    drop_terminal(number)
    if number == REQUEUE:  # srun ends all tasks when one has left: that does not stop the requeue
        ignore_stop_signals()
    raise Stopped(number)


def _is_finished(arguments: Sequence[str]) -> bool:
    folder = option(arguments, "trainer.default_root_dir")
    if not folder:
        return False
    run = Path(expand_home(folder))
    results = read_results(run)
    if results is None or results.get("fingerprint") != fingerprint(arguments):
        return False
    # Where a kill came right after the results.
    shutil.rmtree(run / RESUME, ignore_errors=True)
    print(f"{folder}: finished on {results.get('finished')}; delete the folder to train anew")
    return True


def check_paths(arguments: Sequence[str]) -> None:
    """Refuse paths that lead nowhere before anything slow is imported."""
    if root := option(arguments, "data.init_args.root"):
        wrong = _examine(root) or "no such folder"
        if wrong == "a folder":
            try:
                wrong = "" if any(Path(expand_home(root)).iterdir()) else "an empty folder"
            except OSError as error:
                raise DataError(f"{root}: may not be read ({error.strerror})") from error
        if wrong:
            raise DataError(f"{root}: {wrong}\n{_source_of_dataset(arguments)}".rstrip())
    for name, variable, kind in (
        ("data.init_args.vocab", "VOCAB", DataError),
        ("model.init_args.encoder.checkpoint", "CHECKPOINT", CheckpointError),
    ):
        value = option(arguments, name)
        if value and ("." in value or value.startswith("~")) and (what := _examine(value)) != "a file":
            raise kind(f"{value}: {what or 'no such file'}; {variable}= names a file")


def _examine(name: str) -> str:
    """Return "a file", "a folder", or nothing where there is neither.

    Raises:
        ConfigError: no file system holds such a path.
    """
    path = Path(expand_home(name))
    try:
        return "a file" if path.is_file() else "a folder" if path.is_dir() else ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r}: not a usable path ({getattr(error, 'strerror', None) or error})") from error


def _source_of_dataset(arguments: Sequence[str]) -> str:
    """What the dataset's configuration says at its top about where the data comes from."""
    path = find_dataset_config(arguments)
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    return "\n".join(line[2:] for line in lines if line.startswith("#"))


if __name__ == "__main__":
    sys.exit(main())
