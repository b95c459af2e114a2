"""The DataModules of the three tasks: open-ended questions, multiple choice, retrieval."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch

from cdc_mmpg.data.batch import UNKNOWN_ANSWER, Split, Task
from cdc_mmpg.data.interface import DeviceLabels, SampleOrigin
from cdc_mmpg.errors import DataError
from data_modules.annotations import CONTROL_CHARACTERS
from data_modules.answers import Answers
from data_modules.base import VideoTextDataModule
from data_modules.clip_dataset import ClipDataset, QADataset, Sample


class VideoQADataModule(VideoTextDataModule):
    """Open-ended questions about clips, with one class per answer.

    An answer outside the vocabulary is left out of the training loss and counts as wrong in validation and test.

    Args:
        see `VideoTextDataModule`.
    """

    task: ClassVar[Task] = "open_ended"

    @abstractmethod
    def read_answers(self, training_answers: Iterable[str]) -> Answers:
        """Read the vocabulary of `self.num_classes` - 1 answers; counting `training_answers` is the fallback."""

    def check_samples(self, split: Split, samples: Sequence[Sample]) -> None:
        """Refuse blank questions and answers, and control characters in answers, which are stored one per line."""
        for place, sample in enumerate(samples):
            if not sample.question.strip() or not sample.answer.strip():
                lacking = "answer" if sample.question.strip() else "question"
                raise DataError(
                    f"{self.root}, split {split}: sample {place}, of clip {sample.clip}, has no {lacking}: fix the "
                    "annotation file, or fetch it again"
                )
            if CONTROL_CHARACTERS.search(sample.answer):
                raise DataError(
                    f"{self.root}, split {split}: the answer of sample {place}, of clip {sample.clip}, is "
                    f"{sample.answer!r:.80}: control characters, such as line feeds, are refused"
                )

    def check_answers(self, split: Split, samples: Sequence[Sample]) -> None:
        """Refuse samples if none of their answers is in the vocabulary: no prediction could be right."""
        if not samples or self.count_unknown_answers(samples) < len(samples):
            return
        known = {word.strip().lower(): word for word in self._answers.words}
        alike = (sample.answer for sample in samples if sample.answer.strip().lower() in known)
        answer = next(alike, samples[0].answer)
        word = known.get(answer.strip().lower(), self._answers.words[0])
        hint = ", which differ in whitespace or case" if answer.strip().lower() == word.strip().lower() else ""
        raise DataError(
            f"{self.root}, split {split}: none of {len(samples):,} answers is in the vocabulary: an annotation has "
            f"{answer!r}, the vocabulary {word!r}{hint}. Fix one of the files"
        )

    def read_vocabulary(self) -> None:
        """Read the answer vocabulary."""

        def training_answers() -> Iterator[str]:
            yield from (sample.answer for sample in self.samples("train"))

        self._answers = self.read_answers(training_answers())

    def count_unknown_answers(self, samples: Sequence[Sample]) -> int:
        """Count answers outside the vocabulary."""
        return sum(self._answers.label(sample.answer) < 0 for sample in samples)

    def build(self, samples: Sequence[Sample]) -> QADataset:
        """Build an unaugmented dataset of questions; see `VideoTextDataModule`."""
        return QADataset(
            samples,
            [[ids] for ids in self.text([sample.question for sample in samples])],
            torch.tensor([self._answers.label(sample.answer) for sample in samples]),
            self.cache,
            seed=self.seed,
            shift=self.shift,
        )

    def device_labels(self) -> DeviceLabels:
        """Build the training questions of held-out domains, on which no method trains: for controls only.

        Raises:
            ConfigError: the dataset does not know its devices, and `domains` is None.
        """
        shift = self.require_domains("methods on the device")
        samples = [
            sample
            for sample in self.samples("train")
            if shift.is_unseen(sample.clip) and self.is_ready(sample.clip) and self._answers.label(sample.answer) >= 0
        ]
        origins = [
            SampleOrigin(sample.clip, *self._find_device(sample.clip), sample.type, sample.question, sample.answer)
            for sample in samples
        ]
        return DeviceLabels(self.build(samples), origins)

    def word(self, split: Split, index: int, label: int | None = None) -> str:
        """Return the annotated answer, or the word of class `label`."""
        if label is None:
            return self._splits[split].samples[index].answer
        return [*self._answers.words, UNKNOWN_ANSWER][label]

    def answers(self) -> list[str]:
        """Return the answer vocabulary in the order of its classes."""
        return self._answers.words


class MultipleChoiceDataModule(VideoTextDataModule):
    """Questions about clips with candidates, one of them right; or, without a question, captions, one of which fits.

    A text is the question, [SEP] and a candidate; `TextEncoder.encode_choices` describes how long ones are cut.

    Args:
        see `VideoTextDataModule`.
    """

    task: ClassVar[Task] = "multiple_choice"

    def check_samples(self, split: Split, samples: Sequence[Sample]) -> None:
        """Refuse samples with different numbers of candidates, or without a right one."""
        number = len(samples[0].options)
        for place, sample in enumerate(samples):
            if len(sample.options) != number or not 0 <= sample.right < number:
                raise DataError(
                    f"{self.root}, split {split}: sample {place}, of clip {sample.clip}, has {len(sample.options)} "
                    f"candidates and names number {sample.right}, counted from 0, as right; the first sample has "
                    f"{number} candidates"
                )

    def build(self, samples: Sequence[Sample]) -> ClipDataset:
        """Build an unaugmented dataset of questions with candidates; see `VideoTextDataModule`."""
        texts = self.text.encode_choices([(sample.question, sample.options) for sample in samples])
        # If candidates have equal ids, the model answers with the first of them, so that one is the right one.
        first = [ids.index(ids[sample.right]) for ids, sample in zip(texts, samples, strict=True)]
        samples = [sample._replace(right=right) for sample, right in zip(samples, first, strict=True)]
        labels = torch.tensor(first)
        return ClipDataset(samples, texts, labels, self.cache, seed=self.seed, shift=self.shift)

    def word(self, split: Split, index: int, label: int | None = None) -> str:
        """Return the right candidate or candidate `label`; one with the same ids as the right one has its text."""
        sample = self._splits[split].samples[index]
        texts = self._splits[split].texts[index]
        if label is not None and texts[label] == texts[sample.right]:
            label = sample.right
        return sample.options[sample.right if label is None else label]


class RetrievalDataModule(VideoTextDataModule):
    """Clips with captions: each sample is a clip with all of its captions, one of which training uses in an epoch.

    Args:
        see `VideoTextDataModule`.
    """

    task: ClassVar[Task] = "retrieval"
    even = True  # the contrastive loss needs the same number of clips in every process

    def build(self, samples: Sequence[Sample]) -> ClipDataset:
        """Build an unaugmented dataset of clips with captions; see `VideoTextDataModule`."""
        ids = iter(self.text([caption for sample in samples for caption in sample.options]))
        texts = [[next(ids) for _ in sample.options] for sample in samples]
        labels = torch.zeros(len(samples), dtype=torch.long)
        return ClipDataset(samples, texts, labels, self.cache, draw=True, seed=self.seed, shift=self.shift)

    def count_questions(self, samples: Sequence[Sample]) -> int:
        """Count the captions of samples."""
        return sum(len(sample.options) for sample in samples)

    def word(self, split: Split, index: int, label: int | None = None) -> str:
        """Return the clip's first caption, or for a predicted `label` the rank of its best caption."""
        return self._splits[split].samples[index].options[0] if label is None else f"rank {label}"
