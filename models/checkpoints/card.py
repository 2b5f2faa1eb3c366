"""The content of a checkpoint's `card.json`, and how it is read: no unknown key, none missing, every value of its type.

A card's gates are the first losses up to which a preset leaves an image as it is.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.readout import ReadoutCard
from unperturb.models.networks.restorer import RestorerCard
from unperturb.models.pixels import Preprocessing
from unperturb.models.purifiers.vote import Vote

SCHEMA_VERSION = 1
GATE_SEED = 0  # of the views that a gate is measured on: the service's own seed
_JSON_TYPES: dict[type, tuple[type, ...]] = {int: (int,), float: (float, int), str: (str,), bool: (bool,)}


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
    values = dict(known_fields(Card, raw, file))
    values["architecture"] = Architecture(**_tuples(known_fields(Architecture, raw.get("architecture"), file)))
    if raw.get("head") is not None:
        values["head"] = HeadCard(**known_fields(HeadCard, raw["head"], file))
    for part in ("restorer", "purifier"):
        if raw.get(part) is not None:
            values[part] = RestorerCard(**known_fields(RestorerCard, raw[part], file))
    if raw.get("preprocessing") is not None:
        try:
            how = Preprocessing(**known_fields(Preprocessing, raw["preprocessing"], file))
        except ConfigError as error:
            raise CheckpointError(f"{file}: preprocessing: {error}") from error
        if how.size != values["architecture"].image_size:
            raise CheckpointError(f"{file}: preprocessing to {how.size} pixels, the architecture takes other images")
        values["preprocessing"] = how
    if raw.get("vote") is not None:
        values["vote"] = _vote(raw["vote"], file)
    if "readout" in raw:
        try:
            values["readout"] = ReadoutCard(**known_fields(ReadoutCard, raw["readout"], file))
        except ConfigError as error:
            raise CheckpointError(f"{file}: {error}") from error
    check_gates(raw.get("gates", {}), file)
    card = Card(**_tuples(values))
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
    return isinstance(value, int | float) and math.isfinite(value)


def _vote(raw: Any, file: Path) -> Vote:  # noqa: ANN401
    """Return the vote that a card describes."""
    try:
        shifts = tuple((int(down), int(right)) for down, right in known_fields(Vote, raw, file)["shifts"])
        return Vote(shifts=shifts, mirrored=bool(raw.get("mirrored", True)))
    except (ConfigError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: vote: {error}") from error


def known_fields(kind: type, raw: Any, file: Path) -> dict[str, Any]:  # noqa: ANN401
    """Return `raw` as a dataclass's keyword arguments: no unknown key, none missing, plain values of the right type."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: {kind.__name__} is not an object")
    fields = dataclasses.fields(kind)
    unknown = sorted(raw.keys() - {f.name for f in fields})
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    missing = sorted(required - raw.keys())
    if unknown or missing:
        raise CheckpointError(f"{file}: {kind.__name__} has unknown keys {unknown}, lacks {missing}")
    for name, hint in get_type_hints(kind).items():
        if name in raw and hint in _JSON_TYPES and type(raw[name]) not in _JSON_TYPES[hint]:
            raise CheckpointError(f"{file}: {name}={raw[name]!r} is not of type {hint.__name__}")
    return raw


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
