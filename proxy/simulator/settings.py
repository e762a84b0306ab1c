"""What the simulated server can be told."""

from typing import Literal

import msgspec

from proxy.simulator.faults import Faults


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated server.

    ``tokens_per_s`` 0 means as fast as the sockets take it. ``answer_tokens`` > 0 gives
    every answer that length, for load tests. ``strict_template`` refuses what a
    Mistral-like chat template refuses. ``unknown_adapter`` says what a ``model`` that
    is neither ``tgi`` nor the served one leads to: an error, or (as in TGI 2.3 and
    later with the default backend) an answer from the base model. ``faults`` happen to
    every request for a generation that does not ask for others.
    """

    model: str = "simulated/tgi"
    tokens_per_s: float = 50.0
    first_token_s: float = 0.1
    keep_alive_s: float = 15.0
    answer_tokens: int = 0
    api_key: str | None = None
    strict_template: bool = False
    unknown_adapter: Literal["error", "base"] = "error"
    faults: Faults | None = None
    # TGI's own launcher options; only the token limit is larger than its default.
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4
    max_total_tokens: int = 32_768
    payload_limit_bytes: int = 2_000_000

    @property
    def max_input_tokens(self) -> int:
        return self.max_total_tokens - 1
