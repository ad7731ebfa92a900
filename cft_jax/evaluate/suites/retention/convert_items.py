"""Turns TinyBenchmarks' published item parameters, a pickle, into a file of plain arrays.

    curl -LO https://github.com/felipemaiapolo/tinyBenchmarks/raw/main/tinyBenchmarks/tinyBenchmarks.pkl
    python -m cft_jax.evaluate.suites.retention.convert_items --input=tinyBenchmarks.pkl --output=tinyBenchmarks.npz

A pickle can run any program when it is read. This command is the only place that reads one: it takes the published
file alone, known by its hash, and of that it makes nothing but dictionaries, lists, strings, numbers and arrays.
"""

import hashlib
import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from cft_jax.common import cli
from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically
from cft_jax.evaluate.suites.retention.item_response import BUNDLES, DOWNLOAD

# Name that git gives to the file's contents: SHA-1 over "blob", its size and its bytes.
PUBLISHED_BLOB = "eb2a0276bafbfc02dbf46c459a1142ff9baeb8a6"


def convert(source: Path, target: Path, *, blob: str) -> list[str]:
    """Writes the arrays of a pickle of item parameters.

    Args:
      source: the pickle.
      target: the .npz file.
      blob: the git hash that the pickle must have.

    Returns:
      The names of the arrays.

    Raises:
      UserError: there is no such pickle, it is another one, or it holds something else than plain data.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise UserError(f"--input={source} cannot be read ({error.strerror or error}); {DOWNLOAD}") from error
    found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if found != blob:
        raise UserError(f"{source} has the git hash {found}, not that of the published file, {blob}; {DOWNLOAD}")
    arrays: dict[str, Any] = _arrays(_PlainUnpickler(io.BytesIO(content)).load())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(target, buffer.getvalue())
    return sorted(arrays)


def _numpy_globals() -> dict[tuple[str, str], Any]:
    """The functions by which pickles make arrays and numbers, under the names of NumPy 1 and 2."""
    rebuild, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    from_buffer = np.zeros(1).__reduce_ex__(5)[0]
    found: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for core in ("numpy.core", "numpy._core"):
        found[f"{core}.multiarray", "_reconstruct"] = rebuild
        found[f"{core}.multiarray", "scalar"] = scalar
        found[f"{core}.numeric", "_frombuffer"] = from_buffer
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Makes arrays and built-in containers; everything else that a pickle may name is refused."""

    _allowed = _numpy_globals()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            # Bytes of pickles that Python 2 could read.
            return lambda text, encoding: text.encode(encoding)
        if (module, name) not in self._allowed:
            raise UserError(f"the pickle asks for {module}.{name}, which is no plain data; get the published file")
        return self._allowed[module, name]


def _arrays(published: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for bundle in BUNDLES:
        own = published[bundle]
        scenarios = list(own["scenarios_position"])
        for name in ("A", "B"):
            found[f"{bundle}.{name}"] = np.asarray(own["irt_parameters"][name], np.float64)
        found[f"{bundle}.seen_examples"] = np.asarray(own["seen_examples"], np.int64)
        found[f"{bundle}.scenarios"] = np.array(scenarios)
        found[f"{bundle}.lambdas"] = np.array([float(own["optimal_lambdas"][name]) for name in scenarios])
        for name in scenarios:
            found[f"{bundle}.weights.{name}"] = np.asarray(own["examples_weights"][name], np.float64)
            found[f"{bundle}.positions.{name}"] = np.asarray(own["scenarios_position"][name], np.int64)
            for part, positions in own["subscenarios_position"][name].items():
                found[f"{bundle}.subpositions.{name}.{part}"] = np.asarray(positions, np.int64)
    return found


def _main(values: flags.FlagValues) -> None:
    source, target = (str(values[name].value or "") for name in ("input", "output"))
    if not source or not target:
        raise UserError("--input and --output are needed: the published pickle, and the file to write")
    names = convert(Path(source), Path(target), blob=PUBLISHED_BLOB)
    sys.stdout.write(f"{target}: {len(names)} arrays\n")


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=False)
    flags.DEFINE_string("input", None, "The published pickle.", flag_values=values)
    flags.DEFINE_string("output", None, "The file to write, .npz.", flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
