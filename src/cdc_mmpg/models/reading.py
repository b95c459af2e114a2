"""Recognition before averaging: word pairs that a device recognises in one clip, learned from captions."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CheckpointError, DataError
from cdc_mmpg.models.weights import read_state_dict, save_safetensors

Pair = tuple[int, int]


class Reading(nn.Module):
    """Classifier from anchor features (..., 192) to the probabilities of 192 word pairs in a caption of the clip.

    Averaging features over clips loses which object has which look; averaging recognised pairs keeps it. A pair is
    any two neighbouring words of a caption ("green pole"). The most informative frequent pairs are selected, so no
    list of objects or looks is needed. If the captions have fewer than 192 pairs, the remaining outputs are 0.

    Source: ours. Three linear layers with GELUs between them, trained with binary cross-entropy on frozen features
    with dropout of a tenth. Depth, rates and epochs were selected on held-out captions.
    """

    HIDDEN = 384
    MIN_PAIR_SHARE = 0.004  # smallest share of the captions that contain a pair
    EPOCHS, BATCH, RATE, WEIGHT_DECAY, DROPOUT = 30, 128, 4e-3, 0.3, 0.1
    ABSENT_LOGIT = -30.0  # logit of unused outputs

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURE_DIM, self.HIDDEN)
        self.second = nn.Linear(self.HIDDEN, self.HIDDEN)
        self.last = nn.Linear(self.HIDDEN, FEATURE_DIM)

    def forward(self, features: Tensor) -> Tensor:
        """Return the probabilities (..., 192), computed in float32 regardless of the run's precision."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.sigmoid(self._score(features.float()))

    def _score(self, features: Tensor) -> Tensor:
        """Return the logits of all pairs."""
        hidden = F.gelu(self.first(F.layer_norm(features, (FEATURE_DIM,))))
        return self.last(F.gelu(self.second(hidden)))

    def fit(self, features: Tensor, captions: Sequence[Sequence[int]], seed: int) -> None:
        """Train on captioned clips.

        Args:
            features: (N, V, 192) anchor features of V frames of each clip.
            captions: (N) WordPiece ids of each caption, without special tokens.
            seed: seed of the order, frames and dropout.

        Raises:
            DataError: no word pair occurs often enough and in only a part of the captions.
        """
        pairs = select_pairs(captions, self.MIN_PAIR_SHARE)
        if not pairs:
            raise DataError(
                f"no pair of neighbouring words is in at least {100 * self.MIN_PAIR_SHARE:g} %, but not all, of "
                f"{len(captions)} captions"
            )
        targets = torch.tensor([[pair in words for pair in pairs] for words in map(collect_pairs, captions)]).float()
        targets = F.pad(targets, (0, FEATURE_DIM - len(pairs)))
        generator = torch.Generator().manual_seed(seed)
        steps = self.EPOCHS * (1 + (len(features) - 1) // self.BATCH)
        optimizer = torch.optim.AdamW(self.parameters(), self.RATE, weight_decay=self.WEIGHT_DECAY)
        decay = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps)
        with torch.enable_grad():
            for _ in range(self.EPOCHS):
                for rows in torch.randperm(len(features), generator=generator).split(self.BATCH):
                    frames = torch.randint(features.shape[1], rows.shape, generator=generator)
                    inputs = features[rows, frames]
                    kept = torch.rand(inputs.shape, generator=generator) >= self.DROPOUT
                    scores = self._score(inputs * kept / (1 - self.DROPOUT))
                    loss = F.binary_cross_entropy_with_logits(scores[:, : len(pairs)], targets[rows, : len(pairs)])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    decay.step()
        with torch.no_grad():
            self.last.weight[len(pairs) :] = 0
            self.last.bias[len(pairs) :] = self.ABSENT_LOGIT

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        save_safetensors(self.state_dict(), path)

    @classmethod
    def load(cls, path: Path) -> "Reading":
        """Load a reading written by `save`, with its weights frozen.

        Raises:
            CheckpointError: the file is missing, unreadable, or not a reading.
        """
        reading, state = cls(), read_state_dict(path)
        try:
            reading.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: not a reading: give reading.safetensors of encoder_pretraining") from error
        return reading.requires_grad_(False)


def collect_pairs(words: Sequence[int]) -> set[Pair]:
    """Return the pairs of neighbouring words of a caption."""
    return set(pairwise(words))


def select_pairs(captions: Sequence[Sequence[int]], rarest: float) -> list[Pair]:
    """Return at most 192 word pairs, most informative first: those whose share of captions is nearest to one half."""
    counts = Counter(pair for words in captions for pair in collect_pairs(words))
    shares = {pair: count / len(captions) for pair, count in counts.items() if count >= rarest * len(captions)}
    variances = {pair: share * (1 - share) for pair, share in shares.items() if share < 1}
    return sorted(variances, key=lambda pair: (-variances[pair], pair))[:FEATURE_DIM]
