"""The secrets of API keys: random text, shown once; Redis holds only its SHA-256.

256 random bits cannot be guessed, however fast the hash is, so no slow one is needed as it is for
passwords, and none would be bearable at each request.
"""

import re
import secrets
from hashlib import sha256
from typing import Final

_FORM: Final = re.compile(r"mf-[A-Za-z0-9_-]{43}")
_NUM_BYTES: Final = 32
_ID_LETTERS: Final = "abcdefghjkmnpqrstuvwxyz23456789"
"""Without those that are taken for each other."""
_ID_LENGTH: Final = 10


def new_secret() -> str:
    """Return what a caller will prove itself by."""
    return f"mf-{secrets.token_urlsafe(_NUM_BYTES)}"


def new_key_id() -> str:
    """Return the public name of a key; also the tenant of its jobs, unless it has another."""
    return "k_" + "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))


def is_secret(text: str) -> bool:
    """Whether a text has the form of a secret; nothing else is worth a look into Redis."""
    return _FORM.fullmatch(text) is not None


def digest_of(secret: str) -> str:
    """Return what is kept of a secret."""
    return sha256(secret.encode()).hexdigest()
