"""Heads: what stands on a device after the encoder, for each task, and what a prediction there costs and counts."""

from abc import abstractmethod
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.data.batch import UNKNOWN_LABEL, FeatureBatch, Task, VideoTextBatch, normalise
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evaluation.metrics import CAPTIONS, Outcomes, recalls
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import StaticLayer
from cdc_mmpg.models.processes import count_processes, gather_rows

KeptRows = tuple[Tensor, Tensor]  # which sample each is about (R,), and what it says (R, X)


class LastLayer(Protocol):
    """Scores from hidden units: a static layer, or generated ones."""

    def __call__(self, hidden: Tensor) -> Tensor: ...


class Head(nn.Module):
    """A task: what the encoder reads, what the device computes between it and the last layer, loss and metrics.

    Attributes:
        inputs: D, values that the last layer reads.
        outputs: L, values that it gives.
        layers: how many last layers a sample has.
        adds_up: whether the loss of a batch is the mean over its samples with a known answer, whatever they are beside.
    """

    task: ClassVar[Task]
    monitor: ClassVar[str] = "val/accuracy"  # the best epoch is where this is highest
    adds_up: ClassVar[bool] = True
    pooled: ClassVar[bool] = True  # whether it reads m̄, or the mean [CLS] itself
    inputs: int
    outputs: int
    layers: int = 1

    def encode(self, encoder: AllInOne, batch: VideoTextBatch) -> FeatureBatch:
        """Encode a batch: every clip fused with its text, or with each of its texts."""
        ids, mask = batch.text_ids.flatten(0, -2), batch.text_mask.flatten(0, -2)
        features = encoder(normalise(batch.frames), ids, mask).frame_features
        shape = batch.text_ids.shape[:-1]
        return FeatureBatch(features.unflatten(0, shape), batch.labels, batch.indices)

    def condition(self, frame_features: Tensor) -> Tensor:
        """Return what an adaptation of clips (B, ..., T, 192) starts from: (B, ..., T, 192), 1 where shared."""
        return frame_features

    @abstractmethod
    def forward(self, hidden: Tensor, last_layer: LastLayer) -> Tensor:
        """Return the task's outputs for what it reads (B, ..., 192)."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the loss of a batch, a scalar."""

    def compare(self, outputs: Tensor, rounded: Tensor) -> dict[str, Tensor]:
        """Return what rounding a last layer does to outputs (B, ...), scalars by name: the mean absolute difference."""
        return {"error": (rounded - outputs).abs().mean()}

    @abstractmethod
    def outcomes(self, cases: dict[str, Tensor], batch: FeatureBatch) -> dict[str, KeptRows]:
        """Return what has to be kept of an evaluated batch, given its outputs by case."""

    @abstractmethod
    def predictions(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the rows of a case, of what is kept: (B, X)."""

    @abstractmethod
    def evaluate(self, outcomes: Outcomes) -> dict[str, float]:
        """Return metrics of a whole split, its rows in the samples' order, of the first case."""


class Choosing(Head):
    """A task with one score for everything that can be answered: the highest is the answer."""

    def loss(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the mean cross-entropy over the samples whose answer is known, 0 where none is."""
        total = F.cross_entropy(outputs.float(), batch.labels, ignore_index=UNKNOWN_LABEL, reduction="sum")
        return total / (batch.labels != UNKNOWN_LABEL).sum().clamp(min=1)

    def compare(self, outputs: Tensor, rounded: Tensor) -> dict[str, Tensor]:
        """See `Head`; also the share of samples with the same answer."""
        return {
            "agreement": (rounded.argmax(-1) == outputs.argmax(-1)).float().mean(),
            **super().compare(outputs, rounded),
        }

    def outcomes(self, cases: dict[str, Tensor], batch: FeatureBatch) -> dict[str, KeptRows]:
        """Return `predictions` of every case."""
        return {case: (batch.indices, self.predictions(scores, batch)) for case, scores in cases.items()}

    def predictions(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the answer, the right one and the answer's probability: (B, 3); float32 holds all labels exactly."""
        probabilities, answers = outputs.float().softmax(-1).max(-1)
        return torch.stack([answers.float(), batch.labels.float(), probabilities], dim=-1)

    def evaluate(self, outcomes: Outcomes) -> dict[str, float]:
        """Return the accuracy over all samples; an unknown answer is never right."""
        predicted, labels, _ = next(iter(outcomes.values()))[1].T
        return {"accuracy": float(np.mean(predicted == labels))}


class OpenEnded(Choosing):
    """Open-ended question answering: one class per known answer, and one for the rest.

    Source: eq. 7, scores = W φ(m̄) + b with φ = GELU∘LayerNorm∘Linear(192, hidden). φ is static, trains in all four
    methods and has no dropout; W and b come from the method.

    Args:
        num_classes: the known answers, plus one class for all others.
        hidden: D, width of φ.
    """

    task: ClassVar[Task] = "open_ended"

    def __init__(self, num_classes: int, hidden: int = 96) -> None:
        super().__init__()
        if min(num_classes, hidden) < 1:
            raise ConfigError(f"num_classes {num_classes} and hidden {hidden} are at least 1")
        self.inputs, self.outputs = hidden, num_classes
        self.phi = nn.Sequential(nn.Linear(FEATURE_DIM, hidden), nn.LayerNorm(hidden), nn.GELU())

    def forward(self, hidden: Tensor, last_layer: LastLayer) -> Tensor:
        """Return scores (B, L) of fused features m̄ (B, 192)."""
        return last_layer(self.phi(hidden))


class MultipleChoice(Choosing):
    """Multiple choice: a candidate's score is w · m̄ + b, m̄ of the clip fused with question and candidate.

    Source: section 4.2 and the counts of table 5: one Linear(192, 1) reads m̄ itself. The candidates of a sample share
    it, generated from the mean of their features, so that one upload and one layer serve them all.

    Deviation: no hidden layer of 96, which the text states for multiple choice, too: its counts (F-hyper 37.2K) leave
    room for Linear(192, 1) only. Nor does the paper say how one layer serves five candidates.

    Args:
        candidates: of every sample, where each has a layer; one layer serves any number.
        per_candidate: generate a layer for every candidate from its own feature: as many uploads and layers.
    """

    task: ClassVar[Task] = "multiple_choice"

    def __init__(self, candidates: int = 5, per_candidate: bool = False) -> None:
        super().__init__()
        if candidates < 1:
            raise ConfigError(f"candidates {candidates}: at least 1")
        self.inputs, self.outputs = FEATURE_DIM, 1
        self.layers = candidates if per_candidate else 1
        self.per_candidate = per_candidate

    def encode(self, encoder: AllInOne, batch: VideoTextBatch) -> FeatureBatch:
        """See `Head`.

        Raises:
            ConfigError: another number of candidates than there are layers for.
        """
        if self.per_candidate and batch.text_ids.shape[1] != self.layers:
            raise ConfigError(
                f"{batch.text_ids.shape[1]} candidates, where this head has {self.layers} layers: it takes as many as "
                f"--model.init_args.head.init_args.candidates={batch.text_ids.shape[1]} says in training"
            )
        return super().encode(encoder, batch)

    def condition(self, frame_features: Tensor) -> Tensor:
        """Return (B, K, T, 192) as it is, or the mean over the candidates (B, 1, T, 192)."""
        return frame_features if self.per_candidate else frame_features.mean(1, keepdim=True)

    def forward(self, hidden: Tensor, last_layer: LastLayer) -> Tensor:
        """Return scores (B, K) of fused features m̄ (B, K, 192)."""
        return last_layer(hidden).squeeze(-1)


class Retrieval(Head):
    """Video-text retrieval: clips and captions by themselves, each projected linearly; the cosine is the score.

    Source: section 4.2 and the reference's contrastive recipe. The clip's projection is the last layer, static or
    generated from that clip alone, so that clips can be stored before anyone asks; the text's is always static.
    Training contrasts the clips and captions of a step, of all processes together, in both directions; the loss of an
    evaluation is that over its whole split, each clip with its first caption.

    Deviation: the paper does not say which layer is generated for retrieval; "256" is the only size that it prints.

    Args:
        hidden: L, width of the common space.
        temperature: of the contrastive loss.
    """

    task: ClassVar[Task] = "retrieval"
    monitor: ClassVar[str] = "val/recall"
    adds_up: ClassVar[bool] = False
    pooled: ClassVar[bool] = False  # as the reference: token 0 after the final norm

    def __init__(self, hidden: int = 256, temperature: float = 0.05) -> None:
        super().__init__()
        if hidden < 1 or not 0 < temperature < float("inf"):
            raise ConfigError(f"hidden {hidden} is at least 1 and temperature {temperature} positive and finite")
        self.inputs, self.outputs, self.temperature = FEATURE_DIM, hidden, temperature
        self.text_projection = StaticLayer(FEATURE_DIM, hidden)

    def encode(self, encoder: AllInOne, batch: VideoTextBatch) -> FeatureBatch:
        """Encode clips and captions apart from each other."""
        there = batch.text_mask.any(-1)  # (B, K)
        if there.shape[1] == 1:  # in training: every clip has one, and nothing has to be picked out
            texts = encoder.encode_text(batch.text_ids[:, 0], batch.text_mask[:, 0])[:, None]
        else:
            encoded = encoder.encode_text(batch.text_ids[there], batch.text_mask[there])
            texts = encoded.new_zeros(*there.shape, FEATURE_DIM)
            texts[there] = encoded
        return FeatureBatch(
            encoder.encode_video(normalise(batch.frames)), batch.labels, batch.indices, texts, there
        )  # fmt: skip

    def forward(self, hidden: Tensor, last_layer: LastLayer) -> Tensor:
        """Return embeddings (B, L) of clips with mean [CLS] (B, 192), of length one."""
        return F.normalize(last_layer(hidden), dim=-1)

    def captions(self, texts: Tensor) -> Tensor:
        """Return embeddings (..., L) of captions (..., 192), of length one."""
        return F.normalize(self.text_projection(texts), dim=-1)

    def loss(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the mean of the cross-entropies in both directions, every clip with its first caption.

        Every process computes the loss over all processes' embeddings, with the gradient of its own: multiplied by
        their number, DDP's mean over processes is the gradient of one process with the whole step. A clip that comes
        again (see `EpochBatches`) is left out.
        """
        assert batch.texts is not None
        videos, texts, clips = outputs, self.captions(batch.texts[:, 0]), batch.indices
        world = count_processes() if self.training else 1
        if world > 1:
            videos, texts, clips = (gather_rows(part) for part in (videos, texts, clips))
        with torch.autocast(videos.device.type, enabled=False):  # cosines near each other differ in later digits
            scores = videos.float() @ texts.float().T / self.temperature
        loss = contrast(scores, clips)
        return loss + (world - 1) * (loss - loss.detach())

    def outcomes(self, cases: dict[str, Tensor], batch: FeatureBatch) -> dict[str, KeptRows]:
        """Return the embeddings of clips, by case, and of captions."""
        assert batch.texts is not None
        assert batch.there is not None
        own = batch.indices[:, None].expand_as(batch.there)[batch.there]
        return {case: (batch.indices, self.predictions(videos, batch)) for case, videos in cases.items()} | {
            CAPTIONS: (own, self.captions(batch.texts[batch.there]))
        }

    def predictions(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the embeddings."""
        return outputs

    def evaluate(self, outcomes: Outcomes) -> dict[str, float]:
        """Return `metrics.recalls`, and the loss over the whole split."""
        (clips, videos), (owners, texts) = next(iter(outcomes.values())), outcomes[CAPTIONS]
        _, first = np.unique(owners, return_index=True)
        scores = torch.from_numpy(videos @ texts[first].T) / self.temperature
        return {"loss": float(contrast(scores, torch.from_numpy(clips))), **recalls(outcomes)}


def contrast(scores: Tensor, clips: Tensor) -> Tensor:
    """Return the mean cross-entropy in both directions of scores (N, N) of clips and their captions, a scalar.

    Args:
        scores: row i and column i belong together.
        clips: (N,) which clip each is; one that comes again counts once.
    """
    places = torch.arange(len(clips), device=clips.device)
    again = ((clips[:, None] == clips) & (places[:, None] > places)).any(1)  # (N,)
    scores = scores.masked_fill(again[:, None] ^ again, float("-inf"))
    places = places.masked_fill(again, UNKNOWN_LABEL)
    rows, columns = (F.cross_entropy(part, places, ignore_index=UNKNOWN_LABEL) for part in (scores, scores.T))
    return (rows + columns) / 2
