"""RCO's tables, each against another computation of the same numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import log_softmax, rel_entr, softmax
from sklearn.decomposition import PCA
from torch import nn

from kdbook.planes import displacement_cosines, landscape, trajectories
from kdbook.rco import (
    at_equal_cost,
    divergences_on_test,
    epochs_spent,
    noise_losses,
    noise_of,
    noised,
    repeated,
    searches,
    stage_log,
    target_count,
    training_losses,
)
from kdlib import KD, GreedySearch, build_model, load_data, measure, store, train
from kdlib.engine.plan import mix
from kdlib.methods import OneStage, RocketLaunching, multi_stage


def cross_entropy(logits, labels):
    """The mean, in float64."""
    return -log_softmax(logits.double().numpy(), axis=1)[np.arange(len(labels)), labels].mean()


def divergence(teacher, student, tau):
    """Mean KL(teacher ‖ student) at temperature τ, in float64."""
    p, q = (softmax(z.double().numpy() / tau, axis=1) for z in (teacher, student))
    return rel_entr(p, q).sum(1).mean()


# --- trajectories ---------------------------------------------------------------------------------


def weights(model):
    """Weights of convolutions and linear layers, without biases and batch norm, in float64."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return np.concatenate([m.weight.detach().double().numpy().ravel() for m in layers])


def start(run):
    return weights(build_model(run.model, 10, 1, seed=mix("weights", run.seed)))


@pytest.fixture
def three(tiny):
    """Runs of one network and seed, with 3, 3 and 2 epochs, all of them kept."""
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
    pca = PCA(n_components=2, svd_solver="full")
    plane = pca.fit_transform(stacked(three, start(three[0].run)))
    plane = plane - plane[0]
    for axis, column in enumerate(("pc1", "pc2")):
        ours = table[column].to_numpy()
        sign = np.sign(ours @ plane[:, axis])
        np.testing.assert_allclose(ours, sign * plane[:, axis], rtol=1e-3, atol=1e-5)
        assert np.abs(ours).max() > 0.01
    shares = table[["share1", "share2"]].drop_duplicates().to_numpy()
    np.testing.assert_allclose(shares, [pca.explained_variance_ratio_], rtol=1e-4)
    assert shares.sum() < 0.999  # a share of two axes alone would be 1


def test_trajectories_start_at_the_origin(three):
    table = measure(three, trajectories)
    assert table.run.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert table.epoch.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    first = table[table.epoch == 0]
    np.testing.assert_allclose(first[["pc1", "pc2"]], 0, atol=1e-6)
    assert (table[table.epoch > 0][["pc1", "pc2"]].abs().max(axis=1) > 1e-3).all()


def test_the_last_trajectory_ends_at_the_right_and_at_the_top(three):
    for order in (three, three[::-1]):
        end = trajectories(*order).iloc[-1]
        assert min(end.pc1, end.pc2) >= 0
        assert end.pc1 + end.pc2 > 0


def test_a_trajectory_of_a_later_stage_starts_where_the_stage_starts(tiny):
    first = tiny(epochs=2)
    stage = train([tiny(epochs=2, keep=(1,), start=first)])[0]
    table = trajectories(stage)
    moved = stacked([stage], weights(store.find_record(first).model()))
    plane = PCA(n_components=2, svd_solver="full").fit_transform(moved)
    np.testing.assert_allclose(np.abs(table.pc1), np.abs(plane[:, 0] - plane[0, 0]), rtol=1e-3)


@pytest.mark.parametrize("other", ["seed", "model", "start"])
def test_runs_of_another_start_are_refused(tiny, other):
    change = {"seed": {"seed": 1}, "model": {"model": "resnet8-x0.5"}, "start": {"start": tiny()}}
    runs = train([tiny(epochs=1), tiny(epochs=1, **change[other])])
    for table in (trajectories, lambda *r: displacement_cosines(*r, epoch=1)):
        with pytest.raises(ValueError, match="do not share their data, network, seed and start"):
            table(*runs)


def test_cosines_of_displacements(three):
    table = measure(three, displacement_cosines, epoch=2)
    moved = [weights(t.model(2)) - start(t.run) for t in three]
    assert list(zip(table["first"], table["second"], strict=True)) == [(0, 1), (0, 2), (1, 2)]
    for row in table.itertuples():
        a, b = moved[row.first], moved[row.second]
        assert row.cosine == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), rel=1e-5)
        assert 0 < row.cosine < 0.9999


def test_trajectories_of_every_second_epoch_are_rows_of_all(three):
    table = trajectories(*three, every=2)
    assert table.epoch.tolist() == [0, 2, 3, 0, 2, 3, 0, 2]
    for trained, part in zip(three, (part for _, part in table.groupby("run")), strict=True):
        ends = weights(trained.model()) - start(trained.run)
        assert np.hypot(*part.iloc[-1][["pc1", "pc2"]]) <= np.linalg.norm(ends) * (1 + 1e-5)


