"""Run folders: which are finished, why others are not, how they are named and grouped."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from src.analysis.results import by_protocol, find_runs, group, teacher_names
from src.runs.result import Result
from tests.helpers.run_folders import TEACHER, finished, write_run


def test_finished_runs_are_grouped_by_everything_but_the_seed(tmp_path: Path) -> None:
    for method, seed in [("kd", 1), ("kd", 0), ("vanilla", 0), ("aekt", 0)]:
        write_run(tmp_path, method, seed, layer="serial" if method == "aekt" else "none")
    runs, others = find_runs(tmp_path)
    assert others == []
    groups = group(runs)
    assert list(groups) == ["resnet8 alone", "resnet8 by kd", "resnet8 by aekt, serial"]
    assert [run.result.seed for run in groups["resnet8 by kd"]] == [0, 1]
    assert groups["resnet8 by kd"][0].history()[-1] == {"epoch": 2, "test/accuracy": 0.5}


def test_settings_that_differ_are_in_the_name(tmp_path: Path) -> None:
    for gamma in (0.4, 1.0):
        write_run(tmp_path, "aekt", settings={"method": {"name": "aekt", "gamma": gamma, "beta": 8}})
    assert list(group(find_runs(tmp_path)[0])) == ["resnet8 by aekt (gamma=0.4)", "resnet8 by aekt (gamma=1.0)"]


def test_runs_of_two_teachers_are_not_repetitions(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, teacher={**TEACHER, "sha256": "other"})
    write_run(tmp_path, seed=2, teacher={**TEACHER, "name": "resnet56", "sha256": "third"})
    names = list(group(find_runs(tmp_path)[0]))
    assert len(names) == 3
    assert any("from resnet56" in name for name in names)


def test_another_batch_size_makes_another_table_but_another_learning_rate_does_not(tmp_path: Path) -> None:
    for method, schedule in [
        ("kd", {"epochs": 3, "learning_rate": 0.1}),
        ("dkd", {"epochs": 3, "learning_rate": 0.05}),
        ("at", {"epochs": 3, "learning_rate": 0.1, "batch_size": 8}),
    ]:
        write_run(tmp_path, method, settings={"schedule": schedule})
    data = "colours, 200 training images, 3 epochs"
    counts = {title: len(runs) for title, runs in by_protocol(find_runs(tmp_path)[0]).items()}
    assert counts == {f"{data} (no batch_size)": 2, f"{data} (batch_size=8)": 1}


def test_a_table_says_which_setting_it_lacks(tmp_path: Path) -> None:
    for data in ({}, {"wrong_labels": 0.2}):
        write_run(tmp_path, settings={"data": data, "schedule": {"epochs": 3}})
    title = "colours, 200 training images, 3 epochs"
    assert set(by_protocol(find_runs(tmp_path)[0])) == {f"{title} (no wrong_labels)", f"{title} (wrong_labels=0.2)"}


def test_a_copy_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    shutil.copytree(folder, tmp_path / "zz-backup")
    runs, (copy,) = find_runs(tmp_path)
    assert [run.folder for run in runs] == [folder]
    assert (copy.state, copy.folder.name) == ("a copy", "zz-backup")


@pytest.mark.parametrize(
    ("file", "content", "state", "detail"),
    [
        ("result.json", '{"half', "damaged", "result.json"),
        ("result.json", "\udcff", "damaged", "result.json"),
        ("result.json", "[" * 100_000, "damaged", "result.json"),
        ("result.json", "[1]", "foreign", "the file"),
        ("result.json", '{"test": {"accuracy": 93.5}}', "foreign", "test.accuracy"),
        ("metrics.csv", "epoch,a\n1,2,3\n", "damaged", "metrics.csv"),
        ("metrics.csv", "epoch\nabc\n", "damaged", "metrics.csv"),
        ("result.json", None, "stopped", "3 of 3 epochs done"),
        ("metrics.csv", None, "stopped", "0 of 3 epochs done"),
        ("config.yaml", "[half", "stopped", "3 of ? epochs done"),
        ("config.yaml", "!!python/object/apply:os.getcwd []", "stopped", "3 of ? epochs done"),
        ("run.json", "{half", "damaged", "run.json"),
        ("run.json", '["another program"]', "foreign", "run.json"),
        ("failure.txt", "The loss\nis not finite", "failed", "3 of 3 epochs done: The loss is not finite"),
    ],
)
def test_folders_without_a_usable_result_are_listed_with_the_reason(
    tmp_path: Path, file: str, content: str | None, state: str, detail: str
) -> None:
    folder = write_run(tmp_path)
    if file != "result.json" and not (file == "metrics.csv" and content):
        (folder / "result.json").unlink()
    if content is None:
        (folder / file).unlink(missing_ok=True)
    else:
        (folder / file).write_bytes(content.encode(errors="surrogateescape"))
    runs, (other,) = find_runs(tmp_path)
    assert runs == []
    assert (other.folder, other.state) == (folder, state)
    assert detail in other.detail


def test_a_run_is_running_while_a_process_holds_its_lock(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "result.json").unlink()
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        assert find_runs(tmp_path)[1][0].state == "running"
    assert find_runs(tmp_path)[1][0].state == "stopped"


def test_a_result_alone_is_enough(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    for name in ("run.json", "config.yaml", "metrics.csv"):
        (folder / name).unlink()
    ((run,), others) = find_runs(tmp_path)
    assert (run.history(), others) == ([], [])


@pytest.mark.parametrize(
    ("method", "layer", "teacher", "name", "label"),
    [
        ("vanilla", "none", None, "resnet8 alone", "vanilla"),
        ("vanilla+averaged", "none", None, "resnet8 by vanilla+averaged", "vanilla+averaged"),
        ("tfkd", "none", None, "resnet8 by tfkd", "tfkd"),
        ("dml", "none", None, "resnet8 by dml", "dml"),
        ("kd", "none", TEACHER, "resnet8 by kd", "kd"),
        ("aekt", "serial", TEACHER, "resnet8 by aekt, serial", "aekt, serial"),
    ],
)
def test_only_the_vanilla_method_trains_a_student_alone(
    method: str, layer: str, teacher: dict | None, name: str, label: str
) -> None:
    run = finished(method=method, layer=layer, teacher=teacher)
    assert (run.name, run.label) == (name, label)
    assert run.pair == ("resnet20 to resnet8" if teacher else "resnet8")


def test_methods_without_a_teacher_come_after_the_networks_alone(tmp_path: Path) -> None:
    for method in ("tfkd", "kd", "vanilla", "dml"):
        write_run(tmp_path, method)
    assert list(group(find_runs(tmp_path)[0])) == [
        "resnet8 alone", "resnet8 by kd", "resnet8 by dml", "resnet8 by tfkd",
    ]  # fmt: skip


def test_a_result_of_a_later_version_may_have_more_keys(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    content = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**content, "new": 1, "test": {**content["test"], "new": 1}}))
    ((run,), others) = find_runs(tmp_path)
    assert others == []
    assert run.result == Result.model_validate(content)


@pytest.mark.parametrize("missing", ["test", "parameters", "seconds", "settings", "teacher", "class_names"])
def test_a_result_that_lacks_a_key_is_foreign(tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path)
    content = json.loads((folder / "result.json").read_text())
    del content[missing]
    (folder / "result.json").write_text(json.dumps(content))
    ((other,), runs) = (find_runs(tmp_path)[1], find_runs(tmp_path)[0])
    assert runs == []
    assert (other.state, other.detail) == (
        "foreign", f"result.json was not written by a run ({missing}: field required)",
    )  # fmt: skip


# Runs of the same setting


def test_the_same_teacher_from_two_places_is_one_setting(tmp_path: Path) -> None:
    """Its file's place, its name and the way it was found do not count, because its weights are known."""
    chosen: list[dict[str, Any]] = [
        {"path": "/a/teacher.pt", "seed": 0, "method": {"name": "vanilla"}},
        {"path": "/b/renamed.pt", "seed": 0, "method": {"name": "vanilla"}},
        {"path": "sha256:1f2e3d", "seed": 0, "method": {"name": "vanilla"}},
        {"path": None, "seed": 1, "method": {"name": "tfkd"}},
    ]
    for seed, options in enumerate(chosen):
        name = Path(options["path"] or "resnet20").stem
        model = {"name": f"{name}_to_resnet8", "student": {"name": "resnet8"}, "teacher": {"name": name, "depth": 20}}
        settings = {"teacher": {**options, "fold": False}, "model": model}
        write_run(tmp_path, seed=seed, settings=settings, teacher={**TEACHER, "name": name})
    assert {name: len(runs) for name, runs in group(find_runs(tmp_path)[0]).items()} == {"resnet8 by kd": 4}


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"fold": True}, {}),
        ({}, {"sha256": "0f" * 32}),
        ({}, {"class_index": [1, 0]}),
        ({}, {"mean": [0.1, 0.2, 0.3]}),
        ({}, {"image_size": 64}),
    ],
)
def test_a_teacher_that_answers_otherwise_is_another_setting(
    tmp_path: Path, options: dict[str, Any], facts: dict[str, Any]
) -> None:
    write_run(tmp_path, seed=0, settings={"teacher": {"fold": False}})
    write_run(tmp_path, seed=1, settings={"teacher": {"fold": False, **options}}, teacher={**TEACHER, **facts})
    assert [len(runs) for runs in group(find_runs(tmp_path)[0]).values()] == [1, 1]


