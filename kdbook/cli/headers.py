"""Write what is generated: each notebook's badges and install cell, and the README's map.

python workflow/headers.py [--check]      the project's address comes from pyproject.toml alone
"""

import re
import sys
import tomllib

import book
import nbformat

ADDRESS = tomllib.loads((book.ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
COLAB = "https://colab.research.google.com"

INSTALL = f"""\
# On Colab: fetch the book and its packages. Where kdlib is installed, this does nothing.
import importlib.util
import sys

if importlib.util.find_spec("kdlib") is None:
    !git clone --quiet --depth 1 {ADDRESS} book
    %pip install --quiet --editable book
    sys.path.insert(0, "book")"""


def badges(notebook: book.Notebook) -> str:
    """One line of badges, and what the notebook costs in each profile."""
    inside = notebook.path.relative_to(book.ROOT)
    where = ADDRESS.removeprefix("https://github.com/")
    badge = f"{COLAB}/assets/colab-badge.svg"
    links = [f"[![Open in Colab]({badge})]({COLAB}/github/{where}/blob/main/{inside})"]
    up = "../" * (len(inside.parts) - 1)
    for profile in ("paper", "course"):
        executed = f"results/{profile}/notebooks/{inside.relative_to('notebooks')}"
        if (book.ROOT / executed).exists():
            links.append(f"[executed, {profile} profile]({up}{executed})")
    costs = ", ".join(f"{profile} {cost}" for profile, cost in notebook.cost.items())
    return f"{' · '.join(links)}\n\nTime to run: {costs}."


def outdated(write: bool) -> list[str]:
    """Notebooks whose generated cells differ from what they should be; rewritten if asked."""
    found = []
    for notebook in book.notebooks():
        content = nbformat.read(notebook.path, as_version=4)
        wanted = {"badges": badges(notebook), "install": INSTALL}
        cells = {tag: c for c in content.cells for tag in c.metadata.get("tags", [])}
        if any(cells[tag].source != source for tag, source in wanted.items()):
            found.append(notebook.exhibit)
            for tag, source in wanted.items():
                cells[tag].source = source
            if write:
                nbformat.write(content, notebook.path)
    return found


def readme() -> str:
    """The README with its map of the notebooks as it should be."""
    rows = ["| notebook | exhibit | what it shows | smoke |", "| --- | --- | --- | --- |"]
    for n in book.notebooks():
        inside = n.path.relative_to(book.ROOT)
        rows.append(f"| [{n.path.name}]({inside}) | {n.exhibit} | {n.title} | {n.cost['smoke']} |")
    marked = r"(<!-- map:.*?-->\n).*?(<!-- /map -->)"
    text = (book.ROOT / "README.md").read_text()
    return re.sub(marked, lambda m: m[1] + "\n".join(rows) + "\n" + m[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    checking = "--check" in sys.argv
    changed = outdated(write=not checking)
    if readme() != (book.ROOT / "README.md").read_text():
        changed.append("README.md")
        if not checking:
            (book.ROOT / "README.md").write_text(readme())
    print("\n".join(changed) or "All headers are as they should be.")
    sys.exit(bool(changed) and checking)
