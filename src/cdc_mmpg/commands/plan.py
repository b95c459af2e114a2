"""Plan of a command: the programs to run, their arguments, and their dependencies.

A step runs a program of `cdc-mmpg` with arguments: `cdc-mmpg fit ...`. The dependencies are a small graph over the
catalogue; `make -n` prints the steps in their order.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cdc_mmpg.catalogue import (
    BASELINE,
    BY_NAME,
    FRAME_COUNTS,
    PRETRAINING,
    REASONERS,
    RECIPE_FRAMES,
    SESSION,
    STUDY_SEEDS,
    SYNTHETIC,
    VARIANT_RUNS,
    WORLDS,
    find_pretraining_variant,
    is_trained,
    list_methods,
    list_variant_arguments,
    name_frames_variant,
)
from cdc_mmpg.commands.request import METHOD_GROUPS, Request
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.files import expand_home
from cdc_mmpg.processors import count_processors, find_gpus


class Step(NamedTuple):
    """Step of a plan: one program with its arguments.

    Attributes:
        name: name of the step in messages.
        program: name of a program of `cdc-mmpg`.
        arguments: arguments of the program, after its name.
        needs: names of the steps that this one builds on.
        after: name of a step that this one waits for, whether that succeeds or fails.
        alone: whether the step uses all processors, and no other step runs in parallel.
        folder: folder of the run that the step makes; empty if it makes none.
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
        """Name of the program, and its arguments."""
        return [self.program, *self.arguments]

    @property
    def trains(self) -> bool:
        """Whether the step is a training run, which may use several processes."""
        return self.program == "fit"


class RunName(NamedTuple):
    """Name of a run: `<method>[.<variant>]/seed<N>` in the dataset's folder."""

    method: str
    seed: int
    encoder_seed: int  # seed of the pretraining whose encoder it loads
    variant: str = ""

    @property
    def name(self) -> str:
        """Folder of the run, relative to the dataset's folder."""
        return f"{self.method}{self.variant and '.'}{self.variant}/seed{self.seed}"


def find_run(name: str, seed: int, encoder_seed: int) -> RunName:
    """Return the run of a method, or of a variant given by its dotted name."""
    method, _, variant = name.partition(".")
    return RunName(method, seed, encoder_seed, variant)


