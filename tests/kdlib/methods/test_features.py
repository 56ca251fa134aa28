"""Attention transfer and factor transfer: their losses, the paraphraser, their training."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    batches,
    final_weights,
    gradients,
    move,
    parts_fingerprint,
    parts_of,
    same_log,
    step_in_float64,
    watch_teachers,
)
from torch import nn
from torch.nn import functional as F

from kdlib import (
    AttentionTransfer,
    FactorTransfer,
    Recipe,
    Run,
    build_model,
    load_data,
    store,
    train,
)
from kdlib.engine.passes import ancestry
from kdlib.engine.plan import mix
from kdlib.engine.state import trained_networks
from kdlib.methods import KD, Hint, OneStage, Paraphrase, paraphrase
from kdlib.store import fingerprint

WITH_KD = {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
PARAPHRASING = Recipe(2, 24, lr=0.1)
PAIRS = {
    "equal": ("resnet8-x0.25", "resnet14-x0.25"),
    "other channels": ("resnet8-x0.25", "wrn-10-2-x0.25"),
    "five stages and three": ("vgg13-x0.0625", "wrn-10-1-x0.25"),
    "three stages and four": ("resnet8-x0.25", "mobilenetv2-t1-w0.1"),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)


def pooled(feature, size):
    """Mean of equal squares, ``[b, c, h, w]`` to ``[b, c, size, size]``."""
    b, c, h, _ = feature.shape
    return feature.reshape(b, c, size, h // size, size, h // size).mean((3, 5))


def one_size(first, second):
    size = min(first.shape[2], second.shape[2])
    return pooled(first, size), pooled(second, size)


def features_by_hand(network, x):
    features = [network.stem(x)]
    for stage in network.body:
        features.append(stage(features[-1]))
    return features[1:]


def on_logits_by_hand(step, ce_weight=1.0, kd_weight=0.0, temperature=4.0):
    own, taught = (network(step.x) for network in (step.student, step.teacher))
    ce = (own.logsumexp(1) - own.gather(1, step.labels[:, None]).squeeze(1)).mean()
    p, q = ((z / temperature).exp() for z in (taught, own))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return ce_weight * ce + kd_weight * temperature**2 * (p * (p / q).log()).sum(1).mean()


def assert_same_with_gradients(got, expected, modules):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)
    for ours, theirs in zip(gradients(got, modules), gradients(expected, modules), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


# --- logits and hints -----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{}, WITH_KD], ids=["alone", "with KD"])
def test_a_hint_with_kd_and_its_gradient_equal_those_computed_by_hand(tiny, weights):
    method = Hint(tiny(), hint_weight=2.0, **weights)
    step = step_in_float64(method, *PAIRS["equal"])._replace(targets=None)
    logits, terms = method.loss(step)
    ours, theirs = (features_by_hand(n, step.x)[-1] for n in (step.student, step.teacher))
    expected = on_logits_by_hand(step, **weights) + 2 * ((ours - theirs) ** 2).mean()
    torch.testing.assert_close(logits, step.student(step.x), rtol=1e-11, atol=1e-13)
    assert_same_with_gradients(terms["loss"], expected, [step.student])


def test_kd_and_its_gradient_equal_those_computed_by_hand(tiny):
    for method, weights in ((KD(tiny(), **WITH_KD), WITH_KD), (KD(tiny()), {"kd_weight": 1.0})):
        step = step_in_float64(method, *PAIRS["equal"])
        expected = on_logits_by_hand(step, **{"temperature": 5.0, **weights})
        assert_same_with_gradients(method.loss(step)[1]["loss"], expected, [step.student])


# --- attention ------------------------------------------------------------------------------------


def attention_by_hand(student, teacher, x):
    total = 0
    pairs = zip(features_by_hand(student, x), features_by_hand(teacher, x), strict=False)
    for ours, theirs in pairs:
        maps = []
        for feature in one_size(ours, theirs):
            q = (feature**2).mean(1)
            maps.append(q / (q**2).sum((1, 2), keepdim=True).sqrt())
        total = total + ((maps[0] - maps[1]) ** 2).mean()
    return total


@every_pair
@pytest.mark.parametrize("weights", [{}, WITH_KD], ids=["alone", "with KD"])
def test_attention_and_its_gradient_equal_those_computed_by_hand(tiny, pair, weights):
    method = AttentionTransfer(tiny(), **weights)
    step = step_in_float64(method, *PAIRS[pair], size=16)._replace(targets=None)
    logits, terms = method.loss(step)
    attention = attention_by_hand(step.student, step.teacher, step.x)
    expected = on_logits_by_hand(step, **weights) + 1000 * 256 / 1024 * attention
    assert terms["attention"].item() > 1e-5
    torch.testing.assert_close(terms["attention"], attention, rtol=1e-11, atol=0)
    torch.testing.assert_close(logits, step.student(step.x), rtol=1e-11, atol=1e-13)
    assert_same_with_gradients(terms["loss"], expected, [step.student])
    assert step.parts == {}


@pytest.mark.parametrize(("size", "weight"), [(32, 1000), (16, 250), (8, 62.5), (64, 4000)])
def test_attention_weighs_a_thousand_at_32_pixels_a_side(tiny, size, weight):
    method = AttentionTransfer(tiny())
    step = step_in_float64(method, "resnet8-x0.1", "resnet14-x0.1", size=size)
    terms = method.loss(step)[1]
    factor = (terms["loss"] - terms["ce"]) / terms["attention"]
    assert factor.item() == pytest.approx(weight, rel=1e-9)


def test_attention_of_equal_networks_is_nothing(tiny):
    method = AttentionTransfer(tiny())
    step = step_in_float64(method, *PAIRS["equal"])
    terms = method.loss(step._replace(student=step.teacher))[1]
    assert terms["attention"].item() == 0


def test_the_stages_that_attention_pairs_have_one_size_in_the_papers_pairs():
    with torch.device("meta"):
        x = torch.empty(2, 3, 32, 32)
        vgg, wrn = (build_model(n, 10).eval().stages(x) for n in ("vgg13", "wrn-10-4"))
    assert (len(vgg), len(wrn)) == (5, 3)
    assert [f.shape for f in vgg[:3]] == [f.shape for f in wrn]


# --- factors --------------------------------------------------------------------------------------


@pytest.fixture
def factors(tiny):
    """A method of factor transfer and its networks in float64: ``factors(pair, size, …)``."""

    def make(pair, rate=0.5, size=16, **settings):
        teacher = tiny()
        lender = paraphrase(teacher, PARAPHRASING, rate)
        method = FactorTransfer(teacher, paraphraser=lender, **settings)
        step = step_in_float64(method, *PAIRS[pair], size=size)
        encoder = lender.method.parts(None, step.teacher, step.x)["encoder"].double()
        frozen = {"encoder": encoder.eval().requires_grad_(False)}
        return method, step._replace(frozen=frozen, targets=None)

    return make


def leaky_by_hand(network, x):
    for k in range(0, len(network), 2):
        x = network[k](x)
        x = torch.where(x > 0, x, 0.1 * x)
    return x


def normalised(factor):
    flat = factor.flatten(1)
    return flat / (flat**2).sum(1, keepdim=True).sqrt()


def factors_by_hand(step):
    stages = min(len(step.student.body), len(step.teacher.body))
    ours = features_by_hand(step.student, step.x)[stages - 1]
    theirs = features_by_hand(step.teacher, step.x)[-1]
    ours = leaky_by_hand(step.parts["translator"], ours)
    return one_size(ours, leaky_by_hand(step.frozen["encoder"], theirs))


@every_pair
@pytest.mark.parametrize("weights", [{}, WITH_KD], ids=["alone", "with KD"])
def test_factors_and_their_gradient_equal_those_computed_by_hand(factors, pair, weights):
    method, step = factors(pair, **weights)
    logits, terms = method.loss(step)
    ours, theirs = map(normalised, factors_by_hand(step))
    factor = (ours - theirs).abs().mean()
    expected = on_logits_by_hand(step, **weights) + 500 * factor
    assert terms["factor"].item() > 1e-5
    torch.testing.assert_close(terms["factor"], factor, rtol=1e-11, atol=0)
    torch.testing.assert_close(logits, step.student(step.x), rtol=1e-11, atol=1e-13)
    assert_same_with_gradients(terms["loss"], expected, [step.student, step.parts["translator"]])


def test_a_factor_is_compared_whole_and_not_by_its_mean_over_channels(factors):
    method, step = factors("equal")
    ours, theirs = factors_by_hand(step)
    over_channels = [normalised((f**2).mean(1)) for f in (ours, theirs)]
    found = method.loss(step)[1]["factor"].item()
    assert found != pytest.approx(
        (over_channels[0] - over_channels[1]).abs().mean().item(), rel=0.1
    )
    flipped = step._replace(frozen={"encoder": lambda f: step.frozen["encoder"](f).flip(1)})
    assert method.loss(flipped)[1]["factor"].item() != pytest.approx(found, rel=1e-3)


@every_pair
@pytest.mark.parametrize(("rate", "factor"), [(0.5, 8), (0.25, 4), (0.01, 1)])
def test_translator_and_paraphraser_meet_in_the_factor(factors, pair, rate, factor):
    method, step = factors(pair, rate)
    *_, taught = step.teacher.stages(step.x)
    channels = taught.shape[1]
    expected = {32: 2 * factor if rate > 0.1 else 1, 16: factor}[channels]
    networks = method.paraphraser.method.parts(None, step.teacher, step.x)
    encoder, decoder = (networks[name].double() for name in ("encoder", "decoder"))
    (translator,) = step.parts.values()
    ours = step.student.stages(step.x)[: len(step.teacher.body)][-1]
    assert encoder(taught).shape[1] == translator(ours).shape[1] == expected
    assert translator(ours).shape[2:] == ours.shape[2:]
    assert encoder(taught).shape[2:] == taught.shape[2:]
    assert decoder(encoder(taught)).shape == taught.shape
    for network, layer in ((encoder, nn.Conv2d), (decoder, nn.ConvTranspose2d)):
        layers = [m for m in network if isinstance(m, layer)]
        assert len(layers) == 3
        assert all(m.kernel_size == (3, 3) and m.bias is not None for m in layers)
        assert [m.negative_slope for m in network if isinstance(m, nn.LeakyReLU)] == [0.1] * 3
    assert sum(isinstance(m, nn.Conv2d) for m in translator) == 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in (*encoder, *decoder, *translator))


def test_the_papers_factors_have_half_the_channels_and_one_size(tiny):
    teacher = tiny()
    method = FactorTransfer(teacher, paraphraser=paraphrase(teacher, PARAPHRASING))
    with torch.device("meta"):
        vgg, wrn = (build_model(n, 10).eval() for n in ("vgg13", "wrn-10-4"))
        x = torch.empty(2, 3, 32, 32)
        translator = method.parts(vgg, wrn, x)["translator"]
        encoder = method.paraphraser.method.parts(None, wrn, x)["encoder"]
        ours, theirs = translator(vgg.stages(x)[2]), encoder(wrn.stages(x)[-1])
    assert ours.shape == theirs.shape == (2, 128, 8, 8)


# --- the paraphraser ------------------------------------------------------------------------------


@pytest.fixture
def teacher(tiny):
    return tiny(model="wrn-10-1-x0.5", keep=(1,))


@pytest.fixture
def paraphraser(teacher):
    return paraphrase(teacher, PARAPHRASING)


def test_a_paraphraser_leaves_its_network_the_teacher_to_the_bit(teacher, paraphraser):
    trained, taught_by = train([replace(paraphraser, keep=(1,)), teacher])
    expected = fingerprint(taught_by.model().state_dict())
    assert [fingerprint(trained.model(e).state_dict()) for e in (1, 2)] == [expected] * 2
    assert final_weights(taught_by) == expected
    assert trained.log.test_top1.tolist() == [taught_by.final["test_top1"]] * 2
    assert trained.log.test_kl.abs().max() < 1e-6
    assert trained.summary["teachers"] == {f"{teacher.id}@2": final_weights(taught_by)}


def first_autoencoder(seed, channels, factor):
    """Encoder and decoder; the decoder draws its weights first."""
    with torch.random.fork_rng():
        torch.manual_seed(mix("parts", seed))
        decoder, encoder = [], []
        for a, b in ((factor, factor), (factor, channels), (channels, channels)):
            decoder += [nn.ConvTranspose2d(a, b, 3, padding=1), nn.LeakyReLU(0.1)]
        for a, b in ((channels, channels), (channels, factor), (factor, factor)):
            encoder += [nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def test_training_a_paraphraser_equals_a_plain_pytorch_loop(teacher, paraphraser):
    trained = train([paraphraser])[0]
    taught_by, images = store.find_record(teacher).model(), load_data("digits").first(128)
    encoder, decoder = first_autoencoder(teacher.seed, 32, 16)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _, index, view in batches(paraphraser, images):
        *_, feature = taught_by.stages(images.batch(index, view))
        loss = (decoder(encoder(feature)) - feature).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = parts_of(trained)
    state = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).state_dict()
    assert kept.keys() == state.keys()
    for name, expected in state.items():
        torch.testing.assert_close(kept[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_paraphraser_learns_to_restore_its_teachers_features(teacher):
    epochs = 24
    run = paraphrase(teacher, Recipe(epochs, 24, lr=0.1))
    losses = train([run])[0].log.train_loss.to_numpy().reshape(4, -1).mean(1)
    assert (losses[1:] < losses[:-1]).all()
    assert losses[-1] < 0.85 * losses[0]
    images = load_data("digits").first(128)
    *_, feature = store.find_record(teacher).model().stages(images.batch(torch.arange(128)))
    errors = []
    for epoch in (0, epochs):
        networks = trained_networks(run, epoch, images)
        restored = networks["decoder"](networks["encoder"](feature))
        errors.append((restored - feature).abs().mean().item())
    assert errors[1] < 0.85 * errors[0]
    assert errors[1] < 0.85 * feature.abs().mean().item()


def test_a_paraphraser_of_another_teacher_is_refused(tiny, teacher):
    others = [
        paraphrase(tiny(model="wrn-10-1-x0.5", seed=1), PARAPHRASING),
        teacher,
        tiny(method=KD(teacher)),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"no paraphraser of .*paraphrase\(teacher, recipe\)"):
            FactorTransfer(teacher, paraphraser=other)


def test_what_a_teacher_keeps_makes_no_other_paraphraser(tiny, teacher):
    same = replace(teacher, keep=(1, 2), route=True)
    assert paraphrase(same, PARAPHRASING).id == paraphrase(teacher, PARAPHRASING).id
    FactorTransfer(same, paraphraser=paraphrase(teacher, PARAPHRASING))


def test_a_resumed_paraphraser_equals_an_uninterrupted_one(teacher, assert_resumes):
    run = paraphrase(teacher, replace(PARAPHRASING, epochs=3, milestones=(1,)))
    assert_resumes(run)


# --- training -------------------------------------------------------------------------------------


def first_translator(seed, ours, factor):
    with torch.random.fork_rng():
        torch.manual_seed(mix("parts", seed))
        layers = []
        for a, b in ((ours, ours), (ours, factor), (factor, factor)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def plain_loop(run, term, translator=()):
    """A student that learns beside its teacher, as anybody would write it."""
    taught_by, images = store.find_record(run.method.teacher).model(), load_data("digits")
    images = images.first(128)
    model = build_model(run.model, classes=10, channels=1, seed=mix("weights", run.seed)).train()
    model = model.to(memory_format=torch.channels_last)
    parameters = [*model.parameters(), *(p for layer in translator for p in layer.parameters())]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch, index, view in batches(run, images):
        optimizer.param_groups[0]["lr"] = 0.05 if epoch < 1 else 0.005
        x = images.batch(index, view)
        ours, theirs = features_by_hand(model, x), features_by_hand(taught_by, x)
        logits, taught = model.head(ours[-1]), taught_by.head(theirs[-1])
        kl = F.kl_div((logits / 4).log_softmax(1), (taught / 4).softmax(1), reduction="batchmean")
        loss = 0.1 * F.cross_entropy(logits, images.labels[index]) + 0.9 * 16 * kl
        optimizer.zero_grad()
        (loss + term(ours, theirs)).backward()
        optimizer.step()
    return model


def assert_weights_close(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_training_by_attention_equals_a_plain_pytorch_loop(tiny, teacher):
    run = tiny(milestones=(1,), method=AttentionTransfer(teacher, **WITH_KD), seed=4)
    trained = train([run])[0]

    def term(ours, theirs):
        maps = [[F.normalize((f**2).mean(1).flatten(1)) for f in side] for side in (ours, theirs)]
        return 62.5 * sum(((q - p) ** 2).mean() for q, p in zip(*maps, strict=True))

    assert_weights_close(trained.model().state_dict(), plain_loop(run, term).state_dict())
    assert parts_of(trained) == {}


def test_training_by_factors_equals_a_plain_pytorch_loop(tiny, teacher, paraphraser):
    method = FactorTransfer(teacher, paraphraser=paraphraser, **WITH_KD)
    run = tiny(milestones=(1,), method=method, seed=4)
    trained = train([run])[0]
    encoder, _ = first_autoencoder(0, 32, 16)
    encoder.load_state_dict(store.within(parts_of(store.find_record(paraphraser)), "encoder."))
    translator = first_translator(4, 16, 16)

    def term(ours, theirs):
        mine, taught = translator(ours[-1]).flatten(1), encoder(theirs[-1]).detach().flatten(1)
        return 500 * (F.normalize(mine) - F.normalize(taught)).abs().mean()

    model = plain_loop(run, term, translator)
    assert_weights_close(trained.model().state_dict(), model.state_dict())
    assert_weights_close(
        parts_of(trained), {f"translator.{n}": t for n, t in translator.state_dict().items()}
    )


@pytest.mark.parametrize("weights", [{}, WITH_KD], ids=["alone", "with KD"])
@pytest.mark.parametrize("name", ["attention", "factor", "hint"])
def test_teachers_are_bit_identical_after_their_students_trained(
    tiny, teacher, paraphraser, monkeypatch, name, weights
):
    method = {
        "attention": AttentionTransfer(teacher, **weights),
        "factor": FactorTransfer(teacher, paraphraser=paraphraser, **weights),
        "hint": Hint(teacher, **weights),
    }[name]
    before, lender = train([teacher, paraphraser])
    encoder = fingerprint(store.within(parts_of(lender), "encoder."))
    watched = watch_teachers(monkeypatch)
    trained = train([tiny(method=method)])[0]
    expected = {final_weights(before)} | ({encoder} if name == "factor" else set())
    assert {fingerprint(network.state_dict()) for network in watched} == expected
    assert fingerprint(before.model().state_dict()) == final_weights(before)
    assert fingerprint(store.load_networks(paraphraser, 2)) == fingerprint(
        trained_networks(paraphraser, 2, load_data("digits")).state_dict()
    )
    for network in watched:
        assert not any(module.training for module in network.modules())
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert f"train_{name}" in trained.log


def test_logits_come_from_the_live_teacher_and_from_no_bank(tiny, teacher, paraphraser, swept):
    methods = [
        AttentionTransfer(teacher, **WITH_KD),
        FactorTransfer(teacher, paraphraser=paraphraser, **WITH_KD),
    ]
    results = train([tiny(method=method) for method in methods])
    assert not any(split == "train" for _, split, _, _ in swept)
    for trained, name in zip(results, ("attention", "factor"), strict=True):
        weight = {"attention": 62.5, "factor": 500}[name]
        log = trained.log
        total = 0.1 * log.train_ce + 0.9 * log.train_kd + weight * log[f"train_{name}"]
        assert log.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)


def test_the_translator_moves_and_is_no_part_of_the_student(tiny, teacher, paraphraser):
    method = FactorTransfer(teacher, paraphraser=paraphraser)
    trained, plain = train([tiny(keep=(1,), method=method), tiny()])
    start = first_translator(0, 16, 16).state_dict()
    first, last = (parts_of(trained, epoch) for epoch in (1, 2))
    assert first.keys() == last.keys() == {f"translator.{name}" for name in start}
    for name, tensor in start.items():
        assert not torch.equal(last[f"translator.{name}"], tensor)
        assert not torch.equal(last[f"translator.{name}"], first[f"translator.{name}"])
    assert trained.model().state_dict().keys() == plain.model().state_dict().keys()


def test_a_student_of_factors_trains_its_paraphraser_first_and_names_it(
    tiny, teacher, paraphraser, epochs_trained
):
    run = tiny(method=FactorTransfer(teacher, paraphraser=paraphraser))
    assert ancestry([run]) == [teacher, paraphraser, run]
    assert run.teachers == [(teacher, 2), (paraphraser, 2)]
    trained = train([run])[0]
    order = [teacher.id, paraphraser.id, run.id]
    assert epochs_trained == [(name, epoch) for name in order for epoch in (1, 2)]
    assert trained.summary["teachers"] == {
        f"{parent.id}@2": final_weights(store.find_record(parent))
        for parent in (teacher, paraphraser)
    }


def move_parts(run, other):
    """Give a trained run the networks of another, as training on another machine might."""
    (lender, record), last = train([other, run]), run.recipe.epochs
    networks = trained_networks(lender.run, last, load_data(run.data))
    record.summary["weights"][str(last)] = store.save_networks(run, last, networks)
    store.write_record(run, record.log.to_dict("records"), record.summary)


def test_a_student_is_trained_again_where_its_paraphraser_moved(
    tiny, teacher, paraphraser, epochs_trained
):
    run = tiny(method=FactorTransfer(teacher, paraphraser=paraphraser))
    before = train([run])[0]
    move_parts(paraphraser, paraphrase(teacher, replace(PARAPHRASING, lr=0.01)))
    epochs_trained.clear()
    with pytest.warns(UserWarning, match="trained again") as told:
        after = train([run])[0]
    assert "learned from other weights of its teacher" in str(told[0].message)
    assert epochs_trained == [(run.id, 1), (run.id, 2)]
    assert final_weights(after) != final_weights(before)
    moved = final_weights(store.find_record(paraphraser))
    assert after.summary["teachers"][f"{paraphraser.id}@2"] == moved
    epochs_trained.clear()
    train([run])
    assert epochs_trained == []


def test_where_the_teacher_moved_the_paraphraser_is_trained_again_first(
    tiny, teacher, paraphraser, epochs_trained
):
    run = tiny(method=FactorTransfer(teacher, paraphraser=paraphraser))
    train([run])
    moved = move(teacher, replace(teacher, seed=5))
    epochs_trained.clear()
    with pytest.warns(UserWarning, match="trained again"):
        after = train([run])[0]
    assert epochs_trained == [(parent.id, e) for parent in (paraphraser, run) for e in (1, 2)]
    lender = store.find_record(paraphraser)
    assert fingerprint(lender.model().state_dict()) == moved
    assert after.summary["teachers"] == {
        f"{teacher.id}@2": moved,
        f"{paraphraser.id}@2": final_weights(lender),
    }


def test_a_resumed_student_starts_anew_where_its_paraphraser_moved(
    tiny, teacher, paraphraser, train_until, epochs_trained
):
    run = tiny(epochs=3, method=FactorTransfer(teacher, paraphraser=paraphraser))
    train_until(run, 2)
    move_parts(paraphraser, paraphrase(teacher, replace(PARAPHRASING, lr=0.01)))
    epochs_trained.clear()
    train([run])
    assert epochs_trained == [(run.id, epoch) for epoch in (1, 2, 3)]


@pytest.mark.parametrize("name", ["attention", "factor"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny, teacher, paraphraser, name, assert_resumes
):
    method = {
        "attention": AttentionTransfer(teacher),
        "factor": FactorTransfer(teacher, paraphraser=paraphraser, **WITH_KD),
    }[name]
    run = tiny(epochs=3, milestones=(1,), method=method)
    assert_resumes(run)


def test_lanes_side_by_side_equal_runs_one_by_one(tiny, teacher, paraphraser, elsewhere):
    methods = [
        AttentionTransfer(teacher),
        FactorTransfer(teacher, paraphraser=paraphraser),
        FactorTransfer(teacher, paraphraser=paraphraser, **WITH_KD),
        OneStage(AttentionTransfer(teacher, **WITH_KD), gap=1),
    ]
    runs = [tiny(seed=seed, method=method) for seed, method in enumerate(methods)]
    alone = elsewhere(*runs, lanes=1)
    together = train(runs, lanes=4)
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert all(map(same_log, together, alone))


def test_factors_along_one_anchor_are_plain_factor_transfer_to_the_bit(tiny, teacher, paraphraser):
    method = FactorTransfer(teacher, paraphraser=paraphraser)
    plain, one = train([tiny(method=m) for m in (method, OneStage(method, gap=2))])
    assert final_weights(one) == final_weights(plain)
    assert parts_fingerprint(one) == parts_fingerprint(plain)
    assert one.summary["teachers"] == plain.summary["teachers"]


# --- descriptions ---------------------------------------------------------------------------------


def test_what_is_left_at_its_default_is_no_part_of_the_description(tiny, teacher, paraphraser):
    spelt = {"ce_weight": 1.0, "kd_weight": 0.0, "temperature": 4.0}
    assert tiny(method=AttentionTransfer(teacher)).description["method"] == {
        "kind": "AttentionTransfer",
        "teacher": teacher.description,
    }
    assert tiny(method=FactorTransfer(teacher, paraphraser=paraphraser)).description["method"] == {
        "kind": "FactorTransfer",
        "teacher": teacher.description,
        "paraphraser": paraphraser.description,
    }
    assert paraphraser.description["method"] == {
        "kind": "Paraphrase",
        "teacher": teacher.description,
    }
    same = AttentionTransfer(teacher, attention_weight=1000.0, **spelt)
    assert tiny(method=same).id == tiny(method=AttentionTransfer(teacher)).id


def test_a_paraphraser_of_another_epoch_is_refused(teacher, paraphraser):
    with pytest.raises(ValueError, match="no paraphraser of epoch 1 of"):
        FactorTransfer(teacher, at=1, paraphraser=paraphraser)


def test_every_part_of_a_method_changes_the_id(tiny, teacher, paraphraser):
    attention = AttentionTransfer(teacher)
    factor = FactorTransfer(teacher, paraphraser=paraphraser)
    common = [{}, {"ce_weight": 0.1}, {"kd_weight": 0.9}, {"temperature": 5.0}]
    other = paraphrase(teacher, PARAPHRASING, rate=0.25)
    methods = [replace(method, **change) for method in (attention, factor) for change in common]
    methods += [
        replace(attention, at=1),
        replace(attention, attention_weight=10.0),
        replace(factor, factor_weight=10.0),
        replace(factor, paraphraser=other),
        replace(factor, paraphraser=paraphrase(teacher, replace(PARAPHRASING, lr=0.2))),
        Paraphrase(teacher),
    ]
    assert len({tiny(method=method).id for method in methods}) == len(methods)


def old(method, **settings):
    recipe = Recipe(epochs=2, batch=32, lr=0.1)
    return Run("digits", "resnet8", recipe, method(Run("digits", "resnet14", recipe), **settings))


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        (KD, {}, "b0945417af6d"),
        (KD, {"at": 1, **WITH_KD}, "d38804002b1f"),
        (Hint, {}, "32a47f6bf353"),
        (Hint, {"at": 1, "ce_weight": 0.5, "hint_weight": 3.0}, "0327086654cb"),
        (lambda teacher: OneStage(KD(teacher), gap=1), {}, "2faf3e79b4f4"),
        (lambda teacher: OneStage(Hint(teacher, hint_weight=2.0), gap=1), {}, "7ab06d4f4f20"),
    ],
)
def test_ids_of_kd_and_hints_are_those_they_had_before_they_had_a_class_in_common(
    method, settings, expected
):
    assert old(method, **settings).id == expected
