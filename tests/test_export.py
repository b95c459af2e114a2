"""Exported bundles of device and cloud: agreement with torch, vocabularies, keys, versions, and refusals."""

import hashlib
import json
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from cdc_mmpg.cloud.model import load_model
from cdc_mmpg.data.batch import VideoTextBatch
from cdc_mmpg.deployment import bundles, export
from cdc_mmpg.deployment.bundles import digest_device_weights
from cdc_mmpg.deployment.cloud_bundle import load_or_create_key, write_cloud_bundle
from cdc_mmpg.deployment.source import SPECIAL_WORDS, Source
from cdc_mmpg.device.model import DeviceModel
from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.methods.cdc_mmpg_session import CDCMMPGSession
from cdc_mmpg.methods.hyper import Hyper
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import FDA
from cdc_mmpg.models.generator import Generator
from cdc_mmpg.models.heads import MultipleChoice, OpenEnded, Retrieval
from cdc_mmpg.program import run_to_exit_code
from deployments import ENCODER, WORDS, build_generator, write_deployment
from tolerances import assert_agree


def build_tiny_encoder(**options: object) -> AllInOne:
    return AllInOne(image_size=32, depth=1, vocab_size=len(WORDS), text_length=16, **options)  # type: ignore[arg-type]


def read_settings(folder: Path) -> dict[str, object]:
    return json.loads((folder / "device" / "bundle.json").read_text())


def test_device_scores_agree_with_torch_for_a_generated_layer(deployed):
    """Covers the complete path: features, upload, generated layer, payload, installed layer, scores."""
    folder = deployed / "session"
    torch.manual_seed(1)
    method = build_method(folder)
    model, cloud_model = DeviceModel(folder / "device"), load_model(folder / "cloud")
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    text = model.tokenize("what is the man doing?")
    features = model.encode(frames, text)
    kept = [i for i, word in enumerate(WORDS) if word != "green"]
    ids = torch.tensor([[kept[i] for i in text[0]]])
    batch = VideoTextBatch(torch.from_numpy(frames)[None], ids, torch.ones_like(ids), torch.zeros(1), torch.zeros(1))
    upload = model.encode_anchor(frames)
    with torch.no_grad():
        encoded = method.head.encode(method.encoder, batch).frame_features
        assert_agree(features, encoded)
        expected = method.answer(encoded, torch.from_numpy(upload)[None], torch.ones(1))
        parts = [part[0].numpy() for part in cloud_model.generator(torch.from_numpy(upload)[None])]
    from cdc_mmpg.wire.payloads import decode_matrices, encode_matrices

    received = decode_matrices(encode_matrices(parts, "int8"), model.layout.shapes, "int8")
    scores = model.compute_scores(features, model.install(received, model.layout))
    assert_agree(scores, expected[0])


def build_method(folder: Path) -> CDCMMPGSession:
    """Return the method that `deployments.write_deployment` exports, built from the same seeds."""
    encoder = AllInOne(image_size=32, depth=1, vocab_size=len(WORDS), text_length=16)
    torch.nn.init.normal_(encoder.transformer.temporal_embed, std=0.5)
    method = CDCMMPGSession(encoder, OpenEnded(5), generated="low_rank", size=2)
    torch.nn.init.normal_(method.fda.hyper.weight, std=0.05)
    assert digest_device_weights(method).hex() == read_settings(folder)["encoder"]
    return method.eval()


@pytest.mark.parametrize("kind", ["session", "choice"])
def test_no_product_of_the_int8_encoder_saturates_on_any_processor(deployed, kind):
    """Without VNNI, x86 adds two unsigned-by-signed products in 16 bits, which can hold 2 x 255 x 64."""
    graph = onnx.load(deployed / kind / "device-int8" / "encoder.onnx").graph
    weights = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMulInteger", "ConvInteger")]
    assert len(products) > 5
    for node in products:
        weight = weights[node.input[1]]
        assert weight.dtype == np.uint8 or np.abs(weight.astype(int)).max() <= 64


def test_the_whole_vocabulary_is_kept_on_request(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "MAX_WORDS", 20)
    sources: list[Source] = []

    def stop(source: Source, out: Path) -> dict[str, object]:
        sources.append(source)
        raise ConfigError("enough")

    monkeypatch.setattr(bundles, "write_bundles", stop)
    configurations = ["experiments/methods/cdc_mmpg_session.yaml", "experiments/datasets/synthetic.yaml"]
    for options in ([], ["--all-words"]):
        assert export.main([str(tmp_path), "--untrained", *configurations, *options]) == 2
    shortened, complete = sources
    assert len(shortened.kept) == 20
    assert complete.kept == list(range(len(complete.words)))


