"""`python docs/config_page.py` writes docs/config.md: every config key with its values, default and meaning.

The meaning of a key is the comment behind it in soar/config.py, that of a section its docstring.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from soar import config
from soar.config import Config

HEAD = """# Configuration

Written by `python docs/config_page.py` from [soar/config.py](../soar/config.py); a test compares the two.

A recipe is a TOML file. Every key below may stand in it, or be set with `--set KEY=VALUE`; what is not set has the default
here. `soar run RECIPE --dry-run` prints the resolved config and what it would cost. An unknown key is refused with the
nearest known one. `soar init` writes a commented recipe with your model and problems.

Defaults are the paper's setting (arXiv 2601.18778) unless the meaning says otherwise.
"""
WORDS = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text"}
BOUNDS = {"minimum": "\u2265", "exclusiveMinimum": ">", "maximum": "\u2264", "exclusiveMaximum": "<"}


def markdown() -> str:
    """The reference as a Markdown page."""
    lines, words = [HEAD], meanings()
    for place, section in sections(Config()).items():
        about = inspect.getdoc(type(section)) if place else "Keys outside of any section."
        lines += [
            f"## {place or 'Top level'}",
            "",
            str(about),
            "",
            "| key | value | default | meaning |",
            "|---|---|---|---|",
        ]
        schema = type(section).model_json_schema()["properties"]
        for name, value in section:
            if not isinstance(value, BaseModel):
                key, default = f"{place}.{name}" if place else name, toml(value)
                meaning = words[key].replace("|", "\\|")
                lines.append(f"| `{key}` | {kind(schema[name])} | {default and f'`{default}`'} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def sections(section: BaseModel, place: str = "") -> dict[str, BaseModel]:
    """Dotted path -> section, depth first, with the defaults that it has at its place."""
    inner = {f"{place}.{name}" if place else name: value for name, value in section if isinstance(value, BaseModel)}
    return {place: section} | {
        key: value for part in inner.items() for key, value in sections(part[1], part[0]).items()
    }


def meanings() -> dict[str, str]:
    """Dotted key -> the comment behind it, "" without one."""
    comments: dict[str, dict[str, str]] = {}
    for name, body in re.findall(r"^class (\w+)\(.*?\):\n(.*?)(?=^\S)", inspect.getsource(config), re.M | re.S):
        comments[name] = dict(re.findall(r"^    (\w+): .*?(?:  # (.*))?$", body, re.M))
    return {
        f"{place}.{name}" if place else name: comments[type(section).__name__][name]
        for place, section in sections(Config()).items()
        for name in type(section).model_fields
    }


def kind(schema: dict[str, Any]) -> str:
    """The values of a key in words, from its JSON schema."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        kinds = [kind(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return ", ".join(kinds) + (" (optional)" if len(kinds) < len(schema["anyOf"]) else "")
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"table of {kind(values)}" if isinstance(values, dict) and values else "table"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in BOUNDS.items() if name in schema]
    return " ".join([WORDS[schema["type"]], ", ".join(bounds)]).strip()


def toml(value: Any) -> str:
    """A value as TOML text; nothing for an optional key that is not set."""
    if value is None:
        return ""
    if isinstance(value, float) and value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(markdown(), encoding="utf-8")
