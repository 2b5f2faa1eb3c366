"""The registry of defenses: `name[:preset|key=value,…][,vote=shifts]` and a checkpoint -> a defended classifier."""

import dataclasses
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.checkpoints.card import gate_of
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.purifiers import reverse_attack
from unperturb.models.purifiers.base import NoPurifier, Purifier
from unperturb.models.purifiers.defended import DefendedClassifier, Gradient, purifier_of, vote_of
from unperturb.models.purifiers.restored import restored_of
from unperturb.models.purifiers.rivals import ANTI_ADVERSARY_LOOP, HEDGE_LOOP, AntiAdversary, Hedge
from unperturb.models.purifiers.vote import Vote, parse_shifts

LOOP_KEYS = {
    "steps": int,
    "step_size": Fraction,
    "epsilon": Fraction,
    "momentum": Fraction,
    "start": str,
    "norm": str,
    "step": str,
    "settle": int,
    "gate": Fraction,
}
REVERSE_ATTACK_KEYS = {"views": int, "temperature": Fraction, "restored": Fraction}
NEGATIVES_KEYS = {"negatives": str, "count": int, "fraction": Fraction}
REVERSE_ATTACK = "reverse-attack"
RESTORER = "restorer"
VOTE, VOTE_KEYS = "vote", ("shifts", "mirrored")
MIRRORED = {"yes": True, "no": False}


def _none(checkpoint: Checkpoint, words: list[str], changes: Mapping[str, str]) -> Purifier:
    _refuse("none", words, changes, {})
    return NoPurifier(checkpoint.classifier)


def _reverse_attack(checkpoint: Checkpoint, words: list[str], changes: Mapping[str, str]) -> Purifier:
    name = words[0] if words else "default"
    config = reverse_attack.preset(name)
    _refuse("reverse-attack", words[1:], changes, {**LOOP_KEYS, **REVERSE_ATTACK_KEYS, **NEGATIVES_KEYS})
    if changes.get("gate") == "auto":
        others = [key for key in changes if key in {*REVERSE_ATTACK_KEYS, *NEGATIVES_KEYS, "start", "epsilon", "norm"}]
        if others:
            raise ConfigError(f"gate=auto was measured for the preset's own {others[0]}; give the gate as a number")
        changes = {**changes, "gate": repr(gate_of(checkpoint.card, name))}

    def among(keys: Mapping[str, object]) -> dict[str, str]:
        return {key: value for key, value in changes.items() if key in keys}

    policy = among(NEGATIVES_KEYS)
    if "negatives" in policy:
        policy["kind"] = policy.pop("negatives")
    changed: reverse_attack.ReverseAttackConfig = _changed(config, among(REVERSE_ATTACK_KEYS), REVERSE_ATTACK_KEYS)
    if changed.policy == reverse_attack.PAIR and changed.views > 2:
        raise ConfigError(
            f"views={changed.views}: {name} has an image and its mirror image, and a third is one of them"
        )
    changed = dataclasses.replace(
        changed,
        loop=_changed(config.loop, among(LOOP_KEYS), LOOP_KEYS),
        negatives=_changed(config.negatives, policy, {**NEGATIVES_KEYS, "kind": str}),
    )
    return purifier_of(checkpoint, changed)


def _rival(
    kind: Callable[..., Purifier], name: str, loop: ProjectedGradient
) -> Callable[[Checkpoint, list[str], Mapping[str, str]], Purifier]:
    def build(checkpoint: Checkpoint, words: list[str], changes: Mapping[str, str]) -> Purifier:
        _refuse(name, words, changes, LOOP_KEYS)
        return kind(checkpoint.classifier, _changed(loop, changes, LOOP_KEYS))

    return build


def _restorer(checkpoint: Checkpoint, words: list[str], changes: Mapping[str, str]) -> Purifier:
    known = {"times": Fraction}
    _refuse(RESTORER, words, changes, known)
    return restored_of(checkpoint, **_values(changes, known))


REGISTRY: dict[str, Callable[[Checkpoint, list[str], Mapping[str, str]], Purifier]] = {
    "none": _none,
    REVERSE_ATTACK: _reverse_attack,
    "anti-adversary": _rival(AntiAdversary, "anti-adversary", ANTI_ADVERSARY_LOOP),
    "hedge": _rival(Hedge, "hedge", HEDGE_LOOP),
    RESTORER: _restorer,
}


