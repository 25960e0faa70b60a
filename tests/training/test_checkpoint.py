import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from hf_rsheat.errors import CheckpointError, CheckpointWriteError
from hf_rsheat.models.configuration_rs_vheat import RSVHeatConfig
from hf_rsheat.models.image_processing_rs_vheat import RSVHeatImageProcessor
from hf_rsheat.models.modeling_rs_vheat import RSVHeatForPreTraining
from hf_rsheat.training import checkpoint as checkpoint_module
from hf_rsheat.training.checkpoint import (
    TrainerState,
    gather_optimizer,
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
from hf_rsheat.training.recipe import Recipe

from .conftest import TINY_MODEL


def build(recipe):
    model = RSVHeatForPreTraining(RSVHeatConfig(**TINY_MODEL, image_size=32))
    return model, build_optimizer(model, recipe, torch.device("cpu"))


def save(folder, state, recipe, model, optimizer):
    """Save a checkpoint of everything."""
    moments = gather_optimizer(model, optimizer)
    return save_checkpoint(folder, state, recipe, model, model.state_dict(), moments, RSVHeatImageProcessor())


@pytest.fixture
def saved(tmp_path, make_recipe):
    """A run folder with checkpoints of steps 1 and 2, and the model and optimiser behind them."""
    recipe = make_recipe()
    model, optimizer = build(recipe)
    for step in (1, 2):
        model(torch.randn(1, 3, 32, 32)).loss.backward()  # leaves the SAR stem without optimiser state
        optimizer.step()
        save(tmp_path, TrainerState(step, 0, "data", {"scale": 2.0}), recipe, model, optimizer)
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
    for _, folder in list_checkpoints(saved[0]):
        (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="All checkpoints"):
        latest_checkpoint(saved[0])


def fail_at(monkeypatch, what, number):
    """Make a step of saving fail like a full disk, a read-only folder or a failed rename does."""
    error = OSError(number, os.strerror(number))

    def broken(*_, **__):
        raise error

    target = {"recipe": (Recipe, "save"), "tensors": (checkpoint_module, "save_file"), "flush": (os, "fsync")}
    monkeypatch.setattr(*target.get(what, (Path, what)), broken)


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("mkdir", errno.EROFS),
        ("recipe", errno.ENOSPC),
        ("tensors", errno.ENOSPC),
        ("flush", errno.EIO),
        ("rename", errno.EACCES),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_says_what_it_needs(
    saved, monkeypatch, what, number
):
    folder, model, optimizer, recipe = saved
    with monkeypatch.context() as patch:
        fail_at(patch, what, number)
        with pytest.raises(CheckpointWriteError) as raised:
            save(folder, TrainerState(3, 0, ""), recipe, model, optimizer)
    needed = sum(value.nbytes for value in [*model.state_dict().values(), *gather_optimizer(model, optimizer).values()])
    for part in (str(folder / "checkpoint-3"), os.strerror(number), f"({needed} bytes)", "checkpoint-2 is intact"):
        assert part in str(raised.value)
    assert latest_checkpoint(folder) == folder / "checkpoint-2"
    assert not list(folder.glob(".draft-*"))
    save(folder, TrainerState(3, 0, ""), recipe, model, optimizer)
    assert latest_checkpoint(folder) == folder / "checkpoint-3"


def test_a_full_disk_inside_of_safetensors_is_the_same_error(saved, monkeypatch):
    """What the library raises for it is no OSError."""
    folder, model, optimizer, recipe = saved
    monkeypatch.setattr(
        checkpoint_module,
        "save_file",
        lambda *_: (_ for _ in ()).throw(SafetensorError("No space left on device (os error 28)")),
    )
    with pytest.raises(CheckpointWriteError, match="No space left"):
        save(folder, TrainerState(3, 0, ""), recipe, model, optimizer)


def test_a_draft_of_a_killed_run_is_invisible_and_removed_later(saved):
    folder = saved[0]
    shutil.copytree(folder / "checkpoint-2", folder / ".draft-checkpoint-3")
    assert latest_checkpoint(folder) == folder / "checkpoint-2"
    prune_checkpoints(folder, keep=1)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]


def test_the_newest_and_every_mth_checkpoint_stay(tmp_path):
    for step in range(1, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune_checkpoints(tmp_path, keep=2, keep_every=4)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 8, 9, 10]
    prune_checkpoints(tmp_path, keep=None)
    assert len(list_checkpoints(tmp_path)) == 4


def corrupt(checkpoint, rng):
    """One random damage; returns what it was."""
    path = rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    content = path.read_bytes()
    damage = rng.choice(["flip", "truncate", "remove"]) if content else "remove"
    if damage == "flip":
        position = rng.randrange(len(content))
        flipped = content[position] ^ (1 << rng.randrange(8))
        path.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
    elif damage == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        path.unlink()
    return f"{damage} {path.name}"


def test_200_random_corruptions_are_all_detected(saved, caplog):
    """Bit flips, truncations and missing files: the newest sound checkpoint is used and the log says so."""
    folder = saved[0]
    sound = folder / "sound"
    (folder / "checkpoint-2").rename(sound)
    for seed in range(200):
        shutil.copytree(sound, folder / "checkpoint-2")
        what = corrupt(folder / "checkpoint-2", random.Random(seed))
        caplog.clear()
        assert latest_checkpoint(folder) == folder / "checkpoint-1", (seed, what)
        assert f"{folder / 'checkpoint-2'} is" in caplog.text, (seed, what)
        assert "Trying the one before" in caplog.text
        shutil.rmtree(folder / "checkpoint-2")


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
