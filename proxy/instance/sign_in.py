"""The page that an editor opens when its user clicks "sign in".

An instance would make a token there and hand it back to the editor. The proxy makes
none: its operator configured them. So the page says where tokens come from; and with
``instance.handTokenBack`` it takes one, and offers a link that gives it to the editor.
Only the addresses at which Cody's editors really listen are ever linked to.
"""

import re
from collections.abc import Mapping
from urllib.parse import parse_qs, quote

import msgspec

from proxy.auth import Access
from proxy.config import Settings
from proxy.dialects.base import Head, Reply
from proxy.errors import Unauthorized
from proxy.instance.html import escape, page

PATH = "/user/settings/tokens/new"
CALLBACK_PATH = f"{PATH}/callback"

_TITLE = "Sign in to completions-proxy"
_CUSTOM = "{}://sourcegraph.cody-ai?code={{token}}"
_LOCAL = "http://localhost:{port}/api/sourcegraph/token?token={token}"
# What stands for a token where none is asked for: clients want to have one.
_ANY_TOKEN = "cp_open"


class _Editor(msgspec.Struct, frozen=True):
    name: str
    address: str


# By ``requestFrom``; those that listen on a port of their own add it after a dash.
_EDITORS = {
    "CODY": _Editor("VS Code", _CUSTOM.format("vscode")),
    "CODY_INSIDERS": _Editor("VS Code Insiders", _CUSTOM.format("vscode-insiders")),
    "CODY_VSCODIUM": _Editor("VSCodium", _CUSTOM.format("vscodium")),
    "CODY_CURSOR": _Editor("Cursor", _CUSTOM.format("cursor")),
    "JETBRAINS": _Editor("the JetBrains IDE", _LOCAL),
    "ECLIPSE": _Editor("Eclipse", _LOCAL),
    "VISUAL_STUDIO": _Editor("Visual Studio", _LOCAL),
    "CODY_CLI": _Editor("the Cody command line", _LOCAL),
    "NEOVIM": _Editor("Neovim", _LOCAL),
}
_REQUESTER = re.compile(r"([A-Z_]{1,20})(?:-([0-9]{1,5}))?", re.ASCII)


class _Callback(msgspec.Struct, frozen=True):
    """Which editor waits for a token, and on which port (0: it has none)."""

    requester: str
    editor: _Editor
    port: int

    def link(self, token: str) -> str:
        return self.editor.address.format(port=self.port, token=quote(token, safe=""))


def callback(query: Mapping[str, str]) -> _Callback | None:
    """Return who asks for a token, None for anybody that is no editor we know."""
    requester = query.get("requestFrom", "")
    match = _REQUESTER.fullmatch(requester)
    editor = _EDITORS.get(match[1]) if match else None
    if match is None or editor is None:
        return None
    port = int(match[2] or _digits(query.get("port", "")) or 0)
    listens = editor.address is _LOCAL
    if listens != bool(port) or port > 65535:
        return None
    return _Callback(f"{match[1]}-{port}" if port else match[1], editor, port)


def _digits(text: str) -> str:
    return text if re.fullmatch(r"[0-9]{1,5}", text, re.ASCII) else ""


class Desk:
    """Answers at both paths."""

    def __init__(self, access: Access, settings: Settings) -> None:
        self._access = access
        self._open = settings.open
        self._hands_back = settings.instance.hand_token_back

    def answer(self, head: Head, body: bytes) -> Reply:
        if head.method == "POST":
            return self._take(body)
        waiting = callback(head.query) if head.path == CALLBACK_PATH else None
        return self._ask(waiting)

    def _ask(self, waiting: _Callback | None) -> Reply:
        if waiting is None:
            return self._explanation()
        if self._open:
            return _hand_over(waiting, _ANY_TOKEN)
        return _form(waiting) if self._hands_back else self._explanation()

    def _explanation(self) -> Reply:
        return page(_TITLE, [_where_from(self._open), _HOW_TO_PASTE])

    def _take(self, body: bytes) -> Reply:
        """Look at the token that somebody typed in, and offer it to the editor."""
        fields = _fields(body)
        waiting = callback(fields)
        if waiting is None or not self._hands_back or self._open:
            return self._ask(waiting)
        token = fields.get("token", "").strip()
        try:
            self._access.check(f"Bearer {token}")
        except Unauthorized:
            return _form(waiting, "That token is not known here.")
        return _hand_over(waiting, token)


def _fields(body: bytes) -> dict[str, str]:
    try:
        found = parse_qs(body.decode(), max_num_fields=10)
    except ValueError:
        return {}
    return {name: values[0] for name, values in found.items()}


_HOW_TO_PASTE = (
    "<p>In the editor, choose to sign in with an access token (VS Code: <i>Sign In to "
    "Your Enterprise Instance, Paste Access Token</i>), give the address of this proxy "
    "as the instance's URL, and paste the token.</p>"
)


def _where_from(is_open: bool) -> str:
    if is_open:
        return (
            "<p>This proxy asks nobody for a token, but Cody's clients want to have one: "
            f"any text will do, such as <code>{_ANY_TOKEN}</code>.</p>"
        )
    return (
        "<p>This proxy makes no tokens. Whoever runs it gives you one: tokens stand in "
        "its configuration, under <code>auth.tokens</code>.</p>"
    )


def _form(waiting: _Callback, problem: str = "") -> Reply:
    note = f'<p class="note" role="alert">{escape(problem)}</p>' if problem else ""
    name = escape(waiting.editor.name)
    return page(
        _TITLE,
        [
            _where_from(False),
            note,
            f'<form method="post" action="{CALLBACK_PATH}">',
            '<input type="hidden" name="requestFrom" '
            f'value="{escape(waiting.requester)}">',
            "<label>Access token<input type=password name=token required autofocus "
            'autocomplete="off" spellcheck="false"></label>',
            f"<button>Continue to {name}</button></form>",
            f"<p>If you did not try to sign in from {name}, close this page.</p>",
        ],
        status=401 if problem else 200,
    )


def _hand_over(waiting: _Callback, token: str) -> Reply:
    name = escape(waiting.editor.name)
    return page(
        _TITLE,
        [
            f'<p><a href="{escape(waiting.link(token))}">Open {name}</a> and give it the '
            "token.</p>",
            f"<p>If you did not try to sign in from {name}, close this page.</p>",
        ],
    )
