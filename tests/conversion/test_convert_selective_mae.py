"""SelectiveMAE and MAE files convert completely and compute what the original computes.

Tolerances: golden/selective_mae/README.md.
"""

import argparse
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from hf_rsheat import SelectiveMAEForImageClassification, SelectiveMAEForPreTraining, SelectiveMAEModel
from hf_rsheat.conversion.common import Source, open_checkpoint
from hf_rsheat.conversion.reader import read_checkpoint
from hf_rsheat.conversion.selective_mae import assemble, convert, kind_of, load
from hf_rsheat.conversion.selective_mae_names import DEAD
from hf_rsheat.errors import CheckpointError, ConfigurationError

HEADS = {"num_attention_heads": 4}
PRETRAINING = {**HEADS, "decoder_num_attention_heads": 4}
EPOCHS = [0, 281, 290, 299, 300, 590, 600]
LATENT, LOSS, LOGITS = ({"atol": atol, "rtol": 0.0} for atol in (2e-5, 2e-6, 1e-5))


@pytest.fixture(scope="module")
def source(golden):
    return golden / "selective_mae"


@pytest.fixture(scope="module")
def outputs(source):
    return load_file(source / "small_pretrain_outputs.safetensors")


@pytest.fixture(scope="module")
def finetuned(source):
    return load_file(source / "small_finetuned_outputs.safetensors")


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return convert(source / "small_pretrain.pth", tmp_path_factory.mktemp("pretrain") / "hub", overrides=PRETRAINING)


def draws(outputs, epoch: int) -> dict:
    names = [f"e{epoch}.randperm_{index}" for index in (1, 2)]
    return {
        "epoch": epoch,
        "seed_ids": outputs[f"e{epoch}.seed_ids"],
        "permutations": [outputs[name] for name in names] if names[0] in outputs else None,
    }


@pytest.mark.parametrize("epoch", EPOCHS)
def test_pretraining_matches_at_every_point_of_the_schedule(folder, outputs, epoch):
    model = AutoModelForPreTraining.from_pretrained(folder)
    chosen = {"reconstruct_choice": outputs[f"e{epoch}.recon_choice"]}
    given = {"reconstruct_ids": outputs[f"e{epoch}.recon_ids"]}
    for loss, injected in (("norm_pix", chosen), ("raw_pix", given)):
        model.config.norm_pix_loss = loss == "norm_pix"
        with torch.no_grad():
            output = model(outputs["input"], **draws(outputs, epoch), **injected)
        for name, ids in (("encode_ids", "select_ids"), ("reconstruct_ids", "recon_ids"), ("mask", "mask")):
            assert torch.equal(getattr(output, name).int(), outputs[f"e{epoch}.{ids}"].int())
        predictions = outputs.get(f"e{epoch}.pred", outputs.get(f"e{epoch}.pred_first16"))
        torch.testing.assert_close(output.last_hidden_state, outputs[f"e{epoch}.latent"], **LATENT)
        torch.testing.assert_close(output.logits[..., : predictions.shape[-1]], predictions, **LATENT)
        torch.testing.assert_close(output.loss_per_image, outputs[f"e{epoch}.loss_{loss}"], **LOSS)


