"""Run folders made up to do harm: nothing in them is executed, and nothing outside them is written."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from src.analysis.results import find_runs
from src.common.errors import UserError
from src.models.checkpoints import read_state_dict
from src.runs.result import Result, read_record
from src.setup.reopen import read_config
from tests.helpers.commands import assert_refused
from tests.helpers.hostile import run_on
from tests.helpers.place import Hostile, Place, result_of


def canary(folder: Path) -> Path:
    """Return the path of the file that `Hostile` creates if it is executed."""
    return folder / "executed"


@pytest.mark.filterwarnings("error")  # torch warns of old protocols
@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_is_refused_because_it_asks_for_code(copies: Place, protocol: int) -> None:
    file = copies.path / "plain.pth"
    file.write_bytes(pickle.dumps({"model": Hostile(copies.path)}, protocol=protocol))
    with pytest.raises(UserError, match=r"asks for posix\.system, which could execute code"):
        read_state_dict(file)
    assert not canary(copies.path).exists()


@pytest.mark.parametrize("name", ["evaluate", "resume", "report"])
def test_a_checkpoint_of_a_run_executes_nothing(copies: Place, name: str) -> None:
    folder = copies.folder("aekt")
    file = folder / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(file, weights_only=True), "state_dict": Hostile(copies.path)}, file)
    ran = run_on(copies, name, folder)
    assert "could execute code" in ran.out + ran.err
    assert "Traceback" not in ran.err
    assert not canary(copies.path).exists()


@pytest.mark.parametrize(
    ("node", "target"),
    [
        ({"_target_": "src.models.program.load_program", "path": "{tmp}/script.pt"}, "load_program"),
        ({"_target_": "src.common.files.write_text", "file": "{tmp}/executed", "text": "x"}, "write_text"),
        ({"_target_": "src.data.array_file.save_arrays", "path": "{tmp}/executed"}, "save_arrays"),
        ({"_target_": "torch.optim.sgd.torch.hub.load"}, "hub"),
        ({"a": [{"_target_": "torch.optim.Optimizer.__init__.__globals__"}]}, "globals"),
        ({"_target_": "${oc.env:AEKT_TARGET}"}, "os.system"),
    ],
)
def test_a_configuration_calls_only_what_conf_calls(
    copies: Place, monkeypatch: pytest.MonkeyPatch, node: Any, target: str
) -> None:
    monkeypatch.setenv("AEKT_TARGET", "os.system")
    folder = copies.folder("aekt")
    config: Any = OmegaConf.load(folder / "config.yaml")
    config.data.prepare = json.loads(json.dumps(node).replace("{tmp}", str(copies.path)))
    OmegaConf.save(config, folder / "config.yaml")
    assert_refused(copies.evaluate(f"run={folder}"), "would call", target, "choose another run")
    assert not canary(copies.path).exists()


def test_targets_of_conf_and_optimisers_of_torch_are_allowed(originals: Place, tmp_path: Path) -> None:
    folder = originals.folder("aekt")
    config: Any = OmegaConf.load(folder / "config.yaml")
    for target in ("torch.optim.AdamW", "torch.optim.lr_scheduler.StepLR", "src.methods.kd.KD"):
        config.schedule.optimizer["_target_"] = target
        OmegaConf.save(config, tmp_path / "config.yaml")
        assert read_config(tmp_path, str(tmp_path)).schedule.optimizer._target_ == target


def test_aliases_that_expand_without_end_are_refused(copies: Place) -> None:
    folder = copies.folder("aekt")
    levels = "\n".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    (folder / "config.yaml").write_text(f"data:\n  a0: &a0 [x]\n{levels}\n")
    assert_refused(copies.evaluate(f"run={folder}"), "has YAML aliases", "choose another run")


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_deep_nesting_is_refused(copies: Place, name: str) -> None:
    (copies.folder("aekt") / name).write_text('{"a":' * 100_000)
    for ran in (run_on(copies, "train", copies.folder("aekt")), run_on(copies, "report", copies.folder("aekt"))):
        assert "Traceback" not in ran.err
    assert_refused(run_on(copies, "train", copies.folder("aekt")), f"{name} is damaged", "start_over=true")


def test_links_in_a_run_folder_are_replaced_and_not_followed(copies: Place) -> None:
    folder = copies.folder("aekt")
    precious = copies.path / "precious"
    precious.write_text("keep me")
    (folder / "result.json").unlink()
    for name in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "student.pth"):
        (folder / name).unlink()
        (folder / name).symlink_to(precious)
    assert copies.train("method=aekt", "network@model.teacher=resnet8", "start_over=true").code == 0
    assert precious.read_text() == "keep me"
    assert not any(file.is_symlink() for file in folder.rglob("*"))


@pytest.mark.filterwarnings("ignore")
def test_class_names_are_shown_as_text(copies: Place) -> None:
    for folder in copies.folders("aekt") + copies.folders("vanilla"):
        result = result_of(folder)
        result["class_names"] = ["$\\frac{", "\\input{/etc/passwd}", "_^", "<b>", "%d", "{x}", "|", "\n", "é", "$$"]
        (folder / "result.json").write_text(json.dumps(result))
    ran = run_on(copies, "report", copies.folder("aekt"))
    assert (ran.code, ran.err) == (0, ""), ran.err


@pytest.mark.parametrize("superclasses", [[], ["one"]])
def test_superclasses_must_fit_the_classes(copies: Place, superclasses: list[str]) -> None:
    folder = copies.folder("aekt")
    (folder / "result.json").write_text(json.dumps({**result_of(folder), "superclasses": superclasses}))
    with pytest.raises(UserError, match=r"result\.json.*one superclass for each class"):
        read_record(Result, folder / "result.json")
    _, others = find_runs(folder)
    assert [other.state for other in others] == ["foreign"]
