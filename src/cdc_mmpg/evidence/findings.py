"""What the figures say, in sentences that are made from them: whichever way they turn out."""

from typing import NamedTuple

from cdc_mmpg.catalogue import BASELINE, CONCATENATED, NAMES, PER_SAMPLE, SESSION, SESSIONS, STUDY
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Fact, cite, escape_braces, join_texts
from cdc_mmpg.evidence.pairing import Gain, Side

EQUAL_POINTS = 0.2  # accuracies that lie no further apart count as equal where bytes are compared

# Controls of the adaptive methods: the case, what is given instead, and what it means where that costs nothing.
CONTROLS = (
    ("shuffled", "another sample's anchor", "the adaptation is unused"),
    ("shuffled_device", "another device's anchor", "it does not adapt to the device"),
    ("shuffled_n16", "the mean of another device's anchors", "the adaptation is unused"),
    ("mean_head", "the mean of all heads, for everyone,", "one head for all would do"),
)
# What a session is set beside, as a sentence says it.
OPPONENTS = {
    Side("mean_anchor_virtual"): "taking off the mean anchor",
    Side("in_context_virtual"): "reading the anchors in context on the device",
    Side("on_device", "t3a"): "prototypes that follow the device's features (T3A)",
    Side("on_device", "lame"): "smoothing over neighbours (LAME)",
    Side("on_device", "foa"): "shifting activations (FOA)",
    Side("prompts"): "searching prompts by forward passes (FOA)",
    Side(f"{SESSION}_feature"): "averaging features in place of what is recognised in them",
    Side(f"{SESSION}_collected"): "a session without virtual devices in training",
    Side(f"{SESSION}_jitters"): "a session whose virtual devices jitter colours as augmentation does",
    Side("corrected_grey_world"): "rotating hues back by the mean chroma, which knows the kind of shift",
    Side("corrected_hue_mode"): "rotating hues back by the most frequent hue, which knows the kind of shift",
    Side("corrected_true_cast"): "rotating hues back by the true cast, a ceiling",
}
OTHERS = {BASELINE: "fine-tuning", CONCATENATED: "concatenation, which generates nothing"}


class Payload(NamedTuple):
    """A way to send a head, once a session or for every sample: what it costs, and what it answers rightly."""

    side: Side
    label: str
    bytes: Fact
    accuracy: Fact


def compare_unless_guessing(evidence: Evidence, first: Side, second: Side) -> Gain | None:
    """Return a difference that a sentence may be about.

    None, too, where the reference (of a control the method itself, else `second`) has learnt nothing: it answers no
    more than the majority answer, and a difference to it, or none, says nothing about adaptation.
    """
    reference = first if first.name == second.name else second
    return evidence.compare(first, second) if evidence.beats_guessing(reference) else None


def list_findings(evidence: Evidence) -> list[CitedText]:
    """Return all sentences for which there are runs."""
    return [*list_claims(evidence), *list_control_findings(evidence)]


def list_claims(evidence: Evidence) -> list[CitedText]:
    """Return sentences on what adaptation adds, what of it is needed, and what it takes."""
    claims = [
        *(_compare_with(evidence, method, Side(BASELINE)) for method in PER_SAMPLE if method.startswith("cdc")),
        *(_compare_with(evidence, method, Side(BASELINE)) for method in SESSIONS),
        _compare_with(evidence, SESSION, Side(CONCATENATED)),
        *_compare_with_opponents(evidence),
        *_compare_with_training(evidence),
        _compare_payloads(evidence),
        _judge_reasoner(evidence, "cdc_mmpg"),
        _judge_readings(evidence),
    ]
    return [claim for claim in claims if claim]


def list_control_findings(evidence: Evidence) -> list[CitedText]:
    """Return sentences on what it costs an adaptive method to be given what is another's."""
    findings = []
    for method in (*PER_SAMPLE, *SESSIONS):
        for case, given, meaning in CONTROLS:
            if gain := compare_unless_guessing(evidence, Side(method), Side(method, case)):
                use = "that heads differ is of use" if case == "mean_head" else "its head depends on what was uploaded"
                verdict = {
                    1: f"costs {{}}: {use}",
                    0: f"costs nothing that this test can tell ({{}}): {meaning}",
                    -1: f"does better, by its own minus that {{}}: {meaning}, or harms",
                }[gain.sign]
                findings.append(join_texts(f"{NAMES[method]}: {given} {verdict}.", gain.format_points()))
    return findings


def _compare_with(evidence: Evidence, method: str, other: Side) -> CitedText:
    """Return a sentence on what a method adds over another; empty without runs."""
    gain = compare_unless_guessing(evidence, Side(method), other)
    if gain is None or method == other.name:
        return NO_TEXT
    what = "Per-sample adaptation" if method in PER_SAMPLE else "Adaptation to a session"
    over = OTHERS[other.name]
    verdict = {
        1: f"adds to {over}",
        -1: f"loses to {over}",
        0: f"shows no difference to {over} that this test can tell",
    }[gain.sign]
    return join_texts(f"{what} ({NAMES[method]}) {verdict}: {{}}.", gain.format_points())


