"""The images that a classifier is judged on: RobustBench's own, or a local folder or .npz file."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from unperturb.models.cache import cache_folder
from unperturb.models.errors import DataError
from unperturb.models.networks.robustbench import CLASSES, robustbench_data
from unperturb.models.shapes import Float, Int
from unperturb.training.data import read_folder


class EvaluationSet(NamedTuple):
    """The first n images [n, 3, h, w] in [0, 1] and labels, where they came from, and the SHA-256 over both."""

    images: Float[Tensor, "n 3 h w"]
    labels: Int[Tensor, " n"]
    source: str
    digest: str


def load_images(
    dataset: str, folder: Path | None, *, n: int, image_size: int, classes: tuple[str, ...], cache: Path | None = None
) -> EvaluationSet:
    """Return the first `n` test images, in RobustBench's order, or in sorted file order from `folder`.

    `folder` holds <class>/*, or test/<class>/*, or is an .npz file with `images` (uint8 [n, h, w, 3]) and `labels`.
    `classes` are the classifier's, in its order; for ImageNet the folders are WordNet ids. Raises DataError naming
    what is missing, wrong or too little.
    """
    if folder is None:
        images, labels = robustbench_data(dataset, n=n, folder=cache_folder("robustbench-data"))
        source = "robustbench"
    elif folder.suffix == ".npz":
        images, labels = _from_npz(folder, image_size)
        source = "npz"
    else:
        images, labels = _from_folder(dataset, folder, image_size, classes, cache or cache_folder("images"))
        source = "folder"
    if len(labels) < n:
        raise DataError(f"n_examples={n}, but {folder or dataset} holds {len(labels)} images")
    images, labels = images[:n], labels[:n]
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= len(classes):
        raise DataError(
            f"labels of {folder or dataset} run from {lowest} to {highest}; the classifier has {len(classes)} classes"
        )
    digest = hashlib.sha256(images.contiguous().numpy().tobytes() + labels.numpy().tobytes())
    return EvaluationSet(images, labels, source, digest.hexdigest())


def _from_npz(file: Path, image_size: int) -> tuple[Tensor, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise DataError(f"{file} is not an .npz file with `images` and `labels` ({error})") from error
    if (
        images.dtype != np.uint8
        or images.shape[1:] != (image_size, image_size, 3)
        or labels.shape != (len(images),)
        or labels.dtype.kind not in "iu"
    ):
        raise DataError(
            f"{file}: images are {images.dtype} {images.shape} with labels {labels.dtype} "
            f"{labels.shape}; they must be uint8 [n, {image_size}, {image_size}, 3] with whole numbers [n]"
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels.astype(np.int64))


def _from_folder(
    dataset: str, folder: Path, image_size: int, classes: tuple[str, ...], cache: Path
) -> tuple[Tensor, Tensor]:
    root = folder / "test" if (folder / "test").is_dir() else folder
    if not root.is_dir():
        raise DataError(f"{folder} is neither a folder of class folders nor an .npz file")
    found = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
    order = classes
    if dataset == "imagenet" and found and found[0] not in classes:
        order = wordnet_ids()
    elif len(found) == len(classes) and all(name.isdigit() for name in classes) and not set(found) <= set(classes):
        order = found  # a classifier that names no classes; CIFAR's are in alphabetical order
    unknown = [name for name in found if name not in order]
    if unknown or not found:
        raise DataError(
            f"{root} has {f'a class folder {unknown[0]!r}' if unknown else 'no class folder'}; "
            f"the classifier's classes are {', '.join(order[:10])}{' …' if len(order) > 10 else ''}"
        )
    split = read_folder(root, found, image_size=image_size, cache=cache)
    # A folder may lack classes: a label is the class's place in the classifier's order, not among the folders.
    place = torch.tensor([order.index(name) for name in found])
    return split.images.float() / 255, place[split.labels]


def wordnet_ids() -> tuple[str, ...]:
    """Return ImageNet's 1,000 WordNet ids in the order of its classes."""
    package = find_spec("robustbench")  # found, not imported
    if package is None or package.origin is None:
        raise DataError("ImageNet's class order comes with robustbench, which is not installed")
    file = Path(package.origin).parent / "helper_files" / "imagenet_class_to_id_map.json"
    places: dict[str, int] = json.loads(file.read_text())
    assert len(places) == CLASSES["imagenet"]
    return tuple(sorted(places, key=lambda name: places[name]))
