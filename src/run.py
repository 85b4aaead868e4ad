"""A run is its folder: its name follows from the configuration, and the same command finds it again.

config.yaml (resolved), run.json (versions, fingerprints, teacher), metrics.csv (a row an epoch), checkpoints/last.ckpt,
student.pth (the student alone) and, when it is finished, result.json; failure.txt where an error ended it.
"""

import ast
import csv
import hashlib
import io
import json
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from src.config import METHOD_FACTS
from src.errors import UserError
from src.files import written_whole
from src.resume import AGAIN, locked
from src.secrecy import plain, without_secrets

log = logging.getLogger(__name__)

IRRELEVANT = {
    "data": {"prepare", "root", "path", "workers", "cache", "cache_gigabytes"},
    "teacher": {"store", "train_if_missing", "view_store", "store_gigabytes", "allow_program"},
    "trainer": {
        "accelerator",
        "devices",
        "strategy",
        "num_nodes",
        "plugins",
        "use_distributed_sampler",
        "log_every_n_steps",
        "enable_progress_bar",
        "enable_model_summary",
        "profiler",
    },
}
"""Keys of each group that cannot change a result: no part of a run's identity."""
NO_IDENTITY = {"logger", "gradients", "runs", "start_over", "checkpoint_minutes"}
PACKAGE = Path(__file__).parent


def needs_teacher(cfg: DictConfig) -> bool:
    """Whether a configured method has a teacher."""
    methods: list[Any] = [hydra.utils.get_class(node._target_) for node in (cfg.method, cfg.also) if node]
    return any(method.needs_teacher for method in methods)


