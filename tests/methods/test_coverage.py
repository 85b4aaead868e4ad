"""Every method of `conf/method` is tested: it has a test file, a loss with a statement, and steps of training.

A failing test says which file to edit.
"""

from pathlib import Path

import pytest

from tests.helpers.configure import METHODS
from tests.helpers.feature_losses import FEATURE_LOSSES
from tests.helpers.logit_losses import LOGIT_LOSSES
from tests.helpers.methods import FEATURE_METHODS, LOGIT_METHODS, STEPS, method_of

FOLDER = Path(__file__).parent
SOURCE = FOLDER.parents[1] / "src" / "methods"
SHARED = {"method", "features", "decoupling", "combined"}
"""Modules of `src/methods` that are no method of their own."""
SUBJECTS = {
    "coverage", "closed_forms", "every_method", "every_logit_method", "every_feature_method", "every_two_stage_method",
}  # fmt: skip
"""Test files that are named by their subject."""


def missing(name: str) -> list[str]:
    """List what the tests lack for a method, one sentence for each place."""
    sentences = []
    if not (FOLDER / f"test_{name}.py").is_file():
        sentences.append(
            f"conf/method/{name}.yaml has no test file: add tests/methods/test_{name}.py, with the published weights "
            "and what the paper claims."
        )
    if name not in {method_of(case) for case in (*LOGIT_LOSSES, *FEATURE_LOSSES)}:
        sentences.append(
            f"The loss of conf/method/{name}.yaml is not compared with a statement: enter it in LOGIT_LOSSES in "
            "tests/helpers/logit_losses.py, or in FEATURE_LOSSES in tests/helpers/feature_losses.py."
        )
    if name not in STEPS:
        sentences.append(
            f"conf/method/{name}.yaml is not trained by any test: enter what it trains in STEPS in "
            "tests/helpers/methods.py."
        )
    return sentences


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_tested(name: str):
    assert not missing(name), "\n".join(missing(name))


def test_a_new_method_is_told_each_place_that_lacks_it():
    found = missing("brandnew")
    places = (
        "tests/methods/test_brandnew.py",
        "tests/helpers/logit_losses.py",
        "tests/helpers/methods.py",
    )
    assert len(found) == len(places)
    for sentence, place in zip(found, places, strict=True):
        assert "conf/method/brandnew.yaml" in sentence
        assert place in sentence


@pytest.mark.parametrize("registry", [LOGIT_LOSSES, FEATURE_LOSSES, STEPS], ids=["logits", "features", "steps"])
def test_registries_name_methods_that_exist(registry: dict[str, object]):
    unknown = {method_of(case) for case in registry} - set(METHODS)
    assert not unknown, f"no conf/method/{{{','.join(sorted(unknown))}}}.yaml"


def test_a_loss_is_in_the_registry_of_its_kind():
    on_logits, on_features = ({method_of(case) for case in registry} for registry in (LOGIT_LOSSES, FEATURE_LOSSES))
    assert on_logits == {*LOGIT_METHODS, "vanilla"}
    assert on_features == set(FEATURE_METHODS)


def test_every_module_has_its_test_file_and_every_test_file_its_subject():
    modules = {file.stem for file in SOURCE.glob("*.py")} - {"__init__"}
    assert modules - SHARED == set(METHODS)
    files = {file.stem.removeprefix("test_") for file in FOLDER.glob("test_*.py")}
    assert modules <= files, f"tests/methods lacks test files of {sorted(modules - files)}"
    unknown = files - modules - SUBJECTS
    assert not unknown, f"test files without a module: {sorted(unknown)}. Rename them, or add them to SUBJECTS here."
