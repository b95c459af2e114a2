"""Checks that need a GPU, in parts: `python gpu_check.py PART` writes PARTS/PART.json; `merge` prints all parts.

`gpu_check.sh` runs all parts; SMALL=1 makes them small enough for a CPU. A part is the function with its name.
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
    """Return versions, the speed of matrix products by precision, and the time to copy a batch of frames to the GPU."""
    import torch

    from cdc_mmpg.benchmarks.training import MODES, measure_matrix_peak

    facts: dict[str, Any] = {"python": platform.python_version(), "processors": os.cpu_count()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError as error:
            facts[name] = repr(error)
    if not torch.cuda.is_available():
        return facts
    device, properties = torch.device("cuda"), torch.cuda.get_device_properties(0)
    facts |= {"gpu": properties.name, "GiB": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda,
              "cudnn": torch.backends.cudnn.version()}  # fmt: skip
    facts["TFLOP/s"] = {name: round(measure_matrix_peak(device, mode) / 1e12, 1) for name, mode in MODES.items()}
    frames = torch.randint(256, (BATCH, 3, IMAGE, IMAGE, 3), dtype=torch.uint8)
    for name, source in (("pageable", frames), ("pinned", frames.pin_memory())):
        times = []
        for _ in range(8):
            torch.cuda.synchronize()
            started = time.perf_counter()
            source.to(device, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        facts[f"batch to the GPU, {name}, ms"] = round(1000 * min(times), 2)
    return facts


def clips() -> dict[str, Any]:
    """Render some hundred clips of the synthetic dataset, encoded as real videos."""
    from data_modules.synthetic_clips import DatasetCounts, render_dataset

    started = time.perf_counter()
    small = DatasetCounts(
        seen=4, unseen=2, val=2, labelled=2, history=4, test_seen=1, test=2, captioned=60, questions=3
    )
    large = DatasetCounts(
        seen=12, unseen=6, val=4, labelled=8, history=6, test_seen=2, test=4, captioned=40, questions=3
    )
    render_dataset(WORK / "clips", small if SMALL else large)
    number = len(list((WORK / "clips" / "YouTubeClips").iterdir()))
    return {"clips": number, "seconds": round(time.perf_counter() - started, 1)}


def build_command(method: str, out: str, *more: str, epochs: int = 2) -> list[str]:
    """Return a training command with the paper's sizes of model and frames; its run folder is below `out`."""
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


def execute(arguments: list[str], seconds: float, until: Callable[[], bool] | None = None) -> tuple[int, str, float]:
    """Run a command until it ends, `until` holds or time is up; return its exit code, last output and seconds."""
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


def summarize(folder: Path) -> dict[str, Any]:
    """Return devices, metrics and seconds of a run's results; empty if there are none."""
    path = folder / "results.json"
    if not path.is_file():
        return {}
    results = json.loads(path.read_text())
    return {
        "devices": results["devices"],
        "metrics": {
            k: round(v, 4) for k, v in results["metrics"].items() if any(x in k for x in ("acc", "loss", "recall"))
        },
        "seconds": {k: round(v, 1) for k, v in results["seconds"].items()},
    }


