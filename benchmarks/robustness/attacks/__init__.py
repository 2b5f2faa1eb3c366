"""The registry of attacks: a name -> what it is, which images it is run on, what it needs, and what it may cost."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Literal, NamedTuple

from torch import Tensor

from unperturb.benchmarks.robustness.attacks import adaptive, black_box, controls, label_free, surrogate, transfer
from unperturb.benchmarks.robustness.attacks import autoattack as aa
from unperturb.benchmarks.robustness.attacks.scene import Scene
from unperturb.benchmarks.robustness.budgets import Budget
from unperturb.models.attacks.instance import DISTANCES
from unperturb.models.errors import ConfigError

Need = Literal["defense", "purifier", "steps", "objective", "randomness"]
Run = Callable[[Scene], Tensor | tuple[Tensor, Tensor]]


class Queries(NamedTuple):
    """The most calls of the defended classifier per image: with the full gradient, with BPDA's, and with none."""

    full: int = 0
    bpda: int = 0
    none: int = 0


@dataclass(frozen=True)
class Attack:
    """One attack.

    run:     a scene -> adversarial images; batchmate's also says itself which images are broken
    queries: what it may cost
    budget:  the fields of the budget that it reads
    on:      "right": every image that is classified right, so that it has a figure of its own; "left": those that
             nothing before it has broken; or a name: those that withstood that attack
    needs:   what a defense must have for the attack to say anything that another does not
    parts:   runs in turn, each on the images that are left, instead of `run`
    """

    run: Run
    queries: Callable[[Budget], Queries]
    budget: tuple[str, ...] = ()
    on: str = "left"
    needs: tuple[Need, ...] = ()
    parts: Mapping[str, Run] = field(default_factory=dict)

    @property
    def runs(self) -> Mapping[str, Run]:
        """Return the parts by name, or the one run without a name."""
        return self.parts or {"": self.run}

    @property
    def code(self) -> ModuleType:
        """Return the module that the attack is written in."""
        function = self.run.func if isinstance(self.run, partial) else self.run
        return sys.modules[function.__module__]


AUTOATTACK, DEFENDED_AUTOATTACK = "autoattack", "defended-autoattack"
TRANSFER, FURTHER = UNKNOWING = ("transfer", "transfer-further")
SURROGATE = "surrogate"  # its attacker knows not even the classifier
GRADIENT, TWICE, GENERATOR = "apgd-ce", "apgd-ce-twice", "generator"
QUERYING = ("square", "rays")  # attacks without a gradient; so is AutoAttack's part of the first name
FRESH_ATTACKS = ("bpda-apgd-ce-fresh", "bpda-apgd-dlr-fresh", "apgd-ce-fresh")
APGD = ("apgd_steps", "restarts")
ADAPTIVE = ("adaptive_steps", "restarts")


