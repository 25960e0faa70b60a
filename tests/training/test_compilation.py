"""Training through `torch.compile`: every objective, kills, and errors that say what to do."""

import copy
import os
import re
import shutil
import signal
import statistics
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from hf_rsheat.errors import ConfigurationError, TrainingError
from hf_rsheat.models.token_selection import PHASES
from hf_rsheat.training.checkpoint import latest_checkpoint
from hf_rsheat.training.compilation import compile_parts, compiled_steps, uncompiled
from hf_rsheat.training.data import BatchReader
from hf_rsheat.training.loop import train
from hf_rsheat.training.objectives import _OBJECTIVES, get_objective
from hf_rsheat.training.optimization import build_optimizer
from hf_rsheat.training.sampler import BatchPlan
from hf_rsheat.training.step import Stepper

from .conftest import BACKBONE, DETECTOR, TINY_MODEL, read_log, write_image
from .processes import Training, assert_same_run
from .teachers import CHANNELS, SIZE, save_sam

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
DECODER = {"decoder_hidden_size": 12, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3}
MAE = {**VIT, **DECODER, "intermediate_size": 32, "decoder_intermediate_size": 24}
RS4D = {"hidden_size": CHANNELS, "inner_size": 32, "num_hidden_layers": 2, "state_size": 4}
HEAT = {**TINY_MODEL, "hidden_sizes": [8, 16], "depths": [1, 1]}
VHEAT = {**HEAT, "model_type": "vheat"}

