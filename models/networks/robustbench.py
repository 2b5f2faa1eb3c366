"""RobustBench's model zoo: the only file that imports the package, and copes with its faults.

Seen in robustbench 1.1.1: it imports a module `autoattack` that it does not depend on; it keeps weights in `./models`
unless told otherwise; it keeps a web page that came instead of the weights; it does not say what to do offline.
"""

import pickle
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from unperturb.models.cache import cache_folder
from unperturb.models.errors import ConfigError, DataError, WeightsUnavailableError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.shapes import Float

PREFIX = "robustbench:"  # of the names of its classifiers
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
THREATS = ("Linf", "L2", "corruptions")


class ForeignClassifier(ImageClassifier):
    """Any classifier whose output is its last linear layer's; `features` is that layer's input."""

    def __init__(self, model: nn.Module, *, num_classes: int, image_size: int) -> None:
        model.eval()
        linear, name = None, ""
        for name, module in model.named_modules():  # noqa: B007
            if isinstance(module, nn.Linear):
                linear = module
        if linear is None:
            raise ConfigError(f"{type(model).__name__} has no linear layer whose input could be its features")
        super().__init__(feature_dim=linear.in_features, num_classes=num_classes, image_size=image_size)
        self.model = model
        object.__setattr__(self, "_linear", linear)  # registered under `model` already
        with torch.no_grad():
            probe = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
            features = self.features(probe)
            fits = features.shape == (2, linear.in_features)
            if not fits or not torch.allclose(self.logits(features), model(probe), rtol=1e-4, atol=1e-5):
                raise ConfigError(f"{type(model).__name__} does not end in a linear layer of pooled features")

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return the input of the last linear layer; `x` in [0, 1]."""
        seen: list[Tensor] = []
        linear = cast(nn.Linear, self._linear)
        handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.model(x)
        finally:
            handle.remove()
        return seen[-1]

    def logits(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return the last linear layer's class scores."""
        return cast(Tensor, cast(nn.Linear, self._linear)(features))


def parse_name(name: str, *, dataset: str = "cifar10", threat: str = "Linf") -> tuple[str, str, str]:
    """Return (model, dataset, threat) of `robustbench:<Name>[:<dataset>:<threat>]`; raise ConfigError for another form.

    `dataset` and `threat` stand in where the name has none.
    """
    parts = name.removeprefix(PREFIX).split(":")
    if len(parts) == 1:
        parts += [dataset, threat]
    if len(parts) != 3 or parts[1] not in CLASSES or parts[2] not in THREATS:
        raise ConfigError(
            f"{name!r} is not robustbench:<Name>[:<dataset>:<threat>] with a dataset of {', '.join(CLASSES)} and a "
            f"threat of {', '.join(THREATS)}"
        )
    return parts[0], parts[1], parts[2]


def load_robustbench(name: str, *, image_size: int, weights: bool = True) -> ForeignClassifier:
    """Return a classifier of RobustBench's zoo, in eval mode.

    Raises ConfigError for an unknown name, WeightsUnavailableError saying which file to place where.
    """
    model_name, dataset, threat = parse_name(name)
    robustbench = import_robustbench()
    zoo = robustbench.all_models[robustbench.BenchmarkDataset(dataset)][robustbench.ThreatModel(threat)]
    if model_name not in zoo:
        raise ConfigError(f"RobustBench has no {model_name!r} for {dataset} {threat}; it has {', '.join(sorted(zoo))}")
    if not weights:
        return ForeignClassifier(zoo[model_name]["model"](), num_classes=CLASSES[dataset], image_size=image_size)
    folder = cache_folder("robustbench")
    file = folder / dataset / threat / f"{model_name}.pt"
    remedy = f"place RobustBench's weights for it at {file} and try again"
    _refuse_web_page(file)
    try:
        model = robustbench.load_model(model_name, model_dir=folder, dataset=dataset, threat_model=threat)
    except pickle.UnpicklingError as error:
        raise WeightsUnavailableError(f"{file} holds more than tensors, or is damaged; {remedy}") from error
    except (EOFError, OSError, RuntimeError, ValueError) as error:
        _refuse_web_page(file)
        raise WeightsUnavailableError(
            f"{name} could not be loaded ({type(error).__name__}: {error}); {remedy}"
        ) from error
    return ForeignClassifier(model, num_classes=CLASSES[dataset], image_size=image_size)


def robustbench_data(dataset: str, *, n: int, folder: Path) -> tuple[Tensor, Tensor]:
    """Return the first `n` test images [n, 3, h, w] in [0, 1] and labels, by RobustBench's own loader."""
    import_robustbench()
    from robustbench.data import PREPROCESSINGS, load_clean_dataset
    from robustbench.model_zoo.enums import BenchmarkDataset

    preparation = PREPROCESSINGS["Res256Crop224" if dataset == "imagenet" else None]
    try:
        images, labels = load_clean_dataset(BenchmarkDataset(dataset), n, str(folder), preparation)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise DataError(
            f"{dataset} is not at {folder} and could not be fetched ({error}); name a local folder with --data"
        ) from error
    return images, labels


def robustbench_corruption(dataset: str, kind: str, severity: int, *, n: int, folder: Path) -> Tensor:
    """Return the first `n` images [n, 3, h, w] in [0, 1] of CIFAR-10-C, CIFAR-100-C or ImageNet-C."""
    import_robustbench()
    from robustbench.data import CORRUPTION_DATASET_LOADERS, PREPROCESSINGS
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.zenodo_download import DownloadError

    load = CORRUPTION_DATASET_LOADERS[BenchmarkDataset(dataset)][ThreatModel.corruptions]
    try:
        images, _ = load(n, severity, str(folder), False, (kind,), PREPROCESSINGS[None])
    except (OSError, RuntimeError, DownloadError) as error:
        raise DataError(
            f"{dataset}'s corruptions are not at {folder} and could not be fetched ({error}); "
            "with a local folder in --data they are generated"
        ) from error
    return cast(Tensor, images)


def _refuse_web_page(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as opened:
            start = opened.read(64).lstrip()
        if start.startswith(b"<"):
            raise WeightsUnavailableError(f"{file} is a web page, not weights (a failed download); remove it")


def import_robustbench() -> Any:  # noqa: ANN401
    """Import `robustbench.utils`, with an alias in place of the module that its `eval` imports."""
    if "autoattack" not in sys.modules:
        try:
            import pyautoattack
        except ImportError as error:
            raise WeightsUnavailableError("robustbench is not installed; pip install robustbench") from error
        alias, state = ModuleType("autoattack"), ModuleType("autoattack.state")
        alias.AutoAttack = pyautoattack.AutoAttack  # type: ignore[attr-defined]
        state.EvaluationState = object  # type: ignore[attr-defined]
        sys.modules |= {"autoattack": alias, "autoattack.state": state}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources and timm announce deprecations on import
        try:
            import robustbench.utils
        except ImportError as error:
            raise WeightsUnavailableError(
                f"robustbench cannot be imported ({error}); pip install robustbench"
            ) from error
    return robustbench.utils
