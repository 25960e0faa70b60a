"""RS4D backbones convert completely and compute what the original computes (tolerances: golden/rs4d/README.md)."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from hf_rsheat import RS4DBackbone, RS4DConfig, RS4DImageProcessor, RS4DModel
from hf_rsheat.conversion.common import Source
from hf_rsheat.conversion.reader import read_checkpoint
from hf_rsheat.conversion.rs4d import assemble, convert, load, tensor_names
from hf_rsheat.errors import CheckpointError, ConfigurationError
from hf_rsheat.models.modeling_rs4d import resize_positions

FEATURES = {"atol": 5e-6, "rtol": 0.0}


def write_mmengine(state: dict, path) -> None:
    """A detector's file as mmengine writes it, with a neck and a head that are no part of the backbone."""
    state = {f"backbone.{name}": tensor for name, tensor in state.items()}
    state["neck.feature_spliter.fpn1.0.weight"] = torch.zeros(2, 2)
    state["roi_head.mask_head.no_mask_embed.weight"] = torch.zeros(1, 2)
    state["shared_image_embedding.shared_image_embedding.positional_embedding"] = torch.zeros(2, 2)
    meta = {"cfg": "model = dict(type='RSPrompter')", "dataset_meta": {"classes": ("ship",)}}
    torch.save({"meta": meta, "state_dict": state, "message_hub": {}, "optimizer": {}}, path)


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    """Converted folders of the same tensors from a bare, a multi-GPU and an mmengine file."""
    root = tmp_path_factory.mktemp("rs4d")
    write_mmengine(read_checkpoint(golden / "rs4d/tiny_backbone_single.pth"), root / "mmengine.pth")
    files = {
        "bare": golden / "rs4d/tiny_backbone_single.pth",
        "module": golden / "rs4d/tiny_backbone_ddp.pth",
        "mmengine": root / "mmengine.pth",
    }
    return {name: convert(file, root / name) for name, file in files.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["bare", "module", "mmengine"])
def test_every_layer_of_a_converted_backbone_matches(folders, golden, name):
    expected = load_file(golden / "rs4d/tiny_backbone_io.safetensors")
    pixel_values = expected["pixel_values"].float()
    model = RS4DModel.from_pretrained(folders[name]).eval()
    output = model(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[0], expected["tokens_plus_pos"], **FEATURES)
    torch.testing.assert_close(output.last_hidden_state, expected["final.raw"], **FEATURES)
    backbone = RS4DBackbone.from_pretrained(folders[name], out_indices=[1, 2, 3, 4]).eval()
    maps = backbone(pixel_values).feature_maps
    for i, feature in enumerate(maps):
        torch.testing.assert_close(feature.permute(0, 2, 3, 1), expected[f"block{i}.out"], **FEATURES)
    torch.testing.assert_close(maps[-1], expected["final.featmap"], **FEATURES)
    exact = expected["final.out64"]
    torch.testing.assert_close(maps[-1].permute(0, 2, 3, 1).to(exact.dtype), exact, atol=1e-5, rtol=0.0)


def test_all_files_of_the_same_weights_give_the_same_folder(folders):
    states = [load_file(folder / "model.safetensors") for folder in folders.values()]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    config = RS4DConfig.from_pretrained(folders["bare"])
    assert (config.hidden_size, config.inner_size, config.num_hidden_layers) == (24, 40, 4)
    assert (config.state_size, config.conv_kernel, config.time_step_rank) == (16, 4, 2)
    assert (config.patch_size, config.image_size, config.final_norm) == (16, 128, True)
    assert RS4DImageProcessor.from_pretrained(folders["bare"]).size == {"height": 128, "width": 128}


def test_the_provenance_accounts_for_every_tensor(folders):
    record = json.loads((folders["mmengine"] / "provenance.json").read_text())
    assert len(record["key_map"]) == 42
    assert sorted(record["dropped"]) == [
        "neck.feature_spliter.fpn1.0.weight",
        "roi_head.mask_head.no_mask_embed.weight",
        "shared_image_embedding.shared_image_embedding.positional_embedding",
    ]
    assert record["key_map"]["backbone.pos_embed"] == "embeddings.position_embeddings"
    assert any("path_type" in note for note in record["notes"])


