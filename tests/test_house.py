"""The structure: imports flow one way, every pair of configurations parses, and what the pages say is true."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mutate
import pytest
import torch
import yaml

from cdc_mmpg import catalogue
from cdc_mmpg.commands.main import main as run_command
from cdc_mmpg.commands.main import run_program
from cdc_mmpg.commands.request import COMMAND_VARIABLES
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.training.cli import main
from conftest import TINY, write_clip, write_msvd
from data_modules import synthetic_clips
from processes import finish, start

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("src/cdc_mmpg/**/*.py"), *ROOT.glob("data_modules/*.py")]
PAGES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in (
    "checkpoints", "data_modules", "experiments", "src/cdc_mmpg/training", "src/cdc_mmpg/device", "src/cdc_mmpg/cloud",
    "src/cdc_mmpg/methods", "tests",
))]  # fmt: skip

# From the ground up: a room imports from lower layers and from itself, not from the room beside it.
GROUND = {"catalogue", "dimensions", "errors", "files", "launchers", "processors", "program", "progress", "results"}
LAYERS = (
    GROUND,
    {"media", "wire"},
    {"data", "device"},
    {"data_modules", "evaluation"},
    {"models"},
    {"cloud", "methods"},
    {"evidence", "training"},
    {"controls", "report"},
    {"deployment"},
    {"benchmarks"},
    {"commands"},
)


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def room_of(name: str) -> str:
    """The room of a module, by its full name."""
    parts = name.split(".")
    return parts[0] if parts[0] == "data_modules" else parts[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = "data_modules" if parts[0] == "data_modules" else parts[2]
    if own.startswith("__"):
        return
    height = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    rooms = {room_of(name) for name in imported(path) if name.split(".")[0] in ("cdc_mmpg", "data_modules")}
    beside = {own} | (GROUND if own in GROUND else set())
    assert {room for room in rooms - beside if height[room] >= height[own]} == set()
    assert parts[0] == "data_modules" or "data_modules" not in rooms  # src knows no dataset


LIGHT = (
    *("catalogue", "dimensions", "errors", "files", "launchers", "processors", "program", "progress", "results"),
    "training/cli",
    *("media", "wire", "device", "evidence", "report", "commands", "evaluation/metrics"),
    *("deployment/bundle_files", "deployment/demo", "deployment/export", "deployment/local", "deployment/source"),
)  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_no_torch(name):
    heavy = {"torch", "lightning", "timm", "transformers", "torchmetrics"}
    place = ROOT / "src" / "cdc_mmpg" / name
    paths = list(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert paths
    for path in paths:
        tree = ast.parse(path.read_text())
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        assert not {module.split(".")[0] for module in top} & heavy, path


def test_a_quick_answer_imports_nothing_slow():
    """Also by way of what it imports: a refusal takes a second, torch and Lightning ten."""
    modules = (
        *("commands.main", "commands.execute", "commands.predict", "commands.prepare", "commands.sweep", "device"),
        *("deployment.export", "deployment.demo", "report.page", "report.tables", "training.cli"),
    )
    slow = ("torch", "lightning", "timm", "transformers", "matplotlib", "wandb", "sklearn")
    code = "".join(f"import cdc_mmpg.{name}\n" for name in modules)
    code += f"import sys; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=OUTSIDE
    )
    assert done.stdout == "[]\n"


DATASETS = sorted(path.stem for path in ROOT.glob("experiments/datasets/*.yaml"))
METHODS = sorted(path.stem for path in ROOT.glob("experiments/methods/*.yaml"))


def test_every_method_has_a_configuration_and_an_entry_in_the_catalogue():
    assert sorted(name for name, method in catalogue.BY_NAME.items() if method.program == "fit") == METHODS
    assert len(catalogue.BY_NAME) == len(catalogue.METHODS)
    turns = [method.turn for method in catalogue.METHODS if method.turn]
    assert len(set(turns)) == len(turns)
    for method in catalogue.METHODS:
        assert {method.encoder, method.adr} - {""} <= catalogue.BY_NAME.keys(), method.name


DEVICE_WORDS = ("session", "corrected", "mean_anchor", "in_context")
NEEDS_DEVICES = [name for name in METHODS if any(word in name for word in DEVICE_WORDS)]
# Datasets that know no devices refuse these.
REFUSED = [*NEEDS_DEVICES, "encoder_pretraining"]
# The synthetic dataset and MSVD try all methods; the others the paper's two phases, its simplest baseline, and two more
# in turn: a parse takes a second.
ACCEPTED = [name for name in METHODS if name not in REFUSED]
PAIRS = [
    pytest.param(dataset, method, marks=() if dataset in ("synthetic", "msvd") else pytest.mark.slow)
    for number, dataset in enumerate(DATASETS)
    for method in METHODS
    if dataset in ("synthetic", "msvd") or method in ("adr_pretraining", "cdc_mmpg", "linear")
    or method in (REFUSED[number % len(REFUSED)], ACCEPTED[number % len(ACCEPTED)])
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "method"), PAIRS)
def test_every_pair_parses_with_the_papers_settings(dataset, method, phase_one):
    from cdc_mmpg.training.experiment import Experiment

    pair = [f"--config=experiments/methods/{method}.yaml", f"--config=experiments/datasets/{dataset}.yaml"]
    needed = ["--data.init_args.root=x", "--data.init_args.cache_dir=y", "--model.init_args.encoder.depth=1"]
    adr = [f"--model.init_args.adr={phase_one}"] if catalogue.BY_NAME[method].adr else []
    if dataset != "synthetic" and method in REFUSED:
        with pytest.raises(ConfigError, match="devices" if method in NEEDS_DEVICES else "captions"):
            Experiment([*pair, *needed, *adr], run=False)
        return
    experiment = Experiment([*pair, *needed, *adr], run=False)
    model, data = experiment.model, experiment.datamodule
    session = "cdc_mmpg_session" in method or method == "session_oracle"
    module = "cdc_mmpg_session" if session else "corrected" if method.startswith("corrected") else method
    for suffix in ("_frozen", "_fan_in", "_virtual"):
        module = module.removesuffix(suffix)
    assert type(model).__module__ == f"cdc_mmpg.methods.{module}"
    phase_one_run = method.startswith("adr_pretraining")
    pretraining = method == "encoder_pretraining"  # ours
    assert model.learning_rate == (7e-4 if pretraining else 2e-5 if phase_one_run else 1e-4)
    assert experiment.trainer.max_epochs == (22 if pretraining else 10 if phase_one_run else 40)
    assert data.batch_size == (32 if dataset == "synthetic" else 256)
    frames_of_five = dataset in ("msrvtt_choice", "tgif_action", "tgif_transition") and model.train_encoder
    assert experiment.trainer.accumulate_grad_batches == (4 if frames_of_five else 1)
    classes = {"msvd": 1001, "msrvtt": 1501, "tgif": 1541, "synthetic": 17}
    if dataset in classes:
        assert (model.head.inputs, model.head.outputs) == (96, classes[dataset])
    else:
        assert (model.head.inputs, model.head.outputs) == (192, 256 if dataset == "msrvtt_retrieval" else 1)
    assert model.encoder.num_frames == 3
    if phase_one_run:  # of the sizes that fit the paper's counts
        assert model.adr.preset == ("paper_mc" if model.head.task == "multiple_choice" else "paper_qa")
    if catalogue.BY_NAME[method].adr:
        assert isinstance(model.fda.mlp, torch.nn.Identity)
    assert model.train_encoder == (module in ("fine_tuning", "encoder_pretraining") or (method.startswith("cdc_mmpg")
                                   and module == "cdc_mmpg" and not method.endswith("_frozen")))  # fmt: skip


def test_a_key_is_set_in_one_file_only():
    def leaves(tree: object, prefix: str = "") -> set[str]:
        if isinstance(tree, dict):
            return {leaf for key, value in tree.items() for leaf in leaves(value, f"{prefix}.{key}")}
        return {prefix}

    for dataset in DATASETS:
        for method in METHODS:
            first, second = (
                leaves(yaml.safe_load((ROOT / "experiments" / kind / f"{name}.yaml").read_text()))
                for kind, name in (("datasets", dataset), ("methods", method))
            )
            assert not first & second


# The tests may run under make themselves, with variables of their own.
OUTSIDE = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")}


def make(*arguments: str) -> list[list[str]]:
    """The programs of ours that a make target would run, each with its arguments."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, env=OUTSIDE)
    lines = [line for line in done.stdout.splitlines() if "-m cdc_mmpg " in line and not line.startswith("set --")]
    return [words[words.index("cdc_mmpg") + 1 :] for words in map(shlex.split, lines)]


