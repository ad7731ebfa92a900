"""Asks a server whether it samples what a trained model says.

    python -m cft_jax.check --endpoint=http://localhost:8000/v1 --model=NAME --run=runs/demo

Any OpenAI-compatible server will do (vLLM, SGLang, TGI, llama.cpp, a hosted one). It is asked prompts of the run,
plainly, as a client asks that sets nothing; its answers, and its log-probabilities where it gives any, are held against
the model's exact probabilities. Where they differ, the likely cause is named: a top-k, top-p or temperature left on,
the base model in place of the adapter, a doubled BOS, another template, missing stop tokens, quantised weights.

Exit code 0: calibrated; 3: not; an honest server is called wrong once in 10,000 times. The API key is read from the
environment. More in docs/checking.md.
"""

import sys

from absl import flags

from cft_jax.common import cli
from cft_jax.common.errors import UserError

NOT_CALIBRATED = 3


def _main(values: flags.FlagValues) -> None:
    given = values.flag_values_dict()
    if missing := [f"--{name}" for name in ("endpoint", "model", "run") if not given[name]]:
        raise UserError(f"{', '.join(missing)} missing; --endpoint, --model and --run are needed, see --help")
    from cft_jax.jobs import check

    names = ("endpoint", "model", "run", "num", "prompts", "request", "completions", "timeout", "parallel")
    if not check.start(**{name: given[name] for name in (*names, "api_key_env", "output")}):
        sys.exit(NOT_CALIBRATED)


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=False)
    flags.DEFINE_string("endpoint", None, "Address of the server's API, up to /v1.", flag_values=values)
    flags.DEFINE_string("model", None, "Name by which the server knows the model.", flag_values=values)
    run = "The trained model: directory of a run, an export, a checkpoint in HF format or a hub id."
    flags.DEFINE_string("run", None, run, flag_values=values)
    flags.DEFINE_integer("num", 200, "Answers to each prompt.", lower_bound=2, flag_values=values)
    flags.DEFINE_integer("prompts", 8, "Prompts of the run to ask.", lower_bound=1, flag_values=values)
    request = """Fields to send with every request, as JSON: '{"temperature": 1, "top_p": 1, "top_k": 0}'."""
    flags.DEFINE_string("request", "{}", request, flag_values=values)
    completions = "Send the prompt's own tokens to /completions: leaves the server's template out."
    flags.DEFINE_bool("completions", False, completions, flag_values=values)
    flags.DEFINE_float("timeout", 60.0, "Seconds that a request may take.", lower_bound=0.1, flag_values=values)
    flags.DEFINE_integer("parallel", 8, "Requests at a time.", lower_bound=1, flag_values=values)
    key = "Environment variable that holds the API key, where the server wants one."
    flags.DEFINE_string("api_key_env", "OPENAI_API_KEY", key, flag_values=values)
    flags.DEFINE_string("output", None, "JSON file to write: all numbers and all answers.", flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
