"""Section of examples: clips with a question that only the static or only the adaptive method answers correctly."""

import os
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from math import isnan
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from cdc_mmpg.catalogue import METHOD_LABELS
from cdc_mmpg.errors import DataError
from cdc_mmpg.evaluation.answers import read_answers
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import cite
from cdc_mmpg.evidence.runs import ALL_GROUPS, Run
from cdc_mmpg.evidence.selection import describe_group, find_adaptive_side, find_static_side
from cdc_mmpg.media.video import read_frames
from cdc_mmpg.report.document import Page, Paragraph
from cdc_mmpg.results import PREDICTIONS

CLIP_SUFFIXES = (".mp4", ".avi", ".gif", ".webm", ".mkv", ".mov")
EXAMPLES_PER_KIND = 4
STRIP_FRAMES = 3  # number of frames shown of each clip
FRAME_PIXELS = 88  # width and height of a frame


class ClipExample(NamedTuple):
    """A question that only one of the two methods answers correctly, with both answers."""

    clip: str
    device: str
    question: str
    answer: str
    static: str
    adapted: str


class ShownClip(NamedTuple):
    """An example with frames of its clip, as JPEG in base64; empty without the clip."""

    example: ClipExample
    jpeg: str
    width: int = STRIP_FRAMES * FRAME_PIXELS
    height: int = FRAME_PIXELS


@dataclass(frozen=True)
class ClipsBlock:
    """Examples of one kind; see the blocks of `document`."""

    title: str
    clips: list[ShownClip]
    static_name: str
    adapted_name: str
    adapted_is_right: bool
    kind: ClassVar = "clips"


def choose_examples(
    first: Run, case: str, second: Run, other: str, group: str
) -> tuple[list[ClipExample], list[ClipExample]]:
    """Return questions where adaptation helps, and where it hurts: the first of every device in file order.

    Right and wrong are by label, as in the results: two candidates of a choice may have the same words.

    Args:
        first: run of the adaptive method.
        case: its case.
        second: run of the static method.
        other: its case.
        group: group of devices, or `ALL_GROUPS`.
    """

    def read_words(run: Run, case: str) -> Iterator[tuple[tuple[str, ...], tuple[str, bool]]]:
        assert run.answers is not None
        words, correct = read_answers(run.path / PREDICTIONS).given[case], run.answers.correct[case].tolist()
        for key, of_group, word, right in zip(run.answers.keys, run.answers.groups, words, correct, strict=True):
            if group in (of_group, ALL_GROUPS) and not isnan(right):
                yield key, (str(word), bool(right))

    static_words = dict(read_words(second, other))
    chosen: tuple[list[ClipExample], list[ClipExample]] = ([], [])
    used: tuple[set[str], set[str]] = (set(), set())
    for key, (answered, right) in read_words(first, case):
        clip, device, _, question, answer, _ = key
        kind = 0 if right else 1
        static, static_right = static_words.get(key, ("", right))
        if right != static_right and device not in used[kind] and len(chosen[kind]) < EXAMPLES_PER_KIND:
            used[kind].add(device)
            chosen[kind].append(ClipExample(clip, device, question, answer, static, answered))
    return chosen


def add_examples(page: Page, evidence: Evidence, data: Path | None) -> None:
    """Add clips with a question where adaptation helps, and clips where it hurts.

    Args:
        page: page to which the section is added.
        evidence: evidence of the dataset.
        data: folder of the dataset with the clips; without it no frames are shown.
    """
    first, second = find_adaptive_side(evidence), find_static_side(evidence)
    pairs = evidence.pair_runs(first, second) if first and second and not evidence.is_retrieval else []
    if not first or not second or not pairs:
        return
    a, b = pairs[0]
    case, other = a.find_case(first.case) or "", b.find_case(second.case) or ""
    helped, hurt = choose_examples(a, case, b, other, evidence.group)
    counts = evidence.count_only_one_right(first, second)
    page.begin("examples", "Examples")
    if counts:
        text = cite(
            f"Seed {a.seed}, {describe_group(evidence)}: {{}} questions that only {METHOD_LABELS[first.name]} answers "
            f"correctly, {{}} that only {METHOD_LABELS[second.name]} does. Shown for both kinds: the first question "
            "of each of the first devices, in the order of the file, without further selection.", *counts[0],
        )  # fmt: skip
        page.add(Paragraph(page.mark("examples/numbers", text)))
    files = _find_clips(data, {example.clip for example in (*helped, *hurt)}) if data else {}
    if not files:
        page.add_paragraph("Clips are not shown: pass the dataset's folder with --data.", is_note=True)
    for title, examples, adapted_is_right in (("Adaptation helps", helped, True), ("Adaptation hurts", hurt, False)):
        clips = [
            ShownClip(example, _encode_strip(files[example.clip]) if example.clip in files else "")
            for example in examples
        ]
        page.add(ClipsBlock(title, clips, METHOD_LABELS[second.name], METHOD_LABELS[first.name], adapted_is_right))


def _find_clips(root: Path, names: set[str]) -> dict[str, Path]:
    """Find the files of clips by name, anywhere below a dataset's folder."""
    paths: dict[str, Path] = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in files:
            stem, suffix = os.path.splitext(file)
            name = stem if stem in names else file
            if suffix.lower() in CLIP_SUFFIXES and name in names:
                paths.setdefault(name, Path(folder) / file)
    return paths


def _encode_strip(path: Path) -> str:
    """Encode frames of a clip side by side as JPEG in base64; empty for a clip that cannot be decoded."""
    from PIL import Image  # noqa: PLC0415  only for pictures

    def choose_places(count: int) -> list[int]:
        return [int((k + 0.5) * count / STRIP_FRAMES) for k in range(STRIP_FRAMES)]

    try:
        shown = [np.asarray(frame) for frame in read_frames(path, choose_places, FRAME_PIXELS, side=FRAME_PIXELS)]
    except DataError:
        return ""
    side = FRAME_PIXELS
    cut = [frame[:, (frame.shape[1] - side) // 2 :][:side, :side] for frame in shown]
    file = BytesIO()
    Image.fromarray(np.concatenate(cut, axis=1)).save(file, "JPEG", quality=82)
    return b64encode(file.getvalue()).decode()
