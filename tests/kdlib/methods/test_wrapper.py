"""A method around another passes on all that it does not say itself."""

import inspect

import pytest

from kdlib.methods import Method
from kdlib.methods.distill import Wrapper

# What a wrapper is for, and what derives from its answers.
OWN = {"teacher_at", "anchors"}


@pytest.mark.parametrize("name", sorted(n for n in vars(Method) if not n.startswith("_")))
def test_every_hook_of_a_method_is_passed_on(name):
    if name in OWN:
        return
    assert name in vars(Wrapper), f"Wrapper does not pass on Method.{name}"

    class Inner(Method):
        pass

    told = object()
    hook = vars(Method)[name]
    if inspect.isfunction(hook):
        arguments = [object() for _ in inspect.signature(hook).parameters][1:]
        setattr(Inner, name, lambda self, *given: (told, given))
        expected = (told, tuple(arguments))
    else:
        setattr(Inner, name, told)
        arguments, expected = None, told

    class Around(Wrapper):
        inner = Inner()

    found = getattr(Around(), name)
    result = found if arguments is None else found(*arguments)
    assert result == (None if name == "check" else expected)
