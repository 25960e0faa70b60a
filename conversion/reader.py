"""Read tensors out of checkpoint files without executing anything that is written in them.

A ``.pth`` file is a pickle program. Here it runs in an unpickler that knows nothing but the exact names in `STAND_INS`,
and every one of those names leads to an inert class of this file instead of the real object: not even PyTorch's own
rebuild functions are called. Tensors are recorded as descriptions and built afterwards, with all bounds checked.

Both containers of ``torch.save`` are read here rather than by ``torch.load``: its reader of non-zip files calls
``pickle_module.load`` besides ``Unpickler`` and accepts storage names by substring.
"""

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_rsheat.errors import CheckpointError, UnsafeCheckpointError

# Heavy entries that no converter reads; their tensors are left in the file.
SKIPPED_ENTRIES = ("optimizer", "optimizers", "scaler", "lr_scheduler", "param_schedulers")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ZIP_MAGIC = b"PK\x03\x04"


class StandIn:
    """What an allowed name becomes. ``__setstate__`` exists so that a pickle can never set attributes on it."""

    def __setstate__(self, state: Any) -> None:
        """Ignore the state a pickle carries."""


class Opaque(StandIn):
    """Stands for an object no converter needs (NumPy scalars, devices); takes any arguments, holds none."""

    def __new__(cls, *args: Any) -> "Opaque":
        """Forget the arguments."""
        return super().__new__(cls)


class Mapping(StandIn, dict):
    """Stands for dict subclasses (OrderedDict, yacs and mmengine config nodes)."""


class Namespace(Mapping):
    """Stands for argparse.Namespace: its attributes become items."""

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes as items."""
        self.update(state)


class HistoryBuffer(Opaque):
    """Stands for mmengine's log buffer, whose pickle looks up its own statistics methods."""


class HistoryBufferMethod(StandIn):
    """Stands for `getattr`, which is allowed for one purpose only: naming a statistics method of a HistoryBuffer."""

    def __new__(cls, owner: Any, name: Any) -> None:  # type: ignore[misc]
        """Return None for a HistoryBuffer method, refuse everything else."""
        if owner is not HistoryBuffer or name not in {"mean", "max", "min", "current"}:
            _refuse("builtins.getattr")


class Latin1(StandIn):
    """Stands for `_codecs.encode`, the way protocol 2 spells a bytes object."""

    def __new__(cls, text: str, encoding: str = "latin1") -> bytes:  # type: ignore[misc]
        """Return the bytes; only the encoding that pickle itself writes is known."""
        if encoding != "latin1" or not isinstance(text, str):
            _refuse("_codecs.encode")
        return text.encode("latin-1")


class StorageType(StandIn):
    """Stands for a storage class; subclasses carry its dtype."""

    dtype: torch.dtype


class StorageRecord(StandIn):
    """A run of `numel` values of `dtype` under `key`, not read yet; `offset` counts values into a legacy view."""

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.key, self.dtype, self.numel, self.offset = key, dtype, numel, 0


class TensorRecord(StandIn):
    """Stands for torch's dense rebuild functions: a strided view of a storage, not built yet."""

    def __init__(self, storage: StorageRecord, offset: int, size: tuple, stride: tuple, *rest: Any) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)
        self.dtype = storage.dtype
        # rest of _rebuild_tensor_v2: requires_grad, backward_hooks, metadata (conjugate and negative views).
        if len(rest) > 2 and rest[2]:
            raise CheckpointError("A tensor is a lazy conjugate view: save `tensor.resolve_conj()` instead.")


class UntypedTensorRecord(TensorRecord):
    """Stands for `_rebuild_tensor_v3`, which names the dtype itself."""

    def __init__(self, storage: StorageRecord, offset: int, size: tuple, stride: tuple, *rest: Any) -> None:
        super().__init__(storage, offset, size, stride, *rest[:2], *rest[3:4])
        self.dtype = rest[2]


class ParameterData(StandIn):
    """Stands for `_rebuild_parameter`: a parameter is its tensor."""

    def __new__(cls, data: Any, *args: Any) -> Any:
        """Return the tensor's record."""
        return data


_STORAGE_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
# dtypes that `_rebuild_tensor_v3` names because they have no storage class of their own
_NAMED_DTYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")


