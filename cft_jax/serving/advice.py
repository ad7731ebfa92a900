"""What to do about a mistake, by its kind."""

from collections.abc import Sequence

from cft_jax.serving.verdict import STOP

BASE = "the base model answers"
REPEATED = "every request gets the same answers"
MOVED = "the probabilities themselves are others"
PROMPT = "another prompt reaches the model"

_SAMPLING = (
    "vLLM takes the checkpoint's own sampling settings unless started with --generation-config vllm; or send "
    "temperature=1, top_p=1, top_k=0 (SGLang: -1; llama.cpp: min_p=0, too) with every request, here by --request"
)
_TEMPLATE = "serve the tokenizer and the chat template of export/, and send the messages as they are"
_ADVICE = {
    "temperature": _SAMPLING,
    "top-k": _SAMPLING,
    "top-p": _SAMPLING,
    "min-p": _SAMPLING,
    STOP: "the server must stop at the tokens that export/generation_config.json names as eos_token_id; "
    "or send stop_token_ids with every request, here by --request",
    BASE: "name the adapter as --model, not its base, and load it in the server",
    REPEATED: "the server has a fixed seed, or something between caches its answers; send no seed, turn the cache off",
    MOVED: "quantised weights or cache do this, and so do another checkpoint or another adapter: serve export/ in the "
    "dtype it has",
    PROMPT: "compare the server's chat template and system prompt with those of export/",
    "doubled BOS": "the template writes the BOS, and the server adds one more; send messages, or turn it off there",
    "another date": "pass the date of training (data.chat.date) to the template, as in "
    """--request='{"chat_template_kwargs": {"date_string": "26 Jul 2024"}}'""",
    "thinking mode on": """--request='{"chat_template_kwargs": {"enable_thinking": false}}'""",
    "thinking mode off": """--request='{"chat_template_kwargs": {"enable_thinking": true}}'""",
}


def advice(kinds: Sequence[str]) -> str:
    """One line for a cause made of these kinds of mistakes."""
    return "; ".join(dict.fromkeys(_ADVICE.get(kind, _TEMPLATE) for kind in kinds))
