"""The paper's epochs whose weights the book's runs keep.

All notebooks must ask for the same epochs of a run. Otherwise one notebook makes another notebook's
run train again. That is why one table holds the epochs of all figures.
"""

from kdlib.methods import KD, STC, CrossEntropy, GateSearch

# A student, as (network, method), and the epochs that a figure measures along its training. A
# student of an earlier checkpoint of the teacher does not keep them.
FOLLOWED = {
    ("mobilenetv2-t4-w0.35", CrossEntropy): range(1, 241),  # RCO, Figure 5
    ("mobilenetv2-t4-w0.35", KD): range(1, 241),
    ("mobilenetv2-t6-w0.5", CrossEntropy): range(5, 241, 5),
    ("mobilenetv2-t6-w0.5", KD): range(5, 241, 5),
    ("resnet20", STC): range(50, 501, 50),  # STC, where to cut
    ("densenet-bc-100-12", GateSearch): range(5, 301, 5),  # the search, Figure 5
}

# A teacher with a route always keeps these epochs, also with `--keep-route`. RCO's fixed strategies
# have no other anchors, except for the anchor intervals (M_gap) of 1, 2 and 4 epochs.
RCO_ANCHORS = tuple(range(10, 250, 10))
