"""Make ready what is evaluated: a checkpoint, a factory's model or a module, and the defense in front of it."""

import ast
import copy
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unperturb.benchmarks.robustness.counting import CountingClassifier
from unperturb.benchmarks.robustness.foreign import AnyClassifier, AnyPurifier
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card
from unperturb.models.checkpoints.importing.imported import require_separate
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.inference.folding import folded, with_affine
from unperturb.models.networks.classifier import Architecture, ImageClassifier
from unperturb.models.networks.robustbench import PREFIX
from unperturb.models.provenance import digest_of
from unperturb.models.purifiers.base import Purifier
from unperturb.models.purifiers.defended import DefendedClassifier
from unperturb.models.purifiers.registry import REGISTRY, VOTE, build_defense, chosen_vote

IMPORTED = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)(?::(?P<values>.*))?")


def subject_of(
    model: nn.Module | Checkpoint, *, name: str, classes: tuple[str, ...] | None, image_size: int
) -> Checkpoint:
    """Return a model as a checkpoint; a plain module is run once for its number of classes.

    Raises ConfigError where it gives no scores [n, classes] of two classes or more, or other than `classes` names,
    where an image's scores are not its own or give its pixels no gradient, or where it is known to be for images of
    another size.
    """
    known = model.classifier if isinstance(model, Checkpoint) else model
    if isinstance(known, ImageClassifier) and known.image_size != image_size:
        side = known.image_size
        raise ConfigError(f"{name} is for images of {side} x {side}; these are {image_size} x {image_size}")
    if isinstance(model, Checkpoint):
        if classes is not None and classes != model.card.classes:
            raise ConfigError(f"{name} has its own classes, {', '.join(model.card.classes[:10])}: leave `classes` out")
        return model
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} is a {type(model).__name__}, not a torch.nn.Module from images to class scores")
    try:
        model = copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:  # TorchScript's, and whatever somebody else's module raises
        raise ConfigError(f"{name} is a torch.nn.Module that cannot be copied and frozen: {error}") from error
    probe = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    parameter = next(iter(model.parameters()), probe)
    for part in (probe[:1], probe):  # one image alone is what attacks may leave
        try:
            with torch.no_grad():
                scores = model(part.to(parameter.device, copy=True))
        except Exception as error:  # whatever somebody else's module raises
            raise ConfigError(f"{name} takes no float32 images {list(part.shape)}: {error}") from error
        if not isinstance(scores, torch.Tensor) or scores.ndim != 2 or len(scores) != len(part):
            found = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise ConfigError(
                f"{name} answers images {list(part.shape)} with {found}: scores [n, classes] are needed, whatever n"
            )
    count = scores.shape[1]
    classes = classes or classes_of(model) or tuple(str(number) for number in range(count))
    if len(classes) != count:
        raise ConfigError(f"{name} gives {count} scores, for {len(classes)} classes")
    classifier: ImageClassifier = (
        model if isinstance(model, ImageClassifier) else AnyClassifier(model, num_classes=count, image_size=image_size)
    )
    try:
        require_separate(classifier)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    architecture = Architecture(name=name, num_classes=count, image_size=image_size)
    card = Card(id=name, architecture=architecture, classes=tuple(classes), data={}, training={})
    return Checkpoint(card, classifier)


def classes_of(model: object) -> tuple[str, ...]:
    """Return the names that a model has as `classes`; none where that is something else, as their number."""
    found: Any = getattr(model, "classes", None)
    named = isinstance(found, list | tuple) and all(isinstance(one, str) for one in found)
    return tuple(found) if named else ()


def load_subject(spec: str, *, classes: tuple[str, ...] | None, image_size: int) -> Checkpoint:
    """Return the checkpoint of a shipped name, a folder or `robustbench:<Name>`, or what `package.module:factory`
    returns. Raises ConfigError or CheckpointError saying what is wrong with it.
    """
    match = IMPORTED.fullmatch(spec)
    if spec.startswith(PREFIX) or match is None or Path(spec).is_dir():
        return store.load(spec)
    model = _imported(match, spec)()
    if not isinstance(model, nn.Module | Checkpoint):
        raise ConfigError(f"model {spec} returned a {type(model).__name__}, not a torch.nn.Module")
    if isinstance(model, Checkpoint):
        return model
    return subject_of(model, name=spec, classes=classes, image_size=image_size)


