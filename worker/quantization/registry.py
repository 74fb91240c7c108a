"""Which `--quantize` means which backend: a table. Knows no model and no layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from worker.layers.build import LinearBackend
from worker.quantization.four_bit import four_bit_backend
from worker.quantization.int8 import int8_product
from worker.quantization.llm_int8 import llm_int8_backend


@dataclass(frozen=True, slots=True)
class Quantization:
    """One way to hold weights.

    Attributes:
        open_backend: gives the backend; raises ValueError if it cannot run here.
        has_head: the output head is quantized too. bitsandbytes leaves it as it is, and so do the
            checkpoints and evaluations that people know it by. In int8 it costs next to nothing,
            and a small model with a large vocabulary spends much of its time there.
    """

    open_backend: Callable[[], LinearBackend]
    has_head: bool = False


QUANTIZATIONS = {
    "bitsandbytes": Quantization(llm_int8_backend),
    "bitsandbytes-nf4": Quantization(partial(four_bit_backend, "nf4")),
    "bitsandbytes-fp4": Quantization(partial(four_bit_backend, "fp4")),
    "int8": Quantization(lambda: int8_product, has_head=True),
}


def linear_backends(name: str | None) -> tuple[LinearBackend | None, LinearBackend | None]:
    """The backends of linear layers and of the head; None is the plain product.

    Raises:
        ValueError: `name` is in no row of the table, or its backend cannot run here.
    """
    if name is None:
        return None, None
    if name not in QUANTIZATIONS:
        raise ValueError(f"`quantize` must be one of {', '.join(QUANTIZATIONS)}. Given: {name!r}")
    backend = QUANTIZATIONS[name].open_backend()
    return backend, backend if QUANTIZATIONS[name].has_head else None
