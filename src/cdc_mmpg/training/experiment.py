"""A run from its configuration: Lightning's command line with our links, checkpoints and results."""

import difflib
import inspect
import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import torch
import yaml
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_only

from cdc_mmpg.data.batch import EpochDataModule, plan_batches
from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.evaluation.evaluate import evaluation
from cdc_mmpg.files import atomic_write, expand_home, file_digest, lock_folder, remove_leftovers
from cdc_mmpg.launchers import find_launch
from cdc_mmpg.media.text import vocabulary_size
from cdc_mmpg.methods.base import Answering, Method
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head
from cdc_mmpg.models.weights import load_checkpoint
from cdc_mmpg.processors import count_processors
from cdc_mmpg.results import (
    ANNOTATED,
    CONFIG,
    INPUTS,
    RESULTS,
    RESUME,
    SURROUNDINGS,
    annotations_digest,
    find_dataset_config,
    fingerprint,
    provenance,
    read_inputs,
    read_results,
    read_settings,
    write_json,
)
from cdc_mmpg.training.captions import CaptionDataModule
from cdc_mmpg.training.checkpointing import AtomicCheckpointIO, StopOnSignal, checkpoint_callbacks, newest_state
from cdc_mmpg.training.features import FeatureDataModule
from cdc_mmpg.training.group import GROUPS, GroupStrategy, cluster_environment, parting
from cdc_mmpg.training.loggers import ExampleTable, close, loggers
from cdc_mmpg.training.matmul import Matmul, set_matmul
from cdc_mmpg.training.progress import EpochLines, draws_bar
from cdc_mmpg.training.sessions import SessionDataModule

logger = logging.getLogger(__name__)

OUR_LOGGERS = ("cdc_mmpg", "data_modules")
ANSWERS = "answers.txt"  # of a run: the word of class k in line k
LINKED = {  # what is written once and handed on
    "data.init_args.seed": "seed_everything",
    "model.init_args.seed": "seed_everything",
    "model.init_args.encoder.num_frames": "data.init_args.num_frames",
    "model.init_args.encoder.image_size": "data.init_args.image_size",
    "model.init_args.encoder.text_length": "data.init_args.text_length",
    "model.init_args.head.init_args.num_classes": "data.init_args.num_classes",
}
# Paths in which ~ stands for the home folder.
PATHS = ("trainer.default_root_dir", "data.init_args.root", "data.init_args.cache_dir", "data.init_args.vocab",
         "model.init_args.encoder.checkpoint", "model.init_args.adr")  # fmt: skip
PARTS = ("seed_everything", "matmul", "compile", "trainer", "model", "data")

# Weights stay float32: the generated layer and the loss are computed in it.
PRECISIONS = ("None", "32", "32-true", "bf16", "bf16-mixed", "16", "16-mixed")


# Lightning's advice on what is meant here as it is.
for advice in (
    "LightningCLI's args parameter",
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches",
    r"Found .* module\(s\) in eval mode",
    "`isinstance\\(treespec, LeafSpec\\)`",
    "You're resuming from a checkpoint that ended before the epoch",
    "Experiment logs directory",
    "The `srun` command is available",
):
    warnings.filterwarnings("ignore", message=f".*{advice}")

_CheckpointConnector._hpc_resume_path = None  # what Lightning's own requeue left in the folder is never read


class Parser(LightningArgumentParser):
    """A parser whose refusals are `ConfigError`s."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)  # --trainer.max_epoch is an error, not max_epochs

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage, which is pages long.

        Raises:
            ConfigError: always.
        """
        # Of the report on every alternative type of an argument, what is wrong with ours.
        noise = r"Union subtypes|Subtypes: \[|^\s*Errors:$|<class 'NoneType'>|Given value"
        raise ConfigError("\n".join(line for line in message.strip().splitlines() if not re.search(noise, line)))


UNKNOWN_KEY = re.compile(r"(?:[Kk]ey|Option) ['\"]([\w.]+)['\"] is not|[Uu]nrecognized arguments?: --([\w.]+)")


