"""Read plain data (what a YAML or JSON parser returns) into Structs, and say
everything that is wrong with it at once.

``msgspec.convert`` stops at the first mistake; somebody who pastes eighty lines wants
the whole list. So the data is walked along the types first, and converted only when
nothing is wrong. Problems name keys and kinds of values, never a value: any string
that stands in the wrong place may be a secret.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import msgspec
from msgspec import inspect

T = TypeVar("T", bound=msgspec.Struct)

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_$-]+")

# bool stands before int because it is a subclass of it.
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "nothing"),
    (bool, "true or false"),
    (int, "an integer"),
    (float, "a number"),
    (str, "a string"),
    (Mapping, "a mapping"),
    ((list, tuple), "a list"),
)

# Above it JSON's numbers are not exact; infinity and NaN are not below it.
_LARGEST = 2**53


_type_info = lru_cache(inspect.type_info)


def read(data: object, shape: type[T], path: str, problems: list[str]) -> T | None:
    """Return ``data`` as a ``shape``, or None after adding to ``problems``.

    Args:    path: what the problems call the place of ``data``; "" for the top.
    """
    before = len(problems)
    plain = _Walk(problems).value(data, _type_info(shape), path)
    return msgspec.convert(plain, shape) if len(problems) == before else None


def join(path: str, key: object) -> str:
    """Return the path of ``key`` in the mapping at ``path``.

    A key with a blank in it is not shown: it tends to be a key and a value that
    somebody forgot to put a colon between, and the value may be a secret.
    """
    text = str(key)
    if _PLAIN_KEY.fullmatch(text):
        return f"{path}.{text}" if path else text
    shown = text if text.isprintable() and " " not in text else "…"
    return f'{path}["{shown}"]'


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that ``word`` is likely to mean."""
    folded = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), folded, 1, cutoff=0.7)
    return folded[close[0]] if close else None


def hint(word: str, known: Sequence[str]) -> str:
    """Return what to say of an unknown word: the likeliest known one, or all."""
    if (near := nearest(word, known)) is not None:
        return f'did you mean "{near}"?'
    return f"known: {', '.join(known) or 'none'}"


def _kind(value: object) -> str:
    unknown = f"a {type(value).__name__}"
    return next((name for types, name in _KINDS if isinstance(value, types)), unknown)


def _expected(shape: inspect.Type) -> str:
    match shape:
        case inspect.LiteralType(values):
            words = ", ".join(f'"{value}"' for value in values)
            return words if len(values) == 1 else f"one of {words}"
        case inspect.UnionType(types):
            names = [_expected(each) for each in types if not _is_none(each)]
            return " or ".join(dict.fromkeys(names))
        case inspect.IntType(gt=bound):
            return "an integer" if bound is None else f"an integer above {bound}"
        case inspect.FloatType(ge=least) if least is not None:
            return f"a number of at least {least}"
        case inspect.FloatType(gt=bound):
            return "a number" if bound is None else f"a number above {bound}"
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType():
            return "a string"
        case inspect.ListType():
            return "a list"
    return "a mapping"


def _is_none(shape: inspect.Type) -> bool:
    return isinstance(shape, inspect.NoneType)


def _accepts(shape: inspect.Type, data: object) -> bool:
    """Say whether ``data`` is at least of the kind of ``shape``."""
    match shape:
        case inspect.LiteralType() | inspect.StrType():
            return isinstance(data, str)
        case inspect.ListType():
            return isinstance(data, list | tuple)
        case inspect.StructType() | inspect.DictType():
            return isinstance(data, Mapping)
        case inspect.NoneType():
            return data is None
        case inspect.BoolType():
            return isinstance(data, bool)
    return isinstance(data, int | float) and not isinstance(data, bool)


