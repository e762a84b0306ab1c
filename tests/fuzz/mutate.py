"""Changes of JSON that leave it JSON: a mutation of its bytes seldom does."""

import json
import random
from collections.abc import Callable
from typing import Any

_ODD: list[Any] = [
    *(None, True, False, 0, -1, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**400),
    *(float("nan"), float("inf"), "", " ", "\0", "\n", "\ud800", "\ufeff", "🤖"),
    *("x" * 2000, "${A}", "-1", "1", "null", "a::b::c", "http://[", [], {}, [None]),
    *([[]], {"": None}, {"type": None}, {"text": ""}, {"role": "user"}, [""], [{}]),
]


def mutate(data: bytes, rng: random.Random) -> bytes | None:
    """Return JSON with one to four changes; None if ``data`` is no JSON."""
    try:
        return _changed(json.loads(data), rng)
    except (ValueError, RecursionError, OverflowError):  # or what became of it is none
        return None


def _changed(value: Any, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        places = list(_places(value))
        if not places:
            return json.dumps(rng.choice(_ODD)).encode()
        container, key = rng.choice(places)
        rng.choice(_CHANGES)(container, key, value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return all values within, each as its container and its key there."""
    found, left = [], [value]
    while left:
        container = left.pop()
        keys = (
            list(container)
            if isinstance(container, dict)
            else range(len(container))
            if isinstance(container, list)
            else ()
        )
        found += [(container, key) for key in keys]
        left += [container[key] for key in keys]
    return found


def _replace(container: Any, key: Any, root: Any, rng: random.Random) -> None:
    container[key] = _copy(rng.choice(_ODD))


def _remove(container: Any, key: Any, root: Any, rng: random.Random) -> None:
    del container[key]


def _move(container: Any, key: Any, root: Any, rng: random.Random) -> None:
    other, name = rng.choice(_places(root))
    container[key] = _copy(other[name])


def _repeat(container: Any, key: Any, root: Any, rng: random.Random) -> None:
    if isinstance(container, list):
        container.insert(rng.randint(0, len(container)), _copy(container[key]))
    else:
        container[f"{key}{rng.choice(['', '_', '2'])}"] = [container[key]]


def _nest(container: Any, key: Any, root: Any, rng: random.Random) -> None:
    value = container[key]
    for _ in range(rng.choice([1, 2, 100, 500])):
        value = [value] if rng.random() < 0.5 else {str(key): value}
    container[key] = value


def _edit(container: Any, key: Any, root: Any, rng: random.Random) -> None:
    value = container[key]
    if isinstance(value, str):
        at = rng.randint(0, len(value))
        piece = rng.choice(
            ["", "\0", "\ud83d", "\r\n", ":", "\\", '"', "é", "::", "${"]
        )
        container[key] = value[:at] + piece + value[at + rng.randint(0, 2) :]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        container[key] = rng.choice([-value, value + 1, str(value), float(value)])


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


_CHANGES: list[Callable[[Any, Any, Any, random.Random], None]] = [
    *(_replace, _replace, _remove, _move, _repeat, _nest, _edit, _edit)
]
