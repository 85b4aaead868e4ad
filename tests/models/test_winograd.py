"""winograd=true, teacher.winograd=true: the same convolutions, quicker."""

import copy
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import src.run
from src import native
from src.data.arrays import load_arrays
from src.errors import UserError
from src.models.checkpoints import load_weights
from src.models.mobilenet_v2 import MobileNetV2
from src.models.resnet import resnet8x4, resnet20_option_a
from src.models.wide_resnet import wrn_16_2
from src.models.winograd import SOURCE, Winograd, WinogradConv2d, check_winograd, use_winograd, weight_points
from src.teacher import Teacher
from tests.commands import assert_refused, run
from tests.test_view_store import kd
from tests.tiny import by_threads, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="winograd=true needs a C++ compiler")
ROUNDING = 1e-5


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 5),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    inputs=st.sampled_from([16, 32, 48]),
    outputs=st.sampled_from([16, 32, 64]),
    biased=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_convolution_and_so_are_its_gradients(batch, height, width, inputs, outputs, biased, threads, seed):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, inputs, height, width, generator=draw, requires_grad=True)
    weight = torch.randn(outputs, inputs, 3, 3, generator=draw, requires_grad=True)
    bias = torch.randn(outputs, generator=draw, requires_grad=True) if biased else None
    gradient = torch.randn(batch, outputs, height, width, generator=draw)
    with by_threads(threads):
        output = Winograd.apply(images, weight, bias, None)
        output.backward(gradient)

    given_values = [value for value in (images, weight, bias) if value is not None]
    exact = [value.detach().double().requires_grad_() for value in given_values]
    expected = F.conv2d(*exact, padding=1)
    expected.backward(gradient.double())
    assert output.shape == expected.shape
    assert relative_error(output, expected) < ROUNDING
    for value, reference in zip(given_values, exact, strict=True):
        assert relative_error(value.grad, reference.grad) < ROUNDING


def test_what_follows_may_overwrite_its_answer_and_no_images_give_none():
    convolution = WinogradConv2d(nn.Conv2d(16, 16, 3, padding=1), frozen=False)
    images = torch.randn(2, 16, 8, 8)
    F.relu(convolution(images), inplace=True).sum().backward()
    expected = F.conv2d(images, convolution.weight, convolution.bias, padding=1).relu().sum()
    torch.testing.assert_close(convolution.bias.grad, torch.autograd.grad(expected, convolution.bias)[0])
    assert convolution(images[:0]).shape == (0, 16, 8, 8)
    with pytest.raises(ValueError, match="images of 8 channels for a weight of 16"):
        convolution(images[:, :8])


def test_an_answer_depends_neither_on_the_batch_nor_on_the_threads():
    images, weight = torch.randn(9, 32, 10, 6), torch.randn(16, 32, 3, 3)
    expected = Winograd.apply(images, weight, None, None)
    assert torch.equal(Winograd.apply(images[4:5], weight, None, None), expected[4:5])
    with by_threads(torch.get_num_threads() + 2):
        several = Winograd.apply(images, weight, None, weight_points(weight))
    assert torch.equal(several, expected)


def test_what_it_does_not_compute_stays():
    kept = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(16, 16, 3, padding=1),
    ]
    network = nn.Sequential(*kept, nn.Conv2d(16, 16, 3, padding=1))
    assert use_winograd(network, frozen=False) == 1
    assert [*network][:-1] == kept
    assert isinstance(network[-1], WinogradConv2d)


@pytest.mark.parametrize(("new_network", "fitting"), [(wrn_16_2, 10), (resnet8x4, 4), (MobileNetV2, 0)])
def test_names_and_parameters_stay_and_evaluation_is_by_the_direct_sum(new_network, fitting, caplog):
    network = new_network(4)
    names, parameters = [*network.state_dict()], [*map(id, network.parameters())]
    images = torch.randn(2, 3, 32, 32)
    expected = network.eval()(images)
    assert use_winograd(network, frozen=False) == fitting
    assert ("changes nothing" in caplog.text) == (fitting == 0)
    assert [*network.state_dict()] == names
    assert [*map(id, network.parameters())] == parameters
    assert torch.equal(network(images), expected)


