"""The cloud's generator: uploaded feature -> reasoner or axes -> hypernetwork -> numbers to send."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CheckpointError, DataError
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.fda import FDA, Adaptor, BasisFDA, LowRankFDA, Parts
from cdc_mmpg.models.weights import read_metadata, read_state_dict, save_safetensors
from cdc_mmpg.wire.messages import LayerKind, Layout

SETTINGS_KEY = "generator"  # metadata key of the settings from which `load` rebuilds a generator


class Generator(nn.Module):
    """Generator from uploads (B, 192) to the parts of last layers to send; deterministic in evaluation mode.

    Args:
        reader: module before the adaptor: the paper's reasoner, the axes of a session, a LayerNorm, or an identity.
        adaptor: the hypernetwork.
    """

    def __init__(self, reader: nn.Module, adaptor: Adaptor) -> None:
        super().__init__()
        self.reader, self.adaptor = reader, adaptor

    @property
    def native(self) -> LayerKind:
        """The most compact kind of layer that a device with this adaptor can install."""
        return "low_rank" if isinstance(self.adaptor, LowRankFDA) else "basis" if self._is_basis else "float32"

    @property
    def _is_basis(self) -> bool:
        return isinstance(self.adaptor, BasisFDA)

    def layouts(self) -> list[Layout]:
        """Return all layouts that can be sent: the full layer in every precision, and the adaptor's compact kind."""
        outputs, columns = self.adaptor.outputs, self.adaptor.inputs + 1
        precisions: tuple[LayerKind, ...] = ("float32", "float16", "int8")
        layouts = [Layout(kind, outputs, columns) for kind in precisions]
        if self.native != "float32":
            number = self.adaptor.shapes[0][1 if self._is_basis else 0]
            layouts.append(Layout(self.native, outputs, columns, number))
        return layouts

    def read(self, uploads: Tensor) -> Tensor:
        """Return the adaptor's input (B, 192) for uploads (B, 192)."""
        if isinstance(self.reader, ADR):
            return self.reader(uploads, sample=False).generated
        return self.reader(uploads)

    def forward(self, uploads: Tensor) -> Parts:
        """Return the parts that the adaptor generates from uploads (B, 192)."""
        return self.adaptor.parts(self.read(uploads))

    def matrices(self, parts: Parts, kind: LayerKind) -> Parts:
        """Return the matrices (B, vectors, length) to send as `kind`: the parts, or the full layers made from them."""
        if kind == self.native or isinstance(self.adaptor, FDA):
            return parts
        weight, bias = self.adaptor.install(parts)
        return (torch.cat([weight, bias.unsqueeze(-1)], dim=-1),)

    def round_weights(self) -> None:
        """Round the hypernetwork's linear layer to bfloat16: reading it from memory limits the request rate."""
        hyper = getattr(self.adaptor, "hyper", None)
        if hyper is not None:
            hyper.bfloat16()
            hyper.register_forward_pre_hook(lambda _, inputs: inputs[0].bfloat16())
            hyper.register_forward_hook(lambda *arguments: arguments[2].float())

    def save(self, path: Path) -> None:
        """Write the weights as safetensors, with the settings that `load` needs."""
        reader: dict[str, Any] = {"kind": "nothing"}
        if isinstance(self.reader, ADR):
            reader = {"kind": "adr", "preset": self.reader.preset, "axis": self.reader.axis,
                      "target": self.reader.target}  # fmt: skip
        elif isinstance(self.reader, DeviceAxes):
            reader = {"kind": "axes", "number": self.reader.axes.shape[1]}
        elif isinstance(self.reader, nn.LayerNorm):
            reader = {"kind": "norm"}
        adaptor = {"kind": self.native, "inputs": self.adaptor.inputs, "outputs": self.adaptor.outputs}
        if isinstance(self.adaptor, FDA):
            adaptor["project"] = not isinstance(self.adaptor.mlp, nn.Identity)
        else:
            adaptor["number"] = self.layouts()[-1].number
        settings = json.dumps({"reader": reader, "adaptor": adaptor})
        save_safetensors(self.state_dict(), path, {SETTINGS_KEY: settings})

    @classmethod
    def load(cls, path: Path) -> "Generator":
        """Load a generator written by `save`, frozen and in evaluation mode.

        Raises:
            CheckpointError: the file is missing, unreadable, or not a generator.
        """
        state = read_state_dict(path)
        try:
            settings = json.loads(read_metadata(path)[SETTINGS_KEY])
            generator = cls(_build_reader(**settings["reader"]), _build_adaptor(**settings["adaptor"]))
            generator.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: not a generator ({str(error).splitlines()[-1].strip()}): write one with make export"
            ) from error
        return generator.requires_grad_(False).eval()


def _build_reader(kind: str, **settings: Any) -> nn.Module:
    if kind == "adr":
        return ADR(settings["preset"], settings["axis"], settings["target"])
    if kind == "axes":
        return DeviceAxes(settings["number"])
    if kind == "norm":
        return nn.LayerNorm(FEATURE_DIM, elementwise_affine=False)
    if kind == "nothing":
        return nn.Identity()
    raise DataError(f"unknown reader {kind!r}")


def _build_adaptor(kind: str, inputs: int, outputs: int, number: int = 0, project: bool = False) -> Adaptor:
    if kind == "float32":
        return FDA(inputs, outputs, "printed", project)
    if kind == "low_rank":
        return LowRankFDA(inputs, outputs, number)
    if kind == "basis":
        return BasisFDA(inputs, outputs, number)
    raise DataError(f"unknown adaptor {kind!r}")
