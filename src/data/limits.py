"""How many batches of a split a run scores, by the trainer's options `limit_*_batches`."""

from omegaconf import DictConfig

from src.common.errors import UserError
from src.data.image_data import ImageData


def limited(limit: float | None, batches: int) -> int:
    """Apply a limit as Lightning does: an integer is a number of batches, 0.5 is half of them, 1.0 is all of them.

    >>> [limited(limit, 8) for limit in (None, 0, 3, 20, 0.5, 1, 1.0, 2.0)]
    [8, 0, 3, 8, 4, 1, 8, 2]
    """
    if limit is None:
        return batches
    return int(batches * limit) if isinstance(limit, float) and limit <= 1 else min(int(limit), batches)


def evaluation_batches(data: ImageData, split: str) -> int:
    """Count the batches of `val` or `test`."""
    return -(-data.split_size(split) // data.evaluation_batch_size)


def validated_batches(cfg: DictConfig, data: ImageData) -> int:
    """Count the batches that each validation scores."""
    return limited(cfg.trainer.get("limit_val_batches"), evaluation_batches(data, data.validates_on))


def final_batches(cfg: DictConfig, data: ImageData) -> int:
    """Count the batches that a test at the end of a run scores."""
    return limited(cfg.trainer.get("limit_test_batches"), evaluation_batches(data, "test"))


def scored_batches(cfg: DictConfig, data: ImageData, split: str) -> int:
    """Count the batches of `val` or `test` that a run scores at all. The teacher has to answer these."""
    validated = validated_batches(cfg, data) if split == data.validates_on else 0
    return max(validated, final_batches(cfg, data) if split == "test" else 0)


def check_choice(cfg: DictConfig, data: ImageData, chooser: str) -> None:
    """Raise `UserError` if `chooser`, the subject of its sentence, would choose by test images or by no images."""
    if data.validates_on == "test":
        raise UserError(f"{chooser} would choose by test images: hold training images out with data.val_size=N.")
    if not validated_batches(cfg, data):
        raise UserError(f"{chooser} needs validation images: leave trainer.limit_val_batches=0 out.")


def check_limits(cfg: DictConfig, data: ImageData, world_size: int = 1) -> None:
    """Raise `UserError` if a limit is a fraction of the batches that is less than one batch."""
    training = data.count_training_batches(world_size)
    validation, test = evaluation_batches(data, data.validates_on), evaluation_batches(data, "test")
    for name, batches in (("train", training), ("val", validation), ("test", test)):
        limit = cfg.trainer.get(f"limit_{name}_batches")
        if limit and not limited(limit, batches):
            raise UserError(
                f"trainer.limit_{name}_batches={limit} is less than one batch, because there are only {batches}: "
                f"choose a larger fraction, or a number of batches."
            )
