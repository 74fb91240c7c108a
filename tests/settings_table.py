"""Writes the README's table of settings from the dataclasses, so that it cannot drift; a test compares them."""

import dataclasses
from pathlib import Path

from gateway.settings import GatewaySettings
from worker.settings import WorkerSettings

README = Path(__file__).parent.parent / "README.md"
START = "<!-- settings: made by `python -m tests.settings_table` -->\n"
END = "<!-- end of settings -->"


def table() -> str:
    """The settings of both sides; `serve` takes them all."""
    rows = ["", "| option | default | TGI's variable | meaning |", "|---|---|---|---|"]
    seen: set[str] = set()
    for title, cls in (("gateway", GatewaySettings), ("worker", WorkerSettings)):
        rows.append(f"| **{title}** | | | |")
        for field in dataclasses.fields(cls):
            if field.name not in seen and not field.metadata["hidden"]:
                seen.add(field.name)
                rows.append(_row(field))
    return "\n".join(rows) + "\n\n"


def _row(field: dataclasses.Field) -> str:
    meta = field.metadata
    flag = f"`--{field.name.replace('_', '-')}`"
    default = "" if field.default in (None, (), "") else f"`{field.default}`"
    variables = ", ".join(f"`{name}`" for name in meta["env"])
    choices = f" One of {', '.join(meta['choices'])}." if meta["choices"] else ""
    return f"| {flag} | {default} | {variables} | {meta['help']}{choices} |"


def with_table(text: str) -> str:
    """A README text with its table renewed."""
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
