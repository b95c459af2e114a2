"""Release of finished runs: one zip archive with weights, bundles, tables and a card for each run.

    release.json                    commit, versions, runs, and the bytes and SHA-256 of every other file
    worlds.md                       and of each dataset table.md, report.html, report.json
    <dataset>/<method>/seed<N>/     results, configuration, weights, answers, vocabulary, bundles, CARD.md

The private key of a cloud bundle is left out: whoever opens the release gets a new one (`opened_release`). The paths of
this machine are replaced by those of a default checkout.
"""

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from cdc_mmpg.catalogue import BY_NAME, PRETRAINING
from cdc_mmpg.deployment.opened_release import BUNDLE_CONTENT, CONTENT, DEFAULT_ROOT, FORMAT, MANIFEST
from cdc_mmpg.errors import CheckpointError
from cdc_mmpg.files import atomic_write, hash_file
from cdc_mmpg.program import exit_on_signals, log_to_terminal, run_to_exit_code
from cdc_mmpg.progress import track
from cdc_mmpg.results import CONFIG, describe_provenance, read_results, read_settings
from cdc_mmpg.training.reopen import VOCABULARY

CARD = "CARD.md"
TEXT_SUFFIXES = (".json", ".yaml", ".md", ".html")  # of files that may name paths of this machine
PACKED_SUFFIXES = (*TEXT_SUFFIXES, ".csv", ".txt")  # of files that compression makes smaller
ABSOLUTE = re.compile(r"(?<=[\s\"'=])/(?:[^/\s\"'<>]+/)+")  # the folders of an absolute path
TIME = (1980, 1, 1, 0, 0, 0)  # of every file in the archive, so that equal content makes equal archives


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack finished runs; return the exit code (see `errors`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description="pack finished runs, their bundles and tables into one archive")
    parser.add_argument("root", type=Path, help="folder of the datasets' folders (OUT)")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of the runs in it")
    options = parser.parse_args(arguments)
    log_to_terminal()
    exit_on_signals()

    def run() -> None:
        path = write_release(options.root, options.runs)
        print(f"written: {path} ({decimal(path.stat().st_size)}), SHA-256 {hash_file(path)}")

    return run_to_exit_code(run)


