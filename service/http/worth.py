"""Say what a preset is worth before a model, by what its card says."""

from typing import Any

from pydantic import BaseModel, Field


class Gain(BaseModel):
    """A share of images, paired with the bare classifier's, and its 95% interval."""

    mean: float
    interval: tuple[float, float]


class Worth(BaseModel):
    """What the preset gained before this model when judged on n images; a gain is null where not measured.

    Below 0 it makes things worse. From the checkpoint's card, by `unperturb assess --write-card` or the harness.
    """

    n: int
    budget: str = Field(description="of the attacks: fast, standard or full")
    knows_everything: Gain | None = Field(description="the worst case of attacks that know the purifier")
    does_not_know: Gain | None = Field(description="images attacked without knowing of it")
    clean: Gain | None


def worth_of(figures: dict[str, Any], preset: str) -> Worth | None:
    """Return what a card says of a preset, or None."""
    assessed = figures.get("assessment", {})
    found = assessed.get("presets", {}).get(preset)
    if found is None:
        return None

    def gain(name: str) -> Gain | None:
        value, interval = found.get(name), found.get(f"{name}_interval")
        return None if value is None or interval is None else Gain(mean=value, interval=interval)

    transfer = found.get("transfer_gain")
    return Worth(
        n=assessed["n"],
        budget=assessed["budget"],
        knows_everything=gain("gain"),
        does_not_know=None if transfer is None else Gain(mean=transfer["mean"], interval=transfer["interval"]),
        clean=gain("clean_gain"),
    )
