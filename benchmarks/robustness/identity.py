"""What a stored unit depends on: classifier, defense and attack, each by its parameters, its own code and the versions
of the packages that this imports.

So neither an edited purifier nor an unrelated package makes AutoAttack run again on the unchanged classifier.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from unperturb.benchmarks.robustness.attacks import ATTACKS, AUTOATTACK, SURROGATE, Attack, Need
from unperturb.benchmarks.robustness.budgets import Budget
from unperturb.benchmarks.robustness.code import PROJECT, code_digest, versions_behind
from unperturb.benchmarks.robustness.fingerprint import fingerprint
from unperturb.benchmarks.robustness.foreign import AnyPurifier
from unperturb.benchmarks.robustness.units import digest_of_tensors
from unperturb.models.networks.generator import NoiseGenerator
from unperturb.models.purifiers.base import NoPurifier
from unperturb.models.purifiers.defended import DefendedClassifier

LOADING = "unperturb.models.checkpoints"  # what it loads has a digest of its own
# What attacks import of these is the defense, which has a digest of its own.
OTHERS = ("unperturb.models.purifiers", LOADING)
DEFENSE_PACKAGES = (*OTHERS, "unperturb.models.networks")
JUDGES = ("unperturb.benchmarks.robustness.judging", "unperturb.benchmarks.robustness.attacks.scene")
LIBRARIES = ("torch", "torchvision", "timm")
# What a purifier could offer and does not; the other needs are those of another kind of defense.
REASONS: dict[Need | None, str] = {
    "steps": "the purifier takes no steps that it could be stopped after",
    "objective": "the purifier has no objective",
}


class Identity:
    """The digests of one evaluation, computed once."""

    def __init__(self, defended: DefendedClassifier, generator: NoiseGenerator | None, *, seed: int) -> None:
        classifier = getattr(defended.classifier, "counted", defended.classifier)  # the counts are no part of it

        def fingerprints() -> dict[str, str | None]:
            return {
                "classifier": fingerprint(classifier),
                "defense": fingerprint((defended.purifier, defended.vote), without=(defended.classifier, classifier)),
                "generator": None if generator is None else fingerprint(generator),
            }

        digests, again = fingerprints(), fingerprints()
        own = modules_of_defense(defended)
        parts = {type(part).__module__ for part in defended.modules()}
        self._code = {
            "classifier": code_digest(_modules_of(defended.classifier.modules()), without=OTHERS),
            "defense": code_digest(own),
        }
        self._digests = {name: digest if digest == again[name] else None for name, digest in digests.items()}
        self._generator = digests["generator"]
        self._common: dict[str, Any] = {
            "seed": seed,
            "versions": {**versions_behind(parts, without=(PROJECT,)), **versions_behind(own, without=(LOADING,))},
            "device": next((parameter.device.type for parameter in classifier.parameters()), "cpu"),
            "classifier": digests["classifier"],
            "classifier_code": self._code["classifier"],
            "defense": digests["defense"],
            "defense_code": self._code["defense"],
            "defended_code": code_digest([type(defended).__module__, *JUDGES], without=(PROJECT,)),
        }
        self._attacks = {  # now: a file that is edited during the run is not what runs
            name: code_digest([attack.code.__name__], without=DEFENSE_PACKAGES) for name, attack in ATTACKS.items()
        }

    def of_record(self) -> dict[str, Any]:
        """Return what tells two runs of one specification apart: digests of the values, None for what cannot be
        described, and of the code.
        """
        return {"digests": self._digests, "code": self._code}

    def of_judge(self) -> dict[str, Any]:
        """Return what the answer to an image depends on."""
        return self._common

    def of_attack(
        self, name: str, attack: Attack, budget: Budget, surrogate: "Identity | None" = None
    ) -> dict[str, Any]:
        """Return what an attack's points depend on besides; those of `surrogate` on that classifier, too."""
        return {
            "attack": name,
            "attack_code": self._attacks[name],
            "attack_versions": versions_behind([attack.code.__name__], without=DEFENSE_PACKAGES),
            "budget": {field: getattr(budget, field) for field in attack.budget},
            "generator": self._generator,
            **({"surrogate": surrogate.of_judge()} if surrogate is not None and name == SURROGATE else {}),
        }


def describe(defended: DefendedClassifier) -> dict[str, Any]:
    """Return a defense's kind and parameters, as JSON."""
    purifier = defended.purifier
    own = purifier.purifier if isinstance(purifier, AnyPurifier) else purifier
    config = getattr(own, "config", None)
    described: dict[str, Any] = {
        "kind": type(own).__qualname__,
        "loop": dataclasses.asdict(purifier.loop),
        "vote": None if defended.vote is None else dataclasses.asdict(defended.vote),
        **{name: _plain(value) for name, value in _public(own) if _plain(value) is not None},
    }
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        described["config"] = dataclasses.asdict(config)
    return described


def _public(own: object) -> Iterable[tuple[str, Any]]:
    values = vars(own) if hasattr(own, "__dict__") else {}
    return ((name, value) for name, value in values.items() if not name.startswith("_") and name != "training")


def _plain(value: object) -> object:
    """Return a value as JSON has it; a digest of an array; None for what is neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return digest_of_tensors(value)
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, tuple | list) and all(isinstance(item, bool | int | float | str) for item in value):
        return list(value)
    return None


def missing(names: Iterable[str], defended: DefendedClassifier, *, randomised: bool) -> dict[str, Need | None]:
    """Return the attacks that say nothing that another does not, or that the defense gives nothing for: and what.

    Before a defense AutoAttack on the bare classifier lacks nothing; it is in the row of that.
    """
    purifier = defended.purifier
    bare = isinstance(purifier, NoPurifier)
    has: dict[Need, bool] = {
        "defense": not bare or defended.vote is not None,
        "purifier": not bare,
        "steps": purifier.has_steps,
        "objective": purifier.has_objective,
        "randomness": randomised,
    }
    needed = {name: [need for need in ATTACKS[name].needs if not has[need]] for name in names}
    found: dict[str, Need | None] = {name: needs[0] for name, needs in needed.items() if needs}
    return {**found, AUTOATTACK: None} if has["defense"] else found


def modules_of_defense(defended: DefendedClassifier) -> list[str]:
    """Return the names of the Python modules that a defense is written in; those of its classifier are another's."""
    purifier = defended.purifier
    own = purifier.purifier if isinstance(purifier, AnyPurifier) else purifier
    modules = {type(own).__module__, type(purifier).__module__}
    if defended.vote is not None:
        modules.add(type(defended.vote).__module__)
    parts = set(own.modules()) - set(defended.classifier.modules()) if isinstance(own, nn.Module) else ()
    return sorted(modules | set(_modules_of(parts)))


def _modules_of(parts: Iterable[nn.Module]) -> list[str]:
    """Return the names of the Python modules that parts of networks are written in, but for libraries'."""
    names = {type(part).__module__ for part in parts}
    return sorted(name for name in names if name.partition(".")[0] not in LIBRARIES)
