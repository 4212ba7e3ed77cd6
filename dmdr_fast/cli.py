"""Command line and YAML to a :class:`~dmdr_fast.config.Config`; every mistake is one line that names the key."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import reprlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dmdr_fast.config import Config
from dmdr_fast.config.base import Section
from dmdr_fast.disk import told
from dmdr_fast.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
# In a wheel configs/ lies inside the package, in a checkout beside it.
CONFIGS = next((p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir()), _PACKAGE / "configs")
DEFAULT_CONFIG = CONFIGS / "digits.yaml"


def leaves(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the configuration as (dotted path, field), in the order they are declared."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{path}.")
        else:
            yield path, field


def accepted(field: FieldInfo) -> str:
    """The values a key takes, in words: ``0 | 2 | 3``, ``int > 0``, ``text or null``."""
    return " ".join([_type_words(field.annotation), *_bounds(field.metadata)])


def _type_words(annotation: Any) -> str:
    args = get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    if get_origin(annotation) is tuple:
        return "[" + ", ".join("..." if a is Ellipsis else _type_words(a) for a in args) + "]"
    if hasattr(annotation, "__metadata__"):  # Annotated[type, bounds]
        return " ".join([_type_words(args[0]), *_bounds(annotation.__metadata__)])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, args))
    if args:  # X | None
        return " or ".join(_type_words(a) for a in args)
    words = {str: "text", Path: "path", bool: "true | false", type(None): "null"}
    return words.get(annotation, annotation.__name__)


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        for name, symbol in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if getattr(item, name, None) is not None:
                yield f"{symbol} {getattr(item, name)}"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, raised for the caller to print."""

    def error(self, message: str):
        raise UserError(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``train.py``: ``--config``, ``--print-config`` and one flag per key."""
    parser = Parser(
        prog="dmdr-train",
        usage="dmdr-train [--num_gpus N] [--master_port PORT] [--config NAME|FILE] [--print-config] [--KEY VALUE ...]",
        description=Config.__doc__,
        epilog="Values are read as YAML: 3, 1e-4, true, null, [0.9, 0.999]. Flags override the file. One process per "
        "GPU of this machine, or --num_gpus of them; deepspeed, torchrun and srun start them too: see the docs.",
        allow_abbrev=False,
    )
    recipes = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    parser.add_argument(
        "--config",
        type=_config_file,
        default=DEFAULT_CONFIG,
        help=f"YAML file, or the name of a recipe that comes along: {recipes} (default digits).",
    )
    parser.add_argument("--print-config", action="store_true", help="Print the resolved configuration and exit.")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    groups: dict[str, Any] = {"": parser}
    for path, field in leaves():
        section = path.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        text = f"{field.description} ({accepted(field)}; default {_plain(field.default)})"
        groups[section].add_argument(f"--{path}", dest=path, metavar="V", help=text.replace("%", "%%"))
    return parser


def user_path(text: str) -> Path:
    """A path of the command line; ``~`` is the user's folder, which shells put in only at the start of a word."""
    return Path(os.path.expanduser(text))


def _config_file(text: str) -> Path:
    """The file, or a shipped recipe where there is no such file and the text is its name."""
    path, recipe = user_path(text), CONFIGS / f"{text}.yaml"
    try:
        return recipe if not path.exists() and path.name == text and recipe.is_file() else path
    except OSError:  # a name that is too long
        return path


def _plain(value: Any) -> str:
    return yaml.safe_dump(_yaml_ready(value), default_flow_style=True).replace("\n...", "").strip()


def _yaml_ready(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {k: _yaml_ready(v) for k, v in value.items()}
    return [_yaml_ready(v) for v in value] if isinstance(value, (list, tuple)) else value


def parse(argv: list[str]) -> tuple[Config, bool]:
    """(configuration, whether only to print it) from command-line words.

    Raises:
        UserError: unknown key or flag (with the nearest known name), wrong type or value, unreadable YAML.
    """
    parser = build_parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_unknown_key(unknown[0].lstrip("-").partition("=")[0], "command line"))
    values = _read_yaml(options.config)
    for path, _ in leaves():
        text = getattr(options, path)
        if text is not None:
            _assign(values, path, text)
    return _validated(values, options.config), options.print_config


def load(path: Path) -> Config:
    """The configuration of a YAML file."""
    return parse(["--config", str(path)])[0]


def dump(config: Config) -> str:
    """The resolved configuration as YAML; reading it back gives the same configuration."""
    return yaml.safe_dump(_yaml_ready(config.model_dump()), sort_keys=False)


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.load(path.read_bytes(), Loader=_Loader)  # UTF-8 whatever the locale, or what its mark says
        values = {} if values is None else values
    except OSError as error:
        names = [recipe.stem for recipe in CONFIGS.glob("*.yaml")]
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean the recipe {near[0]}?" if near else "; name a readable YAML file, or a recipe: "
        raise UserError(f"--config {path}: {error.strerror}{hint}{'' if near else ', '.join(sorted(names))}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that does not exist
        raise UserError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected keys and values, got {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.2: 1e-4 is a number (YAML 1.1, PyYAML's default, wants 1.0e-4), a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _assign(values: dict, path: str, text: str) -> None:
    *sections, last = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{section}: expected a group of keys, got {values!r}")
    values[last] = read_value(text)


def read_value(text: str) -> Any:
    """A value of the command line as YAML reads it; the text itself where that is none."""
    text = os.fsencode(text).decode("utf-8", "surrogateescape")  # another locale has taken it for its own
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _validated(values: dict, source: Path) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{_problem(problems[0], source)}{more}") from None


def _problem(problem: ErrorDetails, source: Path) -> str:
    fields = dict(leaves())
    words = [str(w) for w in problem["loc"]]
    prefixes = [".".join(words[:n]) for n in range(len(words), 0, -1)]  # a fault inside a tuple or union is the key's
    path = next((p for p in prefixes if p in fields), ".".join(words))
    if path in fields:
        path, fields = _innermost(words, path, fields)
    if problem["type"] == "extra_forbidden" and path in fields:
        return f"{'.'.join(words)}: unknown key ({source}); {path} takes {accepted(fields[path])}"
    if problem["type"] == "extra_forbidden":
        return _unknown_key(".".join(words), str(source))
    if not words:  # raised by Config itself: the message names its key
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("home", "phase"):
        return f"{path}: {problem['msg']}"
    wanted = f"expected {accepted(fields[path])}" if path in fields else "expected a group of keys"
    return f"{path}: {wanted}; got {_SHOWN.repr(problem['input'])}"


def _innermost(words: list[str], path: str, fields: dict[str, FieldInfo]) -> tuple[str, dict[str, FieldInfo]]:
    """The key that a fault's place names inside ``path``, a list of groups or one that may be null, and its field."""
    field = fields[path]
    for n in range(path.count(".") + 1, len(words)):
        inner = next((found for m in _groups(field.annotation) if (found := m.field(words[n]))), None)
        if inner is not None:
            path, field = ".".join(words[: n + 1]), inner
    return path, {path: field}


def _groups(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _groups(inner)


_SHOWN = reprlib.Repr()  # a YAML of aliases is exponentially long written out
_SHOWN.maxstring = _SHOWN.maxother = 200


def _unknown_key(path: str, source: str) -> str:
    known = [name for name, _ in leaves()]
    section = path.rpartition(".")[0]
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)[0]
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    accepted_keys = f"; keys of {section or 'the top level'}: {', '.join(siblings)}" if siblings else ""
    return f"{path}: unknown key ({source}); did you mean {near}?{accepted_keys}"


def run_user_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Call ``main(argv)``; a UserError, or a write that the disk refuses, is one line on stderr (rank 0) and code 2."""
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read the output, as head does, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        said = told(error)
        if said is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(said.split())}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)  # the launcher ends all ranks when the first one leaves: let rank 0 speak
        return 2
