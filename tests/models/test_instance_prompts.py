"""The prompt head: SAM's decoder and weights, learned points, positions, masks over the whole image."""

import pytest
import torch
import torch.nn.functional as F
from transformers import SamConfig, SamMaskDecoderConfig, SamModel
from transformers.models.sam.modeling_sam import SamMaskDecoder

from hf_rsheat import RS4DForInstanceSegmentation
from hf_rsheat.models import instance_mask_decoder
from hf_rsheat.models.instance_mask_decoder import decode_masks
from hf_rsheat.models.instance_prompts import add_positions, cover_input, dice_loss, position_map
from tests.zoo import instance_config, randomize


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def model_of(head: str = "prompt", **fields) -> RS4DForInstanceSegmentation:
    model = RS4DForInstanceSegmentation(instance_config(head=head, **fields))
    randomize(model)
    return model.eval()


def sam(hidden_size: int = 16) -> SamModel:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16, "image_size": 64}
    vision |= {"output_channels": hidden_size, "num_pos_feats": hidden_size // 2, "global_attn_indexes": [0]}
    decoder = {"hidden_size": hidden_size, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16}
    prompts = {"hidden_size": hidden_size, "image_size": 64, "image_embedding_size": 4}
    return SamModel(SamConfig(vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompts))


@torch.no_grad()
@pytest.mark.parametrize("from_folder", [False, True])
def test_a_prompt_head_starts_from_sam_and_then_decodes_like_it(from_folder, tmp_path):
    teacher, model = sam().eval(), model_of()
    randomize(teacher)
    if from_folder:
        teacher.save_pretrained(tmp_path)
    model.load_sam_mask_decoder(tmp_path if from_folder else teacher)
    head = model.mask_head
    for name, value in teacher.mask_decoder.state_dict().items():
        assert torch.equal(head.mask_decoder.state_dict()[name], value), name
    assert torch.equal(head.no_mask_embed.weight, teacher.prompt_encoder.no_mask_embed.weight)
    embedding = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(head.shared_image_embedding(embedding), teacher.get_image_wide_positional_embeddings())
    boxes = [torch.tensor([[4.0, 4, 40, 40], [0.0, 10, 60, 64]])]
    pyramid, _, _ = model._features(images()[:1])
    points = head.prompts(pyramid, boxes)[None]
    expected, _ = teacher.mask_decoder(
        image_embeddings=embedding,
        image_positional_embeddings=teacher.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=points,
        dense_prompt_embeddings=teacher.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, 4, 4),
        multimask_output=False,
    )
    torch.testing.assert_close(head(pyramid, embedding, boxes), expected[0, :, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layers", "cells_at_once"), [(1, 8192), (2, 120), (3, 25)])
def test_masks_and_gradients_are_those_of_sams_decoder(layers, cells_at_once, monkeypatch):
    monkeypatch.setattr(instance_mask_decoder, "CELLS_AT_ONCE", cells_at_once)  # all, two prompts, two rows
    config = SamMaskDecoderConfig(
        hidden_size=32, num_attention_heads=4, mlp_dim=24, iou_head_hidden_dim=16, num_hidden_layers=layers
    )
    config._attn_implementation = "eager"
    decoder = SamMaskDecoder(config).double()  # its softmax stays in float32
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    image, positions = torch.randn(2, 32, 6, 10, dtype=torch.float64)
    prompts = torch.randn(5, 3, 32, dtype=torch.float64, requires_grad=True)
    expected, _ = decoder(image[None], positions[None], prompts[None], torch.zeros(1, 32, 1, 1), False)
    actual = decode_masks(decoder, image, positions, prompts)
    assert actual.shape == (5, 24, 40)
    torch.testing.assert_close(actual, expected[0, :, 0], atol=1e-5, rtol=1e-5)
    weights = [prompts, *(p for n, p in decoder.named_parameters() if "iou" not in n and "mlps" not in n)]
    wanted = torch.autograd.grad(expected.square().mean(), weights)
    gradients = torch.autograd.grad(actual.square().mean(), weights, allow_unused=True)
    largest = max(float(other.abs().max()) for other in wanted)
    for gradient, other in zip(gradients, wanted, strict=True):
        if gradient is None:  # a bias that moves all scores of a softmax alike: its gradient is rounding
            gradient = torch.zeros_like(other)
        torch.testing.assert_close(gradient, other, atol=1e-5 * largest, rtol=1e-4)
    assert decode_masks(decoder, image, positions, prompts[:0]).shape == (0, 24, 40)


def test_a_sam_that_does_not_fit_is_refused_and_changes_nothing():
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"mask_decoder\.iou_token\.weight"):
        model.load_sam_mask_decoder(sam(32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="head='bbox'"):
        model_of("bbox").load_sam_mask_decoder(sam())


def test_masks_over_the_image_keep_their_place_where_patches_reach_over_it():
    ramp = torch.linspace(0, 1, 80)
    rows = F.interpolate(ramp.expand(1, 1, 64, 80), size=(16, 20), mode="bilinear")[0]
    covered = cover_input(rows, 16, (50, 75))
    assert covered.shape == (1, 50, 75)
    torch.testing.assert_close(covered[0, 10, 4:70], ramp[4:70], atol=1e-2, rtol=0)


def test_position_maps_differ_between_all_places_and_are_resized_for_coarser_levels():
    pyramid = [torch.zeros(1, 16, 8, 12), torch.zeros(1, 16, 4, 6)]
    finest, coarser = add_positions(pyramid)
    torch.testing.assert_close(finest, position_map(pyramid[0]))
    assert len(finest[0].flatten(1).T.unique(dim=0)) == 8 * 12
    torch.testing.assert_close(coarser, F.interpolate(finest, size=(4, 6), mode="bilinear"))


def test_sums_of_sines_and_values_are_a_choice():
    model = model_of(with_sincos=True, n_points=3)
    pyramid, _, _ = model._features(images())
    boxes = [torch.tensor([[0.0, 0, 20, 30]]), torch.zeros(0, 4)]
    points = model.mask_head.prompts(pyramid, boxes)
    assert points.shape == (1, 3, 16)
    values = []
    model.mask_head.point_emb.register_forward_hook(lambda _module, _inputs, output: values.append(output))
    model.mask_head.prompts(pyramid, boxes)
    raw = values[0].reshape(1, 3, 32)
    torch.testing.assert_close(points, torch.sin(raw[..., 0::2]) + raw[..., 1::2])


@torch.no_grad()
def test_prompts_of_a_box_can_start_at_its_places():
    plain, located = model_of(), model_of(with_box_pe=True, n_points=6)
    located.mask_head.shared_image_embedding.load_state_dict(plain.mask_head.shared_image_embedding.state_dict())
    for parameter in located.mask_head.point_emb[-1].parameters():
        parameter.zero_()
    pyramid, _, image = located._features(images()[:1])
    points = located.mask_head.prompts(pyramid, [torch.tensor([[8.0, 24, 40, 56]])])[0]
    encoding = located.mask_head.shared_image_embedding(image)[0]  # of the centres of 4 x 4 cells of 16 pixels
    places = [(2, 1), (1, 0), (1, 2), (3, 0), (3, 2), (2, 1)]  # centre, corners, and again
    torch.testing.assert_close(points, torch.stack([encoding[:, row, column] for row, column in places]))


def test_then_attention_starts_with_keys_made_as_queries_and_finds_the_place():
    decoder = {"hidden_size": 128, "num_attention_heads": 4, "mlp_dim": 16, "iou_head_hidden_dim": 16}
    torch.manual_seed(0)
    head = RS4DForInstanceSegmentation(
        instance_config(head="prompt", with_box_pe=True, mask_decoder_config=decoder)
    ).mask_head
    places = head.shared_image_embedding(torch.zeros(1, 128, 8, 8))[0].flatten(1).T
    blocks = head.mask_decoder.transformer.layers
    for attention in (blocks[0].cross_attn_image_to_token, blocks[1].cross_attn_token_to_image):
        assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)
        scores = attention.q_proj(places) @ attention.k_proj(places).T
        assert torch.equal(scores.argmax(1), torch.arange(64))
    other = instance_config(head="prompt", mask_decoder_config=decoder)
    block = RS4DForInstanceSegmentation(other).mask_head.mask_decoder.transformer.layers[0]
    assert not torch.equal(block.cross_attn_image_to_token.q_proj.weight, block.cross_attn_image_to_token.k_proj.weight)


def test_the_dice_loss_is_part_of_the_mask_loss_only_where_it_is_asked_for():
    targets = torch.zeros(3, 4, 4)
    targets[:2, 1:3, 1:3] = 1
    logits = torch.full((3, 4, 4), -40.0)
    logits[0][targets[0] > 0] = 40.0
    torch.testing.assert_close(dice_loss(logits, targets), torch.tensor([0.0, 0.8, 0.0]))  # right, missed, none
    losses = {}
    for weight in (0.0, 2.0):
        model = model_of(mask_dice_weight=weight)
        label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])}
        label["masks"] = F.pad(torch.ones(1, 32, 32), (16, 16, 16, 16)) > 0
        generator = torch.Generator().manual_seed(0)
        losses[weight] = model(images()[:1], labels=[label], generator=generator).loss_dict["loss_mask"].item()
    assert 0 < losses[2.0] - losses[0.0] < 2
    with pytest.raises(ValueError, match="mask_dice_weight"):
        instance_config(head="prompt", mask_dice_weight=-1.0)


def test_a_detector_can_change_to_the_prompt_head_when_it_is_loaded(tmp_path):
    model_of("bbox").save_pretrained(tmp_path)
    model = RS4DForInstanceSegmentation.from_pretrained(tmp_path, head="prompt")
    assert model.mask_head.mask_decoder.hidden_size == 256  # SAM's own, since nothing else was said
    assert model.mask_head.projection.weight.shape == (256, 16, 1, 1)
    with torch.no_grad():
        assert model(images()).pred_masks.shape[2:] == (16, 16)
