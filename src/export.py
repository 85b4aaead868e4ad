"""`python -m src.export`: what predicts, alone in a file, checked there by its own runtime. `--help` is the guide."""

import copy
import hashlib
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from src.command import job, run_command
from src.config import check_ranges
from src.data.image_data import ImageData, Share
from src.data.imagenet import readable
from src.data.views import normalise
from src.distiller import Distiller
from src.errors import UserError
from src.evaluate import load, read_result, read_teacher
from src.files import written_whole
from src.run import method_name, serialization_name, versions, write_text

log = logging.getLogger(__name__)

SUFFIXES = {"onnx": ".onnx", "exported_program": ".pt2", "torchscript": ".pt", "safetensors": ".safetensors"}
RUNTIMES = {"onnx": "onnxruntime", "exported_program": "torch", "torchscript": "torch", "safetensors": "safetensors"}
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""What the network that is written computes in; int8 is made out of the float32 file."""
LIMITS = {"float32": (1e-4, 0.999), "float16": (0.02, 0.98), "bfloat16": (0.15, 0.9), "int8": (0.5, 0.8)}
"""How far an export may be off: its largest difference, as a share of the student's largest logit, and the share of
images with the same top-1. One that is further off is broken, not just rounded."""
METADATA_FILE = "metadata.json"
BATCH = 64

Answer = Callable[[Tensor], Tensor]
"""Logits [B, C] float32 of uint8 images [B, 3, H, W]."""


class Form(NamedTuple):
    """A kind of file, and what it computes in."""

    format: str
    precision: str

    @classmethod
    def parse(cls, format: str, precision: str) -> "Form":
        """Raises `UserError` where there is no such form."""
        if format not in SUFFIXES:
            raise UserError(f"format={format} is not known, these are: {', '.join(SUFFIXES)}.")
        if precision not in PRECISIONS:
            raise UserError(f"precision={precision} is not known, these are: {', '.join(PRECISIONS)}.")
        if (precision == "int8") > (format == "onnx"):
            raise UserError(f"format={format} has no precision=int8: quantisation is for format=onnx.")
        if (format, precision) == ("onnx", "bfloat16"):
            raise UserError("onnxruntime does not compute in bfloat16 on a processor: use precision=float16 or int8.")
        return cls(format, precision)

    def __str__(self) -> str:
        return self.format if self.precision == "float32" else f"{self.format} {self.precision}"

    @property
    def file_name(self) -> str:
        """student.onnx, student-int8.onnx, ..."""
        return "student" + ("" if self.precision == "float32" else f"-{self.precision}") + SUFFIXES[self.format]


class Classifier(nn.Module):
    """What predicts, with its normalisation inside: logits [B, C] float32 of uint8 images [B, 3, H, W]."""

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to(dtype).to(memory_format=torch.contiguous_format)
        self.eval().requires_grad_(False)
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.network(normalise(images, self.mean, self.std).to(self.dtype)).float()


def classifier(distiller: Distiller) -> Classifier:
    """The student, or what the method has predict in its place: no teacher, serialization or method."""
    return Classifier(distiller.method.predictor(distiller.student), distiller.mean, distiller.std)


def needed(package: str) -> Any:
    """A package of the extra `export`. Raises `UserError` where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"This needs {package.partition('.')[0]}: pip install -e '.[export]'.") from error


# Writing and loading


