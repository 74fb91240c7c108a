"""Bodies of OpenAI's routes, with the extras of TGI and vLLM that clients send. Types only: rules are
`gateway.openai_validation`'s.

A null means "not set". A field that OpenAI does not know is an error, as it is there; one that OpenAI
knows and we cannot serve has the type `Unsupported` and is refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from gateway.schemas.native import (
    AT_LEAST_0,
    PENALTY,
    POSITIVE,
    UNIT,
    Body,
    FirstWrong,
    Float32,
    Int32,
    Text,
    Texts,
)

UNSUPPORTED_PART = "unsupported_part"  # pydantic's name of an error that is told as it is

AnyInt64 = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], FirstWrong()]
Unsupported = Annotated[Any, Field(json_schema_extra={"deprecated": True})]


class StrictBody(Body):
    """A body whose unknown fields are errors."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, populate_by_name=True
    )


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = Field(None, description="Send the token counts in a last chunk.")


class CommonBody(StrictBody):
    """What completions and chat share."""

    model: str | None = Field(
        None, description="One of GET /v1/models; may be left out when one is served."
    )
    stream: bool | None = Field(None, description="Answer as server-sent events.")
    stream_options: StreamOptions | None = None
    n: Int32 | None = Field(
        None,
        description="How many answers to a prompt; default 1.",
        json_schema_extra={"minimum": 1, "maximum": 128},
    )
    temperature: Float32 | None = Field(
        None,
        description="0 to 2; 0 takes the likeliest token. Default 1.",
        json_schema_extra={"minimum": 0, "maximum": 2},
    )
    top_p: Float32 | None = Field(
        None,
        description="Sample among the tokens that make up this probability; default 1.",
        json_schema_extra=UNIT,
    )
    frequency_penalty: Float32 | None = Field(
        None, description="-2 to 2.", json_schema_extra=PENALTY
    )
    presence_penalty: Float32 | None = Field(
        None, description="-2 to 2.", json_schema_extra=PENALTY
    )
    logit_bias: dict[str, Float32] | None = Field(
        None, description="Added to the logits, by token id; -100 to 100."
    )
    stop: Text | Texts | None = Field(
        None, description="Texts that end the answer and are cut from it."
    )
    seed: AnyInt64 | None = Field(None, description="Makes sampling repeatable.")
    user: str | None = Field(None, description="Accepted; has no effect.")
    # extras of vLLM and TGI
    top_k: Int32 | None = Field(
        None,
        description="Extra: sample among the k likeliest; 0, -1: all.",
        json_schema_extra={"minimum": -1},
    )
    min_p: Float32 | None = Field(None, description="Extra: 0 to 1.", json_schema_extra=UNIT)
    repetition_penalty: Float32 | None = Field(
        None, description="Extra: > 0; 1 is none.", json_schema_extra=POSITIVE
    )
    min_tokens: Int32 | None = Field(
        None, description="Extra: no end before this many tokens.", json_schema_extra=AT_LEAST_0
    )
    ignore_eos: bool | None = Field(None, description="Extra: go on after an end of sequence.")
    include_stop_str_in_output: bool | None = Field(
        None, description="Extra: leave the stop text in the answer."
    )
    priority: Int32 | None = Field(
        None, ge=0, le=2, description="Extra: 0 is served first, 2 last; default 1."
    )


class CompletionBody(CommonBody):
    """A prompt and how to continue it."""

    prompt: (
        str
        | Annotated[list[str], FirstWrong()]
        | TokenIds
        | Annotated[list[TokenIds], FirstWrong()]
    ) = Field(
        description="A text, token ids, or a list of either.", examples=["The capital of France is"]
    )
    max_tokens: Int32 | None = Field(
        None, description="Longest answer in tokens; default 16.", examples=[16]
    )
    best_of: Int32 | None = Field(
        None, description="Generate this many answers and give the `n` most likely."
    )
    echo: bool | None = Field(None, description="Put the prompt before the answer.")
    logprobs: Int32 | None = Field(
        None, description="Give log-probabilities, and this many alternatives at every position."
    )
    suffix: str | None = Field(None, description="Not supported; refused when set.")


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, given: Any) -> Any:
        if isinstance(given, str) and given != "text":
            raise PydanticCustomError(
                UNSUPPORTED_PART,
                "`content` parts of type `{type}` are not supported; this model takes text",
                {"type": given[:50]},
            )
        return given


