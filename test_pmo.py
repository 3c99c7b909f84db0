"""Laws of PPO for language models: what is true of every correct implementation, each with its source.

    pytest test_pmo.py                              pmo: the contract's laws, the details D1 to D25, the pipeline
    PMO_IMPL=my_module pytest test_pmo.py           the contract's laws, held against the functions of my_module
    PMO_IMPL=my_module python test_pmo.py           the same, ending in a table: laws that hold, fail, are missing

An implementation is a module with any of the contract's functions (README: "Verify another implementation"). A
function it lacks is reported as missing, never as passed. It may name laws it is known to break, in a dictionary
KNOWN_FAILURES = {"test_name": "why"}; such a law must then really fail. Where good implementations differ by choice
(divisor of the variance, for instance) the law is marked a choice, and only pmo is held to it.

Sources: numbers in brackets are pmo.py's references; PEP-like tags D1 to D25 are the details in README.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

IMPL = os.environ.get("PMO_IMPL", "pmo")
impl = importlib.import_module(IMPL)
is_pmo = hasattr(impl, "Config") and hasattr(impl, "ppo")
KNOWN_FAILURES: dict[str, str] = getattr(impl, "KNOWN_FAILURES", {})

torch.set_num_threads(2)

# -----------------------------------------------------------------------------
# laws: how one is stated, checked and reported


@dataclass(frozen=True)
class Law:
    """A statement, its source, the functions it speaks about, and a check of it."""

    name: str
    statement: str
    source: str
    needs: tuple[str, ...]
    choice: bool
    test: Callable[..., None]
    strategies: dict[str, st.SearchStrategy]

    def hold(self, examples: int = 60, shrink: bool = True) -> None:
        """Raise unless the law holds for the implementation under test; deterministic."""
        if not self.strategies:
            return self.test()
        phases = (Phase.explicit, Phase.generate, *((Phase.shrink,) if shrink else ()))
        calm = settings(
            max_examples=examples, derandomize=True, deadline=None, database=None, phases=phases,
            suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        )  # fmt: skip
        return calm(given(**self.strategies)(self.test))()


LAWS: dict[str, Law] = {}


def law(statement: str, source: str, *needs: str, choice: bool = False, **strategies: st.SearchStrategy):
    """State a law. The decorated function checks one example of it; hypothesis draws its arguments."""

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        stated = LAWS[test.__name__] = Law(test.__name__, statement, source, needs, choice, test, strategies)

        def run() -> None:
            __tracebackhide__ = True
            missing = [name for name in needs if not hasattr(impl, name)]
            if missing:
                pytest.skip(f"missing: {IMPL} has no {', '.join(missing)}")
            known = KNOWN_FAILURES.get(stated.name)
            try:
                stated.hold()
            except Exception as error:
                if known:
                    pytest.xfail(known)
                if choice and not is_pmo:
                    pytest.xfail("another legitimate choice")
                notes = [f"law: {statement}", f"source: {source}", f"implementation: {impl.__file__}"]
                error.__notes__ = [*getattr(error, "__notes__", []), *notes]
                raise
            if known:
                pytest.fail(f"KNOWN_FAILURES of {IMPL} names this law, but it holds: remove the entry")

        run.__name__ = run.__qualname__ = test.__name__
        run.__doc__ = statement
        run.__module__ = test.__module__
        return run

    return decorate


def close(actual: Tensor, expected: object, tolerance: float | None = None) -> None:
    """Equal up to rounding: 1e-9 in float64, 1e-4 in float32, relative to the largest number in sight."""
    __tracebackhide__ = True
    expected = torch.as_tensor(expected, dtype=torch.float64)
    result = actual.detach().double()
    assert result.shape == expected.shape, f"shape is {tuple(result.shape)}, should be {tuple(expected.shape)}"
    tolerance = tolerance or (1e-9 if actual.dtype == torch.float64 else 1e-4)
    scale = max(1.0, expected.nan_to_num(0, 0, 0).abs().max().item()) if expected.numel() else 1.0
    wrong = ~((result - expected).abs() <= tolerance * scale) & ~((result == expected) | (result.isnan() & expected.isnan()))
    assert not wrong.any(), f"got\n{result}\nshould be\n{expected}"


# A batch, as the laws see it, is a list of sequences of numbers. `dense` lays it out as an implementation wants it.


@dataclass(frozen=True)
class Sequences:
    """Sequences of equal lengths under several names, as lists of numbers, without padding."""

    columns: dict[str, list[list[float]]]

    def __getattr__(self, name: str) -> list[list[float]]:
        try:
            return self.__dict__["columns"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in next(iter(self.columns.values()))]

    def dense(self, name: str, junk: float = 0.0, extra: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        width = max(self.lengths) + extra
        return torch.tensor([row + [junk] * (width - len(row)) for row in self.columns[name]], dtype=dtype)

    def mask(self, extra: int = 0) -> Tensor:
        width = max(self.lengths) + extra
        return torch.tensor([[t < n for t in range(width)] for n in self.lengths])

    def __getitem__(self, rows: list[int]) -> Sequences:
        return Sequences({name: [column[i] for i in rows] for name, column in self.columns.items()})


def numbers(low: float = -3, high: float = 3) -> st.SearchStrategy[float]:
    """Multiples of 1/8: exact in every precision, small when shrunk."""
    return st.integers(round(8 * low), round(8 * high)).map(lambda n: n / 8)


@st.composite
def sequences(draw: st.DrawFn, *names: str, rows: int = 4, longest: int = 6, **ranges: tuple[float, float]) -> Sequences:
    """One to four sequences of one to six numbers under each name; `name=(low, high)` narrows the range."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=rows))
    limits = {name: (-3.0, 3.0) for name in names} | ranges
    total = sum(lengths)
    columns = {}
    for name, (low, high) in limits.items():
        flat = iter(draw(st.lists(numbers(low, high), min_size=total, max_size=total)))
        columns[name] = [list(itertools.islice(flat, n)) for n in lengths]
    return Sequences(columns)


