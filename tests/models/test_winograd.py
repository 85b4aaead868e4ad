"""Winograd's algorithm computes the same convolutions, for students and teachers."""

import copy
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from src.common.errors import UserError
from src.data.array_file import load_arrays
from src.models.checkpoints import load_weights
from src.models.mobilenet_v2 import MobileNetV2
from src.models.resnet import resnet8x4, resnet20_option_a
from src.models.wide_resnet import wrn_16_2
from src.models.winograd import SOURCE, Winograd, WinogradConv2d, check_winograd, use_winograd, weight_points
from src.runs import fingerprints
from src.teachers.teacher import Teacher
from tests.helpers.commands import assert_refused, run
from tests.helpers.tiny import by_threads, kd, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="winograd=true needs a C++ compiler")
ROUNDING = 1e-5


def relative_error(found: Any, expected: Any) -> float:
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
def test_outputs_and_gradients_match_torch(batch, height, width, inputs, outputs, biased, threads, seed):
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
    expected = F.conv2d(exact[0], exact[1], exact[2] if biased else None, padding=1)
    expected.backward(gradient.double())
    assert output.shape == expected.shape
    assert relative_error(output, expected) < ROUNDING
    for value, reference in zip(given_values, exact, strict=True):
        assert relative_error(value.grad, reference.grad) < ROUNDING


def test_its_output_may_be_overwritten_and_a_batch_may_be_empty():
    convolution: Any = WinogradConv2d(nn.Conv2d(16, 16, 3, padding=1), frozen=False)
    images = torch.randn(2, 16, 8, 8)
    F.relu(convolution(images), inplace=True).sum().backward()
    expected = F.conv2d(images, convolution.weight, convolution.bias, padding=1).relu().sum()
    torch.testing.assert_close(convolution.bias.grad, torch.autograd.grad(expected, convolution.bias)[0])
    assert convolution(images[:0]).shape == (0, 16, 8, 8)
    with pytest.raises(ValueError, match="images have 8 channels and the weight has 16"):
        convolution(images[:, :8])


def test_the_output_depends_neither_on_the_batch_size_nor_on_the_number_of_threads():
    images, weight = torch.randn(9, 32, 10, 6), torch.randn(16, 32, 3, 3)
    expected = Winograd.apply(images, weight, None, None)
    assert torch.equal(Winograd.apply(images[4:5], weight, None, None), expected[4:5])
    with by_threads(torch.get_num_threads() + 2):
        several = Winograd.apply(images, weight, None, weight_points(weight))
    assert torch.equal(several, expected)


def test_convolutions_that_do_not_fit_are_kept():
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
def test_a_student_keeps_its_names_and_is_evaluated_by_the_direct_sum(new_network, fitting, caplog):
    network = new_network(4)
    names, parameters = [*network.state_dict()], [*map(id, network.parameters())]
    images = torch.randn(2, 3, 32, 32)
    expected = network.eval()(images)
    assert use_winograd(network, frozen=False) == fitting
    assert ("changes nothing" in caplog.text) == (fitting == 0)
    assert [*network.state_dict()] == names
    assert [*map(id, network.parameters())] == parameters
    assert torch.equal(network(images), expected)


def test_a_teachers_logits_agree_up_to_rounding_and_have_another_cache_key():
    plain, teacher = tiny_teacher(), tiny_teacher()
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    teacher.fold((3, 16, 16))
    folded = teacher.key
    teacher.use_winograd()
    assert teacher.winograd == 10
    found, expected = teacher.logits(images), plain.logits(images)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert teacher.digest == plain.digest
    assert len({teacher.key, folded, plain.key}) == 3
    teacher.check_unchanged()
    teacher.to(torch.device("cpu"), torch.channels_last)
    torch.testing.assert_close(teacher.logits(images), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(copy.deepcopy(teacher.network).eval()(images.float()), teacher.network(images.float()))


def test_training_is_reproducible_and_agrees_up_to_rounding_with_the_direct_sum(tmp_path):
    data = tiny_data(tmp_path, batch_size=40)  # more steps would amplify the rounding
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


def test_a_run_is_evaluated_by_the_direct_sum_with_the_same_result(tmp_path, array_file):
    small = ("data=cifar10", f"data.path={array_file}", "model=resnet20_to_resnet8", "trainer=debug", "logger=none")
    places = (f"runs={tmp_path / 'runs'}", f"teacher.store={tmp_path / 'teachers'}", "schedule.batch_size=8")
    quick = ("winograd=true", "teacher.winograd=true", "teacher.fold=true", "teacher.view_store=true")
    with patch.object(Winograd, "forward", side_effect=Winograd.forward) as asked:
        trained = run("train", *small, *places, *quick, "method=kd")
    assert (trained.code, trained.err) == (0, ""), trained.err
    points_known = {call.args[-1] is not None for call in asked.call_args_list}
    assert points_known == {False, True}, "the points of a teacher are known, those of a student are not"
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
def test_a_trained_teacher_keeps_its_predictions(real_data: Path):
    network = resnet20_option_a(10)
    load_weights(network, real_data / "teachers" / "resnet20_cifar10_option_a.th")
    images = load_arrays(real_data / "cifar10.npz").test_images[:1000]
    teacher = Teacher(network, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = teacher.logits(images)
    teacher.use_winograd()
    found = teacher.logits(images)
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_cpp_file_is_part_of_the_code_digest(tmp_path, monkeypatch):
    copied = ["common/errors.py", "common/files.py", "models/native.py", "models/winograd.py", "models/winograd.cpp"]
    for file in copied:
        (tmp_path / "src" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCE.parents[1] / file, tmp_path / "src" / file)
    monkeypatch.setattr(fingerprints, "PACKAGE", tmp_path / "src")
    before = fingerprints.code_digest(["src.models.winograd"])
    with (tmp_path / "src" / "models" / "winograd.cpp").open("a") as kernels:
        kernels.write("// changed")
    assert fingerprints.code_digest(["src.models.winograd"]) != before


def test_other_dtypes_than_float32_are_refused():
    with pytest.raises(TypeError, match=r"float32 on a CPU, not torch\.float64 on cpu"):
        Winograd.apply(torch.randn(1, 16, 4, 4).double(), torch.randn(16, 16, 3, 3).double(), None, None)


def test_a_gpu_is_refused():
    with pytest.raises(UserError, match="work on a CPU only"):
        check_winograd(torch.device("cuda"))


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["winograd=true", "compile=true"], "winograd=true and compile=true exclude each other"),
        (
            ["winograd=true", "trainer.precision=bf16-mixed"],
            "winograd=true computes in float32, but the precision is bf16-mixed",
        ),
        (
            ["teacher.winograd=true", "teacher.precision=bfloat16"],
            "teacher.winograd=true computes in float32, but the precision is bfloat16",
        ),
    ],
)
def test_options_that_exclude_it_are_refused(tmp_path, options, phrase):
    assert_refused(run("train", "experiment=quickstart", f"runs={tmp_path}", "trainer=cpu", *options), phrase)
