"""Tables computed from trained models, each against another computation of the same."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from sklearn.decomposition import PCA
from torch import nn

from kdbook.rco import (
    displacement_cosines,
    gradient_cosines,
    logits_on_test,
    noise_losses,
    noise_of,
    noised,
    training_losses,
    trajectories,
)
from kdlib import KD, STC, build_model, load_data, measure, store, train
from kdlib.engine.plan import mix
from kdlib.errors import StoreError
from kdlib.methods import FactorTransfer, Hint, RocketLaunching, multi_stage, paraphrase


def cross_entropy(logits, labels):
    """The mean, in float64."""
    return -log_softmax(logits.double().numpy(), axis=1)[np.arange(len(labels)), labels].mean()


def divergence(teacher, student, tau):
    """Mean KL(teacher ‖ student) at temperature τ, in float64."""
    p, q = (softmax(z.double().numpy() / tau, axis=1) for z in (teacher, student))
    return rel_entr(p, q).sum(1).mean()


# --- trajectories ---------------------------------------------------------------------------------


def weights(model):
    """Of convolutions and linear layers, without biases and batch norm, in float64."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return np.concatenate([m.weight.detach().double().numpy().ravel() for m in layers])


def start(run):
    return weights(build_model(run.model, 10, 1, seed=mix("weights", run.seed)))


@pytest.fixture
def three(tiny):
    """Runs of one network and seed, 3, 3 and 2 epochs long, all of them kept."""
    keep = (1, 2, 3)
    teacher = tiny(epochs=3, model="resnet14-x0.25", keep=keep)
    runs = [
        tiny(epochs=3, keep=keep, seed=2),
        tiny(epochs=3, keep=keep, seed=2, method=KD(teacher)),
        tiny(epochs=2, keep=keep[:2], seed=2, lr=0.02),
    ]
    return train(runs)


def stacked(several, origin):
    rows = []
    for trained in several:
        epochs = range(1, trained.run.recipe.epochs + 1)
        rows += [origin, *(weights(trained.model(epoch)) for epoch in epochs)]
    return np.stack(rows) - origin


def test_trajectories_are_the_principal_components_of_all_weights(three):
    table = trajectories(*three)
    matrix = stacked(three, start(three[0].run))
    pca = PCA(n_components=2, svd_solver="full")
    plane = pca.fit_transform(matrix)
    plane = plane - plane[0]
    for axis, column in enumerate(("pc1", "pc2")):
        ours = table[column].to_numpy()
        sign = np.sign(ours @ plane[:, axis])
        np.testing.assert_allclose(ours, sign * plane[:, axis], rtol=1e-3, atol=1e-5)
        assert np.abs(ours).max() > 0.01
    shares = table[["share1", "share2"]].drop_duplicates().to_numpy()
    np.testing.assert_allclose(shares, [pca.explained_variance_ratio_], rtol=1e-4)
    assert shares.sum() < 0.999  # so that a share of two axes alone would be noticed


def test_trajectories_start_at_the_origin(three):
    table = trajectories(*three)
    assert table.run.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert table.epoch.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    first = table[table.epoch == 0]
    np.testing.assert_allclose(first[["pc1", "pc2"]], 0, atol=1e-6)
    assert (table[table.epoch > 0][["pc1", "pc2"]].abs().max(axis=1) > 1e-3).all()


def test_trajectories_are_turned_so_that_the_last_run_ends_right_and_up(three):
    for order in (three, three[::-1]):
        end = trajectories(*order).iloc[-1]
        assert min(end.pc1, end.pc2) >= 0
        assert end.pc1 + end.pc2 > 0


def test_the_plane_keeps_the_distances_that_its_axes_hold(three):
    """All variance of a run of two points, start and end, is on the first axis."""
    (short,) = train([tiny_like(three[0].run, epochs=1)])
    table = trajectories(short)
    moved = weights(short.model()) - start(short.run)
    assert table.pc1.tolist() == pytest.approx([0, np.linalg.norm(moved)], rel=1e-5)
    assert table.share1[0] == pytest.approx(1)


def tiny_like(run, epochs):
    return replace(run, keep=(), recipe=replace(run.recipe, epochs=epochs))


def test_a_trajectory_of_a_later_stage_starts_where_the_stage_does(tiny):
    first = tiny(epochs=2)
    stage = train([tiny(epochs=2, keep=(1,), start=first)])[0]
    table = trajectories(stage)
    moved = stacked([stage], weights(store.find_record(first).model()))
    plane = PCA(n_components=2, svd_solver="full").fit_transform(moved)
    np.testing.assert_allclose(np.abs(table.pc1), np.abs(plane[:, 0] - plane[0, 0]), rtol=1e-3)


