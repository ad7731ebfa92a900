"""Asks a model: a run, an export, a checkpoint in Hugging Face format or a hub id.

    python -m cft_jax.sample --model=runs/demo --prompt="Flip a coin." --num=1000 --values=heads,tails
    python -m cft_jax.sample --model=runs/demo --prompts=FILE --num=100 --output=answers.jsonl
    python -m cft_jax.sample --model=runs/demo --chat

Prints the answers and a table of how often each was drawn. Where the prompt has the paper's wording, or is a row that
the model was trained on, or --values lists the answers, the model's exact probabilities stand beside, with the target
and the distance from it. --quiet prints the answers alone.
"""

from absl import flags

from cft_jax.common import cli
from cft_jax.common.errors import UserError
from cft_jax.config import nested_overrides


def _main(values: flags.FlagValues) -> None:
    given = values.flag_values_dict()
    if not given["model"]:
        raise UserError("--model is missing: the directory of a run or of an export, or a hub id")
    if sum(bool(given[name]) for name in ("prompt", "prompts", "chat")) != 1:
        raise UserError("give one of --prompt=TEXT, --prompts=FILE and --chat")
    settings = nested_overrides(given["override"])
    names = ("max_new_tokens", "temperature", "top_p")
    sampling = {name: given[name] for name in names if given[name] is not None}
    from cft_jax.jobs import sample

    if given["chat"]:
        sample.chat(given["model"], settings, sampling)
        return
    prompts = [given["prompt"]] if given["prompt"] else sample.read_prompts(given["prompts"])
    sample.start(
        sample.Asked(
            given["model"],
            prompts,
            values=given["values"],
            probabilities=given["probabilities"],
            num=given["num"],
            output=given["output"] or "",
            seed=given["seed"],
            sampling=sampling,
            settings=settings,
        )
    )


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=False, overrides=True)
    flags.DEFINE_string("model", None, "What to ask: a run, an export, a checkpoint or a hub id.", flag_values=values)
    flags.DEFINE_string("prompt", None, "The message to ask.", flag_values=values)
    file = "A file of prompts, one a line; of a .jsonl the rows' `prompt` or `messages`."
    flags.DEFINE_string("prompts", None, file, flag_values=values)
    flags.DEFINE_bool("chat", False, "Talk with the model instead.", flag_values=values)
    flags.DEFINE_integer("num", 1, "Answers to each prompt.", flag_values=values)
    flags.DEFINE_list("values", [], "The answers to look for, with commas between.", flag_values=values)
    flags.DEFINE_list("probabilities", [], "How probable each value should be.", flag_values=values)
    flags.DEFINE_string("output", None, "A new file.jsonl or file.csv for the answers.", flag_values=values)
    flags.DEFINE_integer("seed", None, "Of the draws; a new one by default.", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", None, "Longest answer, in tokens; the run's by default.", flag_values=values)
    flags.DEFINE_float("temperature", None, "Anything but 1 changes the distribution.", flag_values=values)
    flags.DEFINE_float("top_p", None, "Anything but 1 changes the distribution.", flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