def commands(page: Path) -> list[list[str]]:
    """The make commands in a page's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("make ")]


def run_tiny(log: Path, program: str, arguments: list[str]) -> int:
    """Run a program as make lists it; of a further world few clips are made, in full it takes minutes."""
    if program == "clips":
        folder, _, world, _, seed = arguments
        synthetic_clips.render_dataset(Path(folder), TINY, int(seed), world)
        return 0
    return finish(start(log, run_program, program, arguments))


def commands_to_try() -> list[tuple[str, dict[str, str]]]:
    """The different commands of all pages, each a target with its variables, that have no tests of their own."""
    elsewhere = ("test", "check", "web", "serve", "device", "delay", "benchmark", "sweep", "release", "workspace")
    processes = {"DEVICES": "1", "LAUNCH": "", "COMPILE": "0"}  # several, and compiling, have tests, too
    listed = [command for page in PAGES for command in commands(page)]
    assert listed[:2] == [["train"], ["test"]]
    different = {}
    for target, *variables in listed:
        named = dict(variable.split("=", 1) for variable in variables)
        if target not in elsewhere and "SEEDS" not in named and not {"release.zip", "llava.csv"} & {*named.values()}:
            request = (target, *sorted((name, value) for name, value in named.items() if name not in processes))
            different[request] = (target, named | {name: processes[name] for name in processes.keys() & named.keys()})
    return list(different.values())


@pytest.mark.slow
def test_the_commands_of_the_pages_run(tmp_path, msvd, synthetic):
    """Each one, by make's own account of what it would do, at a tiny size; `make train` alone is the whole chain."""
    encoder = tmp_path / "encoder.safetensors"
    from cdc_mmpg.models.all_in_one import AllInOne
    from cdc_mmpg.models.weights import save_safetensors

    save_safetensors(AllInOne(image_size=32, depth=1, vocab_size=15).state_dict(), encoder)
    save_safetensors(AllInOne().state_dict(), tmp_path / "whole.safetensors")
    clip = write_clip(tmp_path / "clip.mp4", codec="libx264")
    out = tmp_path / "out"
    shutil.copytree(synthetic, out / "synthetic" / "data" / "clips")
    extra = " --model.init_args.encoder.depth=1 --trainer.enable_progress_bar=false --trainer.accelerator=cpu"
    small = " ".join(f"--data.init_args.{name}" for name in ("num_classes=5", "image_size=32", "num_workers=0"))
    ran, seeds = [], {}
    for number, (target, named) in enumerate(commands_to_try()):
        embedded = named.get("DATASET", "synthetic") == "synthetic"
        named |= {"EPOCHS": "1", "OUT": str(out), "PRECISION": "32-true"}
        ours = {"DATA": str(msvd), "CHECKPOINT": str(encoder), "VIDEO": str(clip),
                "FILE": str(tmp_path / "whole.safetensors")}  # fmt: skip
        named |= {key: value for key, value in ours.items() if key in named}
        named["SEED"] = seeds.get(embedded, "0")
        if not embedded:
            named["VOCAB"] = str(msvd / "vocab.txt")
        if target == "demo":
            named["DEMO"] = "terminal"  # the browser has tests of its own
        if target == "data":
            named["ARGS"] = small
        if target == "train":
            named["ARGS"] = f"{extra} {'' if embedded else small} {named.get('ARGS', '')}"
            named["SEED"] = seeds[embedded] = str(number)  # another run each time
        reads = {*COMMAND_VARIABLES[target], *(f"ARGS_{method}" for method in catalogue.BY_NAME)}
        lines = make(target, *(f"{key}={value}" for key, value in named.items() if key in reads))
        for program, *arguments in lines[-1:] if target == "tables" else lines:  # its runs are train's, many times
            code = run_tiny(tmp_path / "log", program, arguments)
            assert code == 0, f"{target} {named}: {(tmp_path / 'log').read_text()}"
        ran.append(target)
    assert set(ran) == {
        "train", "table", "tables", "report", "predict", "figures", "data", "checkpoint", "export", "demo"
    }  # fmt: skip
    released = {"METHOD": "cdc_mmpg_session", "SEED": seeds[True], "OUT": str(out)}
    for program, *arguments in make("release", *(f"{key}={value}" for key, value in released.items())):
        assert run_tiny(tmp_path / "log", program, arguments) == 0, (tmp_path / "log").read_text()
    (release,) = out.glob("release-*.zip")
    released |= {"RELEASE": str(release), "OUT": str(tmp_path / "elsewhere"), "VIDEO": str(clip), "QUESTION": "what?"}
    ((program, *arguments),) = make("predict", *(f"{key}={value}" for key, value in released.items()))
    assert run_tiny(tmp_path / "log", program, arguments) == 0, (tmp_path / "log").read_text()
    assert (out / "msvd" / "data.json").exists()
    for dataset, others in (("msvd", {"adr_pretraining_frozen"}), ("synthetic", {"encoder_pretraining", "privacy"})):
        methods = {path.parents[1].name for path in (out / dataset).rglob("results.json")}
        of_devices = {name for name in catalogue.METHOD_LABELS if catalogue.BY_NAME[name].datasets == "devices"}
        absent = of_devices if dataset == "msvd" else {"cdc_mmpg_frozen"}
        assert methods == ({*catalogue.METHOD_LABELS} - absent) | others | {"adr_pretraining"}
    assert (out / "msvd" / "table.md").exists()
    assert "| Session, n = 16 | vcd | 472 |" in (out / "worlds.md").read_text()
    pictures = {path.name for path in (out / "synthetic" / "figures").iterdir()}
    assert pictures == {"method.png", "data.png", "anchors.png"}
    table = (out / "synthetic" / "table.md").read_text()
    assert "another device's 16 anchors" in table
    assert "Encoder pretrained in this run on" in table


