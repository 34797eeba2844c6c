import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mixfleet_broker.errors import ConfigError
from mixfleet_broker.settings import Settings
from mixfleet_engine.errors import ConfigError as EngineConfigError
from mixfleet_worker.config import MODEL_NAME, engine_config, new_worker_id, worker_config
from support.tiny_model import tiny_config, write_hf_checkpoint


def test_the_model_is_called_as_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "mixtral-8x7b"
    path.mkdir()
    assert worker_config(Settings(model_path=path)).model == "mixtral-8x7b"


def test_a_link_is_called_as_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "current").symlink_to("real")
    assert worker_config(Settings(model_path=tmp_path / "current")).model == "real"


def test_a_given_name_wins(tmp_path: Path) -> None:
    assert worker_config(Settings(model_path=tmp_path, model="mine")).model == "mine"


def test_a_directory_that_cannot_name_a_model_asks_for_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a model"
    path.mkdir()
    with pytest.raises(ConfigError, match="--model NAME"):
        worker_config(Settings(model_path=path))


def test_a_worker_without_a_model_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="mixfleet up"):
        worker_config(Settings())


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        worker_config(Settings(model_path=tmp_path / "nowhere"))


def test_a_simulated_worker_needs_no_model_and_says_so_in_its_name() -> None:
    config = worker_config(Settings(), simulated=True, simulated_step_s=0.5)
    assert (config.model, config.model_path, config.simulated_step_s) == ("simulated", None, 0.5)


def test_a_simulated_worker_with_a_model_is_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="simulated"):
        worker_config(Settings(model_path=tmp_path), simulated=True)


def test_a_simulated_engine_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match="tp=2: a simulated engine is one process"):
        worker_config(Settings(), simulated=True, tp=2)


def test_a_model_must_be_one_that_so_many_ranks_can_share(tmp_path: Path) -> None:
    model = tiny_config(n_layers=1, n_heads=8, n_kv_heads=4, hidden_dim=192)
    settings = Settings(model_path=write_hf_checkpoint(tmp_path / "tiny", model))
    assert worker_config(settings, tp=4).model == "tiny"
    with pytest.raises(EngineConfigError, match=r"tp=8: .*n_kv_heads=4.* work: 1, 2, 4$"):
        worker_config(settings, tp=8)
    with pytest.raises(EngineConfigError, match=r"tp=2: .* 64 inputs a rank.*int4.* work: 1$"):
        worker_config(replace(settings, weight_dtype="int4"), tp=2)


def test_worker_ids_are_unique_and_name_the_process() -> None:
    ids = {new_worker_id() for _ in range(50)}
    assert len(ids) == 50
    for worker_id in ids:
        assert MODEL_NAME.fullmatch(worker_id)
        assert re.search(rf"-{os.getpid()}-", worker_id)


def test_the_engine_gets_its_settings() -> None:
    settings = Settings(
        kv_cache_gib=0.5, max_batch_size=3, max_step_tokens=64, context_length=99, threads=2
    )
    config = engine_config(settings)
    assert config.kv_cache_bytes == 1 << 29
    assert (config.max_batch_size, config.max_step_tokens) == (3, 64)
    assert (config.context_length, config.threads) == (99, 2)
    assert engine_config(Settings()).kv_cache_bytes is None
