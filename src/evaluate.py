"""`python -m src.evaluate`: score a run folder or a checkpoint again. `--help` is the guide."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from src.assemble import make_data, make_distiller, make_parts, make_trainer
from src.config import Train, job, run_command
from src.data.image_data import ImageData
from src.distiller import Distiller
from src.errors import UserError
from src.loading import make_network
from src.metrics import of_split
from src.run import checkpoint_file, needs_teacher, read_checkpoint, read_json
from src.teacher import Answers, Teacher, answers_file

TOLERANCE = 2e-3
"""Another processor rounds otherwise; on the same one the difference is 0."""
TRUSTED = ("src.", "torch.optim.", "lightning.Trainer")


def evaluate(cfg: DictConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Test scores as measured now, and as the run reported them (empty for a bare checkpoint)."""
    if (cfg.run is None) == (cfg.checkpoint is None):
        raise UserError(
            "Give one of run=FOLDER (a run folder) and checkpoint=FILE (with network@model.student=... and data=...)."
        )
    if cfg.run is None:
        return evaluate_checkpoint(cfg), {}
    folder = Path(cfg.run).expanduser()
    reported = read_json(folder / "result.json")["test"] if (folder / "result.json").is_file() else {}
    run_cfg = read_config(folder, cfg.data.root, cfg.data.get("path"))
    run_cfg.trainer.accelerator = cfg.trainer.accelerator
    return test(run_cfg, *load_run(folder, run_cfg)), reported


def evaluate_checkpoint(cfg: DictConfig) -> dict[str, float]:
    """Scores of a checkpoint of any known format as the configured student."""
    cfg.student.path = cfg.checkpoint
    data = make_data(cfg)
    return test(cfg, make_distiller(cfg, data, make_parts(cfg, data), None, {}), data)


def read_config(folder: Path, data_root: str, data_path: str | None = None) -> DictConfig:
    """A run's configuration, for one device of this machine and its data.

    Raises `UserError` where it is missing, or names something to call that is not this project's.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml.")
    run_cfg: Any = OmegaConf.merge(OmegaConf.structured(Train), OmegaConf.load(file))
    for target in targets(OmegaConf.to_container(run_cfg, resolve=True)):
        if not is_trusted(str(target)):
            raise UserError(f"{file} wants to call {target}, which is not this project's: refused.")
    run_cfg.trainer.update(accelerator="auto", devices=1, strategy="auto")
    if not Path(run_cfg.data.root).expanduser().is_dir():
        run_cfg.data.root = data_root
    if data_path:
        run_cfg.data.path = data_path
    return run_cfg


def is_trusted(target: str) -> bool:
    """Whether this names something of this project or of torch's and Lightning's parts that it configures.

    Where it was defined counts too: every module makes what it imports, say `os`, an attribute of its own.
    """
    if not target.startswith(TRUSTED):
        return False
    try:
        found = hydra.utils.get_object(target)
    except ImportError:
        return False
    return found is Trainer or str(getattr(found, "__module__", "")).startswith(TRUSTED)


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
    data = make_data(cfg)
    parts = make_parts(cfg, data)
    teacher, predictions = None, {}
    if needs_teacher(cfg):
        about = read_json(folder / "run.json")["teacher"]
        teacher = blank_teacher(cfg, data, about)
        answers = Answers.load(answers_file(cfg, folder.parents[3], about["key"], data, "test"))
        predictions = {"test": answers.predictions(data.split_size("test"))} if answers else {}
    distiller = make_distiller(cfg, data, parts, teacher, predictions)
    try:
        distiller.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        file = checkpoint_file(folder)
        raise UserError(f"{file} does not fit the networks of {folder / 'config.yaml'}: {error}") from None
    return distiller, data


def blank_teacher(cfg: DictConfig, data: ImageData, about: Mapping[str, Any]) -> Teacher:
    """A teacher of a run's sizes without its weights."""
    chosen = about["class_index"]
    network = make_network(cfg.model.teacher, "model.teacher", max(chosen) + 1 if chosen else data.num_classes)
    return Teacher(network, about["mean"], about["std"], about["image_size"], chosen)


def test(cfg: DictConfig, distiller: Distiller, data: ImageData) -> dict[str, float]:
    """Scores on the test set by the configured trainer."""
    trainer = make_trainer(cfg, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    measured = trainer.test(distiller, datamodule=data, verbose=False)[0]
    return of_split(measured, "test")


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
    wrong = [name for name, value in measured.items() if abs(value - reported.get(name, value)) > TOLERANCE]
    if wrong:
        raise UserError(f"This differs from what the run reported: {', '.join(wrong)}.")
    if reported:
        print("Agrees with what the run reported.")


if __name__ == "__main__":
    run_command(main)
