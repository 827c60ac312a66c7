"""A recipe's JSON Schema, for editors: its keys as `schema` has them, the methods' names, and each method's options."""

from __future__ import annotations

from typing import Any

from interfuse.recipe.schema import Recipe, Wide
from interfuse.registry import Method, methods


def options_schema(method: Method) -> dict[str, Any]:
    """The options that a recipe may give `method`, as JSON Schema properties."""
    wide = Wide.model_json_schema()["properties"] if method.level == "features" else {}
    return method.options.model_json_schema().get("properties", {}) | wide


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors: with the methods' names and, for each, its options."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    rules = []
    shared = {"weight": {"type": "number"}, "int8_mask": {}}  # what mergekit's recipes may hold beside a method's options
    for key, levels in (("fusion", ("layers", "features", "outputs")), ("merge_method", ("weights", "adapters"))):
        known: dict[str, dict[str, Any]] = {}
        for method in [m for m in methods() if m.level in levels]:
            more = options_schema(method) | (shared if key == "merge_method" else {})
            known[method.name] = more | known.get(method.name, {})
        field = schema["properties"][key]
        field.pop("anyOf", None)
        field.update({"type": "string", "examples": list(known)})
        for name, properties in known.items():
            parameters = {"properties": properties, "additionalProperties": False}
            rule = {"properties": {key: {"const": name}}, "required": [key]}
            rules.append({"if": rule, "then": {"properties": {"parameters": parameters}}})
    schema["allOf"] = rules
    return schema
