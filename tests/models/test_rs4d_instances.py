"""Instance segmentation: both heads over every backbone, labels, losses, detections, and where weights come from."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert
from transformers import AutoModelForInstanceSegmentation

from hf_rsheat import RS4DForInstanceSegmentation, RS4DInstanceConfig, adapt_input_channels
from hf_rsheat.models.instance_boxes import TARGETS_AT_ONCE
from hf_rsheat.models.instance_heads import Samples, Targets, _cut_masks
from hf_rsheat.models.instance_neck import FeatureAggregator, SimplePyramid
from tests.zoo import instance_config, randomize, rs4d_config, rs_vheat_config, vheat_config

BACKBONES = {"rs4d": rs4d_config, "vheat": vheat_config, "rs-vheat": rs_vheat_config}
# What SAM's decoder has for several masks per prompt and for their quality, and biases that change no softmax.
UNUSED_IN_SAM = (
    "iou_prediction_head",
    *(f"output_hypernetworks_mlps.{i}." for i in (1, 2, 3)),
    "token_to_image.k_proj.bias",
)
HEADS = pytest.mark.parametrize("head", ["bbox", "prompt"])


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


def label(boxes: list[list[float]], classes: list[int], size: tuple[int, int] = (64, 64)) -> dict[str, torch.Tensor]:
    """Objects that fill their boxes (corners, pixels)."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    y, x = (torch.arange(side) + 0.5 for side in size)
    inside = [(y[:, None] > b[1]) & (y[:, None] < b[3]) & (x > b[0]) & (x < b[2]) for b in corners]
    masks = torch.stack(inside) if inside else torch.zeros(0, *size, dtype=torch.bool)
    scale = torch.tensor([size[1], size[0]]).repeat(2)
    return {
        "class_labels": torch.tensor(classes, dtype=torch.int64),
        "boxes": box_convert(corners, "xyxy", "cxcywh") / scale,
        "masks": masks,
    }


LABELS = [label([[4, 6, 40, 30], [30, 30, 60, 62]], [0, 2]), label([[10, 10, 30, 50]], [1])]
EMPTY = label([], [])


def model_of(head: str = "bbox", backbone: str = "rs4d", **fields) -> RS4DForInstanceSegmentation:
    torch.manual_seed(0)
    model = RS4DForInstanceSegmentation(instance_config(BACKBONES[backbone](), head, **fields))
    randomize(model)
    return model.eval()


@HEADS
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_loss_trains_every_parameter(head, backbone):
    model = model_of(head, backbone).train()
    output = model(images(64, 64), labels=LABELS)
    assert output.pred_boxes is None
    assert output.loss.item() == pytest.approx(sum(value.item() for value in output.loss_dict.values()), rel=1e-5)
    output.loss.backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not [n for n in idle if not any(part in n for part in (*UNUSED_IN_SAM, "stems.sar"))]


@torch.no_grad()
@HEADS
@pytest.mark.parametrize("backbone", BACKBONES)
def test_detections_are_padded_sorted_and_inside_the_image(head, backbone):
    model = model_of(head, backbone)
    pixel_mask = torch.ones(2, 64, 96)
    pixel_mask[1, 40:] = 0
    pixel_mask[1, :, 50:] = 0
    output = model(images(64, 96), pixel_mask)
    batch, number = output.scores.shape
    assert (batch, number) <= (2, 8)
    assert output.pred_boxes.shape == (batch, number, 4)
    assert output.class_labels.dtype == torch.int64
    assert (output.scores.diff(dim=1) <= 0).all()
    real = output.class_labels >= 0
    assert real.any(1).all()
    assert torch.equal(real, output.scores > 0)
    assert output.pred_boxes[~real].eq(0).all()
    assert output.pred_boxes.min() >= 0
    assert (output.pred_boxes[real][:, 2:] > output.pred_boxes[real][:, :2]).all()
    for image, (height, width) in enumerate([(64, 96), (40, 50)]):
        assert output.pred_boxes[image, :, ::2].max() <= width
        assert output.pred_boxes[image, :, 1::2].max() <= height
    assert output.pred_masks.min() >= 0
    assert 0 < output.pred_masks.max() <= 1
    shape = (28, 28) if model.config.mask_layout == "box" else (16, 24)
    assert output.pred_masks.shape[2:] == shape


