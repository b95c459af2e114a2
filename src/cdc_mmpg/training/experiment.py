"""Run of a configuration: Lightning's command line with this project's links, checkpoints and results."""

import inspect
import logging
import os
import platform
import shutil
import signal
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_only

from cdc_mmpg.data.sampling import EpochDataModule, plan_batches
from cdc_mmpg.errors import CDCError, CheckpointError, ConfigError
from cdc_mmpg.evaluation.evaluate import evaluate_outcomes
from cdc_mmpg.files import atomic_write, expand_home, hash_file, lock_folder, remove_leftovers
from cdc_mmpg.launchers import find_launch
from cdc_mmpg.media.text import count_wordpieces
from cdc_mmpg.methods.answering import Answering
from cdc_mmpg.methods.base import Method
from cdc_mmpg.methods.corrected import Corrected
from cdc_mmpg.models.weights import load_checkpoint
from cdc_mmpg.processors import count_processors
from cdc_mmpg.program import REQUEUE_SIGNAL, Stopped
from cdc_mmpg.results import (
    ANNOTATIONS_KEY,
    CONFIG,
    INPUTS,
    PREDICTIONS,
    RESULTS,
    RESUME,
    describe_provenance,
    find_dataset_config,
    hash_annotations,
    hash_command,
    read_inputs,
    write_json,
)
from cdc_mmpg.training.captions import CaptionDataModule
from cdc_mmpg.training.checkpointing import (
    AtomicCheckpointIO,
    StopOnSignal,
    build_checkpoint_callbacks,
    find_newest_state,
)
from cdc_mmpg.training.checks import check_pair, check_trainer, has_begun
from cdc_mmpg.training.corrections import CorrectedDataModule
from cdc_mmpg.training.features import FeatureDataModule
from cdc_mmpg.training.group import GROUPS_VARIABLE, GroupStrategy, choose_cluster_environment, leave_group
from cdc_mmpg.training.loggers import ExampleTable, RunRecord, build_loggers, find_record, finish_loggers
from cdc_mmpg.training.matmul import Matmul, set_matmul
from cdc_mmpg.training.parser import LINKED_KEYS, Parser, explain_unknown_key, flatten, list_given_paths
from cdc_mmpg.training.progress import choose_progress, draws_bar
from cdc_mmpg.training.sessions import SessionDataModule

logger = logging.getLogger(__name__)

LOGGER_NAMES = ("cdc_mmpg", "data_modules")
ANSWERS_FILE = "answers.txt"  # in the folder of a run: line k is the word of class k
# Keys of paths in which ~ is expanded.
PATH_KEYS = ("trainer.default_root_dir", "data.init_args.root", "data.init_args.cache_dir", "data.init_args.vocab",
         "model.init_args.encoder.checkpoint", "model.init_args.adr", "model.init_args.reading")  # fmt: skip
CONFIGURATION_PARTS = ("seed_everything", "matmul", "compile", "trainer", "model", "data")

# Warnings of Lightning about settings that are intended here.
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

_CheckpointConnector._hpc_resume_path = None  # never resume from files of Lightning's own requeue


