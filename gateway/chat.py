"""From a conversation to a prompt: what the chat template is given, and which functions may be called.

Knows bodies and templates; no HTTP, no tokens.
"""

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from common.errors import ValidationError
from common.messages import Grammar, ModelCard
from gateway.chat_template import ChatTemplate, compile_template
from gateway.json_schema import schema_grammar
from gateway.schemas.openai import ChatBody, Message, NamedTool, ToolBody
from gateway.tool_calls import CallDetector, ForcedCallReader, Reader, call_schema, tools_as_text


class ToolChoice(Enum):
    """Who decides whether a function is called."""

    NONE = "none"
    AUTO = "auto"  # the model
    REQUIRED = "required"  # the client, that one is called
    NAMED = "named"  # the client, which one is called


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions that an answer may call."""

    tools: tuple[ToolBody, ...] = ()
    choice: ToolChoice = ToolChoice.NONE

    @property
    def is_forced(self) -> bool:
        return self.choice in (ToolChoice.REQUIRED, ToolChoice.NAMED)

    def grammar(self) -> Grammar | None:
        """What makes a forced answer a call."""
        if not self.is_forced:
            return None
        functions = {tool.function.name: tool.function.parameters for tool in self.tools}
        return schema_grammar(call_schema(functions))

    def reader(self) -> Reader | None:
        """A reader for one answer; None when all of it is content."""
        if self.is_forced:
            return ForcedCallReader()
        if self.choice is ToolChoice.AUTO:
            return CallDetector(tool.function.name for tool in self.tools)
        return None


def tool_use_of(body: ChatBody) -> ToolUse:
    """Which functions may be called. Raises ValidationError."""
    tools, given = tuple(body.tools or ()), body.tool_choice
    name = given.function.name if isinstance(given, NamedTool) else given
    if not tools:
        if name in (None, "none", "auto"):
            return ToolUse()
        raise ValidationError("`tool_choice` needs `tools`; there are none", param="tool_choice")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValidationError("`tools` must have different names", param="tools")
    is_named = isinstance(given, NamedTool) or name not in (None, "none", "auto", "required")
    if is_named and name in names:
        return ToolUse((tools[names.index(name)],), ToolChoice.NAMED)  # TGI: also by the bare name
    if is_named:
        raise ValidationError(
            "`tool_choice` must be `none`, `auto`, `required` or one of `tools`: "
            f"{', '.join(names)}. Given: {name}",
            param="tool_choice",
        )
    return ToolUse(tools, ToolChoice(name or "auto"))


def chat_prompt(body: ChatBody, card: ModelCard, use: ToolUse) -> str:
    """The prompt, special tokens included. Blocks for a while with long conversations.

    Raises TemplateError, and ValidationError for what no template could show.
    """
    template = compile_template(
        card.chat_template, bos_token=card.bos_token, eos_token=card.eos_token
    )
    if not body.messages:
        raise ValidationError("`messages` cannot be empty", param="messages")
    messages = [_template_message(message, template) for message in body.messages]
    last = body.messages[-1]
    continues = body.continue_final_message
    if continues is None:
        can_continue = last.role == "assistant" and not last.tool_calls
        has_text = bool(messages[-1]["content"].strip())
        continues = can_continue and has_text and not body.add_generation_prompt
    if continues and body.add_generation_prompt:
        raise ValidationError(
            "`continue_final_message` and `add_generation_prompt` cannot both be true",
            param="continue_final_message",
        )
    begins = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    return template.render(
        _with_tools(messages, body, template, use),
        tools=_template_tools(use),
        extra=_variables(body),
        add_generation_prompt=begins,
        continue_final_message=continues,
    )


def _variables(body: ChatBody) -> dict[str, Any]:
    """What the client gives the template besides the conversation; TGI has a field for `guideline`."""
    given = body.chat_template_kwargs or {}
    return given if body.guideline is None else {**given, "guideline": body.guideline}


def _template_message(message: Message, template: ChatTemplate) -> dict[str, Any]:
    """A message as templates expect it: content as one text, arguments as an object."""
    shown: dict[str, Any] = {"role": message.role, "content": _text_of(message)}
    if message.role == "developer" and not template.mentions("developer"):
        shown["role"] = "system"  # what the developer's role replaces in OpenAI's newer models
    if message.name is not None:
        shown["name"] = message.name
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return shown


def _text_of(message: Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    if message.content is None and not message.tool_calls and message.role != "assistant":
        raise ValidationError(
            f"`messages` of the role {message.role} must have a `content`", param="messages"
        )
    return message.content or ""


def _arguments(given: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        arguments = json.loads(given or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValidationError(
            f"`messages`: the `arguments` of a tool call must be a JSON object. Given: {given[:100]}",
            param="messages",
        )
    return arguments


def _template_tools(use: ToolUse) -> list[dict[str, Any]] | None:
    if use.choice is ToolChoice.NONE:
        return None
    return [_shown_tool(tool) for tool in use.tools]


def _shown_tool(tool: ToolBody) -> dict[str, Any]:
    function = tool.function
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or {"type": "object", "properties": {}},
        },
    }


def _with_tools(
    messages: list[dict[str, Any]], body: ChatBody, template: ChatTemplate, use: ToolUse
) -> list[dict[str, Any]]:
    """Where the template shows no tools, they stand behind the last message of the user, as in TGI."""
    tools = _template_tools(use)
    if not tools or "tools" in template.variables:
        return messages
    text = tools_as_text(tools, prompt=body.tool_prompt)
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        raise ValidationError("`tools` need a message of the role user", param="messages")
    place = places[-1]
    changed = {**messages[place], "content": messages[place]["content"] + text}
    return [*messages[:place], changed, *messages[place + 1 :]]
