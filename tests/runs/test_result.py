"""Records of a run survive their files, and damage is reported in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from src.common.errors import UserError
from src.runs.result import START_OVER, Fingerprints, Metrics, Result, RunRecord, TeacherFacts, read_record
from tests.helpers.run_folders import make_result

RUN = RunRecord(fingerprints=Fingerprints(code="c0de", data="da7a", teacher=None), seed=3)


@pytest.mark.parametrize("method", ["kd", "vanilla"])
def test_a_result_survives_its_file(tmp_path: Path, method: str) -> None:
    result = make_result(method)
    result.write(tmp_path / "result.json")
    assert read_record(Result, tmp_path / "result.json") == result


def test_a_run_record_survives_its_file(tmp_path: Path) -> None:
    RUN.write(tmp_path / "run.json")
    assert read_record(RunRecord, tmp_path / "run.json") == RUN


def test_only_values_that_were_set_are_written(tmp_path: Path) -> None:
    RUN.write(tmp_path / "run.json")
    written = json.loads((tmp_path / "run.json").read_text())
    assert written == {"fingerprints": {"code": "c0de", "data": "da7a", "teacher": None}, "seed": 3}


def test_the_test_metrics_are_the_first_of_a_result(tmp_path: Path) -> None:
    make_result().write(tmp_path / "result.json")
    assert next(iter(json.loads((tmp_path / "result.json").read_text()))) == "test"


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    RUN.write(tmp_path / "run.json")
    written = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**written, "mood": "good"}))
    assert read_record(RunRecord, tmp_path / "run.json") == RUN


def changed(**values: Any) -> str:
    result = json.loads(make_result().model_dump_json())
    return json.dumps({**result, **values})


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        ("", "is damaged (it is not valid JSON)"),
        (changed()[:100], "is damaged (it is not valid JSON)"),
        ("[" * 100_000, "is damaged (it is not valid JSON)"),
        ("[]", "was not written by a run (the file: "),
        ("{}", "was not written by a run (test: field required)"),
        (changed(test={"accuracy": 0.5}), "was not written by a run (test.top5: field required)"),
        (changed(seed="0"), "was not written by a run (seed: input should be a valid integer)"),
        (changed(seconds="soon"), "was not written by a run (seconds: input should be a valid number)"),
        (
            changed(best_epoch={"split": "test", "epoch": 1, "accuracy": 97.0}),
            "was not written by a run (best_epoch.accuracy: input should be less than or equal to 1)",
        ),
    ],
    ids=["empty", "cut", "deep", "list", "no keys", "no metric", "text for a number", "no number", "no fraction"],
)
def test_damage_is_reported_with_its_place_and_with_advice(tmp_path: Path, content: str, damage: str) -> None:
    file = tmp_path / "result.json"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        read_record(Result, file)
    assert str(caught.value).startswith(f"{file} {damage}")
    assert str(caught.value).endswith(f": {START_OVER}.")
    with pytest.raises(UserError, match="choose another run"):
        read_record(Result, file, "choose another run")


def test_a_cache_key_is_a_digest_so_that_it_cannot_name_another_file() -> None:
    facts: dict[str, Any] = {"name": "resnet20", "sha256": "5e" * 32, "accuracy": 0.7}
    assert TeacherFacts(**facts, key="ab" * 32).key == "ab" * 32
    for key in ("../../elsewhere", "AB" * 32, "ab" * 31, "ab" * 32 + "\n"):
        with pytest.raises(ValidationError):
            TeacherFacts(**facts, key=key)


def test_records_do_not_change() -> None:
    metrics = Metrics(accuracy=0.5, top5=0.9, nll=1.0, ece=0.1)
    with pytest.raises(ValidationError):
        metrics.accuracy = 1.0