def padded(rows: list[list[float]], width: int) -> Tensor:
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)


def tensors(shape: tuple[int, ...], low: float = -3, high: float = 3) -> st.SearchStrategy[Tensor]:
    size = math.prod(shape)
    return st.lists(numbers(low, high), min_size=size, max_size=size).map(
        lambda flat: torch.tensor(flat, dtype=torch.float64).view(shape)
    )


JUNK = {"a large number": 1e6, "NaN": math.nan, "infinity": math.inf}
unit = st.integers(0, 8).map(lambda n: n / 8)
EPSILON = 0.25  # a clip range whose edges 0.75 and 1.25 are exact

# -----------------------------------------------------------------------------
# response_mask, length_mask, penalize_missing_eos [D3, D4, D12]

responses = st.integers(1, 6).flatmap(
    lambda T: st.lists(st.lists(st.integers(0, 3), min_size=T, max_size=T), min_size=1, max_size=4)
)


@law(
    "a response mask is True up to and including the first EOS, and everywhere in a row without one",
    "[4] detail 'EOS'; [5] section 3.3: the EOS action is part of the response",
    "response_mask", rows=responses, eos_id=st.integers(0, 3),
)  # fmt: skip
def test_response_mask_ends_with_the_first_eos(rows, eos_id):
    expected = [[eos_id not in row[:t] for t in range(len(row))] for row in rows]
    mask = impl.response_mask(torch.tensor(rows), eos_id)
    assert mask.dtype == torch.bool, f"dtype is {mask.dtype}, should be bool"
    assert mask.tolist() == expected, f"{rows} with EOS {eos_id}: got {mask.tolist()}, should be {expected}"


@law(
    "what the sampler wrote after the first EOS, EOS again or a pad id, changes nothing",
    "D3: lengths, not pad ids, make masks",
    "response_mask", rows=responses, eos_id=st.integers(0, 3), junk=st.integers(0, 3),
)  # fmt: skip
def test_response_mask_ignores_tokens_after_eos(rows, eos_id, junk):
    filled = [[junk if eos_id in row[:t] else token for t, token in enumerate(row)] for row in rows]
    before = impl.response_mask(torch.tensor(rows), eos_id)
    assert impl.response_mask(torch.tensor(filled), eos_id).equal(before)


