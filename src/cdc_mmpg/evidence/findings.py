"""What the figures say, in sentences that are made from them: whichever way they turn out."""

from typing import NamedTuple

from cdc_mmpg.catalogue import BASELINE, CONCATENATED, NAMES, PER_SAMPLE, SESSION, SESSIONS, STUDY
from cdc_mmpg.evidence.comparisons import Cell, Evidence, Fact, Gain, Side, cell, join, literal

EQUAL_POINTS = 0.2  # accuracies that lie no further apart count as equal where bytes are compared

# Controls of the adaptive methods: the case, what is given instead, and what it means where that costs nothing.
CONTROLS = (
    ("shuffled", "another sample's anchor", "the adaptation is unused"),
    ("shuffled_device", "another device's anchor", "it does not adapt to the device"),
    ("shuffled_n16", "the mean of another device's anchors", "the adaptation is unused"),
    ("mean_head", "the mean of all heads, for everyone,", "one head for all would do"),
)
OTHERS = {BASELINE: "fine-tuning", CONCATENATED: "concatenation, which generates nothing"}


class Payload(NamedTuple):
    """A way to send a head, once a session or for every sample: what it costs, and what it answers rightly."""

    side: Side
    label: str
    bytes: Fact
    accuracy: Fact


def compare(evidence: Evidence, first: Side, second: Side) -> Gain | None:
    """Return a difference that a sentence may be about.

    None, too, where the reference (of a control the method itself, else `second`) has learnt nothing: it answers no
    more than the majority answer, and a difference to it, or none, says nothing about adaptation.
    """
    reference = first if first.name == second.name else second
    return evidence.gain(first, second) if evidence.beats_guessing(reference) else None


def told(evidence: Evidence) -> list[Cell]:
    """All sentences for which there are runs."""
    return [*claims(evidence), *controls(evidence)]


def claims(evidence: Evidence) -> list[Cell]:
    """What adaptation adds, what of it is needed, and what it takes."""
    found = [
        *(_against(evidence, method, Side(BASELINE)) for method in PER_SAMPLE if method.startswith("cdc")),
        *(_against(evidence, method, Side(BASELINE)) for method in SESSIONS),
        _against(evidence, SESSION, Side(CONCATENATED)),
        *_on_device(evidence),
        _bytes(evidence),
        _reasoner(evidence, "cdc_mmpg"),
        _study(evidence),
    ]
    return [each for each in found if each]


def controls(evidence: Evidence) -> list[Cell]:
    """What it costs an adaptive method to be given what is another's."""
    found = []
    for method in (*PER_SAMPLE, *SESSIONS):
        for case, given, meaning in CONTROLS:
            if gain := compare(evidence, Side(method), Side(method, case)):
                use = "that heads differ is of use" if case == "mean_head" else "its head depends on what was uploaded"
                verdict = {
                    1: f"costs {{}}: {use}",
                    0: f"costs nothing that this test can tell ({{}}): {meaning}",
                    -1: f"does better, by its own minus that {{}}: {meaning}, or harms",
                }[gain.sign]
                found.append(join(f"{NAMES[method]}: {given} {verdict}.", gain.amounts()))
    return found


def _against(evidence: Evidence, method: str, other: Side) -> Cell:
    """What a method adds over another."""
    gain = compare(evidence, Side(method), other)
    if gain is None or method == other.name:
        return Cell("")
    what = "Per-sample adaptation" if method in PER_SAMPLE else "Adaptation to a session"
    over = OTHERS[other.name]
    verdict = {
        1: f"adds to {over}",
        -1: f"loses to {over}",
        0: f"shows no difference to {over} that this test can tell",
    }[gain.sign]
    return join(f"{what} ({NAMES[method]}) {verdict}: {{}}.", gain.amounts())


