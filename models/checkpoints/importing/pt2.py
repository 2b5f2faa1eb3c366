"""Read a .pt2 file of torch.export.save: the JSON of its program and its tensors, and nothing that would run code.

torch.export.load unpickles what such a file holds (weights, constants, examples of the input), evaluates the
expressions of its shapes as Python, and loads compiled libraries: whoever wrote the file has the process. None of that
is needed: the graph is JSON and the weights are plain numbers, and these are read here.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unperturb.models.errors import CheckpointError
from unperturb.models.networks.exported import TYPES

FORMAT, MAJOR = "pt2", 8  # of the archive, and the version of its JSON
KINDS = {6: "float16", 7: "float32", 8: "float64", 13: "bfloat16"}
KINDS |= {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 12: "bool"}  # torch's ScalarType, as it is written


def read_pt2(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the program's JSON, and every weight, buffer and constant by the name that it had in the network.

    Raises CheckpointError for what is no such file, and for one whose tensors are pickled or whose code is compiled.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file")
    try:
        with zipfile.ZipFile(file) as archive:
            return _opened(archive, file)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """Return the error of a file in which something is missing, or of another kind than it should be."""
    return CheckpointError(f"{file} is not a program of torch.export that can be read: {type(error).__name__}: {error}")


def _opened(archive: zipfile.ZipFile, file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    members = {name.partition("/")[2]: name for name in archive.namelist()}
    if "archive_format" not in members or archive.read(members["archive_format"]).decode() != FORMAT:
        older = "serialized_exported_program.json" in archive.namelist()
        what = "was saved by a torch of before 2.8: save it again" if older else "is no archive of torch.export.save"
        raise CheckpointError(f"{file} {what}")
    if any(name.startswith("data/aotinductor/") for name in members):
        raise CheckpointError(f"{file} holds compiled code, which is not run; save what torch.export.export returns")
    programs = [name for name in members if re.fullmatch(r"models/[^/]+\.json", name)]
    if len(programs) != 1:
        raise CheckpointError(f"{file} holds {len(programs)} programs, not one")
    raw = json.loads(archive.read(members[programs[0]]))
    if raw["schema_version"]["major"] != MAJOR:
        raise CheckpointError(f"{file} is of schema {raw['schema_version']['major']}, and only {MAJOR} is known")
    program, data = Path(programs[0]).stem, {}
    for folder in ("weights", "constants"):
        listed = json.loads(archive.read(members[f"data/{folder}/{program}_{folder}_config.json"]))["config"]
        for name, entry in listed.items():
            if entry["use_pickle"]:
                raise CheckpointError(f"{file}: {name} is a pickled object, and loading it would run code")
            payload = archive.read(members[f"data/{folder}/{entry['path_name']}"])
            data[name] = _tensor(payload, entry["tensor_meta"])
    return raw, data


def _tensor(payload: bytes, meta: Mapping[str, Any]) -> Tensor:
    """Return a tensor of its own from the numbers of a storage; RuntimeError where it would reach beyond them."""
    kind = TYPES[KINDS[meta["dtype"]]]
    sizes, strides = ([int(one["as_int"]) for one in meta[key]] for key in ("sizes", "strides"))
    if 0 in sizes:
        return torch.zeros(sizes, dtype=kind)
    whole = torch.frombuffer(bytearray(payload), dtype=kind)
    return whole.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"])).clone()
