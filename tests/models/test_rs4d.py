"""RS4D: paths, input sizes, outputs, initial weights, ONNX."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from hf_rsheat import RS4DBackbone, RS4DConfig, RS4DForImageClassification, RS4DModel
from hf_rsheat.models import modeling_rs4d, rs4d_mixer
from hf_rsheat.models.configuration_rs4d import PATH_ORDERS, RS4D_SIZES
from hf_rsheat.models.rs4d_mixer import RS4DMixer
from tests.zoo import randomize, rs4d_config


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


def model_of(model_class, **fields):
    torch.manual_seed(0)
    model = model_class(rs4d_config(**fields))
    randomize(model)
    return model.eval()


def one_order(mixer: RS4DMixer, tokens: torch.Tensor) -> torch.Tensor:
    """The mixer as Mamba defines it, on tokens that already stand in their order."""
    single = RS4DMixer(rs4d_config(path_type="forward"))
    single.load_state_dict({n: v for n, v in mixer.state_dict().items() if not n.startswith("gate.")})
    return single(tokens)


@torch.no_grad()
def test_the_mixer_is_the_originals_at_every_step(golden):
    """Golden intermediates of layer 0; both directions stand one after the other in the batch."""
    state = torch.load(golden / "rs4d/tiny_backbone_single.pth", weights_only=True)
    expected = load_file(golden / "rs4d/tiny_backbone_io.safetensors")
    mixer = RS4DMixer(rs4d_config(hidden_size=24, inner_size=40, state_size=16, path_type="forward"))
    mixer.load_state_dict({n.removeprefix("layers.0."): v for n, v in state.items() if n.startswith("layers.0.")})
    projected = mixer.in_proj(expected["mixer0.in"])
    torch.testing.assert_close(projected, expected["mixer0.in_proj"], atol=5e-6, rtol=0)
    convolved = mixer._convolve(projected.chunk(2, dim=-1)[0])
    torch.testing.assert_close(convolved, expected["mixer0.conv_act"], atol=5e-6, rtol=0)
    torch.testing.assert_close(mixer.x_proj(convolved), expected["mixer0.x_proj"], atol=5e-6, rtol=0)
    gated = []
    mixer.out_proj.register_forward_pre_hook(lambda _module, inputs: gated.append(inputs[0]))
    torch.testing.assert_close(mixer(expected["mixer0.in"]), expected["mixer0.out"], atol=5e-6, rtol=0)
    torch.testing.assert_close(gated[0], expected["mixer0.gated_scan"], atol=5e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("path_type", PATH_ORDERS)
def test_a_layer_joins_the_outputs_of_separate_passes(path_type, monkeypatch):
    permutation = torch.randperm(12)
    monkeypatch.setattr(rs4d_mixer.torch, "randperm", lambda *_args, **_kwargs: permutation)
    mixer = RS4DMixer(rs4d_config(path_type=path_type))
    torch.nn.init.normal_(mixer.A_log)
    torch.nn.init.normal_(mixer.D)
    tokens = torch.randn(2, 12, 16)
    orders = {"forward": torch.arange(12), "reverse": torch.arange(11, -1, -1), "shuffle": permutation}
    passes = []
    for name in PATH_ORDERS[path_type]:
        order = orders[name]
        passes.append(one_order(mixer, tokens[:, order])[:, order.argsort()])
    weights = torch.full((2, len(passes)), 1 / len(passes))
    if mixer.gate is not None:
        weights = mixer.gate(torch.cat([output.mean(1) for output in passes], -1)).softmax(-1)
    expected = sum(weights[:, i, None, None] * output for i, output in enumerate(passes))
    torch.testing.assert_close(mixer(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path_type", PATH_ORDERS)
def test_every_path_trains_and_reloads(path_type, tmp_path):
    model = model_of(RS4DForImageClassification, path_type=path_type)
    model(images(64, 64), labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.save_pretrained(tmp_path)
    reloaded = RS4DForImageClassification.from_pretrained(tmp_path)
    torch.manual_seed(5)
    expected = model(images(64, 64)).logits
    torch.manual_seed(5)  # the shuffled order is drawn anew at each call
    torch.testing.assert_close(reloaded(images(64, 64)).logits, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_bottom_and_right_are_padded_with_zeros_and_positions_resized(monkeypatch):
    model = model_of(RS4DModel)
    pixel_values = images(50, 75)
    padded = torch.zeros(2, 3, 64, 80)
    padded[..., :50, :75] = pixel_values
    torch.testing.assert_close(model(pixel_values).last_hidden_state, model(padded).last_hidden_state)
    embeddings = model.embeddings
    assert embeddings.positions(4, 4) is embeddings.position_embeddings
    grid = embeddings.position_embeddings.reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(4, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(embeddings.positions(4, 5), resized.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_hidden_states_are_the_embedding_and_every_layer_and_only_the_last_is_normalised():
    model = model_of(RS4DModel)
    output = model(images(64, 96), output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 24, 16)] * 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean(1))
    plain = model_of(RS4DModel, final_norm=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(
        model.encoder.layernorm(plain(images(64, 96)).last_hidden_state), output.last_hidden_state
    )
    assert model(images(64, 64)).hidden_states is None


@torch.no_grad()
def test_a_backbone_returns_any_layers_in_any_form():
    fields = {"out_indices": [0, 1, 2]}
    maps = model_of(RS4DBackbone, **fields)(images(48, 80)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 16, 3, 5)] * 3
    tokens = model_of(RS4DModel)(images(48, 80), output_hidden_states=True).hidden_states
    for feature, token in zip(maps, tokens, strict=True):
        torch.testing.assert_close(feature.flatten(2).transpose(1, 2), token)
    hwc = model_of(RS4DBackbone, out_type="featmap_hwc", **fields)(images(48, 80)).feature_maps
    torch.testing.assert_close(hwc[1], maps[1].permute(0, 2, 3, 1))
    raw = model_of(RS4DBackbone, out_type="raw", **fields)(images(48, 80)).feature_maps
    torch.testing.assert_close(raw[2], tokens[2])
    model = model_of(RS4DBackbone, out_type="avg_featmap", **fields)
    torch.testing.assert_close(
        model(images(48, 80)).feature_maps[1], model.pooled_layernorm(tokens[1].mean(1)), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_a_class_token_stands_first_has_a_position_and_is_left_out_of_maps():
    model = model_of(RS4DModel, use_cls_token=True)
    assert model.embeddings.position_embeddings.shape == (1, 17, 16)
    output = model(images(48, 80))
    assert output.last_hidden_state.shape == (2, 16, 16)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 1:].mean(1))
    positions = model.embeddings.positions(3, 5)
    assert torch.equal(positions[:, 0], model.embeddings.position_embeddings[:, 0])
    backbone = model_of(RS4DBackbone, use_cls_token=True)
    assert backbone(images(48, 80)).feature_maps[0].shape == (2, 16, 3, 5)


@pytest.mark.parametrize(
    ("size", "parameters"), [("small", 8_250_368), ("base", 11_752_448), ("large", 16_567_808), ("huge", 18_756_608)]
)
def test_presets_have_the_published_parameter_counts(size, parameters):
    with torch.device("meta"):
        model = RS4DModel(RS4DConfig.preset(size))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert set(RS4D_SIZES) == {"small", "base", "large", "huge"}


def test_a_new_model_starts_as_mamba_does():
    model = RS4DModel(rs4d_config(inner_size=512, state_size=16))
    mixer = model.encoder.layers[0].mixer
    torch.testing.assert_close(-torch.exp(mixer.A_log), -torch.arange(1.0, 17).expand(512, -1))
    time_steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.99 <= time_steps.min() < 2e-3
    assert 5e-2 < time_steps.max() <= 1e-1 * 1.01
    assert mixer.D.eq(1).all()
    assert model.embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.2)


def test_weights_missing_in_a_checkpoint_are_initialised_not_garbage(tmp_path):
    model = model_of(RS4DModel)
    state = {n: v for n, v in model.state_dict().items() if "mixer." not in n and "position" not in n}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = RS4DModel.from_pretrained(tmp_path)
    mixer = loaded.encoder.layers[1].mixer
    torch.testing.assert_close(mixer.A_log[0], torch.arange(1.0, 5).log())
    assert loaded.embeddings.position_embeddings.abs().max() < 0.1
    assert torch.equal(loaded.encoder.norm.weight, model.encoder.norm.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path_type": "backward"}, "forward_reverse_mean"),
        ({"out_type": "map"}, "featmap_hwc"),
        ({"inner_size": 0}, "inner_size"),
        ({"image_size": [0, 64]}, "image_size"),
        ({"time_step_rank": 0}, "time_step_rank"),
    ],
)
def test_bad_config_fields_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        RS4DConfig(**fields)


def test_unknown_presets_and_channels_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match="small, base, large, huge"):
        RS4DConfig.preset("giant")
    with pytest.raises(ValueError, match="num_channels"):
        model_of(RS4DModel)(torch.zeros(1, 4, 64, 64))


def test_four_maps_become_a_pyramid():
    model = model_of(RS4DBackbone, num_hidden_layers=4, out_indices=[1, 2, 3, 4], add_fpn=True)
    with torch.no_grad():
        maps = model(images(48, 80)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 16, 12, 20), (2, 16, 6, 10), (2, 16, 3, 5), (2, 16, 2, 3)]
    with pytest.raises(Exception, match="four `out_indices`"):
        rs4d_config(add_fpn=True, out_indices=[1, 2])


@pytest.mark.parametrize("add_fpn", [False, True])
def test_stock_upernet_works_over_several_layers(add_fpn, tmp_path):
    backbone = rs4d_config(num_hidden_layers=4, out_indices=[1, 2, 3, 4], add_fpn=add_fpn)
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, num_labels=3)
    model = UperNetForSemanticSegmentation(config)
    model(images(64, 64), labels=torch.randint(0, 3, (2, 64, 64))).loss.backward()
    assert model.backbone.encoder.layers[0].mixer.A_log.grad is not None
    model.eval().save_pretrained(tmp_path)
    reloaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(images(64, 64)).logits, model(images(64, 64)).logits, atol=1e-5, rtol=1e-5)


def test_training_compiles_as_one_graph():
    model = model_of(RS4DModel, num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images(64, 64)).pooler_output.square().sum().backward()
    actual = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(images(64, 64)).pooler_output.square().sum().backward()
    for gradient, parameter in zip(actual, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_onnx_export_gives_the_same_maps_with_a_dynamic_batch(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = model_of(RS4DBackbone, num_hidden_layers=1).requires_grad_(False)
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=16)}}
    program = torch.onnx.export(
        model, (), kwargs={"pixel_values": images(64, 64)}, dynamo=True, dynamic_shapes=batch, verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    pixel_values = torch.randn(3, 3, 64, 64)
    (name,) = (value.name for value in session.get_inputs())
    actual = torch.from_numpy(session.run(None, {name: pixel_values.numpy()})[0])
    torch.testing.assert_close(actual, model(pixel_values).feature_maps[0], atol=1e-4, rtol=1e-4)


def test_resizing_positions_to_their_own_grid_changes_nothing():
    table = torch.randn(1, 15, 8)
    torch.testing.assert_close(modeling_rs4d.resize_positions(table, (3, 5), (3, 5)), table, atol=1e-6, rtol=1e-6)
