"""Baselines that adapt a classifier to the questions they answer, per device and without backpropagation."""

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

PROMPT_TOKENS = 3  # learned tokens added to the text
CANDIDATE_PROMPTS = 28  # prompts that each batch is evaluated with


def compute_entropy(scores: Tensor) -> Tensor:
    """Return the entropy (N,) of each row of scores (N, L)."""
    return -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1)


def adjust_prototypes(hidden: Tensor, layer: nn.Linear, kept: int) -> Tensor:
    """Return scores (N, L) by T3A: prototypes that follow the features of the device.

    Source: Iwasawa and Matsuo 2021, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization",
    algorithm 1 and their code: a class's support set starts with its weight vector; every feature joins the set of its
    predicted class; the `kept` members of lowest entropy define the prototype. Questions are processed one at a time.

    Args:
        hidden: (N, D) inputs of the last layer, in the order of the questions.
        layer: last layer, D to L.
        kept: number of members of each support set that are used; 0 uses all.
    """
    members, classes = layer.weight, torch.arange(layer.out_features)
    entropies = compute_entropy(layer(members))
    results = []
    for row in hidden:
        scores = layer(row[None])
        members = torch.cat([members, row[None]])
        classes = torch.cat([classes, scores.argmax(-1)])
        entropies = torch.cat([entropies, compute_entropy(scores)])
        order = entropies.argsort(stable=True)
        if kept:
            rank = (F.one_hot(classes[order], layer.out_features).cumsum(0) - 1).gather(1, classes[order, None])
            order = order[rank.squeeze(1) < kept]
        support = F.normalize(members[order], dim=-1)
        prototypes = F.one_hot(classes[order], layer.out_features).to(support.dtype).T @ support
        results.append(F.normalize(prototypes, dim=-1) @ row)
    return torch.stack(results)


def smooth_over_neighbours(hidden: Tensor, scores: Tensor, neighbours: int, steps: int = 100) -> Tensor:
    """Return log-probabilities (N, L) by LAME: answers of similar features are pulled together.

    Source: Boudiaf et al. 2022, "Parameter-free Online Test-time Adaptation", equation 6 and their code: symmetric
    nearest-neighbour affinities of unit features, and the concave-convex updates of the Laplacian-regularised
    likelihood. The classifier does not change.

    Args:
        hidden: (N, D) features of all questions of the device.
        scores: (N, L) scores of the classifier.
        neighbours: number of nearest neighbours of each feature.
        steps: maximum number of updates; they stop at convergence.
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
    """Shift features (N, D) so that their running mean matches the source mean (FOA's activation shifting).

    Source: Niu et al. 2024, "Test-Time Model Adaptation with Only Forward Passes", equations 7 to 9: the running mean
    takes a tenth of every batch; here a batch is a question.

    Args:
        features: (N, D) features in the order of the questions.
        source: (D,) mean of the training features.
        strength: share of the difference that is applied; 1 is the complete shift.
        memory: weight of the new feature in the running mean.
    """
    mean, moved = features[0], []
    for feature in features:
        mean = memory * feature + (1 - memory) * mean
        moved.append(feature + strength * (source - mean))
    return torch.stack(moved)


class Statistics(NamedTuple):
    """Mean and deviation of the first token after all blocks but the last, and of m̄: (B, 192) for B blocks."""

    mean: Tensor
    deviation: Tensor


def search_prompts(
    model: Any, batches: Iterable[VideoTextBatch], source: Statistics, weight: float, seed: int
) -> Tensor:
    """Return scores (N, L) of one device's questions with FOA's prompts: input tokens learned by forward passes.

    Source: Niu et al. 2024, "Test-Time Model Adaptation with Only Forward Passes", equations 4 to 6: for every batch
    CMA-ES (Hansen 2016, "The CMA Evolution Strategy: A Tutorial"; the library `cma`) draws `CANDIDATE_PROMPTS` prompts.
    The one with the lowest loss, entropy plus distance of the activations to the source's, gives the answers.

    Args:
        model: method with one last layer (`OneLayer`), in evaluation mode.
        batches: batches of the device's questions, in order.
        source: statistics of the training questions, see `measure_activations`.
        weight: weight of the distances relative to the entropy.
        seed: seed of the draws.
    """
    search = cma.CMAEvolutionStrategy(
        PROMPT_TOKENS * FEATURE_DIM * [0.0], 1.0, {"popsize": CANDIDATE_PROMPTS, "seed": seed + 1, "verbose": -9}
    )
    results = []
    for batch in batches:
        candidates = search.ask()
        prompts = torch.from_numpy(np.stack(candidates)).float().view(CANDIDATE_PROMPTS, PROMPT_TOKENS, FEATURE_DIM)
        activations, fused = measure_activations(model.encoder, batch, prompts)  # (K, B, 192), (K, N, 192)
        scores = model.head(fused, model.layer)
        distances = (activations.mean - source.mean).norm(dim=-1) + (activations.deviation - source.deviation).norm(
            dim=-1
        )
        losses = compute_entropy(scores.flatten(0, 1)).view(CANDIDATE_PROMPTS, -1).mean(1) + weight * distances.sum(1)
        search.tell(candidates, losses.tolist())
        results.append(scores[losses.argmin()])
    return torch.cat(results)


@torch.no_grad()
def measure_activations(encoder: AllInOne, batch: VideoTextBatch, prompts: Tensor) -> tuple[Statistics, Tensor]:
    """Encode a batch with each of K prompts (K, P, 192): statistics, both (K, B, 192), and m̄ (K, N, 192)."""
    number, tokens, _ = prompts.shape
    ids, mask = (part.repeat_interleave(number, dim=0) for part in (batch.text_ids, batch.text_mask))
    ids, mask = F.pad(ids, (0, tokens)), F.pad(mask, (0, tokens), value=1)  # placeholders for the prompts
    with _insert_prompts(encoder, prompts.repeat(len(batch.text_ids), 1, 1)) as firsts:
        fused = encoder(normalise(batch.frames), ids, mask).fused.view(-1, number, FEATURE_DIM).transpose(0, 1)
    layers = [first.view(len(fused[0]), number, -1, FEATURE_DIM).transpose(0, 1).flatten(1, 2) for first in firsts]
    layers.append(fused)
    means, deviations = (torch.stack([measure(x, dim=1) for x in layers], dim=1) for measure in (torch.mean, _std))
    return Statistics(means, deviations), fused


def _std(values: Tensor, dim: int) -> Tensor:
    return values.std(dim, unbiased=False)


@contextmanager
def _insert_prompts(encoder: AllInOne, prompts: Tensor) -> Iterator[list[Tensor]]:
    """Insert prompts (N, P, 192) at the last places of every text, and record the first token after each block."""
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
