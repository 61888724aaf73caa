"""How many tokens a prompt or an answer has."""

import random
from dataclasses import dataclass

from afd_server.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class UniformLengths:
    """Every length from `shortest` to `longest` is equally likely."""

    shortest: int
    longest: int

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ConfigError(
                f"lengths from {self.shortest} to {self.longest}: must begin at 1 or more and "
                "not end below"
            )

    def __str__(self) -> str:
        fixed = self.shortest == self.longest
        return str(self.longest) if fixed else f"{self.shortest}:{self.longest}"

    def draw(self, rng: random.Random) -> int:
        """Return a length."""
        return rng.randint(self.shortest, self.longest)


@dataclass(frozen=True, slots=True)
class LogNormalLengths:
    """Lengths like those of conversations: many short, a few long.

    `sigma` is the standard deviation of the logarithm. What is above `longest` is drawn again:
    the tail is cut off, so that requests fit a model, and not heaped up at the end.
    """

    median: float
    sigma: float
    longest: int

    def __post_init__(self) -> None:
        if not (1 <= self.median <= self.longest and 0 < self.sigma <= 5):
            raise ConfigError(
                f"lognormal lengths of median {self.median:g}, sigma {self.sigma:g} and at most "
                f"{self.longest}: 1 ≤ median ≤ longest and 0 < sigma ≤ 5 must hold"
            )

    def __str__(self) -> str:
        return f"lognormal:{self.median:g}:{self.sigma:g}:{self.longest}"

    def draw(self, rng: random.Random) -> int:
        """Return a length."""
        while True:  # half of the draws are below the median, so this ends soon
            length = max(1, round(self.median * rng.lognormvariate(0, self.sigma)))
            if length <= self.longest:
                return length


Lengths = UniformLengths | LogNormalLengths  # str() gives what parse_lengths reads


def parse_lengths(text: str, setting: str) -> Lengths:
    """Read `128`, `64:256` or `lognormal:MEDIAN:SIGMA:LONGEST`.

    Raises:
        ConfigError: it is none of these; the text names the setting.
    """
    try:
        match text.split(":"):
            case ["lognormal", median, sigma, longest]:
                return LogNormalLengths(float(median), float(sigma), int(longest))
            case [shortest, longest]:
                return UniformLengths(int(shortest), int(longest))
            case [fixed]:
                return UniformLengths(int(fixed), int(fixed))
    except ConfigError as error:
        raise ConfigError(f"{setting} is {text!r}: {error}") from error
    except ValueError:
        pass  # a part is no number: said below
    raise ConfigError(f"{setting} is {text!r}; write 128, 64:256 or lognormal:MEDIAN:SIGMA:LONGEST")
