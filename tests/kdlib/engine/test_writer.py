"""Writer: work in order, beside training, and errors that are not lost."""

import threading
import warnings

import pytest
import torch

from kdlib import store, train
from kdlib.engine.writer import SAVING_SHARE, Writer, on_host
from kdlib.errors import StoreError


def test_work_is_done_in_order_in_another_thread():
    writer, done = Writer(), []
    for k in range(5):
        writer.write(lambda k=k: done.append((k, threading.current_thread().name)))
    writer.wait()
    assert [k for k, _ in done] == [0, 1, 2, 3, 4]
    assert threading.current_thread().name not in {name for _, name in done}


def fail():
    raise StoreError("the disk is full")


def test_an_error_is_raised_and_later_work_is_done():
    writer, done = Writer(), []
    started = threading.Event()
    writer.write(started.wait)
    writer.write(fail)
    writer.write(lambda: done.append(1))
    started.set()
    with pytest.raises(StoreError, match="the disk is full"):
        writer.wait()
    assert done == [1]
    writer.wait()  # each error once


def test_a_file_that_cannot_be_written_ends_training(tiny, monkeypatch):
    monkeypatch.setattr(store, "save_modules", lambda *_: fail())
    with pytest.raises(StoreError, match="the disk is full"):
        train([tiny(keep=(1,))])
    assert store.find_record(tiny()) is None


def test_students_share_the_time_of_saving():
    writer = Writer()
    assert writer.may_save(1 / SAVING_SHARE, cost=1)
    writer.students = 16
    assert not writer.may_save(15 / SAVING_SHARE, cost=1)
    assert writer.may_save(16 / SAVING_SHARE, cost=1)


def test_copies_on_the_host_do_not_change():
    weight = torch.zeros(3)
    copy = on_host({"weight": weight})["weight"]
    weight += 1
    assert not copy.any()


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
