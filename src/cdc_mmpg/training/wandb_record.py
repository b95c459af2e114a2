"""Record of a command in Weights & Biases: run, artifacts with lineage, tables and alerts; wandb is imported late.

W&B never stops a command: an error is one warning. Without a server W&B can note neither which artifacts a run used nor
an alert: an offline run has its inputs as configuration, with digests.
"""

import contextlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Literal, NamedTuple

from cdc_mmpg.evaluation.answers import AnswersTable, read_answers
from cdc_mmpg.files import hash_file
from cdc_mmpg.results import CONFIG, PREDICTIONS

logger = logging.getLogger(__name__)

Kind = Literal["train", "pretraining", "control", "export", "delay", "demo", "report"]
WeightsKind = Literal["encoder", "reasoner", "reading"]  # types of the artifacts that runs exchange

PROJECT = "cdc-mmpg"
PATIENCE_SECONDS = 15  # timeout for a server that does not answer
UPLOAD_SECONDS = 120  # timeout of the final upload; the rest stays on disk
SWEPT_KINDS = ("train", "pretraining", "control")  # kinds of runs that a sweep's agent may wait for
# Variables that `start_record` sets itself, or that cannot make W&B fail.
PRESERVED_VARIABLES = ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_ERROR_REPORTING")
AGENT_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")  # set by a sweep's agent for its run


class Subject(NamedTuple):
    """Subject of a W&B run: it determines name, group, job type and tags."""

    kind: Kind  # job type
    dataset: str
    method: str  # or another name of a group within the dataset, such as "report"
    seed: str = ""  # "seed<N>"; empty for a command about a whole dataset

    @classmethod
    def of_run(cls, run: Path, kind: Kind) -> "Subject":
        """Return the subject of a command about a run's folder, `<dataset>/<method>/seed<N>`."""
        return cls(kind, *run.absolute().parts[-3:])

    @property
    def name(self) -> str:
        """Name of the W&B run: that of the folder, and what was done with it."""
        done = self.kind if self.kind in ("export", "demo") else ""
        return "/".join(filter(None, (self.dataset, self.method, self.seed, done)))

    @property
    def group(self) -> str:
        """Group of the W&B run: the seeds of a method have the same one."""
        return f"{self.dataset}/{self.method}"


class Content(NamedTuple):
    """Content of an artifact: files, and digests of data that stay where they are."""

    name: str
    type: WeightsKind | Literal["dataset", "model", "bundle"]
    files: Mapping[str, Path] = {}  # by name within the artifact
    digests: Mapping[str, str] = {}  # sha256, by name within the artifact
    aliases: tuple[str, ...] = ("latest",)

    def hash_parts(self) -> dict[str, str]:
        """Return the sha256 digest of each part, by its name within the artifact."""
        return {**self.digests, **{name: hash_file(path) for name, path in self.files.items()}}

    def build(self) -> Any:
        """Return the artifact. Files are neither copied nor cached; digests are references, of which W&B loads nothing.

        W&B recognises an artifact by its content: the same files are the same version, whichever run logs them.
        """
        import wandb  # noqa: PLC0415  takes seconds
        from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry  # noqa: PLC0415

        artifact = wandb.Artifact(self.name, self.type, metadata={"sha256": self.hash_parts()})
        for name, path in self.files.items():
            artifact.add_file(str(path.absolute()), name, policy="immutable", skip_cache=True)
        for name, digest in self.digests.items():  # `add_reference` would digest the reference, not the data
            entry = ArtifactManifestEntry(path=name, digest=digest, ref=f"sha256:{digest}", size=0)
            artifact.manifest.add_entry(entry)
        return artifact


