"""What is asked for: the variables of a command, checked, and what follows from them.

`make train DATASET=msvd` and `cdc-mmpg train DATASET=msvd` are the same: variables are words NAME=value, or stand in
the environment. Nothing here imports more than the standard library: a wrong word is refused at once.
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
    EMBEDDED,
    METHODS,
    PRETRAINING,
    REASONERS,
    SESSION,
    VARIANTS,
    WORLDS,
    runs_of_all,
    variants_of,
)
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.files import expand_home

SEVERAL = ("main", "all")  # values of METHOD: the rows that are trained in every world, and all that there are
WHOLE = "[1-9][0-9]{0,2}"
# Of each variable that has a form of its own: the form of its whole value, whether it may be empty, what it is.
FORMS = {
    "OUT": (r'[^-"$`\\][^"$`\\]*', False,
            'the folder where runs go: its name does not begin with "-" and has no quote, dollar or backslash'),
    "JOBS": (WHOLE, True, "how many runs go side by side: a whole number from 1"),
    "SEED": ("0|[1-9][0-9]{0,8}", False, "a whole number from 0"),
    "ENCODER_SEED": ("0|[1-9][0-9]{0,8}", True, "the seed whose encoder is taken: a whole number from 0"),
    "SEEDS": (WHOLE, True, "how many seeds from 0 on: a whole number from 1"),
    "NODES": (WHOLE, True, "how many machines train together: a whole number from 1"),
    "EPOCHS": (rf"{WHOLE}|[1-9][0-9]{{3}}", True, "a whole number from 1"),
    "DEVICES": (rf"auto|-1|{WHOLE}|[0-9]+,|\[?[0-9]+(,[0-9]+)+\]?", True,
                'how many processes or GPUs train together: a whole number from 1, "auto" (all GPUs), or their numbers '
                '("0,1")'),
    "MATMUL": ("highest|high", True,
               '"highest" (float32) or "high" (TensorFloat-32 on a GPU): how float32 is multiplied'),
    "COMPILE": ("0|1", True, "0 or 1: whether the encoder is compiled"),
    "FULL": ("0|1", True, "0 or 1: whether `tables` takes five seeds of all"),
    "INT8": ("0|1", True, "0 or 1: whether the device takes the int8 bundle"),
    "OF": ("loading|deployment|adapting", True,
           '"loading", "deployment" or "adapting": what is measured in place of training'),
    "FRAME_CACHE": ("disk|device", True, 'where batches are read from: "disk", or "device" for the memory of the GPU '
                                         "(or CPU) that computes"),
    "SIZE": ("full|toy", True, '"full" or "toy": of the embedded dataset'),
}  # fmt: skip
PLACES = ("DATASET", "DATA", "CACHE", "OUT", "SIZE")
RUN = (*PLACES, "METHOD", "SEED")
TRAINING = (*RUN, "SEEDS", "ENCODER_SEED", "CHECKPOINT", "VOCAB", "JOBS", "DEVICES", "NODES", "LAUNCH", "PRECISION",
            "MATMUL", "COMPILE", "FRAME_CACHE", "EPOCHS", "ARGS", "ARGS_<method>")  # fmt: skip
ASKING = ("VIDEO", "QUESTION", "CHOICES")
# The variables that each command reads.
READS = {
    "train": TRAINING,
    "data": TRAINING,  # it prepares what `train` needs, given the same words
    "tables": (*PLACES, "FULL", "CHECKPOINT", *TRAINING[len(RUN) + 3 :]),
    "table": PLACES,
    "report": PLACES,
    "figures": PLACES,
    "predict": (*RUN, *ASKING, "VOCAB"),
    "export": (*RUN, "ARGS"),
    "serve": (*RUN, "HOST", "PORT", "WORKERS", "KEYS", "CERTIFICATE", "CERTIFICATE_KEY", "ARGS"),
    "device": (*RUN, *ASKING, "CLOUD", "HOST", "PORT", "INT8", "ARGS"),
    "demo": TRAINING,
    "delay": (*PLACES, "ARGS"),
    "sweep": (),
    "checkpoint": ("FILE",),
    "benchmark": ("OF", "ARGS"),
}
UNNAMED = ("PYTHON",)  # of make alone


class Request:
    """The variables of a command, checked, and the places that follow from them.

    Args:
        command: of `READS`.
        given: words NAME=value, of the command line.
        environment: where all other variables are looked up.

    Raises:
        ConfigError: a variable is unknown or has an impossible value; names it, and the nearest or what it can be.
    """

    def __init__(self, command: str, given: Mapping[str, str], environment: Mapping[str, str] | None = None) -> None:
        self.command = command
        environment = os.environ if environment is None else environment
        for name in given:
            if name not in UNNAMED:
                self._check_name(name)
        reads = READS[command]
        names = [*reads, *(f"ARGS_{method}" for method in BY_NAME if "ARGS_<method>" in reads)]
        self.given = {name: environment[name] for name in names if name in environment} | dict(given)
        if "OUT" in self.given:  # names that W&B's agent sets, see experiments/sweep.yaml
            self.given["OUT"] = re.sub(r"\$\((WANDB_\w+)\)", lambda name: environment.get(name[1], ""), self["OUT"])
        for name, (form, may_be_empty, meaning) in FORMS.items():
            value = self.given.get(name, "" if may_be_empty else None)
            if value is not None and not (value == "" and may_be_empty) and not re.fullmatch(form, value):
                raise ConfigError(f"{name}={value}: {name} is {meaning}")
        self.dataset = find_dataset_name(self["DATASET"] or EMBEDDED)
        self.embedded = self.dataset in WORLDS
        self.configuration = EMBEDDED if self.embedded else self.dataset  # the name of its YAML files
        self.out = expand_home(self["OUT"] or "checkpoints" + (f"/{self['SIZE']}" if self["SIZE"] else ""))
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise ConfigError(f"OUT={self.out} is a file: OUT is the folder where runs go")
        # The tasks of MSRVTT, and of TGIF, are about the same clips: they share the folder and the frames. The embedded
        # worlds share captioned clips.
        family = re.sub(rf"^(msrvtt|tgif|{EMBEDDED})_.*", r"\1", self.dataset)
        self.root = f"{self.out}/{self.dataset}"  # of the runs
        self.cache = expand_home(self["CACHE"] or f"{self.out}/{family}/data")
        self.first_data = expand_home(self["DATA"] or (f"{self.cache}/clips" if self.embedded else f"data/{family}"))
        self.vocab = self["VOCAB"] or (f"{self.first_data}/vocab.txt" if self.embedded else "")
        self.seed = int(self["SEED"] or 0)
        self.seeds = list(range(int(self["SEEDS"]))) if self["SEEDS"] else [self.seed]
        self.pretrains = self.embedded and not self["CHECKPOINT"]
        self.method = self["METHOD"] or ("main" if self.embedded else "cdc_mmpg")
        if "DATASET" in reads:
            self._check_pair()

    def __getitem__(self, name: str) -> str:
        """Return the value of a variable, empty where it has none."""
        return self.given.get(name, "")

    def words(self, name: str) -> list[str]:
        """Return the words of a variable that holds several, as a shell would read them.

        Raises:
            ConfigError: a quote does not end.
        """
        try:
            return shlex.split(self[name])
        except ValueError as error:
            raise ConfigError(f"{name}={self[name]}: {str(error).lower()}") from error

    def _check_name(self, name: str) -> None:
        """Refuse a variable that the command does not read: something else would be done, without a word."""
        reads = READS[self.command]
        if name in reads or (name.startswith("ARGS_") and "ARGS_<method>" in reads and name[5:] in BY_NAME):
            return
        known = [each for each in reads if each != "ARGS_<method>"]
        if "ARGS_<method>" in reads:
            known += [f"ARGS_{method}" for method in BY_NAME]
        near = [match for typed in (name, name.upper()) for match in difflib.get_close_matches(typed, known, n=1)]
        hint = f"; {near[0]} is the nearest that it reads" if near else f"; it reads {' '.join(reads) or 'none'}"
        raise ConfigError(f"{name}: `{self.command}` reads no such variable{hint}")

    def _check_pair(self) -> None:
        """Refuse a dataset or a method that does not exist."""
        names = [*BY_NAME, *(variant for method in METHODS for variant in variants_of(method))]
        if self.method not in (*SEVERAL, *names):
            raise ConfigError(
                f"METHOD={self.method} is none of: {' '.join([*SEVERAL, *BY_NAME])}, nor a variant: <method>.frames2 "
                f"(4, 5), {', '.join(f'cdc_mmpg_frozen.{name}' for name in REASONERS)}, "
                f"{', '.join(f'{variant.methods[0]}.{name}' for name, variant in VARIANTS.items())}"
            )
        known = sorted({path.stem for path in Path("experiments/datasets").glob("*.yaml")} | WORLDS.keys())
        if known == sorted(WORLDS):
            raise ConfigError(
                "experiments/datasets is not here: `cdc-mmpg` works in a checkout of the project, cd to it"
            )
        if self.dataset not in known:
            raise ConfigError(f"DATASET={self.dataset} is none of: {' '.join(known)}")

    @property
    def has_domains(self) -> bool:
        """Whether the dataset is given domains that stand for devices."""
        return any(word.startswith("--data.init_args.domains=") for word in self.words("ARGS"))

    @cached_property
    def methods(self) -> list[str]:
        """The methods, or the one variant, that METHOD stands for."""
        if self.method in SEVERAL:
            return runs_of_all(self.embedded, main=self.method == "main")
        return [self.method]

    def in_all_worlds(self) -> list["Request"]:
        """Return this request for every world of the embedded dataset; itself alone where it names a dataset."""
        if not self.embedded or self["DATASET"]:
            return [self]
        return [Request(self.command, self.given | {"DATASET": dataset}, {}) for dataset in WORLDS]

    def data_of(self, seed: int) -> str:
        """Return the folder of the data: of the embedded dataset, that of the world that goes with a pretraining.

        Args:
            seed: of the pretraining, see `encoder_seed`; the first of "sky" has the captioned clips beside it.
        """
        world = WORLDS.get(self.dataset, "")
        return f"{self.first_data}-{world}{seed}" if world and (world, seed) != ("sky", 0) else self.first_data

    @property
    def data(self) -> str:
        """The folder of the data of the run that is asked for."""
        return self.data_of(self.encoder_seed(self.seed))

    @property
    def served(self) -> str:
        """The method that predicts and is deployed: the session's, unless METHOD names another."""
        return SESSION if self.method in SEVERAL else self.method

    @property
    def served_run(self) -> str:
        """The folder of the run that predicts and is deployed."""
        return f"{self.root}/{self.served}/seed{self.seed}"

    def encoder_seed(self, seed: int) -> int:
        """Return whose encoder a run of a seed takes."""
        return int(self["ENCODER_SEED"] or seed)

    def encoder_of(self, source: str, seed: int, pretraining: str = "") -> str:
        """Return the encoder that a run starts from, empty for random weights.

        Args:
            source: the method that trains it.
            seed: of the run that trains it.
            pretraining: variant of that run where it is the pretraining.
        """
        if source in ("", PRETRAINING) and not (self.pretrains and source):
            return self["CHECKPOINT"]
        changed = f".{pretraining}" if pretraining and source == PRETRAINING else ""
        return f"{self.root_of(source)}/{source}{changed}/seed{seed}/encoder.safetensors"

    def reading_of(self, seed: int, pretraining: str = "") -> str:
        """Return the reading that the pretraining of a seed, or a variant of it, leaves."""
        encoder = self.encoder_of(PRETRAINING, seed, pretraining)
        return str(Path(encoder).with_name("reading.safetensors"))

    def root_of(self, method: str) -> str:
        """Return the folder of a method's runs: of the pretraining, which serves all worlds, that of the first."""
        return f"{self.out}/{EMBEDDED}" if method == PRETRAINING else self.root


