"""The checkpoint reader reads every container torch.save knows and executes nothing that is in it."""

import argparse
import copyreg
import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_rsheat.conversion import reader
from hf_rsheat.conversion.reader import read_checkpoint
from hf_rsheat.errors import CheckpointError, UnsafeCheckpointError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.uint16, torch.float8_e4m3fn]
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SYSTEM_INFO = {"protocol_version": PROTOCOL, "little_endian": sys.byteorder == "little", "type_sizes": {}}


def zip_container(data: bytes, path: Path) -> Path:
    """A zip file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", sys.byteorder)
        archive.writestr("archive/version", "3\n")
    return path


def legacy_container(data: bytes, path: Path, *, instead_of: int = 3) -> Path:
    """A legacy file whose pickle number `instead_of` (of magic, protocol, system, tree, storage keys) is `data`."""
    pickles = [pickle.dumps(value, protocol=2) for value in (MAGIC, PROTOCOL, SYSTEM_INFO, {}, [])]
    pickles[instead_of] = data
    path.write_bytes(b"".join(pickles))
    return path


CONTAINERS = {
    "zip": zip_container,
    "legacy": legacy_container,
    "plain": lambda data, path: legacy_container(data, path, instead_of=0),
    "legacy-protocol": lambda data, path: legacy_container(data, path, instead_of=1),
    "legacy-system": lambda data, path: legacy_container(data, path, instead_of=2),
    "legacy-keys": lambda data, path: legacy_container(data, path, instead_of=4),
}


def call(module: str, name: str, *args: object) -> bytes:
    """A pickle that calls module.name(*args), spelled by hand so that any name can be written."""
    arguments = pickle.dumps(args, protocol=2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


def stack_call(module: str, name: str, *args: object) -> bytes:
    """The same with STACK_GLOBAL, whose names may be dotted paths."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    arguments = pickle.dumps(args, protocol=2)[2:-1]
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + arguments + b"R."


def payloads(marker: str) -> dict[str, tuple[bytes, str]]:
    """Programs that would create `marker`, and the global that must be named in the refusal."""
    touch, code = f"touch {marker}", f"open({marker!r}, 'w').close()"
    storage = b"(X\x07\x00\x00\x00storage" + b"cos\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ."
    return {
        "os.system": (call("os", "system", touch), "os.system"),
        "posix.system": (call("posix", "system", touch), "posix.system"),
        "eval": (call("builtins", "eval", code), "builtins.eval"),
        "python 2 eval": (call("__builtin__", "eval", code), "__builtin__.eval"),
        "exec": (call("builtins", "exec", code), "builtins.exec"),
        "subprocess": (call("subprocess", "call", ["touch", marker]), "subprocess.call"),
        "getattr on an allowed class": (call("builtins", "getattr", "x", "__class__"), "builtins.getattr"),
        "reconstructor": (call("copyreg", "_reconstructor", 1, 2, None), "copyreg._reconstructor"),
        "importer": (call("importlib", "import_module", "os"), "importlib.import_module"),
        "torch.load": (call("torch", "load", marker), "torch.load"),
        "torch.hub": (call("torch.hub", "_load_local", "/", "m"), "torch.hub._load_local"),
        "numpy runstring": (
            call("numpy.testing._private.utils", "runstring", code, {}),
            "numpy.testing._private.utils.runstring",
        ),
        "dotted path": (stack_call("torch._utils", "os.system", touch), "torch._utils.os.system"),
        "dotted attribute": (
            stack_call("torch._utils", "_rebuild_tensor_v2.__globals__", touch),
            "torch._utils._rebuild_tensor_v2.__globals__",
        ),
        "module split elsewhere": (stack_call("torch", "_utils._rebuild_tensor_v2", 0), "torch._utils"),
        "anything called Storage": (call("os", "FloatStorage", touch), "os.FloatStorage"),
        "quantized storage": (call("torch", "QInt8Storage"), "torch.QInt8Storage"),
        "codec": (call("_codecs", "encode", code, "rot13"), "_codecs.encode"),
        "old-style instance": (b"(X" + struct.pack("<I", len(touch)) + touch.encode() + b"ios\nsystem\n.", "os.system"),
        "object opcode": (b"(cos\nsystem\nX" + struct.pack("<I", len(touch)) + touch.encode() + b"o.", "os.system"),
        "persistent id": (b"\x80\x02" + storage, "os.system"),
        "second global": (pickle.dumps(OrderedDict(), 2)[:-1] + b"0" + call("os", "system", touch)[2:], "os.system"),
    }


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("payload", payloads(""))
def test_a_pickle_naming_another_global_is_refused_by_name_and_not_run(tmp_path, container, payload):
    marker = tmp_path / "executed"
    data, name = payloads(str(marker))[payload]
    path = CONTAINERS[container](data, tmp_path / "payload.pth")
    with pytest.raises(UnsafeCheckpointError) as refusal:
        read_checkpoint(path)
    assert f"'{name}" in str(refusal.value)
    assert not marker.exists()


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_the_payloads_are_real(tmp_path, container):
    marker = tmp_path / "executed"
    data, _ = payloads(str(marker))["os.system"]
    torch.load(CONTAINERS[container](data, tmp_path / "payload.pth"), weights_only=False)
    assert marker.exists()


