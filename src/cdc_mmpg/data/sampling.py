"""The order of samples, and the division of an optimizer step among processes and accumulated batches."""

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterator
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.plugins.environments import SLURMEnvironment
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cdc_mmpg.data.batch import SPLITS, UNKNOWN_LABEL, Split
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.processors import count_processors
from cdc_mmpg.program import ignore_stop_signals

logger = logging.getLogger(__name__)


class EpochOrder(Sampler[tuple[int, int]]):
    """Sampler of (epoch, index) pairs of all samples, in an order that depends on seed and epoch alone.

    Args:
        size: number of samples in the split.
        seed: seed of the order.
        shuffle: draw a new order in every epoch (training); else keep the annotation order.
    """

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order is drawn next; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, index) for index in self.draw(self.epoch).tolist()])

    def draw(self, epoch: int) -> NDArray[np.int64]:
        """Draw the order of an epoch, (size,)."""
        order = np.arange(self.size)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order


class BatchPlan(NamedTuple):
    """The division of an optimizer step among processes, and into batches that each process accumulates."""

    step: int  # samples of an optimizer step
    at_once: int  # maximum number of samples of a batch, in each process
    world: int  # number of processes

    @property
    def accumulated(self) -> int:
        """Number of batches of a process in a full step."""
        return ceil(self.step / (self.world * self.at_once))

    def share(self, samples: NDArray[np.int64], rank: int) -> list[NDArray[np.int64]]:
        """Return the batches of a process among the samples of a step; all processes have equally many, some empty."""
        part, longest = samples[rank :: self.world], ceil(len(samples) / self.world)
        return [part[start : start + self.at_once] for start in range(0, longest, self.at_once)]

    def count(self, size: int) -> int:
        """Count the training batches of each process in an epoch of `size` samples."""
        rest = ceil(size % self.step / self.world)
        return size // self.step * self.accumulated + ceil(rest / self.at_once)


def plan_batches(step: int, per_device: int | None, world: int) -> BatchPlan:
    """Plan how optimizer steps are divided among `world` processes.

    Args:
        step: samples of an optimizer step, over all processes.
        per_device: maximum number of samples that a device holds at once; None is its entire share of a step.
        world: number of processes, one per device.

    Raises:
        ConfigError: the numbers are not divisible; names some that are.
    """
    if step % world:
        raise ConfigError(
            f"a step of {step} questions (data.init_args.batch_size) cannot be divided evenly among {world} devices: "
            f"use {_find_nearest_divisors(step, world)} devices (DEVICES=), or another batch_size"
        )
    share = step // world
    at_once = min(per_device or share, share)
    if share % at_once:
        raise ConfigError(
            f"a device's share of a step, {share} of {step} questions, cannot be divided into batches of {at_once} "
            f"(data.init_args.per_device): use {_find_nearest_divisors(share, at_once)}"
        )
    return BatchPlan(step, at_once, world)


def _find_nearest_divisors(number: int, to: int) -> str:
    """Return the divisors of a number next below and above `to`, as "2 or 4"."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below, above = [d for d in divisors if d < to], [d for d in divisors if d > to]
    return " or ".join(map(str, [*below[-1:], *above[:1]]))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler of (epoch, index) pairs for one process.

    In training every optimizer step has the same samples for any number of processes and any batch size per process. If
    the last step of an epoch leaves a process without a sample for a batch, the step's first sample fills in, so that
    all processes have equally many batches; `EpochDataModule.weigh` gives it no weight. In evaluation every sample is
    in exactly one batch of one process.

    Args:
        sampler: order of all samples; Lightning sets its epoch by this attribute name.
        plan: division of the steps; evaluation, which has no steps, uses only its `at_once` and `world`.
        rank: rank of this process.
        even: fill up to the number of samples of the other processes, for a loss that needs equal numbers.
        skip: number of steps to skip in the first epoch that is drawn: those taken before a run was stopped in the
            middle of an epoch.
    """

    def __init__(self, sampler: EpochOrder, plan: BatchPlan, rank: int, even: bool = False, skip: int = 0) -> None:
        self.sampler, self.plan, self.rank, self.even, self.skip = sampler, plan, rank, even, skip

    def __len__(self) -> int:
        if self.sampler.shuffle:
            return self.plan.count(self.sampler.size)
        return ceil(len(range(self.rank, self.sampler.size, self.plan.world)) / self.plan.at_once)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, training = self.sampler.epoch, self.sampler.shuffle
        order = self.sampler.draw(epoch)
        step = self.plan.step if training else len(order)
        first, self.skip = self.skip * step, 0
        for start in range(first, len(order), step):
            samples = order[start : start + step]
            largest = self.plan.share(samples, 0)  # no process has more samples than the first
            for part, largest_part in zip(self.plan.share(samples, self.rank), largest, strict=True):
                indices = part.tolist()
                if training and (not indices or (self.even and len(indices) < len(largest_part))):
                    indices.append(int(samples[0]))
                if indices:
                    yield [(epoch, index) for index in indices]


