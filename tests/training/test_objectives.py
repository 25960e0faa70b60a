import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_rsheat.errors import CheckpointError, ConfigurationError
from hf_rsheat.hub import export
from hf_rsheat.training.data import BatchReader
from hf_rsheat.training.objectives import get_objective
from hf_rsheat.training.sampler import BatchPlan

from .conftest import TINY_MODEL, write_image


def read(objective, group, indices=None, epoch=0):
    """Load the samples of one group as one batch."""
    folder = objective.recipe.image_folder
    found = tuple(i for i, sample in enumerate(objective.samples) if sample.group == group)
    plan = BatchPlan(0, epoch, 0, 1, group, found if indices is None else indices)
    return BatchReader(Path(folder), objective.samples, objective, objective.recipe.seed)[plan]


@pytest.fixture
def pretraining(make_recipe):
    return get_objective("rs_vheat")(make_recipe())


def test_an_unknown_objective_is_named_with_the_nearest():
    with pytest.raises(ConfigurationError, match="did you mean 'rs_vheat'"):
        get_objective("rs_heat")


@pytest.mark.parametrize("group", ["optical", "sar", "optical+sar"])
def test_counts_agree_with_the_loss_for_single_and_paired_batches(pretraining, group):
    loaded = read(pretraining, group)
    terms = pretraining.loss(pretraining.build_model(), loaded.batch, 0)
    counts = {name: count for name, count in pretraining.counts(loaded.batch).items() if count}
    assert {name: count for name, (_, count) in terms.items()} == counts
    assert ("contrastive" in terms) == (group == "optical+sar")
    assert loaded.batch["pixel_values"].shape[1:] == ((1 if group == "sar" else 3), 32, 32)


def test_the_loss_of_a_batch_is_the_models_own(pretraining):
    model = pretraining.build_model().eval()
    batch = read(pretraining, "optical+sar").batch
    terms = pretraining.loss(model, batch, 0)
    weighted = sum(pretraining.term_weights[name] * total / count for name, (total, count) in terms.items())
    torch.testing.assert_close(weighted, model(**batch).loss)


def test_a_sample_depends_on_seed_epoch_and_index_only(pretraining):
    alone = read(pretraining, "optical", indices=(5,)).batch
    again = read(pretraining, "optical", indices=(5,)).batch
    later = read(pretraining, "optical", indices=(5,), epoch=1).batch
    assert torch.equal(alone["pixel_values"], again["pixel_values"])
    assert torch.equal(alone["mask_radius"], again["mask_radius"])
    assert not torch.equal(alone["pixel_values"], later["pixel_values"])
    low, high = pretraining.config.mask_radius_range
    assert low <= alone["mask_radius"].item() <= high


def test_preparing_a_sample_leaves_the_global_generators_alone(pretraining):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    numpy_state = np.random.get_state()[1].copy()
    read(pretraining, "optical+sar")
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_unusable_images_leave_their_batch_and_are_reported(pretraining):
    loaded = read(pretraining, "optical")
    assert [image.path for image in loaded.skipped] == ["optical/broken.png"]
    assert loaded.images == len(loaded.batch["pixel_values"]) == 5


def test_readers_reach_spawned_workers(pretraining):
    reader = BatchReader(Path(pretraining.recipe.image_folder), pretraining.samples, pretraining, seed=0)
    plan = BatchPlan(0, 0, 0, 1, "optical", (5,))
    copied = pickle.loads(pickle.dumps(reader))
    assert torch.equal(copied[plan].batch["pixel_values"], reader[plan].batch["pixel_values"])


@pytest.mark.parametrize("factor", [None, 1e-4])
@pytest.mark.parametrize("group", ["optical", "sar", "optical+sar"])
def test_a_process_without_data_gets_a_stand_in_of_its_group(make_recipe, group, factor):
    preprocessing = {} if factor is None else {"sar": {"rescale_factor": factor}}
    objective = get_objective("rs_vheat")(make_recipe(preprocessing=preprocessing))
    loaded = read(objective, group, indices=())
    assert loaded.images == 0
    assert len(loaded.batch["pixel_values"]) == 1
    assert loaded.batch["pixel_values"].abs().max() < 0.02  # the mean colour
    assert all(torch.isfinite(total) for total, _ in objective.loss(objective.build_model(), loaded.batch, 0).values())


