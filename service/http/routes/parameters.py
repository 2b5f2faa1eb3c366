"""The options of a request, in its query or in a JSON body."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from unperturb.models.checkpoints.card import GATE_SEED, gate_of
from unperturb.models.errors import CheckpointError
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.engine.registry import Model
from unperturb.service.errors import UnprocessableError
from unperturb.service.http import json_body
from unperturb.service.http.upload import Upload
from unperturb.service.http.worth import PURPOSES

MAX_SEED = 2**63 - 1
SHOWN = 5
P = TypeVar("P", bound="Purify")


class Purify(BaseModel):
    """The model, and how its purifier runs; unknown names are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(
        None, max_length=json_body.MAX_NAME, description="id of a loaded model; the default one where none is named"
    )
    preset: Annotated[str, Field(json_schema_extra={"enum": list(PRESETS)})] | None = Field(
        None,
        max_length=json_body.MAX_NAME,
        description="of the purifier; the service's own default where none is named. "
        + "; ".join(f"{name}: {purpose.replace('; ', ', ')}" for name, purpose in PURPOSES.items()),
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="of the purifier's random views")

    def updated(self: P, upload: Upload) -> P:
        """Return these of the query with those of the body; raise UnprocessableError for one that stands in both."""
        if twice := sorted(self.model_fields_set & upload.parameters.keys()):
            raise UnprocessableError(f"{twice[0]}: it stands in the query and in the body")
        both = {**self.model_dump(exclude_unset=True), **upload.parameters}
        return json_body.validate(type(self), both, within=upload.within)

    @field_validator("preset")
    @classmethod
    def preset_exists(cls, value: str | None) -> str | None:
        """Refuse an unknown preset."""
        if value is not None and value not in PRESETS:
            raise ValueError(f"{value!r} is not one of {', '.join(PRESETS)}")
        return value


class PurifyOrNot(Purify):
    """The purifier's options, and whether it runs."""

    purify: Literal["always", "auto", "never"] = Field(
        "always",
        description="run the reverse attack first; auto: but for images whose loss is that of clean ones, which saves "
        "time and, in front of an adversarially trained classifier, protects from nothing: most attacked images have "
        "such a loss there, too",
    )

    def stage(self, default: str) -> str | None:
        """Return the preset that its images go through, `default` where none is named; None without purification."""
        return None if self.purify == "never" else self.preset or default

    def gate(self, model: Model, default: str) -> float | None:
        """Return the first loss up to which an image is left as it is; raise UnprocessableError without one."""
        if self.purify != "auto":
            return None
        if not PRESETS[self.preset or default].loop.steps:
            raise UnprocessableError(
                f"purify: auto is for presets with steps, which {self.preset or default!r} has not"
            )
        if self.seed != GATE_SEED:
            raise UnprocessableError(f"seed: purify=auto was measured with the seed {GATE_SEED}, not {self.seed}")
        try:
            return gate_of(model.card, self.preset or default)
        except CheckpointError as error:
            raise UnprocessableError(f"purify: {error}") from error


class Classify(PurifyOrNot):
    """The purifier's options, whether it runs, and what the answer shows."""

    top_k: int | None = Field(None, ge=1, description="classes in the answer; 5, or all of fewer, where none is named")
    return_image: bool = Field(False, description="put the purified image into the answer")

    def classes(self, model: Model) -> int:
        """Return how many classes to show; raise UnprocessableError for more than there are."""
        count = len(model.card.classes)
        if self.top_k is not None and self.top_k > count:
            raise UnprocessableError(f"top_k: {self.top_k} is more than the model's {count} classes")
        return self.top_k or min(SHOWN, count)
