"""Hostile files run nothing and write nothing outside the folder they were given, whichever door they come through."""

import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_rsheat import export, from_pretrained_verified, verify
from hf_rsheat.cli import app
from hf_rsheat.errors import CheckpointError, DataError, VerificationError
from hf_rsheat.evaluation.features import read_image
from hf_rsheat.hub.records import sha256, write_manifest
from hf_rsheat.training.checkpoint import MANIFEST
from hf_rsheat.training.loop import train
from hf_rsheat.training.recipe import Recipe
from tests.conversion.test_reader import legacy_container, payloads, zip_container
from tests.training.conftest import TINY_MODEL, write_image
from tests.zoo import ZOO

ROOT = Path(__file__).parent.parent
CONTAINERS = {"zip": zip_container, "plain": lambda data, path: legacy_container(data, path, instead_of=0)}
PAYLOADS = pytest.mark.parametrize("payload", payloads(""))
BOXES = pytest.mark.parametrize("container", CONTAINERS)


def write_payload(payload: str, container: str, path: Path, marker: Path) -> Path:
    return CONTAINERS[container](payloads(str(marker))[payload][0], path)


def entries(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    entry = ZOO["vheat-classifier"]
    return export(entry.model(), entry.processor(), tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Recipe:
    root = tmp_path_factory.mktemp("run")
    for index in range(3):
        write_image(root / "images" / f"{index}.png", index)
    recipe = Recipe(
        objective="rs_vheat",
        image_folder=str(root / "images"),
        output_dir=str(root / "output"),
        image_size=32,
        model={**TINY_MODEL, "modalities": {"optical": 3}},
        batch_size=2,
        max_steps=2,
        save_steps=1,
        num_workers=0,
    )
    train(recipe)
    return recipe


@PAYLOADS
@BOXES
def test_convert_refuses_and_writes_nothing(payload, container, tmp_path):
    marker = tmp_path / "executed"
    file = write_payload(payload, container, tmp_path / "upstream.pth", marker)
    result = CliRunner().invoke(app, ["convert", "vheat", str(file), str(tmp_path / "model")])
    assert isinstance(result.exception, CheckpointError)
    assert entries(tmp_path) == {file}


@PAYLOADS
@BOXES
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_verify_and_verified_loading_refuse(payload, container, name, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "executed"
    write_payload(payload, container, folder / name, marker)
    write_manifest(folder)
    before = entries(tmp_path)
    with pytest.raises(VerificationError):
        from_pretrained_verified(folder)
    assert verify(folder).failed
    assert entries(tmp_path) == before


PLANTED = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "pytorch_model.bin")


@pytest.mark.parametrize("name", [*PLANTED, "model.safetensors", "optimizer.safetensors", "trainer_state.json"])
@BOXES
def test_resume_runs_nothing_planted_in_a_checkpoint(name, container, finished_run, tmp_path):
    output = Path(shutil.copytree(finished_run.output_dir, tmp_path / "output"))
    shutil.rmtree(output / "checkpoint-2")
    checkpoint, marker = output / "checkpoint-1", tmp_path / "executed"
    write_payload("os.system", container, checkpoint / name, marker)
    recipe = Recipe(**{**vars(finished_run), "output_dir": str(output)})
    if name in PLANTED:
        train(recipe, resume=True)  # nothing reads it
    else:
        with pytest.raises(CheckpointError):  # its hash is not the manifest's
            train(recipe, resume=True)
        sums = json.loads((checkpoint / MANIFEST).read_text())
        sums[name] = sha256(checkpoint / name)
        (checkpoint / MANIFEST).write_text(json.dumps(sums))
        with pytest.raises(CheckpointError):  # and it is no tensor file either
            train(recipe, resume=True)
    assert not marker.exists()


def png_bomb(path: Path, side: int = 60_000) -> Path:
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def test_a_decompression_bomb_is_left_out_of_training_and_embedding(finished_run, exported, tmp_path):
    images = Path(shutil.copytree(finished_run.image_folder, tmp_path / "images"))
    png_bomb(images / "bomb.png")
    recipe = Recipe(**{**vars(finished_run), "image_folder": str(images), "output_dir": str(tmp_path / "output")})
    train(recipe)
    skipped = [json.loads(line) for line in (tmp_path / "output/skipped.jsonl").read_text().splitlines()]
    assert [Path(line["path"]).name for line in skipped] == ["bomb.png"]
    result = CliRunner().invoke(app, ["embed", str(exported), str(images), str(tmp_path / "out.parquet")])
    assert "3 images, 1 left out" in result.output
    with pytest.raises(DataError, match="pixels"):
        read_image(images / "bomb.png")


def test_nothing_in_the_package_unpickles_with_pickles_own_means():
    allowed = {"reader.py"}  # the restricted unpickler itself
    pattern = re.compile(r"torch\.load\(|pickle\.loads?\(|Unpickler\(|joblib\.load|weights_only\s*=\s*False|np\.load\(")
    for folder in ("hf_rsheat", "conversion"):
        for path in (ROOT / folder).rglob("*.py"):
            code = "\n".join(line.partition("#")[0] for line in path.read_text().splitlines())
            if path.name not in allowed:
                assert not pattern.search(re.sub(r'""".*?"""', "", code, flags=re.S)), path
