"""Who may ask: a file of keys, and the key in a request's Authorization header."""

import hmac
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.wire.messages import digest


def read_keys(path: str) -> list[bytes]:
    """Return the digests of the keys in a file, one a line; none where there is no file to read.

    Raises:
        ConfigError: it is not there or empty, or a line holds what no header can carry.
    """
    if not path:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no file of keys ({error}); KEYS= names one, with a key a line") from error
    if not any(lines):
        raise ConfigError(f"{path}: no key in it; write one a line")
    for number, line in enumerate(lines, 1):
        if not line.isprintable():
            raise ConfigError(f"{path}, line {number}: a character that no key can hold; write one key a line")
    return [digest(line.encode()) for line in lines if line]


def find_key(authorizations: Sequence[bytes], keys: Sequence[bytes]) -> bytes | None:
    """Return the digest of the key that the only Authorization header brings, or None where it brings none of `keys`.

    The time does not depend on which key it is or on how much of one is right.
    """
    scheme, _, key = (authorizations[0] if len(authorizations) == 1 else b"").partition(b" ")
    given = digest(key.strip())
    same = [hmac.compare_digest(given, own) for own in keys]
    return given if any(same) and scheme.lower() == b"bearer" else None
