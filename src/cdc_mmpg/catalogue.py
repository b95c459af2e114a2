"""Catalogue of methods: one entry each, used by the plan of runs, the tables, the findings and the figures.

A method consists of a YAML file in `experiments/methods`, which names its class, and an entry here. No torch.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Unit = Literal["static", "sample", "session"]

SYNTHETIC = "synthetic"  # the dataset that is generated here, with its vocabulary and its encoder
# World by dataset name, see `data_modules.synthetic_clips`. All share one configuration, vocabulary and encoder.
WORLDS = {SYNTHETIC: "sky", f"{SYNTHETIC}_memory": "memory", f"{SYNTHETIC}_rooms": "rooms"}
COMPARED_WORLDS = (SYNTHETIC, f"{SYNTHETIC}_memory")  # of `make train`, and in the table of worlds

PRETRAINING = "encoder_pretraining"  # the run that trains the synthetic dataset's encoder
BASELINE = "fine_tuning"  # the method that all others are compared with
SESSION = "cdc_mmpg_session"
CONCATENATED = "session_concatenated"

# Replacement input of a method, by test condition: each control shows what the real input contributes.
SAMPLE_CONTROLS = {
    "shuffled": "another sample's anchor",
    "shuffled_device": "another device's anchor",
    "mean_head": "one mean head for all",
    "bypassed": "ADR bypassed",
}
SESSION_CONTROLS = {"shuffled_n16": "another device's 16 anchors", "mean_head": "one mean head for all"}


class Row(NamedTuple):
    """Row of the table of methods: a method, or a method under another test condition."""

    label: str  # "· ..." for a control of the row above
    method: str
    condition: str | None = None  # None: the first condition, which it was trained under and is compared by


class Method(NamedTuple):
    """Method: its dependencies, the order of its runs, and the look of its rows and lines.

    Attributes:
        name: name of its YAML file and of the folder of its runs.
        label: label of its row; empty for a run that answers no questions.
        unit: scope of one last layer: all samples (static), a sample or a session.
        color: color of its points and lines.
        turn: position among the runs of METHOD=all, the longest runs first; 0 if it is not one of them.
        datasets: datasets whose METHOD=all includes it: any; devices, the synthetic one; published, all others.
        encoder: run that trains its initial encoder; for a method that evaluates a run, that run.
        adr: run of phase one that trains its reasoner.
        features: run that computes the features it shares, of the frozen encoder or of virtual devices; with METHOD=all
            that run goes first.
        uses_reading: whether it uses the pretraining's reading of an anchor.
        controls: label of each condition with replaced input, by condition.
        before, after: labels of other conditions, by condition; their rows stand before and after the method's row.
        in_paper: whether the paper's tables have a row for it.
        several_seeds: whether `make tables` trains it with several seeds.
        main: whether `make train` without METHOD trains it in every world of the synthetic dataset.
        knows: information it uses beyond the history's questions and answers: letters of `KNOWLEDGE`.
        program: program of `cdc-mmpg` that runs it.
    """

    name: str
    label: str = ""
    unit: Unit = "static"
    color: str = "#8b949e"
    turn: int = 0
    datasets: Literal["any", "devices", "published"] = "any"
    encoder: str = PRETRAINING
    adr: str = ""
    features: str = ""
    uses_reading: bool = False
    controls: Mapping[str, str] = {}
    before: Mapping[str, str] = {}
    after: Mapping[str, str] = {}
    in_paper: bool = False
    several_seeds: bool = False
    main: bool = False
    knows: str = ""
    program: Literal["fit", "on_device", "prompts", "privacy"] = "fit"

    def rows(self) -> list[Row]:
        """Return the method's rows in the table of methods."""
        rows = [Row(label, self.name, condition) for condition, label in self.before.items()]
        rows += [Row(self.label, self.name)] if self.label else []
        rows += [Row(label, self.name, condition) for condition, label in self.after.items()]
        return rows + [Row(f"· {label}", self.name, condition) for condition, label in self.controls.items()]


# Information a method may use beyond the history's questions and answers, by its letter in the table.
KNOWLEDGE = {
    "s": "the kind of shift",
    "v": "the kind of shift, in training only (virtual devices: training devices seen with other casts)",
    "c": "captions of the pretraining clips, beyond the encoder that all rows share",
    "d": "which training clips are of the same device",
    "t": "the true cast",
    "l": "answered questions about the device's clips, for backpropagation",
}
FEWER_CLIPS = {"n4": "n = 4", "n8": "n = 8", "alike_n8": "n = 8, similar backgrounds"}


