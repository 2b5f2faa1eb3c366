"""A classifier made ready to be purified for: batch norm folded into convolutions, and its steps in bfloat16.

What it computes is the same, up to rounding; every weight is frozen.
"""

import copy
import dataclasses
from collections import Counter
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.hooks import RemovableHandle

from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.shapes import Float

Precision = Literal["float32", "bfloat16"]
NATIVE = "amx_bf16"  # of a CPU; with avx512_bf16 alone it took 1.5 times as long as float32
TOLERANCE = 1e-9  # of the features' largest, between a network and its folded copy in float64


def native(device: torch.device) -> Precision:
    """Return bfloat16 where the device computes in it, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    return "bfloat16" if torch.cpu.get_capabilities().get(NATIVE, False) else "float32"


def prepared(checkpoint: Checkpoint, *, precision: Precision | Literal["auto"] = "float32") -> Checkpoint:
    """Return the checkpoint with a classifier for inference alone, on the same device.

    precision: of the backbone in the steps; auto: `native`
    """
    classifier = folded(checkpoint.classifier)
    if precision == "auto":
        precision = native(next(iter(checkpoint.classifier.parameters())).device)
    if precision == "bfloat16":
        classifier = BFloat16Backbone(classifier)
    return dataclasses.replace(checkpoint, classifier=classifier.eval().requires_grad_(False))


def folded(classifier: ImageClassifier) -> ImageClassifier:
    """Return a copy whose convolutions have taken in the batch norm that follows them (Jacob et al. 2018, section 3.2).

    A convolution whose output something else reads as well keeps its batch norm, and a network that does not run in
    float64 on the CPU, where this is tried, all of them.
    """
    parameter = next(classifier.parameters(), None)
    if parameter is None:
        return copy.deepcopy(classifier).eval()
    device, side = parameter.device, classifier.image_size
    ready = copy.deepcopy(classifier).eval().requires_grad_(False).to("cpu", torch.float64)
    probe = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        try:
            expected = ready.features(probe)
            pairs = _pairs(ready, probe)
        except RuntimeError:  # of mixed types
            return copy.deepcopy(classifier).eval()
        for pair in pairs:
            first, second = (ready.get_submodule(name) for name in pair)
            fused = fuse_conv_bn_eval(cast(nn.Conv2d, first), cast(nn.BatchNorm2d, second))
            _replace(ready, pair, (fused, nn.Identity()))
            if not (ready.features(probe) - expected).abs().max() <= TOLERANCE * expected.abs().max():
                _replace(ready, pair, (first, second))
    return ready.to(device, torch.float32).to(memory_format=torch.channels_last)


def with_affine(classifier: ImageClassifier) -> ImageClassifier:
    """Return a copy whose batch norms are a scale and a shift per channel: their second derivative, which a gradient
    through a purifier's steps asks for, costs much less.
    """
    ready = copy.deepcopy(classifier).eval()
    for name, module in list(ready.named_modules()):
        if type(module) is nn.BatchNorm2d and module.running_mean is not None:  # a subclass may do more
            ready.set_submodule(name, _Affine(module))
    return ready


class _Affine(nn.Module):
    """What a batch norm does in eval mode."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.detach()
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias.detach()
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.register_buffer("shift", shift.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled and shifted channels."""
        return x * self.scale + self.shift


class BFloat16Backbone(ImageClassifier):
    """A classifier whose features are computed in bfloat16 where their gradient is asked for, and come in float32.

    That is the steps, most of the work. What is computed once an image, its classification above all, is exact: rounded
    there as well, twice as many of the shipped checkpoint's labels change. A gate is compared with a step's own loss.
    """

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__(
            feature_dim=classifier.feature_dim, num_classes=classifier.num_classes, image_size=classifier.image_size
        )
        self.exact, self.rounded = classifier, copy.deepcopy(classifier)
        for module in self.rounded.modules():
            if isinstance(module, nn.Conv2d):  # once, rather than at every step
                module.to(torch.bfloat16)

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return the classifier's features; `x` in [0, 1]."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.exact.features(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.rounded.features(x).float()

    def logits(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return the classifier's own readout."""
        return self.exact.logits(features)


def _replace(network: nn.Module, names: tuple[str, str], modules: tuple[nn.Module, nn.Module]) -> None:
    for name, module in zip(names, modules, strict=True):
        network.set_submodule(name, module)


def _pairs(network: ImageClassifier, probe: Tensor) -> list[tuple[str, str]]:
    """Return the names of every convolution and the batch norm that is given its output, each called once."""
    made: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no id is used again
    found: list[tuple[str, str]] = []
    calls: Counter[str] = Counter()

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def called(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] += 1
            alive.extend((inputs[0], output))
            if isinstance(module, nn.Conv2d):
                made[id(output)] = name
            elif id(inputs[0]) in made:
                found.append((made[id(inputs[0])], name))

        return module.register_forward_hook(called)

    hooks = [
        watch(name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.BatchNorm2d) and module.running_mean is not None)
    ]
    network.features(probe)
    for hook in hooks:
        hook.remove()
    return [pair for pair in found if all(calls[name] == 1 for name in pair)]
