"""What SelectiveMAE promises beyond the common suite (tests/models/test_modeling.py) and parity (tests/conversion)."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_rsheat import (
    SelectiveMAEBackbone,
    SelectiveMAEConfig,
    SelectiveMAEForImageClassification,
    SelectiveMAEForPreTraining,
    SelectiveMAEImageProcessor,
    SelectiveMAEImageProcessorPil,
    SelectiveMAEModel,
    VHeatImageProcessor,
)
from hf_rsheat.models.selective_mae_layers import sincos_table
from tests.zoo import ZOO, selective_mae_config


def images(*size: int, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def pretraining() -> SelectiveMAEForPreTraining:
    return ZOO["selective-mae-pretraining"].model()


def test_position_tables_are_the_originals(golden):
    outputs = load_file(golden / "selective_mae/small_pretrain_outputs.safetensors")
    for name, width in (("init_pos_embed", 32), ("init_decoder_pos_embed", 24)):
        torch.testing.assert_close(sincos_table(14, 14, width), outputs[name][:, 1:], atol=2e-6, rtol=0)
    model = SelectiveMAEForPreTraining(selective_mae_config(image_size=112, hidden_size=32))
    positions = model.selective_mae.embeddings.position_embeddings
    torch.testing.assert_close(positions, outputs["init_pos_embed"], atol=2e-6, rtol=0)


def test_initial_weights_follow_the_original():
    model = SelectiveMAEForImageClassification(selective_mae_config(hidden_size=64, num_labels=20))
    layer = model.selective_mae.encoder.layers[0]
    assert layer.mlp.fc1.weight.abs().max().item() == pytest.approx((6 / (64 + 256)) ** 0.5, rel=0.01)
    assert layer.mlp.fc1.bias.abs().max() == 0
    assert model.classifier.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    projection = model.selective_mae.embeddings.projection.weight
    assert projection.abs().max().item() == pytest.approx((6 / (64 + 192)) ** 0.5, rel=0.01)
    assert model.selective_mae.embeddings.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_published_sizes_have_the_originals_parameter_counts():
    expected = {"small": 21.67, "base": 85.80, "large": 303.30}  # millions, positions included
    with torch.device("meta"):
        for name, millions in expected.items():
            model = SelectiveMAEModel(SelectiveMAEConfig.preset(name))
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
        huge = SelectiveMAEConfig.preset("huge")
        assert (huge.patch_size, huge.num_attention_heads) == (14, 16)
        whole = SelectiveMAEForPreTraining(SelectiveMAEConfig.preset("base"))
    dead = 1_000_000 * 134.90 - sum(p.numel() for p in whole.parameters())
    assert dead == pytest.approx(7.64e6, rel=0.01)  # what the original carries along without using it
    with pytest.raises(ValueError, match="presets are small"):
        SelectiveMAEConfig.preset("giant")


def test_positions_stay_fixed_in_pretraining_and_learn_in_fine_tuning(pretraining, tmp_path):
    pretraining.save_pretrained(tmp_path)
    frozen = {"selective_mae.embeddings.position_embeddings", "decoder.position_embeddings"}
    for model in (pretraining, AutoModelForPreTraining.from_pretrained(tmp_path)):
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    loaded, _ = SelectiveMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded.decoder.position_embeddings.requires_grad
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert all(p.requires_grad for p in classifier.parameters())
    torch.testing.assert_close(
        classifier.selective_mae.encoder.layers[1].mlp.fc1.weight,
        pretraining.selective_mae.encoder.layers[1].mlp.fc1.weight,
    )


def test_evaluation_is_deterministic_and_training_is_not(pretraining):
    first, second = (pretraining(images(64, 64)) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    pretraining.train()
    first, second = (pretraining(images(64, 64)) for _ in range(2))
    assert not torch.equal(first.encode_ids, second.encode_ids)
    assert not torch.equal(first.reconstruct_ids, second.reconstruct_ids)


def test_a_generator_repeats_the_draws(pretraining):
    for model in (pretraining, pretraining.train()):
        first, second = (
            model(images(64, 64), progress=1.0, generator=torch.Generator().manual_seed(5)) for _ in range(2)
        )
        assert torch.equal(first.encode_ids, second.encode_ids)
        assert torch.equal(first.logits, second.logits)
        other = model(images(64, 64), progress=1.0, generator=torch.Generator().manual_seed(6))
        assert not torch.equal(first.encode_ids, other.encode_ids)


def test_progress_and_epoch_say_the_same(pretraining):
    for epoch in (0, 281, 300, 590, 700):
        assert pretraining.stage(epoch=epoch) == pretraining.stage(progress=epoch / 800)
    assert pretraining.stage().phase == "random"
    with pytest.raises(ValueError, match="not both"):
        pretraining(images(64, 64), epoch=1, progress=0.1)
    with pytest.raises(ValueError, match="0 to 1"):
        pretraining(images(64, 64), progress=1.5)


def test_chosen_patches_are_reconstructed_in_ascending_order(pretraining):
    output = pretraining(images(64, 64), reconstruct_ids=torch.tensor([[40, 3], [7, 50]]))
    assert output.reconstruct_ids.tolist() == [[3, 40], [7, 50]]
    assert output.mask.sum(1).tolist() == [2, 2]
    assert output.logits.shape == (2, 2, 192)


def test_the_loss_is_the_mean_of_the_images(pretraining):
    output = pretraining(images(64, 64, batch=3))
    assert output.loss_per_image.shape == (3,)
    torch.testing.assert_close(output.loss, output.loss_per_image.mean())


def test_hog_encodes_structure_first():
    model = SelectiveMAEForPreTraining(selective_mae_config(criterion="hog")).eval()
    pixel_values = torch.zeros(1, 3, 64, 64)
    pixel_values[..., 24:40, 24:40] = images(16, 16, batch=1)  # patches 27, 28, 35 and 36
    output = model(pixel_values, progress=0.0)
    assert set(output.encode_ids[0, :4].tolist()) == {27, 28, 35, 36}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_pretraining_loss_is_nearly_the_same_in_other_precisions(pretraining, dtype, tmp_path):
    pretraining.save_pretrained(tmp_path)
    converted = SelectiveMAEForPreTraining.from_pretrained(tmp_path, dtype=dtype)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    expected, actual = (model(images(64, 64), reconstruct_ids=ids) for model in (pretraining, converted))
    assert actual.last_hidden_state.dtype == dtype
    torch.testing.assert_close(actual.loss_per_image, expected.loss_per_image, rtol=0.1, atol=0)


@pytest.mark.parametrize("size", [(64, 64), (20, 40)])
def test_attention_implementations_agree(size):
    sdpa, eager = (SelectiveMAEForPreTraining(selective_mae_config()).eval() for _ in range(2))
    eager.load_state_dict(sdpa.state_dict())
    eager.set_attn_implementation("eager")
    assert sdpa.config._attn_implementation == "sdpa"
    first, second = (model(images(*size)) for model in (sdpa, eager))
    torch.testing.assert_close(first.logits, second.logits, atol=1e-5, rtol=1e-5)


def test_attention_weights_need_the_eager_implementation():
    model = SelectiveMAEModel(selective_mae_config()).eval()
    with pytest.raises(ValueError, match="eager"):
        model(images(64, 64), output_attentions=True)
    model.set_attn_implementation("eager")
    attentions = model(images(64, 64), output_attentions=True).attentions
    assert [tuple(a.shape) for a in attentions] == [(2, 2, 65, 65)] * 2
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 2, 65))


def test_hidden_states_are_the_embeddings_and_every_layer():
    output = SelectiveMAEModel(selective_mae_config())(images(64, 40), output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 41, 16)] * 3
    assert output.attentions is None


def test_both_kinds_of_pooling_are_config_fields():
    token, mean = (SelectiveMAEModel(selective_mae_config(use_mean_pooling=flag)).eval() for flag in (False, True))
    output = token(images(64, 64))
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    output = mean(images(64, 64))
    torch.testing.assert_close(output.pooler_output, mean.layernorm(output.last_hidden_state[:, 1:].mean(1)))


def test_a_border_that_fills_no_patch_is_seen():
    model = SelectiveMAEModel(selective_mae_config()).eval()
    first, second = images(60, 60), images(60, 60)
    second[..., 59, 59] += 5
    assert not torch.allclose(model(first).pooler_output, model(second).pooler_output)


def test_stochastic_depth_acts_in_training_only():
    torch.manual_seed(0)
    model = SelectiveMAEModel(selective_mae_config(drop_path_rate=0.9))
    outputs = [model(images(64, 64, batch=8)).pooler_output for _ in range(2)]
    assert not torch.allclose(*outputs)
    model.eval()
    assert torch.equal(*(model(images(64, 64)).pooler_output for _ in range(2)))


def test_the_wrong_number_of_channels_is_refused_with_a_way_out(pretraining):
    with pytest.raises(ValueError, match="num_channels=N"):
        pretraining(images(64, 64, channels=4))


def test_ten_channels_and_non_square_tables_work(tmp_path):
    config = selective_mae_config(num_channels=10, image_size=(64, 32))
    SelectiveMAEForPreTraining(config).save_pretrained(tmp_path)
    model = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert model(images(64, 32, channels=10)).logits.shape == (2, 8, 640)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 18},
        {"num_attention_heads": 3},
        {"decoder_hidden_size": 10},
        {"mask_ratio": 1.0},
        {"kept_mask_ratio": 0},
        {"criterion": "random"},
        {"drop_path_rate": 1.0},
        {"num_hidden_layers": 0},
        {"patch_size": 0},
        {"image_size": 0},
    ],
)
def test_bad_config_fields_are_refused(fields):
    with pytest.raises(Exception, match=next(iter(fields)).removeprefix("num_").split("_")[0]):
        selective_mae_config(**fields)


@pytest.mark.parametrize("processor_class", [SelectiveMAEImageProcessor, SelectiveMAEImageProcessorPil])
def test_the_image_processor_is_the_originals_evaluation_and_travels(processor_class, tmp_path):
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor_class(size=112).save_pretrained(tmp_path)
    reloaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(reloaded).__name__.removesuffix("Pil") == "SelectiveMAEImageProcessor"
    pixel_values = reloaded(image, return_tensors="pt").pixel_values
    expected = VHeatImageProcessor(size=112)(image, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 112, 112)
    torch.testing.assert_close(pixel_values, expected, atol=0.02, rtol=0)


def test_stock_upernet_works_over_the_backbone(tmp_path):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = selective_mae_config(num_hidden_layers=4, out_features=stages, apply_layernorm=False)
    assert isinstance(AutoBackbone.from_config(backbone), SelectiveMAEBackbone)
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, num_labels=3)
    model = UperNetForSemanticSegmentation(config)
    model(images(64, 64), labels=torch.randint(0, 3, (2, 64, 64))).loss.backward()
    assert model.backbone.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    reloaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(images(64, 64)).logits, model(images(64, 64)).logits, atol=1e-5, rtol=1e-5)


def test_a_training_step_in_the_middle_of_the_schedule_compiles():
    model = ZOO["selective-mae-pretraining"].model().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    draws = {"seed_ids": torch.tensor([[1, 9, 17, 50]] * 2), "reconstruct_choice": torch.arange(16).expand(2, -1)}
    expected, actual = (m(images(64, 64), progress=0.36, **draws) for m in (model, compiled))
    assert torch.equal(actual.encode_ids, expected.encode_ids)
    torch.testing.assert_close(actual.loss, expected.loss)
    actual.loss.backward()
    torch._dynamo.reset()
