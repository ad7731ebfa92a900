"""Where a model's weights came from."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """The checkpoint behind a model; hashable, so that it may ride on the module as static data.

    Attributes:
      directory: in HF format, with config, tokenizer and weights.
      name: what the user asked for, a hub id or a directory.
      revision: commit of a hub id; empty for a directory.
      config_json: the text of config.json.
      stop_ids: tokens that end a text, ascending: those that generation_config.json names (without one, config.json)
        and, of a trained model, the terminator of its answers.
    """

    directory: str
    name: str
    revision: str
    config_json: str
    stop_ids: tuple[int, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        return json.loads(self.config_json)

    @property
    def max_length(self) -> int | None:
        """The tokens of the longest text that config.json promises; None where it is silent."""
        raw = self.config
        return raw.get("text_config", raw).get("max_position_embeddings")
