"""Opponents without backpropagation that adapt a classifier to the very questions they answer, device by device."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import cma
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.data.batch import VideoTextBatch, normalise
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.models.all_in_one import AllInOne

PROMPTS = 3  # learnt tokens beside the text's
CANDIDATES = 28  # prompts that a batch is answered with, once each


def entropy(scores: Tensor) -> Tensor:
    """Return the entropy of each row of scores, (N,) of (N, L)."""
    return -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1)


def adjust_prototypes(hidden: Tensor, layer: nn.Linear, kept: int) -> Tensor:
    """T3A: answer by prototypes that follow the device's own features; returns scores (N, L).

    Source: Iwasawa and Matsuo 2021, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization",
    algorithm 1 and their code: a class's support begins with its weight vector; every feature joins the support of the
    class that the layer predicts; the `kept` members of lowest entropy make the prototype. One question at a time.

    Args:
        hidden: (N, D) what the last layer reads, in the order of the questions.
        layer: the last layer, D to L.
        kept: members of a class's support that count; 0 is all.
    """
    members, classes = layer.weight, torch.arange(layer.out_features)
    uncertain = entropy(layer(members))
    found = []
    for row in hidden:
        scores = layer(row[None])
        members = torch.cat([members, row[None]])
        classes = torch.cat([classes, scores.argmax(-1)])
        uncertain = torch.cat([uncertain, entropy(scores)])
        order = uncertain.argsort(stable=True)
        if kept:
            rank = (F.one_hot(classes[order], layer.out_features).cumsum(0) - 1).gather(1, classes[order, None])
            order = order[rank.squeeze(1) < kept]
        support = F.normalize(members[order], dim=-1)
        prototypes = F.one_hot(classes[order], layer.out_features).to(support.dtype).T @ support
        found.append(F.normalize(prototypes, dim=-1) @ row)
    return torch.stack(found)


def smooth_over_neighbours(hidden: Tensor, scores: Tensor, neighbours: int, steps: int = 100) -> Tensor:
    """LAME: pull the answers of similar features together, the classifier as it is; returns log-probabilities (N, L).

    Source: Boudiaf et al. 2022, "Parameter-free Online Test-time Adaptation", equation 6 and their code: symmetric
    nearest-neighbour affinities of unit features, and the concave-convex updates of the Laplacian-regularised
    likelihood.

    Args:
        hidden: (N, D) features of all questions of the device.
        scores: (N, L) of the classifier.
        neighbours: of each feature.
        steps: of the updates, which stop when nothing moves.
    """
    unit = F.normalize(hidden, dim=-1)
    similar = (unit @ unit.T).fill_diagonal_(-torch.inf)
    nearest = similar.topk(min(neighbours, len(hidden) - 1)).indices
    affinity = torch.zeros_like(similar).scatter_(1, nearest, 1.0)
    affinity = (affinity + affinity.T) / 2
    likelihood = scores.log_softmax(-1)
    answers = likelihood.exp()
    for _ in range(steps):
        moved = (likelihood + affinity @ answers).softmax(-1)
        if (moved - answers).abs().max() < 1e-6:
            break
        answers = moved
    return answers.log()


def shift_activations(features: Tensor, source: Tensor, strength: float, memory: float = 0.1) -> Tensor:
    """FOA's activation shifting: move features so that their running mean is the source's; returns features (N, D).

    Source: Niu et al. 2024, "Test-Time Model Adaptation with Only Forward Passes", equations 7 to 9: the running mean
    takes a tenth of every batch; here a batch is a question.

    Args:
        features: (N, D) in the order of the questions.
        source: (D,) mean of the training features.
        strength: of the shift; 1 is the whole difference.
        memory: share of the running mean that is new.
    """
    mean, moved = features[0], []
    for feature in features:
        mean = memory * feature + (1 - memory) * mean
        moved.append(feature + strength * (source - mean))
    return torch.stack(moved)


class Statistics(NamedTuple):
    """Mean and deviation of the first token after every block but the last, and of m̄: (B, 192) both, B blocks."""

    mean: Tensor
    deviation: Tensor


def search_prompts(
    model: Any, batches: Iterable[VideoTextBatch], source: Statistics, weight: float, seed: int
) -> Tensor:
    """FOA's prompts: learn tokens of the input by forward passes; returns scores (N, L) of one device's questions.

    Source: Niu et al. 2024, "Test-Time Model Adaptation with Only Forward Passes", equations 4 to 6: for every batch
    CMA-ES (Hansen 2016, "The CMA Evolution Strategy: A Tutorial"; the library `cma`) draws `CANDIDATES` prompts, the
    batch is answered with each, and what is lowest of entropy plus distance of activations to the source's answers it.

    Args:
        model: a method with one last layer (`OneLayer`), in evaluation mode.
        batches: of the device's questions, in order.
        source: of the training questions, see `measure_activations`.
        weight: of the distances beside the entropy.
        seed: of the draws.
    """
    search = cma.CMAEvolutionStrategy(
        PROMPTS * FEATURE_DIM * [0.0], 1.0, {"popsize": CANDIDATES, "seed": seed + 1, "verbose": -9}
    )
    found = []
    for batch in batches:
        drawn = search.ask()
        prompts = torch.from_numpy(np.stack(drawn)).float().view(CANDIDATES, PROMPTS, FEATURE_DIM)
        activations, fused = measure_activations(model.encoder, batch, prompts)  # (K, B, 192), (K, N, 192)
        scores = model.head(fused, model.layer)
        distances = (activations.mean - source.mean).norm(dim=-1) + (activations.deviation - source.deviation).norm(
            dim=-1
        )
        losses = entropy(scores.flatten(0, 1)).view(CANDIDATES, -1).mean(1) + weight * distances.sum(1)
        search.tell(drawn, losses.tolist())
        found.append(scores[losses.argmin()])
    return torch.cat(found)


@torch.no_grad()
def measure_activations(encoder: AllInOne, batch: VideoTextBatch, prompts: Tensor) -> tuple[Statistics, Tensor]:
    """Encode a batch with each of K prompts (K, P, 192): statistics (K, B, 192) each, and m̄ (K, N, 192)."""
    number, tokens, _ = prompts.shape
    ids, mask = (part.repeat_interleave(number, dim=0) for part in (batch.text_ids, batch.text_mask))
    ids, mask = F.pad(ids, (0, tokens)), F.pad(mask, (0, tokens), value=1)  # places for the prompts
    with _prompted(encoder, prompts.repeat(len(batch.text_ids), 1, 1)) as firsts:
        fused = encoder(normalise(batch.frames), ids, mask).fused.view(-1, number, FEATURE_DIM).transpose(0, 1)
    layers = [first.view(len(fused[0]), number, -1, FEATURE_DIM).transpose(0, 1).flatten(1, 2) for first in firsts]
    layers.append(fused)
    means, deviations = (torch.stack([how(own, dim=1) for own in layers], dim=1) for how in (torch.mean, _deviation))
    return Statistics(means, deviations), fused


def _deviation(values: Tensor, dim: int) -> Tensor:
    return values.std(dim, unbiased=False)


@contextmanager
def _prompted(encoder: AllInOne, prompts: Tensor) -> Iterator[list[Tensor]]:
    """Put prompts (N, P, 192) into the last places of every text, and keep the first token after each block."""
    firsts: list[Tensor] = []

    def place(module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
        return torch.cat([embedded[:, : embedded.shape[1] - prompts.shape[1]], prompts], dim=1)

    def keep(module: nn.Module, given: Any, tokens: Tensor) -> None:
        firsts.append(tokens[:, 0])

    hooks = [encoder.text_embeddings.register_forward_hook(place)]
    hooks += [block.register_forward_hook(keep) for block in list(encoder.transformer.blocks)[:-1]]
    try:
        yield firsts
    finally:
        for hook in hooks:
            hook.remove()
