"""The digest of the code that computes a unit: a unit that other code has stored is not taken for this code's."""

import shutil
from pathlib import Path

import pytest

from unperturb.benchmarks.robustness.units import ROOT, code_digest


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources of models/ and benchmarks/."""
    for name in ("models", "benchmarks"):
        for file in (ROOT / name).rglob("*.py"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return tmp_path


def test_copied_tree_has_the_same_digest(tree: Path) -> None:
    assert code_digest(tree) == code_digest()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("models/errors.py", True),
        ("models/networks/classifier.py", True),
        ("models/purifiers/base.py", True),
        ("benchmarks/robustness/evaluation.py", True),
        ("benchmarks/robustness/attacks/adaptive.py", True),
        ("benchmarks/reporting/report.py", False),
        ("benchmarks/reporting/rows.py", False),
    ],
)
def test_changed_file_changes_the_digest_where_units_depend_on_it(tree: Path, file: str, changes: bool) -> None:
    with (tree / file).open("a") as source:
        source.write("# changed\n")
    assert (code_digest(tree) != code_digest()) == changes


@pytest.mark.parametrize(
    ("file", "changes"), [("models/networks/deep/new.py", True), ("benchmarks/reporting/new.py", False)]
)
def test_new_file_changes_the_digest_where_units_depend_on_it(tree: Path, file: str, changes: bool) -> None:
    (tree / file).parent.mkdir(exist_ok=True)
    (tree / file).write_text("")
    assert (code_digest(tree) != code_digest()) == changes
