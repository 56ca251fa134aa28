"""Write the generated text: badges and install cell of each notebook, the README's list of them.

python -m kdbook.cli.headers [--check]      the project's address is read from pyproject.toml
"""

import re
import sys
import tomllib

import nbformat

from kdbook.cli.notebooks import ROOT, Notebook, all_notebooks

ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
COLAB = "https://colab.research.google.com"

INSTALL = f"""\
# On Colab: fetch the book and its packages. Where kdlib is installed, this does nothing.
import importlib.util
import sys

if importlib.util.find_spec("kdlib") is None:
    !git clone --quiet --depth 1 {ADDRESS} book
    %pip install --quiet --editable book
    sys.path.insert(0, "book")"""


def badges(notebook: Notebook) -> str:
    """One line of badges, and the expected time of the notebook in each profile."""
    inside = notebook.path.relative_to(ROOT)
    where = ADDRESS.removeprefix("https://github.com/")
    badge = f"{COLAB}/assets/colab-badge.svg"
    links = [f"[![Open in Colab]({badge})]({COLAB}/github/{where}/blob/main/{inside})"]
    up = "../" * (len(inside.parts) - 1)
    for executed in sorted(ROOT.glob(f"results/*/notebooks/{inside.relative_to('notebooks')}")):
        folder = executed.relative_to(ROOT / "results").parts[0]
        name = folder.replace("+", ", ").replace("=", " = ")
        links.append(f"[executed, {name}]({up}{executed.relative_to(ROOT)})")
    costs = ", ".join(f"{profile_name} {cost}" for profile_name, cost in notebook.cost.items())
    return f"{' · '.join(links)}\n\nTime to run: {costs}."


def outdated(write: bool) -> list[str]:
    """Return the exhibits whose generated cells are out of date; rewrite them if ``write``."""
    found = []
    for notebook in all_notebooks():
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
    """Return the README with an up-to-date table of the notebooks."""
    rows = ["| notebook | exhibit | what it shows | smoke |", "| --- | --- | --- | --- |"]
    for n in all_notebooks():
        inside = n.path.relative_to(ROOT)
        rows.append(f"| [{n.path.name}]({inside}) | {n.exhibit} | {n.title} | {n.cost['smoke']} |")
    marked = r"(<!-- map:.*?-->\n).*?(<!-- /map -->)"
    text = (ROOT / "README.md").read_text()
    return re.sub(marked, lambda m: m[1] + "\n".join(rows) + "\n" + m[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    checking = "--check" in sys.argv
    changed = outdated(write=not checking)
    if readme() != (ROOT / "README.md").read_text():
        changed.append("README.md")
        if not checking:
            (ROOT / "README.md").write_text(readme())
    print("\n".join(changed) or "All generated text is up to date.")
    sys.exit(bool(changed) and checking)
