"""Attention transfer and factor transfer: their losses, the paraphraser, their training."""

from dataclasses import replace

import pytest
import torch
from by_hand import (
    WITH_KD,
    assert_same_weights,
    assert_same_with_gradients,
    digits,
    first_student,
    kl,
    on_logits,
    seeded,
    stage_outputs,
    to_one_size,
    train_by_hand,
)
from helpers import aux_of, final_weights, replace_weights, step_in_float64
from torch import nn
from torch.nn import functional as F

from kdlib import (
    AttentionTransfer,
    FactorTransfer,
    Recipe,
    build_model,
    store,
    train,
)
from kdlib.engine.graph import ancestry
from kdlib.engine.state import trained_modules
from kdlib.methods import KD, paraphrase
from kdlib.runs import Checkpoint
from kdlib.store import fingerprint

PARAPHRASING = Recipe(2, 24, lr=0.1)
PAIRS = {
    "equal": ("resnet8-x0.25", "resnet14-x0.25"),
    "other channels": ("resnet8-x0.25", "wrn-10-2-x0.25"),
    "five stages and three": ("vgg13-x0.0625", "wrn-10-1-x0.25"),
    "three stages and four": ("resnet8-x0.25", "mobilenetv2-t1-w0.1"),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)
with_and_without_kd = pytest.mark.parametrize("weights", [{}, WITH_KD], ids=["alone", "with KD"])


# --- attention ------------------------------------------------------------------------------------


def attention_by_hand(ours, theirs):
    total = 0
    for pair in zip(ours[1:], theirs[1:], strict=False):
        maps = []
        for feature in to_one_size(*pair):
            q = (feature**2).mean(1)
            maps.append(q / (q**2).sum((1, 2), keepdim=True).sqrt())
        total = total + ((maps[0] - maps[1]) ** 2).mean()
    return total


@every_pair
@with_and_without_kd
def test_attention_and_its_gradient_equal_those_computed_by_hand(tiny, pair, weights):
    method = AttentionTransfer(tiny(), **weights)
    step = step_in_float64(method, *PAIRS[pair], size=16)._replace(teacher_logits=None)
    logits, terms = method.loss(step)
    features = (stage_outputs(network, step.x) for network in (step.student, step.teacher))
    attention = attention_by_hand(*features)
    expected = on_logits(step, **weights) + 1000 * 256 / 1024 * attention
    assert terms["attention"].item() > 1e-5
    torch.testing.assert_close(terms["attention"], attention, rtol=1e-11, atol=0)
    torch.testing.assert_close(logits, step.student(step.x), rtol=1e-11, atol=1e-13)
    assert_same_with_gradients(terms["loss"], expected, [step.student])
    assert step.aux == {}


@pytest.mark.parametrize(("size", "weight"), [(32, 1000), (16, 250), (8, 62.5), (64, 4000)])
def test_the_weight_of_attention_grows_with_the_pixels_and_is_1000_at_32x32(tiny, size, weight):
    method = AttentionTransfer(tiny())
    step = step_in_float64(method, "resnet8-x0.1", "resnet14-x0.1", size=size)
    terms = method.loss(step)[1]
    factor = (terms["loss"] - terms["ce"]) / terms["attention"]
    assert factor.item() == pytest.approx(weight, rel=1e-9)


def test_in_the_papers_pairs_the_paired_stages_have_one_size():
    with torch.device("meta"):
        x = torch.empty(2, 3, 32, 32)
        vgg, wrn = (build_model(n, 10).eval().stages(x) for n in ("vgg13", "wrn-10-4"))
    assert (len(vgg), len(wrn)) == (5, 3)
    assert [f.shape for f in vgg[:3]] == [f.shape for f in wrn]


# --- factors --------------------------------------------------------------------------------------


@pytest.fixture
def factors(tiny):
    """A method of factor transfer and its step in float64."""

    def make(pair, rate=0.5, size=16, **settings):
        teacher = tiny()
        paraphraser = paraphrase(teacher, PARAPHRASING, rate)
        method = FactorTransfer(teacher, paraphraser=paraphraser, **settings)
        step = step_in_float64(method, *PAIRS[pair], size=size)
        encoder = paraphraser.method.aux_modules(None, step.teacher, step.x)["encoder"].double()
        pretrained = {"encoder": encoder.eval().requires_grad_(False)}
        return method, step._replace(pretrained=pretrained, teacher_logits=None)

    return make


