"""Whether draws are those of a model, and if not, what is likely wrong. Pure.

Two tests share the probability of a false alarm. The first is blind: chi-square tests of every prompt's frequencies
given that the answer is one of the values, one over all prompts, and an exact one-sided test of the answers that are
none; with Bonferroni's correction. The second looks for known mistakes: the likelihood ratio of each to the model,
averaged with fixed weights, has expectation at most 1 for an honest server, so that by Markov's inequality it exceeds
1/alpha with probability at most alpha, whatever the number of draws. Log-probabilities have no noise but rounding; they
are held against a tolerance, and a much smaller one where they are those of a wrong prompt.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from cft_jax.evaluate.metrics.sound import pooled_chi_square
from cft_jax.serving.draws import Draws, StepProbs
from cft_jax.serving.mistakes import SETTINGS, Temperature, applied, maximum_likelihood, sampling_mistakes, unstopped

# Probability, at most, that an honest server is called wrong: half of it for the known mistakes, four tenths for the
# blind test, a tenth for repeated answers. Of small cells the chi-square exceeds its approximation so far out: of a
# million simulated honest runs (8 prompts, 25 to 200 draws) 20 to 38 had a p-value below 1e-5.
FALSE_ALARM = 1e-4
_BLIND_LEVEL = 1e-5
# KL from the model to the server's log-probabilities that rounding does not explain, nats per token, and what bfloat16
# logits of size 20 make.
MOST_KL, _ROUNDING = 0.01, 1e-3
# Log-probabilities are one source's rather than another's if their KL to it is so much less.
_NEARER = 0.1
# An explanation fits where the blind test of it has at least this p-value.
_FITS = 1e-3
STOP = "stop token"
# Explanations whose fit is looked at, of each number of mistakes.
_TRIED = 12
# Nats by which two mistakes must explain the draws better than one: a second setting, idle, gains 2.
_WORTH = 5.0
# Explanations whose likelihoods differ by less are not told apart.
_ALIKE = 1.0
# Temperatures below are told from greedy by nobody.
_GREEDY = 0.1
_COMBINED_TEMPERATURES = tuple(np.round(np.arange(0.3, 2.01, 0.05), 2))
_LEAST_LOG, _LEAST_REST = -30.0, 1e-6


@dataclass(frozen=True)
class Frequencies:
    """The blind test.

    Attributes:
      p_value: the smallest of all tests, times their number.
      chi_square, degrees: over all prompts.
      p_values: of every prompt; NaN where it has less than two cells.
      num_left, expected_left: answers that are none of the prompt's values.
    """

    p_value: float
    chi_square: float
    degrees: int
    p_values: tuple[float, ...]
    num_left: int
    expected_left: float


@dataclass(frozen=True)
class Cause:
    """An explanation of the draws.

    Attributes:
      name: what is wrong; with settings where there are any.
      kinds: the mistakes it is made of, for advice.
      gain: log-likelihood ratio to the model as it is, nats.
      p_value: of the blind test of this explanation; NaN where it was not asked for.
      kl: from the explanation to the server's log-probabilities, nats per token; NaN where it gives none.
      fits: whether nothing that was seen speaks against it.
    """

    name: str
    kinds: tuple[str, ...]
    gain: float
    p_value: float = math.nan
    kl: float = math.nan
    fits: bool = False


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
      calibrated: whether nothing speaks against it.
      frequencies: the blind test.
      log_evidence: logarithm of the average likelihood ratio of the known mistakes.
      temperature: by maximum likelihood.
      kl: from the model to the server's log-probabilities, nats per token; NaN where it gives none.
      reported_variant: the wrong prompt whose log-probabilities the server reports, or empty.
      is_repeated: whether all requests for a prompt came back alike, which chance does not explain.
    """

    calibrated: bool
    frequencies: Frequencies
    log_evidence: float
    temperature: Temperature
    kl: float
    reported_variant: str
    is_repeated: bool


def judge(
    draws: Draws,
    model: StepProbs,
    variants: Mapping[str, StepProbs],
    *,
    reported: Float[np.ndarray, "C"] | None,
    repetition: float | None,
) -> Verdict:
    """Compares draws with what the model says.

    Args:
      draws: of the server.
      model: what it should draw from.
      variants: what the model says under mistakes in the prompt, by their names.
      reported: log-probabilities by the server, NaN where it says nothing; None where it gives none at all.
      repetition: where all requests for a prompt came back alike, the log-probability of everything but the first.
    """
    frequencies = blind_test(draws, model)
    evidence = _log_evidence(draws, model, variants)
    kls = _kls({"": model, **variants}, draws, reported)
    nearest = min(kls, key=lambda name: kls[name], default="")
    is_variant = nearest != "" and kls[nearest] < _tolerance(kls) < kls[""]
    is_repeated = repetition is not None and repetition < math.log(FALSE_ALARM / 10)
    calibrated = (
        frequencies.p_value > _BLIND_LEVEL
        and evidence < math.log(2 / FALSE_ALARM)
        and not kls.get("", 0.0) > MOST_KL
        and not is_variant
        and not is_repeated
    )
    temperature = maximum_likelihood(draws, model)
    kl = kls.get("", math.nan)
    return Verdict(calibrated, frequencies, evidence, temperature, kl, nearest if is_variant else "", is_repeated)


