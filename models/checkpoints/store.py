"""A checkpoint is a folder: `model.safetensors`, a classifier and what purifies for it, and `card.json`, what they are.

Loading reads tensors and JSON only, so it runs no code from the folder, and refuses a folder whose weights are not
those that the card names.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from unperturb.models import provenance
from unperturb.models.checkpoints.card import Card, parse_card
from unperturb.models.devices import opened_device
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.files import write_whole
from unperturb.models.networks.benchmark_classes import class_names
from unperturb.models.networks.classifier import Architecture, ImageClassifier
from unperturb.models.networks.head import NegativesBank, ProjectionHead
from unperturb.models.networks.imported import ImportedClassifier
from unperturb.models.networks.readout import SoftNeighbours, attach, blank_readout
from unperturb.models.networks.registry import build
from unperturb.models.networks.restorer import Restorer
from unperturb.models.networks.robustbench import CLASSES, PREFIX, ForeignClassifier, load_robustbench, parse_name

WEIGHTS, CARD = "model.safetensors", "card.json"
PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"


@dataclass(frozen=True)
class Checkpoint:
    """A classifier, the head and bank that purify for it (or None, before a head is trained), the restorer of their
    restored view (or None), the network that purifies before the classifier by itself (or None), and the card.
    """

    card: Card
    classifier: ImageClassifier
    head: ProjectionHead | None = None
    bank: NegativesBank | None = None
    restorer: Restorer | None = None
    purifier: Restorer | None = None


def shipped_names() -> tuple[str, ...]:
    """Return the names of the checkpoints that come with the package, `default` first."""
    names = (file.parent.name for file in PRETRAINED.glob(f"*/{CARD}"))
    return tuple(sorted(names, key=lambda name: (name != "default", name)))


def resolve(name: str | os.PathLike[str]) -> Path:
    """Return the folder of a shipped checkpoint's name, or of a path."""
    for folder in (Path(name), PRETRAINED / name):
        if (folder / CARD).is_file():
            return folder
    shipped = ", ".join(shipped_names()) or "none"
    raise CheckpointError(f"{os.fspath(name)!r} is neither a folder with a {CARD} nor a shipped checkpoint ({shipped})")


def save(folder: Path, checkpoint: Checkpoint, *, half: bool = True) -> Card:
    """Write the folder (each file to a temporary one, then renamed; the card last) and return the finished card.

    Weights are stored as float16 with `half`, but somebody else's classifier as it is, float32. Raises CheckpointError
    for weights that are not finite.
    """
    outputs = checkpoint.card.architecture.num_classes
    if len(checkpoint.card.classes) != outputs:
        raise CheckpointError(
            f"{folder}: {len(checkpoint.card.classes)} classes for {outputs} outputs; it was not saved"
        )
    parts = dict(_parts(checkpoint))
    foreign = isinstance(checkpoint.classifier, ImportedClassifier | ForeignClassifier)
    halved = [part for part in parts if half and not (foreign and part == "classifier")]
    digest = write_weights(folder / WEIGHTS, parts, halved=halved)
    card = dataclasses.replace(
        checkpoint.card,
        bank_size=0 if checkpoint.bank is None else len(checkpoint.bank.labels),
        restorer=None if checkpoint.restorer is None else checkpoint.card.restorer,
        restorer_training={} if checkpoint.restorer is None else checkpoint.card.restorer_training,
        purifier=None if checkpoint.purifier is None else checkpoint.card.purifier,
        purifier_training={} if checkpoint.purifier is None else checkpoint.card.purifier_training,
        made_by={"commit": provenance.commit(), "versions": provenance.versions()},
        weights_sha256=digest,
    )
    write_card(folder, card)
    return card


def write_card(folder: Path, card: Card) -> None:
    """Replace the folder's card."""
    write_whole(folder / CARD, (json.dumps(dataclasses.asdict(card), indent=2) + "\n").encode())