def _explain_unknown_key(message: str, given: Sequence[str]) -> str:
    """Return the parser's message, and of an unknown key its whole dotted path and the nearest path that exists.

    Args:
        message: of the parser, which names the last part of the key alone.
        given: the dotted paths of all that was given.
    """
    unknown = UNKNOWN_KEY.search(message)
    if not unknown:
        return message
    name, known = unknown[1] or unknown[2], _known_paths()
    path = next((key for key in given if f".{key}".endswith(f".{name}") and key not in known), name)
    leaves: dict[str, list[str]] = {}
    for key in known:
        leaves.setdefault(key.rpartition(".")[2], []).append(key)
    leaf = path.rpartition(".")[2]
    near = [leaf] if leaf in leaves else sorted(other for other in leaves if other.startswith(leaf))
    near = near or difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.5)
    if not near:
        return f"{path}: there is no such key, and none that exists is like it"
    nearest = max(leaves[near[0]], key=lambda key: difflib.SequenceMatcher(None, key, path).ratio())
    return f"{path}: there is no such key; the nearest that exists is {nearest}"


def _known_paths() -> list[str]:
    """Return the dotted paths of all that a configuration can hold, but for what follows from others (links)."""

    def subclasses(cls: type[Any]) -> Iterator[type[Any]]:
        yield cls
        for child in cls.__subclasses__():
            yield from subclasses(child)

    places = {
        "trainer.": [Trainer],
        "data.init_args.": (cls for cls in subclasses(EpochDataModule) if not cls.__module__.startswith("cdc_mmpg")),
        "model.init_args.": subclasses(Method),
        "model.init_args.encoder.": [AllInOne],
        "model.init_args.head.init_args.": subclasses(Head),
    }
    paths = {
        f"{place}{name}"
        for place, classes in places.items()
        for cls in classes
        for name in inspect.signature(cls).parameters
    }
    paths -= {*LINKED, "model.init_args.encoder.vocab_size"}
    return sorted(paths | {"config", "seed_everything", "matmul", "compile", "data.class_path", "model.class_path",
                           "model.init_args.head.class_path"})  # fmt: skip


