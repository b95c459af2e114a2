"""Caption of the table of methods: the data behind the figures, how to read them, and their commits."""

from collections.abc import Iterable
from pathlib import Path

from cdc_mmpg.catalogue import KNOWLEDGE, PRETRAINING, WORLDS, is_trained
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.runs import ALL_GROUPS, Run
from cdc_mmpg.evidence.selection import (
    count_left_out,
    find_method_runs,
    find_question_types,
    is_partial,
    note_unpublished_counts,
)
from cdc_mmpg.report.cells import GAIN_HEADER
from cdc_mmpg.report.method_table import KNOWLEDGE_HEADER, build_method_table


def write_caption(evidence: Evidence) -> str:
    """Return the caption of the table of methods, which must have at least one row."""
    answering = find_method_runs(evidence)
    external = [run for run in answering if run.is_external]
    runs = [run for run in answering if is_trained(run.name) and not run.is_external] or answering
    groups, types = evidence.groups, find_question_types(evidence)
    queries = "captions" if evidence.is_retrieval else "questions"

    table = build_method_table(evidence)
    rows = table.texts()
    cells = [text for row in rows for text in row]
    gain_column = table.header.index(GAIN_HEADER)
    known = [run.find("data", ALL_GROUPS, "ceiling") for run in runs]
    ceilings = _join_unique(f"{100 * ceiling:.1f} %" for ceiling in known if ceiling is not None)
    trained = "trained method" if external else "method"
    limit = f"; no {trained} can exceed {ceilings} (answers outside the vocabulary)"
    limit = "" if ceilings in ("100.0 %", "") else limit
    resampled = "clips" if groups == [ALL_GROUPS] else "devices, then their clips"
    by_world = "seeds, each with its own world and pretraining; intervals over several seeds resample the seeds first"
    spread = by_world if evidence.dataset in WORLDS else "seeds"
    column = table.header.index(KNOWLEDGE_HEADER) if KNOWLEDGE_HEADER in table.header else None
    letters = [] if column is None else [letter for letter in KNOWLEDGE if any(letter in row[column] for row in rows)]
    meanings = "; ".join(f"{letter} = {KNOWLEDGE[letter]}" for letter in letters)
    splits = dict.fromkeys(f"{split}: {source}" for run in runs for split, source in (run.find("splits") or {}).items())
    machines = [machine for run in runs if (machine := run.find("machine"))]
    commits = [shorten_commit(commit) for run in dict.fromkeys([*runs, *external]) if (commit := run.find("commit"))]
    steps = [
        f"{step} (recipe: {recipe})"
        for run in runs
        if (recipe := run.find("recipe_questions_per_step")) and (step := run.find("questions_per_step")) != recipe
    ]
    encoders = [
        str(_locate_encoder(evidence.folder, run) or run.find("encoder") or "random weights")
        for run in runs
        if not run.is_external
    ]
    monitors = [monitor.replace("val/", "validation ") for run in runs if (monitor := run.find("monitor"))]
    sentences = [
        f"{evidence.dataset}: {_join_unique(_format_questions(run, ALL_GROUPS) for run in runs)} test {queries}, "
        f"{_join_unique(_format_questions(run, 'train') for run in runs)} for training{limit}.",
        "A partial copy: clips are missing, so no figure compares with published ones." if is_partial(runs) else "",
        note_unpublished_counts(runs).text,
        f"In brackets: 95 % bootstrap interval (resampling {resampled})." if any("[" in text for text in cells) else "",
        f"±: standard deviation over {spread}." if any("±" in text for text in cells) else "",
        f"{GAIN_HEADER}: difference in percentage points, paired by question."
        if any(row[gain_column] for row in rows)
        else "",
        f"By question type ({', '.join(types)}): % on unseen devices." if types and groups != [ALL_GROUPS] else "",
        "VR@K: % of clips with one of their captions among the K best matches; TR@K: % of captions with their clip "
        "among the K best matches. Ties count as errors."
        if evidence.is_retrieval
        else "",
        f"Knows (beyond the training questions and answers): {meanings}." if letters else "",
        "D-Param, C-Param: parameters on device and in cloud; up, down: bytes sent each way; epoch: best / trained.",
        f"Splits: {'; '.join(splits)}." if splits else "",
        f"Encoder from: {_join_unique(encoders)}." if encoders else "",
        _describe_pretraining(evidence, runs),
        f"Best epoch by {_join_unique(monitors)}, tested once." if monitors else "",
        f"Questions per training step: {_join_unique(steps)}." if steps else "",
        f"Machine: {_join_unique(machines)}." if machines else "",
        f"Commit {_join_unique(commits)}." if commits else "",
    ]
    return " ".join(filter(None, sentences))


def _join_unique(values: Iterable[str]) -> str:
    """Join the distinct values with commas."""
    return ", ".join(dict.fromkeys(values))


def _format_questions(run: Run, split: str) -> str:
    """Return the number of a split's questions, with the full number if some were left out."""
    number, left_out = run.find("questions", split), count_left_out(run, split)
    if number is None:
        return "?"
    return f"{number:,} of {number + left_out:,}" if left_out else str(number)


def shorten_commit(commit: str) -> str:
    """Return the first eight digits of a commit, with its suffix if files had changed."""
    digits, _, dirty = commit.partition("-")
    return f"{digits[:8]}-{dirty}" if dirty else digits[:8]


def _locate_encoder(folder: Path, run: Run) -> Path | None:
    """Return the path of a run's initial encoder, relative to `folder` or else to its parent; None if it is in neither.

    None as well if the weights were random.
    """
    if not run.find("encoder"):
        return None
    path, root = Path(run.results["encoder"]).resolve(), folder.resolve()
    return next((path.relative_to(place) for place in (root, root.parent) if path.is_relative_to(place)), None)


def _describe_pretraining(evidence: Evidence, runs: list[Run]) -> str:
    """Return a sentence on the encoder's pretraining if it is a run of the dataset; else an empty text."""
    inside = filter(None, (_locate_encoder(evidence.folder, run) for run in runs))
    places = {place.parent.name for place in inside if place.parts[0] == PRETRAINING}
    pretrained = [run for run in evidence.runs.get(PRETRAINING, []) if run.path.name in places and run.find("labels")]
    if not pretrained:
        return ""
    labels = [pretrained[0].find("labels", key) for key in ("captions", "questions", "clips")]
    seconds = [round(run.find("seconds", "train") or 0) for run in pretrained]
    if None in labels:
        return ""
    return (
        "Encoder pretrained in this run on {:,} captions and {:,} questions of {:,} other clips ".format(*labels)
        + f"({'–'.join(dict.fromkeys(map(str, (min(seconds), max(seconds)))))} s)."
    )
