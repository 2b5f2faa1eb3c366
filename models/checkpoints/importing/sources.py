"""What a source knows of its classifier: the network by name, how it wants its pictures, its classes, its weights."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from unperturb.models.cache import cache_folder
from unperturb.models.checkpoints.importing.program import read_program
from unperturb.models.checkpoints.importing.weights import read_state
from unperturb.models.errors import CheckpointError, ConfigError, WeightsUnavailableError
from unperturb.models.networks.classifier import IMAGENET_MEAN, IMAGENET_STD
from unperturb.models.networks.imported import library, require_known
from unperturb.models.pixels import Preprocessing

HUB = "hf-hub:"
# Trained on pixels in [-1, 1], which they make themselves of what ImageNet's mean and std give.
OWN_NORMALISATION = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}
UNUSED = ("_name_or_path", "label2id", "transformers_version", "torch_dtype", "dtype")
Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A classifier as its source describes it.

    name, options: of the architecture; classes: as many outputs as it has by itself, or their names; state: its own
    weights, where it has any and they are wanted; one_size: it takes no images of another size
    """

    name: str
    pictures: Preprocessing
    mean: Triple
    std: Triple
    classes: int | tuple[str, ...]
    options: dict[str, Any]
    state: Callable[[], Mapping[str, Tensor]] | None = None
    one_size: bool = False


def open_source(text: str) -> Source:
    """Return what is known of `torchvision:…`, `timm:…`, `hf-hub:…`, `export:…`, `python:…` or a folder.

    Raises ConfigError for what is none of these or not known, WeightsUnavailableError for a hub that cannot be reached.
    """
    kind, _, name = text.partition(":")
    if kind == "torchvision" and name:
        return _torchvision(name)
    if kind == "timm" and name:
        return _timm(name)
    if text.startswith(HUB):
        return _folder(_fetched(text.removeprefix(HUB)), text)
    if kind == "export" and name:
        return _exported(Path(name))
    if kind == "python" and name.count(":") == 1:
        return _unsaid(text)
    if Path(text).is_dir():
        return _folder(Path(text), text)
    raise ConfigError(
        f"source {text!r} is none of torchvision:NAME, timm:NAME, hf-hub:OWNER/NAME, export:FILE.pt2, "
        "python:package.module:factory, or a folder with config.json"
    )


def _unsaid(name: str, size: int = 224) -> Source:
    """Return the source of a network that says nothing of its pictures: pixels in [0, 1] as they are."""
    pictures = Preprocessing(size=size)
    return Source(name=name, pictures=pictures, mean=(0.0,) * 3, std=(1.0,) * 3, classes=1000, options={})


def _exported(file: Path) -> Source:
    program = read_program(file)
    return replace(
        _unsaid(f"export:{file.stem}", program.size or 224),
        classes=program.options["linear"][1],
        options=program.options,
        state=lambda: program.state,
        one_size=program.size > 0,
    )


def _torchvision(name: str) -> Source:
    from torchvision import models as zoo

    require_known(name, zoo.list_models(module=zoo), "torchvision")
    weights = zoo.get_model_weights(name).DEFAULT
    how = weights.transforms()

    def state() -> Mapping[str, Tensor]:
        folder = cache_folder("torchvision") / "checkpoints"
        try:
            return dict(weights.get_state_dict(model_dir=str(folder), progress=False, check_hash=True))
        except (OSError, RuntimeError) as error:
            raise WeightsUnavailableError(
                f"torchvision's weights {weights} could not be fetched ({error}); without a network, place the file of "
                f"{weights.url} in {folder}, or give --weights"
            ) from error

    return Source(
        name=f"torchvision:{name}",
        pictures=Preprocessing(
            size=how.crop_size[0],
            fit="crop",
            resize=how.resize_size[0],
            interpolation=how.interpolation.value,
            antialias=how.antialias is not False,
        ),
        mean=_triple(how.mean),
        std=_triple(how.std),
        classes=tuple(weights.meta["categories"]),
        options=OWN_NORMALISATION.get(name, {}),
        state=state,
    )


def _timm(name: str) -> Source:
    timm = library("timm")
    require_known(name.partition(".")[0], timm.list_models(), "timm")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) or timm.models.PretrainedCfg()

    def state() -> Mapping[str, Tensor]:
        if not importlib.import_module("timm.models._hub").has_hf_hub() and find_spec("huggingface_hub"):
            raise WeightsUnavailableError(
                f"timm {timm.__version__} cannot fetch weights with the huggingface_hub that is installed; "
                "pip install 'huggingface_hub<2', or give --weights"
            )
        try:
            return dict(timm.create_model(name, pretrained=True).state_dict())
        except Exception as error:  # the hub's, the network's, or timm's own
            raise WeightsUnavailableError(
                f"timm's weights of {name} could not be fetched: {error}; give --weights"
            ) from error

    return _of_timm(name, config.to_dict(), {}, state)