def draw_text(seed: int, epoch: int, index: int, number: int) -> int:
    """Draw the index of the text, among `number`, that training reads in an epoch; same for frames and features."""
    return int(np.random.default_rng((seed, epoch, index, 1)).integers(number))


def draw_copy(seed: int, epoch: int, index: int, number: int) -> int:
    """Draw the copy of a sample, among `number`, that training sees in an epoch: 0 is its device, others virtual."""
    return int(np.random.default_rng((seed, epoch, index, 2)).integers(number)) if number > 1 else 0


def draw_cast(device: str, number: int) -> float:
    """Draw the hue rotation in degrees of virtual device `number` of a device: the same in all runs."""
    digest = hashlib.sha256(f"virtual {number} {device}".encode()).digest()
    return 360 * int.from_bytes(digest[:8], "big") / 2**64


class Jitter(NamedTuple):
    """The colour change of a virtual device, as in common augmentation."""

    brightness: float  # factor, as are contrast and saturation
    contrast: float
    saturation: float
    hue: float  # degrees


def draw_jitter(device: str, number: int) -> Jitter:
    """Draw the colour jitter of virtual device `number` of a device: the same in all runs.

    Source: the ranges of SimCLR's color jitter at half its strength (Chen et al. 2020, "A Simple Framework for
    Contrastive Learning of Visual Representations"), which torchvision's examples also use.
    """
    digest = hashlib.sha256(f"jitter {number} {device}".encode()).digest()
    *factors, hue = np.random.default_rng(int.from_bytes(digest[:8], "big")).uniform(-1, 1, 4).tolist()
    brightness, contrast, saturation = (1 + 0.4 * factor for factor in factors)
    return Jitter(brightness, contrast, saturation, 36 * hue)


