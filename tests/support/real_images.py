"""The real test images, where they are at hand: beside the checkout, not in it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

UNPACK = Path(__file__).parents[3] / "shared" / "data" / "unpack.py"
real_images = pytest.mark.skipif(not UNPACK.is_file(), reason="the real images are not at ../shared/data")


def first_test_images(dataset: str, count: int) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the first test images [count, 32, 32, 3] of cifar10 or cifar100, and their labels."""
    spec = importlib.util.spec_from_file_location("unpack", UNPACK)
    assert spec is not None
    assert spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    images, labels = unpack.read(dataset, "test", count)
    return images, labels.tolist()
