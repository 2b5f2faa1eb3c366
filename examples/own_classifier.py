"""A classifier that somebody has fine-tuned, taken in, given a purifier, and assessed: the whole way, at a tiny size.

    python examples/own_classifier.py [folder]

For a real one: her own network and weights in place of `fine_tuned`, and her images in place of `pictures`.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torchvision.models import resnet18
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

SIDE, CLASSES = 32, ("blue", "green", "red")


def pictures(folder: Path) -> None:
    """Write noisy pictures of three colours, as train/<class>/* and test/<class>/*."""
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("test", 12)):
        for channel, name in zip((2, 1, 0), CLASSES, strict=True):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = 0.5 * torch.rand(3, SIDE, SIDE, generator=draw)
                image[channel] += 0.25
                to_pil_image(image).save(folder / split / name / f"{number:03d}.png")


def fine_tuned(folder: Path, weights: Path) -> None:
    """Train torchvision's ResNet-18 on them for a moment, and save it as most people do."""
    files = sorted((folder / "train").glob("*/*.png"))
    x = torch.stack([pil_to_tensor(Image.open(file)) for file in files]).float() / 255
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    torch.manual_seed(0)
    network = resnet18(num_classes=len(CLASSES))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(12):
        loss = torch.nn.functional.cross_entropy(network((x[step % 3 :: 3] - 0.5) / 0.25), labels[step % 3 :: 3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(network.state_dict(), weights)


def unperturb(*arguments: str | Path) -> None:
    """Run the command line."""
    program = "from unperturb.service.cli import main; main()"
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=True)


def main(folder: Path) -> None:
    """Go the whole way."""
    data, weights, names = folder / "data", folder / "weights.pth", folder / "names.txt"
    pictures(data)
    fine_tuned(data, weights)
    names.write_text("\n".join(CLASSES))
    model, run = folder / "model", folder / "run"
    pixels = ("--image-size", str(SIDE), "--fit", "square", "--mean", ".5,.5,.5", "--std", ".25,.25,.25")
    unperturb("import", "torchvision:resnet18", "--weights", weights, "--classes", names, "--out", model, *pixels)
    tiny = (
        "--epochs",
        "2",
        "--batch-size",
        "20",
        "--held-out",
        "20",
        "--width",
        "8",
        "--depth",
        "2",
        "--device",
        "cpu",
    )
    unperturb("train", "purifier", "--checkpoint", model, "--data", data, "--out", run, *tiny)
    asked = ("--images", "6", "--device", "cpu", "--out", folder / "assessment", "--write-card")
    unperturb("assess", run / "checkpoint", "--data", data, *asked)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
