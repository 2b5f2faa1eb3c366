"""The command line: `unperturb serve | classify | purify | train | import | assess | demo | key`.

What is heavy is imported by the command that needs it: the decoding processes import this module too.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from unperturb.models import command
from unperturb.models.errors import ConfigError
from unperturb.service.errors import RequestError

if TYPE_CHECKING:
    import torch

    from unperturb.models.checkpoints.card import Card
    from unperturb.models.purifiers.defended import DefendedClassifier
    from unperturb.service.decoding.decode import Decoded

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Purify images by a reverse attack, and classify them."
)

Files = Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP")]
CheckpointOption = Annotated[str, typer.Option(help="a shipped checkpoint's name, or a folder")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
PresetOption = Annotated[str, typer.Option(help="default, vote, transfer, restorer or published")]
INTERRUPT_S = 5.0  # for a terminal's Ctrl-C to end what it was sent to as well
SeedOption = Annotated[int, typer.Option(min=0, help="of the random views")]


def refusing(function: Callable[..., None]) -> Callable[..., None]:
    """Print what stops a command as one line, with the status of `models.command.run`."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        def call() -> None:
            try:
                function(*args, **kwargs)
            except ValidationError as error:
                names = [f"UNPERTURB_{e['loc'][0]}: ".upper() if e["loc"] else "" for e in error.errors()]
                faults = "; ".join(name + e["msg"] for name, e in zip(names, error.errors(), strict=True))
                raise ConfigError(faults) from error

        if status := command.run("unperturb", call):
            raise typer.Exit(status)

    return wrapped


@app.command()
@refusing
def serve(
    host: Annotated[str | None, typer.Option(help="address (UNPERTURB_HOST, 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="port (UNPERTURB_PORT, 8000)")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="name or folder (UNPERTURB_CHECKPOINT, default)")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N (UNPERTURB_DEVICE, auto)")] = None,
) -> None:
    """Start the HTTP service; every other setting is an environment variable UNPERTURB_…"""
    from unperturb.service.demo import SAMPLE
    from unperturb.service.http.address import joined, taken
    from unperturb.service.http.app import create_app
    from unperturb.service.http.server import Server
    from unperturb.service.settings import Settings
    from unperturb.service.telemetry import logs

    given: dict[str, Any] = {"host": host, "port": port, "checkpoint": checkpoint, "device": device}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    logs.set_up(level=settings.log_level, style=settings.log_format)
    failed: list[str] = []
    with taken(settings.host, settings.port) as sockets:
        service = create_app(settings, on_failure=failed.append)
        server = Server(service, settings, failed)
        url = f"http://{joined(settings.host, sockets[0].getsockname()[1])}"
        models, workers = service.state.engine.models.by_id, Counter(str(device) for device in settings.devices)
        devices = ", ".join(
            f"{count} workers on {name}" if count > 1 else f"on {name}" for name, count in workers.items()
        )
        key = " -H 'Authorization: Bearer KEY'" if settings.keys.required else ""
        print(f"\n  serving  {url}   (model {', '.join(models)}, {devices})")
        print(f"  docs     {url}/docs")
        print(f"  try      curl{key} -F image=@{os.path.relpath(SAMPLE)} '{url}/classify?top_k=3'\n", flush=True)
        server.run(sockets=sockets)
    if failed:
        os._exit(1)  # not sys.exit: a worker that hangs on its device would never be joined


@app.command()
def key(name: Annotated[str, typer.Argument(help="whose key it is: letters, digits and . _ -")]) -> None:
    """Make an API key, and the pair for UNPERTURB_API_KEYS or UNPERTURB_ADMIN_KEYS."""
    from unperturb.service.keys import PAIR, new_key

    secret, pair = new_key(name)
    if not PAIR.fullmatch(pair):
        typer.echo(f"unperturb: the name {name!r} has signs other than letters, digits and . _ -", err=True)
        raise typer.Exit(2)
    print(f"key (for the client; it is shown only now):  {secret}")
    print(f"pair (for the service's settings):           {pair}")


