"""Keeping what the base does: beside PyTorch and PEFT, under meshes, accumulation and resume."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from cft_jax.checkpoints import from_pretrained
from cft_jax.common.errors import UserError
from cft_jax.common.writer import read_metrics
from cft_jax.config import KeepConfig
from cft_jax.data.kept import kept_texts
from cft_jax.objectives.batch_loss import head_options
from cft_jax.sharding.mesh import make_mesh
from cft_jax.train.keep import keep_options
from cft_jax.train.optimizer import adamw
from cft_jax.train.prefetch import put_kept
from cft_jax.train.remembered import _require_memory, remember_base
from cft_jax.train.state import initial_state, split_model, state_shardings
from cft_jax.train.step import StepOptions, make_train_step

WEIGHT = 0.7
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small random Llama with logits of order one."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 10,
    }
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.15, **sizes)
    directory = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def torch_answers(model, batch):
    """Log-softmaxes of the target positions [B, P, V], their targets as a dense array, and their weights."""
    tokens = torch.tensor(batch.tokens).long()
    logits = model(tokens, attention_mask=torch.tensor(batch.subtree_end > 0).long()).logits.float()
    rows = torch.arange(tokens.shape[0])[:, None]
    targets = torch.zeros(*batch.target_index.shape, logits.shape[-1])
    targets[rows, torch.tensor(batch.target_position).long(), torch.tensor(batch.target_ids).long()] += torch.tensor(
        batch.target_probs
    )
    return logits[rows, torch.tensor(batch.target_index).long()], targets


def kl(base, model):
    q, p = torch.log_softmax(base, -1), torch.log_softmax(model, -1)
    return torch.where(q > -1e20, q.exp() * (q - p), 0.0).sum(-1)


def torch_losses(model, frozen, batch, kept, kind):
    """The mean losses of the answers and of what is kept, by whole rows of logits."""
    logits, targets = torch_answers(model, batch)
    weight, total = torch.tensor(batch.target_weight), float(batch.row_weight.sum())
    loss = torch.special.xlogy(targets, targets).sum(-1) - (targets * torch.log_softmax(logits, -1)).sum(-1)
    answers = (weight * loss).sum() / total
    if kind == "off_support":
        with torch.no_grad():
            before, _ = frozen(lambda model: torch_answers(model, batch))
        masked = [torch.where(targets > 0, torch.tensor(-1e30), x) for x in (before, logits)]
        return answers, (weight * kl(*masked)).sum() / total
    losses = []
    for row in range(len(kept.tokens)):
        starts = np.flatnonzero((kept.positions[row] == 0) & (kept.subtree_end[row] > 0))
        for start in starts:
            ids = torch.tensor(kept.tokens[row, start : kept.subtree_end[row, start]])[None].long()
            scores = model(ids).logits[0, :-1].float()
            if kind == "replay":
                losses.append(torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="none"))
            else:
                with torch.no_grad():
                    before = frozen(lambda model, ids=ids: model(ids).logits[0, :-1].float())
                losses.append(kl(before, scores))
    return answers, torch.cat(losses).mean()


def torch_step(base, adapter, batch, kept, kind):
    """Both losses, and the gradients of their weighted sum by name."""
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is None:
        start = copy.deepcopy(model)
        # Somewhere else than at the base, where the divergence and its gradient are zero.
        with torch.no_grad():
            torch.manual_seed(2)
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape) * parameter.std())
        model.save_pretrained(base / "moved")

        def frozen(ask):
            return ask(start)
    else:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(TARGETS)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(adapter)

        def frozen(ask):
            with model.disable_adapter():
                return ask(model)

    losses = torch_losses(model, frozen, batch, kept, kind)
    (losses[0] + WEIGHT * losses[1]).backward()
    return [loss.item() for loss in losses], {n: p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}


def our_step(base, adapter, batch, texts, kind, put):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    load = {"dtype": jnp.float32, "param_dtype": jnp.float32, "mesh": mesh}
    model = from_pretrained(base, adapter=adapter, **load)
    parts, weights, frozen = split_model(model)
    optimizer = adamw(weight_decay=0.0, max_grad_norm=0.0)
    keep = keep_options(model, KeepConfig(weight=WEIGHT, kind=kind))
    loss = head_options("soft", tau=1.0, softcap=None, mesh=mesh)
    options = StepOptions(loss, (), 1, 11, optimizer, lambda step: jnp.float32(0), keep)
    kept = None
    if kind != "off_support":
        frozen, texts = remember_base(model, frozen, texts, keep, steps=1)
        kept = put_kept(texts.batch(0), mesh)
    if adapter is None:
        weights = split_model(from_pretrained(base / "moved", **load))[1]
    step = make_train_step(parts, options, state_shardings(weights, optimizer))
    state, metrics = step(initial_state(weights, optimizer), frozen, put(batch, mesh), kept)
    gradients = {name: 10 * np.asarray(mu, np.float64) for name, mu in state.optimizer[0].mu.items()}
    return [float(metrics.loss), float(metrics.keep_loss)], gradients


def assert_close(ours, theirs):
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


@pytest.mark.parametrize("kind", ["kl", "off_support", "replay"])
def test_losses_and_gradients_as_with_peft(tmp_path, base, make_batch, make_texts, put, kind):
    batch, texts = make_batch(0), make_texts()
    expected, gradients = torch_step(base, tmp_path / "adapter", batch, texts.batch(0), kind)
    losses, ours = our_step(base, tmp_path / "adapter", batch, texts, kind, put)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for layer in range(2):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            block = f"stacks/0/0/{name.replace('self_attn.', 'attn/').replace('.', '/')}/lora"
            a, b = (gradients[f"base_model.model.model.layers.{layer}.{name}.lora_{x}.default.weight"] for x in "AB")
            assert_close(ours[f"{block}/a"][layer].reshape(-1, 4).T, a)
            assert_close(ours[f"{block}/b"][layer].reshape(4, -1).T, b)


def test_a_model_trained_in_full_remembers_its_base(base, make_batch, make_texts, put):
    batch, texts = make_batch(0), make_texts(per_step=4)
    expected, gradients = torch_step(base, None, batch, texts.batch(0), "kl")
    losses, ours = our_step(base, None, batch, texts, "kl", put)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # The embedding is at both ends of the untied model's two matrices.
    for name, key in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        assert_close(ours[name], gradients[key])


@pytest.mark.parametrize("kind", ["kl", "off_support"])
def test_exact_under_meshes_and_accumulation(new_trainer, make_batch, make_texts, kind):
    """One device and one part against eight devices and two parts, with tokens that all rows share."""
    keep = KeepConfig(weight=WEIGHT, kind=kind)
    options = {"keep": keep, "shared_prefix": (7, 3), "rate": 1e-2}
    whole, parts = new_trainer(**options), new_trainer(mesh=(2, 2, 2), micro_batches=2, **options)
    for step in range(2):
        batch = make_batch(step)
        batch = batch._replace(positions=np.where(batch.subtree_end > 0, batch.positions + 2, 0))
        kept = [None if kind == "off_support" else make_texts(rows).batch(step) for rows in (1, 8)]
        one, other = whole.run(batch, kept[0]), parts.run(batch, kept[1])
        np.testing.assert_allclose([other.loss, other.keep_loss], [one.loss, one.keep_loss], rtol=2e-5)
    assert one.keep_loss > 0
    moments = [jax.device_get(trainer.state.optimizer[0].mu) for trainer in (whole, parts)]
    for name, moment in moments[0].items():
        assert_close(moments[1][name], moment)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_killed_and_resumed_runs_have_the_same_bits(tmp_path, run, make_texts, lora):
    options = {"keep_weight": WEIGHT, "kept": make_texts(), "lora": lora}
    _, whole = run(tmp_path / "whole", **options)
    run(tmp_path / "part", max_steps=4, **options)
    result, resumed = run(tmp_path / "part", **options)
    assert result.step == 15
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    losses = []
    for which in ("whole", "part"):
        rows = read_metrics(tmp_path / which / "metrics.jsonl")
        losses.append({row["step"]: (row["loss"], row["keep_loss"]) for row in rows})
    assert losses[0].items() <= losses[1].items()
    assert losses[0][15][1] > 0
    _, without = run(tmp_path / "without", lora=lora)
    assert any(not np.array_equal(whole[name], without[name]) for name in whole)
    first = read_metrics(tmp_path / "without" / "metrics.jsonl")[0]
    # Nothing has moved before the first step: the answers' loss is the same, and the base is no distance away.
    assert first["loss"] == pytest.approx(losses[0][1][0]) and "keep_loss" not in first
    if not lora:
        assert losses[0][1][1] == pytest.approx(0, abs=1e-6)


def test_only_what_the_steps_see_is_remembered(make_model, make_texts):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = make_model(mesh=mesh, lora=False)
    keep, texts = keep_options(model, KeepConfig(weight=WEIGHT)), make_texts(per_step=2)
    some, every = (remember_base(model, {}, texts, keep, steps=steps)[1] for steps in (2, 100))
    assert some.base[0].size == 4 < every.base[0].size == len(texts.rows.tokens)
    for step in range(2):
        np.testing.assert_array_equal(some.batch(step).base_hidden, every.batch(step).base_hidden)
    with pytest.raises(UserError, match=r"of 3 rows of kept texts takes 6\.0 GiB .* more than half of its 8"):
        _require_memory(6 * 2**30, rows=3, available=8 * 2**30)


def test_a_run_is_not_resumed_to_keep_another_base(tmp_path, run, make_texts):
    options = {"keep_weight": WEIGHT, "kept": make_texts(), "lora": False}
    run(tmp_path, max_steps=1, **options)
    with pytest.raises(UserError, match="trained to keep another base"):
        run(tmp_path, max_steps=2, model_seed=1, **options)


def test_rows_hold_whole_texts_and_come_equally_often():
    texts = [list(range(1, size + 1)) for size in (3, 7, 12, 25, 1)]
    kept = kept_texts(texts, length=12, per_step=2, row_multiple=4, seed=0)
    # Of 25 tokens two pieces of 12, and one left over that predicts nothing; a text of one token neither.
    assert kept.rows.weight.sum() == 2 + 6 + 11 + 11 + 11 and len(kept.rows.tokens) == 4
    seen = np.concatenate([kept.batch(step).tokens[:2] for step in range(4)])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, kept.rows.tokens.tolist() * 2))
    assert kept.batch(0).tokens.shape == (4, 12) and not kept.batch(0).weight[2:].any()
    for row in range(4):
        inside = kept.rows.weight[row] > 0
        assert np.array_equal(kept.rows.next_tokens[row][inside], kept.rows.tokens[row, 1:][inside[:-1]])
    with pytest.raises(ValueError, match="at least two tokens"):
        kept_texts([[5]], length=12, per_step=2, row_multiple=1, seed=0)
