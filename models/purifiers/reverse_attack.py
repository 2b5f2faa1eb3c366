"""The reverse attack: a small change that lowers an image's InfoNCE loss (Mao et al., ICCV 2021, arXiv 2103.14222).

    minimise L_s(x0 + r)   subject to   |r|∞ ≤ ε_v,  x0 + r in [0, 1]

Where the checkpoint has a restorer, the received image with its estimated perturbation taken off is one more view: its
embedding, the anchor, stays as it is, and the others are drawn towards it. Other than in the paper's code, the
negatives are a stored bank instead of the other images of the batch, so that an image's result is its own.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unperturb.models.attacks.projected_gradient import RAMP, Objective, ProjectedGradient
from unperturb.models.contrastive.loss import NegativePolicy, info_nce
from unperturb.models.contrastive.views import ViewPolicy, make_views
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.networks.head import NegativesBank, ProjectionHead
from unperturb.models.networks.restorer import Restorer
from unperturb.models.purifiers.base import Purifier
from unperturb.models.purifiers.vote import Vote
from unperturb.models.shapes import Float, Int, UInt8


@dataclass(frozen=True, kw_only=True)
class ReverseAttackConfig:
    """The purifier's parameters; epsilon and step_size are in `loop`, in pixel units of [0, 1].

    policy: of the views; None: SimCLR's, or beside a restored view, mirrored at random alone
    vote: of the classifier on the purified image, its shifts for images of 32 pixels; None: it sees the image alone.
        With a loop of no steps there is the vote alone, and no head is needed
    restored: how far the restorer goes for the restored view, as a multiple of what it takes off by itself; 0, or a
        checkpoint without a restorer: there is no such view
    restores: what the restorer makes of an image takes its place, and there are no steps
    """

    loop: ProjectedGradient
    views: int
    temperature: float = 0.2
    negatives: NegativePolicy = field(default_factory=NegativePolicy)
    policy: ViewPolicy | None = None
    restored: float = 0.0
    vote: Vote | None = None
    restores: bool = False

    @property
    def changes(self) -> bool:
        """Return whether it changes an image at all: a vote alone does not."""
        return self.loop.steps > 0 or self.restores

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if self.views < 2:
            raise ConfigError(f"views={self.views} must be at least 2: one view has no positive")
        if not 0 <= self.restored < float("inf"):
            raise ConfigError(f"restored={self.restored} must be a number of at least 0")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be above 0")
        if self.loop.direction != "descend":
            raise ConfigError(f"direction={self.loop.direction!r}: a reverse attack descends")
        if self.restores and self.loop.steps:
            raise ConfigError(f"steps={self.loop.steps}: a restorer in an image's place takes none")


MIRRORED = ViewPolicy(
    crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, grayscale=0.0
)  # a restored view shows what is at each pixel; crops and colours hide it
PAIR = replace(MIRRORED, alternate=True)  # the image and its mirror image: nothing is drawn

PRESETS: dict[str, ReverseAttackConfig] = {
    "default": ReverseAttackConfig(
        loop=ProjectedGradient(direction="descend", epsilon=1 / 255, step_size=1 / 255, steps=1, step="soft"),
        views=2,
        policy=PAIR,
        restored=1.0,
        vote=Vote(),
    ),  # the smallest step that 8 bits can hold: a larger one helps whoever steers it (docs/results/presets.md)
    "vote": ReverseAttackConfig(
        loop=ProjectedGradient(direction="descend", epsilon=0.0, step_size=0.0, steps=0), views=2, vote=Vote()
    ),
    "transfer": ReverseAttackConfig(
        loop=ProjectedGradient(direction="descend", epsilon=8 / 255, step_size=6 / 255, steps=1, ramp=RAMP),
        views=2,
        restored=1.0,
        vote=Vote(),
    ),
    "restorer": ReverseAttackConfig(
        loop=ProjectedGradient(direction="descend", epsilon=0.0, step_size=0.0, steps=0), views=2, restores=True
    ),  # within what its restorer may do: see `preset_of`
    "published": ReverseAttackConfig(
        loop=ProjectedGradient(
            direction="descend", epsilon=16 / 255, step_size=2 / 255, steps=40, start="uniform", ramp=RAMP
        ),
        views=4,
    ),
}


def preset(name: str) -> ReverseAttackConfig:
    """Return a preset by name; ConfigError lists the names."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


