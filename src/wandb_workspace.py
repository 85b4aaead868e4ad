"""`python -m src.wandb_workspace ENTITY [PROJECT]`: make a W&B workspace for this project's runs with W&B's library.

It needs `pip install -e '.[workspace]'` and a login.
"""

import argparse

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws


def workspace(entity: str, project: str) -> ws.Workspace:
    """Make a workspace that groups the runs by method.

    It shows the results, the curves by epoch, the figures of classes, and the settings that differ.
    """
    scores = [
        wr.LinePlot(title=f"{name} ({split})", x="epoch", y=[f"{split}/{name}"], groupby_rangefunc="stddev")
        for split in ("test", "val")
        for name in ("accuracy", "nll", "ece", "agreement")
    ]
    last = [
        wr.BarPlot(title=f"{name} after the last epoch", metrics=[f"last/{name}"], groupby_rangefunc="stddev")
        for name in ("accuracy", "nll", "ece", "agreement")
    ]
    cost = wr.ScatterPlot(
        title="Accuracy and time", x=wr.SummaryMetric("seconds"), y=wr.SummaryMetric("last/accuracy"), log_x=True
    )
    media = wr.MediaBrowser(media_keys=["results/class_relations", "results/calibration"], num_columns=2)
    return ws.Workspace(
        entity=entity,
        project=project,
        name="Methods and seeds",
        sections=[
            ws.Section(name="After the last epoch", panels=[*last, cost], is_open=True),
            ws.Section(name="By epoch", panels=[*scores], is_open=True),
            ws.Section(name="Classes", panels=[media], is_open=True),
            ws.Section(name="Settings", panels=[wr.RunComparer(diff_only="split")]),
        ],
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")]),
    )


def main() -> None:
    """Save the workspace and print its address."""
    parser = argparse.ArgumentParser(prog="python -m src.wandb_workspace", description=__doc__)
    parser.add_argument("entity", help="the user or team that owns the project")
    parser.add_argument("project", nargs="?", default="aekt", help="the W&B project; default: aekt")
    given = parser.parse_args()
    print(workspace(given.entity, given.project).save().url)


if __name__ == "__main__":
    main()
