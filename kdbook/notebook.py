"""Helpers of the notebooks: show code, check a reader's answer, read logits."""

import inspect
import math
import textwrap
from collections.abc import Callable
from numbers import Real

import pandas as pd
import torch

from kdlib.data import load_data
from kdlib.store import Trained

try:
    from IPython.display import Markdown
except ImportError:  # a machine that only trains may lack Jupyter
    Markdown = str


def show(*functions: Callable) -> Markdown:
    """The source code of these functions, as the output of a cell."""
    sources = (textwrap.dedent(inspect.getsource(function)) for function in functions)
    return Markdown("\n\n".join(f"```python\n{source}```" for source in sources))


def check(answer, expected, hint: str, tolerance: float = 1e-6) -> None:
    """Compare a reader's answer with the computed answer, and print the result.

    None is an exercise without an answer yet. Raises AssertionError with the hint if the answer is
    wrong.
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


@torch.no_grad()
def logits_on_test(trained: Trained, count: int, epoch: int | None = None) -> pd.DataFrame:
    """Logits of the first ``count`` test images: columns ``label`` and one for each class."""
    images = load_data(trained.run.dataset, "test").first(count)
    logits = trained.model(epoch)(images.batch(torch.arange(len(images))))
    table = pd.DataFrame(logits.tolist(), columns=list(images.class_names))
    table.insert(0, "label", images.labels.tolist())
    return table
