"""Data sets as device-resident uint8 images."""

from kdlib.data.datasets import (
    canonical_name,
    check_name,
    count_views,
    display_name,
    download,
    load_data,
)
from kdlib.data.distortion import split_name
from kdlib.data.images import Images

__all__ = [
    "Images",
    "canonical_name",
    "count_views",
    "display_name",
    "download",
    "load_data",
    "split_name",
]