class Record:
    """Record of a command in a W&B run; without one every method does nothing.

    Args:
        run: the W&B run; None if W&B is off.
    """

    def __init__(self, run: Any = None) -> None:
        self.run = run
        self._failed: set[str] = set()  # what is not tried again
        self._answers = True  # whether the server does

    @property
    def is_online(self) -> bool:
        """Whether a server receives the run, and can note lineage and alerts."""
        return self.run is not None and not self.run.offline

    def use(self, *inputs: Content) -> None:
        """Note the artifacts that the run builds on, in its configuration with digests; online, as lineage, too.

        A server that takes long to store them does not delay the command further.
        """

        def note() -> None:
            described = {part.type: {"artifact": part.name, **part.hash_parts()} for part in inputs}
            self.run.config.update({"inputs": described}, allow_val_change=True)
            artifacts = [(part, part.build()) for part in inputs] if self.is_online else []

            def send() -> None:
                for part, artifact in artifacts:
                    self.run.use_artifact(artifact, aliases=list(part.aliases))

            self._send(send, must_end=False)

        self.attempt("note its inputs", note)

    def log(self, *outputs: Content) -> None:
        """Log the artifacts that the command wrote."""

        def log(part: Content) -> None:
            artifact = part.build()
            self._send(partial(self.run.log_artifact, artifact, aliases=list(part.aliases)))

        for part in outputs:
            self.attempt(f"save the artifact {part.name}", partial(log, part))

    def log_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None = None
    ) -> None:
        """Log a table whose columns have the types of their first cells; None is an empty cell.

        Args:
            name: name of the table.
            columns: names of the columns.
            rows: rows, which may contain images (`wandb.Image`).
            step: number of optimizer steps so far, if training goes on.
        """

        def log() -> None:
            import wandb  # noqa: PLC0415  takes seconds

            first = [next((row[i] for row in rows if row[i] is not None), None) for i in range(len(columns))]
            types = [type(cell) if isinstance(cell, str | int | float) else None for cell in first]
            typed = {} if None in types else {"dtype": types}  # else W&B unites the types of all cells
            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], **typed)
            at = {} if step is None else {"trainer/global_step": step}
            self._send(lambda: self.run.log({name: table, **at}))

        self.attempt(f"save the table {name}", log)

    def log_answers(self, path: Path) -> None:
        """Log the answers of a test, if there are any, as the table `test/predictions`."""

        def log() -> None:
            if path.is_file():
                self.log_table("test/predictions", *list_answers(read_answers(path)))

        self.attempt("read the answers", log)

    def log_page(self, name: str, html: str) -> None:
        """Log an HTML page."""

        def log() -> None:
            import wandb  # noqa: PLC0415  takes seconds

            page = wandb.Html(html, inject=False)
            self._send(lambda: self.run.log({name: page}))

        self.attempt("save the page", log)

    def summarise(self, figures: Mapping[str, Any]) -> None:
        """Write figures to the run's summary."""
        self.attempt("save the summary", lambda: self.run.summary.update(dict(figures)))

    def end(self, code: int = 0, reason: str = "") -> None:
        """End the W&B run, so that the next one of this process starts a new one.

        Args:
            code: exit code of the command; unless it is 0, W&B marks the run as failed.
            reason: why the command ends early; online, W&B sends it as an alert to those who subscribed to alerts.
        """
        if self.run is None:
            return
        if reason and self.is_online:
            title = f"{self.run.name} ended with exit code {code}"
            alert = partial(self.run.alert, title=title, text=reason, level="ERROR")
            self.attempt("send the alert", partial(self._send, alert))
        self._answers = True  # what came before an error is sent, too
        finish = partial(self.run.finish, exit_code=code)
        # A command that was told to stop has little time left.
        self.attempt("end the run", partial(self._send, finish, must_end=False) if code else finish)
        self.run = None

    def _send(self, action: Callable[[], object], must_end: bool = True) -> None:
        """Run an action that may wait for the server, online for `PATIENCE_SECONDS` at most.

        Raises:
            TimeoutError: it has not ended, and `must_end`; it goes on in the background.
        """
        if not self.is_online:
            action()
            return
        errors: list[Exception] = []

        def run() -> None:
            try:
                action()
            except Exception as error:  # raised below
                errors.append(error)

        thread = Thread(target=run, daemon=True)
        thread.start()
        thread.join(PATIENCE_SECONDS)
        if errors:
            raise errors[0]
        if thread.is_alive() and must_end:
            raise TimeoutError(f"the server has not answered for {PATIENCE_SECONDS} s")

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        """Run an action; log an error as a warning. It is not tried again; nothing is if the server does not answer."""
        if self.run is None or not self._answers or what in self._failed:
            return
        try:
            action()
        except Exception as error:  # the client raises many unrelated types, and files may be unreadable
            self._failed.add(what)
            self._answers = not isinstance(error, TimeoutError)
            logger.warning("W&B could not %s (%s); `wandb sync` uploads what is on disk", what, describe_error(error))


