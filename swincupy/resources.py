"""Where the folders that ship with the package lie: `cuda/` and `weights/`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from swincupy.errors import SwincupyError

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: Literal["cuda", "weights"]) -> Path:
    """The folder ``cuda`` or ``weights``.

    An installed wheel has it inside the package (``swincupy/cuda``), a checkout beside it (``cuda``).

    Raises
    ------
    SwincupyError
        It is at neither place.
    """
    installed, checkout = _PACKAGE / name, _PACKAGE.parent / name
    if installed.is_dir():
        return installed
    # site-packages may hold a stranger's folder of that name: only a checkout has pyproject.toml beside it
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    raise SwincupyError(
        f"resource_dir: {name!r} must be a folder of the installation, found neither {installed} nor {checkout}; "
        "install swincupy again from its wheel or checkout"
    )
