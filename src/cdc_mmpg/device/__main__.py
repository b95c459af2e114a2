"""`python -m cdc_mmpg.device`: answer a question about a clip with a device bundle, and say what it took."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.device.client import Answer, Device
from cdc_mmpg.device.connection import make_printable
from cdc_mmpg.errors import DataError
from cdc_mmpg.program import exit_code, leave_on_signals, log_to_terminal

KEY_VARIABLE = "CDC_MMPG_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the best answers; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="the device/ or device-int8/ folder of an export")
    parser.add_argument("--video", type=Path, required=True)
    parser.add_argument("--question", default="")
    parser.add_argument("--choices", default="", help="of a multiple choice, with | between them")
    parser.add_argument("--cloud", help=f"address of the service; its key, if it wants one, in ${KEY_VARIABLE}")
    parser.add_argument("--state", type=Path, help="folder in which the session and its layer are kept")
    parser.add_argument("--new-session", action="store_true", help="forget the clips and the layer of another camera")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds that the answer may wait for a layer")
    options = parser.parse_args(arguments)
    log_to_terminal()
    leave_on_signals()

    def run() -> None:
        if not os.path.isfile(options.video):  # which says no of any name that no file has
            raise DataError(f"{options.video}: no such clip (VIDEO=)")
        key = os.environ.get(KEY_VARIABLE) or None
        device = Device(options.bundle, options.cloud or None, key=key, state=options.state, deadline=options.deadline)
        if options.new_session:
            device.new_session()
        choices = [choice.strip() for choice in options.choices.split("|") if choice.strip()]
        answer = device.answer(options.video, options.question, choices)
        device.close()
        print(format_answer(options.question, answer))

    return exit_code(run)


def format_answer(question: str, answer: Answer) -> str:
    """Return an answer as a person reads it, without what would move a terminal's cursor."""
    lines = [question, *(f"  {probability:6.1%}  {text}" for text, probability in answer.ranked)]
    if answer.unknown_words:
        lines.append(f"not in this bundle's vocabulary, and so not read: {', '.join(answer.unknown_words)}")
    how = {"adapted": "adapted", "kept": "adapted before, and kept", "shared": "shared by all devices"}[answer.origin]
    clips = f", from {answer.anchors} clip{'s' if answer.anchors > 1 else ''}" if answer.anchors else ""
    lines.append(f"last layer: {how}{clips}; the shared one says: {answer.unadapted}")
    if answer.trouble:
        lines.append(f"no newer layer: {answer.trouble}")
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in answer.milliseconds.items())
    lines.append(f"{answer.bytes_up:,} bytes up, {answer.bytes_down:,} down; ms: {stages}")
    return "\n".join(map(make_printable, lines))


if __name__ == "__main__":
    sys.exit(main())
