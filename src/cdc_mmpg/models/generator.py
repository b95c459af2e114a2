"""What the cloud serves: an uploaded feature -> reasoner or axes -> hypernetwork -> the numbers that are sent."""

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

METADATA = "generator"  # where a file says how it is built


class Generator(nn.Module):
    """Uploads (B, 192) -> what is sent of their last layers, in evaluation: the same upload, the same layer.

    Args:
        reader: what stands before the adaptor: the paper's reasoner, the axes of a session, a LayerNorm, or nothing.
        adaptor: the hypernetwork.
    """

    def __init__(self, reader: nn.Module, adaptor: Adaptor) -> None:
        super().__init__()
        self.reader, self.adaptor = reader, adaptor

    @property
    def native(self) -> LayerKind:
        """The smallest that this adaptor's device can take."""
        return "low_rank" if isinstance(self.adaptor, LowRankFDA) else "basis" if self._mixes else "float32"

    @property
    def _mixes(self) -> bool:
        return isinstance(self.adaptor, BasisFDA)

    def layouts(self) -> list[Layout]:
        """Return all that can be sent: the whole layer in every precision, and what the adaptor makes itself."""
        outputs, columns = self.adaptor.outputs, self.adaptor.inputs + 1
        whole: tuple[LayerKind, ...] = ("float32", "float16", "int8")
        found = [Layout(kind, outputs, columns) for kind in whole]
        if self.native != "float32":
            number = self.adaptor.shapes[0][1 if self._mixes else 0]
            found.append(Layout(self.native, outputs, columns, number))
        return found

    def read(self, uploads: Tensor) -> Tensor:
        """Return what the adaptor reads: (B, 192) both."""
        if isinstance(self.reader, ADR):
            return self.reader(uploads, sample=False).generated
        return self.reader(uploads)

    def forward(self, uploads: Tensor) -> Parts:
        """Return what the adaptor makes of uploads (B, 192)."""
        return self.adaptor.parts(self.read(uploads))

    def matrices(self, parts: Parts, kind: LayerKind) -> Parts:
        """Return what is sent of them, matrices (B, vectors, length): the parts themselves, or the layers they make."""
        if kind == self.native or isinstance(self.adaptor, FDA):
            return parts
        weight, bias = self.adaptor.install(parts)
        return (torch.cat([weight, bias.unsqueeze(-1)], dim=-1),)

    def round_weights(self) -> None:
        """Round the hypernetwork's linear layer to bfloat16: half to read from memory, which requests wait for."""
        hyper = getattr(self.adaptor, "hyper", None)
        if hyper is not None:
            hyper.bfloat16()
            hyper.register_forward_pre_hook(lambda _, inputs: inputs[0].bfloat16())
            hyper.register_forward_hook(lambda *arguments: arguments[2].float())

    def save(self, path: Path) -> None:
        """Write the weights as safetensors, with what `load` needs to build the rest."""
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
        save_safetensors(self.state_dict(), path, {METADATA: settings})

    @classmethod
    def load(cls, path: Path) -> "Generator":
        """Load a generator as `save` left it, in evaluation.

        Raises:
            CheckpointError: absent, unreadable, or not a generator.
        """
        state = read_state_dict(path)
        try:
            settings = json.loads(read_metadata(path)[METADATA])
            generator = cls(_reader(**settings["reader"]), _adaptor(**settings["adaptor"]))
            generator.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: not a generator ({str(error).splitlines()[-1].strip()}): make export writes one"
            ) from error
        return generator.requires_grad_(False).eval()


def _reader(kind: str, **settings: Any) -> nn.Module:
    if kind == "adr":
        return ADR(settings["preset"], settings["axis"], settings["target"])
    if kind == "axes":
        return DeviceAxes(settings["number"])
    if kind == "norm":
        return nn.LayerNorm(FEATURE_DIM, elementwise_affine=False)
    if kind == "nothing":
        return nn.Identity()
    raise DataError(f"unknown reader {kind!r}")


def _adaptor(kind: str, inputs: int, outputs: int, number: int = 0, project: bool = False) -> Adaptor:
    if kind == "float32":
        return FDA(inputs, outputs, "printed", project)
    if kind == "low_rank":
        return LowRankFDA(inputs, outputs, number)
    if kind == "basis":
        return BasisFDA(inputs, outputs, number)
    raise DataError(f"unknown adaptor {kind!r}")
