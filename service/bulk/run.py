"""Purify a folder or Parquet files of images, chunk by chunk, in this process or by the actors of Ray Data.

`out/manifest.json` pins what the run is, `out/images/` holds the PNG files, and `out/traces/` one Parquet part for each
chunk. A part is written after its chunk's images, so a run that was killed goes on with the chunks that have no part.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from unperturb.models import provenance
from unperturb.models.checkpoints import store
from unperturb.models.devices import opened_device
from unperturb.models.errors import ConfigError
from unperturb.models.files import write_whole
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import changing, to_uint8
from unperturb.service.bulk.source import Folder, Item, ParquetRows, needed, open_source
from unperturb.service.decoding.decode import Decoded, decode
from unperturb.service.errors import MalformedRequestError, RequestError
from unperturb.service.http.answer import png, top
from unperturb.service.settings import Computing

THREADS = 4  # that decode; an image of the 50 million pixels that are accepted takes each of them about 1 GiB
COLUMNS = {
    "name": "string",
    "status": "string",
    "label": "string",
    "score": "float32",
    "unpurified_label": "string",
    "unpurified_score": "float32",
    "loss_before": "float32",
    "loss_after": "float32",
    "linf": "float32",
    "l2": "float32",
    "losses": "list",
    "width": "int32",
    "height": "int32",
}


@dataclass(frozen=True, kw_only=True)
class BulkJob:
    """One run's options; `chunk` and `batch` in images."""

    source: Path
    out: Path
    checkpoint: str = "default"
    preset: str = "default"
    seed: int = 0
    device: str = "auto"
    column: str = "image"
    chunk: int = 256
    batch: int = 64

    def part(self, chunk: int) -> Path:
        """Return the file of a chunk's traces."""
        return self.out / "traces" / f"part-{chunk:05d}.parquet"


