"""The description of a frozen dataclass: the basis of a run's id."""

from dataclasses import fields, is_dataclass


def describe(value):
    """A frozen dataclass as plain JSON.

    Fields at their default are left out, so that a new field with a default changes no id. Where
    the class has ``DESCRIBED_BY``, it names for a field the attribute that describes it.
    """
    if is_dataclass(value):
        kind = type(value)
        own = kind.__module__.startswith("kdlib.")
        parts = {"kind": kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"}
        described_by = getattr(kind, "DESCRIBED_BY", {})
        for f in fields(value):
            content = getattr(value, described_by.get(f.name, f.name))
            if f.compare and content != f.default:
                parts[f.name] = describe(content)
        return parts
    if isinstance(value, tuple | list):
        return [describe(part) for part in value]
    # 1 and 1.0 are equal, and so are runs that differ in nothing else
    return int(value) if isinstance(value, float) and value.is_integer() else value
