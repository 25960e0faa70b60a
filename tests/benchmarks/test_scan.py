"""`hf-rsheat bench scan` compares the same computation, in time and memory, and says under which conditions."""

import json

import pytest
from typer.testing import CliRunner

from hf_rsheat.benchmarks.scan import ScanSize, bench_scan, measure_time, memory_in_fresh_process, report
from hf_rsheat.cli import app
from hf_rsheat.errors import ConfigurationError

TINY = ScanSize(batch=2, length=40, channels=32, state=4)


@pytest.mark.parametrize("group", ["scan", "mixer"])
def test_both_contestants_compute_the_same(group):
    result = measure_time(group, TINY, repeats=2)
    assert result["relative_difference"] < 1e-5
    assert {name: len(values) for name, values in result["seconds"].items()} == {"hf_rsheat": 2, "transformers": 2}


def test_the_result_holds_ratios_and_conditions_and_reads_as_text():
    result = bench_scan(TINY, repeats=2, memory=False)
    assert result["size"]["threads"] == 1
    assert {"load", "load_after", "torch"} <= set(result)
    scan = result["groups"]["scan"]
    ours, theirs = (scan["contestants"][name] for name in ("hf_rsheat", "transformers"))
    assert scan["speedup_minimum"] == pytest.approx(theirs["minimum"] / ours["minimum"])
    assert "1 thread(s)" in report(result)


def test_memory_is_measured_in_a_fresh_process_above_its_start():
    peaks = memory_in_fresh_process("scan", "transformers", ScanSize(length=1024, channels=256))
    states_megabytes = 2 * 1024 * 256 * 16 * 4 / 2**20
    assert 2 * states_megabytes < peaks["above_start"] < 20 * states_megabytes
    assert peaks["total"] > peaks["above_start"]


def test_the_command_line_prints_json():
    options = ["--length", "20", "--channels", "16", "--state", "2", "--repeats", "1", "--no-memory", "--json"]
    result = CliRunner().invoke(app, ["bench", "scan", *options])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["groups"]) == {"scan", "mixer"}


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigurationError, match="length"):
        ScanSize(length=0)
    with pytest.raises(ConfigurationError, match="scan, mixer"):
        measure_time("sum", TINY, 1)
    with pytest.raises(ConfigurationError, match="repeats"):
        bench_scan(TINY, repeats=0)
