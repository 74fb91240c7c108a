"""Renders a model's own chat template, as transformers does, in a sandbox with limits. Knows no HTTP.

A template comes with a model, so it is code of strangers: it sees messages and tools, cannot change
them, and has a limited time and size. What it refuses by `raise_exception` is the client's error.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from time import monotonic
from typing import Any, NoReturn

from jinja2 import Template, meta, nodes
from jinja2 import TemplateError as JinjaError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import ValidationError

LONGEST_PROMPT = 4_000_000  # characters
LONGEST_S = 2.0
_LONGEST_PRODUCT = 100_000  # of `text * number`
_DEADLINE = (
    "deadline of this rendering"  # among the variables, by a name that no template can spell
)


class TemplateError(ValidationError):
    """The chat template cannot be applied to these messages."""

    kind = "template_error"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template; `variables` are the names that it reads from outside."""

    source: str
    template: Template
    variables: frozenset[str]
    bos_token: str = ""
    eos_token: str = ""

    def mentions(self, word: str) -> bool:
        """Whether a word, such as the name of a role, stands anywhere in the template."""
        return word in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt; with `continue_final_message` it ends inside the last message. Raises TemplateError."""
        values = {
            **(extra or {}),
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            _DEADLINE: monotonic() + LONGEST_S,
        }
        try:
            text = self._render(values)
        except TemplateError:
            raise
        except Exception as error:  # a template can fail with any error that Python has
            raise TemplateError(f"The chat template failed: {_in_a_line(error)}") from error
        if continue_final_message:
            return _cut_behind(text, str(messages[-1].get("content") or ""))
        return text

    def _render(self, values: dict[str, Any]) -> str:
        parts, size = [], 0
        for part in self.template.generate(values):
            _check_time(values[_DEADLINE])
            size += len(part)
            if size > LONGEST_PROMPT:
                raise TemplateError(
                    f"The chat template made more than {LONGEST_PROMPT} characters of the messages"
                )
            parts.append(part)
        return "".join(parts)


@lru_cache(maxsize=32)
def compile_template(source: str, *, bos_token: str = "", eos_token: str = "") -> ChatTemplate:
    """Compile a template; it takes milliseconds the first time. Raises TemplateError."""
    if not source:
        raise TemplateError("The model has no chat template; use /v1/completions or /generate")
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=("jinja2.ext.loopcontrols", _GenerationBlock),
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    try:
        variables = meta.find_undeclared_variables(environment.parse(source))
        template = environment.from_string(source)
    except (JinjaError, RecursionError) as error:
        raise TemplateError(f"The model's chat template is broken: {_in_a_line(error)}") from error
    return ChatTemplate(source, template, frozenset(variables), bos_token, eos_token)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Looks at the clock at every call and sum, so that no loop that does something runs for ever."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        _check_time(context.parent[_DEADLINE])
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_time(context.parent[_DEADLINE])
        if operator == "**":
            raise TemplateError("The chat template uses `**`, which is not allowed")
        if operator == "*":
            _check_product(left, right)
        if operator == "%" and isinstance(left, str):  # "%999999999d"
            raise TemplateError("The chat template formats text by `%`, which is not allowed")
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's part for training; here it is only shown."""

    tags = frozenset(("generation",))

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_time(deadline: float) -> None:
    if monotonic() > deadline:
        raise TemplateError(f"The chat template took more than {LONGEST_S:g} seconds")


def _check_product(left: Any, right: Any) -> None:
    for text, number in ((left, right), (right, left)):
        is_sequence = isinstance(text, (str, list, tuple)) and isinstance(number, int)
        if is_sequence and len(text) * number > _LONGEST_PRODUCT:
            raise TemplateError("The chat template repeats a text too often")


def _refuse(message: str) -> NoReturn:
    raise TemplateError(f"The chat template refuses the messages: {str(message)[:500]}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it for templates: not escaped for HTML, as jinja's own filter does."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _cut_behind(text: str, message: str) -> str:
    """The prompt up to the end of the last message. Templates often strip messages, so both forms are looked for."""
    place = text.rfind(message.strip()) if message.strip() else -1
    if place < 0:
        raise TemplateError(
            "The final message cannot be continued: the chat template does not show its content as "
            "it is. Set `continue_final_message` to false"
        )
    whole = message.lstrip()
    if text.startswith(whole, place):
        return text[: place + len(whole)]
    return text[: place + len(message.strip())]


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
