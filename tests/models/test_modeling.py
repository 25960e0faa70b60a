"""Every model keeps the promises users expect of a transformers model."""

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_rsheat import (
    RSVHeatBackbone,
    RSVHeatForImageClassification,
    RSVHeatForPreTraining,
    RSVHeatModel,
    VHeatBackbone,
    VHeatConfig,
    VHeatForImageClassification,
    adapt_input_channels,
)
from hf_rsheat.models.heat_encoder import HeatDropPath, resize_table
from tests.zoo import STAGES, ZOO, main_output, randomize, rs_vheat_config, vheat_config

ALL = pytest.mark.parametrize("name", ZOO)
# UPerNet's pooling pyramid is stock transformers: its float16 and export limits are not ours.
COMPILED = [
    "vheat-classifier",
    "vheat-backbone",
    "rs-vheat-pretraining",
    "rs-vheat-classifier",
    "rs4d-backbone",
    "selective-mae-pretraining",
    "selective-mae-classifier",
    "selective-mae-backbone",
]
EXPORTED = [
    "vheat-classifier",
    "rs-vheat-classifier",
    "rs-vheat-pretraining",
    "rs4d-backbone",
    "selective-mae-pretraining",
    "selective-mae-classifier",
]
OURS = pytest.mark.parametrize("name", [name for name in ZOO if not name.endswith(("upernet", "instances"))])


def images(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(2))


@ALL
def test_save_and_reload_give_the_same_output(name, tmp_path):
    entry = ZOO[name]
    model = entry.model()
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert not reloaded.training
    with torch.no_grad():
        expected, actual = (main_output(entry, m(images(64, 64))) for m in (model, reloaded))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@ALL
@pytest.mark.parametrize("size", [(32, 32), (33, 65), (96, 64), (75, 50)])
def test_any_input_size_works(name, size):
    entry = ZOO[name]
    with torch.no_grad():
        output = main_output(entry, entry.model()(images(*size)))
    assert output.isfinite().all()
    if name.endswith("upernet") or entry.output == "reconstruction":
        assert output.shape[-2:] == size
    if name.endswith("backbone"):
        assert output.shape[-2:] == tuple(-(-s // entry.stride) for s in size)


# Detectors choose: their precisions and the parameters that only the loss reaches are tested in
# test_rs4d_instances.py.
CONTINUOUS = [name for name in ZOO if not name.endswith("instances")]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_training_reaches_every_parameter_that_is_used(name):
    entry = ZOO[name]
    model = entry.model().train()
    outputs = model(images(64, 64))
    value = getattr(outputs, entry.output)
    pooled = getattr(outputs, "pooler_output", None)
    tensors = [*(value if isinstance(value, tuple) else [value]), *([] if pooled is None else [pooled])]
    sum(t.square().sum() for t in tensors).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = {n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0}
    # What this forward does not use: the other sensor's stem and head, the final norm in pretraining, UPerNet's
    # auxiliary head (it only enters the loss).
    unused = ("stems.sar", "heads.sar", "auxiliary_head")
    assert {n for n in missing if not any(part in n for part in unused)} <= {
        "rs_vheat.layernorm.weight",
        "rs_vheat.layernorm.bias",
    }


@ALL
def test_gradient_checkpointing_gives_the_same_gradients(name):
    entry = ZOO[name]
    gradients = []
    for checkpointing in (False, True):
        model = entry.model()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        torch.manual_seed(3)
        main_output(entry, model(images(32, 32))).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-4)


# Rounding changes which patches SelectiveMAE selects: its precisions are tested in test_selective_mae.py.
@pytest.mark.parametrize("name", [n for n in CONTINUOUS if "upernet" not in n and n != "selective-mae-pretraining"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 2e-2), (torch.float64, 1e-4)])
def test_low_and_double_precision_weights_work(name, dtype, tolerance, tmp_path):
    entry = ZOO[name]
    model = entry.model()
    with torch.no_grad():
        expected = main_output(entry, model(images(64, 64)))
        model.save_pretrained(tmp_path)
        converted = type(model).from_pretrained(tmp_path, dtype=dtype)
        actual = main_output(entry, converted(images(64, 64)))
    assert next(converted.parameters()).dtype == dtype
    difference = (actual.float() - expected).norm() / expected.norm()
    assert difference < tolerance


