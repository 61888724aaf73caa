"""How many workers either pool should have on one machine."""

from collections.abc import Sequence
from typing import NamedTuple

from afd_server.costmodel.pipeline import StageTimes


class PoolSizes(NamedTuple):
    """The workers of either pool."""

    num_attention: int
    num_ffn: int


def choose_pools(
    times: StageTimes,
    num_workers: int,
    num_attention: int | None,
    num_ffn: int | None,
    ffn_sizes: Sequence[int],
) -> PoolSizes:
    """Share workers out so that the busier pool is as little busy as can be: max(T_a/A, T_f/F).

    Args:
        times: of one worker's core in either half.
        num_workers: of both pools; exceeded only where one of each does not fit.
        num_attention: if given. The FFN pool is then no larger than to keep up.
        num_ffn: the other way round.
        ffn_sizes: what the FFN pool can be, in rising order.
    """

    def busier_s(sizes: PoolSizes) -> float:
        return max(times.attention_s / sizes.num_attention, times.ffn_s / sizes.num_ffn)

    if num_ffn is not None:
        most = max(1, num_workers - num_ffn)
        counts = [num_attention] if num_attention is not None else range(1, most + 1)
        return min((PoolSizes(count, num_ffn) for count in counts), key=busier_s)
    fitting = [size for size in ffn_sizes if size + (num_attention or 1) <= num_workers]
    return min(
        (PoolSizes(num_attention or max(1, num_workers - size), size)
         for size in fitting or ffn_sizes[:1]),
        key=busier_s,
    )  # fmt: skip
