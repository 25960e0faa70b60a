import os
import subprocess
import sys

import pytest

from hf_rsheat.training.loop import train

from .conftest import TINY_MODEL, read_log


def test_two_processes_take_the_same_steps_as_one(make_recipe, tmp_path):
    """Pairs, an unreadable image, and a batch of one sample, which leaves the second process without data."""
    model = {**TINY_MODEL, "drop_path_rate": 0.0}
    one = make_recipe(model=model)
    train(one)
    two = make_recipe(model=model, output_dir=str(tmp_path / "two"), gradient_accumulation_steps=2)
    two.save(tmp_path / "two.yaml")
    # `accelerate launch --cpu --num_processes 2` would silently start one process.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, "-m", "hf_rsheat.train", "--config", str(tmp_path / "two.yaml")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 process(es)" in result.stderr
    expected, found = read_log(one.output_dir), read_log(two.output_dir)
    assert [line["group"] for line in found] == [line["group"] for line in expected]
    assert [line["images"] for line in found] == [line["images"] for line in expected]
    assert 1 in [line["images"] for line in found]
    for before, after in zip(expected, found, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-6, abs=1e-6)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    assert (tmp_path / "two" / "skipped.jsonl").read_text() == (tmp_path / "run" / "skipped.jsonl").read_text()
    assert (tmp_path / "two" / "hub" / "model.safetensors").exists()
