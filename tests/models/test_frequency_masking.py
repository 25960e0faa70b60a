"""Frequency masks and targets equal the original helper's."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_rsheat.models.frequency_masking import frequency_distance, frequency_mask, frequency_masks, frequency_target
from hf_rsheat.models.heat_conduction import cosine_basis

CASES = ["1x50x50_s0.3", "1x64x64_s0.25", "3x32x32_s-0.1", "3x40x56_s0.2", "3x64x64_s0.3"]


@pytest.fixture(scope="module")
def tensors(golden):
    return load_file(golden / "rs_vheat/frequency_masking.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_masked_images_are_the_originals(tensors, case):
    image = tensors[f"{case}.image"][None]
    low_cut, high_cut, low_cut_mask, high_cut_mask = frequency_mask(image, float(case.split("_s")[1]))
    assert torch.equal(low_cut_mask, tensors[f"{case}.mask_lowcut"].float())
    assert torch.equal(high_cut_mask, tensors[f"{case}.mask_highcut"].float())
    torch.testing.assert_close(low_cut[0], tensors[f"{case}.out_lowcut"], atol=1e-5, rtol=0)
    torch.testing.assert_close(high_cut[0], tensors[f"{case}.out_highcut"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_frequency_targets_are_the_originals(tensors, case):
    image = 30 * tensors[f"{case}.image"][None]
    for clamp, name in ((True, "apply_dct"), (False, "apply_dct_image")):
        torch.testing.assert_close(frequency_target(image, clamp)[0], tensors[f"{case}.{name}"], atol=1e-4, rtol=0)


def test_frequency_targets_are_clamped_as_the_originals(tensors):
    image = tensors["clamp.image"][None]
    torch.testing.assert_close(frequency_target(image, True)[0], tensors["clamp.apply_dct"], atol=1e-2, rtol=0)
    torch.testing.assert_close(frequency_target(image)[0], tensors["clamp.apply_dct_image"], atol=1e-2, rtol=0)


def test_transform_and_masks_agree_with_the_unpadded_scipy_variant(tensors):
    """The original's numpy twin without padding (its 1-channel high-cut image is a known bug, so 3 channels)."""
    case = {key.removeprefix("scipy_3x24x40."): value for key, value in tensors.items() if key.startswith("scipy_3")}
    masks = frequency_masks(24, 40, 0.25)
    assert torch.equal(masks[0], case["mask_lowcut"].float())
    assert torch.equal(masks[1], case["mask_highcut"].float())
    rows, columns = cosine_basis(24), cosine_basis(40)
    spectrum = rows @ case["image"].float() @ columns.T
    torch.testing.assert_close(spectrum, case["DCT_ortho"].float(), atol=1e-5, rtol=0)
    for mask, name in zip(masks, ("out_lowcut", "out_highcut"), strict=True):
        torch.testing.assert_close(rows.T @ (spectrum * mask) @ columns, case[name].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mode", "keeps_low"), [("mode1", False), ("mode2", True)])
def test_masks_agree_with_the_low_high_helper(tensors, mode, keeps_low):
    """The original's plain low/high masks: ours, except that ours always keep the mean and the tie."""
    reference = tensors[f"low_high_mask.{mode}.12x20_r0.25"]
    low_cut, high_cut = frequency_masks(12, 20, 0.25)
    limit = 0.25 * float(np.hypot(12, 20))
    distance = frequency_distance(12, 20)
    interior = (distance > 0) & (distance - limit).abs().gt(1e-9)
    ours = high_cut if keeps_low else low_cut
    if ours.shape != reference.shape:
        reference = reference.T
    assert torch.equal(ours[interior], reference.float()[interior])


def test_low_cut_and_high_cut_add_up_to_the_image_and_its_mean():
    image = torch.randn(2, 3, 32, 64)
    low_cut, high_cut, low_cut_mask, high_cut_mask = frequency_mask(image, 0.2503)  # no coefficient lies at this radius
    assert (low_cut_mask + high_cut_mask == 1).sum() == 32 * 64 - 1
    torch.testing.assert_close(low_cut + high_cut, image + image.mean(dim=(2, 3), keepdim=True), atol=1e-5, rtol=0)


def test_one_radius_per_image_masks_each_image_by_its_own():
    images, radii = torch.randn(2, 1, 20, 30), torch.tensor([0.2, 0.3])
    low_cut, high_cut, low_cut_mask, _ = frequency_mask(images, radii)
    assert low_cut_mask.shape == (2, 32, 32)
    for i in range(2):
        alone = frequency_mask(images[i : i + 1], radii[i])
        torch.testing.assert_close(low_cut[i], alone[0][0], atol=1e-6, rtol=0)
        torch.testing.assert_close(high_cut[i], alone[1][0], atol=1e-6, rtol=0)


def test_half_precision_images_are_transformed_in_float32():
    image = 10 + torch.randn(1, 1, 64, 64)
    low_cut = frequency_mask(image.half(), 0.2)[0]
    assert low_cut.dtype == torch.float16
    torch.testing.assert_close(low_cut.float(), frequency_mask(image.half().float(), 0.2)[0], atol=1e-2, rtol=1e-3)


def test_a_radius_above_one_is_refused():
    with pytest.raises(ValueError, match="share of the spectrum"):
        frequency_mask(torch.zeros(1, 1, 8, 8), 20.0)
