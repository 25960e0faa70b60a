"""The pretraining figure: its panels hold what they say, whatever the image."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hf_rsheat import RSVHeatConfig, RSVHeatForPreTraining, RSVHeatImageProcessor
from hf_rsheat.errors import MissingExtraError
from hf_rsheat.figures import PATCH, explain, pretraining_figure
from hf_rsheat.scenes import make_scene


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = RSVHeatConfig(
        image_size=64,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        drop_path_rate=0.5,
        layer_scale_init_value=None,
        initializer_range=0.3,
    )
    return RSVHeatForPreTraining(config)


@pytest.fixture(scope="module")
def processor():
    return RSVHeatImageProcessor(size={"height": 64, "width": 64})


@pytest.fixture(scope="module")
def scene():
    return make_scene(64, 0, "harbor")


def test_figure_is_a_1600_pixel_wide_png_for_both_sensors(model, processor, scene, tmp_path):
    for modality, pixels in (("optical", scene.optical), ("sar", scene.sar)):
        path = tmp_path / f"{modality}.png"
        assert pretraining_figure(model, processor, Image.fromarray(pixels), path, modality=modality) == path
        with Image.open(path) as picture:
            assert picture.width == 1600
            assert np.asarray(picture.convert("L")).std() > 20


def test_panels_show_the_input_and_the_models_own_output(model, processor, scene):
    image = Image.fromarray(scene.optical)
    found = explain(model, processor, image)
    np.testing.assert_allclose(found.image * 255, scene.optical, atol=0.51)
    with torch.no_grad():
        output = model(**processor(image, return_tensors="pt"), mask_radius=0.25)
    mean, spread = (np.array(processor.modalities["optical"][name]) for name in ("image_mean", "image_std"))
    expected = np.clip(output.reconstruction[0].permute(1, 2, 0).numpy() * spread + mean, 0, 1)
    np.testing.assert_allclose(found.reconstruction, expected, atol=1e-5)
    assert found.mask_radius == 0.25


def test_diffusivity_is_the_same_for_every_image_and_the_response_is_not(model, processor, scene):
    first = explain(model, processor, Image.fromarray(scene.optical))
    second = explain(model, processor, Image.fromarray(make_scene(64, 1, "forest").optical))
    assert np.array_equal(first.diffusivity, second.diffusivity)
    assert (first.diffusivity >= 0).all()
    assert first.diffusivity.max() > 0
    assert not np.allclose(first.response, second.response)


@pytest.mark.parametrize("patch", [(0, 0), (1, 3), (3, 1)])
def test_response_is_strongest_near_the_heated_patch(model, processor, scene, patch):
    response = explain(model, processor, Image.fromarray(scene.optical), patch=patch, stage=1).response
    assert response.shape == (16, 16)
    row, column = np.unravel_index(response.argmax(), response.shape)
    cells = PATCH // 4
    assert abs(row - (patch[0] + 0.5) * cells) <= cells
    assert abs(column - (patch[1] + 0.5) * cells) <= cells


def test_impossible_stages_and_patches_are_refused_with_the_possible_ones(model, processor, scene):
    image = Image.fromarray(scene.optical)
    with pytest.raises(ValueError, match="1, 2, 3 or 4"):
        explain(model, processor, image, stage=5)
    with pytest.raises(ValueError, match="4 rows and 4 columns"):
        explain(model, processor, image, patch=(4, 0))


def test_missing_matplotlib_names_the_extra(model, processor, scene, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"hf_rsheat\[viz\]"):
        pretraining_figure(model, processor, Image.fromarray(scene.optical), tmp_path / "a.png")
