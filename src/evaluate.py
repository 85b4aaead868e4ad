"""`python -m src.evaluate`: score a run folder or a checkpoint again. `--help` is the guide."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.assemble import make_data, make_distiller, make_parts, make_trainer
from src.command import job, run_command
from src.config import ArrayData, FolderData, StreamData, Train
from src.data.image_data import ImageData
from src.distiller import Distiller
from src.errors import UserError, readable
from src.loading import make_network
from src.metrics import of_split
from src.resume import checkpoint_file, read_checkpoint
from src.run import finished_result, needs_teacher, read_json
from src.teacher import Answers, Teacher, answers_file

TOLERANCE = 2e-3
"""Another processor rounds otherwise; on the same one the difference is 0."""
CONF = Path(__file__).parents[1] / "conf"


def evaluate(cfg: DictConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Test scores as measured now, and as the run reported them (empty for a bare checkpoint)."""
    return test(*load(cfg)), read_result(cfg).get("test", {})


def load(cfg: DictConfig) -> tuple[DictConfig, Distiller, ImageData]:
    """What `run` or `checkpoint` names (a checkpoint of any known format, as the configured student): its
    configuration, module and data.

    Raises `UserError` unless one of the two is given, and where it cannot be loaded.
    """
    if (cfg.run is None) == (cfg.checkpoint is None):
        raise UserError(
            "Give one of run=FOLDER (a run folder) and checkpoint=FILE (with network@model.student=... and data=...)."
        )
    if cfg.run is None:
        cfg.student.path = cfg.checkpoint
        data = make_data(cfg)
        return cfg, make_distiller(cfg, data, make_parts(cfg, data), None, {}), data
    folder = Path(cfg.run).expanduser()
    run_cfg = read_config(folder, cfg.data.root, cfg.data.get("path"))
    run_cfg.trainer.accelerator = cfg.trainer.accelerator
    return run_cfg, *load_run(folder, run_cfg)


def read_result(cfg: DictConfig) -> dict[str, Any]:
    """What a run reported; empty for a bare checkpoint, or a run that is not finished."""
    file = Path(cfg.run or "").expanduser() / "result.json"
    return finished_result(file) if cfg.run and file.is_file() else {}


def read_teacher(folder: Path) -> Any:
    """What a run's run.json says of its teacher; None where it had none. Raises `UserError` where it is damaged."""
    file = folder / "run.json"
    with readable(file, "evaluate another run"):
        about = read_json(file)["teacher"]
        if about is None:
            return None
        if not all(isinstance(about[name], str) for name in ("name", "source", "sha256")):
            raise ValueError("teacher")
        if not re.fullmatch("[0-9a-f]{64}", about["key"]) or not 0 <= about["accuracy"] <= 1:
            raise ValueError("teacher.key, teacher.accuracy")
    return about


