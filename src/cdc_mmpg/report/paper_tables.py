"""Tables 1 to 6 in the paper's layout, with the paper's figures if our runs answered the same questions."""

from collections.abc import Collection

from cdc_mmpg.catalogue import (
    BASELINE,
    DEEPER,
    FRAME_COUNTS,
    METHOD_LABELS,
    PAPER_METHODS,
    RECIPE_FRAMES,
    SESSION,
    SESSION_METHODS,
    is_trained,
    name_frames_variant,
)
from cdc_mmpg.evaluation.metrics import RECALLS
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import (
    ANSWER_BYTES,
    CLIP_BYTES,
    FEATURE_BYTES,
    HEADER_BYTES,
    NO_TEXT,
    CitedText,
    Fact,
    Table,
    add_facts,
    add_framing,
    cite,
    cite_constant,
    compute_delay,
)
from cdc_mmpg.evidence.findings import list_payloads
from cdc_mmpg.evidence.pairing import Gain, Side
from cdc_mmpg.evidence.runs import Run
from cdc_mmpg.evidence.selection import (
    find_method_runs,
    find_question_types,
    find_unpublished_counts,
    is_comparable_with_paper,
    note_predictions,
    note_unpublished_counts,
)
from cdc_mmpg.report.cells import (
    GAIN_HEADER,
    MEDIAN_HEADERS,
    NO_BYTES,
    PaperQuotes,
    cite_or_empty,
    cite_recall,
    cite_result,
    compare_with_fine_tuning,
    count_seeds,
)
from cdc_mmpg.wire.messages import FRAMING_BYTES

RATES_MIB_PER_SECOND = (5, 15, 50, 100)  # the paper writes MB/s
REASONER_NOTES = {  # by preset of the reasoner's sizes
    "small": "The reasoner is smaller than the paper's (554,880 parameters).",
    "paper_qa": "The paper prints no sizes of the reasoner; ours (27,802,816 parameters) fit the paper's totals.",
    "paper_mc": "The paper prints no sizes of the reasoner; ours (20,213,984 parameters) fit the paper's totals.",
}
REASONER_NOTES["default"] = REASONER_NOTES["small"]  # name of `small` in runs of earlier versions
NOT_RUN = CitedText("not run")


def build_paper_table(evidence: Evidence) -> Table:
    """Build tables 1, 2, 3 and 5: accuracy, parameters, bytes and delay of every method, ours and the paper's."""
    number = evidence.cite_paper("table")
    columns: list[tuple[str, list[str]]] = []  # our columns, with the paper's key if it has the column
    runs = find_method_runs(evidence)
    comparable = is_comparable_with_paper(evidence, runs)
    shown = bool(number) and comparable
    if evidence.is_retrieval:
        kinds = find_question_types(evidence) or [f"{way}@{k}" for way in MEDIAN_HEADERS for k in RECALLS]
        columns = [(kind, [kind]) for kind in kinds]
    else:
        columns = [(f"{evidence.group} %", ["accuracy"])]
    columns += [(GAIN_HEADER, []), ("D-Param", ["D-Param"]), ("C-Param", ["C-Param"]), ("bytes up", []),
                ("bytes down", []), ("delay up, ms", []), ("delay down, ms", ["delay"]), ("seeds", [])]  # fmt: skip
    keys = [key for _, paper_keys in columns for key in paper_keys]
    printed = {key: shown and any(evidence.cite_paper(method, key) for method in PAPER_METHODS) for key in keys}
    header = ["method"]
    for name, paper_keys in columns:
        header += [name, *("paper" for key in paper_keys if printed[key])]
    listed = [name for name in evidence.names if is_trained(name) and evidence.find_runs(name)]
    quotes = PaperQuotes(evidence)
    gains = dict(zip(listed, compare_with_fine_tuning(evidence, [Side(name) for name in listed]), strict=True))
    rows: list[tuple[str, list[CitedText]]] = []

    def add_row(label: str, ours: dict[str, CitedText], method: str | None) -> None:
        cells = []
        for name, paper_keys in columns:
            cells.append(ours.get(name, NO_TEXT))
            cells += [quotes.cite(method, key) if method else NO_TEXT for key in paper_keys if printed[key]]
        rows.append((label, cells))

    for method in [*PAPER_METHODS, *(name for name in listed if name not in PAPER_METHODS)]:
        seeds = evidence.find_runs(method)
        if not seeds and not shown:
            continue
        ours = _build_method_cells(evidence, method, seeds, gains.get(method)) if seeds else {columns[0][0]: NOT_RUN}
        add_row(evidence.names[method], ours, method if method in PAPER_METHODS else None)
    for label, ours in _build_computed_rows(evidence):
        add_row(label, ours, None)
    title = f"Table {number.shown} of the paper" if number else "In the layout of the paper's tables 1 and 2"
    notes = [
        CitedText("Delays are for the payload alone at 100 MiB/s, which the paper writes as 100 MB/s."),
        CitedText("Computed rows need no run: the bytes follow from what is sent. The generator is CDC-MMPG's."),
    ]
    sizes = dict.fromkeys(run.find("reasoner") for run in runs)
    notes += [CitedText(REASONER_NOTES[size]) for size in sizes if size in REASONER_NOTES]
    notes += filter(None, [note_predictions(runs)])
    if shown:
        notes += [CitedText("The paper's columns quote it as printed, including its errors."), *quotes.write_notes()]
    if number and not comparable:
        notes.append(CitedText("These runs use another selection of data than the paper, whose figures are left out."))
    notes += [note for note in [note_unpublished_counts(runs)] if note]
    return Table("paper", f"{title}: {evidence.dataset}", header, rows, notes)


