import pytest

from mixfleet_engine.machines import named_machines
from mixfleet_engine.published import PUBLISHED, published_name
from support.memory_machines import GIB, machine

ISSUED = {
    *(f"{n}x {gpu}" for n in (1, 2, 4, 8) for gpu in ("A100 80GB", "H100 80GB")),
    "1x H200 141GB",
    "4x A6000 48GB",
    "2x 6000 Ada 48GB",
    "4x 6000 Ada 48GB",
    "8x 24GB",
}


def test_the_usual_machines_are_there_once_each() -> None:
    labels = [machine.label for machine in named_machines()]
    assert set(labels) >= ISSUED
    assert len(labels) == len(set(labels))


def test_a_process_sees_a_little_less_than_the_name_says() -> None:
    for found in named_machines():
        named_gb = int("".join(c for c in found.name.split()[-1] if c.isdigit()))
        assert 0.95 * named_gb * 1e9 < found.memory_bytes < named_gb * GIB


def test_available_is_all_memory_unless_others_have_some() -> None:
    assert machine(80).available_bytes == 80 * GIB
    assert machine(80, free_gib=30).available_bytes == 30 * GIB
    assert machine(80, free_gib=90).available_bytes == 80 * GIB


def test_labels_count_what_can_be_counted() -> None:
    assert machine(80, num_devices=4).label == "4x GPU"
    assert machine(80, kind="cpu").label == "cpu"
    assert machine(80, kind="cpu", num_devices=2).label == "2 ranks on cpu"


def test_more_devices_are_the_same_devices() -> None:
    assert machine(48).with_devices(4) == machine(48, num_devices=4)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("8x7b", "mixtral-8x7b"),
        ("8x22B", "mixtral-8x22b"),
        ("Mixtral-8x7B", "mixtral-8x7b"),
        ("mixtral-8x22b", "mixtral-8x22b"),
        ("8x70b", None),
        ("mixtral", None),
        ("", None),
    ],
)
def test_published_models_go_by_short_and_full_names(name: str, full: str | None) -> None:
    assert published_name(name) == full


def test_published_contexts_are_those_the_models_were_trained_with() -> None:
    lengths = {name: model.context_length for name, model in PUBLISHED.items()}
    assert lengths == {"mixtral-8x7b": 32_768, "mixtral-8x22b": 65_536}