def test_the_embedded_dataset_makes_itself_and_its_encoder_first():
    listed = make("train", f"OUT={ROOT}/nowhere")
    ordered = [line[line.index("--config") + 1] for line in listed if line[0] == "fit"]
    methods = [Path(name).stem for name in ordered]
    assert methods[0] == "encoder_pretraining"
    for name in ("in_context_virtual", "cdc_mmpg_session", "adr_pretraining"):
        assert methods.index("linear") < methods.index(name)
    assert methods.index("cdc_mmpg_session") < methods.index("session_oracle")  # which takes its virtual devices
    # Both worlds, each with the main rows; one pretraining.
    worlds = [Path(word).parts[-3] for line in listed for word in line if "default_root_dir" in word]
    assert sorted(set(worlds)) == ["synthetic", "synthetic_memory"]
    main = {method.name for method in catalogue.METHODS if method.main and method.program == "fit"}
    assert sorted(methods) == sorted([*main, *main, "adr_pretraining", "adr_pretraining", "encoder_pretraining"])
    everything = {method.name for method in catalogue.METHODS if method.turn and method.datasets != "published"}
    listed = make("train", "METHOD=all", f"OUT={ROOT}/nowhere")
    assert everything - {"on_device", "prompts", "privacy"} <= {
        Path(line[line.index("--config") + 1]).stem for line in listed if line[0] == "fit"
    }
    assert methods.index("adr_pretraining") < methods.index("cdc_mmpg")
    assert [line[0] for line in listed[:2]] == ["clips", "fit"]
    assert any("experiments/tuned/synthetic.cdc_mmpg_session.yaml" in line for line in listed)  # what was tuned


