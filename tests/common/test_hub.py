"""Hub ids: what is downloaded, and one clear line for everything that can go wrong."""

import fnmatch
import http.server
import inspect
import threading
import types

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from cft_jax.checkpoints import from_pretrained
from cft_jax.common import hub
from cft_jax.common.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(monkeypatch, tmp_path):
    """Stands in for the hub; refuses arguments that the real function does not take."""
    real = inspect.signature(huggingface_hub.snapshot_download)
    calls = []

    def set_outcome(outcome):
        def fake(*args, **kwargs):
            bound = real.bind(*args, **kwargs)
            calls.append(bound.arguments)
            if isinstance(outcome, Exception):
                raise outcome
            return str(outcome)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return calls

    return set_outcome


def test_a_directory_is_itself(tmp_path):
    assert hub.resolve(str(tmp_path), revision="main", local_files_only=False) == (tmp_path.resolve(), "")


def test_only_weights_and_texts_of_the_top_are_fetched(snapshot, tmp_path):
    place = tmp_path / COMMIT
    calls = snapshot(place)
    assert hub.resolve("openai/gpt-oss-20b", revision="v1", local_files_only=False) == (place, COMMIT)
    (call,) = calls
    assert call["repo_id"] == "openai/gpt-oss-20b"
    assert call["revision"] == "v1"
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer.model",
        "merges.txt",
        "original/model.safetensors",
        "metal/model.bin",
        "pytorch_model.bin",
        "modeling_evil.py",
        "consolidated.00.pth",
    ]
    taken = [
        file
        for file in files
        if any(fnmatch.fnmatch(file, pattern) for pattern in call["allow_patterns"])
        and not any(fnmatch.fnmatch(file, pattern) for pattern in call["ignore_patterns"])
    ]
    assert taken == files[:6]


def response(status):
    # The hub's client library changes with its version; its errors read these attributes alone.
    return types.SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("gated", response=response(403)), "is gated: accept its licence .* HF_TOKEN"),
        (errors.RepositoryNotFoundError("none", response=response(404)), "no public model of the hub"),
        (errors.RevisionNotFoundError("none", response=response(404)), "no revision 'v1'"),
        (errors.LocalEntryNotFoundError("offline"), "not in the local cache"),
        (errors.OfflineModeIsEnabled("offline"), "not in the local cache"),
        (errors.HfHubHTTPError("503 down\nsecond line", response=response(503)), "cannot be had from the hub"),
        (errors.HfHubHTTPError.__mro__[1]("connection reset"), "connection reset"),
        (OSError("No space left on device"), "No space left"),
    ],
)
def test_failures_end_in_one_line(snapshot, error, message):
    snapshot(error)
    with pytest.raises(UserError, match=message) as raised:
        hub.resolve("google/gemma-3-1b-it", revision="v1", local_files_only=False)
    assert "\n" not in str(raised.value)
    assert "google/gemma-3-1b-it" in str(raised.value)


@pytest.mark.parametrize("name", ["", "./nowhere", "/no/such/directory", "a/b/c", "~/nothing"])
def test_paths_that_do_not_exist(name):
    with pytest.raises(UserError, match="no such directory"):
        hub.resolve(name, revision="main", local_files_only=False)


def test_names_that_are_no_ids():
    with pytest.raises(UserError, match="no valid hub id"):
        hub.resolve("a model", revision="main", local_files_only=True)


def test_files_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        hub.resolve(str(file), revision="main", local_files_only=False)


def test_a_published_name_with_other_numbers_is_told(snapshot, tmp_path, write_hf, hf_config, caplog):
    place = tmp_path / COMMIT
    write_hf(place, hf_config("qwen3"))
    snapshot(place)
    with caplog.at_level("WARNING", logger="absl"):
        model = from_pretrained("Qwen/Qwen3-0.6B", dtype="float32", param_dtype="float32")
    assert "config.json of Qwen/Qwen3-0.6B has embed_dim=48, published was 1024" in caplog.text
    assert model.config.embed_dim == 48
    assert (model.source.name, model.source.revision) == ("Qwen/Qwen3-0.6B", COMMIT)


@pytest.fixture
def answers(monkeypatch):
    """Asks anew at an address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_PAUSES", (0.0, 0.0))

    def ask(address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        hub.hub_answers.cache_clear()
        return hub.hub_answers()

    yield ask
    hub.hub_answers.cache_clear()


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
    monkeypatch.setattr(hub, "get_session", lambda: pytest.fail("the hub was asked"))
    assert not answers("http://127.0.0.1:9")
