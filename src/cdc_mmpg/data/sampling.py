"""The order of samples, and how an optimizer step is shared out to processes and accumulated batches."""

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
    """(epoch, index) pairs of all samples, in an order that depends on seed and epoch alone.

    Args:
        size: samples in the split.
        seed: of the order.
        shuffle: draw a new order every epoch (training); else as annotated.
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
        """Return the order of an epoch, (size,)."""
        order = np.arange(self.size)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order


class BatchPlan(NamedTuple):
    """How the samples of an optimizer step are shared out to processes, and accumulated on each of them."""

    step: int  # samples of an optimizer step
    at_once: int  # most samples of a batch, on each process
    world: int  # processes

    @property
    def accumulated(self) -> int:
        """Batches of a process in a whole step."""
        return ceil(self.step / (self.world * self.at_once))

    def share(self, samples: NDArray[np.int64], rank: int) -> list[NDArray[np.int64]]:
        """Return the batches of a process, of the samples of a step; as many on all processes, some perhaps empty."""
        own, longest = samples[rank :: self.world], ceil(len(samples) / self.world)
        return [own[start : start + self.at_once] for start in range(0, longest, self.at_once)]

    def count(self, size: int) -> int:
        """Return how many training batches each process has of an epoch of `size` samples."""
        rest = ceil(size % self.step / self.world)
        return size // self.step * self.accumulated + ceil(rest / self.at_once)


def plan_batches(step: int, per_device: int | None, world: int) -> BatchPlan:
    """Return how optimizer steps of so many samples are shared out to `world` processes.

    Args:
        step: samples of an optimizer step, over all processes.
        per_device: most samples that a device holds at once; None is its whole share of a step.
        world: processes, one a device.

    Raises:
        ConfigError: the numbers do not divide; names some that do.
    """
    if step % world:
        raise ConfigError(
            f"a step of {step} questions (data.init_args.batch_size) cannot be shared out evenly to {world} devices: "
            f"take {_nearest_divisors(step, world)} devices (DEVICES=), or another batch_size"
        )
    share = step // world
    at_once = min(per_device or share, share)
    if share % at_once:
        raise ConfigError(
            f"a device's share of a step, {share} of {step} questions, does not divide into batches of {at_once} "
            f"(data.init_args.per_device): take {_nearest_divisors(share, at_once)}"
        )
    return BatchPlan(step, at_once, world)


def _nearest_divisors(number: int, to: int) -> str:
    """Return the divisors of a number around another one, as "2 or 4"."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below, above = [d for d in divisors if d < to], [d for d in divisors if d > to]
    return " or ".join(map(str, [*below[-1:], *above[:1]]))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) pairs of one process.

    In training every optimizer step is made of the same samples, however many processes there are and however much each
    of them holds at once. Where the last step of an epoch leaves a process without a sample for a batch, the step's
    first sample stands in, so that all processes take as many batches; `EpochDataModule.weigh` counts it as nothing. In
    evaluation every sample is in exactly one batch of one process.

    Args:
        sampler: the order of all samples; under this name Lightning tells it the epoch.
        plan: of training; of evaluation, which has no steps, its `at_once` and `world`.
        rank: this process among all.
        even: stand in for every sample that another process has more, for a loss that needs as many of all.
        skip: steps to leave out in the first epoch that is drawn: those that a run has taken before it was stopped in
            the middle of an epoch.
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
            longest = self.plan.share(samples, 0)  # the first process has as many as any
            for part, most in zip(self.plan.share(samples, self.rank), longest, strict=True):
                indices = part.tolist()
                if training and (not indices or (self.even and len(indices) < len(most))):
                    indices.append(int(samples[0]))
                if indices:
                    yield [(epoch, index) for index in indices]


def draw_text(seed: int, epoch: int, index: int, number: int) -> int:
    """Return which of a sample's `number` texts training reads in an epoch: the same from frames and from features."""
    return int(np.random.default_rng((seed, epoch, index, 1)).integers(number))


def draw_copy(seed: int, epoch: int, index: int, number: int) -> int:
    """Return which of `number` copies of a sample training sees in an epoch: its device's, or a virtual device's."""
    return int(np.random.default_rng((seed, epoch, index, 2)).integers(number)) if number > 1 else 0


def draw_cast(device: str, number: int) -> float:
    """Return the degrees by which a device's virtual device of that number rotates hues: the same in all runs."""
    digest = hashlib.sha256(f"virtual {number} {device}".encode()).digest()
    return 360 * int.from_bytes(digest[:8], "big") / 2**64


class Jitter(NamedTuple):
    """How a virtual device changes colours, as augmentation usually does."""

    brightness: float
    contrast: float
    saturation: float  # factors
    hue: float  # degrees


def draw_jitter(device: str, number: int) -> Jitter:
    """Return how a device's virtual device of that number jitters colours: the same in all runs.

    Source: the ranges of SimCLR's color jitter at half its strength (Chen et al. 2020, "A Simple Framework for
    Contrastive Learning of Visual Representations"), which torchvision's examples have, too.
    """
    digest = hashlib.sha256(f"jitter {number} {device}".encode()).digest()
    *factors, hue = np.random.default_rng(int.from_bytes(digest[:8], "big")).uniform(-1, 1, 4).tolist()
    brightness, contrast, saturation = (1 + 0.4 * factor for factor in factors)
    return Jitter(brightness, contrast, saturation, 36 * hue)


