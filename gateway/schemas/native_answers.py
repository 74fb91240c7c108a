"""Answers of TGI's own routes, for /openapi.json alone: `gateway.native_format` writes them by hand, for speed."""

from pydantic import BaseModel, Field, RootModel


class TokenBody(BaseModel):
    """A generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillTokenBody(BaseModel):
    """A token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class BestOfSequenceBody(BaseModel):
    """A sequence that `best_of` did not choose."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillTokenBody]
    tokens: list[TokenBody]
    top_tokens: list[list[TokenBody]] = []


class DetailsBody(BaseModel):
    """How an answer came about."""

    finish_reason: str = Field(description="`length`, `eos_token` or `stop_sequence`.")
    generated_tokens: int
    seed: int | None = Field(description="Null for greedy decoding.")
    prefill: list[PrefillTokenBody]
    tokens: list[TokenBody]
    best_of_sequences: list[BestOfSequenceBody] | None = None
    top_tokens: list[list[TokenBody]] | None = None


class GenerateAnswer(BaseModel):
    """The whole answer; `details` only when asked for."""

    generated_text: str
    details: DetailsBody | None = None


class StreamDetailsBody(BaseModel):
    """In the last event of a stream, when asked for."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamEvent(BaseModel):
    """One event of a stream: `id: <request id>:<index>-<chain hash>` and `data: <this>`."""

    index: int = Field(description="Counts from 1.")
    token: TokenBody
    top_tokens: list[TokenBody] | None = None
    generated_text: str | None = Field(description="The whole answer, in the last event.")
    details: StreamDetailsBody | None


class TokenSpan(BaseModel):
    """A token of a prompt, and where in the text it stands (in characters)."""

    id: int
    text: str
    start: int
    stop: int


class RequestAnswer(BaseModel):
    """A request by its id. Times are Unix seconds by the broker's clock."""

    id: str
    model: str
    state: str = Field(description="queued, running, finished, cancelled or failed.")
    attempts: int = Field(description="How many workers have begun or taken it over.")
    prompt_tokens: int
    generated_tokens: int = Field(description="So far.")
    max_new_tokens: int
    priority: int
    on_disconnect: str = Field(description="cancel, grace or run.")
    created_at: float
    deadline_at: float
    finish_reason: str | None
    error: str | None
    error_type: str | None
    cancelled: bool | None = Field(None, description="Only of DELETE: whether it was still live.")


class RequestSequences(BaseModel):
    """A request with `n` or `best_of` above 1 by its id."""

    id: str
    sequences: list[RequestAnswer]


class RequestStateAnswer(RootModel[RequestAnswer | RequestSequences]):
    """A request by its id, or each of its sequences."""


class ErrorAnswer(BaseModel):
    """The body of every error, and the data of an error event."""

    error: str
    error_type: str
