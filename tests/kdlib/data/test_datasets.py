"""Data sets by name, folders of images, and what is wrong with them."""

import hashlib
import os
import pickle
import runpy
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from kdlib import load_data
from kdlib.data import canonical_name, check_name, count_views, datasets, display_name, download
from kdlib.errors import DataError, UnknownName

pytestmark = pytest.mark.usefixtures("fresh_data")


def pixels_of(images):
    """The images without their border."""
    inner = slice(images.pad, images.pad + images.size)
    return images.pixels[:, inner, inner]


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar11", "cifar11+blur1", "digits+fog1"])
@pytest.mark.parametrize("function", [check_name, canonical_name, load_data, count_views])
def test_an_unknown_data_set_names_the_closest(function, name):
    closest = "digits" if "digits" in name else "cifar10"
    with pytest.raises(UnknownName, match=rf"no data set '{name.replace('+', '.')}'.*{closest}"):
        function(name)
    with pytest.raises(UnknownName, match=r"no split 'val'.*test.*train"):
        load_data("digits", "val")


@pytest.mark.parametrize("name", ["mnist", "photos@0123456789ab", "folder:/no/where+noise0.1"])
def test_checking_a_name_reads_nothing(name):
    check_name(name)
    assert count_views(name) == (1 if name == "mnist" else 162)


@pytest.mark.parametrize(
    ("name", "displayed"),
    [
        ("digits", "digits"),
        ("folder:/some/photos/", "photos"),
        ("photos@0123456789ab", "photos"),
        ("photos@home@0123456789ab+blur1", "photos@home+blur1"),
    ],
)
def test_a_displayed_name_has_no_path_and_no_hash(name, displayed):
    assert display_name(name) == displayed


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_views_are_counted_without_an_image(photos, name):
    name = "digits" if name == "digits" else f"folder:{photos()}"
    assert count_views(name) == count_views(name + "+noise1") == load_data(name).views
    assert load_data(name, "test").views == 1


# --- folders of images ----------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Images of several types, sizes and modes; only one of them is 32x32 RGB."""
    random = np.random.default_rng(0)

    def save(path, size, mode):
        path.parent.mkdir(parents=True, exist_ok=True)
        bands = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
        pixels = random.integers(0, 256, (*size[::-1], *bands), dtype=np.uint8)
        PIL.Image.fromarray(pixels, mode).save(path)

    folder = tmp_path / "mixed"
    for split in ("train", "test"):
        save(folder / split / "cat" / "a.png", (32, 32), "RGB")
        save(folder / split / "cat" / "b.JPG", (48, 20), "RGB")
        save(folder / split / "dog" / "c.JPEG", (32, 32), "L")
        save(folder / split / "dog" / "d.png", (8, 8), "RGBA")
        (folder / split / "dog" / "notes.txt").write_text("no image")
    return folder


def test_a_folder_of_mixed_images_becomes_32x32_colour(mixed):
    images = load_data(f"folder:{mixed}")
    assert images.pixels.shape == (4, 40, 40, 3)
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert (images.name, images.views) == ("mixed", 162)
    for got, file in zip(pixels_of(images), ("cat/a.png", "cat/b.JPG", "dog/c.JPEG"), strict=False):
        image = PIL.Image.open(mixed / "train" / file).convert("RGB")
        expected = np.asarray(image.resize((32, 32), PIL.Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(got.numpy(), expected)


def test_a_folder_is_normalised_by_its_own_training_images(mixed):
    images = load_data(f"folder:{mixed}")
    batch = images.batch(torch.arange(4)).double().transpose(0, 1).flatten(1)
    for got, expected in ((batch.mean(1), 0.0), (batch.std(1, correction=0), 1.0)):
        torch.testing.assert_close(got, torch.full_like(got, expected), atol=1e-3, rtol=0)
    assert load_data(f"folder:{mixed}", "test").mean == images.mean


def test_a_folder_is_decoded_once_and_again_if_it_changes(photos, fresh_data, monkeypatch):
    folder = photos()
    first, name = load_data(f"folder:{folder}"), canonical_name(f"folder:{folder}")
    fresh_data()
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image, "open", None)
        again = load_data(f"folder:{folder}")
    assert again is not first
    assert torch.equal(again.pixels, first.pixels)
    assert torch.equal(again.labels, first.labels)
    shutil.copy(folder / "test/cat/0.png", folder / "train/cat/0.png")
    after = load_data(f"folder:{folder}")
    assert canonical_name(f"folder:{folder}") != name
    assert not torch.equal(after.pixels[0], first.pixels[0])
    assert torch.equal(after.pixels[1:], first.pixels[1:])
    fresh_data()
    with pytest.raises(DataError, match=f"{folder} has changed.*{name}"):
        load_data(name)


def test_an_image_of_another_class_changes_the_name(photos):
    folder = photos()
    name = canonical_name(f"folder:{folder}")
    # the images in their order stay the same
    (folder / "train/cat/3.png").rename(folder / "train/dog/!.png")
    assert canonical_name(f"folder:{folder}") != name


def test_a_canonical_name_is_the_same_everywhere_and_loads_where_its_folder_is_known(
    photos, tmp_path, fresh_data
):
    folder = photos("photos@home")
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "photos@home")
    names = {canonical_name(f"folder:{place}") for place in (folder, f"{folder}/", moved)}
    (name,) = names
    place, _, content = name.rpartition("@")
    assert (place, len(content), len(load_data(name))) == ("photos@home", 12, 8)
    assert canonical_name(name) == name
    datasets._folders.clear()
    fresh_data()
    with pytest.raises(DataError, match=r"'photos@home'.*folder:PATH"):
        load_data(name)


