"""A run that answers its prompts well, and a server of its model over HTTP that can be told to make mistakes."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
MODEL = "tiny"
# The scratch tokenizer has neither: a token that goes before a text where special tokens are added, and a mode that
# makes the template write on.
BOS = "<|pad|>"
THINK = "{% if enable_thinking is defined and enable_thinking %}{{ '0.0' }}{% endif %}"


@pytest.fixture(scope="session")
def calibrated_run(shared_dir, command) -> Path:
    """Directory of a finished run of `configs/tiny.py` that has learned its prompts, made once for all tests.

    On one device, in a process of its own: hundreds of steps on eight simulated ones wait for each other.
    """
    from filelock import FileLock

    directory = shared_dir / "calibrated_run"
    fields = ("train.objective=exact", "train.epochs=100", "eval.enabled=False", "checkpoint.every_steps=1000")
    with FileLock(shared_dir / "calibrated_run.lock"):
        if not (directory / "summary.json").exists():
            fields = (*fields, f"data.cache_dir={shared_dir / 'data'}")
            code, _, errors = command(
                "main", f"--config={TINY}", f"--workdir={directory}", *(f"--config.{field}" for field in fields)
            )
            assert code == 0, errors
            spoil_tokenizer(directory / "base")
    return directory


def spoil_tokenizer(directory: Path) -> None:
    """Gives a tokenizer a BOS, and its template a thinking mode; what the run was trained on stays as it is."""
    file = directory / "tokenizer.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    begin = {"SpecialToken": {"id": BOS, "type_id": 0}}
    tokens = {BOS: {"id": BOS, "ids": [record["model"]["vocab"][BOS]], "tokens": [BOS]}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    record["post_processor"] = {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, text]}
    record["post_processor"]["special_tokens"] = tokens
    file.write_text(json.dumps(record), encoding="utf-8")
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + THINK, encoding="utf-8")


@dataclass
class Behaviour:
    """How the server behaves; the fields are its mistakes, and what it can do.

    Attributes:
      model: that answers.
      sampler: draws in the model's stead, which then only scores.
      cut: what becomes of the log-probabilities of a step before a token is drawn.
      encode: messages → prompt.
      stop_ids: tokens that end an answer.
      fixed_seed: every request gets the same draws.
      can: "n" and "logprobs": others are refused, as servers do.
      answers: in place of the next answers: status, body, and seconds until it comes.
      requests, keys: what was asked, and the keys that came with it.
    """

    model: "NextTokens"
    encode: Callable[[Any], list[int]]
    stop_ids: Sequence[int]
    sampler: Any = None
    cut: Callable[[np.ndarray], np.ndarray] = lambda log_probs: log_probs
    fixed_seed: bool = False
    can: Sequence[str] = ("n", "logprobs")
    answers: list[tuple[int, str, float]] = field(default_factory=list)
    requests: list[Mapping[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


class NextTokens:
    """A model's next-token distributions, each computed once."""

    def __init__(self, model, tokenizer) -> None:
        from cft_jax.generate import TextScorer
        from cft_jax.generate.stops import model_stop_ids

        self.score, self.stop_ids = TextScorer(model).next_token_log_probs, model_stop_ids(model, tokenizer)
        self.known: dict[tuple[int, ...], np.ndarray] = {}

    def log_probs(self, rows: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        new = [row for row in dict.fromkeys(rows) if row not in self.known]
        if new:
            found = self.score(new).astype(np.float64)
            self.known |= dict(zip(new, found, strict=True))
        return [self.known[row] for row in rows]


class Drawer:
    """Draws token by token."""

    def __init__(self, behaviour: Behaviour, tokenizer) -> None:
        self.behaviour, self.tokenizer = behaviour, tokenizer
        self.rng, self.lock = np.random.default_rng(5), threading.Lock()

    def draw(self, prompt: Sequence[int], num: int, max_tokens: int) -> list[tuple[list[int], bool]]:
        """Tokens of each answer, and whether it was cut."""
        if self.behaviour.sampler is not None:
            seed, stop = int(self.rng.integers(1 << 30)), self.behaviour.stop_ids[0]
            (found,) = self.behaviour.sampler.complete([prompt], num_samples=num, max_new_tokens=max_tokens, seed=seed)
            return [([*c.tokens, *[stop] * (c.reason == "stop")], c.reason == "length") for c in found]
        rng = np.random.default_rng(3) if self.behaviour.fixed_seed else self.rng
        drawn: list[list[int]] = [[] for _ in range(num)]
        live = list(range(num))
        for _ in range(max_tokens):
            steps = self.behaviour.model.log_probs([(*prompt, *drawn[i]) for i in live])
            for i, log_probs in zip(live, steps, strict=True):
                probs = np.exp(self.behaviour.cut(log_probs))
                drawn[i].append(int(rng.choice(probs.size, p=probs / probs.sum())))
            live = [i for i in live if drawn[i][-1] not in self.behaviour.stop_ids]
        return [(tokens, i in live) for i, tokens in enumerate(drawn)]

    def choice(
        self, prompt: Sequence[int], tokens: list[int], is_cut: bool, asked: Mapping[str, Any]
    ) -> dict[str, Any]:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = {"finish_reason": "length" if is_cut else "stop", "index": 0, "logprobs": None}
        alternatives = asked.get("top_logprobs", asked.get("logprobs")) or 0
        content = []
        steps = self.behaviour.model.log_probs([(*prompt, *tokens[:k]) for k in range(len(tokens))])
        for step, log_probs in enumerate(steps):
            best = np.argsort(-log_probs)[:alternatives].tolist()
            told = [
                {"token": self.tokenizer.decode([t]), "logprob": float(log_probs[t])} for t in (tokens[step], *best)
            ]
            content.append({**told[0], "bytes": None, "top_logprobs": told[1:]})
        if "messages" in asked:
            logprobs = {"content": content} if asked.get("logprobs") else None
            return found | {"message": {"role": "assistant", "content": text}, "logprobs": logprobs}
        logprobs = {
            "tokens": [entry["token"] for entry in content],
            "token_logprobs": [entry["logprob"] for entry in content],
            "top_logprobs": [{t["token"]: t["logprob"] for t in entry["top_logprobs"]} for entry in content],
        }
        return found | {"text": text, "logprobs": logprobs if asked.get("logprobs") else None}


@pytest.fixture
def serve(tokenizer) -> Iterator[Callable[[Behaviour], str]]:
    """Starts a server that behaves so; returns the address of its API."""
    servers = []

    def start(behaviour: Behaviour) -> str:
        drawer = Drawer(behaviour, tokenizer)

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, status: int, body: str) -> None:
                content = body.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                behaviour.keys.append(self.headers.get("Authorization", ""))
                self.answer(200, json.dumps({"object": "list", "data": [{"id": MODEL}]}))

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                behaviour.keys.append(self.headers.get("Authorization", ""))
                with drawer.lock:
                    behaviour.requests.append(asked)
                    if behaviour.answers:
                        status, body, seconds = behaviour.answers[0]
                        behaviour.answers[:] = behaviour.answers[1:]
                        threading.Event().wait(seconds)
                        return self.answer(status, body)
                    for name in ("n", "logprobs"):
                        if (asked.get(name, 1) not in (1, None) and name not in behaviour.can) or (
                            name == "logprobs" and name in asked and name not in behaviour.can
                        ):
                            return self.answer(400, json.dumps({"error": {"message": f"{name} is not supported"}}))
                    prompt = behaviour.encode(asked["messages"]) if "messages" in asked else asked["prompt"]
                    drawn = drawer.draw(prompt, asked.get("n", 1), asked["max_tokens"])
                    choices = [drawer.choice(prompt, *item, asked) for item in drawn]
                return self.answer(200, json.dumps({"choices": choices, "usage": {"prompt_tokens": len(prompt)}}))

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def config(calibrated_run):
    """The settings by which the run is measured."""
    from cft_jax.config import eval_config_dict, from_config_dict

    return from_config_dict(eval_config_dict(["structured"], str(calibrated_run)))


