"""Register which models are served under which id, and who still uses one that has been replaced."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.inference.captured import Execution
from unperturb.models.purifiers.base import lacking
from unperturb.models.purifiers.defended import preset_of, presets_of
from unperturb.models.purifiers.reverse_attack import PRESETS, ReverseAttackConfig
from unperturb.service.engine.cost import Cost
from unperturb.service.engine.stages import stages_of
from unperturb.service.errors import NotFoundError, UnprocessableError

PACE_LIMIT = 10.0  # times faster or slower than estimated
PACE_SMOOTHING = 0.1  # of each new observation's distance from the estimate


@dataclass(eq=False)
class Model:
    """Hold a model that is served under `id`; `number` tells two of one id apart.

    cost:  of images on the slowest device; measured in the warm-up
    execution: how its steps run now; where workers differ, the slowest way: eager, captured, compiled
    workers: both on each worker that has loaded it, by its index
    pace:  what work takes now, in multiples of its cost
    users: requests that have begun on it
    answered: images
    """

    number: int
    id: str
    name: str
    card: Card
    execution: Execution = "eager"
    cost: Cost = Cost()
    workers: dict[int, tuple[Execution, Cost]] = field(default_factory=dict)
    pace: float = 1.0
    users: int = 0
    answered: int = 0

    @property
    def image_size(self) -> int:
        """Return the side of the images that it takes."""
        return self.card.architecture.image_size

    @property
    def presets(self) -> tuple[str, ...]:
        """Return the presets that the checkpoint has the parts for."""
        return presets_of(self.card)

    def preset(self, name: str) -> ReverseAttackConfig:
        """Return a preset as the checkpoint has it."""
        return preset_of(self.card, name)

    def require(self, preset: str | None) -> None:
        """Raise UnprocessableError for a preset that the checkpoint lacks the parts of."""
        if preset is not None and preset not in self.presets:
            part = "purifier" if PRESETS[preset].restores else "head"
            without = lacking(part, f"model {self.id!r}")
            can = " or ".join(f"preset={name}" for name in self.presets)
            raise UnprocessableError(f"preset={preset}: {without}. Until then ask for {can}, or purify=never")

    def observe(self, pace: float) -> None:
        """Follow what work takes now; one step that hung tells little of the next."""
        self.pace += PACE_SMOOTHING * (min(max(pace, 1 / PACE_LIMIT), PACE_LIMIT) - self.pace)

    def alone_s(self, stage: str | None) -> float:
        """Estimate the seconds of one image that has a device for itself."""
        return self.pace * self.cost.alone(stage)

    def step_s(self, stage: str | None) -> float:
        """Estimate the seconds that one image adds to each step that others take anyway while it is there."""
        return self.pace * self.cost.added_by_step(stage)

    def batch_s(self) -> float:
        """Estimate the seconds of a step, whatever it holds."""
        return self.pace * self.cost.per_batch_s

    def added_s(self, other: str | None, stage: str | None, model: "Model", *, turns: int = 0) -> float:
        """Estimate the seconds that one of its images, in stage `other`, adds to one of `model` in `stage`.

        turns: steps for which that one waits before it begins
        """
        return self.pace * self.cost.added_by(other, stage, together=model is self, turns=turns)


class ModelRegistry:
    """Hold the models by id; `on_unused` is called with one served no more, after the last request that began on it."""

    def __init__(self, name: str, on_unused: Callable[[Model], None]) -> None:
        self._numbers, self._on_unused, self._lock = itertools.count(1), on_unused, threading.Lock()
        self._replaced: set[Model] = set()
        first = self.check(name, None)
        self.by_id: dict[str, Model] = {first.id: first}
        self.default_id = first.id

    def check(self, name: str, id: str | None, *, digest: str | None = None) -> Model:
        """Return what a checkpoint is, all of it having been read and checked.

        Raises CheckpointError for one that cannot be served, or has another digest.
        """
        loaded = store.load(name)
        stages_of(loaded)
        if digest not in (None, loaded.card.weights_sha256):
            raise CheckpointError(f"checkpoint {name!r} has SHA-256 {loaded.card.weights_sha256}, not {digest}")
        return Model(next(self._numbers), id or loaded.card.id, name, loaded.card)

    def get(self, id: str | None) -> Model:
        """Return the model with that id, or the default one; NotFoundError lists the ids."""
        model = self.by_id.get(self.default_id if id is None else id)
        if model is None:
            raise NotFoundError(f"model {id!r} is not loaded; {', '.join(sorted(self.by_id))} is")
        return model

    @contextmanager
    def use(self, id: str | None) -> Iterator[Model]:
        """Yield the model, which stays loaded until the block's end even if it is replaced."""
        with self._lock:
            model = self.get(id)
            model.users += 1
        try:
            yield model
        finally:
            with self._lock:
                model.users -= 1
            self._release()

    def put(self, model: Model, *, default: bool) -> None:
        """Serve a model, in place of one with the same id."""
        with self._lock:
            old = self.by_id.get(model.id)
            self.by_id = {**self.by_id, model.id: model}
            if default:
                self.default_id = model.id
            if old is not None:
                self._replaced.add(old)
        self._release()

    def remove(self, id: str) -> None:
        """Serve a model no more; raise ConfigError for the default one."""
        with self._lock:
            model = self.get(id)
            if id == self.default_id:
                raise ConfigError(f"model {id!r} is the default one; it can be replaced but not removed")
            self.by_id = {name: other for name, other in self.by_id.items() if name != id}
            self._replaced.add(model)
        self._release()

    def _release(self) -> None:
        with self._lock:
            unused = [model for model in self._replaced if not model.users]
            self._replaced.difference_update(unused)
        for model in unused:
            self._on_unused(model)
