"""`unperturb purify` of a folder or of Parquet files."""

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from tests.support.pictures import encode
from tests.support.serving import photo
from unperturb.models.checkpoints import store
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import PRESETS, to_uint8
from unperturb.service.bulk import run as bulk
from unperturb.service.bulk.source import open_source
from unperturb.service.cli import app

NAMES = ["a.png", "b.PNG", "c.jpeg", "deep/e.jpg", "deep/er/d.webp"]  # in sorted order
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
PNGS = ["a.png", "b.png", "c.png", "deep/e.png", "deep/er/d.png"]
pytestmark = pytest.mark.usefixtures("one_thread")  # as Ray's actors have
# Prints the process's peak memory in MiB after its second chunk and after its last.
PEAKS = """
import resource, sys
from pathlib import Path
from unperturb.service.bulk import run as bulk

peaks, plain = [], bulk.BulkWorker.run
def run(self, chunk, progress):
    plain(self, chunk, progress)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
bulk.BulkWorker.run = run
source, out, checkpoint = sys.argv[1:]
bulk.run(bulk.BulkJob(source=Path(source), out=Path(out), checkpoint=checkpoint, device="cpu", chunk=16, batch=16))
print(peaks[1], peaks[-1])
"""


def encoded(seed: int, *, size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), kind, lossless=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images and a file that is none."""
    root = tmp_path / "images"
    for seed, name in enumerate(NAMES):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(seed, kind=FORMATS[file.suffix[1:].lower()]))
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.fixture
def payloads() -> list[bytes]:
    return [encoded(seed) for seed in range(7)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def purify(source: Path, out: Path, folder: Path, *more: str) -> Result:
    command = ["purify", str(source), "--out", str(out), "--checkpoint", str(folder), "--device", "cpu", *more]
    return CliRunner().invoke(app, command)


def traces(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for part in sorted((out / "traces").glob("part-*.parquet")):
        rows += pq.ParquetFile(part).read().to_pylist()
    return rows


def pngs(out: Path) -> list[str]:
    return sorted(file.relative_to(out / "images").as_posix() for file in (out / "images").rglob("*") if file.is_file())


def written(out: Path) -> dict[Path, tuple[int, int]]:
    """Which files are there, and which writing of each."""
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.rglob("*") if file.is_file()}


def same_as_the_model(
    row: dict[str, Any], png: Path, payload: bytes, tiny_folder: Path, *, seed: int, preset: str = "default"
) -> None:
    """The row and the PNG are what DefendedClassifier makes of the image by itself."""
    loaded = store.load(tiny_folder)
    x = torch.from_numpy(np.asarray(Image.open(io.BytesIO(payload))).copy()).permute(2, 0, 1)[None].float() / 255
    result, other = (defend(loaded, PRESETS[preset]).classify(x, seed=one) for one in (seed, seed + 1))
    if preset == "transfer":  # which draws its views
        own, others = (abs(row["loss_before"] - float(one.trace.loss_before)) for one in (result, other))
        assert own < 1e-4 < 3e-4 < others
    for prefix, logits in (("", result.logits), ("unpurified_", result.unpurified_logits)):
        scores = logits[0].softmax(0)
        assert row[f"{prefix}label"] == loaded.card.classes[int(scores.argmax())]
        assert row[f"{prefix}score"] == pytest.approx(float(scores.max()), abs=1e-4)
    for key in ("loss_before", "loss_after", "linf", "l2"):
        assert row[key] == pytest.approx(float(getattr(result.trace, key)[0]), abs=1e-3), key
    assert row["losses"] == pytest.approx(result.trace.losses[:, 0].tolist(), abs=1e-3)
    pixels = to_uint8(result.image, x, epsilon=8 / 255)[0].permute(1, 2, 0).numpy()
    with Image.open(png) as image:
        assert (np.asarray(image) == pixels).mean() > 0.99  # a sign may differ between batch sizes
        assert np.abs(np.asarray(image) - (x[0].permute(1, 2, 0).numpy() * 255)).max() <= 8.01


def test_what_is_left_out_of_a_folder_is_said(tmp_path: Path) -> None:
    for name in (
        "a.png",
        "deep/b.jpg",
        ".ipynb_checkpoints/a.png",
        "__MACOSX/c.png",
        "notes.txt",
        "d.heic",
        ".DS_Store",
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(photo())
    (tmp_path / "in" / "gone.png").symlink_to("nowhere.png")
    source = open_source(tmp_path / "in", out=tmp_path / "out", column="image")
    assert source.entries == ["a.png", "deep/b.jpg", "gone.png"]  # the last is an image that cannot be read, and a row
    assert source.said.endswith(
        "in: 3 images; left out: 1 files of no image type (.heic), 1 files of no image type (.txt), 3 hidden files"
    )


def test_folder_gives_a_png_and_a_trace_for_each_image_as_the_model_does(
    folder: Path, out: Path, tiny_folder: Path
) -> None:
    result = purify(folder, out, tiny_folder, "--preset", "transfer", "--seed", "5", "--chunk", "3", "--batch", "2")
    assert result.exit_code == 0, result.output
    assert "5 images, 0 failed" in result.output
    assert pngs(out) == PNGS
    rows = traces(out)
    assert [row["name"] for row in rows] == NAMES
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert [(row["width"], row["height"]) for row in rows] == [(32, 32)] * 5
    assert list(rows[0]) == list(bulk.COLUMNS)
    assert sorted(file.name for file in (out / "traces").iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    for index in (0, 1, 4):
        payload = (folder / rows[index]["name"]).read_bytes()
        same_as_the_model(rows[index], out / "images" / PNGS[index], payload, tiny_folder, seed=5, preset="transfer")
    manifest = json.loads((out / "manifest.json").read_text())
    card = store.read_card(tiny_folder)
    assert manifest["weights_sha256"] == card.weights_sha256
    pinned = {"checkpoint": "tiny", "preset": "transfer", "seed": 5, "chunk": 3, "source": "folder", "count": 5}
    assert pinned.items() <= manifest.items()


def test_names_that_differ_only_in_their_extension_keep_it(folder: Path, out: Path, tiny_folder: Path) -> None:
    (folder / "a.jpg").write_bytes(encoded(9, kind="JPEG"))
    result = purify(folder, out, tiny_folder)
    assert result.exit_code == 0, result.output
    assert pngs(out) == ["a.jpg.png", "a.png.png", "b.PNG.png", "c.jpeg.png", "deep/e.jpg.png", "deep/er/d.webp.png"]


def test_damaged_images_are_rows_and_the_status_is_1(folder: Path, out: Path, tiny_folder: Path) -> None:
    (folder / "b.PNG").write_bytes(encoded(1)[:80])
    (folder / "c.jpeg").write_bytes(b"")
    (folder / "tall.png").write_bytes(encoded(2, size=(40, 90)))
    for _ in range(2):  # the second call finds nothing to do, and says the same
        result = purify(folder, out, tiny_folder, "--batch", "1")
        assert result.exit_code == 1
        assert "6 images, 2 failed" in result.output
    rows = {row["name"]: row for row in traces(out)}
    assert "damaged" in rows["b.PNG"]["status"]
    assert "0 bytes" in rows["c.jpeg"]["status"]
    assert rows["b.PNG"]["label"] is rows["b.PNG"]["losses"] is rows["b.PNG"]["width"] is None
    assert [rows["tall.png"][key] for key in ("status", "width", "height")] == ["ok", 40, 90]
    assert pngs(out) == ["a.png", "deep/e.png", "deep/er/d.png", "tall.png"]


def test_ended_run_goes_on_with_the_chunks_that_have_no_part(
    folder: Path, out: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part = bulk._write_part

    def ended(file: Path, rows: list[dict[str, Any]]) -> None:
        if "00001" in file.name:
            raise RuntimeError("power cut")
        write_part(file, rows)

    with monkeypatch.context() as patched:
        patched.setattr(bulk, "_write_part", ended)
        result = purify(folder, out, tiny_folder, "--chunk", "2")
    assert isinstance(result.exception, RuntimeError)
    before = written(out)
    assert sorted(file.name for file in (out / "traces").iterdir()) == ["part-00000.parquet"]
    result = purify(folder, out, tiny_folder, "--chunk", "2")
    assert result.exit_code == 0, result.output
    after = written(out)
    rewritten = {file.relative_to(out).as_posix() for file in before if after[file] != before[file]}
    assert rewritten == {"images/c.png", "images/deep/e.png"}  # those of the chunk without a part
    assert [row["name"] for row in traces(out)] == NAMES
    assert pngs(out) == PNGS
    assert purify(folder, out, tiny_folder, "--chunk", "2").exit_code == 0
    assert written(out) == after


def test_other_settings_into_the_same_folder_are_refused_by_name(folder: Path, out: Path, tiny_folder: Path) -> None:
    assert purify(folder, out, tiny_folder).exit_code == 0
    before = written(out)
    result = purify(folder, out, tiny_folder, "--seed", "1", "--chunk", "2")
    assert result.exit_code == 2
    assert "seed was 0, is 1; chunk was 256, is 2" in result.output
    (folder / "new.png").write_bytes(encoded(8))
    result = purify(folder, out, tiny_folder)
    assert result.exit_code == 2
    assert "count was 5, is 6; names_sha256 was" in result.output
    assert written(out) == before


@pytest.mark.parametrize("kind", ["bytes", "struct", "large bytes"])
def test_parquet_rows_are_purified_across_files_and_row_groups(
    tmp_path: Path, out: Path, payloads: list[bytes], tiny_folder: Path, kind: str
) -> None:
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    types = {"bytes": pa.binary(), "large bytes": pa.large_binary(), "struct": struct}
    cells = [{"bytes": payload, "path": None} if kind == "struct" else payload for payload in payloads]
    table = pa.table({"label": list(range(7)), "photo": pa.array(cells, types[kind])})
    root = tmp_path / "data"
    root.mkdir()
    pq.write_table(table.slice(0, 5), root / "train-0.parquet", row_group_size=2)
    pq.write_table(table.slice(5), root / "train-1.parquet")
    result = purify(root, out, tiny_folder, "--column", "photo", "--chunk", "3", "--batch", "2")
    assert result.exit_code == 0, result.output
    assert pngs(out) == [f"{row:08d}.png" for row in range(7)]
    rows = traces(out)
    assert [row["name"] for row in rows] == [f"{row:08d}" for row in range(7)]
    for index in (0, 4, 6):
        same_as_the_model(rows[index], out / "images" / pngs(out)[index], payloads[index], tiny_folder, seed=0)
    (out / "traces" / "part-00001.parquet").unlink()  # a chunk in the middle, from a fresh start
    before = [row for row in rows if row["name"] in ("00000003", "00000004", "00000005")]
    assert purify(root, out, tiny_folder, "--column", "photo", "--chunk", "3", "--batch", "2").exit_code == 0
    assert traces(out)[3:6] == before


def test_parquet_row_without_bytes_fails_alone(
    tmp_path: Path, out: Path, payloads: list[bytes], tiny_folder: Path
) -> None:
    file = tmp_path / "one.parquet"
    pq.write_table(pa.table({"image": [{"bytes": payloads[0]}, {"bytes": None}, None, {"bytes": b"gone"}]}), file)
    result = purify(file, out, tiny_folder)
    assert result.exit_code == 1
    assert "4 images, 3 failed" in result.output
    assert [row["status"][:20] for row in traces(out)] == [
        "ok",
        "the row has no bytes",
        "the row has no bytes",
        "the bytes are not an",
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"photo": [b"1"], "label": [1]}, "'image' is not in"),
        ({"image": [1]}, "holds int64, neither bytes nor a struct with bytes"),
        ({"image": [{"path": "a"}]}, "neither bytes nor a struct with bytes"),
        ({"image": pa.array([], pa.binary())}, "holds no image"),
        (None, "is not a readable Parquet file"),
    ],
    ids=["missing", "integers", "struct without bytes", "no rows", "damaged"],
)
def test_parquet_without_images_is_refused(
    tmp_path: Path, out: Path, tiny_folder: Path, table: dict[str, Any] | None, message: str
) -> None:
    file = tmp_path / "one.parquet"
    file.write_bytes(b"PAR1 and no more") if table is None else pq.write_table(pa.table(table), file)
    result = purify(file, out, tiny_folder)
    assert result.exit_code == 2
    assert message in result.output
    assert not out.exists()


def test_parquet_that_breaks_off_in_the_middle_ends_the_run_by_name(
    tmp_path: Path, out: Path, payloads: list[bytes], tiny_folder: Path
) -> None:
    file = tmp_path / "one.parquet"
    pq.write_table(pa.table({"image": payloads}), file, row_group_size=3, use_dictionary=False, compression="gzip")
    second = pq.ParquetFile(file).metadata.row_group(1).column(0)
    damaged = bytearray(file.read_bytes())
    damaged[second.data_page_offset : second.data_page_offset + 200] = bytes(200)
    file.write_bytes(damaged)
    result = purify(file, out, tiny_folder, "--chunk", "2", "--batch", "2")
    assert result.exit_code == 2
    assert f"{file} cannot be read after row" in result.output


def test_folder_that_cannot_be_a_source_or_target_is_refused(folder: Path, tmp_path: Path, tiny_folder: Path) -> None:
    empty, taken = tmp_path / "empty", tmp_path / "taken"
    empty.mkdir()
    taken.mkdir()
    (taken / "thesis.txt").write_text("not ours")
    for source, out, message in (
        (empty, tmp_path / "out", "holds no image"),
        (folder, folder / "purified", "whose images are read"),
        (folder, taken, "is not the folder of a run"),
        (folder, taken / "thesis.txt", "is not the folder of a run"),
    ):
        result = purify(source, out, tiny_folder)
        assert result.exit_code == 2
        assert message in result.output
    pq.write_table(pa.table({"image": [b""]}), folder / "more.parquet")
    assert "holds both images" in purify(folder, tmp_path / "out", tiny_folder).output


@pytest.mark.parametrize(
    ("module", "arguments", "remedy"),
    [("pyarrow.parquet", [], "unperturb[parquet]"), ("ray.data", ["--ray"], "unperturb[ray]")],
)
def test_missing_package_is_named_with_its_remedy(
    folder: Path,
    out: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    arguments: list[str],
    remedy: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = purify(folder, out, tiny_folder, *arguments)
    assert result.exit_code == 2
    assert f"pip install '{remedy}'" in result.output
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_memory_does_not_grow_with_the_number_of_images(
    tmp_path: Path, out: Path, tiny_folder: Path, kind: str
) -> None:
    payload, count = encoded(0, size=(600, 600)), 128
    assert len(payload) > 2**20  # 128 MiB in all
    source = tmp_path / "source"
    source.mkdir()
    if kind == "parquet":  # one row group; its dictionary holds the one image once
        pq.write_table(pa.table({"image": [payload] * count}), source / "all.parquet", row_group_size=count)
    else:
        first = source / "first.png"
        first.write_bytes(payload)
        for index in range(count - 1):
            (source / f"{index}.png").hardlink_to(first)
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(source), str(out), str(tiny_folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    second, last = map(int, done.stdout.split())
    assert last - second < 50, f"{second} MiB after the second chunk, {last} MiB at the end"
    assert len(traces(out)) == count


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.timeout(300)  # Ray takes half a minute to start, and more on a busy machine
def test_ray_does_what_is_left_as_this_process_does(folder: Path, out: Path, tiny_folder: Path, tmp_path: Path) -> None:
    import ray

    here = tmp_path / "here"
    for target in (out, here):
        assert purify(folder, target, tiny_folder, "--chunk", "2").exit_code == 0
    for chunk in (0, 2):
        (out / "traces" / f"part-0000{chunk}.parquet").unlink()
    before = written(out)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        result = purify(folder, out, tiny_folder, "--chunk", "2", "--ray")
    finally:
        ray.shutdown()
    assert result.exit_code == 0, result.output
    assert "5 images, 0 failed" in result.output
    after = written(out)
    kept = {file.relative_to(out).as_posix() for file in before if after[file] == before[file]}
    assert kept == {"manifest.json", "traces/part-00001.parquet", "images/c.png", "images/deep/e.png"}
    for there, expected in zip(traces(out), traces(here), strict=True):
        assert there["name"] == expected["name"]
        assert there["losses"] == pytest.approx(expected["losses"], abs=1e-3)
