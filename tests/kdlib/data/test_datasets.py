import hashlib
import os
import pickle
import runpy
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from kdlib import KdlibError, load_data
from kdlib.data import canonical_name, datasets, download, display_name
from kdlib.errors import DataError, UnknownName

pytestmark = pytest.mark.usefixtures("fresh_data")


def refuse(*args, **kwargs):
    raise AssertionError("decoded again")


def pixels_of(images):
    """The images without their border."""
    inner = slice(images.pad, images.pad + images.size)
    return images.pixels[:, inner, inner]


# --- names ----------------------------------------------------------------------------------------


def test_an_unknown_data_set_names_the_closest():
    with pytest.raises(UnknownName, match=r"no data set 'cifar11'.*cifar10"):
        load_data("cifar11")


def test_an_unknown_split_names_the_splits():
    with pytest.raises(UnknownName, match=r"no split 'val'.*test.*train"):
        load_data("digits", "val")


@pytest.mark.parametrize(
    ("name", "printed"),
    [("digits", "digits"), ("folder:/some/photos/", "photos"), ("photos@0123456789ab", "photos")],
)
def test_a_label_is_free_of_path_and_hash(name, printed):
    assert display_name(name) == printed


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
    batch = images.batch(torch.arange(4)).double()
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        batch.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-3, rtol=0
    )
    assert load_data(f"folder:{mixed}", "test").mean == images.mean


def test_a_folder_is_decoded_once(photos, fresh_data, monkeypatch):
    folder = photos()
    first = load_data(f"folder:{folder}")
    fresh_data()
    monkeypatch.setattr(PIL.Image, "open", refuse)
    again = load_data(f"folder:{folder}")
    assert again is not first
    assert torch.equal(again.pixels, first.pixels)
    assert torch.equal(again.labels, first.labels)


def test_a_changed_folder_is_decoded_again(photos):
    folder = photos()
    before, name = load_data(f"folder:{folder}"), canonical_name(f"folder:{folder}")
    shutil.copy(folder / "test/cat/0.png", folder / "train/cat/0.png")
    after = load_data(f"folder:{folder}")
    assert canonical_name(f"folder:{folder}") != name
    assert not torch.equal(after.pixels[0], before.pixels[0])
    assert torch.equal(after.pixels[1:], before.pixels[1:])


def test_a_run_described_before_its_folder_changed_is_refused(photos):
    folder = photos()
    name = canonical_name(f"folder:{folder}")
    (folder / "train/cat/0.png").unlink()
    with pytest.raises(DataError, match=f"{folder} has changed.*{name}"):
        load_data(name)


def test_a_name_is_free_of_the_place(photos, tmp_path):
    folder = photos()
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "photos")
    names = {canonical_name(f"folder:{place}") for place in (folder, f"{folder}/", moved)}
    assert len(names) == 1
    basename, _, content = names.pop().partition("@")
    assert basename == "photos"
    assert len(content) == 12


def test_a_canonical_name_loads_where_its_folder_was_named(photos):
    folder = photos()
    name = canonical_name(f"folder:{folder}")
    assert len(load_data(name)) == 8
    datasets._folders.clear()
    datasets._load.cache_clear()
    with pytest.raises(DataError, match=r"'photos'.*folder:PATH"):
        load_data(name)


def test_a_folder_may_have_an_at_sign_in_its_name(photos):
    folder = photos("photos@home")
    assert len(load_data(f"folder:{folder}")) == 8
    assert label(canonical_name(f"folder:{folder}")) == "photos@home"


@pytest.mark.parametrize("damage", [b"", b"no image at all", b"half"])
def test_a_damaged_image_is_named(photos, damage):
    path = photos() / "train" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:1500] if damage == b"half" else damage)
    with pytest.raises(DataError, match=str(path)):
        load_data(f"folder:{path.parents[2]}")


def test_a_missing_split_is_named(photos):
    folder = photos()
    shutil.rmtree(folder / "test")
    with pytest.raises(DataError, match=f"{folder} has no folder test/"):
        load_data(f"folder:{folder}")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere"):
        load_data(f"folder:{tmp_path}/nowhere")


def test_classes_that_differ_are_named(photos):
    folder = photos()
    shutil.rmtree(folder / "test" / "dog")
    with pytest.raises(DataError, match=r"differ in their classes: \['dog'\]"):
        load_data(f"folder:{folder}")


def test_an_empty_class_is_named(photos):
    folder = photos()
    for path in (folder / "train" / "cat").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=f"{folder}/train/cat has no .png"):
        load_data(f"folder:{folder}")


def test_a_folder_without_classes_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    with pytest.raises(DataError, match="no class folders"):
        load_data(f"folder:{tmp_path}/empty")


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


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 and CIFAR-100 in miniature, in torchvision's own files, and their pixels."""
    import torchvision.datasets as tv

    random = np.random.default_rng(0)
    pixels = {}

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


def test_cifar_loads_from_torchvisions_files(cifar):
    train, test = load_data("cifar10"), load_data("cifar10", "test")
    assert (len(train), len(test), train.classes, train.views) == (50, 10, 10, 162)
    np.testing.assert_array_equal(pixels_of(train)[10:20], cifar["data_batch_2"])
    np.testing.assert_array_equal(pixels_of(test), cifar["test_batch"])
    assert test.labels.tolist() == list(range(10))
    hundred = load_data("cifar100", "test")
    assert hundred.classes == 100
    np.testing.assert_array_equal(pixels_of(hundred), cifar["test"])


def test_a_complete_download_is_left_as_it_is(cifar, tmp_path):
    assert download("cifar10") == tmp_path / "data"


def test_a_damaged_cifar_archive_says_what_to_do(cifar, tmp_path):
    path = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cifar10 is missing or damaged.*-m kdlib.data cifar10"):
        load_data("cifar10")


def test_a_missing_data_set_says_where_to_put_it_and_how_to_get_it(tmp_path):
    with pytest.raises(DataError) as refusal:
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


def test_every_refusal_is_a_kdlib_error():
    assert issubclass(DataError, KdlibError)
    assert issubclass(UnknownName, KdlibError)