def leaky_by_hand(network, x):
    for k in range(0, len(network), 2):
        x = network[k](x)
        x = torch.where(x > 0, x, 0.1 * x)
    return x


def normalised(factor):
    """Each image's whole factor, not its mean over channels as in attention transfer."""
    flat = factor.flatten(1)
    return flat / (flat**2).sum(1, keepdim=True).sqrt()


@every_pair
@with_and_without_kd
def test_factors_and_their_gradient_equal_those_computed_by_hand(factors, pair, weights):
    method, step = factors(pair, **weights)
    logits, terms = method.loss(step)
    stages = min(len(step.student.body), len(step.teacher.body))
    ours = leaky_by_hand(step.aux["translator"], stage_outputs(step.student, step.x)[stages])
    theirs = leaky_by_hand(step.pretrained["encoder"], stage_outputs(step.teacher, step.x)[-1])
    ours, theirs = map(normalised, to_one_size(ours, theirs))
    factor = (ours - theirs).abs().mean()
    expected = on_logits(step, **weights) + 500 * factor
    assert terms["factor"].item() > 1e-5
    torch.testing.assert_close(terms["factor"], factor, rtol=1e-11, atol=0)
    torch.testing.assert_close(logits, step.student(step.x), rtol=1e-11, atol=1e-13)
    assert_same_with_gradients(terms["loss"], expected, [step.student, step.aux["translator"]])


