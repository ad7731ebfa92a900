"""Checking whether a server samples what a trained model says."""

import dataclasses
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cft_jax.common.compilation import prepare_compilers
from cft_jax.common.errors import UserError
from cft_jax.common.storage import check_file, write_file
from cft_jax.serving.advice import BASE, MOVED, PROMPT, REPEATED, advice
from cft_jax.serving.client import Endpoint, Reply
from cft_jax.serving.draws import AnswerPath, Draws
from cft_jax.serving.reference import Reference
from cft_jax.serving.verdict import Cause, Verdict, as_likely, causes, judge


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a server was found to draw.

    Attributes:
      verdict: whether it is what the model says.
      causes: what is wrong, the likeliest first; empty where nothing is.
      draws: steps along the tries of the prompts.
      replies: of the server, by prompt.
    """

    verdict: Verdict
    causes: Sequence[Cause]
    draws: Draws
    replies: Sequence[Sequence[Reply]]


def start(
    *,
    endpoint: str,
    model: str,
    run: str,
    num: int,
    prompts: int,
    request: str,
    completions: bool,
    timeout: float,
    parallel: int,
    api_key_env: str,
    output: str | None,
) -> bool:
    """The command; see its flags. Returns whether the server is calibrated.

    Raises:
      UserError: the server or the run cannot be asked, or `output` cannot be written.
    """
    fields, key = _fields(request), os.environ.get(api_key_env, "")
    if output:
        check_file(output, "check.json")
    server = Endpoint(endpoint, model, key=key, timeout=timeout, parallel=parallel, fields=fields)
    server.check()
    prepare_compilers()
    reference = Reference(run, prompts)
    result = compare(reference, server, num=num, completions=completions)
    lines = [f"{endpoint}, {model}, against {run}:", *_evidence(reference, result), *_outcome(result)]
    sys.stdout.write("\n".join(lines) + "\n")
    if output:
        head = {"endpoint": endpoint, "model": model, "run": run, "request": fields}
        write_file(output, json.dumps(head | _record(reference, result), indent=2) + "\n")
    return result.verdict.calibrated


def compare(reference: Reference, server: Endpoint, *, num: int, completions: bool = False) -> Result:
    """Asks the server for `num` answers to every prompt and holds them against the model.

    With `completions` the prompts are sent as token ids, so that no mistake can be in them.

    Raises:
      UserError: see `Endpoint.draw`.
    """
    asked = [prompt.tokens if completions else prompt.task.messages for prompt in reference.prompts]
    replies = server.draw(asked, num=num, max_tokens=reference.max_tokens)
    paths = reference.paths(replies)
    reported = reference.reported(replies, paths)
    draws = Draws.of(reference.layout, [[path for reply in own for path in reply] for own in paths])
    variants = {} if completions else reference.variants
    repetition = _repetition(reference, replies, paths)
    verdict = judge(draws, reference.model, variants, reported=reported, repetition=repetition)
    if verdict.calibrated:
        return Result(verdict, (), draws, replies)
    base = {} if reference.base is None else {BASE: reference.base}
    found = causes(draws, {"": reference.model, **variants, **base}, reported=reported)
    if verdict.is_repeated and repetition is not None:
        # Under which all but the first is certain; a greedy server repeats itself, too.
        repeated = Cause(REPEATED, (REPEATED,), -repetition, 1.0, fits=True)
        found.insert(int(bool(found) and found[0].gain > repeated.gain), repeated)
    if not found or not found[0].fits:
        kind = PROMPT if _counted_more(reference, replies) else MOVED
        found = [Cause(kind, (kind,), math.nan, kl=verdict.kl), *found]
    return Result(verdict, found, draws, replies)


def _fields(request: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(request)
    except ValueError as error:
        raise UserError(f"--request={request} is no JSON ({error}); write it as '{{\"temperature\": 1}}'") from None
    if not isinstance(fields, dict):
        raise UserError(f"--request={request} is no JSON object; write it as '{{\"temperature\": 1}}'")
    return fields


def _repetition(
    reference: Reference, replies: Sequence[Sequence[Reply]], paths: Sequence[Sequence[Sequence[AnswerPath]]]
) -> float | None:
    """Log-probability of all replies but the first of each prompt, where they are the same; None where they are not."""
    texts = [[[answer.text for answer in reply.answers] for reply in own] for own in replies]
    if any(len(own) < 2 or any(reply != own[0][: len(reply)] for reply in own) for own in texts):
        return None
    later = [[path for reply in own[1:] for path in reply] for own in paths]
    return reference.model.log_likelihood(Draws.of(reference.layout, later))


def _counted_more(reference: Reference, replies: Sequence[Sequence[Reply]]) -> int | None:
    """How many tokens more than ours the prompts have by the server's count; None where it does not say the same."""
    more = {
        None if reply.prompt_tokens is None else reply.prompt_tokens - len(prompt.tokens)
        for prompt, own in zip(reference.prompts, replies, strict=True)
        for reply in own
    }
    return more.pop() if len(more) == 1 else None


