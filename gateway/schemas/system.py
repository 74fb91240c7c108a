"""Answers of routes that tell of the fleet: /info and /v1/models. For /openapi.json; handlers write them by hand."""

from typing import Any

from pydantic import BaseModel, Field


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


class Info(BaseModel):
    """TGI's fields, of the default model where there is one, and what is served."""

    model_id: str | None
    model_sha: str | None
    model_dtype: str | None
    model_device_type: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int = Field(description="Requests that one process holds open.")
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    max_waiting_requests: int = Field(description="Requests of one model that may wait.")
    max_top_n_tokens: int
    models: list[dict[str, Any]] = Field(description="Every model, its queue and its workers.")
