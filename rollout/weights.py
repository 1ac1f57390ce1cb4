"""Policy weights on the wire: flat byte buckets, one checksum a tensor, a version.

    learner: pack(state dict) -> WeightUpdate -> object store (buckets travel without a copy) -> engine: unpack -> Engine.load_weights

A tensor that is stored once under two names (a tied embedding) travels once, under its first name. Everything is checked before
anything is written: a corrupt, unknown, missing or misshapen tensor is refused by name and the engine keeps its weights.
"""

from __future__ import annotations

import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

_Made = TypeVar("_Made")
_ALIGN = 16  # bytes: a view of any dtype can start at every offset


class WeightError(ValueError):
    """A weight update that must not be used; the message names the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes at `offset` of bucket number `bucket`; `crc` is the CRC-32 of those bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a torch dtype's name, e.g. "float32"
    bucket: int
    offset: int
    nbytes: int
    crc: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightUpdate:
    """All tensors of one policy version. buckets: uint8 arrays, contiguous."""

    version: int
    entries: tuple[TensorEntry, ...]
    buckets: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        return sum(bucket.nbytes for bucket in self.buckets)


_PLACES: WeakKeyDictionary[nn.Module, _Places] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a model's modules keep what state_dict() says, and how the modules looked then. places None: it makes tensors of its own.

    No tensor is kept: a model that moved, or whose weights were laid elsewhere, would have its old ones in memory as well.
    """

    places: list[tuple[str, dict[str, Any], str]] | None
    children: list[tuple[dict[str, Any], tuple[Any, ...]]]
    tensors: list[tuple[dict[str, Any], tuple[str, ...]]]
    empty: list[dict[str, Any]]  # of modules without children, parameters or buffers: most of all there are

    @classmethod
    def of(cls, model: nn.Module) -> _Places:
        modules = list(model.modules())
        held = [kept for module in modules for kept in (module._parameters, module._buffers)]
        return cls(
            places=_places(model),
            children=[(module._modules, tuple(module._modules.values())) for module in modules if module._modules],
            tensors=[(kept, _there(kept)) for kept in held if kept],
            empty=[kept for kept in (*held, *(module._modules for module in modules)) if not kept],
        )

    @property
    def hold(self) -> bool:
        """Whether no module and no tensor has come or gone."""
        return (
            not any(map(len, self.empty))
            and all(tuple(now.values()) == then for now, then in self.children)
            and all(_there(now) == then for now, then in self.tensors)
        )


