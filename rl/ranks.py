"""One learner over several processes: who they are, how the model is split over them, and what they tell each other.

    every rank: its micro-batches -> forward and backward (layers gathered as they are needed, gradients summed and split: FSDP2)
             -> indexer gradients summed -> faults, counts and log-probabilities gathered -> the same decision on every rank -> update

Gradients are summed, never averaged: a loss is divided by counts over the whole batch already. The indexers, a few percent of a model,
stay whole on every rank: their KL is a side output of a layer, which the hooks around a sharded layer would not see. One rank alone has no
process group and does none of this.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from winnow.rollout.broadcast import no_multicast

Value = TypeVar("Value")


class Sized(Protocol):
    """What is dealt out: a micro-batch, by its number of inputs."""

    @property
    def tokens(self) -> Any: ...


@dataclass(frozen=True)
class Ranks:
    """This process's place among the learner's. `Ranks()` is one alone."""

    rank: int = 0
    world: int = 1

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value)
        return found

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums the gradients of whole (not sharded) parameters over the ranks, in place; one without a gradient counts as zeros."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def shard(self, model: Any, whole: Iterable[nn.Parameter]) -> Any:
        """Splits the model's layers, and what is around them, over the ranks, in place; `whole` stays on every rank."""
        if self.world == 1:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        from winnow.rl.scoring import score_rows

        mesh = init_device_mesh(next(model.parameters()).device.type, (self.world,))
        kept, precision = set(whole), MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for module in (*model.get_decoder().layers, model):
            # Resharded after the forward, the root too: parameters left gathered after an evaluation would hide the next update.
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept, mp_policy=precision)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        sharded: Any = model  # what the assertion narrows it to has none of a module's own methods
        assert isinstance(model, FSDPModule)
        sharded.score_rows = partial(score_rows, sharded)
        register_fsdp_forward_method(sharded, "score_rows")
        return sharded

    def deal(self, micro_batches: Sequence[Sized]) -> list[tuple[int, bool]]:
        """This rank's micro-batches: (index, counts). Longest first, each to the rank with the least; a rank with fewer than the others
        goes through one again that does not count, because every rank must take part in every forward and backward pass."""
        shares: list[list[int]] = [[] for _ in range(self.world)]
        loads = [0] * self.world
        order = sorted(range(len(micro_batches)), key=lambda i: (-len(micro_batches[i].tokens), i))
        for index in order:
            least = min(range(self.world), key=lambda r: (loads[r], r))
            shares[least].append(index)
            loads[least] += len(micro_batches[index].tokens)
        most = max(len(share) for share in shares)
        mine = [(index, True) for index in sorted(shares[self.rank])]
        return mine + [(index, False) for index in order[-1:]] * (most - len(mine))


def join_ranks(rank: int, world: int, address: str, timeout_s: float, shared_gpu: bool = False) -> Ranks:
    """Joins the process group at `address` (host:port, where rank 0 listens). Raises within `timeout_s` when a rank does not come.

    shared_gpu: ranks share a GPU, which NCCL refuses; tensors on it go through gloo then, slowly.
    """
    if world > 1 and not torch.distributed.is_initialized():
        no_multicast()
        if torch.cuda.is_available():
            torch.cuda.set_device(0)  # the only one this process was given
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and not shared_gpu else "gloo",
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    return Ranks(rank, world)


def free_address(host: str = "127.0.0.1") -> str:
    """host:port with a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split over ranks. Every rank must ask."""
    from torch.distributed.tensor import DTensor

    detached: Any = tensor.detach()
    return detached.full_tensor() if isinstance(tensor, DTensor) else detached


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be split."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as `like` is; as it stands where `like` is whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
