"""Programs give the logits of the network that they were exported from. Other files are refused."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.exporting.forms import Form, write_form
from src.models.checkpoints import load_weights, weights_digest
from src.models.network import measure_shapes
from src.models.program import load_program
from tests.helpers.exports import random_classifier

IMAGES = torch.randn(2, 3, 16, 16)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    network = Small()
    network(torch.randn(4, 3, 16, 16))
    return network.eval()


def write(form: str, network: nn.Module, folder: Path) -> Path:
    file = folder / ("program.pt2" if form == "export" else "program.pt")
    if form == "export":
        sizes = {0: torch.export.Dim("batch")}
        torch.export.save(torch.export.export(network, (IMAGES,), dynamic_shapes=(sizes,)), file)
        return file
    traced = torch.jit.trace(network, IMAGES)
    torch.jit.save(torch.jit.freeze(traced) if form == "frozen" else traced, file)
    return file


@pytest.mark.parametrize("form", ["script", "frozen", "export"])
def test_a_program_gives_the_logits_of_its_network(form: str, network: nn.Module, tmp_path: Path):
    program = load_program(write(form, network, tmp_path))
    for images in (IMAGES, torch.randn(5, 3, 16, 16)):
        torch.testing.assert_close(program(images), network(images))
    output = program.forward_features(IMAGES)
    assert torch.equal(output.logits, program(IMAGES))
    assert output.features == ()
    assert output.pooled.shape == (2, 0)
    assert measure_shapes(program, (3, 16, 16)) == (10, (), 0)
    assert not output.logits.requires_grad


@pytest.mark.parametrize("form", ["script", "export"])
def test_train_mode_does_not_change_a_program(form: str, network: nn.Module, tmp_path: Path):
    program = load_program(write(form, network, tmp_path))
    expected = program(IMAGES)
    assert program.train().training
    program(torch.randn(8, 3, 16, 16))
    assert torch.equal(program(IMAGES), expected)
    assert not program.eval().training
    assert not any(parameter.requires_grad for parameter in program.parameters())
    assert torch.equal(copy.deepcopy(program)(IMAGES), expected)


@pytest.mark.parametrize("form", ["script", "frozen", "export"])
def test_different_programs_have_different_digests(form: str, network: nn.Module, tmp_path: Path):
    file = write(form, network, tmp_path)
    digest = weights_digest(load_program(file))
    assert weights_digest(load_program(file)) == digest
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert weights_digest(load_program(write(form, other, tmp_path))) != digest


@pytest.mark.parametrize("form", ["script", "export"])
def test_weights_keep_their_names(form: str, network: nn.Module, tmp_path: Path):
    state = load_program(write(form, network, tmp_path)).state_dict()
    assert all(torch.equal(state[f"program.{name}"], value) for name, value in network.state_dict().items())


def test_a_program_has_no_classifier_layer(network: nn.Module, tmp_path: Path):
    program = load_program(write("script", network, tmp_path))
    with pytest.raises(UserError, match=r"program .* has no classifier layer"):
        _ = program.classifier_layer
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="no classifier layer"):
        load_weights(program, tmp_path / "weights.pth")


def test_a_program_for_one_batch_size_refuses_another(network: nn.Module, tmp_path: Path):
    torch.export.save(torch.export.export(network, (IMAGES,)), tmp_path / "two.pt2")
    program = load_program(tmp_path / "two.pt2")
    program(IMAGES)
    with pytest.raises(UserError, match=r"does not accept images of shape \[3, 3, 16, 16\] \(Guard failed"):
        program(torch.randn(3, 3, 16, 16))


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


class Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten()


@pytest.mark.parametrize("module", [Pair(), nn.Identity(), Flat()], ids=lambda module: type(module).__name__)
def test_a_program_without_logits_is_refused(module: nn.Module, tmp_path: Path):
    program = load_program(write("script", module, tmp_path))
    with pytest.raises(UserError, match=r"returns no logits \[B, C\] for images of shape \[2, 3, 16, 16\]"):
        program(IMAGES)


@pytest.mark.parametrize("form", ["script", "export"])
def test_damaged_files_are_refused(form: str, network: nn.Module, tmp_path: Path):
    file = write(form, network, tmp_path)
    content = file.read_bytes()
    inside = content.replace(b"graph_module", b"graph mod le") if form == "export" else content.replace(b"fc", b"zz")
    assert inside != content
    for damaged in (b"hello", content[: len(content) // 2], content[:-1], inside):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file.name} is damaged or not a program") as error:
            load_program(file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "form"), [("a.pt", "torchscript"), ("a.pt2", "exported_program")])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchScript is deprecated
def test_an_export_of_this_project_is_refused(name: str, form: str, tmp_path: Path):
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    metadata = {"normalisation": "inside"}
    write_form(random_classifier(), tmp_path / name, Form(form, "float32"), images, metadata)
    with pytest.raises(UserError, match=rf"{name} was exported by src\.export and normalises images itself"):
        load_program(tmp_path / name)


def test_other_files_are_refused(network: nn.Module, tmp_path: Path):
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth is not a program"):
        load_program(tmp_path / "weights.pth")
    with pytest.raises(UserError, match="is not a file"):
        load_program(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match="is not a file"):
        load_program(tmp_path)
