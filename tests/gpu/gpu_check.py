"""What a GPU has to show, part by part: `python gpu_check.py PART` writes PARTS/PART.json; `merge` prints them all.

`gpu_check.sh` runs all parts; SMALL=1 makes them small enough for a CPU.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path[:0] = ["src", ".", "tests"]
SMALL = bool(os.environ.get("SMALL"))
BATCH, IMAGE, DEPTH = (6, 32, 1) if SMALL else (256, 224, 12)
PARTS, WORK = (Path(os.environ.get(name, f"/tmp/gpu_{name.lower()}")) for name in ("PARTS", "WORK"))
PACKAGES = ("torch", "torchvision", "lightning", "timm", "transformers", "torchmetrics", "numpy", "av", "jsonargparse")
CHILDREN: list[subprocess.Popen[bytes]] = []


def machine() -> dict[str, Any]:
    """Versions, the matrix product's speed by precision, and how long a batch of frames takes to the GPU."""
    import torch

    from cdc_mmpg.benchmarks.training import MODES, matrix_peak

    found: dict[str, Any] = {"python": platform.python_version(), "processors": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError as error:
            found[name] = repr(error)
    if not torch.cuda.is_available():
        return found
    device, properties = torch.device("cuda"), torch.cuda.get_device_properties(0)
    found |= {"gpu": properties.name, "GiB": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda,
              "cudnn": torch.backends.cudnn.version()}  # fmt: skip
    found["TFLOP/s"] = {name: round(matrix_peak(device, mode) / 1e12, 1) for name, mode in MODES.items()}
    frames = torch.randint(256, (BATCH, 3, IMAGE, IMAGE, 3), dtype=torch.uint8)
    for name, source in (("pageable", frames), ("pinned", frames.pin_memory())):
        times = []
        for _ in range(8):
            torch.cuda.synchronize()
            started = time.perf_counter()
            source.to(device, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        found[f"batch to the GPU, {name}, ms"] = round(1000 * min(times), 2)
    return found


def clips() -> dict[str, Any]:
    """Some hundred real clips of the embedded dataset, made here."""
    from data_modules.synthetic_clips import DatasetCounts, make

    started = time.perf_counter()
    small = DatasetCounts(
        seen=4, unseen=2, val=2, labelled=2, history=4, test_seen=1, test=2, captioned=60, questions=3
    )
    many = DatasetCounts(
        seen=12, unseen=6, val=4, labelled=8, history=6, test_seen=2, test=4, captioned=40, questions=3
    )
    make(WORK / "clips", small if SMALL else many)
    number = len(list((WORK / "clips" / "YouTubeClips").iterdir()))
    return {"clips": number, "seconds": round(time.perf_counter() - started, 1)}


def command(method: str, out: str, *more: str, epochs: int = 2) -> list[str]:
    """Return a real command, at the paper's sizes of model and frames; runs of `out` lie together."""
    data = WORK / "clips"
    return [
        sys.executable, "-m", "cdc_mmpg", "fit", f"--config=experiments/methods/{method}.yaml",
        "--config=experiments/datasets/synthetic.yaml",
        f"--trainer.default_root_dir={WORK / out / 'synthetic' / method / 'seed0'}",
        f"--data.init_args.root={data}", f"--data.init_args.cache_dir={WORK / 'data'}",
        f"--data.init_args.vocab={data / 'vocab.txt'}", f"--data.init_args.image_size={IMAGE}",
        f"--data.init_args.resize={IMAGE}", f"--data.init_args.batch_size={4 if SMALL else 64}",
        f"--data.init_args.num_workers={0 if SMALL else 4}", f"--model.init_args.encoder.depth={DEPTH}",
        f"--trainer.max_epochs={epochs}", "--trainer.enable_progress_bar=false", *more,
    ]  # fmt: skip


def go(arguments: list[str], seconds: float, until: Callable[[], bool] | None = None) -> tuple[int, str, float]:
    """Return exit code, end of the output and seconds of a command; kill it when `until` or the limit says so."""
    started, log = time.perf_counter(), WORK / f"log{time.time_ns()}"
    if SMALL and until is None:  # in this process, where everything is imported
        from cdc_mmpg.training.cli import main as run

        return run(arguments[3:]), "", round(time.perf_counter() - started, 1)
    with log.open("wb") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    CHILDREN.append(process)
    while process.poll() is None:
        time.sleep(0.02)
        if time.perf_counter() - started > seconds or (until is not None and until()):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip() and "━" not in line]
    return process.returncode, " | ".join(lines[-3:])[-400:], round(time.perf_counter() - started, 1)


def result_of(folder: Path) -> dict[str, Any]:
    """Return what matters here of a run's results."""
    path = folder / "results.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return {
        "devices": found["devices"],
        "metrics": {
            k: round(v, 4) for k, v in found["metrics"].items() if any(x in k for x in ("acc", "loss", "recall"))
        },
        "seconds": {k: round(v, 1) for k, v in found["seconds"].items()},
    }


