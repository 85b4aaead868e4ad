import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from src.analysis.published import published
from src.analysis.results import Finished, by_protocol, find_runs, group
from src.run import method_name
from tests.analysis.run_folders import TEACHER, write_run
from tests.test_config import configure


def test_finished_runs_are_grouped_by_all_but_the_seed(tmp_path: Path) -> None:
    for method, seed in [("kd", 1), ("kd", 0), ("vanilla", 0), ("aekt", 0)]:
        write_run(tmp_path, method, seed, layer="serial" if method == "aekt" else "none")
    runs, others = find_runs(tmp_path)
    assert others == []
    groups = group(runs)
    assert list(groups) == ["resnet8 alone", "resnet8 by kd", "resnet8 by aekt, serial"]
    assert [run.result["seed"] for run in groups["resnet8 by kd"]] == [0, 1]
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


def test_another_budget_is_another_table_but_another_rate_is_not(tmp_path: Path) -> None:
    for method, schedule in [
        ("kd", {"epochs": 3, "learning_rate": 0.1}),
        ("dkd", {"epochs": 3, "learning_rate": 0.05}),
        ("at", {"epochs": 3, "learning_rate": 0.1, "batch_size": 8}),
    ]:
        write_run(tmp_path, method, settings={"schedule": schedule})
    tables = by_protocol(find_runs(tmp_path)[0])
    assert sorted(len(runs) for runs in tables.values()) == [1, 2]
    assert all(title.startswith("colours, 200 training images, 3 epochs (batch_size=") for title in tables)


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
        ("result.json", "[1]", "foreign", "the whole"),
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
def test_what_is_no_result_is_told(tmp_path: Path, file: str, content: str | None, state: str, detail: str) -> None:
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


def test_a_run_is_running_while_its_process_holds_it(tmp_path: Path) -> None:
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


def run_of(method: str, teacher: str | None, student: str) -> Finished:
    result = {"data": "cifar100", "method": method, "student": student, "serialization": "none"}
    return Finished(Path(), {**result, "teacher": teacher and {"name": teacher}})


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (run_of("vanilla", None, "wrn16_2"), "73.26 (last)"),
        (run_of("kd", "wrn40_2", "wrn16_2"), "74.92 (last)"),
        (run_of("kd+standardized", "wrn40_2", "wrn16_2"), "76.11 (best)"),
        (run_of("dkd", "resnet32x4", "resnet8x4"), "76.32 (best)"),
        (run_of("wttm", "vgg13", "vgg8"), "74.44 (?)"),
        (run_of("mlkd", "wrn40_2", "wrn16_2"), "76.63 (best; longer training)"),
        (run_of("aekt", "wrn40_2", "wrn16_2"), "None"),
        (run_of("kd", "resnet20", "resnet8"), "None"),
    ],
)
def test_published_numbers(run: Finished, text: str) -> None:
    assert str(published(run)) == text
    serial = Finished(Path(), json.loads(json.dumps({**run.result, "serialization": "serial"})))
    assert published(serial) is None


@pytest.mark.parametrize(
    ("switch", "accuracy"), [("standardize_logits=true", "76.62"), ("optimizer=dot", "75.12"), ("seed=1", "73.33")]
)
def test_published_numbers_are_found_by_what_a_run_calls_its_method(switch: str, accuracy: str) -> None:
    method = method_name(configure("method=kd", switch))
    run = run_of(method, "resnet32x4", "resnet8x4")
    assert str(published(run)).startswith(accuracy)
    assert run.label == method
