"""RS-vHeat checkpoints convert completely and compute what the original computes (golden/rs_vheat/README.md)."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_rsheat.conversion import heat
from hf_rsheat.conversion.common import Source
from hf_rsheat.conversion.reader import read_checkpoint
from hf_rsheat.conversion.rs_vheat import FAMILY, convert
from hf_rsheat.errors import CheckpointError
from hf_rsheat.models.image_processing_rs_vheat import RSVHeatImageProcessor
from hf_rsheat.models.modeling_rs_vheat import RSVHeatBackbone, RSVHeatForImageClassification, RSVHeatModel

LOGITS = {"atol": 2e-5, "rtol": 0.0}
FEATURES = {"atol": 5e-5, "rtol": 0.0}
TABLES = {"atol": 1e-6, "rtol": 0.0}


@pytest.fixture(scope="module")
def headed(golden, tmp_path_factory):
    """The pre-training file with the fine-tuned file's classifier added: both stems and a head."""
    state = read_checkpoint(golden / "rs_vheat/small_pretrain_encoder_prefix.pth")["model"]
    tuned = read_checkpoint(golden / "rs_vheat/small_finetune_ema.pth")
    state |= {name: value for name, value in tuned["model"].items() if name.startswith("classifier")}
    path = tmp_path_factory.mktemp("headed") / "headed.pth"
    torch.save({"model": state, "config": tuned["config"]}, path)
    return path


def assert_stages_match(hidden_states, expected):
    torch.testing.assert_close(hidden_states[0], expected["stem"], **FEATURES)
    for i in range(4):
        torch.testing.assert_close(hidden_states[i + 1], expected[f"stage{i}.pre_down"], **FEATURES)


@torch.no_grad()
@pytest.mark.parametrize(("weights", "key"), [("model", "logits"), ("model_ema", "ema.logits")])
def test_the_fine_tuned_classifier_matches(golden, tmp_path, weights, key):
    expected = load_file(golden / "rs_vheat/io_small_opt.safetensors")
    folder = convert(golden / "rs_vheat/small_finetune_ema.pth", tmp_path / "out", weights=weights)
    model = RSVHeatForImageClassification.from_pretrained(folder).eval()
    assert model.config.modalities == {"optical": 3}
    output = model(expected["input"], output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected[key], **LOGITS)
    if weights == "model":
        assert_stages_match(output.hidden_states, expected)
    else:
        assert (output.logits - expected["logits"]).abs().max() > 1e-2


@torch.no_grad()
def test_the_best_checkpoint_with_ddp_prefix_matches(golden, tmp_path):
    expected = load_file(golden / "rs_vheat/io_tiny_ddp.safetensors")
    folder = convert(golden / "rs_vheat/tiny_best_ddp_prefix.pth", tmp_path / "out")
    output = RSVHeatForImageClassification.from_pretrained(folder).eval()(expected["input"], output_hidden_states=True)
    assert_stages_match(output.hidden_states, expected)
    torch.testing.assert_close(output.logits, expected["logits"], **LOGITS)


@torch.no_grad()
def test_the_pretraining_file_becomes_one_model_for_both_sensors(golden, tmp_path):
    folder = convert(golden / "rs_vheat/small_pretrain_encoder_prefix.pth", tmp_path / "out")
    model = RSVHeatModel.from_pretrained(folder).eval()
    assert model.config.modalities == {"optical": 3, "sar": 1}
    for modality, name in (("optical", "opt"), ("sar", "sar")):
        expected = load_file(golden / f"rs_vheat/io_small_{name}.safetensors")
        down = {}
        hooks = [
            stage.downsample.register_forward_hook(lambda _m, _in, out, i=i, down=down: down.update({i: out}))
            for i, stage in enumerate(model.encoder.stages[:3])
        ]
        output = model(expected["input"], modality=modality, output_hidden_states=True)
        assert_stages_match(output.hidden_states, expected)
        torch.testing.assert_close(output.last_hidden_state, expected["forward_features"], **FEATURES)
        assert sorted(down) == [0, 1, 2]
        for i, value in down.items():
            torch.testing.assert_close(value.permute(0, 3, 1, 2), expected[f"stage{i}.post_down"], **FEATURES)
        for hook in hooks:
            hook.remove()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert sorted(provenance["dropped"]) == ["decoder_opt.0.weight", "encoder.fuse_frequency.0.weight"]
    assert any("no final norm" in note for note in provenance["notes"])
    assert list(RSVHeatImageProcessor.from_pretrained(folder).modalities) == ["optical", "sar"]


@torch.no_grad()
def test_a_pretraining_file_with_classifier_classifies_both_sensors(golden, headed, tmp_path):
    model = RSVHeatForImageClassification.from_pretrained(convert(headed, tmp_path / "out")).eval()
    for modality, name in (("optical", "opt"), ("sar", "sar")):
        expected = load_file(golden / f"rs_vheat/io_small_{name}.safetensors")
        torch.testing.assert_close(model(expected["input"], modality=modality).logits, expected["logits"], **LOGITS)


