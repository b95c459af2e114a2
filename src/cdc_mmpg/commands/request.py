"""Variables of a command, checked, and the paths and methods that they select.

`make train DATASET=msvd` and `cdc-mmpg train DATASET=msvd` are the same: variables are arguments NAME=value, or set in
the environment. Neither torch nor Lightning is imported here, so that a wrong variable is refused at once.
"""

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from cdc_mmpg.catalogue import (
    BY_NAME,
    COMPARED_WORLDS,
    METHODS,
    PRETRAINING,
    SESSION,
    SYNTHETIC,
    WORLDS,
    list_methods,
    list_variants,
)
from cdc_mmpg.deployment.opened_release import find_encoder, is_release, open_release
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.files import expand_home

RELEASES = "releases"  # folder of opened releases, in OUT
METHOD_GROUPS = ("main", "all")  # values of METHOD: the rows that are trained in every world, and all methods
WHOLE_NUMBER = "[1-9][0-9]{0,2}"
# For variables with a restricted value: regular expression of the value, whether it may be empty, description.
VALUE_FORMS = {
    "OUT": (r'[^-"$`\\][^"$`\\]*', False,
            'the folder of the runs; its name must not start with "-" or contain a double quote, backquote, dollar or '
            'backslash'),
    "JOBS": (WHOLE_NUMBER, True, "the number of parallel runs, an integer from 1 to 999"),
    "SEED": ("0|[1-9][0-9]{0,8}", False, "an integer from 0 to 999999999"),
    "ENCODER_SEED": ("0|[1-9][0-9]{0,8}", True, "the seed whose encoder is loaded, an integer from 0 to 999999999"),
    "SEEDS": (WHOLE_NUMBER, True, "the number of seeds, counted from 0: an integer from 1 to 999"),
    "NODES": (WHOLE_NUMBER, True, "the number of machines that train together, an integer from 1 to 999"),
    "EPOCHS": (rf"{WHOLE_NUMBER}|[1-9][0-9]{{3}}", True, "an integer from 1 to 9999"),
    "DEVICES": (rf"auto|-1|{WHOLE_NUMBER}|[0-9]+,|\[?[0-9]+(,[0-9]+)+\]?", True,
                'the number of processes or GPUs that train together: an integer from 1 to 999, "auto" (all GPUs), or '
                'their indices ("0,1")'),
    "MATMUL": ("highest|high", True,
               'the precision of float32 products: "highest" (float32) or "high" (TensorFloat-32 on a GPU)'),
    "COMPILE": ("0|1", True, "0 or 1: whether the encoder is compiled"),
    "FULL": ("0|1", True, "0 or 1: whether `tables` trains five seeds of all methods"),
    "WEB": ("0|1", True, "0 or 1: whether the service also serves the browser's page"),
    "DEMO": ("browser|terminal", True, 'where the demo is played: "browser" or "terminal"'),
    "INT8": ("0|1", True, "0 or 1: whether the device loads the int8 bundle"),
    "OF": ("loading|deployment|adapting", True,
           'the benchmark to run instead of training: "loading", "deployment" or "adapting"'),
    "FRAME_CACHE": ("disk|device", True, 'where batches are read from: "disk", or "device" for the memory of the GPU '
                                         "(or CPU) that trains"),
    "SIZE": ("full|toy|wide", True, 'the size of the synthetic dataset: "full", "toy" or "wide"'),
}  # fmt: skip
PLACE_VARIABLES = ("DATASET", "DATA", "CACHE", "OUT", "SIZE")
RUN_VARIABLES = (*PLACE_VARIABLES, "METHOD", "SEED")
TRAINING_VARIABLES = (*RUN_VARIABLES, "SEEDS", "ENCODER_SEED", "CHECKPOINT", "VOCAB", "JOBS", "DEVICES", "NODES",
                      "LAUNCH", "PRECISION", "MATMUL", "COMPILE", "FRAME_CACHE", "EPOCHS", "ARGS",
                      "ARGS_<method>")  # fmt: skip