@law(
    "a length mask is True on as many first slots as the length says",
    "D3", "length_mask", lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), extra=st.integers(0, 2),
)  # fmt: skip
def test_length_mask_is_true_on_the_first_slots(lengths, extra):
    T = max(lengths) + extra
    expected = [[t < n for t in range(T)] for n in lengths]
    mask = impl.length_mask(torch.tensor(lengths), T)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(lengths), T) and mask.tolist() == expected


@law(
    "the length mask of a response mask's row sums is that response mask",
    "D3: a mask is a prefix, so its length says it all",
    "response_mask", "length_mask", rows=responses, eos_id=st.integers(0, 3),
)  # fmt: skip
def test_length_mask_inverts_counting(rows, eos_id):
    mask = impl.response_mask(torch.tensor(rows), eos_id)
    assert impl.length_mask(mask.sum(1), mask.shape[1]).equal(mask)


@law(
    "a response without EOS gets exactly the given score, whatever the model said; others keep theirs",
    "[4] detail 'EOS trick': the score is set to -1, not lowered by 1",
    "penalize_missing_eos",
    rows=st.lists(st.tuples(numbers(), st.booleans()), min_size=1, max_size=5), value=numbers(),
)  # fmt: skip
def test_missing_eos_replaces_the_score(rows, value):
    scores, has_eos = (torch.tensor(column) for column in zip(*rows))
    expected = [score if has else value for score, has in rows]
    assert impl.penalize_missing_eos(scores, has_eos, value).tolist() == expected


@law(
    "a score that is replaced may have been anything, NaN too",
    "D12: replaced, so the old score plays no part", "penalize_missing_eos", value=numbers(),
)  # fmt: skip
def test_missing_eos_replaces_nan(value):
    result = impl.penalize_missing_eos(torch.tensor([math.nan, 0.5]), torch.tensor([False, True]), value)
    assert result.tolist() == [value, 0.5]


# -----------------------------------------------------------------------------
# logprobs_of, entropy_of [D13]

temperatures = st.sampled_from([0.25, 0.5, 0.7, 1.0, 2.0])
logits_and_tokens = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5)).flatmap(
    lambda s: st.tuples(
        tensors(s), st.lists(st.integers(0, s[2] - 1), min_size=s[0] * s[1], max_size=s[0] * s[1]).map(
            lambda flat: torch.tensor(flat).view(s[0], s[1])
        ),
    )
)  # fmt: skip


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


@law(
    "a token's log-probability is the log of softmax(logits / temperature) at that token",
    "[4] detail 'rejection of temperature mismatch': the sampling distribution is the policy; D13",
    "logprobs_of", case=logits_and_tokens, temperature=temperatures,
)  # fmt: skip
def test_logprobs_are_log_softmax_of_tempered_logits(case, temperature):
    logits, tokens = case
    rows = zip(logits.tolist(), tokens.tolist())
    expected = [[math.log(softmax(x, temperature)[v]) for x, v in zip(*row)] for row in rows]
    close(impl.logprobs_of(logits, tokens, temperature), expected)


@law(
    "the probabilities of all tokens sum to 1",
    "definition of a distribution", "logprobs_of", case=logits_and_tokens, temperature=temperatures,
)  # fmt: skip
def test_logprobs_sum_to_one_over_the_vocabulary(case, temperature):
    logits, tokens = case
    total = sum(impl.logprobs_of(logits, torch.full_like(tokens, v), temperature).exp() for v in range(logits.shape[2]))
    close(total, torch.ones(tokens.shape))


@law(
    "adding a constant to all logits of a slot, or scaling logits and temperature together, changes nothing",
    "softmax is shift-invariant; D13", "logprobs_of", "entropy_of", case=logits_and_tokens, shift=numbers(),
)  # fmt: skip
def test_logprobs_and_entropy_depend_on_logit_differences_over_temperature(case, shift):
    logits, tokens = case
    for function in (lambda x, t: impl.logprobs_of(x, tokens, t), impl.entropy_of):
        expected = function(logits, 0.5)
        close(function(logits + shift, 0.5), expected)
        close(function(2 * logits, 1.0), expected)