def test_the_landscape_is_the_loss_of_networks_on_the_plane(three):
    table = measure(three, landscape, points=3, count=60)
    way = trajectories(*three)
    origin = start(three[0].run)
    pca = PCA(n_components=2, svd_solver="full")
    places = pca.fit_transform(stacked(three, origin))
    signs = np.sign([way.pc1 @ (places - places[0])[:, 0], way.pc2 @ (places - places[0])[:, 1]])
    assert len(table) == 9
    assert way.pc1.max() < table.pc1.max() < way.pc1.max() + np.ptp(way.pc1)
    models = [trained.model() for trained in three]
    learned, test = (load_data("digits", split).first(60) for split in ("train", "test"))
    for row in table.iloc[[0, 5]].itertuples():
        place = places[0] + signs * [row.pc1, row.pc2]
        vector = torch.tensor(origin + pca.mean_ + place @ pca.components_).float()
        model = three[0].model()
        for name, own in model.named_parameters():
            if own.ndim > 1:
                part, vector = vector[: own.numel()], vector[own.numel() :]
                own.data = part.view_as(own)
            else:
                own.data = sum(dict(m.named_parameters())[name].data for m in models) / 3
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 1.0  # the statistics of the next batch alone
        with torch.no_grad():
            model.train()(learned.batch(torch.arange(60)))
            model.eval()
            for images, loss in ((learned, row.train), (test, row.test)):
                logits = model(images.batch(torch.arange(60)))
                assert loss == pytest.approx(cross_entropy(logits, images.labels), rel=1e-3)
    assert table.train.std() > 1e-3


# --- noise ----------------------------------------------------------------------------------------


def with_noise(images, index, delta, draw):
    return noised(images, index, noise_of(images, index, draw), delta)


def in_pixels(images, x):
    """Normalised images as pixels in [0, 1], in float64."""
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
    units = []
    for delta in (0.1, 0.7):
        noise = in_pixels(images, with_noise(images, index, delta, 0)) - clean
        units.append(noise / (delta * sigma.reshape(-1, 1, 1, 1)))
        assert units[-1].std() == pytest.approx(1, abs=0.02)
        assert units[-1].mean() == pytest.approx(0, abs=0.02)
        by_image = units[-1].reshape(len(clean), -1).std(1)
        assert np.corrcoef(by_image, sigma)[0, 1] == pytest.approx(0, abs=0.2)
    np.testing.assert_allclose(*units, atol=1e-4)  # the same noise, scaled
    assert sigma.std() > 0.02


def test_noise_of_colour_images_has_one_deviation_over_all_channels(photos):
    folder = photos(count=12)
    for path in folder.rglob("*.png"):  # a dark third channel
        pixels = np.array(Image.open(path))
        pixels[..., 2] //= 8
        Image.fromarray(pixels).save(path)
    images = load_data(f"folder:{folder}", "test")
    index = torch.arange(len(images))
    clean = raw_pixels(images, len(images))
    np.testing.assert_allclose(in_pixels(images, images.batch(index)), clean, atol=1e-6)
    noise = in_pixels(images, with_noise(images, index, 0.5, 1)) - clean
    by_channel = noise.std((2, 3)) / clean.reshape(len(clean), -1).std(1)[:, None]
    assert by_channel.shape == (24, 3)
    np.testing.assert_allclose(by_channel, 0.5, atol=0.06)
    np.testing.assert_allclose(by_channel.mean(0), 0.5, atol=0.01)
    assert clean[:, 2].std() < 0.2 * clean[:, 0].std()


def test_noise_depends_on_image_and_draw_alone():
    images, index = load_data("digits", "test"), torch.tensor([7, 3, 5])
    torch.manual_seed(1)
    some = with_noise(images, index, 0.5, 2)
    torch.manual_seed(2)
    assert torch.equal(some[1:2], with_noise(images, torch.tensor([3]), 0.5, 2))
    assert not torch.equal(some, with_noise(images, index, 0.5, 3))
    noise = some - images.batch(index)
    noise = [one / one.std() for one in noise]
    assert max((noise[0] * noise[k]).mean().abs() for k in (1, 2)) < 0.5


def test_without_noise_the_losses_are_those_of_the_log(tiny):
    student = train([tiny(method=KD(tiny(model="resnet14-x0.25")), seed=1)])[0]
    table = noise_losses(student, [0.0], draws=2)
    assert table.ce.tolist() == pytest.approx([student.final["test_ce"]] * 2, rel=1e-5)
    assert table.kl.tolist() == pytest.approx([student.final["test_kl"]] * 2, rel=1e-4)