def test_a_word_left_out_of_the_vocabulary_reads_as_an_unknown_word(deployed):
    model = DeviceModel(deployed / "session" / "device")
    words = json.loads((deployed / "session" / "device" / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(words, key=words.get) == [*(word for word in WORDS if word != "green"), "green"]
    assert model.tokenize("what is green?") == model.tokenize("what is xyz?")
    assert model.tokenize("what is red?") != model.tokenize("what is xyz?")


def test_special_and_most_frequent_words_are_selected(monkeypatch):
    monkeypatch.setattr(export, "MAX_WORDS", 7)
    words = [f"w{i}" for i in range(20)]
    words[3:8] = SPECIAL_WORDS
    counts = {10: 5, 11: 9, 12: 5, 13: 1, 5: 100}
    assert export.select_words(words, counts) == [3, 4, 5, 6, 7, 11]  # [CLS] is frequent as well as special
    monkeypatch.setattr(export, "MAX_WORDS", 100)
    assert export.select_words(words, counts) == [3, 4, 5, 6, 7, 10, 11, 12, 13]


def test_every_file_has_a_digest_and_only_the_owner_reads_the_key(deployed):
    for kind in ("session", "sample", "choice"):
        for name in ("device", "device-int8"):
            bundle = deployed / kind / name
            files = json.loads((bundle / "bundle.json").read_text())["files"]
            assert {path.name for path in bundle.iterdir()} == {*files, "bundle.json"}
            for file, digest in files.items():
                assert hashlib.sha256((bundle / file).read_bytes()).hexdigest() == digest
        key = deployed / kind / "cloud" / "signing_key.pem"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert not list((deployed / kind).glob("device*/*key*"))
    assert (deployed / "choice" / "device" / "basis.bin").exists()


@pytest.mark.slow
def test_exporting_again_keeps_the_key_pair_and_the_versions(deployed, tmp_path):
    folder = Path(shutil.copytree(deployed / "sample", tmp_path / "sample"))
    before = (folder / "cloud" / "signing_key.pem").read_bytes(), read_settings(folder)["public_key"]
    write_deployment(folder, "cdc_mmpg")
    assert ((folder / "cloud" / "signing_key.pem").read_bytes(), read_settings(folder)["public_key"]) == before
    assert read_settings(folder)["generator"] == read_settings(deployed / "sample")["generator"]
    (folder / "cloud" / "signing_key.pem").write_text("no key")
    with pytest.raises(CheckpointError, match=r"signing_key\.pem: cannot be used as the signing key"):
        load_or_create_key(folder / "cloud" / "signing_key.pem")


@pytest.mark.parametrize("obstacle", ["a file", "read-only", "full"])
def test_an_unwritable_folder_is_named_and_no_partial_file_is_left(obstacle, tmp_path, capsys):
    folder = tmp_path / "out"
    if obstacle == "a file":
        folder.write_text("in the way")
    else:
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder], check=False).returncode:
            pytest.skip("no file system may be mounted here")
    try:
        if obstacle == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        code = run_to_exit_code(
            lambda: write_cloud_bundle(build_generator("full"), ENCODER, "test/full", folder / "cloud")
        )
        assert code == 1
        assert str(folder) in capsys.readouterr().err
        assert not list(tmp_path.glob("out/**/*.tmp"))
    finally:
        if obstacle != "a file":
            subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_key_readable_by_others_is_restricted_to_its_owner(tmp_path):
    load_or_create_key(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o644)
    load_or_create_key(tmp_path / "key.pem")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600


def test_changed_device_weights_change_the_version():
    encoder, head = build_tiny_encoder(), OpenEnded(5)
    method = Hyper(encoder, head)
    before = digest_device_weights(method)
    with torch.no_grad():
        head.phi[0].bias[0] += 1e-3
    assert digest_device_weights(method) != before


