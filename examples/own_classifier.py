"""A classifier that somebody has trained, taken in, given a purifier, and assessed: the whole way.

    python examples/own_classifier.py                                       # noisy pictures of three colours: a minute
    python examples/own_classifier.py --data DIR --epochs 15 --out FOLDER

DIR has train/<class>/* and test/<class>/*. For a network of one's own: it and its weights in place of `trained`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import transforms as t
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms.functional import to_pil_image


def pictures(folder: Path, side: int) -> None:
    """Write noisy pictures of three colours, as train/<class>/* and test/<class>/*."""
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("test", 12)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = 0.5 * torch.rand(3, side, side, generator=draw)
                image[channel] += 0.25
                to_pil_image(image).save(folder / split / name / f"{number:03d}.png")


def trained(data: Path, weights: Path, *, side: int, epochs: int) -> list[str]:
    """Train torchvision's ResNet-18 as its author would, save it as most people do, and return its classes."""
    torch.manual_seed(0)
    seen = t.Compose(
        [t.Resize(side), t.CenterCrop(side), t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize([0.5] * 3, [0.25] * 3)]
    )
    images = ImageFolder(str(data / "train"), seen)
    batches, network = DataLoader(images, 32, shuffle=True, drop_last=True), resnet18(num_classes=len(images.classes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    for epoch in range(epochs):
        right = 0
        for x, labels in batches:
            scores = network(x)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(scores, labels).backward()
            optimizer.step()
            right += int((scores.argmax(1) == labels).sum())
        print(f"epoch {epoch + 1}: {right / (32 * len(batches)):.1%} of them right", flush=True)
    torch.save(network.state_dict(), weights)
    return list(images.classes)


def unperturb(*arguments: object) -> None:
    """Run the command line."""
    program = "from unperturb.service.cli import main; main()"
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=True)


def main(folder: Path, data: Path | None, *, side: int, epochs: int) -> None:
    """Go the whole way."""
    weights, names, model, run = (folder / name for name in ("weights.pth", "names.txt", "model", "run"))
    folder.mkdir(parents=True, exist_ok=True)
    much = "--batch-size 64 --held-out 200 --assess 300"
    if data is None:
        data, much = folder / "data", "--batch-size 20 --held-out 20 --assess 6"
        pictures(data, side)
    names.write_text("\n".join(trained(data, weights, side=side, epochs=epochs)))
    pixels = ("--image-size", side, "--fit", "crop", "--resize", side, "--mean", ".5,.5,.5", "--std", ".25,.25,.25")
    unperturb("import", "torchvision:resnet18", "--weights", weights, "--classes", names, "--out", model, *pixels)
    asked = ("--checkpoint", model, "--data", data, "--epochs", epochs, "--device", "cpu", "--out", run)
    unperturb("train", "purifier", *asked, "--start", "cifar10-natural", *much.split())  # --start: for few images


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        main(given.out or Path(scratch), given.data, side=given.side, epochs=given.epochs)
