"""From a chat to one prompt: templates, tools, and what the model will say to it."""

from collections.abc import Sequence

import msgspec

from proxy.simulator import prose, tokens
from proxy.simulator.events import PlannedCall
from proxy.simulator.generation import Job, schema_of
from proxy.simulator.requests import (
    ChatRequest,
    Function,
    Grammar,
    Message,
    Parameters,
    Refusal,
    Tool,
    TypedChoice,
    tool_error,
)
from proxy.simulator.settings import Settings

TOOL_PROMPT = "Answer with one call of a function, as JSON.\n"


class Chat(msgspec.Struct):
    """A chat that is ready to be answered."""

    job: Job
    call: PlannedCall | None


def prepare(request: ChatRequest, settings: Settings) -> Chat | Refusal:
    """Return what is to be generated, or what TGI refuses before any stream begins."""
    if request.response_format is not None and request.tools is not None:
        return tool_error("Grammar and tools are mutually exclusive")
    offered = _offered(request)
    if isinstance(offered, Refusal):
        return offered
    messages = [(message.role, message.text) for message in request.messages]
    if offered and messages:
        messages[-1] = (messages[-1][0], messages[-1][1] + _tool_text(offered, request))
    inputs = _render(messages, settings)
    if isinstance(inputs, Refusal):
        return inputs
    call, pieces = _words(request, offered, settings)
    job = Job(
        inputs=inputs,
        parameters=_parameters(request),
        pieces=pieces,
        special=False,
        adapter=adapter_of(request.model, settings),
    )
    return Chat(job, call)


def adapter_of(model: str | None, settings: Settings) -> str | None:
    if model is None or "+" in model:  # behind the plus sign stand faults
        return None
    return None if model in ("tgi", settings.model) else model


def _parameters(request: ChatRequest) -> Parameters:
    greedy = request.temperature == 0
    penalty = request.presence_penalty
    return Parameters(
        temperature=None if greedy else request.temperature,
        do_sample=not greedy,
        # So TGI does: 0, OpenAI's "no penalty", becomes a strong one.
        repetition_penalty=None if penalty is None else penalty + 2.0,
        frequency_penalty=request.frequency_penalty,
        top_p=request.top_p,
        max_new_tokens=first_of(request.max_tokens, request.max_completion_tokens),
        stop=request.stop or [],
        seed=request.seed,
        top_n_tokens=request.top_logprobs,
        grammar=request.response_format,
        details=True,
    )


def first_of(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


# --- templates -----------------------------------------------------------------------


def _render(messages: Sequence[tuple[str, str]], settings: Settings) -> str | Refusal:
    if settings.strict_template:
        return _render_strictly(messages)
    turns = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages]
    if messages and messages[-1][0] == "assistant":
        # The last answer is not over: the model goes on with it.
        return "".join(turns).removesuffix("<|im_end|>\n").rstrip()
    return "".join(turns) + "<|im_start|>assistant\n"


def _render_strictly(messages: Sequence[tuple[str, str]]) -> str | Refusal:
    """Like the template of Mistral's first models: no system, strictly in turns."""
    prompt = "<s>"
    for index, (role, text) in enumerate(messages):
        if (role == "user") != (index % 2 == 0):
            return _template_error(
                "Conversation roles must alternate user/assistant/user/assistant/..."
            )
        if role not in ("user", "assistant"):
            return _template_error("Only user and assistant roles are supported!")
        prompt += f"[INST] {text} [/INST]" if role == "user" else f"{text}</s> "
    if messages and messages[-1][0] == "assistant":
        return prompt.removesuffix("</s> ").rstrip()
    return prompt


def _template_error(text: str) -> Refusal:
    return Refusal(
        f"Template error: syntax error: {text} (in <string>:1)", "template_error"
    )


# --- what will be said ---------------------------------------------------------------


def _words(
    request: ChatRequest, offered: Sequence[Tool], settings: Settings
) -> tuple[PlannedCall | None, list[str]]:
    question = last_question(request.messages)
    if tool := _chosen(offered, request, question):
        return _spell_call(tool.function, next_call_id(request.messages))
    if request.response_format is not None:
        return None, json_pieces(request.response_format)
    return None, spoken(prose.answer(question), settings)


def last_question(messages: Sequence[Message]) -> str:
    asked = [message.text for message in messages if message.role == "user"]
    return asked[-1] if asked else ""


def spoken(text: str, settings: Settings) -> list[str]:
    """Split a text; with ``answer_tokens``, repeat it until it has that length."""
    pieces, wanted = tokens.split(text), settings.answer_tokens
    if not wanted:
        return pieces
    return (pieces * (wanted // len(pieces) + 1))[:wanted]


def json_pieces(grammar: Grammar) -> list[str]:
    """Pieces of an answer that follows a grammar; a wrong one is refused later."""
    if grammar.type == "regex":
        return ["?"]
    try:
        return tokens.split(prose.sample_json(schema_of(grammar.value)))
    except msgspec.MsgspecError:
        return []


# --- tools ---------------------------------------------------------------------------


def _offered(request: ChatRequest) -> list[Tool] | Refusal:
    """The tools that the model may call: all, the named one, or none."""
    tools, choice = request.tools or [], request.tool_choice
    if not tools or choice == "none":
        return []
    if choice in (None, "auto", "required"):
        return tools
    name = choice.function.name if isinstance(choice, TypedChoice) else choice
    named = [tool for tool in tools if tool.function.name == name]
    return named or tool_error(f"Tool with name {name} not found")


def _chosen(
    offered: Sequence[Tool], request: ChatRequest, question: str
) -> Tool | None:
    """The first tool that the question names; if a call is required, any."""
    named = (tool for tool in offered if tool.function.name in question)
    free_choice = request.tool_choice in (None, "auto")
    return next(named, None if free_choice or not offered else offered[0])


def _tool_text(offered: Sequence[Tool], request: ChatRequest) -> str:
    listed = msgspec.json.encode(offered).decode()
    return f"\n---\n{listed}\n{request.tool_prompt or TOOL_PROMPT}"


def next_call_id(messages: Sequence[Message]) -> str:
    """TGI counts the calls of a chat; the first is "0"."""
    calls = sum(len(message.tool_calls or ()) for message in messages)
    return str(calls)


def _spell_call(function: Function, call_id: str) -> tuple[PlannedCall, list[str]]:
    """The text of a call, in TGI's grammar for it, and how it will be read."""
    arguments = _arguments(function)
    inner = arguments[1:-1]
    start = tokens.split('{"function": {"_name": "' + function.name)
    head = [*start, '",' if inner else '"']
    pieces = [*head, *tokens.split(inner), "}}"]
    call = PlannedCall(
        call_id, function.name, arguments, head=len(head), close=len(pieces) - 1
    )
    return call, pieces


def _arguments(function: Function) -> str:
    if function.schema is msgspec.UNSET:
        return "{}"
    try:
        schema = msgspec.json.decode(function.schema, type=prose.Schema)
    except msgspec.MsgspecError:
        return "{}"
    return prose.sample_json(schema) if schema.properties else "{}"