def _autoattack_queries(budget: Budget) -> Queries:
    gradients = (1 + 2 * aa.MOST_TARGETS) * budget.autoattack_steps
    return Queries(full=gradients, none=budget.autoattack_queries + gradients // 2)


def _standard(needs: tuple[Need, ...], on: str) -> Attack:
    parts: dict[str, Run] = {part: partial(aa.on_scene, part) for part in aa.PARTS}
    fields = ("autoattack_steps", "autoattack_queries", "unrolled_steps")
    return Attack(aa.on_scene, _autoattack_queries, fields, on, needs, parts)  # type: ignore[arg-type]


def _of_purifier(run: Run, queries: Callable[[Budget], Queries], budget: tuple[str, ...], *needs: Need) -> Attack:
    return Attack(run, queries, budget, needs=("purifier", *needs))


# In the order in which they run: from cheap to dear, and those without a gradient last.
ATTACKS: dict[str, Attack] = {
    AUTOATTACK: _standard((), "right"),
    "noise": Attack(controls.noise, lambda b: Queries(), on="right"),
    GRADIENT: Attack(
        adaptive.apgd_ce,
        lambda b: Queries(full=b.restarts * (b.apgd_steps + 1), none=b.restarts),
        (*APGD, "unrolled_steps"),
        "right",
    ),
    TWICE: Attack(
        adaptive.apgd_ce_twice,
        lambda b: Queries(full=b.restarts * (2 * b.apgd_steps + 1), none=b.restarts),
        (*APGD, "unrolled_steps"),
        GRADIENT,
    ),
    TRANSFER: Attack(transfer.transferred, lambda b: Queries(none=1), on="right", needs=("defense",)),
    "bpda-apgd-ce": _of_purifier(
        adaptive.bpda_apgd_ce, lambda b: Queries(bpda=b.restarts * (b.apgd_steps + 1), none=b.restarts), APGD
    ),
    "bpda-apgd-dlr": _of_purifier(
        adaptive.bpda_apgd_dlr,
        lambda b: Queries(bpda=b.targets * b.restarts * (b.apgd_steps + 1), none=b.targets * b.restarts + 1),
        (*APGD, "targets"),
    ),
    "intermediate": _of_purifier(
        adaptive.intermediate,
        lambda b: Queries(bpda=2 * b.restarts * (b.adaptive_steps + 1), none=3 * b.restarts),
        ADAPTIVE,
        "steps",
    ),
    "bpda-contrastive": _of_purifier(
        adaptive.bpda_contrastive,
        lambda b: Queries(bpda=len(b.lambdas) * b.restarts * (b.adaptive_steps + 1), none=len(b.lambdas) * b.restarts),
        (*ADAPTIVE, "lambdas"),
        "objective",
    ),
    **{
        name: _of_purifier(
            run,
            lambda b: Queries(bpda=b.restarts * b.eot * (b.adaptive_steps + 1), none=b.restarts),
            (*ADAPTIVE, "eot"),
            "randomness",
        )
        for name, run in zip(
            FRESH_ATTACKS[:2], (adaptive.bpda_apgd_ce_fresh, adaptive.bpda_apgd_dlr_fresh), strict=True
        )
    },
    FRESH_ATTACKS[2]: _of_purifier(
        adaptive.apgd_ce_fresh,
        lambda b: Queries(full=b.restarts * b.eot * (b.adaptive_steps + 1), none=b.restarts),
        (*ADAPTIVE, "eot", "unrolled_steps"),
        "randomness",
    ),
    "batchmate": _of_purifier(
        controls.batchmate,
        lambda b: Queries(full=(b.mates + 1) * b.mate_steps, none=(b.mates + 1) * (b.mate_steps + 1)),
        ("mates", "mate_steps", "unrolled_steps"),
    ),
    DEFENDED_AUTOATTACK: _standard(("defense",), "left"),
    "rays": Attack(black_box.rays, lambda b: Queries(none=b.rays_queries), ("rays_queries",)),
}
NAMES = (*ATTACKS, FURTHER)
ATTACKS |= {  # Run where they are named; `all` is what the headline is of.
    "apgd-t": Attack(
        adaptive.apgd_t,
        lambda b: Queries(full=b.targets * b.restarts * (b.apgd_steps + 1), none=b.targets * b.restarts + 1),
        (*APGD, "targets", "unrolled_steps"),
    ),
    "square": Attack(black_box.square, lambda b: Queries(none=b.square_queries), ("square_queries",)),
    **{
        f"instance-{distance}": Attack(
            partial(label_free.instance, distance=distance),
            lambda b: Queries(bpda=b.adaptive_steps, none=2),
            ("adaptive_steps",),
            "right",
        )
        for distance in DISTANCES
    },
    GENERATOR: Attack(label_free.generated, lambda b: Queries(), on="right"),
    # Last, so that what it breaks is not taken from those who know more.
    FURTHER: Attack(
        transfer.transferred_further, lambda b: Queries(none=1), ("apgd_steps",), on="right", needs=("defense",)
    ),
    SURROGATE: Attack(surrogate.shown, lambda b: Queries(none=1), APGD, on="right"),
}
KNOWN = tuple(ATTACKS)
FAST = (AUTOATTACK, "noise", GRADIENT, TRANSFER, "bpda-apgd-ce", "bpda-apgd-dlr", DEFENDED_AUTOATTACK, FURTHER)


def chosen(text: str, *, with_surrogate: bool = False) -> tuple[str, ...]:
    """`all`, `fast`, or names between commas, in the order in which they run; ConfigError lists the names.

    The attack `surrogate` is among them where there is one, and is refused where there is none.
    """
    wanted = {"all": NAMES, "fast": FAST}.get(text) or tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in wanted if name not in KNOWN]
    if unknown or not wanted:
        raise ConfigError(f"attacks={text!r}: choose all, fast, or names of {', '.join(KNOWN)}")
    if SURROGATE in wanted and not with_surrogate:
        raise ConfigError(f"attacks={text!r}: the attack `surrogate` needs another classifier: --surrogate CHECKPOINT")
    needed = {*wanted, SURROGATE} if with_surrogate else set(wanted)
    needed |= set(UNKNOWING) if needed.intersection(UNKNOWING) else set()
    needed |= {AUTOATTACK} if {TRANSFER, DEFENDED_AUTOATTACK} & needed else set()
    needed |= {GRADIENT} if TWICE in wanted else set()
    return tuple(name for name in KNOWN if name in needed)
