"""Notices that a learner's process has died while the driver waits for something else: without it, groups would be waited for in vain."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

PING_EVERY_S = 5.0
logger = logging.getLogger(__name__)


def watch_learner(actors: Sequence[Any], on_death: Callable[[str], object]) -> threading.Event:
    """Pings every actor until the returned event is set; calls `on_death(why)` once where one is gone. A busy actor answers later: only
    its death ends the wait early, and that is what is looked for."""
    stop = threading.Event()

    def watch() -> None:
        import ray

        waiting = {actor.address.remote(): rank for rank, actor in enumerate(actors)}
        while not stop.wait(0.0 if waiting else PING_EVERY_S):
            try:
                done, _ = ray.wait(list(waiting), timeout=PING_EVERY_S) if waiting else ([], [])
                for reference in done:
                    rank = waiting.pop(reference)
                    ray.get(reference, timeout=PING_EVERY_S)
                    if stop.wait(PING_EVERY_S / len(actors)):
                        return
                    waiting[actors[rank].address.remote()] = rank
            except ray.exceptions.RayActorError as error:
                if not stop.is_set():
                    on_death(f"the learner's process died: {error}")
                return
            except Exception as error:
                if (
                    not stop.is_set() and ray.is_initialized()
                ):  # otherwise Ray is gone, and with it what there was to watch
                    logger.warning(
                        "the learner is no longer watched, its death would be noticed at its next call only: %s", error
                    )
                return

    threading.Thread(target=watch, name="winnow-learner-watch", daemon=True).start()
    return stop