def method_name(cfg: DictConfig) -> str:
    """The method, or both that are combined, and what else changes how a student is taught."""
    switches = {
        "standardized": cfg.standardize_logits,
        "dot": cfg.schedule.optimizer._target_ == "src.dot.DOT",
        "averaged": cfg.averaging,
    }
    methods = [node.name for node in (cfg.method, cfg.also) if node]
    return "+".join([*methods, *(name for name, on in switches.items() if on)])


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The part of a configuration that decides the result, as plain types."""
    container = plain(cfg)
    kept: dict[str, Any] = {key: value for key, value in container.items() if key not in NO_IDENTITY}
    for group, keys in IRRELEVANT.items():
        kept[group] = {key: value for key, value in kept[group].items() if key not in keys}
    if kept["trainer"].get("sync_batchnorm"):  # as on one device
        del kept["trainer"]["sync_batchnorm"]
    for method in ("method", "also"):
        for fact in METHOD_FACTS & set(kept[method] or {}):
            del kept[method][fact]
    for network in ("student", "teacher"):
        (kept["model"].get(network) or {}).pop("published_accuracy", None)
    if not needs_teacher(cfg):
        kept["model"] = {"student": kept["model"]["student"]}
        del kept["teacher"]
    return kept


def run_folder(cfg: DictConfig) -> Path:
    """`<runs>/<data>/<pair or network>/<method>/<serialization>-seed<seed>-<digest of the identity>`."""
    pair = cfg.model.name if needs_teacher(cfg) else cfg.model.student.name
    digest = hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:8]
    return (
        Path(cfg.runs).expanduser()
        / cfg.data.name
        / pair
        / method_name(cfg)
        / f"{serialization_name(cfg)}-seed{cfg.seed}-{digest}"
    )


def serialization_name(cfg: DictConfig) -> str:
    """none, serial or parallel."""
    layer = cfg.serialization._target_.rsplit(".", 1)[-1].lower()
    return "none" if layer == "serialization" else layer


def code_digest(modules: Iterable[str]) -> str:
    """A digest of what the named modules of this package, and all that they import from it, do.

    Comments, docstrings and layout do not count, but in C++ beside a module.
    """
    seen: dict[str, str] = {}
    waiting = list(modules)
    options: Any = {"show_empty": True} if sys.version_info >= (3, 13) else {}  # what 3.10 to 3.12 do
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        file = (PACKAGE.parent / module.replace(".", "/")).with_suffix(".py")
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src."):
                waiting.append(node.module or "")
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [part for part in body if not _is_string(part)]  # type: ignore[attr-defined]
        seen[module] = ast.dump(tree, **options).replace(", type_params=[]", "")
        if (kernels := file.with_suffix(".cpp")).is_file():
            seen[kernels.name] = kernels.read_text()
    return hashlib.sha256(json.dumps(sorted(seen.items())).encode()).hexdigest()


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


class RunFolder:
    """One run's folder on disk."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.path = run_folder(cfg)
        self.result_file = self.path / "result.json"
        self.student_file = self.path / "student.pth"
        self.failure_file = self.path / "failure.txt"

    @contextmanager
    def kept(self, first: bool, wait: bool = False) -> Iterator[None]:
        """Keep other commands off what is not finished yet; of several processes of a run the `first` does.

        Raises `BusyError` where another command trains here, unless it shall `wait` for that one's end, and `UserError`
        where the folder cannot be written.
        """
        if not first or (self.result_file.is_file() and not self.cfg.start_over):
            yield
            return
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path, wait):
            yield

    def begin(
        self, fingerprints: Mapping[str, str | None], facts: Mapping[str, Any], first: bool
    ) -> dict[str, Any] | None:
        """Make the folder ready, by the `first` of the processes; the result where the run is finished already.

        Raises `UserError` where what is there was made by other code, another teacher or other data, or where the
        folder cannot be written.
        """
        if self.cfg.start_over:
            if first:
                with _writing(self.path):
                    self._clear()
        else:
            self._compare(fingerprints)
            if self.result_file.is_file():
                return finished_result(self.result_file)
        if first:
            about = {"fingerprints": fingerprints, "versions": versions(), "seed": self.cfg.seed, **facts}
            with _writing(self.path):
                for partial in self.path.rglob(".[0-9]*.*"):  # of `written_whole`, from a process that was killed
                    partial.unlink(missing_ok=True)
                self.failure_file.unlink(missing_ok=True)
                write_text(self.path / "config.yaml", OmegaConf.to_yaml(plain(self.cfg)))
                write_text(self.path / "run.json", json.dumps(about, indent=2))
        return None

    def _clear(self) -> None:
        """What a kill leaves of this is no finished run, and knows of what it is made until the last file goes."""
        self.result_file.unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "run.json":
                entry.unlink()
        (self.path / "run.json").unlink(missing_ok=True)

    def _compare(self, fingerprints: Mapping[str, str | None]) -> None:
        before = self.path / "run.json"
        if not before.is_file():
            return
        earlier = read_json(before).get("fingerprints")
        if not isinstance(earlier, dict):
            raise UserError(f"{before} is not what a run writes: {AGAIN}.")
        changed = [name for name, value in fingerprints.items() if earlier.get(name) != value]
        if changed:
            raise UserError(
                f"{self.path} was made with another {' and another '.join(changed)} than today's: "
                f"add start_over=true to do it again, or runs=... to keep both."
            )

    def fail(self, error: Exception) -> None:
        """Note what ended the run, for reports; the same command goes on all the same."""
        with suppress(OSError):  # a full disk may be what ended it
            write_text(self.failure_file, without_secrets(str(error)) or type(error).__name__)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result: from now on the same command returns it at once, and one checkpoint is enough."""
        write_text(self.result_file, json.dumps(result, indent=2))
        for previous in self.path.rglob("checkpoints/previous.ckpt"):
            previous.unlink()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write the run folder {folder} ({error.strerror}): choose another by runs=..."
        ) from None


class History(Callback):
    """Writes metrics.csv, a row an epoch, and one line an epoch to the log; rows survive a resume in the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "metrics.csv"
        self.rows: list[dict[str, float]] = []
        self.epoch_start = 0.0
        self.learning_rate = 0.0
        self.validated = False

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and what is known of the epoch that has begun."""
        seconds = time.monotonic() - self.epoch_start
        return {"rows": self.rows, "learning_rate": self.learning_rate, "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The rows up to the checkpoint: what came after it is done again."""
        self.rows = list(state_dict["rows"])
        self.learning_rate = state_dict["learning_rate"]
        self.epoch_start = time.monotonic() - state_dict["seconds"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and note the rate that this epoch starts with: at its end the next one's is set."""
        self.validated = False
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.epoch_start = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """This epoch has scores."""
        self.validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's row; validation has run."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.endswith("_step")}
        values = {name.removesuffix("_epoch"): value for name, value in values.items() if "/" in name}
        if not self.validated:  # what Lightning still holds is an earlier epoch's
            values = {name: value for name, value in values.items() if name.startswith("train/")}
        row = {
            "epoch": trainer.current_epoch,
            "learning_rate": self.learning_rate,
            "seconds": time.monotonic() - self.epoch_start,
            **values,
        }
        self.rows.append(row)
        if trainer.is_global_zero:
            write_rows(self.file, self.rows)
            if trainer.progress_bar_callback is None:  # a bar tells the same, and lines would cut it
                log.info("%s", _line(trainer, row))


def _line(trainer: Trainer, row: Mapping[str, float]) -> str:
    """An epoch for the log."""
    parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", f"loss {row['train/loss']:.3f}"]
    for split in ("val", "test"):
        if f"{split}/accuracy" in row:
            parts.append(f"{split} accuracy {100 * row[f'{split}/accuracy']:.2f} %")
    return "  ".join([*parts, f"({row['seconds']:.0f} s)"])


def write_rows(file: Path, rows: list[dict[str, float]]) -> None:
    """A CSV file of rows, with a gap where a row lacks a value (an epoch without validation)."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def read_history(folder: Path) -> list[dict[str, float]]:
    """The rows of a run folder's metrics.csv; none where there is no file yet."""
    return read_rows(folder / "metrics.csv")


def read_rows(file: Path) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers, without its gaps; none where there is no file yet."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


def write_text(file: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    with written_whole(file) as partial:
        partial.write_text(text)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of the run folder. Raises `UserError` where it is damaged."""
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): {AGAIN}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not what a run writes: {AGAIN}.")
    return content


def finished_result(file: Path) -> dict[str, Any]:
    """A run's result.json. Raises `UserError` where it is damaged, or holds no scores."""
    result = read_json(file)
    test = result.get("test")
    if not isinstance(test, dict) or "accuracy" not in test or not all(type(score) is float for score in test.values()):
        raise UserError(f"{file} is not what a run writes: {AGAIN}.")
    return result


def versions() -> dict[str, str]:
    """What ran: Python, the packages that decide numbers, and the commit where this is a git checkout."""
    packages = ("torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "numpy")
    found = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=PACKAGE,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return found
    return {**found, "commit": git.stdout.strip()}
