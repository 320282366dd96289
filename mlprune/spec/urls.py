"""Secrets in URLs: whether a URL contains one, and how to display a URL or a text without them.

Which keys hold URLs, and what happens to one with a secret, is decided where the keys are read.
"""

import re
from urllib.parse import unquote

_SECRET_FIELD = re.compile(r"(password|passwd|pwd|token|secret)\w*\s*=", re.IGNORECASE)


def storage_has_secret(address: str) -> bool:
    """Return whether an object store's address has a user or a query: credentials, since it needs neither."""
    _, is_remote, rest = address.partition("://")
    return bool(is_remote) and ("@" in rest or "?" in rest)


def tracking_has_secret(uri: str) -> bool:
    """Return whether a tracking URI has a password, or for a server anything before an @: it may be a token."""
    if is_server(uri):
        host = re.split(r"[/?#]", uri.partition("://")[2], maxsplit=1)[0]
        return "@" in host or _has_secret_field(uri)
    return re.match(r"[^:/]*://[^:/@?]*:[^@]*@", uri) is not None or _has_secret_field(uri)


def is_server(uri: str) -> bool:
    """Return whether a tracking URI names a server, rather than a database."""
    return uri.strip().lower().startswith(("http://", "https://"))


def _has_secret_field(uri: str) -> bool:
    # unquoted, because one field may hold a whole connection string
    return _SECRET_FIELD.search(unquote(uri.partition("?")[2])) is not None


def scheme_only(url: str) -> str:
    """Return `https://...`: the part of a URL that can be displayed whatever the rest contains."""
    scheme = re.match(r"\s*[\w+.-]+://", url)
    return f"{scheme[0] if scheme else ''}..."


def redact(text: str) -> str:
    """Return a URL, or a text with URLs in it, with *** in place of passwords and tokens."""
    redacted = re.sub(r"(://[^\s:/@]*:)\S*@", r"\1***@", text)
    redacted = re.sub(r"(?i)(https?://)[^\s:/@?#]+@", r"\1***@", redacted)  # a token without a user
    return re.sub(r"([?&]password=)[^&\s]*", r"\1***", redacted)


def without_credentials(url: str) -> str:
    """Return the URL without user and password."""
    return re.sub(r"://\S*@", "://", url)
