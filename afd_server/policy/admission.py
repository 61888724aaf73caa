"""Decides whether a request may enter, before any work is done for it."""

from collections import Counter
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from afd_server.core.errors import InvalidRequest, Overloaded, TargetOutOfReach
from afd_server.core.request import SLO
from afd_server.policy.pace import DECODE_SHARE

RETRY_AFTER_S = 1.0  # at least, where it is not known what will be free by then
LONGEST_RETRY_S = 60.0  # clients give up on servers that say much more
KEPT_SHARE = 4  # one in so many places in the queue is for those who overtake somebody there
LONGEST_WAIT = 0.5  # of the TTFT target may be spent on waiting for others: a wait passes
SHORTEST_WAIT = 0.25  # the same in an overload that lasts, where it only makes everybody late
LASTING = 1 / 3  # of the latest requests are refused then; the less, the longer one may wait
FADING = 0.03  # weight of the newest request in such a share, and of the newest first token in the
# estimate of their pace; of the first ones more, so that they are averaged
EASING = 0.5  # the share of refused ones shrinks so much when somebody finds nobody waiting

SLOMode = Literal["enforce", "best-effort", "off"]


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Limits of one gateway.

    Attributes:
        max_live_requests: most that have not ended.
        max_model_len: the context, in tokens.
        max_queued_requests: most that wait for their first token, where targets are enforced; the
            last quarter of these places is for those who are served before others that wait.
        slo: targets of requests that name none.
        slo_mode: whether requests are refused whose targets would not be met (`enforce`), or only
            scheduled by them (`best-effort`); `off` knows no targets.
    """

    max_live_requests: int
    max_model_len: int
    max_queued_requests: int = 64
    slo: SLO = field(default_factory=SLO)
    slo_mode: SLOMode = "off"


class FirstTokenQueue:
    """The requests that wait for their first token, and how fast these come.

    Its order is that of the attention workers' schedulers: by priority, then evenly between
    tenants, then by when the first token is due.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[int, str, float]] = {}  # by key: priority, tenant, due
        self._num_served = 0  # while others waited
        self._interval_s = 0.0  # between first tokens while somebody waits for one
        self._since_s = 0.0  # the latest first token, or when the queue was last empty
        self._refused_share = 0.0  # of the latest requests

    @property
    def wait_share(self) -> float:
        """Return how much of its TTFT target a request that comes last may wait for others.

        Much as long as hardly anybody is refused: load comes and goes. Who must be refused in any
        case, because more comes than is answered, is so at a short queue as well as at a long one;
        and that is sooner over.
        """
        lasting = min(1.0, self._refused_share / LASTING)
        return LONGEST_WAIT - (LONGEST_WAIT - SHORTEST_WAIT) * lasting

    @property
    def num_waiting(self) -> int:
        """Return the requests without a first token."""
        return len(self._waiting)

    def silence_s(self, now_s: float) -> float:
        """Return since when somebody waits and nobody has had a first token."""
        return max(0.0, now_s - self._since_s) if self._waiting else 0.0

    def drain_s(self, now_s: float) -> float:
        """Return how long it takes until all who wait have their first token.

        At least as long as nobody has had one by now: what stands still is not said to move soon.
        """
        return max(self._interval_s * len(self._waiting), self.silence_s(now_s))

    def retry_after_s(self, now_s: float) -> float:
        """Return when to come back for those who are refused though few are ahead of them."""
        return min(LONGEST_RETRY_S, max(RETRY_AFTER_S, self.drain_s(now_s)))

    def enter(self, key: int, priority: int, tenant: str, due_s: float, now_s: float) -> None:
        """Add a request that was admitted, and whose first token is due by `due_s`."""
        if not self._waiting:
            self._since_s = now_s
        self._waiting[key] = (priority, tenant, due_s)

    def serve(self, key: int, now_s: float) -> None:
        """Take out a request that has its first token."""
        if key not in self._waiting:
            return
        weight = FADING
        if len(self._waiting) > 1:  # else a long prompt was read, which says little of a queue
            self._num_served += 1
            weight = max(FADING, 1 / self._num_served)
        del self._waiting[key]
        self._interval_s += weight * (now_s - self._since_s - self._interval_s)
        self._since_s = now_s

    def leave(self, key: int) -> None:
        """Take out a request that waits no more, if it is there."""
        self._waiting.pop(key, None)

    def expected_wait_s(self, priority: int, tenant: str, due_s: float = inf) -> float:
        """Return how long a new request would wait for those ahead of it."""
        return self._interval_s * self._num_ahead(priority, tenant, due_s)

    def check(
        self,
        config: AdmissionConfig,
        ttft_s: float | None,
        priority: int,
        tenant: str,
        num_new: int,
        now_s: float,
    ) -> None:
        """Refuse what could not begin in time; needs no knowledge of the prompt.

        Who is refused is not told to come back sooner than after as long a silence as there was.

        Who overtakes others may wait for long at any time: the crowd is not theirs.
        Nobody who waits is sent away for somebody more urgent. So a crowd that all the others
        overtake, of low priority or of one tenant, does not get every place. Of several
        choices the last one counts, unless nobody is ahead: they would be too many for ever.

        Raises:
            Overloaded: too many wait, or those ahead take too long.
            InvalidRequest: it would never fit.
        """
        if num_new > config.max_queued_requests:
            raise InvalidRequest(
                f"{num_new} choices in one request, at most {config.max_queued_requests} may wait "
                "for their first token here; ask for fewer at once",
                "n",
            )
        due_s = SLO(ttft_s=ttft_s).first_due_s(now_s)
        num_ahead = self._num_ahead(priority, tenant, due_s)
        num_in_time = sum(due <= due_s for *_, due in self._waiting.values())
        share = self.wait_share if num_ahead >= num_in_time else LONGEST_WAIT
        most_s = inf if ttft_s is None else share * ttft_s
        wait_s = self._interval_s * (num_ahead + num_new - 1) if num_ahead else 0.0
        places = config.max_queued_requests
        is_full = self.num_waiting + num_new > places or num_ahead >= places - places // KEPT_SHARE
        is_refused = is_full or wait_s > most_s
        is_own_doing = is_refused and self._is_own_doing(priority, tenant, due_s, most_s, is_full)
        if not self._waiting:  # what there was of an overload is over
            self._refused_share *= EASING
        if not is_own_doing:  # which would say nothing of the load of others
            self._refused_share += FADING * (is_refused - self._refused_share)
        if not is_refused:
            return
        silence_s = self.silence_s(now_s)
        raise Overloaded(
            f"{self.num_waiting} requests wait for their first token, {num_ahead} of them before "
            f"this one, for some {max(wait_s, silence_s):.1f} s; try again later",
            min(LONGEST_RETRY_S, max(wait_s - most_s, self._interval_s, silence_s, 0.05)),
            "queue_full" if is_full else "expected_wait",
            is_own_doing=is_own_doing,
        )

    def _is_own_doing(
        self, priority: int, tenant: str, due_s: float, most_s: float, is_full: bool
    ) -> bool:
        """Tell whether a tenant, and not the only one, has most places or stands in its own way."""
        num_by_tenant = Counter(t for _, t, _ in self._waiting.values())
        if is_full:
            return len(num_by_tenant) > 1 and 2 * num_by_tenant[tenant] > self.num_waiting
        own = self._in_time(priority, due_s)[tenant]
        others_s = self.expected_wait_s(priority, tenant, due_s) - self._interval_s * own
        return len(num_by_tenant) > 1 and own > 0 and others_s <= most_s

    def _num_ahead(self, priority: int, tenant: str, due_s: float) -> int:
        """Count who is served before a new request: of other tenants, as many as of its own.

        Those of its priority that have more time are not, so a long prompt with a loose target
        keeps nobody out.
        """
        more_urgent = sum(p < priority for p, *_ in self._waiting.values())
        equals = self._in_time(priority, due_s)
        own = equals[tenant]
        return more_urgent + own + sum(min(n, own + 1) for t, n in equals.items() if t != tenant)

    def _in_time(self, priority: int, due_s: float) -> Counter[str]:
        """Count, by tenant, who waits with this priority and is due no later."""
        return Counter(t for p, t, due in self._waiting.values() if p == priority and due <= due_s)