class EpochDataModule(LightningDataModule):
    """A DataModule whose sample order is a function of seed and epoch, and which can resume in the middle of an epoch.

    Its datasets fetch entire batches: `__getitems__` takes (epoch, index) pairs.

    Args:
        batch_size: samples of an optimizer step, over all devices and accumulated batches.
        seed: seed of the order.
        per_device: maximum number of samples that a device holds at once, the rest is accumulated; None is its share.
    """

    TIMEOUT_SECONDS = 30  # limit for loading a batch; a worker that hangs longer is reported
    even: bool = False  # see `EpochBatches`

    def __init__(self, batch_size: int, seed: int, per_device: int | None = None) -> None:
        super().__init__()
        self.batch_size, self.seed, self.per_device = batch_size, seed, per_device
        self._epoch = self._seen_steps = 0
        self._training: EpochBatches | None = None
        self._step_weights: tuple[int, dict[bool, list[float]]] = (-1, {})  # epoch and its weights, see `weigh`

    @property
    def plan(self) -> BatchPlan:
        """Division of an optimizer step among the processes of the run.

        Raises:
            ConfigError: see `plan_batches`.
        """
        return plan_batches(self.batch_size, self.per_device, self.trainer.world_size if self.trainer else 1)

    def count_loading_processes(self) -> int:
        """Return the default number of loading processes: the processors of this process, from 1 to 16.

        The processes of a run share a machine's processors; under SLURM every task has its own processors.
        """
        sharing = 1
        if self.trainer is not None:
            environment = getattr(self.trainer.strategy, "cluster_environment", None)
            sharing = 1 if isinstance(environment, SLURMEnvironment) else self.trainer.num_devices
        return min(16, max(1, count_processors() // sharing))

    def batches(
        self, dataset: Dataset[Any], shuffle: bool, num_workers: int | None = 0, at_once: int | None = None
    ) -> DataLoader[Any]:
        """Return this process's share of a dataset as batches; `num_workers` None is `count_loading_processes`.

        In evaluation, `at_once` limits the samples of a batch. Fewer samples than processes are refused.
        """
        if num_workers is None:
            num_workers = self.count_loading_processes()
        size, plan = len(dataset), self.plan  # type: ignore[arg-type]
        if at_once is not None:
            plan = plan._replace(at_once=min(at_once, plan.at_once))
        if size < plan.world:
            raise ConfigError(
                f"a split of {size} samples cannot be divided among {plan.world} processes: use fewer devices"
            )
        order = EpochOrder(size, self.seed, shuffle)
        order.set_epoch(self._epoch)  # Lightning sets it only after worker processes have begun to fetch
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = EpochBatches(order, plan, rank, self.even, self._seen_steps if shuffle else 0)
        if shuffle:
            self._training, self._step_weights = sampler, (-1, {})
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_return_unchanged,
            worker_init_fn=ignore_stop_signals,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            timeout=self.TIMEOUT_SECONDS if num_workers else 0,
        )

    def weigh(self, batch_idx: int, known: bool) -> float:
        """Return the weight of a training batch's mean, such that a step's weighted mean is that over its samples.

        Lightning divides by the number of accumulated batches and averages over the processes. The weight corrects for
        batches of different sizes: it is 1 if all batches of the step have the same size.

        Args:
            batch_idx: index of the batch of this process in this epoch.
            known: whether to count only samples with a known answer.
        """
        assert self.trainer is not None
        if self._step_weights[0] != (epoch := self.trainer.current_epoch):
            self._step_weights = epoch, self._weigh_epoch(epoch)
        return self._step_weights[1][known][batch_idx]

    def _weigh_epoch(self, epoch: int) -> dict[bool, list[float]]:
        """Compute the weights of all batches of an epoch, by `known`; see `weigh`."""
        assert self._training is not None
        plan, order = self._training.plan, self._training.sampler.draw(epoch)
        is_known = (self.labels("train") != UNKNOWN_LABEL).numpy()
        weights: dict[bool, list[float]] = {False: [], True: []}
        for start in range(0, len(order), plan.step):
            samples = order[start : start + plan.step]
            number, number_known = len(samples), max(1, int(is_known[samples].sum()))
            for part in plan.share(samples, self._training.rank):
                weights[False].append(len(part) * plan.world * plan.accumulated / number)
                weights[True].append(int(is_known[part].sum()) * plan.world * plan.accumulated / number_known)
        return weights

    def count_taken_batches(self, processed: int) -> int:
        """Count the batches that were taken in the epoch to resume, for the current number of devices.

        Args:
            processed: number of batches when the state was saved, possibly with another number of devices.
        """
        if processed and not self._seen_steps:  # the epoch was complete
            return self.plan.count(len(self.labels("train")))
        return self._seen_steps * self.plan.accumulated

    @abstractmethod
    def labels(self, split: Split) -> Tensor:
        """Return the label of every sample of a split, (N,)."""

    @abstractmethod
    def fingerprint(self, split: Split, frames: bool) -> str:
        """Return a digest of a split's clips, questions and labels; with `frames` also of its frames."""

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch to resume, its steps taken, the division of a step, and the fingerprints of the data."""
        trainer = self.trainer
        assert trainer is not None
        finished, seen = divmod(
            trainer.fit_loop.epoch_loop.batch_progress.current.processed, int(trainer.num_training_batches)
        )
        return {
            "epoch": trainer.current_epoch + finished,
            "seen_steps": seen // self.plan.accumulated,
            "plan": self.plan._asdict(),
            "fingerprints": {split: self.fingerprint(split, frames=False) for split in SPLITS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume training with the saved epoch, after the steps taken.

        The run may have had another number of devices: its steps have the same samples.

        Raises:
            ConfigError: the run had other data (names the splits), or steps of another size.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        before = state_dict.get("fingerprints", {})
        changed = [split for split in SPLITS if before.get(split) != self.fingerprint(split, frames=False)]
        if changed:
            raise ConfigError(
                f"this run began with other data: {', '.join(changed)} differ (questions, labels, vocabulary or "
                "clips). Use the data it began with, or delete or rename its folder"
            )
        before, now = BatchPlan(**state_dict["plan"]), self.plan
        if before.step != now.step:
            raise ConfigError(f"this run began with steps of {before.step} questions, not {now.step}: use its command")
        if before != now:
            logger.info(
                "begun as %d x %d x %d (devices, accumulated batches, questions at once), resumes as %d x %d x %d: the "
                "same questions in every step and the same schedule, but not bit-identical",
                *(part for plan in (before, now) for part in (plan.world, plan.accumulated, plan.at_once)),
            )
        self._epoch, self._seen_steps = state_dict["epoch"], state_dict["seen_steps"]


def _return_unchanged(batch: Any) -> Any:
    """Return a batch unchanged: datasets build entire batches, so there is nothing to collate."""
    return batch
