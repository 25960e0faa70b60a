"""RS4D detectors convert completely and compute what the original computes (tolerances: golden/rs4d/README.md)."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchvision.ops import box_convert
from transformers import AutoModelForInstanceSegmentation

from hf_rsheat import RS4DImageProcessor
from hf_rsheat.conversion import rs4d, rs4d_instances
from hf_rsheat.conversion.common import Source
from hf_rsheat.conversion.reader import read_checkpoint
from hf_rsheat.errors import CheckpointError, ConfigurationError
from hf_rsheat.models.instance_boxes import pool_boxes
from hf_rsheat.models.instance_prompts import add_positions, position_map

NECK = {"atol": 5e-5, "rtol": 0.0}
HEADS = {"atol": 1e-4, "rtol": 0.0}
DETECTORS = ("tiny_maskrcnn", "tiny_prompter")
# What the files do not tell: the settings with which the original made the tensors.
SETTINGS = {
    "rpn_nms_pre": 200,
    "rpn_max_per_img": 60,
    "rpn_nms_pre_train": 200,
    "rpn_max_per_img_train": 60,
    "max_per_img": 12,
    "rpn_num_samples": 1_000_000,
    "rcnn_num_samples": 1_000_000,
}
SIZES = [(128, 128), (128, 102)]
ORIGINAL_SIZES = [(100, 100), (100, 80)]


def settings(name: str) -> dict:
    return SETTINGS if name == "tiny_maskrcnn" else {**SETTINGS, "mask_decoder_config": {"num_attention_heads": 2}}


class Case:
    """A converted detector, what the original computed, and the inputs."""

    def __init__(self, golden, folder, name: str) -> None:
        self.folder = rs4d.convert(golden / f"rs4d/{name}.pth", folder, overrides=settings(name))
        self.model = AutoModelForInstanceSegmentation.from_pretrained(self.folder).eval()
        self.expected = load_file(golden / f"rs4d/{name}_io.safetensors")
        statistics = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]).view(2, 1, 3, 1, 1)
        self.pixel_values = (self.expected["image_bgr_uint8"].flip(1).float() - statistics[0]) / statistics[1]
        self.pixel_mask = torch.ones(2, 128, 128)
        self.pixel_mask[1, :, SIZES[1][1] :] = 0

    def labels(self) -> list[dict[str, torch.Tensor]]:
        labels = []
        for i in range(2):
            packed = self.expected[f"gt{i}.masks_packed"].numpy()
            masks = torch.from_numpy(np.unpackbits(packed, axis=-1)[..., :128])
            boxes = box_convert(self.expected[f"gt{i}.boxes"], "xyxy", "cxcywh") / 128
            labels.append({"class_labels": self.expected[f"gt{i}.labels"], "boxes": boxes, "masks": masks})
        return labels


@pytest.fixture(scope="module", params=DETECTORS)
def case(request, golden, tmp_path_factory) -> Case:
    return Case(golden, tmp_path_factory.mktemp(request.param), request.param)


@torch.no_grad()
def test_neck_and_proposals_match(case):
    model, expected = case.model, case.expected
    assert torch.equal(case.pixel_values[:, :, ::8, ::8], expected["pixel_values_every_8th"])
    maps = model.backbone(case.pixel_values).feature_maps
    torch.testing.assert_close(model.neck.aggregator(list(maps)), expected["aggregator.out"], **NECK)
    pyramid, _ = model.neck(maps)
    for i, level in enumerate(pyramid):
        torch.testing.assert_close(level, expected[f"fpn{i}"], **NECK)
    anchors = model.proposal_head(pyramid)
    for i in range(1, 5):
        logits, deltas = expected[f"rpn.cls{i}"], expected[f"rpn.reg{i}"]
        torch.testing.assert_close(anchors.logits[i], logits.permute(0, 2, 3, 1).flatten(1), **HEADS)
        torch.testing.assert_close(anchors.deltas[i], deltas.permute(0, 2, 3, 1).reshape(2, -1, 4), **HEADS)
    for i, (boxes, scores) in enumerate(model.proposal_head.proposals(anchors, SIZES)):
        torch.testing.assert_close(boxes, expected[f"proposals{i}.boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(scores, expected[f"proposals{i}.scores"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_heads_match_on_the_originals_proposals(case):
    model, expected = case.model, case.expected
    pyramid, image = model.neck(model.backbone(case.pixel_values).feature_maps)
    if model.config.with_extra_pe:
        torch.testing.assert_close(position_map(pyramid[0]), expected["extra_pe"], atol=1e-6, rtol=0)
        pyramid = add_positions(pyramid)
    proposals = [expected[f"proposals{i}.boxes"] for i in range(2)]
    pooled = pool_boxes(pyramid, model.config.strides, proposals, 7)
    torch.testing.assert_close(pooled[:2], expected["bbox_head.roi_feats_first2"], **NECK)
    logits, deltas = model.box_head(pyramid, proposals)
    torch.testing.assert_close(logits, expected["bbox_head.cls_score"], **HEADS)
    torch.testing.assert_close(deltas.flatten(1), expected["bbox_head.bbox_pred"], **HEADS)
    rois = expected["mask_rois"]
    boxes = [rois[rois[:, 0] == i, 1:] for i in range(2)]
    masks = model.mask_head(pyramid, image, boxes, expected["mask_head.labels"])
    torch.testing.assert_close(masks, expected["mask_head.logits"].reshape(masks.shape), **HEADS)
    if model.config.head == "prompt":
        torch.testing.assert_close(image, expected["image_embeddings"], **NECK)
        positions = model.mask_head.shared_image_embedding(image)
        torch.testing.assert_close(positions.expand(2, -1, -1, -1), expected["image_positional_embeddings"])


@torch.no_grad()
def test_detections_and_masks_of_the_original_images_match(case):
    outputs = case.model(case.pixel_values, case.pixel_mask)
    processor = RS4DImageProcessor.from_pretrained(case.folder)
    assert processor.mask_layout == case.model.config.mask_layout
    results = processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=ORIGINAL_SIZES, return_binary_maps=True
    )
    for i, (result, (height, width)) in enumerate(zip(results, ORIGINAL_SIZES, strict=True)):
        scale = torch.tensor([SIZES[i][1] / width, SIZES[i][0] / height]).repeat(2)
        torch.testing.assert_close(
            outputs.pred_boxes[i] / scale, case.expected[f"det{i}.boxes"], atol=1e-2, rtol=0, msg=f"image {i}"
        )
        torch.testing.assert_close(outputs.scores[i], case.expected[f"det{i}.scores"], atol=1e-4, rtol=0)
        assert torch.equal(outputs.class_labels[i], case.expected[f"det{i}.labels"])
        packed = case.expected[f"det{i}.masks_packed"].numpy()
        masks = torch.from_numpy(np.unpackbits(packed, axis=-1)[..., :width]).bool()
        assert masks.any()
        same = (result["segmentation"] == masks).flatten(1).float().mean(1)
        assert same.min() >= 0.999


@torch.no_grad()
def test_every_loss_term_matches_on_the_stored_targets(case):
    outputs = case.model(case.pixel_values, case.pixel_mask, case.labels())
    assert set(outputs.loss_dict) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    for name, value in outputs.loss_dict.items():
        assert value.item() == pytest.approx(case.expected[f"loss.{name}"].item(), rel=1e-4), name
    assert outputs.loss.item() == pytest.approx(sum(outputs.loss_dict.values()).item())


def test_the_folder_names_its_classes_and_accounts_for_every_tensor(case):
    config = case.model.config
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2}
    record = json.loads((case.folder / "provenance.json").read_text())
    assert not record["dropped"]
    names = set(case.model.state_dict())
    assert set(record["key_map"].values()) == names
    assert len(record["key_map"]) == len(names)
    assert any("fpn_pa" in note for note in record["notes"])


def on_meta(keys: dict, config_text: str = "") -> Source:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    bare = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    names = {name.removeprefix("backbone."): name for name in tensors}
    return Source(bare, names, {}, {}, None, "state_dict", "official.pth", "0", config_text)


@pytest.mark.parametrize(
    ("name", "selected"),
    [
        ("rs4d_bbox-ssdd", range(1, 22, 2)),
        ("rs4d_bbox-whu", range(1, 24, 2)),
        ("rs4d_bbox-nwpu", range(1, 24, 2)),
        ("rs4d_bbox-nwpu-pa11(last)", (3, 10, 17)),
        ("rs4d_bbox-nwpu-pa10", (3, 10, 17)),
        ("maskrcnn-large", (2, 8, 14, 20, 26)),
        ("rs4d_prompt_ssdd", range(2, 23, 2)),
        ("rs4d_prompt_nwpu", range(2, 23, 2)),
    ],
)
def test_official_detectors_map_completely(golden, name, selected):
    listing = json.loads((golden / "rs4d/official_keys.json").read_text())
    keys = listing["detectors"][name]
    with torch.device("meta"):
        model, result = rs4d_instances.assemble(on_meta(keys))
    assert len(result.key_map) == len(keys)
    parameters = listing["param_counts"][name]["total"]
    assert sum(p.numel() for p in model.parameters()) == parameters
    config = model.config
    assert list(config.select_layers) == list(selected)
    assert (config.head == "prompt") == ("prompt" in name)
    assert (config.aggregator_pa, config.fpn_pa) == ("pa10" in name, "pa11" in name)
    assert config.num_labels == (10 if "nwpu" in name else 1)
    assert list(config.anchor_scales) == ([4, 8] if "prompt" in name else [8])
    if config.head == "prompt":
        assert (config.n_points, config.mask_decoder_config.num_attention_heads) == (5, 8)
        assert config.mask_decoder_config.mlp_dim == 2048


@pytest.mark.parametrize(
    ("text", "layers", "pa"),
    [
        ("feature_aggregator=dict(select_layers=range(0, 22, 2)), feature_spliter=dict(type='RSSimpleFPN')", 0, False),
        ("select_layers=[2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]\ntype='mmdet.RSSimplePaFPN'", 2, True),
        ("'select_layers': (3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23)", 3, False),
        ("select_layers=[1, 2]", 1, False),  # another number than the file has: not believed
    ],
)
def test_the_saved_configuration_tells_what_tensors_cannot(golden, text, layers, pa):
    keys = json.loads((golden / "rs4d/official_keys.json").read_text())["detectors"]["rs4d_bbox-ssdd"]
    with torch.device("meta"):
        model, _ = rs4d_instances.assemble(on_meta(keys, text))
    assert list(model.config.select_layers) == list(range(layers, layers + 22, 2))
    assert model.config.fpn_pa == pa


def test_unknown_layers_and_scales_are_asked_for(golden):
    keys = json.loads((golden / "rs4d/official_keys.json").read_text())["detectors"]["rs4d_bbox-ssdd"]
    fewer = {name: shape for name, shape in keys.items() if "convs.10." not in name}
    with pytest.raises(CheckpointError, match=r"joins 10 of 24 layers[\s\S]*select_layers"), torch.device("meta"):
        rs4d_instances.assemble(on_meta(fewer))
    with torch.device("meta"):
        model, _ = rs4d_instances.assemble(on_meta(fewer), overrides={"select_layers": list(range(10))})
    assert model.config.out_indices == [*range(1, 11), 24]
    wide = {**keys, "rpn_head.rpn_cls.weight": [9, 256, 1, 1]}
    with pytest.raises(CheckpointError, match="anchor_scales"), torch.device("meta"):
        rs4d_instances.assemble(on_meta(wide))


def test_overrides_reach_the_detector_and_its_backbone(golden):
    model, _ = rs4d.load(
        golden / "rs4d/tiny_maskrcnn.pth", overrides={"path_type": "forward", "score_threshold": 0.2}, image_size=64
    )
    assert model.config.backbone_config.path_type == "forward"
    assert (model.config.score_threshold, model.config.image_size) == (0.2, 64)
    with pytest.raises(ConfigurationError, match="score_threshold"):
        rs4d.load(golden / "rs4d/tiny_maskrcnn.pth", overrides={"score_treshold": 0.2})
    with pytest.raises(ConfigurationError, match="num_attention_heads"):
        rs4d.load(golden / "rs4d/tiny_prompter.pth", overrides={"mask_decoder_config": 2})


def test_a_decoder_whose_attention_heads_must_be_said_says_how(golden):
    path = golden / "rs4d/tiny_prompter.pth"
    with pytest.raises(ConfigurationError, match=r"--set mask_decoder_config='\{\"num_attention_heads\": 2\}'"):
        rs4d.load(path, overrides=SETTINGS)


@pytest.mark.parametrize(
    "missing",
    [
        "rpn_head.rpn_conv.bias",
        "neck.feature_spliter.fpn2.0.weight",
        "neck.feature_spliter.lateral_convs.1.norm_layer.bias",
        "roi_head.mask_head.convs.1.conv.weight",
        "backbone.ln1.bias",
    ],
)
def test_missing_tensors_of_a_detector_are_named_as_in_the_file(golden, tmp_path, missing):
    checkpoint = read_checkpoint(golden / "rs4d/tiny_maskrcnn.pth")
    del checkpoint["state_dict"][missing]
    torch.save(checkpoint, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError) as caught:
        rs4d.load(tmp_path / "cut.pth")
    assert f"1 missing:\n  {missing.removeprefix('backbone.')} -> " in str(caught.value)


def test_tensors_that_no_rule_knows_are_refused(golden, tmp_path):
    checkpoint = read_checkpoint(golden / "rs4d/tiny_maskrcnn.pth")
    checkpoint["state_dict"]["roi_head.semantic_head.weight"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"unmapped:\n  roi_head\.semantic_head\.weight"):
        rs4d.load(tmp_path / "more.pth")