def blind_test(draws: Draws, probs: StepProbs, *, count_left: bool = True) -> Frequencies:
    """The frequencies of the values against their probabilities, and, if asked to, of answers that are no values."""
    layout, num, left = draws.layout, draws.num, draws.num_left
    statistic, degrees, p_values, expected_left = 0.0, 0, [], 0.0
    for index, cells in enumerate(probs.cells(layout)):
        own = slice(*layout.child_starts[index : index + 2])
        result = pooled_chi_square(draws.taken[own][layout.is_cell[own]], cells / cells.sum())
        p_values.append(math.nan if result is None else result[1])
        if result is not None:
            statistic, degrees = statistic + result[0], degrees + result[2] - 1
        expected_left += float(num[index] * max(1 - cells.sum(), 0))
    tests = [p for p in p_values if not math.isnan(p)]
    tests += [float(stats.chi2.sf(statistic, degrees))] if degrees else []
    if count_left:
        # The tail of a sum of unlike coin flips lies below that of as many like ones (Hoeffding, 1956).
        total = int(num.sum())
        tests.append(float(stats.binom.sf(left.sum() - 1, total, min(expected_left / total, 1.0))))
    smallest = min([1.0, *(len(tests) * p for p in tests)])
    return Frequencies(smallest, statistic, degrees, tuple(p_values), int(left.sum()), expected_left)


def kl_to_server(draws: Draws, probs: StepProbs, reported: Float[np.ndarray, "C"]) -> float:
    """KL from `probs` to what the server reports, nats per token drawn; tokens that it does not report count as one."""
    layout, known = draws.layout, ~np.isnan(reported)
    p = np.where(known, np.exp(probs.log_probs), 0.0)
    log_q = np.where(known, np.maximum(reported, _LEAST_LOG), 0.0)
    rest_p, rest_q = (
        np.clip(1 - layout.sums(masses), _LEAST_REST, 1.0) for masses in (p, np.where(known, np.exp(log_q), 0.0))
    )
    per_prefix = layout.sums(p * (probs.log_probs - log_q)) + rest_p * np.log(rest_p / rest_q)
    visits = (layout.sums(draws.taken) + draws.left) * (layout.sums(known.astype(np.float64)) > 0)
    return float(visits @ per_prefix / visits.sum()) if visits.any() else math.nan


def _kls(sources: Mapping[str, StepProbs], draws: Draws, reported: Float[np.ndarray, "C"] | None) -> dict[str, float]:
    """KL from each source to what the server reports, nats per token; empty where it reports nothing."""
    return {} if reported is None else {name: kl_to_server(draws, probs, reported) for name, probs in sources.items()}


def _tolerance(kls: Mapping[str, float]) -> float:
    """The most KL of a source that the server may yet be reporting: of the nearest's order, within the known bounds."""
    return min(MOST_KL, max(_ROUNDING, min(kls.values(), default=0.0) / _NEARER))


def _log_evidence(draws: Draws, model: StepProbs, variants: Mapping[str, StepProbs]) -> float:
    """Logarithm of the average likelihood ratio: kinds of mistakes weigh alike, and so do the settings of a kind."""
    base = model.log_likelihood(draws)
    kinds: dict[str, list[float]] = {kind: [] for kind in SETTINGS}
    for kind, setting in sampling_mistakes():
        kinds[kind].append(applied(draws.layout, model, kind, setting).log_likelihood(draws) - base)
    kinds |= {name: [probs.log_likelihood(draws) - base] for name, probs in variants.items()}
    kinds["stop"] = [unstopped(draws.layout, model).log_likelihood(draws) - base]
    return _log_mean([_log_mean(gains) for gains in kinds.values()])


def _log_mean(logs: Sequence[float]) -> float:
    """Logarithm of the mean of what these are the logarithms of."""
    return float(np.logaddexp.reduce(logs)) - math.log(len(logs))


