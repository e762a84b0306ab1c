"""What the simulated model says: pleasant, short, and the same for the same prompt.

Every answer has characters outside ASCII, because that is where streams break.
"""

import re
import zlib

import msgspec

QUOTED = 60  # characters of the question that are repeated

_CLOSINGS = (
    "The path to me works, though — even for “é”, 日本語 and 🙂.",
    "Put a real model in my place and you will get a real answer… ¡adiós!",
    "What you see arrive here, token by token, is the façade – the wiring is real ✓.",
)


def answer(question: str) -> str:
    """A sentence or two in reply to a question."""
    lines = question.strip().splitlines() or ["…"]
    beginning = lines[0][:QUOTED].rstrip()
    dots = "…" if beginning != question.strip() else ""
    closing = _CLOSINGS[zlib.crc32(question.encode(errors="replace")) % len(_CLOSINGS)]
    return (
        "I am a simulator, not a model, so I can only tell you that you asked:"
        f" “{beginning}{dots}” {closing}"
    )


# The part before the hole, in the formats of StarCoder, Qwen, DeepSeek, Code Llama and
# Codestral; without any marker the whole prompt is that part.
_BEFORE_HOLE = re.compile(
    r"(?:<\|?fim_prefix\|?>|<｜fim▁begin｜>|<PRE> ?|\[PREFIX\])"
    r"(.*?)"
    r"(?:<\|?fim_suffix\|?>|<｜fim▁hole｜>| ?<SUF>|\Z)",
    re.DOTALL,
)

# What the last line looks like, and how it goes on; {indent} is that line's own.
_CONTINUATIONS = (
    (r"^\s*$", "return value  # naïve, but it works\n"),
    (
        r"\bdef +\w*$",
        "(value):\n{indent}    # naïve, but it works\n{indent}    return value\n",
    ),
    (r":\s*$", "\n{indent}    result = []  # naïve\n{indent}    return result\n"),
    (
        r"\{\s*$",
        "\n{indent}    const result = []; // naïve\n{indent}    return result;\n{indent}}}\n",
    ),
    (r"\($", "value)  # → simulated\n"),
    (r"\.$", "append(value)  # ✓ simulated\n"),
    (r"=\s*$", " compute(value)  # → simulated\n"),
    (r"^\s*(?:#|//)", "\n{indent}value = 42  # ¿why not?\n"),
)
_ANYTHING_ELSE = '\n{indent}print("héllo, wörld")  # simulated\n'


def code(prompt: str) -> str:
    """Some lines that could follow the prompt."""
    hole = _BEFORE_HOLE.search(prompt)
    before = hole[1] if hole else prompt
    line = before.rpartition("\n")[2]
    indent = line[: len(line) - len(line.lstrip())]
    for looks, template in _CONTINUATIONS:
        if re.search(looks, line):
            return template.format(indent=indent)
    return _ANYTHING_ELSE.format(indent=indent)


_MARKS = re.compile(r"\[/?INST\]|<\|\w+\|>|</?s>")
_CONVERSATION = re.compile(
    r"\[INST\]|<\|im_start\|>|<\|user\|>|\b(?:Human|User): |\?\s*$"
)


def continuation(prompt: str) -> str:
    """What follows a bare prompt: an answer if it looks like a question, else code."""
    if _CONVERSATION.search(prompt):
        return answer(_MARKS.sub("", prompt))
    return code(prompt)


# --- what must have a shape ----------------------------------------------------------


class Schema(msgspec.Struct):
    """As much of JSON schema as it takes to make something up."""

    type: str | list[str] = "string"
    properties: dict[str, "Schema"] | msgspec.UnsetType = msgspec.UNSET
    enum: list[msgspec.Raw] = []


_SAMPLES: dict[str, object] = {
    "string": "simulé",
    "integer": 42,
    "number": 0.5,
    "boolean": True,
    "null": None,
    "array": [],
}


def sample(schema: Schema) -> object:
    """A value that fits the schema, or nearly."""
    if schema.enum:
        return schema.enum[0]
    if schema.properties:
        return {name: sample(part) for name, part in schema.properties.items()}
    kind = schema.type if isinstance(schema.type, str) else schema.type[0]
    return _SAMPLES.get(kind, {})


def sample_json(schema: Schema) -> str:
    return msgspec.json.encode(sample(schema)).decode()
