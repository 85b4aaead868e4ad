"""The resolvers of `conf/`: scaled epochs, names from paths, and constants by pair of networks."""

import os
import sys

import pytest
from hydra import compose, initialize_config_dir

from src.config.instantiate import instantiate
from src.config.names import method_name
from src.config.resolvers import processors, scaled, stem, terminal
from src.setup.assemble import prepare
from tests.helpers.configure import CONF, configure, parts_of

# Epochs


@pytest.mark.parametrize(
    ("epochs", "milestones", "warmup"), [(240, [150, 180, 210], 20), (20, [12, 15, 18], 2), (120, [75, 90, 105], 10)]
)
def test_milestones_and_warmup_scale_with_the_epochs(epochs: int, milestones: list[int], warmup: int) -> None:
    cfg = configure(f"schedule.epochs={epochs}", "method=dkd")
    assert cfg.schedule.scheduler.milestones == milestones
    assert cfg.method.warmup_epochs == warmup
    assert cfg.trainer.max_epochs == epochs


def test_a_scaled_epoch_is_the_published_one_for_the_published_length() -> None:
    assert [scaled(epoch, 240, 240) for epoch in range(241)] == list(range(241))
    assert [scaled(epoch, 240, 1) for epoch in (0, 119, 121, 240)] == [0, 0, 1, 1]


# Names


@pytest.mark.parametrize(
    ("path", "name"), [("photos/birds.npz", "birds"), ("photos/birds/", "birds"), ("/", "arrays"), (None, "arrays")]
)
def test_data_is_named_after_its_path(path: str | None, name: str) -> None:
    assert stem(path, "arrays") == name


def test_an_array_file_names_its_data() -> None:
    assert configure("data=arrays", "data.path=somewhere/birds.npz").data.name == "birds"
    assert configure("data=arrays").data.name == "arrays"
    assert configure("data=imagefolder", "data.root=photos/flowers").data.name == "flowers"


# The machine


def test_data_of_photos_uses_the_processors_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert processors() == 3
    assert configure("data=imagefolder", "seed=31").data.workers == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processors() == 1


def test_a_progress_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=answer: answer)
        assert terminal() is answer
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())  # as in a process of a sweep
    assert terminal() is False


@pytest.mark.parametrize(("visible", "jobs"), [("3,5", 2), ("", 1)])
def test_a_sweep_runs_one_job_per_gpu(monkeypatch: pytest.MonkeyPatch, visible: str, jobs: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["hydra/launcher=gpus"], return_hydra_config=True)
    assert cfg.hydra.launcher.n_jobs == jobs


# Constants by pair


@pytest.mark.parametrize(
    ("pair", "beta"),
    [
        ("wrn40_2_to_wrn16_2", 6.0),
        ("resnet56_to_resnet20", 2.0),
        ("resnet20_to_resnet8", 2.0),
        ("slimnet600k_to_resnet8", 2.0),
        ("slimnet600k_to_resnet20", 2.0),
        ("vgg13_to_mobilenetv2", 6.0),
        ("resnet34_to_resnet18", 0.5),
    ],
)
@pytest.mark.parametrize("method", ["dkd", "aekt"])
def test_beta_depends_on_the_pair(method: str, pair: str, beta: float) -> None:
    built = instantiate(configure(f"method={method}", f"model={pair}").method, "method")
    assert built.beta == beta


@pytest.mark.parametrize("method", ["dkd", "aekt"])
def test_a_pair_without_a_row_gets_the_default(method: str) -> None:
    unlisted = configure(f"method={method}", "network@model.teacher=resnet110", "network@model.student=wrn16_1")
    assert unlisted.model.name == "resnet110_to_wrn16_1"
    assert unlisted.method.beta == 8.0
    assert configure(f"method={method}", "method.beta=3").method.beta == 3


def test_a_method_that_is_added_to_another_gets_its_constants_by_pair_too() -> None:
    cfg = configure("method=dkd", "method@also=kd", "model=resnet34_to_resnet18", "data=imagenet")
    assert (cfg.also.kd_weight, cfg.also.temperature) == (0.5, 1.0)
    assert type(parts_of(cfg).method).__name__ == "Combined"


@pytest.mark.parametrize(
    ("method", "pair", "constants"),
    [
        ("kd", "wrn40_2_to_wrn16_2", {"temperature": 2.0, "kd_weight": 9.0, "cross_entropy_weight": 0.1}),
        ("kd", "resnet110_to_resnet20", {"temperature": 4.0, "kd_weight": 12.0}),
        ("kd", "resnet50_to_mobilenetv2", {"temperature": 3.0, "kd_weight": 1.0}),
        ("kd", "resnet34_to_resnet18", {"temperature": 2.0, "kd_weight": 9.0, "cross_entropy_weight": 0.1}),
        ("dkd", "resnet56_to_resnet20", {"temperature": 3.0, "alpha": 18.0, "beta": 36.0}),
        ("aekt", "resnet32x4_to_resnet8x4", {"temperature": 2.0, "alpha": 9.0, "beta": 72.0, "gamma": 0.55}),
        ("aekt", "slimnet600k_to_resnet8", {"temperature": 2.0, "alpha": 9.0, "beta": 18.0}),
        ("ctkd", "wrn40_2_to_wrn16_2", {"kd_weight": 9.0}),
        ("mlkd", "wrn40_2_to_wrn16_2", {"kd_weight": 9.0}),
        ("nkd", "wrn40_2_to_wrn16_2", {"gamma": 3.5}),
    ],
)
def test_standardized_logits_have_constants_of_their_own(method: str, pair: str, constants: dict[str, float]) -> None:
    cfg = configure(f"method={method}", f"model={pair}", "standardize_logits=true")
    assert {name: cfg.method[name] for name in constants} == constants
    assert method == "nkd" or configure(f"method={method}", f"model={pair}").method != cfg.method
    assert method_name(cfg) == f"{method}+standardized"


def test_networks_of_one_name_have_the_constants_of_their_family() -> None:
    """CIFAR's and ImageNet's ResNets have the same names."""
    for_cifar = configure("method=nkd", "network@model.teacher=resnet34", "network@model.student=resnet18")
    for_imagenet = configure("method=nkd", "model=resnet34_to_resnet18")
    assert for_cifar.model.name == for_imagenet.model.name
    assert (for_cifar.method.gamma, for_cifar.method.temperature) == (3.5, 3.0)
    assert (for_imagenet.method.gamma, for_imagenet.method.temperature) == (1.5, 1.0)
    from_library = prepare(configure("method=nkd", "model=resnet34_to_resnet18", "student.source=torchvision/resnet18"))
    assert from_library.method.gamma == 1.5
