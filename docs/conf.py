"""The documentation as a site: README, CONTRIBUTING and docs/ as they are, and an API page made of the docstrings.

``make docs`` builds it. Its front page is the README; its contents are docs/index.md, section by section.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = html_title = "fastgpt"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md", "docs/api.rst"]
exclude_patterns = [".*", "build", "data", "runs", "out"]  # not looked into: environments, what runs leave
myst_heading_anchors = 4  # GitHub's own anchors
default_role = "code"  # docstrings write `names` as Markdown does
smartquotes = False  # --flag is not a dash
highlight_language = "text"  # commands and their output; what is Python says so
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
html_theme = "furo"
html_copy_source = False


def contents() -> str:
    """A hidden table of contents for each section of docs/index.md, of the pages that it links to."""
    found = ["", "```{toctree}", ":hidden:", "docs/index", "```"]
    for section in (ROOT / "docs/index.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        pages = re.findall(r"\]\(([\w./-]+)\.(?:md|rst)\)", section)
        paths = [(Path("docs") / page).as_posix().replace("docs/../", "") for page in pages]
        found += ["", "```{toctree}", ":hidden:", f":caption: {section.splitlines()[0]}", *paths, "```"]
    return "\n".join(found)


def setup(app) -> None:
    def add_contents(app, name: str, text: list[str]) -> None:
        if name == root_doc:
            text[0] += contents()

    app.connect("source-read", add_contents)
