"""`hf-rsheat bench heat` compares ways to compute the same."""

import json

import pytest
import scipy.fft
import torch
from typer.testing import CliRunner

from hf_rsheat.benchmarks.heat import HeatRun, contestants, dct2_by_fft, idct2_by_fft
from hf_rsheat.cli import app
from hf_rsheat.errors import ConfigurationError


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_the_fft_is_the_orthonormal_dct(size):
    x = torch.randn(3, size, 2, generator=torch.Generator().manual_seed(0))
    coefficients = dct2_by_fft(x, 1)
    torch.testing.assert_close(coefficients, torch.from_numpy(scipy.fft.dct(x.numpy(), axis=1, norm="ortho")))
    torch.testing.assert_close(idct2_by_fft(coefficients, 1), x)


@torch.inference_mode()
def test_all_ways_compute_the_same():
    results = {name: run() for name, run in contestants(HeatRun(image_size=60, batch=2, channels=8)).items()}
    restated = results["operator: original restated"].permute(0, 2, 3, 1)
    torch.testing.assert_close(results["operator"], restated, atol=2e-5, rtol=1e-4)
    for name in ("core: original restated", "core: FFT"):
        torch.testing.assert_close(results["core"], results[name], atol=2e-5, rtol=1e-4)


def test_the_command_line_prints_times_and_limits(tmp_path):
    options = ["bench", "heat", "--size", "32,64", "--channels", "8", "--repeats", "1", "--no-memory"]
    text = CliRunner().invoke(app, options).stdout
    assert "by arithmetic" in text
    assert "time grows" in text
    result = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert [run["image_size"] for run in result["runs"]] == [32, 64]


@pytest.mark.parametrize("values", [{"image_size": 30}, {"image_size": 32, "channels": 0}])
def test_bad_sizes_are_refused(values):
    with pytest.raises(ConfigurationError, match="got"):
        HeatRun(**values)
