"""The saved view of the W&B project: unseen accuracy by method and seed, controls, bytes, curves.

`cdc-mmpg workspace` (`make workspace`) writes the view to the project of WANDB_PROJECT, at WANDB_ENTITY or the user of
the key. The runs of a method's seeds are a group; bands are standard deviations over them. W&B's server holds views, so
it works online only.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from cdc_mmpg.catalogue import METHODS
from cdc_mmpg.errors import CDCError, ConfigError
from cdc_mmpg.program import log_to_terminal, run_to_exit_code
from cdc_mmpg.training.wandb_record import PROJECT, describe_error

VIEW = "CDC-MMPG"
UNSEEN = "test/accuracy/unseen"
BANDS = {"groupby": "Group", "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
MAX_RUNS = 100  # shown in a plot


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the view; return the exit code."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args(arguments)
    log_to_terminal()
    return run_to_exit_code(write_workspace)


def write_workspace() -> None:
    """Write the view and print its address.

    Raises:
        ConfigError: W&B is offline, or no key is configured.
        CDCError: the server cannot be reached, or refuses the view.
    """
    if (os.environ.get("WANDB_MODE") or "online") != "online":
        raise ConfigError(
            f"WANDB_MODE={os.environ['WANDB_MODE']}: a workspace is a view on W&B's server, so it is online only: "
            "unset WANDB_MODE"
        )
    import wandb  # noqa: PLC0415  takes seconds

    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # see `training.wandb_record`
    try:
        if not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "no W&B key is configured, and a workspace is online only: run `.venv/bin/wandb login`, or set "
                "WANDB_API_KEY"
            )
        entity = os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
        workspace = build_workspace(entity, os.environ.get("WANDB_PROJECT") or PROJECT).save()
        print(f"written: {workspace.url}")
    except ConfigError:
        raise
    except Exception as error:  # the client raises many unrelated types
        raise CDCError(
            f"W&B's server cannot be reached or refuses the workspace ({describe_error(error)}): check the key, "
            "WANDB_ENTITY, WANDB_PROJECT, and that the project has a run"
        ) from error


def build_workspace(entity: str, project: str) -> Any:
    """Return the view, a `wandb_workspaces.workspaces.Workspace`."""
    import wandb_workspaces.reports.v2 as panels  # noqa: PLC0415  imports wandb
    import wandb_workspaces.workspaces as views  # noqa: PLC0415  imports wandb

    def compare(metric: str, title: str, **options: Any) -> Any:
        return panels.BarPlot(title=title, metrics=[metric], max_runs_to_show=MAX_RUNS, **options)

    def trace(metric: str, title: str) -> Any:
        x = "trainer/global_step"
        return panels.LinePlot(title=title, x=x, y=[metric], max_runs_to_show=MAX_RUNS, **BANDS)

    conditions = {condition: label for method in METHODS for condition, label in method.controls.items()}
    opponents = {condition: label for method in METHODS if method.program != "fit"
                 for condition, label in method.after.items()}  # fmt: skip
    sections = {
        "Unseen accuracy": [
            compare(UNSEEN, "by method, mean and standard deviation over seeds", **BANDS),
            compare(UNSEEN, "by run: method and seed", legend_template="${run:displayName}"),
            compare("test/accuracy/seen", "devices seen in training, by method", **BANDS),
        ],
        "Controls": [compare(f"test/{condition}/unseen", label, **BANDS) for condition, label in conditions.items()],
        "Opponents on the device": [
            compare(f"test/{condition}/unseen", label, **BANDS) for condition, label in opponents.items()
        ],
        "Bytes": [
            panels.ScatterPlot(title="unseen accuracy against bytes down", x=panels.SummaryMetric("bytes/down"),
                               y=panels.SummaryMetric(UNSEEN), legend_template="${run:displayName}"),
            compare("bytes/down", "bytes down", **BANDS),
            compare("bytes/up", "bytes up", **BANDS),
        ],
        "Curves": [
            trace("val/accuracy", "validation accuracy"),
            trace("train/loss", "training loss"),
            trace("seconds/epoch", "seconds an epoch"),
        ],
        "Answers": [
            panels.WeavePanelSummaryTable(table_name="test/predictions"),
            panels.WeavePanelSummaryTable(table_name="privacy/probes"),
            panels.WeavePanelSummaryTable(table_name="delay/cells"),
        ],
    }  # fmt: skip
    return views.Workspace(
        entity=entity,
        project=project,
        name=VIEW,
        sections=[views.Section(name=name, panels=plots, is_open=True) for name, plots in sections.items()],
        settings=views.WorkspaceSettings(max_runs=MAX_RUNS),
    )