def _of_timm(
    name: str, config: Mapping[str, Any], options: dict[str, Any], state: Callable[[], Mapping[str, Tensor]] | None
) -> Source:
    size = int(config.get("input_size", (3, 224, 224))[-1])
    return Source(
        name=f"timm:{name}",
        pictures=Preprocessing(
            size=size,
            fit="stretch" if config.get("crop_mode") == "squash" else "crop",
            resize=int(size / (config.get("crop_pct") or 0.875)),
            interpolation=config.get("interpolation") or "bilinear",
        ),
        mean=_triple(config.get("mean") or IMAGENET_MEAN),
        std=_triple(config.get("std") or IMAGENET_STD),
        classes=tuple(config["label_names"]) if config.get("label_names") else int(config.get("num_classes") or 1000),
        options=options,
        state=state,
    )


def _fetched(repository: str) -> Path:
    hub = library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of many kinds: no network, no such repository, no right to it
        raise WeightsUnavailableError(f"{HUB}{repository} could not be fetched: {error}") from error


def _folder(folder: Path, text: str) -> Source:
    """Return a folder's source, in the layout of timm's or transformers' repositories on the hub."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{text} is a folder without config.json, which says what timm or transformers is to make")
    config = _json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))

    def state() -> Mapping[str, Tensor]:
        if not files:
            raise CheckpointError(f"{text} holds no weights (*.safetensors); give --weights")
        return {name: value for file in files for name, value in read_state(file).items()}

    if "architecture" in config:
        settings = {**config.get("pretrained_cfg", {}), "num_classes": config.get("num_classes")}
        if config.get("label_names"):
            settings["label_names"] = config["label_names"]
        return _of_timm(config["architecture"], settings, dict(config.get("model_args", {})), state)
    if "model_type" not in config:
        raise ConfigError(f"{text}: config.json names neither timm's `architecture` nor transformers' `model_type`")
    labels = {int(number): str(name) for number, name in config.get("id2label", {}).items()}
    size = config.get("image_size", 224)
    known = _json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").exists() else {}
    normalised = known.get("do_normalize", True)
    if known.get("do_flip_channel_order") or not known.get("do_rescale", True):
        raise ConfigError(f"{text}: pixels in another order or range than RGB in [0, 1]; make a factory of it")
    options = {key: value for key, value in config.items() if key not in UNUSED}
    return Source(
        name=f"transformers:{config['model_type']}",
        pictures=_of_transformers(known, size if isinstance(size, int) else size[-1]),
        mean=_triple(known.get("image_mean") or (0.5, 0.5, 0.5)) if normalised else (0.0, 0.0, 0.0),
        std=_triple(known.get("image_std") or (0.5, 0.5, 0.5)) if normalised else (1.0, 1.0, 1.0),
        classes=tuple(labels[number] for number in sorted(labels)) or int(config.get("num_labels", 2)),
        options=options,
        state=state,
    )


def _of_transformers(known: Mapping[str, Any], size: int) -> Preprocessing:
    """Return what preprocessor_config.json says: both sides to a size, or the shorter one and a centred square."""
    interpolation = Image.Resampling(2 if known.get("resample") is None else known["resample"]).name.lower()
    wanted = known.get("size", size)
    crop = known.get("crop_size", size)
    crop = crop.get("height", size) if isinstance(crop, dict) else int(crop)
    if isinstance(wanted, dict) and "shortest_edge" in wanted:
        resize = int(wanted["shortest_edge"])
        if known.get("crop_pct") and resize < 384:  # ConvNeXt's own rule
            return Preprocessing(
                size=resize, fit="crop", resize=int(resize / known["crop_pct"]), interpolation=interpolation
            )
        cropped = known.get("do_center_crop", False)
        fit = "crop" if cropped or not known.get("crop_pct") else "stretch"
        return Preprocessing(size=crop if cropped else resize, fit=fit, resize=resize, interpolation=interpolation)
    side = wanted.get("height", size) if isinstance(wanted, dict) else int(wanted)
    cropped = known.get("do_center_crop", False)
    return Preprocessing(size=crop if cropped else side, fit="stretch", resize=side, interpolation=interpolation)


def _json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file.name} of the source is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file.name} of the source is not a JSON object")
    return raw


def _triple(values: Any) -> Triple:  # noqa: ANN401
    one, two, three = (float(value) for value in values)
    return one, two, three