@pytest.mark.parametrize("settings", [{"teacher": None}, {"teacher": 3, "model": [1]}, {"model": {"teacher": "x"}}])
def test_the_settings_of_a_foreign_run_may_hold_anything(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_run(tmp_path, settings=settings)
    assert list(group(find_runs(tmp_path)[0])) == ["resnet8 by kd"]


def test_runs_of_other_code_are_neither_copies_nor_repetitions(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    for seed in (0, 1):
        folder = write_run(tmp_path / "b", seed=seed)
        record = json.loads((folder / "run.json").read_text())
        record["fingerprints"]["code"] = "0ther"
        (folder / "run.json").write_text(json.dumps(record))
    runs, others = find_runs(tmp_path)
    assert others == []
    assert {name: len(each) for name, each in group(runs).items()} == {
        "resnet8 by kd (code=0ther)": 2,
        "resnet8 by kd (code=c0de)": 1,
    }


def test_runs_on_other_data_of_the_same_name_are_in_another_table(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    folder = write_run(tmp_path / "b")
    record = json.loads((folder / "run.json").read_text())
    record["fingerprints"]["data"] = "0ther"
    (folder / "run.json").write_text(json.dumps(record))
    runs, others = find_runs(tmp_path)
    assert others == [], "neither is a copy of the other"
    assert {run.data for run in runs} == {"da7a", "0ther"}
    tables = by_protocol(runs)
    assert [len(found) for found in tables.values()] == [1, 1]
    assert all("data_digest=" in title for title in tables)


def test_teachers_of_one_name_are_told_apart_by_their_weights() -> None:
    runs = [finished(teacher={**TEACHER, "sha256": sha}) for sha in ("aa" * 32, "bb" * 32)]
    assert set(teacher_names(runs).values()) == {"resnet20 aaaaaa", "resnet20 bbbbbb"}
    assert set(teacher_names(runs[:1]).values()) == {"resnet20"}
