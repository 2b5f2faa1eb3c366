"""The folders in which downloads and decoded images are kept between runs: the one rule, for every kind of file."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of files; it need not exist yet.

    It lies in $UNPERTURB_CACHE, or else in $XDG_CACHE_HOME/unperturb, or else in ~/.cache/unperturb. Kinds: "images"
    (decoded image folders), "torchvision" (its data sets; its weights in `checkpoints`), "robustbench" (its weights),
    "robustbench-data" (its test images), "compiled" (steps of purifiers, by torch's compiler).
    """
    if chosen := os.environ.get("UNPERTURB_CACHE"):
        return Path(chosen) / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unperturb" / kind