class _Walk:
    """Each method returns the data to convert, which is only used without problems."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems

    def value(self, data: object, shape: inspect.Type, path: str) -> object:
        if isinstance(shape, inspect.UnionType):
            return self.union(data, shape, path)
        if not _accepts(shape, data):
            return self.mismatch(data, shape, path)
        match shape:
            case inspect.StructType():
                assert isinstance(data, Mapping)
                return self.struct(data, shape, path)
            case inspect.DictType():
                assert isinstance(data, Mapping)
                return self.mapping(data, shape, path)
            case inspect.ListType():
                assert isinstance(data, list | tuple)
                return self.items(data, shape, path)
            case inspect.IntType() | inspect.FloatType():
                assert isinstance(data, int | float)
                return self.number(data, shape, path)
            case inspect.LiteralType():
                return self.word(data, shape, path)
            case inspect.StrType():
                assert isinstance(data, str)
                return self.text(data, path)
        return data

    def mismatch(self, data: object, shape: inspect.Type, path: str) -> object:
        expected = _expected(shape)
        text = f"expected {expected}, got {_kind(data)}"
        if "a string" in expected and isinstance(data, int | float):
            text += "; put it in quotes"
        self.problems.append(f"{path or 'the file'}: {text}")
        return data

    def struct(
        self, data: Mapping[object, object], shape: inspect.StructType, path: str
    ) -> object:
        fields = {each.encode_name: each for each in shape.fields}
        plain: dict[object, object] = {}
        for key, value in data.items():
            if not isinstance(key, str) or key not in fields:
                self.unlisted(key, value, shape, path)
            elif value is not None:
                # null is the same as not given, as in Go, where the blocks come from.
                plain[key] = self.value(value, fields[key].type, join(path, key))
        for name, each in fields.items():
            if each.required and name not in plain:
                expected = _expected(each.type)
                self.problems.append(
                    f"{join(path, name)}: missing; expected {expected}"
                )
        if shape.tag_field is not None:
            plain[shape.tag_field] = shape.tag
        return plain

    def unlisted(
        self, key: object, value: object, shape: inspect.StructType, path: str
    ) -> None:
        if key == shape.tag_field:
            return
        known = [each.encode_name for each in shape.fields]
        if shape.tag_field is not None:
            known.append(shape.tag_field)
        # accessToken:secret is a key without a value, for want of a blank.
        is_key = value is not None and _PLAIN_KEY.fullmatch(str(key))
        at = join(path, key) if is_key else f'{path}["…"]'
        self.problems.append(f"{at}: unknown key; {hint(str(key), known)}")

    def mapping(
        self, data: Mapping[object, object], shape: inspect.DictType, path: str
    ) -> object:
        plain: dict[object, object] = {}
        for key, value in data.items():
            at = f'{path}["…"]' if value is None else join(path, key)
            if not isinstance(key, str):
                text = f"expected a string as key, got {_kind(key)}"
                self.problems.append(f"{at}: {text}")
            plain[key] = self.value(value, shape.value_type, at)
        return plain

    def items(
        self,
        data: list[object] | tuple[object, ...],
        shape: inspect.ListType,
        path: str,
    ) -> object:
        return [
            self.value(value, shape.item_type, f"{path}[{index}]")
            for index, value in enumerate(data)
        ]

    def number(
        self, data: float, shape: inspect.IntType | inspect.FloatType, path: str
    ) -> object:
        whole = isinstance(shape, inspect.IntType)
        if not abs(data) <= _LARGEST:
            text = f"expected {_expected(shape)}, got one that is too large"
            self.problems.append(f"{path}: {text}")
            return data
        if whole and data != int(data):
            return self.mismatch(data, shape, path)
        below = shape.gt is not None and data <= shape.gt
        if below or (shape.ge is not None and data < shape.ge):
            self.problems.append(f"{path}: expected {_expected(shape)}")
        # JSON knows no difference between 4000 and 4000.0.
        return int(data) if whole else data

    def word(self, data: object, shape: inspect.LiteralType, path: str) -> object:
        if data not in shape.values:
            near = nearest(str(data), map(str, shape.values))
            more = f'; did you mean "{near}"?' if near else ""
            self.problems.append(f"{path}: expected {_expected(shape)}{more}")
        return data

    def text(self, data: str, path: str) -> object:
        try:
            data.encode()
        except UnicodeEncodeError:
            self.problems.append(f"{path}: contains half of a surrogate pair")
        return data

    def union(self, data: object, shape: inspect.UnionType, path: str) -> object:
        fitting = [each for each in shape.types if _accepts(each, data)]
        if not fitting:
            return self.mismatch(data, shape, path)
        if isinstance(data, Mapping) and len(fitting) > 1:
            return self.tagged(data, fitting, path)
        return self.value(data, fitting[0], path) if data is not None else None

    def tagged(
        self, data: Mapping[object, object], shapes: list[inspect.Type], path: str
    ) -> object:
        tags = {
            str(each.tag): each
            for each in shapes
            if isinstance(each, inspect.StructType)
        }
        first = next(iter(tags.values()))
        at = join(path, first.tag_field)
        tag = data.get(first.tag_field)
        if isinstance(tag, str) and tag in tags:
            return self.struct(data, tags[tag], path)
        words = inspect.LiteralType(tuple(tags))
        if tag is None:
            self.problems.append(f"{at}: missing; expected {_expected(words)}")
            return data
        return self.value(tag, words, at)
