"""AutoAttack (Croce & Hein, ICML 2020), standard version: its four attacks, each on the images that are left.

pyautoattack's attacks are called one by one, in this process: its own driver counts calls through `sys.settrace`, which
it never resets, so that it flags every later model.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.threat import Threat
from unperturb.models.shapes import Float, Int

if TYPE_CHECKING:
    from unperturb.benchmarks.robustness.attacks.scene import Scene

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETED, LEAST_CLASSES = ("apgd-t",), 4  # its targeted DLR loss takes the fourth largest logit
QUERIES = ("square",)
MOST_TARGETS = 9


def on_scene(part: str, scene: "Scene") -> Float[Tensor, "n 3 h w"]:
    """Return what the attack `part` makes of a scene's images: by the full gradient, and Square by what is served."""
    opened = scene if part in QUERIES else scene.opened()

    def predict(x: Tensor) -> Tensor:
        scores = opened.logits(x)
        if opened is not scene and scene.is_cut:  # the gradient of some steps, and the answer of all
            with torch.no_grad():
                served = scene.logits(x)
            scores = scores + (served - scores).detach()
        if x.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:  # a classifier without a gradient
            scores = scores + 0 * x.flatten(1).sum(1, keepdim=True)
        return scores

    return run_part(
        part,
        predict,
        scene.x,
        scene.labels,
        classes=scene.classifier.num_classes,
        threat=scene.threat,
        steps=scene.budget.autoattack_steps,
        queries=scene.budget.autoattack_queries,
        seed=scene.attack_seed,
    )


def run_part(
    part: str,
    predict: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n 3 h w"],
    labels: Int[Tensor, " n"],
    *,
    classes: int,
    threat: Threat,
    steps: int,
    queries: int,
    seed: int,
) -> Float[Tensor, "n 3 h w"]:
    """Return what the attack `part` makes of images that `predict` gets right; the standard has 100 steps and 5,000
    queries. With fewer than four classes `apgd-t` returns the images as they are.
    """
    if part in TARGETED and classes < LEAST_CLASSES:
        return x
    attack = _attack(part, predict, classes=classes, threat=threat, steps=steps, queries=queries, seed=seed, x=x)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.no_grad():
        found: Tensor = attack.perturb(x.clone(), labels.clone())
    return found.detach()


def _attack(
    part: str,
    predict: Callable[[Tensor], Tensor],
    *,
    classes: int,
    threat: Threat,
    steps: int,
    queries: int,
    seed: int,
    x: Tensor,
) -> Any:  # noqa: ANN401
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    norm: Literal["Linf", "L2"] = "Linf" if threat.norm == "linf" else "L2"
    quiet = logging.Logger("autoattack")  # of zero gradients the record's flags and notes tell
    quiet.addHandler(logging.NullHandler())
    common: dict[str, Any] = {"eps": threat.epsilon, "norm": norm, "seed": seed, "device": x.device}
    if part == "apgd-ce":
        return APGDAttack(predict, n_restarts=1, n_iter=steps, eot_iter=1, rho=0.75, loss="ce", logger=quiet, **common)
    if part == "apgd-t":
        attack = APGDAttack_targeted(predict, n_restarts=1, n_iter=steps, eot_iter=1, rho=0.75, logger=quiet, **common)
        attack.n_target_classes = min(MOST_TARGETS, classes - 1)
        return attack
    if part == "fab-t":
        attack = FABAttack_PT(predict, n_restarts=1, n_iter=steps, **common)
        attack.targeted, attack.n_target_classes = True, min(MOST_TARGETS, classes - 1)
        return attack
    if part == "square":
        return SquareAttack(predict, p_init=0.8, n_queries=queries, n_restarts=1, resc_schedule=False, **common)
    raise ValueError(f"AutoAttack has no {part!r}")
