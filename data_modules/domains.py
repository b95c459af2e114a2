"""Domains for datasets that do not know devices: a clip's domain, its effect on frames, and which are unseen.

A domain stands for a device. `categories` come from the dataset and leave frames unchanged. `casts` and `corruptions`
are synthetic: a clip's domain follows from a hash of its name, the same on every machine and for every seed, and its
frames are changed when they are read, so that all kinds share one frame cache.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from cdc_mmpg.data.sampling import Jitter
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.media.frames import Frames

DomainKind = Literal["categories", "casts", "corruptions"]

# MSR-VTT's categories by number, as its authors name them.
CATEGORIES = (
    "music", "people", "gaming", "sports/actions", "news/events/politics", "education", "tv shows", "movie/comedy",
    "animation", "vehicles/autos", "howto", "travel", "science/technology", "animals/pets", "kids/family",
    "documentary", "food/drink", "cooking", "beauty/fashion", "advertisement",
)  # fmt: skip
CAMERA_COUNT = 24
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # shares of red, green and blue in perceived brightness

# Amounts of severity 1 to 5. hue: degrees; blur: standard deviation in pixels of a frame whose shorter side has
# `BLUR_REFERENCE_SIDE`, as for a model at 224 pixels; noise: standard deviation in levels of 255; low-light: factor.
SEVERITIES: Mapping[str, tuple[float, ...]] = {
    "hue": (30, 60, 90, 120, 150),
    "blur": (2, 3, 4, 6, 9),
    "noise": (10, 20, 30, 45, 60),
    "low-light": (0.6, 0.45, 0.3, 0.2, 0.1),
}
BLUR_REFERENCE_SIDE = 268

DOMAIN_NAMES: Mapping[DomainKind, tuple[str, ...]] = {
    "categories": CATEGORIES,
    "casts": tuple(f"camera{number:02}" for number in range(CAMERA_COUNT)),
    "corruptions": ("clean", *(f"{kind}-{severity}" for kind in SEVERITIES for severity in range(1, 6))),
}
# About a fifth: every fifth category; every fifth camera, whose cast lies between seen ones, 15 degrees from the next;
# the highest severity of every corruption, which is beyond the seen ones.
DEFAULT_HELD_OUT: Mapping[DomainKind, tuple[str, ...]] = {
    "categories": DOMAIN_NAMES["categories"][2::5],
    "casts": DOMAIN_NAMES["casts"][2::5],
    "corruptions": DOMAIN_NAMES["corruptions"][5::5],
}


class Effect(NamedTuple):
    """The effect of a domain on frames."""

    kind: str  # a key of `SEVERITIES`
    amount: float


EFFECTS: Mapping[str, Effect] = {
    **{name: Effect("hue", 360 * place / CAMERA_COUNT) for place, name in enumerate(DOMAIN_NAMES["casts"]) if place},
    **{
        f"{kind}-{severity}": Effect(kind, amount)
        for kind, amounts in SEVERITIES.items()
        for severity, amount in enumerate(amounts, start=1)
    },
}  # by domain; categories, the first camera and "clean" have none


def choose_held_out(kind: DomainKind, names: Sequence[str] | None) -> list[str]:
    """Return the domains that training does not see, in the order of `DOMAIN_NAMES`; None takes the default.

    Raises:
        ConfigError: a name does not exist, or none or all of the domains are named.
    """
    known = DOMAIN_NAMES[kind]
    chosen = DEFAULT_HELD_OUT[kind] if names is None else names
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigError(
            f"data.init_args.held_out names {', '.join(map(repr, unknown))}, not in the domains of {kind}: "
            f"{', '.join(known)}"
        )
    if not chosen or set(chosen) == set(known):
        raise ConfigError(
            f"data.init_args.held_out names {'all' if chosen else 'none'} of the domains of {kind}: some must be "
            f"left for training, and some must be unseen; null takes {', '.join(DEFAULT_HELD_OUT[kind])}"
        )
    return [name for name in known if name in chosen]


class Shift(NamedTuple):
    """The domains of a dataset's clips."""

    kind: DomainKind
    held_out: frozenset[str]
    categories: Mapping[str, str]  # by clip; empty for another kind

    def domain(self, clip: str) -> str:
        """Return the domain of a clip; empty if its category is unknown."""
        if self.kind == "categories":
            return self.categories.get(clip, "")
        # The kind is hashed, too: splits can follow from a hash of the name alone (TGIF's validation), and no split may
        # have cameras that the others lack.
        return DOMAIN_NAMES[self.kind][_hash_name(f"{self.kind} {clip}") % len(DOMAIN_NAMES[self.kind])]

    def is_unseen(self, clip: str) -> bool:
        """Return whether a clip's domain is held out."""
        return self.domain(clip) in self.held_out

    def describe_effect(self, clip: str) -> str:
        """Describe how a clip's frames differ from those in the cache, for a digest; empty if they do not."""
        effect = EFFECTS.get(self.domain(clip))
        if effect is None:
            return ""
        noise_seed = f" {clip}" if effect.kind == "noise" else ""
        return f" {effect.kind} {effect.amount:g}{noise_seed}"

    def apply(self, clip: str, frames: Frames) -> Frames:
        """Apply the effect of a clip's domain to its frames (T, H, W, 3)."""
        effect = EFFECTS.get(self.domain(clip))
        if effect is None:
            return frames
        if effect.kind == "hue":
            return rotate_hues(frames, effect.amount)
        if effect.kind == "blur":
            return blur(frames, effect.amount)
        if effect.kind == "noise":
            return add_noise(frames, effect.amount, clip)
        return darken(frames, effect.amount)

    def casts(self) -> dict[str, float]:
        """Return every domain's hue rotation in degrees; NaN for categories, whose casts are unknown."""
        if self.kind == "categories":
            return dict.fromkeys(CATEGORIES, float("nan"))
        effects = {name: EFFECTS.get(name) for name in DOMAIN_NAMES[self.kind]}
        return {name: effect.amount if effect and effect.kind == "hue" else 0.0 for name, effect in effects.items()}


