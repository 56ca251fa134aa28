"""A setting that is chosen on held-out images."""

import pytest

from kdlib import KD, Tuned, store, train
from kdlib.errors import NothingFound

RATES = (0.05, 0.1, 0.2)


def write_accuracy(trained, top1):
    """Change the record of a trained run."""
    rows = [row | {"test_top1": 99.0} for row in trained.rows]
    rows[-1]["test_top1"] = top1
    store.write_record(trained.run, rows, trained.summary)


@pytest.mark.parametrize(("accuracies", "chosen"), [((50, 70, 60), 1), ((60, 50, 60), 0)])
def test_the_best_candidate_after_its_last_epoch_is_chosen(tiny, accuracies, chosen):
    candidates = [tiny(lr=lr, data="digits+held") for lr in RATES]
    chain = Tuned(candidates, [tiny(lr=lr) for lr in RATES])
    for trained, top1 in zip(train(candidates), accuracies, strict=True):
        write_accuracy(trained, top1)
    assert chain.accuracies() == list(accuracies)
    assert chain.choose() == chosen
    assert chain.next_run(None) == chain.runs[chosen]
    assert chain.needs(chain.runs[chosen]) == []


def test_candidates_come_first_and_only_the_chosen_run_follows(tiny, epochs_trained):
    teachers = {data: tiny(epochs=1, data=data) for data in ("digits", "digits+held")}
    declared = {
        data: [tiny(epochs=1, data=data, method=KD(t, kd_weight=w), seed=1) for w in (1, 3)]
        for data, t in teachers.items()
    }
    chain = Tuned(declared["digits+held"], declared["digits"])
    (result,) = train([chain])
    chosen = chain.runs[chain.choose()]
    assert result.run == chosen
    trained = {run for run, _ in epochs_trained}
    assert trained == {r.id for r in (*teachers.values(), *chain.candidates, chosen)}
    epochs_trained.clear()
    assert train([chain])[0].run == chosen
    assert epochs_trained == []


def test_the_result_may_be_a_candidate_itself(tiny):
    candidates = [tiny(epochs=1, lr=lr) for lr in RATES[:2]]
    chain = Tuned(candidates, candidates)
    assert train([chain])[0].run == candidates[chain.choose()]


def test_a_candidate_whose_loss_is_not_finite_loses(tiny):
    candidates = [tiny(lr=lr, data="digits+held") for lr in (1e30, 0.05)]
    chain = Tuned(candidates, [tiny(lr=lr) for lr in (1e30, 0.05)])
    with pytest.warns(UserWarning, match=candidates[0].id):
        (result,) = train([chain], partial=True)
    assert result.run == chain.runs[1]
    assert train([chain])[0].run == chain.runs[1]  # the lost candidate is not tried again


def test_a_chain_ends_where_its_last_run_fails(tiny):
    chain = Tuned([tiny(data="digits+held")], [tiny(lr=1e30)])
    with pytest.warns(UserWarning, match=chain.runs[0].id):
        assert train([chain], partial=True) == [None]


def test_nothing_is_chosen_where_no_candidate_was_trained(tiny):
    bad = tiny(lr=1e30, data="digits+held")
    with pytest.raises(NothingFound):
        Tuned([bad], [tiny()]).choose()
    with pytest.warns(UserWarning, match="No candidate"):
        assert train([Tuned([bad], [tiny()])], partial=True) == [None]


def test_a_chain_needs_one_run_for_each_candidate(tiny):
    for candidates, runs in (([], []), ([tiny()], []), ([tiny()], [tiny(), tiny()])):
        with pytest.raises(ValueError, match="one run for each"):
            Tuned(candidates, runs)


def test_a_forecast_counts_the_candidates_and_one_run(tiny):
    candidates = [tiny(lr=lr, data="digits+held") for lr in RATES]
    runs = [tiny(lr=lr) for lr in RATES]
    assert Tuned(candidates, runs).estimate() == [*candidates, runs[-1]]
