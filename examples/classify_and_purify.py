"""Classify an image file with and without purification, and keep the purified image.

python examples/classify_and_purify.py [IMAGE] [OUT.png]
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_image, to_pil_image

import unperturb
from unperturb.models.pixels import to_rgb, to_size

SAMPLE = Path(__file__).parents[1] / "service" / "assets" / "sample.png"


def main(image: Path = SAMPLE, out: Path = Path("purified.png")) -> None:
    """Print the three likeliest classes, before and after, and write the purified image."""
    checkpoint = unperturb.load("default")
    with Image.open(image) as opened:
        received = to_image(to_size(to_rgb(opened), checkpoint.card.pictures))[None].float() / 255

    purified, trace = unperturb.purify(checkpoint, received)
    for name, model in (("as it came", checkpoint.classifier), ("purified", unperturb.defend(checkpoint))):
        with torch.no_grad():
            probabilities = model(received)[0].softmax(0)
        likeliest = [f"{checkpoint.card.classes[i]} {probabilities[i]:.1%}" for i in probabilities.topk(3).indices]
        print(f"{name:>11}: {', '.join(likeliest)}")
    print(f"InfoNCE {float(trace.loss_before[0]):.3f} -> {float(trace.loss_after[0]):.3f}")
    to_pil_image(purified[0]).save(out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
