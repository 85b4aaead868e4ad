"""`python -m src.wandb_workspace`: the workspace that it saves."""

import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest

pytest.importorskip("wandb_workspaces")

from src import wandb_workspace
from src.wandb_workspace import workspace


def test_wandb_accepts_the_workspace() -> None:
    made = workspace("somebody", "aekt")
    text = made._to_model().model_dump_json(by_alias=True)
    for name in ("test/accuracy", "last/ece", "results/class_relations", "Methods and seeds"):
        assert name in text
    assert type(made)._from_model(made._to_model()).sections[0].name == made.sections[0].name


@pytest.mark.parametrize(("arguments", "project"), [(["somebody"], "aekt"), (["somebody", "other"], "other")])
def test_the_command_saves_the_workspace_and_prints_its_address(
    arguments: list[str], project: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = SimpleNamespace(url="https://example.org/workspace")
    with patch.object(sys, "argv", ["wandb_workspace", *arguments]), patch.object(wandb_workspace, "workspace") as make:
        make.return_value.save.return_value = saved
        wandb_workspace.main()
    make.assert_called_once_with("somebody", project)
    assert capsys.readouterr().out == "https://example.org/workspace\n"
