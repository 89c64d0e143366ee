"""Public names of a package, each imported when it is asked for (PEP 562), so that the package itself is imported at once."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def module_of_each(package: str, modules: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the full name of the module that has each public name.

    Args:
        package: the package, such as `minimind_data`.
        modules: the public names of its modules, by the name of the module in it.
    """
    return {name: f"{package}.{module}" for module, names in modules.items() for name in names}


def importing(package: str, module_of: Mapping[str, str]) -> Callable[[str], Any]:
    """Return what serves a package as `__getattr__`: it imports a public name, and leaves it in the package.

    Args:
        package: the package.
        module_of: the full name of the module that has each public name.
    """

    def public(name: str) -> Any:
        if name not in module_of:
            message = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(message)
        value = getattr(importlib.import_module(module_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return public