def _label_fewer_clips(label: str) -> dict[str, str]:
    """Return the labels of the rows with fewer clips, by condition."""
    return {condition: f"{label}, {number}" for condition, number in FEWER_CLIPS.items()}


# In the order of the tables: the paper's methods, then the others. Runs of phase one answer no questions.
METHODS = (
    Method("linear", "F-linear", color="#94a3b8", turn=1, in_paper=True, several_seeds=True, main=True),
    Method("linear_virtual", "F-linear, virtual devices", color="#b6c2d1", turn=19, datasets="devices",
           features=SESSION, knows="v"),
    Method("static_mlp", "Static MLP", color="#8596ab", turn=18, datasets="devices", features="linear"),
    Method(BASELINE, "Fine-tuning", color="#6b7280", turn=2, in_paper=True, several_seeds=True, main=True),
    Method(f"{BASELINE}_virtual", "Fine-tuning, virtual devices", color="#9aa1ad", turn=28, datasets="devices",
           knows="v"),
    Method("hyper", "F-hyper", "sample", "#c2715a", turn=4, features="linear", controls=SAMPLE_CONTROLS,
           in_paper=True),
    Method("hyper_fan_in", "F-hyper, hyperfan-in", "sample", "#b5488a", turn=5, features="linear",
           controls=SAMPLE_CONTROLS, several_seeds=True),
    Method("cdc_mmpg", "CDC-MMPG", "sample", "#9a6700", turn=3, adr="adr_pretraining", controls=SAMPLE_CONTROLS,
           in_paper=True, several_seeds=True, main=True),
    Method("cdc_mmpg_virtual", "CDC-MMPG, virtual devices", "sample", "#b38a3a", turn=29, datasets="devices",
           adr="adr_pretraining", controls=SAMPLE_CONTROLS, knows="v"),
    Method("cdc_mmpg_frozen", "CDC-MMPG, frozen", "sample", "#c9a227", turn=6, datasets="published",
           encoder=BASELINE, adr="adr_pretraining_frozen", controls=SAMPLE_CONTROLS),
    Method(
        SESSION, "Session, n = 16", "session", "#0b5cad", turn=7, datasets="devices", features="linear",
        before={"n1": "Session, n = 1", "n4": "Session, n = 4", "n8": "Session, n = 8"},
        after={"n23": "Session, n = 23", "alike_n8": "Session, n = 8, similar backgrounds",
               "n0": "· no anchors: the static head", "shuffled_n8": "· another device's 8 anchors"},
        controls=SESSION_CONTROLS, uses_reading=True, several_seeds=True, main=True, knows="vcd",
    ),
    Method(f"{SESSION}_basis", "Session, basis", "session", "#3b82c4", turn=8, datasets="devices",
           features=SESSION, uses_reading=True, controls=SESSION_CONTROLS, several_seeds=True, knows="vcd"),
    Method(f"{SESSION}_full", "Session, full layer", "session", "#7aa7d9", turn=11, datasets="devices",
           features=SESSION, uses_reading=True, controls=SESSION_CONTROLS, knows="vcd"),
    Method(f"{SESSION}_film", "Session, FiLM", "session", "#2f7fb3", turn=15, datasets="devices",
           features=SESSION, uses_reading=True, controls=SESSION_CONTROLS, knows="vcd"),
    Method(f"{SESSION}_bias", "Session, bias alone", "session", "#9db8cf", turn=16, datasets="devices",
           features=SESSION, uses_reading=True, controls=SESSION_CONTROLS, knows="vcd"),
    Method(f"{SESSION}_collected", "Session, no virtual devices", "session", "#46688a", turn=14, datasets="devices",
           features="linear", uses_reading=True, controls=SESSION_CONTROLS, several_seeds=True,
           knows="cd"),
    Method(f"{SESSION}_jitters", "Session, jittered devices", "session", "#5f7f9f", turn=31, datasets="devices",
           features="linear", uses_reading=True, controls=SESSION_CONTROLS, knows="cd"),
    Method(f"{SESSION}_feature", "Session, mean feature", "session", "#6a7f93", turn=13, datasets="devices",
           features=SESSION, controls=SESSION_CONTROLS, several_seeds=True, knows="vd"),
    Method(f"{SESSION}_plain", "Session, plain mean", "session", "#5b7083", turn=12, datasets="devices",
           features="linear", controls=SESSION_CONTROLS, knows="d"),
    Method(CONCATENATED, "Concatenated, n = 16", color="#0f766e", turn=9, datasets="devices", features=SESSION,
           uses_reading=True, controls={"shuffled_n16": SESSION_CONTROLS["shuffled_n16"]}, several_seeds=True,
           knows="vcd"),
    Method("mean_anchor", "Minus mean anchor", color="#7c6f57", turn=20, datasets="devices", features="linear",
           several_seeds=True, knows="d"),
    Method("mean_anchor_virtual", "Minus mean anchor, virtual", color="#a3977f", turn=21,
           datasets="devices", features=SESSION, several_seeds=True, main=True, knows="vd"),
    Method("in_context", "In context, n = 16", color="#7a4fa3", turn=22, datasets="devices", features="linear",
           several_seeds=True, knows="d"),
    Method("in_context_virtual", "In context, virtual devices", color="#a07cc5", turn=10, datasets="devices",
           features=SESSION, several_seeds=True, main=True, knows="vd"),
    Method("corrected_grey_world", "By hand: grey world", color="#b45309", turn=23, datasets="devices",
           features="linear", before=_label_fewer_clips("By hand: grey world"), several_seeds=True, main=True,
           knows="s"),
    Method("corrected_hue_mode", "By hand: hue histogram", color="#d97706", turn=24, datasets="devices",
           features="linear", before=_label_fewer_clips("By hand: hue histogram"), several_seeds=True, knows="s"),
    Method("corrected_true_cast", "By hand: true cast (ceiling)", color="#374151", turn=25,
           datasets="devices", features="linear", several_seeds=True, main=True, knows="st"),
    Method("session_oracle", "Oracle: the true cast", color="#1f2328", turn=17, datasets="devices",
           features=SESSION, several_seeds=True, main=True, knows="vt"),
    Method(
        "on_device", "On the device: not adapted", color="#4d7c0f", turn=26, datasets="devices", encoder=BASELINE,
        after={"tent": "On the device: TENT", "t3a": "On the device: T3A", "lame": "On the device: LAME",
               "foa": "On the device: FOA's shift"} | {f"labels_{n}": f"On the device: {n} labels" for n in (2, 5, 15)},
        several_seeds=True, main=True, program="on_device",
    ),
    Method("prompts", "On the device: FOA's prompts", color="#6b8e23", turn=30, datasets="devices", encoder=BASELINE,
           program="prompts"),
    Method("privacy", turn=27, datasets="devices", encoder=SESSION, program="privacy"),
    Method(PRETRAINING, encoder=""),
    Method("adr_pretraining", features="linear"),
    Method("adr_pretraining_frozen", encoder=BASELINE),
)  # fmt: skip

