"""Domains for datasets that know no devices: whose a clip is, what that does to its frames, and who is unseen.

A domain stands for a device. `categories` are the dataset's own: frames stay as they are. `casts` and `corruptions` are
of our own making: a clip is assigned by a hash of its name, the same on every machine and for every seed, and its
frames are changed when they are read, so that all choices share one frame cache.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from cdc_mmpg.data.sampling import Jitter
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.media.frames import Frames

DomainKind = Literal["categories", "casts", "corruptions"]

# MSR-VTT's, category k in place k, as its authors name them.
CATEGORIES = (
    "music", "people", "gaming", "sports/actions", "news/events/politics", "education", "tv shows", "movie/comedy",
    "animation", "vehicles/autos", "howto", "travel", "science/technology", "animals/pets", "kids/family",
    "documentary", "food/drink", "cooking", "beauty/fashion", "advertisement",
)  # fmt: skip
CAMERAS = 24
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # shares of red, green and blue in the brightness that is seen

# Amounts of severity 1 to 5: degrees; standard deviation in pixels of a frame whose shorter side has 268, as the model
# at 224 pixels is shown it; standard deviation in levels of 255; factor.
SEVERITIES: Mapping[str, tuple[float, ...]] = {
    "hue": (30, 60, 90, 120, 150),
    "blur": (2, 3, 4, 6, 9),
    "noise": (10, 20, 30, 45, 60),
    "low-light": (0.6, 0.45, 0.3, 0.2, 0.1),
}
BLURRED_SIDE = 268

DOMAIN_NAMES: Mapping[DomainKind, tuple[str, ...]] = {
    "categories": CATEGORIES,
    "casts": tuple(f"camera{number:02}" for number in range(CAMERAS)),
    "corruptions": ("clean", *(f"{what}-{place}" for what in SEVERITIES for place in range(1, 6))),
}
# A fifth, unless told: every fifth category and every fifth camera, whose casts lie between seen ones, 15 degrees from
# the next; the severest of every corruption, which is beyond those seen.
DEFAULT_HELD_OUT: Mapping[DomainKind, tuple[str, ...]] = {
    "categories": DOMAIN_NAMES["categories"][2::5],
    "casts": DOMAIN_NAMES["casts"][2::5],
    "corruptions": DOMAIN_NAMES["corruptions"][5::5],
}


class Effect(NamedTuple):
    """What a domain does to frames."""

    what: str  # of `SEVERITIES`
    amount: float


EFFECTS: Mapping[str, Effect] = {
    **{name: Effect("hue", 360 * place / CAMERAS) for place, name in enumerate(DOMAIN_NAMES["casts"]) if place},
    **{
        f"{what}-{place}": Effect(what, amount)
        for what, amounts in SEVERITIES.items()
        for place, amount in enumerate(amounts, start=1)
    },
}  # by domain; none of categories, the first camera and "clean"


def choose_held_out(kind: DomainKind, names: Sequence[str] | None) -> list[str]:
    """Return the domains that training does not see, in the order of `DOMAIN_NAMES`; `names` None is the default.

    Raises:
        ConfigError: a name that does not exist; none, or all.
    """
    known = DOMAIN_NAMES[kind]
    chosen = DEFAULT_HELD_OUT[kind] if names is None else names
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigError(
            f"data.init_args.held_out names {', '.join(map(repr, unknown))}, none of the domains of {kind}: "
            f"{', '.join(known)}"
        )
    if not chosen or set(chosen) == set(known):
        raise ConfigError(
            f"data.init_args.held_out names {'all' if chosen else 'none'} of the domains of {kind}: some must be "
            f"left to train on, and some to be unseen; null takes {', '.join(DEFAULT_HELD_OUT[kind])}"
        )
    return [name for name in known if name in chosen]


class Shift(NamedTuple):
    """The domains of a dataset's clips."""

    kind: DomainKind
    held_out: frozenset[str]
    categories: Mapping[str, str]  # by clip, where that is the kind

    def domain(self, clip: str) -> str:
        """Return the domain of a clip; empty where its category is not known."""
        if self.kind == "categories":
            return self.categories.get(clip, "")
        # The kind is hashed, too: splits are made by hashes of names alone (TGIF's validation, for one), and a split
        # must not have cameras of its own.
        return DOMAIN_NAMES[self.kind][_hash_name(f"{self.kind} {clip}") % len(DOMAIN_NAMES[self.kind])]

    def unseen(self, clip: str) -> bool:
        """Return whether a clip is of a domain that is held out."""
        return self.domain(clip) in self.held_out

    def effect(self, clip: str) -> str:
        """Describe how a clip's frames differ from those in the cache, for a digest; empty where they do not."""
        effect = EFFECTS.get(self.domain(clip))
        if effect is None:
            return ""
        drawn = f" {clip}" if effect.what == "noise" else ""
        return f" {effect.what} {effect.amount:g}{drawn}"

    def apply(self, clip: str, frames: Frames) -> Frames:
        """Return frames (T, H, W, 3) of a clip as its domain has them."""
        effect = EFFECTS.get(self.domain(clip))
        if effect is None:
            return frames
        if effect.what == "hue":
            return rotate_hues(frames, effect.amount)
        if effect.what == "blur":
            return blur(frames, effect.amount)
        if effect.what == "noise":
            return add_noise(frames, effect.amount, clip)
        return darken(frames, effect.amount)

    def casts(self) -> dict[str, float]:
        """Return every domain's rotation of the hues in degrees; of categories nobody knows one."""
        if self.kind == "categories":
            return dict.fromkeys(CATEGORIES, float("nan"))
        effects = {name: EFFECTS.get(name) for name in DOMAIN_NAMES[self.kind]}
        return {name: each.amount if each and each.what == "hue" else 0.0 for name, each in effects.items()}


