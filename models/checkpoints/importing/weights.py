"""Read somebody else's weights: files of many forms to one flat dictionary of tensors that fits a network."""

import json
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unperturb.models.errors import CheckpointError, ConfigError

NESTS = ("state_dict", "model_state_dict", "model_ema", "state_dict_ema", "model", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
COUNT = "n_averaged"  # beside the weights of torch.optim.swa_utils.AveragedModel
SHOWN = 5
SAVE = "save its weights: torch.save(model.state_dict(), 'weights.pth')"


def read_state(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .pth, .pt, .bin or .tar file by name, unnested; no code of it is run.

    Raises CheckpointError for what holds no weights alone: a pickled module, TorchScript, ONNX, something else.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file of weights: .pth, .pt, .bin or .safetensors")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
    if file.suffix == ".onnx":
        raise CheckpointError(f"{file} is ONNX, whose graph has no gradient here; from the network behind it, {SAVE}")
    if _is_torchscript(file):
        raise CheckpointError(f"{file} is TorchScript; from the network it was made of, {SAVE}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's age: what it lacks is an error below
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds Python objects and not weights alone, and loading those would run code; {SAVE}"
        ) from error
    except Exception as error:  # torch's unpickler raises nearly every kind of exception on damaged files
        raise CheckpointError(f"{file} cannot be read as weights of PyTorch; it is damaged, or another kind") from error
    return _unnested(loaded, file)


def fill(network: nn.Module, state: Mapping[str, Tensor], *, of: str) -> None:
    """Load the tensors into a network; CheckpointError says which do not fit, how many, and what was expected."""
    expected = network.state_dict()
    found = dict(without_prefix(state, expected))
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # older files have none
    missing = sorted(expected.keys() - found.keys() - counters)
    unknown = sorted(found.keys() - expected.keys())
    shapes = sorted(
        f"{name} {list(found[name].shape)} for {list(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    )
    faults = [
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', …' * (len(names) > SHOWN)})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise CheckpointError(f"the weights do not fit {of}, which has {len(expected)} tensors: {'; '.join(faults)}")
    expected.update(found)
    network.load_state_dict(expected)  # with its metadata, without which MNASNet takes no weights


def renamed(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors under other names: by a JSON object of regular expressions and replacements, in its order.

    Raises ConfigError for another kind of file, and where two tensors come to one name.
    """
    try:
        rules = json.loads(file.read_text(encoding="utf-8"))
        patterns = [(re.compile(pattern), str(replacement)) for pattern, replacement in rules.items()]
        names = {name: reduce(lambda text, rule: rule[0].sub(rule[1], text), patterns, name) for name in state}
    except (OSError, ValueError, AttributeError, re.error) as error:
        raise ConfigError(f"{file} is no JSON object of regular expressions and replacements: {error}") from error
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise ConfigError(f"{file} gives {len(twice)} names to several tensors, such as {twice[0]!r}")
    return {names[name]: value for name, value in state.items()}


def without_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors under the names of a network: prefixes that all of them have, and it has not, are dropped."""
    state = {name: value for name, value in state.items() if name != COUNT or name in expected}
    while not expected.keys() & state.keys():
        prefix = next((one for one in PREFIXES if all(name.startswith(one) for name in state)), None)
        if prefix is None or not state:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _unnested(loaded: Any, file: Path) -> dict[str, Tensor]:  # noqa: ANN401
    """Return the tensors of a dictionary, or of the one inside it that holds the weights."""
    while isinstance(loaded, Mapping):
        nest = next((name for name in NESTS if isinstance(loaded.get(name), Mapping)), None)
        if nest is None:
            break
        loaded = loaded[nest]
    tensors = {str(name): value for name, value in loaded.items()} if isinstance(loaded, Mapping) else {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{file} holds no dictionary of tensors; {SAVE}")
    return tensors


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())