QUESTION_VARIABLES = ("VIDEO", "QUESTION", "CHOICES")
SERVICE_VARIABLES = ("WEB", "HOST", "PORT", "WORKERS", "KEYS", "CERTIFICATE", "CERTIFICATE_KEY")
# Variables that each command reads.
COMMAND_VARIABLES = {
    "train": TRAINING_VARIABLES,
    "data": TRAINING_VARIABLES,  # so that it takes the same command line as `train`
    "tables": (*PLACE_VARIABLES, "FULL", "CHECKPOINT", *TRAINING_VARIABLES[len(RUN_VARIABLES) + 3 :]),
    "table": (*PLACE_VARIABLES, "PREDICTIONS", "SEED", "VOCAB", "ARGS"),
    "report": (*PLACE_VARIABLES, "RELEASE"),
    "release": (*RUN_VARIABLES, "SEEDS"),
    "figures": PLACE_VARIABLES,
    "predict": (*RUN_VARIABLES, "RELEASE", *QUESTION_VARIABLES, "SESSION", "VOCAB"),
    "export": (*RUN_VARIABLES, "RELEASE", "ARGS"),
    "web": (),
    "serve": (*RUN_VARIABLES, "RELEASE", *SERVICE_VARIABLES, "ARGS"),
    "device": (*RUN_VARIABLES, "RELEASE", *QUESTION_VARIABLES, "CLOUD", "HOST", "PORT", "INT8", "ARGS"),
    "demo": (*TRAINING_VARIABLES, "DEMO", "PORT"),
    "delay": (*PLACE_VARIABLES, "ARGS"),
    "sweep": (),
    "workspace": (),
    "checkpoint": ("FILE",),
    "benchmark": ("OF", "ARGS"),
}
MAKE_ONLY_VARIABLES = ("PYTHON",)  # read by make, not by `cdc-mmpg`


