"""A run's identity holds exactly the options that can change its result, and names its folder."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from src.config.schema import (
    ArrayDataOptions,
    FolderDataOptions,
    MethodOptions,
    NetworkOptions,
    ScheduleOptions,
    StreamDataOptions,
    StudentOptions,
    TeacherOptions,
    TrainerOptions,
    TrainOptions,
    marked,
)
from src.runs.identity import identity, run_path
from src.setup.networks import with_library_networks
from tests.helpers.configure import changed, configure


def folder_of(*overrides: str) -> Path:
    """Return the path of the run with these overrides. Plain values are set without Hydra, which is slow."""
    values = [override for override in overrides if "." in override.split("=")[0] and "@" not in override]
    cfg = copy.deepcopy(configure(*(override for override in overrides if override not in values)))
    for override in values:
        key, value = override.split("=")
        OmegaConf.update(cfg, key, OmegaConf.create(f"value: {value}").value, merge=False)
    return run_path(cfg)


@pytest.mark.parametrize(
    "irrelevant",
    [
        "logger=none",
        "logger=csv",
        "trainer=cpu",
        "trainer=ddp",
        "trainer.devices=2",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=true",
        "teacher.store=elsewhere",
        "teacher.train_if_missing=false",
        "teacher.view_store=true",
        "teacher.view_store_gigabytes=1",
        "teacher.allow_program=true",
        "data.workers=3",
        "data.root=elsewhere",
        "data.path=elsewhere/file.npz",
        "start_over=true",
        "gradients.every=7",
        "gradients.temperature=2",
        "model.teacher.published_accuracy={cifar100: 1.0}",
        "model.student.published_accuracy={}",
        "method.pairs={}",
        "method.standardized={}",
        "method.year=1999",
        "method.settings=guessed",
    ],
)
def test_options_that_cannot_change_a_result_keep_the_folder(irrelevant: str) -> None:
    assert folder_of("method.beta=6", irrelevant) == folder_of("method.beta=6")


def test_the_folder_of_runs_is_not_part_of_the_identity() -> None:
    here, there = folder_of("runs=here"), folder_of("runs=there/below")
    assert here.relative_to("here") == there.relative_to("there/below")


@pytest.mark.parametrize(
    "relevant",
    [
        "seed=1",
        "method=dkd",
        "method=kd",
        "method=vanilla",
        "method@also=kd",
        "trainer=ddp_cpu",  # batch norm is local there
        "standardize_logits=true",
        "optimizer=dot",
        "averaging=ema",
        "method.gamma=0.41",
        "method.beta=6.1",
        "method.weighting=ratio",
        "serialization=none",
        "serialization=parallel",
        "serialization.lr_scale=0.2",
        "schedule=quick",
        "schedule.epochs=241",
        "schedule.batch_size=65",
        "schedule.learning_rate=0.051",
        "schedule.optimizer.momentum=0.8",
        "schedule.scheduler.gamma=0.2",
        "model=resnet56_to_resnet20",
        "network@model.student=wrn16_1",
        "network@model.teacher=resnet110",
        "data=cifar10",
        "data.train_size=1000",
        "data.val_size=1000",
        "data.split_seed=1",
        "data.mean=[0.5,0.5,0.5]",
        "data.padding=2",
        "data.flip=false",
        "teacher.seed=1",
        "teacher.path=somewhere/teacher.pth",
        "teacher.source=timm/resnet18",
        "teacher.image_size=64",
        "student.path=somewhere/student.pth",
        "student.source=timm/resnet18",
        "trainer=debug",
        "trainer.precision=bf16-mixed",
        "trainer.deterministic=false",
        "trainer.benchmark=true",
        "channels_last=false",
        "compile=true",
        "winograd=true",
        "teacher.winograd=true",
        "teacher.precision=bfloat16",
        "teacher.fold=true",
        "teacher.answer_dtype=float16",
    ],
)
def test_options_that_can_change_a_result_change_the_folder(relevant: str) -> None:
    assert folder_of(relevant) != folder_of()


def test_the_folders_of_the_splits_are_part_of_the_identity_and_leaving_photos_out_is_not() -> None:
    plain = folder_of("data=imagefolder")
    named = [folder_of("data=imagefolder", f"data.{split}_folder=x") for split in ("train", "val", "test")]
    assert len({plain, *named}) == 4
    assert folder_of("data=imagefolder", "data.skip_corrupt=true") == plain  # without it there is no run
    assert not {"train_folder", "val_folder", "test_folder"} & identity(configure("data=imagefolder"))["data"].keys()


def test_speed_instead_of_determinism_has_its_own_folder_on_each_trainer() -> None:
    """The overrides that conf/trainer/gpu.yaml names."""
    faster = ("trainer.deterministic=false", "trainer.benchmark=true")
    assert folder_of("trainer=gpu") == folder_of()
    assert folder_of("trainer=gpu", *faster) == folder_of(*faster) != folder_of()


# Every option of the schema

NODES: list[tuple[str, type, tuple[str, ...]]] = [
    ("", TrainOptions, ()),
    ("data", ArrayDataOptions, ()),
    ("data", FolderDataOptions, ("data=imagefolder",)),
    ("data", StreamDataOptions, ("data=stream",)),
    ("model.student", NetworkOptions, ()),
    ("model.teacher", NetworkOptions, ()),
    ("method", MethodOptions, ()),
    ("also", MethodOptions, ("method@also=kd",)),
    ("teacher.method", MethodOptions, ()),
    ("teacher", TeacherOptions, ()),
    ("student", StudentOptions, ()),
    ("schedule", ScheduleOptions, ()),
    ("trainer", TrainerOptions, ()),
]
"""The nodes of a training configuration, their schemas, and the overrides that choose them."""
OPTIONS = [
    pytest.param(node, schema, overrides, option.name, id=f"{schema.__name__}-{node}.{option.name}".removesuffix("."))
    for node, schema, overrides in NODES
    for option in fields(schema)
    if option.name != "_target_"
]


def plain(*overrides: str) -> DictConfig:
    """Compose a configuration without interpolations, in which any value can be set."""
    return OmegaConf.create(OmegaConf.to_container(configure(*overrides), resolve=True))  # type: ignore[return-value]


def other_value(cfg: DictConfig, path: str) -> Any:
    """Return a value that differs from the configured one. A group gets another key, a missing group a method."""
    value = OmegaConf.select(cfg, path)
    if isinstance(value, DictConfig):
        return {**value, "another": 1}
    return configure("method=dkd").method if path == "also" else f"not {value}"


@pytest.mark.parametrize(("node", "schema", "overrides", "option"), OPTIONS)
def test_an_option_is_part_of_the_identity_unless_its_schema_says_that_it_has_no_effect(
    node: str, schema: type, overrides: tuple[str, ...], option: str
) -> None:
    cfg = plain(*overrides)
    before, path = identity(cfg), f"{node}.{option}".removeprefix(".")
    OmegaConf.update(cfg, path, other_value(cfg, path), merge=False)
    assert (identity(cfg) == before) == (option in marked(schema, "no_effect"))


@pytest.mark.parametrize("node", ["data", "method", "schedule", "serialization", "teacher", "trainer"])
def test_a_key_that_no_schema_knows_is_part_of_the_identity(node: str) -> None:
    cfg = plain()
    before = identity(cfg)
    OmegaConf.update(cfg, f"{node}.unknown", 1)
    assert identity(cfg) != before


def test_synchronized_batch_norm_is_the_same_run_as_one_device() -> None:
    alone, synchronized, local = plain(), plain(), plain()
    synchronized.trainer.sync_batchnorm, local.trainer.sync_batchnorm = True, False
    assert identity(synchronized) == identity(alone)
    assert identity(local) != identity(alone)


# Names


def test_a_folder_is_named_after_data_pair_method_serialization_and_seed() -> None:
    folder = folder_of("runs=here", "data=cifar10", "model=resnet20_to_resnet8", "method=aekt", "seed=7")
    assert folder.parts[:-1] == ("here", "cifar10", "resnet20_to_resnet8", "aekt")
    assert folder.name.startswith("serial-seed7-")


def test_the_identity_of_a_run_without_a_teacher_holds_no_teacher() -> None:
    settings = identity(configure("method=vanilla"))
    assert settings["model"] == {"student": settings["model"]["student"]}
    assert "teacher" not in settings
    assert {"model", "teacher"} <= identity(configure("method=kd")).keys()


def test_a_network_trained_alone_is_the_same_run_whichever_pair_names_it() -> None:
    through = [
        ["model=resnet56_to_resnet20"],
        ["model=slimnet600k_to_resnet20"],
        ["network@model.student=resnet20"],
        ["model=resnet56_to_resnet20", "teacher.path=somewhere.pth", "teacher.seed=4"],
    ]
    folders = {folder_of("method=vanilla", *overrides) for overrides in through}
    assert len(folders) == 1
    assert folders.pop().parent.parts[-3:] == ("cifar100", "resnet20", "vanilla")


def test_an_identity_is_plain_and_resolved() -> None:
    settings = identity(configure())
    assert settings["schedule"]["scheduler"]["milestones"] == [150, 180, 210]
    assert settings["method"]["beta"] == 6.0
    assert "${" not in str(settings)


@pytest.mark.parametrize("option", ["teacher.path", "teacher.class_map", "student.path"])
def test_a_file_counts_by_its_content_wherever_it_is(tmp_path: Path, option: str) -> None:
    for name, content in (("a.pth", "one"), ("b.pth", "one"), ("c.pth", "two")):
        (tmp_path / name).write_text(content)
    one, copy_of_one, two = (folder_of(f"{option}={tmp_path / name}") for name in ("a.pth", "b.pth", "c.pth"))
    assert one == copy_of_one
    assert len({one, two, folder_of()}) == 3
    group, name = option.split(".")
    cfg = plain()
    cfg[group][name] = str(tmp_path / "a.pth")
    assert identity(cfg)[group][name] == "sha256:7692c3ad3540bb80"


def test_a_renamed_copy_of_a_program_is_the_same_teacher(tmp_path: Path) -> None:
    def folder(name: str, content: str) -> Path:
        (tmp_path / name).write_text(content)
        cfg = copy.deepcopy(plain())
        cfg.teacher.update(path=str(tmp_path / name), allow_program=True)
        return run_path(with_library_networks(cfg))

    assert folder("a.pt", "one") == folder("b.pt", "one") != folder("c.pt", "two")


def test_a_folder_without_labels_counts_by_its_content(tmp_path: Path) -> None:
    """Its content is part of the data's digest, which a run compares by itself."""
    whole, rest, one, other = (
        identity(changed(configure(), data__unlabelled=value)) for value in (None, "rest", "a/b", str(tmp_path))
    )
    assert "unlabelled" not in whole["data"]
    assert rest["data"]["unlabelled"] == "rest"
    assert one == other
    assert one not in (whole, rest)


def test_a_class_map_that_is_not_given_keeps_the_identity_of_earlier_runs() -> None:
    assert "class_map" not in identity(configure("method=kd"))["teacher"]


def test_an_identity_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_TOKEN", "t0ken-of-the-store")
    cfg = plain()
    cfg.teacher.path = "https://user:t0ken-of-the-store@host/t0ken-of-the-store/teacher.pth"
    assert identity(cfg)["teacher"]["path"] == "https://host/${oc.env:STORE_TOKEN}/teacher.pth"
