"""One example in words."""

import numpy as np

from cft_jax.data.render import render_example

NONE = np.zeros(0, dtype=np.int32)


def test_an_example_shows_prompt_answer_and_loss(small_tokenizer, forest_of, examples_for, batch_of):
    def ids(text):
        return tuple(small_tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = np.array(ids("<s>u\nab: x</s>"), dtype=np.int32)
    assert prompt.size == 8  # "ab" is one token
    forest = forest_of({ids("12"): 0.5, ids("12.5"): 0.25, ids("axe"): 0.25})
    one = render_example(small_tokenizer, batch_of(examples_for(forest, [{2: 1.0}], prompts=[prompt])), NONE)
    first, last = (", ".join(map(str, part)) for part in (prompt[:6], prompt[-6:]))
    assert one.splitlines() == [
        "one example, as the model sees it:",
        "  prompt: '<s>u\\nab: x</s>'",
        f"  its token ids: {first}, ..., {last} (8 tokens)",
        "  answers: 'axe'",
        "  loss at 4 of 11 positions: 7-10",
    ]
    two = render_example(small_tokenizer, batch_of(examples_for(forest, [{1: 1.0, 2: 1.0}], prompts=[prompt])), NONE)
    assert "  answers: 'axe', '12.5'" in two  # in the order of token ids
    many = forest_of({ids(f"x{number}"): 0.1 for number in range(9, -1, -1)})
    everything = {number: 1.0 for number in range(10)}
    assert " and 4 more" in render_example(
        small_tokenizer, batch_of(examples_for(many, [everything], prompts=[prompt])), NONE
    )


def test_a_row_of_padding_is_called_that(small_tokenizer, forest_of, examples_for, batch_of, spaces, prompts):
    batch = batch_of(examples_for(forest_of(*spaces[:1]), [{0: 1.0}], prompts=prompts[:1]), num_rows=2)
    assert render_example(small_tokenizer, batch, NONE, row=1) == "a row of padding"


def test_of_packed_rows_and_shared_prefixes_the_first_example_is_shown_whole(
    small_tokenizer, forest_of, examples_for, batch_of
):
    def ids(text):
        return tuple(small_tokenizer(text, add_special_tokens=False)["input_ids"])

    prompts = [np.array(ids(text), dtype=np.int32) for text in ("<s>xy", "<s>xz")]
    forest = forest_of({ids("e"): 1.0}, {ids("f"): 1.0})
    examples = examples_for(forest, [{0: 1.0}, {0: 1.0}], prompts=prompts)
    batch = batch_of(examples, rows=[0, 0], shared=2)
    lines = render_example(small_tokenizer, batch, prompts[0][:2]).splitlines()
    assert lines[1] == "  prompt: '<s>xy'"
    assert lines[3:] == ["  answers: 'e'", "  loss at 2 of 4 positions: 2-3"]