class Plan:
    """Steps of a command, in an order that respects their dependencies.

    Args:
        request: the command and its variables.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.steps: dict[str, Step] = {}

    @cached_property
    def gpus(self) -> list[str]:
        """GPUs that runs may use; none if the command line selects the CPU."""
        return [] if "--trainer.accelerator=cpu" in self.request.words("ARGS") else find_gpus()

    @cached_property
    def jobs(self) -> int:
        """Number of parallel runs; on GPUs each run has its own GPU.

        Raises:
            ConfigError: parallel runs are configured with several GPUs each.
        """
        request = self.request
        several = len(request.methods) * len(request.seeds) > 1
        number = int(request["JOBS"] or 0)
        if not number and (request["LAUNCH"] or (self.gpus and (request["DEVICES"] or not several))):
            number = 1
        if self.gpus and number != 1:
            if request["DEVICES"] not in ("", "1"):
                raise ConfigError(
                    f"JOBS={number} and DEVICES={request['DEVICES']}: parallel runs have one GPU each, omit one of the "
                    "two variables"
                )
            return min(number or len(self.gpus), len(self.gpus))
        return number or (2 if request.is_synthetic else 1)

    def name_of(self, run: RunName) -> str:
        """Return the name of a run's step, which starts with the dataset's name in all worlds but the first."""
        further = self.request.is_synthetic and self.request.root_of(run.method) != self.request.root_of(PRETRAINING)
        return f"{self.request.dataset}/{run.name}" if further else run.name

    def add(self, step: Step) -> str:
        """Add a step unless the plan has it already; return its name."""
        self.steps.setdefault(step.name, step)
        return step.name

    def add_clips(self, folder: str, world: str, seed: int) -> list[str]:
        """Add the step that makes a world of the synthetic dataset, unless it exists; return the steps to wait for."""
        size = ["--size", self.request["SIZE"]] if self.request["SIZE"] else []
        if Path(folder, "digests.json").is_file() and not size:
            return []
        of_world = ["--world", world, "--seed", str(seed)] if (world, seed) != ("sky", 0) else []
        arguments = (folder, *size, *of_world)
        return [self.add(Step(" ".join(["clips", *arguments]), "clips", arguments))]

    def add_data(self, method: str, seed: int) -> list[str]:
        """Add the steps that make the clips a run reads; return the names that the run needs.

        Args:
            method: method of the run; the pretraining reads only the captioned clips, made with the first world.
            seed: seed of the run's encoder, and so of its world.
        """
        request = self.request
        if not request.is_synthetic:
            return []
        names = self.add_clips(request.first_data, "sky", 0)  # which has the vocabulary, too
        if (folder := request.data_of(seed)) != request.first_data and method != PRETRAINING:
            names += self.add_clips(folder, WORLDS[request.dataset], seed)
        return names

    def add_run(self, run: RunName) -> str:
        """Add a run, after the runs that it builds on; return its name."""
        name = self.name_of(run)
        if name in self.steps:
            return name
        request, method = self.request, BY_NAME[run.method]
        source = run.encoder_seed if method.program == "fit" else run.seed  # a control evaluates the run of its seed
        clips = self.add_data(run.method, run.encoder_seed) if method.program == "fit" else []
        before = [run._replace(method=method.adr)] if method.adr else []
        before += [RunName(method.encoder, source, run.encoder_seed)] if method.encoder not in ("", PRETRAINING) else []
        needs = clips + [self.add_run(needed) for needed in before]
        waits = method.features and request.method in METHOD_GROUPS
        after = self.add_run(run._replace(method=method.features, variant="")) if waits else ""
        if method.encoder and request.pretrains:
            needs.append(self.add_run(RunName(PRETRAINING, source, source, find_pretraining_variant(run.variant))))
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
        pretraining = find_pretraining_variant(run.variant)
        if encoder := request.encoder_of(method.encoder, run.encoder_seed, pretraining):
            yield f"--model.init_args.encoder.checkpoint={encoder}"
        if method.adr:
            yield f"--model.init_args.adr={request.root}/{run._replace(method=method.adr).name}/adr.safetensors"
        if method.uses_reading and (reading := request.reading_of(run.encoder_seed, pretraining)):
            yield f"--model.init_args.reading={reading}"
        yield from list_variant_arguments(run.method, run.variant) if run.variant else ()
        yield from request.words("ARGS")
        yield from request.words(f"ARGS_{run.method}")

    def places(self, data: str) -> list[str]:
        """Return the arguments with the paths of the data."""
        request = self.request
        places = [f"--data.init_args.root={data}", f"--data.init_args.cache_dir={request.cache}"]
        return places + ([f"--data.init_args.vocab={request.vocab}"] if request.vocab else [])

    def list_dataset_arguments(self) -> list[str]:
        """Return the arguments that configure the dataset alone, with a method that all datasets have."""
        paths = ("experiments/methods/linear.yaml", f"experiments/datasets/{self.request.configuration}.yaml")
        configurations = [word for path in paths for word in ("--config", path)]
        return [*configurations, *self.places(self.request.data), *self.request.words("ARGS")]

    def count_processors_per_run(self) -> int:
        """Return the number of processors of each parallel run."""
        return max(1, count_processors() // self.jobs)


def plan_training(request: Request) -> Plan:
    """Plan the runs of METHOD and the runs that they build on, then the table of methods.

    Without DATASET and METHOD these are the main rows in all worlds of the synthetic dataset.
    """
    requests = request.in_all_worlds() if not request["METHOD"] else [request]
    return merge_plans(requests, [_plan_world(world) for world in requests])


def _plan_world(request: Request) -> Plan:
    """Plan the runs of METHOD on one dataset."""
    plan = Plan(request)
    if request.pretrains and not request["SEEDS"]:  # first, since it uses all processors
        source = request.encoder_seed(request.seed)
        plan.add_run(RunName(PRETRAINING, source, source, find_pretraining_variant(request.method.partition(".")[2])))
    # Controls first, with the runs that they evaluate: the two take longest, and none is then left alone at the end.
    methods = sorted(request.methods, key=is_trained)
    for name, seed in [(name, seed) for name in methods for seed in request.seeds]:
        plan.add_run(find_run(name, seed, request.encoder_seed(seed)))
    if any(BY_NAME[name.partition(".")[0]].label and BY_NAME[name.partition(".")[0]].program == "fit"
           for name in request.methods):  # fmt: skip
        plan.add(Step(f"table of {request.dataset}", "table", (request.root,)))
    return plan


def merge_plans(requests: Sequence[Request], plans: Sequence[Plan]) -> Plan:
    """Merge several plans into one: all other steps first, then the tables."""
    merged = Plan(requests[0])
    steps = [step for plan in plans for step in plan.steps.values()]
    for step in sorted(steps, key=lambda step: step.program in ("table", "tables")):
        merged.add(step)
    if len(plans) > 1:
        merged.add(Step("table of the worlds", "worlds", (requests[0].out,)))
    return merged


def plan_tables(request: Request) -> Plan:
    """Plan every table of the paper, and the further tables of this project.

    On a dataset with domains as devices (ARGS=--data.init_args.domains=casts): one run of every method of the synthetic
    dataset. In every world of that one: three pairs of world and pretraining for the main rows, one for the others
    (FULL=1: five for all, many hours); and the reasoner's study, five seeds on the features of one encoder.
    """
    requests = request.in_all_worlds()
    return merge_plans(requests, [_plan_tables_of_world(world) for world in requests])


def _plan_tables_of_world(request: Request) -> Plan:
    """Plan the tables of one dataset."""
    plan = Plan(request)
    if request.is_synthetic:
        full = request["FULL"] == "1"
        methods = list_methods(True)
        repeated = methods if full else [name for name in methods if BY_NAME[name].several_seeds]
        first = request.dataset == SYNTHETIC  # the paper's studies are repeated in one world only
        frames = [name_frames_variant(BASELINE, number) for number in FRAME_COUNTS if first and number != RECIPE_FRAMES]
        for seed in range(5 if full else 3):
            for name in [*repeated, *(frames if full else [])]:
                plan.add_run(find_run(name, seed, seed))
        for name in [*methods, *frames, *VARIANT_RUNS]:
            plan.add_run(find_run(name, 0, 0))
        plan.add_run(RunName(BASELINE, 0, 0))
        for variant in REASONERS if first else ():
            for seed in STUDY_SEEDS:
                for method in ("adr_pretraining_frozen", "cdc_mmpg_frozen"):
                    plan.add_run(RunName(method, seed, 0, variant))
    elif request.has_domains:  # synthetic devices in place of unseen cameras
        for name in list_methods(True):
            if BY_NAME[name].program != "privacy":  # which needs to know what clips show
                plan.add_run(find_run(name, request.seed, request.encoder_seed(request.seed)))
    plan.add(Step(f"tables of {request.dataset}", "tables", (request.root,)))
    return plan


def plan_data(request: Request) -> Plan:
    """Plan the check of a dataset, with the configuration of `linear`: the preparation is the same for all methods."""
    plan = Plan(request)
    clips = plan.add_data("linear", request.encoder_seed(request.seed))
    plan.add(Step("data", "data", (request.root, *plan.list_dataset_arguments()), tuple(clips)))
    return plan


def plan_table(request: Request) -> Plan:
    """Plan the table of methods, after the scoring of other models' predictions if there are any."""
    plan = Plan(request)
    if files := [expand_home(file) for file in request.words("PREDICTIONS")]:
        clips = plan.add_data("linear", request.seed)
        given = [f"--predictions={file}" for file in files]
        arguments = (request.root, *given, f"--seed_everything={request.seed}", *plan.list_dataset_arguments())
        plan.add(Step("score", "score", arguments, tuple(clips)))
    plan.add(Step("table", "table", (request.root,), tuple(plan.steps)))
    return plan


