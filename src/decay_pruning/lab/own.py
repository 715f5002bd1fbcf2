"""Functions of your own, which a recipe names as "module:function"."""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from decay_pruning.errors import ConfigError, DecayPruningError

#: Top-level modules that were found in a folder; another recipe may have others of these names.
_from_folders: set[str] = set()


def find(name: str, what: str, beside: str | os.PathLike[str] | None = None) -> Callable[..., Any]:
    """The function of "module:function".

    Args:
        name: the module can be an installed one, or lie in `beside` or in the current folder.
        what: what it is for, for messages ("data set").
        beside: the folder that is looked into first.

    Raises:
        ConfigError: no such module or function, or a module that cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    here = f"{what} {name!r}"
    with _on_path(beside):
        _forget_another(module_name.partition(".")[0], here)
        try:
            module = importlib.import_module(module_name)
        except DecayPruningError:
            raise
        except Exception as error:  # it runs the code of that module
            kind = "" if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: "
            raise ConfigError(f"{here}: cannot import the module {module_name!r} ({kind}{error})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = get_close_matches(function_name, [n for n in vars(module) if not n.startswith("_")], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{here}: {module_name} has no function {function_name!r}{hint}")
    return function  # type: ignore[no-any-return]


def call(make: Callable[..., Any], here: str, offered: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Call a function with `options`, and with those of `offered` that it has a parameter for.

    Args:
        here: what it is, for messages ("model 'resnet20'").

    Raises:
        ConfigError: an option that it does not know or that is missing, or a package that it lacks.
    """
    try:
        signature = inspect.signature(make)
    except ValueError as error:
        raise ConfigError(f"{here}: its parameters cannot be read ({error})") from error
    taken = signature.parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    unknown = [key for key in options if key not in taken and not anything]
    if unknown:
        near = get_close_matches(unknown[0], taken, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = f"only {', '.join(taken)}" if taken else "and takes none at all"
        raise ConfigError(f"{here} has no option {unknown[0]!r}, {known}{hint}")
    given = {key: value for key, value in offered.items() if anything or key in taken}
    try:
        return make(**{**given, **options})
    except TypeError as error:
        raise ConfigError(f"{here} cannot be built: {error}") from error
    except ImportError as error:
        raise ConfigError(f"{here} needs what is not installed: {error}") from error


def fingerprint(name: str, what: str, beside: str | os.PathLike[str] | None = None) -> str:
    """A hash of the file that a function of your own lies in, so that nothing is kept that an earlier version made."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(find(name, what, beside)))
    except TypeError:  # not written in Python
        file = None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else ""


# -- inside --------------------------------------------------------------------------


@contextmanager
def _on_path(beside: str | os.PathLike[str] | None) -> Iterator[None]:
    """The folder and the current one are first on Python's path; afterwards the folder stays as the last."""
    places = list(dict.fromkeys([*([os.path.abspath(beside)] if beside else []), os.getcwd()]))
    sys.path[:0] = places
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for place in places:
            sys.path.remove(place)
        if beside and places[0] not in sys.path:  # for what its functions import when they run
            sys.path.append(places[0])


def _forget_another(top: str, here: str) -> None:
    """Take a module out of Python's memory if the path now leads to another one of its name.

    Raises:
        ConfigError: it did not come from a folder such as this, so others may be using it.
    """
    loaded = getattr(sys.modules.get(top), "__spec__", None)
    found = importlib.machinery.PathFinder.find_spec(top) if top else None
    if found is None or found.origin is None:
        return
    if loaded is not None and loaded.origin != found.origin:
        if top not in _from_folders:
            raise ConfigError(
                f"{here}: the module {top!r} in {Path(found.origin).parent} has the name of another one that is "
                "in use already: rename it"
            )
        for module in [m for m in sys.modules if m == top or m.startswith(f"{top}.")]:
            del sys.modules[module]
    if loaded is None or loaded.origin != found.origin:
        _from_folders.add(top)