def _build_method_cells(evidence: Evidence, method: str, runs: list[Run], gain: Gain | None) -> dict[str, CitedText]:
    """Return a method's cells by column."""
    side = Side(method)
    recalls = find_question_types(evidence) if evidence.is_retrieval else []
    cells = {
        **{kind: cite_recall(evidence, side, kind) for kind in recalls},
        f"{evidence.group} %": evidence.cite_accuracy(side),
        GAIN_HEADER: gain.format() if gain else NO_TEXT,
        "D-Param": cite_result(evidence, runs[0], "parameters", "device"),
        "C-Param": cite_result(evidence, runs[0], "parameters", "cloud"),
        "seeds": count_seeds(runs),
    }
    for way in ("up", "down"):
        if sent := evidence.cite_value(runs[0], "bytes", way):
            cells |= _cite_traffic(way, sent)
    return cells


def _cite_traffic(way: str, sent: Fact) -> dict[str, CitedText]:
    """Return the cells of bytes and delay in one direction (up or down), by column."""
    delay = compute_delay(sent, RATES_MIB_PER_SECOND[-1])
    return {f"bytes {way}": cite("{}", sent), f"delay {way}, ms": cite("{}", delay)}


def _build_computed_rows(evidence: Evidence) -> list[tuple[str, dict[str, CitedText]]]:
    """Return the rows with computed bytes: split inference, and the generator on the device."""
    rows: list[tuple[str, dict[str, CitedText]]] = []
    answer = cite_constant(ANSWER_BYTES, "ANSWER_BYTES")
    if not evidence.is_retrieval:
        up = _cite_traffic("up", cite_constant(FEATURE_BYTES, "FEATURE_BYTES"))
        rows.append(("Split inference: the cloud answers (computed)", up | _cite_traffic("down", answer)))
    deeper = Side(f"{BASELINE}.{DEEPER}")
    if runs := evidence.find_runs(deeper.name):
        (gain,) = compare_with_fine_tuning(evidence, [deeper])
        rows.append(("Split inference: 6 layers in the cloud, from the frames", {
            **_build_method_cells(evidence, deeper.name, runs, gain),
            "D-Param": cite("{}", NO_BYTES), "C-Param": _cite_all_parameters(evidence, runs[0]),
            **_cite_traffic("up", cite_constant(CLIP_BYTES, "CLIP_BYTES")), **_cite_traffic("down", answer),
        }))  # fmt: skip
    for run in evidence.find_runs("cdc_mmpg")[:1]:
        rows.append(("Generator on the device (computed)", {
            "D-Param": _cite_all_parameters(evidence, run), "C-Param": cite("{}", NO_BYTES),
            **_cite_traffic("up", NO_BYTES), **_cite_traffic("down", NO_BYTES),
        }))  # fmt: skip
    return rows


def _cite_all_parameters(evidence: Evidence, run: Run) -> CitedText:
    """Return the number of a run's parameters on device and cloud together."""
    known = [size for place in ("device", "cloud") if (size := evidence.cite_value(run, "parameters", place))]
    return cite("{}", add_facts(*known)) if len(known) == 2 else NO_TEXT


