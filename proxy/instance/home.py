"""``GET /`` for browsers: what this is, how to point a client at it, which models."""

from proxy import __version__
from proxy.config import Settings
from proxy.dialects.base import Reply
from proxy.instance.html import escape, page
from proxy.modelconfig.resolved import Model

_CLIENTS = (
    (
        "VS Code (Cody)",
        "<i>Sign In to Your Enterprise Instance</i>: this address, then <i>Paste Access "
        "Token</i>",
    ),
    (
        "JetBrains (Cody)",
        "<i>Sign in with an Enterprise Instance</i>: this address and the token",
    ),
    (
        "Neovim (sg.nvim)",
        "<code>SRC_ENDPOINT</code>: this address, <code>SRC_ACCESS_TOKEN</code>: the token",
    ),
    (
        "Cody command line",
        "<code>cody chat --endpoint ADDRESS --access-token TOKEN -m hi</code>",
    ),
    (
        "OpenAI clients",
        "<code>OPENAI_BASE_URL</code>: this address and <code>/v1</code>",
    ),
    ("Anthropic clients", "<code>ANTHROPIC_BASE_URL</code>: this address"),
    ("Hugging Face TGI clients", "this address"),
)


def home(settings: Settings) -> Reply:
    token = (
        "No token is asked for; clients that want one take any text."
        if settings.open
        else "Each wants an access token, which the operator of this proxy gives you."
    )
    return page(
        "completions-proxy",
        [
            f"<p>Version {escape(__version__)}: a proxy between clients of code "
            "assistants and model servers. Clients keep their protocol and change the "
            "address to that of this page.</p>",
            f"<h2>Clients</h2><p>{token}</p><table>",
            *(_row(escape(name), how) for name, how in _CLIENTS),
            "</table><h2>Models</h2><table>",
            "<tr><th>Name</th><th>Model</th><th>For</th></tr>",
            *(_model(model) for model in settings.models.models),
            "</table>",
        ],
    )


def _model(model: Model) -> str:
    uses = ", ".join(model.capabilities)
    ref = f"<code>{escape(model.ref)}</code>"
    return _row(escape(model.display_name), ref, escape(uses))


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