def test_a_complete_mmengine_file_is_read_without_mmengine(golden):
    path = golden / "rs4d/mmengine_wrapper_sample.pth"
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)
    checkpoint = read_checkpoint(path)
    assert set(checkpoint["state_dict"]) >= {"backbone.pos_embed", "backbone.ln1.weight"}
    assert "dataset_meta" in checkpoint["meta"]
    with pytest.raises(CheckpointError, match="no RS4D backbone"):
        load(path)


@pytest.mark.parametrize("size", ["small", "base", "large", "huge", "uhuge2"])
def test_official_sizes_map_completely(golden, size):
    listing = json.loads((golden / "rs4d/official_keys.json").read_text())
    keys = listing["backbones"][size]
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in keys.items()}
        source = Source(tensors, {name: name for name in keys}, {}, {}, None, "bare state dict", "official.pth", "0")
        model, result = assemble(source)
    assert len(result.key_map) == len(keys) == 9 * model.config.num_hidden_layers + 6
    assert sum(p.numel() for p in model.parameters()) == sum(math.prod(shape) for shape in keys.values())
    assert model.config.image_size == 1024
    if size != "uhuge2":  # not one of the presets: it is no size of the paper
        preset = RS4DConfig.preset(size)
        assert model.config.to_dict() == preset.to_dict()


def test_backbones_of_official_detectors_map_completely(golden):
    detectors = json.loads((golden / "rs4d/official_keys.json").read_text())["detectors"]
    names = tensor_names(48)
    for keys in detectors.values():
        backbone = {name.removeprefix("backbone.") for name in keys if name.startswith("backbone.")}
        assert backbone
        assert backbone <= set(names)


@torch.no_grad()
def test_gates_norms_and_class_token_are_recognised(golden, tmp_path):
    state = read_checkpoint(golden / "rs4d/tiny_backbone_single.pth")
    for i in range(4):
        state[f"gate_layers.{i}.0.weight"] = torch.randn(3, 72)
    state["ln2.weight"], state["ln2.bias"] = torch.ones(24), torch.zeros(24)
    state["cls_token"] = torch.randn(1, 1, 24)
    state["pos_embed"] = torch.randn(1, 65, 24)
    del state["ln1.weight"], state["ln1.bias"]
    torch.save(state, tmp_path / "unofficial.pth")
    model, result = load(tmp_path / "unofficial.pth", image_size=64)
    config = model.config
    assert (config.path_type, config.out_type) == ("forward_reverse_shuffle_gate", "avg_featmap")
    assert (config.use_cls_token, config.final_norm, config.image_size) == (True, False, 64)
    table = model.embeddings.position_embeddings
    assert torch.equal(table[:, :1], state["pos_embed"][:, :1])
    torch.testing.assert_close(table[:, 1:], resize_positions(state["pos_embed"][:, 1:], (8, 8), (4, 4)))
    assert not any("path_type" in note for note in result.notes)


def test_a_table_that_is_not_square_needs_its_image_size(golden, tmp_path):
    state = read_checkpoint(golden / "rs4d/tiny_backbone_single.pth")
    state["pos_embed"] = state["pos_embed"][:, :32]
    torch.save(state, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"--set image_size=\[HEIGHT,WIDTH\]"):
        load(tmp_path / "wide.pth")
    model, _ = load(tmp_path / "wide.pth", overrides={"image_size": [64, 128]})
    assert model.config.grid_size == (4, 8)


@pytest.mark.parametrize("missing", ["layers.2.D", "pre_norm.bias", "layers.3.x_proj.weight"])
def test_missing_tensors_are_named(golden, tmp_path, missing):
    state = read_checkpoint(golden / "rs4d/tiny_backbone_single.pth")
    del state[missing]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=missing):
        load(tmp_path / "cut.pth")


def test_unknown_tensors_and_options_are_refused(golden, tmp_path):
    path = golden / "rs4d/tiny_backbone_single.pth"
    torch.save({**read_checkpoint(path), "layers.0.extra": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"unmapped[\s\S]*layers\.0\.extra"):
        load(tmp_path / "more.pth")
    with pytest.raises(ConfigurationError, match="bicubic"):
        convert(path, tmp_path / "folder", resize="zero-pad")
    with pytest.raises(ConfigurationError, match="path_type"):
        load(path, overrides={"path_typ": "forward"})