@ALL
def test_autocast_works(name):
    entry = ZOO[name]
    model = entry.model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = main_output(entry, model(images(64, 64)))
    output.float().square().mean().backward()


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name):
    entry = ZOO[name]
    model = entry.model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = main_output(entry, model(images(64, 96)))
        actual = main_output(entry, compiled(images(64, 96)))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_with_a_dynamic_batch(name):
    entry = ZOO[name]
    model = entry.model()
    batch = torch.export.Dim("batch", min=2, max=16)
    shapes = {"pixel_values": {0: batch}}
    program = torch.export.export(model, (), {"pixel_values": images(64, 64)}, dynamic_shapes=shapes)
    pixel_values = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = main_output(entry, model(pixel_values))
        actual = main_output(entry, program.module()(pixel_values=pixel_values))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_trains_after_a_forward_under_inference_mode():
    model = ZOO["vheat-classifier"].model()
    with torch.inference_mode():
        model(images(64, 64))
    loss = model(images(64, 64), labels=torch.tensor([0, 1])).loss
    loss.backward()
    model.train()
    model(images(64, 64), labels=torch.tensor([0, 1])).loss.backward()


def test_a_fused_step_without_train_changes_the_next_eval_forward():
    model = ZOO["vheat-classifier"].model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        model(images(96, 96))
    model(images(96, 96), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    with torch.no_grad():
        cached = model(images(96, 96)).logits
        model.clear_cache()
        torch.testing.assert_close(cached, model(images(96, 96)).logits, atol=0, rtol=0)


def test_a_deep_copy_trains_apart_from_the_original():
    import copy

    model = ZOO["rs-vheat-classifier"].model()
    with torch.no_grad():
        expected = model(images(64, 64)).logits
        clone = copy.deepcopy(model)
        randomize(clone.classifier)
        for stage in clone.rs_vheat.encoder.stages:
            stage.frequency_embedding.zero_()
        assert not torch.allclose(clone(images(64, 64)).logits, expected)
        assert torch.equal(model(images(64, 64)).logits, expected)


def test_hidden_states_are_the_stem_and_the_stages_before_downsampling():
    model = ZOO["vheat"].model()
    hidden_states = model(images(64, 96), output_hidden_states=True).hidden_states
    assert [tuple(h.shape) for h in hidden_states] == [
        (2, 8, 16, 24),
        (2, 8, 16, 24),
        (2, 16, 8, 12),
        (2, 24, 4, 6),
        (2, 32, 2, 3),
    ]
    assert model(images(64, 96)).hidden_states is None


def test_outputs_are_tuples_on_request():
    logits, hidden_states = ZOO["vheat-classifier"].model()(
        images(64, 64), output_hidden_states=True, return_dict=False
    )
    assert logits.shape == (2, 3)
    assert len(hidden_states) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": [1, 1]}, "one positive number per stage"),
        ({"depths": [1, 1, 0, 1]}, "one positive number per stage"),
        ({"drop_path_rate": 1.5}, "drop_path_rate"),
        ({"image_size": 0}, "image_size"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_bad_config_fields_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        VHeatConfig(**{"hidden_sizes": [8, 16, 24, 32], **fields})


def test_the_wrong_number_of_channels_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="num_channels=N"):
        ZOO["vheat"].model()(images(64, 64, channels=4))


def test_an_unknown_modality_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'lidar'.*optical.*sar"):
        ZOO["rs-vheat"].model()(images(64, 64), modality="lidar")


def test_each_modality_has_its_own_stem_and_shares_the_trunk():
    config = rs_vheat_config(modalities={"optical": 3, "sar": 1, "multispectral": 10})
    model = RSVHeatModel(config).eval()
    randomize(model)
    with torch.no_grad():
        for name, channels in config.modalities.items():
            assert model(images(64, 64, channels=channels), modality=name).pooler_output.shape == (2, 32)


def test_slimmed_widths_are_config_fields(tmp_path):
    config = vheat_config(inner_dims=[8, 8, 12, 16], mlp_hidden_dims=[9, 10, 11, 12])
    model = VHeatForImageClassification(config)
    model.save_pretrained(tmp_path)
    layer = VHeatForImageClassification.from_pretrained(tmp_path).vheat.encoder.stages[2].layers[0]
    assert layer.heat.in_proj.weight.shape == (24, 24)
    assert layer.mlp.fc1.weight.shape == (11, 24)


def test_published_sizes_have_the_originals_parameter_counts():
    with torch.device("meta"):
        tiny = VHeatForImageClassification(VHeatConfig(num_labels=1000))
        base = RSVHeatForImageClassification(
            rs_vheat_config(
                hidden_sizes=[128, 256, 512, 1024],
                depths=[2, 2, 18, 2],
                image_size=224,
                mlp_ratio=4,
                modalities={"optical": 3},
                num_labels=1000,
            )
        )
    assert sum(p.numel() for p in tiny.parameters()) == 30_853_480
    assert sum(p.numel() for p in base.parameters()) == 92_909_032


def test_initial_weights_follow_the_original():
    torch.manual_seed(0)
    model = VHeatForImageClassification(VHeatConfig(layer_scale_init_value=1e-5, depths=[1, 1, 1, 1]))
    layer = model.vheat.encoder.stages[3].layers[0]
    assert layer.heat.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    bound = layer.mlp.fc1.in_features**-0.5
    assert layer.mlp.fc1.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert layer.mlp.fc1.bias.abs().max().item() <= bound
    assert layer.layer_scale1.unique().tolist() == pytest.approx([1e-5])
    assert model.vheat.encoder.stages[0].frequency_embedding.std().item() == pytest.approx(0.02, rel=0.02)


def test_weights_missing_in_a_checkpoint_are_initialised_not_garbage(tmp_path):
    ZOO["vheat"].model().save_pretrained(tmp_path)
    model = VHeatForImageClassification.from_pretrained(tmp_path)
    assert model.classifier.weight.abs().max() < 0.2
    backbone = VHeatBackbone.from_pretrained(tmp_path, out_features=STAGES)
    assert all((norm.weight == 1).all() for norm in backbone.hidden_states_norms.values())


def test_stochastic_depth_keeps_the_expectation_and_is_off_in_eval():
    drop = HeatDropPath(0.25)
    x = torch.ones(4000, 1, 1, 1)
    assert drop(x).mean().item() == pytest.approx(1.0, abs=0.05)
    assert drop(x).unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(drop.eval()(x), x)


def test_resizing_a_table_to_its_own_size_changes_nothing():
    table = torch.randn(7, 5, 3)
    for mode in ("bicubic", "bilinear"):
        assert torch.equal(resize_table(table, 7, 5, mode), table)


@pytest.mark.parametrize(
    ("auto_class", "name"),
    [
        (AutoModel, "vheat"),
        (AutoModel, "rs-vheat"),
        (AutoModelForImageClassification, "vheat-classifier"),
        (AutoModelForImageClassification, "rs-vheat-classifier"),
        (AutoModelForPreTraining, "rs-vheat-pretraining"),
    ],
)
def test_auto_classes_know_the_models(auto_class, name, tmp_path):
    model = ZOO[name].model()
    model.save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)


