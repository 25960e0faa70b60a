"""Gradients, the Siamese trunk and the unused deformable convolution, against the original RS-vHeat code."""

import pytest
import torch
from safetensors.torch import load_file
from torchvision.ops import deform_conv2d

from hf_rsheat.conversion import heat, rs_vheat
from hf_rsheat.models.frequency_masking import frequency_mask

OPTIONS = {"weights": "model", "overrides": None, "image_size": None, "resize": "bilinear"}


def test_gradients_are_the_originals(golden):
    reference = load_file(golden / "rs_vheat/grads_small_opt.safetensors")
    pixel_values = load_file(golden / "rs_vheat/io_small_opt.safetensors")["input"]
    model, result = heat.load(rs_vheat.FAMILY, golden / "rs_vheat/small_finetune_ema.pth", **OPTIONS)
    loss = model(pixel_values, labels=reference["target"]).loss
    torch.testing.assert_close(loss, reference["loss"], atol=2e-5, rtol=0)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = [key.removeprefix("grad.") for key in reference if key.startswith("grad.")]
    assert len(names) == 9
    for name in names:
        expected = reference[f"grad.{name}"]
        actual = gradients[result.key_map[name]]
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual.reshape(expected.shape), expected, atol=1e-3 * scale, rtol=1e-3)


@pytest.mark.parametrize(("sensor", "modality"), [("opt", "optical"), ("sar", "sar")])
def test_low_cut_and_high_cut_images_go_through_the_trunk_as_the_originals(golden, sensor, modality):
    reference = load_file(golden / "rs_vheat/siamese_low_high.safetensors")
    pixel_values = load_file(golden / f"rs_vheat/io_small_{sensor}.safetensors")["input"]
    model, _ = heat.load(rs_vheat.FAMILY, golden / "rs_vheat/small_pretrain_encoder_prefix.pth", **OPTIONS)
    images = dict(zip(("high", "low"), frequency_mask(pixel_values, 0.25)[:2], strict=True))  # low-cut keeps "high"
    for half, image in images.items():
        torch.testing.assert_close(image, reference[f"{sensor}.{half}.input"], atol=1e-5, rtol=0)
        with torch.no_grad():
            outputs = model(image, modality, output_hidden_states=True)
        features = {"forward_features": outputs.last_hidden_state, "stage2.pre_down": outputs.hidden_states[3]}
        for name, feature in features.items():
            torch.testing.assert_close(feature, reference[f"{sensor}.{half}.{name}"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(("case", "stride"), [("mod0_stride1", 1), ("mod1_stride1", 1), ("mod1_stride2", 2)])
def test_the_originals_unused_deformable_convolution_is_torchvisions(golden, case, stride):
    """The released model never calls it; whoever needs it takes torchvision's, with offsets ordered (dy, dx)."""
    tensors = load_file(golden / "rs_vheat/deform_conv.safetensors")
    x, weights = tensors[f"{case}.x"], {k.removeprefix(f"{case}.w."): v for k, v in tensors.items() if f"{case}.w" in k}

    def convolve(name: str) -> torch.Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return torch.nn.functional.conv2d(x, weight, bias, stride=stride, padding=1)

    rows, columns = convolve("p_conv").chunk(2, dim=1)
    offsets = torch.stack((rows, columns), dim=2).flatten(1, 2)
    mask = convolve("m_conv").sigmoid() if "m_conv.weight" in weights else None
    output = deform_conv2d(x, offsets, weights["conv.weight"], stride=stride, padding=1, mask=mask)
    torch.testing.assert_close(output, tensors[f"{case}.out"], atol=5e-6, rtol=0)