def _there(kept: dict[str, Any]) -> tuple[str, ...]:
    return tuple([name for name, tensor in kept.items() if tensor is not None])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` in a fraction of its time, which is half of a transfer's on a fast link: the modules are walked once, and again
    when one has come or gone. Tensors may be replaced."""
    found = _known(model)
    if found.places is None:
        return model.state_dict()
    return {name: held[key].detach() for name, held, key in found.places}


def _known(model: nn.Module) -> _Places:
    found = _PLACES.get(model)
    if found is None or not found.hold:
        found = _PLACES[model] = _Places.of(model)
    return found


def _places(model: nn.Module) -> list[tuple[str, dict[str, Any], str]] | None:
    owners: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    places: list[tuple[str, dict[str, Any], str]] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, key = name.rpartition(".")
        for held in (owners[path]._parameters, owners[path]._buffers) if path in owners else ():
            if held.get(key) is tensor:
                places.append((name, held, key))
                break
        else:
            return None
    return places


def untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without second names: of those in one place the first is kept."""
    first: dict[tuple, str] = {}
    lying = Counter(
        [t.data_ptr() for t in tensors.values()]
    )  # asking for the address alone is quick, and few share one
    return {
        n: t
        for n, t in tensors.items()
        if lying[t.data_ptr()] == 1 or t.numel() == 0 or first.setdefault(_place(t), n) == n
    }


def _place(tensor: Tensor) -> tuple:
    """What tied tensors have in common, and a view of a part of another, or another view of it, has not."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def pack(tensors: Mapping[str, Tensor], version: int, bucket_bytes: int = 1 << 28) -> WeightUpdate:
    """Copies `tensors` (any device, any dtype) into buckets of about `bucket_bytes`; a larger tensor gets a bucket of its own."""
    plan: list[list[tuple[str, Tensor, int]]] = [[]]
    sizes = [0]
    for name, tensor in untied(tensors).items():
        if sizes[-1] and sizes[-1] + tensor.nbytes > bucket_bytes:
            plan.append([])
            sizes.append(0)
        plan[-1].append((name, tensor, sizes[-1]))
        sizes[-1] += -(-tensor.nbytes // _ALIGN) * _ALIGN
    buckets = [np.empty(size, dtype=np.uint8) for size in sizes]

    def write(number: int, name: str, tensor: Tensor, offset: int) -> TensorEntry:
        whole = buckets[number][offset : offset + -(-tensor.nbytes // _ALIGN) * _ALIGN]
        view = whole[: tensor.nbytes]
        whole[tensor.nbytes :] = 0
        if tensor.nbytes:
            torch.from_numpy(view).view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        dtype, crc = str(tensor.dtype).removeprefix("torch."), zlib.crc32(view.data)
        return TensorEntry(
            name=name,
            shape=tuple(tensor.shape),
            dtype=dtype,
            bucket=number,
            offset=offset,
            nbytes=tensor.nbytes,
            crc=crc,
        )

    work = [(number, *member) for number, members in enumerate(plan) for member in members]
    return WeightUpdate(version=version, entries=tuple(_in_threads(write, work)), buckets=tuple(buckets))


def _in_threads(function: Callable[..., _Made], arguments: Sequence[tuple[Any, ...]]) -> list[_Made]:
    """By as many threads as torch has here: new memory, copies and checksums of gigabytes leave the interpreter free."""
    count = torch.get_num_threads()
    if count == 1:
        return [function(*each) for each in arguments]
    with ThreadPoolExecutor(count, thread_name_prefix="winnow-weights") as pool:
        return list(pool.map(lambda each: function(*each), arguments))


def unpack(update: WeightUpdate, verify: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs, views of the buckets: read them, do not write. WeightError names a tensor whose bytes changed on the way."""

    def checked(entry: TensorEntry) -> np.ndarray:
        if entry.bucket >= len(update.buckets) or entry.offset + entry.nbytes > update.buckets[entry.bucket].nbytes:
            raise WeightError(f"weights of version {update.version}: tensor {entry.name!r} lies outside what arrived")
        view = update.buckets[entry.bucket][entry.offset : entry.offset + entry.nbytes]
        if verify and (crc := zlib.crc32(view.data)) != entry.crc:
            raise WeightError(
                f"weights of version {update.version}: tensor {entry.name!r} arrived with checksum {crc:08x}, sent with "
                f"{entry.crc:08x}; it was damaged on the way and nothing of this update is used: send it again"
            )
        return view

    views = _in_threads(checked, [(entry,) for entry in update.entries])
    for entry, view in zip(update.entries, views, strict=True):
        dtype = getattr(torch, entry.dtype)
        if not entry.nbytes:
            yield entry.name, torch.empty(entry.shape, dtype=dtype)
            continue
        with warnings.catch_warnings():  # arrays from the object store are read-only, which torch warns about
            warnings.simplefilter("ignore")
            yield entry.name, torch.frombuffer(view, dtype=dtype).reshape(entry.shape)


def check_match(targets: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], version: int) -> None:
    """WeightError unless tensors of these names and shapes are all that a model with these `targets` (its state dict) needs, and nothing
    else. A tied tensor of the model may come under any of its names, and under all of them."""
    unknown = [name for name in shapes if name not in targets]
    if unknown:
        raise WeightError(
            f"weights of version {version}: the model has no tensor {unknown[0]!r} ({len(unknown)} unknown in all)"
        )
    missing = [name for name in targets if name not in shapes]
    tied = {targets[name].data_ptr() for name in missing}  # the few that may be covered by another name
    covered = {_place(targets[name]) for name in shapes if tied and targets[name].data_ptr() in tied}
    if missing := [name for name in missing if _place(targets[name]) not in covered]:
        raise WeightError(
            f"weights of version {version}: no tensor for {missing[0]!r} arrived ({len(missing)} missing in all)"
        )
    for name, shape in shapes.items():
        if shape != targets[name].shape:
            raise WeightError(
                f"weights of version {version}: tensor {name!r} has shape {tuple(shape)}, "
                f"the model wants {tuple(targets[name].shape)}"
            )


def copy_into(model: nn.Module, tensors: Mapping[str, Tensor], version: int) -> None:
    """Overwrites every weight of `model` in place. Casts dtypes. WeightError, before anything is written, unless `check_match`."""
    if not (isinstance(tensors, Staged) and tensors.fit(model)):
        tensors = Staged(model, tensors, version)
    tensors.run()


class Staged(dict[str, Tensor]):
    """Tensors by name that are all that a model needs and nothing else (WeightError otherwise, as `check_match`), and all that can be done
    about copying them before they are there."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], version: int) -> None:
        super().__init__(tensors)
        targets = state_of(model)
        check_match(targets, {name: tensor.shape for name, tensor in tensors.items()}, version)
        self._places = _where(model)
        self.run = copies([targets[name] for name in tensors], list(tensors.values())).run

    def fit(self, model: nn.Module) -> bool:
        """Whether they were staged for the weights that the model has now."""
        return self._places == _where(model)


def _where(model: nn.Module) -> dict[str, tuple]:
    """Where each tensor of `state_of` lies, and what it is; quicker, for an engine stands still while it is asked."""
    found = _known(model)
    if found.places is None:
        return {name: _place(tensor) for name, tensor in model.state_dict().items()}
    return {name: _place(held[key]) for name, held, key in found.places}


class Copying(Protocol):
    """`run` copies; `release`: whether no tensor is held from here on, as `kernels.byte_copies.Copies` has them."""

    def run(self) -> None: ...

    def release(self) -> bool: ...


def copies(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Copying:
    """What copies each source to its target, in a few launches for all, whenever it is run. They must stay where they are."""
    if targets and targets[0].is_cuda:
        from winnow.kernels.byte_copies import Copies

        return Copies(targets, sources)
    return _TorchCopies(list(targets), list(sources))


@dataclass(frozen=True, slots=True)
class _TorchCopies:
    targets: list[Tensor]
    sources: list[Tensor]

    @torch.no_grad()
    def run(self) -> None:
        if self.targets:
            torch._foreach_copy_(self.targets, self.sources)

    def release(self) -> bool:
        return not self.targets


class Kept:
    """Copies that are made again and again: a learner's tensors, and the buffer that they go to, are where they were a version ago. What was
    found out about them is kept, and no tensor with it."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Copying]] = {}

    def run(
        self,
        number: int,
        buffer: Tensor,
        offsets: Sequence[int],
        sources: Sequence[Tensor],
        targets: Callable[[], Sequence[Tensor]],
    ) -> None:
        """Of the parts of a bucket, to these bytes of the buffer; targets: the views of it, made only where they are needed."""
        key = (buffer.data_ptr(), list(offsets), [_place(t) for t in sources])
        found = self._made.get(number)
        if found is not None and found[0] == key:
            found[1].run()
            return
        made = copies(targets(), sources)
        made.run()
        if made.release():
            self._made[number] = (key, made)
        else:
            self._made.pop(number, None)
