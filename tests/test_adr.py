"""The reasoner: parameter counts, its equations, and when it has no effect."""

import numpy as np
import pytest
import torch

from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.fda import FDA
from tolerances import assert_agree


@pytest.fixture
def anchor() -> torch.Tensor:
    return torch.randn(8, 192, generator=torch.Generator().manual_seed(0)).tanh()


@pytest.mark.parametrize(("preset", "count"), [("small", 554_880), ("paper_qa", 27_802_816), ("paper_mc", 20_213_984)])
def test_parameter_counts(preset, count):
    assert sum(p.numel() for p in ADR(preset).parameters()) == count


def test_renormalised_feature_has_the_decoded_statistics(anchor):
    reasoned = ADR(axis="feature")(anchor, sample=False)
    torch.testing.assert_close(reasoned.generated.mean(1), reasoned.decoded.mean(1))
    torch.testing.assert_close(reasoned.generated.std(1), reasoned.decoded.std(1), rtol=1e-4, atol=0)
    groups = ADR(axis="group:4")(anchor, sample=False)
    torch.testing.assert_close(
        groups.generated.view(8, 4, 48).std(2), groups.decoded.view(8, 4, 48).std(2), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # epsilon matters at the smaller one
def test_equation_16_matches_numpy(anchor, groups, scale):
    anchor = scale * anchor
    reasoned = ADR(axis="feature" if groups == 1 else f"group:{groups}")(anchor, sample=False)
    f, decoded = (part.detach().double().numpy().reshape(8, groups, -1) for part in (anchor, reasoned.decoded))
    std, mean, new_std, new_mean = (
        statistic(part, axis=-1, keepdims=True) for part in (f, decoded) for statistic in (np.std, np.mean)
    )
    expected = new_std * (f - mean) / (std + 1e-5) + new_mean
    assert_agree(reasoned.generated, expected.reshape(8, 192).astype(np.float32))


def test_batch_statistics_of_one_step_match_numpy(anchor):
    """Training uses the statistics of the batch and moves the running ones a tenth of the way towards them."""
    adr = ADR(axis="batch").train()
    reasoned = adr(1e-4 * anchor, sample=False)
    f, decoded = (1e-4 * anchor).double().numpy(), reasoned.decoded.detach().double().numpy()
    expected = decoded.std(0) * (f - f.mean(0)) / (f.std(0) + 1e-5) + decoded.mean(0)
    assert_agree(reasoned.generated, expected.astype(np.float32))
    for row, feature in enumerate((f, decoded)):
        assert_agree(1e3 * adr.running_mean[row], 1e3 * 0.1 * feature.mean(0).astype(np.float32))
        assert_agree(adr.running_std[row], (0.9 + 0.1 * feature.std(0)).astype(np.float32))
    adr.eval()
    reasoned = adr(anchor, sample=False)
    mean, std = adr.running_mean.numpy(), adr.running_std.numpy()
    expected = std[1] * (anchor.numpy() - mean[0]) / (std[0] + 1e-5) + mean[1]
    assert_agree(reasoned.generated, expected)


def test_equation_12_draws_from_the_latent_distribution(anchor):
    adr, latents = ADR(), []
    adr.decoder.register_forward_hook(lambda module, arguments, output: latents.append(arguments[0]))
    torch.nn.init.normal_(adr.encoder[-1].bias)  # deviations far from one
    torch.manual_seed(3)
    reasoned = adr(anchor, sample=True)
    torch.manual_seed(3)
    deviation = (reasoned.log_variance.exp()) ** 0.5
    torch.testing.assert_close(latents[0], reasoned.mean + deviation * torch.randn(8, 96))
    unsampled = adr(anchor, sample=False)
    assert torch.equal(latents[1], unsampled.mean)
    torch.testing.assert_close(torch.cat([unsampled.mean, unsampled.log_variance], -1), adr.encoder(anchor))


def test_normalizing_over_the_whole_feature_makes_the_reasoner_a_no_op(anchor):
    """Trap: then g = a·f + b with two scalars, which a LayerNorm removes, so no layer behind one can tell g from f."""

    def compute_similarity(axis: str) -> float:
        norm = torch.nn.LayerNorm(192, eps=0, elementwise_affine=False)
        generated = ADR(axis=axis)(anchor, sample=False).generated
        return torch.cosine_similarity(norm(generated), norm(anchor)).min().item()

    assert compute_similarity("feature") > 0.99999
    assert compute_similarity("group:4") < 0.99


def test_the_projection_ends_with_a_layer_norm():
    """Trap: without it, a generator sees the arbitrary scale that eq. 16 gives."""
    assert isinstance(FDA(96, 5, "printed", project=True).mlp[-1], torch.nn.LayerNorm)


def test_evaluation_uses_the_running_batch_statistics(anchor):
    adr = ADR(axis="batch").train()
    for _ in range(200):
        adr(anchor, sample=False)
    assert_agree(adr.running_mean[0], anchor.mean(0))
    assert_agree(adr.running_std[0], anchor.std(0, correction=0))
    mean_before = adr.running_mean.clone()
    in_training = adr(anchor[:1], sample=False).generated  # a batch of one has no deviation
    adr.eval()
    assert torch.equal(in_training, adr(anchor[:1], sample=False).generated)
    single = adr(anchor[:1], sample=False).generated
    assert torch.isfinite(single).all()
    assert_agree(single, adr(anchor, sample=False).generated[:1])
    torch.testing.assert_close(adr.running_mean, mean_before)


def test_losses_match_the_equations(anchor):
    adr, fused = ADR(), anchor.flip(0)
    reasoned = adr(anchor, sample=True)
    losses = adr.losses(anchor, fused, reasoned)
    standard = torch.distributions.Normal(0.0, 1.0)
    posterior = torch.distributions.Normal(reasoned.mean, (0.5 * reasoned.log_variance).exp())
    torch.testing.assert_close(losses.kl, torch.distributions.kl_divergence(posterior, standard).mean())
    torch.testing.assert_close(losses.reconstruction, (reasoned.decoded - anchor).square().mean())
    g = reasoned.generated
    torch.testing.assert_close(
        losses.generation, (g - anchor).square().mean() + 0.1 * (g - reasoned.decoded).square().mean()
    )
    torch.testing.assert_close(losses.total, losses.kl + losses.reconstruction + losses.generation)
    adr.target = "global"
    losses = adr.losses(anchor, fused, reasoned)
    torch.testing.assert_close(losses.reconstruction, (reasoned.decoded - fused).square().mean())
    torch.testing.assert_close(losses.generation, (g - fused).square().mean() + 0.1 * (g - anchor).square().mean())


def test_serving_is_reproducible_and_training_is_not(anchor):
    adr = ADR()
    assert torch.equal(adr(anchor, sample=False).generated, adr(anchor, sample=False).generated)
    assert not torch.equal(adr(anchor, sample=True).decoded, adr(anchor, sample=True).decoded)


@pytest.mark.parametrize("axis", ["feature", "group:3", "batch"])
def test_save_and_load(axis, tmp_path, anchor):
    adr = ADR(axis=axis, target="global").train()
    adr(anchor, sample=True)
    adr.save(tmp_path / "adr.safetensors")
    loaded = ADR.load(tmp_path / "adr.safetensors")
    assert (loaded.preset, loaded.axis, loaded.target) == ("small", axis, "global")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), adr.state_dict().values(), strict=True))


def test_files_that_hold_no_reasoner_are_refused(tmp_path):
    from cdc_mmpg.models.weights import save_safetensors

    save_safetensors(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"phase one's adr\.safetensors"):
        ADR.load(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"hello, I am no tensor")
    with pytest.raises(CheckpointError, match=r"text\.safetensors"):
        ADR.load(tmp_path / "text.safetensors")
    (tmp_path / "pickle.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickle\.ckpt"):
        ADR.load(tmp_path / "pickle.ckpt")
    with pytest.raises(CheckpointError, match="no such"):
        ADR.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("axis", ["group:5", "group:", "group:0", "channel", ""])
def test_unknown_axes_are_refused(axis):
    with pytest.raises(ConfigError, match="axis"):
        ADR(axis=axis)
