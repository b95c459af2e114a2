"""`python -m cdc_mmpg.device`: answer a question about a clip with a device bundle; print answers, bytes, times."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.device.client import DEFAULT_DEADLINE_SECONDS, Answer, Device
from cdc_mmpg.device.connection import make_printable
from cdc_mmpg.errors import DataError
from cdc_mmpg.program import exit_on_signals, log_to_terminal, run_to_exit_code

KEY_VARIABLE = "CDC_MMPG_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one question, print the best answers and return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="the device/ or device-int8/ folder of an export")
    parser.add_argument("--video", type=Path, required=True, help="path of the clip")
    parser.add_argument("--question", default="", help="question; may be empty with --choices")
    parser.add_argument("--choices", default="", help="multiple-choice options, separated by |")
    parser.add_argument("--cloud", help=f"URL of the service; if it requires a key, set ${KEY_VARIABLE}")
    parser.add_argument("--state", type=Path, help="folder that stores the session and its layer between runs")
    parser.add_argument("--new-session", action="store_true", help="discard the stored clips and layer")
    parser.add_argument(
        "--deadline",
        type=float,
        default=DEFAULT_DEADLINE_SECONDS,
        help="maximum seconds that an answer waits for a layer",
    )
    options = parser.parse_args(arguments)
    log_to_terminal()
    exit_on_signals()

    def run() -> None:
        if not os.path.isfile(options.video):  # returns False for invalid names, where Path.is_file may raise
            raise DataError(f"{options.video}: no such clip (VIDEO=)")
        key = os.environ.get(KEY_VARIABLE) or None
        device = Device(options.bundle, options.cloud or None, key=key, state=options.state, deadline=options.deadline)
        if options.new_session:
            device.new_session()
        choices = [choice.strip() for choice in options.choices.split("|") if choice.strip()]
        answer = device.answer(options.video, options.question, choices)
        device.close()
        print(format_answer(options.question, answer))

    return run_to_exit_code(run)


def format_answer(question: str, answer: Answer) -> str:
    """Return an answer as text for a terminal, without control characters."""
    lines = [question, *(f"  {probability:6.1%}  {text}" for text, probability in answer.ranked)]
    if answer.unknown_words:
        lines.append(f"not in this bundle's vocabulary, read as [UNK]: {', '.join(answer.unknown_words)}")
    origins = {"adapted": "adapted", "kept": "adapted earlier, loaded from disk", "shared": "shared by all devices"}
    clips = f", from {answer.anchors} clip{'s' if answer.anchors > 1 else ''}" if answer.anchors else ""
    lines.append(f"last layer: {origins[answer.origin]}{clips}; answer of the shared layer: {answer.unadapted}")
    if answer.trouble:
        lines.append(f"no new layer: {answer.trouble}")
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in answer.milliseconds.items())
    lines.append(f"{answer.bytes_up:,} bytes up, {answer.bytes_down:,} bytes down; ms: {stages}")
    return "\n".join(map(make_printable, lines))


if __name__ == "__main__":
    sys.exit(main())