def test_a_teacher_answers_up_to_rounding_and_under_a_key_of_its_own():
    plain, teacher = tiny_teacher(), tiny_teacher()
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    teacher.fold((3, 16, 16))
    folded = teacher.key
    teacher.use_winograd()
    assert teacher.winograd == 10
    said, expected = teacher.logits(images), plain.logits(images)
    assert not torch.equal(said, expected)
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-4)
    assert teacher.digest == plain.digest
    assert len({teacher.key, folded, plain.key}) == 3
    teacher.check_unchanged()
    teacher.to(torch.device("cpu"), torch.channels_last)
    torch.testing.assert_close(teacher.logits(images), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(copy.deepcopy(teacher.network).eval()(images.float()), teacher.network(images.float()))


def test_a_student_learns_the_same_twice_and_up_to_rounding_the_same_as_without(tmp_path):
    data = tiny_data(tmp_path, batch_size=40)  # more steps would multiply the rounding
    plain, *others = (tiny_distiller(data, kd(), teacher=tiny_teacher()) for _ in range(3))
    for distiller in others:
        use_winograd(distiller.student, frozen=False)
    for distiller in (plain, *others):
        tiny_trainer(1).fit(distiller, datamodule=data)
    expected, found, again = map(weights, (plain, *others))
    assert same(found, again)
    assert not same(found, expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_a_run_by_it_is_scored_the_same_again(tmp_path, array_file):
    small = ("data=cifar10", f"data.path={array_file}", "model=resnet20_to_resnet8", "trainer=debug", "logger=none")
    places = (f"runs={tmp_path / 'runs'}", f"teacher.store={tmp_path / 'teachers'}", "schedule.batch_size=8")
    quick = ("winograd=true", "teacher.winograd=true", "teacher.fold=true", "teacher.view_store=true")
    with patch.object(Winograd, "forward", side_effect=Winograd.forward) as asked:
        trained = run("train", *small, *places, *quick, "method=kd")
    assert (trained.code, trained.err) == (0, ""), trained.err
    points_known = {call.args[-1] is not None for call in asked.call_args_list}
    assert points_known == {False, True}, "those of a student and of a teacher"
    (student,) = (tmp_path / "runs").glob("*/*/kd/*/student.pth")
    with patch.object(Winograd, "forward", side_effect=AssertionError("evaluated by Winograd's algorithm")):
        scored = run("evaluate", f"run={student.parent}", f"data.path={array_file}")
    assert (scored.code, scored.err) == (0, ""), scored.err
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in scored.out.splitlines() if "│" in line]
    assert [name for name, *_ in rows] == ["accuracy", "ece", "nll", "top5", "agreement"]
    assert all(now == reported for _, now, reported in rows)
    few = ("forms=[torchscript]", "images=60", "calibration_images=40", "rounds=1", f"out={tmp_path / 'measured'}")
    measured = run("measure", f"run={student.parent}", f"data.path={array_file}", *few)
    assert (measured.code, measured.err) == (0, ""), measured.err


@pytest.mark.slow
@torch.inference_mode()
def test_a_trained_teacher_keeps_its_answers():
    folder = os.environ.get("AEKT_DATA")
    if folder is None:
        pytest.skip("AEKT_DATA names no folder with cifar10.npz and teachers/")
    network = resnet20_option_a(10)
    load_weights(network, Path(folder) / "teachers" / "resnet20_cifar10_option_a.th")
    images = load_arrays(Path(folder) / "cifar10.npz").test_images[:1000]
    teacher = Teacher(network, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = teacher.logits(images)
    teacher.use_winograd()
    said = teacher.logits(images)
    assert torch.equal(said.argmax(dim=1), expected.argmax(dim=1))
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=0)


def test_its_kernels_are_part_of_the_code_that_a_run_names(tmp_path, monkeypatch):
    for file in ("native.py", "errors.py", "files.py", "models/winograd.py", "models/winograd.cpp"):
        (tmp_path / "src" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCE.parents[1] / file, tmp_path / "src" / file)
    monkeypatch.setattr(src.run, "PACKAGE", tmp_path / "src")
    before = src.run.code_digest(["src.models.winograd"])
    with (tmp_path / "src" / "models" / "winograd.cpp").open("a") as kernels:
        kernels.write("// changed")
    assert src.run.code_digest(["src.models.winograd"]) != before


def test_other_numbers_than_float32_are_not_taken():
    with pytest.raises(TypeError, match=r"float32 on a CPU, not for torch\.float64"):
        Winograd.apply(torch.randn(1, 16, 4, 4).double(), torch.randn(16, 16, 3, 3).double(), None, None)


def test_a_gpu_is_refused():
    with pytest.raises(UserError, match="are for a CPU; a GPU has its own"):
        check_winograd(torch.device("cuda"))


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["winograd=true", "compile=true"], "winograd=true is not for a student of compile=true"),
        (["winograd=true", "trainer.precision=bf16-mixed"], "winograd=true computes in float32 and does not fit"),
        (["teacher.winograd=true", "teacher.precision=bfloat16"], "teacher.winograd=true computes in float32"),
    ],
)
def test_what_it_does_not_go_with_is_refused(tmp_path, options, phrase):
    assert_refused(run("train", "experiment=quickstart", f"runs={tmp_path}", "trainer=cpu", *options), phrase)


def test_a_library_is_compiled_once_and_one_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CACHE", tmp_path / "cache")
    compiling = native.library.__wrapped__
    first = compiling(SOURCE)
    assert first.convolve_work(1, 4, 4, 16, 16, 1) > 0
    with patch.object(native, "_compile", side_effect=AssertionError("compiled again")):
        compiling(SOURCE)
    broken = tmp_path / "broken.cpp"
    broken.write_text("not C++")
    with pytest.raises(UserError, match=r"cannot compile broken\.cpp: .*error"):
        compiling(broken)
    assert not [*(tmp_path / "cache").glob("*broken*.so")]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"broken\.cpp needs a C\+\+ compiler, and there is no c\+\+"):
        compiling(broken)