def runs() -> dict[str, Any]:
    """Both phases, one killed and resumed, repeated, in every precision; kept features, a session, retrieval."""
    from communities import write_msrvtt_retrieval

    out: dict[str, Any] = {}
    adr = f"--model.init_args.adr={WORK / 'a' / 'synthetic' / 'adr_pretraining' / 'seed0' / 'adr.safetensors'}"

    def note(
        name: str, method: str, arguments: list[str], seconds: float = 70, until: Callable[[], bool] | None = None
    ) -> None:
        if is_over():
            out[name] = "left out"
            return
        folder = next(part.partition("=")[2] for part in arguments if part.startswith("--trainer.default_root_dir"))
        code, said, took = go(arguments, seconds, until)
        out[name] = {"exit": code, "wall": took, **result_of(Path(folder))} | ({} if code == 0 else {"said": said})
        save("runs", out)

    small_adr = "--model.init_args.preset=small"
    note("phase_one", "adr_pretraining", command("adr_pretraining", "a", small_adr))  # fills the caches, too
    resume = WORK / "b" / "synthetic" / "cdc_mmpg" / "seed0" / "resume"
    bf16 = "--trainer.precision=bf16-mixed"

    def disturbed() -> None:
        again = command("cdc_mmpg", "b", adr, epochs=3)
        note("killed", "cdc_mmpg", again, until=lambda: any(resume.glob("epoch*.ckpt")))
        note("resumed", "cdc_mmpg", again)

    root = WORK / "msrvtt"
    root.mkdir()
    write_msrvtt_retrieval(root)
    retrieval = [
        *command("fine_tuning", "r", bf16, "--data.init_args.only_present=true"),
        f"--data.init_args.root={root}",
        f"--data.init_args.cache_dir={WORK / 'msrvtt-data'}", f"--data.init_args.vocab={root / 'vocab.txt'}",
        f"--trainer.default_root_dir={WORK / 'r' / 'msrvtt_retrieval' / 'fine_tuning' / 'seed0'}",
    ]  # fmt: skip
    retrieval = [part.replace("datasets/synthetic.yaml", "datasets/msrvtt_retrieval.yaml") for part in retrieval]
    jobs = [
        partial(note, "phase_two", "cdc_mmpg", command("cdc_mmpg", "a", adr, epochs=3)),
        disturbed,
        partial(note, "undisturbed_again", "cdc_mmpg", command("cdc_mmpg", "c", adr, epochs=3)),
        partial(note, "bf16", "cdc_mmpg", command("cdc_mmpg", "d", adr, bf16, epochs=1)),
        partial(note, "frames_on_the_device", "cdc_mmpg", command(
            "cdc_mmpg", "e", adr, "--data.init_args.frame_cache=device", epochs=3)),
        partial(note, "accumulated", "cdc_mmpg", command(
            "cdc_mmpg", "f", adr, f"--data.init_args.per_device={2 if SMALL else 16}", epochs=3)),
        partial(note, "encoder_pretraining", "encoder_pretraining", command(
            "encoder_pretraining", "a", "--model.init_args.caption_epochs=1", "--model.init_args.whole_epochs=1")),
        partial(note, "session", "cdc_mmpg_session", command("cdc_mmpg_session", "a")),
        partial(note, "kept_features", "hyper", command("hyper", "a")),
        partial(note, "bf16_statistics_of_batches", "adr_pretraining", command(
            "adr_pretraining", "g", small_adr, bf16, "--model.init_args.axis=batch", epochs=1)),
        partial(note, "float16", "fine_tuning", command(
            "fine_tuning", "h", "--trainer.precision=16-mixed", epochs=1)),
        partial(note, "retrieval", "fine_tuning", retrieval),
    ]  # fmt: skip
    if SMALL:
        for job in jobs:
            job()
    else:
        with ThreadPoolExecutor(4) as pool:  # what they take is mostly imports
            for done in [pool.submit(job) for job in jobs]:
                done.result()
    best = {x: WORK / x / "synthetic" / "cdc_mmpg" / "seed0" / "best.ckpt" for x in "abcef"}
    out["two undisturbed runs"] = compare(best["a"], best["c"])
    for name, other in (("resumed", "b"), ("frames on the device", "e"), ("accumulated", "f")):
        out[f"{name} against undisturbed"] = compare(best["a"], best[other])
    return out


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Return how far the best weights of two runs are from each other."""
    import torch

    if missing := [str(path) for path in (first, second) if not path.is_file()]:
        return {"missing": missing}
    a, b = (torch.load(path, map_location="cpu", weights_only=True) for path in (first, second))
    apart = {
        key: float((value.float() - b["state_dict"][key].float()).abs().max()) for key, value in a["state_dict"].items()
    }
    worst = max(apart, key=lambda key: apart[key])
    return {"epochs": [a["epoch"], b["epoch"]], "largest difference": apart[worst], "in": worst}


def syncs() -> dict[str, Any]:
    """Host synchronisations in a training step, by method and line, as CUDA counts them."""
    import torch
    from lightning import Callback, Trainer
    from torch.utils.data import DataLoader

    from cdc_mmpg.benchmarks.training import BENCHMARK_ROWS, Sizes, build_method, draw_batch

    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                torch.cuda.set_sync_debug_mode("warn")

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                torch.cuda.set_sync_debug_mode("default")

    found, sizes = {}, Sizes(batch=16, steps=8, image=64, depth=2)
    for name, task in BENCHMARK_ROWS:
        batches: Any = [draw_batch(name, task, sizes)] * 8
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(
                devices=1, max_epochs=1, precision="bf16-mixed", callbacks=[Watch()], logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            ).fit(build_method(name, task, sizes), DataLoader(batches, batch_size=None))  # fmt: skip
        lines = Counter(
            f"{'/'.join(x.filename.split('/')[-2:])}:{x.lineno}" for x in caught if "synchroniz" in str(x.message)
        )
        found[f"{name}.{task}"] = {line: round(number / 3, 2) for line, number in lines.most_common()}
        save("syncs", found)
    return found


def numerics() -> dict[str, Any]:
    """How far frame features are from float64: on the CPU, and on the GPU in every precision."""
    import torch

    from cdc_mmpg.benchmarks.training import MODES
    from cdc_mmpg.models.all_in_one import AllInOne
    from cdc_mmpg.training.matmul import set_matmul

    torch.manual_seed(0)
    encoder = AllInOne(image_size=IMAGE, depth=DEPTH).eval()
    video, ids = torch.randn(4, 3, 3, IMAGE, IMAGE), torch.randint(1000, 30_000, (4, 12))
    mask = torch.ones_like(ids)
    mask[::2, 9:] = 0
    found = {}
    with torch.no_grad():
        reference = encoder.double()(video.double(), ids, mask).frame_features
        encoder.float()
        found["cpu"] = distance(encoder(video, ids, mask).frame_features, reference)
        if torch.cuda.is_available():
            encoder.cuda()
            for name, mode in MODES.items():
                set_matmul(mode.matmul)
                with torch.autocast("cuda", torch.bfloat16, enabled=mode.precision == "bf16-mixed"):
                    features = encoder(video.cuda(), ids.cuda(), mask.cuda()).frame_features
                found[name] = distance(features, reference)
    return found


def distance(found: Any, reference: Any) -> float:
    """Return the relative difference of two tensors."""
    return float(f"{float((found.double().cpu() - reference).norm() / reference.norm()):.3g}")


def profile() -> dict[str, Any]:
    """Where the milliseconds of a bfloat16 step of cdc_mmpg go, and how much of it the device is busy."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from cdc_mmpg.benchmarks.training import Sizes, build_method, draw_batch

    sizes = Sizes(BATCH, 3, image=IMAGE, depth=DEPTH)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    method = build_method("cdc_mmpg", "open_ended", sizes).to(device).train()
    batch = draw_batch("cdc_mmpg", "open_ended", sizes)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-4, fused=True)

    def step() -> None:
        own = type(batch)(*(part.to(device, non_blocking=True) for part in batch))
        with torch.autocast(device, torch.bfloat16):
            loss = method._step(own, "train")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profiler(activities=activities) as run:
        started = time.perf_counter()
        for _ in range(3):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / 3
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = sorted(run.key_averages(), key=lambda event: -getattr(event, key))
    (PARTS / "profile.txt").write_text(run.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=60))
    return {
        "ms": round(1000 * seconds, 2),
        "busy ms": round(sum(getattr(event, key) for event in rows) / 3000, 2),
        "most expensive, ms": {event.key[:60]: round(getattr(event, key) / 3000, 2) for event in rows[:10]},
    }