# Drop path is on: compiled and eager runs draw the same.
RECIPES = {
    "rs_vheat": {"image_folder": "pairs", "model": HEAT},
    "classification": {"image_folder": "classes", "model": VHEAT},
    # Steps 1 to 6 of 16 choose tokens in the same way.
    "selective_mae": {"image_folder": "pairs/optical", "model": {**VIT, **DECODER}, "image_size": 64, "max_steps": 16},
    "mae": {"image_folder": "pairs/optical", "model": MAE, "image_size": 64},
    "moco": {
        "image_folder": "pairs/optical",
        "model": VHEAT,
        "objective_options": {"queue_size": 6, "head_size": 16, "key_size": 8},
    },
    "instances": {
        "image_folder": "coco",
        "model": {"backbone_config": BACKBONE, **DETECTOR},
        "image_size": 96,
        "batch_size": 2,
        "objective_options": {"dataset": "generated", "evaluate": False},
    },
    "rs4d_distill": {
        "image_folder": "pairs/optical",
        "model": RS4D,
        "image_size": SIZE,
        "objective_options": {"schedule": "linear", "strength_range": [0.0, 2.0]},
    },
    "slimmable": {
        "image_folder": "pairs/optical",
        "model": MAE,
        "image_size": 64,
        "objective_options": {"objective": "mae", "widths_per_step": 3},
    },
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """8 pairs: whole batches of 4."""
    folder = tmp_path_factory.mktemp("pairs")
    for index in range(8):
        write_image(folder / "optical" / f"{index}.png", index)
        write_image(folder / "sar" / f"{index}.png", 100 + index, "L")
    return folder


@pytest.fixture
def recipe_of(make_recipe, pairs, classes, coco, tmp_path):
    def build(objective, **changes):
        values = {"max_steps": 6, "save_steps": 100, "warmup_steps": 0, "trackers": [], **RECIPES[objective], **changes}
        root, _, below = str(values["image_folder"]).partition("/")
        values["image_folder"] = str({"pairs": pairs, "classes": classes, "coco": coco}.get(root, Path(root)) / below)
        if objective == "rs4d_distill":
            teacher = save_sam(tmp_path / "teacher")
            values["objective_options"] = {**values["objective_options"], "teacher": str(teacher)}
        return make_recipe(objective=objective, **values)

    return build


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs there are after each step."""
    torch._dynamo.reset()
    counters.clear()
    seen = []
    take = Stepper.take

    def counted(self, *arguments):
        result = take(self, *arguments)
        seen.append(counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr(Stepper, "take", counted)
    yield seen
    torch._dynamo.reset()


def test_every_objective_has_a_recipe_here():
    assert RECIPES.keys() == _OBJECTIVES.keys()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("objective", RECIPES)
def test_every_objective_trains_compiled_as_it_does_without(recipe_of, tmp_path, graphs, objective):
    plain = recipe_of(objective, output_dir=str(tmp_path / "plain"))
    train(plain)
    assert set(graphs) == {0}
    graphs.clear()
    recipe = recipe_of(objective, torch_compile=True)
    train(recipe)
    assert graphs[0] > 0
    assert graphs[1] == graphs[4]
    assert graphs[-1] <= 3  # `selective_mae`: near, far, random
    assert not counters["graph_break"]  # nothing within is computed uncompiled
    for expected, found in zip(read_log(plain.output_dir), read_log(recipe.output_dir), strict=True):
        for name in ("loss", "grad_norm", *get_objective(objective)(plain).term_weights):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (expected["step"], name)


def _use_cache(folder):
    """Called in the process that trains."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("objective", ["mae", "classification"])
def test_a_compiled_run_that_is_killed_continues_to_the_same_bits(recipe_of, tmp_path, objective):
    """Batches of 3, 3 and 2: each process begins with another, and each run compiles for itself."""
    settings = {"batch_size": 3, "max_steps": 14, "save_steps": 3, "torch_compile": True, "keep_checkpoints": None}
    whole = recipe_of(objective, output_dir=str(tmp_path / "whole"), **settings)
    training = Training(whole, prepare=partial(_use_cache, str(tmp_path / "first")))
    assert training.finish(1500) == [0], training.text[-3000:]
    recipe = recipe_of(objective, **settings)
    cached = partial(_use_cache, str(tmp_path / "second"))
    for steps in (5, 9):
        training = Training(recipe, resume=True, prepare=cached)
        training.wait_for(lambda training=training, steps=steps: training.steps >= steps, 1500)
        training.processes[0].kill()
        assert training.finish() == [-signal.SIGKILL]
    assert int(latest_checkpoint(Path(recipe.output_dir)).name.rpartition("-")[2]) < 14
    training = Training(recipe, resume=True, prepare=cached)
    assert training.finish(1500) == [0], training.text[-3000:]
    assert_same_run(whole.output_dir, recipe.output_dir)
    states = [load_file(Path(run.output_dir) / "checkpoint-14" / "optimizer.safetensors") for run in (whole, recipe)]
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


def test_without_a_compiler_training_does_not_start(recipe_of):
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ConfigurationError, match=r"install g\+\+ .* or set torch_compile to false"),
    ):
        train(recipe_of("mae", torch_compile=True))


def test_a_graph_that_cannot_be_compiled_ends_the_run_and_names_the_cache(recipe_of, monkeypatch, tmp_path):
    def broken(graph, inputs):
        raise ImportError("libkernel.so: file too short")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled(self, backend=broken))
    with pytest.raises(TrainingError, match=rf"libkernel.so: file too short.* delete {tmp_path}/cache and "):
        train(recipe_of("mae", torch_compile=True))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_a_library_in_the_cache_ends_the_run_and_deleting_it_helps(recipe_of, tmp_path):
    """What a process may leave that is killed while it compiles."""
    cache = tmp_path / "cache"
    prepare = partial(_use_cache, str(cache))
    sound, recipe = (
        recipe_of("mae", max_steps=2, torch_compile=True, output_dir=str(tmp_path / name)) for name in ("sound", "run")
    )
    assert Training(sound, prepare=prepare).finish(900) == [0]
    for library in cache.rglob("*.so"):
        library.write_bytes(library.read_bytes()[:100])
    damaged = Training(recipe, prepare=prepare)
    assert damaged.finish(900) == [1]
    assert re.search(rf"error: torch_compile failed: .*\.so: .* delete {cache} and .* with --resume", damaged.text)
    shutil.rmtree(cache)
    assert Training(recipe, resume=True, prepare=prepare).finish(900) == [0]
    assert_same_run(sound.output_dir, recipe.output_dir)