def write_release(root: Path, runs: Sequence[Path]) -> Path:
    """Write `root/release-<commit>.zip` with finished runs, and return its path.

    Args:
        root: folder of the datasets' folders.
        runs: folders of the runs, `root/<dataset>/<method>/seed<N>`.

    Raises:
        CheckpointError: a run is not finished; names all such runs.
    """
    results = {run: found for run in runs if (found := read_results(run))}
    if unfinished := [str(run.relative_to(root)) for run in runs if run not in results]:
        raise CheckpointError(f"{root}: not finished: {', '.join(unfinished)}; train them first (make train)")
    origin = describe_provenance()
    path = root / f"release-{origin['commit'][:12]}{'-dirty' * origin['commit'].endswith('-dirty')}.zip"
    files: dict[str, dict[str, Any]] = {}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in track(list(_list_contents(root, results)), "packing"):
            data = content if isinstance(content, bytes) else _read_neutral(content, root)
            files[name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
            _add(archive, name, data)
        names = [run.relative_to(root).as_posix() for run in runs]
        manifest = {"format": FORMAT, **origin, "runs": names, "files": files}
        _add(archive, MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
    return path


def _list_contents(root: Path, results: dict[Path, dict[str, Any]]) -> Iterator[tuple[str, Path | bytes]]:
    """Yield the files of a release: the name in the archive, and the path or content."""
    datasets = sorted({run.parents[1] for run in results})
    paths = [root / "worlds.md"] if len(datasets) > 1 else []
    paths += [path for dataset in datasets for path in sorted(dataset.glob("*.*"))]
    paths += [path for run in results for path in sorted(run.rglob("*"))]
    for path in paths:
        name = path.relative_to(root).as_posix()
        if CONTENT.fullmatch(name) and path.is_file() and path.name not in (VOCABULARY, CARD):
            yield name, path
    for run, found in results.items():
        place = run.relative_to(root).as_posix()
        if (run / CONFIG).is_file():
            given = read_settings(run)["data"]["init_args"].get("vocab") or ""
            vocabs = (run / VOCABULARY, Path(given))  # the first one if the run is from a release
            yield from [(f"{place}/{VOCABULARY}", vocab) for vocab in vocabs if vocab.is_file()][:1]
        yield f"{place}/{CARD}", write_card(place, found).encode()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    packs = name.endswith(PACKED_SUFFIXES)
    archive.writestr(zipfile.ZipInfo(name, TIME), content, zipfile.ZIP_DEFLATED if packs else zipfile.ZIP_STORED)


def _read_neutral(path: Path, root: Path) -> bytes:
    """Return the content of a file, with the paths of this machine replaced by those of a default checkout."""
    content = path.read_bytes()
    if path.suffix not in TEXT_SUFFIXES or BUNDLE_CONTENT.fullmatch(f"{path.parent.name}/{path.name}"):
        return content  # bundles name no paths, and have digests
    text = content.decode()
    for folder, neutral in ((root.absolute(), DEFAULT_ROOT), (Path.cwd(), "."), (Path.home(), "~")):
        text = re.sub(rf"{re.escape(str(folder))}(?![\w.-])", neutral, text) if folder != Path("/") else text
    return ABSOLUTE.sub("", text).encode()


def write_card(place: str, results: dict[str, Any]) -> str:
    """Write the card of a run: what it is, what it was trained on, its figures, and the licence of its parts.

    Args:
        place: `<dataset>/<method>/seed<N>`.
        results: content of its results.json.
    """
    dataset, name, seed = place.split("/")
    method, synthetic, number = BY_NAME[name.partition(".")[0]], dataset.startswith("synthetic"), results["seed"]
    if name == PRETRAINING:
        use = f"make train CHECKPOINT=release.zip SEED={number} METHOD=linear"
    else:
        use = f"make predict RELEASE=release.zip DATASET={dataset} METHOD={name} SEED={number} VIDEO= QUESTION="
    lines = [f"# {method.label or name} ({place})", "", "```sh", use, "```", "", "## Trained on", ""]
    lines.append(f"`DATASET={dataset}`, {seed}, commit {results['commit']}.")
    if synthetic:
        lines.append(
            "All clips are synthetic: the run has seen no real video, and its figures say nothing about real ones."
        )
    else:
        lines.append("`inputs.json` has the digests of the annotations and of the weights that it started from.")
    lines += [f"Questions: {', '.join(f'{count:,} {split}' for split, count in questions.items())}."
              for questions in [results.get("questions")] if questions]  # fmt: skip
    lines += [f"Best epoch: {results['best_epoch'] + 1} of {results['epochs']}."] if "epochs" in results else []
    lines += [f"Versions: {', '.join(map(' '.join, results['versions'].items()))}.", "", "## Figures", ""]
    lines += list(_list_figures(results)) or ["None: it answers no questions."]
    lines += [
        "",
        "## Licence",
        "",
        "The authors of the suite have not chosen a licence yet: ask them before you use this.",
    ]
    lines.append("Where the run started from other weights or data, their licences hold as well.")
    return "\n".join(lines) + "\n"


def _list_figures(results: dict[str, Any]) -> Iterable[str]:
    """Yield the lines of a card's table: accuracy in every case and group of devices, with its 95 % interval."""
    cells = [(case, group, kinds["all"]) for case, groups in results.get("accuracy", {}).items()
             for group, kinds in groups.items() if "all" in kinds]  # fmt: skip
    if cells:
        yield "| case | questions of | accuracy % | 95 % interval |\n|---|---|---:|---:|"
    for case, group, cell in cells:
        value, low, high = (f"{100 * cell[end]:.1f}" for end in ("value", "low", "high"))
        yield f"| {case} | {group} | {value} | {low} to {high} |"
