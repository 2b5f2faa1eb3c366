"""Measurements, and the harness as a library: `unperturb.benchmarks.evaluate(model, images, labels) -> Report`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unperturb.benchmarks.reporting.report import Report
    from unperturb.benchmarks.robustness.evaluate import evaluate

__all__ = ["Report", "evaluate"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import the harness when it is asked for."""
    if name == "evaluate":
        from unperturb.benchmarks.robustness.evaluate import evaluate

        return evaluate
    if name == "Report":
        from unperturb.benchmarks.reporting.report import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
