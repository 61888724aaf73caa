"""All that a gateway process is told at its start."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from afd_server.core.model_spec import LoadFormat
from afd_server.policy.admission import SLOMode


@dataclass(frozen=True, slots=True)
class GatewaySpec:
    """One gateway process.

    Attributes:
        listen_fd: an inherited socket, bound to the address that clients use.
        url: that address, for logs and heartbeats.
        supervisor, supervisor_address: whom to report to.
        served_model_name: what clients call the model.
        max_model_len: context in tokens.
        max_live_requests: refuse above this.
        num_attention, num_ffn: workers of a complete topology; `num_ffn_parts` of the FFN
            workers suffice.
        shutdown_timeout_s: how long running requests may go on after a stop signal.
        log_level: of the logging module.
        load_format: `dummy` makes do without a tokenizer.
        max_queued_requests, ttft_slo_s, tpot_slo_s, slo_mode: as in `AdmissionConfig`.
    """

    incarnation: str
    listen_fd: int
    url: str
    supervisor: str
    supervisor_address: str
    model_path: str
    model_digest: str
    served_model_name: str
    max_model_len: int
    max_live_requests: int
    num_attention: int
    num_ffn: int
    num_ffn_parts: int
    with_crc: bool
    shutdown_timeout_s: float
    log_level: str
    load_format: LoadFormat = "auto"
    max_queued_requests: int = 64
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    slo_mode: SLOMode = "off"

    @property
    def model_directory(self) -> Path:
        """Return `model_path` as a path."""
        return Path(self.model_path)

    def to_json(self) -> str:
        """Return the spec as text for another process."""
        return _ADAPTER.dump_json(self).decode()


def parse_gateway_spec(text: str) -> GatewaySpec:
    """Read what `to_json` wrote."""
    return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(GatewaySpec)
