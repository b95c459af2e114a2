"""A trained run as two bundles: what a device needs (twice, whole and with an int8 encoder), and what the cloud needs.

    cloud/         generator.safetensors, cloud.json, signing_key.pem (mode 0600)
    device/        bundle.json, encoder.onnx, head.onnx, shared.npy, basis.npy, vocab.txt, answers.json
    device-int8/   the same
    export.json    what was checked and measured

Of the word table, half of the model at the paper's size, only the words of the training questions stay, the
`MAX_WORDS` most frequent of them; the others become [UNK], and a device says so (`--all-words` keeps all).
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdc_mmpg.deployment.bundle_files import DEVICE_FOLDERS, EXPORT_REPORT
from cdc_mmpg.deployment.source import SPECIAL_WORDS, Source
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.media.frames import shorter_side
from cdc_mmpg.media.text import BERT_SIZE, TextEncoder
from cdc_mmpg.program import exit_code, leave_on_signals, log_to_terminal
from cdc_mmpg.results import write_json
from cdc_mmpg.training.reopen import reopen, results_of

RETRIEVAL_REFUSAL = "retrieval compares stored clips with each other: a device that answers has no use for it"
MAX_WORDS = 6_000  # that are kept: 1.2 MB in int8


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a run; return the exit code (see `errors`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description="bundles for a device and for the cloud, of a finished run")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="where the bundles go; default: deployment/ in the run's folder")
    parser.add_argument(
        "--untrained",
        nargs="+",
        type=Path,
        metavar="YAML",
        help="random weights instead of the run's, of the model that these configurations describe: to size and time "
        "a deployment before anything is trained",
    )
    parser.add_argument("--all-words", action="store_true", help="keep the vocabulary as it is, however large")
    options = parser.parse_args(arguments)
    log_to_terminal()
    leave_on_signals()
    out = options.out or options.run / "deployment"

    def run() -> None:
        report = (
            export_untrained(options.untrained, out, options.all_words)
            if options.untrained
            else export_run(options.run, out, options.all_words)
        )
        print(format_summary(report, out))

    return exit_code(run)


def export_run(run: Path, out: Path, all_words: bool = False) -> dict[str, Any]:
    """Write the bundles of a finished run below `out`, checked against torch and tried on its test; return the report.

    Args:
        run: its folder.
        out: where the bundles go.
        all_words: keep all of the vocabulary.

    Raises:
        CheckpointError: the run is not finished, or damaged.
        ConfigError: its method or task cannot be served.
        DataError: its dataset is not there any more.
    """
    results = results_of(run)
    refuse_unservable(results)

    from cdc_mmpg.data.batch import UNKNOWN_ANSWER  # noqa: PLC0415  see `training.cli`
    from cdc_mmpg.deployment.bundles import write_bundles  # noqa: PLC0415
    from cdc_mmpg.deployment.checks import evaluate_bundles  # noqa: PLC0415
    from cdc_mmpg.models.weights import load_checkpoint  # noqa: PLC0415

    experiment = reopen(run)
    method, data, settings = experiment.model, experiment.dataset, experiment.settings["data"]["init_args"]
    check_servable(method, results["task"])
    method.load_state_dict(load_checkpoint(run / "best.ckpt")["state_dict"])
    data.prepare_data()
    data.setup("test")
    words = TextEncoder(settings["vocab"]).words()
    answers = [*data.answers(), UNKNOWN_ANSWER] if data.task == "open_ended" else []
    source = Source(
        method.eval(),
        f"{run.absolute().parents[1].name}/{run.absolute().parent.name}",
        data.task,
        answers,
        words,
        list(range(len(words))) if all_words else select_words(words, data.word_counts("train")),
        _frame_settings(settings),
        settings["text_length"],
    )
    report = write_bundles(source, out)
    report["seed"] = results["seed"]
    report["test"] = evaluate_bundles(source, data, run, out)
    write_json(report, out / EXPORT_REPORT)
    return report


def export_untrained(configurations: Sequence[Path], out: Path, all_words: bool = False) -> dict[str, Any]:
    """Write bundles of random weights and return their report; the vocabulary is made up, and its first words stay.

    Raises:
        ConfigError: the configurations do not make a method that can be served.
    """
    from cdc_mmpg.deployment.bundles import write_bundles  # noqa: PLC0415  see `training.cli`
    from cdc_mmpg.models.adr import ADR  # noqa: PLC0415
    from cdc_mmpg.training.experiment import Experiment  # noqa: PLC0415  see `training.cli`

    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--config={path}" for path in configurations]
        arguments += [f"--data.init_args.root={folder}", f"--data.init_args.cache_dir={folder}"]
        if any(path.stem.startswith("cdc_mmpg") and "session" not in path.stem for path in configurations):
            ADR("paper_qa").save(Path(folder) / "adr.safetensors")
            arguments.append(f"--model.init_args.adr={folder}/adr.safetensors")
        experiment = Experiment(arguments, run=False)
    method, settings = experiment.model, experiment.settings["data"]["init_args"]
    check_servable(method, method.head.task)
    letters = [mark + letter for mark in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz0123456789?"]
    size = method.encoder.text_embeddings.word_embeddings.num_embeddings
    words = [*SPECIAL_WORDS, *letters, *(f"word{i}" for i in range(max(size, BERT_SIZE)))][:size]
    answers = [f"answer{i}" for i in range(method.head.outputs)] if method.head.task == "open_ended" else []
    name = "/".join(path.stem for path in reversed(configurations))
    kept = list(range(size if all_words else min(size, MAX_WORDS)))
    source = Source(
        method.eval(), name, method.head.task, answers, words, kept, _frame_settings(settings), settings["text_length"]
    )
    report = write_bundles(source, out)
    write_json(report, out / EXPORT_REPORT)
    return report


def refuse_unservable(results: dict[str, Any]) -> None:
    """Refuse by its results a finished run that cannot be served, before anything slow is imported.

    Raises:
        ConfigError: it answers no questions, ranks clips, or sent nothing from a cloud.
    """
    if not results.get("accuracy"):
        raise ConfigError(f"{results['method']} answers no questions: export a run that does")
    if results.get("task") == "retrieval":
        raise ConfigError(RETRIEVAL_REFUSAL)
    if results.get("bytes", {}).get("down") == 0:
        raise ConfigError(
            f"{results['method']} sends nothing from a cloud: take a method that generates its last layer "
            "(METHOD=cdc_mmpg_session, cdc_mmpg or hyper)"
        )


def check_servable(method: Any, task: str) -> None:
    """Refuse a method that cannot be served.

    Raises:
        ConfigError: it cannot.
    """
    from cdc_mmpg.methods.answering import Answering  # noqa: PLC0415  see `training.cli`

    if not isinstance(method, Answering):
        raise ConfigError(f"{type(method).__name__} answers no questions: export a run that does")
    if task == "retrieval":
        raise ConfigError(RETRIEVAL_REFUSAL)
    if method.head.layers > 1:
        raise ConfigError("a layer for every candidate: one upload has one layer (per_candidate: false)")
    method.deployment_parts()


def _frame_settings(settings: dict[str, Any]) -> dict[str, int]:
    """Return which frames the encoder sees, and how large: number, candidates, size and side in pixels."""
    size = settings["image_size"]
    return {"number": settings["num_frames"], "candidates": settings["candidates"], "size": size,
            "side": settings["resize"] or shorter_side(size)}  # fmt: skip


def select_words(words: Sequence[str], counts: dict[int, int]) -> list[int]:
    """Return the ids of the WordPieces that stay: the special ones and the most frequent, in their old order."""
    special = [words.index(word) for word in SPECIAL_WORDS]
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    return sorted({*special, *frequent[: MAX_WORDS - len(special)]})


def format_summary(report: dict[str, Any], out: Path) -> str:
    """Return what a person wants to know of an export."""
    sizes = {name: report["bytes"][name] / 1e6 for name in (*DEVICE_FOLDERS.values(), "cloud")}
    lines = [f"{out}: {report['name']}"]
    for name, size in sizes.items():
        test = report.get("test", {}).get(name)
        accuracy = (
            f"  accuracy {test['accuracy']:.1%}, the run's answer to {test['agreement']:.1%} of the questions"
            if test
            else ""
        )
        lines.append(f"  {name + '/':12} {size:8.2f} MB{accuracy}")
    if "test" in report:
        test = report["test"]
        lines.append(f"  the run itself: accuracy {test['run']['accuracy']:.1%} of {test['questions']} test questions")
    kept = report["words"]
    unknown = f", which makes {report['test']['unknown_words']:.2%} of the test's unknown" if "test" in report else ""
    lines.append(f"  words: {kept['kept']:,} of {kept['vocabulary']:,} kept{unknown}")
    lines.append(f"  float32 against torch: largest difference {report['largest_difference']:.1e}")
    kind = report["layout"]["kind"]
    lines.append(f"  a layer: {report['bytes']['up']} bytes up, {report['bytes']['down'][kind]:,} down ({kind})")
    return "\n".join(lines)
