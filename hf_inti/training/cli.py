"""Settings from a YAML recipe and the command line.

    parse_recipe([ModelArguments, ...], ["recipe.yaml", "--learning_rate", "1e-4"])

Settings have the same names in a recipe as on the command line, which wins. A recipe that changes only a few settings
of another starts with `base: other.yaml` (a path relative to its own folder) and lists the changes.
"""

import difflib
import json
import re
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NoReturn, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser


T = TypeVar("T")


def _mapping(text: str) -> dict:
    """The type of flags that hold a dict."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        example = '{"cube": "dwconv"}'
        raise ArgumentTypeError(f"must be a JSON mapping such as '{example}', got {text!r}")
    return value


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    def _get_help_string(self, action: Action) -> str:  # "(default: None)" and "(default: False)" say nothing
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Raises a one-line ValueError for a wrong flag, where argparse prints the usage and exits."""

    def __init__(self, classes: list[type], **options):
        super().__init__(classes, allow_abbrev=False, formatter_class=_Help, **options)
        self.register("type", dict, _mapping)
        self.names = [f.name for c in classes for f in fields(c)]

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help.")

    def parse(self, arguments: list[str]) -> dict:
        values, unknown = self.parse_known_args(arguments)
        for flag in unknown:
            if not flag.startswith("--"):
                self.error(f"a setting must be given as --name value, got a stray {flag!r}")
            self.check_name(flag[2:].partition("=")[0].replace("-", "_"))
        return vars(values)

    def check_name(self, name: str, where: str = "") -> None:
        if name not in self.names:
            close = difflib.get_close_matches(str(name), self.names, n=1)
            advice = f"did you mean {close[0]!r}?" if close else "see --help."
            raise ValueError(f"{where}a setting must be one that --help lists, got {name!r}; {advice}")


def parse_recipe(classes: list[type], arguments: list[str] | None = None, description: str | None = None) -> tuple:
    """Parse `[recipe.yaml] --flags` (default: the command line) into one instance of each dataclass.

    If the first argument is a YAML file, its settings are read like flags that precede the others. A field of type
    str whose default is None is required. Raises ValueError for a recipe that is missing, not a mapping or its own
    base, for unknown settings, for values of the wrong type, and for required settings that are missing.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(classes, usage="%(prog)s [RECIPE.yaml] [--setting value ...]", description=description)
    hints = {name: hint for c in classes for name, hint in get_type_hints(c).items()}
    flags = []
    if arguments and not arguments[0].startswith("-"):
        flags = _flags_of_yaml(Path(arguments.pop(0)), parser, hints)
    values = parser.parse(flags + arguments)
    for c in classes:
        for f in fields(c):  # argparse's own `required` would not accept a value from the recipe
            if hints[f.name] is str and values[f.name] is None:
                about = f.metadata["help"].rstrip(".")
                parser.error(f"{f.name} must be set with --{f.name} or in the recipe, got neither ({about})")
    return tuple(c(**{f.name: values[f.name] for f in fields(c)}) for c in classes)


def _flags_of_yaml(path: Path, parser: _Parser, hints: dict) -> list[str]:
    """A recipe's settings as flags, so that argparse checks and converts them too (YAML reads 1e-3 as a string)."""
    flags = []
    for name, value in _settings_of_yaml(path, parser).items():
        if value is None:
            if type(None) not in get_args(hints[name]):
                raise ValueError(f"{path}: {name} must have a value, got none; give one or delete the line.")
            parser.set_defaults(**{name: None})
        else:
            flags += flags_of({name: value})
    return flags


def flags_of(settings: dict) -> list[str]:
    """Settings as flags of the command line."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _settings_of_yaml(path: Path, parser: _Parser, above: tuple[Path, ...] = ()) -> dict:
    """A recipe's settings, with those of its base where it has none; `above`: the recipes it is the base of."""
    if path.resolve() in [other.resolve() for other in above]:
        circle = " -> ".join(map(str, (*above, path)))
        raise ValueError(f"a recipe must not be its own base, got {circle}; remove one of these bases.")
    if not path.is_file():
        what = f"{above[-1]}: base" if above else "the first argument"
        raise ValueError(f"{what} must be a recipe (a YAML file), got {path}, which does not exist.")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be valid YAML, got: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping of settings to values, got a {type(settings).__name__}.")
    for name in settings.keys() - {"base"}:
        parser.check_name(name, f"{path}: ")
    if "base" not in settings:
        return settings
    base = settings.pop("base")
    if not isinstance(base, str):
        raise ValueError(f"{path}: base must be the path of a recipe, relative to this file, got {base!r}.")
    return {**_settings_of_yaml(path.parent / base, parser, (*above, path)), **settings}


def parse_arguments(cls: type[T], leading: list[str], description: str, arguments: list[str] | None = None) -> T:
    """Parse `value ... --flags` (default: the command line) into an instance of the dataclass.

    Values before the first flag belong to the settings named in `leading`, in that order; the last of these takes all
    that remain. Raises ValueError like `parse_recipe`.
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
    """Run a script's `main` and exit: with its status, or with 1 and one line on stderr for an error users can fix.

    Ctrl-C exits with 130, as shells expect.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = str(error).strip()
        killed = re.search(r"DataLoader worker \((?:pid|pid\(s\)) ([\d, ]+)\) (.*)", message)
        if killed:
            message = f"DataLoader workers must live, got process {killed[1]}, which {killed[2].rstrip('. ')}; "
            message += "it may have lacked memory: lower num_workers or the batch size (--resume continues)."
        elif isinstance(error, RuntimeError):
            raise
        if "Repo id must" in message:  # transformers takes a missing folder for a name on the Hub
            message += " There is no such folder either."
        if "DataLoader worker process" in message:  # torch puts the worker's traceback first
            message = message.splitlines()[-1].partition(": ")[2]
        sys.exit(f"error: {' '.join(message.split())}")