def build_frames_table(evidence: Evidence) -> Table | None:
    """Build table 4: accuracy and seconds per epoch by frames (in the paper: of fine-tuning); None without runs."""
    if evidence.is_retrieval or evidence.find_task() == "multiple_choice":
        return None
    others = [number for number in FRAME_COUNTS if number != RECIPE_FRAMES]
    shown = [name for name in ("cdc_mmpg",) if any(evidence.find_runs(name_frames_variant(name, n)) for n in others)]
    baselines = [run for number in others for run in evidence.find_runs(name_frames_variant(BASELINE, number))]
    runs = [*find_method_runs(evidence), *baselines]
    has_paper = evidence.cite_paper("frames", "2", "accuracy") and is_comparable_with_paper(evidence, runs)
    if shown or has_paper or any(evidence.find_runs(name_frames_variant(BASELINE, n)) for n in FRAME_COUNTS):
        shown.append(BASELINE)
    quotes = PaperQuotes(evidence)
    header = ["frames"]
    for method in shown:
        header += [f"{METHOD_LABELS[method]} %", "s / epoch"]
    header += ["paper %", "paper s / epoch"] if has_paper else []
    rows = []
    for number in FRAME_COUNTS:
        cells = []
        for method in shown:
            name, seeds = name_frames_variant(method, number), find_frame_seeds(evidence, method)
            runs = [run for run in evidence.find_runs(name) if run.seed in seeds and run.find("epochs")]
            runs = [run for run in runs if run.find("seconds", "train") is not None]
            cells.append(evidence.cite_accuracy(Side(name), seeds=seeds) or NOT_RUN)
            epoch = evidence.aggregate(runs, ("seconds", "train"), over=("epochs",)) if runs else None
            cells.append(cite_or_empty(epoch))
        if has_paper:
            cells += [quotes.cite("frames", str(number), key) for key in ("accuracy", "seconds")]
        rows.append((str(number), cells))
    notes = [CitedText("All rows of a method use the same seeds.")]
    notes += [CitedText("The paper's figures: fine-tuning on one A100, 256 questions per batch.")] if has_paper else []
    notes += quotes.write_notes()
    title = "Table 4 of the paper" if has_paper else "In the layout of the paper's table 4"
    return Table("frames", f"{title}: frames, {evidence.dataset}", header, rows, notes) if shown or has_paper else None


def find_frame_seeds(evidence: Evidence, method: str) -> Collection[int]:
    """Return the seeds that all trained numbers of frames share: rows with different seeds are not comparable."""
    trained = [{run.seed for run in evidence.find_runs(name_frames_variant(method, number))} for number in FRAME_COUNTS]
    return set.intersection(*(seeds for seeds in trained if seeds)) if any(trained) else set()


def build_delay_table(evidence: Evidence) -> Table | None:
    """Build table 6: bytes of every message and their delays at four rates; None without runs."""
    sent: list[tuple[str, Fact, str]] = []  # label, bytes, direction if the paper prints it
    for run in [*evidence.find_runs("cdc_mmpg"), *evidence.find_runs(SESSION)][:1]:
        if up := evidence.cite_value(run, "bytes", "up"):
            sent.append(("Upload: the feature of one frame", up, "up"))
    for payload in list_payloads(evidence):
        side = payload.side
        in_paper = side.name == "cdc_mmpg" and side.case in (None, "float32")
        unit = "session" if side.name in SESSION_METHODS else "sample"
        sent.append((f"Download per {unit}: {payload.label}", payload.bytes, "down" if in_paper else ""))
    if not sent:
        return None
    answer = cite_constant(ANSWER_BYTES, "ANSWER_BYTES")
    sent.append(("Split inference: the cloud's answer (computed)", answer, ""))
    unlike = find_unpublished_counts(find_method_runs(evidence), "answers")
    has_paper = bool(evidence.cite_paper("delays", "up", "KB")) and not unlike
    header = ["message", "payload B", "on the wire B", *(f"{rate} MB/s, ms" for rate in RATES_MIB_PER_SECOND)]
    header += ["paper KB", "paper 100 MB/s, ms"] if has_paper else []
    rows = []
    for label, size, way in sent:
        cells = [cite("{}", size), cite("{}", add_framing(size, upload=way == "up"))]
        cells += [cite("{}", compute_delay(size, rate)) for rate in RATES_MIB_PER_SECOND]
        if has_paper:
            printed = (evidence.cite_paper("delays", way, key) if way else None for key in ("KB", "100"))
            cells += map(cite_or_empty, printed)
        rows.append((label, cells))
    notes = [
        CitedText(
            "MB/s means MiB/s, as in the paper's figures; a delay is the payload's bytes divided by the rate."
        ),
        cite(
            "On the wire: an upload has a header of {} bytes, a download a header and a signature of {} bytes; "
            "make delay measures the overhead of HTTP, TCP and IP, and round trips.",
            cite_constant(HEADER_BYTES, "HEADER_BYTES"), cite_constant(FRAMING_BYTES, "FRAMING_BYTES"),
        ),
    ]  # fmt: skip
    title = "Table 6 of the paper" if has_paper else "In the layout of the paper's table 6"
    return Table("delays", f"{title}: bytes and time, {evidence.dataset}", header, rows, notes)
