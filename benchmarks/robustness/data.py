"""The images that a classifier is judged on: RobustBench's own, or a local folder or .npz file."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unperturb.models.cache import cache_folder
from unperturb.models.errors import DataError
from unperturb.models.networks.benchmark_classes import IMAGENET_CLASSES, class_names, wordnet_ids
from unperturb.models.networks.robustbench import robustbench_data
from unperturb.models.pixels import Preprocessing
from unperturb.models.shapes import Float, Int
from unperturb.training.data import class_folders, images_below, read_folder

NPZ, OWN = ".npz", "own folder"
CIFAR_SIZE = (32, 32)
PUBLISHED = ("cifar10", "cifar100", "imagenet")  # data sets with published rows; any other name is somebody's own


class EvaluationSet(NamedTuple):
    """The first n images [n, 3, h, w] in [0, 1] and labels, where they came from, and the SHA-256 over both."""

    images: Float[Tensor, "n 3 h w"]
    labels: Int[Tensor, " n"]
    source: str
    digest: str


def load_images(
    dataset: str,
    folder: Path | None,
    *,
    n: int,
    draw: int | None = None,
    how: Preprocessing,
    classes: tuple[str, ...],
    cache: Path | None = None,
) -> EvaluationSet:
    """Return the first `n` test images, in RobustBench's order, or in sorted file order from `folder`.

    With a seed `draw`, n random ones of the folder instead, or all of them where it has fewer.

    `folder` holds <class>/*, or test/<class>/*, or is an .npz file with `images` (uint8 [n, h, w, 3]) and `labels`,
    which says not what they are: somebody's own, as is a folder that lacks classes of `dataset`, or whose pictures have
    another size (`is_own`). Pictures become pixels as `how` says. `classes` are the classifier's,
    in its order: class folders are matched by name, and refused where it, or a published `dataset`, has none of the
    name, or the two differ; for ImageNet the folders are WordNet ids. Raises DataError naming what is missing, wrong
    or too little.
    """
    if folder is None and dataset not in PUBLISHED:
        raise DataError(f"--dataset {dataset}: images of your own need --data; known: {', '.join(PUBLISHED)}")
    if dataset in PUBLISHED and (folder is None or folder.suffix != NPZ):
        _require_classes(dataset, classes, in_order=folder is None)
    if folder is None:
        images, labels = robustbench_data(dataset, n=n, folder=cache_folder("robustbench-data"))
        source = "robustbench"
    elif folder.suffix == NPZ:
        images, labels = _from_npz(folder, how.size)
        source = "npz"
    else:
        images, labels = _from_folder(dataset, folder, how, classes, cache or cache_folder("images"))
        source = "folder" if dataset not in PUBLISHED or _may_be(dataset, folder) else OWN
    if draw is None and len(labels) < n:
        raise DataError(f"n_examples={n}, but {folder or dataset} holds {len(labels)} images")
    rows = torch.arange(min(n, len(labels)))
    if draw is not None:
        rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))[: len(rows)].sort().values
    images, labels = images[rows], labels[rows]  # of a large folder no more than these are read
    if images.dtype == torch.uint8:
        images = images.float() / 255
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= len(classes):
        raise DataError(
            f"labels of {folder or dataset} run from {lowest} to {highest}; the classifier has {len(classes)} classes"
        )
    digest = hashlib.sha256(images.contiguous().numpy().tobytes() + labels.numpy().tobytes())
    return EvaluationSet(images, labels, source, digest.hexdigest())


def is_own(dataset: str, source: str) -> bool:
    """Return whether images are somebody's own, and no published figure is to stand beside theirs."""
    return dataset not in PUBLISHED or source in ("npz", OWN)


def _may_be(dataset: str, folder: Path) -> bool:
    """Return whether a folder holds every class of a published data set, with pictures of its size."""
    root, found = _root(folder), folder_classes(folder) or ()
    if dataset == "imagenet":
        return len(found) == IMAGENET_CLASSES
    if set(found) != set(class_names(dataset)):
        return False
    firsts = [next(images_below(root / name, Counter()), None) for name in found]
    return all(first is not None and _size(first) == CIFAR_SIZE for first in firsts)


def _size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as opened:
        return opened.size


def _require_classes(dataset: str, classes: tuple[str, ...], *, in_order: bool) -> None:
    """Raise DataError for a classifier of other classes than a published data set has."""
    remedy = "--dataset NAME is for images of your own"
    if dataset == "imagenet":  # its classes have many names
        if len(classes) != IMAGENET_CLASSES:
            raise DataError(f"the classifier has {len(classes)} classes, imagenet {IMAGENET_CLASSES}; {remedy}")
        return
    known = class_names(dataset)
    if classes != known and (in_order or sorted(classes) != sorted(known)):
        theirs, its = ", ".join(classes[:10]), ", ".join(known[:10])
        raise DataError(
            f"the classifier's {len(classes)} classes are {theirs}, {dataset}'s {len(known)} {its}; {remedy}"
        )


def folder_classes(folder: Path | None) -> tuple[str, ...] | None:
    """Return the names of a folder's class folders, sorted; None for what is no folder."""
    if folder is None or folder.suffix == NPZ:
        return None
    return class_folders(_root(folder))


def _root(folder: Path) -> Path:
    root = folder / "test" if (folder / "test").is_dir() else folder
    if not root.is_dir():
        raise DataError(f"{folder} is neither a folder of class folders nor an .npz file")
    return root


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
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))


def _from_folder(
    dataset: str, folder: Path, how: Preprocessing, classes: tuple[str, ...], cache: Path
) -> tuple[Tensor, Tensor]:
    root, found = _root(folder), folder_classes(folder)
    if not found:
        raise DataError(f"{root} has no class folder")
    order = classes
    if dataset == "imagenet" and len(classes) == IMAGENET_CLASSES and found[0] not in classes:
        order = wordnet_ids()
    if dataset in PUBLISHED and dataset != "imagenet":
        _refuse_others(found, class_names(dataset), root, f"{dataset}; --dataset NAME is for images of your own")
    _refuse_others(found, order, root, f"the classifier, whose classes are {', '.join(order[:10])}")
    split = read_folder(root, found, how, cache=cache)
    # A folder may lack classes: a label is the class's place in the classifier's order, not among the folders.
    place = torch.tensor([order.index(name) for name in found])
    return split.images, place[split.labels]


def _refuse_others(found: tuple[str, ...], known: tuple[str, ...], root: Path, whose: str) -> None:
    unknown = [name for name in found if name not in known]
    if unknown:
        raise DataError(f"{root} has a class folder {unknown[0]!r}, which is no class of {whose}")
