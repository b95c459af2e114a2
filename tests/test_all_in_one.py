"""The encoder: agreement with the reference's outputs, parameter counts, input shapes, and imported weights."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from cdc_mmpg.commands import checkpoint
from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.models.all_in_one import AllInOne, roll_tokens
from cdc_mmpg.models.heads import OpenEnded
from tolerances import assert_agree

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Return the reference's weights, by the rule with which its outputs were computed."""
    keys = json.loads((REFERENCE / "all_in_one_tiny_keys.json").read_text())
    weights = {}
    for name, shape in keys["shapes"].items():
        value = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        value = value * np.float32(0.1) + (name in keys["layernorm_keys"])
        weights[name] = torch.from_numpy(value.astype(np.float32))
    return weights


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE / "all_in_one_tiny.safetensors")


@pytest.fixture(scope="module")
def encoder(state: dict[str, torch.Tensor]) -> AllInOne:
    return AllInOne.from_reference(state).eval()


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1003).standard_normal((2, 3, 3, 224, 224)).astype(np.float32))


def build_small(**arguments: int) -> AllInOne:
    return AllInOne(**{"image_size": 32, "depth": 2, "vocab_size": 50, **arguments}).eval()


def make_inputs(frames: int = 3, size: int = 32, length: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (2, length), generator=generator)
    return torch.randn(2, frames, 3, size, size, generator=generator), ids, torch.ones_like(ids)


@torch.no_grad()
def test_reproduces_the_reference(encoder, expected, video):
    encoded = encoder(video, expected["text_ids"], expected["text_mask"])
    assert_agree(encoded.frame_features, expected["frame_cls"])
    assert_agree(encoded.fused, expected["cls_feats"])


@torch.no_grad()
def test_reproduces_the_reference_for_one_modality(encoder, expected, video):
    text = encoder.encode_text(expected["text_ids"], expected["text_mask"])
    assert_agree(text, expected["text_cls"])
    assert_agree(encoder.encode_video(video).mean(1), expected["video_cls"])


@torch.no_grad()
@pytest.mark.parametrize("fault", ["no rolling", "rolled backwards", "mask ignored"])
def test_the_reference_detects_a_faulty_encoder(encoder, expected, video, fault, monkeypatch):
    mask = expected["text_mask"]
    if fault == "mask ignored":
        mask = torch.ones_like(mask)
    elif fault == "no rolling":
        monkeypatch.setattr("cdc_mmpg.models.all_in_one.roll_tokens", lambda tokens, frames, text: tokens)
    else:
        monkeypatch.setattr(
            "cdc_mmpg.models.all_in_one.roll_tokens",
            lambda tokens, frames, text: roll_tokens(
                tokens.view(-1, frames, *tokens.shape[1:]).flip(1).flatten(0, 1), frames, text
            ).view(-1, frames, *tokens.shape[1:]).flip(1).flatten(0, 1),
        )  # fmt: skip
    fused = encoder(video, expected["text_ids"], mask).fused
    assert (fused - expected["cls_feats"]).abs().max() > 0.1


def test_parameter_counts():
    encoder = AllInOne()
    parts = {
        "text_embeddings": 5_868_672,
        "token_type_embeddings": 384,
        "transformer.patch_embed": 147_648,
        "transformer.blocks": 5_338_368,
        "transformer.norm": 384,
        "pooler": 37_056,
    }
    for name, count in parts.items():
        assert sum(p.numel() for p in encoder.get_submodule(name).parameters()) == count, name
    vit = encoder.transformer
    assert vit.cls_token.numel() + vit.pos_embed.numel() + vit.temporal_embed.numel() == 38_592
    assert sum(p.numel() for p in encoder.parameters()) == 11_431_104


@pytest.mark.parametrize(("classes", "count"), [(1501, 11_595_421), (1001, 11_546_921), (1541, 11_599_301)])
def test_parameter_counts_of_the_device_model(classes, count):
    head = OpenEnded(classes)
    last_layer = head.outputs * (head.inputs + 1)
    assert 11_431_104 + sum(p.numel() for p in head.parameters()) + last_layer == count