def find_dataset_name(typed: str) -> str:
    """Return the name of a dataset's configuration from the names that people type: MSVD-QA, MSR-VTT, TGIF-FrameQA."""
    name = re.sub("[ -]", "_", typed.lower())
    for pattern, replacement in (
        (r"^msr_vtt", "msrvtt"),
        (r"^(msvd|msrvtt|tgif)_?(vid)?qa$", r"\1"),
        (r"^(tgif_?(qa_?)?)?frame_?qa$", "tgif"),
        (r"^tgif_?qa_", "tgif_"),
        (r"^msrvtt_(mc|multiple_choice|mc_?qa)$", "msrvtt_choice"),
        (r"^msrvtt_ret$", "msrvtt_retrieval"),
        (r"^embedded$", EMBEDDED),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def read_words(words: Sequence[str]) -> dict[str, str] | None:
    """Return words NAME=value as variables; None where one is something else: a program's own arguments."""
    pairs = [word.partition("=") for word in words]
    if not all(equals and re.fullmatch(r"[A-Za-z]\w*", name) for name, equals, _ in pairs):
        return None
    return {name: value for name, _, value in pairs}


def read_make(flags: str) -> tuple[dict[str, str], bool]:
    """Return the variables of make's command line as they were typed, and whether make only lists (`-n`).

    Args:
        flags: MAKEFLAGS, in which make escapes blanks and backslashes by a backslash and doubles dollars.
    """
    variables = f" {flags} ".partition(" -- ")[2]
    words = re.findall(r"(?:\\.|[^ \\])+", variables, re.DOTALL)
    plain = [re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL).replace("$$", "$") for word in words]
    pairs = (word.partition("=") for word in plain)
    given = {name.rstrip(":+?!"): value for name, equals, value in pairs if equals}
    first = flags.split(" ", 1)[0]  # single letters together, without a dash
    return given, "n" in first and not first.startswith("-")