@pytest.fixture(scope="module")
def trained(calibrated_run):
    """The trained model, on one device."""
    from cft_jax.checkpoints import from_pretrained

    return from_pretrained(str(calibrated_run / "export"), dtype="float32", param_dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(calibrated_run):
    from cft_jax.text import load_tokenizer

    return load_tokenizer(str(calibrated_run / "base"), revision="", local_files_only=True)


@pytest.fixture(scope="module")
def next_tokens(tokenizer) -> Callable[[Any], NextTokens]:
    """What a model says next."""
    return lambda model: NextTokens(model, tokenizer)


@pytest.fixture(scope="module")
def trained_tokens(trained, next_tokens) -> NextTokens:
    return next_tokens(trained)


@pytest.fixture
def behave(config, trained_tokens, tokenizer) -> Callable[..., Behaviour]:
    """An honest server's behaviour, but for the fields given."""
    from cft_jax.text import ChatOptions, encode_chats

    def make(**mistakes) -> Behaviour:
        options = ChatOptions.from_config(config.data)
        honest = {
            "model": trained_tokens,
            "encode": lambda messages: encode_chats(tokenizer, [messages], options)[0],
            "stop_ids": trained_tokens.stop_ids,
        }
        return Behaviour(**honest | mistakes)

    return make


@pytest.fixture(scope="module")
def reference(calibrated_run):
    """Prompts of the run and what its model says; for reading."""
    from cft_jax.serving.reference import Reference

    return Reference(str(calibrated_run), 4)
