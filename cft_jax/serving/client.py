"""A client of OpenAI-compatible servers: draws of answers, with log-probabilities where the server gives them.

Every request has a time limit, what may pass is tried again, and what will not is told in one line. The API key is
sent and never shown.
"""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.common.progress import Progress

# What a server may get over: too many requests, a restart, a proxy that waits for it.
_MAY_PASS = (408, 425, 429, 500, 502, 503, 504)
_ATTEMPTS = 4
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 20.0
# A server that is silent for a whole time limit is asked once more only.
_TIMEOUTS = 2
_MOST_BYTES, _PIECE = 1 << 26, 1 << 16
# How servers say that they do not know a field, or not this value of it.
_NOT_TAKEN = (400, 405, 422, 500, 501)
# Answers of one request where the server can; several requests per prompt show whether they repeat each other.
_ANSWERS_PER_REQUEST = 25
# Alternatives of a token asked for; servers have different limits, and 0 stands for no log-probabilities.
_ALTERNATIVES = (20, 5, 0)

Prompt = Sequence[Mapping[str, str]] | Sequence[int]


@dataclass(frozen=True)
class Token:
    """A token as the server shows it: text, log-probability, and the log-probabilities of tokens in its stead."""

    text: str
    log_prob: float
    alternatives: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """One draw.

    Attributes:
      text: as the server decodes it; empty where all of it was reasoning.
      is_cut: whether it ran into the limit of tokens.
      has_reasoning: whether a reasoning trace came with it, apart from the text.
      tokens: empty where the server gives no log-probabilities.
    """

    text: str
    is_cut: bool
    has_reasoning: bool
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Reply:
    """The answers to one request, and the length of the prompt by the server's own count (None: not said)."""

    answers: tuple[Answer, ...]
    prompt_tokens: int | None