def write(network: nn.Module, file: Path, form: Form, example: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write a module from uint8 images like `example` [B, 3, H, W] to logits, for any B. int8: `example` calibrates.

    `metadata` goes into the file, each value as JSON.
    """
    told = {key: json.dumps(value) for key, value in metadata.items()}
    two = example[:1].expand(2, -1, -1, -1).contiguous()  # torch.export takes a batch of 1 for a constant
    if form == ("onnx", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            whole, ready = Path(folder) / "float.onnx", Path(folder) / "ready.onnx"
            _write_onnx(network, whole, two, told)
            _quantise(whole, ready, file, example)
    elif form.format == "onnx":
        _write_onnx(network, file, two, told)
    elif form.format == "exported_program":
        torch.export.save(_exported(network, two), file, extra_files={METADATA_FILE: json.dumps(told)})
    elif form.format == "torchscript":
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # TorchScript is deprecated: who asks for it knows
            program = torch.jit.freeze(torch.jit.trace(network, two))
            torch.jit.save(program, str(file), _extra_files={METADATA_FILE: json.dumps(told)})
    else:
        tensors = {name: value.clone() for name, value in _weights(network).items()}
        needed("safetensors.torch").save_file(tensors, file, metadata=told)


def _exported(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(network, (example,), dynamic_shapes={"images": batch})


def _write_onnx(network: nn.Module, file: Path, example: Tensor, metadata: Mapping[str, str]) -> None:
    for package in ("onnx", "onnxscript"):
        needed(package)
        logging.getLogger(package).setLevel(logging.WARNING)
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)
    program: Any = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    program.model.metadata_props.update(metadata)
    program.save(file, external_data=False)


def _quantise(whole: Path, ready: Path, file: Path, images: Tensor) -> None:
    """Post-training quantisation by onnxruntime's own tool: weights by channel, activations by the range seen.

    Weights have 7 bits: sums of products of 8 saturate on processors without VNNI, which costs accuracy (a SlimNet of
    67.8 % on 500 CIFAR-100 images: 60.8 % by 8 bits, 68.0 % by 7).
    """
    tool = needed("onnxruntime.quantization")
    needed("onnxruntime.quantization.shape_inference").quant_pre_process(whole, ready, skip_symbolic_shape=True)

    class Reader(tool.CalibrationDataReader):  # type: ignore[name-defined]
        batches: Iterator[Tensor] = iter(images.split(BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"images": batch.numpy()} for batch in self.batches), None)

    tool.quantize_static(ready, file, Reader(), per_channel=True, reduce_range=True)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Of the network without its normalisation, named as in student.pth."""
    return network.network.state_dict() if isinstance(network, Classifier) else network.state_dict()


def load_form(file: Path, form: Form, network: nn.Module, threads: int = 1) -> Answer:
    """An exported file, ready to answer in its own runtime; for weights alone that is a copy of `network`.

    Raises `UserError` where the runtime is missing or refuses the file.
    """
    if form.format == "onnx":
        options = needed("onnxruntime").SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = needed("onnxruntime").InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class of its own for every kind of failure
            raise UserError(f"onnxruntime refuses {file}: {error}") from error
        return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    program: Any
    if form.format == "exported_program":
        program = torch.export.load(file).module()
    elif form.format == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.jit.load(str(file))
    else:
        program = copy.deepcopy(network)
        inner = program.network if isinstance(program, Classifier) else program
        inner.load_state_dict(needed("safetensors.torch").load_file(file))
    return torch.no_grad()(program)


# Checking


class Check(NamedTuple):
    """An export beside the student in torch, in float32, on the same N images."""

    images: int
    difference: float
    """The largest of a logit."""
    largest: float
    """The student's largest logit by amount."""
    same: int
    """Images with the same top-1."""
    student_accuracy: float
    accuracy: float

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.2g} (logits up to {self.largest:.3g}), same top-1 on "
            f"{self.same:,} of {self.images:,} images; accuracy on them {100 * self.accuracy:.2f} %, student "
            f"{100 * self.student_accuracy:.2f} %"
        )


def answers(answer: Answer, images: Tensor) -> Tensor:
    """Logits [N, C] of images [N, 3, H, W], in batches, the last of which is smaller: the batch is dynamic."""
    with torch.no_grad():
        return torch.cat([answer(batch) for batch in images.split(BATCH)])


def compare(ours: Tensor, exported: Tensor, target: Tensor) -> Check:
    """Logits [N, C] of the student and of its export, targets [N]."""
    student, other = ours.argmax(dim=1), exported.argmax(dim=1)
    return Check(
        images=len(target),
        difference=float((ours - exported).abs().max()),
        largest=float(ours.abs().max()),
        same=int((student == other).sum()),
        student_accuracy=accuracy(ours, target),
        accuracy=accuracy(exported, target),
    )


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Top-1, as a share."""
    return float((logits.argmax(dim=1) == target).double().mean())


def refuse_mismatch(check: Check, form: Form) -> None:
    """Raise `UserError` where an export is further off than rounding can be."""
    difference, same = LIMITS[form.precision]
    # written so that a NaN is refused too
    if not (check.difference <= difference * check.largest and check.same >= same * check.images):
        raise UserError(f"The {form} file does not answer as the student does, and is not kept: {check}.")


def spread_out(count: int, wanted: int) -> Tensor:
    """`wanted` of the positions 0 .. count - 1 (all where there are fewer), evenly: images may be sorted by class."""
    return (torch.arange(min(wanted, count)) * count) // min(wanted, count)


def some_test_images(data: ImageData, wanted: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, H, W] as evaluation sees them, and their classes [N]."""
    positions = spread_out(data.split_size("test"), wanted)
    batches = [data.test_images(rows.tolist()).contiguous() for rows in positions.split(BATCH)]
    return torch.cat(batches), data.source.test_labels[positions]


def some_training_images(data: ImageData, wanted: int) -> Tensor:
    """Images uint8 [N, 3, H, W] as evaluation would see them."""
    index = data.train_index[spread_out(len(data.train_index), wanted)]
    batches = torch.arange(len(index)).split(BATCH)
    reader = data.reader("val", index)
    return torch.cat([reader[Share(0, rows.tolist())].images[0].contiguous() for rows in batches])


# The command


