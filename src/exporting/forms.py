"""The forms of an exported student: write a file in one of them, and load it in its own runtime."""

import copy
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.data.views import normalise
from src.exporting import on_device
from src.training.distiller import Distiller

SUFFIXES = {
    "onnx": ".onnx",
    "executorch": ".pte",
    "exported_program": ".pt2",
    "torchscript": ".pt",
    "safetensors": ".safetensors",
    "hub": "",
}
"""The suffix of the file of each format. `hub` is a folder, which `src/exporting/hub.py` writes and loads."""
RUNTIMES = {
    "onnx": "onnxruntime",
    "executorch": "executorch",
    "exported_program": "torch",
    "torchscript": "torch",
    "safetensors": "safetensors",
    "hub": "torch",
}
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""The dtype in which the written network computes. An int8 file is made from a float32 file."""
METADATA_FILE = "metadata.json"
"""The member of an exported program and of a TorchScript file that holds the metadata."""
BATCH = 64
"""Images per call when a file is checked, calibrated or timed."""

Predictor = Callable[[Tensor], Tensor]
"""Maps uint8 images [B, 3, H, W] to logits [B, C] float32."""


class Form(NamedTuple):
    """The format of a file, and the precision in which it computes.

    >>> form = Form.parse("onnx", "int8")
    >>> str(form), form.file_name
    ('onnx int8', 'student-int8.onnx')
    """

    format: str
    precision: str

    @classmethod
    def parse(cls, format: str, precision: str) -> "Form":
        """Make a form from the two options. Raises `UserError` if there is no such form."""
        if format not in SUFFIXES:
            raise UserError(f"format={format} is unknown: choose one of {', '.join(SUFFIXES)}.")
        if precision not in PRECISIONS:
            raise UserError(f"precision={precision} is unknown: choose one of {', '.join(PRECISIONS)}.")
        if precision == "int8" and format not in ("onnx", "executorch"):
            raise UserError(f"format={format} does not support precision=int8: use format=onnx or executorch.")
        if format == "executorch" and precision not in ("float32", "int8"):
            raise UserError(f"format=executorch does not support precision={precision}: use float32 or int8.")
        if (format, precision) == ("onnx", "bfloat16"):
            raise UserError("onnxruntime does not compute in bfloat16 on a CPU: use precision=float16 or int8.")
        if format == "hub" and precision != "float32":
            raise UserError(f"format=hub does not support precision={precision}: leave it out.")
        return cls(format, precision)

    def __str__(self) -> str:
        return self.format if self.precision == "float32" else f"{self.format} {self.precision}"

    @property
    def file_name(self) -> str:
        """The name of the file: student.onnx, student-int8.onnx, ... The name of the folder of `hub` is hub."""
        if self.format == "hub":
            return "hub"
        return "student" + ("" if self.precision == "float32" else f"-{self.precision}") + SUFFIXES[self.format]


class Classifier(nn.Module):
    """A network with its normalisation inside: it maps uint8 images [B, 3, H, W] to logits [B, C] float32."""

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to(dtype).to(memory_format=torch.contiguous_format)
        self.eval().requires_grad_(False)
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits."""
        logits: Tensor = self.network(normalise(images, self.mean, self.std).to(self.dtype))
        return logits.float()


def make_classifier(distiller: Distiller) -> Classifier:
    """Make a classifier of the network that predicts at inference: the student, or the method's own predictor."""
    predictor = distiller.method.predictor(distiller.student)
    return Classifier(predictor, distiller.settings.mean, distiller.settings.std)


def quantised(network: Classifier, images: Tensor) -> Classifier:
    """Return a classifier in int8 for ExecuTorch, with the ranges of activations for uint8 images [N, 3, H, W].

    The normalisation stays in float32. A classifier that is in int8 already is returned.
    """
    if isinstance(network.network, on_device.Graph):
        return network
    batches = (normalise(batch, network.mean, network.std) for batch in images.split(BATCH))
    return Classifier(on_device.quantise(network.network, batches), network.mean, network.std)


