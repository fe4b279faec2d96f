"""Who asks: API keys, kept as hashes and compared in constant time, and the names that stand for a client elsewhere.

Knows headers; nothing of routes. What a client sent never becomes a name: only hashes leave this file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tenfold.errors import UsageError
from tenfold.server.errors import Refusal

__all__ = ["Keys", "cache_name", "client_name", "read_keys"]

Headers = Sequence[tuple[bytes, bytes]]

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_LEAST_KEY_CHARS = 8


@dataclass(frozen=True, slots=True)
class Keys:
    """The SHA-256 of every key that is let in; none means that no key is asked for."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[str]) -> Keys:
        """From keys, or `sha256:` and the hash of one in hexadecimal."""
        return cls(tuple(dict.fromkeys(_digest_of(entry) for entry in entries)))

    def check(self, headers: Headers) -> bytes:
        """The digest of the key that was shown, b"" where none is asked for. Raises the 401."""
        if not self.digests:
            return b""
        shown = _shown_key(headers)
        if shown is None:
            raise _refused("no API key was given")
        digest = hashlib.sha256(shown).digest()
        # every key is compared, and each in constant time
        if not sum(hmac.compare_digest(digest, known) for known in self.digests):
            raise _refused("the API key is not known")
        return digest


def read_keys(path: Path) -> list[str]:
    """The keys of a file, one a line; lines that are empty or begin with # say nothing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} holds no keys that can be read: {exc}; give a text file, one key a line") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise UsageError(f"{path} holds no key, expected one a line")
    return keys


def client_name(key: bytes, address: str) -> str:
    """The client for fairness: its key, or where it calls from."""
    return _hash("client", key or address.encode())


def cache_name(key: bytes, apart: Mapping[str, str], *, shared: bool) -> str:
    """Which stored prefixes a request may meet: those of its key, and within it those of the same user and salt.

    "" is the space of all who have no key, the command line among them.
    """
    key = b"" if shared else key
    if not key and not apart:
        return ""
    return _hash("cache", key, *(f"{name}={value}".encode() for name, value in sorted(apart.items())))


def _hash(kind: str, *parts: bytes) -> str:
    total = hashlib.sha256(kind.encode())
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:32]


def _digest_of(entry: str) -> bytes:
    hashed = _HASHED.fullmatch(entry)
    if hashed:
        return bytes.fromhex(hashed[1])
    if len(entry) < _LEAST_KEY_CHARS or not entry.isascii() or not entry.isprintable() or " " in entry:
        raise UsageError(
            f"an API key has {len(entry)} characters, expected {_LEAST_KEY_CHARS} or more, ASCII, no spaces"
        )
    return hashlib.sha256(entry.encode()).digest()


def _shown_key(headers: Headers) -> bytes | None:
    """Of Authorization (Bearer, or Basic with the key as password) and x-api-key, Authorization wins."""
    given = [value for name, value in headers if name == b"authorization"]
    if len(given) > 1:
        raise _refused("there are two Authorization headers, expected one")
    if given:
        scheme, _, credentials = given[0].strip().partition(b" ")
        if scheme.lower() == b"bearer":
            return credentials.strip()
        if scheme.lower() == b"basic":
            return _password(credentials.strip())
        raise _refused("the Authorization header is of another scheme, expected Bearer")
    return next((value.strip() for name, value in headers if name == b"x-api-key"), None)


def _password(credentials: bytes) -> bytes | None:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return None


def _refused(message: str) -> Refusal:
    sentence = f"{message}; send it as Authorization: Bearer KEY"
    return Refusal(401, sentence, code="invalid_api_key", headers={"www-authenticate": 'Bearer realm="tenfold"'})