def test_pictures_and_evaluations_are_not_compiled():
    calls = []
    layer = nn.Linear(2, 2)
    layer.compile(backend=lambda graph, inputs: calls.append(graph) or graph)
    for context, compilations in ((uncompiled, 0), (nullcontext, 1), (uncompiled, 1)):
        with context():
            layer(torch.ones(1 + len(calls), 2))
        assert len(calls) == compilations


def read(objective, images=3):
    """A batch of the first images."""
    reader = BatchReader(Path(objective.recipe.image_folder), objective.samples, objective, objective.recipe.seed)
    return reader[BatchPlan(0, 0, 0, 1, "optical", tuple(range(images)))].batch


def test_a_student_of_corrupted_images_learns_what_its_model_would(recipe_of):
    objective = get_objective("rs4d_distill")(recipe_of("rs4d_distill", max_steps=3))
    model, batch = objective.build_model(), read(objective)
    terms = objective.loss(model, batch, 1)
    ratios = {name: terms[name][0][0].item() for name in ("noise_ratio", "mask_ratio")}
    assert ratios["mask_ratio"] > 0.1
    target = objective.teacher(batch["pixel_values"])
    draws = {name: batch[name] for name in ("noise", "mask_order")}
    expected = model(batch["pixel_values"], teacher_features=target, **draws, **ratios).loss_per_image
    torch.testing.assert_close(terms["l1"][0], expected)


def test_selective_mae_says_few_different_shares_of_training_and_none_that_chooses_otherwise(recipe_of):
    objective = get_objective("selective_mae")(recipe_of("selective_mae"))
    said = {}
    for step in range(2000):
        progress = step / 2000
        representative = objective._representative(progress)
        said[representative] = objective._stage(progress).phase
        assert [len(p) for p in objective._permutations(progress, 0)] == [
            len(p) for p in objective._permutations(representative, 0)
        ]
        assert objective._stage(representative).phase == objective._stage(progress).phase
    assert set(said.values()) == set(PHASES)
    assert len(said) < 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("objective", "model"), [("classification", {"model_type": "vheat"}), ("mae", {})])
def test_the_speed_of_compiled_steps(make_recipe, classes, objective, model):
    """Steps of published sizes at 224 px, compiled and eager by turns on all cores; prints what it measures."""
    torch.set_num_threads(os.cpu_count() or 1)
    settings = {"image_size": 224, "batch_size": 4, "learning_rate": 0.0, "objective_options": {}}
    trained = get_objective(objective)(
        make_recipe(objective=objective, image_folder=str(classes), model=model, **settings)
    )
    batch = read(trained, 4)
    models = {"eager": trained.build_model().train()}
    models["compiled"] = copy.deepcopy(models["eager"])
    compile_parts(trained.compiled_parts(models["compiled"]))
    optimizers = {name: build_optimizer(m, trained.recipe, torch.device("cpu")) for name, m in models.items()}
    times = {name: [] for name in models}
    with compiled_steps():
        for step in range(14):  # the first two compile and warm up
            losses = {}
            for name, network in models.items():
                torch.manual_seed(step)
                start = time.perf_counter()
                terms = trained.loss(network, batch, 0)
                loss = sum(weight * terms[term][0].sum() for term, weight in trained.term_weights.items() if weight)
                loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                times[name].append(time.perf_counter() - start)
                losses[name] = loss.item()
            assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)
    eager, compiled = (times[name][2:] for name in ("eager", "compiled"))
    ratio = statistics.median(b / a for a, b in zip(eager, compiled, strict=True))
    print(
        f"\n{objective}: eager {min(eager):.2f} s, compiled {min(compiled):.2f} s ({min(compiled) / min(eager):.2f}x), "
        f"median of neighbours' ratios {ratio:.2f}; the first compiled step {times['compiled'][0]:.0f} s"
    )
    assert ratio < 1.2
