"""How every plot looks: a light and a dark theme, an empty figure, and its PNG bytes."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from unperturb.models.errors import ConfigError

DPI = 150


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a plot: what lies behind it, its text, its fainter text, its grid, and its lines in order."""

    ground: str
    ink: str
    soft: str
    grid: str
    colours: tuple[str, ...]


LIGHT = Theme(
    ground="#ffffff",
    ink="#1a1c20",
    soft="#80858f",
    grid="#e6e7e5",
    colours=("#3b6fb6", "#d1762b", "#3a9461", "#a04a8c", "#7d6b3a", "#4aa3b8"),
)
DARK = Theme(
    ground="#1a1d22",
    ink="#e9ebef",
    soft="#8d95a3",
    grid="#32363e",
    colours=("#82b1ff", "#f2a154", "#6fcf97", "#d993c8", "#cbb677", "#76cfe3"),
)


@contextmanager
def drawn_in(theme: Theme) -> Iterator[None]:
    """Draw every figure inside in the theme's colours; raise ConfigError without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError(f"plots need matplotlib ({error}); pip install 'unperturb[plots]'") from error
    settings: Any = {
        **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), theme.ground),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), theme.ink),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.soft),
        "legend.frameon": False,
        "grid.color": theme.grid,
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
    }
    with mpl.rc_context(settings):
        yield


def open_figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Any, Any, Any]:
    """Return pyplot, a figure of inches, and its axes: one, or an array [rows, columns] of them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.set_axisbelow(True)
    return plt, figure, axes[0, 0] if rows == columns == 1 else axes


def png(plt: Any, figure: Any) -> bytes:  # noqa: ANN401
    """Return the figure as a PNG file, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    plt.close(figure)
    return buffer.getvalue()