@law(
    "the gradient of a token's log-probability is (one-hot − softmax) / temperature",
    "derivative of log-softmax; D13", "logprobs_of", case=logits_and_tokens, temperature=temperatures,
)  # fmt: skip
def test_logprobs_gradient_is_one_hot_minus_softmax(case, temperature):
    logits, tokens = case
    logits = logits.clone().requires_grad_()
    impl.logprobs_of(logits, tokens, temperature).sum().backward()
    one_hot = torch.nn.functional.one_hot(tokens, logits.shape[2])
    close(logits.grad, (one_hot - (logits.detach() / temperature).softmax(-1)) / temperature)


@law(
    "logits in bfloat16 are computed with in float32",
    "D21: a ratio of 1.0001 does not exist in bfloat16", "logprobs_of", "entropy_of", case=logits_and_tokens,
)  # fmt: skip
def test_logprobs_and_entropy_of_half_precision_are_float32(case):
    logits, tokens = case
    for function in (lambda x: impl.logprobs_of(x, tokens, 0.7), lambda x: impl.entropy_of(x, 0.7)):
        half = function(logits.bfloat16())
        assert half.dtype == torch.float32, f"dtype is {half.dtype}, should be float32"
        close(half, function(logits.bfloat16().double()), tolerance=1e-5)


@law(
    "logits of a size that overflows exp() give finite log-probabilities and entropy",
    "numerical stability of log-softmax", "logprobs_of", "entropy_of", size=st.sampled_from([1e2, 1e3, 1e4]),
)  # fmt: skip
def test_logprobs_and_entropy_are_stable_for_huge_logits(size):
    logits = torch.tensor([[[size, 0.0, -size]]], dtype=torch.float64)
    close(impl.logprobs_of(logits, torch.tensor([[2]]), 1.0), [[-2 * size]])
    close(impl.entropy_of(logits, 1.0), [[0.0]])


@law(
    "entropy is −Σ π log π of the tempered distribution, in nats",
    "[1] eq. 9, S; D13", "entropy_of", case=logits_and_tokens, temperature=temperatures,
)  # fmt: skip
def test_entropy_is_minus_the_expected_logprob(case, temperature):
    logits, _ = case
    expected = [[-sum(p * math.log(p) for p in softmax(x, temperature)) for x in row] for row in logits.tolist()]
    close(impl.entropy_of(logits, temperature), expected)


@law(
    "a token that cannot be sampled (logit −∞) adds nothing to the entropy",
    "lim p log p = 0", "entropy_of", V=st.integers(2, 5),
)  # fmt: skip
def test_entropy_ignores_impossible_tokens(V):
    logits = torch.cat([torch.zeros(1, 1, V), torch.full((1, 1, 1), -math.inf)], dim=2).double()
    close(impl.entropy_of(logits, 0.7), [[math.log(V)]])


# -----------------------------------------------------------------------------
# masked_mean, whiten [D16]


@law(
    "a masked mean is the mean of what the mask leaves",
    "D23: every statistic is over response tokens", "masked_mean", s=sequences("x"),
)  # fmt: skip
def test_masked_mean_is_the_mean_of_all_tokens(s):
    flat = [x for row in s.x for x in row]
    close(impl.masked_mean(s.dense("x"), s.mask()), sum(flat) / len(flat))


@law(
    "the gradient of a masked mean is 1/n on the mask and 0 outside, also over junk",
    "D5: padding never matters", "masked_mean", s=sequences("x"), junk=st.sampled_from(sorted(JUNK)),
)  # fmt: skip
def test_masked_mean_gradient_is_uniform_on_the_mask(s, junk):
    x, mask = s.dense("x", JUNK[junk], extra=1).requires_grad_(), s.mask(extra=1)
    impl.masked_mean(x, mask).backward()
    close(x.grad, mask / mask.sum())


