"""The content of a checkpoint's `card.json`, and how it is read: no unknown key, none missing, every value of its type.

A card's gates are the first losses up to which a preset leaves an image as it is.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.readout import ReadoutCard
from unperturb.models.networks.restorer import RestorerCard
from unperturb.models.pixels import Preprocessing
from unperturb.models.purifiers.vote import Vote

SCHEMA_VERSION = 1
GATE_SEED = 0  # of the views that a gate is measured on: the service's own seed
Described = TypeVar("Described")


@dataclass(frozen=True, kw_only=True)
class HeadCard:
    """The head's shape and the temperature that it was trained with."""

    hidden: int
    embedding_dim: int
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Card:
    """The content of `card.json`; an unknown key is refused.

    `training`, `head_training`, … and `figures` are the resolved configurations and measurements, as JSON; `restorer`
    is that of the reverse attack's view, `purifier` the network that stands before the classifier by itself;
    `preprocessing` says how a picture becomes the pixels (None: its centred square); `vote` names the views that were
    chosen for these weights, in their images' pixels (None: the presets' own); `gates`, by preset, are the first losses
    up to which images are left as they are (`loss`), and how they were found.
    """

    id: str
    architecture: Architecture
    classes: tuple[str, ...]
    data: dict[str, Any]
    training: dict[str, Any]
    head: HeadCard | None = None
    restorer: RestorerCard | None = None
    purifier: RestorerCard | None = None
    bank_size: int = 0
    readout: ReadoutCard = field(default_factory=ReadoutCard)
    preprocessing: Preprocessing | None = None
    vote: Vote | None = None
    head_training: dict[str, Any] = field(default_factory=dict)
    restorer_training: dict[str, Any] = field(default_factory=dict)
    purifier_training: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def weights(self) -> str:
        """Return what tells its weights from others: their digest, or the id where there is none (RobustBench's)."""
        return self.weights_sha256 or self.id

    @property
    def pictures(self) -> Preprocessing:
        """Return how a picture becomes the pixels that the classifier takes."""
        return self.preprocessing or Preprocessing(size=self.architecture.image_size)


def parse_card(raw: dict[str, Any], file: Path) -> Card:
    """Return the card that a file's JSON object describes; raise CheckpointError for what it does not know."""
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(f"{file} is not a card of schema version {SCHEMA_VERSION}")
    card = from_json(Card, raw, file)
    if card.preprocessing is not None and card.preprocessing.size != card.architecture.image_size:
        raise CheckpointError(
            f"{file}: preprocessing to {card.preprocessing.size} pixels, the architecture takes other images"
        )
    if card.vote is not None:
        try:
            card.vote.fitting(card.architecture.image_size)
        except ConfigError as error:
            raise CheckpointError(f"{file}: vote: {error}") from error
    check_gates(card.gates, file)
    if len(card.classes) != card.architecture.num_classes:
        raise CheckpointError(f"{file} names {len(card.classes)} classes for {card.architecture.num_classes} outputs")
    return card


def gate_of(card: Card, preset: str) -> float:
    """Return the first loss up to which that preset leaves an image as it is, on views of GATE_SEED.

    CheckpointError where none was measured, or with other weights.
    """
    gate = card.gates.get(preset)
    if gate is None or gate.get("weights_sha256") != card.weights_sha256:
        raise CheckpointError(
            f"checkpoint {card.id!r} has no gate for the preset {preset!r}{' and these weights' * (gate is not None)}; "
            "measure one: unperturb train gate --checkpoint … --data …"
        )
    return float(gate["loss"])


def clean_loss_of(card: Card, preset: str | None) -> tuple[float, float] | None:
    """Return mean and standard deviation of a preset's first loss on clean images, on views of GATE_SEED.

    None where they were not measured, or with other weights.
    """
    gate = card.gates.get(preset or "", {})
    if gate.get("weights_sha256") != card.weights_sha256 or not {"clean_mean", "clean_std"} <= gate.keys():
        return None
    return float(gate["clean_mean"]), float(gate["clean_std"])


def check_gates(gates: Any, file: Path) -> None:  # noqa: ANN401
    """Raise CheckpointError where a card's gates are not what `unperturb train gate` writes."""
    for preset, gate in gates.items() if isinstance(gates, dict) else [("gates", None)]:
        if not isinstance(gate, dict) or not _finite(gate.get("loss")):
            raise CheckpointError(f"{file}: the gate of {preset!r} has no finite loss")
        mean, deviation = gate.get("clean_mean", 0.0), gate.get("clean_std", 1.0)
        if not (_finite(mean) and _finite(deviation) and deviation > 0):
            raise CheckpointError(
                f"{file}: the gate of {preset!r} has clean_mean={mean!r}, clean_std={deviation!r}: a finite mean and a "
                "finite deviation above 0 are needed; take it off the card, and measure it anew: unperturb train gate"
            )


def _finite(value: Any) -> bool:  # noqa: ANN401
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def from_json(kind: type[Described], raw: Any, file: Path) -> Described:  # noqa: ANN401
    """Return the dataclass that a JSON object describes; raise CheckpointError for what is not as its fields are."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: {kind.__name__} is not an object")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    unknown = sorted(raw.keys() - {f.name for f in fields})
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    missing = sorted(required - raw.keys())
    if unknown or missing:
        raise CheckpointError(f"{file}: {kind.__name__} has unknown keys {unknown}, lacks {missing}")
    hints = get_type_hints(kind)
    try:
        return kind(**{name: _read(name, value, hints[name], file) for name, value in raw.items()})
    except ConfigError as error:
        raise CheckpointError(f"{file}: {kind.__name__}: {error}") from error


def _read(name: str, value: Any, hint: Any, file: Path) -> Any:  # noqa: ANN401
    """Return a field's value, a list as the tuple and an object as the dataclass that it is."""
    origin, of = get_origin(hint), get_args(hint)
    if origin is UnionType:  # with None, which stands last
        return None if value is None else _read(name, value, of[0], file)
    if dataclasses.is_dataclass(hint):
        return from_json(cast(type, hint), value, file)
    if origin is tuple and isinstance(value, list):
        parts = of[:1] * len(value) if of[-1] is Ellipsis else of
        if len(parts) == len(value):
            return tuple(_read(name, one, part, file) for one, part in zip(value, parts, strict=True))
    elif hint is float:
        if _finite(value):
            return float(value)
    elif value in of if origin is Literal else type(value) is (origin or hint):
        return value
    expected = "a finite number" if hint is float else f"of type {hint.__name__ if isinstance(hint, type) else hint}"
    raise CheckpointError(f"{file}: {name}={value!r} is not {expected}")
