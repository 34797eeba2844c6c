import threading

import pytest

from mixfleet_broker.errors import BrokerUnavailableError
from mixfleet_broker.key_cache import KeyCache
from mixfleet_broker.key_records import KeyRecord
from mixfleet_broker.key_secrets import new_secret
from support.api_keys import key_record


class Store:
    """Keys by secret, a clock, and a count of the questions."""

    def __init__(self) -> None:
        self.records: dict[str, KeyRecord] = {}
        self.now = 100.0
        self.num_asked = 0

    def find(self, secret: str) -> KeyRecord | None:
        self.num_asked += 1
        return self.records.get(secret)

    def cache(self, max_entries: int = 10) -> KeyCache:
        return KeyCache(self.find, clock=lambda: self.now, ttl_s=2.0, max_entries=max_entries)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.mark.parametrize("is_known", [True, False])
def test_an_answer_is_believed_for_its_time_and_then_asked_for_again(
    store: Store, is_known: bool
) -> None:
    cache, secret = store.cache(), new_secret()
    if is_known:
        store.records[secret] = key_record()
    expected = store.records.get(secret)
    assert [cache.find(secret) for _ in range(3)] == [expected] * 3
    store.now += 1.999
    assert cache.find(secret) == expected
    assert store.num_asked == 1
    store.records = {} if is_known else {secret: key_record()}
    store.now += 0.001
    assert cache.find(secret) == store.records.get(secret)
    assert store.num_asked == 2
    store.now += 1.0
    assert cache.find(secret) == store.records.get(secret)


def test_the_time_counts_from_the_question_not_from_the_answer(store: Store) -> None:
    secret = new_secret()
    store.records[secret] = key_record()

    def slow(asked: str) -> KeyRecord | None:
        store.now += 1.5
        return store.find(asked)

    cache = KeyCache(slow, clock=lambda: store.now, ttl_s=2.0)
    assert cache.find(secret)
    store.records = {}
    store.now += 0.5
    assert cache.find(secret) is None


def test_what_has_not_the_form_of_a_secret_is_never_asked_for(store: Store) -> None:
    cache = store.cache()
    assert cache.find("mf-short") is None
    assert (store.num_asked, len(cache)) == (0, 0)


def test_who_tries_secrets_pushes_no_key_out_and_fills_no_memory(store: Store) -> None:
    cache, secret = store.cache(max_entries=5), new_secret()
    store.records[secret] = key_record()
    cache.find(secret)
    for _ in range(100):
        assert cache.find(new_secret()) is None
    assert len(cache) == 6
    asked_before = store.num_asked
    assert cache.find(secret)
    assert store.num_asked == asked_before


def test_the_oldest_answer_makes_room(store: Store) -> None:
    cache, secrets = store.cache(max_entries=2), [new_secret() for _ in range(3)]
    store.records = dict.fromkeys(secrets, key_record())
    for secret in (*secrets, secrets[2], secrets[1]):
        cache.find(secret)
    assert store.num_asked == 3
    cache.find(secrets[0])
    assert store.num_asked == 4


def test_an_outage_is_not_remembered(store: Store) -> None:
    secret = new_secret()
    store.records[secret] = key_record()
    outages = [BrokerUnavailableError("no Redis answers")]

    def find(asked: str) -> KeyRecord | None:
        if outages:
            raise outages.pop()
        return store.find(asked)

    cache = KeyCache(find, clock=lambda: store.now)
    with pytest.raises(BrokerUnavailableError):
        cache.find(secret)
    assert cache.find(secret)


def test_no_secret_is_kept(store: Store) -> None:
    cache, secret = store.cache(), new_secret()
    cache.find(secret)
    held = [repr(vars(answers)) for answers in (cache._known, cache._unknown)]
    assert secret not in "".join(held)


def test_many_threads_may_ask(store: Store) -> None:
    cache, secrets = store.cache(max_entries=3), [new_secret() for _ in range(8)]
    store.records = dict.fromkeys(secrets[:4], key_record())
    wrong: list[str] = []

    def ask() -> None:
        for i in range(400):
            secret = secrets[i % 8]
            if (cache.find(secret) is not None) != (secret in store.records):
                wrong.append(secret)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert len(cache) == 6
