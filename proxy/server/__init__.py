"""A request from its checks to its log line.

``proxy`` takes them in; ``service`` is what outlives each of them. ``handling`` says who
answers, and asks them; a ``visit`` does so without a task, a ``request`` in aiohttp's. What
is no exchange is a ``page``.
"""

from proxy.server.proxy import Proxy as Proxy
