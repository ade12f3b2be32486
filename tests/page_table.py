"""A table of a page that a command makes: between two marks, of which the first names the command."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
END = "<!-- end of the table -->\n"


def of_page(page: str, command: str) -> str:
    """Read the table that a page of the repository shows."""
    return (ROOT / page).read_text().split(_begin(command))[1].split(END)[0]


def show(page: str, command: str, made: str) -> None:
    """Print a table, and with --write put it into the page in place of the one there."""
    print(made)
    if "--write" in sys.argv:
        text, begin = (ROOT / page).read_text(), _begin(command)
        (ROOT / page).write_text(text.replace(begin + of_page(page, command), begin + made))


def _begin(command: str) -> str:
    return f"<!-- python -m {command} --write -->\n"
