"""The plan: which programs a command means, with which arguments, and what each builds on.

A program is a word of `cdc-mmpg` with its own arguments: `cdc-mmpg fit ...`. What builds on what is a small graph over
the catalogue; its order is that of `make -n`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cdc_mmpg.catalogue import (
    BASELINE,
    BY_NAME,
    CHANGED,
    EMBEDDED,
    FRAMES,
    PRETRAINING,
    REASONERS,
    RECIPE_FRAMES,
    STUDY_SEEDS,
    WORLDS,
    pretraining_of,
    runs_of_all,
    variant_arguments,
    with_frames,
)
from cdc_mmpg.commands.request import SEVERAL, Request
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.processors import count_processors, find_gpus


class Step(NamedTuple):
    """A program of a plan.

    Attributes:
        name: what it is called in messages.
        program: a word of `cdc-mmpg`.
        arguments: of the program, after its word.
        needs: names of the steps that it builds on.
        after: name of a step that it waits for, whatever comes of it.
        alone: takes all processors, and no step goes beside it.
        folder: of the run that it makes; empty for a step that makes none.
    """

    name: str
    program: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    after: str = ""
    alone: bool = True
    folder: str = ""

    @property
    def words(self) -> list[str]:
        """The program's word and its arguments."""
        return [self.program, *self.arguments]

    @property
    def trains(self) -> bool:
        """Whether it is a training run, which several processes may share."""
        return self.program == "fit"


class RunName(NamedTuple):
    """A run: `<method>[.<variant>]/seed<N>` below the dataset's folder."""

    method: str
    seed: int
    encoder_seed: int  # whose encoder it takes
    variant: str = ""

    @property
    def name(self) -> str:
        """The folder below the dataset's."""
        return f"{self.method}{self.variant and '.'}{self.variant}/seed{self.seed}"


def find_run(name: str, seed: int, encoder_seed: int) -> RunName:
    """Return the run of a method, or of a variant by its dotted name."""
    method, _, variant = name.partition(".")
    return RunName(method, seed, encoder_seed, variant)


