"""The verbs `slim` and `redundancy`."""

import pytest
import typer
from typer.testing import CliRunner

from hf_rsheat import SelectiveMAEImageProcessor
from hf_rsheat.cli import slimming
from hf_rsheat.scenes import write_labelled_scenes
from hf_rsheat.slimming.folder import load_model

from .models import build

app = typer.Typer()
app.command()(slimming.slim)
app.command()(slimming.redundancy)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build("selective-mae").save_pretrained(folder)
    SelectiveMAEImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled_scenes(tmp_path_factory.mktemp("data") / "scenes", 12, 32)


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_slim_writes_a_smaller_model_and_says_how_small(model, tmp_path):
    output = run("slim", model, tmp_path / "half", "--width", "0.5")
    assert "of the compute" in output
    slimmed, _ = load_model(tmp_path / "half")
    assert slimmed.config.head_dim == 4
    assert slimmed.config.slim["correction"] is None


def test_calibration_images_mean_ridge_unless_told_otherwise(model, data, tmp_path):
    run("slim", model, tmp_path / "ridge", "--width", "0.5", "--calibrate", data, "--images", "4")
    assert load_model(tmp_path / "ridge")[0].config.slim["correction"] == "ridge"
    options = ("--calibrate", data, "--images", "4", "--keep", "importance", "--correction", "none")
    run("slim", model, tmp_path / "plain", "--width", "0.5", *options)
    assert load_model(tmp_path / "plain")[0].config.slim["correction"] is None


def test_redundancy_prints_every_width_and_where_the_report_is(model, data, tmp_path):
    options = ("--widths", "0.5", "--folds", "2", "--repeats", "1", "--untrained", "0")
    output = run("redundancy", model, "--data", data, "--out", tmp_path / "report", *options)
    assert "width 0.5" in output
    assert (tmp_path / "report" / "report.html").is_file()


def test_widths_that_are_no_numbers_are_refused(model, data, tmp_path):
    result = CliRunner().invoke(
        app, ["redundancy", str(model), "--data", str(data), "--out", str(tmp_path), "--widths", "half"]
    )
    assert result.exit_code == 2
