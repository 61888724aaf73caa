"""Every error of ours, in one tree.

AFDError
├── ConfigError            a flag, environment variable, file key or model directory is wrong
│   ├── ModelError         the model directory lacks a file or tensor, or is of no supported kind
│   └── AddressInUse       a port or socket path is taken
├── InvalidRequest         a client's request is wrong; carries the parameter's name
│   └── TargetOutOfReach   or asks for more than this machine can do
├── Overloaded             right request, no room now
├── ProtocolError          a frame that no peer of ours may send
├── WorkerFailed           a worker did not start, or died
└── TransportError         a peer cannot be reached
"""


class AFDError(Exception):
    """The root: its text is a sentence for the person who can mend the cause."""


class ConfigError(AFDError):
    """A setting is wrong; the text names it, its value and what would be right."""


class ModelError(ConfigError):
    """A model directory cannot be served; the text names the file, tensor or field."""


class AddressInUse(ConfigError):
    """Another process listens where we were told to."""


class InvalidRequest(AFDError):
    """A client asked for something that cannot be done.

    Args:
        message: what was wrong and what would be right.
        param: the request field at fault, or None if no single one is.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TargetOutOfReach(InvalidRequest):
    """A client asked for a target that not even a request alone would keep."""

    reason = "target_out_of_reach"  # for metrics and clients, as that of `Overloaded`


class Overloaded(AFDError):
    """The request is fine but cannot be taken now.

    Args:
        message: what is full.
        retry_after_s: seconds after which a retry is sensible.
        reason: one word for metrics and clients.
        is_own_doing: whether it is this client that has too many requests, rather than all.
    """

    def __init__(
        self, message: str, retry_after_s: float, reason: str, *, is_own_doing: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason
        self.is_own_doing = is_own_doing


class ProtocolError(AFDError):
    """A received frame breaks the wire contract.

    Args:
        message: what was wrong with it.
        reason: one word saying which check failed; a metric label.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class WorkerFailed(AFDError):
    """A worker process did not become ready, or ended without being told to."""


class TransportError(AFDError):
    """A message could not be handed to its peer."""
