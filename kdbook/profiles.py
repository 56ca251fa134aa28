"""The profiles: what is smaller than in the papers, one table each."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from kdbook.choices import keep_route, replaced_data
from kdbook.profile import Profile
from kdbook.small_networks import LAPTOP_NETWORKS, SMALL_NETWORKS
from kdlib.data import canonical_name, display_name
from kdlib.errors import UnknownName

PROFILES = {
    "smoke": Profile(
        name="smoke",
        epoch_scale=1 / 30,
        iteration_scale=1 / 100,
        seeds=(0, 1),
        description="digits, at most 1,000 images, a thirtieth of the epochs or less; no evidence",
        cost="some minutes on two CPU cores",
        datasets={"cifar10": "digits", "cifar100": "digits", "mnist": "digits"},
        models=SMALL_NETWORKS,
        images={"cifar10": 256, "cifar100": 256, "mnist": 1000},
        repeats={"mnist": 18},
        axis_limit=2,
        probed=100,
        seeds_of_grid=1,
        further_seeds=(),
        tries=2,
        evidence=False,
    ),
    "laptop": Profile(
        name="laptop",
        epoch_scale=1 / 10,
        papers={
            "stc": {"epoch_scale": 1 / 50},
            "search": {
                "epoch_scale": 1 / 25,
                "images": {"cifar10": 12_000, "cifar100": 12_000},
            },
            "kr": {"epoch_scale": 1 / 16, "rates": {0.01: 0.1}},
            "methods": {
                "epoch_scale": 1 / 27,
                "images": {"cifar10": 10_000},
                "rates": {0.01: 0.1},
            },
            "rco": {
                "instead": {"cifar100": "cifar10"},
                "images": {"cifar10": 10_000},
                "rates": {0.05: 0.1, 0.01: 0.05},
            },
        },
        seeds=(0, 1, 2),
        description="CIFAR at 16x16 and MNIST, small networks, short trainings: a night on a CPU",
        cost="20 core-hours on a CPU (estimate)",
        models=LAPTOP_NETWORKS,
        suffixes={"cifar10": "+half", "cifar100": "+half"},
        images={"cifar10": 15_000, "cifar100": 15_000},
        batch=64,
        axis_limit=2,
    ),
    "course": Profile(
        name="course",
        epoch_scale=1 / 10,
        seeds=(0, 1, 2),
        description="CIFAR and MNIST, a tenth of the epochs: for one GPU of the T4 class",
        cost="3 days of a T4 (estimate)",
        models={"resnet50": "resnet50-x0.5"},
    ),
    "paper": Profile(
        name="paper",
        epoch_scale=1,
        seeds=(0, 1, 2),
        description="the papers' own settings: for a data-centre GPU",
        cost="20 days of an H200 (estimate)",
    ),
}


def open_profile(
    name: str = "smoke",
    seeds: Iterable[int] | None = None,
    data: Mapping[str, str] | str | None = None,
    paper: str = "",
) -> Profile:
    """A profile by name, with the reader's own seeds and data sets.

    Args:
        name: ``smoke``, ``laptop``, ``course`` or ``paper``.
        seeds: replace the profile's seeds.
        data: replace data sets: ``{"cifar100": "folder:/photos"}``, or the same as text,
            ``"cifar100=folder:/photos"``, with commas between several.
        paper: the chapter, such as ``stc``; its entry in the profile's ``papers`` applies.

    Raises:
        UnknownName: there is no profile or no data set of this name.
        ValueError: ``data`` is text of another form, or KDLIB_KEEP_ROUTE is no number of epochs.
    """
    if name not in PROFILES:
        raise UnknownName("profile", name, PROFILES)
    changes = PROFILES[name].papers.get(paper, {})
    profile = replace(PROFILES[name], keep_route=keep_route(), **changes)
    if seeds is not None:
        profile = replace(profile, seeds=tuple(seeds), further_seeds=())
    if data:
        pairs = data if isinstance(data, Mapping) else replaced_data(data)
        canonical = {canonical_name(paper): canonical_name(own) for paper, own in pairs.items()}
        named = tuple(sorted(f"{paper}={display_name(own)}" for paper, own in canonical.items()))
        datasets = {**profile.datasets, **canonical}
        profile = replace(profile, datasets=datasets, substitutes=named)
    return profile