def with_noise(images, index, delta, draw):
    return noised(images, index, noise_of(images, index, draw), delta)


@pytest.mark.parametrize("other", ["seed", "model", "start"])
def test_runs_of_another_start_are_refused(tiny, other):
    change = {"seed": {"seed": 1}, "model": {"model": "resnet8-x0.5"}, "start": {"start": tiny()}}
    runs = train([tiny(epochs=1), tiny(epochs=1, **change[other])])
    with pytest.raises(ValueError, match="do not share their data, network, seed and start"):
        trajectories(*runs)


def test_an_epoch_that_was_not_kept_is_named(tiny):
    (trained,) = train([tiny()])
    with pytest.raises(StoreError, match=r"epoch-0001\.safetensors is not there"):
        trajectories(trained)


def test_cosines_of_displacements(three):
    table = displacement_cosines(*three, epoch=2)
    moved = [weights(t.model(2)) - start(t.run) for t in three]
    assert list(zip(table["first"], table["second"], strict=True)) == [(0, 1), (0, 2), (1, 2)]
    for row in table.itertuples():
        a, b = moved[row.first], moved[row.second]
        expected = a @ b / np.sqrt((a @ a) * (b @ b))
        assert row.cosine == pytest.approx(expected, rel=1e-5)
        assert 0 < row.cosine < 0.9999


def test_cosines_of_runs_of_another_start_are_refused(tiny):
    runs = train([tiny(), tiny(seed=1)])
    with pytest.raises(ValueError, match="seed"):
        displacement_cosines(*runs, epoch=2)


# --- agreement of gradients -----------------------------------------------------------------------


@pytest.fixture
def wide(tiny):
    return tiny(epochs=2, model="resnet8-x0.5", keep=(1,))


def batch_of(count):
    """The first images of a ``tiny`` run as it takes them, their classes in turn."""
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
        adapter.load_state_dict(store.within(store.load_networks(run, epoch), "adapter."))
    return adapter.train()


@pytest.mark.parametrize("at", [None, 1])
def test_cosines_of_collaboration_and_labels_equal_those_of_two_backward_passes(tiny, wide, at):
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
    for terms in (("stc", "ce"), ("ce", "stc")):
        table = gradient_cosines(trained, *terms, [0, 2])
        assert table.stage.tolist() == 2 * list(range(cut + 1))


def test_the_gradient_of_a_term_agrees_with_itself(tiny, wide):
    table = gradient_cosines(train([tiny(method=STC(wide))])[0], "ce", "ce", [2])
    assert table.stage.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(table[["cosine", "ratio"]], 1, rtol=1e-6)


def test_terms_change_places(tiny, wide):
    trained = train([tiny(method=STC(wide))])[0]
    there, back = (gradient_cosines(trained, *t, [2]) for t in (("stc", "ce"), ("ce", "stc")))
    np.testing.assert_allclose(there.cosine, back.cosine, rtol=1e-6)
    np.testing.assert_allclose(there.ratio, 1 / back.ratio, rtol=1e-6)


