"""The precision of training and of labels, on a CPU that multiplies in bfloat16."""

import pytest
import torch

from kdlib import KD, Penalised, build_model, load_data, train
from kdlib.engine import precision
from kdlib.engine.logit_cache import LogitCache
from kdlib.engine.plan import plan
from kdlib.engine.precision import label_dtype, speed, training_dtype

CPU = torch.device("cpu")


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of speeds for a CPU that multiplies in bfloat16."""
    path = tmp_path / "speeds.csv"
    path.write_text(
        "family,side,training,labels\nresnet,8,0.9,1.0\nresnet,16,1.3,2.0\nmobilenetv2,8,0.5,1.5\n"
    )
    precision._speeds.cache_clear()
    monkeypatch.setattr(precision, "SPEEDS", path)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    monkeypatch.delenv("KDLIB_PRECISION", raising=False)
    yield
    precision._speeds.cache_clear()


@pytest.mark.parametrize(
    ("model", "side", "training", "labels"),
    [
        ("resnet20", 8, "float32", "float32"),
        ("resnet20", 16, "bfloat16", "bfloat16"),
        ("resnet8-x0.5", 32, "bfloat16", "bfloat16"),  # the largest side that was measured
        ("mobilenetv2-t6-w0.5", 32, "float32", "bfloat16"),
        ("resnet20", 4, "float32", "float32"),
        ("vgg13", 32, "float32", "float32"),
    ],
)
def test_bfloat16_is_used_where_the_table_says_that_it_is_faster(
    table, model, side, training, labels
):
    assert str(training_dtype(CPU, model, side)) == f"torch.{training}"
    assert str(label_dtype(CPU, model, side)) == f"torch.{labels}"


def test_a_cpu_that_does_not_multiply_in_bfloat16_computes_in_float32(table, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    assert training_dtype(CPU, "resnet20", 32) == label_dtype(CPU, "resnet20", 32) == torch.float32


@pytest.mark.parametrize("wish", ["float32", "bfloat16"])
def test_the_environment_overrides_the_table(table, monkeypatch, wish):
    monkeypatch.setenv("KDLIB_PRECISION", wish)
    for model in ("resnet20", "mobilenetv2-t6-w0.5"):
        assert str(training_dtype(CPU, model, 16)) == f"torch.{wish}"
        assert str(label_dtype(CPU, model, 16)) == f"torch.{wish}"
    monkeypatch.setenv("KDLIB_PRECISION", "half")
    with pytest.raises(ValueError, match="KDLIB_PRECISION=half is not valid: set it to float32,"):
        training_dtype(CPU, "resnet20", 16)


def test_float16_is_for_a_gpu_where_losses_are_scaled(monkeypatch):
    monkeypatch.setenv("KDLIB_PRECISION", "float16")
    gpu = torch.device("cuda")
    assert training_dtype(gpu) == label_dtype(gpu, "resnet20", 32) == torch.float16
    for choice in (training_dtype, label_dtype):
        with pytest.raises(ValueError, match="float16 needs a GPU"):
            choice(CPU, "resnet20", 32)


def test_the_committed_table_can_be_read():
    assert speed("resnet20", 32, "training") > 1
    assert speed("unknown", 32, "labels") == 0


# --- training -------------------------------------------------------------------------------------


def test_records_name_the_precision_and_float32_gives_its_bits_again(tiny, elsewhere, monkeypatch):
    teacher = tiny(model="resnet14-x0.25")
    run = tiny(method=KD(teacher), seed=1)
    exact = elsewhere(run, teacher)[0]
    monkeypatch.setenv("KDLIB_PRECISION", "bfloat16")
    half = train([run])[0]
    for trained, name in ((exact, "float32"), (half, "bfloat16")):
        about = trained.summary["environment"]
        assert (about["precision"], about["label_precision"]) == (name, name)
    assert half.summary["weights"] != exact.summary["weights"]
    assert half.final["train_loss"] == pytest.approx(exact.final["train_loss"], rel=0.05)
    assert half.model().stem[0].weight.dtype == torch.float32


def test_a_run_in_bfloat16_resumes_to_the_same_bits(tiny, monkeypatch, assert_resumes):
    monkeypatch.setenv("KDLIB_PRECISION", "bfloat16")
    assert_resumes(tiny(epochs=3, method=KD(tiny(epochs=1)), seed=1))


def test_a_method_that_reads_gradients_stays_in_float32(tiny, monkeypatch):
    monkeypatch.setenv("KDLIB_PRECISION", "bfloat16")
    (trained,) = train([tiny(epochs=1, method=Penalised())])
    assert trained.summary["environment"]["precision"] == "float32"
    assert trained.summary["environment"]["label_precision"] is None


def test_labels_in_bfloat16_do_not_depend_on_when_they_were_computed():
    images = load_data("digits").first(100)
    teacher = build_model("resnet14-x0.25", classes=10, channels=1, seed=0)
    teacher(images.batch(torch.arange(100)))
    first, second = (LogitCache(teacher.eval(), images, torch.bfloat16) for _ in range(2))
    index, view = plan(0, 0, len(images), images.views)
    expected = first.logits(index, view)
    assert expected.dtype == first.table.dtype == torch.bfloat16
    for part in torch.randperm(100, generator=torch.manual_seed(0)).split(13):
        second.logits(index[part], view[part])
    assert torch.equal(second.logits(index, view), expected)
    exact = LogitCache(teacher, images).logits(index, view)
    assert (expected.float() - exact).norm() < 0.02 * exact.norm()