def check_capacity(
    config: AdmissionConfig, num_live: int, num_new: int, retry_after_s: float
) -> None:
    """Refuse when the gateway is full; needs no knowledge of the prompt.

    Raises:
        Overloaded: `num_new` more requests would exceed the limit.
        InvalidRequest: they would even if there were no others.
    """
    if num_new > config.max_live_requests:
        raise InvalidRequest(
            f"{num_new} choices in one request, at most {config.max_live_requests} requests may "
            "be live here; ask for fewer at once",
            "n",
        )
    if num_live + num_new > config.max_live_requests:
        raise Overloaded(
            f"{num_live} requests are live and the limit is {config.max_live_requests}; "
            "try again later",
            retry_after_s,
            "max_live_requests",
        )


def check_reachable(slo: SLO, usual: SLO, alone_s: float) -> None:
    """Refuse targets that not even a request alone would keep.

    Args:
        slo: what is asked for.
        usual: targets of those that name none; these are nobody's own.
        alone_s: what a step takes in which one sequence alone gets one token. Reading a prompt
            takes longer, so nobody has a first token sooner.

    Raises:
        TargetOutOfReach: so it is.
    """
    least_s = alone_s / DECODE_SHARE
    if slo.tpot_s is not None and slo.tpot_s != usual.tpot_s and slo.tpot_s < least_s:
        raise TargetOutOfReach(
            f"a TPOT of {slo.tpot_s * 1e3:g} ms is out of reach: a request that is alone gets a "
            f"token every {alone_s * 1e3:.1f} ms here, and others' prompts must be read beside it; "
            f"ask for at least {least_s * 1e3:.1f} ms",
            "x-slo-tpot-ms",
        )
    if slo.ttft_s is not None and slo.ttft_s != usual.ttft_s and slo.ttft_s < alone_s:
        raise TargetOutOfReach(
            f"a TTFT of {slo.ttft_s * 1e3:g} ms is out of reach: a step for a single token takes "
            f"{alone_s * 1e3:.1f} ms here, and reading a prompt more; ask for more than that",
            "x-slo-ttft-ms",
        )


def fit_max_tokens(
    config: AdmissionConfig, num_prompt: int, wanted: int | None, prompt_param: str = "prompt"
) -> int:
    """Return how many tokens may be generated: `wanted`, or all that the context leaves.

    Raises:
        InvalidRequest: prompt and wanted tokens together exceed the context.
    """
    room = config.max_model_len - num_prompt
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens, the context holds {config.max_model_len} "
            "including at least one of output; shorten the prompt",
            prompt_param,
        )
    if wanted is not None and wanted > room:
        raise InvalidRequest(
            f"max_tokens is {wanted}, but a prompt of {num_prompt} tokens leaves room for {room} "
            f"in a context of {config.max_model_len}",
            "max_tokens",
        )
    return wanted if wanted is not None else room
