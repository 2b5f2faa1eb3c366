import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from unperturb.models.contrastive.views import luma


@pytest.mark.skipif(find_spec("jaxtyping") is None, reason="jaxtyping is not installed")
def test_shapes_are_checked_while_testing() -> None:
    with pytest.raises(Exception, match="Type-check error"):
        luma(torch.zeros(3, 8, 8))


def test_models_and_training_import_with_torch_and_pillow_alone() -> None:
    """Invariant 6: none of the service's and the development's packages."""
    absent = (
        "jaxtyping",
        "pydantic",
        "pydantic_settings",
        "fastapi",
        "starlette",
        "uvicorn",
        "typer",
        "robustbench",
        "kornia",
        "matplotlib",
        "tensorboard",
        "scipy",
        "pandas",
        "timm",
    )
    script = f"""
import sys
sys.modules |= dict.fromkeys({absent!r})
import torch
import unperturb.training.__main__, unperturb.models.purifiers.defended, unperturb.models.shapes
import unperturb.models.networks.torchvision, unperturb.models.networks.robustbench
assert unperturb.models.shapes.Float[torch.Tensor, "batch 3"] is torch.Tensor
"""
    subprocess.run([sys.executable, "-c", script], check=True)
