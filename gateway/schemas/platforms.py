"""Bodies of the routes that cloud platforms ask for (SageMaker, Vertex AI), and of /chat_tokenize."""

from typing import Annotated

from pydantic import BaseModel, Field, RootModel

from gateway.schemas.native import Body, CompatBody, FirstWrong, GenerateBody
from gateway.schemas.native_answers import GenerateAnswer, StreamEvent, TokenSpan
from gateway.schemas.openai import ChatBody, CompletionBody
from gateway.schemas.openai_answers import ChatAnswer, ChatChunk, CompletionAnswer


class InvocationBody(RootModel[CompatBody | ChatBody | CompletionBody]):
    """With `inputs` the body of `POST /`, else with `messages` a chat's, else a completion's."""

    model_config = {"json_schema_extra": {"examples": [{"inputs": "The capital of France is"}]}}


class InvocationAnswer(RootModel[list[GenerateAnswer] | ChatAnswer | CompletionAnswer]):
    """The answer of the route that serves such a body."""


class InvocationEvent(RootModel[StreamEvent | ChatChunk | CompletionAnswer]):
    """An event of the route that serves such a body."""


class VertexBody(Body):
    """Prompts or conversations, each with its own parameters."""

    instances: Annotated[list[GenerateBody | ChatBody], FirstWrong()] = Field(
        examples=[[{"inputs": "The capital of France is", "parameters": {"max_new_tokens": 8}}]]
    )


class VertexAnswer(BaseModel):
    """A text for every instance, in their order."""

    predictions: list[str]


class ChatTokens(BaseModel):
    """A conversation as the model sees it."""

    tokenize_response: list[TokenSpan]
    templated_text: str
