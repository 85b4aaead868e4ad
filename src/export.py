"""`python -m src.export`: write the student to a file and check the file in its own runtime. `--help` is the guide."""

import logging
import shlex
from pathlib import Path

import hydra
from omegaconf import DictConfig

from src.command import job, run_command
from src.common.files import output_folder, write_text
from src.config.validation import validate
from src.exporting.card import describe, model_card
from src.exporting.checking import (
    compare,
    export_checked,
    predict_in_batches,
    sample_test_images,
    sample_training_images,
)
from src.exporting.finetuning import check_finetuning, finetuned_classifier
from src.exporting.forms import RUNTIMES, Form, make_classifier, require_runtime
from src.exporting.hub import export_folder, refuse_unfit
from src.exporting.measuring import load_original_teacher
from src.setup.reopen import open_run_or_checkpoint, read_result

log = logging.getLogger(__name__)


def output_file(cfg: DictConfig, form: Form) -> Path:
    """Return the path of the exported file: the option `out` names the file itself, or its folder.

    For `hub` it is the path of the folder.
    """
    if cfg.out is None:
        return Path(cfg.run or Path(cfg.checkpoint).parent).expanduser() / "export" / form.file_name
    if form.format == "hub":
        return output_folder(cfg.out)
    file = Path(cfg.out).expanduser()
    if file.suffix == Path(form.file_name).suffix and not file.is_dir():
        return file
    return output_folder(cfg.out) / form.file_name


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
@job
def main(cfg: DictConfig) -> None:
    """Write the file and its model card, and report how the file compares with the student."""
    form = Form.parse(cfg.format, cfg.precision)
    require_runtime(form)
    validate(cfg)
    opened = open_run_or_checkpoint(cfg)
    if cfg.finetune_epochs:
        check_finetuning(form, opened)
    if form.format == "hub":
        refuse_unfit(opened.distiller)
    file = output_file(cfg, form)
    network, metadata = make_classifier(opened.distiller), describe(cfg, opened)
    images, target = sample_test_images(opened.data, cfg.images)
    if form.format == "hub":
        check = export_folder(opened, network, file, metadata, read_result(cfg.run), images, target)
        log.info("Written: %s. To upload it, choose a name: hf upload USER/NAME %s", file, shlex.quote(str(file)))
        log.info("%s in %s: %s.", form, RUNTIMES[form.format], check)
        return
    example = sample_training_images(opened.data, cfg.calibration_images if form.precision == "int8" else 1)
    if cfg.finetune_epochs:
        teacher = load_original_teacher(cfg, opened)
        network = finetuned_classifier(opened, teacher, cfg.finetune_epochs, example, images, target)
        metadata["finetune_epochs"] = cfg.finetune_epochs
    student_logits = predict_in_batches(network, images)
    exported_logits = export_checked(network, file, form, example, metadata, images, student_logits)
    check = compare(student_logits, exported_logits, target)
    write_text(Path(f"{file}.md"), model_card(file, form, metadata, check))
    log.info("Written: %s, %s bytes, and %s.md", file, f"{file.stat().st_size:,}", file.name)
    log.info("%s in %s: %s.", form, RUNTIMES[form.format], check)


if __name__ == "__main__":
    run_command(main)
