"""The teacher is frozen by construction: each clause of it."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from src.errors import UserError
from src.methods.dkd import DKD
from src.models.checkpoints import weights_digest
from src.models.resnet import resnet8
from src.serialization import Serial
from src.teacher import Answers, Teacher, ViewStore
from tests.tiny import CLASSES, MEAN, STD, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


def dkd():
    return DKD(cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=4.0, warmup_epochs=1)


def test_training_leaves_the_teacher_as_it_was(tmp_path):
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    before, digest = weights(teacher.network), teacher.digest
    distiller = tiny_distiller(data, dkd(), teacher=teacher, serialization=Serial(0.1))
    tiny_trainer().fit(distiller, datamodule=data)
    assert same(before, weights(teacher.network))  # the running statistics of batch norm among them
    assert weights_digest(teacher.network) == digest
    assert not any(module.training for module in teacher.network.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.network.parameters())


def test_the_teacher_is_in_no_module_optimiser_or_checkpoint(tmp_path):
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    distiller = tiny_distiller(data, dkd(), teacher=teacher)
    trainer = tiny_trainer(
        1,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="last")],
        default_root_dir=tmp_path,
    )
    trainer.fit(distiller, datamodule=data)
    theirs = {id(p) for p in teacher.network.parameters()}
    assert not theirs & {id(p) for p in distiller.parameters()}  # so it is in no gradient bucket either
    assert not theirs & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"student.{name}" for name in distiller.student.state_dict()}


def test_train_mode_never_reaches_the_teacher(tmp_path):
    teacher = tiny_teacher()
    distiller = tiny_distiller(tiny_data(tmp_path), dkd(), teacher=teacher)
    distiller.train()
    assert not teacher.network.training
    teacher.network.train()
    with pytest.raises(AssertionError, match="train mode"):
        teacher(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_answers_carry_no_gradient_even_to_images_that_want_one():
    teacher = tiny_teacher()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert not teacher(images).logits.requires_grad
    assert not any(feature.requires_grad for feature in teacher(images).features)


def test_copies_and_weight_averages_share_the_teacher(tmp_path):
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    distiller = tiny_distiller(data, dkd(), teacher=teacher)
    assert copy.deepcopy(distiller).teacher is teacher
    averaging = WeightAveraging()
    tiny_trainer(1, callbacks=[averaging]).fit(distiller, datamodule=data)
    averaged = averaging._average_model
    assert averaged is not None
    assert averaged.module.teacher is teacher
    assert not any("teacher" in name for name, _ in averaged.named_parameters())


def test_the_teacher_is_fed_by_its_own_normalisation():
    network = resnet8(CLASSES).eval()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    teacher = Teacher(network, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = network((images / 255 - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(teacher(images).logits, expected, atol=1e-5, rtol=1e-5)


def test_answers_survive_their_file_and_damage_means_asking_again(tmp_path):
    answers = Answers(torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]))
    file = tmp_path / "teachers" / "answers.npz"
    answers.save(file)
    loaded = Answers.load(file)
    assert loaded is not None
    assert torch.equal(loaded.logits, answers.logits)
    assert torch.equal(loaded.target, answers.target)
    assert answers.predictions(7).tolist() == [*answers.logits.argmax(1).tolist(), -1, -1]
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"not a file of arrays"):
        file.write_bytes(damaged)
        assert Answers.load(file) is None
    np.savez(file, logits=np.array([object()]), target=np.zeros(1))
    assert Answers.load(file) is None
    assert Answers.load(tmp_path / "none.npz") is None


def test_scores_of_answers_are_the_definition():
    logits = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0], [0, 4.0, 0]])
    assert Answers(logits, torch.tensor([0, 1, 0, 1])).scores()["accuracy"] == pytest.approx(0.75)


class Counting:
    """A teacher that counts the images it is asked about."""

    def __init__(self, teacher):
        self.asked = 0
        network = teacher.network.forward_features

        def forward_features(images):
            self.asked += len(images)
            return network(images)

        teacher.network.forward_features = forward_features


def test_the_view_store_asks_once_and_answers_alike(tmp_path):
    teacher, images = tiny_teacher(), torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    index, views = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([0, 7, 7, 3, 1, 49])
    expected = teacher(images).logits
    count = Counting(teacher)
    teacher.store = ViewStore(tmp_path / "a.views", 10, 50, CLASSES)
    assert torch.equal(teacher.view_logits(images, index, views), expected)
    assert count.asked == 6
    teacher.store = ViewStore(tmp_path / "a.views", 10, 50, CLASSES)  # as another process finds it
    assert torch.equal(teacher.view_logits(images, index, views), expected)
    assert count.asked == 6
    other_views = views.clone()
    other_views[2] = 8
    torch.testing.assert_close(teacher.view_logits(images, index, other_views), expected, atol=1e-5, rtol=1e-5)
    assert count.asked == 7


def test_a_torn_row_of_the_view_store_is_asked_again(tmp_path):
    teacher, images = tiny_teacher(), torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    store = teacher.store = ViewStore(tmp_path / "a.views", 2, 2, CLASSES)
    place = torch.tensor([1])
    expected = teacher.view_logits(images, place, place)
    store.answers[1, 1, CLASSES - 1] = 0
    assert torch.equal(teacher.view_logits(images, place, place), expected)
    assert torch.equal(store.read(place, place)[0], expected)


def test_a_view_store_that_cannot_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"teacher\.view_store needs .* set it to false"):
        ViewStore(tmp_path / "a.views", 10**12, 162, 1000)
    assert not (tmp_path / "a.views").exists()


def test_normalisation_constants_are_the_students_in_this_data():
    assert tiny_teacher().mean == MEAN
    assert tiny_teacher().std == STD
