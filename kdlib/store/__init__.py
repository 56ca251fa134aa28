"""The store: weights, resume states, records and measurements of runs, as JSON and safetensors.

``$KDLIB_HOME/<id>/`` holds the weights and the record of a run. Exhibits copy the records that they
use to ``results/<profile>/records/``, so that a clone without a store finds them.
"""

from kdlib.store.measurements import copy_record, measure
from kdlib.store.records import Trained, failure_path, find_record, require_record, write_record
from kdlib.store.weights import (
    fingerprint,
    folder,
    holds_logits,
    holds_weights,
    load_checkpoint,
    load_logits,
    load_modules,
    load_tensors,
    lock,
    save_logits,
    save_modules,
    save_tensors,
    saved_fingerprint,
    select,
    state_path,
    weights_path,
)