def test_gradients_match(folder, outputs):
    model = SelectiveMAEForPreTraining.from_pretrained(folder)
    model(outputs["input"], **draws(outputs, 0), reconstruct_ids=outputs["e0.recon_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    encoder, decoder = "selective_mae.encoder.layers.0.attention.", "decoder.layers.1.attention."
    expected = {
        "blocks.0.attn.qkv.bias": [f"{encoder}{part}_proj.bias" for part in "qkv"],
        "cls_token": ["selective_mae.embeddings.cls_token"],
        "decoder_blocks.1.cross_attn.kv.weight": [f"{decoder}{part}_proj.weight" for part in "kv"],
        "decoder_pred.bias": ["decoder.predictor.bias"],
        "mask_token": ["decoder.mask_token"],
        "patch_embed.proj.bias": ["selective_mae.embeddings.projection.bias"],
    }
    for theirs, ours in expected.items():
        actual = torch.cat([gradients[name] for name in ours])
        torch.testing.assert_close(actual, outputs[f"e0.grad.{theirs}"], rtol=1e-4, atol=1e-6)


def test_all_gradient_norms_match(folder, outputs, source):
    model = SelectiveMAEForPreTraining.from_pretrained(folder)
    model(outputs["input"], **draws(outputs, 0), reconstruct_ids=outputs["e0.recon_ids"]).loss.backward()
    norms = json.loads((source / "small_pretrain_meta.json").read_text())["gradient_norms_epoch0"]
    key_map = json.loads((folder / "provenance.json").read_text())["key_map"]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for theirs, norm in norms.items():
        actual = torch.cat([gradients.pop(name).flatten() for name in key_map[theirs].split(", ")]).norm().item()
        assert actual == pytest.approx(norm, rel=1e-4)
    assert gradients == {}


@pytest.mark.parametrize("kind", ["avg", "token"])
def test_both_classifiers_match(source, finetuned, kind, tmp_path):
    folder = convert(source / f"small_finetuned_{kind}.pth", tmp_path / "hub", overrides=HEADS)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(model, SelectiveMAEForImageClassification)
    assert model.config.use_mean_pooling == (kind == "avg")
    assert model.config.drop_path_rate == 0.1
    with torch.no_grad():
        trunk = model.selective_mae(finetuned["input"])
        torch.testing.assert_close(model(finetuned["input"]).logits, finetuned[f"{kind}.logits"], **LOGITS)
    torch.testing.assert_close(trunk.last_hidden_state, finetuned[f"{kind}.features"], **LOGITS)
    torch.testing.assert_close(trunk.pooler_output, finetuned[f"{kind}.pooled"], **LOGITS)


def test_position_tables_resize_as_in_the_originals_fine_tuning(source, folder, finetuned, tmp_path):
    resized = convert(source / "small_pretrain.pth", tmp_path / "hub", overrides=PRETRAINING, image_size=144)
    models = [SelectiveMAEModel.from_pretrained(path) for path in (folder, resized)]
    table = models[1].embeddings.position_embeddings
    torch.testing.assert_close(table, finetuned["pos_embed_resized_14_to_18"], **LOGITS)
    for model in models:  # at run time and in the converted folder
        with torch.no_grad():
            features = model(finetuned["from_pretrain.input_144"]).last_hidden_state
        torch.testing.assert_close(features, finetuned["from_pretrain.features_144"], **LOGITS)
    pretraining = SelectiveMAEForPreTraining.from_pretrained(resized)
    assert pretraining.decoder.position_embeddings.shape == (1, 324, 24)
    assert AutoImageProcessor.from_pretrained(resized).size["height"] == 144


def test_sizes_ratios_and_dead_parameters_are_accounted_for(folder):
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "image_size": 112,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "decoder_hidden_size": 24,
    }
    expected |= {"decoder_num_hidden_layers": 2, "mask_ratio": 0.85, "kept_mask_ratio": 0.25, "norm_pix_loss": True}
    assert {name: config[name] for name in expected} == expected
    dropped = json.loads((folder / "provenance.json").read_text())["dropped"]
    assert {name.split(".")[0] for name in dropped} == {
        "pos_embed_probs",
        "get_token_probs",
        "get_token_probs_linear",
        "decoder_embed1",
        "hog",
        "decoder_pos_embed[:, 0]",
    }


@pytest.mark.parametrize(
    ("name", "heads", "layers", "decoder_layers"),
    [
        ("pretrain_vit_base", 12, 12, 12),
        ("pretrain_vit_large", 16, 24, 12),
        ("finetuned_vit_base_aid30_token", 12, 12, None),
    ],
)
def test_published_sizes_are_recognised_by_their_shapes(source, name, heads, layers, decoder_layers):
    content = json.loads((source / f"keys_{name}.json").read_text())
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in content.get("keys", content).items()}
        dead = {key for key in tensors if any(re.search(rule, key) for rule in DEAD)}
        kept = {key: value for key, value in tensors.items() if key not in dead}
        opened = Source(kept, {key: key for key in kept}, {}, {}, None, "model", name, "")
        model, result = assemble(opened, {}, overrides=None, image_size=None, to="selective_mae")
    assert (model.config.num_attention_heads, model.config.num_hidden_layers) == (heads, layers)
    if decoder_layers is not None:
        assert model.config.decoder_num_hidden_layers == decoder_layers
        assert model.config.decoder_num_attention_heads == 16
    assert result.notes == []
    assert len(result.key_map) == len(kept)


