"""A module of this package under the name of another: what ``import`` finds, and how to undo that."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MISSING = object()


class ModuleName(MetaPathFinder, Loader):
    """While it is installed, ``import name`` finds `module`.

    The import system imports the package that `name` lies in, and makes the module an attribute of it. So a package
    that is not imported yet gets the attribute when the name is imported, and one that is imported gets it at once.
    """

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name, self.module = name, module
        self._package, _, self._attribute = name.rpartition(".")
        # Whether `sys.modules` had None under the name, which blocks its import.
        self._blocked = name in sys.modules and sys.modules[name] is None
        # Packages that have the attribute, and what it was before.
        self._before: list[tuple[ModuleType, Any]] = []

    def install(self) -> None:
        """Make the name known, or repair what has changed since."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        if not self._package or self._package in sys.modules:
            self._put()

    def uninstall(self) -> None:
        """Restore `sys.modules` and the attributes of packages, where they are still ours."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if sys.modules.get(self.name) is self.module:
            del sys.modules[self.name]
            if self._blocked:
                sys.modules[self.name] = None  # type: ignore[assignment]
        while self._before:
            package, attribute = self._before.pop()
            if vars(package).get(self._attribute) is not self.module:
                continue
            if attribute is _MISSING:
                delattr(package, self._attribute)
            else:
                setattr(package, self._attribute, attribute)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of the import system."""
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        """Of the import system, which takes the module that is in `sys.modules` after this."""
        self._put()

    def _put(self) -> None:
        sys.modules[self.name] = self.module
        package = sys.modules.get(self._package)
        if package is None:
            return
        attribute = vars(package).get(self._attribute, _MISSING)
        if attribute is not self.module:
            self._before.append((package, attribute))
            setattr(package, self._attribute, self.module)