def test_16_bit_images_need_a_stated_factor_and_the_reason_says_how(tmp_path, make_recipe):
    write_image(tmp_path / "images" / "sar" / "a.tif", 0, "I;16")
    refused = read(get_objective("rs_vheat")(make_recipe(image_folder=str(tmp_path / "images"))), "sar")
    assert "preprocessing.sar" in refused.skipped[0].reason
    stated = make_recipe(image_folder=str(tmp_path / "images"), preprocessing={"sar": {"rescale_factor": 1e-4}})
    used = read(get_objective("rs_vheat")(stated), "sar")
    assert used.skipped == []
    assert -2 <= used.batch["pixel_values"].min() <= used.batch["pixel_values"].max() <= 2


def test_a_third_sensor_is_a_config_entry_with_statistics(tmp_path, make_recipe):
    for sensor, mode in {"optical": "RGB", "sar": "L", "thermal": "L"}.items():
        write_image(tmp_path / "images" / sensor / "a.png", 0, mode)
    model = {**TINY_MODEL, "modalities": {"thermal": 1, "sar": 1, "optical": 3}}
    recipe = {"image_folder": str(tmp_path / "images"), "model": model}
    with pytest.raises(ConfigurationError, match=r"preprocessing.thermal.image_mean"):
        get_objective("rs_vheat")(make_recipe(**recipe))
    statistics = {"thermal": {"image_mean": [0.4], "image_std": [0.1]}}
    objective = get_objective("rs_vheat")(make_recipe(**recipe, preprocessing=statistics))
    assert sorted(sample.group for sample in objective.samples) == ["optical+sar", "optical+thermal"]
    assert objective.processor.modalities["thermal"]["image_mean"] == [0.4]
    assert set(objective.loss(objective.build_model(), read(objective, "optical+thermal").batch, 0)) == {
        "spatial",
        "frequency",
        "contrastive",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"depth": [1, 1, 1, 1]}}, "Unknown model field 'depth': did you mean 'depths'"),
        ({"model": {"depths": "many"}}, "Invalid model"),
        ({"model": {"image_size": 64}}, "set image_size only"),
        ({"model": {"model_type": "vheat"}}, "remove model.model_type"),
        ({"model": "nowhere"}, "nowhere"),
        ({"modality": "sat"}, "did you mean 'sar'"),
        ({"preprocessing": {"radar": {}}}, "Unknown modality 'radar' in preprocessing"),
        ({"preprocessing": {"sar": {"mean": [0.5]}}}, "Invalid preprocessing"),
        ({"objective_options": {"crop_scales": [0.5, 1]}}, "did you mean 'crop_scale'"),
        ({"objective_options": {"crop_scale": [0.9, 0.5]}}, "crop_scale"),
        ({"model": {"modalities": {"msi": 13}}}, "13 statistics"),
    ],
)
def test_wrong_entries_are_refused_before_any_work(make_recipe, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        get_objective("rs_vheat")(make_recipe(**changes))


def test_missing_modalities_are_mentioned(make_recipe, classes, caplog):
    get_objective("rs_vheat")(make_recipe(image_folder=str(classes)))
    assert "No images of modality 'sar'" in caplog.text


@pytest.fixture
def pretrained(tmp_path, pretraining):
    """A pretraining Hub folder."""
    return export(pretraining.build_model(), pretraining.processor, tmp_path / "pretrained")


def test_fine_tuning_keeps_the_trunk_and_logs_what_is_new(make_recipe, classes, pretrained, pretraining, caplog):
    caplog.set_level("INFO", logger="hf_rsheat")
    model = {"pretrained": str(pretrained), "drop_path_rate": 0.0}
    recipe = make_recipe(objective="classification", image_folder=str(classes), model=model)
    objective = get_objective("classification")(recipe)
    torch.manual_seed(0)
    classifier = objective.build_model()
    source = dict(get_objective("rs_vheat")(make_recipe(model=str(pretrained))).build_model().named_parameters())
    trunk = {name: p for name, p in classifier.named_parameters() if name.startswith("rs_vheat.")}
    assert all(torch.equal(p, source[name]) for name, p in trunk.items())
    assert "new weights: classifier.bias, classifier.weight" in caplog.text
    assert classifier.config.id2label == {0: "bright", 1: "dark"}
    assert classifier.config.drop_path_rate == 0.0


def test_a_classifier_of_other_classes_starts_anew_but_a_lost_trunk_is_an_error(make_recipe, classes, pretrained):
    shared = {"objective": "classification", "image_folder": str(classes)}
    objective = get_objective("classification")(make_recipe(**shared, model=str(pretrained)))
    objective.config.id2label = {i: str(i) for i in range(5)}
    folder = export(objective.build_model(), objective.processor, pretrained.parent / "five")
    assert get_objective("classification")(make_recipe(**shared, model=str(folder))).build_model().num_labels == 2
    lost = make_recipe(**shared, model={"pretrained": str(pretrained), "depths": [1, 1, 2, 1]})
    with pytest.raises(CheckpointError, match="trunk weights"):
        get_objective("classification")(lost).build_model()


def test_a_folder_without_its_image_processor_is_refused(make_recipe, pretrained):
    (pretrained / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"no preprocessor_config.json"):
        get_objective("rs_vheat")(make_recipe(model=str(pretrained)))


@pytest.mark.parametrize("model_type", ["rs_vheat", "vheat"])
def test_classification_trains_both_families(make_recipe, classes, model_type):
    model = {**TINY_MODEL, "model_type": model_type}
    options = {"label_smoothing": 0.1}
    recipe = make_recipe(
        objective="classification", image_folder=str(classes), model=model, objective_options=options, image_size=64
    )
    objective = get_objective("classification")(recipe)
    loaded = read(objective, "optical")
    network = objective.build_model()
    terms = objective.loss(network, loaded.batch, 0)
    assert {name: count for name, (_, count) in terms.items()} == objective.counts(loaded.batch)
    terms["cross_entropy"][0].sum().backward()
    assert all(p.grad is not None for n, p in network.named_parameters() if "stems.sar" not in n)
    assert objective.processor.size["height"] == 64


def test_classification_trains_rs4d(make_recipe, classes):
    model = {"model_type": "rs4d", "hidden_size": 16, "inner_size": 20, "num_hidden_layers": 2, "state_size": 4}
    objective = get_objective("classification")(
        make_recipe(objective="classification", image_folder=str(classes), model=model)
    )
    network = objective.build_model()
    objective.loss(network, read(objective, "optical").batch, 0)["cross_entropy"][0].sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_classifier_may_learn_from_sar(tmp_path, make_recipe):
    for index in range(4):
        write_image(tmp_path / "images" / ("ship", "sea")[index % 2] / f"{index}.png", index, "L")
    recipe = make_recipe(objective="classification", image_folder=str(tmp_path / "images"), modality="sar")
    objective = get_objective("classification")(recipe)
    batch = read(objective, "sar").batch
    assert batch["pixel_values"].shape == (4, 1, 32, 32)
    objective.loss(objective.build_model(), batch, 0)


def test_vheat_has_no_sar(make_recipe, classes):
    recipe = make_recipe(
        objective="classification", image_folder=str(classes), model={"model_type": "vheat"}, modality="sar"
    )
    with pytest.raises(ConfigurationError, match="Unknown modality 'sar'"):
        get_objective("classification")(recipe)


def test_the_saved_processor_is_what_training_used(pretrained):
    saved = json.loads((pretrained / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 32, "width": 32}
