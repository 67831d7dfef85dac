"""Work that waits until another library imports one of its modules, so that `import mhmoe` need not import it."""

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


class _Watch(MetaPathFinder):
    """Finds the watched modules as Python would, and calls what waits for them as soon as they have run."""

    def __init__(self):
        self.waiting: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name in self.waiting else None
        if spec is not None and spec.loader is not None:
            run, then = spec.loader.exec_module, self.waiting[name]

            def run_and_then(module: ModuleType) -> None:
                run(module)
                then(module)

            spec.loader.exec_module = run_and_then
        return spec


_watch = _Watch()


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """
    Call `then` with the module `name`, at once if it is imported already, and else when it is. One call for a name.

    The importer of the module may be in the middle of an import itself: `then` should touch only what the module
    holds, and import nothing that imports the module's importers.
    """
    if name in sys.modules:
        then(sys.modules[name])
        return
    if _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)
    _watch.waiting[name] = then
