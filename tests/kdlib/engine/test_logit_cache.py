"""LogitCache: a teacher's logits, each computed at most once."""

import pytest
import torch
from gated import images as some_images
from gated import lively

from kdlib import build_model, load_data
from kdlib.engine import LogitCache
from kdlib.engine.logit_cache import folded
from kdlib.engine.plan import plan
from kdlib.store import fingerprint


@pytest.fixture
def images():
    return load_data("digits").first(64)


@pytest.fixture
def make_teacher():
    """Make a teacher whose batch norms have statistics, as those of a trained one."""

    def make():
        teacher = build_model("resnet8-x0.25", classes=10, channels=1, seed=0)
        teacher(load_data("digits").batch(torch.arange(200)))
        return teacher.eval()

    return make


@pytest.fixture
def make_cache(make_teacher, images):
    """Make a cache; a second CPU serves as memory apart from the teacher's device."""

    def make(place="cpu"):
        cache = LogitCache(make_teacher(), images)
        cache.place = place and torch.device(place)
        return cache

    return make


@pytest.fixture
def requests(images):
    """Images and views of three epochs: of 576 possible ones, some come twice."""
    return [plan(0, epoch, len(images), images.views) for epoch in range(3)]


def pairs(index, view):
    return set(zip(index.tolist(), view.tolist(), strict=True))


every_place = pytest.mark.parametrize("place", ["cpu", "cpu:0"])


def test_cached_logits_equal_computed_ones_to_the_bit(requests, make_cache):
    cache, without = make_cache(), make_cache(None)
    assert cache.chunk == 64
    for index, view in requests:
        computed = cache.compute(index, view)
        assert torch.equal(cache.logits(index, view), computed)
        assert torch.equal(without.logits(index, view), computed)
    assert without.known is None


def test_logits_are_those_of_the_teacher_for_these_views(
    images, requests, make_teacher, make_cache
):
    teacher = make_teacher()
    before = fingerprint(teacher.state_dict())
    index, view = requests[0]
    with torch.no_grad():
        expected = teacher(images.batch(index, view))
    torch.testing.assert_close(LogitCache(teacher, images).logits(index, view), expected)
    assert fingerprint(teacher.state_dict()) == before


def test_logits_do_not_depend_on_when_they_were_computed(requests, make_cache):
    first, second = make_cache(), make_cache()
    for index, view in requests:
        first.logits(index, view)
    index, view = (torch.cat(parts) for parts in zip(*requests, strict=True))
    shuffled = torch.randperm(len(index), generator=torch.manual_seed(1))
    for part in shuffled.split(37):
        second.logits(index[part], view[part])
    assert torch.equal(first.logits(index, view), second.logits(index, view))


@every_place
def test_each_view_of_each_image_is_computed_once(requests, make_cache, monkeypatch, place):
    cache, resident, computed = make_cache(place), make_cache(), []
    compute = cache._pass
    monkeypatch.setattr(cache, "_pass", lambda i, v: computed.append(pairs(i, v)) or compute(i, v))
    for index, view in (*requests, *requests):
        assert torch.equal(cache.logits(index, view), resident.logits(index, view))
    asked = set.union(*(pairs(index, view) for index, view in requests))
    assert set.union(*computed) == asked
    assert sum(map(len, computed)) == len(asked)


def test_every_pass_has_one_shape_and_known_logits_need_none(requests, make_cache):
    cache, shapes = make_cache(), []
    cache.teacher.register_forward_hook(lambda _, inputs, __: shapes.append(len(inputs[0])))
    index, view = requests[0]
    cache.logits(index[:5], view[:5])
    cache.logits(index, view)
    assert shapes == [64, 64]
    cache.logits(index, view)
    assert shapes == [64, 64]


def test_a_request_may_name_one_view_twice(make_cache):
    twice = make_cache().logits(torch.tensor([3, 5, 3]), torch.tensor([2, 0, 2]))
    assert torch.equal(twice[0], twice[2])
    assert not torch.equal(twice[0], twice[1])


def test_rows_for_a_table_elsewhere_are_written_at_the_next_read(requests, make_cache):
    cache = make_cache("cpu:0")
    first = cache.logits(*requests[0])
    assert len(cache._copying) == 1  # nothing waited for them
    assert torch.equal(cache.logits(*requests[0]), first)
    assert not cache._copying


@every_place
def test_logits_that_were_not_written_are_not_known(requests, make_cache, monkeypatch, place):
    """As where memory runs out after the pass."""
    cache, fresh = make_cache(place), make_cache()
    passes, compute, sent = [], cache._pass, cache._sent

    def out_of_memory(tensor):
        if passes:
            raise torch.OutOfMemoryError
        return sent(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_sent", out_of_memory)
        patch.setattr(cache, "_pass", lambda i, v: passes.append(1) or compute(i, v))
        with pytest.raises(torch.OutOfMemoryError):
            cache.logits(*requests[0])
    assert torch.equal(cache.logits(*requests[0]), fresh.logits(*requests[0]))


def test_a_teacher_in_train_mode_is_refused(images, make_teacher):
    with pytest.raises(ValueError, match="eval mode"):
        LogitCache(make_teacher().train(), images)


@pytest.mark.parametrize("name", ["densenet-bc-28-6", "googlenet-x0.05", "resnet8-x0.3"])
def test_a_logit_has_the_same_bits_at_any_place_of_a_chunk(name):
    """A matrix product differs where the last layer's inputs are no multiple of 16."""
    images = load_data("digits").first(200)
    network = build_model(name, images.classes, images.channels, seed=0).eval()
    cache = LogitCache(network, images)
    index = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:64]
    view = torch.zeros_like(index)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(cache._pass(index[shuffled], view), cache._pass(index, view)[shuffled])


# --- folding --------------------------------------------------------------------------------------

FAMILIES = [
    *("mobilenetv2-x0.15", "shufflenetv2-x0.18", "resnet14", "wrn-10-1-x0.5", "vgg13-x0.125"),
    *("densenet-bc-28-6", "googlenet-x0.05", "lenet"),
]


def batch_norms(network):
    return sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_teacher_has_the_same_logits_and_fewer_batch_norms(name):
    teacher, x = lively(name), some_images(8, 28 if name == "lenet" else 8)
    before = fingerprint(teacher.state_dict())
    ours, theirs = folded(teacher), teacher(x)
    torch.testing.assert_close(ours(x), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert batch_norms(ours) < batch_norms(teacher) or name == "lenet"
    assert folded(ours) is ours
    assert fingerprint(teacher.state_dict()) == before


def test_no_batch_norm_is_left_where_each_follows_a_convolution():
    assert batch_norms(folded(lively("resnet14"))) == 0
    assert batch_norms(folded(lively("densenet-bc-28-6"))) > 0