def changing(name: str) -> ReverseAttackConfig:
    """Return a preset by name; ConfigError for one that changes no image."""
    config = preset(name)
    if not config.changes:
        raise ConfigError(f"preset {name!r} has no steps: it changes no image")
    return config


class ReverseAttack(Purifier):
    """The purifier of one classifier, with its head and bank; no weight of theirs is ever changed."""

    def __init__(
        self,
        classifier: ImageClassifier,
        head: ProjectionHead,
        bank: NegativesBank,
        config: ReverseAttackConfig,
        restorer: Restorer | None = None,
    ) -> None:
        super().__init__(classifier, config.loop)
        self.restorer = restorer.eval() if restorer is not None and config.restored else None
        self.head, self.bank, self.config = head.eval(), bank, config
        self.policy = config.policy or (ViewPolicy() if self.restorer is None else MIRRORED)
        if config.negatives.count > len(bank.labels):
            raise ConfigError(f"negatives.count={config.negatives.count} of a bank of {len(bank.labels)}")
        self.thresholds: Tensor | None
        self.register_buffer("thresholds", config.negatives.thresholds(bank.embeddings), persistent=False)

    def objective(self, x: Float[Tensor, "batch 3 h w"], seeds: Int[Tensor, " batch"]) -> Objective:
        """Return the InfoNCE loss of each image, on new views at every step."""
        if torch.is_grad_enabled() and x.requires_grad:  # each step's gradient goes through an anchor of its own
            return lambda iterate, step: self.loss(iterate, step, seeds, self.anchor(x))
        with torch.no_grad():
            anchor = self.anchor(x)
        return lambda iterate, step: self.loss(iterate, step, seeds, anchor)

    def anchor(self, received: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch dim"] | None:
        """Return the embedding of each received image's restored view; None without a restorer."""
        if self.restorer is None:
            return None
        restored = self.restorer.restored(received, factor=self.config.restored)
        embedding: Tensor = self.head(self.classifier.features(restored))
        return embedding

    def loss(
        self,
        x: Float[Tensor, "batch 3 h w"],
        step: int | Int[Tensor, " batch"],
        seeds: Int[Tensor, " batch"],
        anchor: Float[Tensor, "batch dim"] | None,
    ) -> Float[Tensor, " batch"]:
        """Return InfoNCE of each image over the views of `step` and the anchor, against the bank."""
        return self.loss_of(self.classifier.features(self.inputs(x, step, seeds)), seeds, anchor)

    def inputs(
        self, x: Float[Tensor, "batch 3 h w"], step: int | Int[Tensor, " batch"], seeds: Int[Tensor, " batch"]
    ) -> Float[Tensor, "rows 3 h w"]:
        """Return the views of each image at its step, one image's after another's."""
        return make_views(x, seeds=seeds, step=step, views=self.config.views, policy=self.policy).flatten(0, 1)

    def loss_of(
        self,
        features: Float[Tensor, "rows features"],
        seeds: Int[Tensor, " batch"],
        anchor: Float[Tensor, "batch dim"] | None,
    ) -> Float[Tensor, " batch"]:
        """Return InfoNCE of each image from the features of its `inputs`, and its anchor."""
        config, negatives = self.config, self.bank.embeddings
        embeddings = self.head(features).view(len(seeds), config.views, -1)  # batch views dim
        if anchor is not None:
            embeddings = torch.cat((embeddings, anchor[:, None]), dim=1)
        keep = config.negatives.keep(embeddings, negatives, seeds, self.thresholds)
        return info_nce(embeddings, negatives, temperature=config.temperature, keep=keep)


def to_uint8(
    purified: Float[Tensor, "batch 3 h w"], received: Float[Tensor, "batch 3 h w"], *, epsilon: float
) -> UInt8[Tensor, "batch 3 h w"]:
    """Round to the nearest 8-bit image that is still within epsilon (L-infinity) of the received one.

    Where no 8-bit value lies that near (epsilon under half a level and a received value between two), the nearest
    level to the received value.
    """
    slack = 1e-3  # levels; float32 does not hold 8 / 255 exactly
    low = ((received - epsilon) * 255 - slack).ceil()
    high = ((received + epsilon) * 255 + slack).floor()
    inside = torch.minimum(torch.maximum((purified * 255).round(), low), high)
    return torch.where(low <= high, inside, (received * 255).round()).clamp(0, 255).to(torch.uint8)
