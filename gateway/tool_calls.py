"""Function calls in a model's text: the schema that forces one, and readers that find them while text streams in.

Knows neither HTTP nor OpenAI's JSON. A call that is forced is a JSON object, by grammar:

    {"name": "get_weather", "arguments": {"city": "Paris"}}

A model that is free to choose is watched for the forms in which models are trained to call: that object,
or a list of them, as the whole answer, also fenced, or behind `[TOOL_CALLS]` (Mistral) or
`<|python_tag|>` (Llama), or in `<tool_call>` blocks (Hermes, Qwen), with `arguments` or `parameters`.
Anything else, and any call of a function that was not offered, is content.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_BLOCK, _BLOCK_END = "<tool_call>", "</tool_call>"
MARKERS = (_BLOCK, "[TOOL_CALLS]", "<|python_tag|>")
CALL_TOKENS = frozenset((*MARKERS, _BLOCK_END))  # special tokens of some vocabularies
_FENCES = ("```json", "```")
_BLOCKS = re.compile(rf"{_BLOCK}(.*?)(?:{_BLOCK_END}|\Z)", re.DOTALL)
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')


@dataclass(frozen=True, slots=True)
class Content:
    """Text for people."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The next function is called."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON of the last call's arguments."""

    text: str


Piece = Content | CallBegins | Arguments


class Reader(Protocol):
    """Takes text as it comes and gives pieces as soon as they are certain."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """What is left at the end of the text."""


class ForcedCallReader:
    """Reads the one call that a grammar made; its arguments stream. A text that ends too early is content."""

    def __init__(self) -> None:
        self._head = ""
        self._is_begun = False
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False
        self._is_over = False

    def push(self, text: str) -> list[Piece]:
        if self._is_begun:
            return self._arguments(text)
        self._head += text
        match = _HEAD.match(self._head)
        if not match:
            return []
        self._is_begun = True
        rest = self._head[match.end() :]
        return [CallBegins(json.loads(match[1])), *self._arguments(rest)]

    def finish(self) -> list[Piece]:
        return [] if self._is_begun or not self._head else [Content(self._head)]

    def _arguments(self, text: str) -> list[Piece]:
        """The part of `text` that belongs to the arguments: up to the brace that closes them."""
        if self._depth == 0:
            text = text.lstrip()
        if self._is_over:
            return []
        for position, character in enumerate(text):
            if self._step(character):
                self._is_over = True
                text = text[: position + 1]
                break
        return [Arguments(text)] if text else []

    def _step(self, character: str) -> bool:
        """Whether the object ends with this character."""
        if self._is_in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._is_in_string = False
            return False
        if character == '"':
            self._is_in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


class CallDetector:
    """Watches a free text for calls of the functions `names`; from what may be one on, it holds the text back."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._is_holding = False
        self._is_begun = False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        if self._is_holding or not self._held.strip():
            return []
        if not self._is_begun and self._may_be_call():
            return []
        self._is_begun = True
        places = [place for marker in MARKERS if (place := self._held.find(marker)) >= 0]
        self._is_holding = bool(places)
        end = min(places) if places else len(self._held) - _open_marker(self._held)
        shown, self._held = self._held[:end], self._held[end:]
        return [Content(shown)] if shown else []

    def finish(self) -> list[Piece]:
        calls, rest = self._parsed(self._held)
        pieces: list[Piece] = []
        for name, arguments in calls:
            pieces += [CallBegins(name), Arguments(arguments)]
        return [*pieces, Content(rest)] if rest else pieces

    def _may_be_call(self) -> bool:
        """Whether the text so far may turn out to be nothing but calls."""
        start = self._held.lstrip()
        if start[0] in "{[" or start.startswith("```"):
            self._is_holding = True
        return self._is_holding or "```".startswith(start)

    def _parsed(self, text: str) -> tuple[list[tuple[str, str]], str]:
        """Calls and the text that is none."""
        if _BLOCK in text:
            found = [self._calls_of(block) for block in _BLOCKS.findall(text)]
            if not all(found):
                return [], text
            rest = _BLOCKS.sub("", text)
            return [call for calls in found for call in calls], rest if rest.strip() else ""
        calls = self._calls_of(text)
        return (calls, "") if calls else ([], text)

    def _calls_of(self, text: str) -> list[tuple[str, str]]:
        """Name and arguments of each call; empty when the text is not all calls."""
        text = text.strip()
        for marker in MARKERS:
            text = text.removeprefix(marker).strip()
        for fence in _FENCES:
            if text.startswith(fence):
                text = text.removeprefix(fence).removesuffix("```").strip()
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = [self._call_of(entry) for entry in (data if isinstance(data, list) else [data])]
        return [call for call in calls if call] if all(calls) else []

    def _call_of(self, entry: Any) -> tuple[str, str] | None:
        if isinstance(entry, dict) and isinstance(entry.get("function"), dict):
            entry = entry["function"]
        if not isinstance(entry, dict) or entry.get("name") not in self._names:
            return None
        arguments = entry.get("arguments", entry.get("parameters", {}))
        if isinstance(arguments, str):
            return entry["name"], arguments
        if not isinstance(arguments, dict):
            return None
        return entry["name"], json.dumps(arguments, ensure_ascii=False)


def call_schema(functions: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """The JSON schema of a call of one of `functions`, given as names and schemas of their parameters."""
    calls, definitions = [], {}
    for number, (name, parameters) in enumerate(functions.items()):
        place = f"#/$defs/function{number}"
        definitions[f"function{number}"] = _moved(parameters or {}, place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$ref": place}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    root = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**root, "$defs": definitions}


def tools_as_text(tools: Iterable[Mapping[str, Any]], *, prompt: str | None) -> str:
    """What tells a model of its tools where its chat template does not."""
    functions = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    prompt = prompt or (
        "You may call one of these functions. To call one, answer with nothing but a JSON object "
        'of the form {"name": <name of the function>, "arguments": {<its arguments>}}.'
    )
    return f"\n---\n{prompt}\n{functions}\n"


def _moved(schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A schema of parameters as a definition at `place`: an object, whose references are from the new root."""
    moved = _with_references(dict(schema), place)
    return moved if "$ref" in moved else {**moved, "type": "object"}


def _with_references(value: Any, root: str) -> Any:
    if isinstance(value, list):
        return [_with_references(item, root) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: root + item[1:]
        if key == "$ref" and isinstance(item, str) and item.startswith("#")
        else _with_references(item, root)
        for key, item in value.items()
    }


def _open_marker(text: str) -> int:
    """How many characters at the end may be the beginning of a marker."""
    sizes = [
        size
        for marker in MARKERS
        for size in range(1, min(len(marker), len(text) + 1))
        if text.endswith(marker[:size])
    ]
    return max(sizes, default=0)