def test_tuned_settings_say_how_they_were_selected():
    tuned = list((ROOT / "experiments" / "tuned").iterdir())
    assert tuned
    for path in tuned:
        dataset, method, _ = path.name.split(".")
        assert dataset in DATASETS
        assert method in METHODS
        assert path.read_text().startswith(("# Selected by ", "# As selected for ")), path


def test_a_question_reaches_the_program_as_it_was_asked():
    question = 'what\'s "five" for $5 or $(shell date) or `date`; $HOME \\ x?'
    (words,) = make("predict", f"QUESTION={question}", "VIDEO=my $clip.mp4")
    assert {"--video=my $clip.mp4", f"--question={question}"} <= set(words)


def test_a_clip_whose_name_begins_with_a_dash_reaches_the_program():
    """Many of MSVD's do."""
    for target in ("predict", "device"):
        (words,) = make(target, "VIDEO=-aaMGK6RGzw_57_61.avi", "QUESTION=-what?")
        assert words[0] == target
        assert {"--video=-aaMGK6RGzw_57_61.avi", "--question=-what?"} <= set(words)


def test_predict_export_and_serve_take_the_same_run():
    """After `make train` alone nothing else need be said."""
    ran = [make(target, "-s") for target in ("predict", "export", "serve")]
    run = "checkpoints/synthetic/cdc_mmpg_session/seed0"
    assert f"--run={run}" in ran[0][0]
    assert run in ran[1][-1]
    assert f"{run}/deployment/cloud" in ran[2][0]
    assert "--run=checkpoints/msvd/cdc_mmpg/seed0" in make("predict", "DATASET=msvd")[0]


