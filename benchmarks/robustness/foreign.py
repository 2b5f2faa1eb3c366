"""Somebody else's classifier and purifier, taken into the harness: any module, and one small protocol.

A purifier is any object with

    purify(x, seeds) -> x'          images [n, 3, h, w] in [0, 1] and one int64 seed each; where an image's result
                                    depends on the others its row says so. What draws from torch's, NumPy's or Python's
                                    own generators is called for each image alone, under its seed

and, where it can, more, by which it is attacked harder:

    unrolled(x, seeds) -> x'        the same with a gradient, where autograd through `purify` gives none
    estimate_gradient(x, g) -> g'   or an estimate of its backward pass, in place of the identity of BPDA
    steps: int                      how many steps it takes, and
    stopped_after(steps)            -> the same purifier stopped after fewer of them: for the attack `intermediate`
    objective(x, seeds)             -> (iterate, step) -> losses [n] that it lowers: for `bpda-contrastive`

A `torch.nn.Module` that maps images to images is one too, and so are ART's preprocessors (called on NumPy arrays, with
`estimate_gradient`).
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
        return cast(Tensor, self.model(x.clone()))  # it may normalise in place

    def logits(self, features: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return the class scores as they are."""
        return features


class AnyPurifier(Purifier):
    """An object of the protocol above, a module, or a preprocessor of ART's, as a purifier of this project.

    It is tried on two random images, and on one alone: ConfigError says what is wrong with what it returns.
    `has_gradient` says whether a gradient comes through it, by itself or by its own estimate, and `mixes` whether an
    image comes out otherwise beside another.
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
        self.has_gradient = False
        together, alone = self._tried(probe, seeds), self._tried(probe[:1], seeds[:1])
        self.mixes = not torch.allclose(together[:1], alone, rtol=0, atol=1e-3)
        self.has_gradient = self._gives_a_gradient(probe, seeds)

    @property
    def draws(self) -> bool:
        """Return whether it draws from torch's, NumPy's or Python's own generators."""
        return self.call.draws

    def _tried(self, x: Tensor, seeds: Tensor) -> Tensor:
        try:
            found = self.descend(x, seeds=seeds).image
        except ConfigError:
            raise
        except Exception as error:  # whatever somebody else's purifier raises
            raise ConfigError(
                f"{_name(self.purifier)} fails on random images {list(x.shape)} and as many seeds: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._check(found, x)
        return found

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


def _call_of(purifier: Any) -> "_Seeded":  # noqa: ANN401
    """Return the purifier as a function of images and seeds; ConfigError for what is none."""
    if callable(getattr(purifier, "purify", None)):
        return _Seeded(purifier.purify)
    if callable(purifier) and callable(getattr(purifier, "estimate_gradient", None)):
        return _Seeded(lambda images, _: _as_tensor(purifier(_as_array(images))[0], images))
    if isinstance(purifier, nn.Module):
        return _Seeded(lambda images, _: purifier(images))
    raise ConfigError(
        f"{_name(purifier)} is no purifier: it needs purify(x, seeds) -> x, or to be a torch.nn.Module from images to "
        "images, or a preprocessor of ART's"
    )


class _Seeded:
    """A purifier under torch's, NumPy's and Python's generators: each image under its own seed, where it draws."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.call = call
        self.draws = False  # as far as was seen

    def __call__(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return what it makes of the images."""
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            before = np.random.get_state(), random.getstate()
            try:
                if not self.draws:
                    _seed(0, x)
                    start, found = _drawn(x), self.call(x.clone(), seeds)
                    self.draws = _drawn(x) != start
                    if not self.draws or not len(x):
                        return found
                each = enumerate(seeds.tolist())
                return torch.cat([self._under(seed, x[i : i + 1], seeds[i : i + 1]) for i, seed in each])
            finally:
                np.random.set_state(before[0])
                random.setstate(before[1])

    def _under(self, seed: int, x: Tensor, seeds: Tensor) -> Tensor:
        _seed(seed, x)
        return self.call(x, seeds)


def _seed(seed: int, x: Tensor) -> None:
    """Seed the generators that a purifier may draw from."""
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which notes a stack for each GPU not yet used
    if x.is_cuda:
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _drawn(x: Tensor) -> tuple[object, ...]:
    """Return where the generators are that a purifier may draw from."""
    of_device = torch.cuda.get_rng_state(x.device).numpy().tobytes() if x.is_cuda else b""
    of_numpy: Any = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), of_device, of_numpy[1].tobytes(), of_numpy[2:], random.getstate()


@contextmanager
def left_as_they_were(purifiers: Iterable[object]) -> Iterator[None]:
    """Give the networks that purifiers hold their modes back at the end, and their weights what wants a gradient."""
    seen: dict[int, object] = {}
    modes = {part: part.training for one in purifiers for net in _networks(one, seen) for part in net.modules()}
    wanting = {weight: weight.requires_grad for part in modes for weight in part.parameters(recurse=False)}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        for weight, wants in wanting.items():
            weight.requires_grad_(wants)


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