@every_pair
@pytest.mark.parametrize(("rate", "factor"), [(0.5, 8), (0.25, 4), (0.01, 1)])
def test_translator_and_paraphraser_have_the_factors_shape(factors, pair, rate, factor):
    method, step = factors(pair, rate)
    *_, taught = step.teacher.stages(step.x)
    expected = max(1, factor * taught.shape[1] // 16) if rate > 0.1 else 1
    modules = method.paraphraser.method.aux_modules(None, step.teacher, step.x)
    encoder, decoder = (modules[name].double() for name in ("encoder", "decoder"))
    (translator,) = step.aux.values()
    ours = step.student.stages(step.x)[: len(step.teacher.body)][-1]
    assert encoder(taught).shape[1] == translator(ours).shape[1] == expected
    assert translator(ours).shape[2:] == ours.shape[2:]
    assert encoder(taught).shape[2:] == taught.shape[2:]
    assert decoder(encoder(taught)).shape == taught.shape
    kinds = (encoder, nn.Conv2d), (decoder, nn.ConvTranspose2d), (translator, nn.Conv2d)
    for network, kind in kinds:
        assert [type(m) for m in network] == [kind, nn.LeakyReLU] * 3
        assert all(m.kernel_size == (3, 3) and m.bias is not None for m in network[::2])
        assert [m.negative_slope for m in network[1::2]] == [0.1] * 3


def test_the_papers_factors_have_half_the_channels_and_one_size(tiny):
    teacher = tiny()
    method = FactorTransfer(teacher, paraphraser=paraphrase(teacher, PARAPHRASING))
    with torch.device("meta"):
        vgg, wrn = (build_model(n, 10).eval() for n in ("vgg13", "wrn-10-4"))
        x = torch.empty(2, 3, 32, 32)
        translator = method.aux_modules(vgg, wrn, x)["translator"]
        encoder = method.paraphraser.method.aux_modules(None, wrn, x)["encoder"]
        ours, theirs = translator(vgg.stages(x)[2]), encoder(wrn.stages(x)[-1])
    assert ours.shape == theirs.shape == (2, 128, 8, 8)


# --- the paraphraser ------------------------------------------------------------------------------


@pytest.fixture
def teacher(tiny):
    return tiny(model="wrn-10-1-x0.5", keep=(1,))


@pytest.fixture
def paraphraser(teacher):
    return paraphrase(teacher, PARAPHRASING)


def test_the_student_of_a_paraphraser_stays_the_teacher_bit_for_bit(teacher, paraphraser):
    trained, taught_by = train([replace(paraphraser, keep=(1,)), teacher])
    expected = fingerprint(taught_by.model().state_dict())
    assert [fingerprint(trained.model(e).state_dict()) for e in (1, 2)] == [expected] * 2
    assert final_weights(taught_by) == expected
    assert trained.log.test_top1.tolist() == [taught_by.final["test_top1"]] * 2
    assert trained.log.test_kl.abs().max() < 1e-6
    assert trained.summary["teachers"] == {f"{teacher.id}@2": final_weights(taught_by)}


def three_layers(layer, *widths):
    layers = []
    for k in range(3):
        layers += [layer(widths[k], widths[k + 1], 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def first_autoencoder(run):
    """Encoder and decoder; the decoder draws its random weights last."""

    def make():
        decoder = three_layers(nn.ConvTranspose2d, 16, 16, 32, 32)
        return three_layers(nn.Conv2d, 32, 32, 16, 16), decoder

    return seeded(run, make)


def test_training_a_paraphraser_equals_a_plain_pytorch_loop(teacher, paraphraser):
    trained = train([paraphraser])[0]
    taught_by = store.find_record(teacher).model()
    encoder, decoder = first_autoencoder(paraphraser)

    def losses(x, labels):
        feature = stage_outputs(taught_by, x)[-1]
        yield (decoder(encoder(feature)) - feature).abs().mean()

    train_by_hand(paraphraser, losses, (PARAPHRASING, [encoder, decoder]))
    expected = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    assert_same_weights(aux_of(trained), expected)


def test_a_paraphraser_learns_to_restore_its_teachers_features(teacher):
    epochs = 24
    run = paraphrase(teacher, Recipe(epochs, 24, lr=0.1))
    losses = train([run])[0].log.train_loss.to_numpy().reshape(4, -1).mean(1)
    assert (losses[1:] < losses[:-1]).all()
    assert losses[-1] < 0.85 * losses[0]
    images = digits(teacher)
    *_, feature = store.find_record(teacher).model().stages(images.batch(torch.arange(128)))
    errors = []
    for epoch in (0, epochs):
        modules = trained_modules(run, epoch, images)
        restored = modules["decoder"](modules["encoder"](feature))
        errors.append((restored - feature).abs().mean().item())
    assert errors[1] < 0.85 * errors[0]
    assert errors[1] < 0.85 * feature.abs().mean().item()


def test_a_paraphraser_of_another_teacher_or_epoch_is_refused(tiny, teacher, paraphraser):
    others = [
        paraphrase(tiny(model="wrn-10-1-x0.5", seed=1), PARAPHRASING),
        teacher,
        tiny(method=KD(teacher)),
    ]
    for other in others:
        with pytest.raises(
            ValueError, match=r"not a paraphraser of .*paraphrase\(teacher, recipe\)"
        ):
            FactorTransfer(teacher, paraphraser=other)
    with pytest.raises(ValueError, match=r"not a paraphraser of .*, epoch 1"):
        FactorTransfer(teacher, at=1, paraphraser=paraphraser)


def test_what_the_teacher_saves_changes_no_paraphraser(teacher, paraphraser):
    same = replace(teacher, keep=(1, 2), save_logits=True)
    assert paraphrase(same, PARAPHRASING).id == paraphraser.id
    FactorTransfer(same, paraphraser=paraphraser)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "factor"])
def test_training_equals_a_plain_pytorch_loop(tiny, teacher, paraphraser, computed_logits, name):
    """The teacher's logits come from the teacher itself and from no cache."""
    method = {
        "attention": AttentionTransfer(teacher, **WITH_KD),
        "factor": FactorTransfer(teacher, paraphraser=paraphraser, **WITH_KD),
    }[name]
    run = tiny(milestones=(1,), method=method, seed=4)
    trained = train([run])[0]
    assert not any(split == "train" for _, split, *_ in computed_logits)
    taught_by, model = store.find_record(teacher).model(), first_student(run)
    translator = seeded(run, lambda: three_layers(nn.Conv2d, 16, 16, 16, 16))
    encoder, _ = first_autoencoder(paraphraser)
    if name == "factor":
        lent = aux_of(store.find_record(paraphraser))
        encoder.load_state_dict(store.select(lent, "encoder."))

    def losses(x, labels):
        ours, theirs = stage_outputs(model, x), stage_outputs(taught_by, x)
        if name == "attention":
            term = 62.5 * attention_by_hand(ours, theirs)
        else:
            factors = translator(ours[-1]), encoder(theirs[-1]).detach()
            mine, taught = (F.normalize(factor.flatten(1)) for factor in factors)
            term = 500 * (mine - taught).abs().mean()
        logits, taught = model.head(ours[-1]), taught_by.head(theirs[-1])
        yield 0.1 * F.cross_entropy(logits, labels) + 0.9 * kl(taught, logits, 4) + term

    aux = {"translator": translator} if name == "factor" else {}
    train_by_hand(run, losses, (run.recipe, [model, *aux.values()]))
    assert_same_weights(trained.model().state_dict(), model, 1e-4, 1e-5)
    assert_same_weights(aux_of(trained), nn.ModuleDict(aux), 1e-4, 1e-5)
    log, weight = trained.log, {"attention": 62.5, "factor": 500}[name]
    total = 0.1 * log.train_ce + 0.9 * log.train_kd + weight * log[f"train_{name}"]
    assert log.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)


