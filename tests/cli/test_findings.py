"""``bmm report --analysis --figures``."""

import json

import pytest
from bmm_cli.report import command
from click.testing import CliRunner

import bmm
from bmm.errors import StudyError
from bmm.report import parameter_label
from tests.analysis.studies import killed_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return killed_study(tmp_path_factory.mktemp("findings") / "run", budget=30, kill_at=24)


def report(*args):
    done = CliRunner().invoke(command, list(map(str, args)))
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_analysis_is_printed_with_the_report(folder):
    found, text = bmm.analyse(folder), report(folder, "--analysis")
    assert text.startswith(report(folder))
    after = text.split("## Analysis")[1]
    first, worst = found.importance[0], found.ablations[0]
    for words in (
        f"{first.total:.1%}", f"{first.lengthscale:.2f}", f"{worst.change.mean:+.4f}", f"{found.prediction.r2:.2f}",
        f"{found.prediction.r2_refitted:.2f}", f"trial {found.certainty.best.trial}", "over the anchor", "patch",
    ):  # fmt: skip
        assert words in after
    assert "\x1b[" not in text


def test_what_matters_least_is_counted(folder, monkeypatch):
    monkeypatch.setattr("bmm_cli.findings._SHOWN", 4)
    text = report(folder, "--analysis")
    assert "and 2 more" in text
    shown = [i.parameter for i in bmm.analyse(folder).importance]
    assert parameter_label(shown[3]) in text
    assert parameter_label(shown[4]) not in text


def test_names_are_no_markup(folder, monkeypatch):
    found = bmm.analyse(folder).to_json()
    found["ablations"][0]["group"] = "[red]x[/red]"
    monkeypatch.setattr(bmm.api, "analyse", lambda _: bmm.analysis.Analysis.from_json(found))
    assert "[red]x[/red]" in report(folder, "--analysis")


def test_json_holds_the_analysis_and_the_files(folder, tmp_path):
    data = json.loads(report(folder, "--analysis", "--figures", tmp_path / "f", "--json"))
    assert data["analysis"] == bmm.analyse(folder).to_json()
    assert data["figures"] == [
        str(tmp_path / "f" / f"{n}.html") for n in ("importance", "effects", "prediction", "progress")
    ]
    assert "analysis" not in json.loads(report(folder, "--json"))


def test_figures_alone_are_written_and_named(folder, tmp_path):
    text = report(folder, "--figures", tmp_path / "f")
    assert "## Analysis" not in text
    for path in (tmp_path / "f").iterdir():
        assert str(path) in text


def test_a_study_too_young_prints_an_error_only(tmp_path):
    young = killed_study(tmp_path / "run", budget=20, kill_at=5)
    assert "trial" in report(young)
    with pytest.raises(StudyError, match="needs 8 completed trials"):
        report(young, "--analysis", "--figures", tmp_path / "f")
    assert not (tmp_path / "f").exists()
