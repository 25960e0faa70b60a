"""Contrastive pretraining makes neighbours of scenes of one kind, with keys of a queue and with keys of the batch."""

import pytest

from hf_rsheat.evaluation.evaluate import evaluate
from hf_rsheat.scenes import write_labelled_scenes
from hf_rsheat.training.loop import train

MODEL = {
    "model_type": "selective_mae",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """480 scenes to learn from, without their labels, and 200 others to find neighbours among."""
    folder = tmp_path_factory.mktemp("generated")
    return [write_labelled_scenes(folder / str(seed), count, 64, seed) for seed, count in enumerate((480, 200))]


@pytest.mark.slow
@pytest.mark.parametrize(("queue_size", "momentum"), [(200, (0.99, 0.99)), (0, (0.9, 0.99))], ids=["queue", "in-batch"])
def test_neighbours_are_of_one_kind_more_often_than_untrained(make_recipe, generated, queue_size, momentum):
    learnt, held_out = generated
    recipe = make_recipe(
        objective="moco",
        image_folder=str(learnt),
        image_size=64,
        model=MODEL,
        objective_options={"queue_size": queue_size, "momentum": momentum, "head_size": 128, "key_size": 32},
        batch_size=40,
        max_steps=300,
        save_steps=300,
        warmup_steps=30,
        weight_decay=0.05,
        max_grad_norm=1.0,
        trackers=[],
    )
    result = evaluate(train(recipe), held_out, "knn", repeats=3)
    accuracy = result["metrics"]["accuracy"]
    untrained = result["baselines"]["untrained network"]["accuracy"]
    gain = untrained["model_minus_baseline"]
    print(f"\n{accuracy['value']:.3f}, untrained {untrained['value']:.3f}, difference {gain}")
    assert gain["interval95"][0] > 0
