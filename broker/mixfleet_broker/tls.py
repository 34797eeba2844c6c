"""TLS to Redis: what the options of a URL make of it, and what a refusal means."""

import os
import ssl
from collections.abc import Iterator, Mapping
from typing import Final, cast

_FILES: Final = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_ALERT: Final = "ALERT"
_OF_A_CERTIFICATE: Final = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE")
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


def tls_context(options: Mapping[str, object]) -> ssl.SSLContext:
    """Return how to encrypt a connection, from the ``ssl_`` options of a URL.

    Raises:
        ValueError: A file is missing or of no use; the text names the option.
        OSError: It cannot be read.
    """
    for name in _FILES:
        path = cast("str | None", options.get(name))
        if path is not None and not os.access(path, os.R_OK):
            raise ValueError(f"{name}={path}: not there, or not readable")
    ca_file = cast("str | None", options.get("ssl_ca_certs"))
    ca_path = cast("str | None", options.get("ssl_ca_path"))
    try:
        context = ssl.create_default_context(cafile=ca_file, capath=ca_path)
    except ssl.SSLError as error:
        raise ValueError(f"ssl_ca_certs={ca_file}: no PEM certificates ({error})") from error
    _load_own_certificate(context, options)
    if options.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif options.get("ssl_check_hostname") is False:
        context.check_hostname = False
    return context


def _load_own_certificate(context: ssl.SSLContext, options: Mapping[str, object]) -> None:
    file = cast("str | None", options.get("ssl_certfile"))
    if file is None:
        return
    key_file = cast("str | None", options.get("ssl_keyfile"))
    # Never None: OpenSSL would ask for it on the terminal.
    password = cast("str", options.get("ssl_password", ""))
    try:
        context.load_cert_chain(file, key_file, password)
    except ssl.SSLError as error:
        raise ValueError(
            f"ssl_certfile={file}: no certificate with its key, or a wrong ssl_password ({error})"
        ) from error


def tls_refusal(error: BaseException) -> str | None:
    """Return what is wrong between the two ends, None if another try may help.

    Args:
        error: What redis-py raised; the reason is among its causes.
    """
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not accepted ({cause.verify_message}): "
                "name the CA that signed it, with ssl_ca_certs"
            )
        # Not every one has a reason: Python makes some without.
        reason = getattr(cause, "reason", None) if isinstance(cause, ssl.SSLError) else None
        if reason is None:
            continue
        if _ALERT in reason and any(sign in reason for sign in _OF_A_CERTIFICATE):
            return (
                f"it does not accept our certificate ({reason}): "
                "name one that it accepts, with ssl_certfile and ssl_keyfile"
            )
        if reason in _NO_TLS:
            return f"it does not speak TLS ({reason}): write redis:// for rediss://"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
