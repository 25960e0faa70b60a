"""The hosted handler answers as promised, and refuses in one sentence."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_rsheat import export
from hf_rsheat.hub.handler import EndpointHandler, Limits
from hf_rsheat.hub.inference import write_handler
from tests.hub.inference_requests import bomb, file, handler_of, opened, picture, refusal, text
from tests.zoo import ZOO

FOLDERS = ["vheat-classifier", "vheat-upernet", "vheat-backbone", "rs-vheat-pretraining", "rs-vheat-upernet"]
# A hosting server: it loads handler.py by path, as Inference Endpoints do, and cannot import this package.
CHILD = """
import importlib.util, json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_rsheat":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
answers = {}
folders, request = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name, folder in folders.items():
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", f"{folder}/handler.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler.EndpointHandler"] = module
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(folder)
    answers[name] = handler(request), type(handler.model).__module__, handler({"inputs": 3})
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def classifier() -> EndpointHandler:
    return handler_of("vheat-classifier")


@pytest.fixture(scope="module")
def pretraining() -> EndpointHandler:
    return handler_of("rs-vheat-pretraining")


@pytest.fixture(scope="module")
def segmenter() -> EndpointHandler:
    handler = handler_of("vheat-upernet")
    pixel_values = handler.processor(picture(), do_center_crop=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():  # such that every class wins somewhere
        logits = handler.model(pixel_values).logits
        handler.model.decode_head.classifier.bias -= logits.mean(dim=(0, 2, 3))
    return handler


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
def test_every_form_of_an_image_gets_the_same_answer(kind, classifier):
    data = file(picture().quantize(64) if kind == "GIF" else picture(), kind)
    encoded = base64.b64encode(data).decode()
    forms = [
        data,
        bytearray(data),
        encoded,
        f"data:image/{kind.lower()};base64,{encoded}",
        encoded[:50] + "\n" + encoded[50:],
    ]
    answers = [classifier({"inputs": form}) for form in (*forms, Image.open(io.BytesIO(data)))]
    assert all(answer == answers[0] for answer in answers)
    assert classifier({"inputs": forms}) == answers[:-1]


def test_a_classifier_answers_as_the_pipeline_does(classifier):
    expected = pipeline("image-classification", model=classifier.model, image_processor=classifier.processor)(picture())
    answer = classifier({"inputs": text(picture())})
    assert [item["label"] for item in answer] == [item["label"] for item in expected]
    assert [item["score"] for item in answer] == pytest.approx([item["score"] for item in expected], abs=1e-6)
    assert classifier({"inputs": text(picture()), "parameters": {"top_k": 1}}) == answer[:1]


def test_a_classifier_with_independent_labels_answers_with_sigmoid_scores():
    handler = handler_of("vheat-classifier")
    handler.model.config.problem_type = "multi_label_classification"
    pixel_values = handler.processor(picture(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = sorted(handler.model(pixel_values).logits[0].sigmoid().tolist(), reverse=True)
    assert [item["score"] for item in handler({"inputs": text(picture())})] == pytest.approx(expected, abs=1e-6)


def test_features_and_heat_maps_come_beside_the_classes(classifier):
    plain = classifier({"inputs": text(picture())})
    answer = classifier({"inputs": text(picture()), "parameters": {"features": True, "heat_maps": True}})
    assert answer["predictions"] == plain
    pixel_values = classifier.processor(picture(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = classifier.model.vheat(pixel_values, output_hidden_states=True)
    assert answer["features"] == pytest.approx(outputs.pooler_output[0].tolist(), abs=1e-6)
    assert list(answer["heat_maps"]) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    heat = outputs.hidden_states[2][0].abs().mean(0)
    np.testing.assert_allclose(opened(answer["heat_maps"]["stage2"]), (heat / heat.max() * 255).numpy(), atol=0.51)


def test_a_heat_source_shows_where_the_features_change(pretraining):
    request = {"inputs": text(picture()), "parameters": {"heat_source": [1, 0]}}
    stem = opened(pretraining(request)["heat_maps"]["stem"])
    assert stem.shape == (16, 16)
    assert stem[12:, :4].max() == 255
    assert stem[:11].max() == stem[:, 6:].max() == 0  # two 3x3 convolutions see no further than that


@pytest.mark.parametrize("name", ["vheat", "vheat-backbone", "rs-vheat", "rs-vheat-backbone", "rs-vheat-pretraining"])
def test_models_without_a_head_answer_with_features(name):
    handler = handler_of(name)
    answer = handler({"inputs": text(picture())})
    assert set(answer) == {"features"}
    assert len(answer["features"]) == 32
    assert refusal(handler({"inputs": text(picture()), "parameters": {"top_k": 3}})) == 400
    if name != "rs-vheat-pretraining":
        assert refusal(handler({"inputs": text(picture()), "parameters": {"reconstruction": True}})) == 400


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_ours_is_served(name):
    entry = ZOO[name]
    handler = EndpointHandler(model=entry.model(), processor=entry.processor())
    answer = handler({"inputs": file(picture()), "parameters": {"features": True}})
    assert len(answer["features"]) > 1
    assert ("predictions" in answer) == name.endswith(("classifier", "upernet", "instances"))
    maps = handler({"inputs": file(picture()), "parameters": {"heat_maps": True}})
    assert "heat_maps" in maps or "no heat maps" in maps["error"]["message"]


def test_a_pretraining_model_reconstructs_on_request(pretraining):
    parameters = {"reconstruction": True, "mask_radius": 0.1}
    answer = pretraining({"inputs": text(picture()), "parameters": parameters})
    pixel_values = pretraining.processor(picture(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = pretraining.model(pixel_values, mask_radius=0.1).reconstruction[0].permute(1, 2, 0).numpy()
    sensor = pretraining.processor.modalities["optical"]
    expected = np.clip(expected * sensor["image_std"] + sensor["image_mean"], 0, 1) * 255
    np.testing.assert_allclose(opened(answer["reconstruction"]), expected, atol=0.6)
    assert opened(answer["input"]).shape == opened(answer["low_cut"]).shape == (64, 64, 3)
    other = pretraining({"inputs": text(picture()), "parameters": {"mask_radius": 0.4}})
    assert other["high_cut"] != answer["high_cut"]


def test_the_modality_chooses_stem_and_statistics(pretraining):
    grey = picture(mode="L")
    answer = pretraining({"inputs": text(grey), "parameters": {"modality": "sar", "reconstruction": True}})
    pixel_values = pretraining.processor(grey, modality="sar", return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = pretraining.model.rs_vheat(pixel_values, modality="sar").pooler_output[0]
    assert answer["features"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert opened(answer["reconstruction"]).shape == (64, 64)
    assert refusal(pretraining({"inputs": text(grey), "parameters": {"modality": "lidar"}})) == 400


def test_16_bit_images_need_their_factor(pretraining):
    wide = Image.fromarray(np.linspace(0, 9000, 64 * 64, dtype=np.uint16).reshape(64, 64))
    parameters = {"modality": "sar"}
    answer = pretraining({"inputs": text(wide), "parameters": parameters})
    assert refusal(answer) == 422
    assert "rescale_factor" in answer["error"]["message"]
    assert pretraining({"inputs": text(wide), "parameters": {**parameters, "rescale_factor": 1e-4}})["features"]


def test_a_segmenter_answers_with_masks_of_the_images_size(segmenter):
    answer = segmenter({"inputs": text(picture(80, 60)), "parameters": {"features": True}})
    masks = np.stack([opened(segment["mask"]) for segment in answer["predictions"]])
    assert masks.shape[1:] == (60, 80)
    assert len(masks) > 1
    assert set(np.unique(masks)) == {0, 255}
    np.testing.assert_array_equal(masks.astype(int).sum(0), 255)  # every pixel belongs to exactly one class
    pixel_values = segmenter.processor(picture(80, 60), do_center_crop=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = segmenter.model(pixel_values)
    (expected,) = segmenter.processor.post_process_semantic_segmentation(outputs, [(60, 80)])
    labels = segmenter.model.config.label2id
    for mask, segment in zip(masks, answer["predictions"], strict=True):
        np.testing.assert_array_equal(mask == 255, expected.numpy() == labels[segment["label"]])
        assert 1 / 3 < segment["score"] <= 1
    assert len(answer["features"]) == 32


@pytest.mark.parametrize("name", ["rs4d-instances", "rs4d-prompted-instances"])
def test_a_detector_answers_with_boxes_and_masks_of_the_images_size(name):
    detector = handler_of(name)
    answer = detector({"inputs": text(picture(80, 60)), "parameters": {"threshold": 0.0}})
    assert len(answer) > 1
    assert sorted((found["score"] for found in answer), reverse=True) == [found["score"] for found in answer]
    for found in answer:
        left, top, right, bottom = found["box"]
        assert 0 <= left < right <= 80
        assert 0 <= top < bottom <= 60
        assert opened(found["mask"]).shape == (60, 80)
        assert found["label"] in detector.model.config.label2id
    assert detector({"inputs": text(picture(80, 60)), "parameters": {"threshold": 1.0}}) == []
    assert refusal(detector({"inputs": text(picture()), "parameters": {"threshold": 2}})) == 400
    assert refusal(handler_of("vheat")({"inputs": text(picture()), "parameters": {"threshold": 0.5}})) == 400


def test_an_image_is_turned_upright(classifier):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    turned = file(picture().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert classifier({"inputs": turned}) == classifier({"inputs": file(picture())})


BROKEN = {
    "no object": ("nonsense", 400),
    "no inputs": ({}, 400),
    "null": ({"inputs": None}, 400),
    "a number": ({"inputs": 7}, 400),
    "an object": ({"inputs": {"image": "x"}}, 400),
    "an empty list": ({"inputs": []}, 400),
    "a list in a list": ({"inputs": [[text(picture())]]}, 400),
    "no base64": ({"inputs": "not base64 at all!"}, 400),
    "not ASCII": ({"inputs": "bäse64"}, 400),
    "base64 of no image": ({"inputs": base64.b64encode(b"hello").decode()}, 415),
    "empty text": ({"inputs": ""}, 415),
    "no bytes": ({"inputs": b""}, 415),
    "a cut file": ({"inputs": file(picture())[:200]}, 415),
    "PostScript": ({"inputs": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"}, 415),
    "a bomb": ({"inputs": bomb(100_000, 100_000)}, 413),
    "a bomb Pillow only warns of": ({"inputs": bomb(10_000, 10_000)}, 413),
    "too many pixels": ({"inputs": bomb(6000, 6000)}, 413),
    "a long strip": ({"inputs": file(Image.new("RGB", (5000, 2)))}, 413),
    "too many images": ({"inputs": [text(picture(1, 1))] * 17}, 413),
    "an address": ({"inputs": "https://example.org/scene.png"}, 403),
    "a plain address": ({"inputs": "HTTP://example.org/scene.png"}, 403),
    "a file name": ({"inputs": "/etc/passwd"}, 400),
    "16 bit": ({"inputs": file(Image.fromarray(np.zeros((9, 9), np.uint16)))}, 422),
    "parameters of another kind": ({"inputs": text(picture()), "parameters": [1]}, 400),
    "an unknown parameter": ({"inputs": text(picture()), "parameters": {"topk": 1}}, 400),
    "a number as name": ({"inputs": text(picture()), "parameters": {1: 1}}, 400),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_refused_in_one_sentence(name, classifier):
    request, status = BROKEN[name]
    answer = classifier(request)
    assert refusal(answer) == status
    json.dumps(answer)


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 0},
        {"top_k": True},
        {"top_k": "3"},
        {"top_k": 2.0},
        {"features": 1},
        {"heat_maps": "yes"},
        {"heat_source": [0.5]},
        {"heat_source": [0.5, 2]},
        {"heat_source": [0.5, float("nan")]},
        {"mask_radius": -1},
        {"mask_radius": 10**400},
        {"modality": 3},
        {"rescale_factor": 0},
        {"reconstruction": True},
    ],
)
def test_unsuitable_parameters_are_refused(parameters, classifier):
    assert refusal(classifier({"inputs": text(picture()), "parameters": parameters})) == 400


def test_null_parameters_count_as_not_given(classifier):
    plain = classifier({"inputs": text(picture())})
    assert classifier({"inputs": text(picture()), "parameters": None}) == plain
    assert classifier({"inputs": text(picture()), "parameters": {"top_k": None, "features": None}}) == plain


def test_a_bad_image_of_a_list_is_named(classifier):
    answer = classifier({"inputs": [text(picture()), "!"]})
    assert refusal(answer) == 400
    assert answer["error"]["message"].startswith("inputs[1]: ")


def test_limits_can_be_set():
    limits = Limits(images=1, bytes=300, pixels=100, mask_values=900)
    handler = handler_of("vheat-upernet", limits=limits)
    assert refusal(handler({"inputs": [text(picture(4, 4))] * 2})) == 413
    assert refusal(handler({"inputs": text(picture(9, 9)) + "A" * 400})) == 413
    assert refusal(handler({"inputs": file(picture(9, 9)) + bytes(300)})) == 413
    assert refusal(handler({"inputs": picture(11, 11)})) == 413
    assert isinstance(handler({"inputs": picture(9, 9)}), list)
    handler.limits = Limits(mask_values=200)
    answer = handler({"inputs": picture(9, 9)})
    assert refusal(answer) == 413
    assert "66 pixels" in answer["error"]["message"]


def test_a_failing_model_is_an_answer_too(caplog):
    handler = handler_of("vheat-classifier")
    with torch.no_grad():
        handler.model.classifier.bias.fill_(float("nan"))
    answer = handler({"inputs": text(picture())})
    assert refusal(answer) == 500
    assert "NaN" in caplog.text


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    exported = {name: export(ZOO[name].model(), ZOO[name].processor(), root / name) for name in FOLDERS}
    for folder in exported.values():
        write_handler(folder)
    return exported


def test_the_handler_runs_where_the_package_does_not_exist(folders, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    jobs = json.dumps({name: str(folder) for name, folder in folders.items()})
    request = {"inputs": [text(picture())], "parameters": {"features": True, "heat_maps": True}}
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, str(script), jobs, json.dumps(request)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = json.loads(run.stdout.splitlines()[-1])
    for name in FOLDERS:
        (actual,), module, refused = answers[name]
        assert module.startswith("transformers_modules")
        assert refusal(refused) == 400
        expected = EndpointHandler(model=ZOO[name].model(), processor=ZOO[name].processor())(request)[0]
        assert actual["features"] == pytest.approx(expected["features"], abs=1e-6)
        assert actual.keys() == expected.keys()
        for before, after in zip(expected.get("predictions", ()), actual.get("predictions", ()), strict=True):
            assert after["label"] == before["label"]
            assert after["score"] == pytest.approx(before["score"], abs=1e-6)


def test_the_requirements_are_this_packages_own(folders):
    lines = (folders["vheat-classifier"] / "requirements.txt").read_text().split()
    assert [line.partition(">=")[0] for line in lines] == [
        "torch",
        "torchvision",
        "transformers",
        "safetensors",
        "numpy",
        "pillow",
    ]


def test_a_folder_that_the_handler_cannot_serve_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["SomethingForObjectDetection"]}))
    with pytest.raises(ValueError, match="SomethingForObjectDetection"):
        EndpointHandler(str(tmp_path))