@torch.no_grad()
@HEADS
def test_an_image_has_the_same_detections_alone_and_in_a_batch(head):
    model = model_of(head)
    pixel_values = images(64, 64)
    both = model(pixel_values)
    for i in range(2):
        alone = model(pixel_values[i : i + 1])
        number = alone.scores.shape[1]
        torch.testing.assert_close(both.pred_boxes[i, :number], alone.pred_boxes[0], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(both.pred_masks[i, :number], alone.pred_masks[0], atol=1e-4, rtol=1e-4)
        assert (both.class_labels[i, number:] == -1).all()


@HEADS
@pytest.mark.parametrize("labels", [[EMPTY, EMPTY], [EMPTY, LABELS[1]], [label([[5, 5, 6, 6]], [0]), LABELS[0]]])
def test_images_without_objects_and_objects_of_one_pixel_train(head, labels):
    model = model_of(head).train()
    output = model(images(64, 64), labels=labels)
    assert all(value.isfinite() for value in output.loss_dict.values())
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@HEADS
def test_a_batch_without_proposals_gives_no_detections_and_a_finite_loss(head):
    model = model_of(head)
    nothing = torch.zeros(2, 64, 64)  # every box is clipped to nothing
    output = model(images(64, 64), nothing, [EMPTY, EMPTY])
    assert output.scores.shape == (2, 0)
    assert output.pred_boxes.shape == (2, 0, 4)
    assert output.pred_masks.shape[:2] == (2, 0)
    assert output.loss.isfinite()
    output.loss.backward()
    sure = model_of(head, score_threshold=1.0)
    with torch.no_grad():
        assert sure(images(64, 64)).class_labels.shape == (2, 0)


@HEADS
def test_what_the_loss_draws_follows_from_the_generator(head):
    fields = {"rpn_num_samples": 8, "rcnn_num_samples": 4, "rcnn_pos_iou": 0.1, "rcnn_neg_iou": 0.1}
    model = model_of(head, **fields)

    def loss(seed: int) -> torch.Tensor:
        with torch.no_grad():
            return model(images(64, 64), labels=LABELS, generator=torch.Generator().manual_seed(seed)).loss

    state = torch.get_rng_state()
    assert loss(1).item() == loss(1).item()
    assert loss(1).item() != loss(2).item()
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_labels_in_evaluation_give_loss_and_detections():
    output = model_of()(images(64, 64), labels=LABELS)
    assert output.loss is not None
    assert output.scores is not None
    plain = model_of()(images(64, 64))
    torch.testing.assert_close(output.scores, plain.scores)
    assert plain.loss is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": torch.tensor([0, 3])}, "within 0 and 2"),
        ({"class_labels": torch.tensor([0, -1])}, "within 0 and 2"),
        ({"masks": torch.zeros(2, 32, 32)}, r"\(64, 64\)"),
        ({"boxes": torch.rand(3, 4)}, "2 class labels"),
        ({"boxes": torch.tensor([[0.5, 0.5, 0.1, 0.0]] * 2)}, "no width or height"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message):
    model = model_of().train()
    with pytest.raises(ValueError, match=message):
        model(images(64, 64), labels=[{**LABELS[0], **change}, LABELS[1]])
    with pytest.raises(ValueError, match="one dict per image"):
        model(images(64, 64), labels=LABELS[:1])


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 2e-2), (torch.float64, 1e-4)])
@HEADS
def test_low_and_double_precision_weights_work(head, dtype, tolerance, tmp_path):
    model = model_of(head)
    model.save_pretrained(tmp_path)
    converted = RS4DForInstanceSegmentation.from_pretrained(tmp_path, dtype=dtype)
    assert next(converted.parameters()).dtype == dtype
    for name, value in model.dense_outputs(images(64, 64)).items():
        actual = converted.dense_outputs(images(64, 64).to(dtype))[name]
        assert (actual.float() - value).norm() / value.norm() < tolerance, name
    output = converted(images(64, 64).to(dtype), labels=LABELS)
    assert output.loss.isfinite()
    assert output.pred_boxes.isfinite().all()


