"""What the cloud serves: a bundle of `make export` in memory, and the layers that its generator makes of uploads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CheckpointError, DataError
from cdc_mmpg.files import json_digest
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.wire.messages import UPLOAD_BYTES, Layout, Upload, Versions, digest, encode_layer

WEIGHT_PRECISIONS = ("float32", "bfloat16")
DENORMAL_CUTOFF = 1e-12  # smaller magnitudes in a feature become 0: denormals slow CPUs about 100x


class CloudBundle(NamedTuple):
    """A cloud bundle whose parts belong together; the weights are not read yet."""

    name: str
    versions: Versions
    key: Ed25519PrivateKey  # signs layers
    weights: str  # "float32" or "bfloat16"


class ServedModel(NamedTuple):
    """A cloud bundle in memory."""

    name: str
    generator: Generator
    layouts: list[Layout]
    versions: Versions
    key: Ed25519PrivateKey
    device: torch.device
    weights: str  # "float32" or "bfloat16"


def read_cloud_bundle(folder: Path) -> CloudBundle:
    """Read a cloud bundle as `make export` wrote it.

    Raises:
        CheckpointError: it is none, damaged, or its parts do not belong together.
    """
    part = folder / "cloud.json"
    try:
        settings = json.loads(part.read_text(encoding="utf-8"))
        if settings.pop("digest", None) != json_digest(settings):
            raise ValueError("changed since it was exported, or of an older export")
        versions = Versions(bytes.fromhex(settings["encoder"]), bytes.fromhex(settings["generator"]))
        public = settings["public_key"]
        name, weights = str(settings["name"]), WEIGHT_PRECISIONS[WEIGHT_PRECISIONS.index(settings["weights"])]
        part = folder / "signing_key.pem"
        key = load_pem_private_key(part.read_bytes(), password=None)
        part = folder / "generator.safetensors"
        stored = digest(part.read_bytes())
    except Exception as error:  # whatever stands there
        raise CheckpointError(
            f"{part}: not a part of a cloud bundle ({type(error).__name__}: {error}): make export writes one"
        ) from error
    if stored != versions.generator:
        raise CheckpointError(f"{folder}: generator.safetensors is not the one that cloud.json tells of: export anew")
    if not isinstance(key, Ed25519PrivateKey) or key.public_key().public_bytes_raw().hex() != public:
        raise CheckpointError(f"{folder}: signing_key.pem is not the key that devices know: restore it, or export anew")
    return CloudBundle(name, versions, key, weights)


def load_model(folder: Path, weights: str = "") -> ServedModel:
    """Load a cloud bundle into memory, on a GPU where there is one, and try it with one upload.

    Args:
        folder: the bundle.
        weights: their precision, in place of the bundle's choice.

    Raises:
        CheckpointError: see `read_cloud_bundle`; or the generator makes numbers that are not finite.
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
        generate_layer(served, bytes(UPLOAD_BYTES), zeros)  # what the first request would wait for
    except DataError as error:
        raise CheckpointError(f"{folder / 'generator.safetensors'}: {error}: train and export anew") from error
    return served


def describe_model(served: ServedModel) -> dict[str, Any]:
    """Return what is served as `/ready` and the log say it: name, versions, precision, kinds of layers."""
    versions = {name: value.hex() for name, value in served.versions._asdict().items()}
    kinds = [layout.kind for layout in served.layouts]
    return {"model": served.name, **versions, "weights": served.weights, "kinds": kinds}


def generate_layers(served: ServedModel, waiting: Sequence[tuple[bytes, Upload]]) -> list[bytes | DataError]:
    """Return the layers for uploads (as they came, and as they were read), each encoded and signed.

    A layer that its precision cannot hold is the error of its own upload; the others are answered.
    """
    uploads = torch.stack([torch.from_numpy(upload.feature.copy()) for _, upload in waiting]).to(served.device)
    uploads[uploads.abs() < DENORMAL_CUTOFF] = 0
    with torch.inference_mode():
        parts = served.generator(uploads)
        sent = {}
        for kind in dict.fromkeys(upload.layout.kind for _, upload in waiting):
            sent[kind] = [part.cpu().numpy() for part in served.generator.matrices(parts, kind)]
    layers: list[bytes | DataError] = []
    for place, (content, upload) in enumerate(waiting):
        matrices = [part[place] for part in sent[upload.layout.kind]]
        try:
            layers.append(encode_layer(matrices, content, upload.layout, served.versions, served.key))
        except DataError as error:
            layers.append(error)
    return layers


def generate_layer(served: ServedModel, content: bytes, upload: Upload) -> bytes:
    """Return the layer for one upload.

    Raises:
        DataError: its precision cannot hold it.
    """
    layer = generate_layers(served, [(content, upload)])[0]
    if isinstance(layer, DataError):
        raise layer
    return layer
