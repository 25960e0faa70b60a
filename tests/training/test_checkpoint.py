import json

import pytest
import torch

from hf_rsheat.errors import CheckpointError
from hf_rsheat.models.configuration_rs_vheat import RSVHeatConfig
from hf_rsheat.models.image_processing_rs_vheat import RSVHeatImageProcessor
from hf_rsheat.models.modeling_rs_vheat import RSVHeatForPreTraining
from hf_rsheat.training.checkpoint import (
    TrainerState,
    latest_checkpoint,
    list_checkpoints,
    load_optimizer,
    load_state,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
    verify,
)
from hf_rsheat.training.optimization import build_optimizer

from .conftest import TINY_MODEL


def build(recipe):
    model = RSVHeatForPreTraining(RSVHeatConfig(**TINY_MODEL, image_size=32))
    return model, build_optimizer(model, recipe, torch.device("cpu"))


@pytest.fixture
def saved(tmp_path, make_recipe):
    """A run folder with checkpoints of steps 1 and 2, and the model and optimiser behind them."""
    recipe = make_recipe()
    model, optimizer = build(recipe)
    for step in (1, 2):
        model(torch.randn(1, 3, 32, 32)).loss.backward()  # leaves the SAR stem without optimiser state
        optimizer.step()
        state = TrainerState(step, 0, "data", {"scale": 2.0})
        save_checkpoint(tmp_path, state, recipe, model, model.state_dict(), optimizer, RSVHeatImageProcessor())
    return tmp_path, model, optimizer, recipe


def test_model_optimiser_and_state_come_back_to_the_bit(saved):
    folder, model, optimizer, recipe = saved
    checkpoint = latest_checkpoint(folder)
    assert checkpoint.name == "checkpoint-2"
    assert load_state(checkpoint) == TrainerState(2, 0, "data", {"scale": 2.0})
    other, other_optimizer = build(recipe)
    load_weights(checkpoint, other)
    load_optimizer(checkpoint, other, other_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    before, after = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    for index, entries in before.items():
        assert all(torch.equal(value, after[index][key]) for key, value in entries.items())


def test_nothing_in_a_checkpoint_is_a_pickle(saved):
    suffixes = {path.suffix for path in saved[0].rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(saved, name, damage, caplog):
    path = saved[0] / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError):
        verify(path.parent)
    assert latest_checkpoint(saved[0]).name == "checkpoint-1"
    assert "Trying the one before" in caplog.text


def test_a_run_with_damaged_checkpoints_only_is_an_error(saved):
    for _, checkpoint in list_checkpoints(saved[0]):
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="All checkpoints"):
        latest_checkpoint(saved[0])


def test_an_unfinished_save_is_invisible_and_removed_later(saved, monkeypatch):
    folder, model, optimizer, recipe = saved
    monkeypatch.setattr(type(recipe), "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(
            folder, TrainerState(3, 0, ""), recipe, model, model.state_dict(), optimizer, RSVHeatImageProcessor()
        )
    assert [step for step, _ in list_checkpoints(folder)] == [1, 2]
    prune_checkpoints(folder, keep=1)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]


def test_checkpoints_sort_by_number(tmp_path):
    for step in (900, 1000, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 900, 1000]


def test_weights_that_do_not_fit_and_foreign_optimiser_state_are_errors(saved, tmp_path):
    folder, _, _, recipe = saved
    wide = RSVHeatForPreTraining(RSVHeatConfig(**{**TINY_MODEL, "hidden_sizes": [8, 16, 32, 72]}, image_size=32))
    with pytest.raises(CheckpointError, match="do not fit"):
        load_weights(folder / "checkpoint-1", wide)
    optical = RSVHeatForPreTraining(RSVHeatConfig(**TINY_MODEL, modalities={"sar": 1}, image_size=32))
    with pytest.raises(CheckpointError, match="not being trained"):
        load_optimizer(folder / "checkpoint-1", optical, build_optimizer(optical, recipe, torch.device("cpu")))


def test_a_state_of_another_version_is_an_error(saved):
    path = saved[0] / "checkpoint-1" / "trainer_state.json"
    path.write_text(json.dumps({"steps": 1}))
    with pytest.raises(CheckpointError, match="trainer state"):
        load_state(path.parent)
