"""``python -m kdlib.data cifar100``: download a data set."""

import sys

from kdlib.data import download
from kdlib.errors import KdlibError

if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
    sys.exit("usage: python -m kdlib.data cifar10|cifar100|mnist")
try:
    print(f"{sys.argv[1]} is in {download(sys.argv[1])}")
except KdlibError as error:
    sys.exit(str(error))
