"""The makers of an artefact: package versions, and the commit where the code is a checkout; a module's digest."""

import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

RECORDED = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "safetensors",
    "robustbench",
    "pyautoattack",
    "timm",
    "kornia",
    "imagecorruptions-imaug",
    "adversarial-robustness-toolbox",
)


def versions() -> dict[str, str]:
    """Return versions of Python and of the installed packages that can move a figure."""
    found = {"python": platform.python_version()}
    for package in RECORDED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache  # what runs is the code that was imported
def commit() -> str | None:
    """Return the checkout's commit, "+changes" added where tracked files (but results) differ, as it was at first.

    None where this file is of no checkout: installed, it may lie within somebody else's.
    """
    folder = Path(__file__).resolve().parent
    try:
        own = ["git", "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(own, cwd=folder, capture_output=True, check=True)
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def digest_of(module: nn.Module) -> str:
    """Return the SHA-256 over a module's parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