BY_NAME = {method.name: method for method in METHODS}
ROWS = tuple(row for method in METHODS for row in method.rows())
METHOD_LABELS = {method.name: method.label for method in METHODS if method.label}
PAPER_METHODS = tuple(method.name for method in METHODS if method.in_paper)
SAMPLE_METHODS = tuple(method.name for method in METHODS if method.unit == "sample")
SESSION_METHODS = tuple(method.name for method in METHODS if method.unit == "session")

# Variants of a method, METHOD=<method>.<variant>: separate runs with other arguments.
FRAME_COUNTS = (2, 3, 4, 5)  # frames of a clip
RECIPE_FRAMES = 3  # frames of a clip in all other runs
AXES, TARGETS = ("feature", "group8", "batch"), ("anchor", "global")  # of the reasoner, compared in a study
REASONERS = {f"{axis}_{target}": f"{axis}, {target}" for axis in AXES for target in TARGETS}
REASONER_METHODS = ("cdc_mmpg", "cdc_mmpg_frozen", "adr_pretraining", "adr_pretraining_frozen")
DEVICE_COUNTS = (12, 24, 48)  # training devices, in place of the synthetic dataset's 96
ARC = "arc"  # group of unseen devices whose casts lie in the arc that is held out of training
_VARIANT_SESSIONS = (SESSION, f"{SESSION}_collected")
_PRETRAINING_METHODS = (SESSION, f"{SESSION}_feature", PRETRAINING)
DEEPER = "depth6"  # variant with a larger encoder, which only a cloud would run


class Variant(NamedTuple):
    """Change to the training of some methods."""

    label: str
    methods: tuple[str, ...]  # with the pretraining among them the change makes new encoders
    arguments: tuple[str, ...]
    changed: tuple[str, ...] = ()  # methods whose runs have the arguments; empty for all


