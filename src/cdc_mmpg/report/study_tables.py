"""Tables that the paper does not have: payloads, spread, training variants, reasoner study, privacy of the upload."""

from typing import Any

from cdc_mmpg.catalogue import ARC, METHOD_LABELS, SESSION_METHODS, STUDY, VARIANTS
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Fact, Table, add_framing, cite
from cdc_mmpg.evidence.findings import list_payloads
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.runs import Run
from cdc_mmpg.report.cells import GAIN_HEADER, cite_or_empty, compare_with_fine_tuning, count_seeds


def build_payload_table(evidence: Evidence) -> Table | None:
    """Build the table of payloads: sizes and accuracies of heads by format; None without such runs."""
    payloads = list_payloads(evidence)
    if not payloads:
        return None
    gains = compare_with_fine_tuning(evidence, [payload.side for payload in payloads])
    rows = []
    for payload, gain in zip(payloads, gains, strict=True):
        unit = CitedText("session" if payload.side.name in SESSION_METHODS else "sample")
        sizes = [cite("{}", payload.bytes), cite("{}", add_framing(payload.bytes))]
        cells = [unit, *sizes, evidence.cite_accuracy(payload.side), gain.format() if gain else NO_TEXT]
        rows.append((payload.label, cells))
    header = ["head", "sent once per", "payload B", "on the wire B", f"{evidence.group} %", GAIN_HEADER]
    return Table("payloads", "Payloads: size and accuracy", header, rows)


def build_spread_table(evidence: Evidence) -> Table | None:
    """Build the table of spread over devices and of calibration by method; None if no run has these values.

    The accuracy that a tenth of the devices does not reach (tenth percentile) is averaged over seeds; the expected
    calibration error is `evaluate.measure_calibration`.
    """
    rows = []
    for row in evidence.rows:
        runs = evidence.find_runs(row.method, row.condition)
        case = runs[0].find_case(row.condition) or "" if runs else ""
        cells = [evidence.cite_accuracy(Side(row.method, row.condition), interval=False)]
        for key in ("tenth_percentile", "calibration_error"):
            keys = (key, case, evidence.group)
            known = [run for run in runs if run.find(*keys) is not None]
            cells.append(cite("{}", evidence.aggregate(known, keys, times=100)) if known else NO_TEXT)
        if any(cells[1:]) and not row.label.startswith("·"):
            rows.append((row.label, cells))
    header = ["method", f"{evidence.group} %", "tenth percentile of devices %", "calibration error %"]
    return Table("spread", "Spread over devices, and calibration", header, rows) if rows else None


def build_variants_table(evidence: Evidence) -> Table | None:
    """Build the table of training variants against the unchanged method; None if no variant was trained."""
    rows = []
    for name, variant in VARIANTS.items():
        for method in variant.methods:
            if runs := evidence.find_runs(f"{method}.{name}"):
                side = Side(f"{method}.{name}")
                cells = []
                for devices in (evidence.group, ARC):
                    gain = evidence.compare(side, Side(method), devices)
                    cells += [evidence.cite_accuracy(side, devices), gain.format() if gain else NO_TEXT]
                rows.append((f"{METHOD_LABELS.get(method, method)}: {variant.label}", [*cells, count_seeds(runs)]))
    group = evidence.group
    header = ["method: change", f"{group} %", "vs unchanged", "held-out casts %", "vs unchanged, same casts", "seeds"]
    return Table("variants", "Training variants", header, rows) if rows else None


def build_reasoner_table(evidence: Evidence) -> Table | None:
    """Build the table of interpretations of equation 16, with and without the reasoner; None if none was trained."""
    trained = {label: name for name, label in STUDY.items() if evidence.find_runs(name)}
    if not trained:
        return None
    gains = evidence.compare_all([(Side(name), Side(name, "bypassed")) for name in trained.values()])
    rows = []
    for (label, name), gain in zip(trained.items(), gains, strict=True):
        both = [evidence.cite_accuracy(Side(name)), evidence.cite_accuracy(Side(name, "bypassed"))]
        rows.append((label, [*both, gain.format() if gain else NO_TEXT, count_seeds(evidence.find_runs(name))]))
    header = ["equation 16: statistics over, target", f"{evidence.group} %", "ADR bypassed %", "difference", "seeds"]
    return Table("reasoner", "Does the reasoner (ADR) help?", header, rows)


def build_privacy_table(evidence: Evidence) -> Table | None:
    """Build the table of what probes read from uploads; None if no probe was trained."""
    rows: list[tuple[str, list[CitedText]]] = []
    runs = evidence.runs.get("privacy", [])
    for run in runs:
        for place, probe in enumerate(run.find("probes") or []):
            label = f"{probe.get('what', '')}, from {probe.get('from', '')}"
            label += f" (seed {run.seed})" if len(runs) > 1 else ""
            rows.append((label, _probe_cells(run, place, probe)))
    if not rows:
        return None
    header = ["target of the probe", "probe", "unit", "chance", "constant guess", "test samples"]
    return Table("privacy", "Privacy: what a probe reads from the upload", header, rows)


def _probe_cells(run: Run, place: int, probe: dict[str, Any]) -> list[CitedText]:
    """Return a probe's result, its unit, the results of guessing, and the number of test samples."""
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
