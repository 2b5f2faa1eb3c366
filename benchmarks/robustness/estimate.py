"""Estimate what a run will cost, before it begins."""

import dataclasses
import time

import torch

from unperturb.benchmarks.robustness.attacks import ATTACKS, AUTOATTACK
from unperturb.benchmarks.robustness.evaluation import Evaluation

# Standard AutoAttack on an image that it never breaks: forward+backward and forward passes of the classifier.
AUTOATTACK_PASSES = (1910, 5954)


def announce(runs: list[Evaluation]) -> None:
    """Print a line per run and attack: at most how many classifier passes per image, and how long that takes here.

    An image that an attack has broken costs it nothing more, so a run mostly takes less.
    """
    budget = dataclasses.asdict(runs[0].plan.budget)
    print("budget: " + ", ".join(f"{name} {value}" for name, value in budget.items()))
    print(f"{'run':44} {'attack':20} {'forward':>9} {'backward':>9}   at most")
    total, seen = 0.0, set()
    for run in runs:
        images = sum(len(chunk) for chunk in run.plan.chunks(len(run.data.labels)))
        forward_s, backward_s = _seconds_per_image(run)
        per_query = _passes_per_query(run)
        for name in run.names:
            if name == AUTOATTACK:
                if id(run.data) in seen:
                    continue  # shared by all purifiers of a model
                seen.add(id(run.data))
                backward, forward = AUTOATTACK_PASSES
                forward += backward
            else:
                with_gradient, without = ATTACKS[name].queries(run.plan.budget) if name in ATTACKS else (0, 1)
                queries = with_gradient + without + 1
                forward = round(queries * per_query[0])
                backward = round(queries * per_query[1] + with_gradient)
            seconds = images * (forward * forward_s + backward * backward_s)
            total += seconds
            print(f"{run.title[:44]:44} {name:20} {forward:9,} {backward:9,}   {_span(seconds)}")
    print(f"all of it on {runs[0].device}: at most about {_span(total)}", flush=True)


def _passes_per_query(run: Evaluation) -> tuple[float, float]:
    """Return the classifier's forward and backward passes per image in one call of the defended classifier, counted."""
    x = run.data.images[:2].to(run.device)
    counting = run.counting
    before = counting.forward_passes, counting.backward_passes
    with torch.no_grad():
        run.defended(x)
    return (counting.forward_passes - before[0]) / len(x), (counting.backward_passes - before[1]) / len(x)


def _seconds_per_image(run: Evaluation) -> tuple[float, float]:
    """Time a forward and a backward pass of the classifier, once on a chunk."""
    x = run.data.images[: run.plan.chunk].to(run.device).requires_grad_()
    spent = []
    for _ in range(2):
        started = time.perf_counter()
        loss = run.counting(x).sum()
        float(loss.detach())
        middle = time.perf_counter()
        (gradient,) = torch.autograd.grad(loss, x)
        float(gradient.sum())
        spent.append((middle - started, time.perf_counter() - middle))
    return min(one for one, _ in spent) / len(x), min(other for _, other in spent) / len(x)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
