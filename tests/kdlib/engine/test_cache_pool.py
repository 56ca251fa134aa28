"""CachePool: the places of logit caches, and the ones that are removed."""

import pytest
import torch

from kdlib import build_model, load_data
from kdlib.engine import LogitCache
from kdlib.engine import cache_pool as pool_module
from kdlib.engine.cache_pool import HOST, CachePool


@pytest.fixture
def make_cache():
    images = load_data("digits").first(64)
    teacher = build_model("resnet8-x0.25", classes=10, channels=1, seed=0).eval()
    return lambda: LogitCache(teacher, images)


@pytest.fixture
def room_for_two(make_cache, monkeypatch):
    one = make_cache().bytes(HOST)
    monkeypatch.setattr(pool_module, "_memory", lambda device: 4 * one)


def test_each_cache_is_made_once(make_cache, room_for_two):
    pool, made = CachePool(), []
    pool.serve(students=3, teachers={"a", "b", "c"})
    for _ in range(3):
        for name in "abc":
            pool.get((name,), lambda name=name: made.append(name) or make_cache())
    assert made == ["a", "b", "c"]
    assert [pool.get((name,), None).place for name in "abc"] == [HOST, HOST, None]


def test_caches_that_no_student_needs_are_removed_first(make_cache, room_for_two):
    pool = CachePool()
    for name in "abc":
        pool.serve(students=1, teachers={name})
        assert pool.get((name,), make_cache).place == HOST
    assert ("a",) not in pool.caches


def test_a_table_that_does_not_fit_beside_its_teacher_lies_in_the_hosts_memory(
    make_cache, monkeypatch
):
    cache, gpu = make_cache(), torch.device("cpu", 0)  # a second CPU in place of a GPU
    cache.device = cache.place = gpu
    teacher = sum(p.numel() * p.itemsize for p in cache.teacher.parameters())
    table = cache.bytes(gpu) - teacher
    for room, place in (
        ({gpu: teacher + table, HOST: 0}, gpu),
        ({gpu: teacher, HOST: table}, HOST),
        ({gpu: teacher, HOST: table - 1}, None),
    ):
        monkeypatch.setattr(pool_module, "_memory", lambda device, room=room: 2 * room[device])
        assert CachePool().get(("a",), lambda: cache).place == place


def test_caches_of_short_lived_teachers_keep_no_training_logits(make_cache):
    pool = CachePool()
    pool.get(("a",), make_cache)
    pool.expect(short_lived={"a", "b"})
    caches = [pool.get((name,), make_cache) for name in "ab"]
    assert [cache.place for cache in caches] == [HOST, None]  # made before, made after
    pool.expect(short_lived=set())
    assert not pool.caches


@pytest.mark.parametrize(("students", "loaded"), [(1, 16), (5, 20)])
def test_only_the_last_few_short_lived_teachers_stay_loaded(make_cache, students, loaded):
    pool = CachePool()
    pool.expect({str(k) for k in range(25)})
    pool.serve(students, set())
    for k in range(25):
        pool.get((str(k),), make_cache)
    assert [*pool.caches] == [(str(k),) for k in range(25 - loaded, 25)]


def test_caches_of_one_teacher_share_its_network(make_cache):
    pool, cache = CachePool(), make_cache()
    assert pool.teacher("a", HOST) is None
    pool.get(("a", "train"), lambda: cache)
    assert pool.teacher("a", HOST) is cache.teacher
    assert pool.teacher("b", HOST) is None
    pool.clear()
    assert pool.teacher("a", HOST) is None


def test_the_hosts_memory_is_limited_by_its_container(monkeypatch, tmp_path):
    monkeypatch.setattr(pool_module, "CGROUP", tmp_path / "memory.max")
    monkeypatch.delenv("KDLIB_GPUS", raising=False)
    whole = pool_module._memory(HOST)
    for text, expected in (("max\n", whole), ("1000000\n", 1_000_000)):
        (tmp_path / "memory.max").write_text(text)
        assert pool_module._memory(HOST) == expected
    monkeypatch.setenv("KDLIB_GPUS", "0,1")
    assert pool_module._memory(HOST) == 500_000
