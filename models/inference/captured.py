"""One step of a stage at fixed sizes and addresses: replayed as one CUDA graph, compiled or not.

Eager PyTorch launches some hundreds of kernels a step, which takes longer than the step's arithmetic for small batches;
a captured graph launches them all at once. On a device without graphs the same code runs uncaptured.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from unperturb.models.attacks.projected_gradient import Descent
from unperturb.models.errors import ConfigError
from unperturb.models.inference.continuous import Slots, Stage, StepResult, step_together
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.shapes import Float, Int

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

Execution = Literal["eager", "captured", "compiled"]
WARM_UP = 3  # steps before the capture, in which libraries choose their kernels
Function = Callable[[Slots], tuple[Tensor, Tensor | None, Tensor]]


class CapturedStep:
    """`load` some images, `replay` steps of theirs; the iterates stay in place between replays.

    size: images at most; fewer are filled up with black ones, whose results nobody sees
    compiled: fuse the step's kernels by torch's compiler, for which `check_compiler` looks (some ten seconds)
    pool: memory that graphs share which are never replayed at the same time, all captured on one `stream`
    """

    def __init__(
        self,
        classifier: ImageClassifier,
        stage: Stage,
        size: int,
        *,
        device: torch.device,
        compiled: bool = False,
        backend: str = "inductor",
        pool: "_POOL_HANDLE | None" = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        side = classifier.image_size
        with torch.inference_mode(False):
            image = torch.zeros(size, 3, side, side, device=device)
            number = torch.zeros(size, dtype=torch.int64, device=device)
            velocity = image.clone() if stage.loop.momentum else None
            anchors = stage.anchor(image)
            self._state = Slots(image, image.clone(), velocity, number, number.clone(), number.clone(), anchors)
            self._losses = torch.zeros(size, device=device)
        self.size, self._used, self.device = size, 0, device

        def step(slots: Slots) -> tuple[Tensor, Tensor | None, Tensor]:
            (after,) = step_together(classifier, [(stage, slots)])
            return after.x, after.velocity, after.losses

        self._step: Function = _compiled(step, self._state, backend) if compiled else step
        self._graph = self._captured(pool, stream) if device.type == "cuda" else None

    def load(self, slots: Slots) -> None:
        """Take the images' state; whatever was here before is gone. At most `size` of them."""
        count = len(slots.seeds)
        for own, given in zip(self._state, slots, strict=True):
            if own is None:
                continue
            own[count : self._used].zero_()
            if given is None:
                own[:count].zero_()  # a velocity before the first step
            else:
                own[:count].copy_(given)
        self._used = count

    def replay(self) -> StepResult:
        """Take one step of every image loaded; what it gives is overwritten by the next."""
        if self._graph is None:
            self._advance()
        else:
            with torch.cuda.device(self.device):
                self._graph.replay()
        velocity = self._state.velocity
        used = slice(self._used)
        return StepResult(self._state.x[used], None if velocity is None else velocity[used], self._losses[used])

    def _advance(self) -> None:
        with torch.no_grad():
            x, velocity, losses = self._step(self._state)
            self._state.x.copy_(x)
            if velocity is not None:
                cast(Tensor, self._state.velocity).copy_(velocity)
            self._losses.copy_(losses)
            self._state.steps.add_(1)

    def _captured(self, pool: "_POOL_HANDLE | None", stream: torch.cuda.Stream | None) -> torch.cuda.CUDAGraph:
        """Return the graph of a step, captured on a stream of this device: torch's own is of another."""
        with torch.cuda.device(self.device):
            stream, current = stream or torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._advance()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._advance()
        return graph


