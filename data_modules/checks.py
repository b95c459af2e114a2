"""Checks of a dataset before training: what is refused, and what is reported."""

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
        minimums: value and minimum by name of the argument.

    Raises:
        ConfigError: an argument is too small; names the first one.
    """
    for name, (value, least) in minimums.items():
        if value < least:
            raise ConfigError(f"data.init_args.{name} is {value}: must be at least {least}")


def check_task(dataset: type["AnnotatedSplits"], num_classes: int | None, protocol: str | None) -> None:
    """Refuse a protocol that the dataset does not have, and a number of classes that does not fit its task.

    Raises:
        ConfigError: names the argument.
    """
    if protocol not in (None, *dataset.PROTOCOLS):
        raise ConfigError(f"data.init_args.protocol is {protocol!r}: must be one of {', '.join(dataset.PROTOCOLS)}")
    if (num_classes is None) == (dataset.task == "open_ended"):
        raise ConfigError(
            f"data.init_args.num_classes is {num_classes}: set it for open-ended questions, and for no other task"
        )


def check_domains(
    dataset: type["AnnotatedSplits"], domains: DomainKind | None, held_out: Sequence[str] | None, frame_cache: str
) -> None:
    """Refuse domains that the dataset or the frame cache does not support.

    Raises:
        ConfigError: names the argument.
    """
    if domains is not None and domains not in dataset.DOMAINS:
        raise ConfigError(
            f"data.init_args.domains is {domains!r}, but {dataset.__name__} "
            + (f"supports {' or '.join(dataset.DOMAINS)}" if dataset.DOMAINS else "knows its devices")
        )
    if domains is None and held_out is not None:
        raise ConfigError("data.init_args.held_out names domains, but data.init_args.domains is not set")
    if frame_cache == "device" and domains not in (None, "categories"):
        raise ConfigError(
            f"data.init_args.domains is {domains}, which changes frames when they are read from the disk, but "
            "data.init_args.frame_cache is device, which does not read from the disk: set FRAME_CACHE=disk"
        )


def check_root(root: Path, remedy: Callable[[], str]) -> None:
    """Refuse a root that is not a folder, is empty, or cannot be read.

    Raises:
        DataError: names the folder.
    """
    try:
        if root.is_dir() and os.listdir(root):
            return
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}): fix the path or its permissions") from error
    raise DataError(f"{root}: {'an empty' if root.is_dir() else 'no such'} folder\n{remedy()}")


def check_categories(data: "AnnotatedSplits", split: Split, shift: Shift) -> None:
    """Refuse a split in which a clip has no domain.

    Raises:
        DataError: a clip has no domain; names all of them.
    """
    clips = sorted({sample.clip for sample in data.samples(split)})
    if unknown := [clip for clip in clips if not shift.domain(clip)]:
        raise DataError(
            f"{data.root}, split {split}: {len(unknown)} of {len(clips)} clips have no category:"
            f"{write_listing(unknown, data.cache_dir / 'uncategorised.txt')}\nfix the file, or use "
            "ARGS=--data.init_args.domains=casts or corruptions"
        )


def describe_held_out(data: "AnnotatedSplits", split: Split, selected: Sequence[Sample]) -> str:
    """Return a note on what a split lost with the held-out domains.

    Raises:
        DataError: no sample of the split is left.
    """
    lost, unit = count_held_out(data, split, selected), "captions" if data.task == "retrieval" else "questions"
    domains = f"{data.domains} {', '.join(data.held_out)}"
    if not selected:
        raise DataError(
            f"{data.root}: every clip of split {split} is of a held-out domain ({domains}): hold out other domains, "
            "ARGS=--data.init_args.held_out=[...]"
        )
    return f"without {lost['questions']:,} {unit} about {lost['clips']:,} clips of unseen domains ({domains})"


def count_held_out(data: "AnnotatedSplits", split: Split, selected: Sequence[Sample]) -> dict[str, int]:
    """Count the questions and clips that a split lost with the held-out domains."""
    before, after = count_samples(data, data.samples(split)), count_samples(data, selected)
    return {unit: before[unit] - after[unit] for unit in before}


def count_samples(data: "AnnotatedSplits", samples: Sequence[Sample]) -> dict[str, Any]:
    """Count the questions and clips of samples."""
    return {"questions": data.count_questions(samples), "clips": len({sample.clip for sample in samples})}


def find_shared_clips(data: "AnnotatedSplits", splits: Sequence[Split]) -> dict[tuple[Split, Split], list[str]]:
    """Find the clips that two of the splits share; pairs of splits without a shared clip are left out."""
    clips = {split: {sample.clip for sample in data.samples(split)} for split in splits}
    pairs = [(first, second) for place, first in enumerate(splits) for second in splits[place + 1 :]]
    shared = {(first, second): sorted(clips[first] & clips[second]) for first, second in pairs}
    return {pair: names for pair, names in shared.items() if names}


def refuse_shared_clips(data: "AnnotatedSplits") -> None:
    """Refuse splits that share a clip.

    Raises:
        DataError: names the splits and the clips.
    """
    for (first, second), names in find_shared_clips(data, SPLITS).items():
        raise DataError(
            f"{data.root}: {first} and {second} share {len(names)} clips, but splits must not: fix the annotation "
            f"files, or fetch them again:{write_listing(names, data.cache_dir / 'shared.txt')}"
        )


def compare_with_published(data: "AnnotatedSplits", splits: Mapping[Split, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `VideoTextDataModule.published` for the given counts by split."""
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
    """Warn if counts of the annotations differ from the published ones."""
    differing = [
        f"{row['split']} {row['here']:,} of {row['published']:,} {row['what']}"
        for row in data.published() if not row["same"]
    ]  # fmt: skip
    if differing:
        logger.warning(
            "%s: not the published annotations, so results are not comparable with published ones: %s",
            data.root, "; ".join(differing),
        )  # fmt: skip


