"""Writes the newest checkpoint of a run in Hugging Face format.

    python -m cft_jax.export --workdir=runs/llama --output=exported --format=merged

`merged` writes full weights (model*.safetensors, config.json, tokenizer files), `adapter` a PEFT adapter
(adapter_model.safetensors, adapter_config.json). OUTPUT must be absent or empty; both may be gs:// addresses.
"""

from absl import flags

from cft_jax.common import cli
from cft_jax.common.errors import UserError

FORMATS = ("merged", "adapter")


def _main(values: flags.FlagValues) -> None:
    workdir, output, form = (str(values[name].value or "") for name in ("workdir", "output", "format"))
    if not workdir or not output:
        raise UserError("--workdir and --output are needed: the run's directory, and a new one for its weights")
    from cft_jax.jobs import export

    export.start(workdir, output, form, values["dtype"].value)


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=False)
    flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)
    flags.DEFINE_string("output", None, "Directory to write; absent or empty.", flag_values=values)
    flags.DEFINE_enum("format", "merged", FORMATS, "What to write.", flag_values=values)
    help_ = "Of merged weights; the base checkpoint's by default."
    flags.DEFINE_enum("dtype", None, ("bfloat16", "float16", "float32"), help_, flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