def build_defense(spec: str, checkpoint: Checkpoint, *, gradient: Gradient = "bpda") -> DefendedClassifier:
    """Return the checkpoint's classifier behind the defense that `spec` names: a purifier, a vote, or both.

    `vote` is the preset's vote alone, of the views that the checkpoint is served with; with `shifts=2` or `mirrored=no`
    of other views. `vote=2` (with `mirrored=no`) among a purifier's values puts one behind it, and `vote=none` leaves
    out the one that it is served with. Raises ConfigError for an unknown name, preset or key or a value out of range,
    CheckpointError where the reverse attack finds no head, or `restorer` no network.
    """
    name, words, changes = _parsed(spec)
    vote = None
    if name == VOTE:
        _refuse(VOTE, words, changes, dict.fromkeys(VOTE_KEYS))
        vote, spec = chosen_vote(checkpoint, **changes), "none"
    elif VOTE in changes:
        vote = chosen_vote(checkpoint, changes.pop(VOTE), changes.pop("mirrored", None))
        spec = f"{name}:" + ",".join([*words, *(f"{key}={value}" for key, value in changes.items())])
    elif name in (REVERSE_ATTACK, RESTORER):
        preset = RESTORER if name == RESTORER else words[0] if words else "default"
        vote = vote_of(checkpoint.card, reverse_attack.preset(preset))
    purifier = build_purifier(spec, checkpoint)
    return DefendedClassifier(checkpoint.classifier, purifier, gradient=gradient, vote=vote)


def build_purifier(spec: str, checkpoint: Checkpoint) -> Purifier:
    """Return the purifier that `spec` names, of the checkpoint and without a vote; see `build_defense`."""
    name, words, changes = _parsed(spec)
    if name not in REGISTRY:
        raise ConfigError(f"purifier {name!r} is not one of {', '.join((*REGISTRY, VOTE))}")
    return REGISTRY[name](checkpoint, words, changes)


def _parsed(spec: str) -> tuple[str, list[str], dict[str, str]]:
    """Return the name, the bare words and the values by key."""
    name, _, rest = spec.partition(":")
    parts = [part.strip() for part in rest.split(",") if part.strip()]
    words = [part for part in parts if "=" not in part]
    return name, words, dict(part.split("=", 1) for part in parts if "=" in part)


def chosen_vote(checkpoint: Checkpoint, shifts: str | None = None, mirrored: str | None = None) -> Vote | None:
    """Return the vote of the views that are spelled, the others those that the checkpoint is served with; None where
    `shifts` is `none`. Raises ConfigError for another spelling, or a shift of half an image.
    """
    if mirrored not in (None, *MIRRORED):
        raise ConfigError(f"mirrored={mirrored!r} is neither yes nor no")
    usual = vote_of(checkpoint.card, reverse_attack.preset(VOTE))
    if shifts == "none" or usual is None:
        return None
    vote = Vote(
        shifts=usual.shifts if shifts is None else parse_shifts(shifts),
        mirrored=MIRRORED.get(mirrored or "", usual.mirrored if shifts is None else True),
    )
    return vote.fitting(checkpoint.card.architecture.image_size)


def _refuse(name: str, words: list[str], changes: Mapping[str, str], known: Mapping[str, object]) -> None:
    if words:
        raise ConfigError(f"purifier {name}: {words[0]!r} is neither a preset of it nor key=value")
    unknown = [key for key in changes if key not in known]
    if unknown:
        raise ConfigError(f"purifier {name} has no {unknown[0]!r}; it has {', '.join(known) or 'no parameters'}")


def _changed(config: Any, changes: Mapping[str, str], kinds: Mapping[str, Callable[[str], Any]]) -> Any:  # noqa: ANN401
    """Return the frozen dataclass with the values that `changes` spell; it checks their ranges itself."""
    return dataclasses.replace(config, **_values(changes, kinds))


def _values(changes: Mapping[str, str], kinds: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Return what `changes` spell; ConfigError names the one that is no number."""
    values: dict[str, Any] = {}
    for key, text in changes.items():
        try:
            value = kinds[key](text)
            values[key] = float(value) if isinstance(value, Fraction) else value
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ConfigError(f"{key}={text!r} is not a {'whole ' * (kinds[key] is int)}number") from None
    return values
