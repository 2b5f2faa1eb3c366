"""The registry of attacks: a name -> what it is, when it applies, and what it may cost."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from unperturb.benchmarks.robustness.attacks import adaptive, black_box, controls, label_free
from unperturb.benchmarks.robustness.attacks.scene import Budget, Scene
from unperturb.models.attacks.instance import DISTANCES
from unperturb.models.errors import ConfigError


@dataclass(frozen=True)
class Attack:
    """One attack.

    run:     a scene -> adversarial images; batchmate's also says itself which images are broken
    queries: the most calls of the defended classifier per image, with and without a gradient
    adaptive: whether it needs a purifier to attack
    """

    run: Callable[[Scene], Tensor | tuple[Tensor, Tensor]]
    queries: Callable[[Budget], tuple[int, int]]
    adaptive: bool = False


AUTOATTACK, TRANSFER = "autoattack", "transfer"  # run by the evaluation: one in its own process, one from its points

ATTACKS: dict[str, Attack] = {
    "noise": Attack(controls.noise, lambda b: (0, 0)),
    "bpda-apgd-ce": Attack(adaptive.bpda_apgd_ce, lambda b: (b.restarts * (b.apgd_steps + 1), b.restarts)),
    "bpda-apgd-dlr": Attack(
        adaptive.bpda_apgd_dlr, lambda b: (b.targets * b.restarts * (b.apgd_steps + 1), b.targets * b.restarts + 1)
    ),
    "bpda-apgd-ce-fresh": Attack(
        adaptive.bpda_apgd_ce_fresh, lambda b: (b.restarts * b.eot * (b.adaptive_steps + 1), b.restarts), adaptive=True
    ),
    "bpda-apgd-dlr-fresh": Attack(
        adaptive.bpda_apgd_dlr_fresh, lambda b: (b.restarts * b.eot * (b.adaptive_steps + 1), b.restarts), adaptive=True
    ),
    "bpda-contrastive": Attack(
        adaptive.bpda_contrastive,
        lambda b: (len(b.lambdas) * b.restarts * (b.adaptive_steps + 1), len(b.lambdas) * b.restarts),
        adaptive=True,
    ),
    "unrolled": Attack(
        adaptive.unrolled, lambda b: (3 * b.restarts * (b.adaptive_steps + 1), b.restarts), adaptive=True
    ),
    "intermediate": Attack(
        adaptive.intermediate, lambda b: (2 * b.restarts * (b.adaptive_steps + 1), 3 * b.restarts), adaptive=True
    ),
    "square": Attack(black_box.square, lambda b: (0, b.square_queries)),
    "rays": Attack(black_box.rays, lambda b: (0, b.rays_queries)),
    "batchmate": Attack(
        controls.batchmate,
        lambda b: (3 * (b.mates + 1) * b.mate_steps, (b.mates + 1) * (b.mate_steps + 1)),
        adaptive=True,
    ),
}
GENERATOR = "generator"
# Run where they are named; `all` is what the headline is of.
BY_NAME: dict[str, Attack] = {
    **{
        f"instance-{distance}": Attack(partial(label_free.instance, distance=distance), lambda b: (b.adaptive_steps, 2))
        for distance in DISTANCES
    },
    GENERATOR: Attack(label_free.generated, lambda b: (0, 0)),
}
FRESH_ATTACKS = ("bpda-apgd-ce-fresh", "bpda-apgd-dlr-fresh")
NAMES = (AUTOATTACK, TRANSFER, *ATTACKS)
ATTACKS |= BY_NAME
KNOWN = (AUTOATTACK, TRANSFER, *ATTACKS)
FAST = (AUTOATTACK, TRANSFER, "noise", "bpda-apgd-ce", "bpda-apgd-dlr")


def chosen(text: str) -> tuple[str, ...]:
    """`all`, `fast`, or names between commas, in the order in which they run; ConfigError lists the names."""
    wanted = {"all": NAMES, "fast": FAST}.get(text) or tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in wanted if name not in KNOWN]
    if unknown or not wanted:
        raise ConfigError(f"attacks={text!r}: choose all, fast, or names of {', '.join(KNOWN)}")
    needed = {*wanted, AUTOATTACK} if TRANSFER in wanted else set(wanted)
    return tuple(name for name in KNOWN if name in needed)


def applies(name: str, *, purifies: bool) -> bool:
    """Return whether the attack says anything that another does not: without a purifier the adaptive ones do not."""
    return purifies or not (name == TRANSFER or (name in ATTACKS and ATTACKS[name].adaptive))
