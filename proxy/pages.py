"""What the configuration alone answers: lists of models, limits, a server's info."""

from collections.abc import Mapping

import msgspec

from proxy.dialects.base import JSON, Reply
from proxy.dialects.gateway import Window, limits_body
from proxy.errors import UnknownModel
from proxy.modelconfig.resolved import Model, ModelConfiguration

_encode = msgspec.json.Encoder().encode


class Listed(msgspec.Struct):
    id: str
    owned_by: str
    object: str = "model"
    created: int = 0


class _List(msgspec.Struct):
    data: list[Listed]
    object: str = "list"


class _AnthropicListed(msgspec.Struct):
    id: str
    display_name: str
    created_at: str = "1970-01-01T00:00:00Z"
    type: str = "model"


class _AnthropicList(msgspec.Struct):
    data: list[_AnthropicListed]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


def model_list(path: str, models: list[Listed], *, anthropic: bool) -> Reply:
    """Answer ``…/models`` and ``…/models/{id}``.

    Raises: UnknownModel: there is no such model.
    """
    wanted = path.partition("/models")[2].strip("/")
    if not wanted:
        return _json(_anthropic_list(models) if anthropic else _List(models))
    for model in models:
        if model.id == wanted:
            return _json(_anthropic(model) if anthropic else model)
    raise UnknownModel(f"The model '{wanted}' does not exist", status=404)


def _anthropic(model: Listed) -> _AnthropicListed:
    return _AnthropicListed(model.id, model.id)


def _anthropic_list(models: list[Listed]) -> _AnthropicList:
    data = [_anthropic(model) for model in models]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return _AnthropicList(data, first, last)


def configured(models: ModelConfiguration, *, refs: bool) -> list[Listed]:
    """The configured models: by their ref, or by the plain name that clients use."""
    names: dict[str, Model] = {}
    for model in models.models:
        names.setdefault(model.ref if refs else model.id, model)
    return [Listed(name, model.provider_id) for name, model in names.items()]


def reported(provider_id: str, body: bytes) -> list[Listed]:
    """The models that an upstream's own list names; none if it is no list."""
    try:
        found = msgspec.json.decode(body, type=_Reported)
    except msgspec.DecodeError:
        return []
    return [Listed(model.id, provider_id) for model in found.data]


class _ReportedModel(msgspec.Struct):
    id: str


class _Reported(msgspec.Struct):
    data: list[_ReportedModel]


def limits(models: ModelConfiguration, windows: Mapping[str, Window]) -> Reply:
    names = [f"{model.provider_id}/{model.name}" for model in models.models]
    features = {"chat_completions": names, "code_completions": names}
    body = limits_body(features, windows)
    return Reply(200, JSON, body)


def info(model: Model) -> Reply:
    """TGI's ``/info`` for a server that is not TGI."""
    window = model.context_window
    return _json(
        {
            "model_id": model.api_model or model.name,
            "model_sha": None,
            "max_concurrent_requests": None,
            "max_best_of": 1,
            "max_stop_sequences": 4,
            "max_input_tokens": window.max_input_tokens,
            "max_total_tokens": window.max_input_tokens + window.max_output_tokens,
            "router": "completions-proxy",
        }
    )


def _json(value: object) -> Reply:
    return Reply(200, JSON, _encode(value))