def deployment() -> dict[str, Any]:
    """The generator of `make benchmark OF=deployment` on the GPU."""
    from cdc_mmpg.benchmarks.generator import measure_generator

    return measure_generator(0.6) or {"skipped": "no GPU"}


def merge() -> None:
    """Print all parts as one JSON, and leave them in $OUT."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(PARTS.glob("*.json"))}
    out = Path(os.environ.get("OUT", PARTS))
    (out / "gpu_check.json").write_text(json.dumps(found, indent=1))
    for name in ("profile.txt", "loading.log"):
        if (PARTS / name).is_file():
            (out / name).write_text((PARTS / name).read_text())
    print("GPU_CHECK_JSON", json.dumps(found, separators=(",", ":"))[:11000])


def save(name: str, content: dict[str, Any]) -> None:
    """Write what a part has found so far."""
    PARTS.mkdir(parents=True, exist_ok=True)
    (PARTS / f"{name}.json").write_text(json.dumps(content))


def is_over() -> bool:
    """Return whether the part's time is used up."""
    return time.time() > float(os.environ.get("UNTIL", "inf"))


def leave(*_: object) -> None:
    """End what this part has started, and itself: its limit is reached."""
    for process in CHILDREN:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(143)


def main() -> int:
    """Run the part that is named."""
    part = sys.argv[1]
    if part == "merge":
        merge()
        return 0
    signal.signal(signal.SIGTERM, leave)
    WORK.mkdir(parents=True, exist_ok=True)
    started, code = time.perf_counter(), 0
    try:
        found = globals()[part]()
    except Exception as error:
        where = traceback.format_exc().strip().splitlines()[-3:]
        found, code = {"error": f"{type(error).__name__}: {error}"[:300], "at": where}, 1
    save(part, {**found, "part_seconds": round(time.perf_counter() - started, 1)})
    return code


if __name__ == "__main__":
    sys.exit(main())
