"""The synthetic dataset: colour constancy on devices that the model has never seen."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from cdc_mmpg.catalogue import ARC
from cdc_mmpg.data.batch import CaptionBatch, Split, View
from cdc_mmpg.data.interface import Captions, Content, DeviceLabels, SampleOrigin, Sessions
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.media.text import HUB_NAME, pad
from data_modules.annotations import Published, as_rows
from data_modules.checks import check_minimums
from data_modules.clip_dataset import ClipDataset, Sample
from data_modules.domains import DomainKind
from data_modules.msvd_qa import MSVDQA
from data_modules.synthetic_clips import BACKGROUND_WORD, DIGESTS, draw_scene, rename_colors_as_seen


class CaptionDataset(Dataset[CaptionBatch]):
    """Clips with a caption and one of their questions: in training the next one in every epoch, else always the same.

    Args:
        captions: clips whose question is their caption.
        questions: questions of these clips in the same order, equally many of each.
        neutral: ids of the neutral prompt.
    """

    def __init__(self, captions: ClipDataset, questions: ClipDataset, neutral: Sequence[int]) -> None:
        self.captions, self.questions, self.neutral = captions, questions, torch.tensor(neutral)
        self.questions_per_clip = len(questions) // len(captions)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> CaptionBatch:
        captions = self.captions.__getitems__(items)
        training, number = self.captions.augment, self.questions_per_clip
        chosen = [index * number + (index + epoch * training) % number for epoch, index in items]
        ids, mask = map(torch.from_numpy, pad([self.questions.texts[i][0] for i in chosen]))
        return CaptionBatch(
            captions.frames, captions.text_ids, captions.text_mask, ids, mask, self.neutral,
            self.questions.labels[torch.tensor(chosen)], captions.indices,
        )  # fmt: skip


class Synthetic(MSVDQA):
    """Synthetic dataset, rendered by `data_modules.synthetic_clips` in MSVD-QA's layout: .mp4 files, 64 x 64, 6 frames.

    One or two objects (disk, ring, bar, pole; six colours; two sizes; left and right) drift over a texture. Every
    device rotates all hues by its own cast, uniform on the circle, and has gain, gamma, noise, blur, zoom and speed.
    Questions ask for an object's true colour (40 %, in "memory" 32 %), its shape, size and side, and for the number of
    objects. A cast can be inferred from a distribution of hues that is the same in the entire world. In the world "sky"
    it is that of the textures (around blue, standard deviation 50 degrees); in "memory" textures have any hue, poles
    are green (standard deviation 20 degrees), and no question asks for a pole's colour; "rooms" is "sky", but the mean
    hue of a device's textures deviates from the world's (standard deviation 20 degrees). So one clip cannot separate a
    red object from a cast, but several clips of a camera can: in "sky" by the pixels, in "memory" by recognising poles.

    Splits: 2,304 training questions on 768 clips of 96 devices; validation 720 questions on 240 clips of 24 other
    devices; test 1,728 on 576 other clips of the 96 ("seen") and 1,440 on 480 clips of 48 others ("unseen").

    Unlabelled: 24 clips of every device that are neither in the validation nor in the test split (for the 96 devices,
    they include the training clips): sessions are drawn from them.

    Pretraining, in the world "sky" of seed 0 only and for all worlds: 6,016 clips, each of a different camera, with a
    caption and three questions by an observer who sees the clip but does not know the camera: apparent colours in
    twelve names, finer than the six colours need; the pretraining answers in words.

    Vocabulary: the 16 answers, and one class for the rest: 17.

    Further files below `root`: `devices.json` (clip: {device, role, cast}), `captions.json` (`sentences`:
    [{caption, video_id}]), `pretraining_qa.json`, `test_seen_qa.json`, `test_unseen_qa.json`, `history_qa.json` (labels
    of the unseen devices' unlabelled clips: for controls only), `vocab.txt` (WordPieces of the training text),
    `digests.json`.

    Args:
        arguments, options: see `VideoTextDataModule`.
        most_devices: number of the devices that train, the first by name; None is all.
        held_out_arc: devices whose cast is in [0, held_out_arc) degrees do not train; in the test, unseen devices with
            such a cast are the group "arc", and training devices that do not train the group "left out".
        name_backgrounds: whether captions name the hue of the background.
    """

    views: ClassVar[frozenset[View]] = frozenset({"samples", "sessions", "captions"})
    DOMAINS: ClassVar[tuple[DomainKind, ...]] = ()
    PUBLISHED: ClassVar[Published] = {}  # no counts are published

    def __init__(
        self,
        *arguments: Any,
        most_devices: int | None = None,
        held_out_arc: float = 0.0,
        name_backgrounds: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        check_minimums({"most_devices": (1 if most_devices is None else most_devices, 1)})
        if not 0 <= held_out_arc < 360:
            raise ConfigError(f"data.init_args.held_out_arc is {held_out_arc}: must be from 0 to below 360 degrees")
        self.most_devices, self.held_out_arc, self.name_backgrounds = most_devices, held_out_arc, name_backgrounds

    def read_split(self, split: Split) -> list[Sample]:
        """Read all samples of a split, in training only those of devices that train; see the base class."""
        samples = super().read_split(split)
        if split != "train":
            return samples
        return [sample for sample in samples if self.devices[sample.clip]["device"] in self._seen]

    def remedy(self) -> str:
        """Return the command that renders the dataset; a complete one is not rendered again."""
        delete, again = (f"delete {self.root} and ", " again") if os.path.exists(self.root) else ("", "")
        return f"{delete}render it{again}: cdc-mmpg clips {self.root}, with its --world, --seed and --size"

    @cached_property
    def devices(self) -> dict[str, dict[str, str | float]]:
        """Device, role and cast by clip."""
        path = self.root / "devices.json"
        rows = self.read_json(path)
        for clip, row in rows.items() if isinstance(rows, dict) else [("", rows)]:
            kinds = [type(row.get(key)) for key in ("device", "role", "cast")] if isinstance(row, dict) else []
            if kinds != [str, str, float]:
                raise DataError(f"{path}: {clip!r} is {row!r:.80}, not {{device, role, cast}}\n{self.remedy()}")
        return rows

    def list_further_clips(self) -> set[str]:
        """Return the names of unlabelled and captioned clips."""
        return set(self.devices)

    def origins(self, split: Split) -> list[SampleOrigin]:
        """Return the origin of each sample; a device is seen if it trains."""
        return self._list_origins(self._splits[split].samples)

    def _list_origins(self, samples: Sequence[Sample]) -> list[SampleOrigin]:
        origins = []
        for sample in samples:
            device = str(self.devices[sample.clip]["device"])
            unseen = ARC if self._is_in_arc(sample.clip) else "unseen"
            other = "left out" if device in self._trainable else unseen
            group = "seen" if device in self._seen else other
            origins.append(SampleOrigin(sample.clip, device, group, sample.type, sample.question, sample.answer))
        return origins

    @cached_property
    def _seen(self) -> set[str]:
        """Devices that train."""
        inside = {str(row["device"]) for clip, row in self.devices.items() if self._is_in_arc(clip)}
        return set(sorted(self._trainable - inside)[: self.most_devices])

    @cached_property
    def _trainable(self) -> set[str]:
        """Devices whose clips have training questions."""
        return {str(row["device"]) for row in self.devices.values() if row["role"] == "train"}

    def _is_in_arc(self, clip: str) -> bool:
        """Return whether the cast of a clip's device is in the held-out arc."""
        return float(self.devices[clip]["cast"]) % 360 < self.held_out_arc

    def sessions(self) -> Sessions:
        """Return the training and history clips by device."""
        devices = {
            clip: str(row["device"])
            for clip, row in self.devices.items()
            if row["role"] in ("train", "history") and self.is_ready(clip)
        }
        recording = (row for row in self.devices.values() if row["role"] != "pretraining")
        casts = {str(row["device"]): float(row["cast"]) for row in recording}
        backgrounds = {clip: content.background for clip, content in self.contents().items()}
        return self.pool_sessions(devices, casts, backgrounds)

    def device_labels(self) -> DeviceLabels:
        """Return questions about the unseen devices' unlabelled clips, with answers: for controls only."""
        samples = [sample for sample in self.read_questions("history_qa.json") if self.is_ready(sample.clip)]
        return DeviceLabels(self.build(samples), self._list_origins(samples))

    def contents(self) -> dict[str, Content]:
        """Return the content that the generator drew for every unlabelled clip: for controls only."""
        path = self.root / DIGESTS
        record = self.read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("seed"), int):
            raise DataError(f"{path}: the seed of the clips is missing\n{self.remedy()}")
        contents = {}
        for clip, row in self.devices.items():
            if row["role"] in ("train", "history") and self.is_ready(clip):
                scene, cast = draw_scene(record["seed"], clip, record.get("world", "sky")), float(row["cast"])
                contents[clip] = Content(
                    row["device"] in self._seen,
                    tuple(thing.shape for thing in scene.things),
                    tuple(thing.color for thing in scene.things),
                    tuple(thing.color for thing in rename_colors_as_seen(scene, cast).things),
                    (scene.hue + cast) % 360,
                )
        return contents

    def build_word_questions(self, samples: Sequence[Sample]) -> ClipDataset:
        """Build questions whose labels are the WordPiece ids of their answers."""
        words = [ids[1:-1] for ids in self.text([sample.answer for sample in samples])]
        if several := {sample.answer for sample, ids in zip(samples, words, strict=True) if len(ids) != 1}:
            names = ", ".join(sorted(several))
            raise DataError(
                f"vocabulary {self.vocab or HUB_NAME}: {names} must be one WordPiece each: use the dataset's vocab.txt "
                "(leave out VOCAB=)"
            )
        questions = self.build(samples)
        questions.labels = torch.tensor([word for (word,) in words])
        return questions

    def captions(self) -> Captions:
        """Build captioned clips with their questions; 1/24 of them, by a hash of the name, is for validation."""
        path = self.root / "captions.json"
        content = self.read_json(path)
        if not isinstance(content, dict) or "sentences" not in content:
            raise DataError(f"{path}: has no sentences: [{{caption, video_id}}]\n{self.remedy()}")
        sentences = as_rows(content["sentences"], path, "sentences")
        rows = [(row.clip("video_id"), row.field(str, "caption")) for row in sentences]
        if not self.name_backgrounds:
            rows = [(clip, caption.rpartition(BACKGROUND_WORD)[0]) for clip, caption in rows]
        questions: dict[str, list[Sample]] = {}
        for sample in self.read_questions("pretraining_qa.json"):
            questions.setdefault(sample.clip, []).append(sample)
        parts: dict[bool, list[Sample]] = {False: [], True: []}
        for clip, caption in rows:
            if self.is_ready(clip) and clip in questions:
                held_out = int(hashlib.sha256(clip.encode()).hexdigest(), 16) % 24 == 0
                parts[held_out].append(Sample(clip, caption))
        if not parts[False] or not parts[True]:
            usable = sum(map(len, parts.values()))
            raise DataError(
                f"{path}: {usable} of {len(rows)} captioned clips are decoded and have questions: training and "
                f"validation need at least one each\n{self.remedy()}"
            )
        number = min(map(len, questions.values()))
        train, val = (
            CaptionDataset(
                self.build(samples).with_augmentation(not held_out),
                self.build_word_questions([row for sample in samples for row in questions[sample.clip][:number]]),
                self.text.neutral(),
            )
            for held_out, samples in parts.items()
        )
        digest = hashlib.sha256()
        for part in (train, val):
            digest.update((part.captions.digest(False) + part.questions.digest(False)).encode())
        return Captions(train, val, len(train), len(train.questions), digest.hexdigest())
