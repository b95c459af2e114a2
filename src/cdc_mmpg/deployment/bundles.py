"""Bundles of a method: two for a device, in float32 and with an int8 encoder, and one for the cloud.

The encoder is exported for one clip and any number of frames up to T. The last layer is an input of the head, so that
a new layer needs no new onnxruntime session. A device trusts the author of its bundle: digests detect damage, not
forgery.
"""

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from cdc_mmpg.deployment.bundle_files import count_folder_bytes, write_content, write_settings
from cdc_mmpg.deployment.checks import compare_with_torch
from cdc_mmpg.deployment.cloud_bundle import write_cloud_bundle
from cdc_mmpg.deployment.graphs import export_encoder, export_head, halve, quantise
from cdc_mmpg.deployment.source import Source
from cdc_mmpg.device.model import (
    ANSWERS_FILE,
    BASIS_FILE,
    BUNDLE_FILE,
    BUNDLE_FORMAT,
    ENCODER_FILE,
    HEAD_FILE,
    LAYER_DTYPES,
    SHARED_FILE,
    TOKENIZER_FILE,
)
from cdc_mmpg.device.page import DEVICE_FOLDERS
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CheckpointError
from cdc_mmpg.files import hash_file
from cdc_mmpg.media.text import build_tokenizer
from cdc_mmpg.methods.answering import Answering
from cdc_mmpg.results import describe_provenance
from cdc_mmpg.wire.messages import compute_digest

MAX_SCORE_DIFFERENCE = 1e-4  # largest absolute difference of the float32 bundle's scores from torch's


def write_bundles(source: Source, out: Path) -> dict[str, Any]:
    """Write the bundles, check the float32 one against torch, and return their entries of the export report.

    Raises:
        CheckpointError: the float32 bundle's scores differ from torch's by more than `MAX_SCORE_DIFFERENCE`.
        CDCError: a file cannot be written.
    """
    start = perf_counter()
    method = source.method
    with torch.no_grad():
        served = method.deployment_parts()
    layouts = {layout.kind: layout for layout in served.generator.layouts()}
    kind = served.generator.native
    layout = layouts[getattr(method, "payload", kind) if kind == "float32" else kind]
    unit = "session" if method.reads == "sessions" else "sample"
    cloud = write_cloud_bundle(served.generator, digest_device_weights(method), source.name, out / "cloud")
    versions = {"encoder": cloud.versions.encoder.hex(), "generator": cloud.versions.generator.hex()}
    origin = {"name": source.name, "made": datetime.now(UTC).isoformat(timespec="seconds"), **describe_provenance()}

    settings = {
        "format": BUNDLE_FORMAT,
        "task": source.task,
        "unit": unit,
        "layout": list(layout),
        **versions,
        "public_key": cloud.key.public_key().public_bytes_raw().hex(),
        "frames": source.frames,
        "text": {"length": source.text_length, "known": len(source.kept)},
        **origin,
    }
    basis = getattr(served.generator.adaptor, "basis", None)
    models = {ENCODER_FILE: export_encoder(source), HEAD_FILE: export_head(method)}
    kept = set(source.kept)
    ordered = [source.words[i] for i in source.kept]
    ordered += [word for i, word in enumerate(source.words) if i not in kept]
    for precision, name in DEVICE_FOLDERS.items():
        folder = out / name
        with tempfile.TemporaryDirectory() as scratch:
            for file, model in models.items():
                content = model.SerializeToString()
                if precision == "int8":
                    content = halve(quantise(content, Path(scratch)) if file == ENCODER_FILE else content)
                write_content(folder / file, content)
        arrays = {SHARED_FILE: served.offline} | ({BASIS_FILE: basis.detach()} if basis is not None else {})
        for file, array in arrays.items():
            write_content(folder / file, array.numpy().astype(LAYER_DTYPES[precision]).tobytes())
        write_content(folder / TOKENIZER_FILE, build_tokenizer(ordered).to_str().encode())
        write_content(folder / ANSWERS_FILE, json.dumps(source.answers).encode())
        digests = {file: hash_file(folder / file) for file in (*models, *arrays, TOKENIZER_FILE, ANSWERS_FILE)}
        write_settings({**settings, "precision": precision, "files": digests}, folder / BUNDLE_FILE)

    difference = compare_with_torch(source, out / DEVICE_FOLDERS["float32"])
    if not difference <= MAX_SCORE_DIFFERENCE:
        raise CheckpointError(
            f"{out}: the exported scores differ from torch's by {difference}, more than {MAX_SCORE_DIFFERENCE}"
        )
    return {
        "name": source.name,
        "task": source.task,
        "unit": unit,
        "layout": layout._asdict(),
        "bytes": {
            **{name: count_folder_bytes(out / name) for name in (*DEVICE_FOLDERS.values(), "cloud")},
            "up": 4 * FEATURE_DIM,
            "down": {kind: layout.payload_bytes for kind, layout in layouts.items()},
        },
        "words": {"vocabulary": len(source.words), "kept": len(source.kept)},
        "largest_difference": difference,
        "generator": cloud.speed,
        "seconds": perf_counter() - start,
        **origin,
    }


def digest_device_weights(method: "Answering") -> bytes:
    """Return the digest of the weights that a device shares with its generator: encoder and static part of the head."""
    content = b"".join(
        name.encode() + value.cpu().contiguous().numpy().tobytes()
        for module in (method.encoder, method.head)
        for name, value in module.state_dict().items()
    )
    return compute_digest(content)