class CalledFunction(Body):
    """What the assistant called."""

    name: str
    arguments: str | dict[str, Any] = Field(description="JSON.")


class ToolCallBody(Body):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(examples=["user"])
    content: str | Annotated[list[TextPart], FirstWrong()] | None = Field(
        None, examples=["What is the capital of France?"]
    )
    name: str | None = None
    tool_calls: Annotated[list[ToolCallBody], FirstWrong()] | None = None
    tool_call_id: str | None = None


class FunctionBody(Body):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = Field(None, description="Has no effect: forced calls always fit.")

    @model_validator(mode="before")
    @classmethod
    def _tgi_name(cls, data: Any) -> Any:
        """TGI calls the parameters `arguments`, too."""
        if isinstance(data, dict) and "arguments" in data and "parameters" not in data:
            return {**data, "parameters": data["arguments"]}
        return data


class ToolBody(Body):
    """A tool that the model may use."""

    type: Literal["function"] = "function"
    function: FunctionBody


class FunctionName(Body):
    name: str


class NamedTool(Body):
    """The tool that the model must use."""

    type: Literal["function"] = "function"
    function: FunctionName


class NamedJsonSchema(Body):
    """OpenAI's `json_schema`."""

    name: str | None = None
    description: str | None = None
    value: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must look like: OpenAI's shapes, and TGI's with `value`."""

    type: Literal["text", "json_object", "json_schema", "json", "regex", "lark"]
    json_schema: NamedJsonSchema | None = None
    value: dict[str, Any] | str | None = Field(
        None, description="TGI: a JSON schema, `{name, schema}`, or an expression."
    )


class ChatBody(CommonBody):
    """A conversation and how to answer it."""

    messages: Annotated[list[Message], FirstWrong()] = Field(
        examples=[[{"role": "user", "content": "What is the capital of France?"}]]
    )
    max_tokens: Int32 | None = Field(
        None, description="Longest answer in tokens; default: what the model's limit leaves."
    )
    max_completion_tokens: Int32 | None = Field(
        None, description="The newer name of `max_tokens`.", examples=[32]
    )
    logprobs: bool | None = Field(None, description="Give log-probabilities.")
    top_logprobs: Int32 | None = Field(
        None, description="Alternatives at every position; needs `logprobs`."
    )
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolBody], FirstWrong()] | None = None
    tool_choice: str | NamedTool | None = Field(
        None, description="`none`, `auto`, `required`, or a function that must be called."
    )
    tool_prompt: str | None = Field(
        None, description="TGI: put before the tools where the chat template shows none."
    )
    guideline: str | None = Field(
        None, description="TGI: a variable for the chat template, such as a policy to judge by."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Accepted; a forced answer is always one call."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Extra: begin the assistant's turn; default: unless one is continued."
    )
    continue_final_message: bool | None = Field(
        None,
        description="Extra: go on with the last message; default, as in TGI: if it is the assistant's.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Extra: variables for the chat template."
    )
    # hints that change nothing in an answer
    metadata: dict[str, Any] | None = Field(None, description="Accepted; has no effect.")
    safety_identifier: str | None = Field(None, description="Accepted; has no effect.")
    prompt_cache_key: str | None = Field(
        None, description="Accepted; prefixes are cached by themselves."
    )
    # what OpenAI has and we have not
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    modalities: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    service_tier: Unsupported = None
    store: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
