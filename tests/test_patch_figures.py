"""The reconstruction figure: every patch stands where it belongs, and says whether it was seen or predicted."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_rsheat import SelectiveMAEConfig, SelectiveMAEForPreTraining, SelectiveMAEImageProcessor
from hf_rsheat.models.selective_mae_layers import patchify
from hf_rsheat.patch_figures import patch_views, reconstruction_figure, selective_mae_views, unpatchify
from hf_rsheat.scenes import make_scene


def make_model(**changes):
    fields = {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "decoder_hidden_size": 12,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
    }
    torch.manual_seed(0)
    return SelectiveMAEForPreTraining(SelectiveMAEConfig(**{**fields, **changes})).eval()


def test_unpatchify_undoes_patchify():
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(unpatchify(patchify(images, 8), 8, 2, 3), images)


@pytest.mark.parametrize("standardised", [False, True])
def test_a_perfect_prediction_restores_the_image(standardised):
    images = torch.rand(2, 3, 20, 24)  # not a multiple of the patch
    patches = patchify(torch.nn.functional.pad(images, (0, 0, 0, 4)), 8)
    predictions = patches
    if standardised:
        predictions = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    encoded = torch.zeros(2, 9, dtype=torch.bool)
    encoded[:, ::2] = True
    views = patch_views(images, 8, encoded, ~encoded, predictions, standardised)
    torch.testing.assert_close(views.restored, images, atol=1e-5, rtol=1e-5)
    assert torch.equal(views.encoded == 0, views.predicted.expand_as(images))


def test_views_show_what_the_model_encodes_and_predicts():
    model, pixel_values = make_model(norm_pix_loss=False), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        views, output = selective_mae_views(model, pixel_values), model(pixel_values)
    for image in range(2):
        shown = {int(i) for i in patchify(views.encoded, 8)[image].abs().sum(-1).nonzero()}
        assert shown == set(output.encode_ids[image].tolist())
        restored = patchify(views.restored, 8)[image]
        torch.testing.assert_close(restored[output.reconstruct_ids[image]], output.logits[image])
        assert int(views.predicted[image].sum()) == output.reconstruct_ids.shape[1] * 64


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_figure_is_a_1600_pixel_wide_png(tmp_path, norm_pix_loss):
    image = Image.fromarray(make_scene(80, 0, "harbor").optical)
    processor = SelectiveMAEImageProcessor(size={"height": 64, "width": 64})
    path = reconstruction_figure(make_model(norm_pix_loss=norm_pix_loss), processor, image, tmp_path / "a.png")
    with Image.open(path) as picture:
        assert picture.width == 1600
        assert np.asarray(picture.convert("L")).std() > 20