@HEADS
def test_dense_outputs_depend_on_every_weight(head):
    model = model_of(head)
    outputs = model.dense_outputs(images(64, 64))
    sum(value.square().sum() for value in outputs.values()).backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not [n for n in idle if not any(part in n for part in UNUSED_IN_SAM)]


def test_weights_missing_in_a_checkpoint_are_initialised_not_garbage(tmp_path):
    model = model_of("prompt", with_sincos=True)
    model.backbone.save_pretrained(tmp_path / "backbone")
    state = {n: v for n, v in model.state_dict().items() if n.startswith("backbone.")}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForInstanceSegmentation.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert value.isfinite().all(), name
        assert value.abs().max() < 10, name
    norm = loaded.neck.aggregator.fusion_conv[1]
    assert norm.running_var.eq(1).all()
    assert norm.num_batches_tracked == 0
    assert loaded.mask_head.shared_image_embedding.positional_embedding.std() == pytest.approx(1, abs=0.6)
    assert loaded.proposal_head.classifier.weight.detach().std() == pytest.approx(0.01, rel=0.5)
    assert loaded.box_head.regressor.weight.detach().std() == pytest.approx(0.001, rel=0.5)
    assert torch.equal(loaded.backbone.encoder.norm.weight, model.backbone.encoder.norm.weight)


@torch.no_grad()
@HEADS
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (75, 50)])
def test_any_input_size_trains_and_detects(head, size):
    model = model_of(head)
    labels = [label([[0, 0, size[1], size[0]]], [1], size), label([], [], size)]
    output = model(images(*size), labels=labels)
    assert output.loss.isfinite()
    if head == "prompt" and output.scores.shape[1]:
        assert output.pred_masks.shape[2:] == size  # no quarter of it covers exactly the image


@torch.no_grad()
def test_the_aggregator_goes_forward_and_in_its_pa_variant_back():
    maps = list(torch.randn(3, 2, 16, 4, 4))
    for pa in (False, True):
        config = instance_config(rs4d_config(num_hidden_layers=3), aggregator_pa=pa)
        aggregator = FeatureAggregator(16, config).eval()
        f = [down(m) for down, m in zip(aggregator.downconvs, maps, strict=True)]
        h = aggregator.hidden_convs
        x = f[0] + h[0](f[0])
        x = (x + f[1]) + h[1](x + f[1])
        x = (x + f[2]) + h[2](x + f[2])
        if pa:
            r = aggregator.reverse_convs
            x = r[2](x) + x
            x = r[1](f[1]) + x
            x = r[1](x) + x
            x = r[0](f[0]) + x
        torch.testing.assert_close(aggregator(maps), aggregator.fusion_conv(x))


@torch.no_grad()
def test_the_pa_pyramid_adds_each_finer_level():
    plain, pa = (SimplePyramid(instance_config(fpn_pa=pa)).eval() for pa in (False, True))
    pa.load_state_dict(plain.state_dict())
    x = torch.randn(1, 16, 4, 6)
    expected = plain(x)[:4]
    for i in (1, 2, 3):
        finer = F.interpolate(expected[i - 1], size=expected[i].shape[-2:], mode="bilinear")
        expected[i] = plain.fpn_convs[i](expected[i] + finer)
    actual = pa(x)
    for level, wanted in zip(actual[:4], expected, strict=True):
        torch.testing.assert_close(level, wanted)
    assert [tuple(level.shape[-2:]) for level in actual] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


