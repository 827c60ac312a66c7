"""The chat template of a merge: a well-known format by name, a template as text, or the one most models have.

A function on the tokenizer's files; nothing is rendered, and no token is added. transformers 4.52 and later read
chat_template.jinja; the entry in tokenizer_config.json that it replaces goes. Formats: as the models' makers publish them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from interfuse.checkpoints.tokenizers.tokenizer import CONFIG, TEMPLATE, TEMPLATES, decode, encode
from interfuse.errors import Problem, RecipeError, nearest

#: Name -> template. Whitespace in a tag with `-` isn't part of the text.
FORMATS = {
    "chatml": """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
""",
    "llama3": """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
""",
    "mistral": """\
{{- bos_token -}}
{%- set ahead = namespace(text='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set ahead.text = message.content | trim + '\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{ '[INST] ' + ahead.text + message.content | trim + ' [/INST]' }}
{%- set ahead.text = '' -%}
{%- else -%}
{{ ' ' + message.content | trim + eos_token }}
{%- endif -%}
{%- endfor -%}
""",
    "alpaca": """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ message.content | trim + '\\n\\n' }}
{%- elif message.role == 'user' -%}
{{ '### Instruction:\\n' + message.content | trim + '\\n\\n' }}
{%- else -%}
{{ '### Response:\\n' + message.content | trim + eos_token + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Response:\\n' }}
{%- endif -%}
""",
    "exaone": """\
{%- for message in messages -%}
{{ '[|' + message.role + '|]' + message.content | trim }}
{{- '\\n' if message.role == 'user' else '[|endofturn|]\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '[|assistant|]' }}
{%- endif -%}
""",
}
#: What marks a turn in a format: where the tokenizer lacks it as a token, it is cut into pieces.
_MARKS = {"chatml": "<|im_start|>", "llama3": "<|start_header_id|>", "exaone": "[|assistant|]"}
_SHORTEST = 20  # characters of a template that says anything; as in mergekit


def template_of(files: Mapping[str, bytes], where: str = "") -> str | None:
    """The default chat template in a tokenizer's files, stripped, or None; `where` is what messages call the folder."""
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8", "replace").strip() or None
    found = decode(files, CONFIG, where).get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return (found.strip() or None) if isinstance(found, str) else None


def with_chat_template(
    files: Mapping[str, bytes], choice: str, templates: Sequence[str | None]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The tokenizer's files with the chat template that `choice` asks for, and notes.

    `choice` is `"auto"` (the most common of `templates`, the models' own in the recipe's order; the first of equals), a name
    of `FORMATS`, or a Jinja template. Anything else is a `RecipeError`.
    """
    template, notes = _chosen(choice, templates)
    if template is None:
        return dict(files), notes
    kept = {name: content for name, content in files.items() if not name.startswith(TEMPLATES + "/")}
    config = decode(files, CONFIG, "tokenizer")
    if config.pop("chat_template", None) is not None:
        kept[CONFIG] = encode(config)
    mark = _MARKS.get(choice)
    if mark and not any(mark.encode() in content for name, content in kept.items() if name != TEMPLATE):
        notes += (f"chat_template: the tokenizer has no token {mark!r}, which {choice} begins a turn with",)
    return {**kept, TEMPLATE: template.encode()}, notes


def _chosen(choice: str, templates: Sequence[str | None]) -> tuple[str | None, tuple[str, ...]]:
    if choice == "auto":
        counted = Counter(template.strip() for template in templates if template and template.strip())
        if not counted:
            return None, ("chat_template: no model has one, so none is written",)
        template, count = counted.most_common(1)[0]  # equal counts come in the order of their first
        return template, (f"chat_template: that of {count} of {len(templates)} models",)
    if isinstance(choice, str) and choice in FORMATS:
        return FORMATS[choice], ()
    if not isinstance(choice, str) or len(choice) < _SHORTEST or "{" not in choice:
        wrong = f"got {choice!r}"
        raise RecipeError(Problem("chat_template", wrong, f"{nearest(str(choice), ['auto', *FORMATS])}; or a Jinja template"))
    return choice, ()
