"""bitsandbytes, imported when it is needed: it is an extra, and takes seconds to import."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


def import_bitsandbytes() -> ModuleType:
    """The package. Raises ValueError if it is not installed.

    On CPUs with AVX512-bf16 its import asks the package `kernels` for compiled code from the hub,
    and warns when there is none. A server runs no code that it fetched while starting, so we answer
    that there is none; bitsandbytes then uses the kernel that it ships.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    with _absent("kernels"), _silent("bitsandbytes.backends.cpu.ops"):
        try:
            return import_module("bitsandbytes")
        except ModuleNotFoundError as error:
            if error.name != "bitsandbytes":
                raise
            raise ValueError(
                "`quantize` with bitsandbytes needs that package: pip install 'tokenfleet[quantize]'"
            ) from error


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Let `import module` fail inside."""
    is_imported = module in sys.modules
    before = sys.modules.get(module)
    sys.modules[module] = None
    try:
        yield
    finally:
        if is_imported:
            sys.modules[module] = before
        else:
            del sys.modules[module]


@contextmanager
def _silent(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False
