"""A network that torch.export has written down, as its card has it: calls of PyTorch's own operators, and no code.

`options` of such an architecture (see importing/program.py, which makes them from a .pt2 file):

    tensors   of each weight, buffer and constant: "p_conv1_weight float32 64 3 7 7"
    calls     in their order, JSON in a line: operator, names of its results, arguments by name
    features  the name of what the last linear layer is given
    linear    its inputs, its outputs, and 1 where it has a bias

An argument is a number, true, false, null, a list, "%name" for an earlier result, "@float32" for a type,
"@channels_last" for a memory format, "@device" for the device of the images, or a word. Only the operators of OPERATORS
are called, which compute on tensors alone: none reaches a file, a network or a process.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from unperturb.models.errors import ConfigError
from unperturb.models.shapes import Float

IMAGES = "@images"  # the name of what the network is given
NAME, WORD = re.compile(r"[A-Za-z_]\w*"), re.compile(r"[a-z_]*")
TYPES = {
    name: cast(torch.dtype, getattr(torch, name))
    for name in ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
}
FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "preserve": torch.preserve_format,
}
ARITHMETIC: dict[str, Callable[[int, int], int]] = {  # on sizes
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
}
# Of torch.ops.aten, whose in-place ones (`name_`) are meant too.
NAMES = """
    abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d add addcmul addmm alias amax amin any arange
    argmax avg_pool1d avg_pool2d baddbmm batch_norm bitwise_and bitwise_not bmm cat ceil celu chunk clamp
    clamp_max clamp_min clone col2im constant_pad_nd contiguous conv1d conv2d convolution cos cumsum detach div
    dropout einsum elu embedding eq erf exp expand expand_as feature_dropout fill flatten flip floor fmod full
    full_like gather ge gelu glu group_norm gt hardsigmoid hardswish hardtanh im2col index index_put index_select
    instance_norm layer_norm le leaky_relu lift_fresh_copy linalg_vector_norm linear log log_softmax logical_and
    logical_not logical_or logsumexp lt masked_fill matmul max max_pool2d max_pool2d_with_indices maximum mean
    meshgrid min minimum mish mm movedim mul narrow native_group_norm native_layer_norm ne neg new_full new_ones
    new_zeros norm ones ones_like pad permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal
    reflection_pad1d reflection_pad2d relu relu6 remainder repeat replication_pad2d reshape reshape_as rms_norm
    roll rsqrt rsub scalar_tensor scaled_dot_product_attention select select_scatter selu sigmoid sign silu sin
    slice slice_scatter softmax softplus split split_with_sizes sqrt squeeze stack std sub sum swapaxes sym_size t
    tanh tensor_split tile to transpose type_as unbind unflatten unfold unsqueeze upsample_bicubic2d
    upsample_bilinear2d upsample_nearest2d var var_mean view view_as where zero zeros zeros_like
    _adaptive_avg_pool2d _log_softmax _native_batch_norm_legit _native_batch_norm_legit_no_training _softmax
    _to_copy _unsafe_view
"""
# Whose result is memory of its own. That of any other may be what it was given, whatever its schema says: dropout's in
# eval mode, type_as's of the same type, einsum's of one tensor.
FRESH_NAMES = """
    add addcmul addmm baddbmm batch_norm bmm cat clone conv1d conv2d convolution div embedding group_norm instance_norm
    layer_norm linear matmul maximum minimum mm mul native_group_norm native_layer_norm prelu rms_norm
    scaled_dot_product_attention stack sub where _native_batch_norm_legit_no_training
"""
OPERATORS, FRESH = frozenset(NAMES.split()), frozenset(FRESH_NAMES.split())
RESHAPED = ("view.default", "_unsafe_view.default")  # the images' memory format here may be another than in the export


class Call(NamedTuple):
    """One operator with its arguments as they are written, its results' names, and what nobody needs after it."""

    operator: str
    arguments: dict[str, Any]
    results: list[str]
    dead: list[str]