class _Refused(Exception):
    """The server answered with an error that a retry does not mend."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host, or turn the request into a GET."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


class Endpoint:
    """A server's OpenAI-compatible API.

    Args:
      url: up to and including `/v1`.
      model: the name by which the server knows the model.
      key: the API key; empty for none.
      timeout: seconds that a request may take.
      parallel: requests at a time.
      fields: of every request beside the usual ones, such as `{"temperature": 1}`; they win over these.
    """

    def __init__(
        self, url: str, model: str, *, key: str, timeout: float, parallel: int, fields: Mapping[str, Any]
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--endpoint={url} must begin with http:// or https://, as in http://localhost:8000/v1")
        if not _is_address(url):
            raise UserError(f"--endpoint={url} is no address; write it as http://localhost:8000/v1")
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                "the API key holds line breaks or letters beyond ASCII, which no request can carry; set it again in "
                "the environment"
            )
        self._url, self._model, self._key, self._timeout = url.rstrip("/"), model, key, timeout
        self._parallel, self._fields = parallel, fields
        self._opener = urllib.request.build_opener(_NoRedirect)

    def check(self) -> None:
        """Refuses a server that is down or no such API, and a model that it does not have.

        Raises:
          UserError: as said.
        """
        try:
            listed = self._request("/models")
        except _Refused as error:
            if error.status in (401, 403):
                raise self._told(error) from error
            return  # not every server lists its models
        try:
            names = [entry["id"] for entry in listed["data"]]
        except (LookupError, TypeError):
            raise UserError(
                f"--endpoint={self._url} lists no models: it answers {json.dumps(listed)[:80]!r}; "
                "give the address of an OpenAI-compatible API, up to /v1"
            ) from None
        if names and self._model not in names:
            raise UserError(f"--model={self._model} is not served at {self._url}; it has {', '.join(names[:12])}")

    def draw(self, prompts: Sequence[Prompt], *, num: int, max_tokens: int) -> list[list[Reply]]:
        """At least `num` answers to every prompt, by request; prompts are messages, or token ids for completions.

        Raises:
          UserError: the server is down, too slow, refuses, or answers what is no completion.
        """
        try:
            first, settings = self._first(prompts[0], min(_ANSWERS_PER_REQUEST, -(-num // 2)), max_tokens)
            # Servers may ignore `n`.
            requests = -(-num // len(first.answers))
            waiting = [index for _ in range(requests) for index in range(len(prompts))][1:]
            replies: list[list[Reply]] = [[] for _ in prompts]
            replies[0].append(first)
            pool = ThreadPoolExecutor(self._parallel)
            try:
                found = pool.map(lambda index: self._ask(prompts[index], settings), waiting)
                with Progress("ask", total=len(waiting), unit="request") as progress:
                    for index, reply in zip(waiting, found, strict=True):
                        replies[index].append(reply)
                        progress.advance()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            return replies
        except _Refused as error:
            raise self._told(error) from error

    def _first(self, prompt: Prompt, answers: int, max_tokens: int) -> tuple[Reply, dict[str, Any]]:
        """The first reply, and the settings that it was given for: the most that the server takes."""
        is_chat = isinstance(prompt[0], Mapping)
        # Log-probabilities say more than the speed of several answers at a time is worth.
        orders = [(n, k) for k in _ALTERNATIVES[:-1] for n in (answers, 1)] + [(answers, 0), (1, 0)]
        for n, alternatives in orders:
            settings: dict[str, Any] = {"n": n} if n > 1 else {}
            settings["max_tokens"] = max_tokens
            if alternatives:
                settings |= {"logprobs": True, "top_logprobs": alternatives} if is_chat else {"logprobs": alternatives}
            try:
                return self._ask(prompt, settings), settings
            except _Refused as error:
                if error.status not in _NOT_TAKEN or (n, alternatives) == orders[-1]:
                    raise
        raise AssertionError("the last order returns or raises")

    def _ask(self, prompt: Prompt, settings: Mapping[str, Any]) -> Reply:
        is_chat = isinstance(prompt[0], Mapping)
        path, asked = ("/chat/completions", "messages") if is_chat else ("/completions", "prompt")
        reply = self._request(path, {"model": self._model, asked: list(prompt), **settings, **self._fields})
        try:
            answers = tuple((_chat_answer if is_chat else _completion)(choice) for choice in reply["choices"])
            counted = (reply.get("usage") or {}).get("prompt_tokens")
        except (LookupError, TypeError, ValueError, AttributeError):
            answers, counted = (), None
        if not answers:
            raise UserError(f"{self._url}{path} answers what is no completion: {json.dumps(reply)[:120]}")
        return Reply(answers, counted if isinstance(counted, int) else None)

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer to a request, tried again where it may pass.

        Raises:
          UserError: the server is down, too slow, or answers no JSON.
          _Refused: it answers with an error.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url + path, data=data, headers=headers)
        timeouts, problem = 0, ""
        for attempt in range(_ATTEMPTS):
            delay = min(_FIRST_DELAY * 2**attempt, _LONGEST_DELAY)
            try:
                return self._parsed(request, self._read(request))
            except urllib.error.HTTPError as error:
                with error:
                    message = _said(error)
                if error.code not in _MAY_PASS or attempt + 1 == _ATTEMPTS:
                    raise _Refused(error.code, message) from error
                asked = error.headers.get("Retry-After", "")
                delay = min(float(asked), _LONGEST_DELAY) if asked.isdecimal() else delay
            except TimeoutError as error:
                timeouts += 1
                if timeouts == _TIMEOUTS:
                    raise UserError(
                        f"{self._url}{path} did not answer within {self._timeout:g} seconds, {_TIMEOUTS} times; raise "
                        "--timeout, or lower --parallel"
                    ) from error
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                problem = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
            if attempt + 1 < _ATTEMPTS:
                time.sleep(delay)
        raise UserError(f"--endpoint={self._url} cannot be reached ({problem}); start the server, or mend the address")

    @staticmethod
    def _parsed(request: urllib.request.Request, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            raise UserError(
                f"{request.full_url} answers no JSON but {content[:60]!r}; give the address of an OpenAI-compatible "
                "API, up to /v1"
            ) from error

    def _read(self, request: urllib.request.Request) -> bytes:
        """The body of the answer; the time limit holds for all of it, however slowly it comes."""
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                parts, size = [], 0
                while part := response.read1(_PIECE):
                    parts.append(part)
                    size += len(part)
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    if size > _MOST_BYTES:
                        raise UserError(
                            f"{request.full_url} answers more than {_MOST_BYTES >> 20} MiB; no completion is so long"
                        )
                return b"".join(parts)
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TimeoutError from error
            raise

    def _told(self, error: _Refused) -> UserError:
        """What a refusal says to the user, without the key, which servers may repeat."""
        said = str(error).replace(self._key, "***") if self._key else str(error)
        if error.status in (401, 403):
            return UserError(f"{self._url} refuses the API key ({error.status}: {said}); set it in the environment")
        if error.status == 404:
            return UserError(f"{self._url} has no such model or path (404: {said}); check --model and --endpoint")
        if 300 <= error.status < 400:
            return UserError(f"{self._url} sends elsewhere ({error.status}); give the final address as --endpoint")
        return UserError(f"{self._url} refuses the request ({error.status}: {said}); check --model and --request")


def _is_address(url: str) -> bool:
    """Whether a request can go there: it names a host, and a port that is a number; all else is written in ASCII."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        return bool(host) and parts.port != 0 and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        return False


def _said(error: urllib.error.HTTPError) -> str:
    """The message in the body of an error, whichever form it has."""
    try:
        content = error.read(_PIECE).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        found = json.loads(content)
        for name in ("error", "message", "detail"):
            found = found.get(name, found) if isinstance(found, dict) else found
        content = found if isinstance(found, str) else json.dumps(found)
    except ValueError:
        pass
    return " ".join(content.split())[:200] or str(error.reason)


def _chat_answer(choice: Mapping[str, Any]) -> Answer:
    message = choice["message"]
    content = message.get("content") or ""
    if not isinstance(content, str):
        raise TypeError("an answer is text")
    listed = (choice.get("logprobs") or {}).get("content") or ()
    tokens = tuple(
        Token(
            entry["token"],
            float(entry["logprob"]),
            {t["token"]: float(t["logprob"]) for t in entry.get("top_logprobs") or ()},
        )
        for entry in listed
    )
    has_reasoning = bool(message.get("reasoning_content") or message.get("reasoning"))
    return Answer(content, choice.get("finish_reason") == "length", has_reasoning, tokens)


def _completion(choice: Mapping[str, Any]) -> Answer:
    if not isinstance(choice["text"], str):
        raise TypeError("an answer is text")
    found = choice.get("logprobs") or {}
    tokens, log_probs = found.get("tokens") or (), found.get("token_logprobs") or ()
    alternatives = found.get("top_logprobs") or [{}] * len(tokens)
    listed = tuple(
        Token(token, float(log_prob), {name: float(value) for name, value in (others or {}).items()})
        for token, log_prob, others in zip(tokens, log_probs, alternatives, strict=True)
        if log_prob is not None
    )
    return Answer(choice["text"], choice.get("finish_reason") == "length", False, listed)
