"""vHeat checkpoints convert completely and compute what the original computes (tolerances: golden/vheat/README.md)."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from hf_rsheat.conversion import heat
from hf_rsheat.conversion.common import Source
from hf_rsheat.conversion.reader import read_checkpoint
from hf_rsheat.conversion.vheat import FAMILY, convert
from hf_rsheat.errors import CheckpointError, ConfigurationError
from hf_rsheat.models.image_processing_vheat import VHeatImageProcessor
from hf_rsheat.models.modeling_vheat import VHeatBackbone, VHeatForImageClassification, VHeatModel

NAMES = ["prenorm", "postnorm_ls"]
SIZES = ["64x64", "96x96", "64x96", "75x50", "40x40"]
LOGITS = {"atol": 2e-5, "rtol": 0.0}
FEATURES = {"atol": 2e-4, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    """Converted folders by checkpoint and weights."""
    root = tmp_path_factory.mktemp("vheat")
    return {
        (name, weights): convert(golden / f"vheat/{name}.pth", root / f"{name}-{weights}", weights=weights)
        for name in NAMES
        for weights in ("model", "model_ema")
    }


@pytest.fixture(scope="module")
def backbones(golden, tmp_path_factory):
    """Backbones from files shaped as the detection and segmentation frameworks write them."""
    root = tmp_path_factory.mktemp("backbones")
    folders = {"postnorm_ls": convert(golden / "vheat/postnorm_ls_mmseg_like.pth", root / "postnorm_ls")}
    norms = load_file(golden / "vheat/prenorm_backbone_multires.safetensors")
    state = {k: v for k, v in read_checkpoint(golden / "vheat/prenorm.pth")["model"].items() if "classifier" not in k}
    state |= {name.removeprefix("weights."): v for name, v in norms.items() if name.startswith("weights.")}
    meta = {"cfg": "model = dict(backbone=dict(type='MMDET_VHEAT', post_norm=False))"}
    torch.save({"meta": meta, "state_dict": {f"backbone.{k}": v for k, v in state.items()}}, root / "prenorm.pth")
    folders["prenorm"] = convert(root / "prenorm.pth", root / "prenorm")
    return {name: VHeatBackbone.from_pretrained(folder).eval() for name, folder in folders.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_stage_of_the_classifier_matches(folders, golden, name):
    expected = load_file(golden / f"vheat/{name}_io_64.safetensors")
    model = VHeatForImageClassification.from_pretrained(folders[name, "model"]).eval()
    down = {}
    for i, stage in enumerate(model.vheat.encoder.stages[:3]):
        stage.downsample.register_forward_hook(lambda _m, _in, out, i=i: down.update({f"down{i}": out}))
    output = model(expected["pixel_values"], output_hidden_states=True)
    for i, hidden in enumerate(output.hidden_states):
        torch.testing.assert_close(hidden, expected["stem" if i == 0 else f"stage{i - 1}"], **FEATURES)
    for key, value in down.items():
        torch.testing.assert_close(value.permute(0, 3, 1, 2), expected[key], **FEATURES)
    pooled = model.vheat(expected["pixel_values"]).pooler_output
    torch.testing.assert_close(pooled, expected["pooled"], **FEATURES)
    assert sorted(down) == ["down0", "down1", "down2"]
    torch.testing.assert_close(output.logits, expected["logits"], **LOGITS)
    torch.testing.assert_close(output.logits, expected["logits_infer_mode"], **LOGITS)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_average_weights_are_taken_when_asked_for(folders, golden, name):
    expected = load_file(golden / f"vheat/{name}_io_64.safetensors")
    model = VHeatForImageClassification.from_pretrained(folders[name, "model_ema"]).eval()
    logits = model(expected["pixel_values"]).logits
    torch.testing.assert_close(logits, expected["logits_ema"], **LOGITS)
    assert (logits - expected["logits"]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_any_input_size_matches_the_original_wrapper(folders, backbones, golden, name, size):
    expected = load_file(golden / f"vheat/{name}_backbone_multires.safetensors")
    pixel_values = expected[f"{size}.pixel_values"]
    output = backbones[name](pixel_values, output_hidden_states=True)
    assert len(output.feature_maps) == 4
    for i, features in enumerate(output.feature_maps):
        torch.testing.assert_close(features, expected[f"{size}.outnorm_feat{i}"], atol=2e-4, rtol=0.0)
        if f"{size}.stage{i}" in expected:
            torch.testing.assert_close(output.hidden_states[i + 1], expected[f"{size}.stage{i}"], **FEATURES)
        if f"{size}.freq{i}" in expected:
            table, _ = backbones[name].encoder.stages[i].tables(*features.shape[-2:])
            torch.testing.assert_close(table, expected[f"{size}.freq{i}"], atol=5e-6, rtol=0.0)
    classifier = VHeatForImageClassification.from_pretrained(folders[name, "model"]).eval()
    torch.testing.assert_close(classifier(pixel_values).logits, expected[f"{size}.logits"], **LOGITS)


@torch.no_grad()
def test_zero_padding_and_bicubic_resizing_match_and_differ(golden, tmp_path):
    expected = load_file(golden / "vheat/prenorm_zeropad_64to96.safetensors")
    logits = {}
    for resize in ("zero-pad", "bicubic"):
        folder = convert(golden / "vheat/prenorm.pth", tmp_path / resize, image_size=96, resize=resize)
        model = VHeatForImageClassification.from_pretrained(folder).eval()
        assert model.config.image_size == 96
        assert VHeatImageProcessor.from_pretrained(folder).size["height"] == 96
        output = model(expected["pixel_values"], output_hidden_states=True)
        logits[resize] = output.logits
        if resize == "zero-pad":
            for i, stage in enumerate(model.vheat.encoder.stages):
                assert torch.equal(stage.frequency_embedding, expected[f"freq_embed.{i}"])
            torch.testing.assert_close(output.hidden_states[-1], expected["stage3"], **FEATURES)
    torch.testing.assert_close(logits["zero-pad"], expected["logits"], **LOGITS)
    torch.testing.assert_close(logits["bicubic"], expected["logits_bicubic_instead"], **LOGITS)


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 30_853_480), ("small", 52_220_392), ("base", 92_132_328)])
def test_official_sizes_map_completely(golden, size, parameters):
    listing = json.loads((golden / f"vheat/keys_{size}_224.json").read_text())
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in listing["keys"].items()}
        source = Source(tensors, {name: name for name in tensors}, {}, {}, None, "model", f"{size}.pth", "")
        model, result = heat.assemble(FAMILY, source, overrides=None, image_size=None, resize="bicubic")
    config, official = model.config, listing["config"]
    assert sum(p.numel() for p in model.parameters()) == parameters == listing["num_params"]
    assert sorted(result.key_map) == sorted(listing["keys"])
    assert config.depths == official["depths"]
    assert config.post_norm == official["post_norm"]
    assert config.layer_scale_init_value == official["layer_scale"]
    assert (config.image_size, config.num_labels, config.mlp_ratio) == (224, 1000, 4.0)


def test_what_was_done_is_written_down(folders, golden):
    provenance = json.loads((folders["prenorm", "model_ema"] / "provenance.json").read_text())
    assert provenance["source"]["file"] == "prenorm.pth"
    assert provenance["source"]["weights"] == "model_ema"
    assert len(provenance["source"]["sha256"]) == 64
    assert provenance["key_map"]["layers.0.1.0.weight"] == "vheat.encoder.stages.0.downsample.conv.weight"
    assert set(provenance["key_map"]) == set(read_checkpoint(golden / "vheat/prenorm.pth")["model_ema"])
    assert str(golden) not in json.dumps(provenance)


def test_settings_come_from_the_saved_training_configuration(folders):
    for name, post_norm, drop_path in (("prenorm", False, 0.1), ("postnorm_ls", True, 0.3)):
        config = json.loads((folders[name, "model"] / "config.json").read_text())
        assert config["post_norm"] is post_norm
        assert config["drop_path_rate"] == pytest.approx(drop_path)
        assert (config["layer_scale_init_value"] is None) == (name == "prenorm")


def test_segmentation_files_drop_foreign_heads_and_say_so(golden, tmp_path, caplog):
    folder = convert(golden / "vheat/postnorm_ls_mmseg_like.pth", tmp_path / "out")
    dropped = json.loads((folder / "provenance.json").read_text())["dropped"]
    assert dropped
    assert all(name.startswith(("decode_head.", "auxiliary_head.")) for name in dropped)
    assert "does not tell post_norm" in caplog.text  # this file has no configuration to take it from
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["VHeatBackbone"]
    assert not VHeatImageProcessor.from_pretrained(folder).do_center_crop


def state_of(golden) -> dict[str, torch.Tensor]:
    return read_checkpoint(golden / "vheat/prenorm.pth")["model"]


def save(state, path, **others):
    torch.save({"model": state, **others}, path)
    return path


def test_a_file_without_classifier_becomes_the_bare_model_with_an_identity_norm(golden, tmp_path, caplog):
    state = {name: value for name, value in state_of(golden).items() if not name.startswith("classifier")}
    torch.save(state, tmp_path / "bare.pth")
    folder = convert(tmp_path / "bare.pth", tmp_path / "out", overrides={"post_norm": False})
    model = VHeatModel.from_pretrained(folder)
    assert torch.equal(model.layernorm.weight, torch.ones(48))
    assert torch.equal(model.layernorm.bias, torch.zeros(48))
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["source"]["weights"] == "bare state dict"
    assert any("no final norm" in note for note in provenance["notes"])
    assert "no final norm" in caplog.text
    assert "post_norm" not in caplog.text


def test_unmapped_missing_and_misshapen_tensors_are_all_listed(golden, tmp_path):
    state = state_of(golden)
    del state["freq_embed.3"], state["layers.2.1.norm1.weight"]
    state["layers.0.0.op.linear.weight"] = torch.zeros(3, 6)
    state["classifier.0.bias"] = torch.zeros(7)
    state |= {"surprise.weight": torch.zeros(1), "layers.0.0.op.norm1.weight": torch.zeros(6)}
    with pytest.raises(CheckpointError) as refusal:
        convert(save(state, tmp_path / "x.pth"), tmp_path / "out")
    listed = str(refusal.value)
    for title, names in {
        "2 unmapped": ["surprise.weight", "layers.0.0.op.norm1.weight"],
        "2 missing": ["freq_embed.3", "layers.2.1.norm1.weight"],
        "2 misshapen": ["layers.0.0.op.linear.weight: (3, 6)", "classifier.0.bias: (7,)"],
    }.items():
        assert title in listed
        assert all(name in listed for name in names)
    assert not (tmp_path / "out").exists()


def test_inference_mode_files_are_refused_with_the_reason(golden, tmp_path):
    state = {name: value for name, value in state_of(golden).items() if "to_k" not in name and "freq" not in name}
    state["layers.0.0.op.k_exp"] = torch.ones(16, 16, 6)
    with pytest.raises(CheckpointError, match=r"inference mode.*cannot be recovered"):
        convert(save(state, tmp_path / "x.pth"), tmp_path / "out")


def test_the_other_family_is_sent_to_its_converter(golden, tmp_path):
    with pytest.raises(CheckpointError, match="convert rs-vheat"):
        convert(golden / "rs_vheat/small_finetune_ema.pth", tmp_path / "out")
    torch.save({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet\.pth is no vHeat checkpoint.*conv1\.weight, fc\.bias"):
        convert(tmp_path / "resnet.pth", tmp_path / "out")


def test_overrides_win_and_unknown_ones_get_the_nearest_name(golden, tmp_path):
    checkpoint = golden / "vheat/prenorm.pth"
    folder = convert(checkpoint, tmp_path / "out", overrides={"post_norm": True, "drop_path_rate": 0.25})
    config = json.loads((folder / "config.json").read_text())
    assert config["post_norm"] is True
    assert math.isclose(config["drop_path_rate"], 0.25)
    with pytest.raises(ConfigurationError, match="no field 'postnorm': did you mean 'post_norm'"):
        convert(checkpoint, tmp_path / "x", overrides={"postnorm": True})
    with pytest.raises(ConfigurationError, match="post_norm"):
        convert(checkpoint, tmp_path / "x", overrides={"post_norm": "perhaps"})
    with pytest.raises(ConfigurationError, match=r"'bicubic', 'bilinear', 'zero-pad'.*nearest"):
        convert(checkpoint, tmp_path / "x", image_size=96, resize="nearest")
    with pytest.raises(CheckpointError, match=r"misshapen.*\n.*classifier|missing|unmapped"):
        convert(checkpoint, tmp_path / "x", overrides={"depths": [1, 1, 1, 1]})


@torch.no_grad()
def test_prefixes_and_safetensors_make_no_difference(folders, golden, tmp_path):
    from safetensors.torch import save_file

    expected = load_file(golden / "vheat/prenorm_io_64.safetensors")
    state = {f"module.model.{name}": value.contiguous() for name, value in state_of(golden).items()}
    save_file(state, tmp_path / "x.safetensors")
    folder = convert(tmp_path / "x.safetensors", tmp_path / "out")
    model = VHeatForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(model(expected["pixel_values"]).logits, expected["logits"], **LOGITS)


def test_class_names_become_labels(golden, tmp_path):
    names = [f"class {i}" for i in range(10)]
    checkpoint = save(state_of(golden), tmp_path / "x.pth", meta={"dataset_meta": {"classes": tuple(names)}})
    folder = convert(checkpoint, tmp_path / "out")
    model = VHeatForImageClassification.from_pretrained(folder)
    assert [model.config.id2label[i] for i in range(10)] == names


def test_stems_for_other_channels_are_inferred(golden, tmp_path):
    state = state_of(golden)
    state["patch_embed.conv1.weight"] = torch.randn(3, 10, 3, 3)
    folder = convert(save(state, tmp_path / "x.pth"), tmp_path / "out")
    model = VHeatForImageClassification.from_pretrained(folder)
    assert model.config.num_channels == 10
    assert len(VHeatImageProcessor.from_pretrained(folder).image_mean) == 10
