"""Whether the hub answers: a server that says no does, a closed port does not."""

import http.server
import threading

import pytest
from huggingface_hub import constants

from cft_jax.common import hub_access


@pytest.fixture
def answers(monkeypatch):
    """Asks anew at an address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "_PAUSES", (0.0, 0.0))

    def ask(address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        hub_access.hub_answers.cache_clear()
        return hub_access.hub_answers()

    yield ask
    hub_access.hub_answers.cache_clear()


def test_a_server_that_refuses_answers_and_a_closed_port_does_not(answers):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(503)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert answers(address)
        server.shutdown()
    assert not answers(address)


def test_offline_asks_nobody(answers, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_access, "get_session", lambda: pytest.fail("the hub was asked"))
    assert not answers("http://127.0.0.1:9")
