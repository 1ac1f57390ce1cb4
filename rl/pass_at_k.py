"""pass@k: the chance that at least one of k samples of a task is right, unbiased from n >= k samples of it.

pass@k = 1 - C(n - c, k) / C(n, k)    with c of n samples right          Chen et al., 2021 (arXiv 2107.03374), section 2.1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb

Interval = tuple[float, float, float]  # mean, low, high


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The estimate for one task. Raises ValueError for k outside [1, num_samples]: fewer samples say nothing about k."""
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(
            f"pass@{k} of {num_right} right among {num_samples} samples: needs 1 <= k <= samples, 0 <= right <= samples"
        )
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def by_k(tasks: Sequence[tuple[int, int]], interval: Callable[[Sequence[float]], Interval]) -> dict[str, Interval]:
    """pass@k over (samples, right) of each task, for k = 1, 2, 4, ... up to the fewest samples that a task has, and that number itself.

    Keys are k as text (they go into JSON). `interval`: mean and interval of independent values; the unit is the task. Tasks without a
    scored sample are left out.
    """
    counted = [(n, c) for n, c in tasks if n]
    if not counted:
        return {}
    most = min(n for n, _ in counted)
    ks = sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})
    return {str(k): interval([pass_at_k(n, c, k) for n, c in counted]) for k in ks}
