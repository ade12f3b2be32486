"""Write the API reference from the docstrings: `python .ci/reference.py FOLDER`. A warning is an error.

The first page is `import pgjax as pg`; every module of every room has one too. pdoc, and not sphinx: it reads these docstrings as
they are, needs no configuration, no theme and no second copy of the list of names, and takes seconds.

Equations stay plain text in the source, where most people read them. The pages set their indices, powers and signs, which needs
no script and no network; LaTeX would need both, and be hard to read in a terminal.
"""

import importlib
import inspect
import pkgutil
import re
import sys
import typing
import warnings
from pathlib import Path
from typing import Any

import jax
import pdoc

import pgjax


def modules() -> list[str]:
    """List pgjax and all that is in it."""
    return ["pgjax", *(found.name for found in pkgutil.walk_packages(pgjax.__path__, "pgjax."))]


class ArrayLike:
    """The name of a union that would run off the page."""


ArrayLike.__module__ = "jax.typing"


def complete(name: str) -> None:
    """Give the named tuples of a module their types, which constructors have forgotten, and the comments on their fields.

    `pg.name` becomes `pgjax.name`, which pdoc makes a link of.
    """
    for _, found in inspect.getmembers(importlib.import_module(name)):
        if not (inspect.isclass(found) or inspect.isfunction(found)) or found.__module__ != name:
            continue
        found.__doc__ = typeset(_linked(found.__doc__ or ""))
        if inspect.isfunction(found):
            found.__annotations__ = {key: shortened(hint) for key, hint in found.__annotations__.items()}
        if inspect.isclass(found) and issubclass(found, tuple) and hasattr(found, "_fields"):
            found.__new__.__annotations__ = typing.get_type_hints(found)
            comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(found), flags=re.MULTILINE))
            for field in found._fields:
                getattr(found, field).__doc__ = _linked(comments.get(field, ""))


def shortened(hint: Any) -> Any:
    """Write jax.typing.ArrayLike as that, and not as all that it may be."""
    whole, given = typing.get_args(jax.typing.ArrayLike), typing.get_args(hint)
    if not all(one in given for one in whole):
        return hint
    return typing.Union[(ArrayLike, *(one for one in given if one not in whole))]


# What carries an index: one letter, or one of these words. A name with an underscore, such as max_len, does not.
_INDEX = re.compile(r"(?<!\w)([A-Za-z]|sum|prod|pi|(?:mean|max)(?=_\w\b))_(\{[^}]*\}|[A-Za-z0-9]+(?:'|(?!\w)))")
_POWER = re.compile(r"\^(\([^()]*\)|[A-Za-z0-9]+)")
_SIGNS = {"!=": "≠", "<=": "≤", ">=": "≥", r"\bsum(?=<sub>)": "Σ", r"\bprod(?=<sub>)": "Π", r"\bpi\b": "π"}


def typeset(text: str) -> str:
    """Set indices, powers and signs of a docstring's equations, which stand before its arguments.

    >>> typeset("b_i = sum_{j != i} s_j^2 / max_len. `x_i`")
    'b<sub>i</sub> = Σ<sub>j ≠ i</sub> s<sub>j</sub><sup>2</sup> / max_len. `x_i`'
    """
    end = re.search(r"^ *(Args|Returns|Raises|Example):|^ *>>>", text, flags=re.MULTILINE)
    told = text[: end.start()] if end else text
    parts = re.split(r"(`[^`]*`)", told)  # code stays as it is
    return "".join(part if i % 2 else _set(part) for i, part in enumerate(parts)) + text[len(told) :]


def _set(text: str) -> str:
    text = _INDEX.sub(lambda found: f"{found[1]}<sub>{found[2].strip('{}')}</sub>", text)
    text = _POWER.sub(lambda found: f"<sup>{found[1]}</sup>", text)
    for plain, sign in _SIGNS.items():
        text = re.sub(plain, sign, text)
    return text


def _linked(text: str) -> str:
    text = re.sub(r"`pg\.(\w+)", r"`pgjax.\1", text)
    public = lambda found: f"`pgjax.{found[1]}`" if found[1] in dir(pgjax) else found[0]
    return re.sub(r"`(\w+_\w+)`", public, text)  # other names may be an argument's


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