def runs() -> dict[str, Any]:
    """Run both phases, also resumed, repeated and in every precision; cached features, a session, retrieval."""
    from communities import write_msrvtt_retrieval

    out: dict[str, Any] = {}
    adr = f"--model.init_args.adr={WORK / 'a' / 'synthetic' / 'adr_pretraining' / 'seed0' / 'adr.safetensors'}"

    def record(
        name: str, method: str, arguments: list[str], seconds: float = 70, until: Callable[[], bool] | None = None
    ) -> None:
        if is_time_over():
            out[name] = "left out"
            return
        folder = next(part.partition("=")[2] for part in arguments if part.startswith("--trainer.default_root_dir"))
        code, end, wall = execute(arguments, seconds, until)
        out[name] = {"exit": code, "wall": wall, **summarize(Path(folder))} | ({} if code == 0 else {"said": end})
        write_part("runs", out)

    small_adr = "--model.init_args.preset=small"
    record("phase_one", "adr_pretraining", build_command("adr_pretraining", "a", small_adr))  # fills the caches, too
    resume = WORK / "b" / "synthetic" / "cdc_mmpg" / "seed0" / "resume"
    bf16 = "--trainer.precision=bf16-mixed"

    def run_interrupted() -> None:
        interrupted = build_command("cdc_mmpg", "b", adr, epochs=3)
        record("killed", "cdc_mmpg", interrupted, until=lambda: any(resume.glob("epoch*.ckpt")))
        record("resumed", "cdc_mmpg", interrupted)

    root = WORK / "msrvtt"
    root.mkdir()
    write_msrvtt_retrieval(root)
    retrieval = [
        *build_command("fine_tuning", "r", bf16, "--data.init_args.only_present=true"),
        f"--data.init_args.root={root}",
        f"--data.init_args.cache_dir={WORK / 'msrvtt-data'}", f"--data.init_args.vocab={root / 'vocab.txt'}",
        f"--trainer.default_root_dir={WORK / 'r' / 'msrvtt_retrieval' / 'fine_tuning' / 'seed0'}",
    ]  # fmt: skip
    retrieval = [part.replace("datasets/synthetic.yaml", "datasets/msrvtt_retrieval.yaml") for part in retrieval]
    jobs = [
        partial(record, "phase_two", "cdc_mmpg", build_command("cdc_mmpg", "a", adr, epochs=3)),
        run_interrupted,
        partial(record, "undisturbed_again", "cdc_mmpg", build_command("cdc_mmpg", "c", adr, epochs=3)),
        partial(record, "bf16", "cdc_mmpg", build_command("cdc_mmpg", "d", adr, bf16, epochs=1)),
        partial(record, "frames_on_the_device", "cdc_mmpg", build_command(
            "cdc_mmpg", "e", adr, "--data.init_args.frame_cache=device", epochs=3)),
        partial(record, "accumulated", "cdc_mmpg", build_command(
            "cdc_mmpg", "f", adr, f"--data.init_args.per_device={2 if SMALL else 16}", epochs=3)),
        partial(record, "encoder_pretraining", "encoder_pretraining", build_command(
            "encoder_pretraining", "a", "--model.init_args.caption_epochs=1", "--model.init_args.whole_epochs=1")),
        partial(record, "session", "cdc_mmpg_session", build_command("cdc_mmpg_session", "a")),
        partial(record, "kept_features", "hyper", build_command("hyper", "a")),
        partial(record, "bf16_statistics_of_batches", "adr_pretraining", build_command(
            "adr_pretraining", "g", small_adr, bf16, "--model.init_args.axis=batch", epochs=1)),
        partial(record, "float16", "fine_tuning", build_command(
            "fine_tuning", "h", "--trainer.precision=16-mixed", epochs=1)),
        partial(record, "retrieval", "fine_tuning", retrieval),
    ]  # fmt: skip
    if SMALL:
        for job in jobs:
            job()
    else:
        with ThreadPoolExecutor(4) as pool:  # most of their time goes into imports
            for done in [pool.submit(job) for job in jobs]:
                done.result()
    best = {x: WORK / x / "synthetic" / "cdc_mmpg" / "seed0" / "best.ckpt" for x in "abcef"}
    out["two undisturbed runs"] = compare_weights(best["a"], best["c"])
    for name, other in (("resumed", "b"), ("frames on the device", "e"), ("accumulated", "f")):
        out[f"{name} against undisturbed"] = compare_weights(best["a"], best[other])
    return out


def compare_weights(first: Path, second: Path) -> dict[str, Any]:
    """Return the largest difference between the best weights of two runs."""
    import torch

    if missing := [str(path) for path in (first, second) if not path.is_file()]:
        return {"missing": missing}
    a, b = (torch.load(path, map_location="cpu", weights_only=True) for path in (first, second))
    differences = {
        key: float((value.float() - b["state_dict"][key].float()).abs().max()) for key, value in a["state_dict"].items()
    }
    worst = max(differences, key=lambda key: differences[key])
    return {"epochs": [a["epoch"], b["epoch"]], "largest difference": differences[worst], "in": worst}


