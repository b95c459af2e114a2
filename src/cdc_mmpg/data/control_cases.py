"""Control cases of a test: anchors taken from other samples, and numbers of anchors in a session."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from cdc_mmpg.data.interface import SampleOrigin

MAX_PARTNER_DRAWS = 64  # draws of a partner from another device before falling back to another pool


def draw_control_partners(origins: Sequence[SampleOrigin], seed: int) -> dict[str, list[int]]:
    """Draw for every sample another one whose anchor it gets in a control.

    Args:
        origins: origins of all samples, in their order.
        seed: seed of the draws.

    Returns:
        shuffled: index of any other sample; shuffled_device: index of one of another device, if possible with the same
        type of question.
    """
    generator = np.random.default_rng(seed)
    circle = generator.permutation(len(origins))
    following = dict(zip(circle.tolist(), np.roll(circle, -1).tolist(), strict=True))
    types: dict[str, list[int]] = {}
    for index, origin in enumerate(origins):
        types.setdefault(origin.type, []).append(index)
    elsewhere = []
    for index, origin in enumerate(origins):
        for pool in (types[origin.type], range(len(origins))):
            drawn = (pool[place] for place in generator.integers(len(pool), size=MAX_PARTNER_DRAWS).tolist())
            other = next((i for i in drawn if origins[i].device != origin.device), None)
            if other is not None:
                break
        elsewhere.append(following[index] if other is None else other)
    return {"shuffled": [following[index] for index in range(len(origins))], "shuffled_device": elsewhere}


class SessionCase(NamedTuple):
    """The upload in an evaluation of sessions."""

    anchors: int  # n, 0 for no upload
    shuffled: bool = False  # whether the anchors are from another device
    alike: bool = False  # whether the clips are those with the most similar backgrounds, as of one room; if known


# Evaluated separately; the first selects the best epoch, and the last is left out if backgrounds are unknown.
SESSION_CASES = {
    "n16": SessionCase(16),
    "n23": SessionCase(23),
    "n8": SessionCase(8),
    "n4": SessionCase(4),
    "n1": SessionCase(1),
    "n0": SessionCase(0),
    "shuffled_n8": SessionCase(8, shuffled=True),
    "shuffled_n16": SessionCase(16, shuffled=True),
    "alike_n8": SessionCase(8, alike=True),
}

Correction = Literal["grey_world", "hue_mode", "true_cast"]  # how a device estimates its cast, or the true cast
# Cases that define from which clips a device estimates its cast.
CORRECTION_CASES = {name: SESSION_CASES[name] for name in ("n16", "n8", "n4", "alike_n8")}