class EpochDataModule(LightningDataModule):
    """A DataModule whose order is a function of seed and epoch, and which can go on in the middle of an epoch.

    Its datasets fetch whole batches: `__getitems__` takes (epoch, index) pairs.

    Args:
        batch_size: samples of an optimizer step, over all devices and accumulated batches.
        seed: of the order.
        per_device: most of them that a device holds at once; None is its whole share. The rest is accumulated.
    """

    TIMEOUT_SECONDS = 30  # for a batch; a worker that hangs longer is reported
    even: bool = False  # see `EpochBatches`

    def __init__(self, batch_size: int, seed: int, per_device: int | None = None) -> None:
        super().__init__()
        self.batch_size, self.seed, self.per_device = batch_size, seed, per_device
        self._epoch = self._seen_steps = 0
        self._training: EpochBatches | None = None
        self._step_weights: tuple[int, dict[bool, list[float]]] = (-1, {})  # of an epoch, see `weigh`

    @property
    def plan(self) -> BatchPlan:
        """How an optimizer step is shared out to the processes of the run.

        Raises:
            ConfigError: see `plan_batches`.
        """
        return plan_batches(self.batch_size, self.per_device, self.trainer.world_size if self.trainer else 1)

    def loading_processes(self) -> int:
        """Return how many processes load batches unless told: as many as this one has processors, from 1 to 16.

        The processes of a run share a machine's processors; under SLURM, with a task for each, a task is given its own.
        """
        sharing = 1
        if self.trainer is not None:
            environment = getattr(self.trainer.strategy, "cluster_environment", None)
            sharing = 1 if isinstance(environment, SLURMEnvironment) else self.trainer.num_devices
        return min(16, max(1, count_processors() // sharing))

    def batches(
        self, dataset: Dataset[Any], shuffle: bool, num_workers: int | None = 0, at_once: int | None = None
    ) -> DataLoader[Any]:
        """Return this process's share of a dataset as batches; in evaluation, of `at_once` samples at most.

        So many processes load them, None is `loading_processes`.
        """
        if num_workers is None:
            num_workers = self.loading_processes()
        size, plan = len(dataset), self.plan  # type: ignore[arg-type]
        if at_once is not None:
            plan = plan._replace(at_once=min(at_once, plan.at_once))
        if size < plan.world:
            raise ConfigError(
                f"a split of {size} samples cannot be shared out to {plan.world} processes: take fewer devices"
            )
        order = EpochOrder(size, self.seed, shuffle)
        order.set_epoch(self._epoch)  # Lightning does so too, but after worker processes have begun to fetch
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
        """Return what the mean over a training batch is multiplied by, for the mean over its whole optimizer step.

        Lightning divides by the number of accumulated batches and takes the mean over the processes. What is left is
        how many of the step's samples this batch has: 1 where all batches have as many.

        Args:
            batch_idx: of this process in this epoch.
            known: count the samples with a known answer only.
        """
        assert self.trainer is not None
        if self._step_weights[0] != (epoch := self.trainer.current_epoch):
            self._step_weights = epoch, self._weigh_epoch(epoch)
        return self._step_weights[1][known][batch_idx]

    def _weigh_epoch(self, epoch: int) -> dict[bool, list[float]]:
        """Return what `weigh` says of all batches of an epoch, by `known`."""
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

    def count_taken(self, processed: int) -> int:
        """Return how many batches the steps are that were taken in the epoch to go on with.

        Args:
            processed: how many they were when the state was saved, perhaps on another number of devices.
        """
        if processed and not self._seen_steps:  # the whole epoch
            return self.plan.count(len(self.labels("train")))
        return self._seen_steps * self.plan.accumulated

    @abstractmethod
    def labels(self, split: Split) -> Tensor:
        """Return the label of every sample of a split, (N,)."""

    @abstractmethod
    def fingerprint(self, split: Split, frames: bool) -> str:
        """Return a digest of a split's clips, questions and labels, and of what decides its frames."""

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch to go on with, its steps that were taken, and of which data and to whom they were."""
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
        """Begin with that epoch, after these steps, when training goes on.

        The run may have been shared out to another number of devices: its steps are of the same samples.

        Raises:
            ConfigError: the run was of other data; names the splits. Or its steps were of another number of samples.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        before = state_dict.get("fingerprints", {})
        changed = [split for split in SPLITS if before.get(split) != self.fingerprint(split, frames=False)]
        if changed:
            raise ConfigError(
                f"this run began on other data: {', '.join(changed)} differ (questions, labels, vocabulary or clips). "
                "Give it the data it began with, or delete or rename its folder"
            )
        before, now = BatchPlan(**state_dict["plan"]), self.plan
        if before.step != now.step:
            raise ConfigError(f"this run began with steps of {before.step} questions, not {now.step}: type its command")
        if before != now:
            logger.info(
                "begun as %d x %d x %d (devices, accumulated batches, questions at once), goes on as %d x %d x %d: the "
                "same questions in every step and the same schedule, but not the same to the last bit",
                *(part for plan in (before, now) for part in (plan.world, plan.accumulated, plan.at_once)),
            )
        self._epoch, self._seen_steps = state_dict["epoch"], state_dict["seen_steps"]


def _return_unchanged(batch: Any) -> Any:
    """Return a batch as it is: datasets build whole batches, so there is nothing to collate."""
    return batch
