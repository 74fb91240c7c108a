"""A program of a user of `langchain-openai`: chats, streams, structured output, tools, completions, and what goes wrong.

Runs in an environment of its own (frameworks.txt); see report.py for what it prints.
"""

from types import SimpleNamespace
from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict
from report import main, outcome


class Report(BaseModel):
    """Whether it is so."""

    model_config = ConfigDict(extra="forbid")
    verdict: Literal["yes", "no"]


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def chat_of(servers: SimpleNamespace, **changes: Any) -> ChatOpenAI:
    values = {"model": "echo", "api_key": servers.key, "max_retries": 0, "timeout": 30}
    url = changes.pop("url", servers.url)
    return ChatOpenAI(base_url=f"{url}/v1", **values | changes)


def chat(servers: SimpleNamespace) -> Any:
    answer = chat_of(servers).invoke([SystemMessage("Be kind"), HumanMessage("Hi é")])
    return {
        "text": answer.content,
        "usage": answer.usage_metadata,
        "reason": answer.response_metadata["finish_reason"],
    }


def chain(servers: SimpleNamespace) -> Any:
    prompt = ChatPromptTemplate.from_messages([("system", "Be kind"), ("human", "Hi {name}")])
    return (prompt | chat_of(servers) | StrOutputParser()).invoke({"name": "Ada"})


def stream(servers: SimpleNamespace) -> Any:
    chunks = list(chat_of(servers, stream_usage=True).stream("Hi é"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return {"text": whole.content, "chunks": len(chunks), "usage": whole.usage_metadata}


async def asynchronous(servers: SimpleNamespace) -> Any:
    model = chat_of(servers)
    texts = [chunk.content async for chunk in model.astream("Hi")]
    answers = await model.abatch(["one", "two"])
    return {"stream": "".join(texts), "batch": [answer.content for answer in answers]}


def structured(servers: SimpleNamespace) -> Any:
    model = chat_of(servers, model="tiny", seed=1)
    found = [
        model.with_structured_output(Report, method=method).invoke("Well?")
        for method in ("json_schema", "function_calling")
    ]
    return [type(report).__name__ for report in found]


def tools(servers: SimpleNamespace) -> Any:
    model = chat_of(servers, model="tiny", seed=2).bind_tools([weather], tool_choice="required")
    answer = model.invoke("What is the weather?")
    (call,) = answer.tool_calls
    conversation = [
        HumanMessage("What is the weather?"),
        AIMessage("", tool_calls=answer.tool_calls),
        ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]),
    ]
    return {"name": call["name"], "then": chat_of(servers).invoke(conversation).content}


def completion(servers: SimpleNamespace) -> Any:
    values = {"base_url": f"{servers.url}/v1", "api_key": servers.key, "model": "echo"}
    model = OpenAI(max_retries=0, **values)
    return {"text": model.invoke("abc"), "stream": list(model.stream("abc"))}


def errors(servers: SimpleNamespace) -> Any:
    models = {
        401: chat_of(servers, api_key="wrong"),
        404: chat_of(servers, model="nowhere"),
        400: chat_of(servers, max_completion_tokens=10**6),
        429: chat_of(servers, url=servers.full),
        503: chat_of(servers, url=servers.empty),
    }
    found = {
        status: {
            "plain": outcome(lambda model=model: model.invoke("Hi").content),
            "stream": outcome(lambda model=model: [chunk.content for chunk in model.stream("Hi")]),
        }
        for status, model in models.items()
    }
    refused = [SystemMessage("Be kind"), HumanMessage("Hi")]
    found[422] = {"plain": outcome(lambda: chat_of(servers, model="tiny").invoke(refused).content)}
    return found


if __name__ == "__main__":
    main(chat, chain, stream, asynchronous, structured, tools, completion, errors)
