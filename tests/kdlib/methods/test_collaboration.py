"""STC: student front and teacher back, joined by an adapter where they do not fit."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    batches,
    final_weights,
    gradients,
    new_trainer,
    parts_fingerprint,
    parts_of,
    same_log,
    step_in_float64,
    watch_teachers,
)
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from kdlib import STC, build_model, load_data, store, train
from kdlib.engine.plan import mix
from kdlib.engine.state import trained_networks
from kdlib.methods import OneStage, multi_stage
from kdlib.store import fingerprint

WITH_KD = {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
PAIRS = {
    "equal": ("resnet8-x0.25", "resnet14-x0.25"),
    "other channels": ("resnet8-x0.25", "resnet14-x0.5"),
    "other family": ("vgg13-x0.0625", "wrn-10-1-x0.25"),
}


# --- the loss -------------------------------------------------------------------------------------


def cross_entropy(logits, probabilities):
    return -(probabilities * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


def softmax(logits):
    return logits.exp() / logits.exp().sum(1, keepdim=True)


BY_HAND = {
    "output": lambda o, z, y: cross_entropy(o, softmax(z)),
    "soft": lambda o, z, y: 16 * cross_entropy(o / 4, softmax(z / 4)),
    "label": lambda o, z, y: cross_entropy(o, torch.eye(5, dtype=o.dtype)[z.argmax(1)]),
    "truth": lambda o, z, y: cross_entropy(o, torch.eye(5, dtype=o.dtype)[y]),
}


def by_hand(step, target, alpha, cut, ce_weight=1.0, kd_weight=0.0, temperature=4.0):
    """The loss of STC with networks taken apart, layer after layer."""
    student, teacher = step.student, step.teacher
    front = nn.Sequential(student.stem, *list(student.body)[:cut])
    back = nn.Sequential(*list(teacher.body)[cut:], teacher.head)
    joint = nn.Sequential(front, *step.parts.values(), back)
    own = nn.Sequential(front, *list(student.body)[cut:], student.head)(step.x)
    z = nn.Sequential(teacher.stem, *teacher.body, teacher.head)(step.x)
    p, q = softmax(z / temperature), softmax(own / temperature)
    kd = temperature**2 * (p * (p / q).log()).sum(1).mean()
    ce = BY_HAND["truth"](own, z, step.labels)
    stc = BY_HAND[target](joint(step.x), z, step.labels)
    return alpha * stc + (1 - alpha) * (ce_weight * ce + kd_weight * kd), stc, own


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("target", BY_HAND)
@pytest.mark.parametrize("weights", [{}, WITH_KD], ids=["alone", "with KD"])
def test_the_loss_and_its_gradient_equal_those_computed_by_hand(tiny, pair, target, weights):
    method = STC(tiny(), alpha=0.3, cut=2, target=target, **weights)
    step = step_in_float64(method, *PAIRS[pair])
    assert (pair == "other channels") == ("adapter" in step.parts)
    logits, terms = method.loss(step)
    loss, stc, own = by_hand(step, target, alpha=0.3, cut=2, **weights)
    torch.testing.assert_close(terms["loss"], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["stc"], stc, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits, own, rtol=1e-12, atol=1e-14)
    modules = [step.student, *step.parts.values()]
    for got, expected in zip(
        gradients(terms["loss"], modules), gradients(loss, modules), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)
    assert terms.keys() == {"loss", "ce", "stc", *(["kd"] if weights else [])}


def test_targets_differ(tiny):
    values = set()
    for target in BY_HAND:
        method = STC(tiny(), target=target)
        step = step_in_float64(method, *PAIRS["equal"])
        taught = torch.tensor([[0.5, 2.0, 1.0, 0.0, 0.0]] * 4, dtype=torch.float64)
        values.add(round(method.loss(step._replace(targets=taught))[1]["stc"].item(), 9))
    assert len(values) == 4


@pytest.mark.parametrize("target", BY_HAND)
def test_the_gradient_equals_finite_differences(tiny, target):
    method = STC(tiny(), alpha=0.4, target=target, **WITH_KD)
    step = step_in_float64(method, "wrn-10-1-x0.1", "resnet8-x0.2", size=4)
    weights = [w for m in (step.student, step.parts["adapter"]) for w in m.parameters()]
    assert gradcheck(lambda *_: method.loss(step)[1]["loss"], weights, fast_mode=True)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_collaboration_moves_the_students_front_alone(tiny, cut):
    method = STC(tiny(), cut=cut)
    step = step_in_float64(method, *PAIRS["other channels"])
    stc = method.loss(step)[1]["stc"]
    stages = [step.student.stem, *step.student.body, step.student.head]
    reached = [all(g.any() for g in gradients(stc, [stage])) for stage in stages]
    assert reached == [True] * (cut + 1) + [False] * (4 - cut)
    assert not any(g.any() for stage in stages[cut + 1 :] for g in gradients(stc, [stage]))
    assert all(g.any() for g in gradients(stc, step.parts.values()))
    stc.backward()
    assert all(p.grad is None for p in step.teacher.parameters())


FAMILIES = [
    "resnet8-x0.25",
    "wrn-10-1-x0.25",
    "vgg13-x0.0625",
    "mobilenetv2-t2-w0.1",
    "resnet50-x0.0625",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teachers_own_front_makes_it_whole_again(tiny, name):
    teacher = build_model(name, 5, 1, seed=0).eval()
    x = torch.randn(3, 1, 16, 16, generator=torch.manual_seed(0))
    twin = build_model(name, 5, 1, seed=0).eval()
    with torch.no_grad():
        for cut in range(1, len(teacher.body) + 1):
            method = STC(tiny(), cut=cut)
            assert method.parts(twin, teacher, x) == {}
            joined = method.joined(twin, teacher, {})["collaboration"]
            assert torch.equal(joined(x), teacher(x))


# --- the adapter ----------------------------------------------------------------------------------


def parts_at_32_pixels(method, student, teacher):
    with torch.device("meta"):
        networks = [build_model(name, 10).eval() for name in (student, teacher)]
        return method.parts(*networks, torch.empty(2, 3, 32, 32))


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("resnet20", "resnet56"),
        ("resnet20", "wrn-40-1"),
        ("vgg13", "wrn-46-4"),
        ("resnet56", "resnet110"),
    ],
)
def test_the_papers_pairs_of_one_width_fit_each_other(tiny, student, teacher, cut):
    assert parts_at_32_pixels(STC(tiny(), cut=cut), student, teacher) == {}


@pytest.mark.parametrize(("cut", "channels"), [(1, 16), (2, 32), (3, 64)])
def test_a_wrn_of_another_width_needs_an_adapter(tiny, cut, channels):
    parts = parts_at_32_pixels(STC(tiny(), cut=cut), "wrn-16-1", "wrn-16-2")
    convolution, norm = parts["adapter"]
    assert parts.keys() == {"adapter"}
    assert convolution.weight.shape == (2 * channels, channels, 1, 1)
    assert convolution.bias is None
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == 2 * channels


@pytest.mark.parametrize(
    ("student", "teacher", "ours", "theirs"),
    [
        ("resnet8-x0.25", "mobilenetv2-t1-w0.1", 16, 8),
        ("mobilenetv2-t1-w0.1", "resnet8-x0.25", 8, 16),
    ],
)
def test_features_of_other_sizes_are_joined(tiny, student, teacher, ours, theirs):
    method = STC(tiny(), cut=1)
    step = step_in_float64(method, student, teacher, size=16)
    resize, convolution, norm = step.parts["adapter"]
    feature = step.student.until(1, step.x)
    resized = resize(feature)
    assert (feature.shape[2], resized.shape[2]) == (ours, theirs)
    if ours > theirs:
        torch.testing.assert_close(resized, F.avg_pool2d(feature, 2))
    else:
        torch.testing.assert_close(resized, feature.repeat_interleave(2, 2).repeat_interleave(2, 3))
    expected = step.teacher.resume(1, norm(convolution(resized)))
    joined = method.joined(step.student, step.teacher, step.parts)["collaboration"]
    torch.testing.assert_close(joined(step.x), expected, rtol=1e-12, atol=0)
    value = method.loss(step)[1]["stc"]
    assert all(g.any() for g in gradients(value, [step.student.stem, step.parts["adapter"]]))


def test_what_differs_in_size_alone_is_joined_too(tiny):
    method = STC(tiny(), cut=1)
    step = step_in_float64(method, "mobilenetv2-t1-w0.25", "resnet8-x0.375", size=16)
    ours, theirs = (network.until(1, step.x).shape[1:] for network in (step.student, step.teacher))
    assert (tuple(ours), tuple(theirs)) == ((6, 8, 8), (6, 16, 16))
    feature = step.parts["adapter"](step.student.until(1, step.x))
    assert feature.shape[1:] == theirs


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def fitting(tiny):
    return tiny(model="resnet14-x0.25", keep=(1,))


@pytest.fixture
def wide(tiny):
    """Needs an adapter from 8 to 16 channels after stage 2."""
    return tiny(epochs=3, model="resnet8-x0.5", keep=(1, 2))


def first_adapter(seed):
    with torch.random.fork_rng():
        torch.manual_seed(mix("parts", seed))
        return nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))


ADAPTER = {f"adapter.{n}" for n in ("0.weight", "1.weight", "1.bias", "1.running_mean")}
ADAPTER |= {"adapter.1.running_var"}


def test_training_equals_a_plain_pytorch_loop(tiny, wide):
    method = STC(wide, at=2, alpha=0.3, **WITH_KD)
    run = tiny(milestones=(1,), method=method, seed=4)
    trained = train([run])[0]
    taught_by, images = store.find_record(wide).model(2), load_data("digits").first(128)
    model = build_model(run.model, classes=10, channels=1, seed=mix("weights", 4)).train()
    model, adapter = model.to(memory_format=torch.channels_last), first_adapter(seed=4)
    parameters = [*model.parameters(), *adapter.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch, index, view in batches(run, images):
        optimizer.param_groups[0]["lr"] = 0.05 if epoch < 1 else 0.005
        x = images.batch(index, view)
        feature = model.body[1](model.body[0](model.stem(x)))
        logits = model.head(model.body[2](feature))
        together = taught_by.head(taught_by.body[2](adapter(feature)))
        taught = taught_by(x)
        stc = F.cross_entropy(together, taught.softmax(1))
        kl = F.kl_div((logits / 4).log_softmax(1), (taught / 4).softmax(1), reduction="batchmean")
        own = 0.1 * F.cross_entropy(logits, images.labels[index]) + 0.9 * 16 * kl
        optimizer.zero_grad()
        (0.3 * stc + 0.7 * own).backward()
        optimizer.step()
    kept = parts_of(trained)
    assert kept.keys() == ADAPTER
    for got, network in (
        (trained.model().state_dict(), model),
        ({n.removeprefix("adapter."): t for n, t in kept.items()}, adapter),
    ):
        for name in got:
            expected = network.state_dict()[name]
            torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_with_alpha_one_nothing_behind_the_cut_moves(tiny, fitting):
    run = tiny(method=STC(fitting, alpha=1), weight_decay=0.0)
    before = build_model(run.model, 10, 1, seed=mix("weights", 0))
    after = dict(train([run])[0].model().named_parameters())
    for name, parameter in before.named_parameters():
        behind = name.startswith(("body.2", "head"))
        assert torch.equal(after[name], parameter) == behind, name


def test_with_alpha_zero_the_student_learns_as_without_a_teacher(tiny, fitting):
    joined, plain = train([tiny(method=STC(fitting, alpha=0)), tiny()])
    ours, theirs = (trained.model().state_dict() for trained in (joined, plain))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("target", BY_HAND)
def test_teachers_are_bit_identical_after_their_students_trained(tiny, wide, monkeypatch, target):
    before = train([wide])[0]
    watched = watch_teachers(monkeypatch)
    train([tiny(epochs=1, method=STC(wide, target=target, **WITH_KD))])
    assert fingerprint(before.model().state_dict()) == final_weights(before)
    assert watched
    for network in watched:
        assert fingerprint(network.state_dict()) == final_weights(before)
        assert not any(module.training for module in network.modules())
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_the_adapter_is_trained_and_kept_with_every_checkpoint(tiny, wide):
    trained, plain = train([tiny(keep=(1,), method=STC(wide)), tiny()])
    first, last = (parts_of(trained, epoch) for epoch in (1, 2))
    start = first_adapter(seed=0).state_dict()
    assert first.keys() == last.keys() == ADAPTER
    for name, tensor in last.items():
        assert not torch.equal(tensor, start[name.removeprefix("adapter.")]), name
        assert not torch.equal(tensor, first[name]), name
    assert trained.model().state_dict().keys() == plain.model().state_dict().keys()


def test_without_an_adapter_nothing_is_kept_beside_the_student(tiny, fitting):
    assert parts_of(train([tiny(method=STC(fitting))])[0]) == {}


def assert_tested(run, row, at):
    """That a log's row has the student and its network with the teacher's epoch ``at``, by hand."""
    taught_by = store.find_record(run.method.teacher_at(0)[0]).model(at)
    test = load_data("digits", "test")
    x = test.batch(torch.arange(len(test)))
    taught = taught_by(x).log_softmax(1)
    networks = trained_networks(run, int(row.epoch), load_data("digits"))
    student = networks["student"]
    feature = student.body[1](student.body[0](student.stem(x)))
    together = taught_by.head(taught_by.body[2](networks["adapter"](feature)))
    for prefix, logits in (("test", student(x)), ("test_collaboration", together)):
        hits = (logits.argmax(1) == test.labels).float().mean()
        kl = F.kl_div(logits.log_softmax(1), taught, reduction="batchmean", log_target=True)
        assert row[f"{prefix}_top1"] == pytest.approx(100 * hits.item())
        ce = F.cross_entropy(logits, test.labels).item()
        assert row[f"{prefix}_ce"] == pytest.approx(ce, rel=1e-5)
        assert row[f"{prefix}_kl"] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("target", ["output", "truth"])
def test_the_log_says_how_good_the_collaboration_is(tiny, wide, target):
    run = tiny(keep=(1,), method=STC(wide, at=2, target=target), seed=1)
    log = train([run])[0].log
    for _, row in log.iterrows():
        assert_tested(run, row, at=2)
    assert (log.test_ce != log.test_collaboration_ce).all()


def test_the_log_holds_the_terms(tiny, fitting):
    alone, with_kd = (
        trained.log
        for trained in train(
            [
                tiny(method=STC(fitting)),
                tiny(method=STC(fitting, alpha=0.5, **WITH_KD)),
            ]
        )
    )
    total = 0.3 * alone.train_stc + 0.7 * alone.train_ce
    assert alone.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)
    assert "train_kd" not in alone
    total = 0.5 * with_kd.train_stc + 0.5 * (0.1 * with_kd.train_ce + 0.9 * with_kd.train_kd)
    assert with_kd.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, wide, assert_resumes):
    run = tiny(epochs=3, milestones=(1,), method=STC(wide, target="soft", **WITH_KD))
    assert_resumes(run)


def test_lanes_side_by_side_equal_runs_one_by_one(tiny, wide, elsewhere):
    methods = [STC(wide), STC(wide, cut=1, target="truth"), OneStage(STC(wide, **WITH_KD), gap=1)]
    runs = [tiny(seed=seed, method=method) for seed, method in enumerate(methods)]
    alone = elsewhere(*runs, lanes=1)
    together = train(runs, lanes=3)
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert all(map(same_log, together, alone))


# --- along a route --------------------------------------------------------------------------------


def test_one_anchor_for_all_epochs_is_plain_collaboration_to_the_bit(tiny, wide):
    plain, one = train([tiny(epochs=3, method=m) for m in (STC(wide), OneStage(STC(wide), gap=3))])
    assert final_weights(one) == final_weights(plain)
    assert same_log(one, plain)


@pytest.mark.parametrize("target", ["output", "truth"])
def test_each_epoch_is_joined_to_its_own_anchor(tiny, wide, target):
    run = tiny(keep=(1,), method=OneStage(STC(wide, target=target), gap=1))
    route, first = train([run, tiny(method=STC(wide, at=1, target=target))])
    for _, row in route.log.iterrows():
        assert_tested(run, row, at=int(row.epoch))
    columns = ["train_stc", "test_ce", "test_collaboration_ce"]
    assert route.log[columns].iloc[0].equals(first.log[columns].iloc[0])
    assert (route.log[columns].iloc[1] != first.log[columns].iloc[1]).all()
    kept = store.find_record(wide).summary["weights"]
    assert route.summary["teachers"] == {f"{wide.id}@{k}": kept[str(k)] for k in (1, 2)}


def test_later_stages_go_on_with_the_adapter_of_the_one_before(tiny, wide):
    first, second = train(multi_stage(tiny(method=STC(wide), seed=1), (1, 3)))
    begins_with = new_trainer(second.run).state.networks["adapter"].state_dict()
    left = parts_of(first)
    assert all(torch.equal(t, left[f"adapter.{n}"]) for n, t in begins_with.items())
    assert parts_fingerprint(second) != parts_fingerprint(first)


# --- what may be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, -1, 4, 2.5])
def test_a_cut_where_there_is_no_stage_is_refused(tiny, fitting, cut):
    with pytest.raises(ValueError, match=f"no cut after stage {cut}: .*3"):
        train([tiny(method=STC(fitting, cut=cut))])


@pytest.mark.parametrize("cut", [0, -1, 4])
def test_a_cut_where_there_is_no_stage_is_refused_before_a_teacher_is_trained(
    tiny, fitting, epochs_trained, cut
):
    with pytest.raises(ValueError, match=f"no cut after stage {cut}"):
        train([tiny(method=STC(fitting, cut=cut))])
    assert epochs_trained == []


def test_a_cut_of_two_written_with_a_point_is_two(tiny, fitting):
    whole, pointed = (tiny(method=STC(fitting, cut=cut)) for cut in (2, 2.0))
    assert whole.id == pointed.id
    train([pointed])


def test_a_cut_beyond_the_shorter_network_is_refused(tiny):
    with pytest.raises(ValueError, match=r"no cut after stage 4: .*3"):
        tiny(model="vgg13-x0.0625", method=STC(tiny(), cut=4))


@pytest.mark.parametrize("alpha", [1.5, -0.1, float("nan")])
def test_an_alpha_that_is_no_share_is_refused(tiny, alpha):
    with pytest.raises(ValueError, match=f"alpha is a share .*from 0 to 1, not {alpha}"):
        STC(tiny(), alpha=alpha)


def test_an_unknown_target_names_those_there_are(tiny):
    with pytest.raises(ValueError, match=r"no target 'logits', but output, soft, label, truth"):
        STC(tiny(), target="logits")


def test_what_is_left_at_its_default_is_no_part_of_the_description(tiny):
    teacher = tiny(seed=1)
    plain = tiny(method=STC(teacher))
    spelt = STC(teacher, None, alpha=0.3, cut=2, target="output", temperature=4.0)
    assert plain.description["method"] == {"kind": "STC", "teacher": teacher.description}
    assert tiny(method=spelt).id == plain.id


def test_every_part_of_a_collaboration_changes_the_id(tiny):
    method = STC(tiny(seed=1))
    changes = [
        {},
        {"at": 1},
        {"alpha": 0.5},
        {"cut": 1},
        {"target": "soft"},
        {"ce_weight": 0.1},
        {"kd_weight": 0.9},
        {"temperature": 5.0},
    ]
    ids = {tiny(method=replace(method, **change)).id for change in changes}
    assert len(ids) == len(changes)
