"""New weights as the pool sees them: what each worker gets now, and what one that comes late gets later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from winnow.rollout.transport import Member


class Offer(Protocol):
    """Weights of one version that every worker must have before it works."""

    @property
    def version(self) -> int: ...

    def begin(self, members: Sequence[Member]) -> Mapping[int, Any]:
        """{worker: the argument of its `load_weights`} for the workers that are up. ConfigError-like errors for a placement that cannot work."""
        ...

    def late(self) -> Any:
        """A reference to one more argument of `load_weights`, in a list: for a worker that was not there. To None: the learner's weights
        have moved on, and the next version comes to every worker."""
        ...

    def lost(self, number: int, why: str) -> None:
        """A worker that took part is gone."""
        ...

    def finished(self) -> bool:
        """Whether the sending end is through. Raises what ended it."""
        ...


@dataclass(frozen=True, slots=True)
class StoreOffer:
    """An update in Ray's object store: everybody reads it there, whenever they come."""

    reference: Any
    version: int

    def begin(self, members: Sequence[Member]) -> Mapping[int, Any]:
        return {member.number: self.reference for member in members}

    def late(self) -> Any:
        return None

    def lost(self, number: int, why: str) -> None:
        pass

    def finished(self) -> bool:
        return True


def no_room(version: int, error: Exception, nbytes: int = 0) -> RuntimeError:
    """What to raise for an update that Ray could not store. Workers keep the weights they have."""
    size = f" ({nbytes / 1e9:.2f} GB)" if nbytes else ""
    return RuntimeError(
        f"weights of version {version}{size} do not fit into Ray's object store, nor on the disk it spills to: give it more (ray start "
        f"--object-store-memory), free the disk, or set cluster.transport to ipc or nccl ({type(error).__name__})"
    )
