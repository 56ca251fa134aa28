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
from helpers import aux_of, final_weights, step_in_float64
from torch import nn
from torch.nn import functional as F

from kdlib import AttentionTransfer, FactorTransfer, Recipe, store, train
from kdlib.engine.state import trained_modules
from kdlib.methods import KD, paraphrase
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


@pytest.mark.parametrize(("rate", "channels"), [(0.5, 8), (0.25, 4), (0.01, 1)])
def test_translator_and_paraphraser_have_the_factors_shape(factors, rate, channels):
    method, step = factors("five stages and three", rate)
    *_, taught = step.teacher.stages(step.x)
    modules = method.paraphraser.method.aux_modules(None, step.teacher, step.x)
    encoder, decoder = (modules[name].double() for name in ("encoder", "decoder"))
    ours = step.student.stages(step.x)[2]
    factor = step.aux["translator"](ours)
    assert factor.shape[1:] == encoder(taught).shape[1:] == (channels, *taught.shape[2:])
    assert decoder(encoder(taught)).shape == taught.shape


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
    assert trained.final["test_top1"] == taught_by.final["test_top1"]
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
    other = paraphrase(same, PARAPHRASING)
    assert (other.id, other.keep, other.save_logits) == (paraphraser.id, (), False)
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


def test_a_student_is_trained_again_where_its_paraphraser_changed(
    tiny, teacher, paraphraser, epochs_trained
):
    student = tiny(epochs=3, method=FactorTransfer(teacher, paraphraser=paraphraser))
    before = train([student])[0]
    other, record = train([paraphrase(teacher, replace(PARAPHRASING, lr=0.01)), paraphraser])
    modules = trained_modules(other.run, 2, digits(paraphraser))
    record.summary["weights"]["2"] = store.save_modules(paraphraser, 2, modules.state_dict())
    store.write_record(paraphraser, record.rows, record.summary)
    epochs_trained.clear()
    with pytest.warns(UserWarning, match="learned from other weights of its teacher .* Paraphrase"):
        after = train([student])[0]
    assert epochs_trained == [(student.id, epoch) for epoch in (1, 2, 3)]
    assert final_weights(after) != final_weights(before)
    changed = final_weights(store.find_record(paraphraser))
    assert after.summary["teachers"][f"{paraphraser.id}@2"] == changed