@app.command("import")
@refusing
def import_classifier(
    source: Annotated[
        str,
        typer.Argument(
            help="torchvision:NAME, timm:NAME, hf-hub:OWNER/NAME, a folder in its layout, export:FILE.pt2 or "
            "python:module:factory"
        ),
    ],
    out: Annotated[Path, typer.Option(help="checkpoint folder to write")],
    weights: Annotated[Path | None, typer.Option(help=".pth, .pt, .bin or .safetensors")] = None,
    rename: Annotated[Path | None, typer.Option(help="JSON: regular expressions for its tensors' names")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="the source's own weights, downloaded")] = False,
    classes: Annotated[Path | None, typer.Option(help="class names: a line each, or JSON")] = None,
    id: Annotated[str | None, typer.Option(help="name on the card; default: the folder's")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=8, max=2048, help="side in pixels of what the network takes")
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="crop (shorter side to --resize, the centre), stretch or square")
    ] = None,
    resize: Annotated[int | None, typer.Option(min=8, max=4096, help="pixels before the centre is cut out")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest …")] = None,
    antialias: Annotated[bool | None, typer.Option(help="of that")] = None,
    mean: Annotated[str | None, typer.Option(help="per channel of pixels in [0, 1], as .485,.456,.406")] = None,
    std: Annotated[str | None, typer.Option(help="likewise")] = None,
    picture: Annotated[Path | None, typer.Option(help="to try it on")] = None,
) -> None:
    """Make a checkpoint of a classifier that somebody else has trained, and try it on a picture."""
    from unperturb.models.checkpoints import store
    from unperturb.models.checkpoints.importing.imported import ImportConfig, import_classifier, warnings_of
    from unperturb.service.demo import SAMPLE
    from unperturb.service.http.answer import top

    config = ImportConfig(
        source=source,
        id=id or out.resolve().name,
        weights=weights,
        rename=rename,
        pretrained=pretrained,
        classes=classes,
        image_size=image_size,
        fit=fit,
        resize=resize,
        interpolation=interpolation,
        antialias=antialias,
        mean=_triple("mean", mean),
        std=_triple("std", std),
    )
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a new folder for the checkpoint, or empty it")
    sys.path.insert(0, "")  # a factory of the folder that one starts from
    loaded = import_classifier(config)
    card, how = loaded.card, loaded.card.pictures
    decoded = _read(picture or SAMPLE, card)
    store.save(out, loaded)
    print(f"{out}: {card.architecture.name}, {len(card.classes)} classes, features of {loaded.classifier.feature_dim}")
    print(
        f"pictures: {how.fit} {f'at {how.resize} ' * bool(how.resize)}to {how.size} pixels, {how.interpolation}"
        f"{', antialiased' * how.antialias}; mean {card.architecture.mean}, std {card.architecture.std}"
    )
    scores = loaded.classifier(_batch(decoded, next(loaded.classifier.parameters()).device))[0].softmax(0)
    print(f"{picture or 'the shipped drawing'}: {_line(top(scores.numpy(), card.classes, min(5, len(card.classes))))}")
    for warning in warnings_of(scores, card.classes):
        typer.echo(f"warning: {warning}", err=True)


def _triple(name: str, text: str | None) -> "tuple[float, float, float] | None":
    if text is None:
        return None
    try:
        one, two, three = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not three numbers between commas") from None
    return one, two, three