def _given_paths(arguments: Sequence[str] | dict[str, Any]) -> list[str]:
    """Return the dotted paths of all that a command line, or a configuration, gives."""
    if isinstance(arguments, dict):
        return [path for path, _ in _flat(arguments)]
    paths = [argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")]
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        file = Path(value if equals else following)
        if name in ("--config", "-c") and file.is_file():
            paths += [path for path, _ in _flat(yaml.safe_load(file.read_text(encoding="utf-8")))]
    return paths


class Experiment(LightningCLI):
    """One run: `fit` trains, tests the best epoch and writes the results; the other subcommands are Lightning's.

    Args:
        arguments: of the command line, the subcommand first; or a configuration, as `config.yaml` holds it.
        run: whether there is a subcommand to run.

    Raises:
        ConfigError: an argument that nothing knows, or the folder holds a run with another configuration.
    """

    def __init__(self, arguments: Sequence[str] | dict[str, Any], run: bool = True) -> None:
        self.arguments = [] if isinstance(arguments, dict) else list(arguments)
        with ExitStack() as self.until_end:  # Lightning's constructor runs the subcommand, too
            super().__init__(
                Method,
                EpochDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,  # ours is written before training, compared, and atomic
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_class=Parser,
                args=arguments if isinstance(arguments, dict) else self.arguments,
                run=run,
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """All but predict, which `cdc_mmpg.commands.predict` does for any clip; a run finds its own checkpoints."""
        commands = {name: set(skip) for name, skip in LightningCLI.subcommands().items() if name != "predict"}
        commands["fit"] |= {"ckpt_path", "weights_only"}
        return commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What the dataset and the seed fix is written once and handed on; what never varies is set."""
        parser.add_argument(
            "--matmul", type=Matmul, default="highest",
            help="how a GPU multiplies float32: exactly (highest), or faster in TensorFloat-32 (high)",
        )  # fmt: skip
        parser.add_argument("--compile", type=bool, default=False, help="compile the encoder's blocks (torch.compile)")
        parser.set_defaults(
            {
                "trainer.use_distributed_sampler": False,  # `batch.EpochBatches` shares out
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
                "trainer.log_every_n_steps": 10,
            }
        )
        for target, source in LINKED.items():
            parser.link_arguments(source, target)
        parser.link_arguments(
            "data.init_args.vocab",
            "model.init_args.encoder.vocab_size",
            compute_fn=lambda vocab: vocabulary_size(vocab and expand_home(vocab)),
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; name an unknown key by its whole path."""
        try:
            super().parse_arguments(parser, args)
        except ConfigError as error:
            raise ConfigError(_explain_unknown_key(str(error), _given_paths(args))) from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The whole configuration, as `config.yaml` holds it."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        dump = self._parser(self.subcommand).dump(config, skip_unset=False, skip_link_targets=True, format="yaml")
        return {key: value for key, value in yaml.safe_load(dump).items() if key in PARTS}

    @property
    def folder(self) -> Path:
        """Of the run."""
        folder = self._get(self.config, "trainer")["default_root_dir"]
        if folder is None:
            raise ConfigError(
                "--trainer.default_root_dir is missing: the folder of the run, <dataset>/<method>/seed<N>"
            )
        return Path(folder)

    def before_instantiate_classes(self) -> None:
        """Refuse what makes no sense; write out what ~ stands for."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        for name in PATHS:
            if isinstance(value := config.get(name), str):
                config[name] = expand_home(value)
        self._check_pair()
        set_matmul(self._get(self.config, "matmul"))
        trainer = self._get(self.config, "trainer")
        if trainer["accumulate_grad_batches"] != 1:
            raise ConfigError(
                f"accumulate_grad_batches is {trainer['accumulate_grad_batches']}: how many batches are accumulated "
                "follows from data.init_args.batch_size, of a whole step, and data.init_args.per_device, at once"
            )
        if str(trainer["precision"]) not in PRECISIONS:
            raise ConfigError(f"precision {trainer['precision']!r}: use 32-true, bf16-mixed or 16-mixed (PRECISION=)")
        if self.subcommand == "fit":
            if trainer["max_steps"] < 1 and trainer["max_epochs"] is not None and trainer["max_epochs"] < 1:
                raise ConfigError(f"max_epochs is {trainer['max_epochs']}: max_epochs must be at least 1 (EPOCHS=)")
            self.identity = {"fingerprint": fingerprint(self.arguments), **provenance()}

    def _claim(self, trainer: Trainer) -> None:
        """Refuse the run's folder where another run has it, else lock it for this one and write what begins here.

        The first process holds the lock for all processes of the run; the others write nothing in the folder.
        """
        if trainer.is_global_zero:
            self.until_end.enter_context(lock_folder(self.folder))
        settings = self.settings
        files = {
            f"content of model.{key}": file_digest(Path(value))
            for key, value in _flat(settings["model"])
            if isinstance(value, str) and Path(value).is_file()
        }
        files[ANNOTATED] = annotations_digest(Path(settings["data"]["init_args"]["root"]))
        if not is_begun(self.folder, settings, files) and trainer.is_global_zero:
            remove_leftovers(self.folder / RESUME, locked=True)
            write_json(files, self.folder / INPUTS)
            with atomic_write(self.folder / CONFIG) as file:
                file.write(yaml.safe_dump(settings, sort_keys=False).encode())

    def _check_pair(self) -> None:
        """Whether dataset, task and method go together."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        method, data, head = (
            resolve_name(part["class_path"])
            for part in (config["model"], config["data"], config["model"]["init_args"]["head"])
        )
        if head.task != data.task:
            raise ConfigError(
                f"{data.__name__} is a dataset for {data.task}, {head.__name__} a head for {head.task}: "
                "leave the head to the dataset's configuration"
            )
        given = method.reads == "sessions" and config["data"]["init_args"].get("domains")
        if method.reads not in data.views and not given:
            lacking = {"sessions": "does not know its clips' devices, and sessions need them: give it some "
                                   f"(ARGS=--data.init_args.domains={' or '.join(data.DOMAINS)}), take",
                       "captions": "has no captions to pretrain an encoder with: take"}[method.reads]  # fmt: skip
            raise ConfigError(
                f"{method.__name__} does not go with {data.__name__}, which {lacking} another method (METHOD=), or the "
                "embedded dataset (DATASET=synthetic)"
            )

    def _view(self) -> EpochDataModule:
        """Return the view of the dataset that the method reads; of a frozen encoder's, features instead of frames."""
        if self.model.reads == "captions":
            return CaptionDataModule(self.dataset)
        if self.model.reads == "sessions":
            return SessionDataModule(self.dataset, self.model.encoder, self.model.head, casts=self.model.oracle)
        if not self.model.train_encoder:
            return FeatureDataModule(self.dataset, self.model.encoder, self.model.head)
        return self.dataset

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Choose the view of the dataset; build Lightning's trainer with our checkpoints, logs and signals.

        Which process logs is for the trainer to say: the environment may name a rank (RANK, SLURM_PROCID) that has
        nothing to do with this run.
        """
        self.dataset: Any = self.datamodule  # itself, not a view of it
        self.datamodule: EpochDataModule = self._view()
        if self.subcommand and self._get(self.config_init, "compile"):
            self.model.encoder.compile_blocks()
        config, launch = self._get(self.config_init, "trainer"), find_launch()
        kwargs["devices"], kwargs["num_nodes"] = devices, nodes = launch.share(config["devices"], config["num_nodes"])
        several = wants_several_processes(devices, nodes)
        bar = draws_bar(config["enable_progress_bar"])
        kwargs |= {"logger": False, "plugins": [*(config["plugins"] or []), AtomicCheckpointIO()]}
        kwargs["enable_progress_bar"] = bar
        if self.subcommand == "fit":
            kwargs["callbacks"] = [
                *(config["callbacks"] or []),
                Timer(),
                *([] if bar else [EpochLines()]),
                StopOnSignal(self.folder),
                ExampleTable(self.folder, self.dataset),
                *checkpoint_callbacks(self.folder, self.model.monitor, self.model.monitor_mode),
            ]
        if config["strategy"] in ("auto", "ddp") and several:
            # Evaluation counts every sample once, so processes take different numbers of steps there: no collective
            # may be part of a forward pass there.
            kwargs["strategy"] = GroupStrategy(
                forward_sync_buffers=False,
                find_unused_parameters=self.model.trains_in_turn,
                gradient_as_bucket_view=True,
            )
        try:
            if environment := cluster_environment(launch, several):
                kwargs["plugins"].append(environment)
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, RuntimeError) as error:
            # More devices than there are: it names both numbers. Or SLURM's tasks are set as Lightning refuses them.
            if isinstance(error, MisconfigurationException) or "SLURM" in str(error):
                raise ConfigError(str(error)) from error
            raise
        if self.subcommand:
            launch.check_processes(trainer.world_size, trainer.num_nodes, alone=GROUPS not in os.environ)
            self.until_end.enter_context(parting(trainer))
        trainer.accumulate_grad_batches = self._count_accumulated(trainer.world_size)
        rank_zero_only.rank = trainer.global_rank
        for name in OUR_LOGGERS:
            logging.getLogger(name).setLevel(logging.INFO if trainer.is_global_zero else logging.ERROR)
        if self.subcommand == "fit":
            self._claim(trainer)
            if trainer.is_global_zero:
                trainer.loggers = loggers(self.folder, self.settings)
                trainer.callbacks.insert(0, LearningRateMonitor("step"))
        return trainer

    def _describe_computing(self) -> dict[str, Any]:
        """Return in which precision a run is computed, on which card, and with which libraries."""
        found = {name: self.settings[name] for name in ("matmul", "compile")}
        found |= {"precision": str(self.trainer.precision), "torch": torch.__version__}
        if self.trainer.strategy.root_device.type == "cuda":
            found |= {
                "card": torch.cuda.get_device_name(self.trainer.strategy.root_device),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            }
        return found

    def _recipe_step(self) -> int:
        """Return how many questions a step has in the dataset's configuration, whatever the command line says."""
        path = find_dataset_config(self.arguments)
        given = yaml.safe_load(path.read_text(encoding="utf-8"))["data"].get("init_args") or {} if path else {}
        default = inspect.signature(type(self.dataset)).parameters["batch_size"].default
        return int(given.get("batch_size", default))

    def _count_accumulated(self, processes: int) -> int:
        """Return how many batches a process accumulates to an optimizer step.

        Raises:
            ConfigError: the step cannot be shared out, see `plan_batches`, or the method needs all of it at once.
        """
        accumulated = plan_batches(self.datamodule.batch_size, self.datamodule.per_device, processes).accumulated
        if accumulated > 1 and (reason := self.model.needs_whole_step):
            raise ConfigError(
                f"per_device is {self.datamodule.per_device}, so that {accumulated} batches are accumulated to a step "
                f"of {self.datamodule.batch_size} questions, but {reason}: leave out data.init_args.per_device, take "
                "more devices (DEVICES=), or PRECISION=bf16-mixed, which takes less memory"
            )
        return accumulated

    def fit(self, model: Method, datamodule: EpochDataModule) -> None:
        """Train, or go on; test the best epoch; write what later runs need; write the results, last."""
        if model.reads != "captions" and self.settings["model"]["init_args"]["encoder"]["checkpoint"] is None:
            logger.warning(
                "no CHECKPOINT: the encoder starts at random. The paper's starts from All-in-One's pretraining on "
                "millions of clips; figures from scratch are far below it and say little about the methods."
            )
        trainer, parameters = self.trainer, model.parameter_counts()
        logger.info(
            "%s: %s parameters on the device, %s in the cloud, %s train",
            self.folder, *(f"{number:,}" for number in parameters),
        )  # fmt: skip
        try:
            trainer.fit(model, datamodule, ckpt_path=newest_state(self.folder), weights_only=True)
        except OSError as error:  # of the CSV logger, whose writes name no file
            error.filename = error.filename or str(self.folder)
            raise
        if not (self.folder / "best.ckpt").is_file():
            raise CheckpointError(f"{self.folder}/best.ckpt is gone: delete {self.folder} to train anew")
        best, timer = trainer.checkpoint_callback, next(c for c in trainer.callbacks if isinstance(c, Timer))
        metrics = {best.monitor: float(best.best_model_score)}
        metrics |= trainer.test(model, datamodule, ckpt_path=best.best_model_path, verbose=False, weights_only=True)[0]
        if not trainer.is_global_zero:  # `parting` waits for what the first process writes
            return
        model.export(self.folder)
        with atomic_write(self.folder / ANSWERS) as file:
            file.write("\n".join(self.dataset.answers()).encode())
        summary = (datamodule if model.reads == "captions" else self.dataset).summary()
        dataset, method, _ = self.folder.absolute().parts[-3:]
        results = {
            "dataset": dataset,
            "method": method,
            "seed": self.settings["seed_everything"],
            "task": self.dataset.task,
            "protocol": self.dataset.protocol,
            "splits": self.dataset.notes,
            "published": self.dataset.published(),
            "domains": self.dataset.domains and {"kind": self.dataset.domains, "held_out": self.dataset.held_out},
            "metrics": metrics,
            "monitor": best.monitor,
            "best_epoch": load_checkpoint(Path(best.best_model_path))["epoch"],
            "epochs": trainer.current_epoch,
            "questions_per_step": datamodule.batch_size,
            "recipe_questions_per_step": self._recipe_step(),
            "classes": model.head.outputs,
            "questions": {split: row["questions"] for split, row in summary.items()},
            "data": summary,
            **(
                evaluation(self.dataset, model.outcomes["test"], self.folder / "predictions.test.csv")
                if isinstance(model, Answering)
                else {}
            ),
            **({"labels": summary["train"]} if model.reads == "captions" else {}),
            "encoder": self.settings["model"]["init_args"]["encoder"]["checkpoint"],
            "parameters": parameters._asdict(),
            "reasoner": getattr(getattr(model, "adr", None), "preset", None),
            "bytes": model.traffic()._asdict(),
            "payloads": {name: {"bytes": size} for name, size in model.payloads().items()},
            "seconds": {"train": timer.time_elapsed("train"), "test": timer.time_elapsed("test")},
            "machine": f"{count_processors()} processors, {platform.system()} {platform.machine()}",
            "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
            "computed": self._describe_computing(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "arguments": self.arguments,
            **self.identity,
        }
        write_json(results, self.folder / RESULTS)
        shutil.rmtree(self.folder / RESUME, ignore_errors=True)
        close(trainer.loggers, results)


def check_arguments(arguments: Sequence[str]) -> None:
    """Parse the arguments of a training run, and compare them with the run in its folder; nothing is built.

    Raises:
        ConfigError: see `Experiment` and `is_begun`.
    """

    class Parsed(Experiment):
        """An experiment that ends when its arguments are parsed."""

        def instantiate_classes(self) -> None:
            """Build nothing."""

        def _run_subcommand(self, subcommand: str) -> None:
            """Run nothing."""

    run = Parsed(arguments)
    with suppress(SystemExit):  # finished
        is_begun(run.folder, run.settings, read_inputs(run.folder))


def is_begun(folder: Path, settings: dict[str, Any], files: dict[str, str]) -> bool:
    """Return whether a folder holds the states of this very run; False where no run has trained there yet.

    Args:
        folder: of the run.
        settings: its configuration.
        files: digests of the files that it begins with, by argument; `inputs.json` keeps them.

    Raises:
        ConfigError: the folder holds a run with another configuration or other files; names the differing keys. Or what
            it holds is damaged.
        SystemExit: it holds this very run, finished.
    """
    finished = (folder / RESULTS).is_file()
    if not (folder / CONFIG).is_file() or not (finished or any(folder.glob(f"{RESUME}/*.ckpt"))):
        return False
    if finished and read_results(folder) is None:
        raise ConfigError(f"{folder / RESULTS}: damaged: delete {folder} to train anew, or put the file back")
    there = dict(_flat(read_settings(folder) | read_inputs(folder)))
    asked = dict(_flat(settings | files))
    # A run that goes on checks its data itself; a finished one cannot.
    own = {"data.init_args.root", "data.init_args.vocab", ANNOTATED}
    free = {*SURROUNDINGS, ANNOTATED} - (own if finished else set())
    for values in (there, asked):
        for key in ("data.init_args.root", "data.init_args.vocab"):
            values[key] = values.get(key) and str(Path(values[key]).resolve())
    differing = sorted(key for key in there.keys() | asked.keys() if there.get(key) != asked.get(key))
    lines = [f"  {key}: {there.get(key)!r} there, {asked.get(key)!r} asked for" for key in differing if key not in free]
    if lines:
        raise ConfigError(
            f"{folder} holds a run with another configuration:\n" + "\n".join(lines) + "\n"
            "Type that run's command to go on with it, or delete or rename the folder."
        )
    if finished:
        print(f"{folder}: finished; delete the folder to train anew")
        raise SystemExit(0)
    return True


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries by dotted key."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def wants_several_processes(devices: Any, num_nodes: int) -> bool:
    """Whether Lightning's `devices` and `num_nodes` ask for more than one process."""
    if devices in ("auto", -1, "-1"):
        return num_nodes > 1 or torch.cuda.device_count() > 1
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part] if "," in devices else int(devices)
    return num_nodes > 1 or (devices if isinstance(devices, int) else len(devices)) > 1
