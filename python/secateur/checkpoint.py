"""Checkpoints: model, optimizers, pruner and whatever else, whole, in one safetensors file.

Every tensor is an entry of the file. How they nest is JSON in the header's metadata, beside the
name and version of the format and the sha256 of the whole file, its own 64 digits taken as zeros.
The header is written here, so that a file is streamed with one tensor in memory at a time and gets
its checksum at the end; safetensors reads and validates it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.layers import WRAPPERS, refuse_flattened
from secateur.nn import BlockSparseLinear
from secateur.pruner import Pruner
from secateur.ranks import Ranks
from secateur.shards import is_sharded

__all__ = ["load", "save"]

_FORMAT = "secateur checkpoint"
_VERSION = 1
# What follows the size of the header in every file: the place of the checksum is fixed.
_HEAD = f'{{"__metadata__":{{"format":"{_FORMAT}","version":"{_VERSION}","sha256":"'.encode()
_NO_DIGEST = b"0" * 64
_HEADER_LIMIT = 100_000_000  # bytes; safetensors reads no longer one
_DEPTH = 64  # json reads no deeper than some depth, which load must not be the first to find out
_CHUNK = 1 << 20  # bytes
_OPENINGS = 10  # how often a file may be replaced while it is opened
_LISTED = 4  # keys of one kind that an error shows

# What every safetensors from 0.4.3 on reads.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# State dicts of modules are ordered; MultiStepLR counts its milestones.
_DICTS: dict[str, type[dict[Any, Any]]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": Counter,
}


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    pruner: Pruner | None = None,
    *,
    extra: Any = None,
) -> None:
    """Write a checkpoint from which :func:`load` resumes bit for bit.

    A crash at any moment leaves the file that was there or the new one, whole. A process that is
    killed may leave ``saving-<pid>-<random>.tmp`` behind, which can be deleted.

    The pruner's state holds that of torch's random generators: of this process, or, where the model
    is sharded, of all of them. Those of Python and numpy, and gradients, are not saved.

    Under DistributedDataParallel any one rank saves. A model of DTensors (``fully_shard``) is saved
    by all ranks of its mesh together: the first writes, one gathered tensor in memory at a time,
    and none goes on before the file is in place; what is no DTensor is saved as the first has it.

    Args:
        path: the file to write, in a directory that exists.
        model: the module. DataParallel, DistributedDataParallel and torch.compile are seen
            through: the file loads with and without them.
        optimizer: one, or several.
        pruner: the pruner of the model.
        extra: what else the run needs, such as the epoch or an LR scheduler's state dict: tensors,
            numbers, strings, None, and lists, tuples and dicts of them.

    Raises:
        TypeError, ValueError: something cannot be saved; the message names its place.
        OSError: the file cannot be written.
        RuntimeError: another rank cannot save. The file that was there is untouched in each case.
    """
    optimizers = _check_arguments(model, optimizer, pruner)
    target = os.path.realpath(os.fsdecode(path))
    # Each may be a collective: they run before anything that one rank alone could refuse.
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    states = [each.state_dict() for each in optimizers]
    pruner_state = None if pruner is None else pruner.state_dict()
    ranks = _ranks_of(model)
    entries = _Entries(sharded=ranks.group is not None)

    def plan() -> bytes:
        if ranks.rank == 0:
            _check_target(target)
        clean = _cleaner(model)
        structure = {
            "model": {clean(key): value for key, value in state.items()},
            "modules": {_clean_path(clean, path): v for path, v in _modules(state).items()},
            "optimizer": states[0] if isinstance(optimizer, Optimizer) else states,
            "trained": [_trained(each, state, clean) for each in optimizers],
            "pruner": pruner_state,
            "extra": extra,
        }
        return _header(entries.encode(structure, ""), entries)

    header = ranks.attempt("save", plan)
    ranks.agree("DTensors to save in the same file", f"{target}: {entries.gathered()}")
    tensors = entries.whole()

    def write() -> None:
        try:
            if ranks.rank == 0:
                _write(target, header, tensors)
        finally:
            for _ in tensors:  # the others wait for this rank to take part, whatever happened
                pass

    ranks.attempt("save", write)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    pruner: Pruner | None = None,
) -> Any:
    """Go on where :func:`save` was called: everything given becomes what it was, to the bit.

    Nothing is unpickled, and nothing changes before the whole file has been checked against its
    checksum and against what is given. Every process loads for itself, whatever the number of
    processes that saved; a DTensor takes its own shard.

    Args:
        path: the file.
        model, optimizer, pruner: as for :func:`save`, made as they were then. What the file holds
            beyond what is given is ignored.

    Returns:
        ``extra``; its tensors are on the CPU.

    Raises:
        TypeError: an argument is not what it should be.
        ValueError: the file is damaged, or no checkpoint, or of a newer version, or does not fit
            what is given. Nothing is changed then.
        OSError: the file cannot be read.
    """
    optimizers = _check_arguments(model, optimizer, pruner)
    model_state, optimizer_states, pruner_state, extra = _ranks_of(model).attempt(
        "load", lambda: _prepare(os.fsdecode(path), model, optimizers, pruner)
    )
    model.load_state_dict(model_state)
    for each, state in zip(optimizers, optimizer_states, strict=True):
        _load_optimizer(each, state)
    if pruner is not None:
        pruner.load_state_dict(pruner_state)
    return extra


def _prepare(
    path: str, model: nn.Module, optimizers: Sequence[Optimizer], pruner: Pruner | None
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], Any]:
    """All that is to be loaded, checked: states of model, optimizers and pruner, and extra."""
    file = _File(path)
    saved = file.structure
    ours: Mapping[str, Any] = model.state_dict(keep_vars=True)
    clean = _cleaner(model)
    named = {clean(key): value for key, value in ours.items()}
    _check_model(file, named)
    _check_patterns(file, model, named)
    states = saved["optimizer"] if isinstance(saved["optimizer"], list) else [saved["optimizer"]]
    if optimizers and len(states) != len(optimizers):
        raise ValueError(
            f"expected {file.path} to hold the state of {len(optimizers)} optimizer(s), got "
            f"{len(states)}"
        )
    for each, then in zip(optimizers, saved["trained"], strict=False):
        _check_optimizer(file, _trained(each, ours, clean), then)
    pruner_state: dict[str, Any] = {}
    if pruner is not None:
        if saved["pruner"] is None:
            raise ValueError(f"expected {file.path} to hold the state of a pruner, got none")
        pruner_state = file.read(saved["pruner"])
        pruner._check_state(pruner_state)

    model_state: OrderedDict[str, Any] = OrderedDict()
    for key, value in ours.items():
        # The model copies its tensors from the file's memory, or from shards of it.
        kept = not isinstance(value, Tensor)
        model_state[key] = file.read(saved["model"][clean(key)], value, copy=kept)
    versions = {path: saved["modules"].get(_clean_path(clean, path), {}) for path in _modules(ours)}
    model_state._metadata = versions  # type: ignore[attr-defined]  # where torch keeps it
    optimizer_states = [
        _optimizer_state(file, state, each) for each, state in zip(optimizers, states, strict=False)
    ]
    return model_state, optimizer_states, pruner_state, file.read(saved["extra"])


def _ranks_of(model: nn.Module) -> Ranks:
    """The processes that hold a model of DTensors together."""
    found: Any = next((p for p in model.parameters() if is_sharded(p)), None)
    if found is None:
        return Ranks()
    mesh = found.device_mesh
    if mesh.size() == dist.get_world_size():
        return Ranks(dist.group.WORLD)
    if mesh.ndim == 1:
        return Ranks(mesh.get_group())
    raise ValueError(
        f"expected a model on a mesh of one dimension or of all {dist.get_world_size()} processes, "
        f"got {mesh}"
    )


def _check_arguments(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None, pruner: Pruner | None
) -> list[Optimizer]:
    """The optimizers, after TypeErrors for what is neither that nor a model nor a pruner."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    refuse_flattened(model)
    if pruner is not None and not isinstance(pruner, Pruner):
        raise TypeError(f"expected pruner to be a Pruner or None, got {type(pruner).__name__}")
    if optimizer is None:
        return []
    optimizers: list[Any] = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(
                "expected optimizer to be a torch.optim.Optimizer, a list of them or None, got "
                f"{type(each).__name__}"
            )
    return optimizers


