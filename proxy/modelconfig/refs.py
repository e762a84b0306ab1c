"""Ids, and the refs made of three of them: ``provider::apiVersion::model``."""

import re

# What may stand in a URL, but for the colon, which separates.
_ID_CHARACTERS = r"A-Za-z0-9\-._~/?#\[\]@!$&'()*+,;=%"
_ID = re.compile(rf"[{_ID_CHARACTERS}]+")
_NOT_ID = re.compile(rf"[^{_ID_CHARACTERS}]+")

_PARTS = ("ProviderID", "APIVersionID", "ModelID")


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def made_id(text: str) -> str:
    """Return ``text`` with "_" for all that may not stand in an id."""
    return _NOT_ID.sub("_", text) or "_"


def ref_problem(ref: str) -> str | None:
    """Return what is wrong with ``ref``, or None."""
    if not ref.strip():
        return "modelRef is blank"
    parts = ref.split("::")
    if len(parts) != len(_PARTS):
        return f'modelRef syntax error: "{ref}"; expected provider::apiVersion::model'
    for name, part in zip(_PARTS, parts, strict=True):
        if not is_id(part):
            return f'invalid {name}: "{part}"'
    return None


def provider_of(ref: str) -> str:
    return ref.partition("::")[0]