@pytest.mark.parametrize("kind", ["full", "low_rank", "basis"])
def test_a_saved_generator_loads_unchanged_and_sends_every_kind(tmp_path, kind):
    original = build_generator(kind)
    original.save(tmp_path / "generator.safetensors")
    loaded = Generator.load(tmp_path / "generator.safetensors")
    uploads = torch.rand(3, 192) * 2 - 1
    with torch.no_grad():
        assert [layout.kind for layout in loaded.layouts()] == ["float32", "float16", "int8",
                                                               *([] if kind == "full" else [kind])]  # fmt: skip
        for ours, theirs in zip(original(uploads), loaded(uploads), strict=True):
            assert torch.equal(ours, theirs)
        weight, bias = original.adaptor.install(original(uploads))
        (matrix,) = loaded.matrices(loaded(uploads), "float32")
        assert torch.equal(matrix, torch.cat([weight, bias.unsqueeze(-1)], dim=-1))
        for layout in loaded.layouts():
            shapes = [tuple(part.shape[1:]) for part in loaded.matrices(loaded(uploads), layout.kind)]
            assert shapes == list(layout.shapes)


def test_rounded_weights_make_nearly_the_same_layers():
    exact, rounded = build_generator("full"), build_generator("full")
    rounded.round_weights()
    uploads = torch.rand(4, 192) * 2 - 1
    with torch.no_grad():
        (ours,), (theirs,) = exact(uploads), rounded(uploads)
    assert rounded.adaptor.hyper.weight.dtype == torch.bfloat16
    assert theirs.dtype == torch.float32
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).norm() < 0.01 * ours.norm()


def test_files_that_are_no_generator_are_refused(tmp_path):
    from cdc_mmpg.models.weights import save_safetensors

    save_safetensors({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    ADR().save(tmp_path / "adr.safetensors")
    for name in ("x", "adr"):
        with pytest.raises(CheckpointError, match="not a generator"):
            Generator.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="no such"):
        Generator.load(tmp_path / "absent.safetensors")


def test_offline_a_generating_method_answers_with_its_mean_layer():
    method = Hyper(build_tiny_encoder(), OpenEnded(5))
    assert isinstance(method.fda, FDA)
    torch.nn.init.normal_(method.fda.mean_latent)
    hidden = torch.randn(3, 96)
    with torch.no_grad():
        layer = method.deployment_parts().offline
        assert_agree(hidden @ layer[:, :-1].T + layer[:, -1], method.fda.average(hidden))


@pytest.mark.parametrize(
    ("make_method", "message"),
    [
        (lambda: Linear(build_tiny_encoder(), OpenEnded(5)), "sends nothing from a cloud"),
        (lambda: Hyper(build_tiny_encoder(), Retrieval()), "retrieval"),
        (lambda: Hyper(build_tiny_encoder(), MultipleChoice(per_candidate=True)), "per_candidate"),
        (lambda: CDCMMPGSession(build_tiny_encoder(), OpenEnded(5), oracle=True), "oracle"),
    ],
)
def test_methods_that_cannot_be_served_are_refused(make_method, message):
    method = make_method()
    with pytest.raises(ConfigError, match=message):
        export.check_servable(method, method.head.task)


def test_a_missing_run_is_refused(tmp_path, capsys):
    for name, target in (("circle", "circle"), ("long", "x" * 4000)):  # neighbors that are not runs
        (tmp_path / name).symlink_to(target)
    assert export.main([str(tmp_path / "linear" / "seed0")]) == 4
    assert "not a finished run" in capsys.readouterr().err


@pytest.mark.slow
def test_at_the_papers_size_the_int8_bundle_is_below_8_megabytes(tmp_path):
    """Covers 1,501 answers, 12 blocks, 224 pixels and full layers; with random weights the first 6,000 words stay."""
    configurations = [Path("experiments/methods/cdc_mmpg.yaml"), Path("experiments/datasets/msrvtt.yaml")]
    report = export.export_untrained(configurations, tmp_path)
    assert report["bytes"]["device-int8"] < 8_000_000
    assert report["bytes"]["device-int8"] == sum(path.stat().st_size for path in (tmp_path / "device-int8").iterdir())
    assert report["bytes"]["down"]["float32"] == 582_388
    assert report["words"] == {"vocabulary": 30_522, "kept": 6_000}
    assert report["largest_difference"] <= 1e-4
    assert load_model(tmp_path / "cloud").layouts[0].payload_bytes == 582_388
    saved = json.loads((tmp_path / "export.json").read_text())
    assert {"commit", "versions", "made"} <= saved.keys()