@torch.no_grad()
@pytest.mark.parametrize(("frames", "size"), [(1, 32), (2, 48), (3, 16), (5, 64)])
def test_accepts_any_number_of_frames_and_any_multiple_of_16(frames, size):
    encoded = build_small(num_frames=5)(*make_inputs(frames, size))
    assert encoded.frame_features.shape == (2, frames, 192)
    assert encoded.fused.shape == (2, 192)


@torch.no_grad()
def test_padding_changes_nothing():
    encoder, (video, ids, mask) = build_small(), make_inputs()
    plain = encoder(video, ids, mask)
    padded = encoder(video, torch.nn.functional.pad(ids, (0, 20)), torch.nn.functional.pad(mask, (0, 20)))
    assert_agree(padded.fused, plain.fused)
    assert_agree(
        encoder.encode_text(ids[:1, :4], mask[:1, :4]),
        encoder.encode_text(ids, torch.tensor([[1] * 4 + [0] * 3, [1] * 7]))[:1],
    )


@torch.no_grad()
def test_the_last_block_computes_only_the_tokens_that_are_read():
    """The features equal those of a last block that computes every token."""
    encoder, (video, ids, mask) = build_small(), make_inputs()
    tokens = {}
    last_block = encoder.transformer.blocks[-1]
    hook = last_block.norm1.register_forward_hook(lambda module, args, output: tokens.update(seen=args[0]))
    features = encoder(video, ids, mask).frame_features
    hook.remove()
    expected = encoder.transformer.norm(last_block(tokens["seen"]))[:, 0]
    assert_agree(features.flatten(0, 1), expected)


def test_rolling_is_circular_and_moves_an_eighth_of_the_patches():
    tokens = torch.arange(3.0).view(3, 1, 1).expand(3, 2 + 197, 1)  # every token holds its frame's number
    rolled = roll_tokens(tokens, frames=3, text_tokens=2)[..., 0]
    assert rolled[0].tolist() == [0] * 3 + [2] * 24 + [0] * 148 + [1] * 24


@torch.no_grad()
def test_one_frame_does_not_roll():
    tokens = torch.randn(4, 20, 8)
    assert roll_tokens(tokens, frames=1, text_tokens=3) is tokens


def test_import_reports_unused_weights_and_refuses_unusable_ones(state, caplog):
    with caplog.at_level("INFO"):
        report = AllInOne().load_reference({**state, "something.else": torch.zeros(1)})
    assert (len(report.used), report.unexpected, report.missing) == (159, ["something.else"], [])
    assert "vqa_classifier.1.weight" in report.dropped
    assert "something.else" in caplog.text
    with pytest.raises(CheckpointError, match=r"pooler\.dense\.bias"):
        AllInOne.from_reference({key: value for key, value in state.items() if key != "pooler.dense.bias"})
    for key, shape, expected_shape in (
        ("transformer.norm.weight", (7,), (192,)),
        ("transformer.temporal_embed", (1, 3, 7), (1, 3, 192)),
        ("transformer.pos_embed", (1, 197, 7), (1, 197, 192)),
        ("transformer.pos_embed", (2, 10, 192), (1, 197, 192)),
        ("text_embeddings.position_embeddings.weight", (40, 7), (40, 192)),
        ("transformer.cls_token", (1, 2, 192), (1, 1, 192)),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"{key!r} is {shape}, this encoder has {expected_shape}")):
            AllInOne.from_reference({**state, key: torch.zeros(shape)})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.model._orig_mod.", "encoder."])
def test_import_strips_the_prefix_of_a_wrapper(prefix, state):
    wrapped = {f"{prefix}{name}": value for name, value in state.items()} | {"head.weight": torch.zeros(2)}
    report = AllInOne().load_reference(wrapped)
    assert (len(report.used), report.unexpected, report.missing) == (159, ["head.weight"], [])
    deit = {name.removeprefix("transformer."): value for name, value in state.items() if "transformer." in name}
    del deit["temporal_embed"]
    report = AllInOne().load_reference({f"{prefix}{name}": value for name, value in deit.items()})
    assert "transformer.pos_embed" in report.used
    assert "text_embeddings.word_embeddings.weight" in report.missing


