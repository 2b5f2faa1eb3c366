"""Show more of a defense than its accuracies: loss curves, a panel of images, time per image, flags."""

import base64
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unperturb.models.purifiers.defended import DefendedClassifier, seeds_of
from unperturb.models.shapes import Float, Int

CURVE_IMAGES, FLAG_IMAGES, TIMED_IMAGES, TURNS = 64, 16, 32, 3
PANEL_PIXELS = 96


def show(
    defended: DefendedClassifier,
    clean: Float[Tensor, "n 3 h w"],
    attacked: Float[Tensor, "n 3 h w"],
    labels: Int[Tensor, " n"],
    *,
    seed: int,
    panel: int,
) -> dict[str, Any]:
    """Return all of it, from the first images, `panel` of them as pictures.

    Everything but `ms_per_image` is the same in every run.
    """
    return {
        "flags": suspicion_flags(defended, clean[:FLAG_IMAGES], labels[:FLAG_IMAGES], seed=seed),
        "curves": {
            "images": min(CURVE_IMAGES, len(clean)),
            **{
                name: _curve(defended, x[:CURVE_IMAGES], seed) for name, x in (("clean", clean), ("attacked", attacked))
            },
        },
        "panel": _panel(defended, clean[:panel], attacked[:panel], labels[:panel], seed) if panel else [],
        "ms_per_image": _ms_per_image(defended, clean[:TIMED_IMAGES], seed),
    }


@contextmanager
def gradient_calls() -> Iterator[list[str]]:
    """Yield the names of autograd's entry points that are called inside the block."""
    calls: list[str] = []
    originals: dict[str, Callable[..., Any]] = {"grad": torch.autograd.grad, "backward": torch.autograd.backward}

    def recorded(name: str) -> Any:  # noqa: ANN401
        def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
            calls.append(name)
            return originals[name](*arguments, **named)

        return call

    try:
        for name in originals:
            setattr(torch.autograd, name, recorded(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(torch.autograd, name, original)


def suspicion_flags(
    defended: DefendedClassifier, x: Float[Tensor, "batch 3 h w"], labels: Int[Tensor, " batch"], *, seed: int
) -> dict[str, Any]:
    """Return what AutoAttack's checks look for (its flags_doc.md), of the defense as an ordinary caller sees it.

    randomised: scores move by more than 1e-4 (of unit L2 length) between seeds
    zero_gradients: images whose cross-entropy has no gradient; that of the attacks, but for a purifier with steps,
        which an ordinary caller's does not go through
    optimisation_loop: autograd is called inside a forward pass
    """
    with torch.no_grad(), gradient_calls() as calls:
        scores = [torch.nn.functional.normalize(defended(x, seed=seed + draw), dim=1) for draw in range(3)]
    spread = max(float((one - scores[0]).norm(dim=1).max()) for one in scores[1:])
    inside = x.detach().clone().requires_grad_()
    stepless = not defended.purifier.loop.steps  # as one network, with no more memory than its answer takes
    purified = defended.purifier.descend(inside, seeds=seeds_of(seed, x), unrolled=stepless).image
    loss = torch.nn.functional.cross_entropy(defended.scores(purified), labels, reduction="sum")
    zero = len(x)
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, inside, allow_unused=True)
        zero = len(x) if gradient is None else int((gradient.flatten(1).abs().sum(1) == 0).sum())
    return {
        "randomised": spread > 1e-4,
        "zero_gradients": zero,
        "of_images": len(x),
        "optimisation_loop": bool(calls),
    }


def _curve(defended: DefendedClassifier, x: Tensor, seed: int) -> list[float]:
    """Return the purifier's mean objective before each step."""
    trace = defended.purify(x, seed=seed).trace
    means = trace.losses.double().nanmean(1)  # of those that took the step
    return [float(value) for value in means[means.isfinite()]]


def _panel(
    defended: DefendedClassifier, clean: Tensor, attacked: Tensor, labels: Tensor, seed: int
) -> list[dict[str, Any]]:
    with torch.no_grad():
        purified = defended.purify(attacked, seed=seed).image
        answers = {
            "clean": defended.classifier(clean).argmax(1),
            "attacked": defended.classifier(attacked).argmax(1),
            "purified": defended.scores(purified).argmax(1),
        }
    return [
        {
            "label": int(labels[row]),
            "predicted": {name: int(values[row]) for name, values in answers.items()},
            "images": {
                "clean": _png(clean[row]),
                "attacked": _png(attacked[row]),
                "purified": _png(purified[row]),
                "attack": _png(_amplified(attacked[row] - clean[row])),
                "purification": _png(_amplified(purified[row] - attacked[row])),
            },
        }
        for row in range(len(clean))
    ]


def _amplified(difference: Tensor) -> Tensor:
    """Return a difference around mid-grey, its largest value at the end of the range."""
    return 0.5 + 0.5 * difference / difference.abs().max().clamp(min=1e-8)


def _png(image: Tensor) -> str:
    """Return a PNG file in base64, at most 96 pixels wide: a record holds five for every image shown."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels)
    if picture.width > PANEL_PIXELS:
        picture = picture.resize((PANEL_PIXELS, PANEL_PIXELS * picture.height // picture.width), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _ms_per_image(defended: DefendedClassifier, x: Tensor, seed: int) -> dict[str, float]:
    """Time the classifier alone and behind its purifier, each the fastest of its turns."""
    best: dict[str, float] = {}
    runs: dict[str, Callable[[], object]] = {
        "classifier": lambda: defended.classifier(x),
        "defended": lambda: defended(x, seed=seed),
    }
    for _ in range(TURNS):
        for name, run in runs.items():
            _wait(x)
            started = time.perf_counter()
            with torch.no_grad():
                run()
            _wait(x)
            best[name] = min((time.perf_counter() - started) * 1000 / len(x), best.get(name, float("inf")))
    return {**best, "times_the_classifier": best["defended"] / best["classifier"]}


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
