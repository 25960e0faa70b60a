"""`hf-rsheat bench instances` compares whole detectors that all do their published work."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hf_rsheat.benchmarks import instances, report
from hf_rsheat.benchmarks.macs import count_macs, count_macs_of_pass
from hf_rsheat.cli import app
from hf_rsheat.errors import BenchmarkError, ConfigurationError
from hf_rsheat.models.configuration_rs4d import RS4DConfig
from hf_rsheat.models.modeling_rs4d import RS4DModel
from tests.zoo import instance_config


class Queries(nn.Module):
    """As many masks as queries."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 4, stride=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images)


@pytest.fixture
def tiny(monkeypatch):
    """Contestants that take no time, ours among them."""
    from hf_rsheat.models import configuration_rs4d_instances

    def config(**fields):
        fields.pop("backbone_config")
        return instance_config(head=fields.pop("head"), **fields)

    monkeypatch.setattr(configuration_rs4d_instances, "RS4DInstanceConfig", config)
    monkeypatch.setattr(instances, "PROPOSALS", 20)
    monkeypatch.setattr(instances, "DETECTIONS", 6)
    monkeypatch.setitem(instances._BUILDERS, "queries", lambda _: instances.Detector(Queries(), lambda x: x, 5))


def test_every_detector_makes_its_published_number_of_masks(tiny):
    names = ["queries", "rs4d-base-bbox", "rs4d-base-prompt"]
    result = instances.bench_instances(names, [64], (2,), repeats=1, memory=False)
    (run,) = result["runs"]
    assert [run["models"][name]["objects"] for name in names] == [5, 6, 6]
    assert run["models"]["queries"]["ratio"] == 1
    assert run["models"]["queries"]["macs"] == 2 * 16 * 16 * 3 * 5 * 16
    assert run["models"]["rs4d-base-bbox"]["macs"] > 0
    text = report.table(result)
    assert "20 proposals and 6 detections" in text
    assert all(name in text for name in names)
    assert len(report.check(result, result)) == 3


def test_a_detector_that_finds_another_number_is_not_timed(tiny, monkeypatch):
    monkeypatch.setitem(instances._BUILDERS, "queries", lambda _: instances.Detector(Queries(), lambda x: x, 4))
    with pytest.raises(BenchmarkError, match=r"4 objects per image .* not \[5\]"):
        instances.bench_instances(["queries"], [64], repeats=1, memory=False)


@pytest.mark.parametrize("changes", [{"models": ["quries"]}, {"models": []}, {"repeats": 0}, {"sizes": [0]}])
def test_impossible_contests_are_refused(tiny, changes):
    settings = {"models": ["queries"], "sizes": [64], "repeats": 1, "memory": False, **changes}
    with pytest.raises(ConfigurationError):
        instances.bench_instances(**settings)


def test_multiply_adds_of_a_real_pass_are_those_of_a_counted_one():
    config = RS4DConfig(image_size=32, hidden_size=32, inner_size=64, num_hidden_layers=2, state_size=4)
    model, images = RS4DModel(config).eval(), torch.zeros(1, 3, 32, 32)
    assert count_macs_of_pass(model, images) == count_macs(model, images)
    assert not model.encoder.layers[0].mixer._forward_pre_hooks


def test_the_command_line_prints_json_and_draws(tiny, tmp_path):
    options = ["bench", "instances", "--models", "queries", "--size", "64,32", "--repeats", "1", "--no-memory"]
    result = CliRunner().invoke(app, [*options, "--json", "--chart", str(tmp_path / "chart.png")])
    assert result.exit_code == 0, result.output
    assert [run["image_size"] for run in json.loads(result.stdout)["runs"]] == [64, 32]
    assert (tmp_path / "chart.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", instances.names())
def test_all_contestants_are_real(name):
    run = instances.InstanceRun(image_size=128)
    (row,) = instances._contest([name], run, 1).values()
    assert row["objects"] >= 100
    assert row["parameters"] > 3e7
    peaks = instances.in_fresh_process("hf_rsheat.benchmarks.instances", [name, vars(run)])
    assert peaks["total"] > peaks["above_start"] > 1
