"""Makes ``dmdr_fast.kernels`` importable in a checkout, where the kernels lie beside the package.

An installed package has them inside. They have no ``__init__.py``, and their folder is not put on the import path: a
package called ``kernels`` exists on the registry. Importing this module does it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import dmdr_fast

_NAME = "dmdr_fast.kernels"


def find_kernels() -> None:
    """Give the import system the folder, unless it knows one.

    Raises:
        ImportError: neither the package nor its parent folder has the kernels.
    """
    if _NAME in sys.modules or importlib.util.find_spec(_NAME) is not None:
        return
    beside = [Path(folder).parent / "kernels" for folder in dmdr_fast.__path__]
    folders = [str(folder) for folder in beside if (folder / "normals.py").is_file()]
    if not folders:
        raise ImportError("the Triton kernels are not installed: reinstall dmdr_fast (`pip install .`)")
    package = ModuleType(_NAME, "The Triton kernels, one file per op.")
    package.__path__ = folders
    sys.modules[_NAME] = package
    dmdr_fast.kernels = package


find_kernels()
