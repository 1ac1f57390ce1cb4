"""The learner's processes as the driver calls them: one actor a rank, bounded waits, a dead rank named.

RemoteLearner.step ─> every rank's LearnerActor.step ─> the first rank's answer
RemoteLearner.weights ─> a reference in the object store, or a StreamOffer (weight_offer.py) that the pool starts
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.rl.config import Config
from winnow.rl.run import code_version
from winnow.rl.transports import transport_of
from winnow.rollout.offers import no_room

DEATH_GRACE_S = 10.0  # after one rank's failure, for the death of another to show


@dataclass(frozen=True)
class SendingEnd:
    """A rank as a sender of weights: its channel's address (host:port), its machine and its device."""

    address: str
    host: str
    device: str


class LearnerDied(RuntimeError):
    """A process of the learner is gone, and with it every step since the last checkpoint."""


class RemoteLearner:
    """The learner's actors, one a rank, with bounded waits. Every rank gets every call; the first one's result is the learner's.

    Weights do not pass through the driver: `weights` returns a reference to them, or an offer. A rank that dies is named in the error.
    """

    def __init__(self, actors: Sequence[Any], config: Config) -> None:
        self.actors, self.timeout_s = list(actors), config.cluster.step_timeout_s
        self.cluster, self.transport = config.cluster, transport_of(config)
        self._order = threading.Lock()  # every rank gets the calls of all threads in one order: they work together
        self.group: tuple[tuple[str, ...], str] | None = None  # of a broadcast: incarnations of its workers, its name
        self._ends: list[SendingEnd] | None = None

    def load(self, path: str | Path | None = None, config: Config | None = None) -> dict[str, Any]:
        return self._get("load", None if path is None else str(path), config)

    def resume(self, folder: str | Path, config: Config | None = None) -> dict[str, Any]:
        return self._get("resume", str(Path(folder).resolve()), config)

    def step(self, batch: Any) -> Any:
        return self._get("step", batch)

    def sft_step(self, examples: Sequence[Any], step: int = 0) -> Any:
        return self._get("sft_step", examples, step)

    def distill_step(self, trajectories: Sequence[Any], teachers: Mapping[str, str], step: int = 0) -> Any:
        return self._get("distill_step", trajectories, teachers, step)

    def logprobs(self, trajectories: Sequence[Any], replay: bool = False) -> Any:
        return self._get("logprobs", trajectories, replay)

    def weights(self, version: int) -> Any:
        """What `Pool.push_weights` takes: a reference to an update in the object store, or an offer whose transfer the pool starts."""
        if self.transport == "store":
            return self._stored(version)
        from winnow.rl.weight_offer import StreamOffer

        if self._ends is None:
            self._ends = [SendingEnd(*end) for end in self._all("open_sender")]
        return StreamOffer(self, self._ends, version)

    def _stored(self, version: int) -> Any:
        """A reference to the first rank's update. The driver owns it, so that it outlives the learner, and does not read it: whether it was
        stored is said by a second result."""
        import ray

        with self._order:
            pairs = [actor.hand_over.options(num_returns=2).remote(version) for actor in self.actors]
        try:
            self._wait("weights", [done for _, done in pairs])
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            raise no_room(version, error) from None
        return pairs[0][0]

    def save(self, folder: str | Path, state: bool = True) -> None:
        self._get("save", str(Path(folder).resolve()), state)

    @property
    def alive(self) -> bool:
        import ray

        try:
            ray.get([actor.address.remote() for actor in self.actors], timeout=DEATH_GRACE_S)
        except ray.exceptions.RayActorError:
            return False
        except ray.exceptions.GetTimeoutError:
            return True  # busy
        return True

    def join(self) -> None:
        """Brings the ranks together in one process group, at an address of the first one's machine. Ranks that share a GPU talk over gloo:
        NCCL refuses them."""
        import ray

        if len(self.actors) > 1:
            address = ray.get(self.actors[0].address.remote(), timeout=self.timeout_s)
            devices = [device for device in self._all("gpu") if device]
            self._get("join", address, len(set(devices)) < len(devices))

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Every rank's result."""
        return self.results(method, self.submit(method, *arguments))

    def submit(self, method: str, *arguments: Any) -> list[Any]:
        """References to every rank's result. Waits for nothing."""
        import ray

        if len(self.actors) > 1:
            arguments = tuple(ray.put(argument) for argument in arguments)  # once, not once a rank
        with self._order:
            return [getattr(actor, method).remote(*arguments) for actor in self.actors]

    def results(self, method: str, references: Sequence[Any]) -> list[Any]:
        """Every rank's, once all are there. Raises as soon as one has failed, whatever the others wait for: LearnerDied, or what it raised."""
        import ray

        self._wait(method, references)
        return ray.get(list(references), timeout=self.timeout_s)

    def _get(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(self._wait(method, self.submit(method, *arguments)), timeout=self.timeout_s)

    def _wait(self, method: str, references: Sequence[Any]) -> Any:
        """The first of the ranks' references, once every rank is done. Raises what a rank raised; TimeoutError after `timeout_s`."""
        import ray

        waiting, deadline = list(references), time.monotonic() + self.timeout_s
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()), fetch_local=False)
            if not done:
                late = f" on rank {references.index(waiting[0])}" if len(references) > 1 else ""
                raise TimeoutError(
                    f"learner.{method} has not returned for {self.timeout_s:.0f} s{late}: raise cluster.step_timeout_s, or give the "
                    "learner less work (learner.micro_tokens, domains.*.quota)"
                )
            try:
                ray.get(done[0])
            except ray.exceptions.RayError as error:
                raise self._explain(method, references, error) from None
        return references[0]

    def _explain(self, method: str, references: Sequence[Any], error: Exception) -> Exception:
        """What to raise for a failed call. Where a rank has died the others fail too, and often first: the dead one is looked for."""
        import ray

        if len(references) > 1:
            ray.wait(list(references), num_returns=len(references), timeout=DEATH_GRACE_S, fetch_local=False)
        for rank, reference in enumerate(references):
            name = f"rank {rank} of {len(references)}" if len(references) > 1 else "process"
            try:
                if ray.wait([reference], timeout=0, fetch_local=False)[0]:
                    ray.get(reference)
            except ray.exceptions.RayActorError as dead:
                return LearnerDied(
                    f"the learner's {name} died during {method}: {dead}; resume=true goes on from the last checkpoint"
                )
            except ray.exceptions.RayError:
                continue
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, Exception) else error


