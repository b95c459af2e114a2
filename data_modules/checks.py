"""Checks of a dataset before it is trained on: what is refused, and what is reported."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdc_mmpg.data.batch import SPLITS, Split
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.files import write_listing
from cdc_mmpg.media.text import TextEncoder
from cdc_mmpg.processors import count_processors
from data_modules.clip_dataset import Sample
from data_modules.domains import DomainKind, Shift

if TYPE_CHECKING:
    from data_modules.annotated_splits import AnnotatedSplits
    from data_modules.base import VideoTextDataModule

logger = logging.getLogger(__name__)


def check_minimums(minimums: Mapping[str, tuple[int, int]]) -> None:
    """Refuse arguments that are too small.

    Args:
        minimums: value and least allowed value, by name of the argument.

    Raises:
        ConfigError: names the first one.
    """
    for name, (value, least) in minimums.items():
        if value < least:
            raise ConfigError(f"data.init_args.{name} is {value}: at least {least}")


def check_task(dataset: type["AnnotatedSplits"], num_classes: int | None, protocol: str | None) -> None:
    """Refuse a protocol that the dataset does not have, and classes that its task does not have.

    Raises:
        ConfigError: names the argument.
    """
    if protocol not in (None, *dataset.PROTOCOLS):
        raise ConfigError(f"data.init_args.protocol is {protocol!r}: one of {', '.join(dataset.PROTOCOLS)}")
    if (num_classes is None) == (dataset.task == "open_ended"):
        raise ConfigError(
            f"data.init_args.num_classes is {num_classes}: open-ended questions have classes, the other tasks none"
        )


def check_domains(
    dataset: type["AnnotatedSplits"], domains: DomainKind | None, held_out: Sequence[str] | None, frame_cache: str
) -> None:
    """Refuse domains that the dataset cannot be given, or that do not go with the frame cache.

    Raises:
        ConfigError: names the argument.
    """
    if domains is not None and domains not in dataset.DOMAINS:
        raise ConfigError(
            f"data.init_args.domains is {domains!r}, but {dataset.__name__} "
            + (f"can be given {' or '.join(dataset.DOMAINS)}" if dataset.DOMAINS else "has devices of its own")
        )
    if domains is None and held_out is not None:
        raise ConfigError("data.init_args.held_out names domains, but data.init_args.domains gives none")
    if frame_cache == "device" and domains not in (None, "categories"):
        raise ConfigError(
            f"data.init_args.domains is {domains}, which change frames when they are read from the disk, and "
            "data.init_args.frame_cache is device, where nothing is read any more: leave them on the disk "
            "(FRAME_CACHE=disk)"
        )


def check_root(root: Path, remedy: Callable[[], str]) -> None:
    """Refuse a root that is no folder, or may not be read.

    Raises:
        DataError: names it.
    """
    try:
        if root.is_dir() and os.listdir(root):
            return
    except OSError as error:
        raise DataError(f"{root}: may not be read ({error.strerror}): mend that") from error
    raise DataError(f"{root}: {'an empty' if root.is_dir() else 'no such'} folder\n{remedy()}")


def check_categories(data: "AnnotatedSplits", split: Split, shift: Shift) -> None:
    """Refuse a split of which a clip has no domain.

    Raises:
        DataError: one has not; names it.
    """
    clips = sorted({sample.clip for sample in data.samples(split)})
    if unknown := [clip for clip in clips if not shift.domain(clip)]:
        raise DataError(
            f"{data.root}, split {split}: of {len(clips)} clips {len(unknown)} have no category:"
            f"{write_listing(unknown, data.cache_dir / 'uncategorised.txt')}\nmend the file, or take "
            "ARGS=--data.init_args.domains=casts or corruptions"
        )


def describe_held_out(data: "AnnotatedSplits", split: Split, selected: Sequence[Sample]) -> str:
    """Return what left a split with the domains that are held out, for its note.

    Raises:
        DataError: everything has left.
    """
    left, unit = count_held_out(data, split, selected), "captions" if data.task == "retrieval" else "questions"
    domains = f"{data.domains} {', '.join(data.held_out)}"
    if not selected:
        raise DataError(
            f"{data.root}: every clip of split {split} is of a domain that is held out ({domains}): name others, "
            "ARGS=--data.init_args.held_out=[...]"
        )
    return f"without {left['questions']:,} {unit} about {left['clips']:,} clips of unseen domains ({domains})"


def count_held_out(data: "AnnotatedSplits", split: Split, selected: Sequence[Sample]) -> dict[str, int]:
    """Count the questions and clips that left a split with the domains that are held out."""
    before, after = count_samples(data, data.samples(split)), count_samples(data, selected)
    return {what: before[what] - after[what] for what in before}


def count_samples(data: "AnnotatedSplits", samples: Sequence[Sample]) -> dict[str, Any]:
    """Count questions and clips of samples."""
    return {"questions": data.count_questions(samples), "clips": len({sample.clip for sample in samples})}


def find_shared_clips(data: "AnnotatedSplits", splits: Sequence[Split]) -> dict[tuple[Split, Split], list[str]]:
    """Return the clips that two of the splits have in common, by pair."""
    clips = {split: {sample.clip for sample in data.samples(split)} for split in splits}
    pairs = [(first, second) for place, first in enumerate(splits) for second in splits[place + 1 :]]
    found = {(first, second): sorted(clips[first] & clips[second]) for first, second in pairs}
    return {pair: names for pair, names in found.items() if names}


def refuse_shared_clips(data: "AnnotatedSplits") -> None:
    """Refuse splits that share a clip.

    Raises:
        DataError: names the splits and the clips.
    """
    for (first, second), names in find_shared_clips(data, SPLITS).items():
        raise DataError(
            f"{data.root}: {first} and {second} share {len(names)} clips, and a split must not be tested on what "
            f"another was trained on:{write_listing(names, data.cache_dir / 'shared.txt')}"
        )


def compare_with_published(data: "AnnotatedSplits", splits: Mapping[Split, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `VideoTextDataModule.published` for the splits whose counts are given."""
    rows = []
    for name, counts in data.PUBLISHED.get(data.protocol, {}).items():
        parts: list[Any] = name.split("+")
        if not all(part in splits for part in parts):
            continue
        for what, count in counts.items():
            editions = {count: ""} if isinstance(count, int) else count
            here = data.num_classes - 1 if what == "answers" else sum(splits[part][what] for part in parts)
            number = here if here in editions else next(iter(editions))
            row = {"split": name, "what": what, "published": number, "here": here}
            rows.append(row | {"same": here == number, "edition": editions[number]})
    return rows


