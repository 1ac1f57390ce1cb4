"""Dynamic sampling inside a domain (DAPO, arXiv 2503.14476): prompts whose samples all got the same reward teach nothing, so their
domain gets other prompts in the same step, until its quota of informative ones is full or the rounds are used up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from winnow.rl.config import Config
from winnow.rl.sampler import TaskSampler
from winnow.rollout.schema import Group, Request, Score


def is_informative(group: Group) -> bool:
    """Whether at least two samples have a score and not all the same one."""
    values = [score.value for score in group.scores if isinstance(score, Score)]
    return len(values) > 1 and max(values) - min(values) > 1e-9


def refill(
    config: Config,
    sampler: TaskSampler,
    step: int,
    groups: Sequence[Group],
    play: Callable[[Sequence[Request]], Sequence[Group]],
) -> tuple[list[Group], dict[str, float]]:
    """Scored groups of a step with those of further prompts behind them, and dynamic/extra_prompts, dynamic/missing.

    play: samples and grades requests. Uninformative groups stay: they are counted where advantages are made. At most
    algorithm.dynamic_rounds rounds; the domain's other tasks may run out before.
    """
    everything = list(groups)
    for number in range(config.algorithm.dynamic_rounds):
        short = _missing(config, everything)
        seen = {group.request.task.id for group in everything}
        requests = [r for name, count in short.items() for r in sampler.extra(step, number, name, count, seen)]
        if not requests:
            break
        everything += play(requests)
    extra = float(len(everything) - len(groups))
    return everything, {
        "dynamic/extra_prompts": extra,
        "dynamic/missing": float(sum(_missing(config, everything).values())),
    }


def _missing(config: Config, groups: Sequence[Group]) -> dict[str, int]:
    """How many informative groups each domain lacks of its quota; domains that lack none are left out."""
    have = Counter(group.request.task.domain for group in groups if is_informative(group))
    short = {domain.name: domain.quota - have[domain.name] for domain in config.domains}
    return {name: count for name, count in short.items() if count > 0}