def test_student_and_teacher_see_the_same_noise(tiny, monkeypatch):
    monkeypatch.setattr("kdbook.rco.CHUNK", 30)
    teacher = tiny(model="resnet14-x0.25")
    student = train([tiny(method=KD(teacher, at=1), seed=1)])[0]
    table = noise_losses(student, [0.2, 0.9], draws=2, count=50)
    pairs = list(zip(table.delta, table.draw, strict=True))
    assert pairs == [(0.2, 0), (0.9, 0), (0.2, 1), (0.9, 1)]
    images = load_data("digits", "test").first(50)
    networks = student.model(), store.find_record(teacher).model()  # its last epoch, not at=1
    for row in table.itertuples():
        x = with_noise(images, torch.arange(50), row.delta, row.draw)
        logits, teacher_logits = (network(x) for network in networks)
        assert row.ce == pytest.approx(cross_entropy(logits, images.labels), rel=1e-5)
        assert row.kl == pytest.approx(divergence(teacher_logits, logits, tau=1), rel=1e-4)
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
    run = tiny(epochs=1, batch=64, method=KD(teacher, at=1), seed=1)
    student = train([replace(run, images=None)])[0]  # more images than one chunk
    table = training_losses(student, **({} if tau == 5.0 else {"temperature": tau}))
    images = load_data("digits")
    x = images.batch(torch.arange(len(images)))
    logits, teacher_logits = student.model()(x), store.find_record(teacher).model()(x)
    assert len(table) == 1
    assert table.ce[0] == pytest.approx(cross_entropy(logits, images.labels), rel=1e-5)
    assert table.kd[0] == pytest.approx(tau**2 * divergence(teacher_logits, logits, tau), rel=1e-4)
    assert student.log.train_ce.iloc[-1] != pytest.approx(table.ce[0], rel=1e-3)


# --- the stages of a chain ------------------------------------------------------------------------


def test_a_chain_counts_and_joins_the_epochs_of_all_stages(tiny):
    teacher = tiny(epochs=3, model="resnet14-x0.25", keep=(1, 2, 3))
    chain = multi_stage(tiny(epochs=2, method=KD(teacher), seed=1), (1, 3, 3))
    trained = train(chain)
    assert [epochs_spent(stage) for stage in trained] == [2, 4, 6]
    joined = stage_log(trained[-1], "test_top1")
    assert joined.epoch.tolist() == [1, 2, 3, 4, 5, 6]
    assert joined.test_top1.tolist() == [row["test_top1"] for t in trained for row in t.rows]


def test_a_repeated_run_is_a_chain_of_equal_stages_that_begins_with_it(tiny):
    teacher = tiny(epochs=3, model="resnet14-x0.25")
    student = tiny(epochs=2, method=KD(teacher), seed=1, keep=(1,))
    chain = multi_stage(student, (3, 3, 3))
    assert [repeated(student, times).id for times in (1, 2, 3)] == [run.id for run in chain]
    assert repeated(student, 2).start.keep == (1,)  # what it keeps is still kept


def test_a_chain_at_equal_cost_has_as_many_stages(tiny):
    teacher = tiny(epochs=3, model="resnet14-x0.25", keep=(1, 2, 3))
    student = tiny(epochs=1, method=KD(teacher), seed=1)
    runs = [multi_stage(student, route)[-1] for route in ((3, 3, 3), (1, 3), (1, 2, 3))]
    longer, two, three = train(runs)
    found = at_equal_cost([longer, longer, None], [two, three, two])
    assert [stage.run for stage in found] == [longer.run.start, longer.run]


def test_a_table_of_searches_says_what_ended_each(tiny):
    teacher = tiny(epochs=4, model="resnet14-x0.25")
    several = [
        GreedySearch(tiny(epochs=1, method=KD(teacher), seed=seed), 1, delta, most=3)
        for seed, delta in ((1, -10.0), (2, 1e9))
    ]
    table = searches(several, train(several))
    assert table.loc[1].tolist() == ["1, 2, 4", "the limit of 3"]
    assert table.loc[2].tolist() == ["1, 4", "Algorithm 2"]


def test_targets_are_the_checkpoints_or_the_steps_of_a_teacher_that_learns(tiny):
    teacher = tiny(epochs=4, model="resnet14-x0.25", keep=(1, 2, 3, 4))
    methods = [
        KD(teacher),
        OneStage(KD(teacher), gap=2),
        OneStage(KD(teacher), gap=1),
        RocketLaunching("resnet8-x0.5", tiny().recipe),
    ]
    runs = [tiny(epochs=4, method=method, seed=1, batch=32) for method in methods]
    images = runs[0].images
    assert [target_count(t) for t in train(runs)] == [1, 2, 4, 4 * images // 32]


def test_divergences_on_test_images_are_those_of_the_log_at_the_last_epoch(tiny):
    teacher = tiny(epochs=2, model="resnet14-x0.25", keep=(1, 2))
    student = train([tiny(method=KD(teacher, at=1), seed=1)])[0]
    table = divergences_on_test(student, epochs=[1, 2])
    images = load_data("digits", "test")
    x = images.batch(torch.arange(len(images)))
    for epoch, kl in zip(table.epoch, table.kl, strict=True):
        taught = store.find_record(teacher).model(epoch)(x)
        assert kl == pytest.approx(divergence(taught, student.model()(x), tau=5), rel=1e-4)
    assert table.kl.nunique() == 2