def _suggest(name: str, known: Sequence[str]) -> str:
    """Return a question with the most similar known name; "" if none is similar."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


class Request:
    """Variables of a command, checked, and the paths and methods that they select.

    Args:
        command: a key of `COMMAND_VARIABLES`.
        given: variables of the command line.
        environment: environment for all other variables; None is that of the process.

    Raises:
        ConfigError: a variable is unknown or its value is invalid; names the most similar variable or the valid values.
    """

    def __init__(self, command: str, given: Mapping[str, str], environment: Mapping[str, str] | None = None) -> None:
        self.command = command
        environment = os.environ if environment is None else environment
        for name in given:
            if name not in MAKE_ONLY_VARIABLES:
                self._check_name(name)
        reads = COMMAND_VARIABLES[command]
        names = [*reads, *(f"ARGS_{method}" for method in BY_NAME if "ARGS_<method>" in reads)]
        self.given = {name: environment[name] for name in names if name in environment} | dict(given)
        if "OUT" in self.given:  # variables that W&B's agent sets, see experiments/sweep.yaml
            self.given["OUT"] = re.sub(r"\$\((WANDB_\w+)\)", lambda name: environment.get(name[1], ""), self["OUT"])
        for name, (form, may_be_empty, meaning) in VALUE_FORMS.items():
            value = self.given.get(name, "" if may_be_empty else None)
            if value is not None and not (value == "" and may_be_empty) and not re.fullmatch(form, value):
                raise ConfigError(f"{name}={value}: {name} is {meaning}")
        self.dataset = find_dataset_name(self["DATASET"] or SYNTHETIC)
        self.is_synthetic = self.dataset in WORLDS
        self.configuration = SYNTHETIC if self.is_synthetic else self.dataset  # the name of its YAML files
        self.out = expand_home(self["OUT"] or "checkpoints" + (f"/{self['SIZE']}" if self["SIZE"] else ""))
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise ConfigError(f"OUT={self.out} is a file: OUT is the folder of the runs")
        # The tasks of MSRVTT, and of TGIF, use the same clips and share their folder and frames. The synthetic worlds
        # share captioned clips.
        family = re.sub(rf"^(msrvtt|tgif|{SYNTHETIC})_.*", r"\1", self.dataset)
        self.cache = expand_home(self["CACHE"] or f"{self.out}/{family}/data")
        self.first_data = expand_home(
            self["DATA"] or (f"{self.cache}/clips" if self.is_synthetic else f"data/{family}")
        )
        self.vocab = self["VOCAB"] or (f"{self.first_data}/vocab.txt" if self.is_synthetic else "")
        self.seed = int(self["SEED"] or 0)
        self.seeds = list(range(int(self["SEEDS"]))) if self["SEEDS"] else [self.seed]
        self.pretrains = self.is_synthetic and not self["CHECKPOINT"]
        self.method = self["METHOD"] or ("main" if self.is_synthetic else "cdc_mmpg")
        if "DATASET" in reads:
            self._check_pair()

    def __getitem__(self, name: str) -> str:
        """Return the value of a variable, empty if it is not set."""
        return self.given.get(name, "")

    def words(self, name: str) -> list[str]:
        """Split a variable's value into words as a shell does.

        Raises:
            ConfigError: a quotation mark is not closed.
        """
        try:
            return shlex.split(self[name])
        except ValueError as error:
            raise ConfigError(f"{name}={self[name]}: {str(error).lower()}") from error

    def _check_name(self, name: str) -> None:
        """Refuse a variable that the command does not read, instead of ignoring it silently."""
        reads = COMMAND_VARIABLES[self.command]
        if name in reads or (name.startswith("ARGS_") and "ARGS_<method>" in reads and name[5:] in BY_NAME):
            return
        known = [variable for variable in reads if variable != "ARGS_<method>"]
        if "ARGS_<method>" in reads:
            known += [f"ARGS_{method}" for method in BY_NAME]
        near = [match for typed in (name, name.upper()) for match in difflib.get_close_matches(typed, known, n=1)]
        hint = f"did you mean {near[0]}?" if near else f"it reads {' '.join(reads) or 'none'}"
        raise ConfigError(f"{name}: `{self.command}` reads no such variable; {hint}")

    def _check_pair(self) -> None:
        """Refuse a dataset or a method that does not exist."""
        names = [*BY_NAME, *(variant for method in METHODS for variant in list_variants(method))]
        if self.method not in (*METHOD_GROUPS, *names):
            if (path := Path(f"experiments/methods/{self.method}.yaml")).is_file():
                raise ConfigError(f"{path} exists, but METHODS in src/cdc_mmpg/catalogue.py has no entry for it")
            raise ConfigError(
                f"METHOD={self.method}: no such method or variant"
                f"{_suggest(self.method, [*METHOD_GROUPS, *names]) or '.'} "
                f"Groups: {', '.join(METHOD_GROUPS)}. Methods: {', '.join(BY_NAME)}. "
                "Variants: see experiments/README.md"
            )
        known = sorted({path.stem for path in Path("experiments/datasets").glob("*.yaml")} | WORLDS.keys())
        if known == sorted(WORLDS):
            raise ConfigError("experiments/datasets not found: run `cdc-mmpg` in a checkout of the project")
        if self.dataset not in known:
            raise ConfigError(f"DATASET={self.dataset} is none of: {' '.join(known)}{_suggest(self.dataset, known)}")

    @property
    def has_domains(self) -> bool:
        """Whether the dataset is configured with domains as devices."""
        return any(word.startswith("--data.init_args.domains=") for word in self.words("ARGS"))

    @cached_property
    def methods(self) -> list[str]:
        """Methods, or the single variant, that METHOD selects."""
        if self.method in METHOD_GROUPS:
            return list_methods(self.is_synthetic, main=self.method == "main")
        return [self.method]

    def in_all_worlds(self) -> list["Request"]:
        """Return this request for each of the compared worlds; only itself if DATASET is given."""
        if not self.is_synthetic or self["DATASET"]:
            return [self]
        return [Request(self.command, self.given | {"DATASET": dataset}, {}) for dataset in COMPARED_WORLDS]

    def data_of(self, seed: int) -> str:
        """Return the folder of the data; for the synthetic dataset, of the world that belongs to a pretraining.

        Args:
            seed: seed of the pretraining, see `encoder_seed`; seed 0 of "sky" is beside the captioned clips.
        """
        world = WORLDS.get(self.dataset, "")
        return f"{self.first_data}-{world}{seed}" if world and (world, seed) != ("sky", 0) else self.first_data

    @property
    def data(self) -> str:
        """Folder of the data of the requested run."""
        return self.data_of(self.encoder_seed(self.seed))

    @cached_property
    def runs(self) -> str:
        """Folder of the datasets' folders: that of the opened RELEASE, or OUT."""
        return str(open_release(self["RELEASE"], Path(self.out) / RELEASES)) if self["RELEASE"] else self.out

    @property
    def root(self) -> str:
        """Folder of the dataset's runs."""
        return f"{self.runs}/{self.dataset}"

    @property
    def served(self) -> str:
        """Method that predicts and is deployed: METHOD, or the session variant if METHOD is not a single method."""
        return SESSION if self.method in METHOD_GROUPS else self.method

    @property
    def served_run(self) -> str:
        """Folder of the run that predicts and is deployed."""
        return f"{self.root}/{self.served}/seed{self.seed}"

    def encoder_seed(self, seed: int) -> int:
        """Return the seed of the pretraining whose encoder a run loads."""
        return int(self["ENCODER_SEED"] or seed)

    def encoder_of(self, source: str, seed: int, pretraining: str = "") -> str:
        """Return the path of the encoder that a run starts from; empty for random weights.

        Args:
            source: method that trains the encoder.
            seed: seed of the run that trains it.
            pretraining: variant of that run, if it is the pretraining.
        """
        if source in ("", PRETRAINING) and not (self.pretrains and source):
            return str(find_encoder(self._released, seed)) if self._released else self["CHECKPOINT"]
        changed = f".{pretraining}" if pretraining and source == PRETRAINING else ""
        return f"{self.root_of(source)}/{source}{changed}/seed{seed}/encoder.safetensors"

    @cached_property
    def _released(self) -> Path | None:
        """Folder of the opened release that CHECKPOINT names; None if it names something else."""
        place = self["CHECKPOINT"]
        return open_release(place, Path(self.out) / RELEASES) if is_release(place) else None

    def reading_of(self, seed: int, pretraining: str = "") -> str:
        """Return the path of the reading network that belongs to the encoder; empty if the encoder has none."""
        if not self.is_synthetic:
            return ""
        reading = Path(self.encoder_of(PRETRAINING, seed, pretraining)).with_name("reading.safetensors")
        return str(reading) if self.pretrains or reading.is_file() else ""

    def root_of(self, method: str) -> str:
        """Return the folder of a method's runs; the pretraining, which all worlds share, is in the first world's."""
        return f"{self.out}/{SYNTHETIC}" if method == PRETRAINING else self.root


