"""The report from the command line: what is refused, and how."""

from pathlib import Path

import pytest

from unperturb.benchmarks.reporting import report

RESULTS = Path(report.__file__).resolve().parents[1] / "results" / "robustness"


def test_help_ends_well_and_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["--help"], 0), ([str(RESULTS), "--surprise", "1"], 2)):
        with pytest.raises(SystemExit) as stopped:
            report.main(arguments)
        assert stopped.value.code == status
    said = capsys.readouterr()
    assert report.SCRIPT in said.out
    assert "surprise" in said.err


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "report"
    assert report.main([str(RESULTS), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"{report.SCRIPT}: {out}: Not a directory\n"


def test_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(folder: Path, out: Path) -> list[Path]:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_report", interrupted)
    assert report.main([str(RESULTS)]) == 130
    assert "interrupted" in capsys.readouterr().err