def start_record(folder: Path, subject: Subject, config: Mapping[str, Any]) -> Record:
    """Start the W&B run of a command, in `<folder>/wandb`, unless WANDB_MODE is disabled.

    W&B works offline unless a key is configured (WANDB_API_KEY or ~/.netrc) or WANDB_MODE is set. A server that does
    not answer delays the start or the end by some seconds. With invalid settings W&B works offline without them; if
    that fails, too, nothing is recorded. A command that is repeated continues its W&B run. Under a sweep's agent, a run
    of METHOD is the run that the agent waits for; the runs that it builds on are separate W&B runs.

    Args:
        folder: folder for W&B's files.
        subject: what the command is about.
        config: configuration to record.
    """
    if not os.environ.get("WANDB_MODE", "-").strip():
        del os.environ["WANDB_MODE"]  # W&B refuses an empty value
    if os.environ.get("WANDB_MODE", "").strip().lower() == "disabled":
        return Record()
    place = folder.absolute() / "wandb"
    for name in ("CACHE", "DATA", "ARTIFACT"):  # W&B would use the home and the working directory
        os.environ[f"WANDB_{name}_DIR"] = str(place / name.lower())
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it sends even offline: 14 s a run
    requested = os.environ.get("METHOD", subject.method) == subject.method  # make exports METHOD
    awaited = AGENT_VARIABLES[0] in os.environ and requested and subject.kind in SWEPT_KINDS
    try:
        place.mkdir(parents=True, exist_ok=True)
        return Record(_start_wandb_run(folder, subject, config, awaited))
    except Exception as error:  # the client raises many unrelated types
        logger.warning(
            "W&B cannot be used (%s): logging offline; upload later with `wandb sync %s/wandb/offline-run-*`",
            describe_error(error), folder,
        )  # fmt: skip
    # So that the next run of this process neither waits again nor reads the invalid settings.
    for name in [name for name in os.environ if name.startswith("WANDB_") and name not in PRESERVED_VARIABLES]:
        del os.environ[name]
    os.environ |= {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(place / "config")}  # not the home's
    try:
        return Record(_start_wandb_run(folder, subject, config, False, uuid.uuid4().hex))  # the first id may be in use
    except Exception as again:
        logger.warning("W&B cannot be used at all (%s): nothing is recorded there", describe_error(again))
        os.environ["WANDB_MODE"] = "disabled"
        return Record()


def _start_wandb_run(
    folder: Path, subject: Subject, config: Mapping[str, Any], awaited: bool, identity: str | None = None
) -> Any:
    """Start a W&B run.

    Args:
        folder: see `start_record`.
        subject: see `start_record`.
        config: see `start_record`.
        awaited: whether a sweep's agent waits for this run.
        identity: id of the W&B run; None for the one in the folder, or a new one.
    """
    import wandb  # noqa: PLC0415  takes seconds

    if "@" in os.environ.get("WANDB_BASE_URL", ""):  # the client prints the URL
        raise ValueError("WANDB_BASE_URL contains a password: remove it and set WANDB_API_KEY")
    trains = subject.kind in ("train", "pretraining")
    kept = folder / "wandb" / ("id" if trains else f"{subject.kind}.id")
    if awaited:
        kept.write_text(os.environ[AGENT_VARIABLES[1]])
    elif identity is None:
        if not kept.is_file():
            kept.write_text(uuid.uuid4().hex)
        identity = kept.read_text()
    wandb.teardown()  # W&B caches the environment, and an earlier run in this process may have failed
    named: dict[str, str | int] = {"dataset": subject.dataset, "method": subject.method}
    named |= {"seed": int(subject.seed[4:])} if re.fullmatch(r"seed\d+", subject.seed) else {}
    with contextlib.nullcontext() if awaited else _without_agent():
        mode: Any = os.environ.get("WANDB_MODE")
        mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        run = wandb.init(
            project=None if awaited else os.environ.get("WANDB_PROJECT", PROJECT),
            name=subject.name,
            group=subject.group,
            job_type=subject.kind,
            tags=[part[:64] for part in (subject.dataset, subject.method, subject.seed) if part],  # the maximum length
            id=None if awaited else identity,
            resume="allow",
            dir=folder,
            mode=mode,
            config={**config, **named},
            settings=wandb.Settings(
                init_timeout=PATIENCE_SECONDS, finish_timeout=UPLOAD_SECONDS, silent=mode == "offline"
            ),
        )
    if trains:
        run.define_metric("trainer/global_step")  # the horizontal axis
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