class BulkWorker:
    """The checkpoint, loaded once, and what is done to a chunk; itself the class of Ray Data's actors."""

    def __init__(self, job: BulkJob, source: Folder | ParquetRows) -> None:
        settings = Computing(device=job.device)
        self.job, self.source, self.device = job, source, opened_device(str(settings.first_device))
        self.max_pixels, self.config = settings.max_pixels, changing(job.preset)
        loaded = store.load(job.checkpoint, device=self.device)
        self.card, self.defended = loaded.card, defend(loaded, self.config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run the chunks whose numbers Ray Data gives, and return the numbers."""
        for chunk in batch["item"]:
            self.run(int(chunk))
        return batch

    def run(self, chunk: int, progress: Callable[[int], object] = lambda count: None) -> None:
        """Purify one chunk and write its images, then its part; call `progress` after every batch."""
        rows: list[dict[str, Any]] = []
        start = chunk * self.job.chunk
        items = self.source.items(start, min(start + self.job.chunk, self.source.count))
        pieces = iter(lambda: list(islice(items, self.job.batch)), [])
        with ThreadPoolExecutor(THREADS) as pool:
            for piece, decoded in _ahead(pool, self._decode, pieces):
                good = {item.name: one for item, one in zip(piece, decoded, strict=True) if isinstance(one, Decoded)}
                pixels, traces = self._purify(list(good.values()))
                list(pool.map(self._write, (item for item in piece if item.name in good), pixels))
                trace_of = dict(zip(good, traces, strict=True))
                for item, one in zip(piece, decoded, strict=True):
                    name = item.name.encode(errors="backslashreplace").decode()  # a file's name may not be UTF-8
                    rows.append({"name": name, **trace_of.get(item.name, {"status": one})})
                progress(len(piece))
        _write_part(self.job.part(chunk), rows)

    def _decode(self, item: Item) -> Decoded | str:
        try:
            payload = item.origin.read_bytes() if isinstance(item.origin, Path) else item.origin
            if payload is None:
                raise MalformedRequestError("the row has no bytes")
            return decode(payload, self.card.pictures, max_pixels=self.max_pixels)
        except RequestError as error:
            return str(error)
        except OSError as error:
            return f"the file cannot be read: {error.strerror}"

    def _purify(self, images: list[Decoded]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        if not images:
            return torch.empty(0), []
        x = torch.from_numpy(np.stack([image.pixels for image in images])).to(self.device).float() / 255
        result = self.defended.classify(x, seed=self.job.seed)
        pixels = to_uint8(result.image, x, epsilon=self.defended.purifier.loop.epsilon).cpu()
        scores, unpurified = (y.softmax(1).cpu().numpy() for y in (result.logits, result.unpurified_logits))
        trace = {key: (value.T if key == "losses" else value).tolist() for key, value in result.trace._asdict().items()}
        if not self.defended.purifier.has_objective:
            trace |= dict.fromkeys(("loss_before", "loss_after"), [None] * len(images))
        rows = []
        for i, image in enumerate(images):
            (after,), (before,) = (top(of[i], self.card.classes, 1) for of in (scores, unpurified))
            rows.append(
                {
                    "status": "ok",
                    "label": after.label,
                    "score": after.score,
                    "unpurified_label": before.label,
                    "unpurified_score": before.score,
                    "width": image.width,
                    "height": image.height,
                    **{key: values[i] for key, values in trace.items()},
                }
            )
        return pixels, rows

    def _write(self, item: Item, pixels: torch.Tensor) -> None:
        file = self.job.out / "images" / item.png
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, png(pixels))


def run(job: BulkJob, *, ray_actors: int = 0) -> tuple[int, int]:
    """Do what is left of the job, by Ray Data where `ray_actors` is above 0; return how many images, how many failed.

    Raises ConfigError for a package that is not installed, a missing column, or an `out` that holds another run, and
    DataError for a source with no image. A damaged image is a row of the traces, and no error.
    """
    parquet = needed("pyarrow.parquet", extra="parquet")
    if ray_actors:
        needed("ray.data", extra="ray")
    job = dataclasses.replace(job, source=job.source.resolve(), out=job.out.resolve())
    source = open_source(job.source, out=job.out, column=job.column)
    tqdm.write(source.said, file=sys.stderr)
    on_gpu = job.device.startswith("cuda") or (job.device == "auto" and torch.cuda.is_available())
    here = dataclasses.replace(job, device="cpu") if ray_actors and on_gpu else job  # leaves the GPUs to the actors
    worker = BulkWorker(here, source)
    _pin(job, source, worker)
    (job.out / "traces").mkdir(exist_ok=True)
    sizes = {i: min(job.chunk, source.count - i * job.chunk) for i in range(-(-source.count // job.chunk))}
    todo = [chunk for chunk in sizes if not job.part(chunk).exists()]
    done = source.count - sum(sizes[chunk] for chunk in todo)
    with tqdm(total=source.count, initial=done, desc="purifying", unit="img") as bar:
        if ray_actors and todo:
            there = dataclasses.replace(job, device="cuda" if on_gpu else "cpu")
            for chunk in _by_ray(there, source, todo, actors=ray_actors):
                bar.update(sizes[chunk])
        else:
            for chunk in todo:
                worker.run(chunk, bar.update)
    statuses = (parquet.ParquetFile(job.part(chunk)).read(["status"]).column(0).to_pylist() for chunk in sizes)
    return source.count, sum(status != "ok" for part in statuses for status in part)


def _pin(job: BulkJob, source: Folder | ParquetRows, worker: BulkWorker) -> None:
    """Write the manifest, or refuse an `out` whose manifest says otherwise."""
    entries = "\0".join(source.entries).encode(errors="surrogateescape")
    identity: dict[str, Any] = {
        "checkpoint": worker.card.id,
        "weights_sha256": worker.card.weights_sha256,
        "preset": job.preset,
        "purifier": json.loads(json.dumps(dataclasses.asdict(worker.config))),
        "seed": job.seed,
        "chunk": job.chunk,
        "source": source.kind,
        "column": source.column,
        "count": source.count,
        "names_sha256": hashlib.sha256(entries).hexdigest(),
    }
    file = job.out / "manifest.json"
    if file.exists():
        before = json.loads(file.read_bytes())
        changed = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in identity.items() if before.get(k) != v]
        if changed:
            raise ConfigError(f"{job.out} holds another run ({'; '.join(changed)}); choose another --out")
        return
    if job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
        raise ConfigError(f"--out {job.out} exists and is not the folder of a run (it has no {file.name})")
    job.out.mkdir(parents=True, exist_ok=True)
    made_by = {"commit": provenance.commit(), "versions": provenance.versions()}
    write_whole(file, (json.dumps({**identity, "made_by": made_by}, indent=1) + "\n").encode())


def _by_ray(job: BulkJob, source: Folder | ParquetRows, todo: list[int], *, actors: int) -> Iterator[int]:
    """Yield chunk numbers as they are done; each actor has a GPU, or a CPU core, of its own."""
    data = needed("ray.data", extra="ray")
    data.DataContext.get_current().enable_progress_bars = False
    each = {"num_gpus": 1} if job.device == "cuda" else {"num_cpus": 1}
    chunks = data.from_items(todo, override_num_blocks=min(len(todo), 1000)).map_batches(
        BulkWorker, fn_constructor_args=(job, source), batch_size=1, compute=data.ActorPoolStrategy(size=actors), **each
    )
    for row in chunks.iter_rows():
        yield int(row["item"])


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Decoded | str], pieces: Iterable[list[Item]]
) -> Iterator[tuple[list[Item], list[Decoded | str]]]:
    """Yield each piece and its results, with the next piece already under way."""
    waiting: list[tuple[list[Item], Iterator[Decoded | str]]] = []
    for piece in pieces:
        waiting.append((piece, pool.map(function, piece)))
        if len(waiting) == 2:
            first, results = waiting.pop(0)
            yield first, list(results)
    for first, results in waiting:
        yield first, list(results)


def _write_part(file: Path, rows: list[dict[str, Any]]) -> None:
    arrow, parquet = needed("pyarrow", extra="parquet"), needed("pyarrow.parquet", extra="parquet")
    losses = arrow.list_(arrow.float32())
    schema = arrow.schema([(name, losses if kind == "list" else kind) for name, kind in COLUMNS.items()])
    stream = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), stream)
    write_whole(file, stream.getvalue().to_pybytes())
