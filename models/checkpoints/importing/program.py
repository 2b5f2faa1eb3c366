"""A program of torch.export -> a network as networks/exported.py takes it: what its JSON says, without running any."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from unperturb.models.checkpoints.importing.pt2 import KINDS, read_pt2, unreadable
from unperturb.models.errors import ConfigError
from unperturb.models.networks.exported import IMAGES, TYPES, operator

MEMORY = {1: "contiguous", 2: "channels_last", 4: "preserve"}
STRIDED, LAYOUT = 7, "@strided"  # the only layout, and so left out
CHECKS = ("_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")
ATEN, PYTHON = "torch.ops.aten.", "_operator."
BATCH = "dynamic_shapes=({0: torch.export.Dim('batch')},)"
ELSE = "import the network by python:package.module:factory"
EVAL = "it was exported in training mode: call model.eval() before torch.export.export"


class Program(NamedTuple):
    """A network as exported.py takes it, its tensors by the names there, and the side of its images (0: any)."""

    options: dict[str, Any]
    state: dict[str, Tensor]
    size: int


def read_program(file: Path) -> Program:
    """Return what a .pt2 file holds; no code of it is run.

    Raises CheckpointError for what is none, or holds pickles or compiled code that its network needs; ConfigError for a
    network that is no classifier of single images of any number, or calls what is not called here.
    """
    raw, data = read_pt2(file)
    try:
        graph, signature = raw["graph_module"]["graph"], raw["graph_module"]["signature"]
        names = _inputs(signature, file)
        calls = _calls(graph["nodes"], file, {names[IMAGES]: IMAGES})
        output = _output(signature, file)
        calls, linear = _without_linear(calls, output, file)
        size = _size(graph["tensor_values"][names[IMAGES]], raw["range_constraints"], file)
        return Program(*_assembled(names, data, calls, linear), size)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise unreadable(file, error) from error


def _inputs(signature: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return what each input of the graph is in the network, by its name in the graph, and IMAGES' own."""
    names, images = dict[str, str](), []
    for spec in signature["input_specs"]:
        ((kind, value),) = spec.items()
        if kind == "user_input" and "as_tensor" in value["arg"]:
            images.append(value["arg"]["as_tensor"]["name"])
        elif kind in ("parameter", "buffer", "tensor_constant"):
            names[value["arg"]["name"]] = value[f"{kind}_name"]
        elif kind != "constant_input":
            raise ConfigError(f"{file}: its network takes a {kind}, not images alone")
    if len(images) != 1:
        raise ConfigError(f"{file}: its network takes {len(images)} tensors, not images alone")
    return {**names, IMAGES: images[0]}


def _output(signature: Mapping[str, Any], file: Path) -> str:
    """Return the name of the class scores."""
    outputs = [next(iter(spec.items())) for spec in signature["output_specs"]]
    changed = [kind for kind, _ in outputs if kind.endswith("_mutation")]
    if changed:
        raise ConfigError(f"{file}: its network changes itself as it runs ({changed[0]}); {EVAL}")
    if len(outputs) != 1 or "as_tensor" not in outputs[0][1]["arg"]:
        raise ConfigError(f"{file}: its network answers with {len(outputs)} values, not with [batch, classes] alone")
    return str(outputs[0][1]["arg"]["as_tensor"]["name"])


def _size(images: Mapping[str, Any], ranges: Mapping[str, Any], file: Path) -> int:
    """Return the side of the images, 0 where it may be any; ConfigError for what is not [batch, 3, side, side]."""
    sizes = [one.get("as_int") for one in images["sizes"]]
    if KINDS.get(images["dtype"]) != "float32" or len(sizes) != 4 or sizes[1] != 3 or sizes[2] != sizes[3]:
        shown = ["any" if one is None else one for one in sizes]
        raise ConfigError(
            f"{file}: its network takes {KINDS.get(images['dtype'])} of {shown}, not float32 of [batch, 3, side, side]"
        )
    if sizes[0] is not None:
        raise ConfigError(f"{file}: its batch size is fixed at {sizes[0]}; export it with {BATCH}")
    written = str(images["sizes"][0]["as_expr"]["expr_str"])
    symbol = re.fullmatch(r"(?:Symbol\(')?(\w+)(?:'.*\))?", written)
    most = (ranges.get(symbol[1]) or {}).get("max_val") if symbol else written
    if most is not None:
        raise ConfigError(f"{file}: its batch size is limited to {most}; export it with {BATCH}")
    return int(sizes[2] or 0)


