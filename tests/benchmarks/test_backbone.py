"""`hf-rsheat bench backbone` compares whole models fairly and says what it compared."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

from hf_rsheat.benchmarks import backbone, contestants, report
from hf_rsheat.benchmarks.macs import count_macs
from hf_rsheat.benchmarks.vheat_reference import ReferenceVHeat
from hf_rsheat.cli import app
from hf_rsheat.errors import BenchmarkError, ConfigurationError
from hf_rsheat.models.configuration_rs4d import RS4DConfig
from hf_rsheat.models.configuration_vheat import VHeatConfig
from hf_rsheat.models.modeling_rs4d import RS4DModel
from hf_rsheat.models.modeling_vheat import VHeatForImageClassification

PAIR = ["vheat-tiny", "vheat-tiny-reference"]


@pytest.fixture(scope="module")
def result():
    return backbone.bench_backbone(PAIR, [32, 64], repeats=1, memory=False)


def test_the_reference_formulation_computes_what_our_model_computes():
    torch.manual_seed(0)
    config = VHeatConfig(image_size=64, hidden_sizes=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_labels=5)
    model = VHeatForImageClassification(config).eval()
    for stage in model.vheat.encoder.stages:  # at initialisation heat hardly flows
        torch.nn.init.normal_(stage.frequency_embedding)
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            ReferenceVHeat(model)(pixel_values), model(pixel_values).logits, atol=2e-5, rtol=1e-4
        )


def test_every_run_has_times_ratios_and_arithmetic_of_every_model(result):
    assert [run["image_size"] for run in result["runs"]] == [32, 64]
    for run in result["runs"]:
        assert list(run["models"]) == PAIR
        ours, reference = run["models"].values()
        assert ours["ratio"] == 1
        assert reference["ratio"] == pytest.approx(reference["minimum"] / ours["minimum"])
        assert ours["macs"] == reference["macs"] > 0
        assert ours["parameters"] == reference["parameters"] > 3e7
    assert {"threads", "load", "versions"} <= set(result["conditions"])


def test_the_table_names_models_and_conditions_and_the_growth_with_pixels(result):
    text = report.table(result)
    assert all(name in text for name in PAIR)
    assert "1 thread(s)" in text
    assert set(report.growth(result)) == set(PAIR)
    same = copy.deepcopy(result)
    for run, factor in zip(same["runs"], (1, 4), strict=True):
        run["models"]["vheat-tiny"]["minimum"] = 0.5 * factor
    assert report.growth(same)["vheat-tiny"] == pytest.approx(1.0)


def test_a_worse_ratio_fails_the_check_and_a_better_one_passes(result):
    stored = copy.deepcopy(result)
    assert len(report.check(result, stored)) == 4
    for run in stored["runs"]:
        run["models"]["vheat-tiny-reference"]["ratio"] *= 0.8
    with pytest.raises(BenchmarkError, match=r"64 px, batch 1, vheat-tiny-reference"):
        report.check(result, stored)
    for run in stored["runs"]:
        run["image_size"] += 1
    with pytest.raises(BenchmarkError, match="in common"):
        report.check(result, stored)


def test_a_chart_is_drawn(result, tmp_path):
    report.chart(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_step_reaches_all_weights_and_memory_counts_what_it_keeps():
    run = backbone.BackboneRun(image_size=32, train=True)
    model = contestants.build("vheat-tiny", 32)
    backbone._step("vheat-tiny", model, run, backbone._images(run))()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    peaks = backbone.in_fresh_process("hf_rsheat.benchmarks.backbone", ["vheat-tiny", vars(run)])
    assert peaks["total"] > peaks["above_start"] > 1


def test_multiply_adds_of_the_scan_are_added_to_the_matrix_products():
    config = RS4DConfig(image_size=32, hidden_size=32, inner_size=64, num_hidden_layers=2, state_size=4)
    model = RS4DModel(config).eval()
    macs = count_macs(model, torch.zeros(1, 3, 32, 32))
    tokens, orders = 4, len(config.orders)
    scans = 3 * tokens * orders * 64 * 4 * 2
    projections = tokens * 32 * (16 * 16 * 3) + 2 * tokens * (32 * 128 + 64 * 32)
    assert macs > projections + scans
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("changes", [{"models": ["vheat-tny"]}, {"models": []}, {"repeats": 0}, {"sizes": [0]}])
def test_impossible_contests_are_refused(changes):
    settings = {"models": ["vheat-tiny"], "sizes": [32], "repeats": 1, "memory": False, **changes}
    with pytest.raises(ConfigurationError):
        backbone.bench_backbone(**settings)


def test_the_command_line_prints_json_and_refuses_words_for_sizes():
    options = ["bench", "backbone", "--models", "vheat-tiny", "--repeats", "1", "--no-memory", "--json"]
    result = CliRunner().invoke(app, [*options, "--size", "32"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runs"][0]["image_size"] == 32
    assert CliRunner().invoke(app, [*options, "--size", "large"]).exit_code == 2


def test_half_precision_is_measured_as_well():
    result = backbone.bench_backbone(["vheat-tiny"], [32], repeats=1, memory=False, dtype="bfloat16")
    (run,) = result["runs"]
    assert run["dtype"] == "bfloat16"
    assert run["models"]["vheat-tiny"]["macs"] > 0


def test_fused_models_compete_with_the_models_they_are_made_of():
    result = backbone.bench_backbone(["vheat-tiny", "vheat-tiny+fused"], [32], repeats=1)
    own, fused = result["runs"][0]["models"].values()
    assert own["macs"] == fused["macs"] > 0
    assert fused["total"] > 0
    with pytest.raises(ConfigurationError, match="fused"):
        backbone.bench_backbone(["vheat-tiny+fused"], [32], repeats=1, memory=False, train=True)
    with pytest.raises(ConfigurationError, match="fused"):
        backbone.bench_backbone(["convnext-tiny+fused"], [32], repeats=1, memory=False)
