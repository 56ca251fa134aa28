"""kdbook: the book on top of kdlib: profiles, claims, exhibits, figures, the command line."""

from importlib import import_module

# The module of each name in `from kdbook import …`; None for a module itself. A name is imported at
# its first use, so that the command line does not wait for torch and matplotlib.
_HOMES = {
    "Exhibit": "exhibits",
    "check": "notebook",
    "checks": None,
    "claims": None,
    "comparisons": None,
    "figures": None,
    "gates": None,
    "kr": None,
    "logits_on_test": "notebook",
    "open_profile": "profiles",
    "planes": None,
    "profiles": None,
    "rco": None,
    "scorecard": None,
    "search": None,
    "show": "notebook",
    "stc": None,
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'kdbook' has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return import_module(f"kdbook.{name}")
    return getattr(import_module(f"kdbook.{home}"), name)
