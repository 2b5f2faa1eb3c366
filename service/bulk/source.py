"""Where bulk purification reads its images: a folder, or the rows of Parquet files."""

import importlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from unperturb.models.errors import ConfigError, DataError
from unperturb.models.files import is_hidden

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ROWS, BUFFER_BYTES = 16, 2**20  # of a Parquet file in memory at a time


class Item(NamedTuple):
    """One image: its name in the trace, its file under `out/images`, and where its bytes are (None: there are none)."""

    name: str
    png: str
    origin: Path | bytes | None


class Folder:
    """The image files under a folder, by relative path; extensions are kept where two names differ in nothing else."""

    kind, column = "folder", None

    def __init__(self, root: Path, names: list[str], left_out: tuple[str, ...] = ()) -> None:
        self.root, self.entries, self.count = root, names, len(names)
        self.said = f"{root}: {self.count:,} images{'; left out: ' * bool(left_out)}{', '.join(left_out)}"
        self.keep = len({Path(name).with_suffix("") for name in names}) < len(names)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the images from `start` to `stop`."""
        for name in self.entries[start:stop]:
            yield Item(name, f"{name if self.keep else Path(name).with_suffix('')}.png", self.root / name)


class ParquetRows:
    """The rows of Parquet files, one after another; `column` holds bytes, or a struct with `bytes`."""

    kind = "parquet"

    def __init__(self, root: Path, names: list[str], column: str) -> None:
        self.files, self.column = [root / name for name in names], column
        self.rows = [self._check(file) for file in self.files]
        self.entries = [f"{name}:{rows}" for name, rows in zip(names, self.rows, strict=True)]
        self.count = sum(self.rows)
        self.said = f"{root}: {self.count:,} rows of {len(names)} Parquet files"
        self._stream: Iterator[Item] = iter(())
        self._at = -1  # where the stream is: chunks in order are read in one pass, whatever the row groups are

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the images from `start` to `stop`."""
        if self._at != start:
            self._stream = self._from(start)
        self._at = -1
        yield from islice(self._stream, stop - start)
        self._at = stop

    def _open(self, file: Path) -> Any:  # noqa: ANN401
        parquet = needed("pyarrow.parquet", extra="parquet")
        return parquet.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)

    def _check(self, file: Path) -> int:
        arrow = needed("pyarrow", extra="parquet")
        try:
            with self._open(file) as opened:
                schema, rows = opened.schema_arrow, int(opened.metadata.num_rows)
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{file} is not a readable Parquet file: {error}") from error
        if self.column not in schema.names:
            raise ConfigError(f"column {self.column!r} is not in {file}, which has {', '.join(schema.names)}")
        kind = schema.field(self.column).type
        if arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)):
            raise ConfigError(f"column {self.column!r} of {file} holds {kind}, neither bytes nor a struct with bytes")
        return rows

    def _from(self, row: int) -> Iterator[Item]:
        number, skip, arrow = row, row, needed("pyarrow", extra="parquet")
        for file, rows in zip(self.files, self.rows, strict=True):
            if skip >= rows:
                skip -= rows
                continue
            try:
                for payload in self._payloads(file, skip):
                    yield Item(f"{number:08d}", f"{number:08d}.png", payload)
                    number += 1
            except (arrow.ArrowException, OSError) as error:
                raise DataError(f"{file} cannot be read after row {number}: {error}") from error
            skip = 0

    def _payloads(self, file: Path, skip: int) -> Iterator[bytes | None]:
        with self._open(file) as opened:
            group = 0
            while skip >= (rows := opened.metadata.row_group(group).num_rows):
                skip, group = skip - rows, group + 1
            left = range(group, opened.num_row_groups)
            for batch in opened.iter_batches(ROWS, row_groups=left, columns=[self.column], use_threads=False):
                taken = batch.column(0).slice(min(skip, len(batch)))
                skip -= len(batch) - len(taken)
                for cell in taken.to_pylist():
                    yield cell["bytes"] if isinstance(cell, dict) else cell


def open_source(source: Path, *, out: Path, column: str) -> Folder | ParquetRows:
    """Return the images of a folder, or of one or several Parquet files.

    Raises DataError for none or both kinds, ConfigError for an `out` inside the folder or a column that is missing.
    """
    root, tables, left_out = source, [source.name], []
    if root.is_file():
        root, images = root.parent, []
    else:
        if out.is_relative_to(root):
            raise ConfigError(f"--out {out} lies in {root}, whose images are read; choose a folder outside it")
        paths = [path.relative_to(root) for path in root.rglob("*") if not path.is_dir()]
        names = sorted(path.as_posix() for path in paths if not is_hidden(path))
        images, tables = ([n for n in names if n.lower().endswith(kind)] for kind in (SUFFIXES, ".parquet"))
        others = Counter(Path(name).suffix.lower() or "no ending" for name in set(names) - {*images, *tables})
        left_out = [f"{count} files of no image type ({kind})" for kind, count in sorted(others.items())]
        if len(paths) > len(names):
            left_out.append(f"{len(paths) - len(names)} hidden files")
        if images and tables:
            raise DataError(f"{root} holds both images ({images[0]}) and Parquet files ({tables[0]}); give one kind")
    items = Folder(root, images, tuple(left_out)) if images or not tables else ParquetRows(root, tables, column)
    if not items.count:
        raise DataError(f"{source} holds no image: neither {', '.join(SUFFIXES)} nor rows of a .parquet file")
    return items


def needed(module: str, *, extra: str) -> Any:  # noqa: ANN401
    """Import a module of an optional package, or raise ConfigError with how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = f"pip install 'unperturb[{extra}]'"
        raise ConfigError(f"{module.split('.')[0]} is needed and is not installed: {remedy}") from error