def _prefixes(model: nn.Module, raw: str = "", clean: str = "") -> Iterator[tuple[str, str]]:
    """(prefix of its keys in the state dict, the same without wrappers) of every module."""
    yield raw, clean
    wraps = isinstance(model, WRAPPERS)
    for child, module in model._modules.items():
        if module is not None:
            through = child == "_orig_mod" or (wraps and child == "module")
            yield from _prefixes(module, f"{raw}{child}.", clean if through else f"{clean}{child}.")


def _cleaner(model: nn.Module) -> Callable[[str], str]:
    """A key of the model's state dict -> the key that it has in the model without wrappers."""
    prefixes = dict(_prefixes(model))

    def clean(key: str) -> str:
        end = key.rfind(".") + 1
        while key[:end] not in prefixes:
            end = key.rfind(".", 0, end - 1) + 1
        return prefixes[key[:end]] + key[end:]

    return clean


def _modules(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a state dict says of each module by its path: the version of its class."""
    return getattr(state, "_metadata", {})


def _clean_path(clean: Callable[[str], str], path: str) -> str:
    return clean(f"{path}.")[:-1] if path else ""


def _trained(
    optimizer: Optimizer, state: Mapping[str, Any], clean: Callable[[str], str]
) -> dict[str, Any]:
    """What an optimizer trains: per group and parameter its name, if it is the model's, and shape.

    States of optimizers know parameters by their position alone.
    """
    names: dict[int, str] = {}
    for key, value in state.items():
        names.setdefault(id(value), clean(key))
    groups = [
        [[names.get(id(p)), list(p.shape)] for p in group["params"]]
        for group in optimizer.param_groups
    ]
    return {"type": type(optimizer).__name__, "groups": groups}


# Saving.


class _Entries:
    """The tensors of a checkpoint by name, each stored once.

    Args:
        sharded: whether there can be DTensors.
    """

    def __init__(self, *, sharded: bool) -> None:
        self._sharded = sharded
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[object, str] = {}

    def encode(self, value: object, place: str, depth: int = 0) -> Any:
        """JSON of a nested value; its tensors become entries.

        Args:
            place: where the value stands, for errors and names of entries.
            depth: how many levels stand above it.

        Raises:
            TypeError: the value is of a type that cannot be saved.
            ValueError: it is nested too deep.
        """
        if depth > _DEPTH:
            raise ValueError(f"expected at most {_DEPTH} levels of nesting, got more at {place}")
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if isinstance(value, float) and kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, Tensor):
            return {"tensor": self._add(value, place)}
        if isinstance(value, (list, tuple)) and kind in (list, tuple):
            items = [self.encode(v, f"{place}[{i}]", depth + 1) for i, v in enumerate(value)]
            return items if kind is list else {"tuple": items}
        if isinstance(value, dict) and kind in _DICTS.values():
            pairs = []
            for key, item in value.items():
                if key is not None and type(key) not in (bool, int, float, str):
                    raise TypeError(
                        f"expected keys that are strings, numbers or None at {place}, got "
                        f"{type(key).__name__}"
                    )
                under = _under(place, key)
                pairs.append([self.encode(key, under), self.encode(item, under, depth + 1)])
            return {kind.__name__: pairs}
        raise TypeError(
            "expected tensors, numbers, strings, None and lists, tuples and dicts of them at "
            f"{place}, got {kind.__module__}.{kind.__qualname__}"
        )

    def _add(self, tensor: Tensor, place: str) -> str:
        sharded = is_sharded(tensor)
        got = None
        if sharded and not self._sharded:
            got = "a DTensor, while no parameter of the model is one"
        elif not sharded and type(tensor) not in (Tensor, nn.Parameter):
            got = f"a {type(tensor).__name__}"
        elif tensor.layout != torch.strided or tensor.is_nested:
            got = f"one of layout {'nested' if tensor.is_nested else tensor.layout}"
        elif tensor.is_meta:
            got = "one on the meta device, without values"
        elif tensor.dtype not in _CODES:
            got = f"one of {tensor.dtype}"
        if got is not None:
            raise TypeError(
                f"expected a dense tensor of {', '.join(map(str, _CODES))} at {place}, got {got}"
            )
        # Ranks must agree on what is the same, and they share objects, not memory.
        identity: object = id(tensor)
        if not sharded and tensor.numel():
            memory = tensor.untyped_storage().data_ptr()
            view = tensor.storage_offset(), tensor.shape, tensor.stride()
            identity = tensor.device, memory, *view, tensor.dtype, tensor.is_neg()
        if identity not in self._names:
            name = place
            while name in self._tensors:  # places are for reading: x["a.b"] and x["a"]["b"]
                name += "'"
            self._tensors[name] = tensor
            self._names[identity] = name
        return self._names[identity]

    def listed(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) as they follow in the file: readers need each aligned to its items."""
        return sorted(self._tensors.items(), key=lambda entry: -entry[1].element_size())

    def gathered(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, shape, dtype) of the DTensors, in the order in which the ranks gather them."""
        return [
            (name, tuple(tensor.shape), _CODES[tensor.dtype])
            for name, tensor in self.listed()
            if is_sharded(tensor)
        ]

    def whole(self) -> Iterator[Tensor]:
        """The tensors as they follow in the file; each DTensor is gathered when its turn comes."""
        for _, tensor in self.listed():
            whole: Any = tensor.detach()
            yield whole.full_tensor() if is_sharded(whole) else whole


def _under(place: str, key: object) -> str:
    if not place:
        return str(key)
    return f"{place}.{key}" if isinstance(key, str) and key.isprintable() else f"{place}[{key!r}]"


def _header(structure: Any, entries: _Entries) -> bytes:
    """The file up to the first tensor, with no checksum yet."""
    text = json.dumps(structure, allow_nan=False, separators=(",", ":"))
    parts = [f'{_NO_DIGEST.decode()}","structure":{json.dumps(text)}}}']
    start = 0
    for name, tensor in entries.listed():
        end = start + math.prod(tensor.shape) * tensor.element_size()
        entry = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        parts.append(f"{json.dumps(name)}:{json.dumps(entry)}")
        start = end
    header = _HEAD + (",".join(parts) + "}").encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _HEADER_LIMIT:
        raise ValueError(
            f"expected at most {_HEADER_LIMIT:,} bytes of what is no tensor, got {len(header):,}: "
            "keep long lists as tensors"
        )
    return len(header).to_bytes(8, "little") + header


def _check_target(path: str) -> None:
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(
            errno.ENOENT, "expected a directory that exists to save in, got", os.path.dirname(path)
        )
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "expected a file to save to, got a directory", path)


def _write(path: str, header: bytes, tensors: Iterable[Tensor]) -> None:
    """Put a file in place, whole or not at all."""
    name = f"saving-{os.getpid()}-{secrets.token_hex(8)}.tmp"  # one that fits wherever path's does
    temporary = os.path.join(os.path.dirname(path), name)
    try:
        try:
            with open(temporary, "xb") as file:
                digest = hashlib.sha256(header)
                file.write(header)
                for tensor in tensors:
                    values = tensor.cpu().contiguous().resolve_neg()
                    if values.numel():
                        # Without a copy, and without numpy.
                        memory = (ctypes.c_char * values.nbytes).from_address(values.data_ptr())
                        digest.update(memory)
                        file.write(memory)
                file.seek(8 + len(_HEAD))
                file.write(digest.hexdigest().encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_directory(os.path.dirname(path))
    except OSError as error:
        raise OSError(error.errno, f"cannot save: {error.strerror}", path) from error


def _sync_directory(path: str) -> None:
    """Make a rename in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have none
            raise
    finally:
        os.close(descriptor)


# Loading.


@dataclass(frozen=True)
class _Stored:
    """A tensor in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class _File:
    """A checkpoint that is whole.

    Attributes:
        path: of the file.
        structure: what was saved, with :class:`_Stored` for tensors.
    """

    structure: dict[str, Any]

    def __init__(self, path: str) -> None:
        self.path = path
        if not any(self._open() for _ in range(_OPENINGS)):
            raise OSError(errno.EAGAIN, "cannot load: it is replaced again and again", path)

    def _open(self) -> bool:
        """Open and check; False where another file took the place of this one meanwhile."""
        with open(self.path, "rb") as file:
            try:
                tensors: Any = safe_open(self.path, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"expected a whole checkpoint, got {self.path}, which is truncated, damaged or "
                    f"no safetensors file: {error}"
                ) from error
            # What is checked below must be what is read later.
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                return False
            metadata = tensors.metadata() or {}
            _check_format(self.path, metadata)
            digest = hashlib.sha256(file.read(8 + len(_HEAD)))
            written = file.read(len(_NO_DIGEST))
            digest.update(_NO_DIGEST)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if written != digest.hexdigest().encode():
            raise ValueError(
                f"expected the contents of {self.path} to have the checksum that they were saved "
                "with, got another one: the file is damaged"
            )
        self._tensors = tensors
        try:
            self.structure = self._decode(json.loads(metadata["structure"]))
        except (KeyError, RecursionError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"expected a structure in {self.path}, got none: {error}") from error
        return True

    def _decode(self, value: Any) -> Any:
        """The inverse of ``_Entries.encode``."""
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag == "tensor":
            entry = self._tensors.get_slice(content)
            return _Stored(content, tuple(entry.get_shape()), _DTYPES[entry.get_dtype()])
        if tag == "float":
            return float(content)
        items = self._decode(content)
        if tag == "tuple":
            return tuple(items)
        result = _DICTS[tag]()
        for key, item in items:
            result[key] = item
        return result

    def read(self, value: Any, like: object = None, *, copy: bool = True) -> Any:
        """A value of the structure with its tensors.

        Args:
            value: of the structure.
            like: tensors of its shape are laid out as it is: strided, or sharded if a DTensor.
            copy: whether tensors get memory of their own or stay in that of the file.
        """
        return self._fill(value, like, copy, {})

    def _fill(self, value: Any, like: object, copy: bool, shared: dict[str, Tensor]) -> Any:
        if isinstance(value, _Stored):
            if value.name not in shared:
                shared[value.name] = self._tensor(value, like, copy)
            return shared[value.name]
        if isinstance(value, dict):
            filled = type(value)()
            for key, item in value.items():
                filled[key] = self._fill(item, like, copy, shared)
            return filled
        if isinstance(value, (list, tuple)):
            return type(value)(self._fill(item, like, copy, shared) for item in value)
        return value

    def _tensor(self, stored: _Stored, like: Any, copy: bool) -> Tensor:
        tensor: Tensor = self._tensors.get_tensor(stored.name)
        alike = isinstance(like, Tensor) and tuple(like.shape) == stored.shape
        if alike and is_sharded(like):
            from torch.distributed.tensor import distribute_tensor  # see shards.py

            mesh, placements = like.device_mesh, like.placements
            tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
        elif alike and copy:
            # Fused optimizers want moments that are strided as the parameter is.
            return torch.empty_like(like, dtype=tensor.dtype, device="cpu").copy_(tensor)
        return tensor.clone() if copy else tensor


def _check_format(path: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"expected a checkpoint of secateur.save, got {path}, a safetensors file of format "
            f"{metadata.get('format')!r}"
        )
    version = metadata.get("version", "")
    if version.isdecimal() and int(version) > _VERSION:
        raise ValueError(
            f"expected a checkpoint of version {_VERSION}, got {path} of version {version}: it "
            "takes a newer secateur to load it"
        )
    if version != str(_VERSION):
        raise ValueError(
            f"expected a checkpoint of version {_VERSION}, got {path} of version {version!r}"
        )


def _check_model(file: _File, ours: Mapping[str, Any]) -> None:
    """Raise unless the file has exactly the model's keys, of the same shapes and dtypes."""
    saved = file.structure["model"]
    misfits = [
        f"{len(keys)} {what} ({', '.join(keys[:_LISTED])}{', ...' if len(keys) > _LISTED else ''})"
        for what, keys in (
            ("missing", [key for key in ours if key not in saved]),
            ("unexpected", [key for key in saved if key not in ours]),
        )
        if keys
    ]
    if misfits:
        raise ValueError(
            f"expected {file.path} to hold exactly the keys of the model, got "
            f"{' and '.join(misfits)}"
        )
    for key, value in ours.items():
        stored = saved[key]
        is_tensor = isinstance(value, Tensor)
        if is_tensor and value.is_meta:
            raise ValueError(f"expected a model with values, got {key} on the meta device")
        if is_tensor != isinstance(stored, _Stored):
            raise ValueError(
                f"expected {key} in {file.path} to be {'a' if is_tensor else 'no'} tensor, got "
                f"{'another value' if is_tensor else 'one'}"
            )
        if is_tensor and (stored.shape, stored.dtype) != (tuple(value.shape), value.dtype):
            raise ValueError(
                f"expected {key} in {file.path} to be {value.dtype} {tuple(value.shape)} as in the "
                f"model, got {stored.dtype} {stored.shape}"
            )


def _check_patterns(file: _File, model: nn.Module, ours: Mapping[str, Any]) -> None:
    """Raise unless block-sparse layers have the pattern they were saved with."""
    indices = {
        id(index)
        for module in model.modules()
        if isinstance(module, BlockSparseLinear)
        for index in (module.row_index, module.col_index)
    }
    for key, value in ours.items():
        if id(value) in indices:
            saved = file.read(file.structure["model"][key], copy=False)
            if not torch.equal(saved, value.cpu()):
                raise ValueError(
                    f"expected {key} in {file.path} to be the pattern of this layer, got another"
                )


def _check_optimizer(file: _File, ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise unless what an optimizer trains is what it trained when it was saved."""
    if saved["type"] != ours["type"]:
        raise ValueError(
            f"expected {file.path} to hold the state of a {ours['type']}, got {saved['type']}"
        )
    sizes, saved_sizes = ([len(group) for group in x["groups"]] for x in (ours, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"expected {file.path} to hold the state of a {ours['type']} with groups of {sizes} "
            f"parameters, got {saved_sizes}"
        )
    for i, (group, saved_group) in enumerate(zip(ours["groups"], saved["groups"], strict=True)):
        for j, (now, then) in enumerate(zip(group, saved_group, strict=True)):
            renamed = None not in (now[0], then[0]) and now[0] != then[0]
            if renamed or now[1] != then[1]:
                raise ValueError(
                    f"expected {file.path} to hold the state of {_described(now)} as parameter {j} "
                    f"of group {i} of {ours['type']}, got {_described(then)}"
                )


def _described(parameter: Sequence[Any]) -> str:
    name, shape = parameter
    return f"{name or 'a parameter'} of shape {tuple(shape)}"


def _optimizer_state(file: _File, state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A saved state dict, its tensors laid out like what they replace."""
    places = _by_key(state, optimizer)
    groups = []
    for saved, ours in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group = file.read(saved)
        for key, value in group.items():
            if isinstance(value, Tensor) and isinstance(ours.get(key), Tensor):
                group[key] = value.to(ours[key].device)
        groups.append(group)
    kept = {}
    for key, value in state["state"].items():
        parameter = places.get(key)
        # A step count has the shape of a scalar parameter.
        scalar = parameter is None or parameter.ndim == 0
        kept[key] = file.read(value, None if scalar else parameter)
    others = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    return {**file.read(others), "state": kept, "param_groups": groups}


def _by_key(state: Mapping[str, Any], optimizer: Optimizer) -> dict[Any, Tensor]:
    """The parameters by the keys that stand for them in a state dict."""
    keys = [key for group in state["param_groups"] for key in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return dict(zip(keys, parameters, strict=True))


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    for key, parameter in _by_key(state, optimizer).items():
        if key in state["state"] and parameter in optimizer.state:
            loaded = optimizer.state[parameter]
            optimizer.state[parameter] = _as_saved(loaded, state["state"][key])


def _as_saved(loaded: Any, saved: Any) -> Any:
    """What ``Optimizer.load_state_dict`` made of a state, in the dtypes it was saved in.

    torch casts all that is kept for a floating-point parameter, but its step, to the parameter's
    dtype, and takes strings apart.
    """
    if isinstance(saved, str):
        return saved
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        exact = {key: _as_saved(loaded[key], saved[key]) for key in saved if key in loaded}
        return {**loaded, **exact}
    if isinstance(saved, (list, tuple)) and isinstance(loaded, (list, tuple)):
        return type(saved)(map(_as_saved, loaded, saved))
    return loaded