class Rotation(NamedTuple):
    """A rotation of the hues of clips, after an earlier change of their frames."""

    degrees: Mapping[str, float]  # by clip
    before: "Change | None"

    def describe_effect(self, clip: str) -> str:
        """Describe how a clip's frames differ from those in the cache, see `Shift`."""
        rotation = f" hue {self.degrees[clip]:.2f}" if self.degrees[clip] else ""
        return (self.before.describe_effect(clip) if self.before else "") + rotation

    def apply(self, clip: str, frames: Frames) -> Frames:
        """Rotate the hues of a clip's frames (T, H, W, 3)."""
        frames = self.before.apply(clip, frames) if self.before else frames
        return rotate_hues(frames, self.degrees[clip]) if self.degrees[clip] else frames


class ColorJitter(NamedTuple):
    """A jitter of the colours of clips, after an earlier change of their frames."""

    jitters: Mapping[str, Jitter]  # by clip
    before: "Change | None"

    def describe_effect(self, clip: str) -> str:
        """Describe how a clip's frames differ from those in the cache, see `Shift`."""
        values = " ".join(f"{value:.4f}" for value in self.jitters[clip])
        return f"{self.before.describe_effect(clip) if self.before else ''} jitter {values}"

    def apply(self, clip: str, frames: Frames) -> Frames:
        """Jitter the brightness, contrast, saturation and hue of a clip's frames (T, H, W, 3)."""
        frames, jitter = self.before.apply(clip, frames) if self.before else frames, self.jitters[clip]
        colors = jitter.brightness * frames.astype(np.float32)
        colors += (jitter.contrast - 1) * (colors - (colors @ LUMA_WEIGHTS).mean())
        colors += (jitter.saturation - 1) * (colors - (colors @ LUMA_WEIGHTS)[..., None])
        return rotate_hues(np.rint(colors.clip(0, 255)).astype(np.uint8), jitter.hue)


Change = Shift | Rotation | ColorJitter  # a change of clips' frames when they are read


def rotate_hues(frames: Frames, degrees: float) -> Frames:
    """Rotate all hues; saturation and value (of HSV) are unchanged."""
    red, green, blue = (frames[..., channel].astype(np.float32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    divisor = np.maximum(chroma, 1)  # a grey has no hue: it is unchanged below, since its chroma is 0
    sextant = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    rotated = np.empty_like(frames)
    for channel, start in enumerate((5, 3, 1)):
        place = sextant + np.float32(start + degrees / 60)
        place -= 6 * np.floor(place / 6)  # twice as fast as %
        rotated[..., channel] = np.rint(value - chroma * np.clip(np.minimum(place, 4 - place), 0, 1))
    return rotated


def blur(frames: Frames, deviation: float) -> Frames:
    """Blur by a Gaussian, truncated at the border; its deviation is in pixels at a side of `BLUR_REFERENCE_SIDE`."""
    _, height, width, _ = frames.shape
    pixels = deviation * min(height, width) / BLUR_REFERENCE_SIDE
    planes = np.moveaxis(frames, -1, 1).astype(np.float32)  # (T, 3, H, W)
    blurred = _make_gaussian_kernel(height, pixels) @ planes @ _make_gaussian_kernel(width, pixels).T
    return np.moveaxis(np.rint(blurred).astype(np.uint8), 1, -1)


def _make_gaussian_kernel(size: int, deviation: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return the matrix (size, size) of the weights between pixels in one dimension; rows sum to 1."""
    places = np.arange(size)
    weights = np.exp(-((places[:, None] - places) ** 2) / (2 * deviation**2))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def add_noise(frames: Frames, deviation: float, name: str) -> Frames:
    """Add Gaussian noise, seeded by a name: the same whenever a clip is read. `deviation` is in levels of 255."""
    noise = np.random.default_rng(_hash_name(name)).standard_normal(frames.shape, dtype=np.float32)
    return np.rint(frames + np.float32(deviation) * noise).clip(0, 255).astype(np.uint8)


def darken(frames: Frames, factor: float) -> Frames:
    """Multiply all levels by a factor, which leaves fewer distinct levels."""
    return np.rint(frames * np.float32(factor)).astype(np.uint8)


def _hash_name(name: str) -> int:
    """Return an integer that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