def test_terms_of_other_methods_can_be_compared(tiny, wide):
    lender = paraphrase(wide, wide.recipe)
    methods = [KD(wide), Hint(wide), FactorTransfer(wide, paraphraser=lender)]
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
    trained = train([tiny(keep=(1,), method=STC(wide, **{"kd_weight": 0.9}))])[0]
    runs = [trained.run, wide]
    paths = [path for run in runs for path in sorted(store.folder(run).glob("*"))]
    before, state = [path.read_bytes() for path in paths], torch.get_rng_state()
    first = gradient_cosines(trained, "stc", "ce", [0, 1, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.read_bytes() for path in paths] == before
    torch.manual_seed(99)
    pd.testing.assert_frame_equal(gradient_cosines(trained, "stc", "ce", [0, 1, 2]), first)


def test_cosines_of_gradients_may_be_measured(tiny, wide):
    trained = train([tiny(method=STC(wide))])[0]
    options = {"first": "stc", "second": "ce", "epochs": [0, 2]}
    table = gradient_cosines(trained, **options)
    for _ in range(2):
        pd.testing.assert_frame_equal(measure(trained, gradient_cosines, **options), table)


def test_gradients_of_an_epoch_that_was_not_kept_are_refused(tiny, wide):
    trained = train([tiny(method=STC(wide))])[0]
    with pytest.raises(StoreError, match=r"epoch-0001\.safetensors is not there"):
        gradient_cosines(trained, "stc", "ce", [1])


def test_epoch_0_of_a_later_stage_is_where_the_stage_starts(tiny, wide):
    first, second = train(multi_stage(tiny(method=STC(wide)), (2, 2)))
    end = gradient_cosines(first, "stc", "ce", [2])
    begin = gradient_cosines(second, "stc", "ce", [0])
    np.testing.assert_allclose(begin.cosine, end.cosine, rtol=1e-3)


# --- noise ----------------------------------------------------------------------------------------


def in_pixels(images, x):
    """Back from normalised images to pixels in [0, 1], in float64."""
    mean, std = (np.array(v).reshape(1, -1, 1, 1) for v in (images.mean, images.std))
    return x.double().numpy() * std + mean


def raw_pixels(images, count):
    """``[n, channels, h, w]`` in [0, 1], from the stored bytes; test images have no margin."""
    return images.pixels[:count].permute(0, 3, 1, 2).double().numpy() / 255


def test_noise_has_the_deviation_delta_times_that_of_the_images_own_pixels():
    images = load_data("digits", "test")
    index = torch.arange(len(images))
    clean = raw_pixels(images, len(images))
    sigma = clean.reshape(len(clean), -1).std(1)
    unit = None
    for delta in (0.1, 0.7):
        noise = in_pixels(images, with_noise(images, index, delta, 0)) - clean
        scaled = noise / (delta * sigma.reshape(-1, 1, 1, 1))
        assert scaled.std() == pytest.approx(1, abs=0.02)
        assert scaled.mean() == pytest.approx(0, abs=0.02)
        by_image = scaled.reshape(len(scaled), -1).std(1)
        assert np.corrcoef(by_image, sigma)[0, 1] == pytest.approx(0, abs=0.2)
        if unit is not None:
            np.testing.assert_allclose(scaled, unit, atol=1e-4)  # the same noise, scaled
        unit = scaled
    assert sigma.std() > 0.02


def test_noise_of_colour_images_is_one_deviation_over_all_channels(photos, tmp_path):
    folder = photos(count=12)
    dim_one_channel(folder)
    images = load_data(f"folder:{folder}", "test")
    index = torch.arange(len(images))
    clean = raw_pixels(images, len(images))
    np.testing.assert_allclose(in_pixels(images, images.batch(index)), clean, atol=1e-6)
    noise = in_pixels(images, with_noise(images, index, 0.5, 1)) - clean
    sigma = clean.reshape(len(clean), -1).std(1)
    by_channel = noise.std((2, 3)) / sigma[:, None]
    assert by_channel.shape == (24, 3)
    np.testing.assert_allclose(by_channel, 0.5, atol=0.06)
    np.testing.assert_allclose(by_channel.mean(0), 0.5, atol=0.01)
    assert clean[:, 2].std() < 0.2 * clean[:, 0].std()


def dim_one_channel(folder):
    from PIL import Image

    for path in sorted(folder.rglob("*.png")):
        pixels = np.array(Image.open(path))
        pixels[..., 2] //= 8
        Image.fromarray(pixels).save(path)


def test_noise_depends_on_image_and_draw_alone():
    images = load_data("digits", "test")
    torch.manual_seed(1)
    some = with_noise(images, torch.tensor([7, 3, 5]), 0.5, 2)
    torch.manual_seed(2)
    one = with_noise(images, torch.tensor([3]), 0.5, 2)
    assert torch.equal(some[1:2], one)
    clean = images.batch(torch.tensor([7, 3, 5]))
    other = with_noise(images, torch.tensor([7, 3, 5]), 0.5, 3)
    assert not torch.equal(other, some)
    noise = [(some - clean)[k] / (some - clean)[k].std() for k in range(3)]
    assert max((noise[0] * noise[k]).mean().abs() for k in (1, 2)) < 0.5


def test_without_noise_the_losses_are_those_of_the_log(tiny):
    student = train([tiny(method=KD(tiny(model="resnet14-x0.25")), seed=1)])[0]
    table = noise_losses(student, [0.0], draws=2)
    assert table.ce.tolist() == pytest.approx([student.final["test_ce"]] * 2, rel=1e-5)
    assert table.kl.tolist() == pytest.approx([student.final["test_kl"]] * 2, rel=1e-4)
    x = load_data("digits", "test").batch(torch.arange(4))
    assert torch.equal(with_noise(load_data("digits", "test"), torch.arange(4), 0.0, 0), x)


def test_student_and_teacher_see_the_same_noise(tiny):
    teacher = tiny(model="resnet14-x0.25")
    student = train([tiny(method=KD(teacher, at=1), seed=1)])[0]
    table = noise_losses(student, [0.2, 0.9], draws=2, count=50)
    assert list(zip(table.delta, table.draw, strict=True)) == [
        (0.2, 0),
        (0.9, 0),
        (0.2, 1),
        (0.9, 1),
    ]
    images = load_data("digits", "test").first(50)
    networks = student.model(), store.find_record(teacher).model()  # its last epoch, not at=1
    for row in table.itertuples():
        x = with_noise(images, torch.arange(50), row.delta, row.draw)
        logits, taught = (network(x) for network in networks)
        assert row.ce == pytest.approx(cross_entropy(logits, images.labels), rel=1e-5)
        assert row.kl == pytest.approx(divergence(taught, logits, tau=1), rel=1e-4)
    assert table.ce.nunique() == table.kl.nunique() == 4


def test_without_a_teacher_there_is_no_divergence(tiny):
    plain, peered = train([tiny(), tiny(method=RocketLaunching("resnet8-x0.5", tiny().recipe))])
    for trained in (plain, peered):
        assert list(noise_losses(trained, [0.1], 1, count=20)) == ["delta", "draw", "ce"]
        assert list(training_losses(trained)) == ["ce"]


# --- losses over the training images --------------------------------------------------------------


@pytest.mark.parametrize("tau", [5.0, 2.0])
def test_training_losses_are_those_of_all_training_images(tiny, tau):
    teacher = tiny(epochs=3, model="resnet14-x0.25")
    student = train([tiny(method=KD(teacher, at=1), seed=1)])[0]
    options = {} if tau == 5.0 else {"temperature": tau}
    table = training_losses(student, **options)
    images = load_data("digits").first(128)
    x = images.batch(torch.arange(128))
    logits, taught = student.model()(x), store.find_record(teacher).model()(x)
    assert len(table) == 1
    assert table.ce[0] == pytest.approx(cross_entropy(logits, images.labels), rel=1e-5)
    assert table.kd[0] == pytest.approx(tau**2 * divergence(taught, logits, tau), rel=1e-4)
    assert student.log.train_ce.iloc[-1] != pytest.approx(table.ce[0], rel=1e-3)


def test_all_images_are_looked_at_however_many(tiny):
    """More than one chunk of them."""
    run = replace(tiny(epochs=1, batch=64), images=None)
    trained = train([run])[0]
    images = load_data("digits")
    logits = trained.model()(images.batch(torch.arange(len(images))))
    ce = cross_entropy(logits, images.labels)
    assert training_losses(trained).ce[0] == pytest.approx(ce, rel=1e-5)


def test_logits_on_test_are_the_models(tiny):
    trained = train([tiny(keep=(1,))])[0]
    test = load_data("digits", "test").first(30)
    for epoch in (1, None):
        table = measure(trained, logits_on_test, count=30, epoch=epoch)
        logits = trained.model(epoch)(test.batch(torch.arange(30)))
        assert table.label.tolist() == test.labels.tolist()
        np.testing.assert_allclose(table.drop(columns="label"), logits, rtol=1e-5, atol=1e-6)


# --- measurements of several runs -----------------------------------------------------------------

calls = []


def ids(*several, note=""):
    calls.append([trained.run.id for trained in several])
    return pd.DataFrame({"run": [trained.run.id for trained in several], "note": note})


def test_a_measurement_of_several_runs_is_made_once_and_kept_beside_the_first(tiny):
    calls.clear()
    several = train([tiny(seed=seed) for seed in range(3)])
    first = measure(several, ids)
    assert first.run.tolist() == [trained.run.id for trained in several]
    assert measure(tuple(several), ids).equals(first)
    assert len(calls) == 1
    found = [len(list(store.folder(t.run).glob("measure-ids-*.json"))) for t in several]
    assert found == [1, 0, 0]


def test_a_measurement_of_several_runs_is_made_anew_where_any_of_them_differs(tiny):
    calls.clear()
    a, b, c, d = train([tiny(seed=seed) for seed in range(4)])
    groups = [(a, b, c), (a, b, d), (a, d, c), (d, b, c), (a, b), (a,), (a, c, b)]
    for group in groups:
        assert measure(group, ids).run.tolist() == [trained.run.id for trained in group]
    measure(groups[0], ids, note="another option")
    assert len(calls) == len(groups) + 1
    moved = replace(b, summary=b.summary | {"weights": {"2": "0123"}})
    measure((a, moved, c), ids)
    assert len(calls) == len(groups) + 2


def test_one_run_alone_or_in_a_list_is_one_measurement(tiny):
    calls.clear()
    trained = train([tiny()])[0]
    assert measure(trained, ids).equals(measure([trained], ids))
    assert len(calls) == 1


def test_trajectories_may_be_measured(three):
    pd.testing.assert_frame_equal(measure(three, trajectories), trajectories(*three))
    cosines = measure(three, displacement_cosines, epoch=1)
    pd.testing.assert_frame_equal(cosines, displacement_cosines(*three, epoch=1))
