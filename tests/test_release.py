"""Releases: finished runs packed with digests, opened elsewhere, and refused when they are not what they claim."""

import contextlib
import functools
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cdc_mmpg.cloud.model import read_cloud_bundle
from cdc_mmpg.commands.main import main
from cdc_mmpg.commands.plan import PLANS
from cdc_mmpg.commands.request import Request
from cdc_mmpg.deployment.opened_release import MANIFEST, find_encoder, is_release, open_release
from cdc_mmpg.deployment.release import write_release
from cdc_mmpg.device.model import read_bundle
from cdc_mmpg.errors import CDCError, CheckpointError, ConfigError
from cdc_mmpg.files import hash_file
from conftest import write_clip
from deployments import Cloud, open_device

RUN = "synthetic/cdc_mmpg_session/seed0"
PRETRAINED = "synthetic/encoder_pretraining/seed0"


@pytest.fixture
def root(deployed: Path, tmp_path: Path) -> Path:
    """Folder like `checkpoints` with a pretraining and a session run that has bundles."""
    root = tmp_path / "out" / "mine"
    for place in (RUN, PRETRAINED):
        run = root / place
        run.mkdir(parents=True)
        results = {"seed": 0, "commit": "c0ffee", "versions": {"torch": "2"}, "best_epoch": 1, "epochs": 3}
        cell = {"value": 0.9, "low": 0.85, "high": 0.93}
        results |= {"accuracy": {"n16": {"unseen": {"all": cell}}}} if place == RUN else {}
        (run / "results.json").write_text(
            json.dumps(results | {"arguments": [f"--root={root}/synthetic/data", "--other=/mnt/lab/x.pt"]})
        )
        (run / "config.yaml").write_text(
            f"data: {{init_args: {{root: {root}/synthetic/data, vocab: {root}/words.txt}}}}"
        )
        (run / "best.ckpt").write_bytes(os.urandom(3000))
    (root / "words.txt").write_text("[PAD]\n[UNK]\n")
    for name in ("encoder", "reading"):
        (root / PRETRAINED / f"{name}.safetensors").write_bytes(name.encode())
    shutil.copytree(deployed / "session", root / RUN / "deployment")
    for private in ("deployment/state/session.json", "deployment/cloud/signing_key.pem.bak", "wandb/id", "logs/m.csv",
                    "deployment/device/.bundle.json.host.1.tmp"):  # fmt: skip
        (root / RUN / private).parent.mkdir(exist_ok=True)
        (root / RUN / private).write_text("private")
    for dataset in ("synthetic", "msvd"):  # of which only one is released
        (root / dataset).mkdir(exist_ok=True)
        (root / dataset / "report.html").write_text(f"<p>{dataset}</p>")
    return root


@pytest.fixture
def release(root: Path) -> Path:
    return write_release(root, [root / PRETRAINED, root / RUN])


def list_files(files: dict[str, tuple[int, str]]) -> bytes:
    """Return a manifest with these files, each with its bytes and SHA-256."""
    entries = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    return json.dumps({"format": 1, "files": entries}).encode()


