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
# What pickles make arrays and numbers with; NumPy 2 calls the package of all but the first two numpy._core.
_PLAIN = {
    "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
}  # fmt: skip


def convert(source: Path, target: Path, *, blob: str) -> list[str]:
    """Writes the arrays of a pickle of item parameters, whose git hash must be `blob`, as .npz; returns their names.

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
    published = _PlainUnpickler(io.BytesIO(content)).load()
    arrays: dict[str, Any] = {}
    for bundle in BUNDLES:
        own = published[bundle]
        scenarios = list(own["scenarios_position"])
        for name in ("A", "B"):
            arrays[f"{bundle}.{name}"] = np.asarray(own["irt_parameters"][name], np.float64)
        arrays[f"{bundle}.seen_examples"] = np.asarray(own["seen_examples"], np.int64)
        arrays[f"{bundle}.scenarios"] = np.array(scenarios)
        arrays[f"{bundle}.lambdas"] = np.array([float(own["optimal_lambdas"][name]) for name in scenarios])
        for name in scenarios:
            arrays[f"{bundle}.weights.{name}"] = np.asarray(own["examples_weights"][name], np.float64)
            arrays[f"{bundle}.positions.{name}"] = np.asarray(own["scenarios_position"][name], np.int64)
            for part, positions in own["subscenarios_position"][name].items():
                arrays[f"{bundle}.subpositions.{name}.{part}"] = np.asarray(positions, np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(target, buffer.getvalue())
    return sorted(arrays)


class _PlainUnpickler(pickle.Unpickler):
    """Makes arrays and built-in containers; everything else that a pickle may name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            # Bytes of pickles that Python 2 could read.
            return lambda text, encoding: text.encode(encoding)
        if f"{module.replace('_core', 'core')}.{name}" not in _PLAIN:
            raise UserError(f"the pickle asks for {module}.{name}, which is no plain data; get the published file")
        return super().find_class(module, name)


def _main(values: flags.FlagValues) -> None:
    source, target = (str(values[name].value or "") for name in ("input", "output"))
    if not source or not target:
        raise UserError("--input and --output are needed: the published pickle, and the file to write")
    sys.stdout.write(f"{target}: {len(convert(Path(source), Path(target), blob=PUBLISHED_BLOB))} arrays\n")


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=False)
    flags.DEFINE_string("input", None, "The published pickle.", flag_values=values)
    flags.DEFINE_string("output", None, "The file to write, .npz.", flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