def _evidence(reference: Reference, result: Result) -> list[str]:
    """What was seen, a line each."""
    verdict, frequencies = result.verdict, result.verdict.frequencies
    answers = [answer for own in result.replies for reply in own for answer in reply.answers]
    lines = [
        f"{len(answers):,} answers to {len(reference.prompts)} prompts; {frequencies.num_left:,} are none of the "
        f"prompt's values, {frequencies.expected_left:.1f} expected",
        f"frequencies: chi-square {frequencies.chi_square:.1f} with {frequencies.degrees} degrees of freedom, "
        f"corrected p-value {frequencies.p_value:.2g}",
        f"temperature by maximum likelihood: {verdict.temperature.value:.3f} ± {verdict.temperature.error:.3f}",
        f"likelihood ratio for known mistakes: exp({verdict.log_evidence:.1f})",
    ]
    if not math.isnan(verdict.kl):
        lines.append(f"log-probabilities: KL {verdict.kl:.2g} nats per token from the model to the server")
    if verdict.reported_variant:
        lines.append(f"log-probabilities: those of {verdict.reported_variant}")
    if more := _counted_more(reference, result.replies):
        lines.append(f"prompts: {abs(more)} tokens {'more' if more > 0 else 'less'} there than here")
    if cut := sum(answer.is_cut for answer in answers):
        lines.append(f"ran into the limit of tokens: {100 * cut / len(answers):.1f} % of the answers")
    if reasoned := sum(answer.has_reasoning for answer in answers):
        lines.append(f"came with a reasoning trace: {100 * reasoned / len(answers):.1f} % of the answers")
    return lines


def _outcome(result: Result) -> list[str]:
    """The verdict, the likely cause, what to do, and what else was looked at."""
    if result.verdict.calibrated:
        return ["calibrated"]
    first = result.causes[0]
    lines = ["NOT calibrated", f"likely cause: {first.name}"]
    if alike := [cause.name for cause in as_likely(result.causes)]:
        lines.append(f"as likely: {', '.join(alike)}; more --num or --prompts may tell them apart")
    lines.append(f"what to do: {advice(first.kinds)}")
    shown = [cause for cause in result.causes if not math.isnan(cause.gain)]
    if shown:
        lines.append("explanations, by likelihood ratio to the model, nats per answer:")
    total = int(result.draws.num.sum())
    for cause in shown:
        kl = "" if math.isnan(cause.kl) else f", KL of log-probabilities {cause.kl:.2g}"
        lines.append(f"  {cause.gain / total:8.3f}  {cause.name} (p-value {cause.p_value:.2g}{kl})")
    return lines


def _record(reference: Reference, result: Result) -> dict[str, Any]:
    """All numbers and answers, for JSON."""
    prompts = []
    for index, (prompt, own) in enumerate(zip(reference.prompts, result.replies, strict=True)):
        counts = Counter(answer.text for reply in own for answer in reply.answers)
        prompts.append(
            {
                "split": prompt.task.split,
                "task_id": prompt.task.task_id,
                "num": int(result.draws.num[index]),
                "none_of_the_values": int(result.draws.num_left[index]),
                "p_value": result.verdict.frequencies.p_values[index],
                "prompt_tokens": {"here": len(prompt.tokens), "there": own[0].prompt_tokens},
                "answers": dict(counts.most_common()),
            }
        )
    causes_ = [dataclasses.asdict(cause) for cause in result.causes]
    return _finite({**dataclasses.asdict(result.verdict), "causes": causes_, "prompts": prompts})


def _finite(value: Any) -> Any:
    """A record without what JSON lacks: such numbers become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