def describe_nothing_found(data: "AnnotatedSplits", named: Sequence[str], paths: Mapping[str, Path]) -> str:
    """Return the error message if none of the named clips exists: one expected name, one existing name."""
    looked_for = next((name for name in named if Path(name).stem in paths), named[0])
    suffix = Path(looked_for).suffix if Path(looked_for).stem in paths else ""
    found = looked_for.removesuffix(suffix) if suffix else next(iter(paths), "")
    existing = f"found {found!r} ({paths[found]}), among {len(paths)}" if found else "found no clip"
    message = f"{data.root}: none of the {len(named)} clips exists: looked for {looked_for!r}, among others; {existing}"
    if suffix:
        return f"{message}. Clip names have no suffix: remove {suffix!r} in the annotations"
    return f"{message}\n{data.remedy()}"


def check_split(data: "AnnotatedSplits", split: Split, ready: Sequence[Sample], paths: Mapping[str, Path]) -> None:
    """Refuse a split without a ready clip, and a training split without a known answer.

    Raises:
        DataError: names an expected clip and an existing one, or gives an example of an answer.
    """
    if not ready:
        looked_for, found = data.select_samples(split)[0].clip, next(iter(paths), "")
        raise DataError(
            f"{data.root}: no question of split {split} has a readable clip: looked for {looked_for!r}, among others; "
            + (f"found {found!r}, among {len(paths)}" if found else "found no clip")
            + f"\n{data.remedy()}"
        )
    if split == "train":
        data.check_answers(split, ready)


def refuse_lost(data: "VideoTextDataModule", lost: Sequence[str], clips: int) -> None:
    """Refuse to continue if more than `max_missing` of `clips` clips are lost.

    Raises:
        DataError: names them; the full list is next to the cache.
    """
    if len(lost) > data.max_missing:
        raise DataError(data.describe_lost(lost, clips))


def run_all_checks(data: "VideoTextDataModule") -> dict[str, Any]:
    """Check everything and fill the frame cache, changed clips included; continue after a problem.

    Returns:
        splits: by split, questions and clips, answers outside the vocabulary, the maximum accuracy, what is ready, and
        with domains what is held out;
        published: rows of `compare_with_published`; missing: names of absent clips; unreadable: reasons by name;
        shared_between_splits: names by pair; same_content_in_splits: names of clips that are the same file; problems:
        error messages; clips, ready: number of named clips and of those with frames; cache: its folder and size in
        bytes; protocol and notes: see `AnnotatedSplits`.
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

    has_tokenizer = True
    try:
        data.text = TextEncoder(data.vocab, data.text_length)
    except DataError as error:
        logger.warning("training will need a vocabulary: %s", error)
        has_tokenizer = False
    read = {split: attempt(partial(data.samples, split), None) for split in SPLITS}
    annotated: dict[Split, list[Sample]] = {split: samples for split, samples in read.items() if samples}
    selected = {split: attempt(partial(data.select_samples, split), None) for split in annotated}
    has_vocabulary = attempt(read_vocabulary, False)
    named = {sample.clip for samples in annotated.values() for sample in samples}
    named |= attempt(data.list_further_clips, set())
    paths: dict[str, Path] = attempt(data.find_clips, {})
    present = {name: paths[name] for name in sorted(named) if name in paths}
    unreadable = data.cache.fill(present, count_processors(), renew=True)
    splits: dict[Split, dict[str, Any]] = {}
    for split, samples in annotated.items():
        row = splits[split] = count_samples(data, samples)
        if has_vocabulary:
            row["unknown_answers"] = data.count_unknown_answers(samples)
            row["ceiling"] = 1 - row["unknown_answers"] / row["questions"]
        if data.domains and (seen := selected[split]) is not None:
            row["held_out"] = count_held_out(data, split, seen)
        ready = present.keys() - unreadable.keys()
        row["ready"] = count_samples(data, [sample for sample in samples if sample.clip in ready])
        if has_vocabulary and (seen := selected[split]) is not None:
            attempt(partial(data.check_answers, split, seen), None)
            usable = [sample for sample in seen if sample.clip in ready]
            if present:
                attempt(partial(check_split, data, split, usable, paths), None)
            if usable and has_tokenizer:
                attempt(partial(data.build, usable), None)
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
    """Find clips of different splits that are the same file under different names."""
    owners: dict[str, dict[str, Split]] = {}
    for split, samples in annotated.items():
        for clip in {sample.clip for sample in samples} & data.cache.ready:
            owners.setdefault(data.cache.key(clip), {})[clip] = split
    return sorted(sorted(clips) for clips in owners.values() if len(set(clips.values())) > 1)