def test_paths_may_have_spaces():
    (command, _) = make(
        "train", "DATASET=msvd", "METHOD=linear", "DATA=my data", "VOCAB=my vocab.txt", "CHECKPOINT=my model.ckpt"
    )
    assert {"--data.init_args.root=my data", "--data.init_args.vocab=my vocab.txt",
            "--model.init_args.encoder.checkpoint=my model.ckpt"} <= set(command)  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said", "one"),
    [
        ("METHOD=linaer", "METHOD=linaer: no such method or variant; did you mean linear?", "hyper_fan_in"),
        ("METHOD=x", "METHOD=x: no such method or variant. Groups: main, all.", "hyper_fan_in"),
        ("DATASET=mvsd", "DATASET=mvsd is none of", "msvd"),
    ],
)
def test_names_that_do_not_exist_are_refused_with_those_that_do(wrong, said, one):
    done = subprocess.run(["make", "train", wrong], cwd=ROOT, capture_output=True, text=True, check=False, env=OUTSIDE)
    assert done.returncode == 2
    assert said in done.stderr
    assert one in done.stderr


def test_a_word_that_is_no_variable_is_refused(capsys):
    assert run_command(["train", "METHOD=linear", "foo"]) == 2
    assert "ConfigError: foo: not a variable; write NAME=value" in capsys.readouterr().err


ALIASES = {
    "msvd": ["MSVD", "msvd-qa", "msvd_qa", "MSVD-QA", "msvdqa"],
    "msrvtt": ["MSRVTT", "msrvtt-qa", "msrvtt_qa", "MSR-VTT", "MSRVTT-QA"],
    "tgif": ["TGIF", "tgif-qa", "TGIF-QA", "tgif-frameqa", "frameqa", "FrameQA"],
    "tgif_action": ["tgif-action", "TGIF-QA-action", "tgif_qa_action"],
    "tgif_transition": ["tgif-transition", "TGIF-QA transition"],
    "msrvtt_choice": ["msrvtt-mc", "MSRVTT-MC", "msrvtt_multiple_choice", "msrvtt-choice"],
    "msrvtt_retrieval": ["msrvtt-retrieval", "MSR-VTT retrieval"],
}