def load(name: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Checkpoint:
    """Return the checkpoint of a folder or a shipped name, or RobustBench's classifier of a name `robustbench:…`.

    It is float32, in eval mode, frozen, on `device`, as `opened_device` has it; RobustBench's has no head, and its data
    set's classes. Raises CheckpointError naming the file and the fault (missing, unknown keys, digest, shapes,
    non-finite weights), ConfigError for a device that is not there, and for RobustBench's ConfigError or
    WeightsUnavailableError.
    """
    device = opened_device(str(device))
    if isinstance(name, str) and name.startswith(PREFIX):
        return _load_foreign(name, device)
    folder = resolve(name)
    card = read_card(folder)
    empty = _empty(card, folder / CARD)
    read_weights(folder / WEIGHTS, card.weights_sha256, dict(_parts(empty)))
    for _, module in _parts(empty):
        module.eval().requires_grad_(False).to(device)
    banks = [] if empty.bank is None else [(empty.bank.embeddings, empty.bank.labels)]
    if isinstance(readout := getattr(empty.classifier, "linear", None), SoftNeighbours):
        banks.append((readout.bank, readout.labels))
    for bank, labels in banks:
        if labels.min() < 0 or labels.max() >= len(card.classes):
            raise CheckpointError(
                f"{folder / WEIGHTS}: a bank has labels outside the card's {len(card.classes)} classes"
            )
        bank.copy_(nn.functional.normalize(bank, dim=1))  # float16 storage leaves lengths that are only nearly 1
    return empty


def _load_foreign(name: str, device: torch.device) -> Checkpoint:
    """Return a classifier of RobustBench's zoo as a checkpoint of no folder."""
    dataset = parse_name(name)[1]
    architecture = Architecture(
        name=name, num_classes=CLASSES[dataset], image_size=224 if dataset == "imagenet" else 32
    )
    classifier = load_robustbench(name, image_size=architecture.image_size).requires_grad_(False).to(device)
    card = Card(
        id=name.replace(":", "-"),
        architecture=architecture,
        classes=class_names(dataset),
        data={},
        training={"by": "RobustBench"},
    )
    return Checkpoint(card, classifier)


def write_weights(file: Path, parts: dict[str, nn.Module], *, halved: Collection[str] = ()) -> str:
    """Write the parts' tensors as safetensors, return the file's SHA-256.

    Floats of the parts that are `halved` are float16, but for a tensor with a value beyond its range. Raises
    CheckpointError for weights that are not finite.
    """
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()  # memory of tensors so far: safetensors takes none twice
    for part, module in parts.items():
        for key, value in module.state_dict().items():
            stored = value.detach().cpu().contiguous()
            if not bool(stored.isfinite().all()):
                raise CheckpointError(f"{part}.{key} is not finite; it was not saved to {file}")
            half = stored.half() if part in halved and stored.is_floating_point() else stored
            written = half if bool(half.isfinite().all()) else stored
            memory = written.untyped_storage().data_ptr()
            tensors[f"{part}.{key}"] = written.clone() if memory in taken else written
            taken.add(memory)
    payload = save_tensors(tensors)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, payload)
    return hashlib.sha256(payload).hexdigest()


def read_weights(file: Path, digest: str, parts: dict[str, nn.Module]) -> None:
    """Fill the parts with the tensors of a file of that SHA-256; CheckpointError names what is wrong with it."""
    try:
        payload = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    found = hashlib.sha256(payload).hexdigest()
    if found != digest:
        raise CheckpointError(f"{file} has SHA-256 {found}, its card says {digest}; fetch it again")
    try:
        tensors = load_tensors(payload)
    except (SafetensorError, KeyError) as error:  # KeyError: a type of numbers that PyTorch has not
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(f"{file}: {key} holds values that are not finite")
    expected = {f"{part}.{key}": v for part, module in parts.items() for key, v in module.state_dict().items()}
    _same_layout(file, expected, tensors)
    for part, module in parts.items():
        state = module.state_dict()
        state.update({key: tensors[f"{part}.{key}"] for key in state})
        module.load_state_dict(state)  # with its metadata, without which MNASNet takes no weights


def read_card(folder: Path) -> Card:
    """Return the card of a checkpoint folder; raise CheckpointError for what it does not know."""
    file = folder / CARD
    return parse_card(read_object(file), file)


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file; raise CheckpointError where it is none."""
    try:
        raw = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    return raw if isinstance(raw, dict) else {}


def _parts(checkpoint: Checkpoint) -> list[tuple[str, nn.Module]]:
    named = (
        ("classifier", checkpoint.classifier),
        ("head", checkpoint.head),
        ("bank", checkpoint.bank),
        ("restorer", checkpoint.restorer),
        ("purifier", checkpoint.purifier),
    )
    return [(name, module) for name, module in named if module is not None]


def _empty(card: Card, file: Path) -> Checkpoint:
    """Return the modules that the card describes, with weights to be replaced."""
    head = bank = None
    try:
        classifier = build(card.architecture, weights=False)
        readout = blank_readout(card.readout, feature_dim=classifier.feature_dim, num_classes=classifier.num_classes)
        if readout is not None:
            attach(classifier, readout)
        if card.head is not None:
            head = ProjectionHead(
                feature_dim=classifier.feature_dim,
                hidden=card.head.hidden,
                embedding_dim=card.head.embedding_dim,
            )
            if card.head.temperature <= 0:
                raise ConfigError(f"temperature={card.head.temperature!r} is not above 0")
            blank = torch.ones(card.bank_size, card.head.embedding_dim)
            bank = NegativesBank(blank, torch.zeros(card.bank_size, dtype=torch.int64))
        restorer, purifier = (None if one is None else Restorer(one) for one in (card.restorer, card.purifier))
    except (ConfigError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{file} describes a model that cannot be built: {error}") from error
    return Checkpoint(card, classifier, head, bank, restorer, purifier)


def _same_layout(file: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    faults = [f"lacks {key}" for key in expected.keys() - found.keys()]
    faults += [f"holds an unknown {key}" for key in found.keys() - expected.keys()]
    faults += [
        f"{key} has shape {tuple(found[key].shape)}, the card's architecture {tuple(expected[key].shape)}"
        for key in expected.keys() & found.keys()
        if expected[key].shape != found[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{file} {'; '.join(sorted(faults)[:3])}{more}")
