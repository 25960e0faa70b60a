"""Slimmed folders load elsewhere, in a process that has never heard of this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BitImageProcessor, ViTImageProcessor

from hf_rsheat import RS4DImageProcessor, RSVHeatImageProcessor, SelectiveMAEImageProcessor, VHeatImageProcessor
from hf_rsheat.errors import ConfigurationError
from hf_rsheat.hub.verify import verify
from hf_rsheat.slimming.folder import load_model, slim_folder

from .models import build, images, outputs

LOADER = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_rsheat":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
inputs, results = load_file(sys.argv[2]), {}
for name, (folder, remote) in json.loads(sys.argv[1]).items():
    model = AutoModel.from_pretrained(folder, trust_remote_code=remote)
    torch.manual_seed(5)
    with torch.no_grad():
        results[name] = model(inputs[name]).last_hidden_state.contiguous()
save_file(results, sys.argv[3])
"""
PROCESSORS = {
    "vit-mae": ViTImageProcessor,
    "dinov2": BitImageProcessor,
    "dinov2-swiglu": BitImageProcessor,
    "dinov3": ViTImageProcessor,
    "vheat": VHeatImageProcessor,
    "rs-vheat": RSVHeatImageProcessor,
    "rs4d": RS4DImageProcessor,
    "selective-mae": SelectiveMAEImageProcessor,
}
REMOTE = ("dinov2", "dinov2-swiglu", "vheat", "rs-vheat", "rs4d", "selective-mae")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(3):
        pixels = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(index)).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, photos) -> dict[str, Path]:
    """A slimmed folder of every architecture."""
    root = tmp_path_factory.mktemp("models")
    written = {}
    for name, processor in PROCESSORS.items():
        model = build(name)
        model.save_pretrained(root / name)
        side = images(model).shape[-1]
        processor(size={"height": side, "width": side}, do_center_crop=False).save_pretrained(root / name)
        written[name] = root / f"{name}-half"
        slim_folder(root / name, written[name], 0.5, correction="ridge", images=photos)
    return written


def test_auto_model_loads_them_in_a_process_without_this_package(folders, tmp_path):
    from safetensors.torch import save_file

    inputs, expected = {}, {}
    for name, folder in folders.items():
        model, _ = load_model(folder)
        inputs[name] = images(model, 1).clone()
        expected[name] = outputs(model, inputs[name])[0]
    save_file(inputs, tmp_path / "inputs.safetensors")
    jobs = json.dumps({name: (str(folder), name in REMOTE) for name, folder in folders.items()})
    subprocess.run(
        [sys.executable, "-c", LOADER, jobs, tmp_path / "inputs.safetensors", tmp_path / "results.safetensors"],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    found = load_file(tmp_path / "results.safetensors")
    for name in folders:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_widths_and_their_story_stand_in_the_config(folders):
    for name, folder in folders.items():
        config = json.loads((folder / "config.json").read_text())
        assert config["slim"]["width_multiplier"] == 0.5
        assert config["slim"]["correction"] == "ridge"
        assert config["slim"]["base"] == name
        assert str(folder.parent) not in json.dumps(config)


def test_stock_models_stay_stock(folders):
    for name, model_type in (("vit-mae", "vit_mae"), ("dinov3", "dinov3_vit")):
        config = json.loads((folders[name] / "config.json").read_text())
        assert config["model_type"] == model_type
        assert "auto_map" not in config


@pytest.mark.parametrize("name", ["vheat", "rs-vheat", "rs4d", "selective-mae"])
def test_our_slimmed_folders_pass_verification(folders, name):
    verify(folders[name])


def test_a_slimmed_folder_can_be_slimmed_again(folders, tmp_path):
    smaller = slim_folder(folders["dinov2"], tmp_path / "quarter", 0.5)
    assert smaller.config.head_dim == 2
    assert smaller.config.slim["previous"]["width_multiplier"] == 0.5


def test_the_full_model_is_never_overwritten(folders):
    with pytest.raises(ConfigurationError, match="give another one"):
        slim_folder(folders["vheat"], folders["vheat"], 0.5)
