"""YAML files of settings: every value as the very text that its flag would get, with file and line for errors.

Imports no libraries of training: a batch job reads such a file on every start of every node.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vit_dist.errors import UserError


class Setting(NamedTuple):
    """One `key: value` line."""

    key: str
    node: yaml.Node
    where: str  # file:line


def read(path: Path, what: str) -> list[Setting]:
    """The lines of a file. `what` names its kind. Raises UserError for what is no YAML or no mapping."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)  # the line itself is not shown: it may hold a secret
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line} is not valid YAML: {getattr(error, 'problem', None) or 'not UTF-8'}") from None
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: {what} is a list of `key: value` lines")
    return entries(node, path)


def entries(node: yaml.MappingNode, path: Path) -> list[Setting]:
    """The lines of a mapping in a file. Raises UserError if a key is given twice."""
    found: dict[str, Setting] = {}
    for key_node, value_node in node.value:
        key, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode) or key == "<<":
            raise UserError(f"{where}: a key is one word here")
        if key in found:
            raise UserError(f"{where}: {key} is given twice")
        found[key] = Setting(key, value_node, where)
    return list(found.values())


def is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def texts(node: yaml.Node) -> list[str]:
    """What stands in the file, one text for each item of a list."""
    return [_text(item) for item in (node.value if isinstance(node, yaml.SequenceNode) else [node])]


def _text(node: yaml.Node) -> str:
    """Upstream takes JSON for its dictionaries."""
    if isinstance(node, yaml.ScalarNode) and re.search("[\ud800-\udfff]", node.value):
        raise UserError(f"line {node.start_mark.line + 1} holds half of a character (a lone surrogate)")
    if isinstance(node, yaml.ScalarNode) and "\0" not in node.value:  # a command line cannot hold one
        return node.value
    try:
        return json.dumps(_Loader("").construct_object(node, deep=True))
    except (TypeError, yaml.YAMLError, RecursionError):
        raise UserError(f"line {node.start_mark.line + 1} holds a value that JSON has no word for") from None


class _Loader(yaml.SafeLoader):
    """As YAML 1.2 has it, `1e-3` is a number. Anchors and aliases are refused: a few lines of them become gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            said = "anchors (&) and aliases (*) are not supported, write the value out"
            raise yaml.composer.ComposerError(None, None, said, event.start_mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