@pytest.mark.slow
def test_datasets_go_by_the_names_that_people_type():
    for dataset, names in ALIASES.items():
        for name in names:
            assert f"experiments/datasets/{dataset}.yaml" in make("train", f"DATASET={name}", "METHOD=linear")[0], name


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("DEVICES=0", "an integer from 1 to 999"), ("DEVICES=two", "an integer from 1 to 999"), ("DEVICES=1.5", "GPUs"),
        ("JOBS=0", "parallel runs"), ("JOBS=many", "parallel runs"), ("JOBS=-1", "parallel runs"),
        ("SEEDS=0", "number of seeds"), ("SEEDS=x", "number of seeds"), ("SEED=abc", "from 0 to 999999999"),
        ("EPOCHS=0", "from 1 to 9999"), ("EPOCHS=10000", "from 1 to 9999"), ("JOBS=1000", "from 1 to 999"),
        ("NODES=0", "machines"), ("OUT=", "the folder of the runs"), ("OUT=README.md", "is a file"),
        ("OUT=-x", "start with"), ('OUT=a"b', "quote"), ("SIZE=huge", "toy"), ("FRAME_CACHE=gpu", "read"),
        ("JOBS=1;touch x", "parallel runs"), ("SEDE=3", "did you mean SEED?"),
        ("method=linear", "did you mean METHOD?"), ("LR=0.1", "it reads"),
        ("ARGS_linaer=--x=1", "did you mean ARGS_linear?"), ("VIDEO=a.mp4", "reads no such"),
        ("ENCODER_SEED=one", "whose encoder"), ("ARGS='--x", "quotation"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_at_once(wrong, said):
    done = subprocess.run(
        ["make", "-n", "train", wrong], cwd=ROOT, capture_output=True, text=True, check=False, env=OUTSIDE
    )
    assert done.returncode == 2
    assert "-m cdc_mmpg fit" not in done.stdout
    assert wrong.partition("=")[0] in done.stderr
    assert said in done.stderr


def test_a_tilde_is_the_home():
    home = OUTSIDE["HOME"]
    (command, _) = make("train", "DATASET=msvd", "METHOD=linear", "OUT=~/runs", "DATA=~/msvd", "CACHE=~/cache")
    assert {f"--trainer.default_root_dir={home}/runs/msvd/linear/seed0", f"--data.init_args.root={home}/msvd",
            f"--data.init_args.cache_dir={home}/cache"} <= set(command)  # fmt: skip


@pytest.mark.parametrize("size", ["toy", "wide"])
def test_another_size_has_a_folder_of_its_own(size):
    lines = make("train", f"SIZE={size}", "METHOD=linear")
    fits = [line for line in lines if "fit" in line]
    assert fits
    assert all(any(f"=checkpoints/{size}/synthetic/" in word for word in line) for line in fits)
    assert lines[0] == ["clips", f"checkpoints/{size}/synthetic/data/clips", "--size", size]


def test_the_recipes_order_is_makes():
    def methods(*arguments: str) -> list[str]:
        return [
            Path(command[command.index("--config") + 1]).stem
            for command in make("train", *arguments)
            if "fit" in command
        ]

    assert methods("DATASET=msvd") == ["adr_pretraining", "cdc_mmpg"]
    assert methods("DATASET=msvd", "METHOD=cdc_mmpg_frozen") == [
        "fine_tuning",
        "adr_pretraining_frozen",
        "cdc_mmpg_frozen",
    ]
    assert methods("DATASET=msvd", "METHOD=all") == [
        "linear", "fine_tuning", "adr_pretraining", "cdc_mmpg", "hyper", "hyper_fan_in", "adr_pretraining_frozen",
        "cdc_mmpg_frozen",
    ]  # fmt: skip


def test_the_variables_reach_lightning():
    command, _ = make("train", "DATASET=msvd", "METHOD=linear", "SEED=3", "DEVICES=2", "NODES=4",
                      "PRECISION=bf16-mixed", "FRAME_CACHE=device", "EPOCHS=7",
                      "CHECKPOINT=c.ckpt", "VOCAB=v.txt", "DATA=d",
                      "ARGS=--data.init_args.batch_size=4",
                      "ARGS_linear=--model.init_args.weight_decay=0")  # fmt: skip
    assert {
        "--seed_everything=3", "--trainer.devices=2", "--trainer.num_nodes=4", "--trainer.precision=bf16-mixed",
        "--data.init_args.frame_cache=device",
        "--trainer.max_epochs=7", "--model.init_args.encoder.checkpoint=c.ckpt", "--data.init_args.vocab=v.txt",
        "--data.init_args.root=d", "--data.init_args.batch_size=4", "--model.init_args.weight_decay=0",
        "--trainer.default_root_dir=checkpoints/msvd/linear/seed3",
    } <= set(command)  # fmt: skip


def test_every_target_is_in_the_help():
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: ([a-z -]*)$", makefile, re.MULTILINE)[1].split())
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, env=OUTSIDE)
    assert {line.split()[1] for line in done.stdout.splitlines()} == phony


def test_the_page_of_the_methods_lists_every_deviation():
    page = (ROOT / "src/cdc_mmpg/methods/README.md").read_text()
    listed = re.findall(r"^- `([\w/]+\.py)`: ", page, re.MULTILINE)
    found = [
        str(path.relative_to(ROOT)).removeprefix("src/cdc_mmpg/")
        for path in SOURCES
        for _ in range(path.read_text().count("Deviation:"))
    ]
    assert sorted(listed) == sorted(found)


def test_the_map_names_every_room():
    text = (ROOT / "tests/README.md").read_text()
    front = (ROOT / "README.md").read_text()
    for path in SOURCES:
        name = f"{path.parent.name}/" if path.parent.name != "cdc_mmpg" else path.name
        assert name in text or name.startswith("__"), path
        assert f"{path.parent.name}/" in front, path


def test_the_front_page_and_the_pages_are_short():
    front = PAGES[0].read_text()
    assert len(front.splitlines()) <= 150
    assert len(front.split()) <= 1_500
    for page in PAGES[1:]:
        assert len(page.read_text().splitlines()) <= 200, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.is_file(), link
        titles = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {title.lower().replace(" ", "-") for title in titles}, link


