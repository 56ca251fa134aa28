import pytest
import torch
from gated import images as some_images
from gated import lively

from kdlib import build_model, load_data
from kdlib.engine import LogitCache, plan
from kdlib.engine import logit_cache as cache_module
from kdlib.engine.logit_cache import HOST, CachePool, folded
from kdlib.store import fingerprint


@pytest.fixture
def images():
    return load_data("digits").first(64)


def make_teacher(seed=0):
    """Its batch norms have statistics of their own, as a trained teacher's have."""
    teacher = build_model("resnet8-x0.25", classes=10, channels=1, seed=seed)
    digits = load_data("digits")
    teacher(digits.batch(torch.arange(200)))
    return teacher.eval()


@pytest.fixture
def requests(images):
    """Images and views of three epochs: of 576 possible ones, some come twice."""
    return [plan(0, epoch, len(images), images.views) for epoch in range(3)]


def pairs(index, view):
    return set(zip(index.tolist(), view.tolist(), strict=True))


def test_targets_equal_the_live_teacher_to_the_bit(images, requests):
    labels = LogitCache(make_teacher(), images)
    assert labels.chunk == len(images)
    for index, view in requests:
        assert torch.equal(labels.targets(index, view), labels.live(index, view))


def test_live_is_the_teacher_on_exactly_these_views(images, requests):
    teacher = make_teacher()
    index, view = requests[0]
    with torch.no_grad():
        expected = teacher(images.batch(index, view))
    torch.testing.assert_close(LogitCache(teacher, images).live(index, view), expected)


def test_targets_do_not_depend_on_when_they_were_computed(images, requests):
    first, second = (LogitCache(make_teacher(), images) for _ in range(2))
    for index, view in requests:
        first.targets(index, view)
    index, view = (torch.cat(parts) for parts in zip(*requests, strict=True))
    shuffled = torch.randperm(len(index), generator=torch.manual_seed(1))
    for part in shuffled.split(37):
        second.targets(index[part], view[part])
    assert torch.equal(first.targets(index, view), second.targets(index, view))


def test_each_view_of_each_image_is_computed_at_most_once(images, requests, monkeypatch):
    labels = LogitCache(make_teacher(), images)
    swept, live = [], labels.live
    monkeypatch.setattr(labels, "live", lambda i, v: swept.append(pairs(i, v)) or live(i, v))
    for index, view in (*requests, *requests):
        labels.targets(index, view)
    asked = set.union(*(pairs(index, view) for index, view in requests))
    assert set.union(*swept) == asked
    assert sum(map(len, swept)) == len(asked)


def test_what_is_known_needs_no_teacher(images, requests):
    calls = []
    labels = LogitCache(make_teacher(), images)
    labels.teacher.register_forward_hook(lambda *_: calls.append(1))
    labels.targets(*requests[0])
    assert len(calls) == 1
    labels.targets(*requests[0])
    assert len(calls) == 1


def test_every_sweep_has_one_shape(images, requests):
    labels, shapes = LogitCache(make_teacher(), images), set()
    labels.teacher.register_forward_hook(lambda _, inputs, __: shapes.add(inputs[0].shape[0]))
    for index, view in requests:
        labels.targets(index[:5], view[:5])
        labels.targets(index, view)
    assert shapes == {labels.chunk}


def test_one_view_asked_for_twice_in_a_request_is_answered_twice(images):
    labels = LogitCache(make_teacher(), images)
    twice = labels.targets(torch.tensor([3, 5, 3]), torch.tensor([2, 0, 2]))
    assert torch.equal(twice[0], twice[2])
    assert not torch.equal(twice[0], twice[1])


def test_a_teacher_in_train_mode_is_refused(images):
    with pytest.raises(ValueError, match="eval mode"):
        LogitCache(make_teacher().train(), images)


