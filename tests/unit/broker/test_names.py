import pytest

from mixfleet_broker.errors import MessageError
from mixfleet_broker.names import check_job_id, check_model_name, check_tenant, check_worker_id


@pytest.mark.parametrize("name", ["mixtral-8x7b", "a", "A.b_c-9", "x" * 64])
def test_a_model_a_worker_and_a_tenant_may_be_named_so(name: str) -> None:
    assert check_model_name(name) == name
    assert check_worker_id(name) == name
    assert check_tenant(name) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a:b", "a/b", "x" * 65, "ü", "a\n"])
def test_a_model_a_worker_and_a_tenant_may_not_be_named_so(name: str) -> None:
    with pytest.raises(MessageError, match="model="):
        check_model_name(name)
    with pytest.raises(MessageError, match="worker_id="):
        check_worker_id(name)
    with pytest.raises(MessageError, match="tenant="):
        check_tenant(name)


@pytest.mark.parametrize("job_id", ["", "a:b", "a.b", "a b", "x" * 129, "a\n", "{a}"])
def test_a_job_id_never_breaks_a_key(job_id: str) -> None:
    with pytest.raises(MessageError, match="job_id="):
        check_job_id(job_id)
