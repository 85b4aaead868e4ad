"""Methods with a mistake each, and the sentence that the dry run says about it."""

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.methods.method import LogitMethod, Method, Stage


class CrossEntropy(Method):
    """A method without mistakes."""

    def weights(self, epoch):
        return {"cross_entropy": 1.0}

    def terms(self, batch):
        return {"cross_entropy": F.cross_entropy(batch.student.logits, batch.target)}


class TermWithoutWeight(CrossEntropy):
    def terms(self, batch):
        return {**super().terms(batch), "forgotten": batch.student.logits.mean()}


class WeightWithoutTerm(CrossEntropy):
    def weights(self, epoch):
        return {**super().weights(epoch), "forgotten": 1.0}


class OneTermForEachImage(CrossEntropy):
    def terms(self, batch):
        return {"cross_entropy": F.cross_entropy(batch.student.logits, batch.target, reduction="none")}


class TermOfTheWrongType(CrossEntropy):
    def terms(self, batch):
        return {"cross_entropy": super().terms(batch)["cross_entropy"].item()}


class TermsWithoutNames(CrossEntropy):
    def terms(self, batch):
        return super().terms(batch)["cross_entropy"]


class MissingKey(CrossEntropy):
    def terms(self, batch):
        return {"cross_entropy": {"student": 0}["logits"]}  # the line of this mistake is part of the sentence


class WrongShape(CrossEntropy):
    def terms(self, batch):
        return {"cross_entropy": F.cross_entropy(batch.student.logits[:, None], batch.target)}  # raised within torch


class NothingTrained(CrossEntropy):
    def terms(self, batch):
        return {"cross_entropy": F.cross_entropy(batch.teacher.logits, batch.target)}


class NoWeight(CrossEntropy):
    def weights(self, epoch):
        return {"cross_entropy": 0.0}


class FeaturesNotRequested(CrossEntropy):
    def terms(self, batch):
        return {"cross_entropy": batch.student.features[0].mean()}


class TeacherNotRequested(CrossEntropy):
    needs_teacher = False

    def terms(self, batch):
        return {"cross_entropy": batch.teacher.logits.mean()}


class MistakeInAStage(CrossEntropy):
    def stages(self):
        return (Stage("first", TermWithoutWeight(), epochs=1),)


class MistakeInAllocate(CrossEntropy):
    def allocate(self, networks):
        raise ValueError("no such size")


class MistakeInDistillation(LogitMethod):
    def weights(self, epoch):
        return {"cross_entropy": 1.0, "difference": 1.0}

    def distillation(self, logits, batch):
        return {"difference": (logits.student - logits.teacher).square()}


class DistillationWithoutNames(MistakeInDistillation):
    def distillation(self, logits, batch):
        return logits.student.mean()


class DistillationWithCrossEntropy(MistakeInDistillation):
    def distillation(self, logits, batch):
        return {"cross_entropy": logits.student.mean()}


class NoDistillation(LogitMethod):
    def weights(self, epoch):
        return {"cross_entropy": 1.0}


class WeightsWithoutNames(CrossEntropy):
    def weights(self, epoch):
        return [1.0]


class OneWeight(CrossEntropy):
    def weights(self, epoch):
        return {"cross_entropy": [1.0][epoch]}  # fails in the second epoch


class WeightsThatChange(CrossEntropy):
    def weights(self, epoch):
        return {"cross_entropy": 1.0} if epoch < 3 else {}


class NoWeightLater(CrossEntropy):
    def weights(self, epoch):
        return {"cross_entropy": float(epoch < 2)}


class TermThatComesLater(CrossEntropy):
    """A method that computes a term, and has its weight, from the second epoch on."""

    def weights(self, epoch):
        return super().weights(epoch) | ({"later": 1.0} if epoch else {})

    def terms(self, batch):
        return super().terms(batch) | ({"later": batch.student.logits.mean()} if batch.epoch else {})


class TermCalledLoss(CrossEntropy):
    def weights(self, epoch):
        return {"loss": 1.0}

    def terms(self, batch):
        return {"loss": batch.student.logits.mean()}


class NotANumber(CrossEntropy):
    def terms(self, batch):
        return {"cross_entropy": (batch.student.logits.mean() * 0) / 0}


class InfiniteButOff(CrossEntropy):
    def weights(self, epoch):
        return {**super().weights(epoch), "later": 0.0}

    def terms(self, batch):
        return {**super().terms(batch), "later": batch.student.logits.sum() / 0}


class ModuleInAList(CrossEntropy):
    def allocate(self, networks):
        self.adapters = [nn.Linear(4, 4)]

    def terms(self, batch):
        return {"cross_entropy": F.cross_entropy(self.adapters[0](batch.student.logits), batch.target)}


