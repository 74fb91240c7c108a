"""The keys that clients may have: the one of `--api-key`, and those of a file that may change while we serve.

The file is TOML, a key an entry. It holds hashes, so that who reads it cannot use the keys:

    web   = { sha256 = "9f86d0...", weight = 3, max_concurrent_requests = 20, max_tokens_per_minute = 60000 }
    batch = { sha256 = "2c26b4...", priority = 2 }

`tokenfleet keys new NAME` makes them. Their 256 random bits are why one round of SHA-256 is enough. Knows no HTTP.
"""

import hashlib
import hmac
import logging
import re
import secrets
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.redis_keys import PRIORITIES

logger = logging.getLogger(__name__)

PREFIX = "tf-"  # lets people and secret scanners tell what it is
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key may do. Its name stands in logs, metrics and the queue, its text nowhere."""

    name: str  # "" for the key of `--api-key`
    digest: bytes
    weight: int = 1  # parts of a full gateway's places
    priority: int | None = None  # of requests that name none, and the best that one may name
    max_concurrent_requests: int | None = None
    max_tokens_per_minute: int | None = None  # of prompts and answers

    @property
    def is_limited(self) -> bool:
        return bool(self.max_concurrent_requests or self.max_tokens_per_minute)


class KeyFileError(ValueError):
    """A key file cannot be used; the message says where and why."""


class KeyRing:
    """All keys that are accepted now."""

    def __init__(self, api_key: str | None = None, path: str | None = None) -> None:
        """Raises KeyFileError."""
        self.path = path
        self._fixed = [] if api_key is None else [ApiKey("", digest_of(api_key))]
        self._keys = self._read()

    @property
    def is_open(self) -> bool:
        """Whether everybody may come in: no key was ever asked for. A file that became empty admits nobody."""
        return not self._fixed and self.path is None

    def find(self, given: str) -> ApiKey | None:
        """The key with this text. Takes as long for a wrong one as for a right one."""
        digest, found = digest_of(given), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def reload(self) -> None:
        """Read the file again. One that cannot be used leaves the keys as they were."""
        try:
            self._keys = self._read()
        except KeyFileError as error:
            logger.error("the keys stay as they were: %s", error)
        else:
            logger.info("the keys were read again", extra={"keys": len(self._keys)})

    def _read(self) -> list[ApiKey]:
        return [*self._fixed, *(read_keys(self.path) if self.path else ())]


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def new_key() -> str:
    """The text of a key nobody has."""
    return PREFIX + secrets.token_urlsafe(32)


def line_for(name: str, key: str) -> str:
    """A key's entry in the file. Raises KeyFileError for a name that cannot be one."""
    _check(
        bool(_NAME.fullmatch(name)), "a name has 1 to 64 letters, digits, `.`, `_` and `-`", name
    )
    quoted = f'"{name}"' if "." in name else name
    return f'{quoted} = {{ sha256 = "{digest_of(key).hex()}" }}'


def read_keys(path: str) -> list[ApiKey]:
    """The keys of a file. Raises KeyFileError."""
    try:
        entries = tomllib.loads(Path(path).expanduser().read_text())
        keys = [_key_of(name, entry) for name, entry in entries.items()]
        names = {key.digest: key.name for key in keys}
        for key in keys:
            other = names[key.digest]
            _check(other == key.name, f"`{key.name}` and this one are the same key", other)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise KeyFileError(f"cannot use the key file {path}: {reason}") from error
    return keys


def _key_of(name: str, entry: Any) -> ApiKey:
    _check(
        bool(_NAME.fullmatch(name)), "a name has 1 to 64 letters, digits, `.`, `_` and `-`", name
    )
    _check(isinstance(entry, dict), f"`{name}` must be a table, as in {name} = {{ sha256 = ... }}")
    digest = entry.pop("sha256", None)
    _check(
        isinstance(digest, str) and bool(_DIGEST.fullmatch(digest.lower())),
        f"`{name}` needs `sha256`, 64 hexadecimal digits",
    )
    known = {field.name for field in fields(ApiKey)} - {"name", "digest"}
    for field, value in entry.items():
        _check(field in known, f"`{name}` may have {', '.join(sorted(known))}", field)
        _check(type(value) is int, f"`{field}` of `{name}` must be a whole number", value)
        if field == "priority":
            _check(value in PRIORITIES, f"`priority` of `{name}` must be 0, 1 or 2", value)
        else:
            _check(value > 0, f"`{field}` of `{name}` must be strictly positive", value)
    return ApiKey(name, bytes.fromhex(digest), **entry)


def _check(is_met: bool, rule: str, *given: object) -> None:
    if not is_met:
        raise KeyFileError(f"{rule}. Given: {given[0]}" if given else rule)
