"""`hf-rsheat bench slim` measures cut models beside the full ones."""

import copy
import json

import pytest
from typer.testing import CliRunner

from hf_rsheat.benchmarks import contestants, report, slim
from hf_rsheat.cli import app
from hf_rsheat.errors import BenchmarkError, ConfigurationError

MODELS = ["rs4d-small", "selective-mae-small"]


@pytest.fixture(scope="module")
def result():
    return slim.bench_slim(MODELS, [0.5], sizes=[32], repeats=1, memory=False)


def test_every_width_is_beside_its_own_full_model_and_needs_less(result):
    assert [list(run["models"]) for run in result["runs"]] == [[name, f"{name}@0.5"] for name in MODELS]
    for run in result["runs"]:
        full, half = run["models"].values()
        assert full["ratio"] == 1
        assert half["ratio"] == pytest.approx(half["minimum"] / full["minimum"])
        assert 0.4 * full["macs"] < half["macs"] < 0.7 * full["macs"]
        assert 0.4 * full["parameters"] < half["parameters"] < 0.7 * full["parameters"]


def test_the_table_the_chart_and_the_check_know_all_models(result, tmp_path):
    assert all(name in report.table(result) for run in result["runs"] for name in run["models"])
    slim.chart(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    stored = copy.deepcopy(result)
    assert len(report.check(result, stored)) == 4
    stored["runs"][0]["models"]["rs4d-small@0.5"]["ratio"] *= 0.8
    with pytest.raises(BenchmarkError, match="rs4d-small@0"):
        report.check(result, stored)


def test_growth_is_every_models_own(result):
    larger = copy.deepcopy(result)
    for run in larger["runs"]:
        run["image_size"] *= 2
        for row in run["models"].values():
            row["minimum"] *= 4
    merged = {"runs": [run for pair in zip(result["runs"], larger["runs"], strict=True) for run in pair]}
    assert report.growth(result) == {}
    growth = report.growth(merged)
    assert growth == pytest.approx(dict.fromkeys(growth, 1.0))
    assert len(growth) == 4


@pytest.mark.parametrize(
    ("models", "widths"), [(["rs4d-small"], []), (["rs4d-small"], [1.5]), (["swin-tiny"], [0.5]), ([], [0.5])]
)
def test_impossible_cuts_are_refused(models, widths):
    with pytest.raises(ConfigurationError):
        slim.bench_slim(models, widths, sizes=[32], repeats=1, memory=False)


def test_a_cut_contestant_has_a_name():
    assert contestants.build("rs4d-small@0.5", 32).config.slim["width_multiplier"] == 0.5
    with pytest.raises(ConfigurationError, match="number above 0"):
        contestants.build("rs4d-small@half", 32)


def test_the_command_line_prints_json_and_refuses_words_for_widths():
    options = ["bench", "slim", "--models", "rs4d-small", "--size", "32", "--repeats", "1", "--no-memory", "--json"]
    printed = CliRunner().invoke(app, [*options, "--widths", "0.5"])
    assert printed.exit_code == 0, printed.output
    assert list(json.loads(printed.stdout)["runs"][0]["models"]) == ["rs4d-small", "rs4d-small@0.5"]
    assert CliRunner().invoke(app, [*options, "--widths", "half"]).exit_code == 2
