"""Somebody else's classifier and purifier, taken into the harness: any module, and one small protocol.

A purifier is any object with

    purify(x, seeds) -> x'          images [n, 3, h, w] in [0, 1] and one int64 seed each; an image's result should not
                                    depend on the others

and, where it can, more, by which it is attacked harder:

    unrolled(x, seeds) -> x'        the same with a gradient, where autograd through `purify` gives none
    estimate_gradient(x, g) -> g'   or an estimate of its backward pass, in place of the identity of BPDA
    steps: int                      how many steps it takes, and
    stopped_after(steps)            -> the same purifier stopped after fewer of them: for the attack `intermediate`
    objective(x, seeds)             -> (iterate, step) -> losses [n] that it lowers: for `bpda-contrastive`

A `torch.nn.Module` that maps images to images is one too, and so are ART's preprocessors (called on NumPy arrays, with
`estimate_gradient`).
"""

from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unperturb.models.attacks.projected_gradient import Descent, Objective, ProjectedGradient
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.purifiers.base import Purifier
from unperturb.models.shapes import Float, Int

OPAQUE = (Tensor, np.ndarray, str, bytes, type, ModuleType, FunctionType, BuiltinFunctionType)  # they hold no network


class AnyClassifier(ImageClassifier):
    """A module that maps images in [0, 1] to class scores; it has no features of its own but these."""

    def __init__(self, model: nn.Module, *, num_classes: int, image_size: int) -> None:
        super().__init__(feature_dim=num_classes, num_classes=num_classes, image_size=image_size)
        self.model = model

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return the class scores."""
        return cast(Tensor, self.model(x))

    def logits(self, features: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return the class scores as they are."""
        return features


class AnyPurifier(Purifier):
    """An object of the protocol above, a module, or a preprocessor of ART's, as a purifier of this project.

    It is tried once on two random images: ConfigError says what is wrong with what it returns. `has_gradient` says
    whether a gradient comes through it, by itself or by its own estimate.
    """

    def __init__(self, classifier: ImageClassifier, purifier: Any, *, device: torch.device | str = "cpu") -> None:  # noqa: ANN401
        steps = getattr(purifier, "steps", 0)
        if not isinstance(steps, int):
            raise ConfigError(f"{_name(purifier)}.steps is {steps!r}, not a whole number")
        loop = ProjectedGradient(direction="descend", epsilon=1.0, step_size=0.0, steps=steps)
        super().__init__(classifier, loop)
        for network in _networks(purifier, {}):
            network.eval().requires_grad_(False).to(device)
        self.purifier = purifier
        self.call = _call_of(purifier)
        self.train(False)
        size = classifier.image_size
        probe = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        seeds = torch.zeros(2, dtype=torch.int64, device=probe.device)
        self._check(self.descend(probe, seeds=seeds).image, probe)
        self.has_gradient = self._gives_a_gradient(probe, seeds)

    def _check(self, found: object, x: Tensor) -> None:
        if not isinstance(found, Tensor) or found.shape != x.shape or found.dtype != x.dtype:
            what = f"{list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"{_name(self.purifier)} makes {what} of images of {list(x.shape)} {x.dtype}")
        if not found.isfinite().all():
            raise ConfigError(f"{_name(self.purifier)} makes NaN or infinite pixels")

    def _gives_a_gradient(self, probe: Tensor, seeds: Tensor) -> bool:
        """Return whether a gradient comes through it; what raises where one is asked for, as NumPy does, has none."""
        inside = probe.clone().requires_grad_()
        try:
            with torch.enable_grad():
                found = self._opened(inside, seeds)
                (slope,) = torch.autograd.grad((found * torch.rand_like(found)).sum(), inside)
        except (RuntimeError, TypeError):
            return False
        return bool(slope.any())

    @property
    def has_steps(self) -> bool:
        """Return whether it can be stopped in between."""
        return self.loop.steps > 0 and hasattr(self.purifier, "stopped_after")

    @property
    def has_objective(self) -> bool:
        """Return whether it says what it lowers."""
        return hasattr(self.purifier, "objective")

    def objective(self, x: Float[Tensor, "batch 3 h w"], seeds: Int[Tensor, " batch"]) -> Objective:
        """Return what it lowers; zero where it says nothing."""
        if self.has_objective:
            return cast(Objective, self.purifier.objective(x, seeds))
        return lambda iterate, _: iterate.new_zeros(len(iterate))

    def descend(
        self, x: Float[Tensor, "batch 3 h w"], *, seeds: Int[Tensor, " batch"], unrolled: bool = False
    ) -> Descent:
        """Purify a copy of the images; with `unrolled`, by what gives a gradient, the identity if nothing does."""
        if unrolled and self.has_gradient:
            found = self._opened(x.clone(), seeds)
        else:
            with torch.inference_mode(False), torch.enable_grad():  # it may take gradients of its own
                found = self.call(x.detach().clone(), seeds.clone())
            found = found.detach() if isinstance(found, Tensor) else found
        if not isinstance(found, Tensor) or found.shape != x.shape:
            self._check(found, x)
        if unrolled and not self.has_gradient:
            found = x + (found - x).detach()
        return Descent(found, x.new_zeros((0, len(x))))

    def _opened(self, x: Tensor, seeds: Tensor) -> Tensor:
        if hasattr(self.purifier, "unrolled"):
            near = cast(Tensor, self.purifier.unrolled(x, seeds))
            return near + (self.descend(x, seeds=seeds).image - near).detach()  # what is served, with its gradient
        if hasattr(self.purifier, "estimate_gradient"):
            return cast(Tensor, _Estimated.apply(x, seeds, self.call, self.purifier.estimate_gradient))
        return self.call(x, seeds)

    def stopped_after(self, steps: int) -> "Purifier":
        """Return it stopped after `steps` steps; as it is, where it can't be."""
        if not self.has_steps or steps >= self.loop.steps:
            return self
        device = next((parameter.device for parameter in self.classifier.parameters()), torch.device("cpu"))
        return AnyPurifier(self.classifier, self.purifier.stopped_after(steps), device=device)