def rewrite(release: Path, path: Path, /, **changed: bytes | None) -> Path:
    """Copy an archive with other contents of some files, by the last part of their names; None leaves one out."""
    with zipfile.ZipFile(release) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = changed.get(Path(name).stem, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


def test_a_release_has_what_others_need_and_nothing_private(root, release):
    with zipfile.ZipFile(release) as archive:
        names, texts = archive.namelist(), b"".join(map(archive.read, archive.namelist()))
        manifest = json.loads(archive.read(MANIFEST))
        config, card = (archive.read(f"{RUN}/{name}").decode() for name in ("config.yaml", "CARD.md"))
    assert manifest["runs"] == [PRETRAINED, RUN]
    assert {*manifest["files"], MANIFEST} == {*names}
    for name in ("results.json", "best.ckpt", "vocab.txt", "deployment/device-int8/bundle.json", "CARD.md"):
        assert f"{RUN}/{name}" in names
    assert not [
        name for name in names if any(part in name for part in ("signing_key", "state", "wandb", "logs", "tmp"))
    ]
    assert str(root).encode() not in texts
    assert b"/mnt/lab" not in texts
    assert "synthetic/report.html" in names
    assert "msvd/report.html" not in names
    assert "root: checkpoints/synthetic/data" in config
    assert "| n16 | unseen | 90.0 | 85.0 to 93.0 |" in card
    assert "Best epoch: 2 of 3." in card
    assert write_release(root, [root / PRETRAINED, root / RUN]).read_bytes() == release.read_bytes()  # reproducible


def test_unfinished_runs_are_not_released(root):
    (root / RUN / "results.json").unlink()
    with pytest.raises(CheckpointError, match=rf"not finished: {RUN}; train them first"):
        write_release(root, [root / PRETRAINED, root / RUN])


def test_an_opened_release_is_served_and_asked_with_a_key_of_its_own(release, deployed, tmp_path):
    folder = open_release(str(release), tmp_path / "cache")
    assert (folder / PRETRAINED / "encoder.safetensors").read_bytes() == b"encoder"
    assert find_encoder(folder, 0) == folder / PRETRAINED / "encoder.safetensors"
    bundles = folder / RUN / "deployment"
    first = read_bundle(deployed / "session" / "device")["public_key"]
    assert first != read_bundle(bundles / "device")["public_key"] == read_bundle(bundles / "device-int8")["public_key"]
    assert read_cloud_bundle(bundles / "cloud").key.public_key().public_bytes_raw().hex() != first
    with Cloud(bundles / "cloud", tmp_path / "log") as service:
        device = open_device(bundles.parent, service.url, "deployment")
        assert device.answer(write_clip(tmp_path / "clip.mp4"), "what is the man doing?").origin == "adapted"
    key = (bundles / "cloud" / "signing_key.pem").read_bytes()
    assert open_release(str(release), tmp_path / "cache") == folder  # opened once
    assert (bundles / "cloud" / "signing_key.pem").read_bytes() == key


def test_a_folder_with_the_content_of_a_release_is_one_too(release, tmp_path):
    with zipfile.ZipFile(release) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert is_release(str(tmp_path / "unpacked"))
    opened = open_release(str(tmp_path / "unpacked"), tmp_path / "cache")
    assert opened == open_release(str(release), tmp_path / "cache")
    (tmp_path / "unpacked" / RUN / "best.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"damaged or incomplete.*no best\.ckpt"):
        open_release(str(tmp_path / "unpacked"), tmp_path / "other")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"best": b"x" * 3000}, r"best\.ckpt: another content than the manifest's"),
        ({"best": b"x" * 9000}, r"best\.ckpt: another content than the manifest's"),
        ({"encoder": b""}, r"encoder\.safetensors: another content"),
        ({"vocab": None}, "damaged or incomplete"),
        ({"release": list_files({f"{RUN}/deployment/cloud/signing_key.pem": (1, "0" * 64)})}, "does not belong in a"),
        ({"release": list_files({f"{RUN}/best.ckpt": (-5, "0" * 64)})}, "release.json is damaged"),
        (
            {"release": list_files({f"{RUN}/best.ckpt": (10**18, "0" * 64)})},
            "1,000,000,000,000,000,000 bytes, .* make room",
        ),
        ({"release": b"{"}, "release.json is damaged"),
        ({"release": b'{"format": 9, "commit": "abc"}'}, "of format 9, not 1: use the suite of commit abc"),
        ({"release": list_files({"../../a/b/seed0/best.ckpt": (1, "")})}, "does not belong in a release"),
        ({"release": list_files({"/a/b/seed0/best.ckpt": (1, "")})}, "does not belong in a release"),
        ({"release": list_files({f"{RUN}/best.ckpt": (1, "0")})}, "release.json is damaged"),
        ({"release": b'{"format": 1, "files": []}'}, "release.json is damaged"),
    ],
)
def test_a_release_that_is_not_what_it_claims_is_refused(release, tmp_path, changed, message):
    damaged = rewrite(release, tmp_path / "damaged.zip", **changed)
    with pytest.raises(CDCError, match=message):
        open_release(str(damaged), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").glob("*") if not path.name.startswith(".")] == []


def test_no_damage_of_an_archive_ends_in_a_traceback(release, tmp_path):
    content, refused = release.read_bytes(), 0
    for place in range(7, len(content), len(content) // 40):
        damaged = tmp_path / "damaged.zip"
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 0x5A]) + content[place + 1 :])
        with contextlib.suppress(CDCError):
            open_release(str(damaged), tmp_path / f"cache{place}")
            continue
        refused += 1
    assert refused > 30  # the others are in what nothing reads, such as file times


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_truncated_archive_is_refused(release, tmp_path, size):
    truncated = tmp_path / "truncated.zip"
    truncated.write_bytes(release.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="damaged or incomplete, fetch the release again"):
        open_release(str(truncated), tmp_path / "cache")
    with pytest.raises(ConfigError, match="no such release"):
        open_release(str(tmp_path / "none.zip"), tmp_path / "cache")


