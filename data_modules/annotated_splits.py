"""The annotated splits of a dataset: what a subclass reads from annotations, and which samples a run uses."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from cdc_mmpg.data.batch import SPLITS, Split, Task, View
from cdc_mmpg.data.interface import Captions
from cdc_mmpg.data.sampling import EpochDataModule
from cdc_mmpg.errors import ConfigError, DataError
from data_modules.annotations import PLAIN_NAME, Published, is_outside_folder
from data_modules.checks import check_categories, check_root, describe_held_out
from data_modules.clip_dataset import Sample
from data_modules.domains import DomainKind, Shift, choose_held_out

logger = logging.getLogger(__name__)


class AnnotatedSplits(EpochDataModule):
    """Annotations and paths of their clips: a subclass reads them, this class checks them and applies domains.

    Args:
        root, cache_dir, protocol, num_classes, domains, held_out: see `base.VideoTextDataModule`.
        batch_size, seed, per_device: see `EpochDataModule`.
    """

    task: ClassVar[Task]
    views: ClassVar[frozenset[View]] = frozenset({"samples"})  # views of the dataset that methods can read
    # Kinds of domains that stand for devices; empty for a dataset that knows its devices.
    DOMAINS: ClassVar[tuple[DomainKind, ...]] = ("casts", "corruptions")
    PROTOCOLS: ClassVar[tuple[str, ...]] = ("official",)
    # Published numbers of questions (or captions), clips and answer classes of each split, by protocol; questions and
    # clips of splits that were published together, such as "train+val", are summed.
    PUBLISHED: ClassVar[Published] = {}

    def __init__(
        self,
        root: str,
        cache_dir: str,
        protocol: str | None,
        num_classes: int | None,
        domains: DomainKind | None,
        held_out: list[str] | None,
        batch_size: int,
        seed: int,
        per_device: int | None,
    ) -> None:
        super().__init__(batch_size, seed, per_device)
        self.domains, self.held_out = domains, choose_held_out(domains, held_out) if domains else []
        self.root, self.cache_dir = Path(root).expanduser(), Path(cache_dir).expanduser()
        self.protocol, self.num_classes = protocol or self.PROTOCOLS[0], num_classes or 0
        self.notes: dict[Split, str] = {}  # how a split was made, if worth reporting; `read_split` fills it
        self._annotated: dict[Split, list[Sample]] = {}
        self._selected: dict[Split, list[Sample]] = {}

    @abstractmethod
    def read_split(self, split: Split) -> list[Sample]:
        """Read all samples of a split from the annotations.

        Raises:
            DataError: an annotation is absent or damaged; names file and position.
        """

    @abstractmethod
    def find_clips(self) -> dict[str, Path]:
        """Return the paths of the clips on disk, by the name that annotations use."""

    @abstractmethod
    def remedy(self) -> str:
        """Return what to fetch, from where, under which terms, and where to put it."""

    def read_vocabulary(self) -> None:
        """Read the answer vocabulary, if the task has one."""
        return

    def list_further_clips(self) -> set[str]:
        """Return the names of clips that the dataset needs although no split has a question about them."""
        return set()

    def read_categories(self) -> dict[str, str]:
        """Read the category of every clip, one of `domains.CATEGORIES`, if `DOMAINS` contains "categories".

        Raises:
            DataError: no file holds categories.
        """
        raise ConfigError(f"{type(self).__name__} knows no categories of its clips")

    def check_samples(self, split: Split, samples: Sequence[Sample]) -> None:
        """Refuse samples that are invalid for the task.

        Raises:
            DataError: a sample is invalid; names it.
        """

    def check_answers(self, split: Split, samples: Sequence[Sample]) -> None:
        """Refuse samples if no answer of theirs is in the vocabulary; call `read_vocabulary` first.

        Raises:
            DataError: no answer is in it; gives an example.
        """

    def count_unknown_answers(self, samples: Sequence[Sample]) -> int:
        """Count the samples whose answer is outside the vocabulary: no method can get them right."""
        return 0

    def count_questions(self, samples: Sequence[Sample]) -> int:
        """Count the questions of samples."""
        return len(samples)

    def captions(self) -> Captions:
        """Return captioned clips, if `views` contains "captions".

        Raises:
            ConfigError: it does not.
        """
        raise ConfigError(f"{type(self).__name__} has no captions: encoder_pretraining needs them")

    @cached_property
    def shift(self) -> Shift | None:
        """Domains of the clips; None without `domains`.

        Raises:
            DataError: see `read_categories`.
        """
        if self.domains is None:
            return None
        return Shift(
            self.domains, frozenset(self.held_out), self.read_categories() if self.domains == "categories" else {}
        )

    def samples(self, split: Split) -> list[Sample]:
        """Return all samples of a split; the annotations are read only once.

        Raises:
            DataError: see `read_split`; also if a clip name is not a plain file name.
        """
        if split not in self._annotated:
            check_root(self.root, self.remedy)
            samples = self.read_split(split)
            if not samples:
                raise DataError(f"{self.root}: split {split} has no questions")
            self.check_samples(split, samples)
            for sample in samples:
                if is_outside_folder(sample.clip):
                    raise DataError(
                        f"{self.root}, split {split}: the clip name {sample.clip!r} is not {PLAIN_NAME}: fix the "
                        "file, or fetch it again"
                    )
            self._annotated[split] = samples
        return self._annotated[split]

    def select_samples(self, split: Split) -> list[Sample]:
        """Return the samples of a split that a run uses: only the test split keeps those of held-out domains.

        Raises:
            DataError: see `samples`; also if a clip has no known domain, or no sample of the split is left.
        """
        if split not in self._selected:
            samples, shift = self.samples(split), self.shift
            if shift is not None:
                check_categories(self, split, shift)
                if split != "test":
                    samples = [sample for sample in samples if not shift.is_unseen(sample.clip)]
                    note = describe_held_out(self, split, samples)
                    self.notes[split] = "; ".join(filter(None, [self.notes.get(split), note]))
                    logger.info("split %s: %s", split, note)
            self._selected[split] = samples
        return self._selected[split]

    def list_named_clips(self) -> list[str]:
        """Return the names of all clips that the dataset needs, sorted."""
        return sorted({sample.clip for split in SPLITS for sample in self.samples(split)} | self.list_further_clips())