def read_section(page: Path, title: str) -> str:
    """Return the text of a page from a heading to the next one of the same level."""
    return re.search(rf"^## {title}\n(.*?)(?=^## )", page.read_text(), re.DOTALL | re.MULTILINE)[1]


def test_figures_in_prose_are_on_record():
    """The front page quotes a recorded table, and every figure of both pages occurs in one."""
    records = {path.name: path.read_text() for path in (ROOT / "checkpoints/record").glob("*.md")}
    assert {"worlds.md", "synthetic.md", "synthetic_memory.md"} <= records.keys()
    front = read_section(ROOT / "README.md", "What it finds")
    table = [line for line in front.splitlines() if line.startswith("|")]
    assert len(table) <= 2 + 9
    assert max(line.count("|") for line in table) <= 6 + 1
    assert set(table) <= set(records["worlds.md"].splitlines())
    figure = r"(?<![\d.,])\d+\.\d+"
    recorded = set(re.findall(figure, "\n".join(records.values())))
    for text in (front, read_section(ROOT / "checkpoints/README.md", "Findings")):
        assert set(re.findall(figure, re.sub(r"arXiv\S+|\d+\.\d+M", "", text))) <= recorded


def test_every_page_is_linked_from_the_front_page():
    front = PAGES[0].read_text()
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT)})" in front


def test_the_page_on_adding_a_dataset_is_true(tmp_path, monkeypatch):
    """Its two blocks, saved as it says, train on a folder as it describes."""
    page = (ROOT / "data_modules" / "README.md").read_text()
    code, configuration = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "yaml"))
    (tmp_path / "my_qa.py").write_text(code)
    (tmp_path / "my_qa.yaml").write_text(configuration.replace("data_modules.my_qa", "my_qa"))
    monkeypatch.syspath_prepend(tmp_path)
    root = tmp_path / "mine"
    for split in ("train", "val", "test"):
        write_clip(root / "clips" / f"{split}.mp4", codec="libx264")
        rows = [f"{split},what is it?,{answer}" for answer in ("red", "green", "blue")]
        (root / f"{split}.csv").write_text("\n".join(["clip,question,answer", *rows]))
    vocab, run = write_msvd(tmp_path / "other") / "vocab.txt", tmp_path / "my_qa" / "linear" / "seed0"
    command = ["fit", "--config=experiments/methods/linear.yaml", f"--config={tmp_path / 'my_qa.yaml'}",
               f"--data.init_args.root={root}", f"--data.init_args.cache_dir={tmp_path / 'data'}",
               f"--data.init_args.vocab={vocab}", f"--trainer.default_root_dir={run}",
               "--data.init_args.image_size=32", "--model.init_args.encoder.depth=1", "--trainer.max_epochs=1",
               "--data.init_args.num_workers=0", "--trainer.enable_progress_bar=false"]  # fmt: skip
    assert main(command) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["questions"] == {"train": 3, "val": 3, "test": 3}


@pytest.mark.parametrize("room", mutate.ROOMS)
def test_mutated_sources_and_their_tests_exist(room):
    assert mutate.list_sources(room)
    for name in mutate.ROOMS[room][1].split():
        assert (ROOT / "tests" / f"test_{name}.py").is_file()


def test_no_path_of_this_machine_is_tracked():
    done = subprocess.run(
        ["git", "grep", "-lIF", f"{ROOT.parent}/"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(tmp_path):
    """With the report's templates; `data_modules` stays in the checkout, which training needs."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [str(ROOT / ".venv/bin/uv"), "build", "--quiet", "--wheel", "--out-dir", str(tmp_path / "out"), str(copy)]
    subprocess.run(command, check=True, env=OUTSIDE)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (scripts,) = (archive.read(name).decode() for name in held if name.endswith("entry_points.txt"))
    sources = {str(path.relative_to(ROOT / "src")) for path in SOURCES if path.is_relative_to(ROOT / "src")}
    assert sources <= held
    templates = {str(path.relative_to(ROOT / "src")) for path in ROOT.glob("src/cdc_mmpg/report/templates/*")}
    assert templates
    assert templates <= held
    assert {name.split("/")[0].split("-")[0] for name in held} == {"cdc_mmpg"}
    assert "cdc-mmpg = cdc_mmpg.commands.main:main" in scripts
