"""The command line."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import make_checkpoint
from tests.support.engines import wait_until
from tests.support.serving import photo
from unperturb.benchmarks import assess
from unperturb.models.checkpoints import store
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import PRESETS, to_uint8
from unperturb.service import cli
from unperturb.service.cli import app
from unperturb.service.http import address
from unperturb.service.http.address import taken
from unperturb.service.http.server import Server
from unperturb.service.keys import digest
from unperturb.training import __main__ as training

run = CliRunner().invoke


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(photo())
    return path


def test_classify_prints_a_line_for_each_file_and_json_on_request(file: Path, tiny_folder: Path) -> None:
    result = run(app, ["classify", str(file), str(file), "--checkpoint", str(tiny_folder), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert result.output.count(f"{file}: ") == 2
    assert "unpurified" in result.output
    result = run(app, ["classify", str(file), "--checkpoint", str(tiny_folder), "--json", "--top-k", "2"])
    record = json.loads(result.output)
    assert len(record["predictions"]) == 2
    assert record["predictions"][0]["label"] in ("red", "green", "blue")


def test_seed_of_a_command_is_the_models_own(file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    defended = defend(store.load(tiny_folder), PRESETS["transfer"])
    x = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255
    scores: list[list[float]] = []
    images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    for seed in (1, 2):
        own, out = defended.classify(x, seed=seed), tmp_path / f"{seed}.png"
        given = ["--checkpoint", str(tiny_folder), "--preset", "transfer", "--seed", str(seed), "--device", "cpu"]
        result = run(app, ["classify", str(file), "--json", *given])
        expected = own.logits[0].softmax(0)
        found = {one["index"]: one["score"] for one in json.loads(result.output)["predictions"]}
        scores.append([found[index] for index in range(3)])
        assert scores[-1] == pytest.approx(expected.tolist(), abs=1e-6)
        assert run(app, ["purify", str(file), "--out", str(out), *given]).exit_code == 0
        images.append(np.asarray(Image.open(out)))
        pixels = to_uint8(own.image, x, epsilon=PRESETS["transfer"].loop.epsilon)[0].permute(1, 2, 0)
        assert np.array_equal(images[-1], pixels)
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)
    assert not np.array_equal(images[0], images[1])


def test_classify_names_a_broken_file_and_goes_on(file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo()[:80])
    result = run(app, ["classify", str(broken), str(file), "--checkpoint", str(tiny_folder)])
    assert result.exit_code == 1
    assert f"{broken}: the image is damaged" in result.output
    assert f"{file}: " in result.output


def test_purify_writes_a_png_within_epsilon(file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "purified.png"
    result = run(app, ["purify", str(file), "--out", str(out), "--checkpoint", str(tiny_folder)])
    assert result.exit_code == 0, result.output
    assert "InfoNCE" in result.output
    difference = np.abs(np.asarray(Image.open(out)).astype(int) - np.asarray(Image.open(BytesIO(photo()))).astype(int))
    assert 0 < difference.max() <= 8


@pytest.mark.parametrize(
    "arguments",
    [
        ["classify", "{file}"],
        ["purify", "{file}", "--out", "{out}/a.png"],
        ["purify", "{folder}", "--out", "{out}"],
        ["demo", "{file}", "--out", "{out}/demo.png"],
    ],
    ids=["classify", "purify", "purify a folder", "demo"],
)
def test_settings_that_only_serving_needs_are_no_matter_to_a_command(
    file: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    for name, value in (("HOST", "0.0.0.0"), ("EXECUTION", "compiled"), ("DEVICE", "cuda:99")):
        monkeypatch.setenv(f"UNPERTURB_{name}", value)
    monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.png").write_bytes(photo())
    (tmp_path / "out").mkdir()
    names = {"file": file, "folder": tmp_path / "folder", "out": tmp_path / "out"}
    given = [one.format(**names) for one in arguments]
    result = run(app, [*given, "--checkpoint", str(tiny_folder), "--device", "cpu"])
    assert result.exit_code == 0, result.output


def test_classify_heeds_the_setting_of_how_many_pixels_a_file_may_have(
    file: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNPERTURB_MAX_PIXELS", "1000")
    result = run(app, ["classify", str(file), "--checkpoint", str(tiny_folder), "--device", "cpu"])
    assert (result.exit_code, "1,000" in result.output) == (1, True)


@pytest.mark.parametrize("given", [True, False], ids=["file", "shipped drawing"])
def test_demo_prints_three_predictions_and_writes_a_picture(
    file: Path, tiny_folder: Path, tmp_path: Path, given: bool
) -> None:
    out = tmp_path / "demo.png"
    result = run(app, ["demo", *([str(file)] if given else []), "--out", str(out), "--checkpoint", str(tiny_folder)])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stdout.splitlines()[:3]] == ["original", "attacked", "purified"]
    assert ("chosen" in result.stderr) is not given
    with Image.open(out) as picture:
        assert min(picture.size) > 500


LOOK, FOLDER, FILE = "look whether it is spelled right", "a folder stands where a file", "a file stands where a folder"


def test_demo_of_the_shipped_checkpoint_shows_a_label_that_is_brought_back(tmp_path: Path) -> None:
    result = run(app, ["demo", "--out", str(tmp_path / "demo.png"), "--device", "cpu"])
    labels = [line.split()[1] for line in result.stdout.splitlines()[:3]]
    assert (labels[0], labels[2]) == ("ship", "ship")
    assert labels[1] != "ship"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "no/such.png"], f"no/such.png: No such file or directory; {LOOK}"),
        (["classify", "{folder}"], f"{{folder}}: Is a directory; {FOLDER}"),
        (["classify", "/proc/self/mem"], "/proc/self/mem: Input/output error; its disk"),
        (
            ["purify", "no/such.png", "--out", "{folder}/a.png"],
            f"unperturb: no/such.png: No such file or directory; {LOOK}",
        ),
        (["purify", "{broken}", "--out", "{folder}/a.png"], "unperturb: {broken}: the image is damaged"),
        (["purify", "{file}", "--out", "{folder}"], f"unperturb: {{folder}}: Is a directory; {FOLDER}"),
        (["purify", "{file}", "--out", "{file}/a.png"], f"unperturb: {{file}}/a.png: Not a directory; {FILE}"),
        (
            ["demo", "no/such.png", "--out", "{folder}/a.png"],
            f"unperturb: no/such.png: No such file or directory; {LOOK}",
        ),
        (["demo", "{file}", "--out", "{file}/a.png"], f"unperturb: {{file}}/a.png: Not a directory; {FILE}"),
        (["demo", "{file}", "--out", "{folder}"], f"unperturb: {{folder}}: Is a directory; {FOLDER}"),
    ],
)
def test_file_that_cannot_be_read_or_written_is_one_line_and_leaves_nothing(
    file: Path,
    tiny_folder: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo()[:80])
    before = sorted(tmp_path.rglob("*"))
    names = {"folder": folder, "file": file, "broken": broken}
    given = [one.format(**names) for one in arguments]
    result = run(app, [*given, "--checkpoint", str(tiny_folder), "--device", "cpu"])
    assert result.exit_code in (1, 2)
    (line,) = capfd.readouterr().err.strip().splitlines() or result.stderr.strip().splitlines()
    assert line.startswith(message.format(**names))
    assert sorted(tmp_path.rglob("*")) == before


def test_address_in_use_is_one_line_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run(app, ["serve", "--port", str(port), "--checkpoint", str(tmp_path / "none"), "--device", "cpu"])
        assert result.exit_code == 2
        assert result.stdout == ""
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith(f"unperturb: 127.0.0.1:{port}: Address already in use; something listens there already")
    result = run(app, ["serve", "--port", "0", "--checkpoint", str(tmp_path / "none"), "--device", "cpu"])
    assert "is neither a folder with a card.json" in result.stderr


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_banner_shows_an_address_that_can_be_opened(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, host: str, shown: str
) -> None:
    @contextmanager
    def given(_host: str, _port: int) -> Iterator[list[socket.socket]]:  # whether this machine has IPv6 or not
        with socket.create_server(("127.0.0.1", 0)) as one:
            ports.append(one.getsockname()[1])
            yield [one]

    ports: list[int] = []
    monkeypatch.setattr(address, "taken", given)
    monkeypatch.setattr(Server, "run", lambda *_, **__: None)
    result = run(app, ["serve", "--host", host, "--port", "0", "--checkpoint", str(tiny_folder), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    (port,) = ports
    assert f"serving  http://{shown}:{port} " in result.stdout
    assert f"'http://{shown}:{port}/classify?top_k=3'" in result.stdout


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_address_is_taken_at_each_place_that_a_name_stands_for(host: str) -> None:
    with taken(host, 0) as sockets:
        assert "127.0.0.1" in [one.getsockname()[0] for one in sockets]
        place, port = sockets[0].getsockname()[:2]
        sockets[0].listen()
        with pytest.raises(OSError, match="Address already in use") as raised, taken(place, port):
            raise AssertionError("it was given away twice")
        assert raised.value.filename == f"{place}:{port}"
    with taken(place, port):
        assert sockets[0].fileno() == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "no/such"], "no/such"),
        (["--preset", "best"], "'best' is not one of default, vote, transfer, restorer, published"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_option_is_refused_in_one_line(file: Path, arguments: list[str], message: str) -> None:
    result = run(app, ["classify", str(file), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_train_is_the_training_module() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from unperturb.service.cli import main; main()", "train", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "classifier" in done.stdout
    assert "head" in done.stdout


def purifier_arguments(folder: Path, images: Path, out: Path, *more: str) -> list[str]:
    given = ["train", "purifier", "--classifier", str(folder), "--data", str(images), "--out", str(out)]
    small = ["--batch-size", "20", "--held-out", "9", "--width", "4", "--depth", "1", "--device", "cpu"]
    return [*given, *small, "--cache", str(out.parent / "cache"), *more]


@contextmanager
def command_line(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, as a shell starts it in a terminal."""
    with subprocess.Popen(
        [sys.executable, "-c", "from unperturb.service.cli import main; main()", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_trained_purifier_is_assessed_and_the_card_says_so(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def instead(_: str, program: list[str]) -> None:  # of what ends this process
        assert program[:3] == [sys.executable, "-m", "unperturb.benchmarks.assess"]
        assert assess.main([*program[3:], "--presets", "restorer"]) == 0

    monkeypatch.setattr(cli, "_ended", lambda program: training.main(program[3:]))
    monkeypatch.setattr(os, "execv", instead)
    store.save(tmp_path / "base", make_checkpoint(head=False))
    arguments = purifier_arguments(tmp_path / "base", image_folder, tmp_path / "run", "--epochs", "1", "--assess", "3")
    context = typer.Context(typer.main.get_command(app))
    context.args = arguments[1:]
    cli.train(context)
    assessment = store.read_card(tmp_path / "run" / "checkpoint").figures["assessment"]
    assert (assessment["n"], set(assessment["presets"])) == (3, {"none", "restorer"})
    assert (tmp_path / "run" / "assessment" / "report.html").is_file()


def test_training_that_is_refused_is_not_assessed_and_its_status_is_the_commands(
    tiny_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    with command_line(
        purifier_arguments(tiny_folder, image_folder, tmp_path / "run", "--attack-steps", "0")
    ) as process:
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (2, "unperturb train purifier: attack_steps=0 must be at least 1\n")


def test_interrupted_training_says_how_to_go_on(tiny_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    with command_line(purifier_arguments(tiny_folder, image_folder, tmp_path / "run", "--epochs", "9999")) as process:
        wait_until(lambda: (tmp_path / "run" / "log.jsonl").exists() or process.poll() is not None, 120)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    # After it may stand what tqdm says of a bar that was not whole when the signal came.
    assert "unperturb train purifier: interrupted; the same command goes on from its last state\n" in said


SLOW_TO_END = """
import sys, time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    print("goes on", flush=True)
    sys.exit(130)
"""
ENDED = "import sys; from unperturb.service import cli; cli.INTERRUPT_S = 0.2; sys.exit(cli._ended(sys.argv[1:]))"


@pytest.mark.parametrize("everyone", [True, False], ids=["a terminal's Ctrl-C", "a signal to the command alone"])
def test_interrupted_command_waits_for_what_it_runs(everyone: bool) -> None:
    program = [sys.executable, "-c", SLOW_TO_END if everyone else SLOW_TO_END.replace("time.sleep(1)", "pass")]
    with subprocess.Popen(
        [sys.executable, "-c", ENDED.replace("0.2", "30") if everyone else ENDED, *program],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "goes on\n")


def test_killed_program_has_the_status_that_a_shell_gives_it() -> None:
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert cli._ended([sys.executable, "-c", killed]) == 137


@pytest.mark.parametrize(
    "command",
    [["-m", "unperturb.service"], ["-c", "from unperturb.service.cli import main; main()", "serve"]],
    ids=["module", "command"],
)
def test_module_and_command_refuse_a_bad_setting_alike(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--device", "tpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("unperturb: UNPERTURB_DEVICE: ")
    assert done.stderr.count("\n") == 1


WITHOUT_ROBUSTBENCH = """
import sys
from pathlib import Path
from typing import Any
sys.modules.update(robustbench=None, pkg_resources=None)
from tests.support.serving import photo, serving
with serving(Path(sys.argv[1])) as client:
    print(client.post("/classify", files={"image": photo()}).status_code)
"""


def test_service_starts_and_answers_without_robustbench(tiny_folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_ROBUSTBENCH, tiny_folder], capture_output=True, text=True)
    assert done.stdout == "200\n", done.stderr


def test_key_prints_a_secret_and_the_pair_that_knows_it() -> None:
    result = run(app, ["key", "ann"])
    secret, pair = (line.split(":", 1)[1].strip() for line in result.output.splitlines())
    assert pair == f"ann:{digest(secret)}"
    assert run(app, ["key", "a b"]).exit_code == 2
