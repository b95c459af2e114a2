"""Opponents without backpropagation that adapt a classifier to the very questions they answer, device by device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """LAME: pull the answers of similar features together, the classifier as it is; returns probabilities (N, L).

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
    return answers


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
