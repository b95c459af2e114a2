"""Answer to a question about a video file, or a ranking of texts, by a trained run: device and cloud in one process."""

import argparse
from collections.abc import Sequence
from glob import glob

from cdc_mmpg.files import expand_home
from cdc_mmpg.program import log_to_terminal, run_to_exit_code
from cdc_mmpg.training.finished import FinishedRun

PRINTED_ANSWERS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the best answers with their probabilities; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--video", required=True, help="path of the clip")
    parser.add_argument("--question", default="", help="question; may be empty with --choices")
    parser.add_argument("--choices", default="", help="candidates or captions, separated by |")
    parser.add_argument(
        "--session",
        action="append",
        default=[],
        help="unlabelled clips of the same camera, for a session method: a path, or a pattern with *; may be repeated",
    )
    parser.add_argument("--vocab", help="path of vocab.txt, if it has moved since training")
    options = parser.parse_args(arguments)
    log_to_terminal()

    def predict() -> None:
        run = FinishedRun(options.run, options.vocab)
        choices = [choice.strip() for choice in options.choices.split("|") if choice.strip()]
        session = [clip for path in map(expand_home, options.session) for clip in sorted(glob(path)) or [path]]
        answers = run.answer(expand_home(options.video), options.question, choices, session)
        print(options.question or options.video)
        for text, score in answers[:PRINTED_ANSWERS]:
            print(f"  {score:6.3f}  {text}" if run.results["task"] == "retrieval" else f"  {score:6.1%}  {text}")

    return run_to_exit_code(predict)
