"""Where a script draws: among its own files, or over the picture that the tutorial shows."""

from __future__ import annotations

from pathlib import Path

COMMITTED = Path(__file__).parents[1] / "pictures"  # shown by README.md and experiments/README.md


def picture_path(picture: Path, refresh: bool) -> Path:
    """Choose where a picture is drawn.

    Args:
      picture: where the script draws by itself.
      refresh: draw over the committed picture of that name instead.

    Example:
      >>> picture_path(Path("runs/rlhf/rlhf.png"), False).as_posix()
      'runs/rlhf/rlhf.png'
      >>> picture_path(Path("runs/rlhf/rlhf.png"), True).relative_to(COMMITTED.parents[1]).as_posix()
      'experiments/pictures/rlhf.png'
    """
    return COMMITTED / picture.name if refresh else picture