@law(
    "whitened numbers have mean 0, and variance 1 by one of the two divisors n and n − 1",
    "[4] detail 'advantage whitening'; both divisors are in use",
    "whiten", s=sequences("x"),
)  # fmt: skip
def test_whiten_gives_mean_zero_and_variance_one(s):
    flat = torch.tensor([x for row in s.x for x in row], dtype=torch.float64)
    if flat.numel() < 2 or flat.std() < 1e-3:
        return
    white = impl.whiten(s.dense("x"), s.mask())[s.mask()]
    close(white.mean(), 0.0, tolerance=1e-5)
    n = len(flat)
    assert any(abs(white.var(correction=0).item() * k - 1) < 1e-4 for k in (1, n / (n - 1))), f"{white.var(correction=0)=}"
    close(white * flat.std(), (flat - flat.mean()) * (white.std() or 1), tolerance=1e-5)


@law(
    "whitening divides by the population's standard deviation (n, not n − 1)",
    "contract: variance over the mask is 1", "whiten", choice=True, s=sequences("x"),
)  # fmt: skip
def test_whiten_uses_the_population_variance(s):
    flat = torch.tensor([x for row in s.x for x in row], dtype=torch.float64)
    std = flat.std(correction=0)
    if std >= 1e-3:
        close(impl.whiten(s.dense("x"), s.mask())[s.mask()], (flat - flat.mean()) / (std + 1e-8))


@law(
    "whitening does not see a shift or a positive scale of its input, and flips with its sign",
    "definition of a standard score", "whiten", s=sequences("x"), shift=numbers(), scale=st.sampled_from([0.5, 3.0, 100.0]),
)  # fmt: skip
def test_whiten_is_invariant_to_shift_and_scale(s, shift, scale):
    x, mask = s.dense("x"), s.mask()
    if x[mask].numel() < 2 or x[mask].std() < 1e-1:
        return
    white = impl.whiten(x, mask)[mask]
    close(impl.whiten(x * scale + shift, mask)[mask], white, tolerance=1e-4)
    close(impl.whiten(-x, mask)[mask], -white, tolerance=1e-4)


@law(
    "without shifting the mean, whitening only scales: zero stays zero, signs and proportions stay",
    "D16; whitened rewards keep their meaning ([4]'s code adds the mean back instead)",
    "whiten", choice=True, s=sequences("x"),
)  # fmt: skip
def test_whiten_without_shift_only_scales(s):
    x, mask = s.dense("x"), s.mask()
    std = x[mask].std(correction=0)
    if std >= 1e-3:
        close(impl.whiten(x, mask, shift_mean=False), x / (std + 1e-8))


@law(
    "what has no spread is never blown up: constants come back no larger than they were",
    "D16; dividing rounding errors by 1e-8 gives noise of size 1", "whiten",
    value=st.sampled_from([0.0, 0.1, -3.0, 1000.1]), n=st.integers(1, 7), shift_mean=st.booleans(),
)  # fmt: skip
def test_whiten_leaves_constant_input_alone(value, n, shift_mean):
    for dtype in (torch.float32, torch.float64):
        x = torch.full((1, n), value, dtype=dtype)
        white = impl.whiten(x, torch.ones(1, n, dtype=torch.bool), shift_mean=shift_mean)
        assert white.abs().max() <= abs(value) + 1e-3, f"constant {value} became {white.tolist()}"
        if shift_mean:
            assert white.abs().max() <= 1e-3, f"constant {value} became {white.tolist()}"


# -----------------------------------------------------------------------------
# kl_estimate [D15]

distributions = st.integers(2, 5).flatmap(lambda V: st.tuples(tensors((V,), -2, 2), tensors((V,), -2, 2)))


@law(
    "k1 = log π − log π_ref, k2 = k1²/2, k3 = π_ref/π − 1 + k1",
    "Schulman 2020, Approximating KL Divergence", "kl_estimate", s=sequences("logprobs", "ref"),
)  # fmt: skip
def test_kl_estimates_are_schulmans(s):
    pairs = [list(zip(*rows)) for rows in zip(s.logprobs, s.ref)]
    formulas = {
        "k1": lambda p, q: p - q,
        "k2": lambda p, q: (p - q) ** 2 / 2,
        "k3": lambda p, q: math.exp(q - p) - 1 + (p - q),
    }
    for kind, formula in formulas.items():
        expected = padded([[formula(p, q) for p, q in row] for row in pairs], max(s.lengths))
        close(impl.kl_estimate(s.dense("logprobs"), s.dense("ref"), kind), expected)


