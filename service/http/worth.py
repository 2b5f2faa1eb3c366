"""Say what a preset is worth before a model, by what its card says."""

from typing import Any

from pydantic import BaseModel, Field, ValidationError

from unperturb.models.checkpoints.card import Card
from unperturb.models.purifiers.defended import preset_of
from unperturb.models.purifiers.parameters import parameters

Interval = tuple[float, float]
PURPOSES = {
    "default": "against perturbations made without knowing of the purifier; little against who knows it",
    "vote": "the cheapest, no step; may help against who knows it, too, before classifiers trained against attacks",
    "transfer": "against perturbations made without knowing of it, more than default; not against who knows it",
    "restorer": "for classifiers never trained against attacks, also against who knows it; costs clean accuracy",
    "published": "the paper's procedure, to compare with; costs clean accuracy",
}


class Gain(BaseModel):
    """A share of images in [-1, 1], paired with the bare classifier's, and its 95% interval."""

    mean: float
    interval: Interval
    at_most: bool = Field(False, description="attacked with less than a judge needs: stronger attacks could lower it")


class Worth(BaseModel):
    """What the preset gained before this model when judged on n images; a gain is null where not measured.

    Below 0 it makes things worse. From the checkpoint's card, by `unperturb assess --write-card` or the harness.
    """

    n: int
    epsilon: float = Field(description="radius of the attacks, L-infinity, in units of [0, 1]")
    budget: str = Field(description="of the attacks: fast, standard or full")
    knows_everything: Gain | None = Field(description="the worst case of attacks that know the purifier")
    does_not_know: Gain | None = Field(description="images attacked without knowing of it")
    clean: Gain | None


class _Judged(BaseModel):
    parameters: dict[str, Any] | None = None
    gain: float | None
    gain_interval: Interval | None
    gain_at_most: bool = False
    transfer_gain: Gain | None
    clean_gain: float | None
    clean_gain_interval: Interval | None


class _Assessment(BaseModel):
    n: int
    epsilon: float
    budget: str
    weights_sha256: str
    presets: dict[str, _Judged]
    verdict: str


def _assessment(card: Card) -> _Assessment | None:
    """Return what stands on a card; None for nothing, of other weights, or not of the form that `assess` writes."""
    try:
        found = _Assessment.model_validate(card.figures.get("assessment"))
    except ValidationError:
        return None
    return found if found.weights_sha256 == card.weights_sha256 else None


def advice_of(card: Card) -> str | None:
    """Return the verdict of a card's assessment, None where there is none of its weights."""
    assessed = _assessment(card)
    return assessed.verdict if assessed else None


def worth_of(card: Card, preset: str) -> Worth | None:
    """Return what a card says of a preset; None where that was not judged, or with other weights or parameters."""
    assessed = _assessment(card)
    found = assessed and assessed.presets.get(preset)
    if not assessed or not found or found.parameters != parameters(preset_of(card, preset)):
        return None

    def gain(mean: float | None, interval: Interval | None, *, at_most: bool = False) -> Gain | None:
        return None if mean is None or interval is None else Gain(mean=mean, interval=interval, at_most=at_most)

    return Worth(
        n=assessed.n,
        epsilon=assessed.epsilon,
        budget=assessed.budget,
        knows_everything=gain(found.gain, found.gain_interval, at_most=found.gain_at_most),
        does_not_know=found.transfer_gain,
        clean=gain(found.clean_gain, found.clean_gain_interval),
    )
