"""Small tables computed from a trained model, for ``measure``."""

import pandas as pd
import torch

from kdlib.data import load_data
from kdlib.store import Trained


@torch.no_grad()
def logits_on_test(trained: Trained, count: int, epoch: int | None = None) -> pd.DataFrame:
    """Logits of the first ``count`` test images: columns ``label`` and one per class."""
    images = load_data(trained.run.data, "test").first(count)
    logits = trained.model(epoch)(images.batch(torch.arange(len(images))))
    table = pd.DataFrame(logits.tolist(), columns=list(images.class_names))
    table.insert(0, "label", images.labels.tolist())
    return table
