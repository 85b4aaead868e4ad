"""`python -m src.evaluate`: evaluate a run folder or a checkpoint again. `--help` is the guide."""

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from src.command import job, run_command
from src.common.errors import UserError
from src.common.metrics import metrics_of_split
from src.setup.reopen import Opened, open_run_or_checkpoint, read_result
from src.training.fitting import make_trainer

TOLERANCE = 2e-3
"""Largest difference that passes. It is 0 on the same processor, but other processors round differently."""


def evaluate(cfg: DictConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Return the test metrics as measured now, and as the run reported them (empty for a bare checkpoint)."""
    measured = score_test_set(open_run_or_checkpoint(cfg))
    result = read_result(cfg.run)
    return measured, result.test.model_dump(exclude_unset=True) if result else {}


def score_test_set(opened: Opened) -> dict[str, float]:
    """Evaluate on the test set with the configured trainer."""
    trainer = make_trainer(opened.cfg, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (tested,) = trainer.test(opened.distiller, datamodule=opened.data, verbose=False)
    return metrics_of_split(tested, "test")


def show(measured: dict[str, float], reported: dict[str, float]) -> None:
    """Print the measured and the reported metrics in one table."""
    table = Table("test set", "measured now", *(["reported by the run"] if reported else []))
    for name, value in measured.items():
        told = [f"{reported[name]:.6f}" if name in reported else "-"] if reported else []
        table.add_row(name, f"{value:.6f}", *told)
    Console().print(table)


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
@job
def main(cfg: DictConfig) -> None:
    """Evaluate and print the metrics. Raises `UserError` if they differ from the metrics that the run reported."""
    measured, reported = evaluate(cfg)
    show(measured, reported)
    wrong = [name for name, value in measured.items() if not abs(value - reported.get(name, value)) <= TOLERANCE]
    if wrong:
        raise UserError(
            f"The metrics differ from those that the run reported: {', '.join(wrong)}. Check that the code, the data "
            "and the files of the run are unchanged."
        )
    if reported:
        print("The metrics agree with those that the run reported.")


if __name__ == "__main__":
    run_command(main)