def plan_demo(request: Request) -> Plan:
    """Plan a session of an unseen device, after the run (on the synthetic dataset) and the export if missing."""
    plan, run = Plan(request), request.served_run
    if request.is_synthetic and not Path(run, "results.json").is_file():
        plan.add_run(find_run(request.served, request.seed, request.encoder_seed(request.seed)))
    if not Path(run, "deployment", "export.json").is_file():
        plan.add(Step("export", "export", (run,), tuple(plan.steps)))
    place = ["--terminal"] if request["DEMO"] == "terminal" else []
    arguments = (run, "--data", request.data, *place, *_options(request, port="PORT"), *request.words("ARGS"))
    plan.add(Step("demo", "demo", arguments, tuple(plan.steps)))
    return plan


def plan_release(request: Request) -> Plan:
    """Plan a release of METHOD's runs (main: in both worlds) and what they build on, with the sessions' bundles.

    The pretraining is left out where there is none, as after a training with CHECKPOINT.
    """
    requests = request.in_all_worlds() if not request["METHOD"] else [request]
    merged, folders = Plan(request), []
    for world in requests:
        runs = [step.folder for step in _plan_world(world).steps.values() if step.folder]
        folders += [run for run in runs if PRETRAINING not in run or Path(run, "results.json").is_file()]
        for run in (f"{world.root}/{world.served}/seed{seed}" for seed in world.seeds):
            if world.served.startswith(SESSION) and not Path(run, "deployment", "export.json").is_file():
                merged.add(Step(f"export of {run}", "export", (run,)))
        merged.add(Step(f"report of {world.dataset}", "report", (world.root, "--data", world.data)))
    merged.add(Step("release", "release", (request.out, *dict.fromkeys(folders)), tuple(merged.steps)))
    return merged


