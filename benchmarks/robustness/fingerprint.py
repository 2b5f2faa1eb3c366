"""A digest of all that an object's behaviour depends on: weights, buffers, and plain values, private ones too."""

import dataclasses
import hashlib
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TORCH_OWN = frozenset(vars(nn.Module()))  # parameters, buffers, hooks …: walked by name, or none of the behaviour
PLAIN = (bool, int, float, complex, str, bytes, type(None), Path, torch.dtype, torch.device, torch.Size)


def fingerprint(thing: object, *, without: Iterable[object] = ()) -> str:
    """Return the SHA-256 over a thing and all that it holds, but for those very objects in `without`.

    What can't be described, such as an open file, makes it another one every time.
    """
    digest = hashlib.sha256()
    for piece in _pieces(thing, {id(one): one for one in without}):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(thing: Any, seen: dict[int, object]) -> Iterator[bytes]:  # noqa: ANN401
    if isinstance(thing, PLAIN):
        yield repr(thing).encode()
        return
    if id(thing) in seen:
        yield b"again"
        return
    seen[id(thing)] = thing  # held, so that no id comes again
    yield f"{type(thing).__module__}.{type(thing).__qualname__}".encode()
    if isinstance(thing, Tensor):
        values = thing.detach().cpu().contiguous()
        yield repr((tuple(values.shape), values.dtype)).encode()
        yield values.flatten().view(torch.uint8).numpy().tobytes() if values.numel() else b""
    elif isinstance(thing, np.ndarray):
        yield repr((thing.shape, thing.dtype)).encode() + thing.tobytes()
    elif isinstance(thing, type | types.ModuleType | types.BuiltinFunctionType):
        yield repr(thing).encode()
    elif isinstance(thing, types.FunctionType | types.MethodType):
        yield from _of_function(thing, seen)
    else:
        for name, value in _held(thing):
            yield name.encode()
            yield from _pieces(value, seen)


def _of_function(thing: Any, seen: dict[int, object]) -> Iterator[bytes]:  # noqa: ANN401
    yield from _of_code(thing.__code__)
    yield from _pieces((thing.__defaults__, thing.__kwdefaults__, getattr(thing, "__self__", None)), seen)
    for cell in getattr(thing, "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:  # of a name that has no value yet
            yield b"empty"
        else:
            yield from _pieces(held, seen)


def _of_code(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code + repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant)
        else:
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant).encode()


def _held(thing: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Yield what a thing holds, by name."""
    if isinstance(thing, Mapping):
        yield from ((repr(key), value) for key, value in thing.items())
    elif isinstance(thing, list | tuple):
        yield from ((str(place), value) for place, value in enumerate(thing))
    elif isinstance(thing, set | frozenset):
        yield from ((str(place), value) for place, value in enumerate(sorted(thing, key=repr)))
    elif isinstance(thing, nn.Module):
        yield from thing.named_parameters(recurse=False)
        yield from thing.named_buffers(recurse=False)
        yield from thing.named_children()
        yield "hooks", [*thing._forward_pre_hooks.values(), *thing._forward_hooks.values()]
        yield from ((name, value) for name, value in vars(thing).items() if name not in TORCH_OWN)
    elif isinstance(thing, partial):
        yield from (("func", thing.func), ("args", thing.args), ("keywords", thing.keywords))
    elif dataclasses.is_dataclass(thing):
        yield from ((field.name, getattr(thing, field.name)) for field in dataclasses.fields(thing))
    elif hasattr(thing, "__dict__"):
        yield from vars(thing).items()
    elif slots := [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]:
        yield from ((name, getattr(thing, name, None)) for name in slots)
    else:
        yield "unknown", uuid.uuid4().hex
