"""An exported folder loads and gives the same outputs where this package does not exist."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetConfig, ResNetModel

from hf_rsheat import VHeatImageProcessor, export
from hf_rsheat.errors import ConfigurationError
from hf_rsheat.hub import export_folder, load_folder
from tests.zoo import ZOO, main_output

AUTO_CLASSES = {
    "vheat": "AutoModel",
    "vheat-classifier": "AutoModelForImageClassification",
    "vheat-upernet": "AutoModelForSemanticSegmentation",
    "rs-vheat": "AutoModel",
    "rs-vheat-pretraining": "AutoModelForPreTraining",
    "rs-vheat-classifier": "AutoModelForImageClassification",
    "rs-vheat-upernet": "AutoModelForSemanticSegmentation",
    "selective-mae": "AutoModel",
    "selective-mae-pretraining": "AutoModelForPreTraining",
    "selective-mae-classifier": "AutoModelForImageClassification",
    "rs4d": "AutoModel",
    "rs4d-classifier": "AutoModelForImageClassification",
    "rs4d-distillation": "AutoModelForPreTraining",
    "rs4d-upernet": "AutoModelForSemanticSegmentation",
    "rs4d-instances": "AutoModelForInstanceSegmentation",
    "rs4d-prompted-instances": "AutoModelForInstanceSegmentation",
}
# What a user without the package runs; one process for all folders, since importing torch costs seconds.
CHILD = """
import importlib.util, json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_rsheat":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import numpy as np, torch, transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, pipeline

image = Image.open(sys.argv[2])
results, report = {}, {}
for name, (folder, auto_class) in json.loads(sys.argv[1]).items():
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = model(pixel_values)
        results[f"{name}.pixel_values"] = pixel_values
        keys = ("logits", "reconstruction", "last_hidden_state", "pred_masks", "feature_map")
        first = next(getattr(outputs, key) for key in keys if key in outputs)
        results[f"{name}.output"] = first.contiguous()
        if not auto_class.endswith("Segmentation"):
            base = AutoModel.from_pretrained(folder, trust_remote_code=True)
            results[f"{name}.pooled"] = base(pixel_values).pooler_output
    task = {"AutoModelForImageClassification": "image-classification", "AutoModelForSemanticSegmentation":
            "image-segmentation", "AutoModelForInstanceSegmentation": "image-segmentation",
            "AutoModel": "image-feature-extraction"}.get(auto_class)
    if task:
        answer = pipeline(task, model=folder, trust_remote_code=True)(image)
        report[name] = [a["label"] for a in answer] if task != "image-feature-extraction" else len(answer)
    report[f"{name}.module"] = type(model).__module__
save_file(results, sys.argv[3])
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {name: export(ZOO[name].model(), ZOO[name].processor(), root / name) for name in AUTO_CLASSES}


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "scene.png"
    pixels = torch.randint(0, 256, (80, 100, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def child(exported, image, tmp_path_factory) -> tuple[dict, dict]:
    """Tensors and report of a fresh process that cannot import this package."""
    home = tmp_path_factory.mktemp("elsewhere")
    script = home / "child.py"
    script.write_text(CHILD)
    jobs = json.dumps({name: (str(folder), AUTO_CLASSES[name]) for name, folder in exported.items()})
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, str(script), jobs, str(image), str(home / "results.safetensors")],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return load_file(home / "results.safetensors"), json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_outputs_are_the_same_without_the_package(name, child, image):
    tensors, report = child
    assert "transformers_modules" in report[f"{name}.module"]
    entry = ZOO[name]
    pixel_values = entry.processor()(Image.open(image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(tensors[f"{name}.pixel_values"], pixel_values)
    with torch.no_grad():
        model = entry.model()
        torch.testing.assert_close(
            tensors[f"{name}.output"], main_output(entry, model(pixel_values)), atol=1e-6, rtol=1e-6
        )
        if not AUTO_CLASSES[name].endswith("Segmentation"):
            base = getattr(model, model.base_model_prefix, model)
            torch.testing.assert_close(
                tensors[f"{name}.pooled"], base(pixel_values).pooler_output, atol=1e-6, rtol=1e-6
            )


def test_pipelines_run_from_the_folder(child):
    report = child[1]
    assert sorted(report["vheat-classifier"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert sorted(report["rs-vheat-classifier"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert report["vheat"] == report["rs-vheat"] == 1
    assert set(report["vheat-upernet"]) <= {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert report["rs-vheat-upernet"]
    assert "rs4d-instances" in report


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_the_card_tells_what_the_model_takes_and_where_it_comes_from(name, exported):
    card = (exported[name] / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert AUTO_CLASSES[name] in card
    assert "licence" in card.lower()
    assert "{{" not in card
    assert str(exported[name].parent) not in card


def test_no_file_of_the_folder_names_this_machine(exported):
    for folder in exported.values():
        for file in folder.iterdir():
            if file.suffix in {".json", ".md", ".py"}:
                assert str(folder.parent) not in file.read_text()


def test_exporting_again_overwrites_and_a_checkpoint_folder_can_be_exported(exported, tmp_path):
    for _ in range(2):
        export_folder(exported["rs-vheat-classifier"], tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (exported["rs-vheat-classifier"], tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_load_folder_uses_our_classes_not_the_folders_code(exported, tmp_path):
    folder = exported["vheat-classifier"]
    model, processor = load_folder(folder)
    assert type(model).__module__ == "hf_rsheat.models.modeling_vheat"
    assert type(processor) is VHeatImageProcessor


def test_foreign_models_processors_and_folders_are_refused(tmp_path):
    model = ZOO["vheat"].model()
    with pytest.raises(ConfigurationError, match="resnet"):
        export(
            ResNetModel(ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)), VHeatImageProcessor(), tmp_path
        )
    with pytest.raises(ConfigurationError, match="RSVHeatImageProcessor"):
        export(model, nn.Identity(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        export(model, VHeatImageProcessor(), tmp_path / "file")
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        load_folder(tmp_path)