def warn_of_unpublished(data: "VideoTextDataModule") -> None:
    """Warn where the annotations are not those that were published."""
    differing = [
        f"{row['split']} {row['here']:,} of {row['published']:,} {row['what']}"
        for row in data.published() if not row["same"]
    ]  # fmt: skip
    if differing:
        logger.warning(
            "%s: not the annotations that were published, so its figures do not compare with published ones: %s",
            data.root, "; ".join(differing),
        )  # fmt: skip


def describe_nothing_found(data: "AnnotatedSplits", named: Sequence[str], paths: Mapping[str, Path]) -> str:
    """Return the error where none of the named clips is there: a name looked for, a name found."""
    looked_for = next((name for name in named if Path(name).stem in paths), named[0])
    suffix = Path(looked_for).suffix if Path(looked_for).stem in paths else ""
    found = looked_for.removesuffix(suffix) if suffix else next(iter(paths), "")
    there = f"found {found!r} ({paths[found]}), among {len(paths)}" if found else "found no clip"
    said = f"{data.root}: none of the {len(named)} clips is there: looked for {looked_for!r}, among others; {there}"
    if suffix:
        return f"{said}. Clips go by their names without suffix: remove {suffix!r} in the annotations"
    return f"{said}\n{data.remedy()}"


def check_split(data: "AnnotatedSplits", split: Split, ready: Sequence[Sample], paths: Mapping[str, Path]) -> None:
    """Refuse a split of which no clip is ready, or on which nothing can be trained.

    Raises:
        DataError: names a clip that is looked for and one that is there.
    """
    if not ready:
        looked_for, found = data.select_samples(split)[0].clip, next(iter(paths), "")
        raise DataError(
            f"{data.root}: no question of split {split} has its clip here: looked for {looked_for!r}, "
            "among others; "
            + (f"found {found!r}, among {len(paths)}" if found else "found no clip")
            + f"\n{data.remedy()}"
        )
    if split == "train":
        data.check_answers(split, ready)


