"""One picture of an attack and its purification."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unperturb.models.attacks.pgd import pgd
from unperturb.models.checkpoints.card import Card
from unperturb.models.errors import ConfigError
from unperturb.models.files import write_whole
from unperturb.models.purifiers.defended import DefendedClassifier
from unperturb.models.shapes import Float
from unperturb.service.http.answer import top

SAMPLE = Path(__file__).parent / "assets" / "sample.png"
CHOSEN = SAMPLE.parent / "page" / "restored.png"  # a part of it; benchmarks/purifier/samples.py chooses
EPSILON = 8 / 255
PRESET = "transfer"  # the attack that is shown does not know of the purifier
AMPLIFIED = 8  # how much stronger a perturbation is shown than it is


def run_demo(
    defended: DefendedClassifier, card: Card, x: Float[Tensor, "1 3 h w"], *, seed: int, out: Path
) -> Iterator[str]:
    """Attack (PGD-20 at 8/255, on the classifier alone), purify, yield the lines to print, write the picture to `out`.

    Raises ConfigError where matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError("the demo's picture needs matplotlib: pip install 'unperturb[plots]'") from error
    mpl.use("Agg")
    label = defended.classifier(x).argmax(1)
    attacked = pgd(defended.classifier, x, label, epsilon=EPSILON, seeds=torch.tensor([seed], device=x.device))
    result = defended.classify(attacked, seed=seed)
    answers = []
    for name, logits in (
        ("original", defended.classifier(x)),
        ("attacked", result.unpurified_logits),
        ("purified", result.logits),
    ):
        (best,) = top(logits[0].detach().softmax(0).cpu().numpy(), card.classes, 1)
        answers.append(f"{name}: {best.label} {best.score:.0%}")
        yield answers[-1]
    losses = (float(loss) for loss in (result.trace.loss_before, result.trace.loss_after))
    _draw(x, attacked, result.image, tuple(losses), answers, out)
    yield f"wrote {out}"


def _draw(
    original: Tensor,
    attacked: Tensor,
    purified: Tensor,
    losses: tuple[float, ...],
    answers: list[str],
    out: Path,
) -> None:
    from matplotlib import pyplot as plt

    def pixels(image: Tensor) -> NDArray[np.float32]:
        shown: NDArray[np.float32] = image[0].detach().permute(1, 2, 0).cpu().clamp(0, 1).numpy()
        return shown

    figure, panels = plt.subplots(2, 3, figsize=(9.6, 6.6), layout="constrained")
    shown = [
        (pixels(original), answers[0]),
        (pixels(attacked), answers[1]),
        (pixels(purified), answers[2]),
        (pixels(0.5 + AMPLIFIED * (attacked - original)), f"attacked - original, {AMPLIFIED} times"),
        (pixels(0.5 + AMPLIFIED * (purified - attacked)), f"purified - attacked, {AMPLIFIED} times"),
    ]
    for panel, (image, title) in zip(panels.flat, shown, strict=False):
        panel.imshow(image, interpolation="nearest")
        panel.set_title(title, fontsize=11)
        panel.set_axis_off()
    bars = panels[1, 2]
    if any(losses):
        drawn_bars = bars.barh(("purified", "attacked"), losses[::-1], height=0.5, color=("#1f6feb", "#8b949e"))
        bars.bar_label(drawn_bars, fmt="%.2f", padding=3)
        bars.set_xlim(0, 1.2 * max(losses))
        bars.set_title("InfoNCE loss", fontsize=11)
        bars.spines[["top", "right", "bottom"]].set_visible(False)
        bars.set_xticks([])
    else:  # a preset without steps has none
        bars.set_axis_off()
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    write_whole(out, drawn.getvalue())