@law(
    "in expectation over samples of π, k1 and k3 are KL(π ‖ π_ref)",
    "Schulman 2020: both are unbiased", "kl_estimate", logits=distributions,
)  # fmt: skip
def test_k1_and_k3_are_unbiased(logits):
    logprobs, ref_logprobs = (x.log_softmax(0) for x in logits)
    kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    for kind in ("k1", "k3"):
        estimates = impl.kl_estimate(logprobs[None], ref_logprobs[None], kind)
        close((logprobs.exp() * estimates[0]).sum(), kl)


@law(
    "k2 and k3 are never negative, and 0 where the two policies agree",
    "Schulman 2020: k3 is a Bregman divergence", "kl_estimate", s=sequences("logprobs", "ref"),
)  # fmt: skip
def test_k2_and_k3_are_not_negative(s):
    for kind in ("k2", "k3"):
        assert (impl.kl_estimate(s.dense("logprobs"), s.dense("ref"), kind) >= 0).all()
        close(impl.kl_estimate(s.dense("ref"), s.dense("ref"), kind), torch.zeros(s.mask().shape))


@law(
    "k3 of nearly equal policies is k1²/2 to a few percent, in float32 too",
    "Taylor: e⁻ˣ − 1 + x = x²/2 − …; exp(x) − 1 loses all digits", "kl_estimate", size=st.sampled_from([1e-2, 3e-3, 1e-3]),
)  # fmt: skip
def test_k3_keeps_its_digits_near_zero(size):
    logprobs = torch.tensor([[size, -size]], dtype=torch.float32)
    k3 = impl.kl_estimate(logprobs, torch.zeros(1, 2), "k3")
    ratio = k3.double() / (size**2 / 2)
    assert ((ratio - 1).abs() < 0.05).all(), f"k3 of ±{size} is {k3.tolist()}, about {size**2 / 2} expected"


