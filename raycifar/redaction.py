"""Secrets in URIs, which are used and never written or printed."""

import re

IN_URI = re.compile(r"(?<!file)://[^\s'\"<>\\]*[^\s'\"<>\\.,:;)…]")
USER = re.compile(r"://(?:[^/?#@]*:(?!\d{1,5}/)[^?#]*|[^/?#@]*)@(?=([^/?#]*))")
PARAMETER = re.compile(r"(?<=[?&;#])(?!amp(?:;|$))([^=&;#]+)(?:=([^&;#]*))?")  # &amp; is how HTML writes &
SECRET_PARAMETER = re.compile(
    r"(?i)\b(sig|signature|x-(?:amz|goog)-[\w-]+|access_key|secret_key|session_token|(?:access_|sas_)?token|password)="
    r"(?!\*\*\*)[^&;#\s'\"<>\\]+"
)
ENTITY = re.compile(r"(&(?!amp;)#?\w+;)")  # in HTML, of a character that ends a URI
HARMLESS = {"region", "scheme", "endpoint_override", "allow_bucket_creation", "allow_bucket_deletion", "project_id"}


def redact(text: str) -> str:
    """Return a text as it may be written and printed: what may be a secret in a URI is replaced by ***.

    These are the user and password before an @, and the parameters after a ?, except those that are known to be
    harmless.
    """
    if "://" in text:
        text = IN_URI.sub(lambda match: redact_uri(match[0]), text)
    return SECRET_PARAMETER.sub(r"\1=***", text) if "=" in text else text


def redact_html(html: str) -> str:
    """Return HTML as `redact` returns the text that it stands for."""
    return "".join(part if ENTITY.fullmatch(part) else redact(part) for part in ENTITY.split(html))


def redact_uri(uri: str) -> str:
    """Return a URI, from its :// on, without its secrets."""

    def user(match: re.Match[str]) -> str:
        name = match[0][3:-1]
        azure = match[1].endswith(".windows.net")  # there, what stands before the @ is a container
        kept = name if name == "anonymous" or (azure and ":" not in name) else "***"
        return f"://{kept}@"

    def parameter(match: re.Match[str]) -> str:
        name, value = match.groups()
        if value is None:
            return "***"
        return match[0] if name in HARMLESS and "@" not in value else f"{name}=***"

    return PARAMETER.sub(parameter, USER.sub(user, uri))
