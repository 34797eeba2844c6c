import re
from pathlib import Path

import pytest

import mixfleet_broker
from mixfleet_broker.keys import (
    CHANNEL,
    CLAIM,
    EXECUTION,
    JOB,
    KEYS,
    QUEUE,
    SUSPENDED,
    WORKER_EXECUTIONS,
    lua_key_table,
)

PACKAGE = Path(next(iter(mixfleet_broker.__path__)))


def test_names_are_filled_in_in_order() -> None:
    assert QUEUE("tiny") == "rq:queue:tiny"
    assert JOB("j1") == "rq:job:j1"
    assert EXECUTION("j1", "t1") == "rq:execution:j1:t1"
    assert WORKER_EXECUTIONS("w1") == "rq:worker:w1:executions"
    assert CLAIM("tiny", "w1", "c1") == "mixfleet:claim:tiny:w1:c1"
    assert SUSPENDED() == "rq:suspended"


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_a_key_takes_exactly_its_names(names: tuple[str, ...]) -> None:
    with pytest.raises(TypeError, match="takes 1 names"):
        CHANNEL(*names)


def test_every_key_says_what_it_is() -> None:
    assert len({key.name for key in KEYS}) == len(KEYS)
    assert len({key.template for key in KEYS}) == len(KEYS)
    for key in KEYS:
        assert key.template.startswith(("rq:", "mixfleet:"))
        assert key.type in ("string", "list", "set", "zset", "hash", "stream")
        assert all((key.writers, key.lifetime, key.meaning))


def test_no_other_file_spells_a_key() -> None:
    spelled = re.compile(r"""['"`](rq|mixfleet):[a-z]""")
    for path in (*PACKAGE.glob("*.py"), *PACKAGE.glob("scripts/*.lua")):
        if path.name != "keys.py":
            assert not spelled.search(path.read_text()), path.name


def test_the_scripts_use_only_keys_that_exist() -> None:
    names = {key.name for key in KEYS}
    for path in PACKAGE.glob("scripts/*.lua"):
        assert set(re.findall(r"\bkey\.(\w+)\(", path.read_text())) <= names, path.name


def test_the_lua_table_has_one_function_for_each_key() -> None:
    table = lua_key_table()
    assert "function key.queue(model) return 'rq:queue:'..model end" in table
    assert (
        "function key.execution(job_id, token) return 'rq:execution:'..job_id..':'..token end"
        in table
    )
    assert table.count("function key.") == len(KEYS)


def test_only_the_storage_files_import_redis() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.stem in ("keys", "messages", "event_codec", "packing", "schema", "stock_job"):
            assert not re.search(r"^\s*(import|from) redis\b", path.read_text(), re.MULTILINE)