def start_learner(config: Config, places: Sequence[Any]) -> list[Any]:
    """One actor a rank, each in its place. Does not wait for them."""
    import ray

    threads, gpus = config.learner.threads, config.cluster.learner_gpus
    actor_class: Any = ray.remote(make_actor_class())
    return [
        actor_class.options(
            num_cpus=threads,
            num_gpus=gpus,
            scheduling_strategy=place,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},  # Ray sets it to 1 otherwise
        ).remote(config, code_version(), rank)
        for rank, place in enumerate(places)
    ]


def make_actor_class() -> type:
    """The learner's class for an actor: it refuses to run another version of the code than the driver's."""
    import torch

    from winnow.rl.learner import Learner
    from winnow.rl.ranks import free_address, join_ranks, whole
    from winnow.rollout.transfer import Sender
    from winnow.rollout.transport import Layout, Order, own_device

    class LearnerActor(Learner):
        """A rank. `offered` is the version that its weights were last sent as; an update, a load makes it None (see `Learner`)."""

        def __init__(self, config: Config, driver_version: str, rank: int = 0) -> None:
            if code_version() != driver_version:
                raise RuntimeError(
                    f"the learner runs winnow {code_version()}, the driver {driver_version}: install the same version on every node, or "
                    "submit with the built wheel"
                )
            super().__init__(config)
            self._rank = rank
            self._sender: Sender | None = None

        def address(self) -> str:
            import ray

            return free_address(ray.util.get_node_ip_address())

        def pid(self) -> int:
            return os.getpid()

        def hand_over(self, version: int) -> tuple[Any, None]:
            """This rank's update, and nothing: two results, see `RemoteLearner`."""
            update = self.weights(version)
            self.offered = version
            return update, None

        def join(self, address: str, shared_gpu: bool) -> None:
            learner, timeout_s = self.config.learner, self.config.cluster.step_timeout_s
            self.ranks = join_ranks(self._rank, learner.ranks, address, timeout_s, shared_gpu)

        def gpu(self) -> str:
            """The uuid of this rank's GPU; empty without one."""
            return own_device("cuda") if self.config.cluster.learner_gpus > 0 and torch.cuda.is_available() else ""

        def open_sender(self) -> tuple[str, str, str]:
            """(address of its channel, host, device) of this rank as a sending end of weights."""
            import ray

            if self._sender is None:
                self._sender = Sender(ray.util.get_node_ip_address(), torch.device(self.device))
            return self._sender.address, os.uname().nodename, own_device(self.device)

        def send(self, version: int, orders: Sequence[Order | None], bucket_bytes: int) -> dict[int, str]:
            """This rank's part of a transfer: {worker: "ok" or what went wrong} of those it sends to. Every rank takes part in the gathers."""
            self.offered = version
            named, order = self.named_weights(), orders[self._rank]
            wholes = (whole(tensor) for tensor in named.values())
            if order is None:
                for _ in wholes:
                    pass
                return {}
            assert self._sender is not None
            return self._sender.send(order, Layout.of(named, version, bucket_bytes), wholes)

        def late(self, version: int) -> list[Any] | None:
            """A reference to the weights of that version in the object store, in a list; None where they are no longer these."""
            import ray

            if self.offered != version:
                return None
            update = self.weights(version)
            if self._rank:
                return None
            try:
                return [ray.put(update)]
            except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
                raise no_room(version, error, update.nbytes) from None

    return LearnerActor
