"""Write the API reference from the docstrings: `python .ci/reference.py FOLDER`. A warning is an error.

The first page is `import pgjax as pg`; every module of every room has one too. pdoc, and not sphinx: it reads these docstrings as
they are, needs no configuration, no theme and no second copy of the list of names, and takes seconds.
"""

import importlib
import inspect
import pkgutil
import re
import sys
import typing
import warnings
from pathlib import Path

import jax
import pdoc

import pgjax


def modules() -> list[str]:
    """List pgjax and all that is in it."""
    return ["pgjax", *(found.name for found in pkgutil.walk_packages(pgjax.__path__, "pgjax."))]


def complete(name: str) -> None:
    """Give the named tuples of a module their types, which constructors have forgotten, and the comments on their fields.

    `pg.name` becomes `pgjax.name`, which pdoc makes a link of.
    """
    for _, found in inspect.getmembers(importlib.import_module(name)):
        if not (inspect.isclass(found) or inspect.isfunction(found)) or found.__module__ != name:
            continue
        found.__doc__ = _linked(found.__doc__ or "")
        if inspect.isclass(found) and issubclass(found, tuple) and hasattr(found, "_fields"):
            found.__new__.__annotations__ = typing.get_type_hints(found)
            comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(found), flags=re.MULTILINE))
            for field in found._fields:
                getattr(found, field).__doc__ = _linked(comments.get(field, ""))


def _linked(text: str) -> str:
    return re.sub(r"`pg\.(\w+)", r"`pgjax.\1", text)


def main(folder: str) -> None:
    """Write the pages into a folder."""
    jax.Array.__qualname__ = "Array"  # which says its private module otherwise
    names = modules()
    for name in names:
        complete(name)
    rooms = [name for name in names if name.count(".") < 2]  # pdoc adds what is in them
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*rooms, output_directory=Path(folder))
    print(f"{len(names)} pages in {folder}: begin at pgjax.html")


if __name__ == "__main__":
    main(*sys.argv[1:])
