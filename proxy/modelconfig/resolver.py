"""The whole ``modelConfiguration`` block -> what the proxy works with."""

from pathlib import Path

from proxy.errors import ConfigError
from proxy.modelconfig import schema
from proxy.modelconfig.default_models import resolve_defaults
from proxy.modelconfig.findings import Findings
from proxy.modelconfig.model_overrides import resolve_models
from proxy.modelconfig.provider_overrides import ReadFile, resolve_providers
from proxy.modelconfig.resolved import ModelConfiguration


def _read_file(name: str) -> str:
    return Path(name).read_text()


def resolve(
    block: schema.Block,
    *,
    path: str = "modelConfiguration",
    read_file: ReadFile = _read_file,
) -> ModelConfiguration:
    """Return the configuration that ``block`` describes.

    Args:    path: what problems call the place of the block.
             read_file: returns the text of an ``accessTokenFile``.
    Raises:  ConfigError: lists everything that is wrong.
    """
    findings = Findings()
    if block.sourcegraph is not None:
        text = "hosted models cannot be discovered here; ignored"
        findings.warn(f"{path}.sourcegraph", text)
    providers = resolve_providers(
        block.provider_overrides or [],
        f"{path}.providerOverrides",
        read_file,
        findings,
    )
    before = len(findings.problems)
    models = resolve_models(block, path, findings)
    if len(findings.problems) > before:
        raise ConfigError(findings.problems)
    if not models:
        text = (
            "no models; name some in modelOverrides, selfHostedModels or"
            " modelOverridesRecommendedSettings"
        )
        raise ConfigError([*findings.problems, f"{path}: {text}"])
    defaults = resolve_defaults(
        block.default_models, models, f"{path}.defaultModels", findings
    )
    if findings.problems:
        raise ConfigError(findings.problems)
    return ModelConfiguration(
        providers=providers,
        models=models,
        default_models=defaults,
        warnings=tuple(findings.warnings),
        system_pre_instruction=block.system_pre_instruction or "",
    )
