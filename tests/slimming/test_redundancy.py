"""The redundancy report, end to end on a tiny model."""

import csv
import json

import numpy as np
import pytest

from hf_rsheat import VHeatImageProcessor
from hf_rsheat.errors import ConfigurationError
from hf_rsheat.scenes import write_labelled_scenes
from hf_rsheat.slimming import redundancy as module
from hf_rsheat.slimming.published import PAPER_WIDTHS
from hf_rsheat.slimming.redundancy import Settings, redundancy

from .models import build

SETTINGS = Settings(correction="ridge", calibration_images=8, folds=2, repeats=2, untrained=1, latency_rounds=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build("vheat").save_pretrained(folder)
    VHeatImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled_scenes(tmp_path_factory.mktemp("data") / "scenes", 20, 32)


@pytest.fixture(scope="module")
def report(model, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    return redundancy(model, data, output, [0.25, 0.5], SETTINGS), output


def test_every_width_has_all_that_is_asked_for(report):
    rows = report[0]["rows"]
    assert [row["width"] for row in rows] == [0.25, 0.5, 1.0]
    assert rows[-1]["compute"] == 1
    assert rows[-1]["knn"]["retention"]["value"] == pytest.approx(1)
    for row in rows:
        assert 0 < row["compute"] <= 1
        assert row["relative_latency"] > 0
        for probe in ("knn", "linear"):
            low, high = row[probe]["accuracy"]["interval95"]
            assert low <= row[probe]["accuracy"]["value"] <= high
            assert "retention_above_untrained" in row[probe]
        for measure in ("feature_correlation", "explained_variance_slope", "effective_dimensionality"):
            assert np.isfinite(row[measure])
    assert rows[0]["flops"] < rows[1]["flops"] < rows[2]["flops"]
    assert rows[0]["parameters"] < rows[1]["parameters"] < rows[2]["parameters"]


def test_the_files_hold_the_same_numbers(report):
    result, output = report
    assert json.loads((output / "report.json").read_text())["rows"][0]["compute"] == result["rows"][0]["compute"]
    with (output / "report.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["knn_accuracy"]) for row in table] == [row["knn"]["accuracy"]["value"] for row in result["rows"]]
    for name in ("accuracy", "latency", "measures", "correlation"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_beside_it(report):
    page = (report[1] / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert page.count("src=") == 4
    assert "http" not in page
    assert str(report[1]) not in page


def test_started_again_only_what_is_missing_is_computed(report, model, data, monkeypatch):
    result, output = report
    measured = []
    original = module._Study._measure
    monkeypatch.setattr(
        module._Study, "_measure", lambda self, width, path: (measured.append(width), original(self, width, path))[1]
    )
    again = redundancy(model, data, output, [0.25, 0.5, 0.75], SETTINGS)
    assert measured == [0.75]
    assert again["rows"][0] == result["rows"][0]


def test_other_settings_are_measured_anew(report, model, data, monkeypatch):
    class Measured(Exception):
        pass

    def refuse(*_):
        raise Measured

    monkeypatch.setattr(module._Study, "_measure", refuse)
    with pytest.raises(Measured):
        redundancy(model, data, report[1], [0.25], Settings(folds=2, repeats=2))


def test_the_paper_has_31_widths():
    assert len(PAPER_WIDTHS) == 31
    assert list(PAPER_WIDTHS) == sorted(set(PAPER_WIDTHS))


def test_widths_outside_of_0_and_1_are_refused(model, data, tmp_path):
    with pytest.raises(ConfigurationError, match=r"in \(0, 1\]"):
        redundancy(model, data, tmp_path, [0.0])


def test_a_ratio_of_paired_scores_has_an_interval_around_it():
    rng = np.random.default_rng(0)
    theirs = rng.uniform(0.6, 0.8, 25)
    ratio = module._ratio(0.9 * theirs, theirs, 5)
    assert ratio["value"] == pytest.approx(0.9)
    np.testing.assert_allclose(ratio["interval95"], 0.9, atol=1e-12)
    noisy = module._ratio(0.9 * theirs + rng.normal(0, 0.05, 25), theirs, 5)
    assert noisy["interval95"][0] < noisy["value"] < noisy["interval95"][1]
    assert np.isnan(module._ratio(theirs, 0 * theirs, 5)["value"])