class Rotation(NamedTuple):
    """Hues of clips, rotated after what their domains do to the frames."""

    degrees: Mapping[str, float]  # by clip
    before: "Change | None"

    def effect(self, clip: str) -> str:
        """Describe how a clip's frames differ from those in the cache, see `Shift`."""
        own = f" hue {self.degrees[clip]:.2f}" if self.degrees[clip] else ""
        return (self.before.effect(clip) if self.before else "") + own

    def apply(self, clip: str, frames: Frames) -> Frames:
        """Return frames (T, H, W, 3) of a clip with their hues rotated."""
        frames = self.before.apply(clip, frames) if self.before else frames
        return rotate_hues(frames, self.degrees[clip]) if self.degrees[clip] else frames


class Jittered(NamedTuple):
    """Colours of clips, jittered after what their domains do to the frames."""

    jitters: Mapping[str, Jitter]  # by clip
    before: "Change | None"

    def effect(self, clip: str) -> str:
        """Describe how a clip's frames differ from those in the cache, see `Shift`."""
        own = " ".join(f"{value:.4f}" for value in self.jitters[clip])
        return f"{self.before.effect(clip) if self.before else ''} jitter {own}"

    def apply(self, clip: str, frames: Frames) -> Frames:
        """Return frames (T, H, W, 3) of a clip with their colours jittered: brightness, contrast, saturation, hue."""
        frames, own = self.before.apply(clip, frames) if self.before else frames, self.jitters[clip]
        colors = own.brightness * frames.astype(np.float32)
        colors += (own.contrast - 1) * (colors - (colors @ GREY).mean())
        colors += (own.saturation - 1) * (colors - (colors @ GREY)[..., None])
        return rotate_hues(np.rint(colors.clip(0, 255)).astype(np.uint8), own.hue)


Change = Shift | Rotation | Jittered  # of the frames of clips, when they are read


def rotate_hues(frames: Frames, degrees: float) -> Frames:
    """Rotate all hues; saturation and value, as HSV has them, stay."""
    red, green, blue = (frames[..., channel].astype(np.float32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    whole = np.maximum(chroma, 1)  # of a grey, which has no hue, nothing is added below
    sextant = np.where(
        value == red,
        (green - blue) / whole,
        np.where(value == green, 2 + (blue - red) / whole, 4 + (red - green) / whole),
    )
    turned = np.empty_like(frames)
    for channel, start in enumerate((5, 3, 1)):
        place = sextant + np.float32(start + degrees / 60)
        place -= 6 * np.floor(place / 6)  # twice as fast as %
        turned[..., channel] = np.rint(value - chroma * np.clip(np.minimum(place, 4 - place), 0, 1))
    return turned


def blur(frames: Frames, deviation: float) -> Frames:
    """Blur by a Gaussian, which the border cuts off; its deviation is in pixels of a `BLURRED_SIDE`."""
    _, height, width, _ = frames.shape
    own = deviation * min(height, width) / BLURRED_SIDE
    planes = np.moveaxis(frames, -1, 1).astype(np.float32)  # (T, 3, H, W)
    blurred = _gaussian(height, own) @ planes @ _gaussian(width, own).T
    return np.moveaxis(np.rint(blurred).astype(np.uint8), 1, -1)


def _gaussian(size: int, deviation: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return what every place takes of every other, (size, size); rows sum up to 1."""
    places = np.arange(size)
    weights = np.exp(-((places[:, None] - places) ** 2) / (2 * deviation**2))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def add_noise(frames: Frames, deviation: float, name: str) -> Frames:
    """Add Gaussian noise of so many levels, which follows from a name: the same whenever the clip is read."""
    noise = np.random.default_rng(_hash_name(name)).standard_normal(frames.shape, dtype=np.float32)
    return np.rint(frames + np.float32(deviation) * noise).clip(0, 255).astype(np.uint8)


def darken(frames: Frames, factor: float) -> Frames:
    """Multiply all levels by a factor, which leaves fewer of them."""
    return np.rint(frames * np.float32(factor)).astype(np.uint8)


def _hash_name(name: str) -> int:
    """Return a whole number that follows from a name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
