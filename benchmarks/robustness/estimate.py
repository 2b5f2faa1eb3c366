"""Estimate what a run will cost, before it begins, and choose the number of threads."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from unperturb.benchmarks.robustness.attacks import ATTACKS, GRADIENT, Queries
from unperturb.benchmarks.robustness.corruptions import CorruptionRun
from unperturb.benchmarks.robustness.evaluation import Evaluation
from unperturb.benchmarks.robustness.figures import LARGER
from unperturb.models.purifiers.defended import DefendedClassifier

TIMED_IMAGES = 32
LIKELY = 0.5  # share of the images that an attack is run on, if half are right and not broken before


Run = TypeVar("Run", bound=Evaluation)


class Cost(NamedTuple):
    """Seconds per image of one call of the defended classifier: with the full gradient, by BPDA, and without."""

    full: float
    bpda: float
    none: float


def announce(runs: list[Evaluation], *, workers: int = 1) -> None:
    """Print a line per run and attack: how many calls of the defense per image, and how long that takes here; of
    corruptions one per run.

    `at most` is if every image withstands everything; an image that is broken costs nothing more, so that it is mostly
    nearer to the second figure, for half of the images. What is stored already takes no time, and is not known here.
    """
    _choose_threads(runs[0])
    if isinstance(runs[0], CorruptionRun):
        return _announce_kinds(cast(list[CorruptionRun], runs), workers)
    budget = dataclasses.asdict(runs[0].plan.budget)
    print("budget: " + ", ".join(f"{name} {value}" for name, value in budget.items()))
    print("calls of the defense per image, with the full gradient, by BPDA, without; and the time:")
    print(f"{'run':40} {'attack':20} {'full':>7} {'bpda':>7} {'none':>7}   {'at most':>8} {'half':>8}")
    total = made = 0.0
    for run in {run.plan.surrogate: run for run in runs}.values():
        made += _announce_surrogate(run, workers)
    for run in _with_bare(runs):
        images, cost = _images(run), _cost(run)
        every_part = {name: ATTACKS[name].queries(run.plan.budget) for name in run.names}
        if GRADIENT in every_part:
            once = every_part[GRADIENT]
            every_part["larger epsilon"] = Queries(*(len(LARGER) * count for count in once))
        for name, calls in every_part.items():
            seconds = images * sum(each * spent for each, spent in zip(calls, cost, strict=True)) / workers
            total += seconds
            print(
                f"{run.title[:40]:40} {name:20} {calls.full:7,} {calls.bpda:7,} {calls.none:7,}   "
                f"{_span(seconds):>8} {_span(seconds * LIKELY):>8}"
            )
        for name, reason in run.could_not_run.items():
            print(f"{run.title[:40]:40} {name:20} not run: {reason}")
    shared = f", by {workers} processes" if workers > 1 else ""
    print(
        f"all of it on {runs[0].device}{shared}, less what is stored: "
        f"about {_span(total * LIKELY + made)}, at most {_span(total + made)}",
        flush=True,
    )


def _announce_surrogate(run: Evaluation, workers: int) -> float:
    """Print a line for the images that are made on a run's surrogate, all of them to the end; return the seconds."""
    surrogate, budget, x = run.plan.surrogate, run.plan.budget, _timed(run)
    if surrogate is None:
        return 0.0
    calls = budget.restarts * (budget.apgd_steps + 1)
    spent = _fastest(partial(_differentiated, surrogate.defended, x)) / len(x)
    seconds = _images(run) * calls * spent / workers
    span = f"{_span(seconds):>8}"
    print(f"{surrogate.title[:40]:40} {'its images':20} {calls:7,} {0:7,} {budget.restarts:7,}   {span} {span}")
    return seconds


def _announce_kinds(runs: list[CorruptionRun], workers: int) -> None:
    """Print a line per run: how many images are classified, and how long that takes here."""
    total = 0.0
    for run in _with_bare(runs):
        images = _images(run) * len(run.kinds)
        seconds = images * _fastest(partial(_classified, run, x := _timed(run))) / len(x) / workers
        total += seconds
        print(f"{run.title[:40]:40} {len(run.kinds):4} kinds, {images:9,} images   {_span(seconds):>8}")
    made = "; to make the corrupted images takes its own time" * (runs[0].source == "generated")
    print(f"all of it on {runs[0].device}, less what is stored: about {_span(total)}{made}", flush=True)


def _with_bare(runs: Sequence[Run]) -> list[Run]:
    bare = [cast(Run, run.bare) for run in runs if run.bare is not None]
    return list(dict.fromkeys([*bare, *runs]))


def _images(run: Evaluation) -> int:
    return sum(len(chunk) for chunk in run.plan.chunks(len(run.data.labels)))


def _timed(run: Evaluation) -> Tensor:
    """Return a few images to time; on a GPU a chunk, which takes hardly longer than a few."""
    count = run.plan.chunk if run.device.type == "cuda" else min(TIMED_IMAGES, run.plan.chunk)
    return run.data.images[:count].to(run.device)


def _classified(run: Evaluation, x: Tensor) -> None:
    with torch.no_grad():
        float(run.defended(x).sum())


def _differentiated(model: DefendedClassifier, x: Tensor) -> None:
    inside = x.clone().requires_grad_()
    scores = model(inside)
    if scores.requires_grad:
        float(torch.autograd.grad(scores.sum(), inside)[0].sum())


def _cost(run: Evaluation) -> Cost:
    """Time the defended classifier."""
    x = _timed(run)
    full = run.defended.attacked_by("full", steps=run.plan.budget.unrolled_steps)
    bpda = run.defended.attacked_by("bpda")

    calls = (partial(_differentiated, full, x), partial(_differentiated, bpda, x), partial(_classified, run, x))
    return Cost(*(_fastest(call) / len(x) for call in calls))


def _choose_threads(run: Evaluation) -> None:
    """Set torch's threads on a CPU to one where that is faster for this network than all of them."""
    threads = torch.get_num_threads()
    if run.device.type != "cpu" or threads == 1:
        return
    x = run.data.images[: run.plan.chunk]

    def pass_through() -> None:
        inside = x.clone().requires_grad_()
        torch.autograd.grad(run.counting(inside).sum(), inside)

    spent = {}
    for count in (threads, 1):
        torch.set_num_threads(count)
        spent[count] = _fastest(pass_through)
    torch.set_num_threads(min(spent, key=lambda count: spent[count]))
    print(f"{torch.get_num_threads()} of {threads} threads, the faster for this network")


def _fastest(call: Callable[[], None]) -> float:
    times = []
    for _ in range(2):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
