"""Call functions after other modules are imported, without importing those modules."""

import importlib.abc
import importlib.machinery
import itertools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _CallingFinder(importlib.abc.MetaPathFinder):
    """
    Find modules with the other finders, and call the functions that wait for a module after its import.

    No function runs while any module below `prefixes` is executing: the modules of transformers import each other
    in circles, and a function that imports from them would find half-executed modules.
    """

    def __init__(self, functions: dict[str, Callable[[], None]], prefixes: tuple[str, ...]) -> None:
        self._waiting = dict(functions)
        self._prefixes = prefixes
        self._num_executing = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(self._prefixes):
            return None
        # Ask only the finders behind this one. Reloading the package adds a second one, and they would ask each other.
        others = list(itertools.dropwhile(lambda finder: finder is not self, sys.meta_path))[1:]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                self._num_executing += 1
                try:
                    execute(module)
                finally:
                    self._num_executing -= 1
                self.call_waiting()

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec

    def call_waiting(self) -> None:
        """Call the functions whose modules are imported."""
        while self._num_executing == 0 and (loaded := sorted(self._waiting.keys() & sys.modules.keys())):
            self._waiting.pop(loaded[0])()
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def call_after_import(functions: dict[str, Callable[[], None]], prefixes: tuple[str, ...]) -> None:
    """
    Call each function once its module is imported: immediately if it already is, otherwise right after its import.

    Args:
        functions: functions without arguments, by the full name of the module that they wait for.
        prefixes: prefixes of module names, such as `"transformers."`. A function also waits until no module with one of
            these prefixes is executing.
    """
    finder = _CallingFinder(functions, prefixes)
    sys.meta_path.insert(0, finder)
    finder.call_waiting()
