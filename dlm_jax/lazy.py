"""Names of a package that are imported on first use, so that `dlm --help` and refused arguments load no JAX."""

import importlib
from collections.abc import Callable, Mapping, Sequence


def lazy_names(package: str, modules: Mapping[str, Sequence[str]]
               ) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Returns `__getattr__`, `__dir__` and `__all__` of a package whose modules are imported once a name is used.

    Args:
      package: its name.
      modules: from each of its modules to the names that the package has from it.
    """
    home = {name: f"{package}.{module}" for module, names in modules.items() for name in names}
    names = sorted(home)

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home[name]), name)

    return get, lambda: names, names
