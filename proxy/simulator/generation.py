"""From a prompt and its parameters to tokens: TGI's limits, in TGI's order.

No clock and no socket: the same prompt and parameters give the same generation.

Source: https://github.com/huggingface/text-generation-inference, router/src/validation.rs
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

import msgspec

from proxy.simulator import prose, tokens
from proxy.simulator.requests import OVERLOADED, Parameters, Refusal, invalid
from proxy.simulator.settings import Settings
from proxy.simulator.tokens import Token

Finish: TypeAlias = Literal["length", "eos_token", "stop_sequence"]


class Job(msgspec.Struct, kw_only=True):
    """One text to generate.

    ``pieces`` is what the model would say if nothing stopped it. ``special`` says
    whether the tokeniser puts a start token before the prompt, which then counts.
    """

    inputs: str
    parameters: Parameters
    pieces: list[str]
    special: bool = True
    adapter: str | None = None


class Generation(msgspec.Struct, kw_only=True):
    """What was generated; the last token may be the special end token."""

    tokens: list[Token]
    finish: Finish
    input_length: int
    seed: int | None

    @property
    def text(self) -> str:
        """The text as TGI gives it at the end: without special tokens."""
        return "".join(token.text for token in self.tokens if not token.special)


Result: TypeAlias = Generation | Refusal


def generate(job: Job, settings: Settings, *, free: bool = True) -> Result:
    """Return the tokens of a job or why there are none.

    Args: free: whether the server has room for one more request.
    """
    if not free:
        return OVERLOADED  # said before anything is checked
    length = tokens.count(job.inputs) + job.special
    if refusal := check(job, length, settings):
        return refusal
    return _run(job, length, settings)


def _run(job: Job, length: int, settings: Settings) -> Generation:
    given = job.parameters.max_new_tokens
    limit = settings.max_total_tokens - length if given is None else given
    produced: list[Token] = []
    finish: Finish = "eos_token"
    stops = _Stops(job.parameters.stop)
    for piece in job.pieces:
        produced.append(tokens.make(piece))
        if stops.reached(piece):
            finish = "stop_sequence"
            break
        if len(produced) == limit:
            finish = "length"
            break
    else:
        produced.append(tokens.END_TOKEN)
    seed = job.parameters.seed if job.parameters.do_sample else None
    return Generation(tokens=produced, finish=finish, input_length=length, seed=seed)


class _Stops:
    """A stop text counts only where a token ends with it, as in TGI."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._keep = max(map(len, self._stops), default=0)
        self._tail = ""

    def reached(self, piece: str) -> bool:
        if not self._stops:
            return False
        self._tail = (self._tail + piece)[-self._keep :]
        return self._tail.endswith(self._stops)


# --- limits --------------------------------------------------------------------------


def check(job: Job, length: int, settings: Settings) -> Refusal | None:
    """Return the first thing that is wrong with a job."""
    parameters = job.parameters
    for text in _faults(job, length, parameters, settings):
        return invalid(text)
    if job.adapter is not None and settings.unknown_adapter == "error":
        text = f"Request failed during generation: unknown adapter {job.adapter!r}"
        return Refusal(text, "generation", 424)
    return None


def _faults(
    job: Job, length: int, parameters: Parameters, settings: Settings
) -> Iterator[str]:
    yield from _sampling_faults(parameters)
    for name, fits, text in _RANGES:
        value = getattr(parameters, name)
        if value is not None and not fits(value):
            yield text
    yield from _count_faults(parameters, settings)
    if not job.inputs:
        yield "`inputs` cannot be empty"
    yield from _length_faults(parameters, length, settings)
    yield from _grammar_faults(parameters)


def _sampling_faults(parameters: Parameters) -> Iterator[str]:
    sampled = ("temperature", "top_k", "top_p", "typical_p")
    sampling = parameters.do_sample or any(
        getattr(parameters, name) is not None for name in sampled
    )
    if (parameters.best_of or 1) > 1 and not sampling:
        yield "you must use sampling when `best_of` is > 1"


_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("temperature", lambda x: x > 0, "`temperature` must be strictly positive"),
    (
        "repetition_penalty",
        lambda x: x > 0,
        "`repetition_penalty` must be strictly positive",
    ),
    (
        "frequency_penalty",
        lambda x: -2 <= x <= 2,
        "`frequency_penalty` must be >= -2.0 and <= 2.0",
    ),
    ("top_p", lambda x: 0 < x < 1, "`top_p` must be > 0.0 and < 1.0"),
    ("typical_p", lambda x: 0 < x < 1, "`typical_p` must be > 0.0 and < 1.0"),
    ("top_k", lambda x: x > 0, "`top_k` must be strictly positive"),
    ("max_new_tokens", lambda x: x > 0, "`max_new_tokens` must be strictly positive"),
)


def _count_faults(parameters: Parameters, settings: Settings) -> Iterator[str]:
    most, given = settings.max_stop_sequences, len(parameters.stop)
    if given > most:
        yield f"`stop` supports up to {most} stop sequences. Given: {given}"
    if parameters.seed is not None and (parameters.best_of or 1) > 1:
        yield "`seed` must not be set when `best_of` > 1"
    top, most = parameters.top_n_tokens or 0, settings.max_top_n_tokens
    if top > most:
        yield f"`top_n_tokens` must be >= 0 and <= {most}. Given: {top}"


def _length_faults(
    parameters: Parameters, length: int, settings: Settings
) -> Iterator[str]:
    most, truncate = settings.max_input_tokens, parameters.truncate
    if truncate is not None and not 0 < truncate <= most:
        yield (
            "`truncate` must be strictly positive and less than"
            f" {most}. Given: {truncate}"
        )
    length = min(length, truncate or length)
    new = parameters.max_new_tokens or 0
    if length + new > settings.max_total_tokens:
        yield (
            "`inputs` tokens + `max_new_tokens` must be <="
            f" {settings.max_total_tokens}. Given: {length} `inputs` tokens and"
            f" {new} `max_new_tokens`"
        )
    if length > most:
        yield f"`inputs` must have less than {most} tokens. Given: {length}"


def _grammar_faults(parameters: Parameters) -> Iterator[str]:
    grammar = parameters.grammar
    if grammar is None or grammar.type == "regex":
        return
    try:
        schema = schema_of(grammar.value)
    except msgspec.MsgspecError as error:
        yield f"grammar is not valid: {error}"
        return
    if schema.properties is msgspec.UNSET:
        yield "grammar is not valid: Grammar must have a 'properties' field"


class _Named(msgspec.Struct):
    """``json_schema`` grammars have their schema one level deeper."""

    schema: msgspec.Raw


def schema_of(value: msgspec.Raw) -> prose.Schema:
    """Read the schema of a grammar: an object, JSON text of one, or a named one.

    Raises: msgspec.MsgspecError: it is none.
    """
    raw: bytes | msgspec.Raw = value
    if bytes(raw).lstrip().startswith(b'"'):
        raw = msgspec.json.decode(raw, type=str).encode()
    with contextlib.suppress(msgspec.ValidationError):
        raw = msgspec.json.decode(raw, type=_Named).schema
    return msgspec.json.decode(raw, type=prose.Schema)
