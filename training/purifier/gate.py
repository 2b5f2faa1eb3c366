"""`unperturb train gate`: from which first loss on an image is worth purifying, measured on clean images.

An image whose InfoNCE loss is within a quantile of what clean training images have, which no training of the
classifier, the head or the restorer saw, is left as it is (`purify=auto`, `reverse-attack:gate=auto`). A loss depends
on the views, so the gate holds for the seed that it was measured with, the service's own. It is part of the defense: an
attack that keeps the loss low passes it, and the harness attacks through it.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unperturb.models import provenance
from unperturb.models.attacks.pgd import pgd
from unperturb.models.attacks.projected_gradient import require_pixel_units
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import GATE_SEED
from unperturb.models.devices import opened_device
from unperturb.models.errors import ConfigError
from unperturb.models.inference.folding import prepared
from unperturb.models.options import option
from unperturb.models.purifiers.defended import reverse_attack_of
from unperturb.models.purifiers.reverse_attack import PRESETS, ReverseAttack
from unperturb.training import data, held_out


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Measure the losses of clean images, and write the quantile of every preset onto the checkpoint's card."""

    checkpoint: str = option("shipped name or folder; its card is replaced")
    data: str = option("the data set that the checkpoint was trained on")
    quantile: float = option("share of clean images that are to be left as they are", 0.9)
    images: int = option("images that training kept back, the first ones, at least 2; 0 for all", 0)
    epsilon: float = option("radius of the attack whose images are counted beside the clean ones, L-infinity", 8 / 255)
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb/images)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if not 0 < self.quantile < 1:
            raise ConfigError(f"quantile={self.quantile} is not between 0 and 1")
        require_pixel_units(self.epsilon)
        if self.images < 0 or self.images == 1:
            raise ConfigError(
                f"images={self.images} is neither 0, for all, nor at least 2: their losses have no spread"
            )


def set_gates(config: GateConfig) -> None:
    """Measure, and replace the card."""
    device = opened_device(config.device)
    loaded = store.load(config.checkpoint, device=device)
    dataset = data.load_for(loaded.card, config.data, cache=config.cache)
    held = data.first(held_out.kept_back(dataset, loaded.card), config.images, device)
    gates: dict[str, Any] = {}
    for name, preset in PRESETS.items():
        if not preset.loop.steps:  # no loss is measured, and nothing saved
            continue
        purifier = reverse_attack_of(prepared(loaded), preset)
        clean, attacked = first_losses(purifier, held, epsilon=config.epsilon)
        deviation = float(clean.std()) if len(clean) > 1 else 0.0
        if not deviation > 0:
            raise ConfigError(f"{name}: the losses of {len(clean)} clean images do not differ; give others, or more")
        gate = float(clean.quantile(config.quantile))
        gates[name] = {
            "loss": gate,
            "seed": GATE_SEED,
            "quantile": config.quantile,
            "n": len(clean),
            "weights_sha256": loaded.card.weights_sha256,
            "commit": provenance.commit(),
            "clean_mean": float(clean.mean()),
            "clean_std": deviation,
            "attacked_mean": float(attacked.mean()),
            "clean_left": float((clean <= gate).float().mean()),
            "attacked_left": float((attacked <= gate).float().mean()),
            "attack_epsilon": config.epsilon,
        }
        print(
            f"{name}: gate {gate:.4f}; {gates[name]['clean_left']:.1%} of clean and "
            f"{gates[name]['attacked_left']:.1%} of attacked images (PGD-20) are left as they are; mean loss "
            f"{gates[name]['clean_mean']:.3f} and {gates[name]['attacked_mean']:.3f}"
        )
    store.write_card(store.resolve(config.checkpoint), dataclasses.replace(loaded.card, gates=gates))


def first_losses(purifier: ReverseAttack, held: data.Split, *, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the loss before the first step of each image, as it is and attacked (PGD-20 on the classifier alone)."""
    clean: list[Tensor] = []
    attacked: list[Tensor] = []
    numbers = torch.arange(len(held.labels), device=held.labels.device)
    for some in numbers.split(data.at_once(held.images)):
        x = held.images[some].float() / 255
        moved = pgd(
            purifier.classifier, x, held.labels[some], epsilon=epsilon, step_size=epsilon / 4, steps=20, seeds=some
        )
        seeds = torch.full_like(some, GATE_SEED)
        for found, images in ((clean, x), (attacked, moved)):
            with torch.no_grad():
                found.append(purifier.objective(images, seeds)(purifier.loop.begin(images, seeds), 0))
    return torch.cat(clean), torch.cat(attacked)