def describe(cfg: DictConfig, run_cfg: DictConfig, distiller: Distiller, data: ImageData) -> dict[str, Any]:
    """What a file says of its use and where it comes from."""
    size = list(data.image_shape[1:])
    facts = {
        "network": run_cfg.model.student.name,
        "class_names": readable(data.class_names),
        "image_size": size,
        "resize": [run_cfg.data.resize] * 2 if "resize" in run_cfg.data else size,
        "mean": list(distiller.mean),
        "std": list(distiller.std),
        "data": {"name": run_cfg.data.name, "digest": data.source.digest[:16]},
        "versions": versions(),
        **dict.fromkeys(("method", "serialization", "teacher", "test", "seed", "epochs", "train_images")),
    }
    if cfg.run is None:
        return {**facts, "source": Path(cfg.checkpoint).name}
    folder = Path(cfg.run).expanduser().resolve()
    result = read_result(cfg)
    teacher = read_teacher(folder)
    return {
        **facts,
        "source": "/".join(folder.parts[-4:]),
        "method": method_name(run_cfg),
        "serialization": serialization_name(run_cfg),
        "teacher": {key: teacher[key] for key in ("name", "sha256", "accuracy")} if teacher else None,
        "seed": run_cfg.seed,
        **{key: result.get(key) for key in ("test", "epochs", "train_images")},
    }


def export(
    network: Classifier, file: Path, form: Form, example: Tensor, metadata: dict[str, Any], images: Tensor, ours: Tensor
) -> Tensor:
    """Write a file as a whole or not at all, load it by its runtime and return its logits [N, C] for `images`.

    `ours` [N, C] are the student's. `example`, see `write`. Raises `UserError` where the two do not agree.
    """
    dtype = PRECISIONS[form.precision]
    cast = Classifier(network.network, network.mean, network.std, dtype)
    place = "outside" if form.format == "safetensors" else "inside"
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as partial:
        write(cast, partial, form, example, {**metadata, "normalisation": place})
        exported = answers(load_form(partial, form, cast), images)
        refuse_mismatch(compare(ours, exported, ours.argmax(dim=1)), form)
    return exported


def card(file: Path, form: Form, metadata: Mapping[str, Any], check: Check) -> str:
    """The model card, in Markdown."""
    height, width = metadata["image_size"]
    teacher, test = metadata["teacher"], metadata["test"]
    numbers = f"mean {metadata['mean']}, std {metadata['std']} of pixels between 0 and 1"
    weights_alone = form.format == "safetensors"
    classes = len(metadata["class_names"])
    pixels = f"float, normalised by {numbers}" if weights_alone else f"uint8, 0 to 255, normalised inside by {numbers}"
    reported = f"{100 * test['accuracy']:.2f} % of the test images, as the run reported; " if test else ""
    rows = {
        "file": f"`{file.name}`: {form.format}, {form.precision}, {file.stat().st_size:,} bytes, sha256 "
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}",
        "network": metadata["network"] + (" (weights alone, named as in this project)" if weights_alone else ""),
        "input": f"`images` [batch, 3, {height}, {width}], any batch, RGB, {pixels}",
        "pictures": "resized to cover {1} x {0} pixels, of which the central {3} x {2} are cut out".format(
            *metadata["resize"], height, width
        ),
        "output": f"`logits` [batch, {classes}], before softmax",
        "top-1": f"{reported}{100 * check.accuracy:.2f} % by this file on {check.images:,} test images, "
        f"{100 * check.student_accuracy:.2f} % by the student in torch",
        "checked": f"by {RUNTIMES[form.format]} {version(RUNTIMES[form.format])}: {check}",
        "from": metadata["source"],
        "data": "{name} (digest {digest})".format(**metadata["data"]),
    }
    if metadata["method"]:
        rows["trained by"] = "{method}, serialization {serialization}, seed {seed}".format(**metadata)
    if test:
        rows["trained by"] += ", {epochs} epochs of {train_images:,} images".format(**metadata)
    if teacher:
        rows["teacher"] = f"{teacher['name']}, top-1 {100 * teacher['accuracy']:.2f} %, sha256 {teacher['sha256']}"
    rows["versions"] = ", ".join(f"{name} {number}" for name, number in metadata["versions"].items())
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    use = f"\n## Use\n\n    python -m src.predict {file.name} image.png\n" if form.format == "onnx" else ""
    title = f"# {metadata['network']} for {metadata['data']['name']}\n\n"
    names = _cell(", ".join(metadata["class_names"]))
    return f"{title}| | |\n|---|---|\n" + "\n".join(lines) + f"\n{use}\n## Classes\n\n{names}\n"


def _cell(text: str) -> str:
    """Class names are the data's, and may hold what Markdown takes for its own."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
@job
def main(cfg: DictConfig) -> None:
    """Write the file and its card, and tell how the file compares with the student."""
    form = Form.parse(cfg.format, cfg.precision)
    check_ranges(cfg)
    run_cfg, distiller, data = load(cfg)
    out = Path(cfg.out or Path(cfg.run or Path(cfg.checkpoint).parent) / "export").expanduser()
    file = out / form.file_name
    network, metadata = classifier(distiller), describe(cfg, run_cfg, distiller, data)
    images, target = some_test_images(data, cfg.images)
    ours = answers(network, images)
    example = some_training_images(data, cfg.calibration_images if form.precision == "int8" else 1)
    exported = export(network, file, form, example, metadata, images, ours)
    check = compare(ours, exported, target)
    write_text(Path(f"{file}.md"), card(file, form, metadata, check))
    log.info("Written: %s, %s bytes, and %s.md", file, f"{file.stat().st_size:,}", file.name)
    log.info("%s in %s: %s.", form, RUNTIMES[form.format], check)


if __name__ == "__main__":
    run_command(main)