def test_auto_backbone_builds_from_a_config():
    assert type(AutoBackbone.from_config(vheat_config())) is VHeatBackbone
    assert type(AutoBackbone.from_config(rs_vheat_config())) is RSVHeatBackbone


@pytest.mark.parametrize(
    "load",
    [
        lambda path: VHeatForImageClassification.from_pretrained(path, num_channels=10),
        lambda path: AutoModelForImageClassification.from_pretrained(path, num_channels=10),
    ],
)
def test_num_channels_adapts_the_stem_as_timm_does(load, tmp_path):
    model = ZOO["vheat-classifier"].model()
    model.save_pretrained(tmp_path)
    adapted = load(tmp_path)
    assert adapted.config.num_channels == 10
    grey = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        expected = model(grey.expand(-1, 3, -1, -1)).logits
        nine = adapted.vheat.stem.conv1.weight[:, :9].sum(1)
        torch.testing.assert_close(nine, 0.9 * model.vheat.stem.conv1.weight.sum(1))
        one = VHeatForImageClassification.from_pretrained(tmp_path, num_channels=1)
        torch.testing.assert_close(one(grey).logits, expected, atol=1e-4, rtol=1e-4)
    adapted.save_pretrained(tmp_path / "adapted")
    again = VHeatForImageClassification.from_pretrained(tmp_path / "adapted")
    assert again.vheat.stem.conv1.in_channels == 10


