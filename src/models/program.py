"""Classifiers whose file contains their code: TorchScript and torch.export programs."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.common.files import describe_foreign
from src.models.network import Network, Output


class Program(Network):
    """A loaded program, as a network that can only be evaluated.

    It cannot be trained, and has neither features nor a classifier layer. The digest of its file is one of its buffers,
    and thereby part of its `weights_digest`, because a frozen program does not list its weights.
    """

    file_digest: Tensor

    def __init__(self, program: Any, digest: bytes) -> None:
        super().__init__()
        self.program = program
        self.register_buffer("file_digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        self.place = nn.Parameter(torch.empty(0))  # callers read a network's device and dtype from a parameter
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "Program":
        """Set the mode of this module. The program itself does not change."""
        self.training = mode
        return self

    @property
    def classifier_layer(self) -> nn.Linear:
        """Raise `UserError`: a program has no classifier layer."""
        raise UserError(
            "A program (TorchScript or torch.export) has no classifier layer: give the weights of a network instead."
        )

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits. There are no features, and the pooled features have shape [B, 0]."""
        return Output(self(images), (), images.new_empty(len(images), 0))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, C] of normalised images [B, 3, H, W].

        Raises `UserError` if the program was exported for another shape, or if it returns anything but logits.
        """
        shape = list(images.shape)
        try:
            logits = self.program(images)
        except AssertionError as error:  # a guard of torch.export
            raise UserError(
                f"The program does not accept images of shape {shape} ({error}): export it for this image size and any "
                "batch size."
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            raise UserError(f"The program returns no logits [B, C] for images of shape {shape}: give a classifier.")
        return logits


def _refuse_own_export(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise `UserError` for a file of `src.export`, which normalises its images itself, as a teacher does."""
    found = [archive.read(name) for name in archive.namelist() if name.endswith("/metadata.json")]
    if any(b"normalisation" in content and b"inside" in content for content in found):
        raise UserError(
            f"{path} was exported by src.export and normalises images itself: give student.pth of its run instead, "
            "without teacher.allow_program=true."
        )


def load_program(path: Path) -> Program:
    """Load a TorchScript or torch.export classifier, frozen, on the CPU.

    Loading executes code from the file, so call this only if the user has declared the file trusted. Raises `UserError`
    if the file is missing, damaged or not a program.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a TorchScript or torch.export file.")
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name.rsplit("/", 1)[-1] for name in archive.namelist()}
            _refuse_own_export(path, archive)
        if members & {"archive_format", "serialized_exported_program.json"}:
            program = torch.export.load(io.BytesIO(content)).module()
        elif "constants.pkl" in members:
            program = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
        else:
            raise UserError(f"{path} is not a program: set teacher.allow_program=false to read it as weights.")
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise any exception of the zip, JSON and code readers
        if not zipfile.is_zipfile(path) and (foreign := describe_foreign(path)):
            raise UserError(f"{path} is not a program, but {foreign}.") from error
        raise UserError(f"{path} is damaged or not a program ({type(error).__name__}): get the file again.") from error
    return Program(program, hashlib.sha256(content).digest())