# --- the paraphraser is a parent of the student ---------------------------------------------------


@pytest.fixture
def student(tiny, teacher, paraphraser):
    return tiny(epochs=3, method=FactorTransfer(teacher, paraphraser=paraphraser))


def test_the_paraphraser_is_trained_before_its_student(
    teacher, paraphraser, student, epochs_trained
):
    assert ancestry([student]) == [teacher, paraphraser, student]
    assert student.teachers == [Checkpoint(teacher, 2), Checkpoint(paraphraser, 2)]
    trained = train([student])[0]
    expected = [(run.id, epoch) for run in (teacher, paraphraser) for epoch in (1, 2)]
    assert epochs_trained == expected + [(student.id, epoch) for epoch in (1, 2, 3)]
    assert trained.summary["teachers"] == {
        f"{parent.id}@2": final_weights(store.find_record(parent))
        for parent in (teacher, paraphraser)
    }


def replace_modules(run, other):
    """Give a trained run all modules of another, as training on another machine may."""
    (trained, record), last = train([other, run]), run.recipe.epochs
    modules = trained_modules(trained.run, last, digits(run))
    record.summary["weights"][str(last)] = store.save_modules(run, last, modules)
    store.write_record(run, record.rows, record.summary)


def test_a_student_is_trained_again_where_its_paraphraser_changed(
    teacher, paraphraser, student, epochs_trained
):
    before = train([student])[0]
    replace_modules(paraphraser, paraphrase(teacher, replace(PARAPHRASING, lr=0.01)))
    epochs_trained.clear()
    with pytest.warns(UserWarning, match="learned from other weights of its teacher .* Paraphrase"):
        after = train([student])[0]
    assert epochs_trained == [(student.id, epoch) for epoch in (1, 2, 3)]
    assert final_weights(after) != final_weights(before)
    changed = final_weights(store.find_record(paraphraser))
    assert after.summary["teachers"][f"{paraphraser.id}@2"] == changed
    epochs_trained.clear()
    train([student])
    assert epochs_trained == []


def test_where_the_teacher_changed_the_paraphraser_is_trained_again_first(
    teacher, paraphraser, student, epochs_trained
):
    train([student])
    changed = replace_weights(teacher, replace(teacher, seed=5))
    epochs_trained.clear()
    with pytest.warns(UserWarning, match="trained again"):
        after = train([student])[0]
    expected = [(paraphraser.id, epoch) for epoch in (1, 2)]
    assert epochs_trained == expected + [(student.id, epoch) for epoch in (1, 2, 3)]
    lender = store.find_record(paraphraser)
    assert fingerprint(lender.model().state_dict()) == changed
    assert after.summary["teachers"] == {
        f"{teacher.id}@2": changed,
        f"{paraphraser.id}@2": final_weights(lender),
    }


def test_an_interrupted_student_starts_anew_where_its_paraphraser_changed(
    teacher, paraphraser, student, train_until, epochs_trained
):
    train_until(student, 2)
    replace_modules(paraphraser, paraphrase(teacher, replace(PARAPHRASING, lr=0.01)))
    epochs_trained.clear()
    train([student])
    assert epochs_trained == [(student.id, epoch) for epoch in (1, 2, 3)]
