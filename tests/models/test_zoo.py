"""Every classifier of torchvision's, and one of most families of timm's, with random weights: minutes."""

import contextlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.transforms.functional import normalize

from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.importing.imported import ImportConfig, import_classifier
from unperturb.models.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LARGEST = 150e6  # parameters; beyond, the same code at other widths would fill the memory
SIZES = {"vit": 224, "maxvit": 224, "inception": 96, "alexnet": 64}  # whose networks take no other, or none smaller
ENDS = "does not end in its last linear layer"  # two heads, whose mean it gives
ODD = {"squeezenet1_0": "no linear layer", "squeezenet1_1": "no linear layer"}
ODD |= dict.fromkeys(("dla34", "dpn48b", "resnetv2_50"), "no linear layer")  # but a convolution
ODD |= dict.fromkeys(("crossvit_tiny_240", "deit_tiny_distilled_patch16_224", "efficientformer_l1"), ENDS)
ODD |= dict.fromkeys(("efficientformerv2_s0", "levit_128s", "repvit_m0_9", "volo_d1_224"), ENDS)
ODD |= {"gcvit_xxtiny": "the images beside it"}  # its global queries are dealt out across the batch
NAMES = [
    name for name in zoo.list_models(module=zoo) if zoo.get_model_weights(name).DEFAULT.meta["num_params"] <= LARGEST
]
TIMM = """
    beit_base_patch16_224 cait_xxs24_224 coat_tiny convmixer_768_32 convnext_atto crossvit_tiny_240 davit_tiny
    deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn48b eca_nfnet_l0
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvit_b0 efficientvit_m0
    fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_a hgnet_tiny
    hiera_tiny_224 hrnet_w18_small inception_next_tiny inception_v4 lcnet_035 levit_128s maxvit_tiny_tf_224
    mixer_s32_224 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
    nest_tiny pit_ti_224 poolformer_s12 pvt_v2_b0 regnetx_002 regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9
    res2net50_14w_8s resmlp_12_224 resnest14d resnet18 resnetv2_50 rexnet_100 selecsls42 semnasnet_050 sequencer2d_s
    seresnet18 skresnet18 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tf_efficientnet_lite0 tiny_vit_5m_224
    tinynet_e tnt_s_patch16_224 tresnet_m twins_pcpvt_small vgg11 visformer_tiny vit_tiny_patch16_224 volo_d1_224
    vovnet39a wide_resnet50_2 xception41 xcit_nano_12_p8_224
"""


def size_of(name: str) -> int:
    return next((size for family, size in SIZES.items() if name.startswith(family)), 32)


def network_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    given = {"init_weights": False, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
    made: nn.Module = zoo.get_model(name, weights=None, **given)
    return lively(made, size_of(name))


def lively(network: nn.Module, size: int) -> nn.Module:
    """Give what begins as nothing values that show in the scores: last layers, and statistics of batch norms."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.05)
    with torch.no_grad():
        network.train()(torch.randn(4, 3, size, size))
    return network.eval()


def agrees(source: str, network: nn.Module, tmp_path: Path, *, size: int, given: int | None) -> None:
    """Import a network's weights, and compare its scores and the input of its last layer."""
    shared = {name: value.clone() for name, value in network.state_dict().items()}
    save_file(OrderedDict(shared), tmp_path / "w.safetensors")
    config = ImportConfig(source=source, weights=tmp_path / "w.safetensors", image_size=given)
    made = import_classifier(config)
    mean, std = (list(part) for part in (made.card.architecture.mean, made.card.architecture.std))
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected: Tensor = network(normalize(x, mean, std))
        features = made.classifier.features(x)
        found = made.classifier.logits(features)
    assert features.shape == (2, made.classifier.feature_dim)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert len(made.card.classes) == expected.shape[1]
    store.save(tmp_path / "made", made, half=False)
    with torch.no_grad():
        assert torch.equal(store.load(tmp_path / "made").classifier(x), made.classifier(x))


def imported_or_refused(source: str, network: nn.Module, tmp_path: Path, *, size: int, given: int | None) -> None:
    says = ODD.get(source.partition(":")[2])
    with contextlib.nullcontext() if says is None else pytest.raises(ConfigError, match=says):
        agrees(source, network, tmp_path, size=size, given=given)


@pytest.mark.parametrize("name", NAMES)
def test_torchvisions_classifier_is_imported_or_refused(name: str, tmp_path: Path) -> None:
    size = size_of(name)
    imported_or_refused(f"torchvision:{name}", network_of(name), tmp_path, size=size, given=size)


@pytest.mark.parametrize("name", TIMM.split())
def test_timms_classifier_is_imported_or_refused(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name)
    size = network.pretrained_cfg["input_size"][-1]
    imported_or_refused(f"timm:{name}", lively(network, size), tmp_path, size=size, given=None)