@app.command()
@refusing
def classify(
    files: Files,
    checkpoint: CheckpointOption = "default",
    preset: PresetOption = "default",
    seed: SeedOption = 0,
    purify: Annotated[Literal["always", "never"], typer.Option(help="never: the classifier alone")] = "always",
    top_k: Annotated[int, typer.Option(min=1, help="classes to print")] = 3,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """Classify image files through the reverse attack."""
    from unperturb.service.http.answer import top

    defended, card, place = _load(checkpoint, None if purify == "never" else preset, device)
    top_k = min(top_k, len(card.classes))
    failed = 0
    for file in files:
        try:
            decoded = _read(file, card)
        except (RequestError, OSError) as error:
            typer.echo(command.told(error) if isinstance(error, OSError) else error, err=True)
            failed += 1
            continue
        result = defended.classify(_batch(decoded, place), seed=seed)
        predictions = top(result.logits[0].softmax(0).cpu().numpy(), card.classes, top_k)
        before = top(result.unpurified_logits[0].softmax(0).cpu().numpy(), card.classes, top_k)
        if as_json:
            record = {"predictions": predictions, "unpurified": before}
            shown = {name: [dataclasses.asdict(prediction) for prediction in values] for name, values in record.items()}
            print(json.dumps({"file": str(file), **shown}))
        else:
            also = "" if purify == "never" else f"   (unpurified: {_line(before[:1])})"
            print(f"{file}: {_line(predictions)}{also}")
    if failed:
        raise typer.Exit(1)


@app.command()
@refusing
def purify(
    file: Annotated[Path, typer.Argument(help="image, folder of images, or Parquet file(s)")],
    out: Annotated[Path, typer.Option(help="PNG to write, at the model's size; for many images, a folder")],
    checkpoint: CheckpointOption = "default",
    preset: PresetOption = "default",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    column: Annotated[str, typer.Option(help="of Parquet: bytes, or a struct with bytes")] = "image",
    chunk: Annotated[int, typer.Option(min=1, help="images to one part of the traces")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="images on the device at a time")] = 64,
    by_ray: Annotated[bool, typer.Option("--ray", help="by Ray Data; --out must be seen by every node")] = False,
    ray_actors: Annotated[int, typer.Option(min=1, help="each with a GPU or CPU core of its own")] = 1,
) -> None:
    """Write the purified image; of a folder or Parquet, every image and its trace, going on where it was ended."""
    if file.is_dir() or file.suffix.lower() == ".parquet":
        from unperturb.service.bulk.run import BulkJob, run

        job = BulkJob(
            source=file,
            out=out,
            checkpoint=checkpoint,
            preset=preset,
            seed=seed,
            device=device,
            column=column,
            chunk=chunk,
            batch=batch,
        )
        count, failed = run(job, ray_actors=ray_actors if by_ray else 0)
        print(f"{out}: {count} images, {failed} failed" + (f" (see status in {out / 'traces'})" if failed else ""))
        if failed:
            raise typer.Exit(1)
        return
    from unperturb.models.files import write_whole
    from unperturb.models.purifiers.reverse_attack import changing, to_uint8
    from unperturb.service.http.answer import png

    changing(preset)
    defended, card, place = _load(checkpoint, preset, device)
    x = _batch(_read(file, card), place)
    started = time.perf_counter()
    purified = defended.purify(x, seed=seed)
    pixels = to_uint8(purified.image, x, epsilon=defended.purifier.loop.epsilon)[0].cpu()
    write_whole(out, png(pixels))
    trace, loss = purified.trace, ""
    if defended.purifier.has_objective:
        loss = f"InfoNCE {float(trace.loss_before):.3f} -> {float(trace.loss_after):.3f}, "
    seconds = time.perf_counter() - started
    print(f"{out}: {loss}largest change {float(trace.linf) * 255:.0f}/255, {seconds:.2f} s")