VARIANTS = {
    **{f"epochs{n}": Variant(f"{n} epochs", (BASELINE,), (f"--trainer.max_epochs={n}",)) for n in (7, 28, 40)},
    "arc90": Variant("a quarter of the casts held out", ("linear", *_VARIANT_SESSIONS, "corrected_grey_world"),
                     ("--data.init_args.held_out_arc=90",)),
    **{f"devices{n}": Variant(f"{n} devices train", ("linear", *_VARIANT_SESSIONS),
                              (f"--data.init_args.most_devices={n}",)) for n in DEVICE_COUNTS},
    "no_background": Variant("captions without the background", _PRETRAINING_METHODS,
                             ("--data.init_args.name_backgrounds=false",), (PRETRAINING,)),
    "no_anchor_loss": Variant("no loss on anchors in the pretraining", _PRETRAINING_METHODS,
                              ("--model.init_args.anchor_weight=0",), (PRETRAINING,)),
    DEEPER: Variant("an encoder of 6 layers instead of 3", (BASELINE, SESSION, PRETRAINING),
                    ("--model.init_args.encoder.depth=6",)),
    "paper_qa": Variant("the reasoner in the paper's size", ("cdc_mmpg", "adr_pretraining"),
                        ("--model.init_args.preset=paper_qa",), ("adr_pretraining",)),
}  # fmt: skip
# Runs of variants that answer questions.
VARIANT_RUNS = tuple(
    f"{run}.{key}" for key, change in VARIANTS.items() for run in change.methods if run in METHOD_LABELS
)
STUDY = {f"cdc_mmpg_frozen.{variant}": label for variant, label in REASONERS.items()}
STUDY_SEEDS = range(5)


def find_knowledge(row: Row) -> str:
    """Return the information that a row's method uses, as letters of `KNOWLEDGE`."""
    labels = "l" if (row.condition or "").startswith("labels_") else ""
    return (BY_NAME[row.method].knows if row.method in BY_NAME else "") + labels


def is_trained(name: str) -> bool:
    """Return whether runs of this name are trained, not evaluations of another run's weights."""
    return name not in BY_NAME or BY_NAME[name].program == "fit"


def choose_color(name: str) -> str:
    """Return the color of a method's points; a default color for one that is not in the catalogue."""
    return BY_NAME[name].color if name in BY_NAME else Method._field_defaults["color"]


def list_methods(has_devices: bool, main: bool = False) -> list[str]:
    """Return the methods of METHOD=all in the order of their runs; with `main` those of METHOD=main."""
    kinds = ("any", "devices" if has_devices else "published")
    chosen = [method for method in METHODS if method.turn and method.datasets in kinds and (method.main or not main)]
    return [method.name for method in sorted(chosen, key=lambda method: method.turn)]


def name_frames_variant(method: str, number: int) -> str:
    """Return the name of a method's runs on `number` frames of a clip."""
    return method if number == RECIPE_FRAMES else f"{method}.frames{number}"


def list_variants(method: Method) -> list[str]:
    """Return the names of a method's variants."""
    if method.program != "fit":
        return []
    variants = [f"{method.name}.{name}" for name, variant in VARIANTS.items() if method.name in variant.methods]
    if method.datasets == "devices":
        return variants
    variants += [name_frames_variant(method.name, number) for number in FRAME_COUNTS if number != RECIPE_FRAMES]
    return variants + [f"{method.name}.{variant}" for variant in REASONERS if method.name in REASONER_METHODS]


def find_pretraining_variant(variant: str) -> str:
    """Return the pretraining variant that a variant of a method builds on; empty for the usual pretraining."""
    return variant if variant in VARIANTS and PRETRAINING in VARIANTS[variant].methods else ""


def list_variant_arguments(method: str, variant: str) -> list[str]:
    """Return the arguments that make a variant of a method."""
    if variant in VARIANTS:
        change = VARIANTS[variant]
        return list(change.arguments) if method in (change.changed or change.methods) else []
    if variant.startswith("frames"):
        return [f"--data.init_args.num_frames={variant.removeprefix('frames')}"]
    if not method.startswith("adr_"):  # phase two loads the reasoner that phase one's variant trained
        return []
    axis, target = variant.split("_")
    return [f"--model.init_args.axis={axis.replace('group', 'group:')}", f"--model.init_args.target={target}"]
