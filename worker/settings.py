"""What an operator can set of a worker. Names are those of TGI's launcher where it has one."""

from dataclasses import dataclass
from pathlib import Path

from common.broker_url import check_broker_url
from common.settings import setting


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Frozen; every "auto" (None) is resolved when the engine is built, into facts of their own."""

    model_id: str = setting(
        "",
        "Folder, GGUF file or hub id of the model; `echo` needs no weights.",
        env=("MODEL_ID",),
    )
    revision: str | None = setting(None, "Hub revision: branch, tag or commit.", env=("REVISION",))
    served_model_name: str | None = setting(
        None,
        "Name that clients use for the model; the default is the model id, or a folder's name.",
    )
    redis_url: str = setting(
        "redis://127.0.0.1:6379/0",
        "Broker: redis://, rediss://, unix://, or redis+sentinel://host,host/service.",
        env=("REDIS_URL",),
    )
    device: str = setting("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    dtype: str = setting(
        "auto",
        "Number format of weights and activations; auto is bfloat16, or float32 where the device has none.",
        choices=("auto", "float32", "float16", "bfloat16"),
        env=("DTYPE",),
    )
    quantize: str | None = setting(
        None,
        "Hold the weights of linear layers in fewer bits; deploy/quantization.md tells what each costs.",
        choices=("bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", "int8"),
        env=("QUANTIZE",),
    )
    threads: int | None = setting(
        None, "CPU threads of one shard; the default is its share of the cores that it may use."
    )
    num_shard: int = setting(
        1,
        "Processes that share one copy of the model (tensor parallelism), each with a GPU of its own.",
        env=("NUM_SHARD",),
    )
    shard_timeout_s: float = setting(
        4.0, "Seconds without progress after which a shard is stuck, and its group starts again."
    )
    num_nodes: int = setting(
        1,
        "Machines that the shards are divided among; the same command runs on each.",
        aliases=("--nnodes",),
    )
    node_rank: int = setting(0, "Number of this machine among them; 0 serves the requests.")
    master_addr: str = setting(
        "127.0.0.1", "Address of machine 0, where the shards meet.", env=("MASTER_ADDR",)
    )
    master_port: int | None = setting(
        None, "Port there; on a single machine the default is a free one.", env=("MASTER_PORT",)
    )
    shard_rank: int | None = setting(None, "Number of this shard.", is_hidden=True)
    shard_fds: tuple[int, ...] = setting(
        (), "What this shard shares with the others.", is_hidden=True
    )
    max_input_tokens: int | None = setting(
        None,
        "Longest prompt, in tokens; the default is --max-total-tokens less one.",
        aliases=("--max-input-length",),
        env=("MAX_INPUT_TOKENS", "MAX_INPUT_LENGTH"),
    )
    max_total_tokens: int | None = setting(
        None,
        "Longest prompt plus answer; the default is what the model was made for, or what fits.",
        env=("MAX_TOTAL_TOKENS",),
    )
    max_batch_size: int = setting(64, "Sequences that run at once.", env=("MAX_BATCH_SIZE",))
    max_batch_prefill_tokens: int = setting(
        512,
        "Tokens that one step may run, decoding and prompt chunks together.",
        env=("MAX_BATCH_PREFILL_TOKENS",),
    )
    max_batch_total_tokens: int | None = setting(
        None,
        "Tokens that the KV cache holds; the default is what fits in memory.",
        env=("MAX_BATCH_TOTAL_TOKENS",),
    )
    block_size: int = setting(32, "Tokens of one block of the KV cache.")
    prefix_caching: bool = setting(
        True, "Keep and reuse the KV blocks of common prompt beginnings.", env=("PREFIX_CACHING",)
    )
    memory_fraction: float = setting(
        0.6,
        "Share of the free memory that the KV cache may take; on a CPU it takes it as it fills.",
        aliases=("--cuda-memory-fraction",),
        env=("CUDA_MEMORY_FRACTION",),
    )
    watermark_gamma: float = setting(
        0.5, "Share of the vocabulary that a watermark favours.", env=("WATERMARK_GAMMA",)
    )
    watermark_delta: float = setting(
        2.0, "What a watermark adds to the logits it favours.", env=("WATERMARK_DELTA",)
    )
    trust_remote_code: bool = setting(
        False,
        "Run Python code that comes with a model. Only for models you have read.",
        env=("TRUST_REMOTE_CODE",),
    )
    huggingface_hub_cache: str | None = setting(
        None, "Folder of the hub cache.", env=("HUGGINGFACE_HUB_CACHE",)
    )
    lease_s: float = setting(
        5.0, "Seconds without a sign of life after which another worker may take over."
    )
    step_timeout_s: float = setting(
        60.0, "Seconds after which a step counts as hung, and the lease is given up."
    )
    drain_s: float = setting(20.0, "Seconds a stopping worker may spend on finishing what it runs.")
    echo_delay_ms: float = setting(0.0, "Echo model: time of one step.")
    echo_salt: str = setting(
        "", "Echo model: makes this worker's tokens differ from other workers'."
    )
    fault_at: str = setting(
        "",
        "For tests: where this process breaks, see common/faults.py.",
        env=("FAULT_AT",),
        is_hidden=True,
    )
    metrics_port: int = setting(0, "Port of the worker's Prometheus metrics; 0 is off.")
    otlp_endpoint: str | None = setting(
        None, "OTLP/gRPC endpoint for traces.", env=("OTLP_ENDPOINT",)
    )
    otlp_service_name: str = setting(
        "tokenfleet.worker", "Service name in traces.", env=("OTLP_SERVICE_NAME",)
    )
    json_output: bool = setting(False, "Log JSON, one object a line.", env=("JSON_OUTPUT",))
    log_level: str = setting(
        "info",
        "Lowest level that is logged.",
        choices=("debug", "info", "warning", "error"),
        env=("LOG_LEVEL",),
    )

    def __post_init__(self) -> None:
        if not self.model_id:
            raise ValueError(
                "`model_id` must name a model: give --model-id a folder, a GGUF file or a hub id. "
                "`echo` is a test model without weights"
            )
        check_broker_url(self.redis_url)
        if (
            self.max_input_tokens
            and self.max_total_tokens
            and self.max_input_tokens >= self.max_total_tokens
        ):
            raise ValueError(
                "`max_input_tokens` must be < `max_total_tokens`. "
                f"Given: {self.max_input_tokens} and {self.max_total_tokens}"
            )
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(
                f"`memory_fraction` must be > 0 and <= 1. Given: {self.memory_fraction}"
            )
        if not 0 < self.watermark_gamma < 1:
            raise ValueError(
                f"`watermark_gamma` must be > 0 and < 1. Given: {self.watermark_gamma}"
            )
        for name in (
            "max_batch_size",
            "max_batch_prefill_tokens",
            "block_size",
            "num_shard",
            "num_nodes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1. Given: {getattr(self, name)}")
        self._check_nodes()

    def _check_nodes(self) -> None:
        if self.num_shard % self.num_nodes:
            raise ValueError(
                "`num_shard` must be divisible by `num_nodes`. "
                f"Given: {self.num_shard} and {self.num_nodes}"
            )
        if not 0 <= self.node_rank < self.num_nodes:
            raise ValueError(
                f"`node_rank` must be less than `num_nodes`, {self.num_nodes}. Given: {self.node_rank}"
            )
        if self.num_nodes > 1 and self.master_port is None:
            raise ValueError("`master_port` is needed with `num_nodes`: all machines must know it")

    @property
    def num_local_shards(self) -> int:
        """Shards of this machine."""
        return self.num_shard // self.num_nodes

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        if self.served_model_name:
            return self.served_model_name
        if not self.is_local:
            return self.model_id
        path = Path(self.model_id).expanduser()
        return path.stem if path.is_file() else path.name

    @property
    def is_local(self) -> bool:
        """Whether `model_id` is a folder or a file rather than a hub id."""
        return Path(self.model_id).expanduser().exists()
