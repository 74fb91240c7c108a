"""Bodies of TGI's own routes (v3.3.7) with our additions. Types only: which values are accepted is `gateway.validation`'s.

Parsing is strict as TGI's is (no "1" for 1), a null means "not set" wherever a field is optional, and unknown fields
are ignored. The response models are here for /openapi.json; `gateway.native_format` writes them by hand, for speed.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_SMALLEST_FLOAT32, _LARGEST_FLOAT32 = 1.1754944e-38, 3.4028234e38  # smallest: without leading zeros


class Body(BaseModel):
    """What every request body shares."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


def _null_is(default: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: default if value is None else value)


def _as_float32(value: float) -> float:
    """Workers compute in 32 bits: what is zero there is zero here, so that "strictly positive" means it."""
    return 0.0 if abs(value) < _SMALLEST_FLOAT32 else value


Switch = Annotated[bool, _null_is(False), Field(json_schema_extra={"nullable": True})]
Float32 = Annotated[
    float, Field(ge=-_LARGEST_FLOAT32, le=_LARGEST_FLOAT32), AfterValidator(_as_float32)
]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Unsigned64 = Annotated[int, Field(ge=0, le=2**64 - 1)]


class JsonGrammar(Body):
    """The answer is JSON that fits a schema."""

    type: Literal["json", "json_object"]
    value: dict[str, Any] | str = Field(description="A JSON schema, or one written as a string.")


class NamedSchema(Body):
    """A JSON schema with a name, which is only for people."""

    name: str | None = None
    value: dict[str, Any] = Field(alias="schema")


class JsonSchemaGrammar(Body):
    """The answer is JSON that fits a schema, in OpenAI's spelling."""

    type: Literal["json_schema"]
    value: NamedSchema


class RegexGrammar(Body):
    """The whole answer matches a regular expression (Rust's, without look-around)."""

    type: Literal["regex"]
    value: str = Field(examples=["[A-Z][a-z]+"])


class LarkGrammar(Body):
    """The answer follows a Lark grammar, in llguidance's dialect."""

    type: Literal["lark"]
    value: str


AnyGrammar = Annotated[
    JsonGrammar | JsonSchemaGrammar | RegexGrammar | LarkGrammar, Field(discriminator="type")
]


class GenerateParameters(Body):
    """How to generate. Everything may be left out; the default is greedy decoding up to the model's limit."""

    best_of: Int32 | None = Field(
        None,
        description="Generate this many sequences and return the most likely one. Needs sampling.",
    )
    temperature: Float32 | None = Field(
        None,
        description="Divides the logits; > 0. A value other than 1 turns sampling on.",
        examples=[0.7],
    )
    repetition_penalty: Float32 | None = Field(
        None, description="1 is none; > 0. Covers prompt and answer.", examples=[1.03]
    )
    frequency_penalty: Float32 | None = Field(
        None,
        description="-2 to 2; subtracted from a token's logit once for each time it was generated.",
    )
    presence_penalty: Float32 | None = Field(
        None,
        description="-2 to 2; subtracted once from the logit of every token that was generated.",
    )
    top_k: Int32 | None = Field(None, description="Sample among the k most likely tokens; > 0.")
    top_p: Float32 | None = Field(
        None, description="Sample among the tokens that make up this probability; > 0 and < 1."
    )
    typical_p: Float32 | None = Field(None, description="Locally typical sampling; > 0 and < 1.")
    min_p: Float32 | None = Field(
        None, description="Drop tokens less likely than this share of the likeliest; 0 to 1."
    )
    do_sample: Switch = Field(False, description="Sample instead of taking the likeliest token.")
    seed: Unsigned64 | None = Field(
        None, description="Makes sampling repeatable. Drawn when absent."
    )
    max_new_tokens: Int32 | None = Field(
        None,
        description="Longest answer in tokens; default: what the model's limit leaves.",
        examples=[32],
    )
    min_new_tokens: Int32 | None = Field(
        None, description="No end of sequence before this many tokens."
    )
    ignore_eos_token: Switch = Field(False, description="Go on after an end-of-sequence token.")
    stop: Annotated[list[str], _null_is([]), Field(json_schema_extra={"nullable": True})] = Field(
        default_factory=list, description="Texts that end the answer."
    )
    include_stop: bool | None = Field(
        None, description="Keep the stop text in the answer; default true, as TGI does."
    )
    truncate: Int32 | None = Field(None, description="Keep only the last n tokens of the prompt.")
    return_full_text: bool | None = Field(None, description="Put the prompt before the answer.")
    details: Switch = Field(
        False, description="Return tokens, log-probabilities and the finish reason."
    )
    decoder_input_details: Switch = Field(
        False,
        description="Return log-probabilities of the prompt; turns `details` on. Not for streams.",
    )
    top_n_tokens: Int32 | None = Field(
        None, description="Return the n likeliest tokens at every position."
    )
    logit_bias: dict[str, Float32] | None = Field(
        None,
        description="Added to the logits, by token id; -100 to 100.",
        examples=[{"50256": -100}],
    )
    watermark: Switch = Field(
        False, description="Mark the answer so that a detector recognizes it (Kirchenbauer 2023)."
    )
    grammar: AnyGrammar | None = Field(None, description="What the answer must look like.")
    adapter_id: str | None = Field(None, description="Not supported; refused when set.")


class GenerateBody(Body):
    """A prompt and how to continue it."""

    inputs: str = Field(description="The prompt.", examples=["The capital of France is"])
    parameters: Annotated[GenerateParameters, _null_is({})] = Field(
        default_factory=GenerateParameters
    )
    model: str | None = Field(
        None, description="One of GET /v1/models; may be left out when one is served."
    )
    priority: int | None = Field(
        None, ge=0, le=2, description="0 is served first, 2 last; default 1."
    )


class CompatBody(GenerateBody):
    """The body of `POST /`."""

    stream: Switch = Field(False, description="Answer as server-sent events.")


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


class ErrorAnswer(BaseModel):
    """The body of every error, and the data of an error event."""

    error: str
    error_type: str


class ModelEntry(BaseModel):
    """A model in GET /v1/models."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str


class ModelList(BaseModel):
    """What is served."""

    object: str = "list"
    data: list[ModelEntry]
