"""A pytest plugin for nbval: kernels communicate over Unix sockets.

Several pytest processes start kernels at the same time. With TCP, two kernels can choose the same
port, and one of them stops.
"""

import itertools
import tempfile

import nbval.kernel

FOLDER = tempfile.TemporaryDirectory(prefix="nbval-")
numbers = itertools.count()
manager = nbval.kernel.KernelManager


def over_sockets(**settings):
    """Create a kernel manager of nbval whose sockets have a unique name."""
    return manager(transport="ipc", ip=f"{FOLDER.name}/{next(numbers)}", **settings)


nbval.kernel.KernelManager = over_sockets
