"""A card tells what the folder's own records say, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from hf_rsheat import VHeatForImageClassification, VHeatImageProcessor, export, verify
from hf_rsheat.cli import app
from hf_rsheat.conversion import vheat
from hf_rsheat.errors import ConfigurationError
from hf_rsheat.hub.card import add_evaluation, add_picture, validate_metadata
from hf_rsheat.hub.export import finish
from hf_rsheat.hub.records import weights_digest
from tests.zoo import ZOO, vheat_config


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    entry = ZOO["rs-vheat-pretraining"]
    recipe = {"objective": "rs_vheat", "seed": 7}
    context = {"dataset": "scenes", "recipe": recipe, "repo_id": "me/small"}
    return export(entry.model(), entry.processor(), tmp_path_factory.mktemp("card") / "model", card_context=context)


@pytest.fixture
def folder(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "model"))


def result_for(folder: Path, path: Path, **changes) -> Path:
    score = {"value": 0.75, "interval95": [0.7, 0.8]}
    result = {
        "task": "knn",
        "protocol": "5-nearest-neighbour",
        "model": {"weights_sha256": weights_digest(folder)},
        "dataset": {"name": "UC Merced", "images": 240},
        "metrics": {"accuracy": score},
        "baselines": {"untrained network": {"accuracy": {"value": 0.5, "interval95": [0.45, 0.55]}}},
    } | changes
    path.write_text(json.dumps(result))
    return path


def test_facts_of_the_run_stand_in_the_card(folder):
    text = (folder / "README.md").read_text()
    assert "Training data: scenes" in text
    assert "| `seed` | `7` |" in text
    assert 'from_pretrained("me/small"' in text
    assert weights_digest(folder) in text
    assert "| sar | 1 | 0.5 | 0.25 |" in text
    assert "no evaluation was run" in text


def test_an_evaluation_becomes_the_model_index_and_the_folder_still_verifies(folder, tmp_path):
    result = result_for(folder, tmp_path / "knn.json")
    run = CliRunner().invoke(app, ["card", str(folder), "--evaluation", str(result)])
    assert run.exit_code == 0, run.output
    card = ModelCard.load(folder / "README.md")
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("UC Merced", "accuracy", 0.75)
    ]
    assert "| UC Merced (240 images) | knn | accuracy | 0.750 | 0.700 to 0.800 |" in card.text
    assert "untrained network" in card.text
    assert verify(folder).ok, str(verify(folder))


def test_an_evaluation_of_other_weights_is_refused(folder, tmp_path):
    result = result_for(folder, tmp_path / "knn.json", model={"weights_sha256": "0" * 64})
    with pytest.raises(ConfigurationError, match="other weights"):
        add_evaluation(folder, result)
    (tmp_path / "typed.json").write_text('{"accuracy": 0.99}')
    with pytest.raises(ConfigurationError, match="not written by"):
        add_evaluation(folder, tmp_path / "typed.json")


@pytest.mark.parametrize("name", ["rs-vheat-pretraining", "selective-mae-pretraining"])
def test_a_picture_is_drawn_for_pretraining_models(name, tmp_path):
    entry = ZOO[name]
    folder = export(entry.model(), entry.processor(), tmp_path / "model", card_context={"recipe": {}})
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "scene.png")
    run = CliRunner().invoke(app, ["card", str(folder), "--picture", str(tmp_path / "scene.png")])
    assert run.exit_code == 0, run.output
    assert (folder / "picture.png").stat().st_size > 10_000
    assert "](picture.png)" in (folder / "README.md").read_text()
    assert verify(folder).ok


def test_a_model_without_a_picture_says_which_ones_have_one(tmp_path):
    entry = ZOO["vheat-classifier"]
    folder = export(entry.model(), entry.processor(), tmp_path / "model")
    with pytest.raises(ConfigurationError, match="VHeatForImageClassification: only RSVHeatForPreTraining and Sel"):
        add_picture(folder, tmp_path / "scene.png")


def test_names_and_labels_are_never_rendered_as_templates(tmp_path):
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% raw %}"
    config = vheat_config(id2label={0: evil, 1: "b"})
    context = {"dataset": evil, "repo_id": "me/model", "recipe": {evil: evil}}
    folder = export(VHeatForImageClassification(config), VHeatImageProcessor(), tmp_path, card_context=context)
    text = (folder / "README.md").read_text()
    assert evil in text
    assert "<class" not in text


def test_converted_weights_say_where_they_come_from_and_that_their_terms_are_unknown(golden, tmp_path):
    folder = vheat.convert(golden / "vheat/prenorm.pth", tmp_path)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "unknown"
    assert "Converted from `prenorm.pth` (SHA-256 `" in card.text
    assert "the terms are unknown" in card.text
    assert verify(folder).ok, str(verify(folder))


def test_published_numbers_stand_apart_from_measured_ones(tmp_path):
    from hf_rsheat.hub.card import PUBLISHED

    sizes = PUBLISHED["vheat"]
    assert len(sizes) == 3
    entry = ZOO["vheat-classifier"]
    folder = export(entry.model(), entry.processor(), tmp_path)
    assert "As published" not in (folder / "README.md").read_text()
    tiny = tuple(entry.model().config.hidden_sizes), tuple(entry.model().config.depths)
    sizes[tiny] = "top-1 82.2 % (somewhere)"
    try:
        finish(folder)
    finally:
        del sizes[tiny]
    assert "As published for this architecture, not measured here" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ZOO)
def test_metadata_is_what_the_hub_accepts(name, tmp_path):
    entry = ZOO[name]
    folder = export(entry.model(), entry.processor(), tmp_path)
    validate_metadata(ModelCard.load(folder / "README.md").data.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pipeline_tag": "magic"}, "pipeline_tag"),
        ({"license": "free"}, "license"),
        ({"license": "other"}, "license_name"),
        ({"tags": [""]}, "tags"),
    ],
)
def test_metadata_the_hub_would_refuse_is_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        validate_metadata({"pipeline_tag": "image-classification", **change})