def read_config(folder: Path, data_root: str, data_path: str | None = None) -> DictConfig:
    """A run's configuration, for one device of this machine and its data.

    Raises `UserError` where it is missing, or names something to call that is not this project's.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml.")
    with readable(file, "evaluate another run"):
        text = file.read_text()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(f"{file} has aliases, which no run writes and which can grow without end: refused.")
        run_cfg: Any = OmegaConf.merge(OmegaConf.structured(Train), OmegaConf.create(text))
        for target in targets(OmegaConf.to_container(run_cfg, resolve=True)):
            if not is_trusted(str(target)):
                raise UserError(f"{file} wants to call {target}, which no file in conf/ names: refused.")
        run_cfg.trainer.update(accelerator="auto", devices=1, strategy="auto")
        if not Path(run_cfg.data.root).expanduser().is_dir():
            run_cfg.data.root = data_root
        if data_path:
            run_cfg.data.path = data_path
    return run_cfg


@functools.cache
def known_targets() -> frozenset[str]:
    """What conf/ and the typed part of the configuration call."""
    texts = [file.read_text() for file in CONF.rglob("*.yaml")]
    named = [target for text in texts for target in re.findall(r"_target_: *([\w.]+)", text)]
    data = (schema._target_ for schema in (ArrayData, FolderData, StreamData))
    return frozenset([*named, *data, "src.models.sources.architecture"])


def is_trusted(target: str) -> bool:
    """Whether this is something that conf/ calls too, or another of torch's optimisers and schedulers.

    Not whatever else this project holds: some of it writes files, or runs programs.
    """
    if target in known_targets():
        return True
    if not target.startswith("torch.optim."):
        return False
    try:
        found: Any = hydra.utils.get_object(target)
    except Exception:  # of importing whatever this is
        return False
    return isinstance(found, type) and issubclass(found, (Optimizer, LRScheduler))


def targets(node: Any) -> list[Any]:
    """Every `_target_` below a node."""
    if isinstance(node, list):
        return [target for item in node for target in targets(item)]
    if not isinstance(node, dict):
        return []
    here = [node["_target_"]] if "_target_" in node else []
    return here + [target for value in node.values() for target in targets(value)]


def load_run(folder: Path, cfg: DictConfig) -> tuple[Distiller, ImageData]:
    """A run's module with its last weights and the teacher's stored answers; the teacher lends only its sizes."""
    folder = folder.resolve()
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoints/last.ckpt: nothing to evaluate.")
    with readable(folder / "config.yaml", "evaluate another run"):
        data = make_data(cfg)
        parts = make_parts(cfg, data)
        teacher, predictions = answering(cfg, data, folder) if needs_teacher(cfg) else (None, {})
        distiller = make_distiller(cfg, data, parts, teacher, predictions)
    try:
        distiller.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        file = checkpoint_file(folder)
        raise UserError(f"{file} does not fit the networks of {folder / 'config.yaml'}: {error}") from None
    return distiller, data


def answering(cfg: DictConfig, data: ImageData, folder: Path) -> tuple[Teacher, dict[str, Tensor]]:
    """A run's teacher without its weights, and what it had predicted, where that is still there."""
    about = read_teacher(folder)
    with readable(folder / "run.json", "evaluate another run"):
        teacher = blank_teacher(cfg, data, about)
        size = data.split_size("test")
        runs = folder.parents[min(3, len(folder.parents) - 1)]
        answers = Answers.load(answers_file(cfg, runs, about["key"], data, "test"), size, data.num_classes)
    return teacher, {"test": answers.predictions(size)} if answers else {}


def blank_teacher(cfg: DictConfig, data: ImageData, about: Mapping[str, Any]) -> Teacher:
    """A teacher of a run's sizes without its weights."""
    chosen = about["class_index"]
    network = make_network(cfg.model.teacher, "model.teacher", max(chosen) + 1 if chosen else data.num_classes)
    return Teacher(network, about["mean"], about["std"], about["image_size"], chosen)


def test(cfg: DictConfig, distiller: Distiller, data: ImageData) -> dict[str, float]:
    """Scores on the test set by the configured trainer."""
    trainer = make_trainer(cfg, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    measured = of_split(trainer.test(distiller, datamodule=data, verbose=False)[0], "test")
    if not measured:
        raise UserError("No image was scored: leave trainer.limit_test_batches out.")
    return measured


def show(measured: dict[str, float], reported: dict[str, float]) -> None:
    """A table of both."""
    table = Table("test set", "measured now", *(["reported by the run"] if reported else []))
    for name, value in measured.items():
        told = [f"{reported[name]:.6f}" if name in reported else "-"] if reported else []
        table.add_row(name, f"{value:.6f}", *told)
    Console().print(table)


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
@job
def main(cfg: DictConfig) -> None:
    """Print the scores; a run that reported something else is an error."""
    measured, reported = evaluate(cfg)
    show(measured, reported)
    wrong = [name for name, value in measured.items() if not abs(value - reported.get(name, value)) <= TOLERANCE]
    if wrong:
        raise UserError(f"This differs from what the run reported: {', '.join(wrong)}.")
    if reported:
        print("Agrees with what the run reported.")


if __name__ == "__main__":
    run_command(main)
