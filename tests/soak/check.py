"""What the log says, held against what the clients saw."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.soak.clients import NOTICED_S, Ask, Seen

# A process that is killed has not yet written the lines of the last moment.
UNWRITTEN_S = 0.3


def log_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the outcomes in a log, and what else stands there."""
    outcomes, rest = [], []
    for line in path.read_text().splitlines():
        try:
            outcome = json.loads(line)
        except ValueError:
            rest.append(line)
        else:
            outcomes.append(outcome)
    return outcomes, rest


def compare(
    asks: Sequence[Ask],
    outcomes: Iterable[dict[str, Any]],
    *,
    may_be_lost: Callable[[float, float], bool] = lambda since_s, until_s: False,
) -> list[str]:
    """Return where the log and the clients do not agree; each request has one line.

    Args: may_be_lost: whether the lines of a connection may be missing that was open
                       from when to when, as its process was killed.
    """
    by_tag: dict[str, list[dict[str, Any]]] = {}
    ids: Counter[str] = Counter()
    for outcome in outcomes:
        by_tag.setdefault(outcome.get("client", ""), []).append(outcome)
        ids[outcome["id"]] += 1
    wrong = [f"the id {id} has {count} lines" for id, count in ids.items() if count > 1]
    for ask in asks:
        found = by_tag.pop(ask.tag, [])
        is_lost = may_be_lost(ask.connected_s, ask.ended_s + UNWRITTEN_S)
        if what := _differs(ask, found, is_lost):
            kinds = [outcome["kind"] for outcome in found]
            wrong.append(
                f"{ask.tag} ({ask.habit}, {ask.dialect.name}, {ask.model}): {what};"
                f" its client saw: {ask.seen} {ask.status}, its lines say: {kinds}"
            )
    nobodys = by_tag.keys() - {""}  # what measures has no number
    wrong += [f"lines of nobody's request: {tag!r}" for tag in sorted(nobodys)]
    return wrong


def _differs(ask: Ask, found: list[dict[str, Any]], is_lost: bool) -> str:
    if len(found) > 1:
        return "more than one line"
    if not found:
        if is_lost or _may_have_none(ask):
            return ""
        return "no line"
    line, kind = found[0], found[0]["kind"]
    if ask.id and line["id"] != ask.id:
        return "a line with another id"
    if ask.seen == "ok" and kind != "ok":
        return "said to have failed"
    if ask.seen == "error" and kind in ("ok", "client_gone"):
        return "an error that is not said to be one"
    if ask.seen == "refused" and kind not in ask.expected_kinds:
        return "refused for another reason"
    if ask.seen in ("ok", "error", "refused") and line["status"] != ask.status:
        return f"a line with the status {line['status']}"
    return ""


def _may_have_none(ask: Ask) -> bool:
    """Whether a request may have come to nothing."""
    if ask.seen == "left early":  # before the proxy had a look at it
        return ask.ended_s - ask.began_s < NOTICED_S
    return ask.seen == "refused" and not ask.expected_kinds


def longest_s(asks: Iterable[Ask]) -> float:
    """Return how long the longest reply took that no other one had to wait for."""
    took = [ask.ended_s - ask.began_s for ask in asks if not ask.follows]
    return max(took, default=0.0)


def table(rows: Iterable[Sequence[object]]) -> str:
    """Lay out rows, the first one as the heading; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def seen_table(asks: Iterable[Ask]) -> str:
    """What clients saw, by dialect."""
    asks = [ask for ask in asks if ask.seen]
    kinds: list[Seen] = ["ok", "error", "refused", "left", "left early", "cut"]
    counts = Counter((ask.dialect.name, ask.seen) for ask in asks)
    names = sorted({ask.dialect.name for ask in asks})
    rows: list[list[object]] = [["seen by clients", *kinds]]
    rows += [[name, *(counts[name, kind] for kind in kinds)] for name in names]
    totals = Counter(ask.seen for ask in asks)
    rows.append(["all", *(totals[kind] for kind in kinds)])
    return table(rows)


def kinds_table(outcomes: Iterable[dict[str, Any]]) -> str:
    """How requests ended, as the log says it."""
    counts = Counter(outcome["kind"] for outcome in outcomes)
    return table([["kind in the log", "lines"], *counts.most_common()])