def _calls(nodes: list[Any], file: Path, renamed: Mapping[str, str]) -> list[list[Any]]:
    """Return every operator, its results' names and its arguments by name, as exported.py has them, without checks."""
    calls: list[list[Any]] = []
    for node in nodes:
        target = str(node["target"])
        name = target.removeprefix(ATEN) if target.startswith(ATEN) else target.replace(PYTHON, "sizes.")
        if name.partition(".")[0] in CHECKS:
            continue
        arguments = {one["name"]: _written(one["arg"], renamed, file) for one in node["inputs"]}
        arguments = {key: one for key, one in arguments.items() if one != LAYOUT}
        if arguments.get("training") is True or arguments.get("train") is True:
            raise ConfigError(f"{file}: {name}: {EVAL}")
        results = [name for one in node["outputs"] for name in _results(one)]
        calls.append([name, results, arguments])
    used = {name for *_, arguments in calls for name in _references(list(arguments.values()))}
    needed = [one for one in calls if not one[0].startswith("sizes.") or used.intersection(one[1])]
    for name, *_ in needed:
        try:
            operator(name)
        except ConfigError as error:
            decomposed = "; save it without run_decompositions()" * name.startswith("as_strided")
            raise ConfigError(f"{file}: {error}{decomposed}; or {ELSE}") from error
    return needed


def _written(argument: Mapping[str, Any], renamed: Mapping[str, str], file: Path) -> Any:  # noqa: ANN401
    """Return an argument as exported.py has it."""
    ((kind, value),) = argument.items()

    def of_name(name: str) -> str:
        return f"%{renamed.get(name, name)}"

    def of_size(one: Mapping[str, Any]) -> Any:  # noqa: ANN401
        return of_name(one["as_name"]) if "as_name" in one else one["as_int"]

    match kind:
        case "as_int" | "as_ints" | "as_bool" | "as_bools" | "as_string" | "as_int_lists":
            return value
        case "as_none":
            return None
        case "as_float":
            return float(value)
        case "as_floats":
            return [float(one) for one in value]
        case "as_tensor":
            return of_name(value["name"])
        case "as_tensors":
            return [of_name(one["name"]) for one in value]
        case "as_optional_tensors":
            return [_written(one, renamed, file) for one in value]
        case "as_sym_int":
            return of_size(value)
        case "as_sym_ints":
            return [of_size(one) for one in value]
        case "as_scalar_type":
            return f"@{KINDS[value]}"
        case "as_memory_format":
            return f"@{MEMORY[value]}"
        case "as_device":
            return "@device"
        case "as_layout" if value == STRIDED:
            return LAYOUT
    raise ConfigError(f"{file}: an argument of the kind {kind} is not known; {ELSE}")


def _results(output: Mapping[str, Any]) -> list[str]:
    """Return the names of a call's result, or of each of several."""
    ((kind, value),) = output.items()
    several = value if isinstance(value, list) else [value]
    return ["_"] if kind == "as_none" else [str(one.get("name", one.get("as_name"))) for one in several]


def _references(written: Any) -> list[str]:  # noqa: ANN401
    if isinstance(written, list):
        return [name for one in written for name in _references(one)]
    return [written[1:]] if isinstance(written, str) and written.startswith("%") else []


def _without_linear(calls: list[list[Any]], output: str, file: Path) -> tuple[list[list[Any]], tuple[str, ...]]:
    """Return the calls before the last linear layer, and the names of its input, its weight and its bias ("": none)."""
    made = {name: (operator, arguments) for operator, results, arguments in calls for name in results}
    name, arguments = made.get(output, ("nothing", {}))
    if name == "linear.default":
        parts = [arguments.get(key) for key in ("input", "weight", "bias")]
    elif name == "addmm.default" and arguments.keys() == {"self", "mat1", "mat2"}:
        turned, of = made.get(str(arguments["mat2"])[1:], ("", {}))
        if turned not in ("t.default", "permute.default"):
            raise ConfigError(f"{file}: its network ends in addmm, and not in a linear layer")
        parts = [arguments["mat1"], of["self"], arguments["self"]]
    else:
        raise ConfigError(
            f"{file}: its network ends in {name}, and not in a linear layer; export what gives the logits"
        )
    left = [one for one in calls if output not in one[1]]
    return left, tuple("" if part is None else str(part)[1:] for part in parts)


def _assembled(
    names: Mapping[str, str], data: Mapping[str, Tensor], calls: list[list[Any]], linear: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the options of exported.py, and its tensors."""
    features, weight, bias = linear
    used = {name for *_, arguments in calls for name in _references(list(arguments.values()))} | {features}
    state = {name: data[names[name]] for name in names if name in used and name != IMAGES}
    kinds = {kind: name for name, kind in TYPES.items()}
    matrix = data[names[weight]]
    options = {
        "tensors": [" ".join((name, kinds[one.dtype], *map(str, one.shape))) for name, one in state.items()],
        "calls": [json.dumps(call) for call in calls],
        "features": features,
        "linear": [matrix.shape[1], matrix.shape[0], int(bool(bias))],
    }
    state["linear.weight"] = matrix
    if bias:
        state["linear.bias"] = data[names[bias]]
    return options, state
