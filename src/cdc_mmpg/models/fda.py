"""Fast Domain Adaptor (paper section 3.2): a hypernetwork that turns a feature into the weights of the last layer."""

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.models.processes import sum_over_processes
from cdc_mmpg.wire.payloads import INT8_MAX, Precision

Init = Literal["printed", "hyperfan_in", "shared_head"]
Parts = tuple[Tensor, ...]  # what the cloud sends: matrices (..., vectors, length)


class StaticLayer(nn.Linear):
    """A last layer that is trained, not generated: the same for every sample."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer, (..., D) -> (..., L), in float32 as the generated ones."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())

    def repeated(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the layer as `batch` devices install it: weight (B, L, D), bias (B, L)."""
        return self.weight.expand(batch, -1, -1), self.bias.expand(batch, -1)


class Adaptor(nn.Module):
    """Feature (..., 192) -> what the cloud sends -> a last layer of L outputs on D inputs.

    A feature's dimensions before the last are those of what the layer reads, or 1 where several hidden vectors share
    a layer. What is sent, and what is made of it, is computed in float32.

    Attributes:
        inputs: D, hidden units that the last layer reads.
        outputs: L, what the last layer tells apart.
        shapes: of the matrices that are sent: vectors, and their length.
    """

    seen: Tensor  # steps of training in which layers were generated

    def __init__(self, inputs: int, outputs: int, shapes: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.inputs, self.outputs, self.shapes = inputs, outputs, shapes
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self._step: list[tuple[Tensor, Tensor]] = []  # totals and numbers of this step's batches, see `remember`

    @property
    def numbers(self) -> int:
        """How many numbers the cloud sends for a layer."""
        return sum(vectors * length for vectors, length in self.shapes)

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The running mean of what training generated; `apply_mean` makes a layer of it."""

    @abstractmethod
    def parts(self, feature: Tensor, counted: Tensor | None = None) -> Parts:
        """Return what the cloud sends for features (..., 192), one matrix for each of `shapes`.

        Args:
            feature: see above.
            counted: (...) which of the layers are used, and so remembered in training; None is all.
        """

    @abstractmethod
    def apply_parts(self, parts: Parts, hidden: Tensor) -> Tensor:
        """Return outputs (..., L) of the layers that the parts make on hidden units (..., D)."""

    @abstractmethod
    def install(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Return the layers as a device installs them: weight (..., L, D) and bias (..., L)."""

    @abstractmethod
    def apply_mean(self, hidden: Tensor) -> Tensor:
        """Return what `average` does, for hidden units in float32."""

    @abstractmethod
    def cloud_modules(self) -> list[nn.Module]:
        """Return the modules that a device does not have."""

    def stored(self) -> int:
        """Count parameters that the device keeps to make a layer of what is sent, beside that layer."""
        return 0

    def forward(self, feature: Tensor, hidden: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return outputs (..., L) of every feature's own layer on hidden units (..., D); see `parts` for `counted`."""
        with torch.autocast(feature.device.type, enabled=False):
            return self.apply_parts(self.parts(feature.float(), counted), hidden.float())

    def apply_sent(self, feature: Tensor, hidden: Tensor, precision: Precision) -> Tensor:
        """Return the same outputs after the layers were sent in that precision."""
        with torch.autocast(feature.device.type, enabled=False):
            return self.apply_parts(as_sent(self.parts(feature.float()), precision), hidden.float())

    def generate(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return every feature's own layer: weight (..., L, D) and bias (..., L)."""
        with torch.autocast(feature.device.type, enabled=False):
            return self.install(self.parts(feature.float()))

    def average(self, hidden: Tensor) -> Tensor:
        """Return outputs (..., L) of one layer for everyone: the mean of those that training generated."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.apply_mean(hidden.float())

    def remember(self, rows: Tensor, counted: Tensor | None) -> None:
        """Note what a training batch generated, (..., X) rows of which some count, until `settle`."""
        if self.training:
            rows = rows.detach().flatten(0, -2)
            weights = count_rows(rows, counted)
            self._step.append((weights @ rows, weights.sum()))

    def settle(self) -> None:
        """Update the running mean, over a hundred steps or so, with what this step's batches and processes generated.

        A step in which nothing was generated leaves it alone. Nothing waits for the device.
        """
        if not self._step:
            return
        totals, numbers = zip(*self._step, strict=True)
        self._step = []
        *total, number = sum_over_processes(torch.cat([sum(totals), sum(numbers).view(1)])).split(self.mean.numel())
        self.seen += number.squeeze() > 0
        weight = torch.where(number > 0, (1 / self.seen.clamp(min=1)).clamp(min=0.01), 0.0)
        self.mean.lerp_((total[0] / number.clamp(min=1)).view_as(self.mean), weight)


def as_sent(parts: Parts, precision: Precision) -> Parts:
    """Return parts as they arrive: what `payloads.decode` makes of their bytes, with a gradient if nothing is rounded.

    Over "int8" the gradient passes as if nothing were rounded (straight through), so that training may know of it.
    """
    if precision == "float32":
        return parts
    if precision == "float16":
        return tuple(part.half().float() for part in parts)
    arrived = []
    for part in parts:
        scale = (part.detach().abs().amax(-1, keepdim=True) / INT8_MAX).half().float()
        rounded = torch.where(
            scale > 0, (part.detach() / scale.clamp(min=1e-12)).round().clamp(-INT8_MAX, INT8_MAX), 0.0
        )
        arrived.append(part + (rounded * scale - part).detach())
    return tuple(arrived)


class FDA(Adaptor):
    """Feature (B, 192) -> weight (B, L, D) and bias (B, L) of a device's last layer, L outputs on D inputs.

    Source: eq. 5, 6 and 11. H is one linear layer with bias: 193 x (D + 1) L parameters, as the paper's counts say.

    Deviation: `init`. The paper prints none; with PyTorch's default ("printed") the generated logits start with a
    standard deviation of 5.7 and one step of gradient descent moves them about 190 times as far as a static head's.
    "hyperfan_in" (Chang et al. 2020, "Principled weight initialization for hypernetworks") starts them near 1;
    "shared_head" gives every input the same head at first, initialised as a static one: H's bias is that head, its
    weight is zero.

    Args:
        inputs, outputs: see `Adaptor`.
        init: see above.
        project: put the MLP of eq. 5 and 11 (two linears, then a LayerNorm: 74,496 parameters) before H. The counts
            of the paper's F-hyper leave no room for it.
    """

    mean_latent: Tensor

    def __init__(self, inputs: int, outputs: int, init: Init, project: bool) -> None:
        super().__init__(inputs, outputs, ((outputs, inputs + 1),))
        self.register_buffer("mean_latent", torch.zeros(FEATURE_DIM))
        self.mlp: nn.Module = nn.Identity()
        if project:
            self.mlp = projection()
        # Output (l, d) is weight d of answer l, the last of each row its bias: a row is what one answer needs.
        self.hyper = nn.Linear(FEATURE_DIM, outputs * (inputs + 1))
        with torch.no_grad():
            weight = self.hyper.weight.view(outputs, inputs + 1, FEATURE_DIM)
            bias = self.hyper.bias.view(outputs, inputs + 1)
            if init == "hyperfan_in":
                # For inputs of variance one: Var(w) = 1 / D, and so logits of variance one, plus the bias's third.
                nn.init.normal_(weight[:, :-1], std=(inputs * FEATURE_DIM) ** -0.5)
                bias[:, :-1] = 0
            elif init == "shared_head":
                shared = nn.Linear(inputs, outputs)
                weight.zero_()
                bias[:, :-1] = shared.weight
                bias[:, -1] = shared.bias

    @property
    def mean(self) -> Tensor:
        """Of what H reads: H is linear."""
        return self.mean_latent

    def forward(self, feature: Tensor, hidden: Tensor, counted: Tensor | None = None) -> Tensor:
        """See `Adaptor`: the same as `generate`, then the layer, without holding B layers.

        H is linear, so the product over D and over H's 192 inputs can be taken at once (B x 192 D numbers in place of
        B x (D + 1) L). Few answers make the layers the smaller of the two.
        """
        if self.outputs <= FEATURE_DIM:
            return super().forward(feature, hidden, counted)
        with torch.autocast(feature.device.type, enabled=False):
            return self._contract(self._latent(feature.float(), counted), hidden.float())

    def _contract(self, latent: Tensor, hidden: Tensor) -> Tensor:
        """Return outputs (..., L) for latents (..., 192)."""
        rows = with_one(hidden)  # (..., D + 1)
        products = (rows.unsqueeze(-1) * latent.unsqueeze(-2)).flatten(-2)  # (..., (D + 1) * 192)
        return F.linear(products, self.hyper.weight.view(self.outputs, -1)) + F.linear(
            rows, self.hyper.bias.view(self.outputs, -1)
        )

    def _latent(self, feature: Tensor, counted: Tensor | None) -> Tensor:
        """Return what H reads."""
        latent: Tensor = self.mlp(feature)
        self.remember(latent, counted)
        return latent

    def parts(self, feature: Tensor, counted: Tensor | None = None) -> Parts:
        """Return the layer with its bias as the last column."""
        return (self.hyper(self._latent(feature, counted)).unflatten(-1, (self.outputs, self.inputs + 1)),)

    def apply_parts(self, parts: Parts, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        weight, bias = self.install(parts)
        return (weight @ hidden.unsqueeze(-1)).squeeze(-1) + bias

    def install(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Adaptor`."""
        return parts[0][..., :-1], parts[0][..., -1]

    def apply_mean(self, hidden: Tensor) -> Tensor:
        """See `Adaptor`; H is linear: the mean layer is that of the mean latent."""
        layer = self.hyper(self.mean_latent).view(self.outputs, self.inputs + 1)
        return F.linear(hidden, layer[:, :-1], layer[:, -1])

    def cloud_modules(self) -> list[nn.Module]:
        """Return MLP and H."""
        return [self.mlp, self.hyper]


class LowRankFDA(Adaptor):
    """Feature (B, 192) -> a rank-r residual on a shared last layer, which the device has.

    The layer is [W, b] = [W0, b0] + U V with U (L, r) and V (r, D + 1): the cloud sends r (L + D + 1) numbers in place
    of (D + 1) L, and a device that was sent nothing answers with the shared layer.

    Source: ours; the residual is LoRA's (Hu et al. 2022) with generated factors. It starts at zero: H gives U = 0 and V
    at random, so that the first steps train U.

    Args:
        inputs, outputs: see `Adaptor`.
        rank: r; at most the smaller side of the layer, which is taken in place of more.
    """

    mean_residual: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        if rank < 1:
            raise ConfigError(f"rank {rank}: at least 1")
        rank = min(rank, inputs, outputs)
        super().__init__(inputs, outputs, ((rank, outputs), (rank, inputs + 1)))
        self.rank = rank
        self.register_buffer("mean_residual", torch.zeros(outputs, inputs + 1))
        self.shared = StaticLayer(inputs, outputs)
        self.mlp = projection()
        self.hyper = nn.Linear(FEATURE_DIM, self.numbers)
        with torch.no_grad():
            self.hyper.weight[: outputs * rank] = 0
            nn.init.normal_(self.hyper.weight[outputs * rank :], std=(inputs * FEATURE_DIM) ** -0.5)
            nn.init.zeros_(self.hyper.bias)

    @property
    def mean(self) -> Tensor:
        """Of the residuals."""
        return self.mean_residual

    def parts(self, feature: Tensor, counted: Tensor | None = None) -> Parts:
        """Return U transposed (..., r, L), and V (..., r, D + 1)."""
        left, right = self.hyper(self.mlp(feature)).split([length * self.rank for _, length in self.shapes], dim=-1)
        left, right = left.unflatten(-1, self.shapes[0]), right.unflatten(-1, self.shapes[1])
        if self.training:
            self._remember_residuals(left.detach().flatten(0, -3), right.detach().flatten(0, -3), counted)
        return left, right

    def _remember_residuals(self, left: Tensor, right: Tensor, counted: Tensor | None) -> None:
        """Do what `remember` does, without making the residuals (B, L, D + 1) of (B, r, L) and (B, r, D + 1)."""
        weights = count_rows(left, counted)
        total = (left * weights[:, None, None]).flatten(0, 1).T @ right.flatten(0, 1)
        self._step.append((total.flatten(), weights.sum()))

    def apply_parts(self, parts: Parts, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        left, right = parts
        residual: Tensor = ((right @ with_one(hidden).unsqueeze(-1)) * left).sum(-2)
        return self.shared(hidden) + residual

    def install(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Adaptor`."""
        layer = _joined(self.shared) + parts[0].mT @ parts[1]
        return layer[..., :-1], layer[..., -1]

    def apply_mean(self, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        return self.shared(hidden) + F.linear(with_one(hidden), self.mean_residual)

    def cloud_modules(self) -> list[nn.Module]:
        """Return MLP and H; the shared layer is the device's."""
        return [self.mlp, self.hyper]


class BasisFDA(Adaptor):
    """Feature (B, 192) -> k coefficients of basis layers that the device keeps beside a shared one.

    The layer is [W0, b0] + sum of c_i [W_i, b_i]: the cloud sends k numbers, however many answers there are. The basis
    trains with what reads the feature, two linears and a tanh, so that it is the one that k numbers use best.

    Source: ours; mixing kept weights by an input is CondConv's (Yang et al. 2019), here with the mixture sent.

    Args:
        inputs, outputs: see `Adaptor`.
        number: k.
    """

    mean_coefficients: Tensor

    def __init__(self, inputs: int, outputs: int, number: int) -> None:
        if number < 1:
            raise ConfigError(f"a basis of {number} layers: at least 1")
        super().__init__(inputs, outputs, ((1, number),))
        self.register_buffer("mean_coefficients", torch.zeros(number))
        self.shared = StaticLayer(inputs, outputs)
        self.basis = nn.Parameter(torch.randn(number, outputs, inputs + 1) * inputs**-0.5)
        last = nn.Linear(FEATURE_DIM, number)
        nn.init.normal_(last.weight, std=0.1 * FEATURE_DIM**-0.5)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.GELU(), last)

    @property
    def mean(self) -> Tensor:
        """Of the coefficients."""
        return self.mean_coefficients

    def parts(self, feature: Tensor, counted: Tensor | None = None) -> Parts:
        """Return the coefficients (..., 1, k), between -1 and 1."""
        coefficients = torch.tanh(self.mlp(feature))
        self.remember(coefficients, counted)
        return (coefficients.unsqueeze(-2),)

    def apply_parts(self, parts: Parts, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        each = F.linear(with_one(hidden), self.basis.flatten(0, 1)).unflatten(-1, self.basis.shape[:2])  # (..., k, L)
        return self.shared(hidden) + (parts[0] @ each).squeeze(-2)

    def install(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Adaptor`."""
        mixed = (parts[0] @ self.basis.flatten(1)).squeeze(-2)
        layer = _joined(self.shared) + mixed.unflatten(-1, self.basis.shape[1:])
        return layer[..., :-1], layer[..., -1]

    def apply_mean(self, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        return self.apply_parts((self.mean_coefficients[None],), hidden)

    def cloud_modules(self) -> list[nn.Module]:
        """Return what reads the feature; the layers are the device's."""
        return [self.mlp]

    def stored(self) -> int:
        """Count the basis."""
        return self.basis.numel()


def projection() -> nn.Sequential:
    """Build the MLP of eq. 5 and 11: two linears, then a LayerNorm."""
    return nn.Sequential(
        nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.GELU(), nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.LayerNorm(FEATURE_DIM)
    )


def count_rows(rows: Tensor, counted: Tensor | None) -> Tensor:
    """Return 1 for each of the rows (B, ...) that counts, else 0, (B,); None is all."""
    return rows.new_ones(len(rows)) if counted is None else counted.flatten().to(rows.dtype)


def with_one(hidden: Tensor) -> Tensor:
    """Append a one to hidden units, which a bias multiplies: (..., D) -> (..., D + 1)."""
    return torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)


def _joined(layer: nn.Linear) -> Tensor:
    """Join weight and bias: (L, D + 1)."""
    return torch.cat([layer.weight, layer.bias.unsqueeze(-1)], dim=-1)
