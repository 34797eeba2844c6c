import json
from pathlib import Path

import pytest

from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.generation import SamplingDefaults, sampling_defaults


def checkpoint(folder: Path, **config: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_without_an_opinion_gets_ours(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == SamplingDefaults()
    assert sampling_defaults(checkpoint(tmp_path, eos_token_id=2)) == SamplingDefaults()


def test_the_makers_settings_count(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, temperature=0.2, top_p=0.9, top_k=50, do_sample=True)
    assert sampling_defaults(folder) == SamplingDefaults(temperature=0.2, top_p=0.9, top_k=50)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 3), ("temperature", "hot"), ("top_p", -0.1), ("top_k", 1.5), ("top_k", True)],
)
def test_a_value_out_of_range_is_named(name: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {name}="):
        sampling_defaults(checkpoint(tmp_path, **{name: value}))