class Stepper:
    """Steps of a classifier's stages on one device, eagerly or from graphs for 1, 2, 4 … images, made at first use.

    Raises ConfigError for `compiled` without a compiler.
    """

    def __init__(self, classifier: ImageClassifier, device: torch.device, *, execution: Execution) -> None:
        if execution == "compiled":
            check_compiler(device)
        self.classifier, self.device, self.execution = classifier, device, execution
        self._made: dict[tuple[Stage, int], CapturedStep] = {}
        self._pool: _POOL_HANDLE | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def together(self) -> bool:
        """Return whether the parts of a step are one batch; a graph for each part is not."""
        return self.execution == "eager"

    def step(self, parts: Sequence[tuple[Stage, Slots]]) -> list[StepResult]:
        """Take one step of every slot of every part."""
        if self.together:
            return step_together(self.classifier, parts)
        return [self._step_of(stage, slots) for stage, slots in parts]

    def _step_of(self, stage: Stage, slots: Slots) -> StepResult:
        stepped: list[StepResult] = []
        begin = 0
        for size in self.sizes(len(slots.seeds)):
            captured = self.captured(stage, size)
            captured.load(Slots(*(None if part is None else part[begin : begin + size] for part in slots)))  # type: ignore[arg-type]
            stepped.append(StepResult(*(None if part is None else part.clone() for part in captured.replay())))  # type: ignore[arg-type]
            begin += size
        whole = (None if None in parts else torch.cat(parts) for parts in zip(*stepped, strict=True))
        return StepResult(*whole)  # type: ignore[arg-type]

    def sizes(self, count: int) -> list[int]:
        """Return the sizes of the batches that take a step of so many images: of the graphs, where there are any.

        On a CPU a black image in an empty place costs what any other does, so that no graph has a quarter of its places
        empty; a GPU is given the images in one graph.
        """
        if self.together:
            return [count]
        size = bucket(count)
        if self.device.type == "cpu" and size - count >= size / 4:
            return [size // 2, *self.sizes(count - size // 2)]
        return [size]

    def prepare(self, stage: Stage, count: int) -> None:
        """Make what steps of so many images need, where that takes time; raises what goes wrong."""
        if not self.together:
            for size in self.sizes(count):
                self.captured(stage, size)

    def descend(self, stage: Stage, x0: Float[Tensor, "batch 3 h w"], *, seeds: Int[Tensor, " batch"]) -> Descent:
        """Take all steps of a stage that needs no labels, for images in [0, 1] that begin and end together."""
        if stage.loop.halts:
            raise ConfigError("a stage with a gate or settle ends images early; they are stepped one step at a time")
        none = torch.zeros_like(seeds)
        slots = Slots(x0, stage.loop.begin(x0, seeds), None, seeds, none, none, stage.anchor(x0))
        losses = []
        if self.execution == "eager":
            for _ in range(stage.loop.steps):
                (after,) = self.step([(stage, slots)])
                slots = slots._replace(x=after.x, velocity=after.velocity, steps=slots.steps + 1)
                losses.append(after.losses)
            return Descent(slots.x, torch.stack(losses) if losses else x0.new_zeros((0, len(x0))))
        captured = self.captured(stage, bucket(len(x0)))
        captured.load(slots)
        x = slots.x
        for _ in range(stage.loop.steps):
            x, _, loss = captured.replay()
            losses.append(loss.clone())
        return Descent(x.clone(), torch.stack(losses) if losses else x0.new_zeros((0, len(x0))))

    def captured(self, stage: Stage, size: int) -> CapturedStep:
        """Return the graph of a stage for so many images."""
        if (stage, size) not in self._made:
            if self._pool is None and self.device.type == "cuda":
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
            self._made[stage, size] = CapturedStep(
                self.classifier,
                stage,
                size,
                device=self.device,
                compiled=self.execution == "compiled",
                pool=self._pool,
                stream=self._stream,
            )
        return self._made[stage, size]


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError where torch's compiler has no compiler to call: of C++ for a CPU, of C for a GPU."""
    variable, names = ("CXX", ("g++",)) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    names = (os.environ[variable],) if variable in os.environ else names
    if not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"execution='compiled' needs a compiler, and {' or '.join(names)} is not installed here: install it, or "
            f"name another in the environment variable {variable}"
        )


def fastest(device: torch.device) -> Execution:
    """Return the fastest way to run steps that this machine has what it takes for."""
    try:
        check_compiler(device)
    except ConfigError:
        return "captured" if device.type == "cuda" else "eager"
    return "compiled"


def bucket(count: int) -> int:
    """Return the next power of two."""
    return 1 << max(0, count - 1).bit_length()


def _compiled(step: Function, example: Slots, backend: str) -> Function:
    """Return the step and its backward pass as one traced graph, compiled for the sizes of `example`."""
    present = [i for i, part in enumerate(example) if part is not None]

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        parts: list[Tensor | None] = [None] * len(example)
        for i, tensor in zip(present, tensors, strict=True):
            parts[i] = tensor
        return tuple(part for part in step(Slots(*parts)) if part is not None)  # type: ignore[arg-type]

    traced = make_fx(of_tensors)(*(example[i] for i in present))
    # A worker's threads may become more and fewer, so that their number does not stand in the code that is made.
    options = {"cpp.dynamic_threads": True} if backend == "inductor" else None
    fast = torch.compile(traced, backend=backend, fullgraph=True, dynamic=False, options=options)  # type: ignore[arg-type]

    def run(slots: Slots) -> tuple[Tensor, Tensor | None, Tensor]:
        x, *velocity, losses = fast(*(slots[i] for i in present))
        return x, velocity[0] if velocity else None, losses

    return run
