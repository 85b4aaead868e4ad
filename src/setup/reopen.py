"""Open a run, or a bare checkpoint, for evaluation, reports and exports.

Run folders may come from someone else. Their files are read without executing code, and their configuration may call
only targets that `conf/` calls too.
"""

import functools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.common.errors import UserError, report_damage
from src.config.names import needs_teacher
from src.config.schema import DATA_SCHEMAS, DataOptions, TrainOptions
from src.data.image_data import ImageData
from src.data.imagenet import english_names
from src.models.checkpoints import read_facts, refuse_without_classifier
from src.runs.checkpointing import checkpoint_file, read_checkpoint
from src.runs.result import Result, RunRecord, TeacherFacts, read_record
from src.setup.assemble import make_data_for, make_distiller, make_method, make_parts, prepare
from src.setup.networks import make_network
from src.teachers.answers import Answers, answers_file
from src.teachers.class_order import are_stated
from src.teachers.teacher import Teacher
from src.training.distiller import Distiller

log = logging.getLogger(__name__)

CONF = Path(__file__).parents[2] / "conf"
ADVICE = "choose another run"


class Opened(NamedTuple):
    """A trained module, its data, and the configuration of its run."""

    cfg: DictConfig
    distiller: Distiller
    data: ImageData


def open_run_or_checkpoint(cfg: DictConfig) -> Opened:
    """Open the run of the option `run`, or load the option `checkpoint` into the configured student.

    A checkpoint may have any format that `src/models/checkpoints.py` knows. Raises `UserError` unless exactly one of
    the two options is given, or if it cannot be opened.
    """
    if (cfg.run is None) == (cfg.checkpoint is None):
        raise UserError(
            "Give exactly one of run=FOLDER (a run folder) and checkpoint=FILE (with network@model.student=... and "
            "data=...)."
        )
    if cfg.run is None:
        trained = {"path": cfg.checkpoint, "new_head": False, "pretrained": True}
        merged: Any = OmegaConf.merge(cfg, {"student": trained})
        file = Path(cfg.checkpoint).expanduser()
        facts = read_facts(file)
        refuse_without_classifier(file, facts, "give the run with run=FOLDER instead")
        opened = _open_untrained(prepare(merged), None)
        _check_class_names(f"checkpoint={cfg.checkpoint}", facts.get("class_names"), opened.data)
        if facts.get("data") not in (None, opened.data.source.digest, opened.data.labelled_digest):
            log.warning("%s was trained on other data, or at another image size, than is read now.", file)
        return opened
    folder = Path(cfg.run).expanduser()
    run_cfg = read_config(folder, cfg.data.root, cfg.data.get("path"))
    if cfg.data.root != OmegaConf.structured(DataOptions).root:  # it was given, and not left at its default
        run_cfg.data.root = cfg.data.root
    if cfg.data.get("unlabelled") is not None:
        run_cfg.data.unlabelled = cfg.data.unlabelled
    run_cfg.trainer.accelerator = cfg.trainer.accelerator
    if read_result(cfg.run) is None:
        log.warning("%s is not finished: its last checkpoint is used.", folder)
    return open_run(folder, run_cfg)


def open_run(folder: Path, cfg: DictConfig) -> Opened:
    """Open a run with its last weights and the stored predictions of its teacher.

    The teacher itself has random weights. Raises `UserError` if the run has no checkpoint, or if its files are damaged
    or do not fit each other.
    """
    folder = folder.resolve()
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoints/last.ckpt, so there is nothing to open: {ADVICE}.")
    with report_damage(folder / "config.yaml", ADVICE):
        opened = _open_untrained(_without_initial_weights(prepare(cfg), folder), folder)
    _check_data(folder, opened.data)
    try:
        opened.distiller.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint_file(folder)} does not fit the networks of {folder / 'config.yaml'} ({error}): {ADVICE}."
        ) from None
    return opened


def _without_initial_weights(cfg: DictConfig, folder: Path) -> DictConfig:
    """Let a finished run's own file replace the student's initial weights, which may be gone or must be downloaded.

    The file has the student's normalisation too, which came with the initial weights. An unfinished run has no file.
    """
    trained = folder / "student.pth"
    if trained.is_file() and (cfg.student.path or cfg.student.source):
        cfg.student.update(path=str(trained), source=None, new_head=False, pretrained=True)
    return cfg


def _check_data(folder: Path, data: ImageData) -> None:
    """Raise `UserError` if a run was trained on data of other classes. Warn if it was trained on other images."""
    file = folder / "run.json"
    if not file.is_file():
        return
    with report_damage(file, ADVICE):
        record = read_record(RunRecord, file, ADVICE)
    _check_class_names(str(folder), record.class_names, data)
    if record.fingerprints.data != data.source.digest:
        log.warning("%s was trained on other data than the data that is read now.", folder)


def _check_class_names(option: str, stated: Sequence[str] | None, data: ImageData) -> None:
    """Raise `UserError` if a network's classes have other names than those of the data, or another order."""
    if not are_stated(stated or None) or not are_stated(data.class_names):
        return
    own, names = english_names(stated or ()), english_names(data.class_names)
    differing = next(((a, b) for a, b in zip(own, names, strict=False) if a != b), None)
    if differing:
        raise UserError(
            f"{option} was trained on other classes than those of the data, or in another order: it calls a class "
            f"{differing[0]} that the data calls {differing[1]}. Choose the data that it was trained on."
        )


