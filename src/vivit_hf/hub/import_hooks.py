"""Call functions once other modules have been imported, without importing these modules."""

import importlib.abc
import importlib.machinery
import itertools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _CallingFinder(importlib.abc.MetaPathFinder):
    """
    Find modules as the other finders do, and call the functions that wait for them after their import.

    No function runs while any module below `prefixes` is still executing: the modules of transformers import each other
    in circles, and a function that imports from them would find some half executed.
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
        # Ask only the finders behind this one: reloading the package adds a second one, and two would ask each other.
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
        """Call the functions whose modules have been imported."""
        while self._num_executing == 0 and (loaded := sorted(self._waiting.keys() & sys.modules.keys())):
            self._waiting.pop(loaded[0])()
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def call_after_import(functions: dict[str, Callable[[], None]], prefixes: tuple[str, ...]) -> None:
    """
    Call each function when the module that is its key has been imported: now if it has been, else right after.

    Args:
        functions (`dict[str, Callable]`): full module name to a function without arguments.
        prefixes (`tuple[str, ...]`): names such as `"transformers."`; a function waits until no module whose name
            begins with one of them is executing.
    """
    finder = _CallingFinder(functions, prefixes)
    sys.meta_path.insert(0, finder)
    finder.call_waiting()
