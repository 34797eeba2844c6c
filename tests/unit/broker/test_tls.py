"""What an error of the TLS layer means to the user. Real handshakes are in tests/redis."""

import ssl

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from mixfleet_broker.tls import tls_context, tls_refusal


def tls_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("reason", "meaning"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "does not accept our certificate"),
        ("TLSV1_ALERT_UNKNOWN_CA", "does not accept our certificate"),
        ("SSLV3_ALERT_BAD_CERTIFICATE", "does not accept our certificate"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "does not accept our certificate"),
        ("WRONG_VERSION_NUMBER", "does not speak TLS"),
        ("RECORD_LAYER_FAILURE", "does not speak TLS"),
    ],
)
def test_a_handshake_that_cannot_ever_succeed_is_told_from_the_error_that_hides_it(
    reason: str, meaning: str
) -> None:
    shown = RedisConnectionError("Error while reading from h:1")
    shown.__context__ = tls_error(reason)
    assert meaning in (tls_refusal(shown) or "")


@pytest.mark.parametrize(
    "cause", [None, tls_error("UNEXPECTED_EOF_WHILE_READING"), ssl.SSLEOFError(8, "EOF")]
)
def test_a_connection_that_was_only_cut_may_be_tried_again(cause: Exception | None) -> None:
    shown = RedisConnectionError("Connection closed by server.")
    shown.__context__ = cause
    assert tls_refusal(shown) is None


@pytest.mark.parametrize(
    ("options", "verify_mode", "check_hostname"),
    [
        ({}, ssl.CERT_REQUIRED, True),
        ({"ssl_cert_reqs": "required"}, ssl.CERT_REQUIRED, True),
        ({"ssl_cert_reqs": "optional"}, ssl.CERT_REQUIRED, True),
        ({"ssl_check_hostname": False}, ssl.CERT_REQUIRED, False),
        ({"ssl_cert_reqs": "none"}, ssl.CERT_NONE, False),
    ],
)
def test_server_and_host_are_checked_unless_told_otherwise(
    options: dict[str, object], verify_mode: ssl.VerifyMode, check_hostname: bool
) -> None:
    context = tls_context(options)
    assert context.verify_mode is verify_mode
    assert context.check_hostname is check_hostname