@law(
    "as a loss, k2's expected gradient is that of KL(π ‖ π_ref), k3's that of KL(π_ref ‖ π), k1's is 0",
    "differentiate under samples of π; D15", "kl_estimate", logits=distributions,
)  # fmt: skip
def test_kl_gradients_in_expectation(logits):
    def gradient(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x = logits[0].clone().requires_grad_()
        function(x.log_softmax(0), logits[1].log_softmax(0)).backward()
        return x.grad

    def estimate(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda p, q: (p.detach().exp() * impl.kl_estimate(p[None], q[None], kind)[0]).sum()

    close(gradient(estimate("k1")), torch.zeros(len(logits[0])))
    close(gradient(estimate("k2")), gradient(lambda p, q: (p.exp() * (p - q)).sum()))
    close(gradient(estimate("k3")), gradient(lambda p, q: (q.exp() * (q - p)).sum()))


# -----------------------------------------------------------------------------
# token_rewards [D15]


@law(
    "each response token pays −β·kl; the last one, EOS itself, also earns the score",
    "Ziegler et al. 2019 eq. 2; [5] section 3.4; the score belongs to the action that ended the response",
    "token_rewards", s=sequences("kl", scores=(-3, 3)), kl_coef=numbers(0, 1),
)  # fmt: skip
def test_score_is_paid_to_the_last_response_token(s, kl_coef):
    scores = [row[0] for row in s.scores]
    expected = [[-kl_coef * kl for kl in row] for row in s.kl]
    for row, score in zip(expected, scores):
        row[-1] += score
    result = impl.token_rewards(torch.tensor(scores, dtype=torch.float64), s.dense("kl"), s.mask(), kl_coef)
    close(result, padded(expected, max(s.lengths)))


@law(
    "rewards of a response sum to its score minus β times its KL, however it is padded",
    "[5] section 3.4: R = r − β log(π/π_ref)", "token_rewards",
    s=sequences("kl", scores=(-3, 3)), kl_coef=numbers(0, 1), extra=st.integers(0, 3),
)  # fmt: skip
def test_rewards_sum_to_score_minus_kl(s, kl_coef, extra):
    scores = torch.tensor([row[0] for row in s.scores], dtype=torch.float64)
    result = impl.token_rewards(scores, s.dense("kl", extra=extra), s.mask(extra), kl_coef)
    close(result.sum(1), scores - kl_coef * torch.tensor([sum(row) for row in s.kl]))


@law(
    "without a price on KL a response has one reward, its score",
    "limit β = 0", "token_rewards", s=sequences("kl", scores=(0.125, 3)),
)  # fmt: skip
def test_without_kl_only_the_last_token_is_rewarded(s):
    scores = torch.tensor([row[0] for row in s.scores], dtype=torch.float64)
    result = impl.token_rewards(scores, s.dense("kl"), s.mask(), 0.0)
    assert ((result != 0).sum(1) == 1).all(), f"rewards {result.tolist()} for scores {scores.tolist()}"


# -----------------------------------------------------------------------------
# gae [D17]

episodes = sequences("rewards", "values")


def deltas(rewards: list[float], values: list[float], gamma: float) -> list[float]:
    after = [*values[1:], 0.0]
    return [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after)]


def n_step_advantage(rewards: list[float], values: list[float], gamma: float, t: int, n: int) -> float:
    """rₜ + … + γⁿ⁻¹ rₜ₊ₙ₋₁ + γⁿ Vₜ₊ₙ − Vₜ, nothing after the end."""
    r, v = rewards + [0.0] * n, values + [0.0] * (n + 1)
    return sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * v[t + n] - v[t]


def gae_of(s: Sequences, gamma: float, lam: float, **layout: float) -> tuple[Tensor, Tensor]:
    extra = int(layout.get("extra", 0))
    junk = layout.get("junk", 0.0)
    return impl.gae(s.dense("rewards", junk, extra), s.dense("values", junk, extra), s.mask(extra), gamma, lam)


@law(
    "an advantage is the (γλ)-discounted sum of the TD residuals that follow it",
    "[3] eq. 16", "gae", s=episodes, gamma=unit, lam=unit,
)  # fmt: skip
def test_gae_is_the_discounted_sum_of_td_residuals(s, gamma, lam):
    expected = []
    for rewards, values in zip(s.rewards, s.values):
        d = deltas(rewards, values, gamma)
        expected.append([sum((gamma * lam) ** k * x for k, x in enumerate(d[t:])) for t in range(len(d))])
    advantages, _ = gae_of(s, gamma, lam)
    close(advantages, padded(expected, max(s.lengths)))


@law(
    "an advantage is the average of the N-step estimators with weights (1 − λ) λⁿ⁻¹, the rest on the last",
    "[3] eq. 16, first line", "gae", s=episodes, gamma=unit, lam=unit,
)  # fmt: skip
def test_gae_is_the_weighted_average_of_n_step_estimators(s, gamma, lam):
    expected = []
    for rewards, values in zip(s.rewards, s.values):
        row = []
        for t in range(len(rewards)):
            longest = len(rewards) - t  # every estimator this long or longer is the Monte-Carlo one
            steps = [n_step_advantage(rewards, values, gamma, t, n) for n in range(1, longest + 1)]
            weights = [(1 - lam) * lam**n for n in range(longest - 1)] + [lam ** (longest - 1)]
            row.append(sum(w * x for w, x in zip(weights, steps)))
        expected.append(row)
    close(gae_of(s, gamma, lam)[0], padded(expected, max(s.lengths)))


@law(
    "λ = 0 gives the TD residual r + γV' − V, with V' = 0 after the last token",
    "[3] eq. 17", "gae", s=episodes, gamma=unit,
)  # fmt: skip
def test_gae_with_lambda_zero_is_the_td_residual(s, gamma):
    expected = [deltas(r, v, gamma) for r, v in zip(s.rewards, s.values)]
    close(gae_of(s, gamma, 0.0)[0], padded(expected, max(s.lengths)))


@law(
    "λ = 1 gives the discounted reward-to-go minus V",
    "[3] eq. 18", "gae", s=episodes, gamma=unit,
)  # fmt: skip
def test_gae_with_lambda_one_is_monte_carlo_minus_value(s, gamma):
    expected = [
        [sum(gamma**k * x for k, x in enumerate(r[t:])) - v[t] for t in range(len(r))] for r, v in zip(s.rewards, s.values)
    ]
    close(gae_of(s, gamma, 1.0)[0], padded(expected, max(s.lengths)))


@law(
    "with λ = 1 the returns do not depend on the values at all",
    "[3] eq. 18", "gae", s=sequences("rewards", "values", "other"), gamma=unit,
)  # fmt: skip
def test_gae_with_lambda_one_has_returns_without_values(s, gamma):
    swapped = Sequences({"rewards": s.rewards, "values": s.other})
    close(gae_of(swapped, gamma, 1.0)[1], gae_of(s, gamma, 1.0)[1])


@law(
    "returns are advantages plus values on every response token, and 0 outside",
    "[1] section 5; [4]: the value target", "gae", s=episodes, gamma=unit, lam=unit, extra=st.integers(0, 2),
)  # fmt: skip
def test_gae_returns_are_advantages_plus_values(s, gamma, lam, extra):
    advantages, returns = gae_of(s, gamma, lam, extra=extra)
    close(returns, advantages.detach().double() + s.dense("values", extra=extra))


@law(
    "the value of the last token's successor is 0: the response ends the episode",
    "[4]: responses are complete episodes", "gae", reward=numbers(), value=numbers(), lam=unit, gamma=unit,
)  # fmt: skip
def test_gae_of_one_token_is_reward_minus_value(reward, value, lam, gamma):
    advantages, returns = gae_of(Sequences({"rewards": [[reward]], "values": [[value]]}), gamma, lam)
    close(advantages, [[reward - value]])
    close(returns, [[reward]])


@law(
    "advantages and returns are linear in rewards and values together, so not whitened",
    "[3] eq. 16 is a sum; whitening is another step", "gae",
    s=sequences("rewards", "values", "rewards2", "values2"), gamma=unit, lam=unit, scale=st.sampled_from([-2.0, 0.5, 4.0]),
)  # fmt: skip
def test_gae_is_linear(s, gamma, lam, scale):
    second = Sequences({"rewards": s.rewards2, "values": s.values2})
    both = Sequences({
        name: [[x + scale * y for x, y in zip(*rows)] for rows in zip(s.columns[name], second.columns[name])]
        for name in ("rewards", "values")
    })  # fmt: skip
    for one, two, sum_of_both in zip(gae_of(s, gamma, lam), gae_of(second, gamma, lam), gae_of(both, gamma, lam)):
        close(sum_of_both, one.detach().double() + scale * two.detach().double())


@law(
    "an action is never blamed for rewards before it",
    "causality: [2] chapter on policy gradients, reward-to-go", "gae", s=episodes, change=numbers(), gamma=unit, lam=unit,
)  # fmt: skip
def test_gae_ignores_earlier_rewards(s, change, gamma, lam):
    later = Sequences({"rewards": [[row[0] + change, *row[1:]] for row in s.rewards], "values": s.values})
    for before, after in zip(gae_of(s, gamma, lam), gae_of(later, gamma, lam)):
        close(after[:, 1:], before[:, 1:].detach())


@law(
    "with perfect values there is no surprise: every advantage is 0 for every λ",
    "[3] section 3: δ has expectation A", "gae", s=sequences("rewards"), gamma=unit, lam=unit,
)  # fmt: skip
def test_gae_is_zero_where_values_are_perfect(s, gamma, lam):
    values = [[sum(gamma**k * x for k, x in enumerate(row[t:])) for t in range(len(row))] for row in s.rewards]
    advantages, _ = gae_of(Sequences({"rewards": s.rewards, "values": values}), gamma, lam)
    close(advantages, torch.zeros(s.mask().shape), tolerance=1e-8 if advantages.dtype == torch.float64 else 1e-4)
