"""Says what a configuration would take on a TPU or GPU, before anyone pays for one; compiles on any machine.

    python -m cft_jax.plan --config=configs/qwen3.py:1.7b --topology=v6e-8
    python -m cft_jax.plan --config=configs/gpt_oss.py --topology=v5litepod-16,v5p-8 --output=plan.json

The TPU's own compiler (pip install -e ".[plan]") compiles every program that the configuration would run and says
whether it fits, what it keeps in memory, how many cycles it takes and what the devices send each other. Where the
configuration's own settings do not fit, others are searched. GPUs are compiled for where they are, else estimated.
No weights are downloaded.
"""

from absl import flags

from cft_jax.common import cli
from cft_jax.common.errors import UserError
from cft_jax.config import config_of
from cft_jax.plan import KINDS
from cft_jax.plan.topologies import topology


def _main(values: flags.FlagValues) -> None:
    given = values.flag_values_dict()
    names = [name for name in (given["topology"] or "").split(",") if name.strip()]
    if not names:
        raise UserError("--topology is missing; name one or more, such as --topology=v6e-8,v5litepod-16")
    topologies = [topology(name) for name in names]
    kinds = tuple(given["programs"]) or KINDS
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--programs={','.join(unknown)} is unknown; there are {', '.join(KINDS)}")
    config = config_of(values)
    from cft_jax.jobs import plan

    plan.start(
        config,
        topologies,
        output=given["output"],
        kinds=kinds,
        rows_per_device=given["rows_per_device"],
    )


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=True)
    flags.DEFINE_string(
        "topology", None, "Devices by name, several with commas between: v5litepod-16, v5e-16, v6e-8, v5p-8, v4-8, "
        "tpu7x-8, h100-8.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("output", None, "JSON file for the figures; it must not exist yet.", flag_values=values)
    rows = (
        "Rows of the batch for each device, in place of config.train.batch_size for all: how a run grows with devices."
    )
    flags.DEFINE_integer("rows_per_device", None, rows, lower_bound=1, flag_values=values)
    some = "Programs to compile, with commas between; by default train, prefill, decode, score and likelihood."
    flags.DEFINE_list("programs", [], some, flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