def plan_with_page(request: Request) -> Plan:
    """Plan an export or the service, after the installation of the page's libraries if they are wanted.

    An export is tried as a browser runs it, if npm is there. One of a release needs the test clips, which are made.
    """
    plan, exports = Plan(request), request.command == "export"
    if exports and request["RELEASE"]:
        plan.add_data(request.served, request.encoder_seed(request.seed))
    if request["WEB"] == "1" or (exports and shutil.which("npm")):
        plan.add(Step("web", "web", ("--optional",) if exports else ()))
    arguments = tuple(ARGUMENTS[request.command](request))
    plan.add(Step(request.command, request.command, arguments, tuple(plan.steps)))
    return plan


def plan_one(request: Request) -> Plan:
    """Plan a command that consists of one program."""
    plan = Plan(request)
    program = f"{request.command}_{request['OF']}" if request["OF"] else request.command
    plan.add(Step(request.command, program, tuple(ARGUMENTS[request.command](request))))
    return plan


def _options(request: Request, **variables: str) -> list[str]:
    """Return the options of the variables that have a value."""
    return [f"--{option.replace('_', '-')}={request[name]}" for option, name in variables.items() if request[name]]


def _question_options(request: Request) -> list[str]:
    """Return the options for clip, question and choices, joined by "=" since the values may begin with a dash."""
    return [f"--{name.lower()}={request[name]}" for name in ("VIDEO", "QUESTION", "CHOICES")]


def _service_address(request: Request) -> str:
    host, port = request["HOST"] or "127.0.0.1", request["PORT"] or "8000"
    return request["CLOUD"] or f"http://{host}:{port}"


ARGUMENTS: dict[str, Callable[[Request], Sequence[str]]] = {
    "report": lambda request: [request.root, "--data", request.data],
    "figures": lambda request: [request.root, "--data", request.data],
    "predict": lambda request: [
        f"--run={request.served_run}", *_question_options(request),
        *(f"--session={clip}" for clip in request.words("SESSION")),
        *([f"--vocab={request.vocab}"] if request["VOCAB"] or (request.vocab and not request["RELEASE"]) else []),
    ],
    "web": lambda request: [],
    "export": lambda request: [
        request.served_run, *([f"--data={request.data}", f"--cache={request.cache}"] if request["RELEASE"] else []),
        *request.words("ARGS"),
    ],
    "serve": lambda request: [
        f"{request.served_run}/deployment/cloud", "--host", request["HOST"] or "127.0.0.1",
        "--port", request["PORT"] or "8000",
        *_options(request, workers="WORKERS", keys="KEYS", certificate="CERTIFICATE",
                  certificate_key="CERTIFICATE_KEY"),
        *(["--web", f"{request.served_run}/deployment"] if request["WEB"] == "1" else []),
        *request.words("ARGS"),
    ],
    "device": lambda request: [
        f"{request.served_run}/deployment/device{'-int8' if request['INT8'] == '1' else ''}",
        *_question_options(request), f"--cloud={_service_address(request)}", "--state",
        f"{request.served_run}/deployment/state", *request.words("ARGS"),
    ],
    "delay": lambda request: [request.root, *request.words("ARGS")],
    "checkpoint": lambda request: [request["FILE"]],
    "sweep": lambda request: ["experiments/sweep.yaml"],
    "workspace": lambda request: [],
    "benchmark": lambda request: request.words("ARGS"),
}  # fmt: skip
PLANS: dict[str, Callable[[Request], Plan]] = {
    "train": plan_training,
    "tables": plan_tables,
    "data": plan_data,
    "table": plan_table,
    "demo": plan_demo,
    **dict.fromkeys(ARGUMENTS, plan_one),
    "release": plan_release,
    "export": plan_with_page,
    "serve": plan_with_page,
}
