"""The images: scikit-learn's handwritten digits, or CIFAR-10 from the files that its authors publish."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

DIGITS_FOR_TESTS = 497


@dataclass(frozen=True)
class Data:
    """Images of shape (images, channels, height, width) with values in [-1, 1], and their labels from 0 on."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def pixels(self) -> int:
        """Numbers in one image."""
        return self.train_images[0].numel()

    def part(self, train: int, test: int | None = None) -> Data:
        """The first images of both sets: `train` of one and `test`, or all, of the other."""
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def flat(self) -> Data:
        """The same with one vector for each image."""
        return replace(self, train_images=self.train_images.flatten(1), test_images=self.test_images.flatten(1))

    def with_wrong_labels(self, share: float, seed: int = 0) -> Data:
        """The same with that share of the training labels drawn anew at random; test labels stay right."""
        random = torch.Generator().manual_seed(seed)
        labels = self.train_labels.clone()
        drawn = torch.randperm(len(labels), generator=random)[: round(share * len(labels))]
        labels[drawn] = torch.randint(10, (len(drawn),), generator=random)
        return replace(self, train_labels=labels)


def minibatches(examples: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of minibatches without end, shuffled anew for each epoch; what is left at an epoch's end is left out."""
    random = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(examples, generator=random)
        yield from order[: examples - examples % size].split(size)


def digits() -> Data:
    """scikit-learn's 1,797 images of 8 x 8 pixels: 1,300 to train with and 497 to test with."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    targets = torch.tensor(labels)[order]
    return Data(
        "digits", images[DIGITS_FOR_TESTS:], targets[DIGITS_FOR_TESTS:], images[:DIGITS_FOR_TESTS], targets[:DIGITS_FOR_TESTS]
    )


def cifar10(folder: Path) -> Data:
    """CIFAR-10 from ``data_batch_1`` to ``data_batch_5`` and ``test_batch``, the python version of its authors' files.

    Raises:
        FileNotFoundError: if one is not in `folder`.
        pickle.UnpicklingError: if one holds anything but arrays, lists and text.
    """
    train = [_read_batch(folder / f"data_batch_{number}") for number in range(1, 6)]
    test_images, test_labels = _read_batch(folder / "test_batch")
    return Data(
        "CIFAR-10", torch.cat([images for images, _ in train]), torch.cat([labels for _, labels in train]), test_images, test_labels
    )


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found; --cifar names the folder cifar-10-batches-py, unpacked from cifar-10-python.tar.gz "
            "(https://www.cs.toronto.edu/~kriz/cifar.html)"
        )
    batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    # A row is an image: 1,024 values of red, then of green, then of blue.
    images = torch.from_numpy(batch[b"data"]).reshape(-1, 3, 32, 32).float() / 127.5 - 1
    return images, torch.tensor(batch[b"labels"])


class _ArraysOnly(pickle.Unpickler):
    """Makes nothing but NumPy's arrays: a pickle may name any function, and would have it called."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): lambda _kind, shape, _type: np.ndarray(shape, np.uint8),
            ("numpy", "ndarray"): np.ndarray,
            # The files are older than Python 3: they say 0 and 1 for False and True, which NumPy no longer takes.
            ("numpy", "dtype"): lambda name, align, copy: np.dtype(name.decode(), align=bool(align), copy=bool(copy)),
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"expected arrays, lists and text alone, found {module}.{name}: this is no file of CIFAR-10"
            )
        return known[module, name]