def test_extension_codes_are_refused_too(tmp_path):
    copyreg.add_extension("os", "system", 0x7F)
    try:
        with pytest.raises(UnsafeCheckpointError, match=r"os\.system"):
            read_checkpoint(zip_container(b"\x80\x02\x82\x7f.", tmp_path / "extension.pth"))
    finally:
        copyreg.remove_extension("os", "system", 0x7F)


@pytest.mark.parametrize("name", ["collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "_codecs\nencode"])
def test_a_pickle_cannot_change_the_stand_ins(tmp_path, name):
    """BUILD on a class sets its attributes unless the class has a __setstate__ of its own."""
    before = dict(vars(reader.STAND_INS[tuple(name.split("\n"))]))
    state = pickle.dumps((None, {"__new__": 1, "__setstate__": 2}), 2)[2:-1]
    path = zip_container(b"\x80\x02c" + name.encode() + b"\n" + state + b"b.", tmp_path / "build.pth")
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert dict(vars(reader.STAND_INS[tuple(name.split("\n"))])) == before


def test_no_stand_in_is_a_function_or_the_real_object():
    harmless = {set, tuple}
    for value in reader.STAND_INS.values():
        assert value in harmless or isinstance(value, torch.dtype) or issubclass(value, reader.StandIn)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_exactly(tmp_path, dtype, zipped):
    values = (torch.arange(24).reshape(2, 3, 4) % 5).to(dtype)
    torch.save({"x": values}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "x.pth")["x"]
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_views_parameters_and_containers_are_read_as_saved(tmp_path, zipped):
    base = torch.randn(6, 5)
    saved = {
        "model": OrderedDict(a=base[1:4, ::2], b=base.t(), c=torch.nn.Parameter(base[0]), d=torch.empty(0, 3)),
        "args": argparse.Namespace(lr=0.1, name="x"),
        "list": [torch.tensor(7), (1, "two", None), {3, 4}],
        "size": base.shape,
        "device": torch.device("cpu"),
        "optimizer": {"state": torch.ones(3)},
    }
    torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "x.pth")
    assert list(read) == ["model", "args", "list", "size", "device"]  # the optimizer stays in the file
    for name, tensor in saved["model"].items():
        assert torch.equal(read["model"][name], tensor.detach())
    assert read["args"] == {"lr": 0.1, "name": "x"}
    assert read["list"][1:] == [(1, "two", None), {3, 4}]
    assert read["list"][0].item() == 7
    assert read["size"] == (6, 5)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_numpy_scalars_do_not_hinder(tmp_path, zipped):
    numpy = pytest.importorskip("numpy")
    saved = {"model": {"x": torch.ones(2)}, "max_accuracy": numpy.float64(71.5), "curve": numpy.arange(3)}
    torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_checkpoint(tmp_path / "x.pth")["model"]["x"], torch.ones(2))


def test_safetensors_are_read(tmp_path):
    save_file({"x": torch.arange(3)}, tmp_path / "x.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "x.safetensors")["x"], torch.arange(3))


def test_shared_and_cyclic_structures_end(tmp_path):
    nested: tuple = (1,)
    for _ in range(64):
        nested = (nested, nested)
    cycle: list = []
    cycle.append(cycle)
    read = read_checkpoint(zip_container(pickle.dumps({"a": nested, "b": cycle}), tmp_path / "x.pth"))
    assert read["b"][0] is read["b"]


def damaged_files(folder: Path) -> dict[str, bytes]:
    state = {"layer.weight": torch.randn(64, 64)}
    whole, legacy = io.BytesIO(), io.BytesIO()
    torch.save(state, whole)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    save_file(state, folder / "x.safetensors")
    flipped = bytearray(whole.getvalue())
    flipped[len(flipped) // 2] ^= 0xFF
    outside = call("torch._utils", "_rebuild_tensor_v2").replace(b")R.", b"")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("arrays.npy", b"")
    return {
        "empty.pth": b"",
        "cut.pth": whole.getvalue()[:-4000],
        "flipped.pth": bytes(flipped),
        "cut_legacy.pth": legacy.getvalue()[:-400],
        "cut_legacy_pickle.pth": legacy.getvalue()[:100],
        "page.pth": b"<!DOCTYPE html><html>Not found</html>",
        "unfinished.pth": outside,
        "pickle.pth": pickle.dumps({"x": 1}),
        "other.zip": archive.getvalue(),
        "cut.safetensors": (folder / "x.safetensors").read_bytes()[:-10],
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    }


@pytest.mark.parametrize(
    "name",
    [
        "empty.pth",
        "cut.pth",
        "flipped.pth",
        "cut_legacy.pth",
        "cut_legacy_pickle.pth",
        "page.pth",
        "unfinished.pth",
        "pickle.pth",
        "other.zip",
        "cut.safetensors",
        "pointer.pth",
        "missing.pth",
    ],
)
def test_damaged_files_say_what_to_do(tmp_path, name):
    path = tmp_path / name
    if name != "missing.pth":
        path.write_bytes(damaged_files(tmp_path)[name])
    with pytest.raises(
        CheckpointError, match=r"Download it again|torch\.save|git lfs pull|pass the path|pass a|is cut"
    ):
        read_checkpoint(path)


def test_tensors_outside_their_storage_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"x": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            # 4 values are stored as BININT1; the claimed shape becomes 200
            archive.writestr(name, data.replace(b"K\x04\x85", b"K\xc8\x85") if name.endswith("data.pkl") else data)
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_whole_pickled_modules_are_refused(tmp_path, zipped):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*plain state dict"):
        read_checkpoint(tmp_path / "x.pth")
