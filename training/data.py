"""Image data sets as resident uint8 arrays, checked whole before training begins.

A data set is `cifar10` or `cifar100` (torchvision, downloaded where there is a network), or a folder
`DIR/train/<class>/…`, `DIR/test/<class>/…`. A folder is decoded once, into an array file in the cache folder that
later runs map instead of decoding again.
"""

import difflib
import hashlib
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unperturb.models.cache import cache_folder
from unperturb.models.checkpoints.card import Card
from unperturb.models.errors import DataError
from unperturb.models.files import is_hidden
from unperturb.models.pixels import Preprocessing, opened, to_rgb, to_size
from unperturb.models.shapes import Int, UInt8

DECODING = 2  # raised where the same file becomes other pixels: what was decoded before is then not taken
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}


class Split(NamedTuple):
    """Images uint8 [n, 3, size, size] and labels int64 [n], in sorted file order."""

    images: UInt8[Tensor, "n 3 h w"]
    labels: Int[Tensor, " n"]


class DataSet(NamedTuple):
    """Both splits, the class names, and the SHA-256 over all pixels and labels."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    digest: str


def load_for(card: Card, source: str, *, cache: Path | None = None) -> DataSet:
    """Load a data set for a classifier that there is: its pictures and its classes, matched by name, in its order.

    Class folders may lack, and differ between the splits. Raises DataError for one that is no class of the
    classifier's, and as `load` does.
    """
    return load(source, card.pictures, cache=cache, classes=card.classes)


def load(
    source: str, how: Preprocessing, *, cache: Path | None = None, classes: tuple[str, ...] | None = None
) -> DataSet:
    """Load a named data set or a folder, each picture as `how` says; its classes are `classes`, or its own, sorted.

    Raises DataError naming the file or folder: missing, without classes, a class without images, a file that cannot
    be decoded, classes that differ between the splits.
    """
    if source in ("cifar10", "cifar100"):
        train, test, found = _torchvision(source, how.size)
        classes = classes or found
        _require_known(found, classes, source)
        train, test = (_labelled(split, found, classes) for split in (train, test))
    else:
        root = Path(source)
        names = {split: _class_names(root / split) for split in ("train", "test")}
        if classes is None:
            classes = names["train"]
            _require_same_classes(root, classes, names["test"])
        for split, found in names.items():
            _require_known(found, classes, f"{root / split}")  # before anything is decoded
        train, test = (
            _labelled(read_folder(root / split, found, how, cache=cache or cache_folder("images")), found, classes)
            for split, found in names.items()
        )
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(np.ascontiguousarray(part.images.numpy()).data)
        digest.update(part.labels.numpy().tobytes())
    return DataSet(Path(source).name, train, test, classes, digest.hexdigest())


def read_folder(folder: Path, classes: tuple[str, ...], how: Preprocessing, *, cache: Path) -> Split:
    """Read one split from the images below `folder/<class>`, sorted by path within and across classes.

    Says how many it took, and what it left out. Raises DataError naming a class without an image, or a file that cannot
    be read.
    """
    files: list[tuple[str, int, Path]] = []
    left_out: Counter[str] = Counter()
    for label, name in enumerate(classes):
        found = list(images_below(folder / name, left_out))
        if not found:
            raise DataError(f"class folder {_shown(folder / name)} holds no image ({', '.join(sorted(SUFFIXES))})")
        files += [(path.relative_to(folder / name).as_posix(), label, path) for path in found]
    files.sort(key=lambda entry: (entry[0], entry[1]))
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    said = f"{_shown(folder)}: {len(files):,} images of {len(classes)} classes{'; left out: ' * bool(why)}{why}"
    print(said, file=sys.stderr)
    labels = torch.tensor([label for _, label, _ in files])
    key = hashlib.sha256(os.fsencode(folder.resolve()) + f" {how} {DECODING}".encode())
    for name, label, path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{_shown(path)} cannot be read: {error.strerror}; repair or remove it") from error
        key.update(os.fsencode(f"{classes[label]}/{name}") + f" {stat.st_size} {stat.st_mtime_ns}".encode())
    array_file = cache / f"{folder.name}-{key.hexdigest()[:32]}.npy"
    if not array_file.exists():
        _decode_all([path for *_, path in files], array_file, how)
    # Copy-on-write: torch wants a writable buffer, and the file stays as it is.
    return Split(torch.from_numpy(np.load(array_file, mmap_mode="c")), labels)


def images_below(folder: Path, left_out: Counter[str], within: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the image files of a class folder and of the folders in it, sorted; count what else is there."""
    within = (*within, folder.resolve())
    for path in sorted(folder.iterdir()):
        if is_hidden(Path(path.name)):
            left_out[f"hidden ({path.name})" if path.is_dir() else "hidden files"] += 1
        elif path.is_dir():
            if path.resolve() in within:
                left_out["links to a folder that they lie in"] += 1
            else:
                yield from images_below(path, left_out, within)
        elif path.suffix.lower() in SUFFIXES:
            yield path
        else:
            left_out[f"files of no image type ({path.suffix.lower() or 'no ending'})"] += 1


