"""Where requests go and with which key: the key comes from the environment and leaves only in a header."""

import ipaddress
import os
import re
import warnings
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kvc.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"
MIN_SECRET = 8  # shorter keys are placeholders such as "none", which occur in ordinary text
_HIDDEN = "[key]"
_KEY_LIKE = re.compile(r"\bsk-[\w*.-]{4,}|(?<=Bearer )\S+")


@dataclass(frozen=True)
class Endpoint:
    """A server and the key for it.

    Attributes:
        base_url: Address up to the version, such as `https://api.openai.com/v1`.
        key: The secret; empty for a server that asks for none.
    """

    base_url: str
    key: str = field(default="", repr=False)

    def redact(self, text: str) -> str:
        """`text` without the key."""
        return text.replace(self.key, _HIDDEN) if len(self.key) >= MIN_SECRET else text

    def quote(self, message: str, limit: int = 200) -> str:
        """A server's message on one line, cut short, without the key or anything that looks like one."""
        text = message.encode(errors="replace").decode()
        text = _KEY_LIKE.sub(_HIDDEN, self.redact(" ".join(text.split())))
        return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _is_local(host: str) -> bool:
    """Whether a host is this machine or one of its own network, where servers usually ask for no key."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".localhost"))


def endpoint(base_url: str | None = None) -> Endpoint:
    """The server and the key, checked before the first request.

    Args:
        base_url: Address of the server; `$OPENAI_BASE_URL`, else OpenAI's, if None.

    Raises:
        UserError: The address is none, holds a secret itself, or the key is missing or cannot be sent.
    """
    url = (base_url or os.environ.get(URL_VARIABLE) or OPENAI_URL).strip().rstrip("/")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise UserError("--base_url: is no valid address; expected something like http://localhost:8000/v1") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(f"--base_url: takes neither password nor query; the key belongs into ${KEY_VARIABLE}")
    if parts.scheme not in {"http", "https"} or not host:
        raise UserError(f"--base_url {url}: expected something like http://localhost:8000/v1")
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key and not _is_local(host):
        raise UserError(f"{KEY_VARIABLE} is not set in the environment, and {url} needs a key")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{KEY_VARIABLE}: holds characters that no key has")
    if key and parts.scheme == "http" and not _is_local(host):
        warnings.warn(f"--base_url {url}: the key travels unencrypted, use https if the server can", stacklevel=2)
    return Endpoint(url, key)
