"""What an operator can set of a gateway. Names are those of TGI's launcher where it has one."""

from dataclasses import dataclass

from common.broker_url import check_broker_url
from common.settings import setting


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Frozen. Limits of a model (input and total tokens) are not here: its workers announce them."""

    # HOSTNAME is not read: Kubernetes sets it to the pod's name
    hostname: str = setting("0.0.0.0", "Address to listen on.")
    port: int = setting(8080, "Port to listen on.", aliases=("-p",), env=("PORT",))
    redis_url: str = setting(
        "redis://127.0.0.1:6379/0",
        "Broker: redis://, rediss://, unix://, or redis+sentinel://host,host/service.",
        env=("REDIS_URL",),
    )
    gateway_workers: int = setting(1, "Processes that share the port.")
    model_id: str | None = setting(
        None,
        "Model of requests that name none; the default is the only one that is served.",
        env=("MODEL_ID",),
    )
    max_concurrent_requests: int = setting(
        1024,
        "Requests that one process holds open; more get 429.",
        env=("MAX_CONCURRENT_REQUESTS",),
    )
    max_waiting_requests: int = setting(
        1024, "Requests of one model that may wait in its queue; more get 429 and Retry-After."
    )
    max_best_of: int = setting(2, "Largest `best_of`.", env=("MAX_BEST_OF",))
    max_stop_sequences: int = setting(
        4, "Most stop sequences of a request.", env=("MAX_STOP_SEQUENCES",)
    )
    max_top_n_tokens: int = setting(5, "Largest `top_n_tokens`.", env=("MAX_TOP_N_TOKENS",))
    max_top_logprobs: int = setting(20, "Largest `top_logprobs` of a chat; OpenAI's own limit.")
    max_client_batch_size: int = setting(
        4,
        "Most prompts of one request, where a route takes several.",
        env=("MAX_CLIENT_BATCH_SIZE",),
    )
    payload_limit: int = setting(
        2_000_000, "Longest request body in bytes.", env=("PAYLOAD_LIMIT",)
    )
    validation_workers: int = setting(
        2, "Threads that tokenize long prompts.", env=("VALIDATION_WORKERS",)
    )
    request_deadline_s: float = setting(
        3600.0, "Seconds after which an unfinished request ends with an error."
    )
    read_timeout_s: float = setting(
        30.0,
        "Seconds that a client may take to send its headers, and then its body; longer is 408.",
    )
    keep_alive_s: float = setting(15.0, "Seconds of silence after which a stream gets a comment.")
    drain_s: float = setting(90.0, "Seconds a stopping gateway may spend on its open streams.")
    wait_for_model: bool = setting(
        False, "Open the port only once a worker is ready.", is_hidden=True
    )
    fault_at: str = setting(
        "",
        "For tests: where this process breaks, see common/faults.py.",
        env=("FAULT_AT",),
        is_hidden=True,
    )
    cors_allow_origin: tuple[str, ...] = setting(
        (), "Origin that browsers may call from; the default is any.", env=("CORS_ALLOW_ORIGIN",)
    )
    api_key: str | None = setting(
        None, "Key that clients send as `Authorization: Bearer <key>`.", env=("API_KEY",)
    )
    api_keys_file: str | None = setting(
        None, "TOML file of keys with names and limits; a change of it counts at once."
    )
    tls_cert: str | None = setting(
        None, "PEM file with the certificate and its chain: serve HTTPS. A change counts at once."
    )
    tls_key: str | None = setting(None, "PEM file with the key of that certificate.")
    compute_type: str | None = setting(
        None, "Value of x-compute-type; the default is `<device>+optimized`.", env=("COMPUTE_TYPE",)
    )
    otlp_endpoint: str | None = setting(
        None, "OTLP/gRPC endpoint for traces.", env=("OTLP_ENDPOINT",)
    )
    otlp_service_name: str = setting(
        "tokenfleet.gateway", "Service name in traces.", env=("OTLP_SERVICE_NAME",)
    )
    json_output: bool = setting(False, "Log JSON, one object a line.", env=("JSON_OUTPUT",))
    log_level: str = setting(
        "info",
        "Lowest level that is logged.",
        choices=("debug", "info", "warning", "error"),
        env=("LOG_LEVEL",),
    )

    def __post_init__(self) -> None:
        check_broker_url(self.redis_url)
        for name in (
            "gateway_workers",
            "max_concurrent_requests",
            "max_waiting_requests",
            "max_best_of",
            "max_client_batch_size",
            "payload_limit",
            "validation_workers",
            "request_deadline_s",
            "keep_alive_s",
            "read_timeout_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"`{name}` must be strictly positive. Given: {getattr(self, name)}"
                )
        for name in ("max_stop_sequences", "max_top_n_tokens", "max_top_logprobs", "drain_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0. Given: {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"`port` must be >= 0 and <= 65535. Given: {self.port}")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("`api_key` must not be blank; leave it out to serve without a key")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("`tls_cert` and `tls_key` need each other; give both or none")
