"""Somebody else's classifier -> a checkpoint of this project, without a head: what `unperturb import` does."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unperturb.models.checkpoints.card import Card
from unperturb.models.checkpoints.importing.sources import Source, Triple, open_source
from unperturb.models.checkpoints.importing.weights import fill, read_state, renamed, without_prefix
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.files import read_whole
from unperturb.models.networks.classifier import Architecture, ImageClassifier
from unperturb.models.networks.imported import ImportedClassifier, TransformersNetwork, last_linear, network_of
from unperturb.models.pixels import Preprocessing


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A source, and what its user says of it, which goes above what the source says.

    weights: a file; rename: a JSON file of what its tensors are called here (see `renamed`); pretrained: the source's
    own, from the network; classes: a file of names, a line each or JSON
    """

    source: str
    id: str = "imported"
    weights: Path | None = None
    rename: Path | None = None
    pretrained: bool = False
    classes: Path | None = None
    image_size: int | None = None
    fit: str | None = None
    resize: int | None = None
    interpolation: str | None = None
    antialias: bool | None = None
    mean: Triple | None = None
    std: Triple | None = None


def import_classifier(config: ImportConfig) -> Checkpoint:
    """Return the checkpoint, float32, frozen, in eval mode.

    Raises ConfigError for a source, library or setting that cannot be had, CheckpointError for weights that cannot be
    read or do not fit, WeightsUnavailableError for weights that cannot be fetched.
    """
    source = open_source(config.source)
    state, origin = _state(config, source)
    pictures = _pictures(config, source)
    architecture = Architecture(
        name=source.name,
        num_classes=source.classes if isinstance(source.classes, int) else len(source.classes),
        image_size=pictures.size,
        mean=config.mean or source.mean,
        std=config.std or source.std,
        options=source.options,
    )
    network = network_of(architecture, allowed=True)
    last = last_linear(network, architecture)
    if state is not None:
        if isinstance(network, TransformersNetwork):
            state = network.under_its_names(state)
        found = without_prefix(state, network.state_dict()).get(f"{last}.weight")
        if found is not None and found.ndim == 2 and len(found) != architecture.num_classes:
            architecture = replace(architecture, num_classes=len(found))
            network = network_of(architecture, allowed=True)
        fill(network, state, of=source.name)
    classifier = ImportedClassifier(architecture, network).requires_grad_(False)
    architecture = replace(architecture, num_classes=classifier.num_classes)
    card = Card(
        id=config.id,
        architecture=architecture,
        classes=_classes(config, source, classifier.num_classes),
        preprocessing=pictures,
        data={},
        training={"by": "imported", "source": _named(config, source), **origin},
    )
    require_separate(classifier.eval())
    if source.name.startswith("python:"):
        _require_same_again(classifier, architecture)
    return Checkpoint(card, classifier.to(memory_format=torch.channels_last))


def require_separate(classifier: ImageClassifier) -> None:
    """Raise ConfigError where an image's scores are not its own, not finite, one, or give its pixels no gradient."""
    if classifier.num_classes < 2:
        raise ConfigError(
            "one score an image, of which no label can be wrong: of two classes, torch.cat((0 * s, s), 1)"
        )
    size, draw = classifier.image_size, torch.Generator().manual_seed(1)
    device = next((parameter.device for parameter in classifier.parameters()), torch.device("cpu"))
    x = torch.rand(3, 3, size, size, generator=draw).to(device).requires_grad_()
    features = classifier.features(x)
    with torch.no_grad():
        scores = classifier.logits(features).detach()
        alone = torch.cat([classifier(x[i : i + 1]) for i in (2, 0, 1)])[[1, 2, 0]]
    if not bool(scores.isfinite().all()):
        raise ConfigError("the network's scores of random pixels are not finite: are these the right weights?")
    margin = 1e-3 * float(scores.abs().max())
    if alone.shape != scores.shape or not torch.allclose(alone, scores, rtol=1e-3, atol=margin):
        raise ConfigError(
            "an image's scores depend on the images beside it, or on chance: is a part of the network in training mode?"
        )
    some = (features * torch.rand(features.shape, generator=draw).to(device)).sum()
    pixels = torch.autograd.grad(some, x, allow_unused=True)[0] if some.requires_grad else None
    if pixels is None or not bool(pixels.isfinite().all()) or not bool(pixels.flatten(1).abs().amax(1).gt(0).all()):
        raise ConfigError(
            "no gradient passes through the network to an image's pixels, which attacks and purifiers need; what has "
            "none, as JPEG, is no part of the model for the harness, but a purifier before it"
        )


