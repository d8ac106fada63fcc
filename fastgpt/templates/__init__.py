"""HTML pages: one base template and one stylesheet, for the doctor's report and for that of bench.mfu, whose own templates lie
beside the code that fills them.

A page is one file that needs nothing else: no script, no font, no request to anywhere. Values are escaped where a template
inserts them, unless they are ``markupsafe.Markup``, and control characters are left out of the whole page.
"""

from __future__ import annotations

from typing import Any

from fastgpt.common import printable

MARK = b'<meta name="generator" content="fastgpt">'
"""Which every page has in its first lines."""


def render(package: str, template: str, **values: Any) -> str:
    """The page that a template, which lies in ``package``, makes of these values. A value that it lacks is an error, not a
    blank."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined  # here, since only pages need it

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader(__name__, "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return printable(environment.get_template(template).render(values))
