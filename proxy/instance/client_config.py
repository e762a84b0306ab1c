"""``GET /.api/client-config``: what clients may do, and in which API version.

Clients ask again every minute while their editor has the focus.
"""

import msgspec

from proxy.config import Instance
from proxy.dialects.base import JSON, Reply


class _ClientConfig(msgspec.Struct, rename="camel"):
    """``attribution`` is left out: clients throw at words they do not know there."""

    latest_supported_completions_stream_api_version: int = msgspec.field(
        name="latestSupportedCompletionsStreamAPIVersion"
    )
    cody_enabled: bool = True
    chat_enabled: bool = True
    auto_complete_enabled: bool = True
    custom_commands_enabled: bool = True
    attribution_enabled: bool = False
    smart_context_window_enabled: bool = True
    models_api_enabled: bool = msgspec.field(name="modelsAPIEnabled", default=True)
    user_should_use_enterprise: bool = False


def client_config(instance: Instance) -> Reply:
    body = msgspec.json.encode(_ClientConfig(instance.api_version))
    return Reply(200, JSON, body)
