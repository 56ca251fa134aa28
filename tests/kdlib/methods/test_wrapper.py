"""A wrapper answers with its inner method, except about the teacher's checkpoints."""

import pytest

from kdlib.methods import Method, Wrapper

NAMES = sorted(name for name in vars(Method) if not name.startswith("_"))
OWN = {"teacher_at", "checkpoints"}


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_passes_on_every_hook_and_flag(name):
    answer = object()

    class Inner(Method):
        pass

    class Around(Wrapper):
        inner = Inner()

    setattr(Inner, name, answer)
    found = getattr(Around(), name)
    assert (found is answer) == (name not in OWN)


def test_every_hook_and_flag_of_a_method_is_known():
    assert {"needs_logits", "loss", "extra_updates", "optimizers", "should_stop"} <= {*NAMES}
