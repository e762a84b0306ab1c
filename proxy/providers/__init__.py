"""Kinds of upstream, one entry each: the table ``PROVIDERS``."""

from collections.abc import Callable

from proxy.modelconfig.resolved import Provider as Settings
from proxy.providers.anthropic import AnthropicProvider
from proxy.providers.base import Provider
from proxy.providers.gateway import GatewayProvider
from proxy.providers.google import GoogleProvider
from proxy.providers.openai import (
    AzureProvider,
    FireworksProvider,
    OpenAICompatibleProvider,
    OpenAIProvider,
)

# serverSideConfig.type -> what speaks to it
PROVIDERS: dict[str, Callable[[Settings], Provider]] = {
    "huggingface-tgi": OpenAICompatibleProvider,
    "openaicompatible": OpenAICompatibleProvider,
    "openai": OpenAIProvider,
    "azureOpenAI": AzureProvider,
    "fireworks": FireworksProvider,
    "anthropic": AnthropicProvider,
    "google": GoogleProvider,
    "sourcegraph": GatewayProvider,
}