def stripped(source, *prefixes: str) -> dict:
    state = read_checkpoint(source / "small_pretrain.pth")["model"]
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


DECODER = ("decoder_", "mask_token", "get_token_probs", "pos_embed_probs", "hog.")


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "module", "safetensors"])
def test_encoder_only_files_of_any_wrapping_become_the_encoder(source, folder, wrap, tmp_path):
    state = stripped(source, *DECODER)
    path = tmp_path / ("model.safetensors" if wrap == "safetensors" else "model.pth")
    if wrap == "safetensors":
        save_file(state, path)
    elif wrap == "module":
        torch.save({"model": {f"module.encoder.{name}": v for name, v in state.items()}}, path)
    else:
        torch.save(state if wrap == "bare" else {"state_dict": state}, path)
    model, _ = load(path, overrides=HEADS)
    assert type(model) is SelectiveMAEModel
    expected = SelectiveMAEModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.fixture
def mae_file(tmp_path):
    """A plain MAE as its original code names it, and transformers' model with the same weights."""
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config |= {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
    config |= {"decoder_intermediate_size": 96, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    model = ViTMAEForPreTraining(ViTMAEConfig(**config, norm_pix_loss=True)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    renamed: dict[str, torch.Tensor] = {}
    rules = [
        ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("vit.embeddings.position_embeddings", "pos_embed"),
        ("vit.embeddings.cls_token", "cls_token"),
        ("vit.layernorm", "norm"),
        ("vit.layers", "blocks"),
        ("decoder.decoder_layers", "decoder_blocks"),
        ("decoder.decoder_", "decoder_"),
        ("decoder.mask_token", "mask_token"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.o_proj", "attn.proj"),
    ]
    for name, value in model.state_dict().items():
        for new, old in rules:
            name = name.replace(new, old)
        if ".attention." in name:
            block, _, rest = name.partition(".attention.")
            fused = f"{block}.attn.qkv.{rest.rsplit('.', 1)[1]}"
            renamed[fused] = torch.cat([renamed[fused], value]) if fused in renamed else value
        else:
            renamed[name] = value
    arguments = argparse.Namespace(mask_ratio=0.75, norm_pix_loss=True)
    torch.save({"model": renamed, "args": arguments, "epoch": 1}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth", model


def test_plain_mae_files_become_transformers_vit_mae(mae_file, tmp_path):
    path, expected = mae_file
    folder = convert(path, tmp_path / "mae", overrides=PRETRAINING, to="vit_mae")
    names = load_file(folder / "model.safetensors").keys()
    assert "decoder.decoder_layers.0.attention.attention.query.weight" in names  # as in facebook/vit-mae-base
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names
    model = ViTMAEForPreTraining.from_pretrained(folder)
    pixel_values, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        actual, wanted = (m(pixel_values, noise=noise) for m in (model, expected))
    torch.testing.assert_close(actual.loss, wanted.loss)
    torch.testing.assert_close(actual.logits, wanted.logits)


def test_plain_mae_files_give_their_encoder_to_our_model(mae_file):
    path, expected = mae_file
    model, result = load(path, overrides=HEADS)
    assert type(model) is SelectiveMAEModel
    assert "decoder of a mae file" in result.dropped["decoder_pred.weight"]
    pixel_values = torch.randn(2, 3, 32, 32)
    expected.config.mask_ratio = 0.0
    with torch.no_grad():
        wanted = expected.vit(pixel_values, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
        torch.testing.assert_close(model(pixel_values).last_hidden_state, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("to", "cls"), [("vit", ViTModel), ("vit_mae", ViTMAEModel)])
def test_stock_encoders_compute_what_the_pretraining_encoder_computes(source, folder, outputs, to, cls, tmp_path):
    stock = convert(source / "small_pretrain.pth", tmp_path / to, overrides=HEADS, to=to)
    options = {"add_pooling_layer": False} if cls is ViTModel else {"mask_ratio": 0.0}
    model = cls.from_pretrained(stock, **options).eval()
    ours = SelectiveMAEModel.from_pretrained(folder)
    ours.embeddings.position_embeddings.data[:, 0] = 0  # pretraining adds none, stock models always do
    noise = {"noise": torch.arange(196.0).expand(2, -1)} if cls is ViTMAEModel else {}
    with torch.no_grad():
        actual = model(outputs["input"], **noise).last_hidden_state
        torch.testing.assert_close(actual, ours(outputs["input"]).last_hidden_state, **LATENT)
    assert "position of the class token" in json.loads((stock / "provenance.json").read_text())["notes"][0]
    assert AutoImageProcessor.from_pretrained(stock)(torch.zeros(3, 50, 60).byte())["pixel_values"][0].shape[-1] == 112
    assert "Licence" in (stock / "README.md").read_text()


def test_a_class_token_classifier_becomes_transformers_classifier(source, finetuned, tmp_path):
    folder = convert(source / "small_finetuned_token.pth", tmp_path / "vit", overrides=HEADS, to="vit")
    with torch.no_grad():
        logits = ViTForImageClassification.from_pretrained(folder)(finetuned["input"]).logits
    torch.testing.assert_close(logits, finetuned["token.logits"], **LOGITS)


@pytest.mark.parametrize(
    ("name", "to"),
    [("small_finetuned_avg", "vit"), ("small_finetuned_avg", "vit_mae"), ("small_finetuned_token", "vit_mae")],
)
def test_what_a_stock_class_cannot_hold_is_refused(source, name, to, tmp_path):
    with pytest.raises(CheckpointError, match="convert to selective_mae"):
        convert(source / f"{name}.pth", tmp_path / "x", overrides=HEADS, to=to)


def test_heads_that_no_shape_tells_must_be_given(source, tmp_path):
    with pytest.raises(ConfigurationError, match="--set num_attention_heads=N"):
        load(source / "small_pretrain.pth")
    with pytest.raises(ConfigurationError, match="--set decoder_num_attention_heads=N"):
        load(source / "small_pretrain.pth", overrides=HEADS)


def test_an_unknown_output_is_refused(source):
    with pytest.raises(ConfigurationError, match="selective_mae, vit, vit_mae"):
        load(source / "small_pretrain.pth", to="dinov2")


def test_missing_and_unknown_tensors_are_listed(source, tmp_path):
    state = stripped(source, "blocks.1.mlp.fc2.weight")
    torch.save({**state, "adapter.weight": torch.zeros(2)}, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=r"adapter\.weight") as error:
        load(tmp_path / "broken.pth", overrides=PRETRAINING)
    assert "blocks.1.mlp.fc2.weight -> selective_mae.encoder.layers.1.mlp.fc2.weight" in str(error.value)


def test_tables_that_are_not_square_need_their_image_size(source, tmp_path):
    state = stripped(source, *DECODER)
    state["pos_embed"] = state["pos_embed"][:, :151]
    torch.save(state, tmp_path / "wide.pth")
    with pytest.raises(ConfigurationError, match="--set image_size"):
        load(tmp_path / "wide.pth", overrides=HEADS)
    model, _ = load(tmp_path / "wide.pth", overrides={**HEADS, "image_size": [80, 120]})
    assert model.embeddings.stored_grid == (10, 15)


def test_a_file_of_another_family_is_refused(golden):
    with pytest.raises(CheckpointError, match="is no SelectiveMAE checkpoint"):
        load(golden / "vheat/prenorm.pth")


def test_kinds_are_told_by_names(source):
    for name, kind in (("pretrain", "pretraining"), ("finetuned_token", "classifier")):
        assert kind_of(open_checkpoint(source / f"small_{name}.pth", "model")) == kind