def refuse_lost(data: "VideoTextDataModule", lost: Sequence[str], clips: int) -> None:
    """Refuse to go on where more of `clips` clips are lost than `max_missing`.

    Raises:
        DataError: names them; the whole list lies beside the cache.
    """
    if len(lost) > data.max_missing:
        raise DataError(data.describe_lost(lost, clips))


def report(data: "VideoTextDataModule") -> dict[str, Any]:
    """Look at everything and fill the frame cache, clips that changed included; goes on where something is wrong.

    Returns:
        splits: questions and clips, answers outside the vocabulary and the ceiling, by split, what is ready, and
        of domains what is held out;
        published: the published counts beside those here; missing: names of absent clips; unreadable: reasons by
        name; shared_between_splits: names by pair; same_content_in_splits: other names of one file; problems:
        annotations that cannot be read; clips, ready: how many are named and have frames; cache: its folder and
        bytes; protocol and notes: see the class.
    """
    problems: list[str] = []

    def attempt(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except DataError as error:
            problems.append(str(error))
            return otherwise

    def read_vocabulary() -> bool:
        data.read_vocabulary()
        return True

    tokenizer = True
    try:
        data.text = TextEncoder(data.vocab, data.text_length)
    except DataError as error:
        logger.warning("training will need a vocabulary: %s", error)
        tokenizer = False
    found = {split: attempt(partial(data.samples, split), None) for split in SPLITS}
    annotated: dict[Split, list[Sample]] = {split: samples for split, samples in found.items() if samples}
    kept = {split: attempt(partial(data.select_samples, split), None) for split in annotated}
    vocabulary = attempt(read_vocabulary, False)
    named = {sample.clip for samples in annotated.values() for sample in samples}
    named |= attempt(data.list_further_clips, set())
    paths: dict[str, Path] = attempt(data.find_clips, {})
    present = {name: paths[name] for name in sorted(named) if name in paths}
    unreadable = data.cache.fill(present, count_processors(), renew=True)
    splits: dict[Split, dict[str, Any]] = {}
    for split, samples in annotated.items():
        row = splits[split] = count_samples(data, samples)
        if vocabulary:
            row["unknown_answers"] = data.count_unknown_answers(samples)
            row["ceiling"] = 1 - row["unknown_answers"] / row["questions"]
        if data.domains and (seen := kept[split]) is not None:
            row["held_out"] = count_held_out(data, split, seen)
        ready = present.keys() - unreadable.keys()
        row["ready"] = count_samples(data, [sample for sample in samples if sample.clip in ready])
        if vocabulary and (seen := kept[split]) is not None:
            attempt(partial(data.check_answers, split, seen), None)
            left = [sample for sample in seen if sample.clip in ready]
            if present:
                attempt(partial(check_split, data, split, left, paths), None)
            if left and tokenizer:
                attempt(partial(data.build, left), None)
    if paths and named and not present:
        problems.append(describe_nothing_found(data, sorted(named), paths))
    return {
        "protocol": data.protocol,
        "notes": data.notes,
        "splits": splits,
        "published": compare_with_published(data, splits),
        "clips": len(named),
        "ready": len(present) - len(unreadable),
        "missing": sorted(named - present.keys()),
        "unreadable": unreadable,
        "shared_between_splits": {
            " and ".join(pair): names for pair, names in find_shared_clips(data, list(annotated)).items()
        },
        "same_content_in_splits": _find_same_content(data, annotated),
        "problems": list(dict.fromkeys(problems)),
        "cache": {
            "folder": str(data.cache.folder),
            "bytes": sum(path.stat().st_size for path in data.cache.folder.glob("*.npy")),
        },
    }


def _find_same_content(data: "VideoTextDataModule", annotated: Mapping[Split, Sequence[Sample]]) -> list[list[str]]:
    """Return clips of different splits that are the same file under different names."""
    owners: dict[str, dict[str, Split]] = {}
    for split, samples in annotated.items():
        for clip in {sample.clip for sample in samples} & data.cache.ready:
            owners.setdefault(data.cache.key(clip), {})[clip] = split
    return sorted(sorted(clips) for clips in owners.values() if len(set(clips.values())) > 1)
