"""The trainer from the command line, on a small image folder whose classes are colours."""

import copy
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training import assert_lowered, classifier_arguments, read_log, run_arguments
from unperturb.models.attacks.pgd import evaluating
from unperturb.models.attacks.projected_gradient import ProjectedGradient
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.registry import build
from unperturb.training import loop, state, world
from unperturb.training.__main__ import COMMANDS, main
from unperturb.training.options import RunConfig, autocast, learning_rate
from unperturb.training.state import STATE
from unperturb.training.supervised.adversarial import SUPERVISED_METHODS, SupervisedBatch, SupervisedMethod, smoothed
from unperturb.training.supervised.classifier import ClassifierConfig


@pytest.mark.parametrize("method", SUPERVISED_METHODS)
def test_classifier_learns_and_ships_a_loadable_checkpoint(method: str, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(classifier_arguments(image_folder, out, "--method", method, "--epochs", "6")) == 0
    loaded = store.load(out / "checkpoint")
    test = loaded.card.figures["test"]
    assert test["clean_accuracy"] > 0.6
    assert test["n"] == 18
    assert test["clean_interval"][0] < test["clean_accuracy"] <= test["clean_interval"][1]
    assert loaded.card.data["train_images"] == 72
    assert loaded.card.training["method"] == method
    assert "out" not in loaded.card.training
    assert [entry["epoch"] for entry in read_log(out)] == [1, 2, 3, 4, 5, 6]
    assert_lowered(out, "loss")


def test_head_trains_on_the_frozen_classifier_and_builds_a_bank(image_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "classifier"
    assert main(classifier_arguments(image_folder, base, "--epochs", "1")) == 0
    out = tmp_path / "head"
    arguments = run_arguments(
        "head",
        image_folder,
        out,
        classifier=base / "checkpoint",
        batch_size=21,
        epochs=4,
        held_out=9,
        bank_size=30,
        queue=16,
        lr=0.01,
        ema=0.5,
        hidden=16,
        embedding_dim=8,
    )
    assert main(arguments) == 0
    loaded, before = store.load(out / "checkpoint"), store.load(base / "checkpoint")
    for name, value in before.classifier.state_dict().items():
        assert torch.equal(loaded.classifier.state_dict()[name], value), name
    assert loaded.bank is not None
    assert loaded.bank.embeddings.shape == (30, 8)
    assert loaded.card.figures == before.card.figures
    assert loaded.card.head_training["queue"] == 16
    assert_lowered(out, "held_out_loss")


def test_state_of_another_configuration_is_refused_by_the_fields_name(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(classifier_arguments(image_folder, out, "--epochs", "1")) == 0
    assert main(classifier_arguments(image_folder, out, "--epochs", "1", "--beta", "3")) == 2
    assert "other beta" in capsys.readouterr().err
    assert main(classifier_arguments(image_folder, out, "--epochs", "1", "--beta", "3", "--no-resume")) == 0


def test_run_goes_on_with_the_same_data_by_another_path_and_with_no_others(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, run = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(image_folder, moved)
    (tmp_path / "link").symlink_to(moved)
    for epochs, data in enumerate((image_folder, moved, f"{moved}/", tmp_path / "link"), 1):
        once = ["--method", "natural", "--epochs", "4", "--schedule", "constant"]
        run_to(epochs, [*classifier_arguments(Path("x"), run, *once)], data)
    assert [entry["epoch"] for entry in read_log(run)] == [4]  # the others were ended before the log
    next((moved / "train" / "red").iterdir()).unlink()
    capsys.readouterr()
    assert main(classifier_arguments(moved, run, "--method", "natural", "--epochs", "4", "--schedule", "constant")) == 2
    assert "other data" in capsys.readouterr().err


def run_to(epoch: int, arguments: list[str], data: object) -> None:
    """Train up to the end of an epoch of several, as a kill would leave it."""
    arguments = [str(data) if one == "x" else one for one in arguments]
    with pytest.MonkeyPatch.context() as patch:
        judge = loop._Run.judge

        def judged(self: loop._Run, figures: dict[str, Any], collapsed: Any) -> bool:
            found = judge(self, figures, collapsed)
            if figures["epoch"] == epoch < 4:
                self.save(STATE)
                raise KeyboardInterrupt
            return found

        patch.setattr(loop._Run, "judge", judged)
        assert main(arguments) == (130 if epoch < 4 else 0)


def test_interrupt_says_how_to_go_on(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unperturb.training.state.save", interrupt)
    assert main(classifier_arguments(image_folder, tmp_path / "run", "--epochs", "2")) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "run" / STATE).exists()


def test_two_processes_train_one_model(image_folder: Path, tmp_path: Path) -> None:
    """torchrun with two CPU processes: the same global batch, one checkpoint, and targets that are of both."""
    out = tmp_path / "run"
    more = ["--epochs", "4", "--self-adaptive-from", "3", "--label-smoothing", "0"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "unperturb.training",
        *classifier_arguments(image_folder, out, *more),
    ]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(read_log(out)) == 4
    targets = torch.load(out / STATE, weights_only=True)["parts"]["memory"]["targets"]
    assert (targets.amax(1) < 1).sum() == 60  # the images of the last epoch
    assert store.load(out / "checkpoint").card.figures["test"]["clean_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere/train is not a folder"),
        (["--lr", "-1"], "lr=-1"),
        (["--lr", "abc"], "abc"),
        (["--epochs", "0"], "epochs=0"),
        (["--batch-size", "100"], "batch_size=100 is over the 63 training images"),
        (["--arch", "resnet9000"], "resnet9000"),
        (["--method", "magic"], "magic"),
        (["--surprise", "1"], "--surprise"),
        (["--label-smoothing", "2"], "label_smoothing=2"),
        (["--device", "cuda:99"], "device='cuda:99' is not on this machine"),
        (["--device", "gpu"], "device='gpu' is not on this machine"),
        (["--seed", "20240101"], "seed=20240101 must be from 0 to 1999999"),
        (["--pad", "-2"], "pad=-2"),
        (["--beta", "-6"], "beta=-6"),
        (
            ["--self-adaptive-from", "1", "--epochs", "9", "--resume-from", "x", "--epoch", "2"],
            "not the targets that have moved",
        ),
        (["--false-negatives", "top"], "set --self-supervised-weight"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_argument_is_refused_with_its_name(
    arguments: list[str], message: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(classifier_arguments(image_folder, tmp_path / "run", *arguments))
    except SystemExit as error:  # argparse's own refusals
        status = int(error.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_memory_too_small_is_refused_before_the_first_epoch(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(SUPERVISED_METHODS, "trades", SupervisedMethod(too_large, SUPERVISED_METHODS["trades"].loss))
    assert main(classifier_arguments(image_folder, tmp_path / "run")) == 2
    assert "batch_size=12 does not fit into the memory of cpu" in capsys.readouterr().err


@pytest.mark.parametrize("method", SUPERVISED_METHODS)
def test_attack_of_a_training_step_leaves_batchnorm_and_mode_alone(method: str) -> None:
    model = build(Architecture(name="wide_resnet_10_1", num_classes=3)).train()
    norm = model.get_submodule("norm")
    attack = ProjectedGradient(direction="ascend", epsilon=8 / 255, step_size=2 / 255, steps=2, start="uniform")
    numbers = torch.arange(4)
    batch = SupervisedBatch(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), numbers, numbers)
    before = int(norm.get_buffer("num_batches_tracked"))
    crafted = SUPERVISED_METHODS[method].craft(model, batch, attack)
    SUPERVISED_METHODS[method].loss(model, batch, crafted, smoothed(batch.labels, 0.0), 1.0).loss.backward()
    assert int(norm.get_buffer("num_batches_tracked")) == before + 1  # one pass in training mode
    assert norm.training


def test_evaluating_gives_every_module_its_mode_back() -> None:
    model = build(Architecture(name="wide_resnet_10_1", num_classes=3)).train()
    model.get_submodule("norm").eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_trades_is_the_sum_of_its_two_terms() -> None:
    """Zhang et al. 2019, eq. 5, against the definition of KL, with an attack of no steps."""
    model = build(Architecture(name="wide_resnet_10_1", num_classes=3))
    attack = ProjectedGradient(direction="ascend", epsilon=0.1, step_size=0.1, steps=0, start="uniform")
    x, labels, seeds = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    batch = SupervisedBatch(x, labels, seeds, seeds)
    trades = SUPERVISED_METHODS["trades"]
    crafted = trades.craft(model, batch, attack)
    found = trades.loss(model, batch, crafted, smoothed(labels, 0.0), 3.0).loss
    p, q = model(x).softmax(1), model(attack.begin(x, seeds)).softmax(1)
    expected = -p[torch.arange(4), labels].log().mean() + 3 * (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(found, expected, atol=1e-5)


def test_one_cycle_rises_to_the_peak_and_falls_to_zero() -> None:
    config = ClassifierConfig(data="x", out=Path("x"), lr=0.4, warmup=0.25)
    rates = [learning_rate(config, p / 100) for p in range(101)]
    assert rates[0] == 0
    assert max(rates) == rates[25] == 0.4
    assert rates[100] < 1e-9
    cosine = ClassifierConfig(data="x", out=Path("x"), lr=0.4, schedule="cosine")
    assert learning_rate(cosine, 0.0) == 0.4
    assert abs(learning_rate(cosine, 0.5) - 0.2) < 1e-9


class Rising:
    """A task of one weight that rises by the rate with each step."""

    def __init__(self) -> None:
        self.images, self.model, self.memory = 20, torch.nn.Linear(1, 1, bias=False), torch.nn.Module()
        torch.nn.init.zeros_(self.model.weight)

    def loss(self, indices: torch.Tensor, epoch: int, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -self.model.weight.sum(), {}

    def validate(self, averaged: torch.nn.Module) -> dict[str, int | float]:
        return {}


@pytest.mark.parametrize("capable", [True, False])
def test_precision_is_bfloat16_by_itself_where_the_processor_computes_in_it(
    capable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": capable, "avx512_bf16": True})
    with autocast(RunConfig(data="unused", out=tmp_path), torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == capable
    with autocast(RunConfig(data="unused", out=tmp_path, precision="float32"), torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


def rising(out: Path, **options: Any) -> RunConfig:
    plain: dict[str, Any] = {"schedule": "constant", "momentum": 0.0, "weight_decay": 0.0}
    return RunConfig(data="none", out=out, device="cpu", batch_size=2, lr=1.0, **plain, **options)


def test_whole_numbers_of_a_network_are_not_averaged(tmp_path: Path) -> None:
    task, places = Rising(), torch.arange(200)
    task.model.register_buffer("places", places.clone())  # as swin_t has them
    fitted = loop.fit(task, rising(tmp_path, epochs=20), world.join("cpu"), made_of={})
    assert torch.equal(fitted.model.get_buffer("places"), places)


def test_run_from_averaged_weights_gives_them_to_the_copy_that_follows_alone(tmp_path: Path) -> None:
    before = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(before.weight, 1e6)  # beyond float16
    state.export(tmp_path / "ema.safetensors", before, epoch=1)
    task = Rising()
    task.memory = torch.nn.ModuleDict({"follower": copy.deepcopy(task.model), "teacher": copy.deepcopy(task.model)})
    config = rising(tmp_path / "run", epochs=2, resume_from=tmp_path / "ema.safetensors", epoch=1)
    copies = [task.memory.get_submodule("follower")]
    fitted = loop.fit(task, config, world.join("cpu"), made_of={}, copies=copies)
    assert task.memory.get_parameter("follower.weight").item() == 1e6
    assert task.memory.get_parameter("teacher.weight").item() == 0
    assert fitted.model.get_parameter("weight").item() > 1e6


def test_log_has_an_attempt_at_an_epoch_once_after_a_crash_and_nothing_of_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, scores = state.save, iter([0.5, 0.1, 0.6, 0.6, 0.7, 0.5])

    def crash(file: Path, *arguments: Any) -> None:
        if file.name == STATE and len(read_log(tmp_path)) == 3:
            raise KeyboardInterrupt
        save(file, *arguments)

    def fit(epochs: int, **options: Any) -> list[int]:
        config = rising(tmp_path, epochs=epochs, **options)
        loop.fit(Rising(), config, world.join("cpu"), made_of={}, collapsed=lambda best, score: best - score > 0.3)
        return [entry["epoch"] for entry in read_log(tmp_path)]

    monkeypatch.setattr(Rising, "validate", lambda *_: {"score": next(scores)})
    with monkeypatch.context() as patch:
        patch.setattr(state, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            fit(3)
    assert [entry["epoch"] for entry in read_log(tmp_path)] == [1, 2, 2]  # the first second collapsed
    assert fit(3) == [1, 2, 2, 3]
    assert fit(1, resume=False) == [1]


@pytest.mark.parametrize("save_every_s", [0.0, 600.0])
def test_loss_that_is_not_finite_ends_a_run_at_once_and_leaves_its_last_good_state(
    save_every_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of 10 steps, whose progress is read after 4 and 8; the loss is lost in step 2 of the second."""
    task, last = Rising(), []

    def loss(indices: torch.Tensor, epoch: int, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        last.append(step)
        return -task.model.weight.sum() * (float("nan") if (epoch, step) == (1, 2) else 1.0), {}

    monkeypatch.setattr(loop, "SYNC_EVERY", 4)
    monkeypatch.setattr(task, "loss", loss)
    averaged = tmp_path / "ema.safetensors"
    with pytest.raises(ConfigError, match=rf"nan in epoch 2; .* --resume-from {averaged} --epoch 1$"):
        loop.fit(task, rising(tmp_path, epochs=3, save_every_s=save_every_s), world.join("cpu"), made_of={})
    saved = torch.load(tmp_path / STATE, weights_only=True)
    at_once = save_every_s == 0
    assert last[-1] == (2 if at_once else 3)
    assert (saved["progress"]["epoch"], saved["progress"]["step"]) == (1, 2 if at_once else 0)
    assert saved["parts"]["model"]["weight"].isfinite().all()
    averaged.unlink()
    with pytest.raises(ConfigError, match=r"nan in epoch 2; lower --lr=1\.0$"):
        loop.fit(task, rising(tmp_path, epochs=3, save_every_s=save_every_s), world.join("cpu"), made_of={})


def test_state_of_a_network_of_another_shape_is_refused(tmp_path: Path) -> None:
    loop.fit(Rising(), rising(tmp_path, epochs=1), world.join("cpu"), made_of={})
    other = Rising()
    other.model = torch.nn.Linear(2, 1, bias=False)
    with pytest.raises(ConfigError, match="does not fit what is trained"):
        loop.fit(other, rising(tmp_path, epochs=1), world.join("cpu"), made_of={})


def test_average_of_a_short_run_is_of_its_end_and_of_a_long_one_has_the_decay(tmp_path: Path) -> None:
    found = {}
    for epochs, ema in ((1, 0.995), (30, 0.9)):
        config = rising(tmp_path / str(epochs), epochs=epochs, ema=ema)
        fitted = loop.fit(Rising(), config, world.join("cpu"), made_of={})
        expected = 1.0  # what the first step leaves
        for step in range(1, 10 * epochs):
            decay = min(ema, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * (step + 1)
        found[epochs] = fitted.model.get_parameter("weight").item()
        assert found[epochs] == pytest.approx(expected, rel=1e-5)
    assert found[1] > 8
    assert found[30] == pytest.approx(300 - 0.9 / 0.1, rel=1e-3)


def test_every_option_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command, (config, _) in COMMANDS.items():
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        for name in (field.name for field in dataclasses.fields(config)):
            assert f"--{name.replace('_', '-')}" in text
