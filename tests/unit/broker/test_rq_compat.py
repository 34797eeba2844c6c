import pickle

import pytest

from mixfleet_broker.rq_compat import REFUSING_CALL, refuse


def test_the_data_of_our_jobs_is_a_call_of_refuse_with_nothing_in_it() -> None:
    function = f"{refuse.__module__}.{refuse.__qualname__}"
    assert pickle.loads(REFUSING_CALL) == (function, None, (), {})


def test_rqs_own_worker_is_told_which_worker_to_use() -> None:
    with pytest.raises(RuntimeError, match="`mixfleet worker`"):
        refuse()
