"""Export of a trained run as bundles: one for the cloud and two for a device (float32 and with an int8 encoder).

    cloud/         generator.safetensors, cloud.json, signing_key.pem (mode 0600)
    device/        bundle.json, encoder.onnx, head.onnx, shared.bin, basis.bin, tokenizer.json, answers.json
    device-int8/   the same files
    demo/          clips and questions of an unseen device, only of the synthetic dataset
    export.json    results of checks and measurements

The word table is half of the model at the paper's size, so only the `MAX_WORDS` most frequent words of the training
questions are kept; others are read as [UNK], which the device reports (`--all-words` keeps all words).
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdc_mmpg.deployment.bundle_files import EXPORT_REPORT, describe_bundles
from cdc_mmpg.deployment.demo import read_session, write_session
from cdc_mmpg.deployment.source import SPECIAL_WORDS, Source
from cdc_mmpg.device.page import DEMO_FOLDER, DEVICE_FOLDERS
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.media.frames import compute_shorter_side
from cdc_mmpg.media.text import BERT_VOCABULARY_SIZE, TextEncoder
from cdc_mmpg.program import exit_on_signals, log_to_terminal, run_to_exit_code
from cdc_mmpg.results import write_json
from cdc_mmpg.training.reopen import load_finished_results, reopen
from cdc_mmpg.training.wandb_record import Subject, describe_checkpoint, list_figures, start_record

RETRIEVAL_REFUSAL = "retrieval cannot be served: it ranks stored clips, while a device answers questions about one clip"
MAX_WORDS = 6_000  # largest number of words kept: 1.2 MB in int8


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a run; return the exit code (see `errors`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description="export a finished run as bundles for a device and the cloud")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="folder of the bundles; default: deployment/ in the run's folder")
    parser.add_argument(
        "--untrained",
        nargs="+",
        type=Path,
        metavar="YAML",
        help="export the model of these configurations with random weights instead of the run, to measure size and "
        "speed of a deployment before training",
    )
    parser.add_argument("--data", help="folder of the run's dataset, if it has moved since training")
    parser.add_argument("--cache", help="folder of its decoded frames, likewise")
    parser.add_argument("--all-words", action="store_true", help="keep the whole vocabulary")
    options = parser.parse_args(arguments)
    log_to_terminal()
    exit_on_signals()
    out = options.out or options.run / "deployment"

    def run() -> None:
        report = (
            export_untrained(options.untrained, out, options.all_words)
            if options.untrained
            else export_run(options.run, out, options.all_words, options.data, options.cache)
        )
        print(format_summary(report, out))
        if not options.untrained:
            record_export(options.run, out, report)

    return run_to_exit_code(run)


def export_run(
    run: Path, out: Path, all_words: bool = False, data_root: str | None = None, cache: str | None = None
) -> dict[str, Any]:
    """Export a finished run, check the bundles against torch, evaluate them on the test set and return the report.

    Args:
        run: folder of the run.
        out: folder of the bundles.
        all_words: whether to keep the whole vocabulary.
        data_root: folder of the run's dataset, if it has moved since training.
        cache: folder of its decoded frames, if it has moved.

    Raises:
        CheckpointError: the run is not finished, or is damaged.
        ConfigError: the run's method or task cannot be served.
        DataError: the run's dataset is no longer available.
    """
    results = load_finished_results(run)
    refuse_unservable(results)

    from cdc_mmpg.data.batch import UNKNOWN_ANSWER  # noqa: PLC0415  see `training.cli`
    from cdc_mmpg.deployment.bundles import write_bundles  # noqa: PLC0415
    from cdc_mmpg.deployment.checks import evaluate_bundles  # noqa: PLC0415

    experiment = reopen(run, places={"root": data_root, "cache_dir": cache})
    method, data, settings = experiment.model, experiment.dataset, experiment.settings["data"]["init_args"]
    check_servable(method, results["task"])
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
        _read_frame_settings(settings),
        settings["text_length"],
    )
    report = write_bundles(source, out)
    report["seed"] = results["seed"]
    report["test"] = evaluate_bundles(source, data, run, out)
    clips = Path(settings["root"])
    if (clips / "devices.json").is_file():  # only the synthetic dataset has it
        write_session(read_session(run, clips, None, 0), clips, out / DEMO_FOLDER)
    write_json(report, out / EXPORT_REPORT)
    return report


def record_export(run: Path, out: Path, report: dict[str, Any]) -> None:
    """Record an export in W&B: its figures, the bundles, and the checkpoint that they were made of."""
    record = start_record(out, Subject.of_run(run, "export"), {"report": report})
    if record.run is not None:
        record.use(describe_checkpoint(run))
        record.log(describe_bundles(run, out))
        record.summarise(list_figures(report))
        record.end()


def export_untrained(configurations: Sequence[Path], out: Path, all_words: bool = False) -> dict[str, Any]:
    """Export a model with random weights and a synthetic vocabulary, of which the first words are kept.

    Raises:
        ConfigError: the configurations do not describe a method that can be served.
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
    words = [*SPECIAL_WORDS, *letters, *(f"word{i}" for i in range(max(size, BERT_VOCABULARY_SIZE)))][:size]
    answers = [f"answer{i}" for i in range(method.head.outputs)] if method.head.task == "open_ended" else []
    name = "/".join(path.stem for path in reversed(configurations))
    kept = list(range(size if all_words else min(size, MAX_WORDS)))
    frames, text_length = _read_frame_settings(settings), settings["text_length"]
    source = Source(method.eval(), name, method.head.task, answers, words, kept, frames, text_length)
    report = write_bundles(source, out)
    write_json(report, out / EXPORT_REPORT)
    return report


