"""What the gates of all attention workers did: how many tokens each expert got."""

from collections import defaultdict

from afd_server.core.errors import ProtocolError
from afd_server.core.topology import Topology
from afd_server.telemetry.metrics import GatewayMetrics
from afd_server.transport.messages import DType, ExpertLoad


class ExpertView:
    """Adds up the counts of the workers, which begin at zero with each incarnation.

    Args:
        metrics: told of every layer that got tokens.
    """

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._seen: dict[str, list[int]] = {}  # by incarnation: its last report, flat
        self._totals: defaultdict[int, list[int]] = defaultdict(list)  # by layer

    def follow(self, topology: Topology) -> None:
        """Forget workers that left; what they counted stays counted."""
        self._seen = {inc: seen for inc, seen in self._seen.items() if topology.find(inc)}

    def take(self, incarnation: str, load: ExpertLoad) -> None:
        """Count what is new in a report; one that was overtaken adds nothing.

        Raises:
            ProtocolError: it is no table of counts, or of another shape than the last.
        """
        payload = load.tokens
        if payload.dtype is not DType.INT64 or len(payload.shape) != 2:
            raise ProtocolError(f"expert counts of shape {payload.shape}", "shape")
        counts = memoryview(bytes(payload.data)).cast("q").tolist()
        last = self._seen.get(incarnation, [0] * len(counts))
        if len(last) != len(counts) or any(count < 0 for count in counts):
            raise ProtocolError("expert counts that cannot follow the last ones", "range")
        if sum(counts) <= sum(last):
            return
        self._seen[incarnation] = counts
        width = payload.shape[1]
        for layer in range(payload.shape[0]):
            row = slice(layer * width, (layer + 1) * width)
            new = [after - before for after, before in zip(counts[row], last[row], strict=True)]
            if any(new):
                self._count(layer, new)

    def hottest(self, num_experts: int) -> dict[str, list[int]]:
        """Return the experts of each layer that got the most tokens; of equals the lower ids.

        Layers without tokens are left out.
        """
        return {
            str(layer): sorted(sorted(range(len(totals)), key=lambda e: -totals[e])[:num_experts])
            for layer, totals in sorted(self._totals.items())
        }

    def _count(self, layer: int, new: list[int]) -> None:
        before = self._totals[layer] or [0] * len(new)
        totals = self._totals[layer] = [a + b for a, b in zip(before, new, strict=True)]
        imbalance = max(totals) * len(totals) / sum(totals)
        self._metrics.expert_tokens(layer, new, imbalance)
