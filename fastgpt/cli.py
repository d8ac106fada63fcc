"""What the command-line entries share: one way to fail."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from fastgpt.errors import UserError


def run(main: Callable[[list[str]], int]) -> None:
    """Run an entry on the command line's arguments and exit: with its code, 2 and one sentence for bad input, 130 for a
    second Ctrl-C."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def report(error: UserError) -> None:
    """Print the one sentence."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}")