class Plan:
    """Steps in an order in which they can be done.

    Args:
        request: what is asked for.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.steps: dict[str, Step] = {}

    @cached_property
    def gpus(self) -> list[str]:
        """The GPUs that runs may take; none where the command line says that they compute on the CPU."""
        return [] if "--trainer.accelerator=cpu" in self.request.words("ARGS") else find_gpus()

    @cached_property
    def jobs(self) -> int:
        """How many runs go side by side; on GPUs each has one of its own.

        Raises:
            ConfigError: runs side by side are to have several GPUs each.
        """
        request = self.request
        several = len(request.methods) * len(request.seeds) > 1
        number = int(request["JOBS"] or 0)
        if not number and (request["LAUNCH"] or (self.gpus and (request["DEVICES"] or not several))):
            number = 1
        if self.gpus and number != 1:
            if request["DEVICES"] not in ("", "1"):
                raise ConfigError(
                    f"JOBS={number} and DEVICES={request['DEVICES']}: runs side by side have a GPU each, leave one of "
                    "the two out"
                )
            return min(number or len(self.gpus), len(self.gpus))
        return number or (2 if request.embedded else 1)

    def name_of(self, run: RunName) -> str:
        """Return the name of a run's step: of a further world of the embedded dataset, with the dataset's name."""
        further = self.request.embedded and self.request.root_of(run.method) != self.request.root_of(PRETRAINING)
        return f"{self.request.dataset}/{run.name}" if further else run.name

    def add(self, step: Step) -> str:
        """Add a step that is not there yet; return its name."""
        self.steps.setdefault(step.name, step)
        return step.name

    def add_clips(self, folder: str, world: str, seed: int) -> list[str]:
        """Add what makes a world of the embedded dataset, where it is not made; return the names that runs need."""
        size = ["--size", self.request["SIZE"]] if self.request["SIZE"] else []
        if Path(folder, "digests.json").is_file() and not size:
            return []
        of_world = ["--world", world, "--seed", str(seed)] if (world, seed) != ("sky", 0) else []
        arguments = (folder, *size, *of_world)
        return [self.add(Step(" ".join(["clips", *arguments]), "clips", arguments))]

    def add_data(self, method: str, seed: int) -> list[str]:
        """Add what makes the clips that a run reads; return the names that it needs.

        Args:
            method: of the run; the pretraining reads captioned clips, which are those of the first world.
            seed: of the run's encoder, and so of its world.
        """
        request = self.request
        if not request.embedded:
            return []
        found = self.add_clips(request.first_data, "sky", 0)  # with the vocabulary
        if (folder := request.data_of(seed)) != request.first_data and method != PRETRAINING:
            found += self.add_clips(folder, WORLDS[request.dataset], seed)
        return found

    def add_run(self, run: RunName) -> str:
        """Add a run after all that it builds on; return its name."""
        name = self.name_of(run)
        if name in self.steps:
            return name
        request, method = self.request, BY_NAME[run.method]
        source = run.encoder_seed if method.program == "fit" else run.seed  # a control is of a run of its own seed
        clips = self.add_data(run.method, run.encoder_seed) if method.program == "fit" else []
        before = [run._replace(method=method.adr)] if method.adr else []
        before += [RunName(method.encoder, source, run.encoder_seed)] if method.encoder not in ("", PRETRAINING) else []
        needs = clips + [self.add_run(each) for each in before]
        waits = method.features and request.method in SEVERAL
        after = self.add_run(run._replace(method=method.features, variant="")) if waits else ""
        if method.encoder and request.pretrains:
            needs.append(self.add_run(RunName(PRETRAINING, source, source, pretraining_of(run.variant))))
        folder = f"{request.root_of(run.method)}/{run.name}"
        if method.program == "fit":
            first_alone = run.method == PRETRAINING and not request["SEEDS"] and request.command != "tables"
            arguments = tuple(self._fit(run, first_alone))
            return self.add(Step(name, "fit", arguments, tuple(needs), after, first_alone, folder))
        finished = f"{request.root}/{method.encoder}/seed{run.seed}"
        return self.add(Step(name, method.program, (finished,), tuple(needs), after, False, folder))

    def _fit(self, run: RunName, alone: bool) -> Iterable[str]:
        """Yield the arguments of a training run."""
        request, method = self.request, BY_NAME[run.method]
        tuned = Path(f"experiments/tuned/{request.configuration}.{run.method}.yaml")
        configurations = [
            f"experiments/methods/{run.method}.yaml",
            f"experiments/datasets/{request.configuration}.yaml",
        ]
        for path in configurations + ([str(tuned)] if tuned.is_file() else []):
            yield from ("--config", path)
        yield f"--trainer.default_root_dir={request.root_of(run.method)}/{run.name}"
        yield f"--seed_everything={run.seed}"
        yield from self.places(request.first_data if run.method == PRETRAINING else request.data_of(run.encoder_seed))
        for variable, option in (
            ("EPOCHS", "trainer.max_epochs"),
            ("DEVICES", "trainer.devices"),
            ("NODES", "trainer.num_nodes"),
            ("PRECISION", "trainer.precision"),
            ("MATMUL", "matmul"),
        ):
            if request[variable]:
                yield f"--{option}={request[variable]}"
        if request["COMPILE"] == "1":
            yield "--compile=true"
        if request["FRAME_CACHE"]:
            yield f"--data.init_args.frame_cache={request['FRAME_CACHE']}"
        if self.jobs > 1 and not alone:
            yield "--trainer.enable_progress_bar=false"
        pretraining = pretraining_of(run.variant)
        if encoder := request.encoder_of(method.encoder, run.encoder_seed, pretraining):
            yield f"--model.init_args.encoder.checkpoint={encoder}"
        if method.adr:
            yield f"--model.init_args.adr={request.root}/{run._replace(method=method.adr).name}/adr.safetensors"
        if method.uses_reading and request.pretrains:
            yield f"--model.init_args.reading={request.reading_of(run.encoder_seed, pretraining)}"
        yield from variant_arguments(run.method, run.variant) if run.variant else ()
        yield from request.words("ARGS")
        yield from request.words(f"ARGS_{run.method}")

    def places(self, data: str) -> list[str]:
        """Return the arguments that say where the data is."""
        request = self.request
        places = [f"--data.init_args.root={data}", f"--data.init_args.cache_dir={request.cache}"]
        return places + ([f"--data.init_args.vocab={request.vocab}"] if request.vocab else [])

    def find_share(self) -> int:
        """Return how many processors each of the runs that go side by side has."""
        return max(1, count_processors() // self.jobs)


def plan_training(request: Request) -> Plan:
    """Plan the runs of METHOD and all that they build on, then the table of methods.

    On the embedded dataset, where neither DATASET nor METHOD is named: the main rows of all of its worlds.
    """
    requests = request.in_all_worlds() if not request["METHOD"] else [request]
    return merge(requests, [_plan_world(each) for each in requests])


def _plan_world(request: Request) -> Plan:
    """Plan the runs of METHOD on one dataset."""
    plan = Plan(request)
    if request.pretrains and not request["SEEDS"]:  # comes first and has all processors
        source = request.encoder_seed(request.seed)
        plan.add_run(RunName(PRETRAINING, source, source, pretraining_of(request.method.partition(".")[2])))
    asked = [(name, seed) for name in request.methods for seed in request.seeds]
    for name, seed in asked:
        plan.add_run(find_run(name, seed, request.encoder_seed(seed)))
    if any(BY_NAME[name.partition(".")[0]].label and BY_NAME[name.partition(".")[0]].program == "fit"
           for name in request.methods):  # fmt: skip
        plan.add(Step(f"table of {request.dataset}", "table", (request.root,)))
    return plan


def merge(requests: Sequence[Request], plans: Sequence[Plan]) -> Plan:
    """Return one plan of several: what trains first, then the tables."""
    merged = Plan(requests[0])
    steps = [step for plan in plans for step in plan.steps.values()]
    for step in sorted(steps, key=lambda step: step.program in ("table", "tables")):
        merged.add(step)
    if len(plans) > 1:
        merged.add(Step("table of the worlds", "worlds", (requests[0].out,)))
    return merged


def plan_tables(request: Request) -> Plan:
    """Plan every table of the paper, and what it does not ask.

    On a dataset that is given domains for devices (ARGS=--data.init_args.domains=casts), one run of every method that
    the embedded dataset has. On the embedded dataset, in all of its worlds, three pairs of world and pretraining of the
    main rows and one of the rest (FULL=1: five of all, many hours); whether the reasoner does anything, over five seeds
    on one encoder's features.
    """
    requests = request.in_all_worlds()
    return merge(requests, [_plan_tables_of_world(each) for each in requests])


def _plan_tables_of_world(request: Request) -> Plan:
    """Plan the tables of one dataset."""
    plan = Plan(request)
    if request.embedded:
        full = request["FULL"] == "1"
        everything = [*runs_of_all(True)]
        main = everything if full else [name for name in everything if BY_NAME[name].several_seeds]
        first = request.dataset == EMBEDDED  # the paper's own questions are asked in one world
        frames = [with_frames(BASELINE, number) for number in FRAMES if first and number != RECIPE_FRAMES]
        for seed in range(5 if full else 3):
            for name in [*main, *(frames if full else [])]:
                plan.add_run(find_run(name, seed, seed))
        for name in [*everything, *frames, *CHANGED]:
            plan.add_run(find_run(name, 0, 0))
        plan.add_run(RunName(BASELINE, 0, 0))
        for variant in REASONERS if first else ():
            for seed in STUDY_SEEDS:
                for method in ("adr_pretraining_frozen", "cdc_mmpg_frozen"):
                    plan.add_run(RunName(method, seed, 0, variant))
    elif request.has_domains:  # whose devices are of our making, in place of unseen cameras
        for name in runs_of_all(True):
            if BY_NAME[name].program == "fit":
                plan.add_run(find_run(name, request.seed, request.encoder_seed(request.seed)))
    plan.add(Step(f"tables of {request.dataset}", "tables", (request.root,)))
    return plan


def plan_data(request: Request) -> Plan:
    """Plan the check of a dataset; the linear head stands for all methods: what is prepared is the same."""
    plan = Plan(request)
    clips = plan.add_data("linear", request.encoder_seed(request.seed))
    configurations = ("experiments/methods/linear.yaml", f"experiments/datasets/{request.configuration}.yaml")
    arguments = [
        request.root,
        *(word for path in configurations for word in ("--config", path)),
        *plan.places(request.data),
    ]
    plan.add(Step("data", "data", (*arguments, *request.words("ARGS")), tuple(clips)))
    return plan


def plan_demo(request: Request) -> Plan:
    """Plan a session of an unseen device, after what it lacks: its run on the embedded dataset, and the export."""
    plan, run = Plan(request), request.served_run
    if request.embedded and not Path(run, "results.json").is_file():
        plan.add_run(find_run(request.served, request.seed, request.encoder_seed(request.seed)))
    if not Path(run, "deployment", "export.json").is_file():
        plan.add(Step("export", "export", (run,), tuple(plan.steps)))
    arguments = (run, "--data", request.data, *request.words("ARGS"))
    plan.add(Step("demo", "demo", arguments, tuple(plan.steps)))
    return plan


def plan_one(request: Request) -> Plan:
    """Plan a command that is one program."""
    plan = Plan(request)
    program = f"{request.command}_{request['OF']}" if request["OF"] else request.command
    plan.add(Step(request.command, program, tuple(ARGUMENTS[request.command](request))))
    return plan


def _options(request: Request, **variables: str) -> list[str]:
    """Return options for the variables that have a value."""
    return [f"--{option.replace('_', '-')}={request[name]}" for option, name in variables.items() if request[name]]


def _asked(request: Request) -> list[str]:
    """Return what is asked: a clip, a question, and texts to choose from; joined, since they may begin with a dash."""
    return [f"--{name.lower()}={request[name]}" for name in ("VIDEO", "QUESTION", "CHOICES")]


def _address(request: Request) -> str:
    host, port = request["HOST"] or "127.0.0.1", request["PORT"] or "8000"
    return request["CLOUD"] or f"http://{host}:{port}"


ARGUMENTS: dict[str, Callable[[Request], Sequence[str]]] = {
    "table": lambda request: [request.root],
    "report": lambda request: [request.root, "--data", request.data],
    "figures": lambda request: [request.root, "--data", request.data],
    "predict": lambda request: [
        f"--run={request.served_run}", *_asked(request), *([f"--vocab={request.vocab}"] if request.vocab else [])
    ],
    "export": lambda request: [request.served_run, *request.words("ARGS")],
    "serve": lambda request: [
        f"{request.served_run}/deployment/cloud", "--host", request["HOST"] or "127.0.0.1",
        "--port", request["PORT"] or "8000",
        *_options(request, workers="WORKERS", keys="KEYS", certificate="CERTIFICATE",
                  certificate_key="CERTIFICATE_KEY"),
        *request.words("ARGS"),
    ],
    "device": lambda request: [
        f"{request.served_run}/deployment/device{'-int8' if request['INT8'] == '1' else ''}", *_asked(request),
        f"--cloud={_address(request)}", "--state", f"{request.served_run}/deployment/state", *request.words("ARGS"),
    ],
    "delay": lambda request: [request.root, *request.words("ARGS")],
    "checkpoint": lambda request: [request["FILE"]],
    "sweep": lambda request: ["experiments/sweep.yaml"],
    "benchmark": lambda request: request.words("ARGS"),
}  # fmt: skip
PLANS: dict[str, Callable[[Request], Plan]] = {
    "train": plan_training,
    "tables": plan_tables,
    "data": plan_data,
    "demo": plan_demo,
    **dict.fromkeys(ARGUMENTS, plan_one),
}
