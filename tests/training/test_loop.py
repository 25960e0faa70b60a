import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_rsheat.errors import ConfigurationError, DataError, MissingExtraError, TrainingError, TransferError
from hf_rsheat.hub import verify
from hf_rsheat.training import loop, publishing
from hf_rsheat.training.loop import train
from hf_rsheat.training.objectives.rs_vheat import RSVHeatPretraining
from hf_rsheat.training.randomness import derive_seed

from .conftest import TINY_MODEL, read_log

LASTING = ("step", "loss", "epoch", "group", "images", "spatial", "frequency", "contrastive", "grad_norm")


def lasting(output_dir):
    """The log without what depends on the clock."""
    return [{name: line[name] for name in LASTING if name in line} for line in read_log(output_dir)]


def weights(output_dir):
    return load_file(Path(output_dir) / "hub" / "model.safetensors")


def assert_equal_runs(first, second):
    assert lasting(first) == lasting(second)
    expected, found = weights(first), weights(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.fixture(scope="module")
def reference(tmp_path_factory, scenes):
    """A finished run of 6 steps with drop path, two epochs of optical, SAR and paired batches."""
    from hf_rsheat.training.recipe import Recipe

    recipe = Recipe(
        objective="rs_vheat",
        image_folder=str(scenes),
        output_dir=str(tmp_path_factory.mktemp("reference")),
        image_size=32,
        model=dict(TINY_MODEL),
        batch_size=4,
        max_steps=6,
        save_steps=3,
        warmup_steps=2,
        learning_rate=1e-3,
        num_workers=0,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(recipe)
    torch.set_num_threads(threads)
    return recipe


def test_a_run_leaves_what_it_promises(reference):
    output_dir = Path(reference.output_dir)
    names = {path.name for path in output_dir.iterdir()}
    assert names - {"tensorboard"} == {
        ".lock",
        "recipe.yaml",
        "log.jsonl",
        "skipped.jsonl",
        "checkpoint-3",
        "checkpoint-6",
        "hub",
    }
    lines = read_log(output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    expected = {"loss", "spatial", "frequency", "learning_rate", "grad_norm", "samples_per_second", "data_wait"}
    assert all(expected <= line.keys() for line in lines)
    assert {line["group"] for line in lines} == {"optical", "sar", "optical+sar"}
    assert all(("contrastive" in line) == (line["group"] == "optical+sar") for line in lines)
    skipped = [json.loads(line) for line in (output_dir / "skipped.jsonl").read_text().splitlines()]
    assert [line["path"] for line in skipped] == ["optical/broken.png"]


def test_the_logged_loss_is_the_weighted_sum_of_the_logged_terms(reference):
    for line in read_log(reference.output_dir):
        assert line["loss"] == pytest.approx(line["spatial"] + line["frequency"] + line.get("contrastive", 0))


def test_the_hub_folder_holds_the_trained_model(reference):
    from transformers import AutoImageProcessor, AutoModelForPreTraining

    import hf_rsheat  # noqa: F401  registers the model types

    hub = Path(reference.output_dir) / "hub"
    model = AutoModelForPreTraining.from_pretrained(hub)
    checkpoint = load_file(Path(reference.output_dir) / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(value, checkpoint[name]) for name, value in model.state_dict().items())
    assert AutoImageProcessor.from_pretrained(hub).size["height"] == 32


def test_the_card_tells_the_settings_but_no_paths(reference):
    card = (Path(reference.output_dir) / "hub" / "README.md").read_text()
    assert "| `learning_rate` | `0.001` |" in card
    assert str(Path(reference.output_dir).parent) not in card
    assert str(Path(reference.image_folder).parent) not in card


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_continues_to_the_same_bits(reference, tmp_path, make_recipe, num_workers):
    output_dir = tmp_path / "killed"
    shutil.copytree(reference.output_dir, output_dir)
    shutil.rmtree(output_dir / "checkpoint-6")
    shutil.rmtree(output_dir / "hub")
    with (output_dir / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    recipe = make_recipe(output_dir=str(output_dir), num_workers=num_workers)
    train(recipe, resume=True)
    assert_equal_runs(reference.output_dir, output_dir)


def test_workers_and_log_blocks_change_nothing(reference, make_recipe):
    recipe = make_recipe(num_workers=2, logging_steps=4, save_steps=5)
    train(recipe)
    assert_equal_runs(reference.output_dir, recipe.output_dir)


def test_resuming_a_finished_run_exports_again_and_changes_nothing(reference, tmp_path, make_recipe):
    output_dir = tmp_path / "done"
    shutil.copytree(reference.output_dir, output_dir)
    shutil.rmtree(output_dir / "hub")
    train(make_recipe(output_dir=str(output_dir)), resume=True)
    assert_equal_runs(reference.output_dir, output_dir)


def test_a_damaged_newest_checkpoint_costs_steps_but_no_bit(reference, tmp_path, make_recipe, caplog):
    output_dir = tmp_path / "damaged"
    shutil.copytree(reference.output_dir, output_dir)
    (output_dir / "checkpoint-6" / "optimizer.safetensors").write_bytes(b"")
    train(make_recipe(output_dir=str(output_dir)), resume=True)
    assert "Trying the one before" in caplog.text
    assert_equal_runs(reference.output_dir, output_dir)


def test_resuming_from_a_path_continues_in_another_folder(reference, make_recipe):
    recipe = make_recipe()
    train(recipe, resume=Path(reference.output_dir) / "checkpoint-3")
    assert lasting(recipe.output_dir) == lasting(reference.output_dir)[3:]


def test_a_finished_checkpoint_from_elsewhere_is_exported(reference, make_recipe):
    recipe = make_recipe()
    train(recipe, resume=Path(reference.output_dir) / "checkpoint-6")
    assert all(
        torch.equal(value, weights(reference.output_dir)[name]) for name, value in weights(recipe.output_dir).items()
    )


def test_starting_over_an_existing_run_is_refused(reference):
    with pytest.raises(ConfigurationError, match="pass --resume"):
        train(reference)
    with pytest.raises(ConfigurationError, match="newer than"):
        train(reference, resume=Path(reference.output_dir) / "checkpoint-3")


def test_resume_without_a_checkpoint_starts_at_the_beginning(make_recipe):
    recipe = make_recipe(max_steps=3)
    train(recipe, resume=True)
    assert len(read_log(recipe.output_dir)) == 3


def test_a_recipe_that_contradicts_the_checkpoint_is_refused(reference, make_recipe, caplog):
    checkpoint = Path(reference.output_dir) / "checkpoint-3"
    with pytest.raises(ConfigurationError, match="'model' was"):
        train(make_recipe(model={**TINY_MODEL, "mlp_ratio": 2.0}), resume=checkpoint)
    train(make_recipe(max_steps=4, batch_size=8), resume=checkpoint)
    assert "'max_steps' was 6 and is 4 now" in caplog.text


def test_a_changed_image_folder_is_mentioned(reference, scenes, tmp_path, make_recipe, caplog):
    shutil.copytree(scenes, tmp_path / "more")
    shutil.copy(scenes / "optical" / "scene0.png", tmp_path / "more" / "optical" / "new.png")
    recipe = make_recipe(image_folder=str(tmp_path / "more"), max_steps=4)
    train(recipe, resume=Path(reference.output_dir) / "checkpoint-3")
    assert "have changed since checkpoint-3" in caplog.text


def gradients_of_first_step(recipe):
    captured = {}

    def capture(optimizer, *_):
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        captured["grads"] = [None if p.grad is None else p.grad.clone() for p in tensors]

    handle = register_optimizer_step_pre_hook(capture)
    try:
        train(recipe)
    finally:
        handle.remove()
    return captured["grads"]


@pytest.mark.parametrize("seed", range(3))  # their first batches: different groups
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_gradients(make_recipe, tmp_path, seed, accumulation):
    model = {**TINY_MODEL, "drop_path_rate": 0.0}
    settings = {"seed": seed, "model": model, "max_steps": 1, "warmup_steps": 0, "max_grad_norm": 0, "batch_size": 5}
    whole = gradients_of_first_step(make_recipe(**settings))
    parts = gradients_of_first_step(
        make_recipe(**settings, gradient_accumulation_steps=accumulation, output_dir=str(tmp_path / "parts"))
    )
    for expected, found in zip(whole, parts, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_objective_that_counts_late_cannot_accumulate(make_recipe, monkeypatch):
    monkeypatch.setattr(RSVHeatPretraining, "counts_from_data", False)
    with pytest.raises(ConfigurationError, match="cannot accumulate"):
        train(make_recipe(gradient_accumulation_steps=2))


def test_counting_after_the_forward_pass_gives_the_same_run(reference, make_recipe, monkeypatch):
    monkeypatch.setattr(RSVHeatPretraining, "counts_from_data", False)
    monkeypatch.setattr(RSVHeatPretraining, "counts", None)
    recipe = make_recipe()
    train(recipe)
    assert_equal_runs(reference.output_dir, recipe.output_dir)


def test_a_folder_without_a_usable_image_is_an_error_that_says_where_to_look(tmp_path, make_recipe):
    (tmp_path / "bad").mkdir()
    for index in range(9):
        (tmp_path / "bad" / f"{index}.png").write_bytes(b"broken")
    recipe = make_recipe(image_folder=str(tmp_path / "bad"), max_skipped=1.0)
    with pytest.raises(DataError, match=r"None of the last images .* could be used: .*skipped.jsonl"):
        train(recipe)
    assert len((Path(recipe.output_dir) / "skipped.jsonl").read_text().splitlines()) == 9
    assert not list(Path(recipe.output_dir).glob("checkpoint-*"))


def test_a_step_without_usable_images_changes_no_weight(tmp_path, scenes, make_recipe):
    shutil.copytree(scenes, tmp_path / "mixed")
    (tmp_path / "mixed" / "sar" / "alone.png").write_bytes(b"broken")
    recipe = make_recipe(image_folder=str(tmp_path / "mixed"), save_steps=1, max_steps=8, keep_checkpoints=None)
    train(recipe)
    lines = read_log(recipe.output_dir)
    *_, empty = [line["step"] for line in lines if line["loss"] is None]
    assert empty > 1
    states = [load_file(Path(recipe.output_dir) / f"checkpoint-{s}" / "model.safetensors") for s in (empty - 1, empty)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint_and_names_its_images(
    make_recipe, monkeypatch, logging_steps
):
    original = RSVHeatPretraining.loss

    def broken(self, model, batch, step):
        terms = original(self, model, batch, step)
        return {name: (total * (float("nan") if step == 1 else 1), count) for name, (total, count) in terms.items()}

    monkeypatch.setattr(RSVHeatPretraining, "loss", broken)
    recipe = make_recipe(save_steps=1, logging_steps=logging_steps)
    with pytest.raises(TrainingError, match=r"loss of step 2 is not finite: .*not_finite.json lists its images"):
        train(recipe)
    assert [path.name for path in Path(recipe.output_dir).glob("checkpoint-*")] == ["checkpoint-1"]
    note = json.loads((Path(recipe.output_dir) / "not_finite.json").read_text())
    assert note["step"] == 2
    assert len(note["files"]) == note["images"] > 0
    assert all((Path(recipe.image_folder) / path).exists() for files in note["files"] for path in files)


def test_a_gradient_that_is_not_finite_never_gets_into_a_checkpoint(make_recipe, monkeypatch):
    original = RSVHeatPretraining.loss

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    def broken(self, model, batch, step):
        terms = original(self, model, batch, step)
        return {name: (Broken.apply(total) if step == 1 else total, n) for name, (total, n) in terms.items()}

    monkeypatch.setattr(RSVHeatPretraining, "loss", broken)
    recipe = make_recipe(save_steps=1)
    with pytest.raises(TrainingError, match="gradient of step 2 is not finite"):
        train(recipe)
    assert [path.name for path in Path(recipe.output_dir).glob("checkpoint-*")] == ["checkpoint-1"]


def test_the_average_of_the_weights_is_exported_and_resumes_to_the_bit(reference, make_recipe, tmp_path):
    recipe = make_recipe(ema_decay=0.9)
    train(recipe)
    assert lasting(recipe.output_dir) == lasting(reference.output_dir)  # averaging changes no step
    raw, averaged = weights(reference.output_dir), weights(recipe.output_dir)
    assert not all(torch.equal(value, averaged[name]) for name, value in raw.items())
    by_step = make_recipe(save_steps=1, keep_checkpoints=None, output_dir=str(tmp_path / "steps"))
    train(by_step)
    start = RSVHeatPretraining(recipe)  # the average by hand, from the weights of every step
    torch.manual_seed(derive_seed("weights", recipe.seed))
    expected = {name: p.detach().clone() for name, p in start.build_model().named_parameters()}
    for step in range(6):
        decay = min(0.9, (1 + step) / (10 + step))
        current = load_file(Path(by_step.output_dir) / f"checkpoint-{step + 1}" / "model.safetensors")
        expected = {name: decay * value + (1 - decay) * current[name] for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-5, atol=1e-6)
    shutil.rmtree(Path(recipe.output_dir) / "checkpoint-6")
    shutil.rmtree(Path(recipe.output_dir) / "hub")
    train(recipe, resume=True)
    assert all(torch.equal(value, averaged[name]) for name, value in weights(recipe.output_dir).items())


def test_pictures_change_nothing_and_show_what_the_objective_says(reference, make_recipe):
    recipe = make_recipe(picture_steps=2)
    train(recipe)
    assert_equal_runs(reference.output_dir, recipe.output_dir)
    pictures = sorted((Path(recipe.output_dir) / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"step-000000{step}.png" for step in (2, 4, 6)]
    with Image.open(pictures[0]) as picture:
        assert picture.width == 4 * 32 + 3 * 4  # input, two masked versions, reconstruction
        assert picture.getextrema() != ((0, 0),) * 3


def test_settings_an_objective_cannot_keep_are_refused(make_recipe, classes):
    with pytest.raises(ConfigurationError, match="has no picture to draw"):
        train(make_recipe(objective="classification", image_folder=str(classes), picture_steps=2))
    with pytest.raises(ConfigurationError, match="has no loss per image to prune by"):
        train(make_recipe(prune_ratio=0.5))


def test_old_checkpoints_are_deleted_and_the_last_step_is_saved(make_recipe):
    recipe = make_recipe(save_steps=2, max_steps=5, keep_checkpoints=2)
    train(recipe)
    assert {path.name for path in Path(recipe.output_dir).glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}


@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_precision_and_checkpointing_run_and_export_float32(make_recipe, changes):
    recipe = make_recipe(max_steps=3, **changes)
    train(recipe)
    assert {value.dtype for value in weights(recipe.output_dir).values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_run_follows_the_plain_one_and_continues_without_compiling(make_recipe, tmp_path, monkeypatch):
    """Traced and differentiated ahead of time, as for any backend, but run with PyTorch's own kernels."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled(self, backend="aot_eager"))
    settings = {"max_steps": 4, "save_steps": 2, "model": {**TINY_MODEL, "drop_path_rate": 0.0}}
    plain = make_recipe(**settings, output_dir=str(tmp_path / "plain"))
    train(plain)
    recipe = make_recipe(**settings, torch_compile=True)
    train(recipe)
    for expected, found in zip(lasting(plain.output_dir), lasting(recipe.output_dir), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert weights(recipe.output_dir).keys() == weights(plain.output_dir).keys()
    shutil.rmtree(Path(recipe.output_dir) / "checkpoint-4")
    train(make_recipe(**settings), resume=True)
    assert [line["step"] for line in read_log(recipe.output_dir)] == [1, 2, 3, 4]


def test_recomputing_activations_changes_no_gradient(make_recipe, tmp_path):
    settings = {"max_steps": 1, "warmup_steps": 0, "model": {**TINY_MODEL, "drop_path_rate": 0.0}}
    plain = gradients_of_first_step(make_recipe(**settings))
    recomputed = gradients_of_first_step(
        make_recipe(**settings, gradient_checkpointing=True, output_dir=str(tmp_path / "recomputed"))
    )
    for expected, found in zip(plain, recomputed, strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected)


def test_the_loss_falls_and_a_classifier_learns_from_the_pretrained_folder(make_recipe, classes, tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_rsheat")
    model = {**TINY_MODEL, "drop_path_rate": 0.0, "modalities": {"optical": 3}}
    pretraining = make_recipe(image_folder=str(classes), model=model, batch_size=16, max_steps=40, learning_rate=3e-3)
    hub = train(pretraining)
    losses = [line["loss"] for line in read_log(pretraining.output_dir)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    fine_tuning = make_recipe(
        objective="classification",
        image_folder=str(classes),
        output_dir=str(tmp_path / "classifier"),
        model=str(hub),
        batch_size=16,
        max_steps=20,
        save_steps=20,
        learning_rate=3e-3,
    )
    train(fine_tuning)
    assert read_log(fine_tuning.output_dir)[-1]["accuracy"] == 1.0
    assert "new weights: classifier.bias, classifier.weight" in caplog.text


def test_hub_model_id_pushes_and_a_failed_push_loses_nothing(make_recipe, monkeypatch):
    calls = []

    def fake_push(folder, repo_id):
        calls.append((Path(folder), repo_id))
        if len(calls) == 1:
            raise OSError("no network")
        return SimpleNamespace(repo_id=repo_id, revision="abc")

    monkeypatch.setattr(publishing, "push", fake_push)
    recipe = make_recipe(max_steps=1, save_steps=1, warmup_steps=0, hub_model_id="me/model")
    with pytest.raises(TransferError, match=r"no network.*hf-rsheat push .* me/model"):
        train(recipe)
    assert (Path(recipe.output_dir) / "hub/model.safetensors").is_file()
    hub = train(recipe, resume=True)
    assert calls == [(hub, "me/model")] * 2
    report = verify(hub)
    assert report.ok, str(report)  # what a real push asks for first


def test_a_tracker_that_is_not_installed_is_an_error_that_names_the_extra(make_recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"trackers: \[wandb\] needs wandb.*hf_rsheat\[trackers\]"):
        train(make_recipe(trackers=["wandb"]))
    assert train(make_recipe(trackers=[]))  # none at all is fine


def test_tensorboard_gets_the_log_where_it_is_installed(reference):
    pytest.importorskip("tensorboard")
    assert list((Path(reference.output_dir) / "tensorboard").glob("*tfevents*"))


def test_the_loop_knows_no_objective():
    text = Path(loop.__file__).read_text()
    assert "RSVHeat" not in text
    assert "Classification" not in text
