"""Tables that the paper does not have: payloads, readings of the reasoner, what the upload gives away."""

from typing import Any

from cdc_mmpg.catalogue import SESSIONS, STUDY
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Fact, Table, add_framing, cite
from cdc_mmpg.evidence.findings import list_payloads
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.runs import Run
from cdc_mmpg.report.cells import GAIN_HEADER, cite_or_empty, compare_with_fine_tuning, count_seeds


def build_payload_table(evidence: Evidence) -> Table | None:
    """Return heads by the way in which they are sent; None where no run has them."""
    payloads = list_payloads(evidence)
    if not payloads:
        return None
    gains = compare_with_fine_tuning(evidence, [payload.side for payload in payloads])
    rows = []
    for payload, gain in zip(payloads, gains, strict=True):
        unit = CitedText("a session" if payload.side.name in SESSIONS else "a sample")
        sizes = [cite("{}", payload.bytes), cite("{}", add_framing(payload.bytes))]
        cells = [unit, *sizes, evidence.cite_accuracy(payload.side), gain.format() if gain else NO_TEXT]
        rows.append((payload.label, cells))
    header = ["head", "sent once", "payload B", "on the wire B", f"{evidence.group} %", GAIN_HEADER]
    return Table("payloads", "What is sent, and what it answers", header, rows)


def build_reasoner_table(evidence: Evidence) -> Table | None:
    """Return the readings of equation 16, each with the reasoner and without it; None where none was trained."""
    trained = {label: name for name, label in STUDY.items() if evidence.find_runs(name)}
    if not trained:
        return None
    gains = evidence.compare_all([(Side(name), Side(name, "bypassed")) for name in trained.values()])
    rows = []
    for (label, name), gain in zip(trained.items(), gains, strict=True):
        both = [evidence.cite_accuracy(Side(name)), evidence.cite_accuracy(Side(name, "bypassed"))]
        rows.append((label, [*both, gain.format() if gain else NO_TEXT, count_seeds(evidence.find_runs(name))]))
    header = ["statistics over, target", f"{evidence.group} %", "bypassed %", "difference", "seeds"]
    return Table("reasoner", "Does the reasoner do anything?", header, rows)


def build_privacy_table(evidence: Evidence) -> Table | None:
    """Return what can be read out of what is uploaded; None where no probe was trained."""
    rows: list[tuple[str, list[CitedText]]] = []
    runs = evidence.runs.get("privacy", [])
    for run in runs:
        for place, probe in enumerate(run.find("probes") or []):
            label = f"{probe.get('what', '')}, from {probe.get('from', '')}"
            label += f" (seed {run.seed})" if len(runs) > 1 else ""
            rows.append((label, _probe_cells(run, place, probe)))
    if not rows:
        return None
    header = ["what is guessed", "by a probe", "unit", "chance", "always the same guess", "on"]
    return Table("privacy", "What the upload gives away", header, rows)


def _probe_cells(run: Run, place: int, probe: dict[str, Any]) -> list[CitedText]:
    """Return a probe's result, its unit, what guessing gets, and the number of its questions."""
    is_accuracy = "accuracy" in probe
    times = 100 if is_accuracy else 1

    def cite_probe(key: str) -> Fact | None:
        if probe.get(key) is None:
            return None
        value = times * probe[key]
        more = {"times": times} if times != 1 else {}
        return Fact(value, f"{value:.1f}", "value", (run.locate("probes", str(place), key),), more)

    value, low, high = (cite_probe(key) for key in ("accuracy" if is_accuracy else "degrees", "low", "high"))
    number = probe.get("number")
    count = Fact(number, f"{number:,}", "value", (run.locate("probes", str(place), "number"),)) if number else None
    return [
        cite("{} [{}, {}]", value, low, high) if value and low and high else cite_or_empty(value),
        CitedText("% right" if is_accuracy else "degrees off"),
        cite_or_empty(cite_probe("chance")),
        cite_or_empty(cite_probe("majority")),
        cite_or_empty(count),
    ]
