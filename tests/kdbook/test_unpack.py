"""Unpacking: damage is found before anything is written, and nothing is lost."""

import json

import pytest
from helpers import flip_a_bit, garble, replace_weights, truncate
from packs import NAME, SMOKE, here, pack_runs, packed_names

from kdbook import pack as pack_module
from kdbook import unpack
from kdbook.exhibits import Exhibit
from kdbook.pack import Contents, write
from kdbook.packed import INDEX
from kdbook.remaining import epochs_left, unfinished
from kdlib import store, train
from kdlib.errors import StoreError
from kdlib.files import home, results

# --- damage ---------------------------------------------------------------------------------------


def change(out, key, value):
    index = json.loads((out / INDEX).read_text())
    index["files"][0][key] = value
    (out / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: flip_a_bit(first_part(out)), "part-000-.* is damaged .*Nothing was unpacked"),
        (lambda out: truncate(first_part(out)), "part-000-.* is damaged .*copy the pack again"),
        (lambda out: first_part(out).unlink(), "part-000-.* is missing.*copy the pack again"),
        (lambda out: (out / INDEX).unlink(), "writing it was interrupted.*kdbook.pack` again"),
        (lambda out: truncate(out / INDEX), "index.json is damaged"),
        (lambda out: change(out, "sha256", "0" * 64), "runs/.* is damaged"),
        (lambda out: change(out, "size", 7), "index.json is damaged"),
    ],
)
def test_a_damaged_pack_is_refused_before_anything_is_written(
    out, machine, family, damage, message
):
    train(family)
    pack_runs(out, family, measured=[NAME], size=10_000)
    damage(out)
    machine("second")
    with pytest.raises(StoreError, match=message):
        unpack.unpack(out)
    assert here() == {}


def first_part(out):
    (path,) = out.glob("part-000-*")
    return path


def describe_another_run(path):
    path.write_bytes(path.read_bytes().replace(b'"images": 128', b'"images": 127'))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("epoch-0002.safetensors", flip_a_bit),
        ("record.jsonl", describe_another_run),
        ("record.jsonl", garble),
        ("state.safetensors", lambda path: store.save_tensors(path, {}, {})),
    ],
)
def test_content_that_contradicts_itself_is_refused(
    out, machine, family, file, damage, monkeypatch
):
    """The hashes of the pack are right, but the packed file was damaged before."""
    train(family)
    path = store.folder(family[0]) / file
    damage(path)
    monkeypatch.setattr(pack_module, "check_content", lambda *_: None)
    write(out, "smoke", Contents({f"runs/{family[0].id}/{file}": path}), 10**6)
    machine("second")
    with pytest.raises(StoreError, match=f"{family[0].id}/{file} .* is damaged"):
        unpack.unpack(out)
    assert here() == {}


@pytest.mark.parametrize(
    "name",
    [
        "/tmp/evil",
        "../evil",
        "runs/../evil",
        "runs/../../evil",
        "runs/evil.py",
        "runs/0123456789ab/../evil",
        "runs/0123456789ab/evil.py",
        "results/evil",
        "results/smoke",
        "results/course/table.md",
        "results/smoke/../../evil",
        "results/smoke//evil",
        "results/smoke/.evil",
        "results/published/claims.yaml",
        "results\\smoke\\evil",
        "results/smoke/link/evil",
        "evil",
        "",
    ],
)
def test_nothing_is_written_outside_of_the_store_and_the_profiles_results(out, tmp_path, name):
    (results() / "smoke").mkdir(parents=True)
    (results() / "smoke" / "link").symlink_to(tmp_path)
    (tmp_path / "content").write_text("evil")
    write(out, "smoke", Contents({name: tmp_path / "content"}), 10**6)
    with pytest.raises(StoreError, match=r"does not belong to the store.*Nothing was unpacked"):
        unpack.unpack(out)
    assert here() == {}
    write(out, "published", Contents({name: tmp_path / "content"}), 10**6)
    with pytest.raises(StoreError, match="does not belong to the store"):
        unpack.unpack(out)


# --- nothing is lost ------------------------------------------------------------------------------