def _open_untrained(cfg: DictConfig, folder: Path | None) -> Opened:
    """Make the module and the data of a configuration. `folder` is the folder of its run, if there is one."""
    method = make_method(cfg)
    data = make_data_for(cfg, method)
    parts = make_parts(cfg, data, method)
    teacher, predictions = _stored_teacher(cfg, data, folder) if folder and needs_teacher(cfg) else (None, {})
    return Opened(cfg, make_distiller(cfg, data, parts, teacher, predictions), data)


def read_config(folder: Path, data_root: str, data_path: str | None = None) -> DictConfig:
    """Read a run's configuration, and adapt it to one device of this machine.

    `data_root` replaces the run's `data.root` if this machine has no such folder, and `data_path` replaces its
    `data.path`. Raises `UserError` if the configuration is missing or damaged, or calls a target that is not trusted.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder, because it has no config.yaml: {ADVICE}.")
    with report_damage(file, ADVICE):
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(f"{file} has YAML aliases, which no run writes and which can expand without end: {ADVICE}.")
        merged: Any = OmegaConf.merge(OmegaConf.structured(TrainOptions), OmegaConf.create(text))
        cfg: DictConfig = merged
        for target in find_targets(OmegaConf.to_container(cfg, resolve=True)):
            if not is_trusted(str(target)):
                raise UserError(f"{file} would call {target}, which no file in conf/ names: {ADVICE}.")
        cfg.trainer.update(accelerator="auto", devices=1, strategy="auto")
        if not Path(cfg.data.root).expanduser().is_dir():
            cfg.data.root = data_root
        if data_path:
            cfg.data.path = data_path
        unlabelled = cfg.data.get("unlabelled")
        if unlabelled not in (None, "rest") and not Path(unlabelled).expanduser().is_dir():
            cfg.data.update(unlabelled=None, unlabelled_share=None)  # photos that were only trained on
    return cfg


@functools.cache
def known_targets() -> frozenset[str]:
    """List the targets that `conf/`, the schemas and `src/setup/networks.py` call."""
    texts = [file.read_text(encoding="utf-8") for file in CONF.rglob("*.yaml")]
    named = [target for text in texts for target in re.findall(r"_target_: *([\w.]+)", text)]
    data = (schema._target_ for schema in DATA_SCHEMAS)
    return frozenset([*named, *data, "src.models.sources.architecture"])


def is_trusted(target: str) -> bool:
    """Return whether `conf/` calls this target too, or whether it is an optimiser or a scheduler of torch.

    Other functions of this project are not trusted, because some of them write files or run programs.

    >>> is_trusted("torch.optim.AdamW"), is_trusted("os.system")
    (True, False)
    """
    if target in known_targets():
        return True
    if not target.startswith("torch.optim."):
        return False
    try:
        found: Any = hydra.utils.get_object(target)
    except Exception:  # an import can raise anything
        return False
    return isinstance(found, type) and issubclass(found, (Optimizer, LRScheduler))


def find_targets(node: Any) -> list[Any]:
    """List every `_target_` in a node, at any depth.

    >>> find_targets({"_target_": "a", "list": [{"_target_": "b"}]})
    ['a', 'b']
    """
    if isinstance(node, list):
        return [target for item in node for target in find_targets(item)]
    if not isinstance(node, dict):
        return []
    here = [node["_target_"]] if "_target_" in node else []
    return here + [target for value in node.values() for target in find_targets(value)]


def read_result(run: str | None) -> Result | None:
    """Read a run's result. Returns None for a bare checkpoint, and for a run that is not finished."""
    file = Path(run or "").expanduser() / "result.json"
    return read_record(Result, file, ADVICE) if run and file.is_file() else None


def read_teacher(folder: Path) -> TeacherFacts | None:
    """Read the facts of a run's teacher. Returns None if it had none. Raises `UserError` if run.json is damaged."""
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} has no run.json, which describes its teacher: {ADVICE}.")
    with report_damage(folder / "run.json", ADVICE):
        return read_record(RunRecord, folder / "run.json", ADVICE).teacher


def _stored_teacher(cfg: DictConfig, data: ImageData, folder: Path) -> tuple[Teacher | None, dict[str, Tensor]]:
    """Make a teacher with the sizes of the run's teacher, and load its predictions if they are still stored."""
    facts = read_teacher(folder)
    if facts is None or facts.key is None:
        raise UserError(f"{folder / 'run.json'} does not describe the run's teacher: {ADVICE}.")
    with report_damage(folder / "run.json", ADVICE):
        teacher = blank_teacher(cfg, data, facts)
        size = data.split_size("test")
        runs = folder.parents[min(3, len(folder.parents) - 1)]
        answers = Answers.load(answers_file(cfg, runs, facts.key, data, "test"), size, data.num_classes)
    return teacher, {"test": answers.predictions(size)} if answers else {}


def blank_teacher(cfg: DictConfig, data: ImageData, facts: TeacherFacts) -> Teacher:
    """Make a teacher with the sizes of a run's teacher and random weights, because a method may ask for its shapes."""
    chosen = facts.class_index
    network = make_network(cfg.model.teacher, "model.teacher", max(chosen) + 1 if chosen else data.num_classes)
    return Teacher(network, facts.mean or data.mean, facts.std or data.std, facts.image_size, chosen)
