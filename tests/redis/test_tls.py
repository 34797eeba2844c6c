"""TLS for real: a proxy that speaks it stands before a real server."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixfleet_broker.connection import connect
from mixfleet_broker.errors import BrokerUnavailableError, ConfigError
from support.fake_sentinel import FakeSentinel
from support.redis_server import RedisServer
from support.sentinel import free_port
from support.tls_proxy import Certificates, TlsProxy


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of another authority, that nobody here trusts."""
    return Certificates(tmp_path_factory.mktemp("certificates"), "strangers")


@pytest.fixture
def proxy(redis_url: str, certificates: Certificates) -> Iterator[TlsProxy]:
    with TlsProxy(redis_url, certificates.server_context()) as proxy:
        yield proxy


@pytest.fixture
def strict_proxy(redis_url: str, certificates: Certificates) -> Iterator[TlsProxy]:
    """Takes only clients with a certificate."""
    context = certificates.server_context()
    certificates.demand_of_clients(context)
    with TlsProxy(redis_url, context) as proxy:
        yield proxy


def refusal(url: str) -> str:
    """How connecting fails at once, for one who would otherwise wait for ever."""
    begun = time.monotonic()
    with pytest.raises(BrokerUnavailableError) as caught:
        connect(url, patience_s=None)
    assert time.monotonic() - begun < 3
    return str(caught.value)


def test_a_client_that_trusts_the_authority_speaks_tls(
    proxy: TlsProxy, certificates: Certificates
) -> None:
    with connect(f"rediss://{proxy.address}/0?ssl_ca_certs={certificates.ca_file}") as redis:
        redis.set("a", b"x" * 100_000)
        assert redis.get("a") == b"x" * 100_000
        assert redis.blpop(["nothing"], timeout=0.1) is None
        with redis.pipeline(transaction=False) as pipeline:
            assert pipeline.get("a").ping().execute()[1] is True


def test_a_server_of_an_unknown_authority_is_refused_at_once_and_the_error_says_why(
    proxy: TlsProxy, strangers: Certificates
) -> None:
    for query in ("", f"?ssl_ca_certs={strangers.ca_file}"):
        text = refusal(f"rediss://u:hunter2@{proxy.address}/0{query}")
        assert "its certificate is not accepted" in text
        assert "with ssl_ca_certs" in text
        assert "hunter2" not in text


def test_a_certificate_for_another_host_is_refused_unless_told_otherwise(
    redis_url: str, certificates: Certificates
) -> None:
    with TlsProxy(redis_url, certificates.server_context("other.example")) as proxy:
        url = f"rediss://{proxy.address}/0?ssl_ca_certs={certificates.ca_file}"
        assert "its certificate is not accepted" in refusal(url)
        with connect(f"{url}&ssl_check_hostname=no") as redis:
            assert redis.ping()


def test_without_any_check_every_certificate_is_taken(proxy: TlsProxy) -> None:
    with connect(f"rediss://{proxy.address}/0?ssl_cert_reqs=none") as redis:
        assert redis.ping()


def test_sentinels_and_the_primary_that_they_name_are_spoken_to_in_tls(
    proxy: TlsProxy, certificates: Certificates, strangers: Certificates
) -> None:
    with (
        FakeSentinel(proxy.port) as sentinel,
        TlsProxy(f"redis://127.0.0.1:{sentinel.port}", certificates.server_context()) as entry,
    ):
        url = f"rediss+sentinel://{entry.address}/mymaster/0?ssl_ca_certs="
        with connect(f"{url}{certificates.ca_file}") as redis:
            assert redis.set("a", 1)
        text = refusal(f"{url}{strangers.ca_file}")
        assert "its certificate is not accepted" in text
        # The Sentinels themselves, not only the primary.
        with pytest.raises(BrokerUnavailableError):
            connect(f"redis+sentinel://{entry.address}/mymaster", patience_s=0.1)


def test_a_client_certificate_opens_a_server_that_asks_for_one(
    strict_proxy: TlsProxy, certificates: Certificates
) -> None:
    url = f"rediss://{strict_proxy.address}/0?ssl_ca_certs={certificates.ca_file}"
    with connect(f"{url}&ssl_certfile={certificates.client_file}") as redis:
        assert redis.ping()


def test_a_missing_or_strange_client_certificate_is_named(
    strict_proxy: TlsProxy, certificates: Certificates, strangers: Certificates
) -> None:
    url = f"rediss://{strict_proxy.address}/0?ssl_ca_certs={certificates.ca_file}"
    for query in ("", f"&ssl_certfile={strangers.client_file}"):
        text = refusal(url + query)
        assert "does not accept our certificate" in text
        assert "with ssl_certfile" in text


def test_a_server_without_tls_is_named() -> None:
    port = free_port()
    # A Redis waits for the end of what it takes for a command, or says that it is none.
    with (
        RedisServer("--port", str(port)),
        pytest.raises(BrokerUnavailableError, match=r"does .*speak TLS"),
    ):
        connect(f"rediss://127.0.0.1:{port}/0", patience_s=0.2)


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("ssl_ca_certs=/nowhere/ca.pem", "ssl_ca_certs=/nowhere/ca.pem: not there"),
        ("ssl_ca_certs={nonsense}", "no PEM certificates"),
        ("ssl_certfile={nonsense}", "no certificate with its key"),
        ("ssl_certfile={ca}&ssl_keyfile={other}", "no certificate with its key"),
    ],
)
def test_files_that_cannot_be_used_are_a_config_error_at_once(
    tmp_path: Path,
    certificates: Certificates,
    strangers: Certificates,
    query: str,
    problem: str,
) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense\n")
    files = {"nonsense": nonsense, "ca": certificates.ca_file, "other": strangers.client_file}
    with pytest.raises(ConfigError, match=problem):
        connect(f"rediss://127.0.0.1:1/0?{query.format(**files)}", patience_s=None)


def test_files_that_were_renewed_are_read_when_the_client_connects_again(
    redis_url: str, certificates: Certificates, strangers: Certificates, tmp_path: Path
) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(certificates.ca_file.read_bytes())
    with TlsProxy(redis_url, certificates.server_context()) as proxy:
        redis = connect(f"rediss://{proxy.address}/0?ssl_ca_certs={ca_file}", patience_s=0.5)
        port = proxy.port
    with redis, TlsProxy(redis_url, strangers.server_context(), port=port):
        ca_file.unlink()
        with pytest.raises(BrokerUnavailableError, match=r"ssl_ca_certs=.*ca\.pem: not there"):
            redis.ping()
        ca_file.write_bytes(strangers.ca_file.read_bytes())
        assert redis.ping()
