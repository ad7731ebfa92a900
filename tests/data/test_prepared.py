"""Prepared tasks: prompts and tries as built one by one, found in the cache exactly when nothing changed."""

import dataclasses

import numpy as np
import pytest

from cft_jax.common.errors import UserError
from cft_jax.config import ChatConfig, DataConfig
from cft_jax.data import prepared as prepared_module
from cft_jax.data.prepared import prepare
from cft_jax.distributions import OutputSpace, PromptSpec, Task, space_settings, task_from_spec
from cft_jax.text.chat import encode_chat
from cft_jax.text.scratch import train_tokenizer
from cft_jax.text.trie import build_trie

DICE = OutputSpace(tuple("123456"), np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.5]))


def family_task(sigma=1.0):
    parameters = {"mu": 0.0, "sigma": sigma}
    return task_from_spec(PromptSpec("train", "gaussian", f"gaussian_{sigma}", parameters, f"A Gaussian of {sigma}."))


def listed_task(space=DICE, text="Roll."):
    return Task("train", "custom", "die", ({"role": "user", "content": text},), space=space)


@pytest.fixture
def data(tmp_path):
    return DataConfig(num_decimals=1, max_bins=60, cache_dir=str(tmp_path))


def test_tries_and_prompts_are_those_built_alone(small_tokenizer, data):
    tasks = [family_task(), listed_task(), family_task(3.0)]
    for _ in range(2):  # built, then from the cache
        found = prepare(small_tokenizer, tasks, data)
        end = small_tokenizer.eos_token_id
        assert found.forest.terminator_id == end
        for index, task in enumerate(tasks):
            assert found.prompts[index].tolist() == encode_chat(small_tokenizer, task.messages)
            space = task.output_space(space_settings(data))
            alone, trie = build_trie(small_tokenizer, space, end), found.forest.trie(index)
            assert trie.leaves()[0] == alone.leaves()[0]
            np.testing.assert_allclose(trie.child_probs, alone.child_probs, rtol=1e-14)
            assert found.depths[index] == alone.max_depth
    assert found.from_cache
    counts = found.statistics()
    tries = [found.forest.trie(index) for index in range(3)]
    assert counts["prompts"] == 3
    assert counts["prefixes"] == sum(trie.num_prefixes for trie in tries)
    assert counts["values"] == sum(trie.leaf_prefix.size for trie in tries)
    assert counts["max_children"] == max(trie.max_children for trie in tries)
    assert counts["bytes"] > counts["prefixes"] * 24


def test_at_full_resolution_only_listed_tasks_are_listed(data):
    tokenizer = train_tokenizer(["A Gaussian of 1.0.", "Roll."] * 2, vocab_size=300)
    tasks = [listed_task(), family_task(), listed_task(), family_task(2.0)]
    found = prepare(tokenizer, tasks, dataclasses.replace(data, space="full"))
    assert found.is_analytic.tolist() == [False, True, False, True]
    assert len(found.forest) == len(found.analytic) == 2
    assert found.analytic[1].space.last > found.analytic[0].space.last
    assert found.statistics()["values"] == 12


def test_no_tasks_prepare_to_nothing(small_tokenizer, data):
    found = prepare(small_tokenizer, [], data)
    assert found.statistics() == dict.fromkeys(found.statistics(), 0)


CHANGES = {
    "decimals": lambda tasks, data: (tasks, dataclasses.replace(data, num_decimals=2)),
    "bins": lambda tasks, data: (tasks, dataclasses.replace(data, max_bins=50)),
    "quantile": lambda tasks, data: (tasks, dataclasses.replace(data, quantile_low=0.01)),
    "tails": lambda tasks, data: (tasks, dataclasses.replace(data, tail_policy="drop")),
    "bos": lambda tasks, data: (tasks, dataclasses.replace(data, duplicate_bos=True)),
    "date": lambda tasks, data: (tasks, dataclasses.replace(data, chat=ChatConfig(date="2025-01-01"))),
    "terminator": lambda tasks, data: (tasks, dataclasses.replace(data, terminator="<s>")),
    "parameters": lambda tasks, data: ([family_task(1.5), *tasks[1:]], data),
    "order": lambda tasks, data: (tasks[::-1], data),
    "prompt": lambda tasks, data: ([tasks[0], listed_task(text="Roll!")], data),
    "probabilities": lambda tasks, data: (
        [tasks[0], listed_task(OutputSpace(DICE.values, DICE.probabilities[::-1]))],
        data,
    ),
    "values": lambda tasks, data: (
        [tasks[0], listed_task(OutputSpace(tuple("abcdef"), DICE.probabilities))],
        data,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_shapes_the_data_is_in_the_key(small_tokenizer, data, change):
    tasks = [family_task(), listed_task()]
    prepare(small_tokenizer, tasks, data)
    assert prepare(small_tokenizer, [family_task(), listed_task()], data).from_cache
    assert not prepare(small_tokenizer, *CHANGES[change](tasks, data)).from_cache


def test_the_tokenizer_and_the_code_are_in_the_key(small_tokenizer, data, monkeypatch):
    tasks = [listed_task()]
    prepare(small_tokenizer, tasks, data)
    monkeypatch.setattr(prepared_module, "_code_digest", lambda: "another version")
    assert not prepare(small_tokenizer, tasks, data).from_cache
    small_tokenizer.chat_template += "\n"
    assert not prepare(small_tokenizer, tasks, data).from_cache


def test_what_does_not_shape_the_data_is_not_in_the_key(small_tokenizer, data):
    prepare(small_tokenizer, [listed_task()], data)
    assert prepare(small_tokenizer, [listed_task()], dataclasses.replace(data, max_length=300)).from_cache


def test_the_default_cache_follows_the_environment(small_tokenizer, data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepare(small_tokenizer, [listed_task()], dataclasses.replace(data, cache_dir=""))
    assert (tmp_path / "xdg" / "cft_jax" / "data").is_dir()


def test_the_longest_prompt_is_named(small_tokenizer, data):
    # By hand: <s> u newline, five for "Roll.", </s>, <s> a newline; then a digit and the terminator: 14 tokens.
    tasks = [listed_task()]
    prepare(small_tokenizer, tasks, dataclasses.replace(data, max_length=14))
    with pytest.raises(UserError, match=r"task die: .* up to 14 tokens .* config\.data\.max_length=13 \(1 of 1 tasks"):
        prepare(small_tokenizer, tasks, dataclasses.replace(data, max_length=13))
