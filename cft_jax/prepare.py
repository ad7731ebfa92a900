"""Builds and caches the tokenised training data and prints its figures; needs the tokenizer, not the weights.

    python -m cft_jax.prepare --config=configs/llama.py --output=DIR [--config.data.num_decimals=2 ...]

The tries go to the data cache (`data.cache_dir`), where the main job finds them; `prepare.json` in DIR holds the
figures.
"""

from absl import flags

from cft_jax.common import cli
from cft_jax.common.errors import UserError
from cft_jax.config import config_of


def _main(values: flags.FlagValues) -> None:
    output = values["output"].value
    if not output:
        raise UserError("--output is missing; name the directory for prepare.json")
    config = config_of(values)
    from cft_jax.jobs import prepare

    prepare.start(config, output)


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=True)
    flags.DEFINE_string("output", None, "Directory for prepare.json.", flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
