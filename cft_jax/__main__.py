"""All commands behind one: `cft-jax main --config=demo`, or `python -m cft_jax main --config=demo`."""

import ast
import difflib
import importlib
import sys
from pathlib import Path

from cft_jax import __version__

_PACKAGE = Path(__file__).parent


def commands() -> dict[str, Path]:
    """The file of every command, by its name: the modules and packages here that have a `main()`."""
    found = {file.stem: file for file in _PACKAGE.glob("[!_]*.py")}
    found |= {file.parent.name: file for file in _PACKAGE.glob("*/__main__.py")}
    return {name: file for name, file in sorted(found.items()) if "\ndef main()" in file.read_text(encoding="utf-8")}


def main() -> None:
    """The command line: hands the words after a command's name to it."""
    known, (name, *words) = commands(), [*sys.argv[1:], "--help"][: max(len(sys.argv) - 1, 1)]
    if name == "--version":
        sys.stdout.write(f"cft_jax {__version__}\n")
    elif name in ("--help", "-h"):
        sys.stdout.write(_help(known))
    elif name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(known)}"
        sys.stderr.write(f"error: unknown command {name!r}; {hint}\n")
        sys.exit(2)
    else:
        sys.argv = [f"cft-jax {name}", *words]
        module = f"cft_jax.{name}" + (".__main__" if known[name].name == "__main__.py" else "")
        importlib.import_module(module).main()


def _help(known: dict[str, Path]) -> str:
    lines = ["cft-jax COMMAND --flag=value ...; cft-jax COMMAND --help says more", ""]
    for name, file in known.items():
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:9} {about.splitlines()[0]}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