def _torch_names() -> dict[tuple[str, str], Any]:
    types = {f"{n}Storage": type(f"{n}Storage", (StorageType,), {"dtype": d}) for n, d in _STORAGE_DTYPES.items()}
    table: dict[tuple[str, str], Any] = {(m, n): t for n, t in types.items() for m in ("torch", "torch.cuda")}
    table |= {(module, "UntypedStorage"): types["ByteStorage"] for module in ("torch", "torch.storage")}
    table |= {("torch", str(d).removeprefix("torch.")): d for d in _STORAGE_DTYPES.values()}
    return table | {("torch", name): getattr(torch, name) for name in _NAMED_DTYPES}


STAND_INS: dict[tuple[str, str], Any] = {
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "getattr"): HistoryBufferMethod,
    ("__builtin__", "getattr"): HistoryBufferMethod,
    ("collections", "OrderedDict"): Mapping,
    ("_codecs", "encode"): Latin1,
    ("argparse", "Namespace"): Namespace,
    ("yacs.config", "CfgNode"): Mapping,
    ("fvcore.common.config", "CfgNode"): Mapping,
    ("mmengine.config.config", "ConfigDict"): Mapping,
    ("mmengine.logging.history_buffer", "HistoryBuffer"): HistoryBuffer,
    ("numpy", "dtype"): Opaque,
    ("numpy", "ndarray"): Opaque,
    ("numpy.core.multiarray", "scalar"): Opaque,
    ("numpy._core.multiarray", "scalar"): Opaque,
    ("numpy.core.multiarray", "_reconstruct"): Opaque,
    ("numpy._core.multiarray", "_reconstruct"): Opaque,
    ("torch", "device"): Opaque,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): TensorRecord,
    ("torch._utils", "_rebuild_tensor_v2"): TensorRecord,
    ("torch._utils", "_rebuild_tensor_v3"): UntypedTensorRecord,
    ("torch._utils", "_rebuild_parameter"): ParameterData,
    **_torch_names(),
}
"""Exact (module, name) -> stand-in. A name that is not here is refused; extend the table, never the matching."""


def _refuse(name: str) -> NoReturn:
    raise UnsafeCheckpointError(
        f"The checkpoint names the global '{name}', which reading weights never needs. Nothing of it was executed. "
        "If you trust the file's author, ask for a .safetensors file or a plain state dict instead."
    )