def _judge_reasoner(evidence: Evidence, method: str) -> CitedText:
    """Return a sentence on a method with and without the reasoner; empty without runs."""
    gain = compare_unless_guessing(evidence, Side(method), Side(method, "bypassed"))
    if gain is None:
        return NO_TEXT
    verdict = {1: "helps", -1: "harms", 0: "can be left out"}[gain.sign]
    return join_texts(
        f"The reasoner (ADR) {verdict} in {NAMES[method]}: with it minus without it {{}}.", gain.format_points()
    )


def _judge_readings(evidence: Evidence) -> CitedText:
    """Return a sentence on every reading of the reasoner that was trained; empty without runs."""
    names = [name for name in STUDY if name in evidence.runs and evidence.beats_guessing(Side(name))]
    gains = [gain for gain in evidence.compare_all([(Side(name), Side(name, "bypassed")) for name in names]) if gain]
    if not gains:
        return NO_TEXT
    helping = [gain for gain in gains if gain.sign > 0]
    best = max(gains, key=lambda gain: gain.value.amount)
    if not helping:
        return join_texts(
            "In none of the readings of equation 16 that were trained does the reasoner help; "
            "the most that it adds is {}.", best.format_points()
        )  # fmt: skip
    return join_texts(
        "In some readings of equation 16 the reasoner helps; the most that it adds is {}.", best.format_points()
    )


def _compare_with_opponents(evidence: Evidence) -> list[CitedText]:
    """Return sentences on what else adapts without labels, against a session."""
    findings = []
    for side, what in OPPONENTS.items():
        if gain := compare_unless_guessing(evidence, Side(SESSION), side):
            verdict = {1: "is better than", -1: "is worse than", 0: "cannot be told from"}[gain.sign]
            findings.append(join_texts(f"A session {verdict} {what}: {{}}.", gain.format_points()))
    return findings


def _compare_with_training(evidence: Evidence) -> list[CitedText]:
    """Return sentences on training on the device against the session's head."""
    findings = []
    for case, what in (
        ("tent", "entropy minimisation"),
        ("labels_2", "fine-tuning on 2 labels of the device"),
        ("labels_5", "fine-tuning on 5 labels of the device"),
        ("labels_15", "fine-tuning on 15 labels of the device"),
    ):
        if gain := compare_unless_guessing(evidence, Side(SESSION), Side("on_device", case)):
            verdict = {1: "is better than", -1: "is worse than", 0: "cannot be told from"}[gain.sign]
            findings.append(join_texts(f"A session {verdict} {what} by backpropagation: {{}}.", gain.format_points()))
    return findings


def list_payloads(evidence: Evidence) -> list[Payload]:
    """Return every way to send a head that was tested, of the paper's method and of sessions."""
    payloads = []
    for method in ("cdc_mmpg", *SESSIONS):
        for run in evidence.find_runs(method)[:1]:
            default = evidence.cite_value(run, "bytes", "down")
            named = [(case, evidence.cite_value(run, "payloads", case, "bytes")) for case in run.find("payloads") or {}]
            repeated = [
                case for case, size in named if size and default and size.value == default.value and run.find_case(case)
            ]
            for case, size in [*([] if repeated or not default else [(None, default)]), *named]:
                accuracy = evidence.mean_accuracy(Side(method, case))
                if size and accuracy:
                    label = NAMES[method] + (f", {case}" if case else "")
                    payloads.append(Payload(Side(method, case), label, size, accuracy))
    return payloads


def find_equal_payloads(evidence: Evidence) -> tuple[Payload, Payload] | None:
    """Return the smallest payload of a session that answers as well as the best, and the best.

    None where there is none, or the best only guesses.
    """
    payloads = [payload for payload in list_payloads(evidence) if payload.side.name in SESSIONS]
    if not payloads:
        return None
    best = max(payloads, key=lambda payload: (payload.accuracy.amount, -payload.bytes.amount))
    if not evidence.beats_guessing(best.side):
        return None
    enough = [payload for payload in payloads if payload.accuracy.amount >= best.accuracy.amount - EQUAL_POINTS]
    return min(enough, key=lambda payload: (payload.bytes.amount, -payload.accuracy.amount)), best


def _compare_payloads(evidence: Evidence) -> CitedText:
    """Return a sentence on the bytes that a session needs; empty without runs."""
    equal = find_equal_payloads(evidence)
    if not equal:
        return NO_TEXT
    least, best = equal
    best_label, least_label = escape_braces(best.label), escape_braces(least.label)
    if least == best:
        return cite(
            f"The best head of a session answers {{}} % in {{}} bytes ({best_label}); no smaller one comes "
            "within two tenths of a point.", best.accuracy, best.bytes
        )  # fmt: skip
    return cite(
        f"{{}} bytes a session are enough ({least_label}): {{}} %, within two tenths of a point of the best, "
        f"{{}} % in {{}} bytes ({best_label}).",
        least.bytes, least.accuracy, best.accuracy, best.bytes,
    )  # fmt: skip
