"""What made an artefact."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from unperturb.models import provenance


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], cwd=folder, check=True)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Leaves no commit of another folder behind."""
    yield
    provenance.commit.cache_clear()


def commit_now() -> str | None:
    provenance.commit.cache_clear()
    return provenance.commit()


@pytest.mark.usefixtures("forgotten")
def test_commit_tells_changed_code_but_not_new_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, figures = tmp_path / "models" / "a.py", tmp_path / "benchmarks" / "results" / "a.json"
    for file in (code, figures):
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert commit_now() is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = commit_now()
    assert clean is not None
    assert len(clean) == 40
    installed = tmp_path / ".venv" / "provenance.py"  # within a checkout of something else
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert commit_now() is None
    monkeypatch.setattr(provenance, "__file__", str(code))
    figures.write_text("2\n")
    assert commit_now() == clean
    code.write_text("2\n")
    assert commit_now() == clean + "+changes"
    code.write_text("1\n")
    assert provenance.commit() == clean + "+changes"  # as at the first call
    assert commit_now() == clean