def refuse_unservable(results: dict[str, Any]) -> None:
    """Refuse a run that cannot be served by its results, before slow imports.

    Raises:
        ConfigError: the run answers no questions, ranks clips, or sends nothing from a cloud.
    """
    if not results.get("accuracy"):
        raise ConfigError(f"{results['method']} answers no questions: export a run that does")
    if results.get("task") == "retrieval":
        raise ConfigError(RETRIEVAL_REFUSAL)
    if results.get("bytes", {}).get("down") == 0:
        raise ConfigError(
            f"{results['method']} sends nothing from a cloud: choose a method that generates its last layer "
            "(METHOD=cdc_mmpg_session, cdc_mmpg or hyper)"
        )


def check_servable(method: Any, task: str) -> None:
    """Refuse a method that cannot be served.

    Raises:
        ConfigError: the method or task cannot be served.
    """
    from cdc_mmpg.methods.answering import Answering  # noqa: PLC0415  see `training.cli`

    if not isinstance(method, Answering):
        raise ConfigError(f"{type(method).__name__} answers no questions: export a run that does")
    if task == "retrieval":
        raise ConfigError(RETRIEVAL_REFUSAL)
    if method.head.layers > 1:
        raise ConfigError(
            "one layer per candidate cannot be served, only one per upload: train again with "
            "ARGS=--model.init_args.head.init_args.per_candidate=false"
        )
    method.deployment_parts()


def _read_frame_settings(settings: dict[str, Any]) -> dict[str, int]:
    """Return the frame settings of the encoder: number, candidates, size and side in pixels."""
    size = settings["image_size"]
    return {"number": settings["num_frames"], "candidates": settings["candidates"], "size": size,
            "side": settings["resize"] or compute_shorter_side(size)}  # fmt: skip


def select_words(words: Sequence[str], counts: dict[int, int]) -> list[int]:
    """Select the ids of the WordPieces to keep: the special and the most frequent ones, in ascending order."""
    special = [words.index(word) for word in SPECIAL_WORDS]
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    return sorted({*special, *frequent[: MAX_WORDS - len(special)]})


def format_summary(report: dict[str, Any], out: Path) -> str:
    """Format the report of an export for the terminal."""
    sizes = {name: report["bytes"][name] / 1e6 for name in (*DEVICE_FOLDERS.values(), "cloud")}
    lines = [f"{out}: {report['name']}"]
    for name, size in sizes.items():
        test = report.get("test", {}).get(name)
        accuracy = (
            f"  accuracy {test['accuracy']:.1%}, same answer as the run for {test['agreement']:.1%} of the questions"
            if test
            else ""
        )
        if test and test["wasm"]:
            wasm = test["wasm"]
            accuracy += f"; in a browser for {wasm['equal_answers']} of {wasm['questions']}"
        lines.append(f"  {name + '/':12} {size:8.2f} MB{accuracy}")
    if "test" in report:
        test = report["test"]
        lines.append(f"  the run: accuracy {test['run']['accuracy']:.1%} on {test['questions']} test questions")
        if not test[DEVICE_FOLDERS["float32"]]["wasm"]:
            lines.append("  not tried as a browser runs it: that needs Node.js and make web")
    kept = report["words"]
    unknown = f"; {report['test']['unknown_words']:.2%} of the test words are unknown" if "test" in report else ""
    lines.append(f"  words: {kept['kept']:,} of {kept['vocabulary']:,} kept{unknown}")
    lines.append(f"  float32 bundle against torch: largest difference {report['largest_difference']:.1e}")
    kind = report["layout"]["kind"]
    lines.append(f"  a layer: {report['bytes']['up']} bytes up, {report['bytes']['down'][kind]:,} down ({kind})")
    return "\n".join(lines)