class Experiment(LightningCLI):
    """Experiment of a run: `fit` trains, tests the best epoch and writes the results; the others are Lightning's.

    Args:
        arguments: command line with the subcommand first; or a configuration, in the form of `config.yaml`.
        run: whether to run the subcommand.

    Raises:
        ConfigError: an argument is unknown, or the folder has a run with another configuration.
    """

    def __init__(self, arguments: Sequence[str] | dict[str, Any], run: bool = True) -> None:
        self.arguments = [] if isinstance(arguments, dict) else list(arguments)
        with ExitStack() as self.until_end:  # Lightning's constructor runs the subcommand, too
            super().__init__(
                Method,
                EpochDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,  # replaced by `_lock_folder`: written before training, compared, and atomic
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_class=Parser,
                args=arguments if isinstance(arguments, dict) else self.arguments,
                run=run,
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return all subcommands but predict (see `cdc_mmpg.commands.predict`); a run finds its checkpoints itself."""
        commands = {name: set(skip) for name, skip in LightningCLI.subcommands().items() if name != "predict"}
        commands["fit"] |= {"ckpt_path", "weights_only"}
        return commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link settings that follow from the dataset and the seed, so that they are set once; set fixed defaults."""
        parser.add_argument(
            "--matmul", type=Matmul, default="highest",
            help="how a GPU multiplies float32: exactly (highest), or faster in TensorFloat-32 (high)",
        )  # fmt: skip
        parser.add_argument("--compile", type=bool, default=False, help="compile the encoder's blocks (torch.compile)")
        parser.set_defaults(
            {
                "trainer.use_distributed_sampler": False,  # `sampling.EpochBatches` distributes the samples
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
                "trainer.log_every_n_steps": 10,
            }
        )
        for target, source in LINKED_KEYS.items():
            parser.link_arguments(source, target)
        parser.link_arguments(
            "data.init_args.vocab",
            "model.init_args.encoder.vocab_size",
            compute_fn=lambda vocab: count_wordpieces(vocab and expand_home(vocab)),
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; name an unknown key by its full path."""
        try:
            super().parse_arguments(parser, args)
        except ConfigError as error:
            raise ConfigError(explain_unknown_key(str(error), list_given_paths(args))) from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Complete configuration, in the form of `config.yaml`."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        dump = self._parser(self.subcommand).dump(config, skip_unset=False, skip_link_targets=True, format="yaml")
        return {key: value for key, value in yaml.safe_load(dump).items() if key in CONFIGURATION_PARTS}

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        folder = self._get(self.config, "trainer")["default_root_dir"]
        if folder is None:
            raise ConfigError(
                "--trainer.default_root_dir is missing: set the folder of the run, <dataset>/<method>/seed<N>"
            )
        return Path(folder)

    def before_instantiate_classes(self) -> None:
        """Refuse invalid combinations of settings; expand ~ in paths."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        for name in PATH_KEYS:
            if isinstance(value := config.get(name), str):
                config[name] = expand_home(value)
        check_pair(config)
        set_matmul(self._get(self.config, "matmul"))
        trainer = self._get(self.config, "trainer")
        check_trainer(trainer)
        if self.subcommand == "fit":
            if trainer["max_steps"] < 1 and trainer["max_epochs"] is not None and trainer["max_epochs"] < 1:
                raise ConfigError(f"max_epochs is {trainer['max_epochs']}: max_epochs must be at least 1 (EPOCHS=)")
            self.identity = {"fingerprint": hash_command(self.arguments), **describe_provenance()}

    def _lock_folder(self, trainer: Trainer) -> None:
        """Lock the run's folder, refuse it if it has another run, and write the configuration of a new run.

        The first process holds the lock for all processes of the run; the others write nothing in the folder.
        """
        if trainer.is_global_zero:
            self.until_end.enter_context(lock_folder(self.folder))
        settings = self.settings
        files = {
            f"content of model.{key}": hash_file(Path(value))
            for key, value in flatten(settings["model"])
            if isinstance(value, str) and Path(value).is_file()
        }
        files[ANNOTATIONS_KEY] = hash_annotations(Path(settings["data"]["init_args"]["root"]))
        if not has_begun(self.folder, settings, files) and trainer.is_global_zero:
            remove_leftovers(self.folder / RESUME, locked=True)
            write_json(files, self.folder / INPUTS)
            with atomic_write(self.folder / CONFIG) as file:
                file.write(yaml.safe_dump(settings, sort_keys=False).encode())

    def _choose_view(self) -> EpochDataModule:
        """Return the view of the dataset that the method reads; with a frozen encoder, features instead of frames."""
        if self.model.reads == "captions":
            return CaptionDataModule(self.dataset)
        if isinstance(self.model, Corrected):
            return CorrectedDataModule(self.dataset, self.model.encoder, self.model.head, self.model.correction)
        if self.model.reads == "sessions":
            model = self.model
            return SessionDataModule(
                self.dataset, model.encoder, model.head, model.upload, model.virtual, model.oracle, model.reads_sets,
                model.jitters,
            )  # fmt: skip
        if not self.model.train_encoder:
            return FeatureDataModule(self.dataset, self.model.encoder, self.model.head, self.model.virtual)
        self.dataset.virtual = self.model.virtual
        return self.dataset

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Choose the view of the dataset; build Lightning's trainer with this project's checkpoints, logs and signals.

        The trainer decides which process logs: the environment may contain a rank (RANK, SLURM_PROCID) that does not
        belong to this run.
        """
        self.dataset: Any = self.datamodule  # the dataset itself, not a view
        self.datamodule: EpochDataModule = self._choose_view()
        if self.subcommand and self._get(self.config_init, "compile"):
            self.model.encoder.compile_blocks()
        config, launch = self._get(self.config_init, "trainer"), find_launch()
        devices, nodes = launch.resolve_devices(config["devices"], config["num_nodes"])
        kwargs |= {"devices": devices, "num_nodes": nodes}
        several = wants_several_processes(devices, nodes)
        kwargs |= {"logger": False, "plugins": [*(config["plugins"] or []), AtomicCheckpointIO()]}
        kwargs["enable_progress_bar"] = draws_bar(config["enable_progress_bar"])
        if self.subcommand == "fit":
            kwargs["callbacks"] = [
                *(config["callbacks"] or []),
                Timer(),
                *choose_progress(config["enable_progress_bar"], config["callbacks"] or []),
                StopOnSignal(self.folder),
                ExampleTable(self.folder, self.dataset),
                RunRecord(self.folder, self.settings, self.dataset),
                *build_checkpoint_callbacks(self.folder, self.model.monitor, self.model.monitor_mode),
            ]
        if config["strategy"] in ("auto", "ddp") and several:
            # Evaluation counts every sample once, so processes take different numbers of steps there, and a collective
            # in a forward pass would hang.
            kwargs["strategy"] = GroupStrategy(
                forward_sync_buffers=False,
                find_unused_parameters=self.model.trains_in_turn,
                gradient_as_bucket_view=True,
            )
        try:
            if environment := choose_cluster_environment(launch, several):
                kwargs["plugins"].append(environment)
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, RuntimeError) as error:
            # More devices than available (the message has both numbers), or SLURM tasks that Lightning refuses.
            if isinstance(error, MisconfigurationException) or "SLURM" in str(error):
                raise ConfigError(str(error)) from error
            raise
        if self.subcommand:
            launch.check_processes(trainer.world_size, trainer.num_nodes, alone=GROUPS_VARIABLE not in os.environ)
            self.until_end.enter_context(leave_group(trainer))
        trainer.accumulate_grad_batches = self._count_accumulated(trainer.world_size)
        rank_zero_only.rank = trainer.global_rank
        for name in LOGGER_NAMES:
            logging.getLogger(name).setLevel(logging.INFO if trainer.is_global_zero else logging.ERROR)
        if self.subcommand == "fit":
            self._lock_folder(trainer)
            if trainer.is_global_zero:
                trainer.loggers = build_loggers(self.folder, self.model, self.settings)
                trainer.callbacks.insert(0, LearningRateMonitor("step"))
        return trainer

    def _describe_computing(self) -> dict[str, Any]:
        """Return the numeric precision, the GPU and the library versions of a run."""
        computed = {name: self.settings[name] for name in ("matmul", "compile")}
        computed |= {"precision": str(self.trainer.precision), "torch": torch.__version__}
        if self.trainer.strategy.root_device.type == "cuda":
            computed |= {
                "card": torch.cuda.get_device_name(self.trainer.strategy.root_device),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            }
        return computed

    def _read_recipe_step(self) -> int:
        """Return the questions of a step by the dataset's configuration, without overrides of the command line."""
        path = find_dataset_config(self.arguments)
        given = yaml.safe_load(path.read_text(encoding="utf-8"))["data"].get("init_args") or {} if path else {}
        signatures = (inspect.signature(cls).parameters for cls in type(self.dataset).__mro__)
        default = next(parameters["batch_size"].default for parameters in signatures if "batch_size" in parameters)
        return int(given.get("batch_size", default))

    def _count_accumulated(self, processes: int) -> int:
        """Return the number of batches that a process accumulates for an optimizer step.

        Raises:
            ConfigError: the step cannot be divided, see `plan_batches`, or the method needs the step in one batch.
        """
        accumulated = plan_batches(self.datamodule.batch_size, self.datamodule.per_device, processes).accumulated
        if accumulated > 1 and (reason := self.model.needs_whole_step):
            raise ConfigError(
                f"per_device is {self.datamodule.per_device}, so that {accumulated} batches are accumulated to a step "
                f"of {self.datamodule.batch_size} questions, but {reason}: omit data.init_args.per_device, use more "
                "devices (DEVICES=), or PRECISION=bf16-mixed, which needs less memory"
            )
        return accumulated

    def fit(self, model: Method, datamodule: EpochDataModule) -> None:
        """Train and test, see `_train_and_test`; record an early end in W&B, but that of a job which SLURM requeues."""
        try:
            self._train_and_test(model, datamodule)
        except Stopped as error:
            if error.number != REQUEUE_SIGNAL:
                reason = f"stopped by {signal.Signals(error.number).name}"
                find_record(self.trainer.loggers).end(128 + error.number, reason)
            raise
        except Exception as error:
            if isinstance(error, OSError):  # from the CSV logger, whose errors name no file
                error.filename = error.filename or str(self.folder)
            code = error.exit_code if isinstance(error, CDCError) else CDCError.exit_code
            find_record(self.trainer.loggers).end(code, str(error))
            raise

    def _train_and_test(self, model: Method, datamodule: EpochDataModule) -> None:
        """Train or resume; test the best epoch; export the files that later runs need; write the results last."""
        if model.reads != "captions" and self.settings["model"]["init_args"]["encoder"]["checkpoint"] is None:
            logger.warning(
                "no CHECKPOINT: the encoder starts from random weights, and accuracies will be far below the paper's. "
                "Set CHECKPOINT= to All-in-One-Ti's weights (https://github.com/showlab/all-in-one)"
            )
        trainer, parameters = self.trainer, model.parameter_counts()
        logger.info(
            "%s: %s parameters on the device, %s in the cloud, %s trainable",
            self.folder, *(f"{number:,}" for number in parameters),
        )  # fmt: skip
        trainer.fit(model, datamodule, ckpt_path=find_newest_state(self.folder), weights_only=True)
        if not (self.folder / "best.ckpt").is_file():
            raise CheckpointError(f"{self.folder}/best.ckpt is missing: delete {self.folder} to train anew")
        best, timer = trainer.checkpoint_callback, next(c for c in trainer.callbacks if isinstance(c, Timer))
        metrics = {best.monitor: float(best.best_model_score)}
        metrics |= trainer.test(model, datamodule, ckpt_path=best.best_model_path, verbose=False, weights_only=True)[0]
        if not trainer.is_global_zero:  # `leave_group` waits until the first process has written
            return
        model.export(self.folder)
        with atomic_write(self.folder / ANSWERS_FILE) as file:
            file.write("\n".join(self.dataset.answers()).encode())
        summary = (datamodule if model.reads == "captions" else self.dataset).summary()
        results = {
            **self.describe(self.folder, self.arguments),
            "metrics": metrics,
            "monitor": best.monitor,
            "best_epoch": load_checkpoint(Path(best.best_model_path))["epoch"],
            "epochs": trainer.current_epoch,
            "questions_per_step": datamodule.batch_size,
            "recipe_questions_per_step": self._read_recipe_step(),
            "classes": model.head.outputs,
            "questions": {split: row["questions"] for split, row in summary.items()},
            "data": summary,
            **(
                evaluate_outcomes(self.dataset, model.outcomes["test"], self.folder / PREDICTIONS)
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
            "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
            "computed": self._describe_computing(),
            **self.identity,
        }
        write_json(results, self.folder / RESULTS)
        shutil.rmtree(self.folder / RESUME, ignore_errors=True)
        finish_loggers(trainer.loggers, self.folder, self.settings, results)

    def describe(self, folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the first entries of results.json: on which data, with which seed, where, when and by which command.

        Args:
            folder: folder of the results, `<dataset>/<name>/seed<N>`.
            arguments: arguments of the command.
        """
        data, (dataset, method, _) = self.dataset, folder.absolute().parts[-3:]
        return {
            "dataset": dataset,
            "method": method,
            "seed": self.settings["seed_everything"],
            "task": data.task,
            "protocol": data.protocol,
            "splits": data.notes,
            "published": data.published(),
            "domains": data.domains and {"kind": data.domains, "held_out": data.held_out},
            "machine": f"{count_processors()} processors, {platform.system()} {platform.machine()}",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "arguments": list(arguments),
        }


def check_arguments(arguments: Sequence[str]) -> None:
    """Parse the arguments of a training run and compare them with the run in its folder, without building anything.

    Raises:
        ConfigError: see `Experiment` and `has_begun`.
    """

    class Parsed(Experiment):
        """Experiment that ends when its arguments are parsed."""

        def instantiate_classes(self) -> None:
            """Build nothing."""

        def _run_subcommand(self, subcommand: str) -> None:
            """Run nothing."""

    run = Parsed(arguments)
    with suppress(SystemExit):  # the run is finished
        has_begun(run.folder, run.settings, read_inputs(run.folder))


def wants_several_processes(devices: Any, num_nodes: int) -> bool:
    """Return whether Lightning's `devices` and `num_nodes` mean more than one process."""
    if devices in ("auto", -1, "-1"):
        return num_nodes > 1 or torch.cuda.device_count() > 1
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part] if "," in devices else int(devices)
    return num_nodes > 1 or (devices if isinstance(devices, int) else len(devices)) > 1
