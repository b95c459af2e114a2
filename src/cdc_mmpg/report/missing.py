"""What a dataset's tables lack, with the commands that make it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.catalogue import (
    BASELINE,
    BY_NAME,
    CHANGED,
    EMBEDDED,
    FRAMES,
    PAPERS,
    PRETRAINING,
    RECIPE_FRAMES,
    STUDY,
    STUDY_SEEDS,
    WORLDS,
    runs_of_all,
    with_frames,
)
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.runs import ALL_GROUPS, PREDICTIONS
from cdc_mmpg.evidence.selection import find_method_runs
from cdc_mmpg.report.paper_tables import build_frames_table

FURTHER_WORLDS = WORLDS.keys() - {EMBEDDED}  # which are not asked what the paper's reasoner does


def find_missing(evidence: Evidence) -> list[tuple[str, list[str]]]:
    """Return for every table the commands that make what it lacks.

    A study's seeds are those that any of its own runs has: three of the main rows say nothing about the others.
    """
    devices = evidence.groups != [ALL_GROUPS]
    trained = [BY_NAME[name] for name in runs_of_all(embedded=devices) if BY_NAME[name].label]
    main = [method.name for method in trained if method.several_seeds or not devices]
    once = [method.name for method in trained if method.name not in main]  # `make tables` takes one seed
    sessions = [method.name for method in trained if method.datasets == "devices" and method.program == "fit"]
    other_frames = [with_frames(BASELINE, number) for number in FRAMES if number != RECIPE_FRAMES]
    listed_frames = other_frames if build_frames_table(evidence) else []
    variants = list(CHANGED) if devices else []
    has_study = devices and evidence.dataset not in FURTHER_WORLDS
    seeds = evidence.find_seeds(main) or [0]
    seeds_of_once = evidence.find_seeds(once) or seeds[:1]
    by_table: list[tuple[str, Sequence[str], Sequence[int]]] = [
        ("the paper's methods", PAPERS, seeds),
        ("controls", [name for name in main if name not in PAPERS + tuple(sessions)], seeds),
        ("sessions", sessions, seeds),
        ("opponents on the device", ["on_device", "prompts"] if devices else [], seeds_of_once),
        ("frames (table 4)", listed_frames, evidence.find_seeds(other_frames) or seeds[:1]),
        ("what is changed in training", variants, evidence.find_seeds(variants) or seeds[:1]),
        ("the study of the reasoner", list(STUDY) if has_study else [], STUDY_SEEDS),
        ("privacy", ["privacy"] if devices else [], evidence.find_seeds(["privacy"]) or seeds[:1]),
    ]
    missing = []
    for what, names, wanted in by_table:
        commands = []
        for name in names:
            trained_seeds = evidence.find_seeds([name])
            if lacking := [seed for seed in (seeds_of_once if name in once else wanted) if seed not in trained_seeds]:
                commands.append(format_command(evidence, name, lacking))
        if commands:
            missing.append((what, commands))
    without_answers = [
        f"delete {run.path} and train anew: it has no {PREDICTIONS}"
        for run in find_method_runs(evidence) if run.answers is None
    ]  # fmt: skip
    if without_answers:
        missing.append(("answers by question, for the differences", without_answers))
    return missing


def format_command(evidence: Evidence, name: str, seeds: Sequence[int]) -> str:
    """Return the command that makes a run, a method or a variant of one, with one seed or several."""
    words = ["make", "train", f"DATASET={evidence.dataset}", f"METHOD={name}"]
    if len(seeds) == 1:
        words.append(f"SEED={seeds[0]}")
    else:
        words.append(f"SEEDS={len(seeds)}" if list(seeds) == list(range(len(seeds))) else "SEED=$seed")
    if name in STUDY:
        words.append("ENCODER_SEED=0")  # one encoder for all
    out = evidence.folder.parent
    if out.absolute() != Path("checkpoints").absolute():
        words.append(f"OUT={shlex.quote(str(out))}")
    encoders = (run.find("encoder") for run in evidence.find_runs("linear"))
    given = [encoder for encoder in encoders if encoder and PRETRAINING not in Path(encoder).parts]
    words += [f"CHECKPOINT={shlex.quote(encoder)}" for encoder in given[:1]]
    line = " ".join(words)
    return f"for seed in {' '.join(map(str, seeds))}; do {line}; done" if "SEED=$seed" in words else line
