"""A finished run in Python: its results, its answers to questions about any clip, and the layers of its sessions.

Torch, Lightning and pandas are imported late: results and configuration are read without them.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.evaluation.answers import MARKS_COLUMN, read_answers
from cdc_mmpg.files import expand_home
from cdc_mmpg.launchers import check_environment
from cdc_mmpg.media.frames import Frames, choose_candidates, choose_middle_candidates, crop
from cdc_mmpg.media.text import TextEncoder, pad
from cdc_mmpg.media.video import read_frames
from cdc_mmpg.results import PREDICTIONS, RESULTS, read_settings
from cdc_mmpg.training.reopen import load_finished_results, reopen

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

    from cdc_mmpg.data.batch import FeatureBatch
    from cdc_mmpg.methods.answering import Answering
    from cdc_mmpg.methods.base import Method
    from cdc_mmpg.methods.cdc_mmpg_session import Session
    from cdc_mmpg.training.experiment import Experiment

Clip = str | PathLike[str]  # path of a clip


class ScoredAnswer(NamedTuple):
    """An answer, or a text to choose from, with its score."""

    text: str
    score: float  # probability; in retrieval the cosine of clip and caption


class FinishedRun:
    """A finished run: the content of its folder, and its device and cloud in one process on the CPU.

    Work in the checkout of the project: the run's dataset is imported from the working folder, and relative paths of
    the configuration, such as that of the vocabulary, start there.

    Attributes:
        folder: folder of the run.
        results: content of results.json; `results["accuracy"][case][group][type]` has "value", "low" and "high".

    Args:
        folder: folder of the run.
        vocab: path of `vocab.txt`, if it has moved since training.

    Raises:
        CheckpointError: the run is not finished, or damaged; names the finished runs of the dataset.
    """

    def __init__(self, folder: str | PathLike[str], vocab: str | PathLike[str] | None = None) -> None:
        self.folder = Path(expand_home(os.fspath(folder)))
        self._vocab = None if vocab is None else expand_home(os.fspath(vocab))
        self.results: dict[str, Any] = load_finished_results(self.folder)

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """Content of config.yaml; a ConfigError names a damaged file."""
        return read_settings(self.folder)

    @cached_property
    def model(self) -> "Method":
        """LightningModule with the weights of the best epoch, in evaluation mode; see `reopen` for the exceptions."""
        method: Method = self._experiment.model
        return method.eval()

    @cached_property
    def words(self) -> list[str]:
        """Word of each answer of an open-ended run, in the order of a layer's rows; empty for other tasks."""
        from cdc_mmpg.data.batch import UNKNOWN_ANSWER  # noqa: PLC0415  see the module
        from cdc_mmpg.training.experiment import ANSWERS_FILE  # noqa: PLC0415

        if self.results["task"] != "open_ended":
            return []
        return [*(self.folder / ANSWERS_FILE).read_text(encoding="utf-8").split("\n"), UNKNOWN_ANSWER]

    @cached_property
    def _experiment(self) -> "Experiment":
        """Experiment of the run, reopened without its data; the state of the random numbers is left as it was."""
        check_environment()
        from lightning.pytorch.utilities.seed import isolate_rng  # noqa: PLC0415  see the module

        with isolate_rng(), _quiet_lightning():  # Lightning's command line seeds them, and says so
            return reopen(self.folder, self._vocab, reads_data=False)

    @cached_property
    def _data_settings(self) -> dict[str, Any]:
        """Arguments of the run's dataset."""
        settings: dict[str, Any] = self._experiment.settings["data"]["init_args"]
        return settings

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        """Tokenizer of the run's texts."""
        return TextEncoder(self._data_settings["vocab"], self._data_settings["text_length"])

    def answer(
        self, video: Clip, question: str = "", choices: Sequence[str] = (), session: Sequence[Clip] = ()
    ) -> list[ScoredAnswer]:
        """Answer a question about a clip, or rank choices: all answers with their scores, the best first.

        Args:
            video: path of the clip.
            question: the question; may be empty with choices.
            choices: candidates of a multiple choice, or for a retrieval run captions; empty for open-ended questions.
            session: paths of unlabelled clips of the same camera, to which a session method adapts; without them it
                answers as a device without an upload.

        Raises:
            DataError: a clip is missing or cannot be decoded.
            ConfigError: question or choices do not fit the run's task, the run answers no questions, or there is a
                session, but the method takes none.
        """
        for clip, variable in ((video, "VIDEO"), *((clip, "SESSION") for clip in session)):
            _check_clip(Path(clip), variable)
        task = self._check_question(question, choices)
        method = self._answering
        head: Any = method.head  # of the task

        import torch  # noqa: PLC0415  see the module

        from cdc_mmpg.methods.cdc_mmpg_session import Session  # noqa: PLC0415

        if task == "multiple_choice":
            texts = self._text_encoder.encode_choices([(question, choices)])[0]
        else:
            texts = self._text_encoder(choices or [question])
        frames = self._read_frames(video)
        anchors = self.anchors(session) if session else torch.zeros(0, FEATURE_DIM)
        with torch.no_grad():
            encoded = self._encode(frames, texts)
            if isinstance(method, Session):
                upload = anchors if method.reads_sets else anchors.sum(0) / max(1, len(anchors))
                outputs = method.answer(encoded.frame_features, upload[None], torch.tensor([len(anchors)]))
            else:
                weight, bias = method.device_layers(encoded.frame_features)  # as the cloud sends them
                outputs = head(
                    method.fuse(encoded.frame_features),
                    lambda hidden: (weight @ hidden.unsqueeze(-1)).squeeze(-1) + bias,
                )
            if task == "retrieval":
                scores = (head.embed_captions(encoded.texts) @ outputs.unsqueeze(-1)).squeeze(-1)
            else:
                scores = outputs.softmax(-1)
        values, labels = (part.tolist() for part in scores[0].sort(descending=True, stable=True))
        words = self.words or choices
        return [ScoredAnswer(words[label], value) for label, value in zip(labels, values, strict=True)]

    def anchors(self, clips: Sequence[Clip]) -> "Tensor":
        """Return what a device stores of each clip of a session, (n, 192): the reading, or feature, of one frame.

        Raises:
            DataError: a clip is missing or cannot be decoded.
            ConfigError: the method takes no session.
        """
        import torch  # noqa: PLC0415  see the module

        method, prompt = self._session_method, [self._text_encoder.neutral()]
        rows = [torch.zeros(0, FEATURE_DIM)]
        for clip in clips:
            frames = self._read_frames(clip)
            middle = len(frames) // 2
            with torch.no_grad():
                encoded = self._encode(frames[middle : middle + 1], prompt)
                rows.append(method.upload(encoded.frame_features.flatten(1, -2)[:, :1]))
        return torch.cat(rows)

    def layer(self, anchors: "Tensor") -> "tuple[Tensor, Tensor]":
        """Return the last layer that a device installs for a session: weight (L, D), bias (L); row l is of `words[l]`.

        The layer is rounded as the cloud sends it, so that `answer` with the same clips applies this layer.

        Args:
            anchors: (n, 192) anchors of the session's clips, see `anchors`, of which the device uploads the mean; with
                n = 0 the layer is the one that all devices share.

        Raises:
            ConfigError: the method generates no layer from a session.
            DataError: the anchors have another shape.
        """
        if anchors.ndim != 2 or anchors.shape[1] != FEATURE_DIM:
            raise DataError(
                f"anchors of shape {tuple(anchors.shape)}: must be (n, {FEATURE_DIM}), as `anchors(clips)` returns them"
            )
        weight, bias = self._session_method.session_layer(anchors)
        return weight.detach().clone(), bias.detach().clone()

    def predictions(self) -> "pandas.DataFrame":
        """Return the answers of the test, one row a question.

        Columns: clip, device, group (of devices: "seen" or "unseen"), type (of the question), question and answer
        (the right one), all text; then for every case its answer, named as the case in `results["accuracy"]`, and in
        `<case>_right` whether it is right (boolean; missing, with an empty answer, where the case was not asked). For
        retrieval: direction ("VR" or "TR"), clip, caption, then for every case the rank of the right text or clip.

        Raises:
            ConfigError: the run answers no questions, or pandas is not installed.
            DataError: the file of the answers is missing or damaged.
        """
        self._check_answers()
        try:
            import pandas  # noqa: PLC0415  optional
        except ModuleNotFoundError as error:
            raise ConfigError("a frame of the predictions needs pandas: install it (pip install pandas)") from error
        path = self.folder / PREDICTIONS
        try:
            table = read_answers(path)
            if not table.right and self.results["task"] != "retrieval":
                raise ValueError(f"no column {MARKS_COLUMN!r}")
            if list(table.given) != (cases := list(self.results["accuracy"])):
                raise ValueError(f"its cases are {', '.join(table.given)}, those of {RESULTS} {', '.join(cases)}")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}): restore it, or delete {self.folder} and train anew"
            ) from error
        columns: dict[str, Any] = dict(table.asked)
        for case, given in table.given.items():
            columns[case] = given
            if table.right:
                columns[f"{case}_right"] = pandas.array(table.right[case], "boolean")
        return pandas.DataFrame(columns)

    @property
    def _answering(self) -> "Answering":
        """Model of a run that answers questions."""
        self._check_answers()
        method: Any = self.model
        return method

    @property
    def _session_method(self) -> "Session":
        """Model of a run with sessions; a ConfigError if its method takes none."""
        from cdc_mmpg.methods.cdc_mmpg_session import Session  # noqa: PLC0415  see the module

        method = self._answering
        if not isinstance(method, Session):
            raise ConfigError(
                f"{self.folder}: {self.results['method']} takes no session: leave it out (SESSION=), or use a run of a "
                "session method, such as METHOD=cdc_mmpg_session"
            )
        if method.oracle:
            raise ConfigError(
                f"{self.folder}: {self.results['method']} reads the camera's true cast, not clips of a session: use "
                "METHOD=cdc_mmpg_session"
            )
        return method

    def _check_answers(self) -> None:
        """Refuse a run that answers no questions."""
        if "accuracy" not in self.results:
            raise ConfigError(
                f"{self.folder}: {self.folder.absolute().parent.name} answers no questions; use a run that does, such "
                "as METHOD=cdc_mmpg"
            )

    def _check_question(self, question: str, choices: Sequence[str]) -> str:
        """Check that question and choices fit the run; return the run's task."""
        self._check_answers()
        task, run = str(self.results["task"]), self.folder
        if task == "open_ended" and choices:
            raise ConfigError(
                f"{run} answers open-ended questions: ask one (QUESTION=), and give no choices (CHOICES=)"
            )
        if task == "open_ended" and not question.strip():
            raise ConfigError("the question is empty: ask one (QUESTION=)")
        if task != "open_ended" and len(choices) < 2:
            raise ConfigError(f"{run} is for {task}: give the texts to choose from (CHOICES='one | another | ...')")
        return task

    def _read_frames(self, video: Clip) -> Frames:
        """Decode the frames of a clip that evaluation uses, (T, S, S, 3)."""
        data = self._data_settings
        kept, size = (data["num_frames"], data["candidates"]), data["image_size"]
        candidates = read_frames(
            Path(video), lambda count: choose_candidates(count, *kept), size, data["decoder"], data["resize"]
        )
        return crop(candidates[choose_middle_candidates(*kept)], size).copy()

    def _encode(self, frames: Frames, texts: Sequence[Sequence[int]]) -> "FeatureBatch":
        """Encode a clip (T, S, S, 3) with a text, or with several texts to choose from."""
        import torch  # noqa: PLC0415  see the module

        from cdc_mmpg.data.batch import VideoTextBatch  # noqa: PLC0415

        shape = (1, -1) if self.results["task"] == "open_ended" else (1, len(texts), -1)
        ids, mask = (torch.from_numpy(array).view(shape) for array in pad(texts))
        none = torch.zeros(1, dtype=torch.long)  # a question without label and index
        batch: FeatureBatch = self.model.encode(VideoTextBatch(torch.from_numpy(frames)[None], ids, mask, none, none))
        return batch


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Leave out Lightning's messages below warnings during a block."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_clip(video: Path, variable: str) -> None:
    """Refuse a clip that is no file; the error names the variable of `make predict`."""
    if not video.is_file():
        problem = "a folder, not a clip" if video.is_dir() else "no such clip"
        raise DataError(f"{video}: {problem} ({variable}=)" if video.name else f"no clip: name one ({variable}=)")
