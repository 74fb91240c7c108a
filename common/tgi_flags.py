"""What the launcher of text-generation-inference (v3.3.7) takes and `tokenfleet serve` does not, as a table.

Each flag is accepted without effect, because nothing here needs it and answers stay what they are, or refused,
because answers would not be what was asked for. A few have a meaning of their own, which `common/launcher.py` gives them.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import click


class Treatment(StrEnum):
    """What becomes of a flag."""

    NO_EFFECT = "accepted without effect"
    REFUSED = "refused"
    MAPPED = "has a meaning here"


@dataclass(frozen=True, slots=True)
class TgiFlag:
    """A flag of TGI's launcher.

    `note` says why it has no effect, what to do instead where it is refused, or what it means.
    """

    name: str  # on the command line, without its dashes
    treatment: Treatment
    note: str
    is_switch: bool = False
    alias: str = ""
    has_variable: bool = True  # whether TGI also reads NAME from the environment
    type: click.ParamType | None = None

    @property
    def parameter(self) -> str:
        return self.name.replace("-", "_")

    def option(self) -> click.Option:
        """As click reads it. Its value is None where nobody gave it."""
        variable = self.parameter.upper() if self.has_variable else None
        kind: dict[str, Any] = {"is_flag": True} if self.is_switch else {"type": self.type}
        names = [self.parameter, f"--{self.name}", *filter(None, [self.alias])]
        help = (
            self.note if self.treatment is Treatment.MAPPED else f"[{self.treatment}] {self.note}"
        )
        return click.Option(
            names, default=None, envvar=variable, show_envvar=True, help=help, **kind
        )


_NO_EFFECT, _REFUSED, _MAPPED = Treatment.NO_EFFECT, Treatment.REFUSED, Treatment.MAPPED

FLAGS = (
    TgiFlag(
        "sharded",
        _MAPPED,
        "true shards over all visible GPUs, false over none; --num-shard says how many.",
        type=click.BOOL,
    ),
    TgiFlag(
        "weights-cache-override",
        _MAPPED,
        "Folder with the model's files; the model keeps the name --model-id.",
    ),
    TgiFlag("speculate", _NO_EFFECT, "Every token is drawn from the model itself."),
    TgiFlag("kv-cache-dtype", _NO_EFFECT, "The KV cache has the model's own number format."),
    TgiFlag("waiting-served-ratio", _NO_EFFECT, "Waiting requests join the batch at every step."),
    TgiFlag("max-waiting-tokens", _NO_EFFECT, "Waiting requests join the batch at every step."),
    TgiFlag("cuda-graphs", _NO_EFFECT, "Which graphs are captured is not a setting."),
    TgiFlag("enable-prefill-logprobs", _NO_EFFECT, "They are always to be had.", is_switch=True),
    TgiFlag("disable-custom-kernels", _NO_EFFECT, "The device decides on kernels.", is_switch=True),
    TgiFlag("disable-grammar-support", _NO_EFFECT, "A grammar delays nobody else.", is_switch=True),
    TgiFlag("shard-uds-path", _NO_EFFECT, "Shards need no path of their own."),
    TgiFlag("prometheus-port", _NO_EFFECT, "GET /metrics is on the port of the service."),
    TgiFlag("usage-stats", _NO_EFFECT, "Nothing is ever sent home."),
    TgiFlag(
        "env", _NO_EFFECT, "No environment is printed.",
        is_switch=True, alias="-e", has_variable=False,
    ),
    TgiFlag("ngrok", _REFUSED, "No tunnel is opened; publish the port yourself.", is_switch=True),
    TgiFlag("ngrok-authtoken", _NO_EFFECT, "Belongs to --ngrok."),
    TgiFlag("ngrok-edge", _NO_EFFECT, "Belongs to --ngrok."),
    TgiFlag("lora-adapters", _REFUSED, "Merge the adapter into the model and serve the result."),
    TgiFlag("rope-scaling", _REFUSED, "Write `rope_scaling` into the model's config.json."),
    TgiFlag("rope-factor", _REFUSED, "Write `rope_scaling` into the model's config.json."),
    TgiFlag(
        "tokenizer-config-path", _REFUSED,
        "Put that tokenizer_config.json into a copy of the model's folder.",
    ),
)  # fmt: skip

# Number formats of TGI that `--quantize` does not know here, and what comes near.
_PREQUANTIZED = (
    "reads weights that were quantized before, which is not supported. Serve the original model, "
    "with `--quantize bitsandbytes-nf4` for 4 bits a weight or `--quantize int8` for 8"
)
_ON_THE_FLY = "is not supported; `--quantize int8` holds weights in 8 bits too"
UNSUPPORTED_QUANTIZATION = {
    **dict.fromkeys(("awq", "compressed-tensors", "exl2", "gptq", "marlin"), _PREQUANTIZED),
    **dict.fromkeys(("eetq", "fp8"), _ON_THE_FLY),
}
