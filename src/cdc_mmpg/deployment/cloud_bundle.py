"""Cloud bundle: a generator, its versions, and the key that signs its layers."""

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
from cdc_mmpg.results import describe_provenance
from cdc_mmpg.wire.messages import Versions, compute_digest

TIMED_MIN_WEIGHTS = 1_000_000  # number of weights from which their precision affects a generator's speed
BFLOAT16_MIN_SPEEDUP = 1.1  # speedup over float32 from which bfloat16 is chosen


class WrittenCloudBundle(NamedTuple):
    """Key, versions and measured speed of a written cloud bundle."""

    key: "Ed25519PrivateKey"
    versions: Versions
    speed: dict[str, Any]  # result of `choose_weight_precision`


def write_cloud_bundle(generator: "Generator", encoder: bytes, name: str, folder: Path) -> WrittenCloudBundle:
    """Write a cloud bundle and return its key, versions and speed; an existing signing key is kept.

    Args:
        generator: generator on the CPU.
        encoder: digest of the encoder whose features the generator reads.
        name: name of the model, <dataset>/<method>.
        folder: folder of the bundle.

    Raises:
        CheckpointError: the existing key cannot be read.
        CDCError: a file cannot be written.
    """
    key = load_or_create_key(folder / SIGNING_KEY)
    generator.save(folder / GENERATOR)
    versions = Versions(encoder, compute_digest((folder / GENERATOR).read_bytes()))
    speed = choose_weight_precision(folder / GENERATOR)
    digests = {name: value.hex() for name, value in versions._asdict().items()}
    public = key.public_key().public_bytes_raw().hex()
    write_settings(
        {"name": name, "public_key": public, **digests, **speed, **describe_provenance()}, folder / CLOUD_SETTINGS
    )
    return WrittenCloudBundle(key, versions, speed)


def load_or_create_key(path: Path) -> "Ed25519PrivateKey":
    """Return the key in a file; if the file is missing, create it, readable by its owner only.

    Raises:
        CheckpointError: the file exists and is not such a key, or its mode cannot be set to owner-only.
        CDCError: the file cannot be written.
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
        raise CheckpointError(
            f"{path}: cannot be used as the signing key ({error}): restore it, or delete it and export again; devices "
            "then need the new bundle"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CheckpointError(
            f"{path}: not an Ed25519 key: delete it and export again; devices then need the new bundle"
        )
    return key


def choose_weight_precision(path: Path) -> dict[str, Any]:
    """Choose the faster precision of the weights on this machine; return it with the milliseconds by batch size."""
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
