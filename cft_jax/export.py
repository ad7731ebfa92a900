"""Writes the newest checkpoint of a run in Hugging Face format.

    python -m cft_jax.export --workdir=runs/llama --output=exported --format=merged

`merged` writes full weights (model*.safetensors, config.json, tokenizer files), `adapter` a PEFT adapter
(adapter_model.safetensors, adapter_config.json). OUTPUT must be absent or empty; both may be gs:// addresses.
`--config.model.lora.strength=0.7` weakens a run's adapters, or strengthens them, without training again.
"""

from absl import flags

from cft_jax.common import cli
from cft_jax.common.errors import UserError
from cft_jax.config import Config, LoraConfig, broken_rules, read_override

FORMATS = ("merged", "adapter")


def _main(values: flags.FlagValues) -> None:
    workdir, output, form = (str(values[name].value or "") for name in ("workdir", "output", "format"))
    if not workdir or not output:
        raise UserError("--workdir and --output are needed: the run's directory, and a new one for its weights")
    strength = _strength(values)
    from cft_jax.jobs import export

    export.start(workdir, output, form, values["dtype"].value, strength)


def _strength(values: flags.FlagValues) -> float:
    """The one field of the configuration that an export may change."""
    strength = 1.0
    if values["config"].value:
        raise UserError("an export takes its configuration from the run; leave --config out")
    for assignment in values["override"].value or ():
        path, value = read_override(Config(), assignment)
        if path != ["model", "lora", "strength"]:
            raise UserError(f"config.{'.'.join(path)} cannot change in an export; only config.model.lora.strength can")
        strength = value
    for problem in broken_rules(LoraConfig(strength=strength), "config.model.lora"):
        raise UserError(problem)
    return strength


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=True)
    flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)
    flags.DEFINE_string("output", None, "Directory to write; absent or empty.", flag_values=values)
    flags.DEFINE_enum("format", "merged", FORMATS, "What to write.", flag_values=values)
    help_ = "Of merged weights; the base checkpoint's by default."
    flags.DEFINE_enum("dtype", None, ("bfloat16", "float16", "float32"), help_, flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
