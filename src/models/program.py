"""Classifiers that come with their own code: TorchScript and torch.export files."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import UserError
from src.models.network import Network, Output


class Program(Network):
    """A loaded program as a network that only answers: it cannot be trained, has no features and no classifier layer.

    The digest of its file stands among its buffers, for `weights_digest`: a frozen program names no weights.
    """

    file_digest: Tensor

    def __init__(self, program: Any, digest: bytes) -> None:
        super().__init__()
        self.program = program
        self.register_buffer("file_digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        self.place = nn.Parameter(torch.empty(0))  # every network can be asked for its device and dtype
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "Program":
        """Nothing changes inside the program."""
        self.training = mode
        return self

    @property
    def classifier_layer(self) -> nn.Linear:
        """Raises `UserError`."""
        raise UserError(
            "A program (TorchScript or torch.export) has no classifier to ask for: give a network's weights."
        )

    def forward_features(self, images: Tensor) -> Output:
        """Logits; no features; pooled features [B, 0]."""
        return Output(self(images), (), images.new_empty(len(images), 0))

    def forward(self, images: Tensor) -> Tensor:
        """Logits. Raises `UserError` where the program was exported for another shape or answers something else."""
        shape = list(images.shape)
        try:
            logits = self.program(images)
        except AssertionError as error:  # a guard of torch.export
            raise UserError(f"The program does not take {shape} ({error}): export it for that, any batch.") from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            raise UserError(f"The program does not answer {shape} by logits [B, C]: give a classifier.")
        return logits


def load_program(path: Path) -> Program:
    """A TorchScript or torch.export classifier, frozen, on the CPU.

    Loading executes code from the file: call this only where the user has said that the file is trusted. Raises
    `UserError` where the file is missing, damaged or no program.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: give a TorchScript or torch.export file.")
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name.rsplit("/", 1)[-1] for name in archive.namelist()}
        if members & {"archive_format", "serialized_exported_program.json"}:
            program = torch.export.load(io.BytesIO(content)).module()
        elif "constants.pkl" in members:
            program = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
        else:
            raise UserError(f"{path} is no program: leave teacher.allow_program out to read it as weights.")
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in every way that readers of zip, JSON and code can
        raise UserError(f"{path} is damaged or no program ({type(error).__name__}): get it again.") from error
    return Program(program, hashlib.sha256(content).digest())
