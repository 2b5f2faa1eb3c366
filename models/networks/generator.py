"""A network that makes an adversarial perturbation in one pass: an image -> noise of at most ε (a contrastive attack
generator, after Uysal and Baytaş), and its checkpoint.

    x_adv = clamp(x + ε · tanh(G(x)), 0, 1)
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from unperturb.models import provenance
from unperturb.models.checkpoints.card import from_json
from unperturb.models.checkpoints.store import CARD, WEIGHTS, read_object, read_weights, write_weights
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.files import write_whole
from unperturb.models.shapes import Float

SCHEMA_VERSION = 1
GROUPS = 8  # of GroupNorm, which unlike BatchNorm keeps an image's noise its own


@dataclass(frozen=True, kw_only=True)
class GeneratorCard:
    """The content of a generator's card.json.

    epsilon: radius in pixel units of [0, 1]; width: channels at full size
    classifier_sha256: of the frozen classifier's tensors, before and after the training
    """

    id: str
    epsilon: float
    width: int
    classifier_sha256: tuple[str, str]
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""
    kind: str = "generator"
    schema_version: int = SCHEMA_VERSION


class NoiseGenerator(nn.Module):
    """Images in [0, 1] -> images within ε of them: two halvings, two residual blocks, two doublings, skips between."""

    def __init__(self, *, width: int, epsilon: float) -> None:
        super().__init__()
        if width < GROUPS or width % GROUPS:
            raise ConfigError(f"width={width} must be a multiple of {GROUPS}")
        if not 0 < epsilon < 1:
            raise ConfigError(f"epsilon={epsilon} is not in (0, 1): it is in pixel units, as in 8/255")
        self.epsilon = epsilon
        self.stem = _layer(3, width, 1)
        self.down = nn.ModuleList([_layer(width, 2 * width, 2), _layer(2 * width, 4 * width, 2)])
        self.middle = nn.ModuleList([_layer(4 * width, 4 * width, 1) for _ in range(2)])
        self.up = nn.ModuleList([_layer(4 * width + 2 * width, 2 * width, 1), _layer(2 * width + width, width, 1)])
        self.last = nn.Conv2d(width, 3, 3, 1, 1)

    def noise(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Return the noise in (-1, 1); the images' sides are multiples of 4."""
        wide = self.stem(2 * x - 1)
        half = self.down[0](wide)
        low = self.down[1](half)
        for block in self.middle:
            low = low + block(low)
        for block, skipped in zip(self.up, (half, wide), strict=True):
            low = block(torch.cat((nn.functional.interpolate(low, scale_factor=2.0), skipped), dim=1))
        return cast(Tensor, self.last(low)).float().tanh()

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Return the attacked images, in [0, 1]."""
        return (x + self.epsilon * self.noise(x)).clamp(0, 1)


def _layer(inside: int, outside: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.GroupNorm(GROUPS, outside), nn.SiLU())


def save(folder: Path, generator: NoiseGenerator, card: GeneratorCard) -> GeneratorCard:
    """Write the folder, weights first, and return the finished card."""
    digest = write_weights(folder / WEIGHTS, {"generator": generator})
    made_by = {"commit": provenance.commit(), "versions": provenance.versions()}
    card = dataclasses.replace(card, weights_sha256=digest, made_by=made_by)
    write_whole(folder / CARD, (json.dumps(dataclasses.asdict(card), indent=2) + "\n").encode())
    return card


def load(folder: Path, *, device: str | torch.device = "cpu") -> tuple[NoiseGenerator, GeneratorCard]:
    """Return the generator of a folder, frozen, and its card; CheckpointError names the file and the fault."""
    file = folder / CARD
    raw = read_object(file)
    if (raw.get("kind"), raw.get("schema_version")) != ("generator", SCHEMA_VERSION):
        raise CheckpointError(f"{file} is not a generator's card of schema version {SCHEMA_VERSION}")
    card = from_json(GeneratorCard, raw, file)
    try:
        generator = NoiseGenerator(width=card.width, epsilon=card.epsilon)
    except (ConfigError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file} describes a generator that cannot be built: {error}") from error
    read_weights(folder / WEIGHTS, card.weights_sha256, {"generator": generator})
    return generator.eval().requires_grad_(False).to(device), card