@pytest.mark.parametrize("damage", [b"", b"no image at all", b"half"])
def test_a_damaged_image_is_named(photos, damage):
    path = photos() / "train" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:1500] if damage == b"half" else damage)
    with pytest.raises(DataError, match=str(path)):
        load_data(f"folder:{path.parents[2]}")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("", "has no folder train/"),
        ("test", "has no folder test/"),
        ("test/dog", r"differ in their classes: \['dog'\]"),
        ("train/cat/*", "train/cat has no .png"),
        ("*/*", "train has no class folders"),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(photos, missing, message):
    folder = photos()
    for path in list(folder.glob(missing)) if missing else [folder]:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(DataError, match=f"{folder}.*{message}"):
        load_data(f"folder:{folder}")


@pytest.mark.parametrize("length", [0, 100, 20_000])
def test_a_truncated_cache_is_made_anew(photos, fresh_data, tmp_path, length):
    folder = photos()
    first = load_data(f"folder:{folder}")
    (cache,) = (tmp_path / "home" / "cache").iterdir()
    os.truncate(cache, length)
    fresh_data()
    assert torch.equal(load_data(f"folder:{folder}").pixels, first.pixels)
    assert cache.stat().st_size > 20_000


# --- torchvision's data sets ----------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 and CIFAR-100 in miniature, in torchvision's own files, and their pixels."""
    import torchvision.datasets as tv

    random = np.random.default_rng(0)
    pixels = {}

    def md5(path):
        return hashlib.md5(path.read_bytes()).hexdigest()

    def write(dataset, files, label_key, count):
        folder = tmp_path / "data" / dataset.base_folder
        folder.mkdir(parents=True)
        for file in files:
            rows = random.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
            pixels[file] = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            content = {"data": rows, label_key: list(range(count))}
            (folder / file).write_bytes(pickle.dumps(content))
        meta = {dataset.meta["key"]: [f"class {k}" for k in range(count)]}
        path = folder / dataset.meta["filename"]
        path.write_bytes(pickle.dumps(meta))
        sums = [[file, md5(folder / file)] for file in files]
        monkeypatch.setattr(dataset, "train_list", sums[:-1])
        monkeypatch.setattr(dataset, "test_list", sums[-1:])
        monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": md5(path)})

    batches = [f"data_batch_{k}" for k in range(1, 6)]
    write(tv.CIFAR10, [*batches, "test_batch"], "labels", 10)
    write(tv.CIFAR100, ["train", "test"], "fine_labels", 100)
    return pixels


def test_cifar_loads_from_torchvisions_files(cifar, tmp_path):
    train, test = load_data("cifar10"), load_data("cifar10", "test")
    assert (len(train), len(test), train.classes, train.views) == (50, 10, 10, 162)
    np.testing.assert_array_equal(pixels_of(train)[10:20], cifar["data_batch_2"])
    np.testing.assert_array_equal(pixels_of(test), cifar["test_batch"])
    assert test.labels.tolist() == list(range(10))
    hundred = load_data("cifar100", "test")
    assert hundred.classes == 100
    np.testing.assert_array_equal(pixels_of(hundred), cifar["test"])
    assert download("cifar10") == tmp_path / "data"  # a complete download stays as it is


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_missing_or_damaged_data_set_says_what_to_do(cifar, tmp_path, damage):
    path = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content) if damage == "damaged" else path.unlink()
    with pytest.raises(DataError, match="cifar10 is missing or damaged") as refusal:
        load_data("cifar10")
    for advice in (tmp_path / "data", "python -m kdlib.data cifar10", "KDLIB_DATA", "folder:PATH"):
        assert str(advice) in str(refusal.value)


@pytest.fixture
def mnist(tmp_path):
    """MNIST in miniature, in its own IDX files, and their pixels."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = {}
    for split, count in (("train", 20), ("t10k", 10)):
        pixels[split] = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, content in (("images-idx3", pixels[split]), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, content.ndim]) + np.array(content.shape, ">i4").tobytes()
            (raw / f"{split}-{name}-ubyte").write_bytes(head + content.tobytes())
    return raw, pixels


def test_mnist_loads_from_its_own_files(mnist):
    _, pixels = mnist
    train, test = load_data("mnist"), load_data("mnist", "test")
    np.testing.assert_array_equal(train.pixels[..., 0], pixels["train"])
    np.testing.assert_array_equal(test.pixels[..., 0], pixels["t10k"])
    assert train.labels.tolist() == [*range(10)] * 2
    assert (train.classes, train.channels, train.size) == (10, 1, 28)


@pytest.mark.parametrize("length", [0, 3, 500])
def test_a_truncated_mnist_file_says_what_to_do(mnist, length):
    os.truncate(mnist[0] / "train-images-idx3-ubyte", length)
    with pytest.raises(DataError, match=r"mnist.*-m kdlib.data mnist"):
        load_data("mnist")


def test_only_torchvisions_data_sets_can_be_downloaded(monkeypatch):
    with pytest.raises(UnknownName, match="cifar10"):
        download("cifar11")
    monkeypatch.setattr("sys.argv", ["kdlib.data", "cifar11"])
    with pytest.raises(SystemExit, match="Did you mean cifar10"):
        runpy.run_module("kdlib.data", run_name="__main__")
