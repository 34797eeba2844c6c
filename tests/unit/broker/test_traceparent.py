import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider

from mixfleet_broker.settings import traces_exporter
from mixfleet_broker.traceparent import current_traceparent, valid_traceparent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        f"00-{TRACE}-{SPAN}",
        f"01-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_what_is_no_traceparent_is_none(text: str | None) -> None:
    assert valid_traceparent(text) is None


def test_a_good_one_stays_as_it_is() -> None:
    assert valid_traceparent(f"00-{TRACE}-{SPAN}-01") == f"00-{TRACE}-{SPAN}-01"


def test_the_current_spans_is_a_good_one() -> None:
    with TracerProvider().get_tracer("test").start_as_current_span("x") as span:
        found = current_traceparent()
    assert found is not None
    assert valid_traceparent(found) == found
    assert f"{span.get_span_context().span_id:016x}" in found
    assert current_traceparent() is None


def test_who_does_not_trace_does_not_import_it() -> None:
    program = (
        "import sys\nimport mixfleet\nfrom mixfleet_broker import traceparent, tracing\n"
        "assert traceparent.current_traceparent() is None\n"
        "assert tracing.traces_if_wanted('x') is None\n"
        "assert 'opentelemetry' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


@pytest.mark.parametrize(
    ("environ", "exporter"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, None),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"}, None),
    ],
)
def test_opentelemetrys_own_variables_switch_traces_on(
    environ: dict[str, str], exporter: str | None
) -> None:
    assert traces_exporter(environ) == exporter
