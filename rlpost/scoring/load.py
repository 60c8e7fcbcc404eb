"""Finds a reward function by its name in a recipe, and checks its signature before anything expensive happens."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from rlpost.errors import RewardError
from rlpost.recipe.places import candidates
from rlpost.scoring.contract import BUILTINS, EXTRAS, LoadedReward, RewardFunction
from rlpost.scoring.files import module_name

DEFAULT_FUNCTION = "reward"
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_reward(spec: str, base: Path | None = None) -> LoadedReward:
    """Loads the function that `spec` names, in the process that is to call it: what its code does when it is imported, it
    does there. `describe_reward` looks at it from outside.

    Args:
        spec: `path/to/file.py:function` (a relative path is looked for in the working directory, then in `base`),
            `package.module:function`, or the name of a file in rewards/. The function is `reward` if none is named.
        base: the recipe's folder.

    Raises:
        RewardError: nothing by that name, the code fails when it is imported, or it is no reward function.
    """
    if not spec.strip():
        raise RewardError(f"A reward needs a function. {_known_rewards(base)}")
    place, _, function_name = spec.strip().partition(":")
    file = find_file(place, base)
    module = _import_file(file, spec) if file else _import_module(place, function_name, spec, base)
    function = _get_function(module, function_name or DEFAULT_FUNCTION, spec)
    resolved = f"{file or place}:{function_name or DEFAULT_FUNCTION}"
    stem = file.stem if file else place.rsplit(".", 1)[-1]
    name = stem if function_name in ("", DEFAULT_FUNCTION) else function_name
    return _describe(function, resolved, name)


def list_rewards(base: Path | None = None) -> dict[str, Path]:
    """The names that need no path, and the files they stand for; earlier folders win."""
    package = Path(__file__).resolve().parents[1]
    folders = [Path.cwd() / "rewards", package.parent / "rewards", package / "_shipped" / "rewards"]
    if base is not None:
        folders.insert(1, base / "rewards")
    rewards: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.py")):
            if not file.name.startswith("_"):
                rewards.setdefault(file.stem, file.resolve())
    return rewards


def check_signature(reward: RewardFunction, columns: Collection[str], arguments: Collection[str] = ()) -> None:
    """Checks that `reward` can be called with what the data set and the recipe give.

    Args:
        reward: the function.
        columns: the data set's columns.
        arguments: the names of the fixed arguments of the recipe.

    Raises:
        RewardError: a parameter that nobody provides, or an argument that the function does not take.
    """
    check_arguments(reward, arguments)
    given = {*BUILTINS, *EXTRAS, *columns, *arguments}
    missing = sorted(reward.required - given)
    if missing:
        raise RewardError(
            f"The reward function {reward.spec} needs {_join(missing)}, which neither the data set's columns "
            f"({_join(sorted(columns)) or 'none'}) nor the reward's `arguments` ({_join(sorted(arguments)) or 'none'}) "
            f"provide.{_nearest(missing[0], columns)} "
            "Rename the parameter, give it a default, or add it to `arguments`."
        )


def check_arguments(reward: RewardFunction, arguments: Collection[str]) -> None:
    """The part of `check_signature` that needs no data set: the fixed arguments must fit the function."""
    taken = sorted({*arguments} & {*BUILTINS})
    if taken:
        raise RewardError(
            f"The reward function {reward.spec} is given {_join(taken)} by rlpost itself: remove it from `arguments`."
        )
    # A shipped reward's ** are the data set's columns, and it names all its arguments: another one is a slip.
    open_ended = reward.takes_any and Path(reward.spec.rpartition(":")[0]) not in list_rewards().values()
    unknown = [] if open_ended else sorted({*arguments} - reward.parameters)
    if unknown:
        raise RewardError(
            f"The reward function {reward.spec} takes no argument {_join(unknown)}."
            f"{_nearest(unknown[0], reward.parameters)} Its parameters are {_join(sorted(reward.parameters))}."
        )


def find_file(place: str, base: Path | None) -> Path | None:
    """The file that `place` names by path or by a name in rewards/; None if it can only be a module."""
    if not place.endswith(".py") and "/" not in place:
        return list_rewards(base).get(place)
    tried = [Path.cwd() / path for path in candidates(place, base)]
    for candidate in tried:
        if candidate.is_file():
            return candidate.resolve()
    raise RewardError(
        f"There is no reward file {place}: looked at {_join([str(p) for p in tried])}. {_known_rewards(base)}"
    )


def _import_file(file: Path, spec: str) -> ModuleType:
    """Imports a file under a name of its own, by which the children of a reward's process pools find it, too."""
    if file.suffix != ".py":
        raise RewardError(f"The reward file {file} is no Python source file.")
    try:
        return importlib.import_module(module_name(file))
    except BaseException as error:
        raise RewardError(f"The reward {spec} cannot be imported: {_why(error)} ({file}).") from error


def _import_module(place: str, function_name: str, spec: str, base: Path | None) -> ModuleType:
    known = list_rewards(base)
    if not function_name:
        if there := next((path for path in candidates(place, base) if path.exists()), None):
            kind = "a folder" if there.is_dir() else "a file that is no Python source file"
            raise RewardError(
                f"The reward {spec!r} is {kind} ({there}). Name a file that ends in .py, such as {spec}.py, or a reward by its "
                f"name. {_known_rewards(base)}"
            )
        raise RewardError(f"There is no reward named {spec!r}.{_nearest(place, known)} {_known_rewards(base)}")
    try:
        return importlib.import_module(place)
    except BaseException as error:
        hint = _nearest(place, known) if isinstance(error, ModuleNotFoundError) else ""
        raise RewardError(
            f"The reward {spec} cannot be imported: {_why(error)}.{hint} A reward is named "
            f"`path/to/file.py:function`, `package.module:function`, or as a file in rewards/. {_known_rewards(base)}"
        ) from error


def _why(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return (
            f"it ends the program (sys.exit({error.code!r})) while it is imported; put what a script does under "
            '`if __name__ == "__main__":`'
        )
    return f"{type(error).__name__}: {error}"


def _get_function(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if callable(function):
        return function
    own = [n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")]
    raise RewardError(
        f"The reward {spec} has no function {name!r}.{_nearest(name, own)} "
        f"{getattr(module, '__file__', module.__name__)} defines {_join(sorted(own)) or 'no functions'}."
    )


def _describe(function: Callable[..., Any], spec: str, name: str) -> LoadedReward:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"The reward {spec} does not tell its parameters ({error}): wrap it in a function."
        ) from error
    by_keyword = {p.name: p for p in parameters if p.kind in _BY_KEYWORD}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    nameless = [
        p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY and p.default is inspect.Parameter.empty
    ]
    if nameless or ("completions" not in by_keyword and not takes_any):
        raise RewardError(
            f"The reward {spec} must take the keyword `completions` (a list of chat messages a completion): "
            f"def {spec.rsplit(':', 1)[-1]}(completions, **columns). "
            f"Its parameters are {_join([p.name for p in parameters])}."
        )
    empty = inspect.Parameter.empty
    return LoadedReward(
        spec=spec,
        name=name,
        function=function,
        is_async=_is_async(function),
        parameters=frozenset(by_keyword),
        required=frozenset(p.name for p in by_keyword.values() if p.default is empty),
        takes_any=takes_any,
    )


def _is_async(function: Callable[..., Any]) -> bool:
    """Also for objects whose class has an `async def __call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _known_rewards(base: Path | None) -> str:
    return f"Rewards by name: {_join(sorted(list_rewards(base))) or 'none'}."


def _nearest(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _join(names: Collection[str]) -> str:
    return ", ".join(names)
