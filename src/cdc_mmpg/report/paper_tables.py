"""The paper's tables 1 to 6 in their form, its figures beside ours where the runs answered what the paper's did."""

from collections.abc import Collection

from cdc_mmpg.catalogue import (
    BASELINE,
    FRAMES,
    NAMES,
    PAPERS,
    RECIPE_FRAMES,
    SESSION,
    SESSIONS,
    is_trained,
    with_frames,
)
from cdc_mmpg.evaluation.metrics import RECALLS
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import (
    ANSWER_BYTES,
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
    find_unlike_published,
    is_comparable_with_paper,
    note_unlike_published,
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

RATES_MIB_PER_SECOND = (5, 15, 50, 100)  # the paper's MB/s
REASONER_NOTES = {  # by the preset of the reasoner's sizes
    "small": "The reasoner is small (554,880 parameters), not of the paper's size.",
    "paper_qa": "The reasoner's sizes (27,802,816 parameters) fit the paper's totals; it prints no sizes.",
    "paper_mc": "The reasoner's sizes (20,213,984 parameters) fit the paper's totals; it prints no sizes.",
}
REASONER_NOTES["default"] = REASONER_NOTES["small"]  # its name in runs of earlier versions
NOT_RUN = CitedText("not run")


def build_paper_table(evidence: Evidence) -> Table:
    """Return tables 1, 2, 3 and 5: accuracy, parameters, bytes and delay of every method, the paper's beside ours."""
    number = evidence.cite_paper("table")
    columns: list[tuple[str, list[str]]] = []  # ours, with the paper's key where it prints one
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
    printed = {key: shown and any(evidence.cite_paper(method, key) for method in PAPERS) for key in keys}
    header = ["method"]
    for name, paper_keys in columns:
        header += [name, *("paper" for key in paper_keys if printed[key])]
    listed = [name for name in evidence.names if is_trained(name) and evidence.find_runs(name)]
    quotes = PaperQuotes(evidence)
    gains = dict(zip(listed, compare_with_fine_tuning(evidence, [Side(name) for name in listed]), strict=True))
    rows: list[tuple[str, list[CitedText]]] = []

    def add(label: str, ours: dict[str, CitedText], method: str | None) -> None:
        cells = []
        for name, paper_keys in columns:
            cells.append(ours.get(name, NO_TEXT))
            cells += [quotes.cite(method, key) if method else NO_TEXT for key in paper_keys if printed[key]]
        rows.append((label, cells))

    for method in [*PAPERS, *(name for name in listed if name not in PAPERS)]:
        seeds = evidence.find_runs(method)
        if not seeds and not shown:
            continue
        ours = _method_cells(evidence, method, seeds, gains.get(method)) if seeds else {columns[0][0]: NOT_RUN}
        add(evidence.names[method], ours, method if method in PAPERS else None)
    for label, ours in _computed_rows(evidence):
        add(label, ours, None)
    title = f"Table {number.shown} of the paper" if number else "In the form of the paper's tables 1 and 2"
    notes = [
        CitedText("Delays are those of the payload alone at 100 MiB/s, the paper's 100 MB/s."),
        CitedText("Computed: no run, the bytes follow from what is sent. The generator on the device is CDC-MMPG's."),
    ]
    sizes = dict.fromkeys(run.find("reasoner") for run in runs)
    notes += [CitedText(REASONER_NOTES[size]) for size in sizes if size in REASONER_NOTES]
    if shown:
        notes += [CitedText("The paper's columns are as printed, its errors included."), *quotes.write_notes()]
    if number and not comparable:
        notes.append(CitedText("These runs are on another selection than the paper's, so its figures are left out."))
    notes += [note for note in [note_unlike_published(runs)] if note]
    return Table("paper", f"{title}: {evidence.dataset}", header, rows, notes)


def _method_cells(evidence: Evidence, method: str, runs: list[Run], gain: Gain | None) -> dict[str, CitedText]:
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
            cells |= _traffic_cells(way, sent)
    return cells


def _traffic_cells(way: str, sent: Fact) -> dict[str, CitedText]:
    """Return the cells of bytes and delay in a direction (up or down), by column."""
    delay = compute_delay(sent, RATES_MIB_PER_SECOND[-1])
    return {f"bytes {way}": cite("{}", sent), f"delay {way}, ms": cite("{}", delay)}


def _computed_rows(evidence: Evidence) -> list[tuple[str, dict[str, CitedText]]]:
    """Return the rows that need no run: the cloud answers itself, or the device generates itself."""
    rows: list[tuple[str, dict[str, CitedText]]] = []
    if not evidence.is_retrieval:
        up, down = cite_constant(FEATURE_BYTES, "FEATURE_BYTES"), cite_constant(ANSWER_BYTES, "ANSWER_BYTES")
        rows.append(
            ("Split inference: the cloud answers (computed)", _traffic_cells("up", up) | _traffic_cells("down", down))
        )
    for method, label in (("cdc_mmpg", "Generator on the device (computed)"),):
        for run in evidence.find_runs(method)[:1]:
            sizes = [evidence.cite_value(run, "parameters", place) for place in ("device", "cloud")]
            known = [size for size in sizes if size]
            rows.append((label, {
                "D-Param": cite("{}", add_facts(*known)) if len(known) == 2 else NO_TEXT,
                "C-Param": cite("{}", NO_BYTES),
                **_traffic_cells("up", NO_BYTES), **_traffic_cells("down", NO_BYTES),
            }))  # fmt: skip
    return rows


def build_frames_table(evidence: Evidence) -> Table | None:
    """Return table 4: accuracy and seconds per epoch by frames. The paper's figures are fine-tuning's."""
    if evidence.is_retrieval or evidence.find_task() == "multiple_choice":
        return None
    others = [number for number in FRAMES if number != RECIPE_FRAMES]
    shown = [name for name in ("cdc_mmpg",) if any(evidence.find_runs(with_frames(name, n)) for n in others)]
    baselines = [run for number in others for run in evidence.find_runs(with_frames(BASELINE, number))]
    runs = [*find_method_runs(evidence), *baselines]
    beside = evidence.cite_paper("frames", "2", "accuracy") and is_comparable_with_paper(evidence, runs)
    if shown or beside or any(evidence.find_runs(with_frames(BASELINE, n)) for n in FRAMES):
        shown.append(BASELINE)
    quotes = PaperQuotes(evidence)
    header = ["frames"]
    for method in shown:
        header += [f"{NAMES[method]} %", "s / epoch"]
    header += ["paper %", "paper s / epoch"] if beside else []
    rows = []
    for number in FRAMES:
        cells = []
        for method in shown:
            name, seeds = with_frames(method, number), find_frame_seeds(evidence, method)
            runs = [run for run in evidence.find_runs(name) if run.seed in seeds and run.find("epochs")]
            runs = [run for run in runs if run.find("seconds", "train") is not None]
            cells.append(evidence.cite_accuracy(Side(name), seeds=seeds) or NOT_RUN)
            epoch = evidence.aggregate(runs, ("seconds", "train"), over=("epochs",)) if runs else None
            cells.append(cite_or_empty(epoch))
        if beside:
            cells += [quotes.cite("frames", str(number), key) for key in ("accuracy", "seconds")]
        rows.append((str(number), cells))
    notes = [CitedText("The rows of a method are of the same seeds.")]
    notes += [CitedText("The paper's figures are fine-tuning's on one A100, 256 questions a batch.")] if beside else []
    notes += quotes.write_notes()
    title = "Table 4 of the paper" if beside else "In the form of the paper's table 4"
    return Table("frames", f"{title}: frames, {evidence.dataset}", header, rows, notes) if shown or beside else None


def find_frame_seeds(evidence: Evidence, method: str) -> Collection[int]:
    """Return the seeds that every number of frames has of those that were run: rows of other seeds do not compare."""
    tried = [{run.seed for run in evidence.find_runs(with_frames(method, number))} for number in FRAMES]
    return set.intersection(*(seeds for seeds in tried if seeds)) if any(tried) else set()


def build_delay_table(evidence: Evidence) -> Table | None:
    """Return table 6: bytes, and the time that they take at four rates."""
    sent: list[tuple[str, Fact, str]] = []  # label, bytes, the paper's direction where it prints them
    for run in [*evidence.find_runs("cdc_mmpg"), *evidence.find_runs(SESSION)][:1]:
        if up := evidence.cite_value(run, "bytes", "up"):
            sent.append(("Upload: the feature of one frame", up, "up"))
    for payload in list_payloads(evidence):
        side = payload.side
        in_paper = side.name == "cdc_mmpg" and side.case in (None, "float32")
        unit = "session" if side.name in SESSIONS else "sample"
        sent.append((f"Download a {unit}: {payload.label}", payload.bytes, "down" if in_paper else ""))
    if not sent:
        return None
    answer = cite_constant(ANSWER_BYTES, "ANSWER_BYTES")
    sent.append(("Split inference: the answer of the cloud (computed)", answer, ""))
    unlike = find_unlike_published(find_method_runs(evidence), "answers")
    beside = bool(evidence.cite_paper("delays", "up", "KB")) and not unlike
    header = ["what", "payload B", "on the wire B", *(f"{rate} MB/s, ms" for rate in RATES_MIB_PER_SECOND)]
    header += ["paper KB", "paper 100 MB/s, ms"] if beside else []
    rows = []
    for label, size, way in sent:
        cells = [cite("{}", size), cite("{}", add_framing(size, upload=way == "up"))]
        cells += [cite("{}", compute_delay(size, rate)) for rate in RATES_MIB_PER_SECOND]
        if beside:
            printed = (evidence.cite_paper("delays", way, key) if way else None for key in ("KB", "100"))
            cells += map(cite_or_empty, printed)
        rows.append((label, cells))
    notes = [
        CitedText(
            "MB/s as in the paper, whose figures are those of MiB/s; delays are the payload's bytes over the rate."
        ),
        cite(
            "On the wire: an upload has a header of {} bytes, what comes down a header and a signature, {}; what HTTP, "
            "TCP and IP add, and round trips, are measured by make delay.",
            cite_constant(HEADER_BYTES, "HEADER_BYTES"), cite_constant(FRAMING_BYTES, "FRAMING_BYTES"),
        ),
    ]  # fmt: skip
    title = "Table 6 of the paper" if beside else "In the form of the paper's table 6"
    return Table("delays", f"{title}: bytes and time, {evidence.dataset}", header, rows, notes)
