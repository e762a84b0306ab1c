"""What a Cody client expects of a Sourcegraph instance, beside completions.

Every reply is made of the configuration, most of them once, at start. Nothing here
waits, and nothing that a client sends here is kept or logged.
"""

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from proxy.auth import Access
from proxy.config import Settings
from proxy.dialects.base import JSON, Head, Reply
from proxy.instance import sign_in
from proxy.instance.client_config import client_config
from proxy.instance.graphql import Operations
from proxy.instance.home import home
from proxy.instance.supported_models import supported_models

GRAPHQL = "/.api/graphql"


class Visit(msgspec.Struct, frozen=True):
    """One request of such a kind; ``user`` is the name of its token."""

    head: Head
    user: str = ""
    body: bytes = b""


class Page(msgspec.Struct, frozen=True):
    """What is at one path. ``is_logged``: whether a visit that went well is worth a line:
    clients make some sixty for one chat.
    """

    answer: Callable[[Visit], Reply]
    methods: tuple[str, ...] = ("GET", "HEAD")
    needs_token: bool = True
    is_logged: bool = True


_Reply: TypeAlias = Callable[[Visit], Reply]


class Instance:
    """The pages of an instance. ``usage`` answers a user's question for their own."""

    def __init__(
        self, settings: Settings, access: Access, usage: Callable[[str], Reply]
    ) -> None:
        operations = Operations(settings)
        desk = sign_in.Desk(access, settings)
        self._home = Page(_always(home(settings)), needs_token=False)
        self._graphql = Page(
            lambda visit: operations.answer(visit.head.query, visit.body, visit.user),
            methods=("POST",),
            is_logged=False,
        )
        signing_in = Page(
            lambda visit: desk.answer(visit.head, visit.body),
            methods=("GET", "HEAD", "POST"),
            needs_token=False,
        )
        self._pages = {
            "/.api/client-config": Page(_always(client_config(settings.instance))),
            "/.api/modelconfig/supported-models.json": Page(
                _always(supported_models(settings.models))
            ),
            # There are none: what rules there are lie in the client's own files.
            "/.api/rules": Page(_always(Reply(200, JSON, b'{"rules":[]}'))),
            "/.api/usage": Page(lambda visit: usage(visit.user)),
            "/-/debug/otlp/v1/traces": Page(
                _always(Reply(200, JSON, b"{}")),
                methods=("POST",),
                needs_token=False,
                is_logged=False,
            ),
            sign_in.PATH: signing_in,
            sign_in.CALLBACK_PATH: signing_in,
        }

    def page(self, head: Head) -> Page | None:
        """Return what answers a request; None if it is none of an instance's."""
        path = head.path
        # Clients keep the path of their endpoint for GraphQL, and only there.
        if path.endswith(GRAPHQL):
            return self._graphql
        if path == "/" and head.method in self._home.methods:
            # Everybody but a browser means TGI's health.
            accepts_html = "text/html" in head.headers.get("Accept", "")
            return self._home if accepts_html else None
        return self._pages.get(path)


def _always(reply: Reply) -> _Reply:
    return lambda _: reply
