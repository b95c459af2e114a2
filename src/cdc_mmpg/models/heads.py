"""Task heads: the layers on a device after the encoder, with the loss and metrics of each task."""

from abc import abstractmethod
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.data.batch import UNKNOWN_LABEL, FeatureBatch, Task, VideoTextBatch, normalise
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evaluation.metrics import CAPTIONS, Outcomes, compute_recalls
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import StaticLayer
from cdc_mmpg.models.processes import count_processes, gather_rows

KeptRows = tuple[Tensor, Tensor]  # sample indices (R,) and values (R, X)


class LastLayer(Protocol):
    """Map from hidden units to scores: a static layer or generated ones."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the scores of hidden units."""


class Head(nn.Module):
    """Base of the tasks: encoder inputs, computation between encoder and last layer, loss and metrics.

    Attributes:
        inputs: D, input size of the last layer.
        outputs: L, output size of the last layer.
        layers: number of last layers per sample.
        has_sample_loss: whether the batch loss is the mean of independent losses of the samples with a known answer.
    """

    task: ClassVar[Task]
    monitor: ClassVar[str] = "val/accuracy"  # metric that selects the best epoch: the highest value
    has_sample_loss: ClassVar[bool] = True
    pooled: ClassVar[bool] = True  # whether the head reads m̄ (after the pooler) or the mean [CLS]
    inputs: int
    outputs: int
    layers: int = 1

    def encode(self, encoder: AllInOne, batch: VideoTextBatch) -> FeatureBatch:
        """Encode a batch, each clip fused with its text or with each of its texts."""
        ids, mask = batch.text_ids.flatten(0, -2), batch.text_mask.flatten(0, -2)
        features = encoder(normalise(batch.frames), ids, mask).frame_features
        shape = batch.text_ids.shape[:-1]
        return FeatureBatch(features.unflatten(0, shape), batch.labels, batch.indices)

    def condition(self, frame_features: Tensor) -> Tensor:
        """Return the features that generate the layers (B, ..., T, 192); dimensions that share a layer have size 1."""
        return frame_features

    @abstractmethod
    def forward(self, hidden: Tensor, last_layer: LastLayer) -> Tensor:
        """Return the task's outputs for pooled features (B, ..., 192)."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the loss of a batch, a scalar."""

    def compare(self, outputs: Tensor, rounded: Tensor) -> dict[str, Tensor]:
        """Return the effect of rounding a last layer on outputs (B, ...), scalars by name: mean absolute difference."""
        return {"error": (rounded - outputs).abs().mean()}

    @abstractmethod
    def outcomes(self, cases: dict[str, Tensor], batch: FeatureBatch) -> dict[str, KeptRows]:
        """Return the rows to keep of an evaluated batch, given its outputs by case."""

    @abstractmethod
    def predictions(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the values to keep of one case: (B, X)."""

    @abstractmethod
    def evaluate(self, outcomes: Outcomes) -> dict[str, float]:
        """Return metrics of a complete split for the first case; rows are in the order of the samples."""


class ClassificationHead(Head):
    """Task with one score per possible answer; the highest score is the answer."""

    def loss(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the mean cross-entropy over the samples with a known answer, 0 if there is none."""
        total = F.cross_entropy(outputs.float(), batch.labels, ignore_index=UNKNOWN_LABEL, reduction="sum")
        return total / (batch.labels != UNKNOWN_LABEL).sum().clamp(min=1)

    def compare(self, outputs: Tensor, rounded: Tensor) -> dict[str, Tensor]:
        """See `Head`; add the share of samples whose answer is unchanged."""
        return {
            "agreement": (rounded.argmax(-1) == outputs.argmax(-1)).float().mean(),
            **super().compare(outputs, rounded),
        }

    def outcomes(self, cases: dict[str, Tensor], batch: FeatureBatch) -> dict[str, KeptRows]:
        """Return `predictions` for every case."""
        return {case: (batch.indices, self.predictions(scores, batch)) for case, scores in cases.items()}

    def predictions(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return predicted label, true label and the prediction's probability (B, 3); float32 holds labels exactly."""
        probabilities, answers = outputs.float().softmax(-1).max(-1)
        return torch.stack([answers.float(), batch.labels.float(), probabilities], dim=-1)

    def evaluate(self, outcomes: Outcomes) -> dict[str, float]:
        """Return the accuracy over all samples; unknown answers count as wrong."""
        predicted, labels, _ = next(iter(outcomes.values()))[1].T
        return {"accuracy": float(np.mean(predicted == labels))}


class OpenEnded(ClassificationHead):
    """Open-ended question answering: one class per known answer, and one for all others.

    Source: eq. 7, scores = W φ(m̄) + b with φ = GELU∘LayerNorm∘Linear(192, hidden). φ is static, trains in all four
    methods and has no dropout; W and b come from the method.

    Args:
        num_classes: number of known answers, plus one class for all others.
        hidden: D, width of φ.
    """

    task: ClassVar[Task] = "open_ended"

    def __init__(self, num_classes: int, hidden: int = 96) -> None:
        super().__init__()
        if min(num_classes, hidden) < 1:
            raise ConfigError(f"num_classes {num_classes} and hidden {hidden} must be at least 1")
        self.inputs, self.outputs = hidden, num_classes
        self.phi = nn.Sequential(nn.Linear(FEATURE_DIM, hidden), nn.LayerNorm(hidden), nn.GELU())

    def forward(self, hidden: Tensor, last_layer: LastLayer) -> Tensor:
        """Return scores (B, L) of fused features m̄ (B, 192)."""
        return last_layer(self.phi(hidden))


class MultipleChoice(ClassificationHead):
    """Multiple choice: a candidate's score is w · m̄ + b, m̄ of the clip fused with question and candidate.

    Source: section 4.2 and the counts of table 5: one Linear(192, 1) reads m̄ itself. The candidates of a sample share
    it, generated from the mean of their features, so that one upload and one layer serve them all.

    Deviation: no hidden layer of 96, which the text states for multiple choice, too: its counts (F-hyper 37.2K) leave
    room for Linear(192, 1) only. Nor does the paper say how one layer serves five candidates.

    Args:
        candidates: number of candidates of every sample; only read if `per_candidate`, one layer serves any number.
        per_candidate: generate one layer per candidate, each from an upload for that candidate.
    """

    task: ClassVar[Task] = "multiple_choice"

    def __init__(self, candidates: int = 5, per_candidate: bool = False) -> None:
        super().__init__()
        if candidates < 1:
            raise ConfigError(f"candidates {candidates} must be at least 1")
        self.inputs, self.outputs = FEATURE_DIM, 1
        self.layers = candidates if per_candidate else 1
        self.per_candidate = per_candidate

    def encode(self, encoder: AllInOne, batch: VideoTextBatch) -> FeatureBatch:
        """See `Head`.

        Raises:
            ConfigError: the number of candidates differs from the number of layers.
        """
        if self.per_candidate and batch.text_ids.shape[1] != self.layers:
            raise ConfigError(
                f"{batch.text_ids.shape[1]} candidates, but this head has {self.layers} layers: train with "
                f"--model.init_args.head.init_args.candidates={batch.text_ids.shape[1]}"
            )
        return super().encode(encoder, batch)

    def condition(self, frame_features: Tensor) -> Tensor:
        """Return the features (B, K, T, 192), or their mean over the candidates (B, 1, T, 192)."""
        return frame_features if self.per_candidate else frame_features.mean(1, keepdim=True)

    def forward(self, hidden: Tensor, last_layer: LastLayer) -> Tensor:
        """Return scores (B, K) of fused features m̄ (B, K, 192)."""
        return last_layer(hidden).squeeze(-1)


class Retrieval(Head):
    """Video-text retrieval: clips and captions are encoded and projected separately; their cosine is the score.

    Source: section 4.2 and the reference's contrastive recipe. The clip's projection is the last layer, static or
    generated from that clip alone, so that embeddings of clips can be stored in advance; the text's is always static.
    Training contrasts the clips and captions of a step, gathered from all processes, in both directions; in evaluation
    the loss is over the complete split, each clip with its first caption.

    Deviation: the paper does not say which layer is generated for retrieval; "256" is the only size that it prints.

    Args:
        hidden: L, dimension of the joint embedding space.
        temperature: divisor of the cosines in the contrastive loss.
    """

    task: ClassVar[Task] = "retrieval"
    monitor: ClassVar[str] = "val/recall"
    has_sample_loss: ClassVar[bool] = False
    pooled: ClassVar[bool] = False  # as in the reference: token 0 after the final norm

    def __init__(self, hidden: int = 256, temperature: float = 0.05) -> None:
        super().__init__()
        if hidden < 1 or not 0 < temperature < float("inf"):
            raise ConfigError(f"hidden {hidden} must be at least 1, temperature {temperature} positive and finite")
        self.inputs, self.outputs, self.temperature = FEATURE_DIM, hidden, temperature
        self.text_projection = StaticLayer(FEATURE_DIM, hidden)

    def encode(self, encoder: AllInOne, batch: VideoTextBatch) -> FeatureBatch:
        """Encode clips and captions separately."""
        present = batch.text_mask.any(-1)  # (B, K)
        if present.shape[1] == 1:  # training: one caption per clip, no padding to skip
            texts = encoder.encode_text(batch.text_ids[:, 0], batch.text_mask[:, 0])[:, None]
        else:
            encoded = encoder.encode_text(batch.text_ids[present], batch.text_mask[present])
            texts = encoded.new_zeros(*present.shape, FEATURE_DIM)
            texts[present] = encoded
        return FeatureBatch(
            encoder.encode_video(normalise(batch.frames)), batch.labels, batch.indices, texts, present
        )  # fmt: skip

    def forward(self, hidden: Tensor, last_layer: LastLayer) -> Tensor:
        """Return unit-length embeddings (B, L) of clips with mean [CLS] (B, 192)."""
        return F.normalize(last_layer(hidden), dim=-1)

    def embed_captions(self, texts: Tensor) -> Tensor:
        """Return unit-length embeddings (..., L) of captions with [CLS] (..., 192)."""
        return F.normalize(self.text_projection(texts), dim=-1)

    def loss(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the mean of the cross-entropies in both directions, each clip with its first caption.

        Every process computes the loss over the embeddings of all processes, with gradients for its own embeddings
        only. The gradient is multiplied by the number of processes, so that DDP's mean equals the gradient of a single
        process with the complete step. Repeated clips (see `EpochBatches`) are left out.
        """
        assert batch.texts is not None
        videos, texts, clips = outputs, self.embed_captions(batch.texts[:, 0]), batch.indices
        world = count_processes() if self.training else 1
        if world > 1:
            videos, texts, clips = (gather_rows(part) for part in (videos, texts, clips))
        with torch.autocast(videos.device.type, enabled=False):  # close cosines need float32 to be told apart
            scores = videos.float() @ texts.float().T / self.temperature
        loss = compute_contrastive_loss(scores, clips)
        return loss + (world - 1) * (loss - loss.detach())

    def outcomes(self, cases: dict[str, Tensor], batch: FeatureBatch) -> dict[str, KeptRows]:
        """Return the embeddings of the clips by case, and those of the captions."""
        assert batch.texts is not None
        assert batch.there is not None
        owners = batch.indices[:, None].expand_as(batch.there)[batch.there]
        return {case: (batch.indices, self.predictions(videos, batch)) for case, videos in cases.items()} | {
            CAPTIONS: (owners, self.embed_captions(batch.texts[batch.there]))
        }

    def predictions(self, outputs: Tensor, batch: FeatureBatch) -> Tensor:
        """Return the embeddings (B, L) unchanged."""
        return outputs

    def evaluate(self, outcomes: Outcomes) -> dict[str, float]:
        """Return `metrics.compute_recalls` and the loss over the complete split."""
        (clips, videos), (owners, texts) = next(iter(outcomes.values())), outcomes[CAPTIONS]
        _, first = np.unique(owners, return_index=True)
        scores = torch.from_numpy(videos @ texts[first].T) / self.temperature
        return {"loss": float(compute_contrastive_loss(scores, torch.from_numpy(clips))), **compute_recalls(outcomes)}


def compute_contrastive_loss(scores: Tensor, clips: Tensor) -> Tensor:
    """Return the contrastive loss of clips and captions, a scalar: mean cross-entropy over both directions.

    Args:
        scores: (N, N) similarities of clips (rows) and captions (columns); matching pairs are on the diagonal.
        clips: (N,) index of the clip of each row; repeated clips count once.
    """
    places = torch.arange(len(clips), device=clips.device)
    repeats = ((clips[:, None] == clips) & (places[:, None] > places)).any(1)  # (N,)
    scores = scores.masked_fill(repeats[:, None] ^ repeats, float("-inf"))
    places = places.masked_fill(repeats, UNKNOWN_LABEL)
    rows, columns = (F.cross_entropy(part, places, ignore_index=UNKNOWN_LABEL) for part in (scores, scores.T))
    return (rows + columns) / 2
