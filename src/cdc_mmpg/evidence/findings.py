"""Findings: sentences generated from the figures, worded by their sign and significance."""

from typing import NamedTuple

from cdc_mmpg.catalogue import BASELINE, CONCATENATED, METHOD_LABELS, SAMPLE_METHODS, SESSION, SESSION_METHODS, STUDY
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Fact, cite, escape_braces, join_texts
from cdc_mmpg.evidence.pairing import Gain, Side

EQUAL_ACCURACY_POINTS = 0.2  # accuracies at most this far apart count as equal when bytes are compared

# Controls of the adaptive methods: case, replacement input, conclusion if the replacement costs no accuracy.
CONTROLS = (
    ("shuffled", "another sample's anchor", "no sign that the adaptation is used"),
    ("shuffled_device", "another device's anchor", "no sign that it adapts to the device"),
    ("shuffled_n16", "the mean of another device's anchors", "no sign that the adaptation is used"),
    ("mean_head", "one mean head for all inputs", "one shared head would be enough"),
)
# Methods that sentences compare a session with.
OPPONENTS = {
    Side("mean_anchor_virtual"): "subtracting the mean anchor",
    Side("in_context_virtual"): "an in-context transformer over the anchors on the device",
    Side("on_device", "t3a"): "adjusting class prototypes to the device's features (T3A)",
    Side("on_device", "lame"): "smoothing predictions over neighbours (LAME)",
    Side("on_device", "foa"): "shifting activations (FOA)",
    Side("prompts"): "searching prompts with forward passes alone (FOA)",
    Side(f"{SESSION}_feature"): "averaging plain features instead of what is recognised in them",
    Side(f"{SESSION}_collected"): "the same method trained without virtual devices",
    Side(f"{SESSION}_jitters"): "the same method with virtual devices that use ordinary colour jitter",
    Side("corrected_grey_world"): "rotating hues back by the mean chroma (given the kind of shift)",
    Side("corrected_hue_mode"): "rotating hues back by the most frequent hue (given the kind of shift)",
    Side("corrected_true_cast"): "rotating hues back by the true cast (an upper bound)",
}
REFERENCES = {
    BASELINE: "fine-tuning",
    f"{BASELINE}_virtual": "fine-tuning with the same virtual devices",
    CONCATENATED: "concatenation, which generates no weights",
}


class Payload(NamedTuple):
    """A format in which a head is sent, once per session or for every sample: its size and its accuracy."""

    side: Side
    label: str
    bytes: Fact
    accuracy: Fact


def compare_unless_guessing(evidence: Evidence, first: Side, second: Side) -> Gain | None:
    """Return a difference that supports a sentence; None if there is none or the reference only guesses.

    The reference is the method itself for a control, else `second`. If it is no better than the majority answer, it
    has learned nothing, and no difference to it says anything about adaptation.
    """
    reference = first if first.name == second.name else second
    return evidence.compare(first, second) if evidence.beats_guessing(reference) else None


def list_findings(evidence: Evidence) -> list[CitedText]:
    """Return all sentences that the finished runs support."""
    return [*list_claims(evidence), *list_control_findings(evidence)]


def list_claims(evidence: Evidence) -> list[CitedText]:
    """Return sentences on the gain from adaptation, the parts that it needs, and its cost in bytes."""
    claims = [
        *(
            _compare_with(evidence, method, Side(f"{BASELINE}_virtual" if method.endswith("_virtual") else BASELINE))
            for method in SAMPLE_METHODS
            if method.startswith("cdc")
        ),
        *(_compare_with(evidence, method, Side(BASELINE)) for method in SESSION_METHODS),
        _compare_with(evidence, SESSION, Side(CONCATENATED)),
        *_compare_with_opponents(evidence),
        *_compare_with_device_training(evidence),
        _compare_payloads(evidence),
        _judge_reasoner(evidence, "cdc_mmpg"),
        _judge_reasoner_study(evidence),
    ]
    return [claim for claim in claims if claim]


def list_control_findings(evidence: Evidence) -> list[CitedText]:
    """Return sentences on the accuracy that adaptive methods lose when they are given another input."""
    findings = []
    for method in (*SAMPLE_METHODS, *SESSION_METHODS):
        for case, given, meaning in CONTROLS:
            if gain := compare_unless_guessing(evidence, Side(method), Side(method, case)):
                use = "individual heads help" if case == "mean_head" else "its head depends on what was uploaded"
                verdict = {
                    1: f"costs {{}}: {use}",
                    0: f"makes no significant difference ({{}}): {meaning}",
                    -1: f"is better (own minus control: {{}}): {meaning}, and adapting may do harm",
                }[gain.sign]
                findings.append(join_texts(f"{METHOD_LABELS[method]}: using {given} {verdict}.", gain.format_points()))
    return findings


