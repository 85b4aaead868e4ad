"""The customary code that the benchmarks compare with: DKD by masks, torchvision's loader, and a plain loop."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from torchvision import datasets, transforms
from torchvision.transforms import v2

from benchmarks.images import CLASSES
from benchmarks.timing import seconds_per_call
from src.data.array_data import ArrayData

AUGMENTATIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "standard": ([], []),
    "trivial": ([transforms.TrivialAugmentWide()], []),
    "randaugment": ([transforms.RandAugment()], []),
    "mixup": ([], [v2.MixUp(num_classes=CLASSES)]),
    "cutmix": ([], [v2.CutMix(num_classes=CLASSES)]),
}
"""By augmentation, torchvision's transforms of an image and of a batch."""


def masked_dkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute cross-entropy and DKD (alpha 1, beta 8) of logits [B, C] as mdistiller writes it.

    It masks the target with a matrix [B, C], and with a logit that is 1000 lower.
    """
    mask = torch.zeros_like(student).scatter_(1, target[:, None], 1).bool()
    p, q = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    p, q = (torch.cat([(x * mask).sum(1, keepdim=True), (x * ~mask).sum(1, keepdim=True)], dim=1) for x in (p, q))
    tckd = F.kl_div(torch.log(p), q, reduction="batchmean") * temperature**2
    others = F.log_softmax(student / temperature - 1000.0 * mask, dim=1)
    nckd = F.kl_div(others, F.softmax(teacher / temperature - 1000.0 * mask, dim=1), reduction="batchmean")
    return F.cross_entropy(student, target) + tckd + 8 * nckd * temperature**2


def torchvision_loader(
    data: ArrayData, batch_size: int, repeats: int = 1, workers: int = 2, augmentation: str = "standard"
) -> DataLoader[Any]:
    """Load the same images with torchvision's CIFAR100, and the usual transforms of each image.

    An epoch has every image `repeats` times. `augmentation` is one of `AUGMENTATIONS`.
    """
    policy, mixing = AUGMENTATIONS[augmentation]
    dataset: Any = datasets.CIFAR100.__new__(datasets.CIFAR100)  # the constructor would look for its archive
    rows = data.train_index.repeat(repeats)
    dataset.data = data.arrays.train_images[rows].permute(0, 2, 3, 1).contiguous().numpy()
    dataset.targets = data.source.train_labels[rows].tolist()
    dataset.target_transform = None
    dataset.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            *policy,
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )

    def collate(samples: Any) -> Any:
        images, target = default_collate(samples)
        for mix in mixing:
            images, target = mix(images, target)
        return images, target

    options: dict[str, Any] = {"num_workers": workers, "collate_fn": collate if mixing else None}
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, **options)


def time_plain_loop(
    student: nn.Module, teacher: nn.Module, loader: DataLoader[Any], steps: int, device: torch.device | None = None
) -> float:
    """Train with `masked_dkd` in a plain loop, on the device of both networks. Returns the seconds per step.

    The clock starts after the first batch, when the loader's workers have started and fetch ahead.
    """
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    batches = iter(loader)
    next(batches)

    def step() -> None:
        images, target = (x.to(device, non_blocking=True) for x in next(batches))
        with torch.no_grad():
            teacher_logits = teacher(images)
        loss = masked_dkd(student(images), teacher_logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return seconds_per_call(step, steps)
