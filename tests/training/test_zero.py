"""DeepSpeed (ZeRO) on two CPU processes, where it is installed; what it refuses, everywhere."""

import importlib
import importlib.util
import os
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from hf_rsheat.errors import ConfigurationError, MissingExtraError
from hf_rsheat.training import zero
from hf_rsheat.training.environment import build_accelerator
from hf_rsheat.training.journal import read_lines
from hf_rsheat.training.objectives import get_objective

from .conftest import write_image
from .processes import Training, assert_same_run, tiny

SETTINGS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}


def configured(stage=2, mixed_precision="no", **settings):
    config = {"zero_optimization": {"stage": stage, **settings}}
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)))
    zero.configure(accelerator, SimpleNamespace(mixed_precision=mixed_precision, max_grad_norm=2), True)
    return config


def test_the_recipe_decides_what_a_configuration_would_and_the_rest_is_refused():
    assert configured()["gradient_clipping"] == 2.0
    with pytest.raises(ConfigurationError, match=r"got 3: use examples/accelerate/fsdp2\.yaml"):
        configured(stage=3)
    with pytest.raises(ConfigurationError, match="without offloading"):
        configured(offload_optimizer={"device": "cpu"})
    with pytest.raises(ConfigurationError, match="bf16 or no"):
        configured(mixed_precision="fp16")


def test_deepspeed_that_is_not_installed_is_named(monkeypatch, make_recipe):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="needs deepspeed"):
        build_accelerator(make_recipe(), get_objective("mae"))


def use_deepspeed():
    """What `accelerate launch` with examples/accelerate/deepspeed.yaml tells its processes."""
    backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute, that is torch itself
    backend.build_shm_op = lambda: None  # minutes of compiling, for an all-reduce in shared memory
    del os.environ["ACCELERATE_USE_CPU"]
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=os.environ.get("STAGE", "2"))


def stop_after_four():
    import signal

    from .test_signals import signal_self

    use_deepspeed()
    signal_self(signal.SIGTERM, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["1", "2"])
def test_deepspeed_trains_resumes_and_leaves_checkpoints_for_everybody(tmp_path, monkeypatch, stage):
    """As two plain processes to 1e-4; a stopped run ends with the same bits; one process continues its checkpoint."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("STAGE", stage)
    for index in range(20):
        write_image(tmp_path / "images" / f"{index}.png", index)

    def recipe(name, **changes):
        values = {"objective": "mae", "model": SETTINGS, "batch_size": 6, "max_steps": 8, "ema_decay": 0.9}
        values |= {"gradient_accumulation_steps": 2, "save_steps": 4}
        return tiny(tmp_path / "images", tmp_path / name, **{**values, **changes})

    assert Training(recipe("plain"), processes=2).finish(600) == [0, 0]
    assert Training(recipe("zero"), processes=2, prepare=use_deepspeed).finish(600) == [0, 0]
    losses = [[line["loss"] for line in read_lines(tmp_path / name / "log.jsonl")] for name in ("plain", "zero")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    moments = [load_file(tmp_path / name / "checkpoint-8" / "optimizer.safetensors") for name in ("plain", "zero")]
    assert moments[0].keys() == moments[1].keys()
    assert all(value.shape == moments[1][name].shape for name, value in moments[0].items())

    stopped = recipe("stopped")
    assert Training(stopped, processes=2, prepare=stop_after_four).finish(600) == [143, 143]
    assert Training(stopped, resume=True, processes=2, prepare=use_deepspeed).finish(600) == [0, 0]
    assert_same_run(tmp_path / "zero", tmp_path / "stopped")

    handed_over = recipe("handed", max_steps=8)
    assert Training(handed_over, processes=2, prepare=stop_after_four).finish(600) == [143, 143]
    assert Training(handed_over, resume=True).finish(600) == [0]
    found = [line["loss"] for line in read_lines(tmp_path / "handed" / "log.jsonl")]
    assert found == pytest.approx(losses[0], rel=1e-4)