def causes(
    draws: Draws,
    sources: Mapping[str, StepProbs],
    *,
    reported: Float[np.ndarray, "C"] | None,
) -> list[Cause]:
    """Explanations of draws that are not the model's, the likeliest first.

    One mistake that fits is preferred to two, unless two explain the draws much better.

    Args:
      draws: of the server.
      sources: "" for the model as it should be asked, and by name what else may answer: the base model, the model
        asked in another way.
      reported: see `judge`.

    Returns:
      The likeliest of those that fit, then what was tried by its gain.
    """
    kls = _kls(sources, draws, reported)
    tried, best = [], []
    for candidates in (_single(draws, sources), _combined(draws, sources)):
        level = _weighed(draws, sources, candidates, kls=kls, reported=reported)
        tried += level
        best += [next((cause for cause in level if cause.fits), None)]
    single, double = best
    is_worth = single is None or (double is not None and double.gain > single.gain + _WORTH)
    first = double if is_worth else single
    others = sorted((cause for cause in tried if cause is not first), key=lambda cause: -cause.gain)
    return others if first is None else [first, *others]


def as_likely(found: Sequence[Cause]) -> list[Cause]:
    """Explanations, of other kinds, that the draws do not tell apart from the first."""
    first, kinds, alike = found[0], {found[0].kinds}, []
    for cause in found[1:]:
        is_near = cause.fits and first.fits and cause.gain > first.gain - _ALIKE
        if is_near and len(cause.kinds) == len(first.kinds) and cause.kinds not in kinds:
            kinds.add(cause.kinds)
            alike.append(cause)
    return alike


def _weighed(
    draws: Draws,
    sources: Mapping[str, StepProbs],
    candidates: Iterable[tuple[str, tuple[str, ...], str, StepProbs]],
    *,
    kls: Mapping[str, float],
    reported: Float[np.ndarray, "C"] | None,
) -> list[Cause]:
    """The likeliest of the candidates, and whether they fit; `kls` are those of the sources."""
    base, most_kl = sources[""].log_likelihood(draws), _tolerance(kls)
    ranked = sorted(((item[-1].log_likelihood(draws) - base, item) for item in candidates), key=lambda pair: -pair[0])
    found = []
    for gain, (name, kinds, source, probs) in ranked[:_TRIED]:
        p_value = blind_test(draws, probs, count_left=kinds[-1] not in SETTINGS).p_value
        # Servers report what the model says, or what is left of it after temperature and cuts.
        kl = math.nan if reported is None else min(kl_to_server(draws, probs, reported), kls[source])
        # Where the log-probabilities are not the model's, whose they are need not be seen in the draws.
        is_better = gain > 0 or kls.get("", 0.0) > most_kl
        found.append(Cause(name, kinds, gain, p_value, kl, is_better and p_value > _FITS and not kl > most_kl))
    return found


def _single(draws: Draws, sources: Mapping[str, StepProbs]) -> Iterator[tuple[str, tuple[str, ...], str, StepProbs]]:
    """Every source that is not the model itself, and every way to draw from the model: name, kinds, source, steps."""
    model = sources[""]
    yield from ((name, (name,), name, probs) for name, probs in sources.items() if name)
    yield STOP, (STOP,), "", unstopped(draws.layout, model)
    yield from ((name, (kind,), "", probs) for name, kind, probs in _ways(draws, model))


def _ways(draws: Draws, source: StepProbs) -> Iterator[tuple[str, str, StepProbs]]:
    """Ways to draw from a source, each kind with its likeliest setting: name, kind, steps."""
    for kind, settings in SETTINGS.items():
        if kind == "temperature":
            best = maximum_likelihood(draws, source)
            if best.value < _GREEDY:
                continue
            probs = applied(draws.layout, source, kind, best.value)
            yield f"temperature {best.value:.3g} ± {best.error:.1g}", kind, probs
            continue
        tried = ((setting, applied(draws.layout, source, kind, setting)) for setting in settings)
        # Of settings that cut alike the one with the fewest digits, as people write them.
        setting, probs = max(tried, key=lambda item: (round(item[1].log_likelihood(draws), 6), -len(f"{item[0]:g}")))
        yield ("greedy" if (kind, setting) == ("top-k", 1) else f"{kind} {setting:g}"), kind, probs


def _combined(draws: Draws, sources: Mapping[str, StepProbs]) -> Iterator[tuple[str, tuple[str, ...], str, StepProbs]]:
    """Two mistakes: another source that is drawn from in another way; or a temperature, and then a cut."""
    for name, source in sources.items():
        if name:
            yield from ((f"{name}, {way}", (name, kind), name, probs) for way, kind, probs in _ways(draws, source))
    model = sources[""]
    best = max(
        (
            # One edge for all temperatures, or the hottest would explain greedy answers best.
            (applied(draws.layout, tempered, kind, setting, edge=model), temperature, kind, setting)
            for temperature in _COMBINED_TEMPERATURES
            for tempered in [applied(draws.layout, model, "temperature", temperature)]
            for kind, settings in SETTINGS.items()
            if kind != "temperature"
            for setting in settings[:: 5 if kind == "top-p" else 1]
        ),
        key=lambda item: item[0].log_likelihood(draws),
    )
    probs, temperature, kind, setting = best
    yield f"temperature {temperature:.3g}, {kind} {setting:g}", ("temperature", kind), "", probs
