"""Try a method once on random images, so that mistakes in it show at once and not after a teacher is trained."""

import copy
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from src.common.errors import UserError
from src.config.names import method_name, needs_teacher, teacher_is_program
from src.data.image_data import ImageData, Samples
from src.methods.method import weighted
from src.setup.assemble import Parts, make_distiller
from src.setup.teacher import find_teacher, load_teacher, make_untrained_teacher
from src.teachers.teacher import Teacher
from src.training.distiller import Distiller
from src.training.fitting import try_options

IMAGES = 4
"""The number of random images."""
ROOT = Path(__file__).parents[2]
LIBRARIES = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))
"""Folders of Python's library and of installed packages."""


def dry_run(cfg: DictConfig, data: ImageData, parts: Parts) -> None:
    """Compute the terms of all stages of the method, on copies of the parts and with a teacher of random weights.

    The optimiser, the averaging and the logger are tried too. Raises `UserError` if one of these fails, if the method
    fails, if its terms and its weights have different names, if a term is not a scalar, if all weights are 0, if no
    term depends on anything that is trained, if a callback waits for a metric that the run does not have, or if
    `keep_best` would keep a student that does not predict alone.
    """
    cfg = copy.deepcopy(cfg)
    cfg.compile = False
    try:
        teacher = trial_teacher(cfg, data) if needs_teacher(cfg) else None
        distiller = make_distiller(cfg, data, copy.deepcopy(parts), teacher)
        _check_monitors(cfg, distiller)
        if cfg.keep_best and not distiller.predicts_alone:
            raise UserError(
                f"keep_best=true keeps the student alone, but method={method_name(cfg)} predicts through parts of the "
                "method too: leave it out."
            )
        images = random_views(data)
        for module in [*(distiller.for_stage(stage) for stage in distiller.method.stages()), distiller]:
            try_options(cfg, module, _try_terms(module, images))
        if cfg.schedule.batch_size == 1:
            _try_single_image(distiller, data)
    except UserError as error:
        if str(error).startswith("The method"):
            raise UserError(f"method={method_name(cfg)}: {error}") from error
        raise
    except Exception as error:
        raise UserError(f"method={method_name(cfg)} fails on random images: {_describe(error)}.") from error


def trial_teacher(cfg: DictConfig, data: ImageData) -> Teacher:
    """Make a teacher of random weights. A program has no architecture that could be made again, so it is loaded."""
    if teacher_is_program(cfg):
        return load_teacher(cfg, data, find_teacher(cfg))
    return make_untrained_teacher(cfg, data)


def random_views(data: ImageData, images: int = IMAGES) -> Samples:
    """Make a batch of random images with the labels of training images, in as many views as the method asks for.

    If there are images without labels, every other image is one of them.
    """
    generator = torch.Generator().manual_seed(0)
    labelled = data.train_index[: images - len(data.unlabelled_index[: images // 2])]
    index = torch.cat([labelled, data.unlabelled_index[: images - len(labelled)]])
    shape = (len(index), *data.image_shape)
    views = tuple(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(data.views_per_image)
    )
    numbers = tuple(torch.zeros_like(index) for _ in views)
    samples = Samples(views, data.train_labels[index], index, numbers)
    if data.augmentation.mixing is None:
        return samples
    return samples._replace(other_target=samples.target, share=torch.ones(len(index)))


def _try_terms(distiller: Distiller, images: Samples) -> dict[str, Tensor]:
    """Compute the weighted terms."""
    batch, logits = distiller.observe(images)
    terms: object = distiller.method.all_terms(batch, logits)
    if not isinstance(terms, Mapping):
        raise UserError(f"The method's terms are a {type(terms).__name__}: return a dict of scalar tensors by name.")
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.ndim:
            shape = f"a tensor of shape {list(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
            raise UserError(f"The method's term {name!r} is {shape}: return a scalar, such as the mean over the batch.")
    summed = weighted(terms, distiller.method.weights(0))
    if not summed:
        raise UserError("The method's weights are all 0 in the first epoch: raise the weight of at least one term.")
    if not any(term.requires_grad for term in summed.values()):
        raise UserError("The method's terms depend on nothing that is trained: compute them from the student's output.")
    return summed


def _try_single_image(distiller: Distiller, data: ImageData) -> None:
    """Raise `UserError` if the networks cannot train on one image. Batch norm needs several values per channel."""
    try:
        _try_terms(distiller, random_views(data, images=1))
    except Exception as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"schedule.batch_size=1 is too small for these networks ({why}): choose 2 or more.") from error


def _check_monitors(cfg: DictConfig, distiller: Distiller) -> None:
    """Raise `UserError` if a callback of `trainer.callbacks` waits for a metric of an evaluation that is not logged."""
    split = distiller.settings.validates_on
    names = [*distiller.metrics, *(["agreement"] if distiller.teacher else [])]
    known = [f"{split}/{name}" for name in names] if cfg.trainer.get("limit_val_batches") != 0 else []
    for number, callback in enumerate(cfg.trainer.get("callbacks") or ()):
        monitor = callback.get("monitor")
        if monitor is None or not callback.get("strict", True) or monitor.startswith("train/"):
            continue
        if monitor not in [*known, "accuracy", "loss"]:
            choice = f"choose one of {', '.join(known)}" if known else "leave trainer.limit_val_batches=0 out"
            raise UserError(f"trainer.callbacks[{number}].monitor={monitor} is not a metric of this run: {choice}.")


def _describe(error: Exception) -> str:
    """Describe an error by its type, its message, and the last line outside of libraries that led to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own_code(Path(frame.filename))]
    file = Path(frames[-1].filename)
    shown = file.relative_to(ROOT) if ROOT in file.parents else file
    return f"{type(error).__name__}: {' '.join(str(error).split())} in {shown}, line {frames[-1].lineno}"


def _is_own_code(file: Path) -> bool:
    return file.is_file() and not any(folder in file.parents for folder in LIBRARIES)
