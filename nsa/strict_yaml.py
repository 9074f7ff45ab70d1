"""Reads strict YAML into a typed tree of sections, with helpful errors.

A plain YAML loader takes the last of two equal keys, reads ``3e-4`` as a string and ``no`` as a boolean. Here a
duplicate key is an error, scalars follow YAML 1.2 (``true``/``false``, ``3e-4`` is a number), and every problem is
reported with the file, the line, the full dotted key and what would be valid. This module works for any section.
"""

import difflib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

SectionT = TypeVar("SectionT", bound=BaseModel)
LIMIT = 2**20  # bytes of a file
Path_ = tuple[str | int, ...]  # of a value in the tree: ("data", "sources", 0, "weight")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where and what to do."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars (underscores in integers are kept: 20_000_000) and without aliases."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (filled below)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not supported", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes strings that only ``_Loader`` would read as another type, such as 1E0."""


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _parse(text: str, name: str) -> tuple[Any, dict[Path_, int]]:
    """Python values of a YAML text, and the line (from 1) of every key and list item. ``name``: for error messages."""
    lines: dict[Path_, int] = {}
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not a YAML text: {error}") from error

    def build(node: yaml.Node, path: Path_) -> Any:
        lines.setdefault(path, node.start_mark.line + 1)
        if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            raise ConfigError(f"{name}, line {node.start_mark.line + 1}: tags ({node.tag}) are not supported")
        if isinstance(node, yaml.SequenceNode):
            return [build(child, (*path, i)) for i, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{name}, line {line}: a key must be a word")
            if key in mapping:
                first = lines[(*path, key)]
                raise ConfigError(f"{name}, line {line}: duplicate key {dotted((*path, key))} (first on line {first})")
            lines[(*path, key)] = line
            mapping[key] = build(value_node, (*path, key))
        return mapping

    try:
        node = loader.get_single_node()
        return (None if node is None else build(node, ())), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        parts = [part for part in (error.context, error.problem) if part]
        raise ConfigError(f"{name}{f', line {mark.line + 1}' if mark else ''}: {', '.join(parts)}") from error
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except ValueError as error:  # a scalar that matches a resolver but is not a valid value, e.g. a huge integer
        raise error if isinstance(error, ConfigError) else ConfigError(f"{name}: {error}") from error
    finally:
        loader.dispose()


def read_tree(path: Path) -> Any:
    """The plain values in a YAML file of any section. Raises ``ConfigError`` if it is not strict YAML."""
    return parse(_read(path), str(path))


def parse(text: str, name: str) -> Any:
    """The plain values of a YAML text. Raises ``ConfigError`` if it is not strict YAML."""
    return _parse(text, name)[0]


def _read(path: str | Path) -> str:
    try:
        with Path(path).open("rb") as file:
            text = file.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise ConfigError(f"{path}: more than {LIMIT} bytes are no configuration")
        return text.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error


def dotted(path: Sequence[str | int]) -> str:
    """``data.sources.0.weight`` of ("data", "sources", 0, "weight")."""
    return ".".join(map(str, path))


def _override(tree: Any, override: str) -> Path_:
    """Write one ``key=value`` into ``tree`` (in place) and return the path it names."""
    key, equals, text = override.partition("=")
    where = f"override {override!r}"
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{where}: write key=value with a dotted key, e.g. attention.kind=dense")
    value, _ = _parse(text, where)
    path: list[str | int] = []
    parts = key.split(".")
    for i, part in enumerate(parts):
        step: str | int = part
        if isinstance(tree, list):
            if not part.isdecimal() or int(part) >= len(tree):
                raise ConfigError(
                    f"{where}: {dotted(path)} is a list of {len(tree)}; name an item by 0..{len(tree) - 1}"
                )
            step = int(part)
        elif not isinstance(tree, dict):
            raise ConfigError(f"{where}: {dotted(path)} is a single value and has no {part!r} in it")
        path.append(step)
        if i == len(parts) - 1:
            tree[step] = value
        elif isinstance(tree, dict) and tree.get(part) is None:
            tree[part] = {}
        tree = tree[step]
    return tuple(path)


def load(
    section: type[SectionT],
    path: str | Path,
    overrides: Sequence[str] = (),
    upgrade: Callable[[Any], Any] = lambda tree: tree,
    finish: Callable[[Any], None] = lambda tree: None,
) -> SectionT:
    """Read ``path``, apply the ``key=value`` overrides in order, and validate the result as a ``section``.

    ``upgrade``: converts the values of the file before the overrides, such as those of an older one to the current
    keys. ``finish``: changes them in place after the overrides.

    Raises ``ConfigError`` that lists all problems.
    """
    return read(section, _read(path), str(path), overrides, upgrade, finish)


def read(
    section: type[SectionT],
    text: str,
    path: str,
    overrides: Sequence[str] = (),
    upgrade: Callable[[Any], Any] = lambda tree: tree,
    finish: Callable[[Any], None] = lambda tree: None,
) -> SectionT:
    """As `load`, from the text of a file. ``path``: for error messages."""
    tree, lines = _parse(text, path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys such as {', '.join(list(section.model_fields)[:4])}")
    tree = upgrade(tree)
    overridden = {_override(tree, override): override for override in overrides}
    finish(tree)
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        problems: dict[Path_, str] = {}  # one per key: a union reports every alternative that did not fit
        for item in error.errors():
            where, annotation = _real_path(section, item["loc"])
            problems.setdefault(where, _in_words(section, where, annotation, item))
        messages = [_place(where, words, lines, overridden) + words for where, words in problems.items()]
    raise ConfigError(
        f"{path}: " + (messages[0] if len(messages) == 1 else "\n  ".join([f"{len(messages)} problems", *messages]))
    )


def _place(path: Path_, words: str, lines: dict[Path_, int], overridden: dict[Path_, str]) -> str:
    parts = [path[:length] for length in range(len(path), 0, -1)]
    for part in parts:  # first: what is below an overridden section is no longer that of the file
        if part in overridden:
            return f"override {overridden[part]!r}: "
    if causes := [override for key, override in overridden.items() if _is_named(key, path, words)]:
        return f"override{'s' * (len(causes) > 1)} {' and '.join(map(repr, causes))}: "
    for part in parts:
        if part in lines:
            return f"line {lines[part]}: "
    made = [override for key, override in overridden.items() if path and key[: len(path)] == path]
    return f"override {made[0]!r}: " if made else ""  # the override created the section that the path names


def _is_named(key: Path_, section: Path_, words: str) -> bool:
    """Whether a problem of a whole section names this key in it. Of a list's item messages have the last word alone."""
    if len(key) <= len(section) or key[: len(section)] != section:
        return False
    name = dotted(key[len(section) :] if any(isinstance(part, int) for part in section) else key)
    return re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", words) is not None


def _real_path(section: type[BaseModel], loc: Sequence[str | int]) -> tuple[Path_, Any]:
    """The keys in pydantic's location, which also has the alternatives of unions, and the type of the last key."""
    path: Path_ = ()
    annotation: Any = section
    for part in loc:
        model, item = _section_of(annotation), _item_of(annotation)
        if model is not None and part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
        elif item is not None and isinstance(part, int):
            annotation = item
        elif model is not None:
            annotation = None  # an unknown key
        else:
            break
        path += (part,)
    return path, annotation


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for part in get_args(annotation) for choice in _alternatives(part)]
    return [annotation]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    sections = [a for a in _alternatives(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
    return sections[0] if sections else None


def _item_of(annotation: Any) -> Any:
    items = [get_args(a)[0] for a in _alternatives(annotation) if get_origin(a) is list]
    return items[0] if items else None


def is_section(annotation: Any) -> bool:
    """Whether a value of this type is a section, with its own keys."""
    return _section_of(annotation) is not None


def type_words(annotation: Any) -> str:
    """A type in plain words: ``a whole number or null``."""
    words = []
    for choice in _alternatives(annotation):
        if get_origin(choice) is Literal:
            values = [str(value) for value in get_args(choice)]
            words.append(values[0] if len(values) == 1 else "one of " + ", ".join(values))
        elif get_origin(choice) is list:
            words.append("a list of: " + type_words(get_args(choice)[0]))
        elif _section_of(choice):
            words.append("a mapping of keys")
        else:
            names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
            words.append(names[choice])
    return " or ".join(words)


def _in_words(section: type[BaseModel], path: Path_, annotation: Any, item: Any) -> str:
    """One problem that pydantic reports, in plain words."""
    key, kind, got = dotted(path), item["type"], item["input"]
    if kind == "value_error":  # raised by one of our validators, whose message names the keys
        return str(item["ctx"]["error"])
    if kind == "missing":
        field = _field(section, path)
        return f"{key} is missing" + (f" ({field.description})" if field and field.description else "")
    if kind == "extra_forbidden":
        return f"unknown key {key}; {_nearest(section, path)}"
    shown = "null" if got is None else str(got).lower() if isinstance(got, bool) else repr(got)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    if kind.endswith(("_type", "_parsing", "_from_float")) or kind == "literal_error":
        return f"{key}: expected {type_words(annotation)}, got {shown}"
    if kind == "string_pattern_mismatch":
        return f"{key}: {shown} may only have letters, digits and _ . -"
    if kind == "too_short":
        return f"{key}: needs at least {item['ctx']['min_length']} item(s), got {item['ctx']['actual_length']}"
    return f"{key}: {item['msg'].replace('Input should', 'must').replace('List should', 'must')}, got {shown}"


def _field(section: type[BaseModel], path: Path_) -> Any:
    model = _section_of(_real_path(section, path[:-1])[1])
    return model.model_fields.get(str(path[-1])) if model else None


def walk(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that holds a value, with its pydantic field. ``*`` stands for an item of a list of sections.

    The plain keys of a section come before its subsections.
    """
    yield from ((prefix + name, f) for name, f in section.model_fields.items() if not is_section(f.annotation))
    for name, field in section.model_fields.items():
        item = _item_of(field.annotation)
        inner = _section_of(field.annotation if item is None else item)
        if inner is not None:
            yield from walk(inner, f"{prefix}{name}." + ("" if item is None else "*."))


def _nearest(section: type[BaseModel], path: Path_) -> str:
    """A suggestion for an unknown key: a sibling with a similar name, or a key of that name in another section."""
    parent = _section_of(_real_path(section, path[:-1])[1])
    siblings = list(parent.model_fields) if parent else []
    name = str(path[-1])
    for sibling, field in parent.model_fields.items() if parent else ():
        inner = _section_of(field.annotation)
        if inner is not None and name in inner.model_fields:
            return f"the nearest valid one is {dotted((*path[:-1], sibling, name))}"
    if close := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return f"the nearest valid one is {dotted((*path[:-1], close[0]))}"
    elsewhere = {key.rpartition(".")[2]: key for key, _ in walk(section)}
    if close := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.6):
        return f"the nearest valid one is {elsewhere[close[0]]}"
    return f"valid in {dotted(path[:-1]) or 'the top level'}: {', '.join(siblings)}"


def dump(section: BaseModel) -> str:
    """YAML of the whole tree, defaults included; ``load`` reads it back to an equal tree."""
    # The dumper follows YAML 1.1: it quotes more strings than needed and writes 1.0e-08. Both are read back correctly.
    tree = section.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
