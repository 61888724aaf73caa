"""What is asked of a server: requests before they are sent. Everything follows from a seed."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from afd_server.core.errors import ConfigError
from afd_server.core.request import SLO
from afd_server.workload.lengths import Lengths
from afd_server.workload.trace import TraceEntry


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A run of random tokens, the same wherever `key` is."""

    key: str
    num_tokens: int

    def token_ids(self, vocabulary: range) -> list[int]:
        """Draw the tokens."""
        return random.Random(self.key).choices(vocabulary, k=self.num_tokens)


@dataclass(frozen=True, slots=True)
class Shape:
    """A request's tokens: what its prompt is made of and how many are to come."""

    prompt: tuple[PromptPart, ...]
    num_output_tokens: int

    @property
    def num_input_tokens(self) -> int:
        """Return the length of the prompt."""
        return sum(part.num_tokens for part in self.prompt)


@dataclass(frozen=True, slots=True)
class Offer:
    """A request to be made. `at_s` None: as soon as another one has ended."""

    at_s: float | None
    shape: Shape
    slo: SLO
    cancel_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Clients:
    """What those who ask want and how patient they are.

    `targets` are TPOTs in seconds with their weights; empty: requests carry no target. The share
    `cancel_share` of requests is given up `cancel_after_s` after it was sent.
    """

    targets: tuple[tuple[float, float], ...] = ()
    cancel_share: float = 0.0
    cancel_after_s: float = 1.0


def synthetic_shapes(
    input_lengths: Lengths,
    output_lengths: Lengths,
    seed: str,
    *,
    prefix_tokens: int = 0,
    num_prefixes: int = 1,
    prefix_seed: str = "",
) -> Iterator[Shape]:
    """Yield shapes without end; no two prompts are equal.

    Args:
        input_lengths: of what a prompt has for itself.
        output_lengths: of the answers.
        seed: of lengths, choices and prompts.
        prefix_tokens: in front of each prompt, shared with others.
        num_prefixes: how many such prefixes there are, each equally likely.
        prefix_seed: of their tokens.
    """
    rng, prefixes = random.Random(f"{seed} lengths"), random.Random(f"{seed} prefixes")
    index = 0
    while True:
        own = PromptPart(f"{seed} prompt {index}", input_lengths.draw(rng))
        number = prefixes.randrange(num_prefixes)
        prefix = PromptPart(f"{prefix_seed} prefix {number}", prefix_tokens)
        yield Shape((prefix, own) if prefix_tokens else (own,), output_lengths.draw(rng))
        index += 1


def trace_shapes(entries: Sequence[TraceEntry], block_tokens: int, seed: str) -> Iterator[Shape]:
    """Yield the shapes of a trace; blocks of the same id have the same tokens."""
    for index, entry in enumerate(entries):
        left = entry.num_input_tokens
        parts = []
        for block in entry.block_ids:
            parts.append(PromptPart(f"{seed} block {block}", min(block_tokens, left)))
            left -= parts[-1].num_tokens
        if left:
            parts.append(PromptPart(f"{seed} prompt {index}", left))
        yield Shape(tuple(parts), entry.num_output_tokens)


def make_offers(
    times_s: Iterable[float | None], shapes: Iterable[Shape], clients: Clients, seed: str
) -> Iterator[Offer]:
    """Yield offers until times or shapes end.

    Targets and cancellations have draws of their own: asking for some changes nothing else.
    """
    targets = random.Random(f"{seed} targets")
    cancellations = random.Random(f"{seed} cancellations")
    values = [target for target, _ in clients.targets]
    weights = [weight for _, weight in clients.targets]
    for at_s, shape in zip(times_s, shapes, strict=False):
        slo = SLO(tpot_s=targets.choices(values, weights)[0]) if values else SLO()
        leaves = cancellations.random() < clients.cancel_share
        yield Offer(at_s, shape, slo, clients.cancel_after_s if leaves else None)


def parse_targets(text: str, setting: str) -> tuple[tuple[float, float], ...]:
    """Read `20:1,50:2`: TPOT targets in milliseconds, each with its weight.

    Raises:
        ConfigError: it is not of that form.
    """
    try:
        pairs = [tuple(map(float, part.split(":"))) for part in text.split(",")]
        targets = [(milliseconds / 1000, weight) for milliseconds, weight in pairs]
    except ValueError:
        targets = []
    if not targets or not all(0 < value < 3600 and 0 < weight < 1e9 for value, weight in targets):
        raise ConfigError(
            f"{setting} is {text!r}; write milliseconds and weights, all positive, as in 20:1,50:2"
        )
    return tuple(targets)
