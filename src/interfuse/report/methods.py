"""The registered methods as text: all of them in a list, one in full, as data for JSON and the documentation.

What is said is read off the registry: summaries from docstrings, options from signatures. Nothing is written twice.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from interfuse.recipe.json_schema import options_schema
from interfuse.registry import Level, Method

#: The key of a recipe that names a method of each level, and what the level fuses.
LEVELS: dict[Level, tuple[str, str]] = {
    "weights": ("merge_method", "weights of networks of one architecture, merged into one checkpoint"),
    "adapters": ("merge_method", "LoRA adapters of one base, merged into one adapter without it"),
    "layers": ("fusion", "whole layers of trained networks, put into a target"),
    "features": ("fusion", "features of any networks, fused by a small trained module"),
    "outputs": ("fusion", "predictions of any networks, combined, or taught to a network of their own"),
}


def described(method: Method) -> dict[str, Any]:
    """A method as JSON: its options are JSON Schema properties, with types, ranges and defaults."""
    return {
        "name": method.name,
        "level": method.level,
        "recipe": f"{LEVELS[method.level][0]}: {method.name}",
        "summary": method.summary,
        "needs": method.needs or "nothing",
        "options": options_schema(method),
        "paper": method.paper,
    }


def listed(methods: Sequence[Method], width: int) -> str:
    """All of `methods` by level, a paragraph each, at most `width` characters wide."""
    lines: list[str] = []
    indent = 2 + max((len(method.name) for method in methods), default=0) + 2
    for level, (_, about) in LEVELS.items():
        found = [method for method in methods if method.level == level]
        lines += ["", f"{level}: {about}"] if found else []
        for method in found:
            first = f"  {method.name}".ljust(indent)
            lines += textwrap.wrap(method.summary, width, initial_indent=first, subsequent_indent=" " * indent)
            options = ", ".join(options_schema(method)) or "none"
            more = f"needs {method.needs or 'nothing'}; options: {options}"
            lines += textwrap.wrap(more, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
    return "\n".join([*lines[1:], "", "One in full, with its options and paper: interfuse methods NAME"])


def in_full(method: Method) -> str:
    """One method: summary, needs, options with ranges and defaults, paper."""
    about = described(method)
    lines = [f"{about['name']} ({about['level']}), in a recipe `{about['recipe']}`", f"  {about['summary']}"]
    lines += [f"  needs: {about['needs']}"]
    lines += [f"  paper: {about['paper']}"] if about["paper"] else []
    lines += ["  options, under `parameters`:"] if about["options"] else []
    for name, schema in about["options"].items():
        lines.append(f"    {name}: {allowed(schema)}")
        lines += [f"      {schema['description']}"] if "description" in schema else []
    return "\n".join(lines)


def allowed(schema: dict[str, Any]) -> str:
    """A value's type, range and default in words: `integer, at least 1, default 4`."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    words = [" or ".join(_kind(kind) for kind in kinds)]
    if schema.get("default") is not None:
        words.append(f"default {json.dumps(schema['default'])}")
    return ", ".join(words)


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    words = [str(schema.get("type", "any"))]
    if schema.get("type") == "array" and "type" in schema.get("items", {}):
        words = [f"list of {_kind(schema['items'])}"]
    for key, text in (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    ):
        words += [f"{text} {schema[key]:g}"] if key in schema else []
    return ", ".join(words)
