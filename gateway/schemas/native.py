"""Bodies of TGI's own routes (v3.3.7) with our additions. Types only: which values are accepted is `gateway.validation`'s.

Parsing is strict as TGI's is (no "1" for 1), a null means "not set" wherever a field is optional, and unknown fields
are ignored. Answers are in native_answers.py.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import core_schema

_SMALLEST_FLOAT32, _LARGEST_FLOAT32 = 1.1754944e-38, 3.4028234e38  # smallest: without leading zeros


# For the schema alone: `gateway.validation` holds the rules, because its messages are TGI's.
POSITIVE = {"exclusiveMinimum": 0}
SHARE = {"exclusiveMinimum": 0, "exclusiveMaximum": 1}
UNIT = {"minimum": 0, "maximum": 1}
PENALTY = {"minimum": -2, "maximum": 2}
AT_LEAST_0 = {"minimum": 0}


class Body(BaseModel):
    """What every request body shares."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


@dataclass(frozen=True, slots=True)
class NullIs:
    """Of a field that is never None: a null means this value, and the schema says that it may be null."""

    value: Any

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        fill = core_schema.no_info_before_validator_function(self._fill, handler(source))
        fill["metadata"] = {"pydantic_js_functions": [self._schema]}
        return fill

    def _fill(self, given: Any) -> Any:
        return self.value if given is None else given

    @staticmethod
    def _schema(schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "null"}]}


@dataclass(frozen=True, slots=True)
class FirstWrong:
    """Of a list: its first wrong item is the only one that is told. A million of them would hold up the event loop.

    As pydantic's FailFast, which cannot stand in a union.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return {**handler(source), "fail_fast": True}


def _as_float32(value: float) -> float:
    """Workers compute in 32 bits: what is zero there is zero here, so that "strictly positive" means it."""
    return 0.0 if abs(value) < _SMALLEST_FLOAT32 else value


Switch = Annotated[bool, NullIs(False)]
Float32 = Annotated[
    float, Field(ge=-_LARGEST_FLOAT32, le=_LARGEST_FLOAT32), AfterValidator(_as_float32)
]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Text = Annotated[str, Field(json_schema_extra={"minLength": 1})]
Texts = Annotated[list[Text], FirstWrong()]
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
        json_schema_extra=AT_LEAST_0,
    )
    temperature: Float32 | None = Field(
        None,
        description="Divides the logits; > 0. A value other than 1 turns sampling on.",
        examples=[0.7],
        json_schema_extra=POSITIVE,
    )
    repetition_penalty: Float32 | None = Field(
        None,
        description="1 is none; > 0. Covers prompt and answer.",
        examples=[1.03],
        json_schema_extra=POSITIVE,
    )
    frequency_penalty: Float32 | None = Field(
        None,
        description="-2 to 2; subtracted from a token's logit once for each time it was generated.",
        json_schema_extra=PENALTY,
    )
    presence_penalty: Float32 | None = Field(
        None,
        description="-2 to 2; subtracted once from the logit of every token that was generated.",
        json_schema_extra=PENALTY,
    )
    top_k: Int32 | None = Field(
        None, description="Sample among the k most likely tokens; > 0.", json_schema_extra=POSITIVE
    )
    top_p: Float32 | None = Field(
        None,
        description="Sample among the tokens that make up this probability; > 0 and < 1.",
        json_schema_extra=SHARE,
    )
    typical_p: Float32 | None = Field(
        None, description="Locally typical sampling; > 0 and < 1.", json_schema_extra=SHARE
    )
    min_p: Float32 | None = Field(
        None,
        description="Drop tokens less likely than this share of the likeliest; 0 to 1.",
        json_schema_extra=UNIT,
    )
    do_sample: Switch = Field(False, description="Sample instead of taking the likeliest token.")
    seed: Unsigned64 | None = Field(
        None, description="Makes sampling repeatable. Drawn when absent."
    )
    max_new_tokens: Int32 | None = Field(
        None,
        description="Longest answer in tokens; default: what the model's limit leaves.",
        examples=[32],
        json_schema_extra=POSITIVE,
    )
    min_new_tokens: Int32 | None = Field(
        None,
        description="No end of sequence before this many tokens.",
        json_schema_extra=AT_LEAST_0,
    )
    ignore_eos_token: Switch = Field(False, description="Go on after an end-of-sequence token.")
    stop: Annotated[Texts, NullIs([])] = Field(
        default_factory=list, description="Texts that end the answer."
    )
    include_stop: bool | None = Field(
        None, description="Keep the stop text in the answer; default true, as TGI does."
    )
    truncate: Int32 | None = Field(
        None, description="Keep only the last n tokens of the prompt.", json_schema_extra=POSITIVE
    )
    return_full_text: bool | None = Field(None, description="Put the prompt before the answer.")
    details: Switch = Field(
        False, description="Return tokens, log-probabilities and the finish reason."
    )
    decoder_input_details: Switch = Field(
        False,
        description="Return log-probabilities of the prompt; turns `details` on. Not for streams.",
    )
    top_n_tokens: Int32 | None = Field(
        None,
        description="Return the n likeliest tokens at every position.",
        json_schema_extra=AT_LEAST_0,
    )
    logit_bias: dict[str, Float32] | None = Field(
        None,
        description="Added to the logits, by token id; -100 to 100.",
        examples=[{"11": -100}],
    )
    watermark: Switch = Field(
        False, description="Mark the answer so that a detector recognizes it (Kirchenbauer 2023)."
    )
    grammar: AnyGrammar | None = Field(None, description="What the answer must look like.")
    adapter_id: str | None = Field(None, description="Not supported; refused when set.")


class GenerateBody(Body):
    """A prompt and how to continue it."""

    inputs: Text = Field(description="The prompt.", examples=["The capital of France is"])
    parameters: Annotated[GenerateParameters, NullIs({})] = Field(
        default_factory=GenerateParameters, description="How to generate."
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