class ModuleMadeOnFirstUse(CrossEntropy):
    def terms(self, batch):
        self.adapter = nn.Linear(4, 4)
        return {"cross_entropy": F.cross_entropy(self.adapter(batch.student.logits), batch.target)}


class BrokenGradient(CrossEntropy):
    def terms(self, batch):
        power = batch.student.logits.exp()
        product = power * power
        power += 1
        return {"cross_entropy": product.mean()}


class PredictorOfOtherClasses(CrossEntropy):
    def predictor(self, student):
        return nn.Sequential(student, nn.Linear(4, 3))


class FewRows(CrossEntropy):
    """A memory bank with a row for each image of a batch, and not of the data."""

    def allocate(self, networks):
        self.bank = torch.zeros(8, 4)

    def terms(self, batch):
        self.bank[batch.index] = batch.student.logits.detach()  # too few rows
        return super().terms(batch)


class SomeNeighbours(CrossEntropy):
    """A method that needs more than a few images in a batch."""

    def terms(self, batch):
        distances = torch.cdist(batch.student.logits, batch.student.logits)
        return {"cross_entropy": distances.topk(9, largest=False).values.mean()}


class ZeroAtFirst(CrossEntropy):
    """A method with a term that is a constant until its memory is full."""

    def weights(self, epoch):
        return {**super().weights(epoch), "later": 1.0}

    def terms(self, batch):
        return {**super().terms(batch), "later": batch.student.logits.new_zeros(())}


class CountsCalls(CrossEntropy):
    """A method with a buffer that every call changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def terms(self, batch):
        self.calls += 1
        return super().terms(batch)


def line_of(method: type, text: str) -> int:
    lines, first = inspect.getsourcelines(method)
    return first + next(number for number, line in enumerate(lines) if text in line)


HERE = "tests/helpers/mistaken_methods.py, line"
SCALAR = "return a scalar, such as the mean over the batch."
WITHOUT_WEIGHT = "The method computes the term 'forgotten', but its weights() lacks it: add its weight there."
MISTAKES: dict[type[Method], str] = {
    TermWithoutWeight: WITHOUT_WEIGHT,
    WeightWithoutTerm: (
        "The method's weights() has 'forgotten', but no term has this name: remove it or compute the term."
    ),
    OneTermForEachImage: f"The method's term 'cross_entropy' is a tensor of shape [8]: {SCALAR}",
    TermOfTheWrongType: f"The method's term 'cross_entropy' is a float: {SCALAR}",
    TermsWithoutNames: "The method's terms are a tensor of shape []: return a dict of scalar tensors by name.",
    NothingTrained: "The method's terms depend on nothing that is trained: compute them from the student's output.",
    NoWeight: "The method's weights are all 0 in epoch 0: raise the weight of at least one term.",
    FeaturesNotRequested: (
        "The method reads features without asking for them: set needs_features = True in its class."
    ),
    TeacherNotRequested: (
        "The method reads the teacher, but its class sets needs_teacher or reads_teacher to False: set it to True."
    ),
    MistakeInAStage: WITHOUT_WEIGHT,
    MistakeInDistillation: f"The method's term 'difference' is a tensor of shape [8, 4]: {SCALAR}",
    DistillationWithoutNames: ("The method's terms are a tensor of shape []: return a dict of scalar tensors by name."),
    DistillationWithCrossEntropy: (
        "The method's distillation returns cross_entropy, which is added for it: leave it out."
    ),
    WeightsWithoutNames: "The method's weights() returns a list: return a dict of numbers by term.",
    WeightsThatChange: (
        "The method computes the term 'cross_entropy', but its weights() lacks it: add its weight there."
    ),
    NoWeightLater: "The method's weights are all 0 in epoch 2: raise the weight of at least one term.",
    TermCalledLoss: "The method's term 'loss' has the name of the sum of all terms: choose another name.",
    PredictorOfOtherClasses: (
        "The method's predictor returns a tensor of shape [2, 3]: return logits of shape [2, 4]."
    ),
}
FAILURES: dict[type[Method], str] = {
    MissingKey: f"KeyError: 'logits' in {HERE} {line_of(MissingKey, 'the line of this mistake')}.",
    WrongShape: f" in {HERE} {line_of(WrongShape, 'raised within torch')}.",
    MistakeInAllocate: f"ValueError: no such size in {HERE} {line_of(MistakeInAllocate, 'no such size')}.",
    OneWeight: f"IndexError: list index out of range in {HERE} {line_of(OneWeight, 'second epoch')}.",
    FewRows: f" is out of bounds for dimension 0 with size 8 in {HERE} {line_of(FewRows, 'too few rows')}.",
    BrokenGradient: "one of the variables needed for gradient computation has been modified by an inplace operation",
    NoDistillation: "NotImplementedError: NoDistillation defines no distillation() in src/methods/method.py, line",
}
