"""Contents of small array files."""

import numpy as np


def colour_arrays(train: int = 200, test: int = 60, classes: int = 10) -> dict[str, np.ndarray]:
    """Make 32 x 32 images of one colour per class with noise, which a network can learn to classify."""
    random = np.random.default_rng(0)
    colours = random.permutation(np.array(np.meshgrid([30, 125, 220], [30, 125, 220], [30, 125, 220])).reshape(3, -1).T)
    arrays: dict[str, np.ndarray] = {"class_names": np.array([f"colour {i}" for i in range(classes)])}
    for split, count in (("train", train), ("test", test)):
        labels = (np.arange(count) % classes).astype(np.uint8)
        images = colours[labels][:, None, None, :] + random.normal(0, 12, (count, 32, 32, 3))
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8), f"{split}_labels": labels}
    return arrays


def arrays(train: int = 60, test: int = 23, classes: int = 3, size: tuple[int, int] = (8, 6)) -> dict[str, np.ndarray]:
    """Make images of random noise. Their classes alternate."""
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (train, *size, 3), dtype=np.uint8),
        "train_labels": (np.arange(train) % classes).astype(np.uint8),
        "test_images": rng.integers(0, 256, (test, *size, 3), dtype=np.uint8),
        "test_labels": (np.arange(test) % classes).astype(np.uint8),
        "class_names": np.array([f"class {i}" for i in range(classes)]),
    }
