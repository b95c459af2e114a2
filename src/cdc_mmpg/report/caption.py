"""The caption of the table of methods: what the figures were obtained on, how to read them, and by which commits."""

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
    note_unlike_published,
)
from cdc_mmpg.report.cells import GAIN_HEADER
from cdc_mmpg.report.method_table import KNOWLEDGE_HEADER, build_method_table


def write_caption(evidence: Evidence) -> str:
    """Return the caption of the table of methods, of which there must be a row."""
    runs = [run for run in find_method_runs(evidence) if is_trained(run.name)] or find_method_runs(evidence)
    groups, types = evidence.groups, find_question_types(evidence)
    queries = "captions" if evidence.is_retrieval else "questions"

    table = build_method_table(evidence)
    rows = table.texts()
    cells = [text for row in rows for text in row]
    gain_column = table.header.index(GAIN_HEADER)
    known = [run.find("data", ALL_GROUPS, "ceiling") for run in runs]
    ceilings = _list_once(f"{100 * ceiling:.1f} %" for ceiling in known if ceiling is not None)
    outside = f"; no method can exceed {ceilings} (answers outside the vocabulary)"
    beyond = "" if ceilings in ("100.0 %", "") else outside
    resampled = "clips" if groups == [ALL_GROUPS] else "devices and then their clips"
    worlds = evidence.dataset in WORLDS
    before = "; an interval of several pairs resamples the pairs first" if worlds else ""
    column = table.header.index(KNOWLEDGE_HEADER) if KNOWLEDGE_HEADER in table.header else None
    knows = [] if column is None else [letter for letter in KNOWLEDGE if any(letter in row[column] for row in rows)]
    splits = dict.fromkeys(f"{split}: {source}" for run in runs for split, source in (run.find("splits") or {}).items())
    machines = [machine for run in runs if (machine := run.find("machine"))]
    commits = [shorten_commit(commit) for run in runs if (commit := run.find("commit"))]
    steps = [
        f"{step}, where the recipe has {recipe}"
        for run in runs
        if (recipe := run.find("recipe_questions_per_step")) and (step := run.find("questions_per_step")) != recipe
    ]
    encoders = [str(_locate_encoder(evidence.folder, run) or run.find("encoder") or "random weights") for run in runs]
    monitors = [monitor.replace("val/", "validation ") for run in runs if (monitor := run.find("monitor"))]
    sentences = [
        f"{evidence.dataset}: {_list_once(_format_questions(run, ALL_GROUPS) for run in runs)} test {queries}, "
        f"{_list_once(_format_questions(run, 'train') for run in runs)} for training{beyond}.",
        "A partial copy: clips are missing, so nothing here compares with published ones." if is_partial(runs) else "",
        note_unlike_published(runs).text,
        f"In brackets: 95 % interval, {resampled} resampled." if any("[" in text for text in cells) else "",
        f"±: standard deviation over {'pairs of world and pretraining' if worlds else 'seeds'}{before}."
        if any("±" in text for text in cells)
        else "",
        "Against fine-tuning: the difference in points, paired by question."
        if any(row[gain_column] for row in rows)
        else "",
        f"By question type ({', '.join(types)}): % on unseen devices." if types and groups != [ALL_GROUPS] else "",
        "VR@K, in %: a clip asks for its captions, of which the best placed counts; TR@K: a caption "
        "asks for its clip. Ties count against us."
        if evidence.is_retrieval
        else "",
        f"Knows: {'; '.join(f'{letter} {KNOWLEDGE[letter]}' for letter in knows)}." if knows else "",
        f"Splits: {'; '.join(splits)}." if splits else "",
        f"Encoder from: {_list_once(encoders)}.",
        _describe_pretraining(evidence, runs),
        f"Best epoch by {_list_once(monitors)}, tested once." if monitors else "",
        f"Questions of a step: {_list_once(steps)}." if steps else "",
        f"Machine: {_list_once(machines)}." if machines else "",
        f"Commit {_list_once(commits)}." if commits else "",
    ]
    return " ".join(filter(None, sentences))


def _list_once(values: Iterable[str]) -> str:
    """Return different values with commas between."""
    return ", ".join(dict.fromkeys(values))


def _format_questions(run: Run, split: str) -> str:
    """Return the number of a split's questions, and of how many where some were left out."""
    number, left_out = run.find("questions", split), count_left_out(run, split)
    if number is None:
        return "?"
    return f"{number:,} of {number + left_out:,}" if left_out else str(number)


def shorten_commit(commit: str) -> str:
    """Return the first letters of a commit, and whether the files were others."""
    digits, _, dirty = commit.partition("-")
    return f"{digits[:8]}-{dirty}" if dirty else digits[:8]


def _locate_encoder(folder: Path, run: Run) -> Path | None:
    """Return the path within `folder` of the encoder that a run began with; None where it lies elsewhere."""
    if not run.find("encoder"):
        return None
    path = Path(run.results["encoder"]).resolve()
    return path.relative_to(folder.resolve()) if path.is_relative_to(folder.resolve()) else None


def _describe_pretraining(evidence: Evidence, runs: list[Run]) -> str:
    """Return a sentence on the encoder's pretraining where that is a run of the dataset, too; else nothing."""
    inside = filter(None, (_locate_encoder(evidence.folder, run) for run in runs))
    places = {place.parent.name for place in inside if place.parts[0] == PRETRAINING}
    pretrained = [run for run in evidence.runs.get(PRETRAINING, []) if run.path.name in places and run.find("labels")]
    if not pretrained:
        return ""
    labels = [pretrained[0].find("labels", what) for what in ("captions", "questions", "clips")]
    seconds = [round(run.find("seconds", "train") or 0) for run in pretrained]
    if None in labels:
        return ""
    return (
        "Encoder pretrained in this run on {:,} captions and {:,} questions of {:,} other clips ".format(*labels)
        + f"({'–'.join(dict.fromkeys(map(str, (min(seconds), max(seconds)))))} s)."
    )
