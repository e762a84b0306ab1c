"""A server that behaves like Hugging Face TGI, without a model.

For the first run, for tests, and for load: it speaks the same bytes, refuses the same
requests with the same words, and says nothing worth knowing, at a pace that is set.

    running = await start(Settings(tokens_per_s=0))
    ...                                     # requests to running.url
    await running.stop()

Asked to, it goes wrong in all the ways that real servers do: see ``faults``.
"""

from proxy.simulator.faults import FaultError, Faults, describe, parse
from proxy.simulator.server import Running, start
from proxy.simulator.settings import Settings

__all__ = ["FaultError", "Faults", "Running", "Settings", "describe", "parse", "start"]