def _reasoner(evidence: Evidence, method: str) -> Cell:
    gain = compare(evidence, Side(method), Side(method, "bypassed"))
    if gain is None:
        return Cell("")
    verdict = {1: "helps", -1: "harms", 0: "can be left out"}[gain.sign]
    return join(f"The reasoner (ADR) {verdict} in {NAMES[method]}: with it minus without it {{}}.", gain.amounts())


def _study(evidence: Evidence) -> Cell:
    """Over every reading of the reasoner that was trained."""
    names = [name for name in STUDY if name in evidence.runs and evidence.beats_guessing(Side(name))]
    gains = [gain for gain in evidence.gains([(Side(name), Side(name, "bypassed")) for name in names]) if gain]
    if not gains:
        return Cell("")
    helping = [gain for gain in gains if gain.sign > 0]
    best = max(gains, key=lambda gain: gain.value.amount)
    if not helping:
        return join(
            "In none of the readings of equation 16 that were trained does the reasoner help; "
            "the most that it adds is {}.", best.amounts()
        )  # fmt: skip
    return join("In some readings of equation 16 the reasoner helps; the most that it adds is {}.", best.amounts())


def _on_device(evidence: Evidence) -> list[Cell]:
    """The opponents with backpropagation against the session's head."""
    found = []
    for case, what in (
        ("tent", "entropy minimisation"),
        ("labels_2", "fine-tuning on 2 labels of the device"),
        ("labels_5", "fine-tuning on 5 labels of the device"),
        ("labels_15", "fine-tuning on 15 labels of the device"),
    ):
        if gain := compare(evidence, Side(SESSION), Side("on_device", case)):
            verdict = {1: "is better than", -1: "is worse than", 0: "cannot be told from"}[gain.sign]
            found.append(join(f"A session {verdict} {what} by backpropagation: {{}}.", gain.amounts()))
    return found


def payloads(evidence: Evidence) -> list[Payload]:
    """Every way to send a head that was tested, of the paper's method and of sessions."""
    found = []
    for method in ("cdc_mmpg", *SESSIONS):
        for run in evidence.of(method)[:1]:
            own = evidence.text(run, "bytes", "down")
            named = [(case, evidence.text(run, "payloads", case, "bytes")) for case in run.find("payloads") or {}]
            same = [case for case, size in named if size and own and size.value == own.value and run.case(case)]
            for case, size in [*([] if same or not own else [(None, own)]), *named]:
                accuracy = evidence.mean_accuracy(Side(method, case))
                if size and accuracy:
                    label = NAMES[method] + (f", {case}" if case else "")
                    found.append(Payload(Side(method, case), label, size, accuracy))
    return found


def equal_accuracy(evidence: Evidence) -> tuple[Payload, Payload] | None:
    """Of sessions' payloads, the least that answers as well as the best, and the best; None if that only guesses."""
    found = [each for each in payloads(evidence) if each.side.name in SESSIONS]
    if not found:
        return None
    best = max(found, key=lambda each: (each.accuracy.amount, -each.bytes.amount))
    if not evidence.beats_guessing(best.side):
        return None
    enough = [each for each in found if each.accuracy.amount >= best.accuracy.amount - EQUAL_POINTS]
    return min(enough, key=lambda each: (each.bytes.amount, -each.accuracy.amount)), best


def _bytes(evidence: Evidence) -> Cell:
    found = equal_accuracy(evidence)
    if not found:
        return Cell("")
    least, best = found
    if least == best:
        return cell(
            f"The best head of a session answers {{}} % in {{}} bytes ({literal(best.label)}); no smaller one comes "
            "within two tenths of a point.", best.accuracy, best.bytes
        )  # fmt: skip
    return cell(
        f"{{}} bytes a session are enough ({literal(least.label)}): {{}} %, within two tenths of a point of the best, "
        f"{{}} % in {{}} bytes ({literal(best.label)}).",
        least.bytes, least.accuracy, best.accuracy, best.bytes,
    )  # fmt: skip
