"""Choosing weights, reading settings and running as a script behave the same for every converter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_rsheat.cli import app
from hf_rsheat.conversion import vheat
from hf_rsheat.conversion.common import open_checkpoint, parse_overrides, saved_settings, select_weights, strip_prefixes
from hf_rsheat.errors import CheckpointError, ConfigurationError

STATE = {"x": torch.ones(1)}


@pytest.mark.parametrize(
    ("checkpoint", "weights", "entry"),
    [
        (STATE, "model", "bare state dict"),
        ({"model": STATE, "model_ema": STATE, "epoch": 1}, "model", "model"),
        ({"model": STATE, "model_ema": STATE, "epoch": 1}, "model_ema", "model_ema"),
        ({"state_dict": STATE, "meta": {}}, "model", "state_dict"),
    ],
)
def test_the_weights_are_found_in_every_wrapper(checkpoint, weights, entry):
    assert select_weights(checkpoint, weights) == (entry, STATE)


@pytest.mark.parametrize(
    ("checkpoint", "weights", "message"),
    [
        ({"model": STATE}, "model_ema", "its entries are .'model'"),
        ({"model_ema": STATE, "epoch": 1}, "model", "--weights model|model_ema"),
        ([1, 2], "model", "no dictionary of tensors"),
        ({}, "model", "no dictionary of tensors"),
        ({"model": {**STATE, "step": 3}}, "model", "not tensors: step"),
    ],
)
def test_missing_weights_are_reported_with_what_is_there(checkpoint, weights, message):
    with pytest.raises(CheckpointError, match=message):
        select_weights(checkpoint, weights)


def test_unknown_weights_are_a_configuration_error():
    with pytest.raises(ConfigurationError, match="model_ema"):
        select_weights(STATE, "ema")


def test_nested_prefixes_are_stripped():
    assert strip_prefixes("module.encoder.layers.0") == "layers.0"
    assert strip_prefixes("backbone.model.norm") == "norm"
    assert strip_prefixes("decoder.encoder.x") == "decoder.encoder.x"


def test_names_that_collide_without_prefix_are_refused(tmp_path):
    torch.save({"module.x": torch.ones(1), "x": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"module\.x and x"):
        open_checkpoint(tmp_path / "x.pth", "model")


def test_the_chosen_entry_is_logged(golden, caplog):
    caplog.set_level("INFO")
    open_checkpoint(golden / "vheat/prenorm.pth", "model_ema")
    assert "reading the weights under 'model_ema'" in caplog.text


def test_overrides_are_typed():
    pairs = ["post_norm=true", "layer_scale_init_value=None", "depths=[1,1,2,1]", "drop_path_rate=0.1", "name=a=b"]
    expected = {"post_norm": True, "layer_scale_init_value": None, "depths": [1, 1, 2, 1], "drop_path_rate": 0.1}
    assert parse_overrides(pairs) == {**expected, "name": "a=b"}
    with pytest.raises(ConfigurationError, match="KEY=VALUE"):
        parse_overrides(["post_norm"])


def test_settings_are_read_from_mmengine_text_only_if_unambiguous():
    text = "model = dict(backbone=dict(post_norm=True, layer_scale=1e-05))"
    assert saved_settings({"meta": {"cfg": text}}) == {"post_norm": True}
    assert saved_settings({"meta": {"cfg": text + "\npost_norm = False"}}) == {}
    assert saved_settings(STATE) == {}


def test_the_converter_runs_as_a_script(golden, tmp_path):
    command = [sys.executable, vheat.__file__, str(golden / "vheat/prenorm.pth"), str(tmp_path / "out")]
    options = ["--weights", "model_ema", "--set", "drop_path_rate=0.2"]
    run = subprocess.run([*command, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "reading the weights under 'model_ema'" in run.stderr
    assert str(tmp_path / "out") in run.stdout
    assert json.loads((Path(tmp_path) / "out/config.json").read_text())["drop_path_rate"] == 0.2


def test_a_bad_option_is_one_sentence_and_a_failure(golden, tmp_path, monkeypatch, capsys):
    command = ["vheat.py", str(golden / "vheat/prenorm.pth"), str(tmp_path / "out"), "--set", "post_nrm=true"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        vheat.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "did you mean 'post_norm'" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("family", "option"), [("vheat", "--to=vit"), ("selective-mae", "--resize=bicubic")])
def test_an_option_of_another_family_is_refused_before_anything_is_read(tmp_path, family, option):
    arguments = ["convert", family, str(tmp_path / "absent.pth"), str(tmp_path / "model"), option]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"'{family}' has no such option" in result.output