def _require_same_again(classifier: ImportedClassifier, architecture: Architecture) -> None:
    """Raise ConfigError where the factory's next network, with these weights, has other scores: it is made anew where
    the checkpoint is loaded.
    """
    again = ImportedClassifier(architecture, network_of(architecture, allowed=True)).eval()
    again.load_state_dict(classifier.state_dict())
    x = torch.rand(2, 3, *2 * (classifier.image_size,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        if not torch.allclose(again(x), classifier(x), rtol=1e-3, atol=1e-4):
            raise ConfigError(
                f"{architecture.name} makes another network each time, in something that its state_dict does not hold: "
                "draw it from a seed, or register it as a buffer"
            )


def warnings_of(scores: Tensor, names: Sequence[str]) -> list[str]:
    """Return what looks wrong with the classes' names, and with softmax scores [classes] of a picture."""
    doubled, found = [name for name, count in Counter(names).items() if count > 1], []
    if doubled:
        found += [
            f"{len(doubled)} names stand for several classes ({doubled[0]}): no folder of images can be told theirs"
        ]
    top, classes = float(scores.max()), len(scores)
    entropy = float(-(scores.clamp(min=1e-12).log() * scores).sum() / torch.tensor(float(classes)).log())
    if entropy > 0.95:
        found += ["the scores are nearly uniform: are these the right weights, mean and std?"]
    elif top > 1 - 1e-6:
        found += ["the score of one class is 1: are mean and std those of the model, for pixels in [0, 1]?"]
    return found


def _state(config: ImportConfig, source: Source) -> tuple[Mapping[str, Tensor] | None, dict[str, Any]]:
    """Return the weights, and where they are from; None for a factory that brings its own."""
    if config.weights is not None and (config.pretrained or source.name.startswith("export:")):
        raise ConfigError("weights: give one of the two, these or the source's own")
    if config.weights is not None:
        digest = hashlib.sha256(read_whole(config.weights)).hexdigest() if config.weights.is_file() else ""
        state = read_state(config.weights)
        if config.rename is not None:
            state = renamed(state, config.rename)
        return state, {"weights": config.weights.name, "file_sha256": digest}
    if source.name.startswith("python:"):
        return None, {"weights": "the factory's"}
    if source.name.startswith("export:"):
        assert source.state is not None
        digest = hashlib.sha256(Path(config.source.partition(":")[2]).read_bytes()).hexdigest()
        return source.state(), {"weights": "the program's", "file_sha256": digest}
    named = source.name == config.source
    if source.state is None or (named and not config.pretrained):
        raise ConfigError(f"{config.source}: give --weights FILE, or --pretrained for its own from the network")
    return source.state(), {"weights": "the source's"}


def _pictures(config: ImportConfig, source: Source) -> Preprocessing:
    names = {"size": "image_size", "fit": "fit", "resize": "resize", "interpolation": "interpolation"}
    wanted = {field: getattr(config, name) for field, name in {**names, "antialias": "antialias"}.items()}
    wanted = {field: value for field, value in wanted.items() if value is not None}
    if source.one_size and wanted.get("size", source.pictures.size) != source.pictures.size:
        raise ConfigError(f"image_size={wanted['size']}: {source.name} was exported for {source.pictures.size} pixels")
    if "size" in wanted and "resize" not in wanted and source.pictures.resize:  # the share that is cut stays
        wanted["resize"] = round(wanted["size"] * source.pictures.resize / source.pictures.size)
    if wanted.get("fit") == "square" and config.resize is None:  # the source's is of another fit
        wanted["resize"] = 0
    return replace(source.pictures, **wanted)


def _named(config: ImportConfig, source: Source) -> str:
    """Return the source without a folder of this machine."""
    on_disk = ":" not in config.source or source.name.startswith("export:")
    return source.name if on_disk else config.source


def _classes(config: ImportConfig, source: Source, count: int) -> tuple[str, ...]:
    if config.classes is not None:
        names = read_classes(config.classes)
        if len(names) != count:
            raise ConfigError(f"{config.classes} names {len(names)} classes, the network has {count}")
        return names
    if not isinstance(source.classes, int) and len(source.classes) == count:
        return source.classes
    return tuple(str(number) for number in range(count))


def read_classes(file: Path) -> tuple[str, ...]:
    """Return class names: a line each, a JSON list, or a JSON object from numbers to names."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as text: {error}") from error
    if text.lstrip()[:1] in ("[", "{"):
        try:
            raw = json.loads(text)
            ordered = [raw[key] for key in sorted(raw, key=int)] if isinstance(raw, dict) else raw
            names = [one[-1] if isinstance(one, list) and one else one for one in ordered]  # [WordNet id, name]
            if not all(isinstance(name, str) for name in names):
                raise ValueError("not every name is a text")
            return tuple(names)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file} is neither a JSON list of names nor an object from numbers to names") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