def find_dataset_name(typed: str) -> str:
    """Return the name of a dataset's configuration for a common spelling: MSVD-QA, MSR-VTT, TGIF-FrameQA."""
    name = re.sub("[ -]", "_", typed.lower())
    for pattern, replacement in (
        (r"^msr_vtt", "msrvtt"),
        (r"^(msvd|msrvtt|tgif)_?(vid)?qa$", r"\1"),
        (r"^(tgif_?(qa_?)?)?frame_?qa$", "tgif"),
        (r"^tgif_?qa_", "tgif_"),
        (r"^msrvtt_(mc|multiple_choice|mc_?qa)$", "msrvtt_choice"),
        (r"^msrvtt_ret$", "msrvtt_retrieval"),
        (r"^embedded$", SYNTHETIC),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def read_words(words: Sequence[str]) -> dict[str, str] | None:
    """Parse arguments NAME=value; return None if one has another form, as the arguments of a program have."""
    pairs = [word.partition("=") for word in words]
    if not all(equals and re.fullmatch(r"[A-Za-z]\w*", name) for name, equals, _ in pairs):
        return None
    return {name: value for name, _, value in pairs}


def read_make(flags: str) -> tuple[dict[str, str], bool]:
    """Return the variables of make's command line as they were typed, and whether make only lists (`-n`).

    Args:
        flags: value of MAKEFLAGS, in which make escapes blanks and backslashes with a backslash and doubles dollars.
    """
    variables = f" {flags} ".partition(" -- ")[2]
    words = re.findall(r"(?:\\.|[^ \\])+", variables, re.DOTALL)
    plain = [re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL).replace("$$", "$") for word in words]
    pairs = (word.partition("=") for word in plain)
    given = {name.rstrip(":+?!"): value for name, equals, value in pairs if equals}
    first = flags.split(" ", 1)[0]  # the single-letter options, joined without a dash
    return given, "n" in first and not first.startswith("-")
