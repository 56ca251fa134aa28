"""A plugin of pytest beside nbval: kernels are reached over Unix sockets.

Those of several processes that start at once would race for TCP ports, and the loser dies.
"""

import itertools
import tempfile

import nbval.kernel

FOLDER = tempfile.TemporaryDirectory(prefix="nbval-")
numbers = itertools.count()
manager = nbval.kernel.KernelManager


def over_sockets(**settings):
    """nbval's kernel manager; every kernel has sockets of its own name."""
    return manager(transport="ipc", ip=f"{FOLDER.name}/{next(numbers)}", **settings)


nbval.kernel.KernelManager = over_sockets
