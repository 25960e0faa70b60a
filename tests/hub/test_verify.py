"""Nothing damaged, renamed, random or foreign passes as one of our models."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_rsheat import RSVHeatImageProcessor, VHeatBackbone, export, from_pretrained_verified, verify
from hf_rsheat.cli import app
from hf_rsheat.errors import VerificationError
from hf_rsheat.hub.records import write_manifest
from tests.zoo import STAGES, ZOO, randomize, rs_vheat_config

NAMES = pytest.mark.parametrize("name", ZOO)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("verify")
    return {name: export(ZOO[name].model(), ZOO[name].processor(), root / name) for name in ZOO}


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported["rs-vheat-classifier"], tmp_path / "model"))


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def trunk_tensor(tensors: dict) -> str:
    """A weight inside the trunk, whatever the family calls its layers."""
    layers = re.compile(r"(^|\.)layers?\.\d")
    return min(name for name, tensor in tensors.items() if tensor.ndim > 1 and layers.search(name))


def rename(tensors: dict) -> None:
    name = trunk_tensor(tensors)
    tensors[name.replace("weight", "kernel") if "weight" in name else f"{name}_renamed"] = tensors.pop(name)


def poison(value: float):
    def change(tensors: dict) -> None:
        tensors[trunk_tensor(tensors)][0, 0] = value

    return change


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


MUTATIONS = {
    "missing": lambda folder: edit(folder, lambda tensors: tensors.pop(trunk_tensor(tensors))),
    "renamed": lambda folder: edit(folder, rename),
    "misshapen": lambda folder: edit(
        folder, lambda tensors: tensors.update({(n := trunk_tensor(tensors)): tensors[n][:-1].clone()})
    ),
    "nan": lambda folder: edit(folder, poison(float("nan"))),
    "inf": lambda folder: edit(folder, poison(float("inf"))),
    "flipped bit": flip_bit,
    "truncated": truncate,
}


@NAMES
def test_the_untouched_folder_verifies_and_loads(name, exported):
    report = verify(exported[name])
    assert report.ok, str(report)
    model = from_pretrained_verified(exported[name])
    assert type(model) is type(ZOO[name].model())
    expected = ZOO[name].model().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@NAMES
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_raises(name, mutation, exported, tmp_path):
    folder = Path(shutil.copytree(exported[name], tmp_path / "model"))
    MUTATIONS[mutation](folder)
    with pytest.raises(VerificationError):
        from_pretrained_verified(folder)
    report = verify(folder)
    assert {check.name for check in report.failed} >= {"files"}
    if mutation != "flipped bit":  # only a hash can tell a flipped bit; the rest is seen even if the hashes were redone
        write_manifest(folder)
        with pytest.raises(VerificationError):
            from_pretrained_verified(folder)


def test_wrong_weights_with_fresh_hashes_do_not_reproduce_the_outputs(folder):
    edit(folder, lambda tensors: tensors.update({(n := trunk_tensor(tensors)): torch.randn_like(tensors[n])}))
    write_manifest(folder)
    assert [check.name for check in verify(folder).failed] == ["outputs"]


def test_a_plain_folder_is_reported_as_that_and_loads_only_on_request(tmp_path):
    entry = ZOO["vheat-classifier"]
    entry.model().save_pretrained(tmp_path)
    entry.processor().save_pretrained(tmp_path)
    report = verify(tmp_path)
    assert report.is_plain
    assert not report.failed
    assert CliRunner().invoke(app, ["verify", str(tmp_path)]).exit_code == 3
    with pytest.raises(VerificationError, match="require_manifest=False"):
        from_pretrained_verified(tmp_path)
    from_pretrained_verified(tmp_path, require_manifest=False)


def test_another_class_loads_from_a_verified_trunk(exported):
    backbone = from_pretrained_verified(exported["vheat-classifier"], model_class=VHeatBackbone, out_features=STAGES)
    assert isinstance(backbone, VHeatBackbone)


def test_the_command_prints_a_line_a_check_and_json(folder):
    runner = CliRunner()
    good = runner.invoke(app, ["verify", str(folder)])
    assert good.exit_code == 0
    assert len(good.stdout.splitlines()) == 8
    assert json.loads(runner.invoke(app, ["verify", str(folder), "--json"]).stdout)["ok"]
    flip_bit(folder)
    bad = runner.invoke(app, ["verify", str(folder)])
    assert bad.exit_code == 1
    assert "FAILED  files: changed: model.safetensors" in bad.stdout


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modeling_rs_vheat.py", "import os; os.system('touch executed')\n"),
        ("extra.py", "print('hello')\n"),
        ("__pycache__/modeling_rs_vheat.cpython-311.pyc", "\0"),
        ("pytorch_model.bin", "cos\nsystem\n"),
    ],
)
def test_foreign_code_fails_and_is_named(folder, file, content):
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    write_manifest(folder)
    failed = verify(folder).failed
    assert [check.name for check in failed] == ["code"]
    assert file in failed[0].detail
    assert not Path("executed").exists()


def test_a_config_that_names_another_repositorys_code_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "somebody/else--modeling.Model"
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder)
    with pytest.raises(VerificationError, match="somebody/else"):
        from_pretrained_verified(folder)


def test_a_processor_that_differs_from_the_card_fails(folder):
    RSVHeatImageProcessor(modalities={"optical": {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}}).save_pretrained(
        folder
    )
    write_manifest(folder)
    assert "processor" in {check.name for check in verify(folder).failed}


@pytest.mark.parametrize("shard", ["../outside.safetensors", "sub/model.safetensors", "model.bin"])
def test_shard_names_that_leave_the_folder_are_refused(folder, shard, tmp_path):
    shutil.move(folder / WEIGHTS, tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"rs_vheat.layernorm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(folder)
    with pytest.raises(VerificationError, match="no file of this folder"):
        from_pretrained_verified(folder)


@pytest.mark.parametrize("length", [2**62, 2**40, 10**9])
def test_absurd_header_lengths_are_refused(folder, length):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}")
    write_manifest(folder)
    with pytest.raises(VerificationError):
        from_pretrained_verified(folder)


@NAMES
def test_sharded_weights_verify_and_reload(name, exported, tmp_path):
    entry = ZOO[name]
    model = entry.model()
    folder = export(model, entry.processor(), tmp_path, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert verify(folder).ok
    reloaded = from_pretrained_verified(folder).state_dict()
    assert all(torch.equal(value, reloaded[key]) for key, value in model.state_dict().items())


def test_exporting_unsharded_over_shards_leaves_none(tmp_path):
    entry = ZOO["rs-vheat-pretraining"]
    export(entry.model(), entry.processor(), tmp_path, max_shard_size="40KB")
    folder = export(entry.model(), entry.processor(), tmp_path)
    assert not list(folder.glob("model-*.safetensors"))
    assert verify(folder).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_exports_verify(dtype, tmp_path):
    from hf_rsheat import RSVHeatModel

    model = RSVHeatModel(rs_vheat_config())
    randomize(model)
    folder = export(model.to(dtype), RSVHeatImageProcessor(), tmp_path)
    assert verify(folder).ok
    assert from_pretrained_verified(folder).dtype == dtype


@pytest.mark.parametrize("name", ["nowhere", "../up", "a/b/c"])
def test_what_is_neither_folder_nor_repository_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(VerificationError):
        verify(name)