@pytest.mark.parametrize(
    "load",
    [
        lambda path: RSVHeatForPreTraining.from_pretrained(path, modalities={"optical": 3, "sar": 2}),
        lambda path: AutoModelForPreTraining.from_pretrained(path, modalities={"optical": 3, "sar": 2}),
    ],
)
def test_modalities_adapt_one_stem_and_say_so(load, tmp_path):
    ZOO["rs-vheat"].model().save_pretrained(tmp_path)
    model = load(tmp_path)
    assert {n: s.conv1.in_channels for n, s in model.rs_vheat.stems.items()} == {"optical": 3, "sar": 2}
    assert model.config.modalities == {"optical": 3, "sar": 2}


def test_num_channels_of_rs_vheat_is_the_default_modality(tmp_path):
    ZOO["rs-vheat"].model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, num_channels=13)
    assert model.config.modalities == {"optical": 13, "sar": 1}
    assert model(images(64, 64, channels=13)).pooler_output.shape == (2, 32)


BACKBONES = pytest.mark.parametrize("make_config", [vheat_config, rs_vheat_config])


def backbone_config(make_config, channels: int):
    fields = {"num_channels": channels} if make_config is vheat_config else {"modalities": {"optical": channels}}
    return make_config(out_features=STAGES, **fields)


@BACKBONES
@pytest.mark.parametrize("channels", [3, 10])
def test_stock_upernet_works_over_our_backbones(make_config, channels, tmp_path):
    config = UperNetConfig(
        backbone_config=backbone_config(make_config, channels), hidden_size=16, auxiliary_channels=8, num_labels=3
    )
    model = UperNetForSemanticSegmentation(config)
    labels = torch.randint(0, 3, (2, 64, 64))
    model(images(64, 64, channels=channels), labels=labels).loss.backward()
    assert model.backbone.encoder.stages[0].frequency_embedding.grad is not None
    model.eval().save_pretrained(tmp_path)
    reloaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    pixel_values = images(64, 64, channels=channels)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(pixel_values).logits, model(pixel_values).logits, atol=1e-5, rtol=1e-5)


@BACKBONES
@pytest.mark.parametrize("channels", [3, 10])
def test_stock_mask2former_works_over_our_backbones(make_config, channels, tmp_path):
    config = Mask2FormerConfig(
        backbone_config=backbone_config(make_config, channels),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=4,
        num_labels=2,
        train_num_points=16,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    masks = [torch.randint(0, 2, (1, 64, 64)).float() for _ in range(2)]
    classes = [torch.tensor([1]), torch.tensor([0])]
    model(images(64, 64, channels=channels), mask_labels=masks, class_labels=classes).loss.backward()
    model.eval().save_pretrained(tmp_path)
    reloaded = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    pixel_values = images(64, 64, channels=channels)
    with torch.no_grad():
        actual, expected = (m(pixel_values).class_queries_logits for m in (reloaded, model))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_stems_inside_stock_models_can_be_adapted():
    config = UperNetConfig(backbone_config=backbone_config(vheat_config, 3), hidden_size=16, auxiliary_channels=8)
    model = UperNetForSemanticSegmentation(config).eval()
    adapt_input_channels(model, 6)
    assert model(images(64, 64, channels=6)).logits.shape[-2:] == (64, 64)
    assert model.config.backbone_config.num_channels == 6


@pytest.mark.slow
@OURS
def test_inductor_compiles_every_model(name):
    entry = ZOO[name]
    model = entry.model()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        expected = main_output(entry, model(images(64, 96)))
        actual = main_output(entry, compiled(images(64, 96)))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