def describe_error(error: Exception) -> str:
    """Return an error as one line without the values of settings, which may be the key."""
    if getattr(error, "title", "") == "Settings" and callable(errors := getattr(error, "errors", None)):  # of pydantic
        return "; ".join(f"WANDB_{'.'.join(map(str, part['loc'])).upper()}: {part['type']}" for part in errors())
    text = " ".join(str(error).split())
    for name, value in os.environ.items():
        if name.startswith("WANDB_") and value and re.search("KEY|TOKEN|PASS|SECRET", name):
            text = text.replace(value, "...")
    return f"{type(error).__name__}: " + re.sub(r"//[^/@\s]*@", "//...@", text)[:300]


@contextlib.contextmanager
def _without_agent() -> Iterator[None]:
    """Hide the variables of a sweep's agent during the block."""
    hidden = {name: os.environ.pop(name) for name in AGENT_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ |= hidden


# Artifacts, tables and figures of this project


def name_artifact(*parts: str) -> str:
    """Return an artifact's name from its parts, with the characters that W&B allows."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", "-".join(parts))


def describe_checkpoint(run: Path) -> Content:
    """Return the artifact with the weights of a run's best epoch: `best`; also `latest`, until it is trained anew."""
    dataset, method, seed = run.absolute().parts[-3:]
    name = name_artifact(dataset, method, seed, "checkpoint")
    return Content(name, "model", {"best.ckpt": run / "best.ckpt"}, aliases=("best", "latest"))


def describe_weights(path: Path, kind: WeightsKind) -> Content:
    """Return the artifact with a file of weights, named after the run that wrote it, else after the file."""
    path = path.absolute()
    written = path.parts[-4:-1] if (path.parent / CONFIG).is_file() else (path.stem,)
    return Content(name_artifact(*written, kind), kind, {path.name: path})


def list_answers(table: AnswersTable) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of a test's answers.

    The marks of a case become a column of numbers, 1 right and 0 wrong, whose mean is the accuracy of any selection of
    questions; it is empty for a question that the case does not answer.
    """
    right = {f"{case} is right": [None if mark is None else int(mark) for mark in marks]
             for case, marks in table.right.items()}  # fmt: skip
    columns = {**table.asked, **table.given, **right}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def list_figures(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in a nested dictionary, by the path of their keys."""
    figures: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            figures |= list_figures(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            figures[f"{prefix}{key}"] = value
    return figures


def list_accuracies(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the accuracies in `results.json`: `test/<case>/<group>`, and `test/accuracy/<group>` of the first case."""
    figures: dict[str, float] = {}
    for place, (case, groups) in enumerate((results.get("accuracy") or {}).items()):
        values = {group: cells["all"]["value"] for group, cells in groups.items() if "all" in cells}
        figures |= {f"test/{case}/{group}": value for group, value in values.items()}
        figures |= {f"test/accuracy/{group}": value for group, value in values.items() if not place}
    return figures


def record_evaluation(run: Path, folder: Path, results: Mapping[str, Any]) -> None:
    """Record an evaluation of a finished run, with its figures, answers and probes.

    Args:
        run: folder of the run.
        folder: folder of the evaluation.
        results: content of its `results.json`.
    """
    record = start_record(folder, Subject.of_run(folder, "control"), {"arguments": results["arguments"]})
    if record.run is None:
        return
    record.use(describe_checkpoint(run))
    costs = {part: results[part] for part in ("parameters", "bytes", "seconds") if part in results}
    record.summarise({**results.get("metrics", {}), **list_accuracies(results), **list_figures(costs)})
    record.log_answers(folder / PREDICTIONS)
    if probes := results.get("probes"):
        columns = ["what", "from", "clips", "score", "low", "high", "chance", "majority"]
        scores = [{**probe, "score": probe.get("accuracy", probe.get("degrees"))} for probe in probes]
        rows = [[score[column] for column in columns] for score in scores]
        record.log_table("privacy/probes", columns, rows)
        record.summarise({f"privacy/{score['what']}/{score['from']}": score["score"] for score in scores})
    record.end()
