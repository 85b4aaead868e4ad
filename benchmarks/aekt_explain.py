"""Explain explicit transfer: which images get its weight, and what the serialization layer absorbs.

    python -m benchmarks.aekt_explain --out results/aekt_study/explained --runs FOLDER OVERRIDE ...

The command trains a student by `method=aekt` with the given overrides of `src.train`. In every `--every`-th step it
keeps the confidences of student and teacher in the target class, and the weights of the serialization layer. Then it
draws four figures.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from src.methods.aekt import AEKT, explicit_weight
from src.methods.decoupling import target_log_odds
from src.runs.folder import RunFolder
from src.train import train
from src.training.gradient_anatomy import read_gradients

CONF = Path(__file__).parents[1] / "conf"
MOMENTS = (0.05, 0.3, 1.0)
"""The moments of the training that are drawn, as shares of its steps."""
WINDOW = 8
"""The number of measured steps that are drawn together at one moment."""


class Confidences(L.Callback):
    """Keep log p_t and log q_t of every `every`-th batch, and the layer's weights [C, C], in an npz file."""

    def __init__(self, file: str, every: int) -> None:
        self.file, self.every = Path(file), every
        self.steps: list[int] = []
        self.pairs: list[Tensor] = []
        self.layers: list[Tensor] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keep the confidences of this batch, at the method's temperature."""
        module: Any = pl_module
        if trainer.global_step % self.every:
            return
        batch, logits = module.last_batch
        views = (logits.student.detach(), logits.teacher)
        odds = torch.stack([target_log_odds(each, batch.target, module.method.temperature) for each in views])
        if self.pairs and odds.shape != self.pairs[0].shape:  # the last batch of an epoch is smaller
            return
        self.steps.append(trainer.global_step)
        self.pairs.append(torch.nn.functional.logsigmoid(odds))
        if hasattr(module.serialization, "layer"):
            self.layers.append(module.serialization.layer.weight.detach().clone())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        layers = torch.stack(self.layers) if self.layers else torch.empty(0)
        np.savez(self.file, steps=self.steps, pairs=torch.stack(self.pairs).numpy(), layers=layers.numpy())


def weights_by_confidence(pairs: np.ndarray, method: AEKT) -> Figure:
    """Draw each image's confidences, coloured by its weight, at three moments.

    `pairs` [K, 2, B] holds log p_t and log q_t.
    """
    figure, panels = plt.subplots(1, len(MOMENTS), figsize=(11, 3.8), sharex=True, sharey=True, layout="constrained")
    for panel, moment in zip(panels, MOMENTS, strict=True):
        end = max(WINDOW, round(moment * len(pairs)))
        log_p, log_q = torch.from_numpy(pairs[end - WINDOW : end]).transpose(0, 1).flatten(1)
        weight = explicit_weight(log_p, log_q, method.weighting, method.max_weight)
        drawn = panel.scatter(log_p.exp(), log_q.exp(), c=weight, s=9, cmap="viridis", vmin=0, vmax=method.max_weight)
        panel.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        bound = (weight >= 0.999 * method.max_weight).float().mean()
        panel.set_title(
            f"after {100 * moment:.0f} % of the steps:\nmean weight {weight.mean():.1f}, {100 * bound:.0f} % at bound"
        )
        panel.title.set_fontsize(9)
        panel.set_xlabel("student's confidence $p_t$")
    panels[0].set_ylabel("teacher's confidence $q_t$")
    figure.colorbar(drawn, ax=panels, label="weight w")
    return figure


def shares(steps: np.ndarray, pairs: np.ndarray, method: AEKT) -> Figure:
    """Draw the share of images at the bound, and the means of weight and confidences, over the steps."""
    log_p, log_q = (torch.from_numpy(pairs[:, i]) for i in (0, 1))
    weight = torch.stack(
        [explicit_weight(p, q, method.weighting, method.max_weight) for p, q in zip(log_p, log_q, strict=True)]
    )
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    left.plot(steps, smooth(weight.mean(dim=1).numpy()), label="mean weight")
    at_bound = (weight >= 0.999 * method.max_weight).float().mean(dim=1)
    middle.plot(steps, 100 * smooth(at_bound.numpy()), label="images at the bound, %")
    right.plot(steps, smooth(log_p.exp().mean(dim=1).numpy()), label="student's confidence $p_t$")
    right.plot(steps, smooth(log_q.exp().mean(dim=1).numpy()), label="teacher's confidence $q_t$")
    for panel in (left, middle, right):
        panel.set_ylim(bottom=0)
        finish(panel)
    return figure


def pulls(rows: list[dict[str, float]]) -> Figure:
    """Draw the mean pull of each term at the target logit, and its length at the student's own logits."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    steps = [row["step"] for row in rows]
    for name in ("cross_entropy", "tckd", "explicit_transfer"):
        left.plot(steps, smooth(np.array([-row[f"{name}/target"] for row in rows])), label=name.replace("_", " "))
    for name in ("cross_entropy", "tckd", "nckd", "explicit_transfer"):
        right.plot(steps, smooth(np.array([row[f"{name}/own"] for row in rows])), label=name.replace("_", " "))
    left.set_title("pull at the target logit", fontsize=9)
    right.set_title("length of the gradient at the student's own logits", fontsize=9)
    for panel in (left, right):
        finish(panel)
    return figure


def layer(steps: np.ndarray, layers: np.ndarray) -> Figure:
    """Draw the layer's singular values and its distance from the identity over the steps. `layers` is [K, C, C]."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    values = np.linalg.svd(layers, compute_uv=False)
    for name, column in (("largest", values[:, 0]), ("median", np.median(values, axis=1)), ("smallest", values[:, -1])):
        left.plot(steps, column, label=f"{name} singular value")
    away = layers - np.eye(layers.shape[1])
    diagonal = np.diagonal(away, axis1=1, axis2=2)
    right.plot(steps, np.sqrt((away**2).sum(axis=(1, 2))), label="distance from the identity")
    right.plot(steps, np.sqrt((diagonal**2).sum(axis=1)), label="its part on the diagonal")
    for panel in (left, right):
        finish(panel)
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Average over five measured steps."""
    return np.convolve(np.pad(values, 2, mode="edge"), np.ones(5) / 5, mode="valid")


def finish(panel: Axes) -> None:
    """Label the axis of steps, and add the legend."""
    panel.set_xlabel("step")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)


def main() -> None:
    """Train, and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the figures")
    parser.add_argument("--runs", type=Path, required=True, help="the folder of run folders")
    parser.add_argument("--every", type=int, default=10, help="the number of steps between two measurements")
    parser.add_argument("overrides", nargs="*", help="options of src.train")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.runs.mkdir(parents=True, exist_ok=True)
    file = (options.runs / "confidences.npz").resolve()
    callback = f"{{_target_: benchmarks.aekt_explain.Confidences, file: {file}, every: {options.every}}}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        places = [f"runs={options.runs}", f"gradients.every={options.every}", f"+trainer.callbacks=[{callback}]"]
        cfg = compose("train", ["method=aekt", *options.overrides, *places])
    train(cfg)
    method = AEKT(**{name: cfg.method[name] for name in AEKT.__init__.__annotations__ if name != "return"})
    kept = np.load(file)
    figures = {
        "weights": weights_by_confidence(kept["pairs"], method),
        "bound": shares(kept["steps"], kept["pairs"], method),
        "pulls": pulls(read_gradients(RunFolder(cfg, True).path)),
    }
    if kept["layers"].size:
        figures["layer"] = layer(kept["steps"], kept["layers"])
    for name, figure in figures.items():
        figure.savefig(options.out / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