def _compare_with(evidence: Evidence, method: str, other: Side) -> CitedText:
    """Return a sentence on a method's gain over another; empty without runs."""
    gain = compare_unless_guessing(evidence, Side(method), other)
    if gain is None or method == other.name:
        return NO_TEXT
    unit = "Per-sample adaptation" if method in SAMPLE_METHODS else "Per-session adaptation"
    reference = REFERENCES[other.name]
    verdict = {
        1: f"improves on {reference}",
        -1: f"is worse than {reference}",
        0: f"does not differ significantly from {reference}",
    }[gain.sign]
    return join_texts(f"{unit} ({METHOD_LABELS[method]}) {verdict}: {{}}.", gain.format_points())


def _judge_reasoner(evidence: Evidence, method: str) -> CitedText:
    """Return a sentence on a method with and without the reasoner; empty without runs."""
    gain = compare_unless_guessing(evidence, Side(method), Side(method, "bypassed"))
    if gain is None:
        return NO_TEXT
    verdict = {1: "helps", -1: "harms", 0: "makes no significant difference"}[gain.sign]
    template = f"The reasoner (ADR) {verdict} in {METHOD_LABELS[method]}: its contribution is {{}}."
    return join_texts(template, gain.format_points())


def _judge_reasoner_study(evidence: Evidence) -> CitedText:
    """Return a sentence on the trained interpretations of equation 16 (the reasoner); empty without runs."""
    names = [name for name in STUDY if name in evidence.runs and evidence.beats_guessing(Side(name))]
    gains = [gain for gain in evidence.compare_all([(Side(name), Side(name, "bypassed")) for name in names]) if gain]
    if not gains:
        return NO_TEXT
    helping = [gain for gain in gains if gain.sign > 0]
    best = max(gains, key=lambda gain: gain.value.amount)
    if not helping:
        return join_texts(
            "The reasoner helps in none of the trained interpretations of the paper's equation 16; "
            "its largest gain is {}.", best.format_points()
        )  # fmt: skip
    template = "The reasoner helps in some interpretations of the paper's equation 16; its largest gain is {}."
    return join_texts(template, best.format_points())


def _compare_with_opponents(evidence: Evidence) -> list[CitedText]:
    """Return sentences that compare a session with other methods that need no labels of the device."""
    findings = []
    for side, opponent in OPPONENTS.items():
        if gain := compare_unless_guessing(evidence, Side(SESSION), side):
            verdict = {1: "is better than", -1: "is worse than", 0: "does not differ significantly from"}[gain.sign]
            findings.append(join_texts(f"The session method {verdict} {opponent}: {{}}.", gain.format_points()))
    return findings


def _compare_with_device_training(evidence: Evidence) -> list[CitedText]:
    """Return sentences that compare a session's head with training on the device."""
    findings = []
    for case, training in (
        ("tent", "entropy minimisation"),
        ("labels_2", "fine-tuning on 2 labels from the device"),
        ("labels_5", "fine-tuning on 5 labels from the device"),
        ("labels_15", "fine-tuning on 15 labels from the device"),
    ):
        if gain := compare_unless_guessing(evidence, Side(SESSION), Side("on_device", case)):
            verdict = {1: "is better than", -1: "is worse than", 0: "does not differ significantly from"}[gain.sign]
            template = f"The session method {verdict} {training} by backpropagation: {{}}."
            findings.append(join_texts(template, gain.format_points()))
    return findings


def list_payloads(evidence: Evidence) -> list[Payload]:
    """Return all tested payloads of the paper's method and of sessions."""
    payloads = []
    for method in ("cdc_mmpg", *SESSION_METHODS):
        for run in evidence.find_runs(method)[:1]:
            default = evidence.cite_value(run, "bytes", "down")
            named = [(case, evidence.cite_value(run, "payloads", case, "bytes")) for case in run.find("payloads") or {}]
            repeated = [
                case for case, size in named if size and default and size.value == default.value and run.find_case(case)
            ]
            for case, size in [*([] if repeated or not default else [(None, default)]), *named]:
                accuracy = evidence.cite_mean_accuracy(Side(method, case))
                if size and accuracy:
                    label = METHOD_LABELS[method] + (f", {case}" if case else "")
                    payloads.append(Payload(Side(method, case), label, size, accuracy))
    return payloads


def find_equal_payloads(evidence: Evidence) -> tuple[Payload, Payload] | None:
    """Return a session's smallest payload that is as accurate as its best one, and the best one.

    None if there is none, or if the best one only guesses.
    """
    payloads = [payload for payload in list_payloads(evidence) if payload.side.name in SESSION_METHODS]
    if not payloads:
        return None
    best = max(payloads, key=lambda payload: (payload.accuracy.amount, -payload.bytes.amount))
    if not evidence.beats_guessing(best.side):
        return None
    least_accuracy = best.accuracy.amount - EQUAL_ACCURACY_POINTS
    enough = [payload for payload in payloads if payload.accuracy.amount >= least_accuracy]
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
            f"The best payload of a session reaches {{}} % with {{}} bytes ({best_label}); no smaller payload comes "
            "within 0.2 points.", best.accuracy, best.bytes
        )  # fmt: skip
    return cite(
        f"{{}} bytes per session are enough ({least_label}): {{}} %, within 0.2 points of the best payload, "
        f"{{}} % with {{}} bytes ({best_label}).",
        least.bytes, least.accuracy, best.accuracy, best.bytes,
    )  # fmt: skip
