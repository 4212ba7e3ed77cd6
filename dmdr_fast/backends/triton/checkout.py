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


if _NAME not in sys.modules and importlib.util.find_spec(_NAME) is None:
    _beside = [Path(folder).parent / "kernels" for folder in dmdr_fast.__path__]
    _folders = [str(folder) for folder in _beside if (folder / "normals.py").is_file()]
    if not _folders:
        raise ImportError("the Triton kernels are not installed: reinstall dmdr_fast (`pip install .`)")
    sys.modules[_NAME] = dmdr_fast.kernels = ModuleType(_NAME, "The Triton kernels, one file per op.")
    dmdr_fast.kernels.__path__ = _folders
