"""Data sets: uint8 images that stay in the memory of one device."""

from kdlib.data.datasets import (
    canonical_name,
    check_name,
    count_views,
    display_name,
    download,
    load_data,
)
from kdlib.data.distortion import is_distorted, split_name
from kdlib.data.images import Images
