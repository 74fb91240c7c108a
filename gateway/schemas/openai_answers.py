"""Answers of OpenAI's routes, for /openapi.json alone: `gateway.openai_format` writes them by hand, for speed."""

from pydantic import BaseModel, Field

from gateway.schemas.openai import CalledFunction


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Found in the prefix cache.")


class Usage(BaseModel):
    """Token counts; the answer's count its end-of-sequence token."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Log-probabilities of completions: lists of equal length."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(BaseModel):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: str | None = Field(description="`stop` or `length`; null before the end.")


class CompletionAnswer(BaseModel):
    """The answer of /v1/completions, and a chunk of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class AnsweredCall(BaseModel):
    id: str
    type: str = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: str = "assistant"
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str = Field(description="`stop`, `length` or `tool_calls`.")


class ChatAnswer(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CallDelta(BaseModel):
    index: int
    id: str | None = None
    type: str | None = None
    function: dict[str, str]


class MessageDelta(BaseModel):
    role: str | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(BaseModel):
    """One event of a streamed chat; `data: [DONE]` follows the last."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorAnswer(BaseModel):
    """The body of every error under /v1, and the data of an error event there."""

    error: OpenAIError