class ExportedNetwork(nn.Module):
    """Runs the calls, and the last linear layer on their result."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._tensors = [self._reserve(line) for line in options["tensors"]]
        inputs, outputs, bias = options["linear"]
        self._features = str(options["features"])
        written = [json.loads(line) for line in options["calls"]]
        self._calls = _parsed(written, kept={*self._tensors, self._features})
        self.linear = nn.Linear(inputs, outputs, bias=bool(bias))

    def _reserve(self, line: str) -> str:
        """Make room for a tensor, and return its name."""
        name, kind, *sizes = line.split()
        if not NAME.fullmatch(name) or kind not in TYPES:
            raise ConfigError(f"tensors: {line!r} is not a name, a type and sizes")
        self.register_buffer(name, torch.zeros([int(size) for size in sizes], dtype=TYPES[kind]))
        return name

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return class scores of images that are normalised as the exported network wants them."""
        values: dict[str, Any] = {name: self._buffers[name] for name in self._tensors}
        values[IMAGES] = x
        for call in self._calls:
            found = operator(call.operator)(**{key: _value(one, values) for key, one in call.arguments.items()})
            several = found if isinstance(found, list | tuple) else [found]
            values.update(zip(call.results, several, strict=True))
            for name in call.dead:
                del values[name]
        scores: Tensor = self.linear(values[self._features])
        return scores


@cache
def operator(name: str) -> Callable[..., Any]:
    """Return the function of an operator's name, `relu.default` or `sizes.mul`; ConfigError for one not among these."""
    packet, _, overload = name.partition(".")
    if packet == "sizes" and overload in ARITHMETIC:
        return ARITHMETIC[overload]
    known = OPERATORS & {packet, packet.removesuffix("_")}
    operators = getattr(torch.ops.aten, packet, None) if known else None
    if operators is None or overload not in operators.overloads():
        raise ConfigError(f"the operator {name!r} is not one of those that are called here")
    return cast(
        Callable[..., Any], torch.ops.aten.reshape.default if name in RESHAPED else getattr(operators, overload)
    )


def _parsed(written: list[Any], *, kept: set[str]) -> list[Call]:
    """Return the calls; ConfigError for an operator or value that is none, or a name that nothing has before."""
    staying = {*kept}  # and what may be a view of it
    calls, known, last_use = [], {IMAGES, *kept}, dict[str, int]()
    for number, (name, results, arguments) in enumerate(written):
        used = set(_names(list(arguments.values())))
        written_over = _written_over(operator(name))
        if over := staying.intersection(_names([arguments.get(key) for key in written_over])):
            raise ConfigError(f"calls: {name} writes over what is to stay, {sorted(over)[0]!r}")
        if _in_training(arguments):
            raise ConfigError(f"calls: {name} is called in training mode")
        if unknown := used - known:
            raise ConfigError(f"calls: {name} uses {sorted(unknown)[0]!r}, which nothing before it has made")
        if used & staying and not written_over and name.partition(".")[0] not in FRESH:
            staying.update(str(one) for one in results)
        if name in RESHAPED:
            arguments = {"shape" if key == "size" else key: one for key, one in arguments.items()}
        calls.append(Call(name, arguments, [str(one) for one in results], []))
        known.update(results)
        last_use.update(dict.fromkeys([*used, *results], number))
    for name, number in last_use.items():
        if name not in kept:
            calls[number].dead.append(name)
    return calls


def _written_over(called: Callable[..., Any]) -> list[str]:
    """Return the arguments that an operator writes over and returns, by its schema; arithmetic on sizes has none."""
    arguments = called._schema.arguments if hasattr(called, "_schema") else ()
    return [one.name for one in arguments if one.alias_info is not None and one.alias_info.is_write]


def _in_training(arguments: Mapping[str, Any]) -> bool:
    """Return whether an operator draws numbers, mixes the batch, or writes running statistics, in no schema's words.

    InstanceNorm without any takes an image's own statistics in eval mode, too.
    """
    modes = ["training", "train"]
    if (arguments.get("running_mean"), arguments.get("running_var")) != (None, None):
        modes.append("use_input_stats")
    return any(arguments.get(mode, False) is not False for mode in modes)


def _names(written: Any) -> list[str]:  # noqa: ANN401
    """Return the earlier results in a written value; ConfigError for what is no value."""
    if isinstance(written, list):
        return [name for one in written for name in _names(one)]
    if not isinstance(written, str):
        if isinstance(written, int | float | None):
            return []
    elif written.startswith("%"):
        return [written[1:]]
    elif written == "@device" or written[1:] in {*TYPES, *FORMATS} or WORD.fullmatch(written):
        return []
    raise ConfigError(f"calls: {written!r} is no value")


def _value(written: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return what a written argument stands for."""
    if isinstance(written, list):
        return [_value(one, values) for one in written]
    if not isinstance(written, str):
        return written
    kind, name = written[:1], written[1:]
    if kind == "%":
        return values[name]
    if kind == "@":
        return values[IMAGES].device if name == "device" else TYPES[name] if name in TYPES else FORMATS[name]
    return written