class _Unpickler(pickle.Unpickler):
    """Unpickler whose whole world is `STAND_INS`; records the storages it meets in the order of their first use."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, StorageRecord] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Look the exact name up. The inherited method is never reached: it imports."""
        if (module, name) not in STAND_INS:
            _refuse(f"{module}.{name}")
        return STAND_INS[(module, name)]

    def persistent_load(self, pid: Any) -> StorageRecord:
        """Record a storage: ("storage", type, key, location, numel[, view])."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not issubclass(pid[1], StorageType):
            raise CheckpointError("The pickle refers to something that is no tensor storage: save a plain state dict.")
        _, storage_type, key, _, numel = pid[:5]
        record = StorageRecord(str(key), storage_type.dtype, int(numel))
        self.storages.setdefault(record.key, record)
        if len(pid) > 5 and pid[5] is not None:  # legacy files describe shared storages as views of a root
            _, offset, view_numel = pid[5]
            record = StorageRecord(record.key, record.dtype, int(view_numel))
            record.offset = int(offset)
        return record


def _check_byte_order(order: str) -> None:
    if order != sys.byteorder:
        raise CheckpointError(f"The file was written on a {order}-endian machine: load and save it again on this one.")


def _read_zip(file: BinaryIO) -> tuple[Any, Callable[[str], bytearray]]:
    """Unpickle a zip container. Returns the tree and a function key -> bytes of that storage."""
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    roots = [n.removesuffix("data.pkl") for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError("The zip archive holds no single 'data.pkl', so torch.save did not write it.")
    root = roots[0]
    if f"{root}constants.pkl" in names:
        raise CheckpointError("This is a TorchScript archive: save its `state_dict()` with torch.save instead.")
    if f"{root}byteorder" in names:
        _check_byte_order(archive.read(f"{root}byteorder").decode())
    unpickler = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")))  # read whole: its checksum is verified first
    return unpickler.load(), lambda key: bytearray(archive.read(f"{root}data/{key}"))


def _read_legacy(file: BinaryIO) -> tuple[Any, Callable[[str], bytearray]]:
    """Unpickle the pre-1.6 container: five pickles in a row, then the storages."""
    if _Unpickler(file).load() != _LEGACY_MAGIC or _Unpickler(file).load() != _LEGACY_PROTOCOL:
        raise CheckpointError("The file is a pickle, but torch.save did not write it.")
    _check_byte_order("little" if _Unpickler(file).load()["little_endian"] else "big")
    unpickler = _Unpickler(file)
    tree = unpickler.load()
    places: dict[str, tuple[int, int]] = {}
    for key in _Unpickler(file).load():
        (numel,) = struct.unpack("<q", file.read(8))
        size = numel * unpickler.storages[key].dtype.itemsize
        places[key] = (file.tell(), size)
        file.seek(size, 1)

    def read(key: str) -> bytearray:
        start, size = places[key]
        file.seek(start)
        return bytearray(file.read(size))

    return tree, read


class _Builder:
    """Turns records into tensors and stand-in containers into plain ones; keeps sharing, survives cycles."""

    def __init__(self, read: Callable[[str], bytearray]) -> None:
        self.read = read
        self.bytes: dict[str, Tensor] = {}
        self.done: dict[int, Any] = {}

    def build(self, node: Any) -> Any:
        """Plain Python and torch objects for a node of the unpickled tree."""
        if isinstance(node, TensorRecord):
            return self.tensor(node)
        if not isinstance(node, dict | list | tuple):
            return node
        if id(node) in self.done:
            return self.done[id(node)]
        if isinstance(node, dict):
            plain: dict = {}
            self.done[id(node)] = plain
            plain.update((key, self.build(value)) for key, value in node.items())
            return plain
        items: list = []
        if isinstance(node, list):
            self.done[id(node)] = items
        items.extend(self.build(value) for value in node)
        # Tuples are remembered too: nested pairs of one tuple would otherwise grow exponentially.
        return self.done.setdefault(id(node), tuple(items))

    def tensor(self, record: TensorRecord) -> Tensor:
        """One tensor; raises CheckpointError where it reaches outside its storage."""
        storage = record.storage
        if storage.key not in self.bytes:
            content = self.read(storage.key)
            self.bytes[storage.key] = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()
        start = storage.offset * storage.dtype.itemsize
        size = storage.numel * storage.dtype.itemsize
        data = self.bytes[storage.key][start : start + size]
        if len(data) != size or min(start, size, record.offset, *record.size, *record.stride) < 0:
            raise CheckpointError(f"Storage '{storage.key}' holds fewer values than its tensors need: the file is cut.")
        return torch.as_strided(data.view(record.dtype), record.size, record.stride, record.offset)


def _read_torch(path: Path, skip: Iterable[str]) -> Any:
    with path.open("rb") as file:
        start = file.read(64)
        file.seek(0)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path.name} is a Git LFS pointer, not the weights: run `git lfs pull` first.")
        tree, read = _read_zip(file) if start.startswith(_ZIP_MAGIC) else _read_legacy(file)
        if isinstance(tree, dict):
            tree = {key: value for key, value in tree.items() if key not in skip}
        return _Builder(read).build(tree)


def read_checkpoint(path: str | Path, *, skip: Iterable[str] = SKIPPED_ENTRIES) -> Any:
    """Read a ``torch.save`` file (zip or legacy) or a ``.safetensors`` file; executes nothing of it.

    Args:
        path: The checkpoint.
        skip: Top-level entries left out of the result, so that optimizer states are never loaded.

    Returns:
        What was saved, of plain dicts, lists, tuples, numbers, strings and CPU tensors in their stored dtype; config
        nodes and namespaces become dicts, other allowed objects inert placeholders.

    Raises:
        UnsafeCheckpointError: The pickle names a global outside `STAND_INS`.
        CheckpointError: There is no such file, or it is damaged, truncated or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"There is no checkpoint file '{path}': pass the path of a .pth, .pt or .safetensors file."
        )
    try:
        return load_file(path) if path.suffix == ".safetensors" else _read_torch(path, tuple(skip))
    except CheckpointError:
        raise
    except (Exception, SafetensorError) as error:  # a foreign byte stream can fail in any way; all mean the same
        raise CheckpointError(
            f"{path.name} is damaged, cut short, or not a checkpoint ({type(error).__name__}: {error}). Download it "
            "again and compare its size or checksum; a .pth written by torch.save or a .safetensors file is needed."
        ) from error
