"""Which training images a run holds back, and which of them were seen by what it begins with.

A checkpoint's card says how many images its training held out, by what seed, and of which data.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unperturb.models.checkpoints.card import Card
from unperturb.models.errors import ConfigError, DataError
from unperturb.training.data import DataSet, Split
from unperturb.training.options import RunConfig


def hold_out(split: Split, count: int, *, seed: int) -> tuple[Split, Split]:
    """Return the split without `count` random images, and those images."""
    if not 0 < count < len(split.labels):
        raise DataError(f"cannot hold out {count} of {len(split.labels)} training images")
    held = _held(len(split.labels), count, seed)
    kept = torch.ones_like(split.labels, dtype=torch.bool)
    kept[held] = False
    return Split(split.images[kept], split.labels[kept]), Split(split.images[held], split.labels[held])


def _held(total: int, count: int, seed: int) -> Tensor:
    """Return the numbers of the images that are held out, sorted."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def training_images(train: Split, config: RunConfig) -> tuple[Split, Split]:
    """Return the training images that a run uses, and those that it holds back."""
    images, held_out, seed = config.images, config.held_out, config.seed
    kept, held = hold_out(train, held_out, seed=seed)
    if not images:
        return kept, held
    if images > len(kept.labels):
        raise DataError(f"images={images}, but {len(kept.labels)} training images are left beside held_out={held_out}")
    order = torch.randperm(len(kept.labels), generator=torch.Generator().manual_seed(seed + 1))[:images].sort().values
    return Split(kept.images[order], kept.labels[order]), held


def training_images_for(
    card: Card | None, dataset: DataSet, config: RunConfig, *, start: Card | None = None
) -> tuple[Split, Split]:
    """`training_images` of a run that begins with a checkpoint; says how many of those held back that was trained on.

    On them its accuracy, and what is chosen and measured by them, looks better than on new images.
    start: the card of the checkpoint whose purifier it begins with
    """
    images = training_images(dataset.train, config)
    if card is not None:
        _say_seen(repr(card.id), list(_classifier_held_out(card, dataset.digest)), dataset, config)
    if start is not None:
        pairs = list(_part_held_out(start.purifier_training, dataset.digest))
        _say_seen(f"the purifier of {start.id!r}", pairs, dataset, config)
    return images


def kept_back(dataset: DataSet, card: Card) -> Split:
    """Return the training images that no training of the classifier, the head or the restorer saw.

    ConfigError where the card does not say which those are, or was made of other images.
    """
    parts = [part for part in (card.head_training, card.restorer_training) if part]
    digests = {card.data.get("sha256"), *(part.get("data_sha256") for part in parts)}
    if digests - {None, dataset.digest}:
        raise ConfigError(f"{card.id!r} was trained on other images than {dataset.name} has")
    pairs = list(_classifier_held_out(card, dataset.digest))
    pairs += [pair for part in parts for pair in _part_held_out(part, dataset.digest)]
    said = [pair for pair in pairs if pair is not None]
    if len(said) < len(pairs):
        raise ConfigError(f"the card of {card.id!r} does not say which training images were held out")
    held = set.intersection(*(set(_held(len(dataset.train.labels), *pair).tolist()) for pair in said))
    if not held:
        raise ConfigError(f"{card.id!r}: no training image was held out by all that it was made by")
    numbers = torch.tensor(sorted(held))
    return Split(dataset.train.images[numbers], dataset.train.labels[numbers])


def _say_seen(what: str, pairs: list[tuple[int, int] | None], dataset: DataSet, config: RunConfig) -> None:
    """Say how many of the images that a run holds back were seen by what held out those of `pairs`."""
    total = len(dataset.train.labels)
    known = [pair for pair in pairs if pair is not None]
    unknown = f"whether {what} was trained on the images that are held back is not known"
    if len(known) < len(pairs):
        print(unknown, file=sys.stderr)
    elif not pairs:
        print(f"{unknown}: it was on other images, or on the same ones at another size or fit", file=sys.stderr)
    else:
        own = set.intersection(*(set(_held(total, *pair).tolist()) for pair in known))
        if seen := len(set(_held(total, config.held_out, config.seed).tolist()) - own):
            by = " and by ".join(f"held_out={count}, seed={seed}" for count, seed in known)
            new = f"new to it are those held back by {by}" if own else "none of the training images is new to it"
            print(
                f"held_out={config.held_out}, seed={config.seed}: {what} was trained on {seen} of these images; {new}",
                file=sys.stderr,
            )


def _classifier_held_out(card: Card, digest: str) -> Iterator[tuple[int, int] | None]:
    """Yield how many of these images a classifier's training held out, and by what seed; then those before it.

    None for one of which that is not known, nothing for one on other images.
    """
    if "sha256" in card.data:
        yield from _held_out_by(card.data, card.training, digest)
    else:
        yield None


def _part_held_out(training: dict[str, Any], digest: str) -> Iterator[tuple[int, int] | None]:
    """Yield the same of the training of a head, a restorer or a purifier."""
    data = {"sha256": training.get("data_sha256", digest), "held_out_of_train": training.get("held_out")}
    yield from _held_out_by(data, training, digest)
    if training.get("start_sha256"):
        yield None  # of the purifier that it began with


def _held_out_by(known: dict[str, Any], training: dict[str, Any], digest: str) -> Iterator[tuple[int, int] | None]:
    if known.get("sha256") == digest:
        count, seed = known.get("held_out_of_train"), training.get("seed")
        yield None if count is None or seed is None else (count, seed)
    for before in ("classifier", "encoder"):
        if f"{before}_training" in training:
            data = training.get(f"{before}_data", {"sha256": digest})  # older cards leave it out
            yield from _held_out_by(data, training[f"{before}_training"], digest)
