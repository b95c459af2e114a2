"""Model that the cloud serves: a bundle of `make export` in memory, and the layers that its generator computes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CheckpointError, DataError
from cdc_mmpg.files import hash_json
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.wire.messages import UPLOAD_BYTES, Layout, Upload, Versions, compute_digest, encode_layer

WEIGHT_PRECISIONS = ("float32", "bfloat16")
DENORMAL_CUTOFF = 1e-12  # smaller magnitudes in a feature become 0: denormals slow CPUs about 100x


class CloudBundle(NamedTuple):
    """A cloud bundle with verified parts; the weights are not loaded yet."""

    name: str
    versions: Versions
    key: Ed25519PrivateKey  # signs layers
    weights: str  # "float32" or "bfloat16"


class ServedModel(NamedTuple):
    """A cloud bundle loaded into memory."""

    name: str
    generator: Generator
    layouts: list[Layout]
    versions: Versions
    key: Ed25519PrivateKey
    device: torch.device
    weights: str  # "float32" or "bfloat16"


def read_cloud_bundle(folder: Path) -> CloudBundle:
    """Read and verify a cloud bundle written by `make export`.

    Raises:
        CheckpointError: the folder is not a cloud bundle, is damaged, or its files do not belong together.
    """
    part = folder / "cloud.json"
    try:
        settings = json.loads(part.read_text(encoding="utf-8"))
        if settings.pop("digest", None) != hash_json(settings):
            raise ValueError("changed since the export, or written by an older version")
        versions = Versions(bytes.fromhex(settings["encoder"]), bytes.fromhex(settings["generator"]))
        public = settings["public_key"]
        name, weights = str(settings["name"]), WEIGHT_PRECISIONS[WEIGHT_PRECISIONS.index(settings["weights"])]
        part = folder / "signing_key.pem"
        key = load_pem_private_key(part.read_bytes(), password=None)
        part = folder / "generator.safetensors"
        stored = compute_digest(part.read_bytes())
    except Exception as error:  # the files may contain anything
        raise CheckpointError(
            f"{part}: not a valid file of a cloud bundle ({type(error).__name__}: {error}): run make export"
        ) from error
    if stored != versions.generator:
        raise CheckpointError(f"{folder}: generator.safetensors does not match cloud.json: export again")
    if not isinstance(key, Ed25519PrivateKey) or key.public_key().public_bytes_raw().hex() != public:
        raise CheckpointError(f"{folder}: signing_key.pem is not the key that devices trust: restore or export again")
    return CloudBundle(name, versions, key, weights)


def load_model(folder: Path, weights: str = "") -> ServedModel:
    """Load a cloud bundle into memory, on a GPU if there is one, and test it with one upload.

    Args:
        folder: folder of the bundle.
        weights: precision of the weights, "float32" or "bfloat16"; "" for the bundle's choice.

    Raises:
        CheckpointError: see `read_cloud_bundle`; or the generator's output is not finite.
    """
    bundle = read_cloud_bundle(folder)
    generator = Generator.load(folder / "generator.safetensors")
    weights = weights or bundle.weights
    if weights == "bfloat16":
        generator.round_weights()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    served = ServedModel(
        bundle.name, generator.to(device), generator.layouts(), bundle.versions, bundle.key, device, weights
    )
    zeros = Upload(served.layouts[0], served.versions, torch.zeros(FEATURE_DIM).numpy())
    try:
        generate_layer(served, bytes(UPLOAD_BYTES), zeros)  # warm-up, which the first request would otherwise wait for
    except DataError as error:
        raise CheckpointError(f"{folder / 'generator.safetensors'}: {error}: train and export again") from error
    return served


def describe_model(served: ServedModel) -> dict[str, Any]:
    """Describe the served model for `/ready` and the log: name, versions, precision, kinds of layers."""
    versions = {name: value.hex() for name, value in served.versions._asdict().items()}
    kinds = [layout.kind for layout in served.layouts]
    return {"model": served.name, **versions, "weights": served.weights, "kinds": kinds}


def generate_layers(served: ServedModel, waiting: Sequence[tuple[bytes, Upload]]) -> list[bytes | DataError]:
    """Return the encoded and signed layers for uploads, given as pairs of raw bytes and decoded upload.

    A layer that its precision cannot represent is returned as an error; the other uploads are not affected.
    """
    uploads = torch.stack([torch.from_numpy(upload.feature.copy()) for _, upload in waiting]).to(served.device)
    uploads[uploads.abs() < DENORMAL_CUTOFF] = 0
    with torch.inference_mode():
        parts = served.generator(uploads)
        matrices_by_kind = {}
        for kind in dict.fromkeys(upload.layout.kind for _, upload in waiting):
            matrices_by_kind[kind] = [part.cpu().numpy() for part in served.generator.matrices(parts, kind)]
    layers: list[bytes | DataError] = []
    for i, (content, upload) in enumerate(waiting):
        matrices = [part[i] for part in matrices_by_kind[upload.layout.kind]]
        try:
            layers.append(encode_layer(matrices, content, upload.layout, served.versions, served.key))
        except DataError as error:
            layers.append(error)
    return layers


def generate_layer(served: ServedModel, content: bytes, upload: Upload) -> bytes:
    """Return the encoded and signed layer for one upload.

    Raises:
        DataError: the requested precision cannot represent the layer.
    """
    layer = generate_layers(served, [(content, upload)])[0]
    if isinstance(layer, DataError):
        raise layer
    return layer
