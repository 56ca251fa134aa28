"""Agreement of the gradients of two terms, against two backward passes."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kdbook.stc import collaboration, early_error, gradient_cosines, pair_name
from kdlib import KD, STC, build_model, load_data, measure, store, train
from kdlib.engine.plan import mix
from kdlib.methods import FactorTransfer, Hint, multi_stage, paraphrase


@pytest.fixture
def wide(tiny):
    return tiny(epochs=2, model="resnet8-x0.5", keep=(1,))


def batch_of(count):
    """The first training images of a ``tiny`` run, and their labels."""
    images = load_data("digits").first(128).first(count)
    return images.batch(torch.arange(count)), images.labels


def agreement(model, one, other, stages):
    """Rows (stage, cosine, ratio) of two losses of a model, by two backward passes in numpy."""
    gradients = []
    for loss in (one, other):
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients.append(
            [
                np.concatenate([w.grad.double().numpy().ravel() for w in part.parameters()])
                for part in [model.stem, *model.body][:stages]
            ]
        )
    lengths = [[np.sqrt((g**2).sum()) for g in side] for side in gradients]
    return [
        (k, gradients[0][k] @ gradients[1][k] / a / b, a / b)
        for k, (a, b) in enumerate(zip(*lengths, strict=True))
    ]


def assert_rows(table, epoch, expected):
    rows = table[table.epoch == epoch]
    assert rows.stage.tolist() == [stage for stage, _, _ in expected]
    assert rows.cosine.tolist() == pytest.approx([c for _, c, _ in expected], rel=1e-3, abs=1e-5)
    assert rows.ratio.tolist() == pytest.approx([ratio for _, _, ratio in expected], rel=1e-3)


def adapter_of(run, epoch):
    with torch.random.fork_rng():
        torch.manual_seed(mix("parts", run.seed))
        adapter = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
    if epoch:
        adapter.load_state_dict(store.select(store.load_modules(run, epoch), "adapter."))
    return adapter.train()


@pytest.mark.parametrize("at", [None, 1])
def test_cosines_equal_those_of_two_backward_passes(tiny, wide, at):
    run = tiny(keep=(1,), seed=3, method=STC(wide, at=at, kd_weight=0.5))
    trained = train([run])[0]
    table = gradient_cosines(trained, "stc", "ce", [0, 1, 2], count=100)
    assert list(table) == ["epoch", "stage", "cosine", "ratio"]
    assert table.epoch.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    teacher, (x, labels) = store.find_record(wide).model(at), batch_of(100)
    for epoch in (0, 1, 2):
        model = build_model(run.model, 10, 1, seed=mix("weights", 3))
        if epoch:
            model.load_state_dict(trained.model(epoch).state_dict())
        feature = model.train().until(2, x)
        logits = model.resume(2, feature)
        together = teacher.resume(2, adapter_of(run, epoch)(feature))
        stc = nn.functional.cross_entropy(together, teacher(x).softmax(1))
        ce = nn.functional.cross_entropy(logits, labels)
        assert_rows(table, epoch, agreement(model, stc, ce, stages=3))
    assert table.cosine.abs().max() < 0.9999
    assert table.cosine.nunique() == table.ratio.nunique() == 9


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_stages_behind_the_cut_are_left_out(tiny, wide, cut):
    trained = train([tiny(method=STC(wide, cut=cut))])[0]
    there, back = (
        gradient_cosines(trained, *terms, [0, 2]) for terms in (("stc", "ce"), ("ce", "stc"))
    )
    assert there.stage.tolist() == back.stage.tolist() == 2 * list(range(cut + 1))
    np.testing.assert_allclose(there.cosine, back.cosine, rtol=1e-6)
    np.testing.assert_allclose(there.ratio, 1 / back.ratio, rtol=1e-6)


def test_terms_of_other_methods_can_be_compared(tiny, wide):
    paraphraser = paraphrase(wide, wide.recipe)
    methods = [KD(wide), Hint(wide), FactorTransfer(wide, paraphraser=paraphraser)]
    results = train([tiny(method=method) for method in methods])
    for trained, term in zip(results, ("kd", "hint", "factor"), strict=True):
        table = gradient_cosines(trained, term, "ce", [0, 2], count=64)
        assert table.stage.tolist() == [0, 1, 2, 3] * 2
        assert table.cosine.abs().max() < 0.9999
    x, labels = batch_of(64)
    teacher, model = store.find_record(wide).model(), results[0].model().train()
    logits = model.requires_grad_(True)(x)
    p, q = (teacher(x) / 5).softmax(1), (logits / 5).softmax(1)
    kd = 25 * (p * (p / q).log()).sum(1).mean()
    ce = nn.functional.cross_entropy(logits, labels)
    table = gradient_cosines(results[0], "kd", "ce", [2], count=64)
    assert_rows(table, 2, agreement(model, kd, ce, stages=4))


def test_comparing_gradients_changes_nothing(tiny, wide):
    trained = train([tiny(keep=(1,), method=STC(wide, kd_weight=0.9))])[0]
    paths = [path for run in (trained.run, wide) for path in sorted(store.folder(run).glob("*"))]
    before, state = [path.read_bytes() for path in paths], torch.get_rng_state()
    first = gradient_cosines(trained, "stc", "ce", [0, 1, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.read_bytes() for path in paths] == before
    torch.manual_seed(99)
    options = {"first": "stc", "second": "ce", "epochs": [0, 1, 2]}
    pd.testing.assert_frame_equal(measure(trained, gradient_cosines, **options), first)


def test_epoch_0_of_a_later_stage_is_the_start_of_the_stage(tiny, wide):
    first, second = train(multi_stage(tiny(method=STC(wide)), (2, 2)))
    end = gradient_cosines(first, "stc", "ce", [2])
    begin = gradient_cosines(second, "stc", "ce", [0])
    np.testing.assert_allclose(begin.cosine, end.cosine, rtol=1e-3)


def test_the_collaboration_of_any_student_is_that_of_its_feature_in_the_teachers_back(tiny):
    teacher, student = train([tiny(model="resnet14-x0.25"), tiny()])
    row = measure([student, teacher], collaboration, cut=2).iloc[0]
    test = load_data("digits", "test")
    x = test.batch(torch.arange(len(test)))
    ours, theirs = (network.model().until(2, x).double() for network in (student, teacher))
    logits = teacher.model().double().resume(2, ours)
    wrong = (logits.argmax(1) != test.labels).double().mean().item()
    assert row.collaboration_error == pytest.approx(100 * wrong, abs=0.3)
    apart = [((a - b) ** 2).sum() / (b**2).sum() for a, b in zip(ours, theirs, strict=True)]
    assert row.distance == pytest.approx(np.mean([a.item() for a in apart]), rel=1e-4)
    own = measure([teacher, teacher], collaboration, cut=2).iloc[0]
    assert own.distance == own.attention == 0
    assert own.collaboration_error == pytest.approx(100 - teacher.final["test_top1"], abs=1e-3)
    with pytest.raises(ValueError, match="need an adapter after stage 2"):
        collaboration(train([tiny(model="resnet8-x0.5")])[0], teacher, 2)


def test_the_early_error_is_that_before_the_first_fall_of_the_rate(tiny):
    trained = train([tiny(epochs=3, milestones=(2,))])[0]
    first, second, _ = 100 - trained.log.test_top1
    assert early_error(trained) == pytest.approx((first + second) / 2)
    assert trained.log.lr.nunique() == 2


def test_pairs_have_the_papers_names():
    assert pair_name("resnet20<-wrn40-1") == "ResNet-20 ← WRN-40-1"