def _shown(path: Path) -> str:
    """Return a path that can be printed, whatever bytes its name has."""
    return os.fsencode(path).decode(errors="backslashreplace")


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders in a folder, sorted, without hidden ones."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(Path(p.name))))


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; a data set is cifar10, cifar100 or a folder with train/ and test/")
    names = class_folders(folder)
    if len(names) < 2:
        raise DataError(f"{folder} holds {len(names)} class folder(s); at least 2 are needed")
    return names


def _require_same_classes(root: Path, train: tuple[str, ...], test: tuple[str, ...]) -> None:
    """Raise DataError saying which class folders one split has alone, and which of those differ in spelling only."""
    if train == test:
        return
    folded = {_folded(name): name for name in test}
    near = [f"{name!r} and {folded[_folded(name)]!r}" for name in train if name not in test and _folded(name) in folded]
    alone = [
        f"{split} alone has {', '.join(map(repr, names[:5]))}"
        for split, names in (("train", sorted(set(train) - set(test))), ("test", sorted(set(test) - set(train))))
        if names
    ]
    spelled = f"; spelled differently: {', '.join(near[:5])}" * bool(near)
    raise DataError(f"{root}/train and {root}/test do not have the same class folders: {'; '.join(alone)}{spelled}")


def _require_known(found: tuple[str, ...], classes: tuple[str, ...], of: str) -> None:
    unknown = [name for name in found if name not in classes]
    if unknown:
        near = difflib.get_close_matches(unknown[0], classes, n=3) or classes[:5]
        raise DataError(
            f"{of} has a class {unknown[0]!r} ({len(unknown)} such), which is none of the classifier's {len(classes)}: "
            f"{', '.join(map(repr, near))} …"
        )


def _labelled(split: Split, found: tuple[str, ...], classes: tuple[str, ...]) -> Split:
    """Return a split of class folders with the places of their names among `classes` as labels."""
    place = torch.tensor([classes.index(name) for name in found])
    return Split(split.images, place[split.labels])


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _decode_all(paths: list[Path], array_file: Path, how: Preprocessing) -> None:
    """Decode every file into a new .npy, or raise DataError naming the first that cannot be; an OSError names the .npy.

    Neither leaves anything.
    """
    array_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = array_file.with_suffix(f".{os.getpid()}.tmp")
    shape = (len(paths), 3, how.size, how.size)
    try:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(temporary)
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(lambda path: _decode(path, how), paths)
            for index, pixels in enumerate(tqdm(decoded, total=len(paths), desc="decoding", unit="img", leave=False)):
                out[index] = pixels
        out.flush()
        temporary.replace(array_file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(array_file)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(file: Path) -> None:
    """Take the disk space of a sparse file: where there is none, a write to its map would end the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def _decode(path: Path, how: Preprocessing) -> NDArray[np.uint8]:
    try:
        with opened(path.read_bytes()) as (picture, orientation):
            image = to_size(to_rgb(picture, orientation), how)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{_shown(path)} cannot be decoded as an image ({error}); repair or remove it") from error
    return np.asarray(image).transpose(2, 0, 1)


def _torchvision(name: str, image_size: int) -> tuple[Split, Split, tuple[str, ...]]:
    from torchvision import datasets

    if image_size != 32:
        raise DataError(f"{name} has images of 32 pixels; image_size={image_size} needs an image folder")
    root = Path(os.environ.get("UNPERTURB_DATA") or cache_folder("torchvision"))
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    splits = []
    for train in (True, False):
        try:
            data = kind(root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{name} could not be downloaded to {root} ({error}); place torchvision's archive there, set "
                "UNPERTURB_DATA to a folder that has it, or name an image folder instead"
            ) from error
        splits.append(Split(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)))
    return splits[0], splits[1], tuple(data.classes)


def resident(split: Split, device: torch.device) -> Split:
    """Return the split on `device`; raise DataError where its memory is too small."""
    try:
        return Split(split.images.to(device), split.labels.to(device))
    except torch.OutOfMemoryError as error:
        size = split.images.numel() / 2**30
        raise DataError(
            f"{len(split.labels)} images ({size:.1f} GiB) do not fit on {device}; use smaller images"
        ) from error


def first(split: Split, count: int, device: torch.device) -> Split:
    """Return the first `count` images (0 for all) on `device`."""
    count = count or len(split.labels)
    return resident(Split(split.images[:count], split.labels[:count]), device)


def at_once(images: Tensor, *, most: int | None = None, pixels: int = 1 << 20) -> int:
    """Return how many images of this size are attacked at once: each takes memory at every layer, so few large ones."""
    most = (1000 if images.is_cuda else 250) if most is None else most
    return max(1, min(most, pixels // images[0, 0].numel())) if len(images) else 1


def described(dataset: DataSet, train: Split, *, held_out: int) -> dict[str, object]:
    """Return what a checkpoint's card says of the data that it was trained on."""
    return {
        "name": dataset.name,
        "sha256": dataset.digest,
        "train_images": len(dataset.train.labels),
        "used_of_train": len(train.labels),
        "test_images": len(dataset.test.labels),
        "held_out_of_train": held_out,
    }