def test_the_defaults_are_the_published_settings():
    config = RS4DInstanceConfig(num_labels=1)
    assert config.to_dict()["backbone_config"]["num_hidden_layers"] == 24
    assert list(config.select_layers) == list(range(1, 22, 2))
    assert (list(config.anchor_scales), config.rcnn_num_samples, config.with_extra_pe) == ([8], 512, False)
    assert (config.strides, config.image_size, config.mask_layout) == ((4, 8, 16, 32, 64), 1024, "box")
    config = RS4DInstanceConfig(head="prompt", num_labels=1)
    assert list(config.select_layers) == list(range(2, 23, 2))
    assert (list(config.anchor_scales), config.rcnn_num_samples, config.with_extra_pe) == ([4, 8], 256, True)
    assert config.mask_layout == "image"
    with torch.device("meta"):
        parameters = sum(p.numel() for p in RS4DForInstanceSegmentation(config).parameters())
    assert parameters == 38_832_296


@HEADS
def test_configurations_reload_as_they_were(head, tmp_path):
    config = instance_config(head=head, id2label={0: "ship", 1: "harbor", 2: "bridge"})
    config.save_pretrained(tmp_path)
    reloaded = RS4DInstanceConfig.from_pretrained(tmp_path)
    assert reloaded.to_dict() == config.to_dict()
    assert RS4DInstanceConfig.from_pretrained(tmp_path, select_layers=[1]).out_indices == [2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "mask"}, "bbox, prompt"),
        ({"select_layers": [1, 0]}, "ascending layers from 0 to 1"),
        ({"select_layers": []}, "ascending layers"),
        ({"select_layers": [2]}, "ascending layers"),
        ({"backbone_config": {"model_type": "resnet"}}, "rs4d, rs_vheat, vheat"),
        ({"backbone_config": vheat_config(), "select_layers": [1]}, "hierarchical"),
        ({"backbone_config": vheat_config(), "fpn_pa": True}, "hierarchical"),
        ({"backbone_config": rs4d_config(patch_size=6)}, "multiple of 4"),
        ({"rpn_nms_threshold": 1.5}, "within 0 and 1"),
        ({"feature_size": 18}, "multiple of 4"),
        ({"max_per_img": 0}, "positive"),
        ({"anchor_scales": []}, "positive numbers"),
    ],
)
def test_bad_config_fields_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        instance_config(**fields)


def test_a_backbone_of_more_bands_is_saved_with_them(tmp_path):
    model = model_of("bbox", "vheat")
    adapt_input_channels(model, 6)
    model.save_pretrained(tmp_path)
    reloaded = RS4DForInstanceSegmentation.from_pretrained(tmp_path)
    assert reloaded.config.backbone_config.num_channels == 6
    with torch.no_grad():
        assert reloaded(torch.randn(1, 6, 64, 64)).scores.isfinite().all()


def test_layers_are_chosen_by_index_from_zero():
    model = RS4DForInstanceSegmentation(instance_config(rs4d_config(num_hidden_layers=4), select_layers=[0, 2]))
    seen = []
    model.neck.aggregator.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs[0]))
    states = model.backbone(images(64, 64), output_hidden_states=True).hidden_states
    model.neck(model.backbone(images(64, 64)).feature_maps)
    for feature, state in zip(seen, (states[1], states[3]), strict=True):
        torch.testing.assert_close(feature.flatten(2).transpose(1, 2), state)


def test_mask_targets_are_cut_out_of_the_objects_own_mask():
    objects = 2 * TARGETS_AT_ONCE + 3
    corners = [[2.0 * i + 4, 0.0, 2.0 * i + 6, 20.0 + i] for i in range(objects)]
    truth = label(corners, [0] * objects, (64, 80))
    targets = Targets(torch.tensor(corners), truth["class_labels"], truth["masks"])
    chosen = torch.tensor([objects - 1, 0, TARGETS_AT_ONCE, 0])
    boxes = targets.boxes[chosen] + torch.tensor([-1.0, 0, 1, 0])  # twice as wide: half of it is the object
    cut = _cut_masks(Samples(torch.cat((boxes, boxes)), chosen), targets, 28)
    expected = torch.zeros(4, 28, 28, dtype=torch.bool)
    expected[:, :, 7:21] = True
    assert (cut == expected).float().mean() > 0.99
    assert _cut_masks(Samples(boxes, chosen[:0]), targets, 28).shape == (0, 28, 28)