@torch.no_grad()
@pytest.mark.parametrize("at", ["conversion", "run time"])
@pytest.mark.parametrize(("size", "name"), [(96, "opt"), (32, "opt"), (96, "sar")])
def test_bilinear_resizing_matches_the_original_loader(golden, headed, tmp_path, size, name, at):
    prefix = f"bilinear.{size}.{name}."
    every = load_file(golden / "rs_vheat/resize_tables.safetensors")
    expected = {key.removeprefix(prefix): value for key, value in every.items() if key.startswith(prefix)}
    folder = convert(headed, tmp_path / "out", image_size=size if at == "conversion" else None)
    model = RSVHeatForImageClassification.from_pretrained(folder).eval()
    for i, stage in enumerate(model.rs_vheat.encoder.stages):
        if f"freq_embed.{i}" in expected:
            tables = stage.tables(*expected[f"freq_embed.{i}"].shape[:2])
            torch.testing.assert_close(tables[0], expected[f"freq_embed.{i}"], **TABLES)
            torch.testing.assert_close(tables[1], expected[f"heat_capacity.{i}"], **TABLES)
            if at == "conversion":
                assert stage.frequency_embedding.shape == expected[f"freq_embed.{i}"].shape
    modality = {"opt": "optical", "sar": "sar"}[name]
    output = model(expected["input"], modality=modality, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[3], expected["stage2.pre_down"], **FEATURES)
    torch.testing.assert_close(output.hidden_states[4], expected["forward_features"], **FEATURES)
    torch.testing.assert_close(output.logits, expected["logits"], **LOGITS)


@pytest.mark.parametrize("size", [96, 32])
def test_zero_padding_matches_the_original_script(golden, tmp_path, size):
    expected = load_file(golden / "rs_vheat/resize_tables.safetensors")
    checkpoint = golden / "rs_vheat/small_pretrain_encoder_prefix.pth"
    folder = convert(checkpoint, tmp_path / "out", image_size=size, resize="zero-pad")
    model = RSVHeatModel.from_pretrained(folder)
    for i, stage in enumerate(model.encoder.stages):
        assert torch.equal(stage.frequency_embedding, expected[f"zeropad.{size}.freq_embed.{i}"])
        # heat capacities are indexed by position, so they are resized bilinearly
        torch.testing.assert_close(stage.heat_capacity, expected[f"bilinear.{size}.opt.heat_capacity.{i}"], **TABLES)


@pytest.mark.parametrize("sensor", ["optical", "sar"])
def test_the_official_base_maps_completely(golden, sensor):
    listing = json.loads((golden / "rs_vheat/keys_base_224.json").read_text())
    shapes = dict(listing["optical_model"])
    if sensor == "sar":
        shapes = {k: v for k, v in shapes.items() if "patch_embed" not in k} | listing["sar_stem_instead_of_opt"]
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        source = Source(tensors, {name: name for name in tensors}, {}, {}, None, "model", "base.pth", "")
        model, result = heat.assemble(FAMILY, source, overrides=None, image_size=None, resize="bilinear")
    assert len(result.key_map) == 557
    if sensor == "optical":
        assert sum(p.numel() for p in model.parameters()) == 92_909_032
    config, official = model.config, listing["config"]
    assert (config.depths, config.hidden_sizes) == (official["depths"], official["dims"])
    assert config.post_norm == official["post_norm"]
    assert config.layer_scale_init_value == official["layer_scale"]
    assert list(config.modalities) == [sensor]


def test_output_norms_make_a_backbone(golden, tmp_path):
    state = read_checkpoint(golden / "rs_vheat/tiny_best_ddp_prefix.pth")["model"]
    state = {name.replace("module.", "backbone."): v for name, v in state.items() if "classifier" not in name}
    state |= {f"backbone.outnorm{i}.weight": torch.rand(4 * 2**i) for i in (2, 3)}
    state |= {f"backbone.outnorm{i}.bias": torch.rand(4 * 2**i) for i in (2, 3)}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    model = RSVHeatBackbone.from_pretrained(convert(tmp_path / "x.pth", tmp_path / "out"))
    assert model.out_features == ["stage3", "stage4"]


def test_errors_list_every_tensor_by_its_name_in_the_file(golden, tmp_path):
    state = read_checkpoint(golden / "rs_vheat/tiny_best_ddp_prefix.pth")["model"]
    del state["module.patch_embed_opt.conv1.weight"], state["module.heat_capacity.1"]
    state["module.layers.0.0.op.norm1.bias"] = torch.zeros(5)
    state["module.memory_decay"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as refusal:
        convert(tmp_path / "x.pth", tmp_path / "out")
    for name in ("patch_embed_opt.conv1.weight", "heat_capacity.1", "module.layers.0.0.op.norm1.bias: (5,)"):
        assert name in str(refusal.value)
    assert "1 unmapped:\n  module.memory_decay" in str(refusal.value)


def test_inference_mode_and_vheat_files_are_refused(golden, tmp_path):
    with pytest.raises(CheckpointError, match="convert vheat"):
        convert(golden / "vheat/prenorm.pth", tmp_path / "out")
    state = read_checkpoint(golden / "rs_vheat/tiny_best_ddp_prefix.pth")["model"]
    state["module.layers.0.0.op.k_exp"] = torch.ones(8, 8, 4)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="inference mode"):
        convert(tmp_path / "x.pth", tmp_path / "out")
