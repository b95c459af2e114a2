"""Access control: a file of keys, and the key in a request's Authorization header."""

import hmac
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.wire.messages import compute_digest


def read_keys(path: str) -> list[bytes]:
    """Read a file with one key per line and return the digests of the keys; none if `path` is empty.

    Raises:
        ConfigError: the file is missing or empty, or a line contains characters that a header cannot carry.
    """
    if not path:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read keys ({error}); set KEYS= to a file with one key per line") from error
    if not any(lines):
        raise ConfigError(f"{path}: the file contains no key; write one key per line")
    for number, line in enumerate(lines, 1):
        if not line.isprintable():
            raise ConfigError(f"{path}, line {number}: unprintable character in a key; write one key per line")
    return [compute_digest(line.encode()) for line in lines if line]


def find_key(authorizations: Sequence[bytes], keys: Sequence[bytes]) -> bytes | None:
    """Return the digest of the key in the only Authorization header, or None if it is not one of `keys`.

    The comparison takes constant time: it does not depend on which key matches or on how much of a key is correct.
    """
    scheme, _, key = (authorizations[0] if len(authorizations) == 1 else b"").partition(b" ")
    given = compute_digest(key.strip())
    matches = [hmac.compare_digest(given, key_digest) for key_digest in keys]
    return given if any(matches) and scheme.lower() == b"bearer" else None