def syncs() -> dict[str, Any]:
    """Count host synchronizations per training step by method and line, as CUDA reports them."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}

    from lightning import Callback, Trainer
    from torch.utils.data import DataLoader

    from cdc_mmpg.benchmarks.training import BENCHMARK_ROWS, Sizes, build_method, draw_batch

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                torch.cuda.set_sync_debug_mode("warn")

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                torch.cuda.set_sync_debug_mode("default")

    counts, sizes = {}, Sizes(batch=16, steps=8, image=64, depth=2)
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
        counts[f"{name}.{task}"] = {line: round(number / 3, 2) for line, number in lines.most_common()}
        write_part("syncs", counts)
    return counts


def numerics() -> dict[str, Any]:
    """Return the error of frame features against float64: on the CPU, and on the GPU in every precision."""
    import torch

    from cdc_mmpg.benchmarks.training import MODES
    from cdc_mmpg.models.all_in_one import AllInOne
    from cdc_mmpg.training.matmul import set_matmul

    torch.manual_seed(0)
    encoder = AllInOne(image_size=IMAGE, depth=DEPTH).eval()
    video, ids = torch.randn(4, 3, 3, IMAGE, IMAGE), torch.randint(1000, 30_000, (4, 12))
    mask = torch.ones_like(ids)
    mask[::2, 9:] = 0
    errors = {}
    with torch.no_grad():
        reference = encoder.double()(video.double(), ids, mask).frame_features
        encoder.float()
        errors["cpu"] = compute_error(encoder(video, ids, mask).frame_features, reference)
        if torch.cuda.is_available():
            encoder.cuda()
            for name, mode in MODES.items():
                set_matmul(mode.matmul)
                with torch.autocast("cuda", torch.bfloat16, enabled=mode.precision == "bf16-mixed"):
                    features = encoder(video.cuda(), ids.cuda(), mask.cuda()).frame_features
                errors[name] = compute_error(features, reference)
    return errors


def compute_error(actual: Any, reference: Any) -> float:
    """Return the relative difference of two tensors."""
    return float(f"{float((actual.double().cpu() - reference).norm() / reference.norm()):.3g}")


def profile() -> dict[str, Any]:
    """Profile a bfloat16 step of cdc_mmpg: its time, the device's busy time, and the most expensive operations."""
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
        on_device = type(batch)(*(part.to(device, non_blocking=True) for part in batch))
        with torch.autocast(device, torch.bfloat16):
            loss = method._step(on_device, "train")
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
    """Measure the generator on the GPU, like `make benchmark OF=deployment`."""
    from cdc_mmpg.benchmarks.generator import measure_generator

    return measure_generator(0.6) or {"skipped": "no GPU"}


def merge() -> None:
    """Print all parts as one JSON object, and write them to $OUT."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(PARTS.glob("*.json"))}
    out = Path(os.environ.get("OUT", PARTS))
    (out / "gpu_check.json").write_text(json.dumps(parts, indent=1))
    for name in ("profile.txt", "loading.log"):
        if (PARTS / name).is_file():
            (out / name).write_text((PARTS / name).read_text())
    print("GPU_CHECK_JSON", json.dumps(parts, separators=(",", ":"))[:11000])


def write_part(name: str, content: dict[str, Any]) -> None:
    """Write the results of a part so far."""
    PARTS.mkdir(parents=True, exist_ok=True)
    (PARTS / f"{name}.json").write_text(json.dumps(content))


def is_time_over() -> bool:
    """Return whether the part's time is used up."""
    return time.time() > float(os.environ.get("UNTIL", "inf"))


def kill_and_exit(*_: object) -> None:
    """Kill the commands of this part and exit: its time limit is reached."""
    for process in CHILDREN:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(143)


def main() -> int:
    """Run the part that the command line names."""
    part = sys.argv[1]
    if part == "merge":
        merge()
        return 0
    signal.signal(signal.SIGTERM, kill_and_exit)
    WORK.mkdir(parents=True, exist_ok=True)
    started, code = time.perf_counter(), 0
    try:
        results = globals()[part]()
    except Exception as error:
        where = traceback.format_exc().strip().splitlines()[-3:]
        results, code = {"error": f"{type(error).__name__}: {error}"[:300], "at": where}, 1
    write_part(part, {**results, "part_seconds": round(time.perf_counter() - started, 1)})
    return code


if __name__ == "__main__":
    sys.exit(main())
