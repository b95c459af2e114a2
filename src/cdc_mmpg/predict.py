"""Answer a question about a video file with a trained run, device and cloud played in one process."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.cli import exit_code, log_to_terminal
from cdc_mmpg.errors import CheckpointError, ConfigError, DataError
from cdc_mmpg.results import read_results


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the best answers with their probabilities; returns the exit code (see `errors`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--video", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--vocab", help="vocab.txt, where it is not where training found it")
    options = parser.parse_args(arguments)
    log_to_terminal()

    def run() -> None:
        answers = predict(options.run, options.video, options.question, options.vocab)
        print(options.question)
        for word, probability in answers:
            print(f"  {probability:6.1%}  {word}")

    return exit_code(run)


def predict(run: Path, video: Path, question: str, vocab: str | None = None, most: int = 5) -> list[tuple[str, float]]:
    """The `most` best answers to a question about a clip, with their probabilities.

    The last layer is made explicitly, as the cloud sends it, and then installed.

    Raises:
        ConfigError: an empty question, or a run that answers none.
        CheckpointError: the run is not finished, or damaged.
        DataError: the clip is absent or cannot be decoded.
    """
    from cdc_mmpg.frames import candidate_indices, crop, middle_candidates  # noqa: PLC0415  see `cli`
    from cdc_mmpg.video import read_frames  # noqa: PLC0415

    if not question.strip():
        raise ConfigError("the question is empty: ask one (QUESTION=)")
    if not video.is_file():
        raise DataError(f"{video}: no such clip (VIDEO=)")
    results = read_results(run)
    if results is None:
        raise CheckpointError(f"{run}: not a finished run; train it first (make train METHOD={run.parent.name})")
    if "test/accuracy" not in results["metrics"]:
        raise ConfigError(
            f"{run}: {run.parent.name} answers no questions; take a run that does, such as METHOD=cdc_mmpg"
        )

    import torch  # noqa: PLC0415
    import torch.nn.functional as F  # noqa: PLC0415
    import yaml  # noqa: PLC0415

    from cdc_mmpg.batch import UNKNOWN_ANSWER, VideoTextBatch  # noqa: PLC0415
    from cdc_mmpg.experiment import ANSWERS, CONFIG, Experiment  # noqa: PLC0415
    from cdc_mmpg.text import TextEncoder  # noqa: PLC0415
    from cdc_mmpg.weights import load_checkpoint  # noqa: PLC0415

    settings = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    arguments = settings["model"]["init_args"]
    arguments["encoder"]["checkpoint"] = None  # all weights are in best.ckpt
    if "adr" in arguments:
        arguments["adr"] = str(run / "adr.safetensors")
    if vocab:
        settings["data"]["init_args"]["vocab"] = vocab
    settings["trainer"] |= {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "strategy": "auto"}
    experiment = Experiment(settings, run=False)
    model, data = experiment.model, experiment.settings["data"]["init_args"]
    model.load_state_dict(load_checkpoint(run / "best.ckpt")["state_dict"])
    model.eval()
    num_frames, size = data["num_frames"], data["image_size"]
    candidates = read_frames(video, lambda count: candidate_indices(count, num_frames), size, data["decoder"],
                             data["resize"])  # fmt: skip
    frames = torch.from_numpy(crop(candidates[middle_candidates(num_frames)], size).copy())[None]
    ids = torch.tensor(TextEncoder(data["vocab"], data["text_length"])([question]))
    batch = VideoTextBatch(frames, ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long), torch.zeros(1))
    words = [*(run / ANSWERS).read_text(encoding="utf-8").split("\n"), UNKNOWN_ANSWER]
    with torch.no_grad():
        features = model.encode(batch)  # on the device, which uploads one row of it
        weight, bias = model.device_layers(features)  # in the cloud, which sends these
        fused = model.fused(features)
        scores = model.head(fused, lambda hidden: F.linear(hidden, weight[0], bias[0]))
    best = scores.softmax(-1)[0].topk(min(most, len(words)))
    return [(words[label], value) for value, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


if __name__ == "__main__":
    sys.exit(main())
