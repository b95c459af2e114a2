"""Recognition before averaging: what a device reads of one clip, learned from captions alone."""

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
    """Anchor feature (..., 192) -> how likely each of 192 pairs of words is in a caption of the clip, from 0 to 1.

    Which thing has which look is a product, and the mean of features over clips loses it: the mean of what is
    recognised in each clip does not. A pair is two neighbouring words of a caption ("green pole"), whatever the words
    are: the most frequent pairs that tell captions apart are taken, and no list of things or looks is needed. Where
    captions have fewer pairs, the rest is 0.

    Source: ours. The network is three linears with GELUs between them, trained with binary cross-entropy on frozen
    features, of which a tenth is dropped. Depth, rates and epochs were picked on held-out captions.
    """

    HIDDEN = 384
    RAREST = 0.004  # share of the captions that a pair is in at least
    EPOCHS, BATCH, RATE, WEIGHT_DECAY, DROPPED = 30, 128, 4e-3, 0.3, 0.1
    NEVER = -30.0  # logit of what is no pair

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURE_DIM, self.HIDDEN)
        self.second = nn.Linear(self.HIDDEN, self.HIDDEN)
        self.last = nn.Linear(self.HIDDEN, FEATURE_DIM)

    def forward(self, features: Tensor) -> Tensor:
        """Return the likelihoods, (..., 192), in float32 whatever the precision of the run."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.sigmoid(self._score(features.float()))

    def _score(self, features: Tensor) -> Tensor:
        """Return the logits of all pairs."""
        hidden = F.gelu(self.first(F.layer_norm(features, (FEATURE_DIM,))))
        return self.last(F.gelu(self.second(hidden)))

    def fit(self, features: Tensor, captions: Sequence[Sequence[int]], seed: int) -> None:
        """Train on clips with captions.

        Args:
            features: (N, V, 192) anchor features of V frames of each clip.
            captions: (N) the words of each, without special tokens.
            seed: of initialisation and order.

        Raises:
            DataError: captions have no pair in common.
        """
        pairs = frequent_pairs(captions, self.RAREST)
        if not pairs:
            raise DataError(f"{len(captions)} captions have no pair of words that some have and others have not")
        wanted = torch.tensor([[pair in there for pair in pairs] for there in map(set_of_pairs, captions)]).float()
        wanted = F.pad(wanted, (0, FEATURE_DIM - len(pairs)))
        generator = torch.Generator().manual_seed(seed)
        steps = self.EPOCHS * (1 + (len(features) - 1) // self.BATCH)
        optimizer = torch.optim.AdamW(self.parameters(), self.RATE, weight_decay=self.WEIGHT_DECAY)
        decay = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps)
        with torch.enable_grad():
            for _ in range(self.EPOCHS):
                for rows in torch.randperm(len(features), generator=generator).split(self.BATCH):
                    frames = torch.randint(features.shape[1], rows.shape, generator=generator)
                    seen = features[rows, frames]
                    there = torch.rand(seen.shape, generator=generator) >= self.DROPPED
                    scores = self._score(seen * there / (1 - self.DROPPED))
                    loss = F.binary_cross_entropy_with_logits(scores[:, : len(pairs)], wanted[rows, : len(pairs)])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    decay.step()
        with torch.no_grad():
            self.last.weight[len(pairs) :] = 0
            self.last.bias[len(pairs) :] = self.NEVER

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        save_safetensors(self.state_dict(), path)

    @classmethod
    def load(cls, path: Path) -> "Reading":
        """Load a reading as `save` left it, frozen.

        Raises:
            CheckpointError: absent, unreadable, or not a reading.
        """
        reading, state = cls(), read_state_dict(path)
        try:
            reading.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: not a reading, which encoder_pretraining writes") from error
        return reading.requires_grad_(False)


def set_of_pairs(words: Sequence[int]) -> set[Pair]:
    """Return the pairs of neighbouring words of a caption."""
    return set(pairwise(words))


def frequent_pairs(captions: Sequence[Sequence[int]], rarest: float) -> list[Pair]:
    """Return at most 192 pairs that captions have, the most telling first: those of which half of them have one."""
    counts = Counter(pair for words in captions for pair in set_of_pairs(words))
    known = {pair: count / len(captions) for pair, count in counts.items() if count >= rarest * len(captions)}
    telling = {pair: share * (1 - share) for pair, share in known.items() if share < 1}
    return sorted(telling, key=lambda pair: (-telling[pair], pair))[:FEATURE_DIM]