@app.command()
@refusing
def demo(
    file: Annotated[Path | None, typer.Argument(help="default: a part of the shipped drawing, chosen")] = None,
    out: Annotated[Path, typer.Option(help="picture to write")] = Path("demo.png"),
    checkpoint: CheckpointOption = "default",
    preset: PresetOption = "transfer",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Attack an image, purify it, print the three predictions and write one picture of it all."""
    from unperturb.service.demo import CHOSEN, run_demo

    defended, card, place = _load(checkpoint, preset, device)
    x = _batch(_read(file or CHOSEN, card), place)
    if file is None:
        typer.echo("a part of the shipped drawing, chosen: most labels are not brought back", err=True)
    for line in run_demo(defended, card, x, seed=seed, out=out):
        print(line)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train a part: the same as python -m unperturb.training …, and a purifier is assessed at the end."""
    given, run = context.args, [sys.executable, "-m"]
    training = [*run, "unperturb.training", *given]
    if given[:1] != ["purifier"] or {"-h", "--help"} & set(given):
        os.execv(sys.executable, training)
    if status := _ended(training):
        raise typer.Exit(status)
    from unperturb.models.options import parse
    from unperturb.training.purifier.purifier import PurifierConfig

    config = parse(PurifierConfig, given[1:], program="unperturb train purifier")
    if config.assess and not Path(config.data).is_dir():
        print(f"unperturb assess {config.out / 'checkpoint'} --data DIR tells what it is worth, on images of a folder")
    elif config.assess:
        checkpoint, cache = str(config.out / "checkpoint"), ["--cache", str(config.cache)] if config.cache else []
        asked = ["--data", config.data, "--images", str(config.assess), "--device", config.device, *cache]
        asked += ["--write-card", "--out", str(config.out / "assessment")]
        os.execv(sys.executable, [*run, "unperturb.benchmarks.assess", checkpoint, *asked])


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def assess(context: typer.Context) -> None:
    """Measure whether a purifier helps a checkpoint's classifier, on images of one's own."""
    os.execv(sys.executable, [sys.executable, "-m", "unperturb.benchmarks.assess", *context.args])


def _ended(program: list[str]) -> int:
    """Run a program to its end, and return its exit status as a shell does.

    Ctrl-C is for the program: a terminal sends it to both, and this process waits until it has said how to go on. One
    that nobody else has sent on is sent on after INTERRUPT_S.
    """
    child = subprocess.Popen(program)  # not `run`, which kills it a quarter of a second after Ctrl-C
    interrupted = False
    while True:
        try:
            status = child.wait(INTERRUPT_S if interrupted else None)
        except KeyboardInterrupt:
            interrupted = True
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            interrupted = False
        else:
            return status if status >= 0 else 128 - status


def _load(name: str, preset: str | None, device: str) -> "tuple[DefendedClassifier, Card, torch.device]":
    from unperturb.models.checkpoints import store
    from unperturb.models.devices import opened_device
    from unperturb.models.purifiers import reverse_attack
    from unperturb.models.purifiers.base import NoPurifier
    from unperturb.models.purifiers.defended import DefendedClassifier, defend
    from unperturb.service.settings import Computing

    place = opened_device(str(Computing(device=device).first_device))
    config = None if preset is None else reverse_attack.preset(preset)
    loaded = store.load(name, device=place)
    if config is None:
        return DefendedClassifier(loaded.classifier, NoPurifier(loaded.classifier)), loaded.card, place
    return defend(loaded, config), loaded.card, place


def _read(file: Path, card: "Card") -> "Decoded":
    from unperturb.models.files import read_whole
    from unperturb.service.decoding.decode import decode
    from unperturb.service.settings import Computing

    try:  # a device that only UNPERTURB_DEVICE names is none of a file's business
        return decode(read_whole(file), card.pictures, max_pixels=Computing(device="auto").max_pixels)
    except RequestError as error:
        raise type(error)(f"{file}: {error}") from error


def _batch(decoded: "Decoded", device: "torch.device") -> "torch.Tensor":
    import torch

    return torch.from_numpy(decoded.pixels)[None].to(device).float() / 255


def _line(predictions: list[Any]) -> str:
    return ", ".join(f"{p.label} {p.score:.1%}" for p in predictions)


def main() -> None:
    """Run the console script."""
    app()