@pytest.fixture
def address(release: Path) -> Iterator[str]:
    """Address of the archive on a server in this process."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=release.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/{release.name}"
    server.shutdown()
    server.server_close()


def test_a_release_is_fetched_once_if_its_digest_is_given(address, release, tmp_path):
    pinned = f"{address}#sha256={hash_file(release)}"
    folder = open_release(pinned, tmp_path / "cache")
    content = release.read_bytes()
    release.unlink()
    assert open_release(pinned, tmp_path / "cache") == folder
    release.write_bytes(content)
    with pytest.raises(ConfigError, match="an https address is needed, or one that ends in #sha256="):
        open_release(address, tmp_path / "cache")
    with pytest.raises(CheckpointError, match="another SHA-256 than the address says"):
        open_release(f"{address}#sha256={'0' * 64}", tmp_path / "cache")
    with pytest.raises(ConfigError, match="cannot be fetched"):
        open_release(f"{address}x#sha256={'0' * 64}", tmp_path / "cache")


def test_a_download_that_breaks_off_is_not_kept(address, release, tmp_path, monkeypatch):
    pinned, whole = f"{address}#sha256={hash_file(release)}", release.stat().st_size
    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", lambda self, source, out: out.write(source.read(5_000)))
    with pytest.raises(ConfigError, match=f"broke off after 5,000 of {whole:,} bytes"):
        open_release(pinned, tmp_path / "cache")
    monkeypatch.undo()
    assert open_release(pinned, tmp_path / "cache").is_dir()


def test_commands_use_the_runs_and_the_encoder_of_a_release(release, tmp_path):
    place = {"RELEASE": str(release), "OUT": str(tmp_path / "new")}
    request = Request("predict", {**place, "METHOD": "cdc_mmpg_session"})
    assert Path(request.served_run).is_relative_to(tmp_path / "new" / "releases")
    assert not any("vocab" in word for step in PLANS["predict"](request).steps.values() for word in step.arguments)
    assert Request("train", {"CHECKPOINT": ""}).encoder_of("", 0) == ""
    export = PLANS["export"](Request("export", place)).steps.values()
    assert [step.program for step in export if step.program != "web"] == ["clips", "export"]
    given = {"CHECKPOINT": str(release), "OUT": str(tmp_path / "new"), "METHOD": "cdc_mmpg_session"}
    steps = PLANS["train"](Request("train", given)).steps.values()
    assert not any("encoder_pretraining" in step.name for step in steps)
    options = dict(word[2:].partition("=")[::2] for step in steps for word in step.arguments if word[:2] == "--")
    assert Path(options["model.init_args.encoder.checkpoint"]).read_bytes() == b"encoder"
    assert Path(options["model.init_args.reading"]).read_bytes() == b"reading"
    with pytest.raises(ConfigError, match="no pretrained encoder of seed3, but seed0"):
        PLANS["train"](Request("train", {**given, "SEED": "3"}))


def test_make_release_packs_the_runs_of_both_worlds(tmp_path, capsys):
    out = str(tmp_path / "out")
    plan = PLANS["release"](Request("release", {"OUT": out}))
    (step,) = (step for step in plan.steps.values() if step.program == "release")
    assert step.arguments[0] == out
    assert {f"{out}/{place}" for place in (RUN, "synthetic_memory/cdc_mmpg_session/seed0")} < {*step.arguments}
    assert [step.program for step in plan.steps.values()] == ["export", "report"] * 2 + ["release"]
    static = PLANS["release"](Request("release", {"OUT": out, "METHOD": "linear"})).steps.values()
    assert [step.program for step in static] == ["report", "release"]  # there is nothing to export, and no pretraining
    assert main(["release", out, f"{out}/{RUN}"]) == 4
    assert "not finished: synthetic/cdc_mmpg_session/seed0; train them first" in capsys.readouterr().err