def test_import_resizes_embeddings(state):
    longer = AllInOne(num_frames=5, image_size=96, text_length=20)
    longer.load_reference(state)
    temporal_embed = longer.transformer.temporal_embed
    torch.testing.assert_close(temporal_embed[:, :3], state["transformer.temporal_embed"])
    assert temporal_embed[:, 3:].abs().sum() == 0
    positions = state["transformer.pos_embed"]
    patches = positions[:, 1:].view(1, 14, 14, 192).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(patches, (6, 6), mode="bicubic", antialias=True).flatten(2).mT
    expected = torch.cat([positions[:, :1], resized], 1)
    torch.testing.assert_close(longer.transformer.pos_embed.detach(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        longer.text_embeddings.position_embeddings.weight, state["text_embeddings.position_embeddings.weight"][:20]
    )
    shorter = AllInOne.from_reference(state, num_frames=2)
    torch.testing.assert_close(shorter.transformer.temporal_embed, state["transformer.temporal_embed"][:, :2])


def test_importing_deit_leaves_the_text_embeddings_random(state):
    deit = {k.removeprefix("transformer."): v for k, v in state.items() if k.startswith("transformer.")}
    del deit["temporal_embed"]
    encoder = AllInOne()
    report = encoder.load_reference({**deit, "head.weight": torch.zeros(1000, 192)})
    assert "text_embeddings.word_embeddings.weight" in report.missing
    assert report.dropped == ["transformer.head.weight"]
    torch.testing.assert_close(encoder.transformer.pos_embed, state["transformer.pos_embed"])
    with pytest.raises(CheckpointError, match="pos_embed"):
        encoder.load_reference({k: v for k, v in deit.items() if k != "pos_embed"})


def test_deit_is_loaded_from_a_file_or_downloaded_by_timm(state, tmp_path, monkeypatch):
    deit = {k.removeprefix("transformer."): v for k, v in state.items() if k.startswith("transformer.")}
    del deit["temporal_embed"]
    torch.save({"model": deit}, tmp_path / "deit.pth")
    from_file = AllInOne(checkpoint=str(tmp_path / "deit.pth"))
    assert torch.equal(from_file.transformer.cls_token, state["transformer.cls_token"])
    create_model = timm.create_model

    def create_with_weights(name, pretrained=False, **arguments):
        model = create_model(name, **arguments)
        if pretrained:
            model.load_state_dict(deit, strict=False)
        return model

    monkeypatch.setattr("timm.create_model", create_with_weights)
    downloaded = AllInOne(checkpoint="deit_tiny_patch16_224")
    assert torch.equal(downloaded.transformer.pos_embed, state["transformer.pos_embed"])

    def fail_to_download(name, pretrained=False, **arguments):
        if pretrained:
            raise OSError("no route to the hub")
        return create_model(name, **arguments)

    monkeypatch.setattr("timm.create_model", fail_to_download)
    with pytest.raises(CheckpointError, match="download its file elsewhere"):
        AllInOne(checkpoint="deit_tiny_patch16_224")


@pytest.mark.parametrize(
    "arguments",
    [{"image_size": 100}, {"image_size": 0}, {"num_frames": 0}, {"depth": 0}, {"vocab_size": 0}, {"text_length": 0}],
)
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        AllInOne(**arguments)


def test_random_weights_have_the_scale_of_their_inputs():
    """This lets a small encoder learn within minutes."""
    torch.manual_seed(0)
    encoder = AllInOne(image_size=224, depth=1, vocab_size=500)
    vit, block = encoder.transformer, encoder.transformer.blocks[0]
    for weight, deviation in [
        (encoder.text_embeddings.word_embeddings.weight, 0.02),
        (encoder.text_embeddings.position_embeddings.weight, 0.02),
        (block.attn.qkv.weight, (2 / 192) ** 0.5),
        (block.mlp.fc1.weight, (2 / 192) ** 0.5),
        (block.mlp.fc2.weight, (2 / 768) ** 0.5),
        (encoder.pooler["dense"].weight, (2 / 192) ** 0.5),
        (vit.patch_embed.proj.weight, (3 * 16 * 16) ** -0.5),
        (vit.pos_embed, 0.5),
    ]:
        assert weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert abs(weight.mean().item()) < deviation / 5
    assert encoder.token_type_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.3)
    for bias in (block.attn.qkv.bias, block.mlp.fc1.bias, encoder.pooler["dense"].bias, vit.patch_embed.proj.bias):
        assert not bias.any()
    assert not vit.temporal_embed.any()


