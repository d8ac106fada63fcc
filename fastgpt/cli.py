"""What the command-line entries share: one way to fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from fastgpt.errors import UserError


def run(main: Callable[[list[str]], int]) -> None:
    """Run an entry on the command line's arguments and exit: with its code, 2 and one sentence for bad input, 130 for a
    second Ctrl-C, 141 in silence (as SIGPIPE would end it) when what reads the output has gone: ``fastgpt plan | head``."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def report(error: UserError) -> None:
    """Print the one sentence."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}")
