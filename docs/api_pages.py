"""Writes docs/api/: a page for each public name, made of its docstring, and an index.

python docs/api_pages.py             (make docs)
python docs/api_pages.py --check     writes nothing; exits with 1 and names what is stale
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "api"
INDEX = "README.md"

# The modules whose names are public, in the order of the index.
MODULES = (
    "gptkern", "gptkern.functional", "gptkern.nn", "gptkern.autograd", "gptkern.optim", "gptkern.training",
    "gptkern.training.lora", "gptkern.training.search",
)  # fmt: skip

INTRODUCTION = """# Public names

Each has a page, made of its docstring by `make docs`. What is not listed here may change without notice.

`import gptkern` imports nothing else. A name is loaded, and PyTorch with it, when it is first used; with the first one
all operators are registered with PyTorch.
"""


def public() -> dict[str, list[tuple[str, Any]]]:
    """The module's name -> its public names with what they stand for."""
    return {module: [(name, _found(module)[name]) for name in _names(module)] for module in MODULES}


def pages() -> dict[str, str]:
    """The text of each file of docs/api/, by the file's name."""
    found = {INDEX: _index()}
    for module, names in public().items():
        for name, value in names:
            found[_file(module, name)] = _page(f"{module}.{name}", value)
    return found


def _found(module: str) -> dict[str, Any]:
    imported = __import__(module, fromlist=["*"])
    return {name: getattr(imported, name) for name in dir(imported)}


def _names(module: str) -> list[str]:
    """__all__ without what has a place of its own; where there is none, the classes that the module defines."""
    found = _found(module)
    listed = found.get("__all__") or [
        name for name, value in found.items() if inspect.isclass(value) and value.__module__ == module
    ]
    return [name for name in listed if not inspect.ismodule(found[name]) and not name.startswith("_")]


def _file(module: str, name: str) -> str:
    return f"{module}.{name}".removeprefix("gptkern.") + ".md"


def _index() -> str:
    parts = [INTRODUCTION]
    for module, names in public().items():
        parts.append(f"## {module}\n")
        parts.append("| name | |\n|---|---|")
        parts += [f"| [`{name}`]({_file(module, name)}) | {_summary(value)} |" for name, value in names]
        if module == "gptkern":
            parts.append("| `__version__` | The version, a string. |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _summary(value: Any) -> str:
    """The docstring's first sentence."""
    first = " ".join(inspect.getdoc(value).partition("\n\n")[0].split())
    return _escaped(re.match(r".*?[.:](?=\s|$)|.*", first)[0].rstrip(":"))


# --- A page -----------------------------------------------------------------------------------------------------------


def _page(name: str, value: Any) -> str:
    source = Path(inspect.getsourcefile(inspect.unwrap(value))).resolve().relative_to(ROOT).as_posix()
    parts = [f"# {name}", f"[All names]({INDEX}) · [{source}](../../{source})"]
    if not inspect.isclass(value) or _has_constructor(value):
        parts.append(_code(_signature(name, value)))
    parts.append(_markdown(inspect.getdoc(value)))
    for method, function in _methods(value):
        parts.append(f"## {method}")
        if not isinstance(function, property):
            parts.append(_code(_signature(f"{name}.{method}", getattr(value, method))))
        parts.append(_markdown(inspect.getdoc(function)))
    return "\n\n".join(parts) + "\n"


def _has_constructor(cls: type) -> bool:
    """Whether the constructor is gptkern's own; PyTorch's twins have PyTorch's, whose signature varies by version."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return owner.__module__.startswith("gptkern.")


def _methods(value: Any) -> list[tuple[str, Any]]:
    if not inspect.isclass(value):
        return []
    kinds = (classmethod, staticmethod, property)
    own = [(name, f) for name, f in vars(value).items() if inspect.isfunction(f) or isinstance(f, kinds)]
    return [(name, f) for name, f in own if not name.startswith("_") and f.__doc__]


def _signature(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    lines, kind = [], None
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and kind is not parameter.KEYWORD_ONLY:
            lines.append("*")
        kind = parameter.kind
        annotated = parameter.annotation is not parameter.empty
        text = parameter.name + (f": {_annotation(parameter.annotation)}" if annotated else "")
        if parameter.default is not parameter.empty:
            default = _default(parameter.default)
            text += f" = {default}" if annotated else f"={default}"
        lines.append(text)
    inside = "".join(f"\n    {line}," for line in lines) + "\n" if lines else ""
    result = signature.return_annotation
    arrow = "" if result is signature.empty or inspect.isclass(value) else f" -> {_annotation(result)}"
    return f"{name}({inside}){arrow}"


def _default(value: Any) -> str:
    """As it stands in the code; of a lambda that it is one."""
    name = getattr(value, "__name__", None) if callable(value) else None
    return repr(value) if name is None else "…" if name == "<lambda>" else name


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _markdown(docstring: str) -> str:
    """The docstring's blocks: paragraphs, indented formulas, and sections such as `Args:` as lists."""
    parts = []
    for block in docstring.split("\n\n"):
        lines = block.split("\n")
        if re.fullmatch(r"(Args|Returns|Raises|Attributes)\b.*:", lines[0]):
            parts.append(f"**{lines[0].removesuffix(':')}**")
            parts.append(_section(lines[1:]))
        elif lines[0].startswith("    "):
            parts.append("```text\n" + "\n".join(line.removeprefix("    ") for line in lines) + "\n```")
        else:
            text = _escaped(" ".join(line.strip() for line in lines))
            parts.append(re.sub(r"^(Backends|Sources?):", r"**\1**:", text))
    return "\n\n".join(parts)


# `name: `, `name, name: `, `SomeError: `
_NAMED = r"(?!None\b)[A-Za-z_]\w*(?:\.\w+)*(?:, [A-Za-z_]\w*)*: "


def _section(lines: list[str]) -> str:
    """The entries of a section as a list; where they have no names, a paragraph."""
    entries: list[str] = []
    for line in lines:
        if re.match(rf"    {_NAMED}", line) or not entries:
            entries.append(line.strip())
        else:
            entries[-1] += " " + line.strip()
    if not re.match(_NAMED, entries[0]):
        return _escaped(" ".join(entries))
    # Two on a line: "input: (…, width). bias: (width,) or None."
    split = [part for entry in entries for part in re.split(rf"(?<=\.) (?={_NAMED})", entry)]
    return "\n".join(f"- `{name}`: {_escaped(text)}" for name, _, text in (entry.partition(": ") for entry in split))


def _escaped(text: str) -> str:
    """What Markdown would read as emphasis, HTML or a table's edge, outside of code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*|])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


# --- Writing ----------------------------------------------------------------------------------------------------------


def stale(write: bool = False) -> list[str]:
    """The files of docs/api/ that are not as the docstrings have them; written anew or removed where `write`."""
    wanted = pages()
    found = sorted(
        name for name, text in wanted.items() if not (FOLDER / name).is_file() or (FOLDER / name).read_text() != text
    )
    gone = sorted(path.name for path in FOLDER.glob("*") if path.name not in wanted)
    if write:
        FOLDER.mkdir(exist_ok=True)
        for name in found:
            (FOLDER / name).write_text(wanted[name])
        for name in gone:
            (FOLDER / name).unlink()
    return [f"docs/api/{name}" for name in [*found, *gone]]


def main(arguments: list[str]) -> int:
    checking = arguments == ["--check"]
    if arguments and not checking:
        sys.exit(__doc__)
    found = stale(write=not checking)
    print(*found or ["docs/api: nothing is stale"], sep="\n")
    return int(checking and bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