class _Estimated(torch.autograd.Function):
    """A purifier whose backward pass is its own estimate, on NumPy arrays."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        seeds: Tensor,
        call: Callable[[Tensor, Tensor], Tensor],
        estimate: Callable[..., Any],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.estimate = estimate
        return call(x, seeds)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        with torch.enable_grad():  # ART's own PyTorch preprocessors differentiate inside
            estimated = ctx.estimate(_as_array(x), _as_array(gradient))
        return _as_tensor(estimated, x), None, None, None


def _call_of(purifier: Any) -> Callable[[Tensor, Tensor], Tensor]:  # noqa: ANN401
    """Return the purifier as a function of images and seeds; ConfigError for what is none."""
    if callable(getattr(purifier, "purify", None)):
        return cast(Callable[[Tensor, Tensor], Tensor], purifier.purify)
    if callable(purifier) and callable(getattr(purifier, "estimate_gradient", None)):
        return _Seeded(lambda images: _as_tensor(purifier(_as_array(images))[0], images))
    if isinstance(purifier, nn.Module):
        return _Seeded(purifier)
    raise ConfigError(
        f"{_name(purifier)} is no purifier: it needs purify(x, seeds) -> x, or to be a torch.nn.Module from images to "
        "images, or a preprocessor of ART's"
    )


class _Seeded:
    """What takes no seeds, under torch's and NumPy's generators: each image under its own seed, where it draws."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        self.call = call
        self.draws: bool | None = None

    def __call__(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return what it makes of the images."""
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            state = np.random.get_state()  # ART's preprocessors draw from it
            try:
                if self.draws is None and len(x):
                    with torch.no_grad():
                        self.draws = not torch.equal(self._under(0, x[:1]), self._under(1, x[:1]))
                if not self.draws:
                    return self._under(0, x)
                return torch.cat([self._under(int(seed), x[i : i + 1]) for i, seed in enumerate(seeds)])
            finally:
                np.random.set_state(state)

    def _under(self, seed: int, x: Tensor) -> Tensor:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        return self.call(x)


def _networks(thing: object, seen: dict[int, object]) -> Iterator[nn.Module]:
    """Yield the networks that a thing holds, however deep in lists and objects."""
    if id(thing) in seen or isinstance(thing, OPAQUE):
        return
    seen[id(thing)] = thing
    if isinstance(thing, nn.Module):
        yield thing
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from _networks(value, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from _networks(value, seen)
    for value in vars(thing).values() if hasattr(thing, "__dict__") else ():
        yield from _networks(value, seen)


def _as_array(x: Tensor) -> Any:  # noqa: ANN401
    return x.detach().cpu().numpy().astype(np.float32)


def _as_tensor(array: Any, like: Tensor) -> Tensor:  # noqa: ANN401
    return torch.as_tensor(np.asarray(array), dtype=like.dtype, device=like.device)


def _name(purifier: object) -> str:
    return f"{type(purifier).__module__}.{type(purifier).__qualname__}"
