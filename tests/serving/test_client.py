"""A user's mistakes with a server: one line each, in bounded time, and the key in none of them."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cft_jax import check
from cft_jax.common.errors import UserError
from cft_jax.serving import client
from cft_jax.serving.client import Endpoint

KEY = "sk-secret"
MESSAGES = [{"role": "user", "content": "Coin?"}]
HEADS = {"message": {"content": "heads"}, "finish_reason": "stop"}


@pytest.fixture
def serve(monkeypatch):
    """A server that gives these answers, one after the other, the last again and again: status, body, headers."""
    monkeypatch.setattr(client, "_FIRST_DELAY", 0.01)
    servers = []

    def start(*answers, wait=0.0, trickle=0.0):
        seen, left = [], list(answers)

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                seen.append((self.path, json.loads(body or "null"), self.headers.get("Authorization")))
                status, answer, headers = left.pop(0) if len(left) > 1 else left[0]
                stopped.wait(wait)
                content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for byte in content if trickle else ():
                    self.wfile.write(bytes([byte]))
                    if stopped.wait(trickle):
                        return
                if not trickle:
                    self.wfile.write(content)

            do_POST = do_GET

        server, stopped = ThreadingHTTPServer(("127.0.0.1", 0), Handler), threading.Event()
        server.handle_error = lambda *_: None  # a client that hangs up
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append((server, stopped))
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield start
    for server, stopped in servers:
        stopped.set()
        server.shutdown()
        server.server_close()


def endpoint(url, **settings):
    return Endpoint(url, "coin", **{"key": KEY, "timeout": 5.0, "parallel": 2, "fields": {}, **settings})


def models(*names):
    return 200, {"data": [{"id": name} for name in names]}, {}


def chat(*choices):
    return 200, {"choices": list(choices or [HEADS]), "usage": {"prompt_tokens": 7}}, {}


def draw(url, num=2, **settings):
    return endpoint(url, **settings).draw([MESSAGES], num=num, max_tokens=8)


def test_what_is_asked(serve):
    url, seen = serve(chat())
    draw(url, fields={"temperature": 1, "max_tokens": 3})
    path, asked, key = seen[0]
    assert path == "/v1/chat/completions" and key == f"Bearer {KEY}"
    # Nothing about sampling but what the user names, so that the server's own defaults show.
    assert asked == {
        "model": "coin", "messages": MESSAGES, "max_tokens": 3, "temperature": 1, "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip


def test_answers_are_collected_however_many_come_at_a_time(serve):
    url, _ = serve(chat(HEADS, HEADS, HEADS))
    (replies,) = draw(url, num=7)
    assert [len(reply.answers) for reply in replies] == [3, 3, 3]
    assert replies[0].prompt_tokens == 7 and replies[0].answers[0].text == "heads"


def test_an_answer_without_text(serve):
    silent = {"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "length"}
    url, _ = serve(chat(silent))
    answer = draw(url)[0][0].answers[0]
    assert (answer.text, answer.is_cut, answer.has_reasoning) == ("", True, True)


def test_what_may_pass_is_tried_again(serve):
    busy = (503, {"error": {"message": "loading"}}, {})
    url, seen = serve(busy, (429, "", {"Retry-After": "0"}), chat())
    assert draw(url)[0][0].answers and len(seen) == 4  # two of them for the two answers


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, {"error": {"message": "it\nbroke"}}, {}), "refuses the request (500: it broke)"),
        (
            (401, {"error": {"message": f"Incorrect API key: {KEY}"}}, {}),
            "refuses the API key (401: Incorrect API key: ***)",
        ),
        ((404, {"message": "no such model"}, {}), "has no such model or path (404: no such model)"),
        ((400, {"detail": "too long"}, {}), "refuses the request (400: too long)"),
        ((302, "", {"Location": "http://elsewhere.example/v1"}), "sends elsewhere (302)"),
        ((200, "<html>hello</html>", {}), "answers no JSON but"),
        ((200, {"choices": []}, {}), "answers what is no completion"),
        ((200, {"choices": [{"text": "heads"}]}, {}), "answers what is no completion"),
        ((200, ["heads"], {}), "answers what is no completion"),
        ((200, {"choices": [{"message": {"content": 7}}]}, {}), "answers what is no completion"),
    ],
)
def test_answers_that_are_none(serve, answer, said):
    url, _ = serve(answer)
    with pytest.raises(UserError) as error:
        draw(url)
    assert said in str(error.value) and KEY not in str(error.value) and "\n" not in str(error.value)


def test_a_key_from_a_file_ends_in_a_line_break(serve):
    url, seen = serve(chat())
    draw(url, key=f"{KEY}\n")
    assert seen[0][2] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"„{KEY}“"])
def test_a_key_that_no_request_can_carry_is_not_shown(key):
    with pytest.raises(UserError, match="set it again in the environment") as error:
        endpoint("http://127.0.0.1:9/v1", key=key)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://host:eighty/v1", "http:///v1", "http://a..b/v1", "http://host/ü", "http://a b/"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="is no address; write it as"):
        endpoint(url)


@pytest.mark.parametrize("slow", [{"wait": 3.0}, {"trickle": 0.05}], ids=["silent", "byte by byte"])
def test_a_slow_server(serve, slow):
    url, seen = serve((200, {"choices": ["heads"] * 20}, {}), **slow)
    with pytest.raises(UserError, match=r"did not answer within 0\.2 seconds, 2 times; raise --timeout"):
        draw(url, timeout=0.2)
    assert len(seen) == 2


@pytest.fixture
def attempt(monkeypatch, capsys, log_restored):
    """Runs the command; returns its exit code and the last line of stderr; the key is nowhere."""

    def run(*arguments):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setattr(sys, "argv", ["check", *arguments])
        with pytest.raises(SystemExit) as stopped:
            check.main()
        out, err = capsys.readouterr()
        assert KEY not in out + err and "Traceback" not in err
        return stopped.value.code, err.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--endpoint=URL",), "--model, --run missing"),
        (("--endpoint=localhost:8000", "--model=coin", "--run=r"), "must begin with http:// or https://"),
        (("--endpoint=URL", "--model=dice", "--run=r"), "--model=dice is not served at URL; it has coin, card"),
        (("--endpoint=URL", "--model=coin", "--run=/no/where"), "/no/where"),
        (("--endpoint=URL", "--model=coin", "--run=r", "--request=x"), "--request=x is no JSON"),
        (("--endpoint=URL", "--model=coin", "--run=r", "--request=[]"), "--request=[] is no JSON object"),
        (("--endpoint=URL", "--model=coin", "--run=r", "--output=/tmp"), "--output=/tmp is a directory"),
        (("--endpoint=URL", "--model=coin", "--run=r", "--num=1"), "num"),
    ],
)
def test_mistakes_in_the_command(serve, attempt, arguments, said):
    url, _ = serve(models("coin", "card"))
    code, line = attempt(*(argument.replace("URL", url) for argument in arguments))
    assert code == 2 and line.startswith("error: ") and said.replace("URL", url) in line


def test_a_server_that_is_down(serve, attempt):
    code, line = attempt("--endpoint=http://127.0.0.1:9/v1", "--model=coin", "--run=r")
    assert code == 2 and "cannot be reached" in line and "start the server, or mend the address" in line


def test_another_kind_of_server(serve, attempt):
    url, _ = serve((200, {"hello": "world"}, {}))
    code, line = attempt(f"--endpoint={url}", "--model=coin", "--run=r")
    assert code == 2 and "lists no models" in line
