"""Settings from a YAML recipe and the command line.

    parse_recipe([ModelArguments, ...], ["recipe.yaml", "--learning_rate", "1e-4"])

A recipe holds the same names as the command line has flags; what the command line says wins. A recipe that changes a
few settings of another names it, `base: other.yaml` (a path from its own folder), and holds the changes.
"""

import difflib
import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from transformers import HfArgumentParser


def _mapping(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        example = '{"cube": "dwconv"}'
        raise ArgumentTypeError(f"wanted a JSON mapping such as '{example}', got {text!r}")
    return value


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" and "(default: False)" say nothing
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Whose errors are ValueErrors of one line: argparse's own print the usage and end the process."""

    def __init__(self, classes, **options):
        super().__init__(classes, allow_abbrev=False, formatter_class=_Help, **options)
        self.register("type", dict, _mapping)
        self.names = [f.name for c in classes for f in fields(c)]

    def error(self, message: str):
        raise ValueError(f"{message}; --help explains the settings.")

    def parse(self, arguments: list[str]) -> dict:
        values, unknown = self.parse_known_args(arguments)
        for flag in unknown:
            if not flag.startswith("--"):
                self.error(f"there is no place for {flag!r}")
            self.check_name(flag[2:].partition("=")[0].replace("-", "_"))
        return vars(values)

    def check_name(self, name: str, where: str = "") -> None:
        if name not in self.names:
            close = difflib.get_close_matches(str(name), self.names, n=1)
            self.error(f"{where}there is no setting {name!r}" + (f", did you mean {close[0]!r}?" if close else ""))


def parse_recipe(classes: list[type], arguments: list[str] | None = None, description: str | None = None) -> tuple:
    """Instances of the dataclasses, from `[recipe.yaml] --flags` (default: the process's command line).

    The first argument may be a YAML file; its settings are read as if they were flags in front of the others. Raises
    ValueError for a file that is missing or no mapping, for settings and flags that do not exist, for values of a wrong
    kind, for recipes that are each other's base, and for a required value (one without a default) that nothing gives.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(classes, usage="%(prog)s [RECIPE.yaml] [--setting value ...]", description=description)
    hints = {name: hint for c in classes for name, hint in get_type_hints(c).items()}
    flags = []
    if arguments and not arguments[0].startswith("-"):
        flags = _flags_of_yaml(Path(arguments.pop(0)), parser, hints)
    values = parser.parse(flags + arguments)
    for c in classes:
        for f in fields(c):  # a str that is None by default: it may come from the recipe, but must come
            if hints[f.name] is str and values[f.name] is None:
                parser.error(f"--{f.name} is required, here or in the recipe: {f.metadata['help'].rstrip('.')}")
    return tuple(c(**{f.name: values[f.name] for f in fields(c)}) for c in classes)


def _flags_of_yaml(path: Path, parser: _Parser, hints: dict) -> list[str]:
    """A recipe's settings as flags, so that both are checked and converted alike (YAML reads 1e-3 as text)."""
    flags = []
    for name, value in _settings_of_yaml(path, parser).items():
        if value is None:
            if type(None) not in get_args(hints[name]):
                raise ValueError(f"{path}: {name} has no value; give one or leave the line out.")
            parser.set_defaults(**{name: None})
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _settings_of_yaml(path: Path, parser: _Parser, above: tuple[Path, ...] = ()) -> dict:
    """A recipe's settings over those of its base; `above`: the recipes whose base this one is."""
    if path.resolve() in [other.resolve() for other in above]:
        raise ValueError(f"recipes are each other's base: {' -> '.join(map(str, (*above, path)))}; take one base out.")
    if not path.is_file():
        where = f"{above[-1]} names it as its base" if above else "the first argument, if it is no flag, is a YAML file"
        raise ValueError(f"there is no recipe {path}; {where}.")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold names with values, got {type(settings).__name__}.")
    for name in settings.keys() - {"base"}:
        parser.check_name(name, f"{path}: ")
    if "base" not in settings:
        return settings
    base = settings.pop("base")
    if not isinstance(base, str):
        raise ValueError(f"{path}: base must name one recipe, by its path from this file, got {base!r}.")
    return {**_settings_of_yaml(path.parent / base, parser, (*above, path)), **settings}


def parse_arguments(cls: type, leading: list[str], description: str, arguments: list[str] | None = None):
    """An instance of the dataclass, from `value ... --flags` (default: the process's command line).

    Values in front of the first flag are those of the flags named in `leading`; the last of these takes all that are
    left. Raises ValueError as `parse_recipe` does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    usage = "%(prog)s " + " ".join(name.upper() for name in leading) + " [--setting value ...]"
    parser = _Parser([cls], usage=usage, description=description)
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    given, flags = arguments[:count], arguments[count:]
    for name in leading:
        if given:
            taken = given if name == leading[-1] else given[:1]
            flags += [f"--{name}", *taken]
            given = given[len(taken) :]
    return cls(**parser.parse(flags))


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and end the process: what the user can mend is one line on stderr and exit status 1."""
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as error:
        message = str(error).strip()
        if "Repo id must" in message:  # a path that is no folder is taken for a name on the Hub
            message += " There is no such folder either."
        if "DataLoader worker process" in message:  # torch puts the worker's traceback in front
            message = message.splitlines()[-1].partition(": ")[2]
        sys.exit(f"error: {' '.join(message.split())}")
