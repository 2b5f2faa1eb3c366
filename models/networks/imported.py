"""Other people's networks by name, as ImageClassifiers: torchvision's, timm's, transformers', exported, a factory's.

    torchvision:<name>    timm:<name>    transformers:<model type>    export:<name>    python:<package.module>:<factory>

`options` is what the library builds the network from, or of an exported one all that it does. A factory is code, and is
called where the environment variable UNPERTURB_ALLOW_CODE names its module (or several between commas).
"""

import difflib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.classifier import Architecture, ImageClassifier
from unperturb.models.networks.exported import ExportedNetwork
from unperturb.models.shapes import Float

DANGEROUS = re.compile(
    r"^pretrained|use_pretrained|(checkpoint|weights|name_or)_path|^file|url$|cache_dir|hub|auto_map|trust_remote"
    r"|_implementation|quantization|^token$|custom_load"
)
KINDS = ("torchvision", "timm", "transformers", "export", "python")
ALONE = "bring one that does by python:package.module:factory"
ALLOW = "UNPERTURB_ALLOW_CODE"


class ImportedClassifier(ImageClassifier):
    """A network without its last linear layer, that layer, and the normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: Architecture, network: nn.Module) -> None:
        size = architecture.image_size
        probe = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = run(network.eval(), probe, architecture)
            name = last_linear(network, architecture)
            linear = cast(nn.Linear, network.get_submodule(name))
            network.set_submodule(name, nn.Identity())
            other = ConfigError(f"{architecture.name} does not end in its last linear layer, {name}, alone: {ALONE}")
            try:
                features = run(network, probe, architecture)
            except ConfigError as error:
                raise other from error
            fits = features.shape == (2, linear.in_features)
            if not fits or not torch.allclose(linear(features), expected, rtol=1e-4, atol=1e-4, equal_nan=True):
                raise other
        super().__init__(feature_dim=linear.in_features, num_classes=linear.out_features, image_size=size)
        self.register_buffer("mean", torch.tensor(architecture.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(architecture.std).view(1, 3, 1, 1))
        self.body, self.linear = network, cast(nn.Module, linear)

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return the input of the last linear layer; `x` in [0, 1]."""
        return cast(Tensor, self.body((x - self.mean) / self.std))

    def logits(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return the last linear layer's class scores."""
        return cast(Tensor, self.linear(features))


class TransformersNetwork(nn.Module):
    """A network of transformers', which answers with an object."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores alone."""
        return cast(Tensor, self.network(x).logits)

    def under_its_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights by the names that they have here: the library's versions call the same tensors differently.

        What it does not know comes as it is, and what it lacks not at all.
        """
        if not state.keys() <= self.network.state_dict().keys():
            logs, kind = library("transformers.utils.logging"), cast(Any, type(self.network))
            logs.set_verbosity_error()
            logs.disable_progress_bar()
            filled, found = kind.from_pretrained(
                None,
                config=self.network.config,
                state_dict=dict(state),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            other = {name for name, *_ in found["mismatched_keys"]} | set(found["missing_keys"])
            known = {name: value for name, value in filled.state_dict().items() if name not in other}
            state = known | {name: state[name] for name in {*other, *found["unexpected_keys"]} & state.keys()}
        return {f"network.{name}": value for name, value in state.items()}


def is_imported(name: str) -> bool:
    """Return whether an architecture's name is one of this file's."""
    return name.partition(":")[0] in KINDS and ":" in name


def build_imported(architecture: Architecture) -> ImportedClassifier:
    """Return the network of a card's architecture, with fresh weights.

    Where it has other classes than a factory or a program makes (it was fine-tuned), its last layer is a new one.
    Raises ConfigError for a name that its library does not know, a library that is not installed, or a network that
    does not end in a linear layer; CheckpointError for a factory whose module is not allowed to run.
    """
    made = ImportedClassifier(architecture, network_of(architecture))
    if made.num_classes != architecture.num_classes:
        made.num_classes = architecture.num_classes
        made.linear = nn.Linear(made.feature_dim, made.num_classes)
    return made


def network_of(architecture: Architecture, *, allowed: bool = False) -> nn.Module:
    """Return the library's own network, with fresh weights; `allowed`: the user has named the factory just now.

    ConfigError for options by which a library would fetch files or run code, and for what it cannot build.
    """
    refuse_dangerous(architecture.options)
    try:
        return _built(architecture, allowed=allowed)
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # whatever somebody else's library raises
        raise ConfigError(f"{architecture.name} cannot be built: {type(error).__name__}: {error}") from error


def refuse_dangerous(options: Any, name: str = "options") -> None:  # noqa: ANN401
    """Raise ConfigError for an option, however deep, that names files, hubs or code: a card is not to reach those."""
    if isinstance(options, dict):
        for key, value in options.items():
            if DANGEROUS.search(str(key)):
                raise ConfigError(f"{name}.{key} is not taken from a file: a library may fetch or run what it names")
            refuse_dangerous(value, f"{name}.{key}")
    elif isinstance(options, list):
        for value in options:
            refuse_dangerous(value, name)
    elif not isinstance(options, str | int | float | bool | None):
        raise ConfigError(f"{name} holds a {type(options).__name__}")


def _built(architecture: Architecture, *, allowed: bool) -> nn.Module:
    kind, _, name = architecture.name.partition(":")
    classes = architecture.num_classes
    if kind == "torchvision":
        from torchvision import models as zoo

        require_known(name, zoo.list_models(module=zoo), kind)
        return cast(nn.Module, zoo.get_model(name, weights=None, num_classes=classes, **architecture.options))
    if kind == "timm":
        timm = library("timm")
        require_known(name.partition(".")[0], timm.list_models(), kind)
        options = {**architecture.options, "num_classes": classes, "pretrained": False}
        return cast(nn.Module, timm.create_model(name, **options))
    if kind == "transformers":
        transformers = library("transformers")
        if name == "timm_wrapper":
            raise ConfigError("transformers' timm_wrapper: import the network as timm:NAME")
        config = transformers.AutoConfig.for_model(**{**architecture.options, "num_labels": classes})
        return TransformersNetwork(transformers.AutoModelForImageClassification.from_config(config))
    if kind == "export":
        return ExportedNetwork(architecture.options)
    module, _, factory = name.partition(":")
    if not allowed and module not in [part.strip() for part in os.environ.get(ALLOW, "").split(",")]:
        raise CheckpointError(f"{architecture.name} runs code of your own: set {ALLOW}={module} to allow it")
    return _made_by(module, factory)


def run(network: nn.Module, probe: Tensor, architecture: Architecture) -> Tensor:
    """Return what a network makes of images; ConfigError where it does not take them."""
    try:
        found = network(probe.clone())  # it may normalise in place
    except Exception as error:  # whatever somebody else's network raises
        raise ConfigError(f"{architecture.name} does not take images of {list(probe.shape)}: {error}") from error
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = f"{list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"{architecture.name} answers with {what}, not with [batch, classes]")
    return found


def last_linear(network: nn.Module, architecture: Architecture) -> str:
    """Return the name of the last linear layer; ConfigError where there is none."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ConfigError(f"{architecture.name} has no linear layer whose input could be its features")
    return str(names[-1])


def library(name: str) -> ModuleType:
    """Return an optional library; ConfigError says how to get it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # timm 1.0.9's, of what torch will lack one day
            return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} is not installed ({error}): pip install {name}") from error


def require_known(name: str, known: Sequence[str], kind: str) -> None:
    """Raise ConfigError, with names that are near, for one that a library does not know."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise ConfigError(f"{kind} has no classifier {name!r}" + (f"; near: {', '.join(near)}" if near else ""))


def _made_by(module: str, factory: str) -> nn.Module:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        function: Any = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"python:{module}:{factory} cannot be found on the Python path: {error}") from error
    made = function()
    if not isinstance(made, nn.Module):
        raise ConfigError(f"python:{module}:{factory} returned {type(made).__name__}, not a torch.nn.Module")
    return made
