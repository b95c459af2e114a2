"""ONNX graphs of the encoder and the head, and their quantisation to 8 bits."""

import copy
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript import optimizer
from torch import Tensor, nn

from cdc_mmpg.data.batch import normalise
from cdc_mmpg.deployment.source import Source
from cdc_mmpg.methods.answering import Answering
from cdc_mmpg.models.all_in_one import AllInOne

MIN_HALVED_NUMBERS = 10_000  # least number of elements of a tensor that is stored as float16 in the int8 bundle
MAX_FOLDED_NUMBERS = 1 << 22  # largest number of elements of a constant that is folded at export


def export_encoder(source: Source) -> "onnx.ModelProto":
    """Export the encoder for one clip: frames (T, S, S, 3) uint8, ids (1, L), no padding -> features (T, 192)."""
    encoder: AllInOne = copy.deepcopy(source.method.encoder).float().eval()
    table = encoder.text_embeddings.word_embeddings.weight.detach()
    encoder.text_embeddings.word_embeddings = nn.Embedding.from_pretrained(table[source.kept])
    time = encoder.transformer.temporal_embed.detach()
    max_frames = max(3, time.shape[1])  # the exporter specialises dimensions of 1, and ranges with one value
    padded = torch.cat([time, time.new_zeros(1, max_frames - time.shape[1], time.shape[2])], dim=1)
    encoder.transformer.temporal_embed = nn.Parameter(padded)
    encoder.num_frames = max_frames

    class OneClip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, frames: "Tensor", ids: "Tensor") -> "Tensor":
            return encoder.encode_clip(normalise(frames[None]), ids)

    size, length = source.frames["size"], min(8, source.text_length)
    frames = torch.zeros(max_frames, size, size, 3, dtype=torch.uint8)
    ids = torch.ones(1, length, dtype=torch.long)
    dim = torch.export.Dim
    shapes = {"frames": {0: dim("frames", min=2, max=max_frames)},
              "ids": {1: dim("length", min=2, max=source.text_length)}}  # fmt: skip
    return _export_onnx(OneClip(), (frames, ids), ["frames", "ids"], ["features"], shapes)


def export_head(method: "Answering") -> "onnx.ModelProto":
    """Export the head: features (K, T, 192) of a clip with K texts, a layer (L, D + 1) -> scores, upload (192,)."""
    choosing = method.head.task == "multiple_choice"

    class OneSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.method = method

        def forward(self, features: "Tensor", layer: "Tensor") -> tuple["Tensor", "Tensor"]:
            sample = features[None] if choosing else features  # (1, K, T, 192) or (1, T, 192)
            upload = method.upload(method.head.condition(sample))
            scores = method.head(method.fuse(sample), lambda hidden: hidden @ layer[:, :-1].T + layer[:, -1])
            return scores.flatten(), upload.flatten()

    max_frames = max(3, method.encoder.num_frames) if method.reads == "sessions" else method.encoder.num_frames
    features = torch.zeros(5 if choosing else 1, max_frames, 192)
    layer = torch.zeros(method.head.outputs, method.head.inputs + 1)
    dim = torch.export.Dim
    shapes: dict[str, dict[int, Any]] = {"features": {}, "layer": {}}
    if method.reads == "sessions":  # an anchor is one frame
        shapes["features"][1] = dim("frames", min=2, max=max_frames)
    if choosing:
        shapes["features"][0] = dim("choices", min=2, max=64)
    return _export_onnx(OneSample(), (features, layer), ["features", "layer"], ["scores", "upload"], shapes)


def _export_onnx(
    module: Any, example: tuple[Any, ...], inputs: list[str], outputs: list[str], shapes: dict[str, Any]
) -> "onnx.ModelProto":
    """Export a module as ONNX, without debug information."""
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            module.eval(), example, dynamo=True, input_names=inputs, output_names=outputs, dynamic_shapes=shapes,
            verbose=False,
        )  # fmt: skip
    assert program is not None
    optimizer.optimize_ir(program.model, input_size_limit=MAX_FOLDED_NUMBERS, output_size_limit=MAX_FOLDED_NUMBERS)
    model = program.model_proto
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    return model


def halve(content: bytes) -> bytes:
    """Store the large float32 tensors of an ONNX model as float16; onnxruntime widens them when it loads the model."""
    model = onnx.load_from_string(content)
    casts = []
    for tensor in list(model.graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) >= MIN_HALVED_NUMBERS:
            name = f"{tensor.name}.half"
            half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), name)
            model.graph.initializer.remove(tensor)
            model.graph.initializer.append(half)
            casts.append(helper.make_node("Cast", [name], [tensor.name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def quantise(content: bytes, scratch: Path) -> bytes:
    """Quantise the matrices, word table and patch embedding of an ONNX model to 8 bits; activations at run time.

    Weights are unsigned, as activations are: x86 processors without VNNI multiply unsigned by signed numbers with an
    instruction that adds pairs of products in 16 bits, where full-range signed weights overflow silently.

    Source: onnxruntime's dynamic quantisation, with a scale and a zero point per output; its documentation recommends
    unsigned weights, or signed ones of 7 bits. Measured with random weights at the paper's size, relative to full-range
    signed weights with VNNI: unsigned 0.83 times the error of the features in 1.4 times the time, 7 bits 1.6 times the
    error in the same time. ARM processors, as in phones, have an instruction for unsigned weights.
    """
    original, quantised = scratch / "original.onnx", scratch / "quantised.onnx"
    original.write_bytes(content)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime recommends a preprocessing that has no effect here
    try:
        quantize_dynamic(
            original, quantised, op_types_to_quantize=["MatMul", "Gather", "Conv"], per_channel=True,
            weight_type=QuantType.QUInt8,
        )  # fmt: skip
    finally:
        logging.getLogger().setLevel(level)
    return quantised.read_bytes()
