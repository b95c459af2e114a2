"""The section of examples: clips with a question that the static or the adaptive method alone answers rightly."""

import csv
import os
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from math import isnan
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from cdc_mmpg.catalogue import NAMES
from cdc_mmpg.errors import DataError
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import cite
from cdc_mmpg.evidence.runs import ALL_GROUPS, PREDICTIONS, Run
from cdc_mmpg.evidence.selection import describe_group, find_adaptive_side, find_static_side
from cdc_mmpg.media.video import read_frames
from cdc_mmpg.report.document import Page, Paragraph

CLIP_SUFFIXES = (".mp4", ".avi", ".gif", ".webm", ".mkv", ".mov")
EXAMPLES_OF_A_KIND = 4
STRIP_FRAMES = 3  # of a clip that are shown
FRAME_PIXELS = 88  # side of a frame


class ClipExample(NamedTuple):
    """A question that one answers rightly and the other does not."""

    clip: str
    device: str
    question: str
    answer: str
    static: str
    adapted: str


class ShownClip(NamedTuple):
    """An example with frames of its clip, as JPEG in base64; empty where there are none."""

    example: ClipExample
    jpeg: str
    width: int = STRIP_FRAMES * FRAME_PIXELS
    height: int = FRAME_PIXELS


@dataclass(frozen=True)
class ClipsBlock:
    """Examples of a kind; see the blocks of `document`."""

    title: str
    clips: list[ShownClip]
    static_name: str
    adapted_name: str
    adapted_is_right: bool
    kind: ClassVar = "clips"


def choose_examples(
    first: Run, case: str, second: Run, other: str, group: str
) -> tuple[list[ClipExample], list[ClipExample]]:
    """Return questions of a group where adaptation helps, and where it hurts: the first of every device in file order.

    Right and wrong are by label, as in the results: two candidates of a choice may have the same words.

    Args:
        first, case: what adapts.
        second, other: what does not.
        group: of devices, or everything.
    """

    def read_words(run: Run, case: str) -> Iterator[tuple[tuple[str, ...], tuple[str, bool]]]:
        assert run.answers is not None
        with (run.path / PREDICTIONS).open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        place = header.index(case)
        for key, row, right in zip(run.answers.keys, rows, run.answers.correct[case].tolist(), strict=True):
            if group in (row[2], ALL_GROUPS) and not isnan(right):
                yield key, (row[place], bool(right))

    before = dict(read_words(second, other))
    chosen: tuple[list[ClipExample], list[ClipExample]] = ([], [])
    used: tuple[set[str], set[str]] = (set(), set())
    for key, (answered, right) in read_words(first, case):
        clip, device, _, question, answer, _ = key
        way = 0 if right else 1
        was, was_right = before.get(key, ("", right))
        if right != was_right and device not in used[way] and len(chosen[way]) < EXAMPLES_OF_A_KIND:
            used[way].add(device)
            chosen[way].append(ClipExample(clip, device, question, answer, was, answered))
    return chosen


def add_examples(page: Page, evidence: Evidence, data: Path | None) -> None:
    """Add clips whose question adaptation gets right, and as many that it gets wrong.

    Args:
        page: to which the section is added.
        evidence: of the dataset.
        data: the dataset's folder, with the clips; without it no frames are shown.
    """
    first, second = find_adaptive_side(evidence), find_static_side(evidence)
    pairs = evidence.pair_runs(first, second) if first and second and not evidence.is_retrieval else []
    if not first or not second or not pairs:
        return
    a, b = pairs[0]
    case, other = a.find_case(first.case) or "", b.find_case(second.case) or ""
    helped, hurt = choose_examples(a, case, b, other, evidence.group)
    counts = evidence.count_right_alone(first, second)
    page.begin("examples", "Examples")
    if counts:
        text = cite(
            f"Of seed {a.seed}, {describe_group(evidence)}: {NAMES[first.name]} alone is right on {{}} questions, "
            f"{NAMES[second.name]} alone on {{}}. Below, of both kinds, the first question of each of the first "
            "devices in the file's order: no other choice was made.", *counts[0],
        )  # fmt: skip
        page.add(Paragraph(page.mark("examples/numbers", text)))
    files = _find_clips(data, {example.clip for example in (*helped, *hurt)}) if data else {}
    if not files:
        page.add_paragraph("Without the clips: give their folder as --data.", is_note=True)
    for title, examples, adapted_is_right in (("Adaptation helps", helped, True), ("Adaptation hurts", hurt, False)):
        clips = [
            ShownClip(example, _encode_strip(files[example.clip]) if example.clip in files else "")
            for example in examples
        ]
        page.add(ClipsBlock(title, clips, NAMES[second.name], NAMES[first.name], adapted_is_right))


def _find_clips(root: Path, names: set[str]) -> dict[str, Path]:
    """Return the files of clips by name, wherever they lie below a dataset's folder."""
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
    """Return some frames of a clip side by side, as JPEG in base64; empty for a clip that cannot be decoded."""
    from PIL import Image  # noqa: PLC0415  only for pictures

    def middle_places(count: int) -> list[int]:
        return [int((k + 0.5) * count / STRIP_FRAMES) for k in range(STRIP_FRAMES)]

    try:
        shown = [np.asarray(frame) for frame in read_frames(path, middle_places, FRAME_PIXELS, side=FRAME_PIXELS)]
    except DataError:
        return ""
    side = FRAME_PIXELS
    cut = [frame[:, (frame.shape[1] - side) // 2 :][:side, :side] for frame in shown]
    file = BytesIO()
    Image.fromarray(np.concatenate(cut, axis=1)).save(file, "JPEG", quality=82)
    return b64encode(file.getvalue()).decode()
