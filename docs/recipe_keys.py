"""Writes the table of keys into docs/recipe.md, from gptkern/training/recipe_files.py.

python docs/recipe_keys.py      (make docs)
"""

from __future__ import annotations

from pathlib import Path

from gptkern import formatting
from gptkern.training import recipe_files, values

PAGE = Path(__file__).resolve().parent / "recipe.md"
BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"

RESUME = {
    recipe_files.SAME: "stays",
    recipe_files.WARNED: "may change, with a warning",
    recipe_files.FREE: "may change",
    recipe_files.FOUND: "may lie elsewhere",
}


def table() -> str:
    rows = []
    for key in recipe_files.KEYS.values():
        default = "" if key.default is None else f"`{_toml(key)}`"
        option = f"`{key.option}`" if isinstance(key.kind, values.Switch) else f"`{key.option} {key.metavar}`"
        rows.append((f"`{key.name}`", option, default, formatting.escaped(key.words), RESUME[key.resume]))
    return formatting.table(("key", "option", "default", "meaning", "under `--resume`"), rows)


def _toml(key: recipe_files.Key) -> str:
    return recipe_files.text({key.name: key.default}).partition(" = ")[2].strip()


def written(page: str) -> str:
    """The page with the table as it is."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
