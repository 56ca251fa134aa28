"""What notebooks use to show code and to check a reader's answers."""

import inspect
import math
import textwrap
from collections.abc import Callable
from numbers import Real

from IPython.display import Markdown


def show(*functions: Callable) -> Markdown:
    """The library's own source of these functions, as the cell's output."""
    sources = (textwrap.dedent(inspect.getsource(function)) for function in functions)
    return Markdown("\n\n".join(f"```python\n{source}```" for source in sources))


def check(answer, expected, hint: str, tolerance: float = 1e-6) -> None:
    """Compare a reader's answer with the computed one and say so.

    An unanswered exercise (None) is only mentioned, a wrong answer raises AssertionError with the
    hint.
    """
    if answer is None:
        print("Not answered yet.")
        return
    if isinstance(expected, str):
        right = str(answer).strip("`'\" ").casefold() == expected.casefold()
    elif isinstance(expected, bool) or not isinstance(answer, Real):
        right = answer == expected
    else:
        right = math.isclose(answer, expected, rel_tol=tolerance, abs_tol=tolerance)
    assert right, f"Not yet. {hint}"
    print("Right.")
