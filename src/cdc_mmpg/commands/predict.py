"""Answer to a question about a video file, or a ranking of texts, by a trained run: device and cloud in one process."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.files import expand_home
from cdc_mmpg.launchers import check_environment
from cdc_mmpg.media.frames import choose_candidates, choose_middle_candidates, crop
from cdc_mmpg.media.text import TextEncoder, pad
from cdc_mmpg.media.video import read_frames
from cdc_mmpg.program import log_to_terminal, run_to_exit_code
from cdc_mmpg.training.reopen import load_finished_results, reopen


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the best answers with their probabilities; return the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--video", required=True, help="path of the clip")
    parser.add_argument("--question", default="", help="question; may be empty with --choices")
    parser.add_argument("--choices", default="", help="candidates or captions, separated by |")
    parser.add_argument("--vocab", help="path of vocab.txt, if it has moved since training")
    options = parser.parse_args(arguments)
    log_to_terminal()

    def run() -> None:
        choices = [choice.strip() for choice in options.choices.split("|") if choice.strip()]
        run, video, vocab = (name and expand_home(name) for name in (options.run, options.video, options.vocab))
        task, answers = predict(Path(run), Path(video), options.question, choices, vocab)
        print(options.question or options.video)
        for word, score in answers:
            print(f"  {score:6.3f}  {word}" if task == "retrieval" else f"  {score:6.1%}  {word}")

    return run_to_exit_code(run)


def predict(
    run: Path,
    video: Path,
    question: str = "",
    choices: Sequence[str] = (),
    vocab: str | None = None,
    most: int = 5,
) -> tuple[str, list[tuple[str, float]]]:
    """Return the run's task, and the `most` best answers (or choices) for a clip with their probabilities.

    For a retrieval run the choices are captions, scored by their cosine to the clip. The last layer is computed
    explicitly, as the cloud sends it, and then installed.

    Raises:
        ConfigError: the question or the choices are missing, or the run answers no questions.
        CheckpointError: the run is not finished, or damaged.
        DataError: the clip is missing or cannot be decoded.
    """
    task = _check_task(run, video, question, choices)

    check_environment()
    import torch  # noqa: PLC0415

    from cdc_mmpg.data.batch import UNKNOWN_ANSWER, VideoTextBatch  # noqa: PLC0415
    from cdc_mmpg.training.experiment import ANSWERS_FILE  # noqa: PLC0415

    experiment = reopen(run, vocab, reads_data=False)
    model, data = experiment.model, experiment.settings["data"]["init_args"]
    model.eval()
    kept, size = (data["num_frames"], data["candidates"]), data["image_size"]
    candidates = read_frames(video, lambda count: choose_candidates(count, *kept), size, data["decoder"],
                             data["resize"])  # fmt: skip
    frames = torch.from_numpy(crop(candidates[choose_middle_candidates(*kept)], size).copy())[None]
    text = TextEncoder(data["vocab"], data["text_length"])
    words = list(choices)
    if task == "open_ended":
        words = [*(run / ANSWERS_FILE).read_text(encoding="utf-8").split("\n"), UNKNOWN_ANSWER]
        texts = text([question])
    else:
        texts = text.encode_choices([(question, choices)])[0] if task == "multiple_choice" else text(choices)
    shape = (1, -1) if task == "open_ended" else (1, len(texts), -1)
    ids, mask = (torch.from_numpy(array).view(shape) for array in pad(texts))
    batch = VideoTextBatch(frames, ids, mask, torch.zeros(1, dtype=torch.long), torch.zeros(1))
    with torch.no_grad():
        encoded = model.encode(batch)
        features = encoded.frame_features  # on the device, which uploads one row
        weight, bias = model.device_layers(features)  # in the cloud, which sends these
        outputs = model.head(model.fuse(features), lambda hidden: (weight @ hidden.unsqueeze(-1)).squeeze(-1) + bias)
        if task == "retrieval":
            scores = (model.head.embed_captions(encoded.texts) @ outputs.unsqueeze(-1)).squeeze(-1)
        else:
            scores = outputs.softmax(-1)
    best = scores[0].topk(min(most, len(words)))
    answers = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return task, [(words[label], value) for value, label in answers]


def _check_task(run: Path, video: Path, question: str, choices: Sequence[str]) -> str:
    """Check that the run and its inputs fit together; return the run's task."""
    if not video.is_file():
        problem = "a folder, not a clip" if video.is_dir() else "no such clip"
        raise DataError(f"{video}: {problem} (VIDEO=)" if video.name else "no clip: name one (VIDEO=)")
    results = load_finished_results(run)
    if "accuracy" not in results:
        raise ConfigError(
            f"{run}: {run.parent.name} answers no questions; use a run that does, such as METHOD=cdc_mmpg"
        )
    task = str(results["task"])
    if task == "open_ended" and choices:
        raise ConfigError(f"{run} answers open-ended questions: ask one (QUESTION=), and give no choices (CHOICES=)")
    if task == "open_ended" and not question.strip():
        raise ConfigError("the question is empty: ask one (QUESTION=)")
    if task != "open_ended" and len(choices) < 2:
        raise ConfigError(f"{run} is for {task}: give the texts to choose from (CHOICES='one | another | ...')")
    return task
