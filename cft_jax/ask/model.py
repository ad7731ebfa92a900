"""A model that can be asked for draws and for the exact probabilities of answers, from whatever names it."""

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float64

from cft_jax.ask.tasks import Prompt
from cft_jax.checkpoints.hf_checkpoint import read_config as read_hf_config
from cft_jax.common import hub
from cft_jax.common.compilation import prepare_compilers
from cft_jax.common.errors import UserError
from cft_jax.common.storage import CHECKPOINTS, opened, reaching
from cft_jax.config import Config, changed, from_config_dict, read_config, validate
from cft_jax.distributions import OutputSpace
from cft_jax.evaluate.backends.load import load_measured_model
from cft_jax.evaluate.backends.protocol import MeasuredModel
from cft_jax.evaluate.suites.structured.settings import prompt_codec
from cft_jax.text.values import check_strings

_DTYPES = ("bfloat16", "float32", "float16")
_LARGEST_SEED = 2**31


def load(what: str | os.PathLike[str], **settings: Any) -> "Model":
    """Loads a model to ask.

    Args:
      what: the directory of a run, whose newest checkpoint is taken; a directory in Hugging Face format, of a model or
        an adapter; an address such as gs://bucket/runs/a; or a hub id.
      **settings: fields of the configuration, nested as there: `model={"dtype": "float32"}`. By default those of the
        run; elsewhere the usual ones, with the dtype of the checkpoint's files.

    Raises:
      UserError: there is no such model, it cannot be loaded, or a setting is wrong.
    """
    prepare_compilers()
    config = settings_of(os.fspath(what), settings)
    return Model(load_measured_model(config), config)


def settings_of(what: str, settings: Mapping[str, Any]) -> Config:
    """The configuration to ask a model with: that of its run, if it has one, with these settings changed.

    Raises:
      UserError: see `load`.
    """
    with reaching(what):
        is_run = (epath.Path(what).expanduser() / CHECKPOINTS).is_dir()
    config = Config()
    if is_run:
        with opened(what, write=False, flag="model") as run:
            config = from_config_dict(read_config(run.path))
    config = changed(config, {"model": {"checkpoint": what, "base": "", "scratch": {"enabled": False}}})
    config = changed(config, {"export": {"enabled": False}})
    config = changed(config, settings)
    validate(config)
    if is_run or "dtype" in settings.get("model", {}):
        return config
    return changed(config, {"model": {"dtype": _dtype_of_files(config) or config.model.dtype}})


def messages_of(prompt: Prompt) -> Sequence[Mapping[str, str]]:
    """A prompt as messages; a text is the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def new_seed() -> int:
    """A seed that was never used."""
    return secrets.randbelow(_LARGEST_SEED)


def _dtype_of_files(config: Config) -> str:
    """What config.json says; empty where it says nothing of use, as for an adapter alone."""
    model = config.model
    place, _ = hub.resolve(model.checkpoint, revision=model.revision, local_files_only=model.local_files_only)
    raw = read_hf_config(place) if (place / "config.json").is_file() else {}
    found = raw.get("dtype") or raw.get("torch_dtype")
    return found if found in _DTYPES else ""


class Model:
    """A language model to ask; it does not change.

    Attributes:
      measured: the model as evaluations have it: its name, its tokenizer and what runs it.
      config: how it is asked: chat options, terminator, resolution of the families' numbers.
    """

    def __init__(self, measured: MeasuredModel, config: Config) -> None:
        self.measured, self.config = measured, config
        self.codec = prompt_codec(measured.tokenizer, config.data)

    def __repr__(self) -> str:
        return f"<cft_jax.Model {self.measured.name}>"

    def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[str]:
        """Draws n answers to a prompt, without the token that ends them.

        Args:
          prompt: the user's message, or a list of {"role", "content"} that ends with the user's.
          n: how many.
          seed: of the draws; None takes a new one each time.
          max_new_tokens: longest answer, in tokens; by default `config.eval.max_new_tokens`.
          temperature: divides the logits; anything but 1 gives another distribution than that of `distribution`.
          top_p: draws from the most probable tokens alone; the same holds.

        Raises:
          UserError: the prompt is longer than the model's context, or an argument is out of its range.
        """
        options: dict[str, Any] = {
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        return self.sample_each([prompt], n, **options)[0]

    def sample_each(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        seed: int | Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[list[str]]:
        """As `sample`, for many prompts at once, which takes less time than one after another.

        `seed` is one for all, which gives different prompts independent draws, or one for each.
        """
        length = self.config.eval.max_new_tokens if max_new_tokens is None else max_new_tokens
        seed = new_seed() if seed is None else seed
        return self.measured.backend.sample(
            [self.encode(prompt, length) for prompt in prompts],
            seeds=[seed] * len(prompts) if isinstance(seed, int) else seed,
            num_samples=n,
            max_new_tokens=length,
            temperature=temperature,
            top_p=top_p,
        )

    def distribution(self, prompt: Prompt, values: Sequence[str]) -> Float64[np.ndarray, "N"]:
        """The exact probabilities of answers to a prompt; see `score`.

        They are not renormalised: what the model puts elsewhere is missing from their sum.
        """
        return np.exp(self.score(prompt, values))

    def score(self, prompt: Prompt, answers: Sequence[str]) -> Float64[np.ndarray, "N"]:
        """The exact log-probabilities, in nats, that `sample` draws each of these answers.

        An answer counts with its own tokens, as the tokenizer writes it, followed by any token that ends a text.

        Raises:
          UserError: the prompt with the longest answer does not fit the context, or there is an answer that the model
            cannot give: its tokens read as another text, or hold the one that ends answers.
        """
        return self.score_each([prompt], [answers])[0]

    def score_each(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Float64[np.ndarray, "N"]]:
        """As `score`, for many prompts at once, each with answers of its own."""
        different = [list(dict.fromkeys(own)) for own in answers]
        spaces = [OutputSpace(tuple(own), np.full(len(own), 1 / max(len(own), 1))) for own in different]
        for own in different:
            check_strings(self.measured.tokenizer, own, "answers")
        tries = [self.codec.build_trie(space) for space in spaces]
        tokens = [self.encode(prompt, trie.max_depth + 1) for prompt, trie in zip(prompts, tries, strict=True)]
        found = []
        for own, asked, score in zip(
            different, answers, self.measured.backend.score(tokens, tries, prefixes=None), strict=True
        ):
            log_probs = np.logaddexp(score.string_log_probs, score.other_stop_log_probs)
            by_answer = dict(zip(own, log_probs.tolist(), strict=True))
            found.append(np.array([by_answer[answer] for answer in asked], np.float64))
        return found

    def encode(self, prompt: Prompt, room: int) -> list[int]:
        """Token ids of a prompt that leaves so many tokens of the context to the answer.

        Raises:
          UserError: it leaves fewer.
        """
        tokens, longest = self.codec.encode(messages_of(prompt)), self.measured.backend.max_length
        if longest is not None and len(tokens) + room > longest:
            raise UserError(
                f"the prompt has {len(tokens)} tokens and the answer up to {room}, more than the {longest} of the "
                f"context of {self.measured.name}; shorten the prompt, or lower max_new_tokens"
            )
        return tokens