def import_extra(package: str, extra: str = "export") -> Any:
    """Import a package of an extra of pyproject.toml. Raises `UserError` if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{package.partition('.')[0]} is not installed: pip install -e '.[{extra}]'.") from error


def require_runtime(form: Form) -> None:
    """Import the package that runs a form. Raises `UserError` if it is missing."""
    import_extra(RUNTIMES[form.format], "executorch" if form.format == "executorch" else "export")


def write_form(network: nn.Module, file: Path, form: Form, example: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write a module that maps uint8 images like `example` [B, 3, H, W] to logits, for any batch size.

    An ExecuTorch file has a batch size of 1. For int8, `example` calibrates the quantisation. `metadata` is stored in
    the file, each value as JSON.
    """
    encoded = {key: json.dumps(value) for key, value in metadata.items()}
    two = example[:1].expand(2, -1, -1, -1).contiguous()  # torch.export would treat a batch size of 1 as a constant
    if form == ("onnx", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            _write_onnx(network, Path(folder) / "float.onnx", two, encoded)
            quantise_onnx(Path(folder) / "float.onnx", file, example)
    elif form.format == "onnx":
        _write_onnx(network, file, two, encoded)
    elif form.format == "executorch":
        require_runtime(form)
        module = quantised(cast(Classifier, network), example) if form.precision == "int8" else network
        on_device.write_program(module, file, example, encoded)
    elif form.format == "exported_program":
        torch.export.save(_export(network, two), file, extra_files={METADATA_FILE: json.dumps(encoded)})
    elif form.format == "torchscript":
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but the user chose it
            program = torch.jit.freeze(torch.jit.trace(network, two))
            torch.jit.save(program, str(file), _extra_files={METADATA_FILE: json.dumps(encoded)})
    else:
        tensors = {name: value.clone() for name, value in _weights(network).items()}
        # `save_file` makes a file that only its owner can read.
        file.write_bytes(import_extra("safetensors.torch").save(tensors, metadata=encoded))


def _export(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(network, (example,), dynamic_shapes={"images": batch})


def _write_onnx(network: nn.Module, file: Path, example: Tensor, metadata: Mapping[str, str]) -> None:
    for package in ("onnx", "onnxscript"):
        import_extra(package)
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


def quantise_onnx(float_file: Path, file: Path, images: Tensor, **options: Any) -> None:
    """Quantise after training by onnxruntime's own tool: weights per channel, activations by their observed range.

    Activations are unsigned and weights are signed, which is onnxruntime's fastest form (results/onnx_int8). Weights
    have 7 bits. With 8 bits, sums of products saturate on processors without VNNI, which costs accuracy: a SlimNet with
    67.8 % on 500 CIFAR-100 images has 60.8 % with 8 bits and 68.0 % with 7. `options` replace arguments of
    onnxruntime's `quantize_static`.
    """
    tool = import_extra("onnxruntime.quantization")
    preprocessing = import_extra("onnxruntime.quantization.shape_inference")

    class Reader(tool.CalibrationDataReader):  # type: ignore[name-defined, misc]
        batches: Iterator[Tensor] = iter(images.split(BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"images": batch.numpy()} for batch in self.batches), None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        preprocessing.quant_pre_process(float_file, prepared, skip_symbolic_shape=True)
        types = {"activation_type": tool.QuantType.QUInt8, "weight_type": tool.QuantType.QInt8}
        chosen = {**types, "per_channel": True, "reduce_range": True, **options}
        tool.quantize_static(prepared, file, Reader(), **chosen)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights under the names of student.pth, without the normalisation around the network."""
    inner = network.network if isinstance(network, Classifier) else network
    return inner.state_dict()


def load_form(file: Path, form: Form, network: nn.Module, threads: int = 1) -> Predictor:
    """Load an exported file in its own runtime. Weights alone are loaded into a copy of `network`.

    Raises `UserError` if the runtime is not installed, or if onnxruntime or executorch cannot load the file.
    """
    if form.format == "onnx":
        return _load_onnx(file, threads)
    if form.format == "executorch":
        require_runtime(form)
        return on_device.load_program(file, threads)
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
        inner.load_state_dict(import_extra("safetensors.torch").load_file(file))
    predictor: Predictor = torch.no_grad()(program)
    return predictor


def _load_onnx(file: Path, threads: int) -> Predictor:
    runtime = import_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each kind of failure
        raise UserError(f"onnxruntime cannot load {file} ({error}): export it again.") from error
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