def test_what_is_here_already_is_not_written_again(out, family):
    train(family)
    pack_runs(out, family, measured=[NAME])
    before = here()
    times = {path: path.stat().st_mtime_ns for path in home().rglob("*.safetensors")}
    assert unpack.unpack(out).endswith(f"0.0 MB; {len(packed_names(out))} files already there.")
    assert here() == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_run_with_other_weights_stays_whole(tiny, out, machine, family):
    train(family)
    pack_runs(out, family, measured=[NAME])
    machine("second")
    train(family)
    replace_weights(family[0], tiny(seed=5))
    for lost in (False, True):
        if lost:  # then the weights of the pack must not take their place
            store.weights_path(family[0], 2).unlink()
        before = here()
        line = unpack.unpack(out)
        assert here() == before
        assert "skipped 2: trained with other weights here" in line


@pytest.mark.parametrize("damage", [truncate, garble, flip_a_bit, lambda path: path.unlink()])
@pytest.mark.parametrize("file", ["epoch-0002.safetensors", "record.jsonl"])
def test_a_damaged_or_missing_file_is_repaired(out, family, file, damage):
    train(family)
    pack_runs(out, family, measured=[NAME])
    before = here()
    damage(store.folder(family[0]) / file)
    if damage is flip_a_bit and file == "record.jsonl":
        garble(store.folder(family[0]) / file)
    record, weights = file == "record.jsonl", file.startswith("epoch")
    merged = unpack.unpack(out)
    assert merged.startswith(f"Merged {record:d} record")
    assert f" {weights:d} file" in merged.partition(" of weights")[0]
    assert here() == before


def test_the_state_with_more_epochs_wins(tiny, out, tmp_path, machine, train_until):
    run = tiny(epochs=4, keep=(1, 2, 3))
    for name, epochs in (("first", 1), ("second", 3)):
        machine(name)
        train_until(run, epochs)
        pack_runs(tmp_path / f"{name}_pack", [run])
    before = here()
    line = unpack.unpack(tmp_path / "first_pack")
    assert "trained as far here" in line
    assert here() == before
    machine("first")
    unpack.unpack(tmp_path / "second_pack")
    assert here() == before
    assert epochs_left(run) == 1


def test_a_state_needs_its_checkpoints(tiny, out, machine, train_until):
    run = tiny(epochs=3, keep=(1,))
    train_until(run, 2)
    store.weights_path(run, 1).unlink()
    pack_runs(out, [run])
    machine("second")
    assert "skipped 1: its checkpoints are not in the pack" in unpack.unpack(out)
    assert here() == {}


def test_a_finished_run_needs_no_state(tiny, out, train_until):
    run = tiny()
    train_until(run, 1)
    pack_runs(out, [run])
    train([run])
    before = here()
    assert "skipped 1: trained here already" in unpack.unpack(out)
    assert here() == before


def test_a_run_in_training_is_left_alone(out, machine, family):
    train(family)
    pack_runs(out, family, measured=[NAME])
    machine("second")
    with store.lock(family[0]):
        line = unpack.unpack(out)
    assert "skipped 2: in training here now" in line
    assert store.find_record(family[0]) is None
    assert store.find_record(family[1]) is not None
    unpack.unpack(out)
    assert unfinished(family) == []


@pytest.mark.parametrize("newer", ["first", "second"])
def test_the_newer_rendering_wins(out, tmp_path, machine, family, newer):
    for name in ("first", "second"):
        machine(name)
        trained = train(family)
        exhibit = Exhibit(NAME, SMOKE)
        exhibit.add("Student", "cifar10", trained, lambda t, name=name: len(name))
        exhibit.record()
        year = "2031" if name == newer else "2030"
        for path in exhibit.folder.glob("*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"written": year}))
        pack_runs(tmp_path / f"{name}_pack", family)
    line = unpack.unpack(tmp_path / "first_pack")
    table = (results() / "smoke" / NAME / "table.csv").read_text()
    assert ("rendered here" in line) == (newer == "second")
    assert (",5.0," in table) == (newer == "first")
