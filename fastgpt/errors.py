"""The one exception that means "the input is wrong", as opposed to "the program is"."""

from __future__ import annotations


class UserError(Exception):
    """One sentence naming the field, the value and what would be right; entry points print it and exit with 2."""