@torch.no_grad()
def test_embeddings_match_a_computation_by_hand():
    """A patch gets its position, time and modality; the visual [CLS] gets the first position; a text gets no time."""
    encoder, (video, ids, mask) = build_small(num_frames=4), make_inputs(frames=3)
    for parameter in (*encoder.token_type_embeddings.parameters(), encoder.transformer.temporal_embed):
        torch.nn.init.normal_(parameter)
    vit, modality = encoder.transformer, encoder.token_type_embeddings.weight
    patches = torch.nn.functional.conv2d(
        video.flatten(0, 1), vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=16
    )
    tokens = patches.flatten(2).mT.view(2, 3, 4, 192) + vit.pos_embed[:, 1:] + vit.temporal_embed[0, :3, None]
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(2, 3, -1, -1)
    expected = torch.cat([first, tokens], 2).flatten(0, 1) + modality[1]
    torch.testing.assert_close(encoder._embed_video(video), expected, rtol=1e-4, atol=1e-4)
    text = encoder.text_embeddings
    summed = (
        text.word_embeddings.weight[ids] + text.position_embeddings.weight[:7] + text.token_type_embeddings.weight[0]
    )
    expected = torch.nn.functional.layer_norm(summed, (192,), text.LayerNorm.weight, text.LayerNorm.bias, 1e-12)
    for padding in (mask, None):
        torch.testing.assert_close(encoder._embed_text(ids, padding), expected + modality[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_texts_without_padding_need_no_mask():
    encoder, (video, ids, mask) = build_small().eval(), make_inputs()
    assert_agree(encoder(video, ids, None).frame_features, encoder(video, ids, mask).frame_features)
    assert_agree(encoder.encode_text(ids, None), encoder.encode_text(ids, mask))
    assert_agree(encoder.encode_words(video, ids, None), encoder.encode_words(video, ids, mask))


@torch.no_grad()
def test_positions_are_resized_to_frames_of_another_shape():
    encoder, (_, ids, mask) = build_small(image_size=64), make_inputs()
    vit = encoder.transformer
    tall = torch.zeros(2, 3, 3, 96, 32)
    positions = vit.pos_embed[:, 1:].view(1, 4, 4, 192).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(positions, (6, 2), mode="bicubic", antialias=True).flatten(2).mT
    plain = vit.patch_embed.proj.bias + resized + encoder.token_type_embeddings.weight[1]
    torch.testing.assert_close(encoder._embed_video(tall)[:, 1:], plain.expand(6, -1, -1), rtol=1e-4, atol=1e-4)
    assert encoder(tall, ids, mask).frame_features.shape == (2, 3, 192)


@torch.no_grad()
def test_encoding_one_clip_on_a_device_matches_encoding_a_batch():
    encoder, (video, ids, mask) = build_small(), make_inputs()
    batched = encoder(video, ids, mask).frame_features
    for index in range(2):
        single = encoder.encode_clip(video[index : index + 1], ids[index : index + 1])
        torch.testing.assert_close(single, batched[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda video, ids, mask: (video[:, :, 0], ids, mask), "is not .B, T, 3, H, W"),
        (lambda video, ids, mask: (video[:, :, :2], ids, mask), "is not .B, T, 3, H, W"),
        (lambda video, ids, mask: (video[..., :24, :], ids, mask), "multiples of 16"),
        (lambda video, ids, mask: (video[..., :24], ids, mask), "multiples of 16"),
        (lambda video, ids, mask: (video.repeat(1, 2, 1, 1, 1), ids, mask), "6 frames in a clip.*1 to 3"),
        (lambda video, ids, mask: (video[:, :0], ids, mask), "0 frames in a clip"),
        (lambda video, ids, mask: (video, ids, mask[:, 1:]), r"expected .B, L. with L <= 40"),
        (lambda video, ids, mask: (video, ids[0], mask[0]), r"expected .B, L. with L <= 40"),
        (lambda video, ids, mask: (video, ids.repeat(1, 6), mask.repeat(1, 6)), r"expected .B, L. with L <= 40"),
        (lambda video, ids, mask: (video, ids[:1].repeat(3, 1), mask[:1].repeat(3, 1)), "3 texts for 2 clips"),
    ],
)
def test_each_wrong_shape_is_refused_with_its_reason(change, message):
    with pytest.raises(ValueError, match=message):
        build_small()(*change(*make_inputs()))


def test_wrong_inputs_are_refused():
    encoder, (video, ids, mask) = build_small(), make_inputs()
    for wrong_inputs in [(video[:, :, :, :30], ids, mask), (video, ids, mask[:, 1:]),
                (video.repeat(1, 2, 1, 1, 1), ids, mask), (video, ids.repeat(1, 9), mask.repeat(1, 9))]:  # fmt: skip
        with pytest.raises(ValueError, match=r"video|text|frames"):
            encoder(*wrong_inputs)


def test_the_checkpoint_command_lists_every_key(state, tmp_path, capsys):
    other_weights = {"itm_score.fc.weight": torch.zeros(2, 192), "mystery": torch.zeros(1)}
    longer_embedding = {"transformer.temporal_embed": torch.zeros(1, 8, 192)}
    torch.save({"state_dict": state | other_weights | longer_embedding}, tmp_path / "whole.ckpt")
    assert checkpoint.main([str(tmp_path / "whole.ckpt")]) == 0
    printed = capsys.readouterr().out
    used, dropped, unexpected, missing = (
        printed.index(word) for word in ("used ", "dropped ", "unexpected ", "missing 0")
    )
    assert used < printed.index("  transformer.temporal_embed  (1, 8, 192), here (1, 3, 192)\n") < dropped
    assert dropped < printed.index("  itm_score.fc.weight\n") < unexpected < printed.index("  mystery\n") < missing
    deit = {k.removeprefix("transformer."): v for k, v in state.items() if k.startswith("transformer.")}
    torch.save({"model": deit}, tmp_path / "deit_in_time.pth")  # DeiT's names, with a temporal embedding
    assert checkpoint.main([str(tmp_path / "deit_in_time.pth")]) == 0
    capsys.readouterr()
    partial_state = {key: value for key, value in state.items() if "blocks.3." not in key}
    torch.save({"state_dict": partial_state}, tmp_path / "part.ckpt")
    assert checkpoint.main([str(tmp_path / "part.ckpt")]) == 4
    captured = capsys.readouterr()
    assert captured.out.count("  transformer.blocks.3.") == len(state) - len(partial_state)
    assert "lacks" in captured.err
    assert checkpoint.main([""]) == 4
    assert "FILE=" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_results_and_is_compiled_once():
    encoder, compiled = build_small(depth=3).eval(), build_small(depth=3).eval()
    compiled.load_state_dict(encoder.state_dict())
    compiled.compile_blocks()
    compile_counters = torch._dynamo.utils.counters["stats"]
    for length in (7, 9):
        video, ids, mask = make_inputs(length=length)
        mask[0, 5:] = 0
        actual, expected = (model(video, ids, mask).frame_features for model in (compiled, encoder))
        assert (actual - expected).abs().max() <= 1e-5
        for features in (actual, expected):
            features.sum().backward()
        for (name, parameter), expected_parameter in zip(
            compiled.named_parameters(), encoder.parameters(), strict=True
        ):
            if expected_parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, expected_parameter.grad, rtol=1e-3, atol=1e-3, msg=name)
        assert compile_counters["unique_graphs"] == 1