def ready(subject: Checkpoint, device: torch.device) -> Checkpoint:
    """Return a copy of the checkpoint on the device, whose classifier counts its passes; batch norm folded and channels
    last, in float32: what is attacked is what is judged.
    """
    subject = copy.deepcopy(subject)
    classifier = subject.classifier.eval().requires_grad_(False).to(device)
    if not isinstance(classifier, AnyClassifier):
        classifier = _faster(classifier)
    parts = {
        name: None if (part := getattr(subject, name)) is None else part.to(device)
        for name in ("head", "bank", "restorer", "purifier")
    }
    counting = CountingClassifier(classifier).eval().requires_grad_(False)
    return replace(subject, classifier=counting, **parts)  # type: ignore[arg-type]


def _faster(classifier: ImageClassifier) -> ImageClassifier:
    """Return the classifier with its batch norms folded or made affine; as it is where that is not the same."""
    faster = with_affine(folded(classifier))
    device = next((parameter.device for parameter in classifier.parameters()), torch.device("cpu"))
    size = classifier.image_size
    probe = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        same = torch.allclose(faster(probe), classifier(probe), rtol=1e-3, atol=1e-4)
    return faster if same else classifier


def defense_of(purifier: Any, subject: Checkpoint) -> DefendedClassifier:  # noqa: ANN401
    """Return the subject's classifier behind a specification, a purifier of one's own (see `foreign`), or none.

    A specification is one of this project's, or `package.module:Class[:key=value,…]` on the Python path, with a vote
    behind it where `vote` is among the values and the class takes none. Raises ConfigError or CheckpointError saying
    what is wrong with it.
    """
    vote = None
    if purifier is None:
        purifier = "none"
    if isinstance(purifier, str):
        name = purifier.partition(":")[0]
        match = IMPORTED.fullmatch(purifier)
        if name in (*REGISTRY, VOTE) or match is None:
            return build_defense(purifier, subject)
        kind, values = _imported(match, purifier), _values(match["values"] or "")
        if VOTE in values and VOTE not in _wanted(kind):
            spelled = {key: str(values.pop(key)).replace(" ", "") for key in (VOTE, "mirrored") if key in values}
            vote = chosen_vote(subject, spelled[VOTE], spelled.get("mirrored"))
        purifier = _made(kind, values, subject, purifier)
    device = next((parameter.device for parameter in subject.classifier.parameters()), torch.device("cpu"))
    if not isinstance(purifier, Purifier):
        purifier = AnyPurifier(subject.classifier, purifier, device=device)
    return DefendedClassifier(subject.classifier, purifier.requires_grad_(False).to(device), vote=vote)


def described_model(subject: Checkpoint, spec: str) -> dict[str, Any]:
    """Return what a record says of the classifier."""
    return {
        "spec": spec,
        "architecture": subject.card.architecture.name,
        "weights_sha256": subject.card.weights_sha256 or digest_of(subject.classifier),
    }


def _imported(match: re.Match[str], spec: str) -> Callable[..., Any]:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(match["module"]), match["name"])
    except ImportError as error:
        raise ConfigError(
            f"{spec}: {error}; it is looked for from the current folder and on PYTHONPATH. Names that are known: "
            f"{', '.join((*REGISTRY, VOTE))}"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{spec}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{spec} is a {type(found).__name__}, which can't be called")
    return found  # type: ignore[no-any-return]


def _made(kind: Callable[..., Any], values: dict[str, Any], subject: Checkpoint, spec: str) -> Any:  # noqa: ANN401
    """Return the purifier, given the classifier where it asks for one."""
    own = {"classifier": subject.classifier} if "classifier" in _wanted(kind) else {}
    try:
        return kind(**own, **values)
    except TypeError as error:
        raise ConfigError(f"{spec}: {error}") from error


def _wanted(kind: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of what a class or function takes."""
    try:
        return tuple(inspect.signature(kind).parameters)
    except ValueError:  # written in C
        return ()


def _values(text: str) -> dict[str, Any]:
    """Return `key=value,…` with Python's numbers, fractions, tuples, True and None as such, and the rest as words."""
    try:
        call = ast.parse(f"_({text})", mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"{text!r} is not key=value,… ({error.msg})") from None
    if (
        not isinstance(call, ast.Call)
        or not isinstance(call.func, ast.Name)
        or call.args
        or any(keyword.arg is None for keyword in call.keywords)
    ):
        raise ConfigError(f"{text!r} is not key=value,…")
    found: dict[str, Any] = {}
    for keyword in call.keywords:
        try:
            found[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            found[str(keyword.arg)] = _fraction(ast.unparse(keyword.value))
    return found


def _fraction(text: str) -> float | str:
    """Return `8 / 255` as a number, as this project's own purifiers take it, and other words as they are."""
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        return text
