"""The cloud's bundle: a generator, what it belongs to, and the key that signs its layers."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cdc_mmpg.deployment.bundle_files import CLOUD_SETTINGS, GENERATOR, SIGNING_KEY, write_settings
from cdc_mmpg.errors import CheckpointError
from cdc_mmpg.files import atomic_write
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.results import provenance
from cdc_mmpg.wire.messages import Versions, digest

TIMED_MIN_WEIGHTS = 1_000_000  # of a generator, from which their precision matters to its speed
BFLOAT16_MIN_SPEEDUP = 1.1  # over float32, for bfloat16 to be chosen


class WrittenCloudBundle(NamedTuple):
    """Key, versions and measured speed of a cloud bundle that was written."""

    key: "Ed25519PrivateKey"
    versions: Versions
    speed: dict[str, Any]  # what `choose_weight_precision` returns


def write_cloud_bundle(generator: "Generator", encoder: bytes, name: str, folder: Path) -> WrittenCloudBundle:
    """Write a cloud bundle, whose key stays where there is one, and return what belongs to it.

    Args:
        generator: on the processor.
        encoder: digest of the encoder whose features it reads.
        name: <dataset>/<method>.
        folder: where to.

    Raises:
        CheckpointError: the key that is there cannot be read.
        CDCError: a file cannot be written.
    """
    key = load_or_create_key(folder / SIGNING_KEY)
    generator.save(folder / GENERATOR)
    versions = Versions(encoder, digest((folder / GENERATOR).read_bytes()))
    speed = choose_weight_precision(folder / GENERATOR)
    digests = {name: value.hex() for name, value in versions._asdict().items()}
    public = key.public_key().public_bytes_raw().hex()
    write_settings({"name": name, "public_key": public, **digests, **speed, **provenance()}, folder / CLOUD_SETTINGS)
    return WrittenCloudBundle(key, versions, speed)


def load_or_create_key(path: Path) -> "Ed25519PrivateKey":
    """Return the key in a file, which is made first where there is none: readable by its owner alone.

    Raises:
        CheckpointError: there is a file, and it holds no such key, or others may read it.
        CDCError: it cannot be written.
    """
    if not os.path.lexists(path):
        content = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with atomic_write(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
    try:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a key ({error}): restore it, or delete it and export anew") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CheckpointError(f"{path}: not an Ed25519 key: delete it and export anew")
    return key


def choose_weight_precision(path: Path) -> dict[str, Any]:
    """Return the precision in which this machine should hold the weights, and the measured milliseconds by batch."""
    if sum(value.numel() for value in Generator.load(path).state_dict().values()) < TIMED_MIN_WEIGHTS:
        return {"weights": "float32"}
    milliseconds: dict[str, dict[str, float]] = {}
    for precision in ("float32", "bfloat16"):
        generator = Generator.load(path)
        if precision == "bfloat16":
            generator.round_weights()
        milliseconds[precision] = {}
        for batch in (1, 8):
            uploads = torch.zeros(batch, 192)
            with torch.inference_mode():
                times = [_measure_seconds(partial(generator, uploads)) for _ in range(6)]
            milliseconds[precision][str(batch)] = 1000 * min(times)
    faster = all(
        milliseconds["float32"][batch] > BFLOAT16_MIN_SPEEDUP * milliseconds["bfloat16"][batch] for batch in ("1", "8")
    )
    return {"weights": "bfloat16" if faster else "float32", "milliseconds": milliseconds}


def _measure_seconds(run: Callable[[], Any]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start
