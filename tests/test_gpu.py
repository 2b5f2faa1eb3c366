"""What only a CUDA device can show; opt in with `pytest -m gpu`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.support.training import FRESH, classifier_arguments, pretrain_arguments
from unperturb.benchmarks import robustbench_eval
from unperturb.benchmarks.purifier import purify_speed
from unperturb.models.checkpoints import store
from unperturb.models.inference.captured import Execution, Stepper
from unperturb.models.inference.continuous import ReverseAttackStage
from unperturb.models.inference.folding import Precision, prepared
from unperturb.models.purifiers.defended import defend, reverse_attack_of
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.training.__main__ import main as train
from unperturb.training.contrastive.pretrain import GOES_ON, PRETRAINING_METHODS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # inductor would have it
]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Convolutions in float32, the same twice; what a test changes of it does not outlive it."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32
    cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = False, True, False
    yield
    cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = before


@pytest.mark.parametrize("checkpoint", ["default", "small"])
@pytest.mark.parametrize("preset", ["default", "transfer", "vote", "published"])
def test_scores_are_the_same_alone_and_in_a_batch(images: torch.Tensor, preset: str, checkpoint: str) -> None:
    defended = defend(store.load(checkpoint, device="cuda"), PRESETS[preset])
    x = images.cuda()
    together = defended.classify(x, seed=0).logits.softmax(1)
    alone = torch.cat([defended.classify(one, seed=0).logits.softmax(1) for one in x.split(1)])
    assert (together - alone).abs().max() < (1e-4 if preset == "default" else 1e-3)


def test_loaded_checkpoint_computes_in_float32() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32 = matmul.allow_tf32 = True
    store.load("small", device="cuda")
    assert not cudnn.allow_tf32
    assert not matmul.allow_tf32


def test_default_preset_gives_what_it_gives_on_the_cpu(images: torch.Tensor) -> None:
    scores = []
    for device in ("cpu", "cuda"):
        defended = defend(store.load("default", device=device), PRESETS["default"])
        scores.append(defended.classify(images.to(device), seed=0).logits.softmax(1).cpu())
    assert (scores[0] - scores[1]).abs().max() < 1e-2


@pytest.mark.parametrize("device", [f"cuda:{i}" for i in range(torch.cuda.device_count())])
@pytest.mark.parametrize("execution", ["captured", "compiled"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_steps_are_the_eager_ones(
    images: torch.Tensor, device: str, execution: Execution, precision: Precision
) -> None:
    loaded = store.load("default", device=device)
    ready = prepared(loaded, precision=precision)
    in_turn = ReverseAttackStage(reverse_attack_of(loaded, PRESETS["default"]))
    stage = ReverseAttackStage(reverse_attack_of(ready, PRESETS["default"]))
    stepper = Stepper(ready.classifier, torch.device(device), execution=execution)
    x, seeds = images.to(device), torch.arange(8, device=device)
    for count in (8, 3, 5):  # 3 and 5 in graphs for 4 and 8
        found = stepper.descend(stage, x[:count], seeds=seeds[:count])
        expected = in_turn.purifier.descend(x[:count], seeds=seeds[:count])
        assert (found.image - x[:count]).abs().max() > 0.1 / 255
        exactly = precision == "float32"
        assert torch.allclose(found.losses, expected.losses, rtol=1e-2 if exactly else 0.1)
        scores = [loaded.classifier(image).softmax(1) for image in (found.image, expected.image)]
        assert (scores[0] - scores[1]).abs().max() < (0.02 if exactly else 0.1)
    once, again = (stepper.descend(stage, x[:1], seeds=seeds[:1]).image for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("execution", ["eager", "captured"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_service_answers_from_the_device(execution: Literal["eager", "captured"], precision: Precision) -> None:
    pytest.importorskip("fastapi", reason="what models/ and training/ need is tested without the service's packages")
    from fastapi.testclient import TestClient

    from tests.support.serving import wait_until_ready
    from unperturb.service.http.app import create_app
    from unperturb.service.settings import Settings

    sample = Path(__file__).parents[1] / "service" / "assets" / "sample.png"
    with TestClient(create_app(Settings(device="cuda", execution=execution, precision=precision))) as client:
        wait_until_ready(client)
        answer = client.post("/classify", files={"image": sample.read_bytes()})
    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["label"] == "ship"


def test_classifier_trains_on_the_device(image_folder: Path, tmp_path: Path) -> None:
    arguments = classifier_arguments(image_folder, tmp_path / "run", "--epochs", "1", "--device", "cuda")
    assert train(arguments) == 0
    assert (tmp_path / "run" / "checkpoint" / "card.json").is_file()


def test_harness_runs_every_attack_on_the_device(tiny_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "--model",
        str(tiny_folder),
        "--data",
        str(image_folder),
        "--dataset",
        "colours",
        "--n-examples",
        "8",
        "--chunk",
        "4",
        "--budget",
        "fast",
        "--device",
        "cuda",
        "--out",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path),
        "--purifier",
        "none",
        "--purifier",
        "reverse-attack",
        "--purifier",
        "hedge:steps=2",
    ]
    assert robustbench_eval.main(arguments) == 0
    assert len(list((tmp_path / "out").glob("*.json"))) == 3


@pytest.mark.parametrize("method", PRETRAINING_METHODS)
def test_encoder_trains_and_classifies_on_the_device(method: str, image_folder: Path, tmp_path: Path) -> None:
    def run(*more: str) -> None:
        assert train([*more, "--device", "cuda"]) == 0

    places = ["--data", str(image_folder), "--cache", str(tmp_path)]
    run(*pretrain_arguments(image_folder, tmp_path / "base", *FRESH, "--epochs", "1"))
    base = str(tmp_path / "base" / "checkpoint")
    begin = ["--encoder", base] if method in GOES_ON else FRESH
    more = ["--method", method, "--epochs", "2", "--false-negatives", "quantile", "--false-negatives-from", "0"]
    run(*pretrain_arguments(image_folder, tmp_path / "run", *begin, *more))
    encoder = ["--encoder", str(tmp_path / "run" / "checkpoint"), *places]
    small = ["--epochs", "2", "--batch-size", "21", "--held-out", "9"]
    run("linear", *encoder, *small, "--out", str(tmp_path / "linear"))
    run("knn", *encoder, "--neighbours", "9", "--out", str(tmp_path / "knn"))
    classifier = ["--classifier", str(tmp_path / "linear" / "checkpoint"), *places, *small]
    run("generator", *classifier, "--width", "8", "--out", str(tmp_path / "generator"))


@pytest.mark.parametrize(
    "switches",
    [
        ["--self-adaptive-from", "0"],
        ["--weight-perturbation", "5e-3"],
        ["--labelled", "0.34", "--self-supervised-weight", "1"],
    ],
    ids=lambda value: value[0],
)
def test_switches_of_the_classifier_run_on_the_device(switches: list[str], image_folder: Path, tmp_path: Path) -> None:
    more = ["--epochs", "2", "--device", "cuda", *switches]
    assert train(classifier_arguments(image_folder, tmp_path / "run", *more)) == 0


def test_speed_is_measured_on_the_device(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    arguments = [
        "--arch",
        "preact_resnet18",
        "--batch",
        "4",
        "--steps",
        "2",
        "--blocks",
        "1",
        "--precision",
        "bfloat16",
        "--device",
        "cuda",
        "--out",
        str(out),
    ]
    assert purify_speed.main(arguments) == 0
    cells = json.loads(out.read_text())["results"]["batches"]["4"]
    assert {"eager", "eager, bfloat16", "captured, bfloat16"} < cells.keys()
    assert cells["captured, bfloat16"]["peak_bytes"] > 0
