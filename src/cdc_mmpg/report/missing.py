"""Missing runs of a dataset's tables, with the commands that train them."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.catalogue import (
    BASELINE,
    BY_NAME,
    FRAME_COUNTS,
    PAPER_METHODS,
    PRETRAINING,
    RECIPE_FRAMES,
    STUDY,
    STUDY_SEEDS,
    SYNTHETIC,
    VARIANT_RUNS,
    WORLDS,
    list_methods,
    name_frames_variant,
)
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.runs import ALL_GROUPS
from cdc_mmpg.evidence.selection import find_method_runs
from cdc_mmpg.report.paper_tables import build_frames_table
from cdc_mmpg.results import PREDICTIONS

FURTHER_WORLDS = WORLDS.keys() - {SYNTHETIC}  # worlds in which the paper's reasoner is not studied


def find_missing(evidence: Evidence) -> list[tuple[str, list[str]]]:
    """Return for every table the commands that train its missing runs.

    The seeds of a study are those that any of its runs has, independent of the number of seeds in the main rows.
    """
    has_devices = evidence.groups != [ALL_GROUPS]
    trained = [BY_NAME[name] for name in list_methods(has_devices) if BY_NAME[name].label]
    main = [method.name for method in trained if method.several_seeds or not has_devices]
    once = [method.name for method in trained if method.name not in main]  # `make tables` trains one seed
    sessions = [method.name for method in trained if method.datasets == "devices" and method.program == "fit"]
    other_frames = [name_frames_variant(BASELINE, number) for number in FRAME_COUNTS if number != RECIPE_FRAMES]
    listed_frames = other_frames if build_frames_table(evidence) else []
    variants = list(VARIANT_RUNS) if has_devices else []
    has_study = has_devices and evidence.dataset not in FURTHER_WORLDS
    seeds = evidence.find_seeds(main) or [0]
    seeds_of_once = evidence.find_seeds(once) or seeds[:1]
    by_table: list[tuple[str, Sequence[str], Sequence[int]]] = [
        ("the paper's methods", PAPER_METHODS, seeds),
        ("controls", [name for name in main if name not in PAPER_METHODS + tuple(sessions)], seeds),
        ("sessions", sessions, seeds),
        ("competing methods on the device", ["on_device", "prompts"] if has_devices else [], seeds_of_once),
        ("frames (table 4)", listed_frames, evidence.find_seeds(other_frames) or seeds[:1]),
        ("training variants", variants, evidence.find_seeds(variants) or seeds[:1]),
        ("study of the reasoner", list(STUDY) if has_study else [], STUDY_SEEDS),
        ("privacy", ["privacy"] if has_devices else [], evidence.find_seeds(["privacy"]) or seeds[:1]),
    ]
    missing = []
    for table, names, wanted in by_table:
        commands = []
        for name in names:
            trained_seeds = evidence.find_seeds([name])
            if lacking := [seed for seed in (seeds_of_once if name in once else wanted) if seed not in trained_seeds]:
                commands.append(format_command(evidence, name, lacking))
        if commands:
            missing.append((table, commands))
    without_answers = [
        f"delete {run.path} and train anew: it has no {PREDICTIONS}"
        for run in find_method_runs(evidence) if run.answers is None
    ]  # fmt: skip
    if without_answers:
        missing.append(("answers by question, needed for the differences", without_answers))
    return missing


def format_command(evidence: Evidence, name: str, seeds: Sequence[int]) -> str:
    """Return the shell command that trains a method, or scores a predictions file, with one seed or several."""
    file = next((run.find("predictions", "file") for run in evidence.find_runs(name) if run.is_external), None)
    what = ["table", f"PREDICTIONS={shlex.quote(file)}"] if file else ["train", f"METHOD={name}"]
    words = ["make", what[0], f"DATASET={evidence.dataset}", what[1]]
    if len(seeds) == 1:
        words.append(f"SEED={seeds[0]}")
    else:
        counted = list(seeds) == list(range(len(seeds))) and not file
        words.append(f"SEEDS={len(seeds)}" if counted else "SEED=$seed")
    if name in STUDY:
        words.append("ENCODER_SEED=0")  # one encoder for all seeds
    out = evidence.folder.parent
    if out.absolute() != Path("checkpoints").absolute():
        words.append(f"OUT={shlex.quote(str(out))}")
    encoders = (run.find("encoder") for run in evidence.find_runs("linear"))
    given = [encoder for encoder in encoders if encoder and PRETRAINING not in Path(encoder).parts]
    words += [f"CHECKPOINT={shlex.quote(encoder)}" for encoder in given[:1] if not file]
    line = " ".join(words)
    return f"for seed in {' '.join(map(str, seeds))}; do {line}; done" if "SEED=$seed" in words else line