def test_sweeps_leave_the_teacher_as_it_was(images, requests):
    teacher = make_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    LogitCache(teacher, images).targets(*requests[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


# --- folding --------------------------------------------------------------------------------------

FAMILIES = [
    *("mobilenetv2-x0.15", "shufflenetv2-x0.18", "resnet14", "wrn-10-1-x0.5", "vgg13-x0.125"),
    *("densenet-bc-28-6", "googlenet-x0.05", "lenet"),
]


def batch_norms(network):
    return sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_teacher_answers_as_the_teacher_does(name):
    size = 28 if name == "lenet" else 8
    teacher, x = lively(name), some_images(8, size)
    ours, theirs = folded(teacher), teacher(x)
    torch.testing.assert_close(ours(x), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert batch_norms(ours) < batch_norms(teacher) or name == "lenet"
    assert folded(ours) is ours


def test_no_batch_norm_is_left_where_each_follows_a_convolution():
    assert batch_norms(folded(lively("resnet14"))) == 0
    assert batch_norms(folded(lively("densenet-bc-28-6"))) > 0


def test_folding_leaves_the_teacher_itself_alone():
    teacher = lively("resnet14")
    before = fingerprint(teacher.state_dict())
    folded(teacher)
    assert fingerprint(teacher.state_dict()) == before


# --- a table in the host's memory -----------------------------------------------------------------


@pytest.fixture
def spilled(images):
    """A bank whose table is elsewhere than its teacher: to the bank, another CPU is as good."""
    bank = LogitCache(make_teacher(), images)
    bank.place = torch.device("cpu", 0)
    assert bank.place != bank.device
    return bank


def test_a_spilled_bank_gives_the_same_numbers_and_sweeps_as_little(
    images, requests, spilled, monkeypatch
):
    resident, swept, live = LogitCache(make_teacher(), images), [], spilled.live
    monkeypatch.setattr(spilled, "live", lambda i, v: swept.append(pairs(i, v)) or live(i, v))
    for index, view in (*requests, *requests):
        assert torch.equal(spilled.targets(index, view), resident.targets(index, view))
    asked = set.union(*(pairs(index, view) for index, view in requests))
    assert sum(map(len, swept)) == len(asked)


def test_rows_arrive_when_the_table_is_read_again(requests, spilled):
    first = spilled.targets(*requests[0])
    assert len(spilled.arriving) == 1  # nobody waited for them
    assert torch.equal(spilled.targets(*requests[0]), first)
    assert not spilled.arriving


@pytest.mark.parametrize("place", [torch.device("cpu"), torch.device("cpu", 0)])
def test_labels_that_were_not_written_are_not_known(images, requests, monkeypatch, place):
    """As where memory runs out in between."""
    bank, fresh = (LogitCache(make_teacher(), images) for _ in range(2))
    bank.place, sent = place, bank._sent

    def out_of_memory(tensor):
        if len(swept):
            raise torch.OutOfMemoryError
        return sent(tensor)

    swept, sweep = [], bank._sweep
    with monkeypatch.context() as patch:
        patch.setattr(bank, "_sent", out_of_memory)
        patch.setattr(bank, "_sweep", lambda i, v: swept.append(1) or sweep(i, v))
        with pytest.raises(torch.OutOfMemoryError):
            bank.targets(*requests[0])
    assert torch.equal(bank.targets(*requests[0]), fresh.targets(*requests[0]))


def test_the_hosts_memory_is_what_a_container_may_have(monkeypatch, tmp_path):
    monkeypatch.setattr(cache_module, "CGROUP", tmp_path / "memory.max")
    monkeypatch.delenv("KDLIB_GPUS", raising=False)
    whole = cache_module._memory(HOST)
    for text, expected in (("max\n", whole), ("1000000\n", 1_000_000)):
        (tmp_path / "memory.max").write_text(text)
        assert cache_module._memory(HOST) == expected
    monkeypatch.setenv("KDLIB_GPUS", "0,1")
    assert cache_module._memory(HOST) == 500_000


# --- the shelf ------------------------------------------------------------------------------------


@pytest.fixture
def room_for_two(images, monkeypatch):
    one = LogitCache(make_teacher(), images).bytes(images.device)
    monkeypatch.setattr(cache_module, "_memory", lambda device: 4 * one)


def test_a_shelf_makes_each_bank_once_however_many_take_turns(images, room_for_two):
    shelf, made = CachePool(), []
    shelf.wanted = {"a", "b", "c"}
    for _ in range(3):
        for name in "abc":
            shelf.get((name,), lambda n=name: made.append(n) or LogitCache(make_teacher(), images))
    assert made == ["a", "b", "c"]
    places = [shelf.get((name,), None).place for name in "abc"]
    assert places == [images.device, images.device, None]


def test_banks_that_nobody_wants_make_room(images, room_for_two):
    shelf = CachePool()
    for name in "abc":
        shelf.wanted = {name}
        bank = shelf.get((name,), lambda: LogitCache(make_teacher(), images))
        assert bank.place == images.device
    assert ("a",) not in shelf.banks


def test_a_table_that_does_not_fit_beside_its_teacher_goes_to_the_host(images, monkeypatch):
    """On a GPU; here the teacher is made to believe that the CPU is one."""
    bank, beside = LogitCache(make_teacher(), images), torch.device("cpu", 0)
    bank.device = bank.place = beside
    teacher = sum(p.numel() * p.itemsize for p in bank.teacher.parameters())
    table = bank.bytes(beside) - teacher
    for room, place in (
        ({beside: teacher + table, HOST: 0}, beside),
        ({beside: teacher, HOST: table}, HOST),
        ({beside: teacher, HOST: table - 1}, None),
    ):
        monkeypatch.setattr(cache_module, "_memory", lambda device, room=room: 2 * room[device])
        assert CachePool().get(("a",), lambda: bank).place == place


def test_a_bank_that_does_not_fit_gives_the_same_numbers(images, requests):
    remembering, forgetting = (LogitCache(make_teacher(), images) for _ in range(2))
    forgetting.place = None
    for index, view in requests:
        assert torch.equal(remembering.targets(index, view), forgetting.targets(index, view))
    assert forgetting.known is None


@pytest.mark.parametrize("name", ["densenet-bc-28-6", "googlenet-x0.05", "resnet8-x0.3"])
def test_a_logit_has_the_same_bits_at_any_place_of_a_chunk(name):
    """With inputs of the last layer that are no multiple of 16, a matrix product differs."""
    images = load_data("digits").first(200)
    network = build_model(name, images.classes, images.channels, seed=0).eval()
    bank = LogitCache(network, images)
    index = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:64]
    view = torch.zeros_like(index)
    swept = bank._sweep(index, view)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bank._sweep(index[shuffled], view), swept[shuffled])
