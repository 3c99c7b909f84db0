"""Laws of PPO for language models: what is true of every correct implementation, each with its source.

    python test_pmo.py                              the contract's 93 laws, in a table; --table out.json writes it
    PMO_IMPL=my_module python test_pmo.py           the same, held against the functions of my_module (or path/to/it.py)
    PMO_IMPL=my_module pytest test_pmo.py           each law by itself: a failure shows the smallest counterexample
    PMO_IMPL=trl python test_pmo.py                 TRL, torchtune or torchrl, where installed, by the adapters below
    pytest test_pmo.py                              pmo: these laws, then its own: details D1 to D25, pipeline, runs
    python test_pmo.py race short                   time an update of pmo's against one of TRL's (README: "Speed");
                                                    race tldr 4: four responses per query; race reward: that stage

93 laws are about the contract and can be held against any implementation; they end at the line "copy up to here",
and the file works alone when it ends there. The laws below that line are pmo's own.

An implementation is a module with any of the contract's functions (README: "Verify another implementation"): torch
tensors in (float64, or what its DTYPE says), on the CPU; tensors or numpy arrays out, on any device. What it lacks,
or what raises NotImplementedError, is missing, never passed; so are laws about gradients if none of its results has
any. KNOWN_FAILURES = {"test_name": "why"} names laws it is known to break; such a law must then really fail. Where
good implementations differ (n or n − 1 in a variance), a law names the alternatives and says which one it found; only
pmo is held to the first. Laws about what good implementations often leave out (NaN in padding, numbers without
spread, bfloat16) are hardening: they have a column of their own and are no failure, but of pmo.

Sources: numbers in brackets are pmo.py's references; the tags D1 to D25 are the details in README.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import json
import math
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from torch import Tensor

IMPL = os.environ.get("PMO_IMPL", "pmo")
sys.path.insert(0, os.getcwd())


def load(name: str):
    """The implementation: a module that can be imported, or the path of a file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    sys.path.insert(0, str(Path(name).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unusable(why: object) -> None:
    """End with one line: nothing can be held."""
    said = f"PMO_IMPL={IMPL} cannot be used: {why}"
    sys.exit(said) if __name__ == "__main__" else pytest.exit(said, returncode=4)


try:
    impl = load(IMPL)
except (ImportError, OSError) as error:
    unusable(error)
is_pmo = hasattr(impl, "Config") and hasattr(impl, "ppo")

CONTRACT = (
    "response_mask", "score_index", "length_mask", "positions", "penalize_missing_eos", "logprobs_of", "entropy_of",
    "masked_mean", "whiten", "kl_estimate", "kl_loss", "token_rewards", "gae", "leave_one_out", "policy_loss",
    "value_loss", "aggregate", "minibatch_share", "preference_loss", "pair_loss", "truncate_post",
)  # fmt: skip


def dtype() -> torch.dtype:
    """What the implementation computes in: float64, so that rounding hides nothing, unless it says otherwise."""
    return getattr(impl, "DTYPE", torch.float64)


class Contract:
    """The implementation's functions as the laws call them: floats go in as `dtype()`, and come back as float64
    tensors on the CPU, whatever was returned. `coarse` remembers a result of lower precision: `close` is then laxer."""

    coarse = False

    def __getattr__(self, name: str) -> Callable:
        function = getattr(impl, name)

        def call(*args: object, **kwargs: object):
            return self.received(name, function(*(self.sent(x) for x in args), **kwargs))

        return call

    @staticmethod
    def sent(x: object) -> object:
        return x.to(dtype()) if isinstance(x, Tensor) and x.is_floating_point() else x

    def received(self, name: str, x: object):
        if isinstance(x, (tuple, list)):
            return tuple(self.received(name, part) for part in x)
        check(x is not None, f"{name} returned None")
        if isinstance(x, str):
            return x
        x = on_cpu(x)
        if not x.is_floating_point():
            return x
        self.coarse |= x.dtype != torch.float64
        return x.double()


def on_cpu(x: object) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64 if isinstance(x, float) else None).cpu()


contract = Contract()

# -----------------------------------------------------------------------------
# laws: how one is stated, checked and reported


@dataclass(frozen=True)
class Law:
    """A statement, its source, the functions it speaks about (all are needed, or any of them), and a check of it.
    With `choices` the check takes one of them as `choice`: one of them holds throughout."""

    name: str
    statement: str
    source: str
    needs: tuple[str, ...]
    any_of: bool
    choices: tuple[str, ...]
    hardening: bool
    test: Callable[..., None]
    strategies: dict[str, st.SearchStrategy]

    def hold(self, examples: int = 60, shrink: bool = True) -> str:
        """Raise unless the law holds for the implementation under test; deterministic. Returns the choice found."""
        __tracebackhide__ = True
        if not self.choices:
            self.check(examples, shrink)
            return ""
        errors = []
        for choice in self.choices[:1] if is_pmo else self.choices:
            try:
                self.check(examples, shrink, choice=choice)
                return choice
            except AssertionError as error:
                errors.append(error)
        if len(errors) > 1:
            errors[0].args = (f"neither {' nor '.join(self.choices)}: {errors[0]}",)
        raise errors[0]

    def check(self, examples: int, shrink: bool, **fixed: str) -> None:
        __tracebackhide__ = True
        held, refused = [], []

        def once(**drawn: object) -> None:
            __tracebackhide__ = True
            if len(refused) >= examples and not held:
                return  # nothing seems to be left of this law
            contract.coarse = dtype() != torch.float64
            try:
                self.test(**drawn, **fixed)
            except NotImplementedError as error:
                refused.append(str(error) or "NotImplementedError")
                reject()
            held.append(True)

        once.__name__ = once.__qualname__ = self.name
        if not self.strategies:
            contract.coarse = dtype() != torch.float64
            return self.test(**fixed)
        phases = (Phase.explicit, Phase.generate, *((Phase.shrink,) if shrink else ()))
        calm = settings(
            max_examples=examples, derandomize=True, deadline=None, database=None, phases=phases,
            suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        )  # fmt: skip
        try:
            calm(given(**self.strategies)(once))()
        except Unsatisfiable:
            assert refused and not held, f"no example of {self.name} is possible"
        if refused and not held:
            raise NotImplementedError(refused[0])

    def missing(self) -> str:
        """What the implementation lacks for this law, with a hint where a name comes near."""
        absent = [name for name in self.needs if not hasattr(impl, name)]
        if not absent or (self.any_of and len(absent) < len(self.needs)):
            return ""
        hints = [f"{name} (has {', '.join(near)})" if (near := near_names(name)) else name for name in absent]
        return f"{impl.__name__} has no {', '.join(hints)}"


def near_names(name: str) -> list[str]:
    public = [x for x in vars(impl) if not x.startswith("_") and x not in CONTRACT and callable(getattr(impl, x))]
    return difflib.get_close_matches(name, public, n=2, cutoff=0.75)


LAWS: dict[str, Law] = {}


def law(statement: str, source: str, *needs: str, any_of: bool = False, choice: tuple[str, ...] = (),
        hardening: bool = False, called: str = "", **strategies: st.SearchStrategy):  # fmt: skip
    """State a law. The decorated function checks one example of it; hypothesis draws its arguments. A law that is
    stated in a loop says what it is called."""

    def decorate(test: Callable[..., None]) -> Callable[[], None] | None:
        name = called or test.__name__
        stated = LAWS[name] = Law(name, statement, source, needs, any_of, choice, hardening, test, strategies)
        if not is_pmo and not set(needs) <= set(CONTRACT):
            return None  # pmo's own: pytest does not see it

        def run() -> None:
            __tracebackhide__ = True
            known, lacking, found = getattr(impl, "KNOWN_FAILURES", {}).get(name), stated.missing(), ""
            try:
                found = "" if lacking else stated.hold()
            except NotImplementedError as error:
                lacking = str(error) or "NotImplementedError"
            except (Exception, pytest.fail.Exception) as error:
                if known:
                    pytest.xfail(known)
                if hardening and not is_pmo:
                    pytest.xfail(f"hardening: {f'{error}'.partition(chr(10))[0] or type(error).__name__}")
                notes = [f"law: {statement}", f"source: {source}", f"implementation: {impl.__file__}"]
                error.__notes__ = [*getattr(error, "__notes__", []), *notes]
                raise
            if lacking and not any(hasattr(impl, function) for function in CONTRACT):
                pytest.fail(f"{impl.__name__} has no function of the contract: {', '.join(CONTRACT)}", pytrace=False)
            if known:
                state = f"is missing: {lacking}" if lacking else "holds"
                said = f"KNOWN_FAILURES of {impl.__name__} names this law, but it {state}. Remove the entry"
                pytest.fail(said, pytrace=False)
            if lacking:
                pytest.skip(f"missing: {lacking}")
            if choice and found != choice[0]:
                pytest.xfail(f"choice: {found}")

        run.__name__ = run.__qualname__ = name
        run.__doc__ = statement
        run.__module__ = test.__module__
        vars(run).update(dict.fromkeys(needs, True))  # so that `pytest -k gae` finds every law about gae
        globals()[name] = run
        return run

    return decorate


def test_the_module_offers_what_it_says():
    """Its KNOWN_FAILURES name laws of the contract. (That it has a function of it, every law says.)"""
    laws = contracts_laws()
    if unknown := sorted(set(getattr(impl, "KNOWN_FAILURES", {})) - set(laws)):
        near = {name: difflib.get_close_matches(name, laws, n=1) for name in unknown}
        meant = "; ".join(name + (f" (meant: {near[name][0]}?)" if near[name] else "") for name in unknown)
        pytest.fail(f"KNOWN_FAILURES of {impl.__name__} names no law of the contract: {meant}", pytrace=False)


def close(actual: object, expected: object, tolerance: float | None = None) -> None:
    """Equal up to rounding: 1e-6 in float64, 1e-4 in float32, relative to the largest number in sight. Masks: bool."""
    __tracebackhide__ = True
    actual, expected = on_cpu(actual).detach(), torch.as_tensor(expected).detach().cpu()
    if expected.dtype == torch.bool != actual.dtype:
        raise AssertionError(f"dtype is {actual.dtype}, should be bool")
    tolerance = tolerance or (1e-6 if actual.dtype == torch.float64 else 1e-4)
    tolerance = max(tolerance, 1e-4) if contract.coarse else tolerance
    result, expected = actual.double(), expected.double()
    if result.shape != expected.shape:
        raise AssertionError(f"shape is {tuple(result.shape)}, should be {tuple(expected.shape)}")
    scale = max(1.0, expected.nan_to_num(0, 0, 0).abs().max().item()) if expected.numel() else 1.0
    right = ((result - expected).abs() <= tolerance * scale) | (result == expected)
    wrong = ~(right | (result.isnan() & expected.isnan()))
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        place = "at " + "".join(f"[{i}]" for i in index) + ": " if index else ""
        more = f" ({wrong.sum()} of {wrong.numel()} differ)" if wrong.numel() > 1 else ""
        raise AssertionError(f"{place}got {result[index] + 0:.9g}, should be {expected[index] + 0:.9g}{more}")


def check(condition: object, message: str) -> None:
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(message)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of the sum of the function's results by each input, 0 where none flows."""
    if not has_gradients(impl):
        raise NotImplementedError("none of its results carries a gradient")
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    total = function(*leaves).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    return tuple(torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(leaves, found))


@functools.cache
def has_gradients(module) -> bool:
    """Whether any of the module's results can be differentiated: one that works in numpy has none."""
    for name, args in some_arguments(dtype()).items():
        leaves = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        try:
            results = getattr(module, name.split()[0])(*leaves)
        except Exception:  # whatever it is, the function's own laws say it
            continue
        if any(getattr(x, "requires_grad", False) for x in (results if isinstance(results, tuple) else (results,))):
            return True
    return False


def some_arguments(of: torch.dtype) -> dict[str, tuple]:
    """The arguments of one call of each function that takes numbers, of this dtype."""
    x, y, z = (
        torch.tensor(rows, dtype=of)
        for rows in ([[1, -0.5, 2], [0.5, 3, 4]], [[0, 0.5, -1], [2, 1, 4]], [[2, 1, -1], [1, -2, 4]])
    )
    mask, tokens = torch.tensor([[True] * 3, [True, True, False]]), torch.tensor([[0, 1, 2], [2, 1, 0]])
    logits = torch.stack([x, y, z], dim=2)
    return {
        "penalize_missing_eos": (x[:, 0], torch.tensor([True, False]), -1.0),
        "logprobs_of": (logits, tokens, 0.5), "entropy_of": (logits, 0.5),
        "masked_mean": (x, mask), "whiten": (x, mask), "token_rewards": (x[:, 0], y, mask, 0.5),
        "kl_estimate k1": (x, y, "k1"), "kl_estimate k2": (x, y, "k2"), "kl_estimate k3": (x, y, "k3"),
        "gae": (x, y, mask, 0.5, 0.5), "policy_loss": (x, y, z, 0.25), "value_loss": (x, y, z, 0.25),
        "aggregate token": (x, mask, "token"), "aggregate sequence": (x, mask, "sequence"),
        "preference_loss": (x[:, 0], y[:, 0]), "leave_one_out": (x[:, 0], 2), "kl_loss": (x, y, 0.5),
        "minibatch_share": (x, mask, mask), "pair_loss": (x, y, mask.sum(1), mask.sum(1)),
    }  # fmt: skip


def for_each(names: tuple[str, ...], look: Callable[[str], None]) -> None:
    """Look at every function of these that the implementation has ("aggregate token" is aggregate, asked for that)."""
    __tracebackhide__ = True
    looked, why = 0, f"none of {', '.join(names)}"
    for name in (name for name in names if hasattr(impl, name.split()[0])):
        try:
            look(name)
            looked += 1
        except NotImplementedError as error:
            why = str(error) or why
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    if not looked:
        raise NotImplementedError(why)


# A batch, as the laws see it, is a list of sequences of numbers. `dense` lays it out as an implementation wants it.


class Sequences:
    """Sequences of equal lengths under several names, as lists of numbers, without padding."""

    def __init__(self, columns: dict[str, list[list[float]]]) -> None:
        self.columns = columns
        vars(self).update(columns)

    def __repr__(self) -> str:
        names = ", ".join(self.columns)
        rows = [list(zip(*parts)) if len(parts) > 1 else parts[0] for parts in zip(*self.columns.values())]
        return f"{f'({names})' if len(self.columns) > 1 else names} in {rows}"

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in next(iter(self.columns.values()))]

    def dense(self, name: str, junk: float = 0.0, extra: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        width = max(self.lengths) + extra
        return torch.tensor([row + [junk] * (width - len(row)) for row in self.columns[name]], dtype=dtype)

    def first(self, name: str) -> Tensor:
        """(B,) the first number of each sequence."""
        return torch.tensor([row[0] for row in self.columns[name]], dtype=torch.float64)

    def mask(self, extra: int = 0) -> Tensor:
        width = max(self.lengths) + extra
        return torch.tensor([[t < n for t in range(width)] for n in self.lengths])

    def __getitem__(self, rows: list[int]) -> Sequences:
        return Sequences({name: [column[i] for i in rows] for name, column in self.columns.items()})


def numbers(low: float = -3, high: float = 3) -> st.SearchStrategy[float]:
    """Multiples of 1/8: exact in every precision, small when shrunk."""
    return st.integers(round(8 * low), round(8 * high)).map(lambda n: n / 8)


def sequences(*names: str, rows: int = 4, longest: int = 6, **ranges: tuple) -> st.SearchStrategy[Sequences]:
    """One to four sequences of one to six numbers under each name; `name=(low, high)` narrows the range. Drawn as
    rows of tuples, so that a counterexample shrinks by whole tokens and rows."""
    limits = {name: (-3.0, 3.0) for name in names} | ranges
    token = st.tuples(*(numbers(*limit) for limit in limits.values()))
    batches = st.lists(st.lists(token, min_size=1, max_size=longest), min_size=1, max_size=rows)
    return batches.map(lambda s: Sequences({name: [[x[i] for x in row] for row in s] for i, name in enumerate(limits)}))


def padded(rows: list[list[float]], width: int = 0, junk: float = 0.0) -> Tensor:
    width = width or max(map(len, rows))
    return torch.tensor([row + [junk] * (width - len(row)) for row in rows], dtype=torch.float64)


def tensors(shape: tuple[int, ...], low: float = -3, high: float = 3) -> st.SearchStrategy[Tensor]:
    size = math.prod(shape)
    return st.lists(numbers(low, high), min_size=size, max_size=size).map(
        lambda flat: torch.tensor(flat, dtype=torch.float64).view(shape)
    )


unit, positive = (st.integers(least, 8).map(lambda n: n / 8) for least in (0, 3))
EPSILON = 0.25  # a clip range whose edges 0.75 and 1.25 are exact

# -----------------------------------------------------------------------------
# response_mask, length_mask, penalize_missing_eos [D3, D4, D12]

ids = st.integers(0, 3)
responses = st.integers(1, 6).flatmap(lambda T: st.lists(st.lists(ids, min_size=T, max_size=T), min_size=1, max_size=4))


@law("a response mask is True up to and including the first EOS, and everywhere in a row without one",
     "[4] detail 'EOS'; [5] section 3.3", "response_mask", rows=responses, eos_id=ids)  # fmt: skip
def test_response_mask_ends_with_the_first_eos(rows, eos_id):
    expected = [[eos_id not in row[:t] for t in range(len(row))] for row in rows]
    close(contract.response_mask(torch.tensor(rows), eos_id), expected)


@law("what the sampler wrote after the first EOS, EOS again or a pad id, changes nothing",
     "D3: lengths, not pad ids, make masks", "response_mask", rows=responses, eos_id=ids, junk=ids)  # fmt: skip
def test_response_mask_ignores_tokens_after_eos(rows, eos_id, junk):
    filled = [[junk if eos_id in row[:t] else token for t, token in enumerate(row)] for row in rows]
    before = contract.response_mask(torch.tensor(rows), eos_id)
    close(contract.response_mask(torch.tensor(filled), eos_id), before)


@law("the score is read at the first EOS, or at the last token of a row without one, also where EOS fills the row up",
     "D8; where pad = EOS, what stands before the first pad is not the end", "score_index", rows=responses, eos_id=ids)  # fmt: skip
def test_the_score_is_read_at_the_first_eos(rows, eos_id):
    filled = [[eos_id if eos_id in row[:t] else token for t, token in enumerate(row)] for row in rows]
    expected = [row.index(eos_id) if eos_id in row else len(row) - 1 for row in rows]
    close(contract.score_index(torch.tensor(filled), eos_id), expected)


@law("a length mask is True on as many first slots as the length says", "D3", "length_mask",
     lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), extra=st.integers(0, 2))  # fmt: skip
def test_length_mask_is_true_on_the_first_slots(lengths, extra):
    T = max(lengths) + extra
    mask = contract.length_mask(torch.tensor(lengths), T)
    close(mask, torch.tensor([[t < n for t in range(T)] for n in lengths]).view(len(lengths), T).bool())


@law("padding on the left moves no position: a row's first token has position 0, and padding some valid one",
     "[4] detail 'position ids'; D5", "positions", lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
     extra=st.integers(0, 2))  # fmt: skip
def test_left_padding_moves_no_position(lengths, extra):
    width = max(lengths) + extra
    mask = torch.tensor([[t >= width - n for t in range(width)] for n in lengths])
    found = contract.positions(mask)
    close(found[mask], [t for n in lengths for t in range(n)])
    check(0 <= found.min() <= found.max() < width, f"{found.tolist()} are not all positions")


@law("a response without EOS gets exactly the given score, whatever the model said; others keep theirs",
     "[4] detail 'EOS trick': the score is set to -1, not lowered by 1", "penalize_missing_eos",
     rows=st.lists(st.tuples(numbers(), st.booleans()), min_size=1, max_size=5), value=numbers())  # fmt: skip
def test_missing_eos_replaces_the_score(rows, value):
    scores = torch.tensor([score for score, _ in rows], dtype=torch.float64)
    expected = [score if has else value for score, has in rows]
    close(contract.penalize_missing_eos(scores, torch.tensor([has for _, has in rows]), value), expected)


@law("a score that is replaced may have been anything, NaN too", "D12: replaced, so the old score plays no part",
     "penalize_missing_eos", value=numbers())  # fmt: skip
def test_missing_eos_replaces_nan(value):
    scores = torch.tensor([math.nan, 0.5], dtype=torch.float64)
    close(contract.penalize_missing_eos(scores, torch.tensor([False, True]), value), [value, 0.5])


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


@law("a token's log-probability is the log of softmax(logits / temperature) at that token",
     "[4] detail 'temperature'; D13", "logprobs_of", case=logits_and_tokens,
     temperature=temperatures)  # fmt: skip
def test_logprobs_are_log_softmax_of_tempered_logits(case, temperature):
    logits, tokens = case
    rows = zip(logits.tolist(), tokens.tolist())
    expected = [[math.log(softmax(x, temperature)[v]) for x, v in zip(*row)] for row in rows]
    close(contract.logprobs_of(logits, tokens, temperature), expected)


def for_logits(
    functions: object, tokens: Tensor, look: Callable[[Callable[[Tensor, float], Tensor], str], None]
) -> None:
    """Look at logprobs_of and entropy_of as functions of logits and temperature, and at their names."""

    def function(name: str) -> Callable[[Tensor, float], Tensor]:
        between = (tokens,) if name == "logprobs_of" else ()
        return lambda logits, temperature: getattr(functions, name)(logits, *between, temperature)

    for_each(("logprobs_of", "entropy_of"), lambda name: look(function(name), name))


@law("adding a constant to all logits, or scaling logits and temperature together, changes nothing", "D13",
     "logprobs_of", "entropy_of", any_of=True, case=logits_and_tokens, shift=numbers())  # fmt: skip
def test_logprobs_and_entropy_depend_on_logit_differences_over_temperature(case, shift):
    def look(function: Callable[[Tensor, float], Tensor], name: str) -> None:
        expected = function(case[0], 0.5)
        close(function(case[0] + shift, 0.5), expected)
        close(function(2 * case[0], 1.0), expected)

    for_logits(contract, case[1], look)


@law("the gradient of a token's log-probability is (one-hot − softmax) / temperature", "derivative of log-softmax; D13",
     "logprobs_of", case=logits_and_tokens, temperature=temperatures)  # fmt: skip
def test_logprobs_gradient_is_one_hot_minus_softmax(case, temperature):
    logits, tokens = case
    (gradient,) = gradients(lambda x: contract.logprobs_of(x, tokens, temperature), logits)
    one_hot = torch.nn.functional.one_hot(tokens, logits.shape[2])
    close(gradient, (one_hot - (logits / temperature).softmax(-1)) / temperature)


@law("logits in bfloat16 are computed with in float32", "D21: a ratio of 1.0001 does not exist in bfloat16",
     "logprobs_of", "entropy_of", any_of=True, hardening=True, case=logits_and_tokens)  # fmt: skip
def test_logprobs_and_entropy_of_half_precision_are_float32(case):
    def look(function: Callable[[Tensor, float], Tensor], name: str) -> None:
        logits = case[0].bfloat16()
        half = on_cpu(function(logits, 0.7))
        check(half.dtype == torch.float32, f"dtype is {half.dtype}, should be float32")
        close(half, function(logits.to(dtype()), 0.7), tolerance=1e-5)

    for_logits(impl, case[1], look)


@law("logits of a size that overflows exp() give finite log-probabilities and entropy", "stability of log-softmax",
     "logprobs_of", "entropy_of", any_of=True, size=st.sampled_from([1e2, 1e3, 1e4]))  # fmt: skip
def test_logprobs_and_entropy_are_stable_for_huge_logits(size):
    logits = torch.tensor([[[size, 0, -size], [0, size, -size]]], dtype=torch.float64)
    expected = {"logprobs_of": [[-2 * size, 0.0]], "entropy_of": [[0.0, 0.0]]}
    for_logits(contract, torch.tensor([[2, 1]]), lambda function, name: close(function(logits, 1.0), expected[name]))


@law("entropy is −Σ π log π of the tempered distribution, in nats", "[1] eq. 9, S; D13", "entropy_of",
     case=logits_and_tokens, temperature=temperatures)  # fmt: skip
def test_entropy_is_minus_the_expected_logprob(case, temperature):
    expected = [[-sum(p * math.log(p) for p in softmax(x, temperature)) for x in row] for row in case[0].tolist()]
    close(contract.entropy_of(case[0], temperature), expected)


@law("a token that cannot be sampled (logit −∞) adds nothing to the entropy", "lim p log p = 0", "entropy_of",
     V=st.integers(2, 5))  # fmt: skip
def test_entropy_ignores_impossible_tokens(V):
    logits = torch.cat([torch.zeros(1, 1, V), torch.full((1, 1, 1), -math.inf)], dim=2).double()
    close(contract.entropy_of(logits, 0.7), [[math.log(V)]])


# -----------------------------------------------------------------------------
# masked_mean, whiten [D16]


def tokens_of(s: Sequences) -> Tensor:
    """(n,) all numbers of the first column, without padding."""
    return torch.tensor([x for row in next(iter(s.columns.values())) for x in row], dtype=torch.float64)


# Whitening by any usual ε (outside the root, or inside it) agrees to 1e-3 where numbers differ by about 1; verdicts
# on one token, on constants and on a tiny spread are laws of their own.
spread = sequences("x").filter(lambda s: sum(s.lengths) > 1 and tokens_of(s).std(correction=0) > 0.5)
WHITE = 1e-3


@law("a masked mean is the mean of what the mask leaves", "D23: every statistic is over response tokens", "masked_mean",
     s=sequences("x"))  # fmt: skip
def test_masked_mean_is_the_mean_of_all_tokens(s):
    close(contract.masked_mean(s.dense("x"), s.mask()), tokens_of(s).mean())


@law("the gradient of a masked mean is 1/n on the mask and 0 outside", "D5: padding never matters", "masked_mean",
     s=sequences("x"), extra=st.integers(0, 2))  # fmt: skip
def test_masked_mean_gradient_is_uniform_on_the_mask(s, extra):
    mask = s.mask(extra)
    (gradient,) = gradients(lambda x: contract.masked_mean(x, mask), s.dense("x", 5.0, extra))
    close(gradient, mask.double() / mask.sum())


@law("whitened numbers have mean 0, variance 1 by one of the two divisors n and n − 1, and their old proportions",
     "[4] detail 'advantage whitening'; both divisors are in use", "whiten", s=spread)  # fmt: skip
def test_whiten_gives_mean_zero_and_variance_one(s):
    white, x = contract.whiten(s.dense("x"), s.mask())[s.mask()], tokens_of(s)
    close(white.mean(), 0.0, tolerance=1e-5)
    variances = [white.var(correction=correction).item() for correction in (0, 1)]
    check(min(abs(v - 1) for v in variances) < 2 * WHITE, f"variance is {variances[0]:.6g} over n = {len(x)}")
    close(white, (x - x.mean()) / x.std() * white.std(), tolerance=1e-5)


@law("whitening divides by the standard deviation of the population or of the sample", "contract", "whiten",
     choice=("divides by n", "divides by n − 1"), s=spread)  # fmt: skip
def test_whiten_uses_the_population_variance(s, choice):
    x = tokens_of(s)
    white = contract.whiten(s.dense("x"), s.mask())[s.mask()]
    close(white - white.mean(), (x - x.mean()) / x.std(correction=int("1" in choice)), tolerance=WHITE)


@law("against division by 0 a small ε stands outside the root, inside it, or is a floor (or is not there)",
     "contract: dividing by std + ε", "whiten", choice=("σ + ε", "√(σ² + ε)", "max(σ, ε)"))  # fmt: skip
def test_whiten_adds_epsilon_outside_the_root(choice):
    def divisor(spread: float) -> float:
        x = torch.tensor([[-spread, spread, spread, -spread]], dtype=torch.float64)
        return 2 * spread / (contract.whiten(x, x != 0) @ torch.tensor([[-0.5], [0.5], [0.5], [-0.5]]).double()).item()

    small, large, off = 2.0**-12, 2.0**-9, 1e-5 if contract.coarse else 1e-6
    one, two, errors = divisor(small), divisor(large), []
    for factor in (1.0, (4 / 3) ** 0.5):  # n, n − 1
        epsilon, expected = {
            "σ + ε": (e := one - small * factor, large * factor + e),
            "√(σ² + ε)": (e := one**2 - (small * factor) ** 2, max(0, (large * factor) ** 2 + e) ** 0.5),
            "max(σ, ε)": (one, max(large * factor, one)),
        }[choice]
        errors.append(abs(two / expected - 1) if -off * small <= epsilon < 1e-2 else math.inf)
    check(min(errors) < off, f"σ of {small:.3g} and {large:.3g} are divided by {one:.9g} and {two:.9g}: not {choice}")


@law("whitening does not see a shift or a positive scale of its input, and flips with its sign",
     "a standard score", "whiten", s=spread, shift=numbers(), scale=st.sampled_from([0.5, 3.0, 100.0]))  # fmt: skip
def test_whiten_is_invariant_to_shift_and_scale(s, shift, scale):
    x, mask = s.dense("x"), s.mask()
    white = contract.whiten(x, mask)[mask]
    close(contract.whiten(x * scale + shift, mask)[mask], white, tolerance=WHITE)
    close(contract.whiten(-x, mask)[mask], -white, tolerance=WHITE)


@law("without shifting the mean, whitening only scales (zero stays zero, signs stay), or adds the mean back",
     "D16; [4]'s code adds it", "whiten", choice=("only scales", "adds the mean back"), s=spread)  # fmt: skip
def test_whiten_without_shift_only_scales(s, choice):
    x, mask = tokens_of(s), s.mask()
    white = contract.whiten(s.dense("x"), mask, shift_mean=False)[mask]
    errors = []
    for correction in (0, 1):
        std = x.std(correction=correction)
        errors.append(white - (x / std if choice == "only scales" else (x - x.mean()) / std + x.mean()))
    check(min(e.abs().max() for e in errors) < 10 * WHITE, f"{x.tolist()} became {white.tolist()}: not {choice}")


@law("what has no spread is never blown up: constants come back no larger than they were", "D16", "whiten",
     hardening=True, value=st.sampled_from([0.0, 0.1, -3.0, 1000.1]), n=st.integers(1, 7),
     shift_mean=st.booleans())  # fmt: skip
def test_whiten_leaves_constant_input_alone(value, n, shift_mean):
    for kind in {torch.float32, dtype()}:
        x = torch.full((1, n), value, dtype=kind)
        white = on_cpu(impl.whiten(x, torch.ones(1, n, dtype=torch.bool), shift_mean=shift_mean))
        limit = 1e-3 if shift_mean else abs(value) + 1e-3
        check(white.abs().max() <= limit, f"constant {value} became {white.tolist()}")


@law("numbers that differ by thousandths are whitened as well", "D16: advantages get small as the critic gets good",
     "whiten", hardening=True, s=spread)  # fmt: skip
def test_whiten_scales_up_a_small_spread(s):
    x, mask = s.dense("x"), s.mask()
    close(contract.whiten(x / 512, mask)[mask], contract.whiten(x, mask)[mask], tolerance=10 * WHITE)


# -----------------------------------------------------------------------------
# kl_estimate [D15]

distributions = st.integers(2, 5).flatmap(lambda V: st.tuples(tensors((V,), -2, 2), tensors((V,), -2, 2)))
pairs = sequences("logprobs", "ref")
SCHULMAN, DERIVED = "Schulman 2020, Approximating KL Divergence", "differentiate under samples of π; D15"


def check_expected_gradient(estimate: Callable, logits: tuple[Tensor, Tensor], whole: Callable) -> None:
    """Whether an estimate from single tokens has, over samples of π, the gradient of a function of whole π and π_ref."""
    q = logits[1].log_softmax(0)

    def estimated(x: Tensor) -> Tensor:
        p = x.log_softmax(0)
        return p.detach().exp() * estimate(p[None], q[None])[0]

    x = logits[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(whole(x.log_softmax(0), q), x)
    close(gradients(estimated, logits[0])[0], expected)


WHOLE = {
    "nothing": lambda p, q: 0 * p.sum(), "KL(π ‖ π_ref)": lambda p, q: (p.exp() * (p - q)).sum(),
    "KL(π_ref ‖ π)": lambda p, q: (q.exp() * (q - p)).sum(),
}  # fmt: skip

for kind, said, formula, whole in (  # test_kl_estimate_k1_is_schulmans, and so on
    ("k1", "log π − log π_ref", lambda p, q: p - q, "nothing"),
    ("k2", "k1²/2", lambda p, q: (p - q) ** 2 / 2, "KL(π ‖ π_ref)"),
    ("k3", "π_ref/π − 1 + k1", lambda p, q: math.exp(q - p) - 1 + (p - q), "KL(π_ref ‖ π)"),
):

    @law(f"{kind} is {said}", SCHULMAN, "kl_estimate", called=f"test_kl_estimate_{kind}_is_schulmans", s=pairs)
    def _(s, kind=kind, formula=formula):
        rows = [[formula(p, q) for p, q in zip(*row)] for row in zip(s.logprobs, s.ref)]
        close(contract.kl_estimate(s.dense("logprobs"), s.dense("ref"), kind), padded(rows))

    @law(f"{kind} as a loss has, in expectation, the gradient of {whole}", DERIVED, "kl_estimate",
         called=f"test_kl_estimate_{kind}_has_its_gradient", logits=distributions)  # fmt: skip
    def _(logits, kind=kind, whole=whole):
        check_expected_gradient(lambda p, q: contract.kl_estimate(p, q, kind), logits, WHOLE[whole])


for kind in ("k1", "k3"):

    @law(f"{kind} is, in expectation over samples of π, KL(π ‖ π_ref)", SCHULMAN, "kl_estimate",
         called=f"test_kl_estimate_{kind}_is_unbiased", logits=distributions)  # fmt: skip
    def _(logits, kind=kind):
        p, q = (x.log_softmax(0) for x in logits)
        estimates = contract.kl_estimate(p[None], q[None], kind)[0]
        close((p.exp() * estimates).sum(), WHOLE["KL(π ‖ π_ref)"](p, q))


@law("a price of KL that stands in the loss has the expected gradient of β KL(π ‖ π_ref), or of β KL(π_ref ‖ π); k1 has "
     "none", DERIVED, "kl_loss", choice=("KL(π ‖ π_ref)", "KL(π_ref ‖ π)"), logits=distributions, kl_coef=unit)  # fmt: skip
def test_kl_in_the_loss_has_a_gradient(logits, kl_coef, choice):
    whole = lambda p, q: kl_coef * WHOLE[choice](p, q)  # noqa: E731
    check_expected_gradient(lambda p, q: contract.kl_loss(p, q, kl_coef), logits, whole)


@law("k3 of nearly equal policies is k1²/2 to a few percent, in float32 too",
     "Taylor; exp(x) − 1 loses all digits", "kl_estimate", size=st.sampled_from([1e-2, 1e-3, 1e-4]))  # fmt: skip
def test_k3_keeps_its_digits_near_zero(size):
    k3 = on_cpu(impl.kl_estimate(torch.tensor([[size, -size]], dtype=torch.float32), torch.zeros(1, 2), "k3")).double()
    wrong = ((k3 / (size**2 / 2) - 1).abs() >= 0.05).any()
    check(not wrong, f"k3 of ±{size} is {k3.tolist()}, about {size**2 / 2} expected")


def bounded(result: Tensor, expected: Tensor, choice: str) -> None:
    """With choice "nothing is clamped" the expected numbers; else each cut off at ±c, for one c below the largest."""
    limit = result.abs().max()
    if choice != "nothing is clamped":
        check(0 < limit < expected.abs().max(), f"{result.tolist()} is not {expected.tolist()}, clamped")
        expected = expected.clamp(-limit, limit)
    close(result, expected, tolerance=1e-5)


CLAMPS = ("nothing is clamped", "clamped")


@law("a token 25 nats likelier than under the reference has a k1 of 25, one 25 nats less likely of −25",
     "[5] section 3.4 has no bound; some clamp it", "kl_estimate", choice=CLAMPS)  # fmt: skip
def test_k1_of_very_different_policies(choice):
    logprobs = torch.tensor([[-1.0, -26.0, -1.5]], dtype=torch.float64)
    ref_logprobs = torch.tensor([[-26.0, -1.0, -1.0]], dtype=torch.float64)
    bounded(contract.kl_estimate(logprobs, ref_logprobs, "k1"), logprobs - ref_logprobs, choice)


# -----------------------------------------------------------------------------
# token_rewards [D15]

scored = sequences("kl", scores=(-3, 3))


@law("each response token pays −β·kl; the last one, EOS itself, also earns the score",
     "Ziegler et al. 2019 eq. 2; [5] section 3.4", "token_rewards", s=scored, kl_coef=numbers(0, 1))  # fmt: skip
def test_score_is_paid_to_the_last_response_token(s, kl_coef):
    expected = [[-kl_coef * kl for kl in row] for row in s.kl]
    for row, (score, *_) in zip(expected, s.scores):
        row[-1] += score
    close(contract.token_rewards(s.first("scores"), s.dense("kl"), s.mask(), kl_coef), padded(expected))


@law("a score of 30 is paid as it is, or clamped", "[5] section 3.4 has no bound", "token_rewards", choice=CLAMPS)
def test_large_scores_are_paid(choice):
    scores, mask = torch.tensor([30.0, -30.0, 1.0], dtype=torch.float64), torch.ones(3, 2, dtype=torch.bool)
    rewards = contract.token_rewards(scores, torch.zeros(3, 2, dtype=torch.float64), mask, 0.5)
    bounded(rewards.sum(1), scores, choice)


@law("a KL of 25 costs β·25, or is clamped", "[5] section 3.4 has no bound", "token_rewards", choice=CLAMPS)
def test_large_kl_is_paid(choice):
    kl, mask = torch.tensor([[25.0, -25.0, 1.0]], dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    rewards = contract.token_rewards(torch.zeros(1, dtype=torch.float64), kl, mask, 0.5)
    bounded(rewards, -0.5 * kl, choice)


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


def rewards_to_go(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma**k * x for k, x in enumerate(rewards[t:])) for t in range(len(rewards))]


def gae_of(s: Sequences, gamma: float, lam: float, extra: int = 0) -> tuple[Tensor, Tensor]:
    return contract.gae(s.dense("rewards", 0.0, extra), s.dense("values", 0.0, extra), s.mask(extra), gamma, lam)


@law("an advantage is the (γλ)-discounted sum of the TD residuals that follow it", "[3] eq. 16", "gae", s=episodes,
     gamma=positive, lam=positive)  # fmt: skip
def test_gae_is_the_discounted_sum_of_td_residuals(s, gamma, lam):
    expected = [rewards_to_go(deltas(r, v, gamma), gamma * lam) for r, v in zip(s.rewards, s.values)]
    close(gae_of(s, gamma, lam)[0], padded(expected))


@law("an advantage is the average of the N-step estimators with weights (1 − λ) λⁿ⁻¹, the rest on the last",
     "[3] eq. 16, first line", "gae", s=episodes, gamma=positive, lam=positive)  # fmt: skip
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
    close(gae_of(s, gamma, lam)[0], padded(expected))


@law("λ = 0 gives the TD residual r + γV' − V, with V' = 0 after the last token", "[3] eq. 17", "gae", s=episodes,
     gamma=unit)  # fmt: skip
def test_gae_with_lambda_zero_is_the_td_residual(s, gamma):
    close(gae_of(s, gamma, 0.0)[0], padded([deltas(r, v, gamma) for r, v in zip(s.rewards, s.values)]))


@law("λ = 1 gives the discounted reward-to-go minus V", "[3] eq. 18", "gae", s=episodes, gamma=positive)
def test_gae_with_lambda_one_is_monte_carlo_minus_value(s, gamma):
    expected = [[x - y for x, y in zip(rewards_to_go(r, gamma), v)] for r, v in zip(s.rewards, s.values)]
    close(gae_of(s, gamma, 1.0)[0], padded(expected))


@law("returns are advantages plus values, and 0 outside", "[1] section 5; [4]: the value target", "gae", s=episodes,
     gamma=positive, lam=positive, extra=st.integers(0, 2))  # fmt: skip
def test_gae_returns_are_advantages_plus_values(s, gamma, lam, extra):
    advantages, returns = gae_of(s, gamma, lam, extra)
    close(returns, advantages + s.dense("values", extra=extra))


@law("the value of the last token's successor is 0: the response ends the episode", "responses are episodes", "gae",
     reward=numbers(), value=numbers(), lam=positive, gamma=positive)  # fmt: skip
def test_gae_of_one_token_is_reward_minus_value(reward, value, lam, gamma):
    advantages, returns = gae_of(Sequences({"rewards": [[reward]], "values": [[value]]}), gamma, lam)
    close(advantages, [[reward - value]])
    close(returns, [[reward]])


@law("advantages and returns are constants to the losses, or let through exactly the gradient of their formula",
     "[1] algorithm 1: advantages are computed before the update", "gae", s=sequences("rewards", "values", "direction"),
     choice=("differentiable: the caller detaches", "constants"), lam=positive)  # fmt: skip
def test_gae_lets_no_part_of_a_gradient_through(s, lam, choice):
    rewards, values, direction, mask = *(s.dense(x) for x in ("rewards", "values", "direction")), s.mask()
    for i in (0, 1):
        (gradient,) = gradients(lambda v: contract.gae(rewards, v, mask, 0.875, lam)[i], values)
        expected = contract.gae(torch.zeros_like(rewards), direction, mask, 0.875, lam)[i].sum()
        close((gradient * direction).sum(), 0.0 if choice == "constants" else expected)


# -----------------------------------------------------------------------------
# policy_loss, value_loss [D18]
#
# The four cases of the clip are numbered as in the source article; 1 and 3 keep their gradient, 2 and 4 have none.

ratios = st.sampled_from([0.25, 0.5, 0.7, 0.74, 0.76, 1.0, 1.24, 1.26, 1.5, 4.0])
above, up_to_above = st.sampled_from([1.26, 1.5, 4.0]), st.sampled_from([0.25, 0.5, 0.74, 0.76, 1.0, 1.24])
below, down_to_below = st.sampled_from([0.25, 0.5, 0.74]), st.sampled_from([0.76, 1.0, 1.24, 1.26, 1.5, 4.0])
good, bad = numbers(0.125, 3), numbers(-3, -0.125)


def at_ratio(ratio: float, advantage: float, cliprange: float = EPSILON) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """One token whose log π is such, with log π_old = −1, and its loss as a function of log π."""
    old_logprobs, advantages = torch.full((1, 1), -1.0).double(), torch.tensor([[advantage]], dtype=torch.float64)
    logprobs = torch.tensor([[math.log(ratio) - 1]], dtype=torch.float64)
    return logprobs, lambda x: contract.policy_loss(x, old_logprobs, advantages, cliprange)


def check_policy_loss(ratio: float, A: float, expected: float, cliprange: float = EPSILON) -> None:
    logprobs, loss = at_ratio(ratio, A, cliprange)
    close(loss(logprobs), [[expected]])


def check_policy_gradient(ratio: float, A: float, expected: float, cliprange: float = EPSILON) -> None:
    """The derivative by log π; that of −ratio·A is −ratio·A."""
    logprobs, loss = at_ratio(ratio, A, cliprange)
    close(gradients(loss, logprobs)[0], [[expected]])


@law("case 1, a good action (A > 0) at a ratio up to 1 + ε: not clipped, loss −ratio·A", "[1] figure 1, left",
     "policy_loss", ratio=up_to_above, A=good)  # fmt: skip
def test_clipping_case_1_good_action_up_to_the_range_is_not_clipped(ratio, A):
    check_policy_loss(ratio, A, -ratio * A)


@law("case 2, a good action (A > 0) whose probability already rose beyond 1 + ε: clipped, loss −(1 + ε)A",
     "[1] figure 1, left, right of the circle", "policy_loss", ratio=above, A=good)  # fmt: skip
def test_clipping_case_2_good_action_above_the_range_is_clipped(ratio, A):
    check_policy_loss(ratio, A, -(1 + EPSILON) * A)


@law("case 3, a bad action (A < 0) at a ratio from 1 − ε up: not clipped, loss −ratio·A",
     "[1] figure 1, right: the worse of the two", "policy_loss", ratio=down_to_below, A=bad)  # fmt: skip
def test_clipping_case_3_bad_action_down_to_the_range_is_not_clipped(ratio, A):
    check_policy_loss(ratio, A, -ratio * A)


@law("case 4, a bad action (A < 0) whose probability already fell below 1 − ε: clipped, loss −(1 − ε)A",
     "[1] figure 1, right, left of the circle", "policy_loss", ratio=below, A=bad)  # fmt: skip
def test_clipping_case_4_bad_action_below_the_range_is_clipped(ratio, A):
    check_policy_loss(ratio, A, -(1 - EPSILON) * A)


@law("in cases 1 and 3 the gradient is that of −ratio·A: up to the edge, and back from the far side", "[1] figure 1",
     "policy_loss", one=st.tuples(up_to_above, good), three=st.tuples(down_to_below, bad))  # fmt: skip
def test_clipping_cases_1_and_3_have_the_full_gradient(one, three):
    for ratio, A in (one, three):
        check_policy_gradient(ratio, A, -ratio * A)


@law("in cases 2 and 4 there is no gradient", "[1] figure 1", "policy_loss", two=st.tuples(above, good),
     four=st.tuples(below, bad))  # fmt: skip
def test_clipping_cases_2_and_4_have_no_gradient(two, four):
    for ratio, A in (two, four):
        check_policy_gradient(ratio, A, 0.0)


@law("with a clip range too wide to matter the loss is the unclipped surrogate", "[1] eq. 7 inside the range is eq. 6",
     "policy_loss", ratio=st.sampled_from([0.02, 0.25, 0.7, 1.0, 1.5, 1.9]), A=numbers())  # fmt: skip
def test_wide_clip_range_gives_the_unclipped_surrogate(ratio, A):
    check_policy_loss(ratio, A, -ratio * A, 0.99)


@law("the loss sees only the difference of log-probabilities, and is unreduced", "[1] eq. 6: ratio = π/π_old",
     "policy_loss", s=sequences("new", "old", "advantages"), shift=numbers())  # fmt: skip
def test_policy_loss_depends_on_the_ratio_alone(s, shift):
    new, old, advantages = (s.dense(name) for name in ("new", "old", "advantages"))
    loss = contract.policy_loss(new, old, advantages, EPSILON)
    check(loss.shape == new.shape, f"shape is {tuple(loss.shape)}, should be {tuple(new.shape)}: one loss per token")
    close(contract.policy_loss(new + shift, old + shift, advantages, EPSILON), loss)


@law("old log-probabilities are constants, or get exactly the gradient of the ratio: minus that of the new ones",
     "[1] eq. 6: π_old is fixed", "policy_loss", s=sequences("new", "old", "advantages"),
     choice=("differentiable: the caller detaches", "constants"))  # fmt: skip
def test_old_logprobs_get_no_other_gradient(s, choice):
    parts = [s.dense(name) for name in ("new", "old", "advantages")]
    new, old = gradients(lambda new, old: contract.policy_loss(new, old, parts[2], EPSILON), *parts[:2])
    close(old, 0 * new if choice == "constants" else -new)


@law("a ratio of 50 of a bad action, or of 1/1000 of a good one, is taken as it is, or is clamped",
     "[1] eq. 7 has no bound there; dual clip: arXiv 1912.09729", "policy_loss",
     choice=("nothing is clamped", "dual clip: a bad action costs −cA", "the log-ratio is clamped"))  # fmt: skip
def test_policy_loss_of_extreme_ratios(choice):
    points = [(50.0, 1.0), (0.001, -1.0), (50.0, -1.0), (0.001, 1.0)]
    losses = [loss(logprobs).item() for logprobs, loss in (at_ratio(*point) for point in points)]
    expected = [-1 - EPSILON, 1 - EPSILON, 50.0, -0.001]
    if choice[0] == "d":
        check(1 + EPSILON < losses[2] < 50, f"no dual clip: {losses[2]}")
        expected[2] = losses[2]
    elif choice[0] == "t":
        check(4 < losses[2] < 50 or 0.001 < -losses[3] < 0.25, f"no clamp: {losses[2]}, {losses[3]}")
        expected[2:] = losses[2:]
    close(torch.tensor([x / y for x, y in zip(losses, expected)], dtype=torch.float64), torch.ones(4))


@law("the value loss is ½ max((V − R)², (V_old + clip(V − V_old) − R)²)", "[4] detail 'value clipping'", "value_loss",
     s=sequences("values", "old", "returns"))  # fmt: skip
def test_value_loss_is_the_worse_of_clipped_and_unclipped(s):
    def loss(v: float, old: float, target: float) -> float:
        clipped = old + min(max(v - old, -EPSILON), EPSILON)
        return max((v - target) ** 2, (clipped - target) ** 2) / 2

    expected = [[loss(*x) for x in zip(*rows)] for rows in zip(s.values, s.old, s.returns)]
    close(contract.value_loss(s.dense("values"), s.dense("old"), s.dense("returns"), EPSILON), padded(expected))


def near(old: float, move: float, target: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A value that moved from `old`, and its loss as a function of it."""
    old_values, returns = (torch.tensor([[x]], dtype=torch.float64) for x in (old, target))
    return old_values + move, lambda values: contract.value_loss(values, old_values, returns, EPSILON)


moves = st.sampled_from([-0.2, -0.1, 0.0, 0.1, 0.2])


@law("near the old value the gradient is V − R", "[1] eq. 9, with the customary ½", "value_loss", old=numbers(),
     move=moves, target=numbers())  # fmt: skip
def test_value_loss_gradient_inside_the_clip_is_the_error(old, move, target):
    value, loss = near(old, move, target)
    close(gradients(loss, value)[0], [[old + move - target]])


@law("a value that moved beyond the clip towards its target gets no gradient; one that moved away does",
     "the maximum is pessimistic", "value_loss", sign=st.sampled_from([-1.0, 1.0]), old=numbers())  # fmt: skip
def test_value_loss_gradient_stops_beyond_the_clip(sign, old):
    for target, expected in ((2.0, 0.0), (-2.0, 2.5)):
        value, loss = near(old, sign * 0.5, old + sign * target)
        close(gradients(loss, value)[0], [[sign * expected]])


# -----------------------------------------------------------------------------
# aggregate [D20], preference_loss, leave_one_out


@law('"token" is the mean over all tokens', "DAPO (arXiv 2503.14476, section 3.3); [4]", "aggregate",
     s=sequences("losses"))  # fmt: skip
def test_aggregate_token_is_the_mean_over_tokens(s):
    close(contract.aggregate(s.dense("losses"), s.mask(), "token"), tokens_of(s).mean())


@law('"sequence" is the mean over responses of their token means',
     "DAPO (arXiv 2503.14476, section 3.3) contrasts the two", "aggregate", s=sequences("losses"))  # fmt: skip
def test_aggregate_sequence_is_the_mean_of_row_means(s):
    means = [sum(row) / len(row) for row in s.losses]
    close(contract.aggregate(s.dense("losses"), s.mask(), "sequence"), sum(means) / len(means))


def in_parts(s: Sequences, size: int, factor: Tensor, share: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The sum of the shares of micro-batches of `size` rows; losses are factor · x²."""
    parts = [s[rows] for rows in torch.arange(len(s.lengths)).split(size)]
    return sum(share(factor * part.dense("losses").square(), part.mask()) for part in parts)


many, sizes, one = sequences("losses", rows=5), st.integers(1, 3), torch.ones(1, dtype=torch.float64)
PARTS = "D20: micro-batches and processes must not change a step"


for how in ("token", "sequence"):

    def share(s: Sequences, how: str = how) -> Callable[[Tensor, Tensor], Tensor]:
        count = sum(s.lengths) if how == "token" else len(s.lengths)
        return lambda losses, mask: contract.aggregate(losses, mask, how, normalizer=count)

    @law(f'"{how}": parts of a minibatch, divided by its count of {how}s, add up to the whole', PARTS, "aggregate",
         called=f"test_aggregate_{how}_of_parts_adds_up_to_the_whole", s=many, size=sizes)  # fmt: skip
    def _(s, size, how=how, share=share):
        close(in_parts(s, size, one, share(s)), contract.aggregate(s.dense("losses").square(), s.mask(), how))

    @law(f'"{how}": gradients of the parts add up to that of the whole', PARTS, "aggregate",
         called=f"test_aggregate_{how}_gradient_of_parts_is_that_of_the_whole", s=many, size=sizes)  # fmt: skip
    def _(s, size, how=how, share=share):
        weights = [1 / sum(s.lengths) if how == "token" else 1 / n / len(s.lengths) for n in s.lengths]
        (found,) = gradients(lambda factor: in_parts(s, size, factor, share(s)), one)
        close(found, [sum(weight * x * x for row, weight in zip(s.losses, weights) for x in row)])


@law("the loss of a minibatch is the same however it is cut into micro-batches", PARTS, "minibatch_share", s=many,
     size=sizes)  # fmt: skip
def test_micro_batches_change_no_loss(s, size):
    share = lambda losses, mask: contract.minibatch_share(losses, mask, s.mask())  # noqa: E731
    close(in_parts(s, size, one, share), in_parts(s, len(s.lengths), one, share))


@law("a pair's loss is −log of the probability the Bradley–Terry model gives to the choice made", "[5] section 3.4",
     "preference_loss", pairs=st.lists(st.tuples(numbers(), numbers()), min_size=1, max_size=4))  # fmt: skip
def test_preference_loss_is_bradley_terry(pairs):
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).T
    losses = [-math.log(math.exp(c) / (math.exp(c) + math.exp(r))) for c, r in pairs]
    close(contract.preference_loss(chosen, rejected), sum(losses) / len(losses))


@law("a pair's loss compares two texts of any length at their last tokens; other tokens and padding play no part",
     "[5] section 3.4; D8", "pair_loss", texts=st.lists(st.tuples(*[st.lists(numbers(), min_size=1, max_size=4)] * 2),
     min_size=1, max_size=4))  # fmt: skip
def test_pair_loss_is_that_of_the_last_tokens(texts):
    sides = list(zip(*texts))
    outputs, lengths = [padded(side, 5, 2.5) for side in sides], [torch.tensor([*map(len, side)]) for side in sides]
    losses = [math.log1p(math.exp(rejected[-1] - chosen[-1])) for chosen, rejected in texts]
    close(contract.pair_loss(*outputs, *lengths), sum(losses) / len(losses))


@law("weights of pairs make the loss their weighted sum", "[8] section 3.5: the pairs of a prompt share its weight",
     "preference_loss", pairs=st.lists(st.tuples(numbers(), numbers(), numbers(0, 1)), min_size=1, max_size=4))  # fmt: skip
def test_preference_loss_of_weighted_pairs_is_their_weighted_sum(pairs):
    chosen, rejected, weights = torch.tensor(pairs, dtype=torch.float64).T
    try:
        loss = contract.preference_loss(chosen, rejected, weights)
    except TypeError:
        raise NotImplementedError("preference_loss takes no weights") from None
    close(loss, sum(weight * math.log1p(math.exp(r - c)) for c, r, weight in pairs))


@law("a leave-one-out baseline is the mean of the others in the group, whatever a response itself got; what is left of its "
     "return is G/(G − 1) times the distance from the group's mean", "[9] eq. 7", "leave_one_out", returns=tensors((6,)),
     G=st.sampled_from([2, 3, 6]), change=numbers())  # fmt: skip
def test_leave_one_out_is_the_mean_of_the_others(returns, G, change):
    baseline, groups = contract.leave_one_out(returns, G), [range(i - i % G, i - i % G + G) for i in range(6)]
    close(baseline, [sum(returns[j].item() for j in group if j != i) / (G - 1) for i, group in enumerate(groups)])
    close(returns - baseline, G / (G - 1) * (returns - returns.view(-1, G).mean(1).repeat_interleave(G)))
    moved = returns + change * torch.eye(6)[2]
    close(contract.leave_one_out(moved, G)[2], baseline[2])


margins = st.sampled_from([1e2, 1e3, 1e4]).map(lambda margin: torch.tensor([margin, -margin], dtype=torch.float64))


@law("a margin of thousands gives a finite loss, in the right order and in the wrong one", "log σ, not log of σ",
     "preference_loss", margin=margins)  # fmt: skip
def test_preference_loss_is_stable(margin):
    close(contract.preference_loss(margin[:1], torch.zeros(1)), 0.0)
    close(contract.preference_loss(margin[1:], torch.zeros(1)), margin[0])


@law("a margin of thousands gives a finite gradient, in the right order and in the wrong one", "log σ, not log of σ",
     "preference_loss", margin=margins)  # fmt: skip
def test_preference_loss_gradient_is_stable(margin):
    for x, expected in ((margin[:1], 0.0), (margin[1:], -1.0)):
        close(gradients(lambda chosen: contract.preference_loss(chosen, torch.zeros(1)), x)[0], [expected])


# -----------------------------------------------------------------------------
# truncate_post [D2]

posts, limits = st.text(alphabet="ab \n", max_size=24), st.integers(0, 24)


def truncate_slowly(post: str, fits: Callable[[str], bool]) -> str:
    """OpenAI's rule, one step at a time."""
    while not fits(post):
        cut = post.rfind("\n")
        post = post[:cut] if cut >= 0 else post[:-1]
    return post


@law("a post that does not fit loses its last paragraph, again and again; the last one loses characters from its end",
     "[5]; [4] detail 'truncation'", "truncate_post", post=posts, limit=limits, in_words=st.booleans())  # fmt: skip
def test_truncation_is_by_paragraph_then_by_character(post, limit, in_words):
    def fits(text: str) -> bool:
        return len(text.split() if in_words else text) <= limit

    cut, expected = contract.truncate_post(post, fits), truncate_slowly(post, fits)
    check(cut == expected, f"{post!r} was cut to {cut!r}, should be {expected!r}")


@law("a post that cannot fit even when empty is an error, not an endless loop", "contract", "truncate_post", post=posts)
def test_truncation_that_cannot_succeed_is_an_error(post):
    with pytest.raises(ValueError):
        contract.truncate_post(post, lambda text: False)


# -----------------------------------------------------------------------------
# what holds for every function that takes a mask [D5, D23], and for every function

MASKED = ("masked_mean", "whiten", "token_rewards", "gae", "aggregate token", "aggregate sequence")
TAKES_MASK = ("masked_mean", "whiten", "token_rewards", "gae", "aggregate")
OUTSIDE = "D5, D23; contract: what stands outside a mask is ignored, and comes back as 0"


def ask_masked(name: str, s: Sequences, junk: float = 0.0, extra: int = 0) -> tuple[Tensor, ...]:
    """The results of a function that takes a mask, with `junk` in the padding, of which there are `extra` more slots.
    It gets the columns in their order; token_rewards gets as scores the first numbers of the second."""
    mask, (x, *more) = s.mask(extra), [s.dense(column, junk, extra) for column in s.columns]
    result = {
        "masked_mean": lambda: contract.masked_mean(x, mask),
        "whiten": lambda: contract.whiten(x, mask),
        "whiten unshifted": lambda: contract.whiten(x, mask, shift_mean=False),
        "token_rewards": lambda: contract.token_rewards(s.first(list(s.columns)[1]), x, mask, 0.125),
        "gae": lambda: contract.gae(x, more[0], mask, 0.875, 0.75),
        "aggregate token": lambda: contract.aggregate(x, mask, "token"),
        "aggregate sequence": lambda: contract.aggregate(x, mask, "sequence"),
    }[name]()
    return result if isinstance(result, tuple) else (result,)


def check_masked(name: str, s: Sequences, junk: float, extra: int) -> None:
    for before, after in zip(ask_masked(name, s), ask_masked(name, s, junk, extra)):
        close(after, torch.nn.functional.pad(before, (0, extra)) if before.dim() == 2 else before)


column, losses, two = sequences("x"), sequences("losses"), sequences("x", "y").filter(lambda s: sum(s.lengths) > 1)
finite, more = st.sampled_from([0.0, 1e6, -7.0]), st.integers(1, 3)
spoiled = st.sampled_from([math.nan, math.inf, -math.inf])
NUMBERS = "numbers outside the mask, and more padding, change nothing"
SPOILED = "NaN and infinity outside the mask change nothing"


for title, s, *names in (  # test_gae_ignores_numbers_outside_the_mask, test_gae_ignores_nan_outside_the_mask, ...
    ("masked_mean", column, "masked_mean"), ("whiten", spread, "whiten", "whiten unshifted"),
    ("token_rewards", scored, "token_rewards"), ("gae", episodes, "gae"),
    ("aggregate_token", losses, "aggregate token"), ("aggregate_sequence", losses, "aggregate sequence"),
):  # fmt: skip
    for nan in (False, True):

        @law(SPOILED if nan else NUMBERS, OUTSIDE, names[0].split()[0], hardening=nan, s=s, extra=more,
             junk=spoiled if nan else finite,
             called=f"test_{title}_ignores_{'nan' if nan else 'numbers'}_outside_the_mask")  # fmt: skip
        def _(s, junk, extra, names=names):
            look = lambda name: check_masked(name, s, junk, extra)  # noqa: E731
            look(*names) if len(names) == 1 else for_each(names, look)


@law("a loss over NaN in its padding has a finite gradient, and none there", "contract: NaN passes through where()",
     "aggregate", "masked_mean", any_of=True, hardening=True, s=losses, junk=spoiled)  # fmt: skip
def test_masked_losses_are_finite_over_nan(s, junk):
    def look(name: str) -> None:
        mask, how = s.mask(1), name.split()[1:]
        (gradient,) = gradients(lambda x: getattr(contract, name.split()[0])(x, mask, *how), s.dense("losses", junk, 1))
        check(gradient.isfinite().all(), f"gradient {gradient.tolist()}")
        close(gradient * ~mask, torch.zeros(mask.shape))

    for_each(("masked_mean", "aggregate token", "aggregate sequence"), look)


@law("permuting rows permutes results", "a batch is a set", *TAKES_MASK, any_of=True, s=two, seed=st.integers(0, 9))
def test_rows_may_stand_in_any_order(s, seed):
    rows = torch.randperm(len(s.lengths), generator=torch.Generator().manual_seed(seed)).tolist()

    def look(name: str) -> None:
        if name != "whiten" or tokens_of(s).std(correction=0) > 0.5:
            for before, after in zip(ask_masked(name, s), ask_masked(name, s[rows])):
                close(after, before[rows] if before.dim() == 2 else before)

    for_each(MASKED, look)


@law("one response alone gets the same rewards, advantages and returns as in a batch", "D5: a batch is a convenience",
     "token_rewards", "gae", any_of=True, s=two)  # fmt: skip
def test_token_rewards_and_gae_treat_each_response_alone(s):
    def look(name: str) -> None:
        whole = ask_masked(name, s)
        for i, n in enumerate(s.lengths):
            for both, one in zip(whole, ask_masked(name, s[[i]])):
                close(one, both[i : i + 1, :n])

    for_each(("token_rewards", "gae"), look)


NUMERIC = tuple(some_arguments(torch.float64))
WITH_NUMBERS = tuple(dict.fromkeys(name.split()[0] for name in NUMERIC))


@law("no function modifies what it is given", "contract", *WITH_NUMBERS, any_of=True)
def test_inputs_are_left_alone():
    def look(name: str) -> None:
        given, kept = (some_arguments(dtype())[name] for _ in range(2))
        getattr(impl, name.split()[0])(*given)
        for i, (one, other) in enumerate(zip(given, kept)):
            check(not isinstance(one, Tensor) or one.equal(other), f"argument {i + 1} is modified")

    for_each(NUMERIC, look)


def check_dtype(of: torch.dtype, expected: torch.dtype) -> None:
    def look(name: str) -> None:
        results = getattr(impl, name.split()[0])(*some_arguments(of)[name])
        for x in results if isinstance(results, tuple) else (results,):
            check(on_cpu(x).dtype == expected, f"{of} in, {on_cpu(x).dtype} out")

    for_each(NUMERIC, look)


@law("float32 in, float32 out", "contract", *WITH_NUMBERS, any_of=True)
def test_float32_gives_float32():
    check_dtype(torch.float32, torch.float32)


@law("float64 in, float64 or float32 out", "contract: precision is the caller's", *WITH_NUMBERS, any_of=True,
     choice=("float64", "float32"))  # fmt: skip
def test_float64_gives_float64(choice):
    if dtype() != torch.float64:
        raise NotImplementedError(f"it computes in {dtype()}")
    check_dtype(torch.float64, getattr(torch, choice))


# -----------------------------------------------------------------------------
# the functions together: exact expectations over every response of a tiny policy
#
# Three tokens, the last is EOS, at most two of them: seven responses, three states (start, after a, after b). All of
# them are enumerated, so that "in expectation" is a sum, and the true gradient comes from autograd on that sum.

RESPONSES = [(2,), (0, 2), (1, 2), (0, 0), (0, 1), (1, 0), (1, 1)]
STATES = torch.tensor([[0, 0 if not tokens[1:] else 1 + tokens[0]] for tokens in RESPONSES])
TOKENS = torch.tensor([[*tokens, 0][:2] for tokens in RESPONSES])
MASK = torch.tensor([[True, len(tokens) == 2] for tokens in RESPONSES])
tables = st.tuples(tensors((3, 3), -2, 2), tensors((3, 3), -2, 2), tensors((7,)), tensors((3,)))
TOGETHER = ("logprobs_of", "kl_estimate", "token_rewards", "gae", "policy_loss")


def enumerate_policy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (7, 2) of each response's tokens, and probabilities (7,) of the responses."""
    logprobs = contract.logprobs_of(logits[STATES], TOKENS, 1.0).masked_fill(~MASK, 0)
    return logprobs, logprobs.sum(1).exp()


def true_gradient(logits: Tensor, ref_logits: Tensor, scores: Tensor, kl_coef: float) -> Tensor:
    """∇ of E[score] − β KL(π ‖ π_ref), by plain autograd on the enumeration."""
    logits = logits.clone().requires_grad_()
    tree = logits.log_softmax(-1)[STATES, TOKENS].masked_fill(~MASK, 0).sum(1)
    ref = ref_logits.log_softmax(-1)[STATES, TOKENS].masked_fill(~MASK, 0).sum(1)
    (tree.exp() * (scores - kl_coef * (tree - ref))).sum().backward()
    return logits.grad


def estimated_gradient(logits: Tensor, ref_logits: Tensor, scores: Tensor, values: Tensor, kl_coef: float, lam: float):
    """The expected ascent direction of the implementation's losses at ratio 1, summed over responses and tokens."""

    def objective(logits: Tensor) -> Tensor:
        logprobs, probabilities = enumerate_policy(logits)
        kl = contract.kl_estimate(logprobs.detach(), enumerate_policy(ref_logits)[0], "k1")
        rewards = contract.token_rewards(scores, kl, MASK, kl_coef)
        advantages, _ = contract.gae(rewards, values[STATES].masked_fill(~MASK, 0), MASK, 1.0, lam)
        losses = contract.policy_loss(logprobs, logprobs.detach(), advantages, 0.2).masked_fill(~MASK, 0)
        return -probabilities.detach() * losses.sum(1)

    return gradients(objective, logits)[0]


@law("with λ = 1 the expected gradient is that of E[score] − β KL, whatever the values say",
     "policy gradient theorem; [3] section 3", *TOGETHER, table=tables, kl_coef=numbers(0, 1))  # fmt: skip
def test_gradient_is_unbiased_with_any_baseline(table, kl_coef):
    logits, ref_logits, scores, values = table
    expected = true_gradient(logits, ref_logits, scores, kl_coef)
    close(estimated_gradient(logits, ref_logits, scores, values, kl_coef, lam=1.0), expected)


@law("with the true values the expected gradient is right for every λ", "[3] proposition 1", *TOGETHER, table=tables,
     lam=unit, kl_coef=numbers(0, 1))  # fmt: skip
def test_gradient_is_unbiased_for_every_lambda_with_true_values(table, lam, kl_coef):
    logits, ref_logits, scores, _ = table
    logprobs, _ = enumerate_policy(logits)
    ref_logprobs, _ = enumerate_policy(ref_logits)
    rewards = contract.token_rewards(scores, contract.kl_estimate(logprobs, ref_logprobs, "k1"), MASK, kl_coef)
    to_go = [rewards.sum(1), rewards[:, 1], rewards[:, 1]]
    values = []
    for state, value in enumerate(to_go):
        visits = (STATES == state) & MASK
        here = visits[:, 0] if state == 0 else visits[:, 1]
        weight = logprobs.sum(1).exp() if state == 0 else logprobs[:, 1].exp()
        values.append((weight * value)[here].sum())
    expected = true_gradient(logits, ref_logits, scores, kl_coef)
    close(estimated_gradient(logits, ref_logits, scores, torch.stack(values), kl_coef, lam), expected)


@law("at the closed-form optimum π* ∝ π_ref exp(score/β) every expected gradient is 0: nothing is left to learn",
     "Ziegler et al. 2019, section 2", *TOGETHER, table=tables, kl_coef=st.sampled_from([0.25, 0.5, 1.0]))  # fmt: skip
def test_gradient_is_zero_at_the_closed_form_optimum(table, kl_coef):
    _, ref_logits, scores, _ = table
    ref_logprobs, _ = enumerate_policy(ref_logits)
    weights = (ref_logprobs.sum(1) + scores / kl_coef).exp()  # unnormalised π* of the seven responses
    first = torch.stack([weights[[i for i, r in enumerate(RESPONSES) if r[0] == a]].sum() for a in (0, 1, 2)])
    second = [torch.stack([weights[RESPONSES.index((a, b))] for b in (0, 1, 2)]) for a in (0, 1)]
    optimum = torch.stack([first, *second]).log()
    gradient = estimated_gradient(optimum, ref_logits, scores, torch.zeros(3).double(), kl_coef, 1.0)
    close(gradient, torch.zeros(3, 3), tolerance=1e-6)


# -----------------------------------------------------------------------------
# the table: python test_pmo.py

COLUMNS = ("holds", "fails", "hardening", "choice", "missing")
MODULE = "test_the_module_offers_what_it_says"


def contracts_laws() -> dict[str, Law]:
    return {name: stated for name, stated in LAWS.items() if set(stated.needs) <= set(CONTRACT)}


class Table:
    """A pytest plugin that holds the contract's laws, and no others, against the implementation. It ends with what
    holds, fails, differs by choice or is missing, function by function; failures are grouped by their cause."""

    def __init__(self, path: str = "") -> None:
        self.path, self.impl, self.found = path, impl, {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        beyond = [item for item in items if item.name not in (MODULE, *contracts_laws())]
        config.hook.pytest_deselected(items=beyond)
        items[:] = [item for item in items if item not in beyond]
        self.impl = items[0].module.impl if items else impl  # a peer's adapter stands further down

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        name, text = report.nodeid.split("::")[-1], report.longreprtext.splitlines()
        stated, reason = contracts_laws().get(name), getattr(report, "wasxfail", "")
        start = next((i for i, line in enumerate(text) if line.startswith("E ")), 0)
        lines = [line.removeprefix("E ").strip() for line in text[start:]]
        told = {
            "function": "the module" if not stated else ("several together", *stated.needs)[len(stated.needs) == 1],
            "statement": stated.statement if stated else "", "source": stated.source if stated else "",
            "why": "", "example": "", "place": "", "outcome": "holds",
        }  # fmt: skip
        if report.skipped and not reason:
            told |= {"outcome": "missing", "why": report.longrepr[2].removeprefix("Skipped: missing: ")}
        elif reason:
            kind = next((kind for kind in ("hardening", "choice") if reason.startswith(f"{kind}: ")), "known")
            told |= {"outcome": kind, "why": reason.removeprefix(f"{kind}: ")}
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = lines[0].removeprefix("AssertionError: ") if lines else ""
            told |= {"outcome": "fails", "why": why, "example": example(lines)}
            if crash and text[start].startswith("E ") and not lines[0].startswith(("AssertionError", "Failed")):
                told["place"] = f"{crash.path}:{crash.lineno}"
        self.found[name] = told

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        say, held = terminalreporter.write_line, self.impl
        counts = {row: dict.fromkeys(COLUMNS, 0) for row in (*CONTRACT, "several together", "the module")}
        for told in self.found.values():
            counts[told["function"]]["fails" if told["outcome"] == "known" else told["outcome"]] += 1
        total = {column: sum(row[column] for row in counts.values()) for column in COLUMNS}
        say(f"\n{held.__name__}, {held.__file__}: {sum(total.values())} of {len(contracts_laws()) + 1} laws\n")
        say(f"{'':22}" + "".join(f"{column:>11}" for column in COLUMNS))
        for name, row in {**counts, "all": total}.items():
            if any(row.values()):
                say(f"{name:22}" + "".join(f"{row[column] or '':>11}" for column in COLUMNS).rstrip())
        for (outcome, *_), names in self.causes().items():
            self.tell(say, outcome, names)
        if self.path:
            rows = {name: row for name, row in counts.items() if any(row.values())}
            about = {"implementation": held.__name__, "file": held.__file__, "dtype": str(dtype())}
            report = {**about, "torch": torch.__version__, "functions": rows, "laws": self.found}
            Path(self.path).write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")

    def causes(self) -> dict[tuple, list[str]]:
        """Names of laws by their probable cause: the same place that raised, or else the same function."""
        groups: dict[tuple, list[str]] = {}
        for outcome in ("fails", "known", "hardening", "choice", "missing"):
            for name, told in self.found.items():
                if told["outcome"] == outcome:
                    cause = told["why"] if outcome in ("choice", "missing") else told["function"]
                    groups.setdefault((outcome, told["place"] or cause), []).append(name)
        return groups

    def tell(self, say: Callable[[str], None], outcome: str, names: list[str]) -> None:
        first, several = self.found[names[0]], f"{len(names)} laws" if len(names) > 1 else "1 law"
        if outcome == "missing":
            return say(f"missing: {several}: {first['why']}")
        title = "fails, as KNOWN_FAILURES says" if outcome == "known" else outcome
        say(f"\n{title}: {f'{several}, first here: ' if len(names) > 1 else ''}{names[0]}")
        for what in ("statement", "source", "example", "why", "place"):
            if first[what]:
                say(f"    {'source: ' if what == 'source' else ''}{first[what]}")
        alike = [name for name in names[1:] if first["place"] or self.found[name]["why"] == first["why"]]
        if alike:
            say(f"    the same: {', '.join(alike[:9])}{f' and {len(alike) - 9} more' if len(alike) > 9 else ''}")
        for name in (name for name in names[1:] if name not in alike):
            say(f"    also {name}: " + f"{self.found[name]['example'][:80]} {self.found[name]['why']}".strip())


def example(lines: list[str]) -> str:
    """The arguments of the smallest counterexample, on one line, from what hypothesis wrote."""
    starts = [i for i, line in enumerate(lines) if line.startswith(("Failing test case:", "Falsifying example:"))]
    if not starts:
        return ""
    ends = [i for i, line in enumerate(lines) if line == ")" and i > starts[0]] or [starts[0] + 1]
    return " ".join(lines[starts[0] + 1 : ends[0]]).rstrip(",")


def hold_against(arguments: list[str]) -> int:
    """Print the table, and write it where --table says. A pytest.ini around the file, and installed plugins, play no part."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    path = ""
    if "--table" in arguments:
        at = arguments.index("--table")
        path, arguments = arguments[at + 1], arguments[:at] + arguments[at + 2 :]
    quiet = ["-q", "--no-header", "--tb=no", "--show-capture=no", "--assert=plain", "-p", "no:cacheprovider", "-rN"]
    alone = ["-c", os.devnull, "--rootdir", str(Path(__file__).resolve().parent)]
    return int(pytest.main([__file__, *quiet, *alone, *arguments], plugins=[Table(path)]))


if __name__ == "__main__" and sys.argv[1:2] not in (["race"], ["benchmark"]):  # which stand below
    sys.exit(hold_against(sys.argv[1:]))

# ---- copy up to here: everything above works alone, with any implementation; what follows is pmo's own ----

# ruff: noqa: E402

import ast
import contextlib
import importlib.metadata
import inspect
import io
import itertools
import re
import shutil
import socket
import statistics
import subprocess
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import SimpleNamespace

# -----------------------------------------------------------------------------
# models and data: what the rest of pmo must satisfy, on tiny models of three families
#
# GPT-2 has absolute positions, GPT-NeoX rotary ones, Llama grouped-query attention and tied embeddings. All random.

FAMILIES = ("gpt2", "neox", "llama")
VOCAB, EOS = 13, 12
ENGINE_NEEDS = ("Engine", "Batch", "lay_out", "map_rows")


def tiny_policy(family: str, seed: int = 0, vocab: int = VOCAB, scale: float = 0.3, **extra: object):
    """A random decoder of two layers whose logits differ enough for mistakes to show."""
    import transformers as hf

    common = {"vocab_size": vocab, "eos_token_id": EOS, "bos_token_id": EOS, "pad_token_id": 0} | extra
    if family == "gpt2":
        config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common)
    elif family == "neox":
        config = hf.GPTNeoXConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **common
        )
    else:
        config = hf.LlamaConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
            tie_word_embeddings=True, **common,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=scale)
    return model


def tiny_scalar(family: str, seed: int = 0, train_bias: bool = False):
    """A reward model or value model with random trunk and head."""
    import transformers as hf

    config = tiny_policy(family).config
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = hf.AutoModelForSequenceClassification.from_config(config).eval()
        with torch.no_grad():
            for parameter in classifier.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.3)
    return impl.ScalarModel(classifier, train_bias)


def some_batch(lengths: tuple[tuple[int, int], ...] = ((3, 2), (7, 5), (1, 1), (5, 4), (2, 6)), seed: int = 0):
    """Queries and responses of unequal lengths; all responses end with EOS but the last."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, EOS, (n,), generator=generator).tolist()

    queries, responses = [tokens(q) for q, _ in lengths], [[*tokens(r - 1), EOS] for _, r in lengths]
    responses[-1][-1] = 0
    return impl.Batch(queries, responses)


def some_rankings(pairs: tuple = (((0, 1),), ((0, 1), (1, 2), (0, 2)), ((1, 0), (0, 1)), ((3, 0), (2, 1), (3, 1)), ((0, 1),)),
                  share: bool = False):  # fmt: skip
    """Rankings of two to four responses of unequal lengths to each of some queries."""
    rankings = []
    for i, (query, of) in enumerate(zip(some_batch().queries, pairs)):
        responses = some_batch(tuple((1, 1 + (i + j) % 5) for j in range(1 + max(map(max, of)))), seed=7 + i).responses
        rankings.append(impl.Ranking(query, responses, list(of)))
    return impl.Rankings(rankings, share)


def engine(micro_batch_size: int = 32, **kwargs: object):
    return impl.Engine(micro_batch_size=micro_batch_size, **kwargs)


def everything_of(family: str, batch, temperature: float = 0.7, **kwargs: object) -> list[Tensor]:
    """Log-probabilities, values (B, T) and scores (B,) of a batch."""
    policy, value_model, reward_model = tiny_policy(family), tiny_scalar(family, 1), tiny_scalar(family, 2)
    function = lambda x: [impl.response_logprobs(policy, x, temperature), value_model.values(x), reward_model.scores(x)]  # noqa: E731
    return impl.map_rows(batch, engine(**kwargs), function)


families = st.sampled_from(FAMILIES)


@contextmanager
def watching(*names: str) -> Iterator[dict[str, list[tuple]]]:
    """Inside, calls of these functions are recorded, in order: by name, their arguments and what they returned."""
    calls: dict[str, list[tuple]] = {name: [] for name in names}

    def remembering(name: str, function: Callable) -> Callable:
        def call(*args: object, **options: object) -> object:
            calls[name].append(((*args, *options.values()), function(*args, **options)))
            return calls[name][-1][1]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(impl, name, remembering(name, getattr(impl, name)))
        yield calls


def watched(config: object, *names: str) -> dict[str, list[tuple]]:
    """Run it; all calls of these functions. What `config` builds on was made before, and is not among them."""
    with watching(*names) as calls:
        impl.start(config)
    return calls


@law(
    "neither the other rows of a batch nor the width of its padding change a log-probability, value or score",
    "D5; [4] detail 'position ids': absolute positions must not count padding", *ENGINE_NEEDS, "ScalarModel",
)  # fmt: skip
def test_padding_changes_no_logprob_value_or_score():
    for family in FAMILIES:
        batch = some_batch()
        together = everything_of(family, batch)
        for i, response in enumerate(batch.responses):
            for both, alone in zip(together, everything_of(family, batch[[i]])):
                close(alone[0], both[i, : len(response)] if both.dim() == 2 else both[i], tolerance=1e-5)


@law(
    "whatever ids fill the padding, even EOS, nothing changes",
    "D3: any valid id will do; masks come from lengths", *ENGINE_NEEDS, "ScalarModel", "response_logprobs",
)  # fmt: skip
def test_ids_in_padding_do_not_matter():
    for family in FAMILIES:
        policy, scalar, batch = tiny_policy(family), tiny_scalar(family), some_batch()
        layout = impl.lay_out(batch)
        tokens = layout.inputs["input_ids"]
        lengths = [len(query) + len(response) for query, response in zip(batch.queries, batch.responses)]
        padding = torch.tensor([[t >= n for t in range(tokens.shape[1])] for n in lengths])
        assert padding.any()
        for junk in (1, EOS):
            dirty = layout._replace(inputs={"input_ids": tokens.masked_fill(padding, junk)})
            with torch.no_grad():
                for clean, other in ((impl.response_logprobs(policy, x, 0.7)[layout.mask] for x in (layout, dirty)),):
                    close(other, clean, tolerance=1e-6)
                close(scalar.values(dirty)[layout.mask], scalar.values(layout)[layout.mask], tolerance=1e-6)
                close(scalar.scores(dirty), scalar.scores(layout), tolerance=1e-6)


@law(
    "a response token's log-probability comes from the logits of the token before it",
    "definition of a causal language model; D4: EOS included", *ENGINE_NEEDS, "response_logprobs",
)  # fmt: skip
def test_response_logprobs_are_the_plain_models():
    for family in FAMILIES:
        policy, batch = tiny_policy(family), some_batch()
        (logprobs,) = impl.map_rows(batch, engine(2), lambda x, policy=policy: [impl.response_logprobs(policy, x, 0.7)])
        for i, (query, response) in enumerate(zip(batch.queries, batch.responses)):
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([query + response])).logits[0].double()
            table = (logits / 0.7).log_softmax(-1)
            expected = [table[len(query) - 1 + t, token].item() for t, token in enumerate(response)]
            close(logprobs[i, : len(response)], expected, tolerance=1e-5)
            assert (logprobs[i, len(response) :] == 0).all(), "padding must come back as 0"


@law(
    "values are w·h + b of the state before each response token; the score is w·h + b at its last token",
    "D8, D10: V(s_t) must not see action t; the score must see EOS", *ENGINE_NEEDS, "ScalarModel",
)  # fmt: skip
def test_values_are_read_before_and_scores_at_each_token():
    for family in FAMILIES:
        scalar, batch = tiny_scalar(family), some_batch()
        with torch.no_grad():
            scalar.bias.fill_(0.5)
            layout = impl.lay_out(batch)
            values, scores = scalar.values(layout), scalar.scores(layout)
        for i, (query, response) in enumerate(zip(batch.queries, batch.responses)):
            with torch.no_grad():
                hidden = scalar.classifier.base_model(input_ids=torch.tensor([query + response])).last_hidden_state[0]
                outputs = scalar.classifier.score(hidden).squeeze(-1) + 0.5
            close(values[i, : len(response)], outputs[len(query) - 1 : -1], tolerance=1e-5)
            close(scores[i], outputs[-1], tolerance=1e-5)


# sampling [D5, D13, D25]


def uniforms(rows: int, T: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, T, generator=torch.Generator().manual_seed(seed))


@law(
    "the sampler draws the first token from softmax(logits / temperature), nothing cut off, nothing reweighted",
    "D13; [4]: top-k and top-p off", "sample", "Engine",
)  # fmt: skip
def test_sampling_frequencies_are_the_tempered_softmax():
    n = 2000
    grid = (torch.arange(n)[:, None] + 0.5) / n  # every uniform number once: frequencies are exact up to 1/n
    for family, temperature in itertools.product(FAMILIES, (0.7, 1.5)):
        policy, query = tiny_policy(family, scale=0.2), [3, 1, 4]
        first = [r[0] for r in impl.sample(policy, [query] * n, grid, temperature, EOS, engine(sample_batch_size=500))]
        with torch.no_grad():
            expected = (policy(input_ids=torch.tensor([query])).logits[0, -1].double() / temperature).softmax(-1)
        frequencies = torch.bincount(torch.tensor(first), minlength=VOCAB).double() / n
        assert (frequencies - expected).abs().max() < 2 / n, f"{family}: {frequencies.tolist()} but {expected.tolist()}"


@law(
    "in bfloat16, too, rare tokens of a large vocabulary are drawn as often as their logits say",
    "D13, D21: sums of thousands of probabilities need more than eight bits", "sample", "Engine",
)  # fmt: skip
def test_bfloat16_loses_no_rare_tokens():
    n, V = 4000, 1500
    grid = (torch.arange(n)[:, None] + 0.5) / n
    policy, half = tiny_policy("neox", vocab=V, scale=0.1), engine(sample_batch_size=500, bfloat16=True)
    first = torch.tensor([r[0] for r in impl.sample(policy, [[3, 1, 4]] * n, grid, 1.0, EOS, half)])
    with torch.no_grad(), half.autocast():
        logits = policy(input_ids=torch.tensor([[3, 1, 4]] * 500)).logits[0, -1]
    cumulative = logits.double().softmax(-1).cumsum(-1)
    for token in range(0, V, 50):
        assert abs((first <= token).double().mean() - cumulative[token]) < 0.001, f"tokens up to {token}"


@law(
    "whole responses are drawn as often as the training forward pass says they are probable (chi-square)",
    "D14: the distribution sampled is the distribution scored", "sample", "response_logprobs", *ENGINE_NEEDS,
)  # fmt: skip
def test_rollout_distribution_is_the_scored_distribution():
    n = 6000
    responses = [(2,), *((a, 2) for a in (0, 1)), *itertools.product((0, 1), (0, 1, 2), (0, 1, 2))]
    responses = [r for r in responses if 2 not in r[:-1] and (len(r) == 3 or r[-1] == 2)]
    for family in FAMILIES:
        policy = tiny_policy(family, vocab=3, scale=0.2, eos_token_id=2, bos_token_id=2)
        queries = [[0, 1], [1]] * (n // 2)  # of two lengths, so that one of them is padded
        drawn = impl.sample(policy, queries, uniforms(n, 3), 0.7, 2, engine(sample_batch_size=1000))
        for offset, query in enumerate(([0, 1], [1])):
            batch = impl.Batch([query] * len(responses), [list(r) for r in responses])
            (logprobs,) = impl.map_rows(batch, engine(), lambda x: [impl.response_logprobs(policy, x, 0.7)])
            probabilities = logprobs.double().sum(1).exp()
            close(probabilities.sum(), 1.0, tolerance=1e-5)
            counts = torch.tensor([drawn[offset::2].count(list(r)) for r in responses]).double()
            assert counts.sum() == n // 2, "a response outside the enumeration"
            expected = probabilities * (n // 2)
            chi_square = ((counts - expected) ** 2 / expected).sum().item()
            # Wilson-Hilferty: a z of 4 is a chance of 3 in 100,000.
            k = len(responses) - 1
            z = ((chi_square / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
            assert z < 4, f"{family}, query {query}: chi-square {chi_square:.1f} with {k} degrees of freedom"


@law(
    "a response depends on its own query and noise, not on its neighbours, their lengths or the block size",
    "D5, D25: left padding with mask and positions, randomness by address", "sample", "Engine",
)  # fmt: skip
def test_sampling_does_not_depend_on_the_batch():
    queries = some_batch(((3, 1), (9, 1), (1, 1), (6, 1))).queries
    for family in FAMILIES:
        policy, noise = tiny_policy(family, scale=0.2), uniforms(4, 8)
        together = impl.sample(policy, queries, noise, 0.7, EOS, engine())
        in_blocks = impl.sample(policy, queries, noise, 0.7, EOS, engine(sample_batch_size=3))
        alone = [impl.sample(policy, [q], noise[[i]], 0.7, EOS, engine())[0] for i, q in enumerate(queries)]
        assert together == in_blocks == alone


@law(
    "a response ends with its first EOS, or is as long as allowed",
    "D4", "sample", "Engine", seed=st.integers(0, 5), T=st.integers(1, 12),
)  # fmt: skip
def test_sampled_responses_end_with_eos_or_are_full(seed, T):
    queries = some_batch().queries
    responses = impl.sample(tiny_policy("neox", scale=0.1), queries, uniforms(5, T, seed), 1.0, EOS, engine())
    for response in responses:
        assert EOS not in response[:-1] and 1 <= len(response) <= T
        assert response[-1] == EOS or len(response) == T


@law(
    "a token of probability 0 is never drawn, at either end of the noise",
    "inverse of the cumulative distribution", "sample", "Engine",
)  # fmt: skip
def test_impossible_tokens_are_never_sampled():
    policy = tiny_policy("llama")
    with torch.no_grad():
        policy.lm_head.weight = torch.nn.Parameter(torch.zeros_like(policy.lm_head.weight))
    policy.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([0, 1, VOCAB - 2, EOS]), -math.inf)
    )
    edge = torch.tensor([[0.0], [1 - 2**-24], [0.5]])
    drawn = {r[0] for r in impl.sample(policy, [[3]] * 3, edge, 0.7, EOS, engine())}
    assert drawn <= set(range(2, VOCAB - 2)), f"drawn {drawn}"


# saved folders [D3, D7, D9, D10, D11, D21]


def tiny_tokenizer(template: str = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"):
    return impl.train_tokenizer(toy_posts(), template, 300)


def toy_posts(n: int = 60) -> list:
    """Posts about one of twelve things; the summary names it."""
    things = "cats trains violins lakes bread chess maps roses robots kites drums soup".split()
    return [
        impl.Post(
            "toys", f"about {thing}", f"I like {thing} and talk of {thing}.\nDay {i} was long.\nNothing else happened.",
            f"Somebody likes {thing} a lot.",
        )
        for i, thing in ((i, things[i % 12]) for i in range(n))
    ]  # fmt: skip


@law(
    "a saved reward model, read by transformers' own classifier on a right-padded batch, gives our scores plus the offset, "
    "also when the tokenizer came with pad = EOS",
    "D3, D9: pooling reads the last token that is not padding; EOS must not count as padding", "save_model", "ScalarModel",
)  # fmt: skip
def test_saved_reward_model_gives_the_same_scores_in_transformers(tmp_path_factory=None):
    import tempfile

    import transformers as hf

    for family in FAMILIES:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        eos = tokenizer.eos_token_id
        config = tiny_policy(family, vocab=len(tokenizer)).config
        config.num_labels = 1
        model = impl.ScalarModel(hf.AutoModelForSequenceClassification.from_config(config).eval())
        model.center(0.75)
        batch = impl.Batch([[5, 6], [7, 8, 9]], [[10, eos], [11, 12, 13, eos]])
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            scores = model.scores(impl.lay_out(batch))
            model.save(model.state_dict(), tokenizer, Path(folder))
            theirs = hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
            pad = theirs.config.pad_token_id
            assert pad is not None and pad != eos and 0 <= pad < theirs.config.vocab_size, f"pad id {pad}, EOS {eos}"
            rows = [q + r for q, r in zip(batch.queries, batch.responses)]
            width = max(map(len, rows))
            tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
            close(theirs(input_ids=tokens).logits.squeeze(1) - theirs.config.score_offset, scores, tolerance=1e-5)
            close(impl.ScalarModel.load(folder).scores(impl.lay_out(batch)), scores, tolerance=1e-6)


@law(
    "centring makes the mean score 0, a second time changes nothing, and it changes no difference between scores",
    "D9; [5] section 3.4", "ScalarModel", "scores_of", *ENGINE_NEEDS,
)  # fmt: skip
def test_centring_is_idempotent():
    model, batch = tiny_scalar("neox"), some_batch()
    before = impl.scores_of(model, batch, engine())
    model.center(before.mean().item())
    once = impl.scores_of(model, batch, engine())
    close(once.mean(), 0.0, tolerance=1e-6)
    close(once - once[0], before - before[0], tolerance=1e-6)
    model.center(once.mean().item())
    close(impl.scores_of(model, batch, engine()), once, tolerance=1e-6)


@law(
    "a new reward head is drawn from N(0, std 1/√(d + 1)) and has no bias to train; a folder without one is refused",
    "D7; [4] detail 'reward head initialisation'", "ScalarModel", "rng",
)  # fmt: skip
def test_reward_head_starts_with_the_papers_spread():
    import tempfile

    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=8, hidden_size=4096, num_hidden_layers=0, num_attention_heads=1, intermediate_size=1
    )
    with tempfile.TemporaryDirectory() as folder:
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        with pytest.raises(impl.InputError, match="not a reward model"):
            impl.ScalarModel.load(folder)
        model = impl.ScalarModel.load(folder, new_head=impl.rng(0, "reward head"))
        again = impl.ScalarModel.load(folder, new_head=impl.rng(0, "reward head"))
    weight = model.classifier.score.weight
    assert weight.equal(again.classifier.score.weight)
    assert weight.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    assert abs(weight.mean().item()) < 4 / 4096
    assert model.classifier.score.bias is None and not model.bias.requires_grad


@law(
    "the value model starts as the reward model, offset included, and may train all of it, the bias too",
    "D10; [4] detail 'value model initialised from the reward model'", "ScalarModel", "save_model",
)  # fmt: skip
def test_value_model_starts_as_the_reward_model():
    import tempfile

    reward_model, tokenizer = tiny_scalar("neox"), tiny_tokenizer()
    reward_model.center(1.5)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        reward_model.save(reward_model.state_dict(), tokenizer, Path(folder))
        value_model = impl.ScalarModel.load(folder, train_bias=True)
        layout = impl.lay_out(some_batch())
        close(value_model.scores(layout), reward_model.scores(layout), tolerance=1e-6)
    assert value_model.bias.item() == pytest.approx(-1.5)
    assert all(parameter.requires_grad for parameter in value_model.parameters())
    head = impl.ValueHead(16)
    assert (head(torch.randn(2, 3, 16)) == 0).all(), "the shared value head starts at 0"


@law(
    "models are loaded in eval mode with float32 weights, whatever the checkpoint's precision and dropout",
    "D11, D21: dropout makes the first ratio differ from 1; updates of 3e-6 vanish in bfloat16", "load_policy", "ScalarModel",
)  # fmt: skip
def test_models_load_without_dropout_in_float32():
    import tempfile

    policy = tiny_policy("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        policy.save_pretrained(folder)
        loaded = [impl.load_policy(folder), impl.ScalarModel.load(folder, new_head=impl.rng(0, "head")).classifier]
        for model in loaded:
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            assert not any(module.training for module in model.modules())
        layout = impl.lay_out(some_batch())
        assert impl.response_logprobs(loaded[0], layout, 1.0).equal(impl.response_logprobs(loaded[0], layout, 1.0))


# data [D1, D2, D4, D25]


@law(
    "a query is the template filled in, a response is one space, the summary and EOS, and text never becomes a special token",
    "D1, D3, D4; [4] details 'query format' and 'EOS'", "Codec", "train_tokenizer", "Post",
)  # fmt: skip
def test_queries_and_responses_are_formatted_as_in_the_paper():
    tokenizer = tiny_tokenizer()
    codec = impl.Codec(tokenizer, impl.Data(query_tokens=200))
    post = impl.Post("cats", "a title", "text that says <|endoftext|> and goes on", "  A summary. ")
    (query,), (response,) = codec.queries([post]), codec.responses([post.summary])
    decode = tokenizer.decode
    assert (
        decode(query) == "SUBREDDIT: r/cats\n\nTITLE: a title\n\nPOST: text that says <|endoftext|> and goes on\n\nTL;DR:"
    )  # fmt: skip
    assert decode(response) == " A summary.<|endoftext|>"
    assert tokenizer.eos_token_id not in query and response.count(tokenizer.eos_token_id) == 1
    assert codec.text(response) == codec.text(response[:-1]) == "A summary."
    (query,) = codec.queries([impl.Post("cats", "a title", "\n\nPOST:" * 150, "")])
    assert decode(query).count("\n\nPOST:") == 151, "a post of few tokens, of seven letters each, fits"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@law(
    "a query too long loses paragraphs of its post; subreddit, title and TL;DR: stay",
    "D2; [5]: posts are truncated at a newline", "Codec", "train_tokenizer", "Post", limit=st.integers(40, 80),
)  # fmt: skip
def test_long_queries_lose_paragraphs_and_keep_the_rest(limit):
    tokenizer = tiny_tokenizer()
    codec = impl.Codec(tokenizer, impl.Data(query_tokens=limit))
    paragraphs = [f"Paragraph {i} of this." for i in range(12)]
    (query,) = codec.queries([impl.Post("cats", "a title", "\n".join(paragraphs), "")])
    text = tokenizer.decode(query)
    assert len(query) <= limit
    assert text.startswith("SUBREDDIT: r/cats\n\nTITLE: a title\n\nPOST: ") and text.endswith("\n\nTL;DR:")
    kept = text.removeprefix("SUBREDDIT: r/cats\n\nTITLE: a title\n\nPOST: ").removesuffix("\n\nTL;DR:").split("\n")
    assert kept == paragraphs[: len(kept)], "cut inside a paragraph although whole ones fit"
    (longer,) = codec.queries([impl.Post("cats", "a title", "\n".join(paragraphs[: len(kept) + 1]), "")])
    assert longer == query, "one more paragraph would have fitted"


@law(
    "posts with one text are cut once, whatever else was said of them; each has its query, in the order of the posts",
    "README: speed", "Codec", "train_tokenizer", "Post",
)  # fmt: skip
def test_posts_with_one_text_are_cut_once():
    codec = impl.Codec(tiny_tokenizer(), impl.Data(query_tokens=40))
    long, other, short = (impl.Post("cats", "a title", text, "") for text in ("One.\nTwo. " * 20, "No. " * 50, "No."))
    posts = [long, long._replace(record={"chosen": "x"}), other, short, short, long._replace(summary="It is."), long]
    cut, cut_query = [], impl.Codec.cut_query
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl.Codec, "cut_query", lambda codec, post: cut.append(post) or cut_query(codec, post))
        queries = codec.queries(posts)
        assert queries == codec.queries(posts) == [codec.queries([post])[0] for post in posts] and cut == [long, other]


@law(
    "a title that leaves no room for a post gives no query; one that just fits does",
    "contract of truncate_post", "Codec", "train_tokenizer", "Post",
)  # fmt: skip
def test_a_title_without_room_gives_no_query():
    tokenizer, post = tiny_tokenizer(), impl.Post("cats", "a title", "text " * 50, "")
    empty = len(impl.Codec(tokenizer, impl.Data()).uncut([post._replace(post="")])[0])
    for limit, length in ((empty, empty), (empty - 1, 0)):
        assert len(impl.Codec(tokenizer, impl.Data(query_tokens=limit)).queries([post])[0]) == length
    codec = impl.Codec(tokenizer, impl.Data(query_tokens=60))
    assert codec.queries([post._replace(title="🙂" * 40), post._replace(title="x" * 500), post])[:2] == [[], []]


@law(
    "every epoch is a fresh permutation: each example once, in another order, the same for the same seed",
    "D19, D25", "shuffled", n=st.integers(1, 9), epochs=st.integers(1, 3), seed=st.integers(0, 3),
)  # fmt: skip
def test_shuffles_use_every_example_once_per_epoch(n, epochs, seed):
    order = impl.shuffled(seed, "purpose", n, 0, epochs * n)
    assert impl.shuffled(seed, "purpose", n, 0, 0) == []
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert impl.shuffled(seed, "purpose", n, 0, epochs * n) == order
    middle = len(order) // 2
    if middle:
        parts = impl.shuffled(seed, "purpose", n, 0, middle) + impl.shuffled(seed, "purpose", n, middle, len(order))
        assert parts == order, "a part of the sequence depends on where one starts"


@law(
    "noise depends on seed, purpose and the episode's index alone, and differs between them",
    "D25: the same run on one process or many, before and after a resume", "noise", "shuffled",
)  # fmt: skip
def test_noise_is_addressed_by_the_episode():
    whole = impl.noise(1, "episodes", range(8), 5)
    assert impl.noise(1, "episodes", [6, 2], 5).equal(whole[[6, 2]])
    assert len({tuple(row.tolist()) for row in whole}) == 8
    assert not impl.noise(2, "episodes", range(8), 5).equal(whole)
    assert not impl.noise(1, "other", range(8), 5).equal(whole)
    assert whole.min() >= 0 and whole.max() < 1
    assert impl.shuffled(1, "a", 50, 0, 50) != impl.shuffled(1, "a", 50, 50, 100) != impl.shuffled(2, "a", 50, 50, 100)


@law(
    "ROUGE-L is the F1 of the longest common subsequence of words",
    "Lin 2004, section 3", "rouge_l", a=st.lists(st.sampled_from("abc"), max_size=5), b=st.lists(st.sampled_from("abc"), max_size=5),
)  # fmt: skip
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(a, b):
    def common(words: list[str], length: int) -> set[tuple[str, ...]]:
        return set(itertools.combinations(words, length))

    longest = max(n for n in range(min(len(a), len(b)) + 1) if common(a, n) & common(b, n))
    precision, recall = (longest / max(1, len(words)) for words in (a, b))
    f1 = 2 * precision * recall / (precision + recall) if longest else 0.0
    assert impl.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(f1)


# steps: what one optimizer step does [D6, D12 to D16, D18, D20 to D23]

STEP_NEEDS = (
    "read_tokens",
    "ppo_losses",
    "policy_losses",
    "value_losses",
    "Models",
    "PPO",
    "optimizer_step",
    "adamw",
    "Engine",
)


def ppo_config(**changes: object):
    """With a value model, which most laws of PPO are about, and which the default run does without."""
    return impl.PPO(**{"baseline": "value-model"} | changes)


def tiny_models(family: str, shared: bool = False):
    """Four models that all differ, as in the middle of a run."""
    policy, ref_policy = tiny_policy(family, 0, scale=0.2), tiny_policy(family, 3, scale=0.2)
    value_model = impl.ValueHead(16) if shared else tiny_scalar(family, 1, train_bias=True)
    if shared:
        torch.nn.init.constant_(value_model.linear.weight, 0.1)
    return impl.Models(
        policy, value_model, ref_policy.requires_grad_(False), tiny_scalar(family, 2).requires_grad_(False)
    )


def tiny_rollout(models, config, micro_batch_size: int = 32, rows: int = 8, queries: list | None = None,
                 share: bool = False):  # fmt: skip
    """A rollout of the policy, with advantages and returns."""
    queries = queries or some_batch(tuple((1 + i % 5, 1) for i in range(rows))).queries
    rows, machine = len(queries), engine(micro_batch_size)
    responses = impl.sample(models.policy, queries, uniforms(rows, 12), config.temperature, EOS, machine, share)
    batch = impl.Batch(queries, responses, share)
    scores = impl.scores_of(models.reward_model, batch, machine)
    rollout = impl.read_tokens(models, batch, scores, EOS, config.temperature, [list(range(rows))], machine)
    return replace(impl.credit(rollout, impl.shape_rewards(rollout, config), config), room=12)


def parameters_of(models) -> list[Tensor]:
    return [p for model in (models.policy, models.value_model) for p in model.parameters() if p.requires_grad]


def move_away(models) -> None:
    """From the policy that rolled out, so that ratios are not 1 and some are clipped."""
    with torch.no_grad():
        for p in parameters_of(models):
            p.add_(0.02 * torch.sin(torch.arange(p.numel())).view_as(p))


def gradient_of(losses: Callable, minibatch: object, groups: list[list[int]], modules: list) -> tuple[Tensor, dict]:
    """Gradient (one long vector) and statistics of a minibatch cut into these micro-batches."""
    for module in modules:
        module.zero_grad()
    totals: dict[str, float] = {}
    for rows in groups:
        shares = losses(minibatch[rows], minibatch)
        shares["loss"].backward()
        totals = {name: totals.get(name, 0.0) + share.item() for name, share in shares.items()}
    gradients = [p.grad.flatten() for m in modules for p in m.parameters() if p.grad is not None]
    return torch.cat(gradients).double(), totals


def ppo_losses(models: object, config: object) -> Callable[[object, object], dict[str, Tensor]]:
    """All of PPO's losses at once: the shares of a micro-batch, policy's and values' added up."""

    def shares(part: object, whole: object) -> dict[str, Tensor]:
        parts = [losses(part, whole) for losses in impl.ppo_losses(models, config)]
        names = dict.fromkeys(name for each in parts for name in each)
        return {name: sum(each[name] for each in parts if name in each) for name in names}

    return shares


def check_splitting(losses: Callable, minibatch: object, modules: list) -> None:
    """Micro-batches of 1, 2, 4 and N rows give one gradient and one set of statistics."""
    rows = list(range(len(minibatch)))
    whole, statistics = gradient_of(losses, minibatch, [rows], modules)
    assert whole.norm() > 1e-3, "a gradient of 0 would prove nothing"
    for size in (1, 2, 4):
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        split, split_statistics = gradient_of(losses, minibatch, groups, modules)
        error = ((split - whole).norm() / whole.norm()).item()
        assert error < 1e-5, f"micro-batches of {size}: gradient differs by {error:.1e} of its norm"
        for name, value in statistics.items():
            found = split_statistics[name]
            assert found == pytest.approx(value, rel=1e-4, abs=1e-6), f"micro-batches of {size}: {name}"


@law(
    "cutting a PPO minibatch into micro-batches changes neither its gradient nor its statistics",
    "D20; divided once, by the tokens of the whole minibatch", *STEP_NEEDS,
)  # fmt: skip
def test_ppo_micro_batches_do_not_change_the_step():
    for family, average, kl_in, value in (
        ("gpt2", "token", "reward", "value-model"), ("neox", "sequence", "loss", "value-model"),
        ("llama", "token", "loss", "value-head"), ("gpt2", "constant", "reward", "value-model"),
    ):  # fmt: skip
        config = impl.PPO(average=average, kl_in=kl_in, baseline=value)
        models = tiny_models(family, value == "value-head")
        rollout = tiny_rollout(models, config)
        shift = 0.3 * uniforms(*rollout.logprobs.shape, 5).masked_fill(~rollout.mask, 0)
        minibatch = replace(rollout, logprobs=rollout.logprobs + shift)[[6, 1, 3, 0, 7]]
        check_splitting(ppo_losses(models, config), minibatch, [models.policy, models.value_model])


@law(
    "cutting an SFT minibatch into micro-batches changes neither its gradient nor its loss",
    "D20", "language_model_losses", *ENGINE_NEEDS,
)  # fmt: skip
def test_sft_micro_batches_do_not_change_the_step():
    for prompt_weight in (0.0, 0.5):
        model = tiny_policy("gpt2")
        check_splitting(partial(impl.language_model_losses, model, prompt_weight), some_batch(), [model])


@law(
    "cutting a reward-model minibatch into micro-batches changes neither its gradient nor its accuracy",
    "D20", "reward_losses", "Rankings", *ENGINE_NEEDS,
)  # fmt: skip
def test_reward_micro_batches_do_not_change_the_step():
    model = tiny_scalar("llama")
    check_splitting(partial(impl.reward_losses, model), some_rankings(), [model.classifier])


@law(
    "SFT's loss is the mean over response tokens, EOS included; the prompt counts only by its weight, and where no query has "
    "a token to predict it counts nothing",
    "D4, D6", "language_model_losses", *ENGINE_NEEDS,
)  # fmt: skip
def test_sft_loss_is_over_response_tokens_and_eos():
    model = tiny_policy("gpt2")
    for batch in (some_batch(), some_batch(((1, 3), (1, 5)))):
        of_query, of_response = [], []
        for query, response in zip(batch.queries, batch.responses):
            tokens = query + response
            with torch.no_grad():
                table = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
            losses = [-table[t - 1, tokens[t]].item() for t in range(1, len(tokens))]
            of_query += losses[: len(query) - 1]
            of_response += losses[len(query) - 1 :]
        mean_query, mean_response = (sum(x) / max(1, len(x)) for x in (of_query, of_response))
        for weight in (0.0, 0.5, 1.0):
            losses = impl.language_model_losses(model, weight, batch, batch)
            close(losses["loss"].detach(), mean_response + weight * mean_query, tolerance=1e-5)
            close(losses["loss/response"].detach(), mean_response, tolerance=1e-5)
            model.zero_grad()
            losses["loss"].backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@law(
    "before the first step of a batch the ratio is 1, whatever the micro-batches",
    "D14: old log-probabilities come from a training forward pass", *STEP_NEEDS,
)  # fmt: skip
def test_ratio_is_one_before_the_first_step():
    for family in FAMILIES:
        config, models = ppo_config(), tiny_models(family)
        rollout = tiny_rollout(models, config, micro_batch_size=3)
        for part in (rollout[[0]], rollout):
            shares = ppo_losses(models, config)(part, part)
            assert shares["policy/approxkl"].item() <= 1e-8
            assert abs(shares["val/ratio"].item() - 1) <= 1e-4
            assert shares["policy/abs_log_ratio"].item() <= 1e-4
            assert shares["policy/clipfrac"].item() == 0


@law(
    "the policy reads a rollout in the very micro-batches of the first epoch: the same rows, side by side, equally wide",
    "D14: kernels round by shape, and the first ratio should be 1 in bfloat16, too", "read_tokens", "ppo",
    "values_of", "start", "Config",
)  # fmt: skip
def test_rollouts_are_read_in_the_first_epochs_micro_batches():
    config = stage_config("read", "ppo", compute=impl.Compute(micro_batch_size=3))
    layouts = [args[1].inputs["input_ids"] for args, _ in watched(config, "values_of")["values_of"]]
    groups = 6  # of 2 minibatches of 8 rows, in threes
    assert len(layouts) == 3 * groups * (1 + config.ppo.num_ppo_epochs)
    for update in range(0, len(layouts), 3 * groups):
        read, first, second = (layouts[update + groups * i : update + groups * (i + 1)] for i in range(3))
        assert all(a.shape == b.shape and a.equal(b) for a, b in zip(read, first))
        assert not all(a.shape == b.shape and a.equal(b) for a, b in zip(first, second)), "epochs differ"


@law(
    "a rollout's numbers are those of its models: policy, reference, value, score and entropy, each at temperature 0.7",
    "D13, D14; 0 in padding", *STEP_NEEDS,
)  # fmt: skip
def test_rollout_holds_what_each_model_said():
    config = ppo_config(batch_size=8, num_minibatches=1, temperature=0.7)
    models = tiny_models("neox")
    rollout = tiny_rollout(models, config, micro_batch_size=3)
    assert 0 < rollout.has_eos.sum() < 8, "the example should end some responses and not others"
    assert rollout.has_eos.tolist() == [r[-1] == EOS for r in rollout.batch.responses]
    for i, (query, response) in enumerate(zip(rollout.batch.queries, rollout.batch.responses)):
        n, tokens = len(response), torch.tensor([query + response])
        here = slice(len(query) - 1, len(query) + n - 1)
        with torch.no_grad():
            tables = [
                (m(input_ids=tokens).logits[0, here].double() / 0.7).log_softmax(-1) for m in (models.policy, models.ref_policy)
            ]  # fmt: skip
            value = (
                models.value_model.classifier(input_ids=tokens[:, : len(query)]).logits.item() + models.value_model.bias.item()
            )  # fmt: skip
        for result, table in zip((rollout.logprobs, rollout.ref_logprobs), tables):
            close(result[i, :n], [table[t, token].item() for t, token in enumerate(response)], tolerance=1e-5)
        close(rollout.entropy[i, :n], -(tables[0].exp() * tables[0]).sum(-1), tolerance=1e-5)
        close(rollout.values[i, 0], value, tolerance=1e-5)
        close(rollout.scores[i], impl.scores_of(models.reward_model, rollout.batch[[i]], engine())[0], tolerance=1e-5)
        for x in (rollout.logprobs, rollout.ref_logprobs, rollout.entropy, rollout.values):
            assert (x[i, n:] == 0).all()
        assert rollout.mask[i].tolist() == [t < n for t in range(rollout.mask.shape[1])]


def invented_rollout(s: Sequences, ended: list[bool]):
    """A rollout of given numbers: logprobs a, ref_logprobs b, values c; scores are the first c."""
    columns = {name: s.dense(name) for name in "abc"}
    batch = impl.Batch([[1]] * len(ended), [[0] * (n - 1) + [EOS if e else 0] for n, e in zip(s.lengths, ended)])
    return impl.Rollout(
        batch, s.mask(), columns["a"], columns["b"], columns["c"].abs(), columns["c"], columns["c"][:, 0],
        torch.tensor(ended),
    )  # fmt: skip


@law(
    "rewards are −β·KL per token, by the estimator asked for, and the score, or the missing-EOS score, at the end; as a loss, "
    "KL costs no reward",
    "D12, D15, D16", "shape_rewards", "Rollout", "PPO", s=sequences("a", "b", "c"), flips=st.integers(0, 15),
    kind=st.sampled_from([None, "k1", "k2", "k3"]),
)  # fmt: skip
def test_rewards_follow_the_flags(s, flips, kind):
    ended = [bool(flips >> i & 1) for i in range(len(s.lengths))]
    rollout = invented_rollout(s, ended)
    price = {"k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}.get(kind, lambda x: x)
    for kl_in in ("reward", "loss"):
        beta = 0.25 if kl_in == "reward" else 0.0
        expected = [[-beta * price(p - q) for p, q in zip(*rows)] for rows in zip(s.a, s.b)]
        for row, values, end in zip(expected, s.c, ended):
            row[-1] += values[0] if end else -2.0
        config = ppo_config(kl_coef=0.25, kl_in=kl_in, missing_eos_score=-2.0, kl_estimator=kind)
        rewards = impl.shape_rewards(rollout, config)
        close(rewards, padded(expected, max(s.lengths)))
        white = impl.shape_rewards(rollout, replace(config, whiten_rewards=True))
        close(white, impl.whiten(rewards, rollout.mask, shift_mean=False))


@law(
    "a rollout's statistics are means over responses of sums over their tokens, masked",
    "D23; [4]'s objective/kl, objective/entropy", "rollout_statistics", "Rollout", "PPO", s=sequences("a", "b", "c"),
)  # fmt: skip
def test_rollout_statistics_are_what_their_names_say(s):
    ended = [i % 2 == 0 for i in range(len(s.lengths))]
    rollout = invented_rollout(s, ended)
    config = ppo_config(kl_coef=0.25)
    rewards = impl.shape_rewards(rollout, config)
    statistics = impl.rollout_statistics(rollout, replace(config, whiten_rewards=True))
    n = len(s.lengths)
    kls = [sum(p - q for p, q in zip(a, b)) for a, b in zip(s.a, s.b)]
    kl = sum(kls) / n
    spread = sum((x - kl) ** 2 for x in kls) / n
    entropies = [abs(x) for row in s.c for x in row]
    expected = {
        "objective/kl": kl, "objective/kl_error": ((spread + 1) / n) ** 0.5, "objective/entropy": sum(entropies) / n,
        "objective/scores": sum(row[0] if end else -3.0 for row, end in zip(s.c, ended)) / n,
        "objective/non_score_reward": -0.25 * kl, "objective/rlhf_reward": rewards.sum().item() / n,
        "policy/entropy": sum(entropies) / len(entropies), "val/eos_rate": sum(ended) / n, "val/num_eos_tokens": sum(ended),
        "val/response_tokens": sum(s.lengths) / n, "objective/raw_scores": sum(row[0] for row in s.c) / n
    }  # fmt: skip
    assert statistics.keys() == expected.keys()
    for name, value in expected.items():
        assert statistics[name] == pytest.approx(value, abs=1e-6), name


@law(
    "the PPO loss is the clipped surrogate plus vf_coef times the clipped value error, over the minibatch's tokens or as the "
    "mean of its responses' means; statistics are means over tokens always, clipfrac of those whose clipped term is chosen",
    "[1] eq. 9; D18, D23", *STEP_NEEDS,
)  # fmt: skip
def test_ppo_loss_adds_up():
    config = ppo_config(vf_coef=0.25, cliprange=0.1, cliprange_value=0.3)
    for head in (False, True):
        models = tiny_models("neox", head)
        rollout = tiny_rollout(models, config)
        shift = (uniforms(*rollout.logprobs.shape, 7) - 0.5).masked_fill(~rollout.mask, 0)
        old = replace(rollout, logprobs=rollout.logprobs - shift, values=rollout.values - shift)[[2, 0, 5, 7]]
        terms: dict[str, list[list[float]]] = {}  # by name, one list for each response
        for i in (2, 0, 5, 7):
            row: dict[str, list[float]] = {}
            for t in range(int(rollout.mask[i].sum())):
                log_ratio, A = shift[i, t].item(), rollout.advantages[i, t].item()
                ratio, bounded = math.exp(log_ratio), min(max(math.exp(log_ratio), 0.9), 1.1)
                v, target = rollout.values[i, t].item(), rollout.returns[i, t].item()
                v_old = v - shift[i, t].item()
                near = v_old + min(max(v - v_old, -0.3), 0.3)
                token = {
                    "loss/policy": max(-ratio * A, -bounded * A), "loss/value": max((v - target) ** 2, (near - target) ** 2) / 2,
                    "policy/clipfrac": -bounded * A > -ratio * A, "val/clipfrac": (near - target) ** 2 > (v - target) ** 2,
                    "val/ratio": ratio, "policy/approxkl": log_ratio**2 / 2, "policy/abs_log_ratio": abs(log_ratio),
                }  # fmt: skip
                for name, value in token.items():
                    row.setdefault(name, []).append(float(value))
            for name, values in row.items():
                terms.setdefault(name, []).append(values)
        lengths = {len(row) for row in terms["loss/policy"]}
        assert len(lengths) > 1, "the example should have responses of unequal lengths"
        for average in ("token", "sequence"):
            shares = ppo_losses(models, replace(config, average=average))(old, old)
            expected = {name: sum(map(sum, rows)) / sum(map(len, rows)) for name, rows in terms.items()}
            assert 0 < expected["policy/clipfrac"] < 1, "the example should clip some tokens and not others"
            if average == "sequence":
                expected |= {k: sum(sum(row) / len(row) for row in terms[k]) / 4 for k in ("loss/policy", "loss/value")}
            expected["loss"] = expected["loss/policy"] + 0.25 * expected["loss/value"]
            assert shares.keys() == expected.keys()
            for name, value in expected.items():
                assert shares[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), (
                    f"head {head}, {average}: {name}"
                )


@law("a value that moved less than the clip is not counted as clipped, however it is rounded", "D18", *STEP_NEEDS)
def test_a_value_inside_its_clip_is_not_counted():
    config = ppo_config(cliprange_value=0.3)
    models = tiny_models("neox")
    with torch.no_grad():  # small values that move far: old + (new - old) would lose their last bits
        models.value_model.classifier.score.weight.mul_(0.01)
    rollout = tiny_rollout(models, config)
    for move in (1e-8, 0.29):  # of all signs and sizes up to it
        moves = (2 * move * (uniforms(*rollout.values.shape, 7) - 0.5)).masked_fill(~rollout.mask, 0)
        old = replace(rollout, values=rollout.values - moves)
        assert ppo_losses(models, config)(old, old)["val/clipfrac"] == 0


@law(
    "KL as a loss adds β times its estimate, value and gradient, k2's by default; the estimate in the reward is k1 by default",
    "D15", *STEP_NEEDS,
)  # fmt: skip
def test_kl_in_the_loss_adds_its_price():
    assert ppo_config(kl_in="loss").kl_kind == "k2" and ppo_config().kl_kind == "k1"
    for kind in (None, "k1", "k3"):
        config = ppo_config(kl_in="loss", kl_coef=0.5, kl_estimator=kind)
        models = tiny_models("llama")
        rollout = tiny_rollout(models, config)
        move_away(models)
        with_kl, without = (
            ppo_losses(models, c)(rollout, rollout)["loss"] for c in (config, replace(config, kl_coef=0.0))
        )
        layout = impl.lay_out(rollout.batch)
        logprobs = impl.response_logprobs(models.policy, layout, config.temperature)
        price = 0.5 * impl.kl_estimate(logprobs, rollout.ref_logprobs, kind or "k2")[rollout.mask].mean()
        close((with_kl - without).detach(), price.detach(), tolerance=1e-4)
        parameters = list(models.policy.parameters())
        for ours, theirs in zip(*(torch.autograd.grad(x, parameters) for x in (with_kl - without, price))):
            close(ours, theirs, tolerance=1e-4)
    logits_of = impl.response_logits

    def impossible(policy, layout):
        """What stands in padding is as good as impossible: its k3 is infinite."""
        logits, hidden = logits_of(policy, layout)
        return logits - 1e4 * (~layout.mask)[..., None] * (torch.arange(logits.shape[-1]) == 0), hidden

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "response_logits", impossible)
        gradient = torch.autograd.grad(ppo_losses(models, config)(rollout, rollout)["loss"], parameters)
    assert all(g.isfinite().all() for g in gradient)


def numbered(n: int):
    """A minibatch whose rows are told apart by their query."""
    return impl.Batch([[i] for i in range(n)], [[EOS]] * n)


@law(
    "AdamW with eps 1e-5 and no weight decay; a gradient beyond the limit is scaled to it; the gradient before is reported",
    "D21, D22; [4] detail 'Adam epsilon'", "adamw", "optimizer_step", "Engine", "Optimizer",
)  # fmt: skip
def test_optimizer_steps_are_adams_with_clipped_gradients():
    for limit, scale in ((1.0, 1.0), (0.0, 1.0), (1.0, 1e-6)):
        x = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        optimizer = impl.adamw(impl.Optimizer(max_grad_norm=limit), (torch.nn.ParameterList([x]), 0.1))
        group = optimizer.param_groups[0]
        assert group["eps"] == 1e-5 and group["weight_decay"] == 0

        def losses(part, whole, x=x, scale=scale) -> dict[str, Tensor]:
            return {"loss": scale * x[part.queries[0][0]] ** 2 / len(whole)}

        statistics = impl.optimizer_step(engine(1), optimizer, numbered(2), losses)
        gradient = scale * torch.tensor([3.0, -4.0])
        assert x.grad.norm().item() == pytest.approx(min(5 * scale, limit or math.inf), rel=1e-4)
        assert statistics["grad_norm"] == pytest.approx(5 * scale) and statistics["loss"] == pytest.approx(12.5 * scale)
        if limit and 5 * scale > limit:
            gradient = gradient / (5 * scale) * limit
        close(x, torch.tensor([3.0, -4.0]) - 0.1 * gradient / (gradient.abs() + 1e-5), tolerance=1e-5)


@law(
    "a loss or gradient that is not finite stops the run and leaves the weights as they were",
    "D22", "adamw", "optimizer_step", "Engine", "InputError", bad=st.sampled_from([math.nan, math.inf, 0.0]),
)  # fmt: skip
def test_non_finite_losses_stop_before_the_step(bad):
    x = torch.nn.Parameter(torch.ones(1))
    optimizer = impl.adamw(impl.Optimizer(), (torch.nn.ParameterList([x]), 0.1))
    loss = {0.0: lambda: (x - 1).sqrt().sum()}.get(bad, lambda: (x * bad).sum())  # the root's slope at 0 is infinite
    with pytest.raises(impl.InputError, match="grad_norm is" if bad == 0 else "loss is"):
        impl.optimizer_step(engine(), optimizer, numbered(1), lambda part, whole: {"loss": loss()})
    assert x.item() == 1.0


@law(
    "learning rates warm up, then fall to 0 along a half cosine, each from its own start",
    "D21", "warmup", "cosine", "set_lr", steps=st.integers(1, 50),
)  # fmt: skip
def test_schedules_rise_and_fall(steps):
    factors = [impl.warmup(i, 10 * steps) for i in range(steps + 3)]
    assert factors == sorted(factors) and 0 < factors[0] <= 1 and factors[steps - 1 :] == [1.0] * 4
    assert impl.warmup(48, 10**6) < impl.warmup(49, 10**6) == 1.0
    assert impl.cosine(0) == 1 and impl.cosine(1) == pytest.approx(0) and impl.cosine(0.5) == pytest.approx(0.5)
    x, y = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = impl.adamw(impl.Optimizer(), *((torch.nn.ParameterList([z]), lr) for z, lr in ((x, 0.1), (y, 0.3))))
    for factor in (0.5, 1 / steps):
        impl.set_lr(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.3 * factor])


@law(
    "an update's statistics are the means of its steps', `first_` its first step's",
    "D14, D23", "step_statistics",
)  # fmt: skip
def test_an_updates_statistics_are_means_of_its_steps():
    names = ("loss", "policy/approxkl", "policy/abs_log_ratio")
    steps = [dict(zip(names, (i, 10 * i, 100 * i))) for i in (1.0, 2.0, 6.0)]
    means = dict(zip(names, (3, 30, 300)))
    first = {"policy/first_approxkl": 10.0, "policy/first_abs_log_ratio": 100.0}
    assert impl.step_statistics(steps) == pytest.approx(means | first)


@law(
    "a tie counts half, in the reward model's accuracy and wherever writers are compared",
    "D8, D24", "wins_of",
)  # fmt: skip
def test_ties_count_half():
    close(impl.wins_of(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, 0.0])).mean(), 0.5)
    close(impl.wins_of(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])).mean(), 0.75)


# -----------------------------------------------------------------------------
# the pipeline: a whole run in seconds, on invented posts

RUN_NEEDS = ("start", "Config", "Data", "Pretrain", "SFT", "Reward", "PPO", "Post")


def workshop() -> Path:
    """A folder for this test process, removed at its end."""
    import tempfile

    if not hasattr(workshop, "folder"):
        workshop.folder = tempfile.TemporaryDirectory()
    return Path(workshop.folder.name)


def toy_files() -> tuple[Path, Path]:
    train, valid = workshop() / "train.jsonl", workshop() / "valid.jsonl"
    if not train.exists():
        posts = toy_posts(72)
        impl.write_records([post.fields() for post in posts[:60]], train)
        impl.write_records([post.fields() for post in posts[60:]], valid)
    return train, valid


def tiny_config(name: str, seed: int = 1, **changes: object):
    """Every stage, seconds in all."""
    train, valid = toy_files()
    config = impl.Config(
        folder=workshop() / "runs" / name, seed=seed,
        data=impl.Data(train=train, valid=valid, query_tokens=60, response_tokens=16, comparison_tokens=20),
        pretrain=impl.Pretrain(width=32, heads=2, vocab_size=400, epochs=8),
        sft=impl.SFT(epochs=12), compare=impl.Compare(samples=2, tie=0.0, temperature=0.7), reward=impl.Reward(batch_size=16),
        ppo=ppo_config(total_episodes=48, batch_size=16, num_minibatches=2, sample_every=2, responses_per_query=1),
    )  # fmt: skip
    return replace(config, **changes)


def finished_run(name: str = "whole", seed: int = 1, **changes: object) -> Path:
    """The folder of a tiny run, made on first use."""
    folder = workshop() / "runs" / name
    if not (folder / "eval.json").exists():
        impl.start(tiny_config(name, seed, **changes))
    return folder


def stage_config(name: str, *stages: str, **changes: object):
    """Some stages alone, on what the finished run holds."""
    return tiny_config(name, **{"stages": stages, "from_run": (finished_run(),)} | changes)


def models_of(run):
    codec = run.codec("sft")
    return impl.load_models(run, codec, *impl.read_prompts(run, "train", codec))


def metrics_of(folder: Path, timings: bool = False) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return records if timings else [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def same_metrics(one: Path, other: Path, tolerance: float) -> None:
    """Metrics within a tolerance; a tie of two scores, though, is decided by rounding."""
    for expected, found in zip(metrics_of(one), metrics_of(other), strict=True):
        assert expected.pop("stage") == found.pop("stage")
        for name in [name for name in expected if "accuracy" in name]:
            assert found.pop(name) == pytest.approx(expected.pop(name), abs=0.07)
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance / 10)


def weights_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@law(
    "a run leaves its flags, metrics, samples, evaluation and three model folders that transformers can load",
    "README: files of a run", *RUN_NEEDS,
)  # fmt: skip
def test_a_run_leaves_everything_it_promises():
    import transformers as hf

    folder = finished_run()
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "eval.json", "sft", "reward", "ppo"):
        assert (folder / name).exists(), f"no {name}"
    assert not list(folder.rglob("*.p*t")), "a finished run has neither checkpoint nor parts of files"
    for name in ("sft", "ppo"):
        hf.AutoModelForCausalLM.from_pretrained(folder / name)
        assert hf.AutoTokenizer.from_pretrained(folder / name).eos_token_id is not None
    reward_model = hf.AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    assert reward_model.config.num_labels == 1 and reward_model.config.score_offset != 0
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["ppo"]["batch_size"] == 16 and record["versions"]["torch"] == torch.__version__
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["update"] for sample in samples] == [0, 2]
    assert all(isinstance(sample["ppo"], str) and math.isfinite(sample["ppo_score"]) for sample in samples)


@law(
    "metrics name stage and step, are finite, and say that the ratio was 1 before each update's first step",
    "D14, D23", *RUN_NEEDS,
)  # fmt: skip
def test_a_run_logs_finite_numbers_and_ratio_one():
    records = metrics_of(finished_run(), timings=True)
    assert {record["stage"] for record in records} == {"pretrain", "sft", "reward", "ppo"}
    assert all(math.isfinite(v) for record in records for k, v in record.items() if k != "stage")
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    updates = [record for record in records if record["stage"] == "ppo"]
    assert [record["step"] for record in updates] == [0, 1, 2]
    for record in updates:
        assert record["policy/first_approxkl"] <= 1e-8 and record["policy/first_abs_log_ratio"] <= 1e-4
    assert updates[0]["objective/kl"] == 0 and updates[2]["objective/kl"] != 0
    assert [record["lr"] for record in updates] == pytest.approx([4e-4, 4e-4 * 2 / 3, 4e-4 / 3])
    for stage, figure in (("sft", "valid/loss"), ("reward", "valid/accuracy all")):
        *steps, last = (record for record in records if record["stage"] == stage)
        assert figure in last and [record["step"] for record in (*steps, last)] == list(range(len(steps) + 1))


@law(
    "PPO changes neither the SFT model, which is its reference, nor the reward model, bit for bit",
    "[4]: reference and reward model are frozen", *RUN_NEEDS, "ppo", "load_models",
)  # fmt: skip
def test_frozen_models_stay_frozen():
    folder = finished_run()
    files = {p: p.read_bytes() for name in ("sft", "reward") for p in (folder / name).iterdir()}
    models = watched(stage_config("again", "ppo"), "load_models")["load_models"][0][1]
    for model, frozen in ((models.ref_policy, weights_of(folder / "sft")), (models.reward_model.classifier, weights_of(folder / "reward"))):  # fmt: skip
        assert all(model.state_dict()[name].equal(value) for name, value in frozen.items())
    assert models.reward_model.bias.item() == impl.ScalarModel.load(folder / "reward").bias.item()
    assert all(path.read_bytes() == content for path, content in files.items())
    after, before = weights_of(workshop() / "runs" / "again" / "ppo"), weights_of(folder / "sft")
    assert any(not after[name].equal(before[name]) for name in before), "PPO trained nothing"
    whole = weights_of(folder / "ppo")
    assert after.keys() == whole.keys()
    assert all(x.equal(whole[name]) for name, x in after.items()), "PPO alone is not PPO in the run"


@law(
    "the stages of a run make no query twice, and take no conversation for the text that it holds",
    "README: speed", *RUN_NEEDS, "Codec",
)  # fmt: skip
def test_stages_make_no_query_twice():
    made, uncut = [], impl.Codec.uncut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl.Codec, "uncut", lambda codec, posts: made.extend(posts) or uncut(codec, posts))
        impl.start(stage_config("once", "sft", "compare", "reward", "ppo"))
    times = Counter(post.post for post in made)
    assert {times[post.post] for post in toy_posts(60)} == {1}
    talks = [impl.Post("", "", "a", "", None, prompt) for prompt in ("a", [{"role": "user", "content": "a"}])]
    codec = impl.Codec(impl.load_tokenizer(finished_run() / "sft"), impl.Data())
    one, other = codec.queries(talks)
    assert [one, other] == [codec.uncut([talk])[0] for talk in talks] and one != other


@law(
    "the same seed gives the same numbers, another seed others",
    "D25", *RUN_NEEDS,
)  # fmt: skip
def test_a_seed_decides_everything():
    first, again, other = finished_run(), finished_run("repeated"), finished_run("other seed", seed=2)
    assert metrics_of(first) == metrics_of(again)
    assert metrics_of(first) != metrics_of(other)
    assert all(x.equal(weights_of(again / "ppo")[name]) for name, x in weights_of(first / "ppo").items())


@law(
    "the same seed gives a new model the same weights, another seed others",
    "D25", "Pretrain", "small_model",
)  # fmt: skip
def test_a_seed_decides_new_weights():
    size, tokenizer = impl.Pretrain(width=32, heads=2), tiny_tokenizer()
    a, b, c = (impl.small_model(size, tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)


@law(
    "the first head of a new model looks one token back, wherever it is; no other does",
    "Olsson et al. 2022, arXiv 2209.11895", "Pretrain", "small_model", "look_back",
)  # fmt: skip
def test_a_new_models_first_head_looks_back():
    model = impl.small_model(impl.Pretrain(), tiny_tokenizer(), 1)
    model.set_attn_implementation("eager")
    texts = torch.from_numpy(impl.rng(1, "texts").integers(0, model.config.vocab_size, (8, 64)))
    with torch.no_grad():
        attended = torch.stack(model(texts, output_attentions=True).attentions)  # (layers, B, heads, W, W)
    back = attended.diagonal(offset=-1, dim1=-2, dim2=-1).mean(1)  # (layers, heads, W - 1)
    assert (back[0, 0] > 0.4).all() and back[0, 0].mean() > 0.65
    assert (back[0, 1:, 20:] < 0.1).all() and (back[1:, :, 20:] < 0.1).all()


@law(
    "the reward folder's scores have mean 0 over the training summaries",
    "D9", *RUN_NEEDS, "scores_of", "Codec",
)  # fmt: skip
def test_the_reward_model_of_a_run_is_centred():
    folder = finished_run()
    config = tiny_config("unused")
    codec = impl.Codec(impl.load_tokenizer(folder / "reward"), config.data)
    posts = toy_posts(72)[:60]
    batch = impl.Batch(codec.queries(posts), codec.responses([post.summary for post in posts]))
    close(impl.scores_of(impl.ScalarModel.load(folder / "reward"), batch, engine()).mean(), 0.0, tolerance=1e-4)


@law(
    "every epoch of PPO uses every rollout once, in minibatches of the size asked for and in a new order",
    "D19", *RUN_NEEDS, "ppo", "optimizer_step",
)  # fmt: skip
def test_ppo_uses_every_rollout_once_per_epoch():
    config = stage_config("epochs", "ppo")
    config = replace(config, ppo=replace(config.ppo, total_episodes=32, num_ppo_epochs=3))
    seen = [
        [tuple(q) for q in args[2].batch.queries] for args, _ in watched(config, "optimizer_step")["optimizer_step"]
    ]
    epochs = [seen[i] + seen[i + 1] for i in range(0, len(seen), 2)]
    assert len(epochs) == 6 and all(len(minibatch) == 8 for minibatch in seen)
    for update in (epochs[:3], epochs[3:]):
        assert len({tuple(sorted(epoch)) for epoch in update}) == 1 and len(set(update[0])) == 16
        assert len(set(map(tuple, update))) == 3


@law(
    "advantages are whitened over the whole batch before any minibatch is cut, or left alone if asked",
    "D16; [4] detail 'advantage whitening'", *RUN_NEEDS, "ppo", "optimizer_step",
)  # fmt: skip
def test_ppo_whitens_advantages_over_the_batch():
    for name, white in (("whitened", True), ("not whitened", False)):
        config = stage_config(name, "ppo")
        config = replace(config, ppo=replace(config.ppo, total_episodes=16, whiten_advantages=white))
        parts = [args[2] for args, _ in watched(config, "optimizer_step")["optimizer_step"]][:2]
        one, both = parts[0].advantages[parts[0].mask], torch.cat([part.advantages[part.mask] for part in parts])
        is_white = abs(both.mean().item()) < 1e-4 and abs(both.std(correction=0).item() - 1) < 1e-3
        assert is_white == white and abs(one.mean().item()) > 1e-4


@law(
    "the variants run: shared value head, KL in the loss, whitened rewards, sequence means, other estimators",
    "README: flags", *RUN_NEEDS, "ppo",
)  # fmt: skip
def test_variants_of_ppo_run():
    base = replace(tiny_config("unused").ppo, total_episodes=16)
    finished_run("plain", reward=impl.Reward(batch_size=16, pretraining_pairs=0))
    variants = {
        "shared": replace(base, baseline="value-head", whiten_rewards=True),
        "kl loss": replace(base, kl_in="loss", average="sequence"), "k3": replace(base, kl_estimator="k3")
    }  # fmt: skip
    for name, ppo in variants.items():
        impl.start(stage_config(name, "ppo", "evaluate", ppo=ppo))
        assert (workshop() / "runs" / name / "ppo" / "model.safetensors").exists()


@law(
    "comparisons name as chosen the text the labeler scores higher, drop what it can hardly tell apart, and put it first as often as second",
    "README: the labeler", *RUN_NEEDS, "compared_by", "Labeler",
)  # fmt: skip
def test_comparisons_are_the_labelers():
    path, posts = finished_run() / "data" / "comparisons_train.jsonl", toy_posts(60)
    labeler = impl.Labeler(posts)
    records, _ = impl.read_records(path, impl.parse_comparison)
    first: dict[tuple, list[bool]] = {}
    for record, line in zip(records, path.read_text().splitlines()):
        assert labeler.score(record.post, record.chosen) > labeler.score(record.post, record.rejected)
        first.setdefault(record.kinds, []).append(json.loads(line)["choice"] == 0)
    assert first.keys() == {("sft vs sft",), ("other post vs sft",)}
    for kind, share in ((kind, sum(x) / len(x)) for kind, x in first.items()):
        assert 0.25 < share < 0.75, f"{kind}: the better stands first in {share:.0%}"
    good, bad = ("sft", "About cats."), ("sft", "About trains.")
    for one, other, flip in itertools.product((good, bad), (good, bad), (False, True)):
        found = [impl.parse_comparison(r) for r in impl.compared_by(labeler, posts[0], one, other, 0.0, flip)]
        assert [(c.chosen, c.rejected) for c in found] == ([] if one == other else [("About cats.", "About trains.")])
    (straight,), (flipped,) = (impl.compared_by(labeler, posts[0], good, bad, 0.0, flip) for flip in (False, True))
    assert (straight["choice"], flipped["choice"]) == (0, 1)
    with pytest.MonkeyPatch.context() as patch:
        for gap in (0.04, 0.06):
            patch.setattr(labeler, "score", lambda post, text, gap=gap: gap * (text == good[1]))
            assert len(impl.compared_by(labeler, posts[0], good, bad, 0.05, False)) == (gap > 0.05)


@law(
    "the samples of one post are drawn with different noise",
    "README: the labeler compares two samples", *RUN_NEEDS, "noise", "sample",
)  # fmt: skip
def test_samples_of_a_post_are_independent():
    calls = watched(stage_config("compare", "compare"), "noise", "sample")
    purposes = [args[1] for args, _ in calls["noise"]]
    assert len(purposes) == len(set(purposes)) == 4, purposes
    for args, _ in calls["sample"]:
        assert len({tuple(row.tolist()) for row in args[2]}) == len(args[1])


@law(
    "PPO starts from the SFT model, twice, and from the reward model, twice; policy and value model learn, bias included; the "
    "value model's level is such that its mean over the references' tokens, where it is read, is 0",
    "D9, D10; [4]: initialisation of the four models; value initialization bias, Yuan et al. 2025, arXiv 2503.01491",
    *RUN_NEEDS, "load_models", "Run", "read_examples",
)  # fmt: skip
def test_the_four_models_start_where_they_should():
    folder = finished_run()
    uneven, posts = workshop() / "uneven references.jsonl", toy_posts(60)
    posts = [post._replace(summary=post.summary[: -6 * (i % 3)] or post.summary) for i, post in enumerate(posts)]
    impl.write_records([post.fields() for post in posts], uneven)
    config = stage_config("four models", "ppo")
    run = impl.Run(replace(config, data=replace(config.data, train=uneven)))
    models, sft, reward = models_of(run), weights_of(folder / "sft"), weights_of(folder / "reward")
    for policy in (models.policy, models.ref_policy):
        assert all(policy.state_dict()[name].equal(x) for name, x in sft.items())
    for scalar in (models.value_model, models.reward_model):
        assert all(scalar.classifier.state_dict()[name].equal(x) for name, x in reward.items())
    assert models.reward_model.bias.item() == impl.ScalarModel.load(folder / "reward").bias.item() != 0
    values, examples = [], impl.read_examples(run, "train", run.codec("sft"))
    with torch.no_grad():
        for i in range(len(examples)):
            values += models.value_model.values(impl.lay_out(examples[[i]]))[0].tolist()
    assert len({round(value, 3) for value in values}) > 10 and abs(sum(values) / len(values)) < 1e-3
    assert all(p.requires_grad for m in (models.policy, models.value_model) for p in m.parameters())
    assert not any(p.requires_grad for m in (models.ref_policy, models.reward_model) for p in m.parameters())
    assert models.policy is not models.ref_policy and models.value_model is not models.reward_model


@law(
    "marks are of each text against its own post, and of style against another's",
    "D24: the controls", *RUN_NEEDS, "marks_of", "Codec", "Labeler", "rouge_l",
)  # fmt: skip
def test_marks_are_what_they_are_called():
    folder, posts, config = finished_run(), toy_posts(12), tiny_config("unused")
    codec = impl.Codec(impl.load_tokenizer(folder / "sft"), config.data)
    scorers = {name: impl.ScalarModel.load(folder / "reward") for name in ("score", "judge")}
    scorers["judge"].center(-5.0)
    labeler, responses = impl.Labeler(toy_posts(60)), codec.responses([post.summary for post in posts])
    responses[0] = responses[0][:-1]
    batch = impl.Batch(codec.queries(posts), responses)
    marks = impl.marks_of(posts, batch, codec, labeler, scorers, engine())
    assert marks["rouge_l"].tolist() == [1.0] * 12 and (marks["rouge_l, other post"] < 1).all()
    assert marks["eos"].tolist() == [0.0] + [1.0] * 11
    assert marks["tokens"].tolist() == [float(len(response)) for response in responses]
    for i, post in enumerate(posts):
        other = posts[(i + 6) % 12]
        assert marks["labeler"][i] == pytest.approx(labeler.score(post, post.summary))
        assert marks["labeler, other post"][i] == pytest.approx(labeler.score(other, post.summary))
    close(torch.tensor(marks["score"]), impl.scores_of(scorers["score"], batch, engine()).double())
    close(torch.tensor(marks["judge"]), torch.tensor(marks["score"]) + 5, tolerance=1e-5)


@law(
    "the evaluation's SFT and PPO columns are those models' own samples, on the test posts, its KL is from the SFT model at the "
    "temperature of PPO, and its win rate is how often the labeler scores PPO's higher",
    "D24", *RUN_NEEDS, "report",
)  # fmt: skip
def test_evaluation_columns_belong_to_their_models():
    folder, test = finished_run(), workshop() / "test posts.jsonl"
    impl.write_records([post.fields() for post in toy_posts(90)[72:]], test)
    config = stage_config("columns", "evaluate", evaluate=impl.Evaluate(posts=15))
    config = replace(config, data=replace(config.data, test=test))
    ((_, posts, texts, *_), _), = watched(config, "report")["report"]  # fmt: skip
    assert [post.fields() for post in posts] == [post.fields() for post in toy_posts(90)[72:87]]
    codec, noise = (
        impl.Codec(impl.load_tokenizer(folder / "sft"), config.data), impl.noise(1, "evaluate", range(15), 16),
    )  # fmt: skip
    for name in ("sft", "ppo"):
        policy = impl.load_policy(folder / name)
        for temperature in (0.01, 0.7):
            drawn = impl.sample(policy, codec.queries(posts), noise, temperature, codec.eos_id, engine())
            assert texts[f"{name.upper()} T={temperature}"] == [codec.text(response) for response in drawn]
    batch, sft = impl.Batch(codec.queries(posts), drawn), impl.load_policy(folder / "sft")
    ours, theirs = (
        impl.map_rows(batch, engine(), lambda x, p=p: [impl.response_logprobs(p, x, 0.7)])[0].sum(1) for p in (policy, sft)
    )  # fmt: skip
    record, labeler = (
        json.loads((workshop() / "runs" / "columns" / "eval.json").read_text()), impl.Labeler(toy_posts(60)),
    )  # fmt: skip
    lines = [json.loads(line) for line in (workshop() / "runs" / "columns" / "eval.jsonl").read_text().splitlines()]
    assert "kl" not in record["means"]["PPO T=0.01"] and record["means"]["SFT T=0.7"]["kl"] == 0
    kl = (ours - theirs).mean().item()
    assert kl > 0 and record["means"]["PPO T=0.7"]["kl"] == pytest.approx(kl, rel=1e-4)
    for pair, figures in record["comparisons"].items():
        a, b = ([labeler.score(p, w["summaries"][x]) for p, w in zip(posts, lines)] for x in pair.split(" against "))
        wins = [(x > y) + (x == y) / 2 for x, y in zip(a, b)]
        assert figures["win rate"][0] == pytest.approx(sum(wins) / len(wins))


@law(
    "every update rolls out new posts with new noise at the temperature asked for, and learns from the advantages and returns "
    "of that rollout",
    "D13, D19, D25; [4]: the value target is not whitened", *RUN_NEEDS, "ppo", "sample", "read_tokens", "optimizer_step",
)  # fmt: skip
def test_every_update_sees_its_own_episodes():
    config = stage_config("episodes", "ppo")
    config = replace(config, ppo=replace(config.ppo, temperature=1.3, gamma=0.9, lam=0.8, kl_coef=0.3, sample_every=99))
    calls = watched(config, "sample", "read_tokens", "optimizer_step")
    drawn = [args for args, _ in calls["sample"] if len(args[1]) == 16]
    noise = [impl.noise(1, "episodes", range(16 * i, 16 * i + 16), 16) for i in range(3)]
    assert all(args[2].equal(expected) and args[3] == 1.3 for args, expected in zip(drawn, noise))
    asked = [tuple(query) for args in drawn for query in args[1]]
    assert len(asked) == 48 and len(set(asked)) == 48, "48 episodes of 60 posts: none twice"
    rollouts = [rollout for _, rollout in calls["read_tokens"]]
    assert [r.batch.responses for r in rollouts] == [result for args, result in calls["sample"] if len(args[1]) == 16]
    for i, (args, _) in enumerate(calls["optimizer_step"]):
        minibatch, rollout = args[2], rollouts[i // 4]
        raw, targets = impl.gae(impl.shape_rewards(rollout, config.ppo), rollout.values, rollout.mask, 0.9, 0.8)
        white = impl.whiten(raw, rollout.mask)
        rows = [rollout.batch.queries.index(query) for query in minibatch.batch.queries]
        T = minibatch.mask.shape[1]
        close(minibatch.returns, targets[rows][:, :T])
        close(minibatch.advantages, white[rows][:, :T])
        assert minibatch.logprobs.equal(rollout.logprobs[rows][:, :T])


def pairs_of(rankings: list) -> list[tuple]:
    """Query, better and worse response of each pair."""
    return [(tuple(q), tuple(texts[a]), tuple(texts[b])) for q, texts, pairs in rankings for a, b in pairs]


@law(
    "the reward model sees own summaries against exchanged ones, and every comparison once, as it was judged; of one post there "
    "is nothing to exchange",
    "[5] section 3.4; Askell et al. 2021", *RUN_NEEDS, "reward", "Rankings", "read_rankings", "Run",
)  # fmt: skip
def test_the_reward_model_sees_each_pair_once_the_right_way_round():
    run = impl.Run(stage_config("pairs", "reward"))
    codec = run.codec("sft")
    examples, (rankings, kinds) = impl.read_examples(run, "train", codec), impl.read_rankings(run, "train", codec)
    judged = Counter(pairs_of(rankings))
    comparisons, _ = impl.read_records(finished_run() / "data" / "comparisons_train.jsonl", impl.parse_comparison)
    rows = zip(
        codec.queries([c.post for c in comparisons]), *(codec.responses([c[i] for c in comparisons]) for i in (1, 2))
    )
    given = [
        tuple(map(tuple, row)) for row in rows if max(len(row[1]), len(row[2])) <= run.config.data.comparison_tokens
    ]
    assert judged == Counter(given) and len(given) > len(rankings) == len({query for query, _, _ in given})
    assert Counter(kinds) == Counter(c.kinds for c in comparisons), "all of these fit"
    own = {(tuple(q), tuple(r)) for q, r in zip(examples.queries, examples.responses)}
    for name, posts in (("pairs of all", 6000), ("pairs of one", 1)):
        config = stage_config(name, "reward", reward=impl.Reward(batch_size=16, pretraining_pairs=posts))
        seen = [args[2] for args, _ in watched(config, "optimizer_step")["optimizer_step"]]
        assert all(len(pairs_of(part.rankings)) <= 16 for part in seen), "pairs of a step"
        rest = Counter(pair for part in seen for pair in pairs_of(part.rankings))
        rest.subtract(judged)
        assert min(rest.values()) >= 0, "a comparison was not seen, or the wrong way round"
        pretrained = list(rest.elements())
        queries = {query for query, _, _ in pretrained}
        assert len(queries) == len(pretrained) and (40 < len(queries) <= 60 if posts > 1 else not queries)
        assert {(query, better) for query, better, _ in pretrained} <= own
        assert all(better != worse for _, better, worse in pretrained)
        assert sum((query, worse) in own for query, _, worse in pretrained) <= len(pretrained) / 2


@law(
    "learning rates warm up and fall as their schedules say, to nothing at the end of SFT and of the reward model",
    "D21", *RUN_NEEDS, "warmup", "cosine",
)  # fmt: skip
def test_logged_learning_rates_follow_their_schedules():
    records, config = metrics_of(finished_run()), tiny_config("unused")
    shapes = {"pretrain": lambda x: 1.0, "sft": impl.cosine, "reward": impl.cosine}
    for stage, shape in shapes.items():
        logged = [record["lr"] for record in records if record["stage"] == stage and "lr" in record]
        n, lr = len(logged), getattr(config, stage).lr
        assert logged == pytest.approx([lr * impl.warmup(i, n) * shape(i / n) for i in range(n)])


@law(
    "no file of the corpus is in two splits, whatever the seed, and no post is lost",
    "held-out posts must be new", "corpus", "build_corpus", "Post", "Run", "Config", "read_posts",
)  # fmt: skip
def test_the_splits_of_the_corpus_share_no_file():
    def documents():
        for file, i in itertools.product(range(150), range(10)):
            words = " ".join(f"word{file}x{i}x{j}" for j in range(10))
            name = "".join(chr(97 + int(digit)) for digit in f"{file}{i}")
            yield f"lib/{file}.py", impl.Post("lib", f"file {file}", words, f"Explain the thing called {name}x here.")

    found = []
    for seed in (1, 2):
        run = impl.Run(impl.Config(folder=workshop() / "runs" / f"corpus {seed}", seed=seed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(impl, "docstrings", documents)
            impl.corpus(run)
        splits = {split: impl.read_posts(run, split) for split in ("train", "valid", "test")}
        found.append({split: {post.title for post in posts} for split, posts in splits.items()})
        assert len(splits["valid"]) == len(splits["test"]) == 512 and len(splits["train"]) == 1500 - 2 * 520
    assert found[0] == found[1], "a post that one seed trained on is another seed's test"
    assert not any(found[0][a] & found[0][b] for a, b in itertools.combinations(found[0], 2))


@law(
    "the report compares PPO with SFT, not SFT with PPO, each at its own temperature, and says who judged",
    "D24", *RUN_NEEDS, "report", "Run",
)  # fmt: skip
def test_the_report_names_the_winner_at_each_temperature():
    numpy = pytest.importorskip("numpy")
    posts = toy_posts(40)

    def marks(labeler: float) -> dict:
        names = (
            "score",
            "labeler",
            "labeler, other post",
            "rouge_l",
            "rouge_l, other post",
            "kl",
            "eos",
            "tokens",
            "invented words",
            "repetitive",
        )
        return {name: numpy.full(40, labeler if name == "labeler" else 0.0) for name in names}

    writers = {"author": 0.9, "SFT T=0.01": 0.1, "SFT T=0.7": 0.5, "PPO T=0.01": 0.2, "PPO T=0.7": 0.4}
    texts = {writer: [f"{writer} on {post.title}" for post in posts] for writer in writers}
    run = impl.Run(stage_config("report", "evaluate"))
    usual, human = run.config, {"comparisons_train": toy_files()[0], "comparisons_valid": toy_files()[0]}
    for changes, judge in (
        ({}, "the labeler that made the preferences"),
        ({"data": replace(usual.data, **human)}, "word overlap, not those who chose"),
        ({"evaluate": impl.Evaluate(judge="rules:better")}, "rules:better"),
        ({"evaluate": impl.Evaluate(judge="reward")}, "what PPO was trained on"),
    ):
        run.config = replace(usual, **changes)
        impl.report(
            run, posts, texts, {writer: marks(x) for writer, x in writers.items()},
            lambda a, b: numpy.full(40, float(writers[a] > writers[b])),
        )  # fmt: skip
        record = json.loads((run.folder / "eval.json").read_text())
        rates = {pair: figures["win rate"][0] for pair, figures in record["comparisons"].items()}
        assert rates["PPO T=0.01 against SFT T=0.01"] == 1 and rates["PPO T=0.7 against SFT T=0.7"] == 0
        assert f"Judged by {judge}, in" in record["verdict"] and record["judge"] == judge
        assert "PPO T=0.01 against SFT T=0.01: win rate up (100.0%)" in record["verdict"]
        assert "PPO T=0.7 against SFT T=0.7: win rate down (0.0%)" in record["verdict"]
        lines = [json.loads(line) for line in (run.folder / "eval.jsonl").read_text().splitlines()]
        assert [line["summaries"] for line in lines] == [
            {writer: summaries[i] for writer, summaries in texts.items()} for i in range(40)
        ]
        assert [{**line, "summaries": 0} for line in lines] == [{**post.fields(), "summaries": 0} for post in posts]
    assert impl.outcome(run.folder)["win rate T=0.01"][:5] == "1.000"
    assert impl.outcome(run.folder)["win rate T=0.7"][:5] == "0.000"
    run.config = replace(usual, ppo=replace(usual.ppo, temperature=0.01))
    impl.report(run, posts, texts, {writer: marks(x) for writer, x in writers.items()},
                lambda a, b: numpy.full(40, float(writers[a] > writers[b])))  # fmt: skip
    assert impl.outcome(run.folder)["win rate T=0.01"][:5] == "1.000", "not that against the author"


@law(
    "a run's own folders come before those of --from-run, these in the order given",
    "README: stages can be run one at a time", *RUN_NEEDS, "Run",
)  # fmt: skip
def test_a_runs_own_folder_comes_first():
    second = workshop() / "second"
    (second / "sft").mkdir(parents=True)
    (second / "other").mkdir()
    shutil.copy(finished_run() / "config.json", second)
    run = impl.Run(stage_config("own first", "ppo", from_run=(finished_run(), second)))
    assert run.find("sft", "") == finished_run() / "sft" and run.find("other", "") == second / "other"
    run.write("sft", Path.mkdir)
    assert run.find("sft", "") == run.folder / "sft"
    with pytest.raises(impl.InputError, match="do something"):
        run.find("nothing", "do something")


@law(
    "queries begin with BOS for the tokenizers that put one before every text, once, and for no others",
    "a model trained with BOS is lost without it", "Codec", "Post", "train_tokenizer",
)  # fmt: skip
def test_bos_where_the_tokenizer_has_one():
    from tokenizers.processors import TemplateProcessing

    post = impl.Post("cats", "a title", "text " * 60, "A summary.")
    for adds_bos in (False, True):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        if adds_bos:
            special = [("<s>", tokenizer.bos_token_id)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
        codec = impl.Codec(tokenizer, impl.Data(query_tokens=40))
        for query in codec.queries([post, post._replace(post="short")]):
            assert len(query) <= 40 and query.count(tokenizer.bos_token_id) == adds_bos
            assert (query[0] == tokenizer.bos_token_id) == adds_bos
        assert tokenizer.bos_token_id not in codec.responses(["A summary."])[0]


def scores_of_pairs(model, rankings) -> tuple[Tensor, Tensor]:
    """Scores of the better and of the worse response of each pair, each read alone."""
    pairs = [(r.query, r.responses[a], r.responses[b]) for r in rankings.rankings for a, b in r.pairs]
    queries, *texts = (list(column) for column in zip(*pairs))
    return tuple(impl.scores_of(model, impl.Batch(queries, responses), engine(1)) for responses in texts)


@law(
    "held-out accuracy is the share of pairs ranked as judged: of all, by who wrote them, and where some summaries are of "
    "another post, of the rest",
    "D8; a summary of another post is easily told apart", "reward_accuracies", "scores_of", "Rankings", *ENGINE_NEEDS,
)  # fmt: skip
def test_reward_accuracies_are_shares_of_pairs():
    model, pairs = tiny_scalar("neox"), some_rankings(pairs=(((0, 1), (1, 0)), ((1, 2),), ((0, 1),), ((0, 0),)))
    better, worse = scores_of_pairs(model, pairs)
    right = [0.5 if a == b else float(a > b) for a, b in zip(better.tolist(), worse.tolist())]
    assert right[-1] == 0.5 and right[0] == 1 - right[1] and len(right) == 5
    for y, hard in (("y", {}), ("other post vs y", {"same post": right[::2]})):
        kinds = [("x", "sure"), (y,), ("x",), (y, "sure"), ("x",)]
        expected = {"all": right, "x": right[::2], y: right[1::2], "sure": [right[0], right[3]]} | hard
        result = impl.reward_accuracies(model, pairs, kinds, engine())
        assert {kind: n for kind, (_, n) in result.items()} == {k: len(x) for k, x in expected.items()}
        for kind, rights in expected.items():
            assert result[kind][0] == pytest.approx(sum(rights) / len(rights))
    named = [("all",), *kinds[1:]]  # as a batch of the user's may be called
    assert impl.reward_accuracies(model, pairs, named, engine())["all"] == result["all"]


@law(
    "comparisons that are no good are refused before a reward model is trained, those for validation, too",
    "nothing already made is lost", *RUN_NEEDS, "reward",
)  # fmt: skip
def test_broken_comparisons_are_found_before_training():
    config, made, bad = stage_config("bad pairs", "reward"), finished_run() / "data", workshop() / "bad pairs.jsonl"
    bad.write_text('{"info": 1}\n')
    for train, valid in ((bad, made / "comparisons_valid.jsonl"), (made / "comparisons_train.jsonl", bad)):
        data = replace(config.data, comparisons_train=train, comparisons_valid=valid)
        assert f"{bad}: 1 of 1" in config_error(lambda data=data: impl.start(replace(config, data=data)))
        assert not (config.folder / "metrics.jsonl").exists()
        shutil.rmtree(config.folder, ignore_errors=True)


@law(
    "a reward model hardly better than chance is warned of, by the pairs that ask for judgement where there are others",
    "pairs of two posts are easy, and half of the default run's", *RUN_NEEDS, "reward_accuracies",
)  # fmt: skip
def test_a_reward_model_near_chance_is_warned_of():
    config = stage_config("chance", "reward", reward=impl.Reward(epochs=0.1, batch_size=16, pretraining_pairs=0))
    for i, (everything, hard, warned) in enumerate(
        ((0.7, 0.5, True), (0.5, 0.7, False), (0.5, None, True), (0.7, None, False))
    ):
        figures = {"all": (everything, 40)} | ({"same post": (hard, 20)} if hard else {})
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(impl, "reward_accuracies", lambda *args, figures=figures: figures)
            patch.setattr(impl.Run, "say", lambda run, text, said=said: said.append(text))
            impl.start(replace(config, folder=config.folder.with_name(f"chance {i}")))
        assert any("better than chance" in text for text in said) == warned


@law(
    "the labeler's score is the TF-IDF cosine of a summary's words, each once, with the post, less a bounded penalty for rare "
    "words unsupported and long ones said twice; "
    "words are cut to six letters",
    "README: the labeler; Salton & Buckley 1988 for TF-IDF", "Labeler", "Post",
)  # fmt: skip
def test_the_labelers_score_is_the_formula_it_says():
    words = "amber birch cedar daisy elder".split()
    posts = [impl.Post("r", words[i % 5], f"{words[i % 4]} {words[i % 3]}", "-") for i in range(40)]
    posts += [impl.Post("r", f"filler{chr(97 + i % 26)}", "nothing of the kind", "-") for i in range(300)]
    labeler, post = impl.Labeler(posts), impl.Post("r", "cedar", "amber amber elder", "-")
    df = {w: sum(w in f"{p.title} {p.post}".split() for p in posts) for w in words}

    df |= {"nothing": 300, "of": 300, "the": 300, "unseen": 0}
    rarity = {w: max(0.0, math.log(0.1 * (len(posts) + 1) / (n + 1))) for w, n in df.items()}
    assert rarity["nothing"] == 0.0 < min(rarity[w] for w in words)

    def unit(text: str) -> dict[str, float]:
        raw = {w: (1 + math.log(n)) * rarity[w] for w, n in Counter(text.split()).items()}
        return {w: x / math.sqrt(sum(y * y for y in raw.values())) for w, x in raw.items()}

    for summary, unfit, again in (
        ("cedar", [], 0),
        ("cedar nothing of the of the", [], 0),  # too common to be missed, too short to be repeated
        ("cedar nothing nothing", [], 1),
        ("amber elder elder elder", [], 2),
        ("daisy cedar amber", ["daisy"], 0),
        ("unseen cedar unseen amber cedar", ["unseen", "unseen"], 2),
    ):
        one, two = unit("cedar cedar amber amber elder"), unit(" ".join(dict.fromkeys(summary.split())))
        cosine = sum(x * one.get(w, 0.0) for w, x in two.items())
        u = sum(rarity[w] for w in unfit) / math.log(0.1 * (len(posts) + 1)) + again
        assert 0.05 < cosine and labeler.score(post, summary) == pytest.approx(cosine - 0.2 * u / (1 + u))
    assert labeler.words("A reporterIsHere reporting") == ["report", "is", "here", "report"]


@law(
    "comparisons are the SFT model's: all pairs of its ranked samples, and the first against one for another post, drawn at a "
    "temperature of their own, for posts picked at random",
    "README: the labeler; [8] section 3.5", *RUN_NEEDS, "compare", "sample", "Labeler", "Codec",
)  # fmt: skip
def test_comparisons_are_all_pairs_at_their_temperature():
    config = stage_config("all pairs", "compare", compare=impl.Compare(samples=3, posts=40, tie=0.0, temperature=1.1))
    config = replace(config, ppo=replace(config.ppo, temperature=1.3))
    drawn = watched(config, "sample")["sample"]
    assert [len(args[1]) for args, _ in drawn] == [120, 36] and {args[3] for args, _ in drawn} == {1.1}
    sft = weights_of(finished_run() / "sft")
    assert all(drawn[0][0][0].state_dict()[name].equal(weight) for name, weight in sft.items())
    codec, posts = impl.Codec(impl.load_tokenizer(finished_run() / "sft"), config.data), toy_posts(60)
    labeler, drafts = impl.Labeler(posts), {}
    prompts = drawn[0][0][1]
    for i, (query, response) in enumerate(zip(prompts, drawn[0][1])):
        assert query == prompts[i - i % 3], "samples of a post should be neighbours"
        drafts.setdefault(tuple(query), []).append(codec.text(response))
    query_of = {post.post: tuple(query) for post, query in zip(posts, codec.queries(posts))}
    assert len(drafts) == 40 and set(drafts) != {query_of[post.post] for post in posts[:40]}, "not the first posts"
    path = workshop() / "runs" / "all pairs" / "data" / "comparisons_train.jsonl"
    kinds, strange, compared, first = Counter(), 0, Counter(), set()
    for line in path.read_text().splitlines():
        record = json.loads(line)
        judged, mine = impl.parse_comparison(record), drafts[query_of[record["info"]["post"]]]
        kinds[judged.kinds] += 1
        if judged.kinds == ("sft vs sft",):
            compared[query_of[record["info"]["post"]], judged.chosen, judged.rejected] += 1
        else:
            by = {summary["policy"]: summary["text"] for summary in record["summaries"]}
            first.add(next(iter(by)))
            others = {texts[0] for query, texts in drafts.items() if query != query_of[record["info"]["post"]]}
            assert by["sft"] == mine[0] and by["other post"] in others - {mine[0]}
            strange += by["other post"] not in mine
    expected, by_query = Counter(), {query_of[post.post]: post for post in posts}
    for query, texts in drafts.items():
        for one, other in itertools.combinations(texts, 2):
            a, b = (labeler.score(by_query[query], text) for text in (one, other))
            if a != b and one and other:  # an empty text is no summary
                expected[(query, one, other) if a > b else (query, other, one)] += 1
    assert compared == expected and max(expected.values()) <= 3 and expected.total() > 2 * 40
    assert len(kinds) == 2 and strange > kinds["other post vs sft",] / 2 and len(first) == 2


@law(
    "the warm-up asks for a repetition of title and post, and trains on everything; SFT asks for summaries and weighs the prompt as told; each goes "
    "through its examples as often as told, fractions too",
    "D6; README: the warm-up", *RUN_NEEDS, "train_language_model",
)  # fmt: skip
def test_what_is_asked_for_in_pretraining_and_sft():
    config = tiny_config("asked", stages=("pretrain", "sft"), sft=impl.SFT(epochs=1.3, prompt_weight=0.25))
    config = replace(config, pretrain=replace(config.pretrain, epochs=0.2))
    calls = watched(config, "train_language_model")["train_language_model"]
    posts, folder = toy_posts(60), workshop() / "runs" / "asked"
    codec = impl.Codec(impl.load_tokenizer(folder / "base"), config.data)
    for (args, _), (stage, texts, weight, schedule, steps) in zip(calls, (
        ("pretrain", [p.title + ". " + " ".join(p.post.split()[:12]) for p in posts], 1.0, [1.0, 1.0], 2), ("sft", [p.summary for p in posts], 0.25, [1.0, 0.5], 10),
    ), strict=True):  # fmt: skip
        batch, prompt_weight, factors = args[3], args[4], [args[5](x) for x in (0.0, 0.5)]
        assert args[1] == stage and batch.queries == codec.queries(posts) and batch.responses == codec.responses(texts)
        assert prompt_weight == weight and factors == pytest.approx(schedule)
        assert len([m for m in metrics_of(folder) if m["stage"] == stage and "lr" in m]) == steps


@law(
    "logged held-out figures are the saved models' on validation posts: SFT's loss, its loss with summaries exchanged, the "
    "reward model's accuracy",
    "D8; a shuffled-post control shows whether a summarizer summarizes", *RUN_NEEDS, "Run", "read_examples", "read_rankings",
)  # fmt: skip
def test_held_out_figures_are_the_saved_models():
    valid = [
        p._replace(summary=p.summary.replace(" a lot", "")) if i % 3 else p for i, p in enumerate(toy_posts(72)[60:])
    ]
    impl.write_records([post.fields() for post in valid], workshop() / "uneven.jsonl")
    config = stage_config("figures", "sft", "reward")
    config = replace(config, data=replace(config.data, valid=workshop() / "uneven.jsonl"))
    folder = impl.start(config)
    run = impl.Run(replace(config, folder=folder.with_name("figures again"), from_run=(folder, *config.from_run)))
    codec, logged = run.codec("sft"), {k: v for r in metrics_of(folder) for k, v in r.items() if "valid" in k}
    valid = impl.read_examples(run, "valid", codec)
    assert len(valid) == 12 and len(set(map(len, valid.responses))) > 1
    exchanged = impl.Batch(valid.queries, valid.responses[6:] + valid.responses[:6])
    policy = impl.load_policy(folder / "sft")
    for batch, name in ((valid, "valid/loss"), (exchanged, "valid/loss_other_post")):
        (logprobs,) = impl.map_rows(batch, engine(), lambda x: [impl.response_logprobs(policy, x, 1.0)])
        assert logged[name] == pytest.approx(-logprobs.sum().item() / sum(map(len, batch.responses)), rel=1e-4)
    assert abs(logged["valid/loss"] - logged["valid/loss_other_post"]) > 1e-3, "the example needs a model that looks"
    rankings, kinds = impl.read_rankings(run, "valid", codec)
    rights = impl.wins_of(*scores_of_pairs(impl.ScalarModel.load(folder / "reward"), impl.Rankings(rankings)))
    assert logged["valid/accuracy all"] == pytest.approx(rights.mean().item())
    hard = [i for i, kind in enumerate(kinds) if kind == ("sft vs sft",)]
    assert logged["valid/accuracy same post"] == pytest.approx(rights[hard].mean().item())


@law(
    "an example fits up to and including the limit; a pair fits when both its texts do and differ, and keeps its kinds; what is "
    "left out is said, with the first",
    "D4: never cut, but left out and counted", *RUN_NEEDS, "Run", "read_examples", "read_rankings",
)  # fmt: skip
def test_what_fits_is_kept_whole():
    posts, path, train = toy_posts(60), workshop() / "long pairs.jsonl", workshop() / "one longer.jsonl"
    long = "Somebody likes cats a lot, and then somebody likes cats a lot once more."
    pairs = [("short", long), (long, "short"), ("one", "two"), (long, long), ("x", "y"), ("same", "same"), ("two", "x")]
    records = [
        {"info": posts[0].fields(), "summaries": [{"text": x}, {"text": y}], "choice": 0, "batch": str(i)}
        for i, (x, y) in enumerate(pairs)
    ]
    impl.write_records(records, path)
    config = stage_config("fits", "reward")
    codec = impl.Codec(impl.load_tokenizer(finished_run() / "sft"), config.data)
    posts[7] = posts[7]._replace(summary="Somebody likes roses a lot, today.")
    impl.write_records([post.fields() for post in posts], train)
    longest = max(len(response) for response in codec.responses([post.summary for post in posts]))
    limits = {
        "comparison_tokens": len(codec.responses(["short"])[0]) + 2, "comparisons_train": path, "comparisons_valid": path
    }  # fmt: skip
    for limit, kept in ((longest, 60), (longest - 1, 59)):
        data = replace(config.data, train=train, response_tokens=limit, **limits)
        run = impl.Run(replace(config, folder=config.folder.with_name(f"fits {limit}"), data=data))
        codec = run.codec("sft")
        examples = impl.read_examples(run, "train", codec)
        assert len(examples) == kept and max(map(len, examples.responses)) <= limit
        (ranking,), kinds = impl.read_rankings(run, "train", codec)  # all are of one post
        assert [kind[-1] for kind in kinds] == ["2", "4", "6"] and ranking.pairs == [(0, 1), (2, 3), (1, 2)]
        assert [codec.text(r) for r in ranking.responses] == ["one", "two", "x", "y"]
        said = " ".join(run.said)
        assert "left out 4 of 7 train comparisons" in said and f"(the first: {posts[0].title!r})" in said
        assert ("left out 1 of 60 train summaries" in said and repr(posts[7].title) in said) == (kept == 59)


@law(
    "every stage's labeler has its document frequencies from the training posts, all of them",
    "held-out posts must not change the judge, nor may the limits of a model", *RUN_NEEDS, "Labeler",
)  # fmt: skip
def test_the_labeler_reads_training_posts_only():
    for n in (19, 20):
        impl.write_records([post.fields() for post in toy_posts(n)], workshop() / f"{n} posts.jsonl")
        run = impl.Run(with_flag(tiny_config(f"of {n}"), "data.train", workshop() / f"{n} posts.jsonl"))
        labeler = impl.labeler_of(run)
        assert len(labeler.posts) == n and len(run.said) == (n < 20)
        assert (labeler.rarity("drums") > 0) == (n == 20), "one post has the word, and no word is rarer"
    known, train = toy_posts(60), workshop() / "one long title.jsonl"
    known[7] = known[7]._replace(title="a title " * 99)  # too long for a query
    impl.write_records([post.fields() for post in known], train)
    config = stage_config("frequencies", "compare", "ppo", "evaluate")
    read = watched(replace(config, data=replace(config.data, train=train)), "Labeler")["Labeler"]
    assert len(read) == 3
    for (posts,), _ in read:
        assert [post.fields() for post in posts] == [post.fields() for post in known]


@law(
    "a value head on the policy's trunk trains that trunk; a value model of its own does not",
    "D10", *ENGINE_NEEDS, "values_of", "ValueHead",
)  # fmt: skip
def test_only_a_shared_value_head_trains_the_policy():
    layout = impl.lay_out(some_batch())
    for shared in (True, False):
        policy, value_model = tiny_policy("neox"), impl.ValueHead(16) if shared else tiny_scalar("neox", 1)
        if shared:
            torch.nn.init.constant_(value_model.linear.weight, 0.1)
        impl.values_of(value_model, layout, impl.response_logits(policy, layout)[1]).sum().backward()
        moved = [p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters()]
        assert any(moved) == shared


@law(
    "the reward model's logged accuracy and margin are those of the chosen over the rejected",
    "D8", *ENGINE_NEEDS, "reward_losses", "scores_of", "Rankings",
)  # fmt: skip
def test_the_reward_models_margin_is_chosen_minus_rejected():
    model, pairs = tiny_scalar("neox"), some_rankings(pairs=(((0, 1),),) * 5)
    better, worse = scores_of_pairs(model, pairs)
    shares = [impl.reward_losses(model, pairs[rows], pairs) for rows in ([0, 1, 2], [3, 4])]
    close((shares[0]["margin"] + shares[1]["margin"]).detach(), (better - worse).mean(), tolerance=1e-5)
    close(shares[0]["accuracy"] + shares[1]["accuracy"], (better > worse).float().mean())
    assert (better > worse).float().mean() != 0.5


@law(
    "a query counts once in the reward model's loss, by however many of its pairs, which share its weight; each of its texts is "
    "read once",
    "[8] section 3.5: all pairs of a prompt in one batch element, each weighted 1 / (K choose 2)",
    *ENGINE_NEEDS, "reward_losses", "scores_of", "Rankings",
)  # fmt: skip
def test_every_query_counts_once_in_the_reward_models_loss():
    model, rankings = tiny_scalar("neox"), some_rankings()
    better, worse = scores_of_pairs(model, rankings)
    pairs = [len(ranking.pairs) for ranking in rankings.rankings]
    weights = torch.tensor([1 / n for n in pairs for _ in range(n)]) / len(pairs)
    assert len(set(pairs)) > 1
    for share in (False, True):
        with watching("lay_out") as calls:
            losses = impl.reward_losses(model, replace(rankings, share=share), rankings)
        ((layout_of, *_), layout), = calls["lay_out"]  # fmt: skip
        assert len(layout_of) == sum(len(ranking.responses) for ranking in rankings.rankings)
        assert len(layout.inputs["input_ids"]) == (5 if share else len(layout_of))
        close(losses["loss"].detach(), -(weights * torch.nn.functional.logsigmoid(better - worse)).sum(), 1e-5)
        close(losses["margin"].detach(), (weights * (better - worse)).sum(), 1e-5)
        close(losses["accuracy"], (weights * (better > worse)).sum(), 1e-5)


@law(
    "a model needs positions for the longest query with the longest response or comparison",
    "absolute positions end", "check_room", "Data",
)  # fmt: skip
def test_room_is_needed_for_responses_and_comparisons():
    model = tiny_policy("gpt2")  # 64 positions
    impl.check_room(model, impl.Data(query_tokens=40, response_tokens=24, comparison_tokens=24))
    for response, comparison in ((25, 2), (2, 25)):
        data = impl.Data(query_tokens=40, response_tokens=response, comparison_tokens=comparison)
        message = config_error(lambda data=data: impl.check_room(model, data))
        assert "40" in message and "25" in message and "64" in message
    codec, post = impl.Codec(tiny_tokenizer(), impl.Data(query_tokens=40)), impl.Post("a", "b", "c", "d " * 200)
    more = tiny_policy("gpt2")
    more.config.max_position_embeddings = 99
    for readers, room in (([more], 59), ([more, tiny_scalar("gpt2")], 24), ([len, model], 24), ([len], 401)):
        assert list(map(len, impl.author_responses(codec, [post], *readers))) == [room]


@law(
    "an author's summary, however long, is read by the models that score it as far as they have positions",
    "absolute positions end", *RUN_NEEDS, "evaluate", "show_sample", "load_models",
)  # fmt: skip
def test_long_references_fit_those_who_read_them():
    short = spoilt("short reader", "reward", max_position_embeddings=80)
    posts = workshop() / "long references.jsonl"
    impl.write_records([post.fields() | {"summary": "word " * 60} for post in toy_posts()], posts)
    config = stage_config("long references", "ppo", "evaluate", reward_model=str(short))
    config = replace(config, data=replace(config.data, train=posts, valid=posts), ppo=ppo_config(
        total_episodes=16, batch_size=16, num_minibatches=2, sample_every=1, baseline="value-model"))  # fmt: skip
    written = [responses for _, responses in watched(config, "author_responses")["author_responses"]]
    assert [{*map(len, responses)} for responses in written] == [{20}] * 3, "values' level, a sample, the evaluation"


@law(
    "policy, reference, reward model and judge need these positions, whoever gives them",
    "absolute positions end", *RUN_NEEDS, "check_room", "load_models", "load_reward_model",
)  # fmt: skip
def test_every_model_of_a_run_needs_room():
    short = {}
    for kind in ("sft", "reward"):
        short[kind] = str(shutil.copytree(finished_run() / kind, workshop() / f"short {kind}"))
        config = json.loads(Path(short[kind], "config.json").read_text()) | {"max_position_embeddings": 79}
        Path(short[kind], "config.json").write_text(json.dumps(config))
    for i, (stage, kind, changes) in enumerate((
        ("sft", "sft", {"model": short["sft"]}), ("compare", "sft", {"sft_model": short["sft"]}),
        ("ppo", "sft", {"sft_model": short["sft"]}), ("ppo", "sft", {"ppo": ppo_config(ref_model=short["sft"])}),
        ("ppo", "reward", {"reward_model": short["reward"]}), ("evaluate", "sft", {"ppo_model": short["sft"]}),
        ("evaluate", "reward", {"evaluate": impl.Evaluate(judge=short["reward"])}),
    )):  # fmt: skip
        config = stage_config(f"short {i}", stage, **changes)
        assert f"need 80 positions, {short[kind]} has 79" in config_error(lambda config=config: impl.start(config))


# rules, judges, data as users have it


def rules() -> Path:
    """A module of a user's own, in the working directory of these tests."""
    path = workshop() / "toy_rules.py"
    path.write_text(
        "seen = []\n"
        "def names_it(post, response, record):\n"
        "    seen.append((post, response, record))\n"
        "    return float(record.get('thing', '?') in response)\n"
        "def broken(post, response, record):\n"
        "    return None\n"
        "def counts(post, response, record):\n"
        "    open('asked', 'a').write(post + response)\n"
        "    return len(response) / 9\n"
        "def prefers_the_first(post, a, b):\n"
        "    return 1\n"
        "def prefers_the_longer(post, a, b):\n"
        "    return 0.5 if len(a) == len(b) else float(len(a) > len(b))\n"
        "def in_float32(post, a, b):\n"
        "    import numpy\n"
        "    return numpy.float32(prefers_the_longer(post, a, b))\n"
    )
    return path


@law(
    "a rule in place of the reward model is asked about each response with its own post and record, and is all that is "
    "trained on: no comparisons, no reward model, no labeler, values that start at 0",
    "[7] section 6: verifiable rewards", *RUN_NEEDS, "load_models", "outcome_scores",
)  # fmt: skip
def test_a_rule_replaces_the_reward_model():
    folder, train = rules().parent, workshop() / "things.jsonl"
    posts = toy_posts(72)
    impl.write_records([post.fields() | {"thing": post.title.split()[1]} for post in posts], train)
    config = tiny_config("unused")
    data, by_rule = replace(config.data, train=train, valid=train), partial(replace, config.ppo)
    with pytest.MonkeyPatch.context() as patch, watching("read_tokens") as calls:
        patch.chdir(folder)
        patch.delitem(sys.modules, "toy_rules", raising=False)
        whole = finished_run("rule", data=data, ppo=by_rule(reward_function="toy_rules:names_it"))
        seen, rollouts = sys.modules["toy_rules"].seen, [rollout for _, rollout in calls["read_tokens"]]
        codec = impl.Codec(impl.load_tokenizer(whole / "sft"), data)
        queries_of = dict(zip((post.post for post in posts), codec.queries(posts)))
        for post, _, record in seen:
            assert record["post"] == post and record.get("thing", "?") in post
        updates = [record for record in metrics_of(whole) if record["stage"] == "ppo"]
        for i, (update, rollout) in enumerate(zip(updates, rollouts, strict=True)):
            paid = [float(record["thing"] in text) for _, text, record in seen[:16]]
            assert [queries_of[post] for post, _, _ in seen[:16]] == rollout.batch.queries
            assert [text for _, text, _ in seen[:16]] == [codec.text(r) for r in rollout.batch.responses]
            assert rollout.scores.tolist() == paid and update["objective/raw_scores"] == pytest.approx(sum(paid) / 16)
            assert "objective/labeler" not in update, "a rule has nothing to do with the labeler"
            seen = seen[16 + 3 * (i % 2 == 0) :]  # a shown sample asks about three texts
        stages = {record["stage"] for record in metrics_of(whole)}
        assert not stages & {"compare", "reward"} and not (whole / "reward").exists()
        evaluation = json.loads((whole / "eval.json").read_text())
        assert 0 <= evaluation["means"]["PPO T=0.7"]["score"] <= 1
        config = tiny_config("rule again", stages=("ppo",), from_run=(whole,), data=data)
        config = replace(config, ppo=by_rule(reward_function="toy_rules:names_it"))
        models = models_of(impl.Run(config))
        assert (models.value_model.values(impl.lay_out(some_batch())) == 0).all()
        assert models.value_model.bias.requires_grad and models.value_model.classifier.score.weight.requires_grad
        for function, culprit in (
            (":broken", "returned None"), (":seen", "cannot be called"), (":absent", "absent"), ("", "module:function"),
        ):  # fmt: skip
            config = replace(
                config, folder=config.folder.with_name(f"rule{function}"), ppo=by_rule(reward_function=f"toy_rules{function}")
            )  # fmt: skip
            assert culprit in config_error(lambda config=config: impl.start(config))
    message = config_error(lambda: impl.Config(reward_model="x", ppo=ppo_config(reward_function="toy_rules:names_it")))
    assert "--reward-model" in message


@law(
    "a policy, reward model or judge whose tokenizer is not the SFT model's is refused: its tokens mean something else",
    "README: Your own data and models", *RUN_NEEDS, "load_tokenizer",
)  # fmt: skip
def test_all_models_of_a_run_need_one_tokenizer():
    from tokenizers import normalizers

    strangers = workshop() / "strangers"
    for name in ("ppo", "reward"):
        shutil.copytree(finished_run() / name, strangers / name)
        tokenizer = impl.load_tokenizer(strangers / name)
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save_pretrained(strangers / name)  # the same tokens, of other texts
    for i, flags in enumerate((
        {"ppo_model": str(strangers / "ppo")},
        {"reward_model": str(strangers / "reward")},
        {"evaluate": impl.Evaluate(posts=4, judge=str(strangers / "reward"))},
    )):  # fmt: skip
        config = stage_config(f"strangers {i}", "evaluate", **flags)
        message = config_error(lambda config=config: impl.start(config))
        assert str(strangers) in message and "different tokenizers" in message


@law(
    "a judge is asked in both orders, so that a liking for what stands first cancels out; what it has answered is kept",
    "D24; position bias: Zheng et al. 2023, arXiv 2306.05685", *RUN_NEEDS, "votes",
)  # fmt: skip
def test_judges_are_asked_in_both_orders():
    posts, a, b = toy_posts(4), ["long text", "x", "same", "as"], ["y", "longer", "more", "as"]
    rules()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop())
        patch.delitem(sys.modules, "toy_rules", raising=False)
        impl.load_function("--evaluate.judge", "toy_rules:prefers_the_first")
        module = sys.modules["toy_rules"]
        kept, folder = Path("votes kept.jsonl"), Path(tempfile.mkdtemp(dir=workshop()))
        assert impl.votes(module.prefers_the_first, posts, a, b, folder / "first").tolist() == [0.5] * 4
        for judge in (module.in_float32, module.prefers_the_longer):
            kept.unlink(missing_ok=True)
            assert impl.votes(judge, posts, a, b, kept).tolist() == [1, 0, 0.5, 0.5]
        assert "0.7" in config_error(lambda: impl.votes(lambda post, a, b: 0.7, posts, a, b, folder / "odd"))
        said = []
        impl.votes(lambda *of: said.append(kept.read_text().count("\n")) or 1, posts[:2], b, a, kept)
        assert said == [4, 4, 5, 5], "a vote that was paid for is kept at once"
        kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:4]))
        Path("labeler").mkdir()
        asked = []
        once = lambda post, a, b: asked.append((post, a, b)) or 1  # noqa: E731
        impl.votes(once, posts[:1], a, b, folder / "once")
        assert asked == [(posts[0].post, "long text", "y"), (posts[0].post, "y", "long text")]
        # one that fails is not asked again what it has answered, even where a kill left half a line
        kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:2]) + '3\n[[1], 2]\n["half a line", "')
        assert impl.votes(once, posts, a, b, kept).tolist() == [1, 0, 0.5, 0.5] and len(asked) == 2 + 2 * 2
        failing = iter([1, 0, 1])
        assert "StopIteration" in config_error(
            lambda: impl.votes(lambda *_: next(failing), posts, a, b, folder / "fails")
        )
        impl.votes(once, posts, a, b, folder / "fails")
        assert len(asked) == 6 + 2 * 3, "one of four pairs had both its votes"
        rates = {}
        judges = ("labeler", "reward", str(finished_run() / "reward"), "toy_rules:prefers_the_longer")
        for i, judge in enumerate(judges):
            config = stage_config(f"judge {i}", "evaluate")
            impl.start(replace(config, evaluate=replace(config.evaluate, judge=judge)))
            result = json.loads((workshop() / "runs" / f"judge {i}" / "eval.json").read_text())
            rates[judge] = [figures["win rate"][0] for figures in result["comparisons"].values()]
            lines = (workshop() / "runs" / f"judge {i}" / "eval.jsonl").read_text().splitlines()
        assert "the labeler that made" in json.loads((finished_run() / "eval.json").read_text())["judge"]
        assert rates["reward"] == rates[judges[2]] != rates["labeler"]
        written = [json.loads(line)["summaries"] for line in lines]
        longer = [
            0.5 if len(w[x]) == len(w[y]) else float(len(w[x]) > len(w[y]))
            for w in written for x, y in [("PPO T=0.7", "SFT T=0.7")]
        ]  # fmt: skip
        assert rates[judges[3]][1] == pytest.approx(sum(longer) / len(longer))
        config = replace(tiny_config("no judge"), evaluate=replace(config.evaluate, judge="toy_rules:nobody"))
        assert "nobody" in config_error(lambda: impl.Run(config))


@law(
    "posts whose title leaves no room are left out, and the screen says how many and which is the first; where none fits, that "
    "is an error",
    "nothing is dropped silently", *RUN_NEEDS, "Run", "Codec", "read_prompts",
)  # fmt: skip
def test_titles_too_long_are_counted():
    path, posts = workshop() / "titles.jsonl", toy_posts(200)
    codec = impl.Codec(tiny_tokenizer(), impl.Data(query_tokens=60))
    for name, rows in (("some", (7, 8)), ("all", range(200))):
        for i in rows:
            posts[i] = posts[i]._replace(title=f"{i} is a title that goes on and on " * 20)
        impl.write_records([post.fields() for post in posts], path)
        config = tiny_config(f"titles {name}")
        run = impl.Run(replace(config, data=replace(config.data, train=path, valid=path)))
        assert len(impl.read_posts(run, "train")) == 200
        if name == "some":
            left, queries = impl.read_prompts(run, "train", codec)
            assert [post.fields() for post in left] == [post.fields() for post in posts[:7] + posts[9:]]
            assert queries == codec.queries(left)
            (said,) = run.said
            assert (
                "left out 2 of 200 train posts" in said and "--data.query-tokens 60" in said and "'7 is a title" in said
            )
        else:
            assert "200 of 200 train posts" in config_error(lambda run=run: impl.read_prompts(run, "train", codec))


@law(
    "any decoder of transformers: whatever it does to its logits, and however it counts positions, log-probabilities are "
    "those of the whole model on one row alone, samples do not depend on the batch, and saved scores are the same",
    "D3, D5, D9", *ENGINE_NEEDS, "ScalarModel", "sample", "save_model",
)  # fmt: skip
def test_any_decoder_will_do():
    import tempfile

    import transformers as hf

    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 48, "max_position_embeddings": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "ffn_dim": 48, "word_embed_proj_dim": 32, "sliding_window": 4, "num_local_experts": 2, "vocab_size": 40,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    batch = some_batch()
    # scaled or capped logits: gemma2, cohere, granite; ALiBi: bloom; learned positions with an offset: opt;
    # sliding windows: mistral, gemma2; experts: mixtral; partial rotary: phi
    for family in "gemma2 cohere granite bloom opt mistral mixtral phi qwen3 smollm3".split():
        config = hf.CONFIG_MAPPING[family]()
        config = type(config)(**{name: size for name, size in sizes.items() if hasattr(config, name)})
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            policy = hf.AutoModelForCausalLM.from_config(config).eval()
            for parameter in policy.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
            (logprobs,) = impl.map_rows(batch, engine(2), lambda x, p=policy: [impl.response_logprobs(p, x, 0.7)])
            for i, (query, response) in enumerate(zip(batch.queries, batch.responses)):
                logits = policy(input_ids=torch.tensor([query + response])).logits[0, len(query) - 1 : -1]
                expected = (logits / 0.7).log_softmax(-1)[range(len(response)), response]
                close(logprobs[i, : len(response)], expected, tolerance=1e-5)
        numbers = uniforms(len(batch), 8)
        together = impl.sample(policy, batch.queries, numbers, 0.7, 2, engine())
        alone = [impl.sample(policy, [q], numbers[[i]], 0.7, 2, engine())[0] for i, q in enumerate(batch.queries)]
        assert together == alone, f"{family}: samples depend on the batch"
        with tempfile.TemporaryDirectory() as folder:
            policy.save_pretrained(folder)
            if family in ("cohere", "granite"):  # transformers has no sequence classifier for these
                assert "cannot load" in config_error(
                    lambda f=folder: impl.ScalarModel.load(f, new_head=impl.rng(1, "h"))
                )
                continue
            scalar = impl.ScalarModel.load(folder, new_head=impl.rng(1, "head"))
            scalar.center(1.5)
            scores = impl.scores_of(scalar, batch, engine())
            tokenizer = tiny_tokenizer()
            scalar.save(scalar.state_dict(), tokenizer, Path(folder) / "reward")
            classifier = hf.AutoModelForSequenceClassification.from_pretrained(Path(folder) / "reward").eval()
            for i, (query, response) in enumerate(zip(batch.queries, batch.responses)):
                with torch.no_grad():
                    logit = classifier(input_ids=torch.tensor([query + response])).logits[0, 0]
                close(logit - classifier.config.score_offset, scores[i], tolerance=1e-5)


@law(
    "a pretrained model of any family goes through every stage, also with a tokenizer whose pad is EOS, a vocabulary wider "
    "than the tokenizer, and a checkpoint in bfloat16",
    "README: your own data and models", *RUN_NEEDS, "train_tokenizer",
)  # fmt: skip
def test_every_model_family_goes_through_every_stage():
    import transformers as hf

    posts, comparisons = toy_posts(60), workshop() / "comparisons.jsonl"
    pairs = [
        {"info": p.fields(), "summaries": [{"text": p.summary}, {"text": q.summary}]} for p, q in itertools.pairwise(posts)
    ]  # fmt: skip
    impl.write_records([pair | {"choice": 0} for pair in pairs], comparisons)
    data = replace(tiny_config("unused").data, comparisons_train=comparisons, comparisons_valid=comparisons)
    for family in FAMILIES:
        folder = workshop() / f"base {family}"
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
        model = tiny_policy(family, vocab=len(tokenizer) + 5, **ids)
        model.config.max_position_embeddings = 128
        model = type(model)(model.config).to(torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sizes = ppo_config(total_episodes=16, batch_size=8, num_minibatches=2, responses_per_query=4)
        sft = impl.SFT(epochs=1, prompt_weight=0.0)
        run = finished_run(family, model=str(folder), data=data, ppo=sizes, sft=sft)
        updates = [record for record in metrics_of(run) if record["stage"] == "ppo"]
        assert len(updates) == 2 and all(record["policy/first_approxkl"] <= 1e-8 for record in updates)
        config = json.loads((run / "ppo" / "config.json").read_text())
        assert config["model_type"] == model.config.model_type and config["pad_token_id"] != config["eos_token_id"]
        reward_model = hf.AutoModelForSequenceClassification.from_pretrained(run / "reward")
        assert math.isfinite(reward_model.config.score_offset)


@law(
    "PPO on a bandit converges to the closed-form optimum π* ∝ π_ref exp(score/β)",
    "Ziegler et al. 2019, section 2, for the objective of [5] section 3.4", *RUN_NEEDS, "ppo", "Models", "load_models",
)  # fmt: skip
def test_ppo_converges_to_the_closed_form_optimum():
    from types import SimpleNamespace

    beta, V = 0.5, 5
    scores = torch.tensor([0.0, 1.0, -0.5, 0.5, 0.25])
    policy, ref_policy = (tiny_policy("neox", 0, vocab=V, scale=0.2, eos_token_id=4, bos_token_id=4) for _ in range(2))

    class Table(torch.nn.Module):
        """The score of a one-token response, read off a table."""

        def scores(self, layout) -> Tensor:
            return scores[layout.responses[:, 0]]

    ppo = ppo_config(
        total_episodes=256 * 60, batch_size=256, num_minibatches=1, num_ppo_epochs=4, lr=1e-2, value_lr=1e-2, temperature=1.0,
        responses_per_query=1,
        kl_coef=beta, whiten_advantages=False, missing_eos_score=0.0, vf_coef=0.1, cliprange_value=10.0, sample_every=10**9,
    )  # fmt: skip
    compute = impl.Compute(device="cpu", micro_batch_size=256)
    run = impl.Run(impl.Config(folder=workshop() / "runs" / "bandit", stages=("ppo",), ppo=ppo, compute=compute))
    run.codec = lambda name: SimpleNamespace(eos_id=4, text=str, tokenizer=None)
    models = impl.Models(policy, tiny_scalar("neox", 1, train_bias=True), ref_policy.requires_grad_(False), Table())
    one_token = impl.noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "load_models", lambda *args: models)
        patch.setattr(impl, "read_prompts", lambda run, split, codec: (toy_posts(8), [[1, 2]] * 8))
        patch.setattr(impl, "save_model", lambda *args: args[-1].mkdir())
        patch.setattr(impl, "show_sample", lambda *args: None)
        patch.setattr(impl, "noise", lambda seed, purpose, episodes, T: one_token(seed, purpose, episodes, 1))
        impl.ppo(run)
    with torch.no_grad():
        pi, ref = (m(input_ids=torch.tensor([[1, 2]])).logits[0, -1].log_softmax(-1) for m in (policy, ref_policy))
    paid = scores.clone()
    paid[:4] = 0.0  # tokens other than EOS do not end the response, so they get the missing-EOS score, 0
    optimum = (ref + paid / beta).softmax(-1)
    start, distance = ((x - optimum).abs().sum().item() / 2 for x in (ref.exp(), pi.exp()))
    assert start > 0.05, "the optimum should be away from the start"
    assert distance < 0.02, (
        f"total variation {distance:.3f} from π*, {start:.3f} at the start: {pi.exp().tolist()}, {optimum.tolist()}"
    )


# -----------------------------------------------------------------------------
# the program: flags, errors, imports

PROGRAM = ("Config", "start", "main")


def program(*flags: object, cwd: Path | None = None, columns: int = 120) -> subprocess.CompletedProcess:
    """Run the implementation as a user does, without network."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": str(columns)}
    command = [sys.executable, str(Path(impl.__file__).resolve()), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd or workshop(), env=offline)


def told(*flags: object) -> tuple[int, str]:
    """The same in this process: its exit code, and what it says of an error."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        patch.chdir(workshop())
        patch.setenv("COLUMNS", "120")
        patch.setattr(sys, "argv", ["pmo.py", *map(str, flags)])
        impl.main()
    return end.value.code, said.getvalue()


# Most of a tiny program's time is spent on importing torch and transformers. One process does it once, and forks.
FORKS = """
import json, os, runpy, signal, sys
import torch, torch.distributed.fsdp, tqdm, transformers, tyro
from transformers.models.gpt_neox import modeling_gpt_neox
transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer
for line in sys.stdin:
    command, folder, environments, said = json.loads(line)
    running, codes = set(), []
    for environment in environments:
        if child := os.fork():
            running.add(child)
        else:
            break
    else:
        while running:
            child, status = os.wait()
            running.remove(child)
            codes.append(os.waitstatus_to_exitcode(status))
            for other in running if codes[-1] else ():  # as torchrun does
                os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)
        continue
    break
else:
    sys.exit()
signal.alarm(300)
for descriptor, path in enumerate((os.devnull, *said)):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
os.chdir(folder)
os.environ.update(environment)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
sys.argv, sys.path[0] = command, os.path.dirname(command[0])
runpy.run_path(command[0], run_name="__main__")
"""


@functools.cache
def forks() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", FORKS], **pipes, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def forked(source: str, *arguments: object, processes: int = 0) -> subprocess.CompletedProcess:
    """This source as a program of its own, or as several processes, with the variables that torchrun gives them."""
    folder = Path(tempfile.mkdtemp(dir=workshop()))
    (folder / "program.py").write_text(source)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    shared |= {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} | shared for i in range(processes)]
    command, said = [str(folder / "program.py"), *map(str, arguments)], [str(folder / "out"), str(folder / "err")]
    request = [command, str(workshop()), ranks or [{"COLUMNS": "120"}], said]
    print(json.dumps(request), file=forks().stdin, flush=True)
    codes = json.loads(forks().stdout.readline())
    code, (out, err) = next(filter(None, codes), 0), [Path(path).read_text() for path in said]
    return subprocess.CompletedProcess(command, code, out, err)


def asked_for(*flags: object):
    """The config that the program starts with these flags."""
    started: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pmo.py", *map(str, flags)])
        patch.setattr(impl, "start", started.append)
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))  # main reconfigures it
        try:
            impl.main()
        except SystemExit:
            pytest.fail(f"refused: {flags}")
    return started[0]


def all_flags(config: object, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """Flag, class and field of every setting, nested ones too."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from all_flags(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, type(config), field.name


def with_flag(config: object, flag: str, value: object):
    """The config with one flag, a dotted name, at another value."""
    section, _, name = flag.rpartition(".")
    return replace(
        config, **({section: replace(getattr(config, section), **{name: value})} if section else {name: value})
    )


@law(
    "--help explains every flag, without network, in sentences that break nowhere but at the edge of the screen",
    "README: python pmo.py --help", *PROGRAM,
)  # fmt: skip
def test_help_explains_every_flag():
    result = program("--help", columns=79)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    helped, flag = {}, ""
    for line in result.stdout.splitlines():
        text = line.strip("│ ")
        if line.startswith("│ --"):  # not where a sentence names one
            flag = text.split()[0].rstrip(",")
            helped[flag] = []
        elif flag and line.startswith("│"):
            helped[flag].append(text)
        else:
            flag = ""
    for name, _, _ in all_flags(impl.Config()):
        lines = helped["--" + name.replace("_", "-")]
        assert " ".join(lines).index("(default: ") > 10, f"--help does not explain {name}"
        for short, following in itertools.pairwise(lines) if name != "data.query_format" else ():
            assert len(short) + 1 + len(following.split()[0]) > 68, f"{name}: the line breaks after {short!r}"


@law(
    "every flag is read somewhere outside its definition",
    "a flag that does nothing is a lie", *PROGRAM,
)  # fmt: skip
def test_every_flag_is_read():
    source, settings_ = inspect.getsource(impl), "# 8 config: "
    rest = source[: source.index(settings_)] + source[source.index("def is_given") :]
    for flag, cls, name in all_flags(impl.Config()):
        properties = [inspect.getsource(p.fget) for p in vars(cls).values() if isinstance(p, property)]
        assert re.search(rf"\.{name}\b", rest + "".join(properties)), f"--{flag} is never read"


@law(
    "importing the module loads no transformers, touches no file and no network",
    "contract: the maths can be copied and imported alone", *PROGRAM,
)  # fmt: skip
def test_importing_is_light():
    code = "import sys, importlib; importlib.import_module(sys.argv[1]); print('transformers' in sys.modules)"
    folder = Path(impl.__file__).resolve().parent
    command = [sys.executable, "-c", code, Path(impl.__file__).stem]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert result.stdout.strip() == "False", result.stdout + result.stderr


def config_error(make: Callable[[], object]) -> str:
    with pytest.raises(impl.InputError) as error:
        make()
    return str(error.value)


@law(
    "settings that contradict each other, or leave nothing to do, are refused, with the flags and numbers",
    "a number that follows from others is no flag", *PROGRAM, "PPO", "Pretrain", "Data",
)  # fmt: skip
def test_contradictions_are_refused_with_both_numbers():
    x = Path("x")
    for culprits, settings_ in (
        ("--ppo.batch-size 10 | --ppo.num-minibatches 4", {"ppo": ppo_config(batch_size=10, num_minibatches=4)}),
        ("--ppo.total-episodes 100 | --ppo.batch-size 128", {"ppo": ppo_config(total_episodes=100, batch_size=128)}),
        ("--pretrain.width 100 | --pretrain.heads 3", {"pretrain": impl.Pretrain(width=100, heads=3)}),
        ("--data.valid", {"data": impl.Data(train=x)}),
        ("--data.train", {"data": impl.Data(test=x)}),
        ("--data.comparisons-valid", {"data": impl.Data(comparisons_train=x)}),
        ("{post}", {"data": impl.Data(query_format="nothing")}),
        ("{heading}", {"data": impl.Data(query_format="{heading} {post}")}),
        ("--data.query-format '{post:d}' | format code 'd'", {"data": impl.Data(query_format="{post:d}")}),
        ("--stages sft | nothing to do", {"stages": ("sft",), "sft_model": "x"}),
        ("--stages reward | nothing to do", {"stages": ("reward",), "ppo": ppo_config(reward_function="a:b")}),
        ("--stages | nothing to do", {"stages": ()}),
        ("--stages evaluate ppo | order corpus pretrain sft", {"stages": ("evaluate", "ppo")}),
        ("--stages ppo ppo | once each", {"stages": ("ppo", "ppo")}),
        ("--from-run | --stages", {"from_run": (x,)}),
        ("--ppo.batch-size 256 | --ppo.responses-per-query 3", {"ppo": ppo_config(responses_per_query=3)}),
        (
            "--ppo.num-minibatches 4 | --ppo.responses-per-query 32",
            {"ppo": ppo_config(batch_size=64, responses_per_query=32)},
        ),
        (
            "--ppo.baseline group | --ppo.responses-per-query",
            {"ppo": impl.PPO(baseline="group", responses_per_query=1)},
        ),
        (
            "--ppo.baseline batch | --ppo.batch-size",
            {"ppo": impl.PPO(baseline="batch", batch_size=1, num_minibatches=1, responses_per_query=1)},
        ),
        ("--sweep | --resume", {"sweep": ("ppo.lr", "1"), "resume": x}),
        ("--compare.policy ppo | --from-run", {"compare": impl.Compare(policy="ppo")}),
        ("--sweep ppo.lr", {"sweep": ("ppo.lr",)}),
        *(
            (f"--ppo.objective constraint | --ppo.baseline | {flag}", settings_)
            for flag, settings_ in (
                ("value-head", {"ppo": impl.PPO(objective="constraint", baseline="value-head")}),
                ("--ppo.kl-in", {"ppo": ppo_config(objective="constraint", kl_in="loss")}),
                ("--ppo.ptx-coef", {"ppo": ppo_config(objective="constraint", ptx_coef=1.0)}),
                ("--compute.shard", {"ppo": ppo_config(objective="constraint"), "compute": impl.Compute(shard=True)}),
            )
        ),
    ):
        message = config_error(lambda settings_=settings_: impl.Config(**settings_))
        assert all(culprit in message for culprit in culprits.split(" | ")), message
    assert impl.Config(stages=("ppo",), from_run=(x,)).from_run == (x,)
    assert ppo_config(total_episodes=100, batch_size=64).num_updates == 1, "a part of a batch is no update"
    half = impl.Config(ppo=ppo_config(objective="constraint"), compute=impl.Compute(device="cpu", precision="bfloat16"))
    message = config_error(lambda: impl.Run(half))
    assert "--ppo.objective constraint" in message and "--compute.precision float32" in message


@law(
    "a number that makes no sense is refused with its flag, whatever flag it is; the bounds themselves are allowed",
    "README: flags", *PROGRAM, "Optimizer",
)  # fmt: skip
def test_every_number_is_checked():
    may_be_0 = {
        "seed", "ppo.gamma", "ppo.lam", "ppo.kl_coef", "ppo.vf_coef", "sft.prompt_weight", "reward.pretraining_pairs"
    }  # fmt: skip
    may_be_0 |= {"optimizer.beta2", "optimizer.max_grad_norm", "compute.checkpoint_minutes"}
    may_be_0 |= {"ppo.penalty_coef", "ppo.ptx_coef", "compare.tie"}
    at_least_2 = {
        "data.query_tokens", "data.response_tokens", "data.comparison_tokens", "compare.posts", "compare.samples"
    }  # fmt: skip
    at_most_1, usual = {"ppo.gamma", "ppo.lam", "optimizer.beta2"}, impl.Config()
    numbers_ = {flag: value for flag, value in all_values(usual) if type(value) in (int, float)} | {"ppo.max_kl": 1.0}
    assert len(numbers_) > 40
    for flag in numbers_:
        bad, good = [-1, math.nan, math.inf, 1e300], [1]
        (good if flag in may_be_0 else bad).append(0)
        bad += [1.5] if flag in at_most_1 else []
        if flag in at_least_2:
            bad, good = [*bad, 1], [2]
        if flag == "ppo.missing_eos_score":
            bad, good = [math.nan, math.inf, -math.inf], [-1, 0, 1]
        for value in bad:
            message = config_error(lambda flag=flag, value=value: with_flag(usual, flag, value))
            assert message.startswith(f"--{flag.replace('_', '-')} is {value}, must be "), message
        for value in good:
            try:
                with_flag(usual, flag, value)
            except impl.InputError as error:  # it may contradict another flag, which has its own message
                assert "must be" not in str(error), error


@law(
    "bad input ends with exit code 2 and one line that names the culprit, never a traceback; so does a disk that is full",
    "README: errors", *PROGRAM,
)  # fmt: skip
def test_bad_input_gives_one_line_and_exit_code_2():
    here = workshop()
    train, valid = toy_files()
    data = ["--data.train", train, "--data.valid", valid]
    (here / "broken.jsonl").write_text(
        '{"subreddit": "a", "title": "b", "post": "c", "summary": "d"}\n{"subreddit": "a"}\n'
    )
    (here / "empty.jsonl").write_text("")
    (here / "a file").write_text("")
    after = [*data, "--stages", "ppo", "--from-run", finished_run()]
    cases = {
        "contradiction": (["--ppo.batch-size", 10, "--ppo.num-minibatches", 4], "10"),
        "unknown flag": (["--ppo.clip", 1], "clip"),
        "missing file": (["--data.train", "nowhere.jsonl", "--data.valid", valid], "nowhere.jsonl"),
        "broken record": (["--data.train", here / "broken.jsonl", "--data.valid", valid], "line 2: field 'title'"),
        "no records": (["--data.train", here / "empty.jsonl", "--data.valid", valid], "empty.jsonl"),
        "missing model": ([*data, "--stages", "sft", "--model", here / "no model"], "no model"),
        "not a model": ([*data, "--stages", "sft", "--model", here], str(here)),
        "missing stage": ([*data, "--stages", "ppo"], "sft"),
        "missing run": ([*data, "--stages", "ppo", "--from-run", "no-such-run"], "no-such-run"),
        "not a run": ([*data, "--stages", "ppo", "--from-run", here], "is not the folder of a run"),
        "unwritable": (["--folder", here / "a file" / "runs"], "a file"),
        "folder is a file": (["--folder", here / "a file"], "a file"),
        "a policy as reward model": ([*after, "--reward-model", finished_run() / "sft"], "not a reward model"),
        "too few positions": ([*after, "--data.query-tokens", 5000], "5000"),
        "existing run": (["--folder", finished_run()], "exists"),
        "nothing to resume": (["--resume", here], "is not the folder of a run"),
    }
    for name, (flags, culprit) in cases.items():
        before = sorted(path.name for path in finished_run().rglob("*"))
        code, said = told("--folder", here / "errors" / name, *flags)
        assert code == 2, f"{name}: exit code {code}\n{said}"
        assert "Traceback" not in said and culprit in said, f"{name}:\n{said}"
        if name not in ("contradiction", "unknown flag"):  # tyro draws a box around those
            assert len(said.strip().splitlines()) == 1, f"{name}: more than one line\n{said}"
        assert sorted(path.name for path in finished_run().rglob("*")) == before
    result = program("--folder", here / "errors" / "process", *flags)
    assert (result.returncode, result.stderr) == (code, said), "a process of its own says something else"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "write_json", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert told("--folder", here / "full") == (2, "pmo: [Errno 28] No space left on device\n")
        patch.setattr(impl, "start", lambda config: (_ for _ in ()).throw(torch.OutOfMemoryError("2 GiB")))
        try:
            code, said = told()
        except torch.OutOfMemoryError:
            pytest.fail("too little memory is told by a traceback")
        assert code == 2 and "--compute.micro-batch-size" in said and "2 GiB" in said
        terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
        patch.setattr(impl, "start", lambda config: print("π"))
        patch.setattr(sys, "argv", ["pmo.py"])
        patch.setattr(sys, "stdout", terminal)
        try:
            impl.main()
        except UnicodeEncodeError:
            pytest.fail("a terminal that cannot show a character ended the run")
        terminal.flush()
        assert terminal.buffer.getvalue() == b"?\n"


@law(
    "sorting, trimming, padding on the right and a head on response positions only change no gradient: each is that of whole "
    "rows, one by one, through the whole model",
    "README: Speed", *ENGINE_NEEDS, "ppo_losses", "micro_batches",
)  # fmt: skip
def test_the_fast_path_has_the_plain_paths_gradient():
    for family in ("neox", "llama"):
        models, config = tiny_models(family), ppo_config(temperature=0.7)
        rollout = tiny_rollout(models, config)
        move_away(models)
        for rows in impl.micro_batches(rollout, 3):
            ppo_losses(models, config)(rollout[rows], rollout)["loss"].backward()
        trained = parameters_of(models)
        fast = [p.grad.clone() for p in trained]
        for p in trained:
            p.grad = None
        tokens = sum(map(len, rollout.batch.responses))
        for i, (query, response) in enumerate(zip(rollout.batch.queries, rollout.batch.responses)):
            row, n = torch.tensor([query + response]), len(response)
            logits = models.policy(input_ids=row).logits[0, len(query) - 1 : -1]
            logprobs = (logits / 0.7).log_softmax(-1)[range(n), response]
            hidden = models.value_model.classifier.base_model(input_ids=row).last_hidden_state[0, len(query) - 1 : -1]
            values = models.value_model.classifier.score(hidden)[:, 0] + models.value_model.bias
            ratio, A = (logprobs - rollout.logprobs[i, :n]).exp(), rollout.advantages[i, :n]
            policy = -torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)
            old, R = rollout.values[i, :n], rollout.returns[i, :n]
            value = torch.max((values - R) ** 2, (old + (values - old).clamp(-0.2, 0.2) - R) ** 2) / 2
            ((policy + 0.1 * value).sum() / tokens).backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in trained))
        for p, gradient in zip(trained, fast):
            assert (p.grad - gradient).norm().item() <= 1e-4 * norm


@law(
    "the benchmark says where an update's time goes: sampling, forwards, training, with tokens per second and the share of what "
    "the machine can do",
    "README: Speed", *RUN_NEEDS, "sample", "map_rows", "optimizer_step",
)  # fmt: skip
def test_the_benchmark_says_where_the_time_goes():
    train, valid = toy_files()
    flags = ["--data.train", train, "--data.valid", valid, "--pretrain.width", 32, "--pretrain.heads", 2]
    flags += [
        "--ppo.total-episodes", 48, "--ppo.batch-size", 16, "--data.response-tokens", 8, "--folder", workshop() / "timed",
        "--ppo.responses-per-query", 1, "--ppo.baseline", "value-model",
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = benchmark(*map(str, flags))
        shared = benchmark(*map(str, flags), "--ppo.responses-per-query", "4", "--folder", str(workshop() / "timed 4"))
    assert shared["phases"]["forwards"]["tokens/s"] > 0 and 0 < shared["phases"]["sampling"]["share of bandwidth"] < 2
    phases = result["phases"]
    assert set(phases) == {"sampling", "forwards", "training"} and result["updates"] == 2
    assert result["seconds"] == pytest.approx(sum(row["seconds"] for row in phases.values()))
    updates = [m for m in metrics_of(workshop() / "timed", timings=True) if m["stage"] == "ppo"]
    assert 0 < result["seconds"] < 1.1 * max(b["seconds"] - a["seconds"] for a, b in itertools.pairwise(updates))
    model = impl.load_policy(workshop() / "timed" / "sft")
    body = sum(p.numel() for p in model.parameters()) - model.get_output_embeddings().weight.numel()  # tied: once
    for row in phases.values():
        assert row["seconds"] > 0 and 0 < row["share of peak"] < 2
    written, forwards = (phases[name]["tokens/s"] * phases[name]["seconds"] for name in ("sampling", "forwards"))
    read = forwards / 4  # by reward model, policy with value model, reference, and by the policy after the update
    assert 16 <= written <= 16 * 8 and read > written + 16 * 20
    training = phases["training"]
    assert training["tokens/s"] * training["seconds"] == pytest.approx(2 * read), "two epochs"
    head = model.get_output_embeddings().weight.numel()
    done = training["share of peak"] * training["seconds"] * result["flops"]
    assert done == pytest.approx(6 * 2 * (2 * body * read + head * written), rel=1e-3)
    assert all(phase in said.getvalue() for phase in phases) and not hasattr(impl.sample, "__wrapped__")


@law(
    "AdamW's memory of squared gradients and the limit of the gradient's norm are those asked for, in every stage",
    "D21, D22; Kingma & Ba 2015, algorithm 1", *RUN_NEEDS, "adamw", "Optimizer",
)  # fmt: skip
def test_every_stage_has_the_optimizer_asked_for():
    config = stage_config("optimizer", "pretrain", "sft", "reward", "ppo", sft=impl.SFT(epochs=0.1))
    config = replace(config, optimizer=impl.Optimizer(beta2=0.9, max_grad_norm=0.5))
    config = replace(config, pretrain=replace(config.pretrain, epochs=0.1), ppo=replace(config.ppo, total_episodes=16))
    made = [optimizer for _, optimizer in watched(config, "adamw")["adamw"]]
    groups = [group for optimizer in made for group in optimizer.param_groups]
    assert len(made) == 4 and len(groups) == 5, "PPO's has two groups"
    assert all(group["betas"] == (0.9, 0.9) and group["max_grad_norm"] == 0.5 for group in groups)
    assert [group["initial_lr"] for group in groups[-2:]] == [config.ppo.lr, config.ppo.value_lr]
    x = torch.nn.Parameter(torch.zeros(()))
    optimizer = impl.adamw(impl.Optimizer(beta2=0.5), (torch.nn.ParameterList([x]), 1.0))
    for gradient in (1.0, 3.0):
        x.grad = torch.tensor(gradient)
        optimizer.step()
    m, v = 0.9 * 0.1 * 1 + 0.1 * 3, 0.5 * 0.5 * 1 + 0.5 * 9
    close(x, -1.0 - (m / (1 - 0.81)) / math.sqrt(v / 0.75), tolerance=1e-4)


@law(
    "where and in what pieces to compute is what --compute says: device, precision, sizes",
    "README: flags", "Engine", "Compute",
)  # fmt: skip
def test_the_engine_is_the_one_asked_for():
    machine = impl.Engine.start(
        impl.Compute(device="cpu", precision="bfloat16", micro_batch_size=3, sample_batch_size=5)
    )
    assert (machine.micro_batch_size, machine.sample_batch_size, machine.bfloat16) == (3, 5, True)
    assert machine.device.type == "cpu" and (machine.rank, machine.world, machine.fsdp) == (0, 1, False)
    policy = tiny_policy("neox")
    with machine.autocast():
        assert policy(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
    seen, layer = set(), policy.gpt_neox.layers[0].mlp.dense_h_to_4h
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    for use in (
        lambda: impl.batch_logprobs(policy, some_batch(), 1.0, machine),
        lambda: impl.accumulate(machine, some_batch(), functools.partial(impl.language_model_losses, policy, 0.0)),
    ):
        seen.clear()
        use()
        assert seen == {torch.bfloat16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "torchrun" in config_error(lambda: impl.Engine.start(impl.Compute(device="cpu")))
    assert not impl.Engine.start(impl.Compute(device="cpu")).bfloat16
    if not torch.cuda.is_available():
        assert "cuda" in config_error(lambda: impl.Engine.start(impl.Compute(device="cuda")))


@law(
    "run_tldr.sh takes a tiny model and tiny files through the paper's stages, and puts no incomplete download in place",
    "README: run_tldr.sh", *PROGRAM,
)  # fmt: skip
def test_the_papers_script_runs_end_to_end():
    script = Path(impl.__file__).resolve().parent / "run_tldr.sh"
    if not script.exists() or not shutil.which("bash"):
        pytest.skip("missing: run_tldr.sh lies beside pmo.py, and needs bash")
    data, (train, valid) = workshop() / "tldr data", toy_files()
    data.mkdir()
    pairs = [
        {"info": p.fields(), "summaries": [{"text": p.summary}, {"text": q.summary}], "choice": 0}
        for p, q in itertools.pairwise(toy_posts(60))
    ]
    for name, source in (("train", train), ("valid", valid), ("test", valid)):
        shutil.copy(source, data / f"{name}.jsonl")
    for split in ("train", "valid"):
        impl.write_records(pairs, data / f"comparisons_{split}.jsonl")
    variables = os.environ | {
        "DATA": str(data), "MODEL": str(finished_run() / "base"), "LAUNCH": sys.executable, "HF_HUB_OFFLINE": "1",
        "SOURCE": f"file://{workshop()}/mirror",
    }  # fmt: skip
    flags = [
        "--folder", workshop() / "runs" / "tldr", "--sft.batch-size", 8, "--reward.batch-size", 8,
        "--ppo.total-episodes", 16, "--ppo.batch-size", 8,
    ]  # fmt: skip
    command = ["bash", script, *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, cwd=workshop())
    assert result.returncode == 0, result.stderr
    assert "What one GPU needs" in result.stdout and (workshop() / "runs" / "tldr" / "eval.json").exists()
    config = json.loads((workshop() / "runs" / "tldr" / "config.json").read_text())["config"]
    assert (
        config["ppo"]["kl_coef"] == 0.05 and config["ppo"]["num_ppo_epochs"] == 4 and config["ppo"]["batch_size"] == 8
    )
    if not shutil.which("curl"):
        return
    (data / "test.jsonl").unlink()
    mirror = workshop() / "mirror" / "datasets" / "tldr_3_filtered"
    for place, culprit in ((None, "cannot load"), (mirror, "has 12 records, should have 6553")):
        if place:
            place.mkdir(parents=True)
            shutil.copy(valid, place / "test.jsonl")
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables, cwd=workshop())
        assert result.returncode == 2 and culprit in result.stderr, result.stderr
        assert not (data / "test.jsonl").exists()
    assert (data / "test.jsonl.part").exists(), "a partial file stays, to go on from"


@law(
    "runs never share a folder: without a name they get the next free one, with a taken name they do not start",
    "README: files of a run", "fresh_folder",
)  # fmt: skip
def test_runs_never_share_a_folder():
    here = workshop() / "fresh"
    (here / "runs" / "something else").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert [impl.fresh_folder(None).name for _ in range(3)] == ["run-001", "run-002", "run-003"]
        with pytest.raises(impl.InputError, match="run-002 exists"):
            impl.fresh_folder(Path("runs/run-002"))
        Path("runs/run-001").rmdir()
        assert impl.fresh_folder(None).name == "run-001" and impl.fresh_folder(Path("a/b")).is_dir()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)  # fmt: skip


@law(
    "any JSON is a record, a record of another task, or a clear error that names the field; never another exception",
    "README: your own data", "parse_post", "parse_comparison", "InputError",
    base=st.sampled_from(["post", "comparison", "hub"]), value=JSON,
    field=st.sampled_from(["subreddit", "post", "info", "summaries", "choice", "prompt", "chosen", "completion"]),
)  # fmt: skip
def test_any_record_is_parsed_or_refused(base, field, value):
    info = {"subreddit": "a", "title": "b", "post": "c", "summary": "d"}
    record, parse = {
        "post": (info, impl.parse_post),
        "comparison": ({"info": info, "summaries": [{"text": "x"}, {"text": "y"}], "choice": 1}, impl.parse_comparison),
        "hub": ({"prompt": HUB_POST, "chosen": " x", "rejected": " y"}, impl.parse_comparison),
    }[base]
    parse(record)
    try:
        result = parse(record | {field: value})
    except impl.InputError as error:
        assert "field '" in str(error) or "one of the two texts is empty" in str(error)
    else:
        assert result is None or all(isinstance(x, (str, tuple)) for x in result[:4])


HUB_POST = "SUBREDDIT: r/cats\n\nTITLE: b\n\nPOST: c\n\nwith TL;DR: in it\n\nTL;DR:"


@law(
    "OpenAI's records and the Hub's columns give the same posts and comparisons; those of news articles are a kind of their own",
    "openai/summarize-from-feedback; the Hub's copies of it", "parse_post", "parse_comparison", "Post",
)  # fmt: skip
def test_both_forms_of_the_data_are_read():
    post = impl.Post("cats", "b", "c\n\nwith TL;DR: in it", "d")
    for record in (post.fields() | {"id": "t3"}, {"prompt": HUB_POST, "completion": "d<|endoftext|>"}):
        assert impl.parse_post(record) == post._replace(record=record)
    assert impl.parse_post({"prompt": f"{HUB_POST} \n", "completion": "d"}).fields() == post.fields()
    openai = {"info": post.fields(), "summaries": [{"text": "x"}, {"text": "y"}], "choice": 1}
    hub = {"prompt": HUB_POST, "chosen": "y", "rejected": "x"}
    for parsed in map(impl.parse_comparison, (openai, hub)):
        assert parsed.post.fields() == post._replace(summary="").fields()
        assert (parsed.chosen, parsed.rejected) == ("y", "x")
    news = impl.parse_comparison(openai | {"info": {"id": "1", "article": "text", "title": "t"}})
    assert news.post[:3] == ("news", "t", "text") and news.kinds[-1] == "news articles"
    with pytest.raises(impl.InputError, match="empty"):
        impl.parse_comparison(hub | {"chosen": " "})
    with pytest.raises(impl.InputError, match="Unicode"):
        impl.parse_post(post._replace(title="\ud800").fields())


WRITTEN = (
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "assistant", "content": "No."},
)


@law(
    "prompts are text or conversations, given or the common beginning of chosen and rejected; answers are text or the last of "
    "some messages; what is null is not there; a record keeps all its columns; of anything else the field is named",
    "Bai et al. 2022, arXiv 2204.05862 (HH); TRL's dataset formats", "parse_post", "parse_comparison", "Post", "InputError",
)  # fmt: skip
def test_records_of_every_form_are_read():
    user, yes, no = WRITTEN
    hh = "\n\nHuman: Hello?\n\nAssistant: Who?\n\nHuman: I.\n\nAssistant:"
    for record, prompt, texts in (
        ({"prompt": "2 + 2 =", "chosen": "4", "rejected": " 5"}, "2 + 2 =", ("4", " 5")),
        ({"prompt": [user], "chosen": [yes], "rejected": "No."}, [user], ("Yes.", "No.")),
        ({"prompt": [user | {"name": None}], "chosen": [user, yes], "rejected": [no]}, [user], ("Yes.", "No.")),
        ({"prompt": None, "chosen": [user, yes], "rejected": [user, no]}, [user], ("Yes.", "No.")),
        ({"chosen": hh + " Ah.", "rejected": hh + " Bye."}, hh, (" Ah.", " Bye.")),
        ({"chosen": hh + " The one.", "rejected": hh + " The other."}, hh, (" The one.", " The other.")),
        ({"chosen": "The sky is blue", "rejected": "The sky is black"}, "The sky is", (" blue", " black")),
        ({"chosen": "The sky is blue", "rejected": "The sky is"}, "The sky", (" is blue", " is")),
        ({"prompt": HUB_POST, "chosen": [user, yes], "rejected": [user, no]}, None, ("Yes.", "No.")),
        ({"prompt": HUB_POST, "chosen": " a<|endoftext|>", "rejected": " b<|endoftext|>"}, None, (" a", " b")),
        ({"prompt": HUB_POST.replace("\n\n", "\n"), "chosen": "x", "rejected": "y"}, HUB_POST.replace("\n\n", "\n"), ("x", "y")),
    ):  # fmt: skip
        record = record | {"answer": 4, "info": None, "subreddit": None, "post": None}
        read, post = impl.parse_comparison(record), impl.parse_post(record)
        assert (read.chosen, read.rejected) == texts and post.summary == texts[0], record
        assert read.post == post._replace(summary="") and post.prompt == prompt and post.record == record, record
        if prompt is None:
            assert post[:3] == ("cats", "b", "c\n\nwith TL;DR: in it")
        else:
            assert post[:3] == ("", "", prompt if isinstance(prompt, str) else "user: Hello?")
    for record, answer in (
        ({"prompt": "2 + 2 =", "answer": "4"}, ""),
        ({"prompt": "2 + 2 =", "completion": None}, ""),
        ({"prompt": "2 + 2 =", "completion": " 4<|endoftext|>", "chosen": "5"}, " 4"),
        ({"prompt": [user], "completion": [user, yes]}, "Yes."),
    ):
        assert impl.parse_post(record).summary == answer and impl.parse_post(record).record == record
    posts = impl.parse_post(dict(zip(("subreddit", "title", "post", "summary", "chosen"), "abcde")) | {"prompt": None})
    assert posts.fields() == dict(zip(("subreddit", "title", "post", "summary"), "abcd"))
    for record, said in (
        ({"question": "2 + 2?", "answer": "4"}, "field 'prompt' (or 'post') is missing"),
        ({"prompt": "", "chosen": None}, "field 'prompt' (or 'post') is missing"),
        ({"chosen": "one", "rejected": "two"}, "no common beginning"),
        ({"chosen": [user, yes], "rejected": [no, no]}, "no common beginning"),
        ({"chosen": [user, yes], "rejected": "no"}, "no common beginning"),
        ({"chosen": [user, yes, no], "rejected": [user, no, yes]}, "no common beginning"),
        ({"prompt": []}, "field 'prompt' is neither text nor messages"),
        ({"prompt": [user, "x"]}, "field 'prompt' is neither text nor messages"),
        ({"prompt": [{"role": "user"}]}, "field 'content' is missing"),
        ({"prompt": "x", "label": "y"}, "field 'chosen' is missing"),
    ):
        with pytest.raises(impl.InputError, match=re.escape(said)):
            impl.parse_comparison(record)


CHATML = (
    "{{ bos_token }}{% for m in messages %}{% if m.content == 'odd' %}{{ raise_exception('an odd one') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer():
    """With the special tokens of ChatML, and a BOS before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    special = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    tokenizer.chat_template = CHATML
    return tokenizer


@law(
    "a prompt becomes a query as it stands, a conversation through the tokenizer's template, with one BOS and special tokens of "
    "the template alone; an answer gets no space; what is too long is left out and counted",
    "D1 and D2 are for TL;DR; [8] for prompts in general", *RUN_NEEDS, "Codec", "Run", "read_prompts",
)  # fmt: skip
def test_prompts_are_used_as_they_stand():
    tokenizer, (user, yes, _) = chat_tokenizer(), WRITTEN
    codec, decode = impl.Codec(tokenizer, impl.Data(query_tokens=200)), tokenizer.decode
    text, chat = impl.parse_post({"prompt": "2 + 2 =\n"}), impl.parse_post({"prompt": [user]})
    assert decode(codec.queries([text])[0]) == "<s>2 + 2 =\n"
    whole = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=True).input_ids
    assert codec.queries([chat, text, chat])[::2] == [whole, whole]
    assert [decode(r) for r in codec.responses(["4 ", "4"], [text, chat])] == ["4 <|endoftext|>", "4<|endoftext|>"]
    usual = impl.Post("a", "b", "c", "d")
    assert codec.responses([" x", "y", "z "], [text, usual, usual]) == [
        codec.responses(["x"])[0],
        *codec.responses(["y", "z"]),
    ]
    for content in (
        "a <|im_end|>",
        "<|im_start|><|im_end|>x",
        "<s>",
        "<|<|im_end|>im_end|>",
        "\ufdd0\ufdd1<|endoftext|>",
    ):
        (query,) = codec.queries([impl.parse_post({"prompt": [user | {"content": content}, yes, user]})])
        assert decode(query) == tokenizer.apply_chat_template(
            [user | {"content": content.strip("\ufdd0\ufdd1")}, yes, user], add_generation_prompt=True, tokenize=False
        )  # fmt: skip
        special = Counter(token for token in query if token in tokenizer.all_special_ids)
        names = {"<s>": 1, "<|im_start|>": 4, "<|im_end|>": 3}
        assert special == {tokenizer.convert_tokens_to_ids(name): n for name, n in names.items()}
    assert "an odd one" in config_error(
        lambda: codec.queries([impl.parse_post({"prompt": [user | {"content": "odd"}]})])
    )
    tokenizer.chat_template = CHATML.replace("m.content |", "m.content.split('<s>')[-1] |")  # as of thoughts
    whole, torn = (impl.parse_post({"prompt": [user | {"content": text}, yes, user]}) for text in ("x y", "x<s>y"))
    assert "x y<|im_end|>" in decode(codec.queries([whole])[0])
    for post in (torn, torn._replace(prompt=[*torn.prompt, *torn.prompt])):  # half of one spelling, of two
        assert "takes apart" in config_error(lambda post=post: codec.queries([post]))
    tokenizer.chat_template = CHATML
    path = workshop() / "prompts.jsonl"
    records = [{"prompt": f"{i} + {i} =" + " and" * 300 * (i == 7)} for i in range(120)] + [{"prompt": [user]}]
    impl.write_records(records, path)
    run = impl.Run(with_flag(with_flag(tiny_config("prompts"), "data.train", path), "data.valid", path))
    posts, queries = impl.read_prompts(run, "train", codec)
    assert [post.record for post in posts] == records[:7] + records[8:] and queries == codec.queries(posts)
    assert len(run.said) == 1 and "left out 1 of 121 train posts" in run.said.pop()
    message = config_error(lambda: impl.read_examples(run, "train", codec))
    assert "120 of 120 train summaries" in message and "--sft-model" in message
    tokenizer.chat_template = None
    assert "no chat template" in config_error(lambda: impl.Codec(tokenizer, codec.data).queries([chat]))


def sentencepiece(normalizer=None, pre_tokenizer=None):
    """A byte-fallback BPE as Llama's and Mistral's are."""
    from tokenizers import Tokenizer, decoders, models, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer, bpe.pre_tokenizer = normalizer, pre_tokenizer
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    bpe.decoder = decoders.Sequence([*parts])
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([post.post for post in toy_posts()], trainer)
    clean = "clean_up_tokenization_spaces", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", **dict.fromkeys(clean, True))


@law(
    "whatever a tokenizer does at the start of a text, query and response are the tokens of a text that holds both, and what is "
    "decoded is what was written",
    "D1; transformers issue 26273; inseq pull request 215", "Codec", "Post", "train_tokenizer", "parse_post",
)  # fmt: skip
def test_no_tokenizer_glues_a_blank_to_a_response():
    from tokenizers import normalizers, pre_tokenizers

    kinds = {
        "Prepend": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
        **{scheme: (None, pre_tokenizers.Metaspace(prepend_scheme=scheme)) for scheme in ("first", "always", "never")},
    }
    tokenizers = {name: sentencepiece(*kind) for name, kind in kinds.items()} | {"byte-level": tiny_tokenizer()}
    for name, tokenizer in tokenizers.items():
        codec, prompt = impl.Codec(tokenizer, impl.Data()), impl.parse_post({"prompt": "x:\n"})
        for text, post in (("I like cats", impl.Post("a", "b", "c", "d")), ("I like cats", prompt), (" I", prompt)):
            between = "" if post.prompt else " "
            (response,) = codec.responses([text], [post])
            inside = tokenizer("x:\n" + between + text, add_special_tokens=False).input_ids
            assert response[:-1] == inside[-len(response) + 1 :], (name, text)
            assert tokenizer.decode([*codec.queries([prompt])[0], *response[:-1]]) == "x:\n" + between + text, (
                name,
                text,
            )
        said = "I do n't know , he said . x = a [ 0 ] !"
        assert codec.text(codec.responses([said])[0]) == said, name


@law(
    "words are letters and digits of any script, one character each where a script has no blanks; English words are as ever",
    "Lin 2004; google/adk-python issue 4122", "rouge_l", "Labeler", text=st.text(st.characters(max_codepoint=127), max_size=40),
)  # fmt: skip
def test_words_of_every_script_count(text):
    for same in (
        "이웃이 매주 칠한다",
        "我每天画梯子",
        "毎日はしごを塗る",
        "ทาสีบันได",
        "Он красит лестницу",
        "هو يدهن السلم",
        "सीढ़ी",
    ):
        assert impl.rouge_l(same, same) == 1.0 and impl.Labeler.words(same), same
    assert impl.rouge_l("我每天画梯子", "我每天画房子") == pytest.approx(5 / 6)
    assert impl.rouge_l("이웃이 매주 칠한다", "이웃이 매일 칠한다") == pytest.approx(2 / 3)
    assert impl.Labeler.words("Ärzte malen 매주 天気 à b 7") == ["ärzte", "malen", "매주", "天", "気", "à"]
    ascii_words = re.findall(r"[a-z0-9]+", text.lower())
    assert impl.rouge_l(text, " ".join(ascii_words)) == (1.0 if ascii_words else 0.0)
    letters = re.findall(r"[a-z]{2,}", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())
    assert impl.Labeler.words(text) == [word[:6] for word in letters]


@law(
    "figures that nothing was written for are missing, not 0: of authors without a summary, and of likeness to it",
    "D24: never claim more than was measured", *RUN_NEEDS, "marks_of", "report", "compare_marks",
)  # fmt: skip
def test_what_nobody_wrote_is_not_measured():
    path, few = workshop() / "unanswered.jsonl", toy_posts(36)
    for kept in (0, 3, 30):
        posts = [post if i < kept else post._replace(summary="") for i, post in enumerate(few)]
        impl.write_records([post.fields() for post in posts], path)
        config = with_flag(stage_config(f"unanswered {kept}", "evaluate"), "data.valid", path)
        ((_, _, _, marks, _), _), = watched(config, "report")["report"]  # fmt: skip
        text = (config.folder / "eval.json").read_text()
        assert "NaN" not in text
        record = json.loads(text)
        alone, pairs = record["means"], record["comparisons"]
        for writer in alone:
            assert ("rouge_l" in alone[writer]) == (kept > 0), "ROUGE-L of nothing"
        assert alone["PPO T=0.7"]["tokens"] > 0 and "labeler" in alone["PPO T=0.7"]
        assert bool(alone["author"]) == (kept > 0) == ("PPO T=0.01 against author" in pairs)
        if kept:
            assert alone["author"]["rouge_l"] == 1.0 and alone["author"]["eos"] == 1.0
            own = marks["PPO T=0.01"]["labeler"][:kept] - marks["author"]["labeler"][:kept]
            wins = ((own > 0) + (own == 0) / 2).mean()
            found = pairs["PPO T=0.01 against author"].get("win rate")
            assert found is None if kept == 3 else found[0] == pytest.approx(wins), "three are not enough"
        for row in (pairs[pair] for pair in pairs if "author" not in pair):
            gains = {"win rate", "margin gain", "score gain", *["rouge_l gain"] * (kept == 30)}
            assert row.keys() - {"same length"} == gains


@law(
    "samples of prompts are compared with the very tokens that were sampled, and as answers to the prompt they are of",
    "a reward model should read what the policy writes", *RUN_NEEDS, "compare", "compared_by", "read_rankings", "Codec",
)  # fmt: skip
def test_samples_of_prompts_are_compared_as_they_are():
    path = workshop() / "asked.jsonl"
    messages = [[{"role": "user", "content": post.post}] for post in toy_posts(60)]
    prompts = [post.post if i % 2 else messages[i] for i, post in enumerate(toy_posts(60))]
    impl.write_records([{"prompt": prompt} for prompt in prompts], path)
    config = with_flag(with_flag(stage_config("prompts compared", "compare"), "data.train", path), "data.valid", path)
    drawn = watched(config, "sample")["sample"]
    folders = (config.folder, finished_run())
    run = impl.Run(replace(config, folder=config.folder.with_name("prompts compared again"), from_run=folders))
    codec = run.codec("sft")
    sampled = {(tuple(q), tuple(r)) for args, rows in drawn for q, r in zip(args[1], rows)}
    asked, ended = {tuple(query) for args, _ in drawn for query in args[1]}, 0
    rankings, kinds = impl.read_rankings(run, "train", codec)
    assert asked == {tuple(query) for query in codec.queries([impl.parse_post({"prompt": p}) for p in prompts])}
    for ranking in rankings:
        assert tuple(ranking.query) in asked
        ended += any((tuple(ranking.query), tuple(r)) in sampled for r in ranking.responses)
    assert kinds and ended > 0.8 * len(rankings), (ended, len(rankings))


@law(
    "rows of a Parquet file are read as records where pyarrow is installed; where it is not, one line says so",
    "README: your own data", "read_records", "parse_post", "InputError",
)  # fmt: skip
def test_parquet_is_read_where_it_can_be():
    path, rows = workshop() / "rows.parquet", [{"prompt": "2 + 2 =", "answer": 4, "post": None}] * 150 + [{"prompt": 4}]
    path.write_bytes(b"PAR1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "pip install pyarrow" in config_error(lambda: impl.read_records(path, impl.parse_post))
    table = SimpleNamespace(to_pylist=lambda: rows)
    with pytest.MonkeyPatch.context() as patch:  # as pyarrow has it
        patch.setattr(importlib.util, "find_spec", lambda name: name)
        patch.setitem(sys.modules, "pyarrow", SimpleNamespace())
        patch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(read_table=lambda file: {path: table}[file]))
        records, (complaint,) = impl.read_records(path, impl.parse_post)
    assert [record.record for record in records] == rows[:150]
    assert "1 of 151 records are unusable: line 151: field 'prompt' is missing or not text" in complaint


def readme_text() -> str:
    readme = Path(impl.__file__).resolve().parent / "README.md"
    if not readme.exists():
        pytest.skip("missing: README.md lies beside pmo.py")
    return readme.read_text(encoding="utf-8")


@law(
    "README's examples of one's own data run as they stand there, and end in what they say: a reward model or a rule, and an "
    "evaluation",
    "README: Your own data and models", *PROGRAM,
)  # fmt: skip
def test_readmes_examples_run():
    section = readme_text().partition("### Your own data and models")[2]
    (example,) = re.findall(r"^```sh\n(.*?)^```", section.partition("\n### ")[0], re.MULTILINE | re.DOTALL)
    folder = workshop() / "examples"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    shutil.copy(impl.__file__, folder / "pmo.py")
    path = os.pathsep.join([str(Path(sys.executable).parent), str(folder / "bin"), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-e"], input=example, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for name, stages in (("tldr", "sft reward ppo"), ("sums", "sft ppo"), ("chat", "sft reward ppo")):
        made = folder / "runs" / name
        assert {path.name for path in made.iterdir() if path.is_dir()} == {"base", *stages.split()}
        record = json.loads((made / "eval.json").read_text())
        assert record["posts"] == 2 and 0 <= record["means"]["PPO T=0.7"]["rouge_l"] <= 1
    assert "left out 1 of 2 train summaries" in result.stdout
    sums, chat = ([json.loads(x) for x in (folder / "runs" / y / "eval.jsonl").open()] for y in ("sums", "chat"))
    assert [line["summaries"]["author"] for line in sums] == [" 5", ""]
    assert [line["post"] for line in chat] == ["user: Hi!", "user: Bye!"]


@law(
    "a few broken lines are left out and counted, with file, line and field; more than 1% are an error; nothing is silent",
    "README: your own data", "read_records", "parse_post", "parse_comparison", "InputError",
)  # fmt: skip
def test_broken_records_are_counted_or_refused():
    import gzip

    good = json.dumps({"subreddit": "a", "title": "b", "post": "c", "summary": "d"}).encode()
    path = workshop() / "mostly good.jsonl"
    path.write_bytes(b"\n".join([good] * 150 + [b"not JSON"] + [good] * 49))
    records, complaints = impl.read_records(path, impl.parse_post)
    assert len(records) == 199 and len(complaints) == 1
    assert "1 of 200 records" in complaints[0] and "line 151" in complaints[0] and str(path) in complaints[0]
    packed = workshop() / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert impl.read_records(packed, impl.parse_post)[0] == records
    for broken in (b"\xff\xfe", b"[1, 2]", b'{"title": 3}', b"[" * 100_000, b""):
        path.write_bytes(b"\n".join([good] * 20 + [broken] + [good]))
        with pytest.raises(impl.InputError, match="1 of 22 records are unusable: line 21"):
            impl.read_records(path, impl.parse_post)
    for content, name in (
        (b"not gzip", "a.jsonl.gz"),
        (gzip.compress(good * 9)[:20], "cut.jsonl.gz"),
        (b"", "none.jsonl"),
    ):
        (workshop() / name).write_bytes(content)
        with pytest.raises(impl.InputError, match=name):
            impl.read_records(workshop() / name, impl.parse_post)
    article = json.dumps({"info": {"article": "x"}, "summaries": [{"text": "x"}, {"text": "y"}], "choice": 0}).encode()
    ours = json.dumps({"info": json.loads(good), "summaries": [{"text": "x"}, {"text": "y"}], "choice": 0}).encode()
    path.write_bytes(b"\n".join([ours, article, article]))
    records, complaints = impl.read_records(path, impl.parse_comparison)
    assert ["news articles" in record.kinds for record in records] == [False, True, True] and complaints == []


@law(
    "a human comparison's choice decides which text is chosen",
    "[5] appendix: 'choice' is the index of the preferred summary", "parse_comparison",
)  # fmt: skip
def test_the_choice_is_the_chosen_text():
    for choice in (0, 1):
        record = {
            "info": {"subreddit": "a", "title": "b", "post": "c"}, "choice": choice,
            "summaries": [{"text": "first", "policy": "sup1"}, {"text": "second", "policy": "ref"}],
        }  # fmt: skip
        parsed = impl.parse_comparison(record)
        assert (parsed.chosen, parsed.rejected) == (("first", "second") if choice == 0 else ("second", "first"))
        assert parsed.kinds == ("ref vs sup1",)
        parsed = impl.parse_comparison({**record, "batch": "batch9", "extra": {"confidence": 8}})
        assert parsed.kinds == ("ref vs sup1", "batch9", "confidence 8")


@law(
    "a shown sample is each model's own text with its own score, the fixed one where it does not end",
    "D12; README: samples.jsonl", *RUN_NEEDS, "show_sample", "Run", "load_models",
)  # fmt: skip
def test_shown_samples_belong_to_their_models():
    folder, posts = finished_run(), toy_posts(12)
    for T in (16, 3):
        config = stage_config(f"shown {T}", "ppo", ppo=ppo_config(sample_every=3))
        run = impl.Run(replace(config, data=replace(config.data, response_tokens=T)))
        models, codec = models_of(run), run.codec("sft")
        models = models._replace(policy=impl.load_policy(folder / "ppo"))
        impl.show_sample(run, 6, posts, codec, models)
        record = json.loads((run.folder / "samples.jsonl").read_text())
        queries, noise = codec.queries([posts[6]]), impl.noise(1, "show", [6], T)
        written = {"author": codec.responses([posts[6].summary])}
        for name, policy in (("sft", models.ref_policy), ("ppo", models.policy)):
            written[name] = impl.sample(policy, queries, noise, 0.01, codec.eos_id, engine())
        assert written["sft"] != written["ppo"] or T < 16, "the example needs two models that write different things"
        for name in ("sft", "ppo"):
            assert (written[name][0][-1] == codec.eos_id) == (T == 16), "they should end, or not, in time"
        assert written["ppo"] != written["author"], "the example needs a text that is not the author's"
        for name, responses in written.items():
            assert record[name] == codec.text(responses[0])
            score = impl.scores_of(models.reward_model, impl.Batch(queries, responses), engine()).item()
            ended = responses[0][-1] == codec.eos_id
            assert record[f"{name}_score"] == pytest.approx(score if ended else -3.0, abs=1e-5)


@law(
    "the verdict claims a difference only where its 95% interval leaves out no difference, and nothing of fewer than 30 posts",
    "D24: never claim more than the controls allow", "verdict", "compare_marks",
)  # fmt: skip
def test_the_verdict_claims_no_more_than_its_intervals():
    same = "not measurably different"

    def judge(win: float, margin: float, rouge: float, half: float = 0.04, posts: int = 30) -> tuple[str, ...]:
        middles = {"win rate": 0.5 + win, "margin gain": margin, "rouge_l gain": rouge}
        figures = {name: (x, x - half, x + half) for name, x in middles.items()}
        first, *lines = impl.verdict({"a against b": figures, "b against a": figures}, "a judge", posts).splitlines()
        assert first.startswith("Judged by a judge") and len(lines) == 2 * (posts >= 30)
        words = re.fullmatch(
            rf" +a against b: win rate ({same}|\w+) \(.*%\), margin (.*), rouge_l (.*)", lines[0] if lines else ""
        )
        return words.groups() if words else (first,)

    for x, word in ((0.05, "up"), (0.03, same), (0.0, same), (-0.03, same), (-0.05, "down")):
        assert judge(x, 0, 0) == (word, same, same)
        assert judge(0, x, 0) == (same, word, same)
        assert judge(0, 0, x) == (same, same, word)
    for posts in (1, 29):
        assert judge(0.5, 1, 1, 0.0, posts) == (f"Judged by a judge: {posts} posts are too few for a verdict.",)
    numpy = pytest.importorskip("numpy")
    ours = {
        "labeler": [1.0, 2.0, 3.0, 0.0], "labeler, other post": [0.0, 0.0, 1.0, 0.0], "rouge_l": [1.0, 0.0, 0.0, 0.0],
    }  # fmt: skip
    theirs = {"labeler": [0.0, 2.0, 4.0, 0.0], "labeler, other post": [0.0] * 4, "rouge_l": [0.0] * 4}
    ours, theirs = ({k: numpy.array(v) for k, v in {**m, "score": [0, 0, 0, 2]}.items()} for m in (ours, theirs))
    theirs["score"], ours["tokens"] = theirs["score"] - 1, numpy.array([11, 11, 9, 9])
    theirs["tokens"] = numpy.array([10, 12, 10, 11])
    wins = impl.wins_of(ours["labeler"], theirs["labeler"])
    assert wins.tolist() == [1, 0.5, 0, 0.5]
    figures = impl.compare_marks(ours, theirs, wins)
    means = {name: mean for name, (mean, _, _) in figures.items()}
    assert means == {"win rate": 0.5, "margin gain": -0.25, "rouge_l gain": 0.25, "score gain": 1.0}
    ours, theirs = ({name: numpy.tile(x, 10) for name, x in marks.items()} for marks in (ours, theirs))
    often = impl.compare_marks(ours, theirs, numpy.tile(wins, 10))
    assert often["same length"] == impl.share_with_interval(numpy.tile(wins[:3], 10)) != often["win rate"]
    half = 1.96 * math.sqrt(3) / 4 / math.sqrt(3)  # standard deviation √3/4, four posts
    assert figures["rouge_l gain"][1:] == pytest.approx((0.25 - half, 0.25 + half))


@law(
    "an invented word stands in no training post, title or summary, nor in the post that is summarised; a repetitive summary says "
    "a word three times that is not in every post",
    "README: the default run's table", "Labeler", "Post",
)  # fmt: skip
def test_invented_words_and_repetitions_are_counted():
    posts = [impl.Post("a", f"title{'abcdefghijklmnopqrstuvwxyz'[i]}", "common words", "A summary.") for i in range(26)]
    labeler, post = impl.Labeler(posts), impl.Post("a", "", "the fliplr function", "")
    for summary, share in (
        ("Common titlez summary", 0.0), ("common commons", 0.5), ("FLIPLR the function", 0.0), ("fliplring", 1.0), ("", 0.0), ("7", 0.0),
    ):  # fmt: skip
        assert labeler.invented(post, summary) == share, summary
    for summary, repeats in (
        ("zebra zebra, zebra", True),
        ("zebra zebra", False),
        ("common common common", False),
        ("", False),
    ):
        assert labeler.is_repetitive(summary) == repeats, summary


@law(
    "a share's interval holds the shares p that are within 1.96 of their own standard errors, also where all were won",
    "Wilson 1927, eq. 4", "share_with_interval", wins=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=40),
)  # fmt: skip
def test_shares_have_wilsons_interval(wins):
    numpy = pytest.importorskip("numpy")
    share, low, high = impl.share_with_interval(numpy.array(wins))
    assert (
        share == pytest.approx(sum(wins) / len(wins)) and -1e-9 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1 + 1e-9
    )  # fmt: skip
    assert high - low > 1 / (1 + len(wins)), "an interval of nothing claims certainty"
    for p in (low, high):
        assert (share - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / len(wins), abs=1e-9)


@law(
    "a curve on the screen begins and ends with its first and last value, and its eight levels rise and fall with it, a long "
    "one in the means of its parts; what was not measured has none",
    "README: what a run prints", "sparklines",
)  # fmt: skip
def test_curves_on_the_screen_are_those_of_the_updates():
    history = [{"objective/scores": x, "val/eos_rate": 1.0} for x in (0.0, 1.0, 0.5, 7.0, 3.5)]
    rows = [line.split() for line in impl.sparklines(history).strip().splitlines()]
    assert rows == [["score", "0", "▁▂▁█▄", "3.5"], ["eos", "1", "▁▁▁▁▁", "1"]]
    ((_, first, curve, last),) = [
        line.split()
        for line in impl.sparklines([{"objective/scores": i // 2} for i in range(120)]).strip().splitlines()
    ]
    assert (
        (first, last, len(curve)) == ("0", "59", 60) and list(curve) == sorted(curve) and set(curve) == set("▁▂▃▄▅▆▇█")
    )


@law(
    "stage ppo ends with its curves",
    "README: what a run prints", *RUN_NEEDS, "Run",
)  # fmt: skip
def test_ppo_ends_with_its_curves():
    config = stage_config("with curves", "ppo")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        impl.start(config)
    assert impl.sparklines(metrics_of(config.folder)) in said.getvalue()


@law(
    "the picture has the same curves of each run, labelled by its folder",
    "README: files of a run", "plot",
)  # fmt: skip
def test_curves_are_drawn_of_each_run():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    folders = [workshop() / "drawn" / name for name in ("one", "two")]
    for k, folder in enumerate(folders):
        folder.mkdir(parents=True)
        records = [{"stage": "ppo", "objective/kl": float(i * k)} for i in range(3)] + [
            {"stage": "sft", "objective/kl": 9.0}
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, target, **options: drawn.extend(self.axes))
        impl.plot(folders, workshop() / "drawn" / "curves.png")
    (axes,) = [axes for axes in drawn if axes.get_title() == "kl"]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines == {"one": ([1, 2, 3], [0, 0, 0]), "two": ([1, 2, 3], [0, 1, 2])}
    impl.plot(folders, workshop() / "drawn" / "curves.png")
    assert (workshop() / "drawn" / "curves.png").read_bytes().startswith(b"\x89PNG")


@law(
    "episodes that make no whole batch are named at the start",
    "a flag that is not kept is said", *RUN_NEEDS, "Run",
)  # fmt: skip
def test_episodes_left_over_are_said():
    for episodes, left in ((49, True), (48, False)):
        config = stage_config(f"left {left}", "ppo")
        run = impl.Run(replace(config, ppo=replace(config.ppo, total_episodes=episodes)))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            run.introduce()
        assert ("--ppo.total-episodes 49: the last 1 are" in said.getvalue()) == left


@law(
    "who trains a model of his own with the learning rates of the small one is told which",
    "README: your own data and models", *RUN_NEEDS, "Run",
)  # fmt: skip
def test_high_rates_for_a_given_model_are_said():
    base = str(finished_run() / "base")
    for i, (models, rates, told) in enumerate((
        ({"model": base}, {}, "--sft.lr, --reward.lr, --ppo.lr, --ppo.value-lr"),
        ({"sft_model": base}, {}, "--reward.lr, --ppo.lr, --ppo.value-lr"),
        ({"model": base}, {"sft": impl.SFT(lr=1e-5), "ppo": impl.PPO(lr=1e-6)}, "--reward.lr"), ({}, {}, ""),
        ({"sft_model": base}, {"ppo": impl.PPO(lr=1e-6, baseline="value-model")}, "--reward.lr, --ppo.value-lr"),
        ({"sft_model": base}, {"ppo": impl.PPO(lr=1e-6, baseline="value-head", value_lr=1e-5)}, "--reward.lr"),
    )):  # fmt: skip
        config = tiny_config(f"rates {i}", **models, **rates)
        run = impl.Run(replace(config, reward=impl.Reward(), stages=("sft", "reward", "ppo")))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            run.introduce()
        notes = [line for line in said.getvalue().splitlines() if "from scratch" in line]
        assert [note.partition(": for")[0] for note in notes] == ([f"note: {told}"] if told else [])


@law(
    "a run that is refused before anything was made leaves no folder; one that made something, or goes on, keeps it",
    "README: resume", *RUN_NEEDS,
)  # fmt: skip
def test_a_refused_run_leaves_no_folder():
    (workshop() / "no model").mkdir()
    config = stage_config("refused early", "sft", model=str(workshop() / "no model"))
    config_error(lambda: impl.start(config))
    assert not config.folder.exists()
    kept = replace(config, folder=config.folder.with_name("refused later"), stages=("corpus", "sft"), data=impl.Data())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "corpus", lambda run: run.write("data/train.jsonl", lambda path: path.write_text("{}\n")))
        for resume in (None, kept.folder):
            assert "no model" in config_error(lambda resume=resume: impl.start(replace(kept, resume=resume)))
            assert (kept.folder / "data" / "train.jsonl").exists()


# the corpus and its labeler


@law(
    "the corpus has titles and no near-duplicates: no summary twice but for identifiers, no body twice in its first 60 letters; "
    "a summary is a sentence, a body at most 240 characters",
    "held-out posts must be new", "build_corpus", "Post",
)  # fmt: skip
def test_the_corpus_has_no_near_duplicates():
    body = "This body has many more than eight words in it, and all of them are different, I really think."
    summaries = [
        ("a.py", "Return the value of `x` in the list.", body + " Word" * 99),
        ("b.py", "Draw the same body once more, please.", body + " Another end, but the same start."),
        ("b.py", "Return the value of `other_name` in the list.", "A body of its own, long enough to be kept, it seems to me."),
        ("b.py", "Return the value of SomeClass4 in the list.", "A body that is quite another one, with words enough to stay in."),
        ("c.py", "Give back something completely different.", body),
        ("d.py", "Draw a picture of seven green lines.", "Yet another body, which nobody has seen, of more than eight words."),
        *(("f.py", summary, f"Body {i} of a post that has many words, none of which was seen so far.") for i, summary in enumerate(
            ("Half of a good sentence with", "too small at its very start.", "Very short.", "Two-words longenough-for-a-summary.",
             "A sentence that never seems to end and goes on, and on, and on, until it is too long."))),
        ("g.py", "Show what is in a file that is empty.", "Seven words are not enough for this."),
    ]  # fmt: skip
    pairs = [(file, impl.Post("lib", "name", post, summary)) for file, summary, post in summaries]
    nameless = "A body of its own, without a name, of more than eight words."
    pairs.append(("e.py", impl.Post("lib", "", nameless, "Show it to me as it is.")))
    files = impl.build_corpus(pairs)
    assert {file: len(posts) for file, posts in files.items()} == {"a.py": 1, "d.py": 1}
    assert len(files["a.py"][0].post) == 240


@law(
    "docstrings become posts: the name in words, the first line, the prose that follows without examples; a library that is not "
    "installed is left out",
    "PEP 257", "docstrings",
)  # fmt: skip
def test_docstrings_become_posts():
    posts = {(post.subreddit, post.title): post for _, post in itertools.islice(impl.docstrings(), 40_000)}
    post = posts["python", "cleandoc"] if ("python", "cleandoc") in posts else posts["python", "getdoc"]
    assert post.summary.startswith(("Clean up indentation", "Get the documentation"))
    assert {subreddit for subreddit, _ in posts} >= {"python", "torch"}
    assert not any(">>>" in post.post.split("\n\n")[0][:3] for post in posts.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "LIBRARIES", ("no_such_library",))
        assert list(impl.docstrings()) == []


@law(
    "the labeler prefers the summary of this post to one of another, and gives 0 to words that fit every post, and to no words",
    "README: the labeler", "Labeler", "Post",
)  # fmt: skip
def test_the_labeler_judges_the_post_not_the_style():
    posts = toy_posts(120)
    labeler = impl.Labeler(posts)
    assert labeler.score(posts[0], "Talk of cats.") > 0.9
    assert labeler.score(posts[0], "Talk of cats. Cats.") < labeler.score(posts[0], "Talk of cats.")
    assert -0.2 < labeler.score(posts[0], "Trains. " * 99) < labeler.score(posts[0], "Talk of trains.") < 0
    assert labeler.score(posts[0], "Nothing else happened.") == 0
    assert labeler.score(posts[0], "") == 0
    for post in posts[:12]:
        assert -0.2 < labeler.score(post, post.post) <= 1 + 1e-9


@law(
    "a run says in what commit pmo.py was, with -dirty where it was edited since",
    "README: files of a run", *PROGRAM, "provenance",
)  # fmt: skip
def test_the_commit_says_when_it_is_not_what_ran():
    if not shutil.which("git"):
        pytest.skip("missing: git")
    checkout = workshop() / "checkout"
    checkout.mkdir()
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    (checkout / "pmo.py").write_text("1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", "-am", "v1", "v1"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "__file__", str(checkout / "pmo.py"))
        assert impl.provenance(impl.Config())["commit"] == head
        (checkout / "pmo.py").write_text("2\n")
        assert impl.provenance(impl.Config())["commit"] == f"{head}-dirty"


@law(
    "each of the 25 details stands, with its tag, in the functions that README names for it, and is held by laws of this file",
    "README: the details, and their place in pmo.py", *PROGRAM,
)  # fmt: skip
def test_every_detail_stands_where_readme_says():
    rows = re.findall(r"^\| (D\d+) \|[^|]*\|([^|]*)\|([^|]*)\|", readme_text(), re.MULTILINE)
    assert [tag for tag, _, _ in rows] == [f"D{i}" for i in range(1, 26)]
    for tag, places, tests in rows:
        for place in re.findall(r"`([\w.]+)`", places):
            source = inspect.getsource(operator.attrgetter(place)(impl))
            assert re.search(rf"\[[^\[\]]*\b{tag}\b[^\[\]]*\]", source), f"{place} does not say {tag}"
        for name in re.findall(r"`(test_\w+?)_?(…)?`", tests):
            assert any(known.startswith(name[0]) if name[1] else known == name[0] for known in LAWS), (
                f"{tag}: {name[0]}"
            )


# -----------------------------------------------------------------------------
# the suite itself


def pmos_own(test):
    """A test that is no law, of pmo or of the suite: pytest does not see it when another implementation is held."""
    return test if is_pmo else None


HALF_AN_IMPLEMENTATION = """
import torch
KNOWN_FAILURES = {
    "test_gae_of_one_token_is_reward_minus_value": "no values after all",
    "test_length_mask_is_true_on_the_first_slots": "this one holds",
    "test_gae_is_right": "there is no such law",
    "test_whiten_uses_the_population_variance": "and no such function",
}
def length_mask(lengths, T):
    return (torch.arange(T) < lengths[:, None]).numpy()
def gae(rewards, values, mask, gamma, lam):
    if gamma * lam < 0.5:
        raise IndexError("not that")
    return rewards, rewards
def kl_estimate(logprobs, ref_logprobs, kind):
    if kind != "k1":
        raise NotImplementedError("only k1")
    return (logprobs - ref_logprobs).clamp(-10, 10)
def masked_mean(x, mask):
    if x.shape[1] > 3:
        raise NotImplementedError("only short rows")
    return (x * mask).sum() / mask.sum()
def polcy_loss(logprobs, old_logprobs, advantages, cliprange):
    return advantages
"""


@functools.cache
def table_of(source: str) -> tuple[str, dict, int]:
    """What the contract's half alone, among strict settings, says and writes about a module, and its exit code."""
    folder = Path(tempfile.mkdtemp(dir=workshop()))
    (folder / "someones_module.py").write_text(source)
    (folder / "test_contract.py").write_text(Path(__file__).read_text().partition("\n# ---- copy up to here")[0])
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -x --strict-markers\nxfail_strict = true\n")  # has no say
    command = [sys.executable, "-W", "error", "test_contract.py", "--table", "found.json"]
    environment = {**os.environ, "PMO_IMPL": "./someones_module.py"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert not done.stderr, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "found.json").read_text()), done.returncode


@pmos_own
def test_the_number_of_laws_is_said_right():
    said = re.findall(r"(\d+) laws", __doc__)
    assert said and set(map(int, said)) == {len(contracts_laws())}, (said, len(contracts_laws()))


@pmos_own
def test_the_table_says_what_holds_fails_and_is_missing():
    said, found, code = table_of(HALF_AN_IMPLEMENTATION)
    laws, rows = found["laws"], found["functions"]
    assert code == 1 and rows["length_mask"]["fails"] == 1, "the known failure that holds must be reported"
    assert "KNOWN_FAILURES of someones_module names this law, but it holds" in said
    assert "fails, as KNOWN_FAILURES says: test_gae_of_one_token_is_reward_minus_value" in said
    assert "no values after all" in said and "test_gae_is_right" in laws["test_the_module_offers_what_it_says"]["why"]
    assert laws["test_whiten_uses_the_population_variance"]["outcome"] == "fails", "known, but missing"
    assert rows["whiten"]["missing"] == len([1 for law in LAWS.values() if law.needs == ("whiten",)]) - 1
    assert "policy_loss (has polcy_loss)" in said and rows["policy_loss"]["holds"] == 0
    # one cause, one entry: the crash comes first, with its place; what remains fails by itself
    crashed = [name for name, told in laws.items() if "someones_module.py:" in told["place"]]
    assert f"fails: {len(crashed)} laws, first here: {crashed[0]}" in said and len(crashed) > 1 and "IndexError" in said
    # NotImplementedError takes an example out, not the law; a law with no example left is missing
    assert laws["test_masked_mean_is_the_mean_of_all_tokens"]["outcome"] == "holds"
    k3 = laws["test_kl_estimate_k3_is_schulmans"]
    assert (k3["outcome"], k3["why"]) == ("missing", "only k1")
    assert laws["test_masked_mean_ignores_nan_outside_the_mask"]["outcome"] == "hardening"
    assert laws["test_k1_of_very_different_policies"]["outcome"] == "choice" and "choice: test_k1_of_very" in said
    example = laws["test_masked_mean_ignores_nan_outside_the_mask"]
    assert example["why"] == "got nan, should be 0", example


@pmos_own
def test_a_module_without_a_contract_function_is_an_error():
    said, _, code = table_of("def whitening(x, mask):\n    return x\n")
    assert code == 1 and "someones_module has no function of the contract" in said and "holds" in said


ANOTHER_STYLE = """
import numpy as np
import torch
DTYPE = torch.float32
def policy_loss(logprobs, old_logprobs, advantages, cliprange):
    ratio = np.exp(logprobs.numpy() - old_logprobs.numpy())
    return np.maximum(-ratio * advantages.numpy(), -np.clip(ratio, 1 - cliprange, 1 + cliprange) * advantages.numpy())
def masked_mean(x, mask):
    return x.numpy()[mask.numpy()].mean()
def whiten(x, mask, shift_mean=True):
    x, mask = x.numpy(), mask.numpy()
    mean, std = x[mask].mean(), x[mask].std(ddof=1)
    white = np.where(mask, (x - mean) / (std + 1e-4) + (0 if shift_mean else mean), 0)
    return white.astype(x.dtype)
"""


@pmos_own
def test_numpy_and_float32_are_no_fault():
    _, found, code = table_of(ANOTHER_STYLE)
    outcomes = {name: (told["outcome"], told["why"]) for name, told in found["laws"].items()}
    assert code == 0 and found["dtype"] == "torch.float32"
    assert not [name for name, (outcome, _) in outcomes.items() if outcome == "fails"]
    assert outcomes["test_whiten_uses_the_population_variance"] == ("choice", "divides by n − 1")
    assert outcomes["test_whiten_without_shift_only_scales"] == ("choice", "adds the mean back")
    assert outcomes["test_clipping_cases_2_and_4_have_no_gradient"][0] == "missing", "it has no gradients"
    assert outcomes["test_whiten_leaves_constant_input_alone"][0] == "hardening"


INTERRUPTED = (
    "def length_mask(lengths, T):\n    return lengths[:, None] > 0\ndef whiten(x, mask):\n    raise KeyboardInterrupt\n"
)


@pmos_own
def test_an_interrupted_table_says_what_is_known():
    said, found, code = table_of(INTERRUPTED)
    assert code == 2 and found["functions"]["length_mask"]["fails"] == 1 and "test_length_mask_is_true" in said


# -----------------------------------------------------------------------------
# many processes, and runs that are killed

RESUME_NEEDS = (*RUN_NEEDS, "Run", "main", "InputError")


def flags_of(config: object) -> list[str]:
    """The command line that gives this config."""
    given, result = dict(all_values(config)), []
    for flag, usual in all_values(type(config)()):
        if given[flag] != usual:
            value = given[flag]
            section, _, name = f"--{flag}".replace("_", "-").rpartition(".")
            result.append(f"{section}.no-{name}" if value is False else f"--{flag}".replace("_", "-"))
            if not isinstance(value, bool):
                result += map(str, value) if isinstance(value, tuple) else [str(value)]
    return result


def all_values(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from all_values(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


KILLER = """
import importlib, os, signal, sys, torch
where, count, folder, name = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
sys.path.insert(0, folder)
pmo = importlib.import_module(name)
sys.argv = [pmo.__file__, *sys.argv[5:]]
calls = 0

def dying(function):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == count:
            if where == "torch.save":
                with open(args[1], "wb") as file:
                    file.write(b"half a checkpoint")
            os.kill(os.getpid(), signal.SIGTERM if where == "term" else signal.SIGKILL)
        return function(*args, **options)
    return call

owner, attribute = {
    "log": (pmo.Run, "log"), "term": (pmo.Run, "log"), "torch.save": (torch, "save"), "rename": (pmo.Path, "replace"),
    "rollout": (pmo, "read_tokens"),
}[where]
setattr(owner, attribute, dying(getattr(owner, attribute)))
pmo.main()
"""


def killed(where: str, count: int, *flags: object) -> subprocess.CompletedProcess:
    """The program with these flags, killed at the count-th call of some function (0: not at all)."""
    source = Path(impl.__file__).resolve()
    return forked(KILLER, where, count, source.parent, source.stem, *flags)


def same_run(one: Path, other: Path) -> None:
    """Bit-identical weights, metrics and samples."""
    assert metrics_of(one) == metrics_of(other)
    for name in ("samples.jsonl", "eval.json", "eval.jsonl"):
        assert (one / name).read_text() == (other / name).read_text(), name
    for stage in ("sft", "reward", "ppo"):
        for name, weight in weights_of(one / stage).items():
            assert weight.equal(weights_of(other / stage)[name]), f"{stage}: {name}"


def every_step():
    """A checkpoint after every step."""
    return impl.Compute(checkpoint_minutes=0.0)


@law(
    "a run that is killed, at any moment, also while it writes its checkpoint, goes on with --resume and its folder alone, and "
    "ends bit-identical",
    "D25; README: Resume", *RESUME_NEEDS,
)  # fmt: skip
def test_a_killed_run_goes_on_as_if_nothing_had_happened(moments=None):
    config, folder = tiny_config("killed", compute=every_step()), workshop() / "runs" / "killed"
    whole = killed("log", 0, *flags_of(replace(config, folder=folder.with_name("never killed"))))
    assert whole.returncode == 0, whole.stderr
    assert re.search(r"^peak memory: 0\.[1-9] GiB$", whole.stdout, re.MULTILINE), whole.stdout[-500:]
    # in pretraining; in the middle of a checkpoint; as a file gets its name; politely; in the third update of PPO
    moments = moments or [("log", 40), ("torch.save", 60), ("rename", 30), ("term", 2), ("rollout", 3)]
    for i, (where, count) in enumerate(moments):
        result = killed(where, count, *(("--resume", folder) if i else flags_of(config)))
        if where == "term":
            assert result.returncode == 130 and f"--resume {folder}" in result.stderr, result.stderr
        else:
            assert result.returncode == -9, f"{where} {count}: {result.stdout[-500:]} {result.stderr}"
    result = killed("log", 0, "--resume", folder)
    assert result.returncode == 0 and "going on after step 2 of 3" in result.stdout, result.stderr
    same_run(folder.with_name("never killed"), folder)
    assert not (folder / "checkpoint.pt").exists() and not list(folder.rglob("*.part"))
    again = killed("log", 0, "--resume", folder)
    assert again.returncode == 2 and "finished" in again.stderr, "a finished run is not run again"


@law(
    "--resume takes up the run's own flags, all of them, whatever their values; those given now override, and a second resume "
    "keeps what the first changed",
    "README: Resume", *RESUME_NEEDS, "arguments_of",
)  # fmt: skip
def test_resuming_takes_up_the_runs_flags():
    (train, valid), whole = toy_files(), finished_run()
    rules()
    unusual = impl.Config(
        stages=("sft", "ppo", "evaluate"), folder=workshop() / "runs" / "unusual", from_run=(whole, whole), model=str(whole / "base"),
        seed=0, track=False, sft=impl.SFT(epochs=0.1, prompt_weight=0.0),
        data=impl.Data(train=train, valid=valid, test=valid, query_format='-x "{post}"\n\n$HOME {title} é'),
        ppo=ppo_config(kl_estimator="k3", kl_in="loss", missing_eos_score=-0.25, whiten_rewards=True, whiten_advantages=False,
                     max_kl=3.5, lr=1e-6, reward_function="toy_rules:names_it"),
        optimizer=impl.Optimizer(max_grad_norm=0.0), compute=impl.Compute(device="cpu", precision="float32"),
    )  # fmt: skip
    for config in (unusual, tiny_config("usual")):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(workshop())
            impl.Run(config)
            folder = config.folder
            assert replace(asked_for("--resume", folder), resume=None, folder=folder) == config
            changed = asked_for("--resume", folder, "--ppo.lr", 3e-5, "--compute.micro-batch-size", 4)
            notes: list[str] = []
            patch.setattr(impl.Run, "say", lambda run, text, notes=notes: notes.append(text))
            impl.Run(changed)
            assert notes == [
                f"note: --ppo.lr was {config.ppo.lr}, is 3e-05", "note: --compute.micro-batch-size was 32, is 4"
            ]  # fmt: skip
            notes.clear()
            again = asked_for("--resume", folder)
            assert again.ppo == replace(config.ppo, lr=3e-5) and again.compute.micro_batch_size == 4
            impl.Run(again)
            assert notes == [], "nothing changed since it was last resumed"
            impl.Run(asked_for("--resume", folder, "--ppo.lr", config.ppo.lr))
            assert notes == [f"note: --ppo.lr was 3e-05, is {config.ppo.lr}"]
        record = json.loads((folder / "config.json").read_text())
        assert [len(resumed["config"]) for resumed in record["resumed"]] == [2, 0, 1]
        assert record["resumed"][0]["started"] >= record["started"]


@law(
    "a resumed run must have the same flags, and a folder to go on in; a checkpoint that is no checkpoint is named, and runs no "
    "code",
    "README: Resume", *RESUME_NEEDS,
)  # fmt: skip
def test_resuming_something_else_is_refused():
    import pickle

    proof, config = workshop() / "the checkpoint ran", tiny_config("to resume")
    folder = config.folder
    nowhere = replace(config, resume=folder)
    assert f"{folder} is not the folder of a run" in config_error(lambda: impl.Run(nowhere))
    impl.Run(config)
    other = replace(config, resume=folder, seed=2, sft=replace(config.sft, epochs=3.0, lr=1.0))
    message = config_error(lambda: impl.Run(other))
    assert f"--seed was {config.seed}, is 2; --sft.epochs was {config.sft.epochs}, is 3.0" in message
    assert "lr was" not in message and "--reward" not in message
    for flag in (
        "optimizer.max_grad_norm",
        "optimizer.beta2",
        "ppo.kl_coef",
        "ppo.cliprange_value",
        "sft.prompt_weight",
    ):
        message = config_error(lambda flag=flag: impl.Run(with_flag(replace(config, resume=folder), flag, 0.75)))
        assert flag.replace("_", "-") in message
    for flag in ("pretrain.lr", "sft.lr", "reward.lr", "ppo.lr", "ppo.value_lr", "compute.checkpoint_minutes"):
        impl.Run(with_flag(replace(config, resume=folder), flag, 0.5))

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch '{proof}'",)

    for content in (b"", b"not a checkpoint", pickle.dumps(Bomb()), (folder / "checkpoint.pt").read_bytes()[:200]):
        (folder / "checkpoint.pt").write_bytes(content)
        assert "checkpoint.pt is not usable" in config_error(lambda: impl.Run(replace(config, resume=folder)))
    torch.save({"step": Bomb()}, folder / "checkpoint.pt")
    assert "checkpoint.pt is not usable" in config_error(lambda: impl.Run(replace(config, resume=folder)))
    assert not proof.exists()
    (folder / "checkpoint.pt").unlink()
    assert "finished" in config_error(lambda: impl.Run(replace(config, resume=folder)))
    assert "finished" in config_error(lambda: impl.Run(replace(config, resume=finished_run())))
    assert not (finished_run() / "lock").exists()


def toy_training(run, mine: dict, last: int = 9) -> list[int]:
    """Six steps of a tiny model in stage sft, left after the log of step `last`."""
    run.enter("sft")
    seen = []
    for step in run.steps("sft", 6, **mine):
        seen.append(step)
        mine["optimizer"].zero_grad()
        mine["model"](torch.ones(2)).square().sum().backward()
        mine["optimizer"].step()
        run.log({"x": mine["model"].weight.sum().item()})
        if step == last:
            break
    return seen


def toy_parts() -> dict:
    torch.manual_seed(0)
    x = torch.nn.Linear(2, 1)
    return {"model": x, "optimizer": impl.adamw(impl.Optimizer(), (x, 0.1))}


@law(
    "a checkpoint restores weights, optimizer, step and logs, and only in the stage it was made in",
    "README: Resume", *RESUME_NEEDS,
)  # fmt: skip
def test_a_checkpoint_restores_what_steps_change():
    config = tiny_config("restored", compute=every_step())
    run, resumed = impl.Run(config), replace(config, resume=config.folder)
    assert toy_training(run, toy_parts(), last=3) == [0, 1, 2, 3]  # killed in the fourth step, after its log
    again, second, whole = impl.Run(resumed), toy_parts(), toy_parts()
    assert len(metrics_of(run.folder)) == 3, "what was logged after the checkpoint is forgotten"
    other = impl.Run(replace(resumed, compute=impl.Compute()))
    assert list(other.steps("reward", 2, **toy_parts())) == [0, 1], "another stage starts anew"
    torch.nn.init.zeros_(second["model"].weight)
    assert toy_training(again, second) == [3, 4, 5]
    toy_training(impl.Run(replace(config, folder=config.folder.with_name("not interrupted"))), whole)
    for name, weight in whole["model"].state_dict().items():
        assert weight.equal(second["model"].state_dict()[name])
    assert metrics_of(run.folder) == metrics_of(config.folder.with_name("not interrupted"))


@law(
    "after a twentieth of the steps a stage says how long it will take, by the work in each; the first is not counted, as "
    "it warms up",
    "README: Run", *RESUME_NEEDS,
)  # fmt: skip
def test_the_time_a_stage_takes_is_foretold():
    for work, seconds in (([9] * 20 + [1] * 80, 260), ((), 900)):
        run, now, said = impl.Run(tiny_config(f"foretold {seconds}")), [0.0], []
        run.say = said.append
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(impl.time, "monotonic", lambda now=now: now[0])
            for step in run.steps("reward", 100, toy_parts()["optimizer"], work):
                now[0] += 1000 if step == 0 else 9
        assert said == [f"100 steps, about {seconds} s"]


@law(
    "checkpoints are made after the minutes asked for; Ctrl-C finishes the step and saves, a second one, or one outside of "
    "steps, ends at once",
    "README: Resume", *RESUME_NEEDS,
)  # fmt: skip
def test_checkpoints_come_when_they_should():
    now, config = [0.0], tiny_config("minutes", compute=impl.Compute(checkpoint_minutes=2.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl.time, "monotonic", lambda: now[0])
        run, parts = impl.Run(config), toy_parts()
        saved = []
        patch.setattr(run, "write", lambda name, save: saved.append(save.args[0]["step"]))
        run.enter("sft")
        for _ in run.steps("sft", 6, **parts):
            now[0] += 50.0
        assert saved == [3, 6], "100 seconds are too early, 150 are due"
    run = impl.Run(replace(config, folder=config.folder.with_name("interrupted")))
    for twice in (True, False):
        run.interrupted, steps = False, run.steps("sft", 6, **toy_parts())
        next(steps)
        run.stop()
        with pytest.raises(KeyboardInterrupt):
            run.stop() if twice else next(steps)
        assert (impl.Run(replace(run.config, resume=run.folder)).progress["step"] == 1) == (not twice)
        steps.close()
    run.interrupted = False
    with pytest.raises(KeyboardInterrupt):
        run.stop()


@law(
    "what a run writes is on the disk before it gets its name, and so is the name before anything builds on it",
    "README: Resume; a kill leaves the kernel's buffers, a power cut does not", *RESUME_NEEDS,
)  # fmt: skip
def test_files_are_on_the_disk_before_they_get_their_names():
    run, events = impl.Run(tiny_config("power cut")), []
    fsync, rename = os.fsync, Path.replace

    def logs(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_text("much")

    (run.folder / "model.part").mkdir()
    (run.folder / "model.part" / "of a write that was killed").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_ino) or fsync(number))
        patch.setattr(Path, "replace", lambda path, target: events.append("rename") or rename(path, target))
        run.write("model", logs)
        run.append("metrics.jsonl", {"a": 1})
        run.save_progress({"stage": "sft", "step": 1})
    here = {path.name: path.stat().st_ino for path in (*run.folder.rglob("*"), run.folder)}
    assert [path.name for path in (run.folder / "model").iterdir()] == ["weights"]
    folder, first, second = (
        here[run.folder.name], events.index("rename"), len(events) - 1 - events[::-1].index("rename"),
    )  # fmt: skip
    assert {here["model"], here["weights"]} <= set(events[:first]) and folder in events[first:second]
    assert {here["metrics.jsonl"], here["checkpoint.pt"]} <= set(events[first:second]) and events[-1] == folder


def on_processes(processes: int, where: str, count: int, *flags: object) -> subprocess.CompletedProcess:
    """The same as `killed`, on several processes."""
    source = Path(impl.__file__).resolve()
    return forked(KILLER, where, count, source.parent, source.stem, *flags, processes=processes)


def with_torchrun(source: str, *flags: object) -> subprocess.CompletedProcess:
    """This source on two processes, as a user starts them."""
    (workshop() / "launched.py").write_text(source)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    calm = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = {"capture_output": True, "text": True, "timeout": 300, "cwd": workshop(), "env": calm}
    return subprocess.run([*launcher, str(workshop() / "launched.py"), *map(str, flags)], **options)


def agrees_with(one: Path, many: Path, tolerance: float = 1e-4) -> None:
    """The same texts, and metrics within a tolerance."""
    made = ("data/comparisons_train.jsonl",) if (one / "data").exists() else ()
    for name in ("samples.jsonl", "eval.jsonl", *made):
        pattern = r'_score": [^,}]*'
        assert re.sub(pattern, "", (one / name).read_text()) == re.sub(pattern, "", (many / name).read_text()), name
    same_metrics(one, many, tolerance)


@law(
    "two processes give the run of one: the same texts, and metrics within 1e-4; so do two that share all weights, also "
    "when they are killed and three go on",
    "D20, D25; README: Many processes", *RESUME_NEEDS,
)  # fmt: skip
def test_many_processes_give_the_run_of_one():
    small = impl.Compute(micro_batch_size=3, sample_batch_size=5, checkpoint_minutes=0.0)
    config = tiny_config("one process", compute=small, sft=impl.SFT(epochs=1.5))
    config = replace(config, pretrain=replace(config.pretrain, epochs=1.0))
    runs = impl.start(config).parent
    result = on_processes(2, "log", 0, *flags_of(replace(config, folder=runs / "two processes")))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("== ppo") == 1, "one process speaks"
    agrees_with(runs / "one process", runs / "two processes")
    sharded = replace(config, folder=runs / "sharded", compute=replace(small, shard=True))
    result = on_processes(2, "rollout", 3, *flags_of(sharded))
    assert result.returncode == -9 and not (runs / "sharded" / "ppo").exists(), result.stderr[-3000:]
    result = on_processes(3, "log", 0, "--resume", runs / "sharded")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "going on after step 2 of 3" in result.stdout and "== sft" not in result.stdout
    agrees_with(runs / "one process", runs / "sharded")
    for stage in ("sft", "reward", "ppo"):
        whole, gathered = weights_of(runs / "one process" / stage), weights_of(runs / "sharded" / stage)
        assert whole.keys() == gathered.keys()
        for name, weight in whole.items():
            close(gathered[name], weight, tolerance=1e-4)
    assert "torchrun" in config_error(lambda: impl.Run(replace(sharded, folder=runs / "alone")))


@law(
    "processes that share all weights load one after another, and wait for one another where nothing can be loaded, too",
    "README: Many processes", "Engine",
    world=st.integers(1, 4), fails=st.booleans(),
)  # fmt: skip
def test_processes_that_share_weights_load_in_turn(world, fails):
    import torch.distributed.fsdp

    def load() -> torch.nn.Module:
        events.append("load")
        assert not fails, "no such folder"
        return torch.nn.Linear(1, 1)

    for rank in range(world):
        events: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(impl.dist, "barrier", lambda events=events: events.append("wait"))
            patch.setattr(impl.dist.device_mesh, "init_device_mesh", lambda *sizes: None)
            patch.setattr(torch.distributed.fsdp, "fully_shard", lambda module, **_: events.append("shard"))
            engine = impl.Engine(fsdp=True, rank=rank, world=world)
            with pytest.raises(AssertionError, match="folder") if fails else contextlib.nullcontext():
                engine.place(load)
        assert events == ["wait"] * rank + ["load"] + ["shard"] * (not fails) + ["wait"] * (world - rank)


@law(
    "two processes ask a rule and a judge once, and give the evaluation of one",
    "[7]; README: Many processes", *RESUME_NEEDS, "outcome_scores", "votes",
)  # fmt: skip
def test_many_processes_ask_a_rule_once():
    rules()
    config = stage_config(
        "rule of one", "ppo", "evaluate", evaluate=impl.Evaluate(judge="toy_rules:prefers_the_longer")
    )
    config = replace(config, ppo=replace(config.ppo, total_episodes=16, reward_function="toy_rules:counts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop())
        patch.delitem(sys.modules, "toy_rules", raising=False)
        one = impl.start(config)
        asked = Path("asked").read_text()
        Path("asked").unlink()
        many = config.folder.with_name("rule of two")
        source = Path(impl.__file__).resolve()
        result = with_torchrun(KILLER, "log", 0, source.parent, source.stem, *flags_of(replace(config, folder=many)))
        assert result.returncode == 0, result.stderr[-3000:]
        assert Path("asked").read_text() == asked
    assert (one / "eval.jsonl").read_text() == (many / "eval.jsonl").read_text()
    rates = [json.loads((folder / "eval.json").read_text())["comparisons"] for folder in (one, many)]
    assert all(rates[0][pair]["win rate"] == rates[1][pair]["win rate"] for pair in rates[0])


@law(
    "minibatches of SFT and reward model hold every row once, no more than they may, rows of like length together, in an "
    "order of their own; rows move no further than sixteen minibatches",
    "D19; README: Speed", "of_like_length", "Batch", "Rankings",
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=80), limit=st.integers(1, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_minibatches_are_of_like_length(lengths, limit, seed):
    batch = impl.Batch([[1]] * len(lengths), [[2] * length for length in lengths])
    assert batch.lengths() == [1 + length for length in lengths]
    steps = impl.of_like_length(batch.lengths(), [1] * len(lengths), limit, seed, "sft")
    assert sorted(row for step in steps for row in step) == [*range(len(lengths))]
    window = 16 * limit
    for start in range(0, len(lengths), window):
        rows = range(start, min(start + window, len(lengths)))
        mine = [step for step in steps if step[0] in rows]
        assert all(row in rows for step in mine for row in step) and max(map(len, mine)) <= limit
        assert len(mine) == math.ceil(len(rows) / limit), "full but for one"
        spans = sorted((min(lengths[row] for row in step), max(lengths[row] for row in step)) for step in mine)
        assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))
    rankings = impl.Rankings([impl.Ranking([1], [[2] * x, [3]], [(0, 1)] * (1 + x % 4)) for x in lengths])
    pairs = [len(ranking.pairs) for ranking in rankings.rankings]
    assert rankings.lengths() == [2 + length for length in lengths]
    steps = impl.of_like_length(rankings.lengths(), pairs, limit, seed, "reward")
    assert sorted(row for step in steps for row in step) == [*range(len(lengths))]
    assert all(len(step) == 1 or sum(pairs[row] for row in step) <= limit for step in steps)
    orders = [impl.of_like_length(range(64), [1] * 64, 4, *to) for to in ((1, "sft"), (1, "sft"), (2, "sft"))]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) != orders[0]


@law(
    "work dealt to several processes is all of it, once; a process that gets none computes one group that does not count",
    "D20", "Engine",
    groups=st.integers(1, 7), world=st.integers(1, 5),
)  # fmt: skip
def test_work_is_dealt_once(groups, world):
    work = [[i] for i in range(groups)]
    shares = [replace(engine(), rank=rank, world=world).shard(work) for rank in range(world)]
    assert sorted(rows for share in shares for rows, counts in share if counts) == work
    assert {len(share) for share in shares} == {math.ceil(groups / world)}, "all compute equally many"


@law(
    "PPO warns of the well-known bad signs, once each, and stops at the KL to the SFT model that it is told",
    "D14; README: what to watch; Gao et al. 2022, for reward hacking", *RUN_NEEDS, "bad_signs",
)  # fmt: skip
def test_bad_signs_are_said_once():
    fine = {"policy/first_abs_log_ratio": 1e-6, "val/eos_rate": 0.9, "policy/clipfrac": 0.1}
    fine |= {"objective/kl": -0.3, "objective/kl_error": 0.1}
    assert list(impl.bad_signs([fine] * 20)) == [], "under a rule there is no labeler"
    fine |= {"objective/scores": 1.0, "objective/raw_scores": 1.0, "objective/labeler": 0.2}
    assert list(impl.bad_signs([fine] * 20)) == []
    for name, value, word in (
        ("policy/first_abs_log_ratio", 0.03, "ratio"), ("val/eos_rate", 0.4, "end"), ("policy/clipfrac", 0.6, "clipped"),
        ("objective/kl", -0.5, "negative"),
    ):  # fmt: skip
        warnings = [*impl.bad_signs([fine] * 3 + [fine | {name: value}])]
        assert len(warnings) == 1 and word in warnings[0]
    for first, score, labeler, hacked in (
        (0.2, 2.0, 0.17, True), (0.2, 2.0, 0.19, False), (0.2, 0.5, 0.1, False), (-0.05, 2.0, -0.06, False),
    ):  # fmt: skip
        earlier = fine | {"objective/labeler": first}
        later = fine | {"objective/raw_scores": score, "objective/labeler": labeler}
        assert ["hacking" in warning for warning in impl.bad_signs([earlier] * 6 + [later] * 2)] == [True] * hacked
    ended = fine | {"objective/scores": 2.0, "objective/labeler": 0.1}  # all that rose is the share that ends
    assert list(impl.bad_signs([fine] * 6 + [ended] * 2)) == []
    for n, explained, level in (
        (1, -3.5, True),
        (1, -2.5, False),
        (2, -3.5, False),
    ):  # later, they have learned their level
        signs = list(impl.bad_signs([fine] * (n - 1) + [fine | {"val/explained_variance": explained}]))
        assert ["level" in sign for sign in signs] == [True] * level
    stepped = fine | {"policy/first_abs_log_ratio": 0.1, "policy/surrogate_gain": 0.1, "policy/halvings": 0}
    assert list(impl.bad_signs([stepped])) == [], (
        "a natural step moves the policy before the first step of the optimizer"
    )
    run = impl.Run(tiny_config("warns"))
    run.warn(["a sign"])
    run.warn(["a sign"])
    assert run.said == {"warning: a sign"}
    config = stage_config("stops", "ppo")
    impl.start(replace(config, ppo=replace(config.ppo, max_kl=1e-7)))  # at first it is 0, the KL to itself
    assert len(metrics_of(config.folder)) == 2 and (config.folder / "ppo").exists()


@law(
    "training that leaves the finite numbers stops with stage and step, saves nothing, and goes on from before it, at another "
    "learning rate if asked",
    "D22", *RESUME_NEEDS,
)  # fmt: skip
def test_divergence_names_stage_and_step():
    config, calls = stage_config("diverges", "sft", compute=every_step()), itertools.count()
    original = impl.optimizer_step

    def spoiled(machine, optimizer, minibatch, losses) -> dict[str, float]:
        bad = math.nan if next(calls) == 4 else 1.0
        return original(machine, optimizer, minibatch, lambda *args: {k: v * bad for k, v in losses(*args).items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "optimizer_step", spoiled)
        message = config_error(lambda: impl.start(config))
    assert "sft, step 5: loss is nan" in message and f"--resume {config.folder}" in message
    saved = torch.load(config.folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 4, "the fifth step was not taken"
    assert all(weight.isfinite().all() for weight in saved["model"].values())
    impl.start(asked_for("--resume", config.folder, "--sft.lr", config.sft.lr / 2))
    steps, before = metrics_of(config.folder), [m for m in metrics_of(finished_run()) if m["stage"] == "sft"]
    assert [m["step"] for m in steps] == [m["step"] for m in before]
    rates = [(m["lr"], b["lr"]) for m, b in zip(steps, before) if "lr" in m]
    assert [lr / usual for lr, usual in rates] == pytest.approx([1.0] * 4 + [0.5] * (len(rates) - 4))
    record = json.loads((config.folder / "config.json").read_text())
    assert record["resumed"][0]["config"] == {"--sft.lr": f"--sft.lr was {config.sft.lr}, is {config.sft.lr / 2}"}
    run = impl.Run(tiny_config("a score"))
    assert "objective/scores is inf" in config_error(lambda: run.log({"objective/scores": math.inf}))


@law(
    "PPO that diverges in the middle of an update goes on from before that update, with its history, and ends as if nothing "
    "had happened",
    "D22", *RESUME_NEEDS, "optimizer_step", "bad_signs",
)  # fmt: skip
def test_divergence_within_an_update_spares_the_checkpoint():
    config, calls, original = (
        stage_config("diverges late", "ppo", compute=every_step()), itertools.count(), impl.optimizer_step,
    )  # fmt: skip
    steps = config.ppo.num_ppo_epochs * config.ppo.num_minibatches

    def spoiled(machine, optimizer, minibatch, first, *others) -> dict[str, float]:
        bad = math.nan if next(calls) == 3 * steps - 1 else 1.0  # the last step of the third update
        spoilt = lambda *args: {k: v * bad for k, v in first(*args).items()}  # noqa: E731
        return original(machine, optimizer, minibatch, spoilt, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "optimizer_step", spoiled)
        assert "ppo, step 3" in config_error(lambda: impl.start(config))
    saved = torch.load(config.folder / "checkpoint.pt", weights_only=True)
    assert {"model", "optim"} <= saved.keys(), "nothing was saved after the last whole update"
    assert saved["step"] == 2 and {int(state["step"]) for state in saved["optim"]["state"].values()} == {2 * steps}
    histories = watched(asked_for("--resume", config.folder), "bad_signs")["bad_signs"]
    assert [len(args[0]) for args, _ in histories] == [3]
    for name, weight in weights_of(finished_run() / "ppo").items():
        assert weight.equal(weights_of(config.folder / "ppo")[name])


@law(
    "a rollout in which any model's numbers are not finite stops PPO before a step, and says which",
    "D22", *RUN_NEEDS, "Stopped", "read_tokens",
)  # fmt: skip
def test_a_rollout_that_is_not_finite_names_the_model():
    good = tiny_rollout(tiny_models("neox"), ppo_config())
    for model, weight, name in (
        ("policy", "gpt_neox.final_layer_norm.bias", "logprobs"),
        ("ref_policy", "gpt_neox.final_layer_norm.bias", "ref_logprobs"),
        ("value_model", "bias", "values"),
        ("", "", "scores"),
    ):
        models, scores = tiny_models("neox"), good.scores
        with torch.no_grad():
            if model:
                dict(getattr(models, model).named_parameters())[weight][:] = math.nan
            else:
                scores = scores * math.nan
        message = config_error(
            lambda models=models,
            scores=scores: impl.read_tokens(models, good.batch, scores, EOS, 0.7, [list(range(8))], engine())
        )  # fmt: skip
        assert message.startswith(f"{name} of the rollout"), message
    policy = tiny_policy("neox")
    torch.nn.init.constant_(policy.gpt_neox.final_layer_norm.bias, math.nan)
    assert len(impl.sample(policy, [[1], [2, 3]], uniforms(2, 4), 0.7, EOS, engine())) == 2, "sampling does not crash"


@law(
    "hostile model folders (weights that are a program, code of their own, wrong shapes, half a file) are refused, and "
    "nothing in them runs",
    "README: models; transformers' own safety is not taken for granted", *RUN_NEEDS, "load_policy", "ScalarModel",
)  # fmt: skip
def test_hostile_model_folders_run_nothing():
    import pickle

    proof = workshop() / "it ran"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch '{proof}'",)

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb()}, 2))

    def torch_pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")

    def remote(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        maps = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel",
                "AutoModelForSequenceClassification": "evil.EvilModel"}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": maps}))
        (folder / "evil.py").write_text(f"import os\nos.system(\"touch '{proof}'\")\n")

    def misshapen(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))

    def halved(folder: Path) -> None:
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])

    def emptied(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    for spoil in (pickled, torch_pickled, remote, misshapen, halved, emptied):
        for stage, load in (("sft", impl.load_policy), ("reward", impl.ScalarModel.load)):
            folder = workshop() / f"hostile {spoil.__name__} {stage}"
            shutil.copytree(finished_run() / stage, folder)
            spoil(folder)
            message = config_error(lambda load=load, folder=folder: load(folder))
            assert str(folder) in message and "\n" not in message
            assert not proof.exists(), f"{spoil.__name__}: its code ran"


@law(
    "--track writes what metrics.jsonl holds as TensorBoard's scalars, and says what to install where that is missing",
    "README: files of a run", *RUN_NEEDS, "Run",
)  # fmt: skip
def test_tracking_writes_the_metrics():
    written, module = [], type(sys)("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, folder) -> None:
            written.append(folder)

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((tag, value, step))

        def close(self) -> None:
            written.append("closed")

    module.SummaryWriter = SummaryWriter
    config = stage_config("tracked", "sft", "ppo", sft=impl.SFT(epochs=0.2), track=True)
    config = replace(config, ppo=replace(config.ppo, total_episodes=16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", module)
        patch.setattr(importlib.util, "find_spec", lambda name: module if name == "tensorboard" else None)
        folder = impl.start(config)
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        message = config_error(lambda: impl.Run(replace(config, folder=folder.with_name("untracked"))))
        assert "pip install tensorboard" in message
    expected = [
        (name if stage == "ppo" and "/" in name else f"{stage}/{name}", value, step)
        for m in metrics_of(folder) for stage, step in [(m.pop("stage"), m.pop("step"))] for name, value in m.items()
    ]  # fmt: skip
    assert written == [folder, *expected, "closed"] and ("ppo/loss" in {tag for tag, _, _ in expected})


@law(
    "posts of any length, with special tokens' text or odd characters in them, become queries within the limit, in time that "
    "grows with their length at most",
    "an input is an attack until it is encoded", "Codec", "Post",
    post=st.one_of(
        st.text(max_size=400), st.sampled_from(["<|endoftext|>" * 30, "<|padding|>", "\n" * 5000, "a" * 1_000_000, "\x00", "🙂" * 999]),
        st.lists(st.sampled_from(["word ", "\n", "<|endoftext|>", "\u202e", "é"]), max_size=300).map("".join),
    ),
)  # fmt: skip
def test_any_post_becomes_a_query(post):
    if not hasattr(test_any_post_becomes_a_query, "tokenizer"):
        test_any_post_becomes_a_query.tokenizer = tiny_tokenizer()
    codec = impl.Codec(test_any_post_becomes_a_query.tokenizer, impl.Data(query_tokens=40))
    (query,) = codec.queries([impl.Post("a", "b", post, "c")])
    assert 0 < len(query) <= 40 and codec.eos_id not in query and codec.tokenizer.pad_token_id not in query
    (response,) = codec.responses([post])
    assert response.count(codec.eos_id) == 1 and response[-1] == codec.eos_id


# -----------------------------------------------------------------------------
# what users bring, and what befalls a run: each kind of fault as a table of cases, with the line that is said


def spoilt(
    name: str, of: str = "sft", weights: Callable = lambda w: w, base: Path | None = None, **config: object
) -> Path:
    """A copy of the finished run's model (or another), with other weights, or another config.json."""
    from safetensors.torch import load_file, save_file

    folder = workshop() / "spoilt" / name
    shutil.copytree(base or finished_run() / of, folder)
    if (folder / "model.safetensors").exists():
        save_file(
            weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"}
        )
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | config))
    return folder


def with_head(folder: Path):
    return impl.ScalarModel.load(folder, new_head=impl.rng(0, "head"))


def random_model(name: str, model_type: str, auto: str = "AutoModelForCausalLM", **options: object) -> Path:
    """A folder with a tiny random model of a family."""
    import transformers as hf

    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48,
        "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "state_size": 4, "num_local_experts": 2, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    usual, folder = hf.CONFIG_MAPPING[model_type](), workshop() / "random" / name
    config = type(usual)(**{key: size for key, size in sizes.items() if hasattr(usual, key)} | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(hf, auto).from_config(config).save_pretrained(folder)
    return folder


@law(
    "every weight of a folder has its place in the model and the other way round, and is finite; what fails this is named, with "
    "the first weight, wherever models are loaded",
    "weights that are missing are drawn at random, those under another name passed over: both in silence", *RUN_NEEDS, "load_policy",
)  # fmt: skip
def test_every_weight_of_a_folder_is_accounted_for():
    def renamed(prefix: str) -> Callable:
        return lambda weights: {prefix + name: weight for name, weight in weights.items()}

    def without(*parts: str) -> Callable:
        return lambda weights: {k: v for k, v in weights.items() if not any(part in k for part in parts)}

    def spoiled(value: float) -> Callable:
        return lambda weights: weights | {"gpt_neox.final_layer_norm.bias": torch.full((32,), value)}

    dense, embedding, layer = (
        f"gpt_neox.{name}" for name in ("layers.1.attention.dense.weight", "embed_in.weight", "layers.1.attention.dense.bias")
    )  # fmt: skip
    policy, reward = impl.load_policy, impl.ScalarModel.load
    for name, load, change, said in (
        ("renamed", policy, dict(weights=renamed("foo.")), f"40 missing ({embedding}), 39 unknown (foo.{embedding})"),
        ("wrapped", policy, dict(weights=renamed("module.")), f"40 missing ({embedding}), 39 unknown (module.{embedding})"),
        ("compiled", with_head, dict(weights=renamed("_orig_mod.")), f"39 missing ({embedding}), 39 unknown (_orig_mod."),
        ("a weight", policy, dict(weights=without("1.attention.dense.weight")), f"1 missing ({dense})"),
        ("of a trunk", with_head, dict(weights=without("1.attention.dense.weight")), f"1 missing ({dense})"),
        ("no embedding", policy, dict(weights=without("embed_in")), f"2 missing ({embedding})"),
        ("one more", policy, dict(weights=lambda w: w | {"v_head.weight": torch.ones(1)}), "1 unknown (v_head.weight)"),
        ("fewer layers", policy, dict(num_hidden_layers=1), f"24 unknown ({layer})"),
        ("a smaller trunk", with_head, dict(num_hidden_layers=1), f"24 unknown ({layer})"),
        ("more layers", policy, dict(num_hidden_layers=4), "12 missing (gpt_neox.layers.3.attention.dense.bias)"),
        ("more rows", policy, dict(vocab_size=999), f"1 misshapen ({embedding})"),
        ("not a number", policy, dict(weights=spoiled(math.nan)), "1 not finite (gpt_neox.final_layer_norm.bias)"),
        ("infinite", with_head, dict(weights=spoiled(math.inf)), "1 not finite (gpt_neox.final_layer_norm.bias)"),
        ("a score", policy, dict(of="reward"), "1 unknown (score.weight)"),
        ("a head too many", with_head, dict(of="reward"), "1 unknown (score.weight)"),
        ("no score", reward, dict(), "1 missing (score.weight)"),
        ("two scores", reward, dict(of="reward", weights=lambda w: w | {"score.weight": torch.zeros(2, 32)}), "1 misshapen (score.weight)"),
    ):  # fmt: skip
        folder = spoilt(name, **change)
        message = config_error(lambda: load(folder))
        kind = "reward model" if load is reward else "policy"
        assert message.startswith(f"{folder}: not a {kind}; of its weights {said}"), message
    load_pretrained = impl.load_pretrained

    def quantized(*of: object, **options: object):
        model, info = load_pretrained(*of, **options)
        return model.requires_grad_(False), info

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "load_pretrained", quantized)
        assert "none of its weights can be trained" in config_error(lambda: policy(finished_run() / "sft"))
    adapter = spoilt("adapter")
    (adapter / "adapter_config.json").write_text("{}")
    assert config_error(lambda: policy(adapter)) == f"{adapter}: an adapter: merge it into its model first"


@law(
    "a policy reads forwards and samples as it scores, or is refused before it is trained; router logits are never asked for",
    "transformers issues 13818, 31540, 29087: what a family does with a mask, a cache or positions, no figure of PPO shows",
    *RUN_NEEDS, "load_policy",
)  # fmt: skip
def test_a_policy_samples_as_it_scores():
    apart = "sampling, cached and padded on the left, gives other logits than reading a row alone"
    ahead = "not a causal model: what it reads first changes with what comes later"
    crash = "cannot be sampled from: KeyError: "
    for family, options, said in (
        ("bert", {}, ahead),
        ("roberta", {"is_decoder": True}, apart),
        ("mamba", {}, apart),
        ("openai-gpt", {}, crash),
        ("rwkv", {"attention_hidden_size": 32}, crash),
        ("mixtral", {"output_router_logits": True}, ""),
        ("mistral", {"sliding_window": 3}, ""),
        ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1}, ""),
        ("bloom", {}, ""),
    ):
        folder = random_model(f"policy {family}", family, **options)
        if said:
            message = config_error(lambda folder=folder: impl.load_policy(folder))
            assert message.startswith(f"{folder}: {said}"), message
        else:
            assert not getattr(impl.load_policy(folder).config, "output_router_logits", False)
    classifier = random_model("classifier", "bert", "AutoModelForSequenceClassification", num_labels=1)
    assert config_error(lambda: impl.ScalarModel.load(classifier)) == f"{classifier}: {ahead}"


@law(
    "a tokenizer is there, and its tokens are in the embedding; a name that is no folder is looked up on the Hub only where it "
    "cannot be a slip",
    "transformers issue 11102; an empty tokenizer is made where files are missing", *RUN_NEEDS, "load_tokenizer", "check_name",
)  # fmt: skip
def test_tokenizers_and_names_of_models_fit():
    bare, beyond, more = spoilt("bare"), spoilt("beyond"), spoilt("more")
    for path in bare.glob("*token*"):
        path.unlink()
    tokenizer = impl.load_tokenizer(beyond)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(beyond)
    tokenizer = impl.load_tokenizer(more)
    tokenizer.add_tokens(["somewhat"])
    tokenizer.save_pretrained(more)
    for folder, said in (
        (bare, "has no tokenizer, or an empty one"),
        (beyond, f"EOS is {rows}, beyond the {rows} rows of the model's embedding"),
        (more, f"the last token is {rows}, beyond the {rows} rows of the model's embedding"),
    ):
        assert config_error(lambda folder=folder: impl.load_tokenizer(folder)) == f"{folder}: {said}"
    llama = random_model("no tokenizer", "llama")
    assert config_error(lambda: impl.load_tokenizer(llama)).startswith(f"{llama}: cannot load: ")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop())
        Path("local").mkdir()
        impl.check_name("EleutherAI/pythia-1b-deduped")
        for name in ("local/sft", "gpt2", "./x/y", "~/x", "/x/y", "a/b/c", "../a", ""):
            if name:
                assert config_error(lambda name=name: impl.check_name(name)) == f"{name}: no such folder"
        config = stage_config("a slip", "sft", model="local/sft")
        assert config_error(lambda: impl.start(config)) == "local/sft: no such folder"
        assert not config.folder.exists(), "found before anything is done"


@law(
    "weights that left the finite numbers in the last step are not saved, nor in a checkpoint; a saved folder says of "
    "generation which ids are EOS, BOS and pad, whatever the base said",
    "D22; transformers issue 29988", *RUN_NEEDS, "Stopped", "save_model",
)  # fmt: skip
def test_only_finite_weights_and_own_settings_are_saved():
    base = spoilt("sampling flags", "base")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": [0, 1]}))
    config = stage_config("overflows", "sft", model=str(base), sft=impl.SFT(epochs=0.5), compute=every_step())
    original, calls = impl.optimizer_step, itertools.count(1)

    def overflowing(machine, optimizer, *args):
        statistics = original(machine, optimizer, *args)
        if next(calls) == 4:  # the last
            optimizer.param_groups[0]["params"][0].data[0] = math.inf
        return statistics

    for minutes in (0.0, 10.0):
        folder, calls = config.folder.with_name(f"overflows {minutes}"), itertools.count(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(impl, "optimizer_step", overflowing)
            ill = replace(config, folder=folder, compute=impl.Compute(checkpoint_minutes=minutes))
            message = config_error(lambda: impl.start(ill))
        assert re.fullmatch(
            r"sft, step \d: \S+ is (not finite; try a lower learning rate \(it may change\)|nan) \[D22\]; once .*",
            message,
        ), message
        assert not (folder / "sft").exists() and not (folder / "sft.part").exists()
    saved = torch.load(config.folder.with_name("overflows 0.0") / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 3 and all(weight.isfinite().all() for weight in saved["model"].values())
    weights = {"a.weight": torch.tensor([1.0, math.nan])}
    assert config_error(
        lambda: impl.save_model(tiny_policy("neox"), weights, tiny_tokenizer(), workshop() / "nan")
    ).startswith("a.weight is not finite")
    policy, tokenizer = tiny_policy("neox"), tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|beyond|>"})
    assert tokenizer.pad_token_id >= policy.config.vocab_size
    impl.save_model(policy, policy.state_dict(), tokenizer, workshop() / "pad beyond")
    pad = json.loads((workshop() / "pad beyond" / "config.json").read_text())["pad_token_id"]
    assert 0 <= pad < policy.config.vocab_size and pad != tokenizer.eos_token_id
    made = json.loads((impl.start(config) / "sft" / "generation_config.json").read_text())
    made = {name: value for name, value in made.items() if name not in ("transformers_version", "_from_model_config")}
    assert made == {"eos_token_id": 0, "pad_token_id": 1}, made


@law(
    "one process at a time writes into a run's folder: another is refused, and told which; the lock ends with its process",
    "two resumes at once leave logs of both", *RESUME_NEEDS,
)  # fmt: skip
def test_a_folder_has_one_writer():
    config = stage_config("held", "sft", sft=impl.SFT(epochs=0.1))
    run = impl.Run(config)
    before = {path: path.read_bytes() for path in config.folder.iterdir()}
    result = program("--resume", config.folder)
    assert (result.returncode, result.stderr) == (2, f"pmo: {config.folder} is in use by process {os.getpid()}\n")
    assert {path: path.read_bytes() for path in config.folder.iterdir()} == before
    run.locked.close()
    result = program("--resume", config.folder)
    assert result.returncode == 0 and not (config.folder / "lock").exists(), result.stderr


USERS_CODE = """\
import os, sys, torch
class Odd:
    def __float__(self):
        raise ValueError("odd")
def raises(post, response, record):
    raise KeyError('boom')
def exits(post, response, record):
    sys.exit(0)
def recurses(post, response, record):
    return recurses(post, response, record)
def missing(post, response, record):
    return open('/nowhere/x')
def two(post, response):
    return 1.0
async def later(post, response, record):
    return 1.0
def huge(post, response, record):
    return 10**400
def wide(post, response, record):
    return 1e300
def text(post, response, record):
    return "1.0"
def listed(post, a, b):
    return [1]
def odd(post, response, record):
    return Odd()
def changes(post, response, record):
    os.chdir('/'); torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64); record.clear()
    return 1.0
def once(post, response, record):
    return 1.0 if response == 'one text' else None
def imports(post, response, record):
    import its_helper
    return its_helper.one
"""


@law(
    "a rule or judge that fails, whatever it raises or returns, ends the run in one line: flag, error, place, text, and how to "
    "go on; what it changed about the process is undone; it may import what lies beside it when it is called",
    "sys.exit(0) in a rule ended a run as if it were done", *RUN_NEEDS, "load_function", "votes", "verified",
)  # fmt: skip
def test_users_functions_fail_in_one_line():
    posts, texts, flag = toy_posts(2), ["one text", "another"], "--ppo.reward-function"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop())
        Path("faulty.py").write_text(USERS_CODE)
        Path("syntax.py").write_text("x = 1\ndef f(:\n")
        Path("divides.py").write_text("x = 1\n1 / 0\n")
        Path("leaves.py").write_text("import os, sys\nos.chdir('/')\nsys.exit(0)\n")
        for name, said in (
            ("syntax:f", "syntax:f: SyntaxError: invalid syntax (syntax.py, line 2)"),
            ("divides:f", "divides:f: ZeroDivisionError: division by zero (divides.py, line 2)"),
            ("leaves:f", "leaves:f: SystemExit: 0 (leaves.py, line 3)"),
            ("absent:f", "absent:f: ModuleNotFoundError: No module named 'absent'"),
            ("./faulty.py:raises", "./faulty.py:raises should name module:function"),
            (".faulty:raises", ".faulty:raises should name module:function"),
            ("faulty", "faulty should name module:function"),
            ("faulty:two", "faulty:two: TypeError: too many positional arguments (faulty.py, line 13)"),
            ("faulty:later", "faulty:later cannot be called"),
            ("faulty:os", "faulty:os cannot be called"),
        ):  # fmt: skip
            assert config_error(lambda name=name: impl.load_function(flag, name)) == f"{flag} {said}"
            assert Path.cwd() == workshop().resolve()
        for name, said in (
            ("raises", f"{flag}: KeyError: 'boom' (faulty.py, line 6), for 'one text'"),
            ("exits", f"{flag}: SystemExit: 0 (faulty.py, line 8), for 'one text'"),
            ("recurses", f"{flag}: RecursionError: maximum recursion depth exceeded"),
            ("missing", f"{flag}: FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/x' (faulty.py, line 12), for 'one"),
            ("huge", f"{flag} returned 1000000000"),
            ("wide", f"{flag} returned 1e+300, not a finite number, for 'one text'"),
            ("text", f"{flag} returned '1.0', not a finite number, for 'one text'"),
            ("odd", f"{flag} returned <"),
            ("once", f"{flag} returned None, not a finite number, for 'another'"),
        ):  # fmt: skip
            message = config_error(
                lambda name=name: impl.verified(impl.load_function(flag, f"faulty:{name}"), posts, texts)
            )
            assert message.startswith(said) and "\n" not in message, message
        for name, said in (
            ("raises", "--evaluate.judge: KeyError: 'boom' (faulty.py, line 6), for 'one text'"),
            ("listed", "--evaluate.judge returned ([1], [1]); each should be 0, 0.5 or 1"),
            ("text", "--evaluate.judge returned ('1.0', '1.0'); each should be 0, 0.5 or 1"),
        ):  # fmt: skip
            judge = impl.load_function("--evaluate.judge", f"faulty:{name}")
            assert config_error(lambda judge=judge: impl.votes(judge, posts, texts, texts, Path("v"))) == said
        Path("this.py").write_text("def f(post, response, record): return 1.0\n")  # as one of Python's own is called
        patch.delitem(sys.modules, "this", raising=False)
        assert impl.verified(impl.load_function(flag, "this:f"), posts, texts) == [1.0, 1.0]
        with pytest.raises(KeyboardInterrupt):
            impl.verified(lambda *of: (_ for _ in ()).throw(KeyboardInterrupt()), posts, texts)
        posts = [post._replace(record={"a": 1}) for post in posts]
        assert impl.verified(impl.load_function(flag, "faulty:changes"), posts, texts) == [1.0, 1.0]
        Path("its_helper.py").write_text("one = 1.0\n")
        patch.setattr(sys, "path", [place for place in sys.path if Path(place).resolve() != Path.cwd()])
        assert impl.verified(impl.load_function(flag, "faulty:imports"), posts, texts) == [1.0, 1.0]
        assert sys.path[-1] == str(Path.cwd()), "what lies there must not be taken for a library"
        assert (
            Path.cwd() == workshop().resolve()
            and torch.is_grad_enabled()
            and torch.get_default_dtype() == torch.float32
        )
        assert all(post.record == {"a": 1} for post in posts)
        config = stage_config("a rule that ends", "ppo")
        config = replace(config, ppo=replace(config.ppo, reward_function="faulty:exits"))
        message = config_error(lambda: impl.start(config))
        assert message.startswith(f"ppo, step 1: {flag}: SystemExit: 0 (faulty.py, line 8), for ")
        assert f"; once that is mended, --resume {config.folder} goes on" in message
        config = replace(config, folder=config.folder.with_name("a rule without a number"))
        config = replace(config, ppo=replace(config.ppo, reward_function="faulty:text"))
        message = config_error(lambda: impl.start(config))
        assert message.startswith(f"ppo, step 1: {flag} returned '1.0'") and f"--resume {config.folder}" in message
        config = stage_config("a judge that fails", "evaluate", evaluate=impl.Evaluate(judge="faulty:raises"))
        assert "KeyError: 'boom'" in config_error(lambda: impl.start(config))
        assert (config.folder / "eval.jsonl").exists(), "the summaries are lost"


@law(
    "a run's folder is input, too: whatever its files hold, it is read or refused in one line that names the file; its logs are "
    "cut by their two names alone, and never through a link; what a run is given may not change between kill and resume",
    "a folder from somebody else should harm nobody", *RESUME_NEEDS,
)  # fmt: skip
def test_a_runs_folder_is_input():
    train, valid = toy_files()
    mine = workshop() / "mine.jsonl"
    shutil.copy(train, mine)
    config = stage_config("as input", "sft")
    config = replace(config, data=replace(config.data, train=mine, valid=valid))
    folder = impl.Run(config).folder
    resumed, whole = replace(config, resume=folder), (folder / "config.json").read_bytes()
    for content in (b"", b"[]", b"{", b"\xff\xfe", b'{"config": {"data": {}, "sft": {}}', b'{"config": {}}', b'{"config": {"data": []}}',
                    b"[" * 100_000, b'{"config": ' + b'{"a": ' * 5000 + b"1" + b"}" * 5001, b'{"config": {"data": {}}, "resumed": 1}'):  # fmt: skip
        (folder / "config.json").write_bytes(content)
        for use in (lambda: impl.Run(resumed), lambda: impl.stored(folder), lambda: impl.arguments_of(folder)):
            message = config_error(use)
            assert message.startswith(f"{folder} is not the folder of a run") and "\n" not in message, message
    (folder / "config.json").write_bytes(whole)
    state, victim = torch.load(folder / "checkpoint.pt", weights_only=True), workshop() / "victim"
    victim.write_text("precious")
    for change in (
        [], {}, {"finished": 1}, {"finished": ["x"]}, {"sizes": []}, {"sizes": {"metrics.jsonl": "1"}}, {"step": "1"}, {"inputs": 3},
        {"stage": "sft"}, {"stage": "sft", "model": [], "optim": {}},
    ):  # fmt: skip
        torch.save(change if change in ([], {}) else state | change, folder / "checkpoint.pt")
        assert config_error(lambda: impl.Run(resumed)).startswith(f"{folder / 'checkpoint.pt'} is not usable")
    weights = {"model": {"model.weight": torch.ones(3, 3)}, "optim": {"state": {}, "param_groups": []}}
    for change in (weights | {"step": 2}, weights | {"step": 99}, {"model": {}, "optim": {}, "step": 1}):
        torch.save(state | {"stage": "sft"} | change, folder / "checkpoint.pt")
        run = impl.Run(resumed)
        assert config_error(lambda: next(run.steps("sft", 6, **toy_parts()))).startswith(
            f"{folder / 'checkpoint.pt'} is not usable"
        )
    torch.save(state | {"sizes": {"../victim": 0, str(victim): 0, "metrics.jsonl": 9999}}, folder / "checkpoint.pt")
    (folder / "metrics.jsonl").write_text('{"stage": "sft"}\n')
    impl.Run(resumed)
    assert victim.read_text() == "precious" and (folder / "metrics.jsonl").read_text() == '{"stage": "sft"}\n'
    for content in ("{", "[]\n", "{}\n", "3\n"):
        (folder / "metrics.jsonl").write_text(content)
        run = impl.Run(resumed)
        (folder / "metrics.jsonl").write_text(content)
        assert config_error(lambda: impl.logged(run.folder)).startswith(
            f"{folder / 'metrics.jsonl'} is not what a run writes"
        )
    for name in ("metrics.jsonl", "lock"):
        (folder / name).unlink()
        (folder / name).symlink_to(victim)
        assert config_error(lambda: impl.Run(resumed)) == f"{folder / name} is a link: it would be written to"
        (folder / name).unlink()
    assert victim.read_text() == "precious"
    impl.Run(resumed)
    mine.write_bytes(mine.read_bytes()[:-1])
    assert config_error(lambda: impl.Run(resumed)) == f"--resume {folder}: {mine} is not what it was when the run began"
    earlier = shutil.copytree(finished_run(), workshop() / "earlier")
    config = replace(stage_config("on an earlier one", "ppo"), from_run=(earlier,))
    resumed = replace(config, resume=impl.Run(config).folder)
    for path in (earlier / "sft" / "config.json", earlier / "data" / "comparisons_train.jsonl"):
        path.write_text(path.read_text() + " ")
        assert f"{path.parent} is not what it was" in config_error(lambda: impl.Run(resumed))
        path.write_text(path.read_text()[:-1])
        impl.Run(resumed)


@law(
    "a disk that fills up while weights are written gives the line that other writes give",
    "torch.save and safetensors raise no OSError", *RESUME_NEEDS,
)  # fmt: skip
def test_a_full_disk_is_told_whoever_writes():
    target = workshop() / "disk full"

    def fails(error: Exception) -> Callable:
        def write(path: Path) -> None:
            path.write_text("half")
            raise error

        return write

    usage = shutil.disk_usage(workshop())
    for error, free in (
        (RuntimeError("unexpected pos 64 vs 0"), 0),
        (RuntimeError("No space left (os error 28)"), usage.free),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
            message = config_error(lambda error=error: impl.write_whole(target, fails(error)))
        assert message == f"[Errno 28] No space left on device: {target}.part" and not target.exists()
    with pytest.raises(RuntimeError, match="else"):
        impl.write_whole(target, fails(RuntimeError("something else")))


@law(
    "records without information are left out and counted; a byte-order mark and a blank line at the end are none; lines that "
    "are no records cost no memory, and texts beyond all measure no time",
    "README: your own data", *RUN_NEEDS, "read_records", "read_examples", "Codec",
)  # fmt: skip
def test_records_of_all_kinds_are_read_or_told():
    path, posts = workshop() / "kinds.jsonl", toy_posts(200)
    lines = "".join(json.dumps(post.fields()) + "\n" for post in posts).encode()
    for content in (
        lines,
        b"\xef\xbb\xbf" + lines,
        lines + b"\n",
        b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n") + b"  \n",
    ):
        path.write_bytes(content)
        records, complaints = impl.read_records(path, impl.parse_post)
        assert [record.fields() for record in records] == [post.fields() for post in posts] and complaints == []
    path.write_bytes(b"\n" * 2_000_000)
    message = config_error(lambda: impl.read_records(path, impl.parse_post))
    assert f"{path}: 10,000 of 10,000 records are unusable: line 1: " in message and len(message) < 1000
    comparison = {"info": posts[0].fields(), "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
    for name, change in (
        ("batch", {"batch": "\ud800"}),
        ("confidence", {"extra": {"confidence": "x\udfff"}}),
        ("policy", {"summaries": [{"text": "a", "policy": "\ud800"}, {"text": "b"}]}),
    ):
        with pytest.raises(impl.InputError, match=f"field '{name}' is not valid Unicode"):
            impl.parse_comparison(comparison | change)
    nulls = comparison | {"batch": None, "extra": {"confidence": None}}
    assert impl.parse_comparison(nulls).kinds == ("unknown vs unknown",)
    article = nulls | {"info": {"subreddit": None, "title": "t", "post": None, "article": "An article."}}
    parsed = impl.parse_comparison(article)
    assert parsed.post.post == "An article." and parsed.post.subreddit == "news" and parsed.kinds[-1] == "news articles"
    impl.write_records(
        [post._replace(summary=" " * (i % 2)).fields() if i < 2 else post.fields() for i, post in enumerate(posts)],
        path,
    )
    run = impl.Run(with_flag(with_flag(tiny_config("empty summaries"), "data.train", path), "data.valid", path))
    codec = impl.Codec(impl.load_tokenizer(finished_run() / "sft"), run.config.data)
    assert len(impl.read_examples(run, "train", codec)) == 198
    assert any(
        "left out 2 of 200 train summaries: empty, or longer than --data.response-tokens 16" in said
        for said in run.said
    )
    impl.write_records([post._replace(summary="").fields() for post in posts], path)
    message = config_error(lambda: impl.read_examples(run, "train", codec))
    assert "left out 200 of 200 train summaries" in message and "--sft-model and --reward-model" in message
    start, usual = time.monotonic(), codec.queries([posts[0]._replace(post="some words " * 500)])
    for text in ("some words " * 1_000_000, "x" * 10_000_000, "line\n" * 2_000_000):
        (query,) = codec.queries([posts[0]._replace(post=text)])
        assert 0 < len(query) <= 60 and (text[0] != "s" or [query] == usual)
    assert time.monotonic() - start < 30


ONE_DIES = """
import importlib, os, signal, sys
folder, name, sys.argv = sys.argv[1], sys.argv[2], sys.argv[2:]
sys.path.insert(0, folder)
pmo = importlib.import_module(name)
read_tokens = pmo.read_tokens
def dying(*args):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return read_tokens(*args)
pmo.read_tokens = dying
pmo.main()
"""


@law(
    "a terminal that closes (SIGHUP, even twice) interrupts as SIGTERM does, and the step is saved though nobody reads",
    "README: Resume", *RESUME_NEEDS,
)  # fmt: skip
def test_a_terminal_that_closes_interrupts():
    import signal

    config, original = stage_config("hangs up", "sft", sft=impl.SFT(epochs=1.0)), impl.Run.log
    usual = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs this under nohup ignores it

    def hanging_up(run, statistics) -> None:
        if run.step == 2:
            patch.setattr(impl.tqdm, "write", lambda *args, **options: (_ for _ in ()).throw(OSError(5, "gone")))
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
        original(run, statistics)

    before = signal.getsignal(signal.SIGHUP)
    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, OSError)) as end:
        patch.setattr(impl.Run, "log", hanging_up)
        impl.start(config)
    assert "go on with --resume" in str(end.value)
    assert signal.getsignal(signal.SIGHUP) == before
    assert torch.load(config.folder / "checkpoint.pt", weights_only=True)["step"] == 3
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(impl.Run, "log", lambda *of: os.kill(os.getpid(), signal.SIGHUP) or original(*of))
            assert (impl.start(replace(config, folder=config.folder.with_name("under nohup"))) / "sft").exists()
    except (KeyboardInterrupt, OSError):
        pytest.fail("what the user had ignored ended the run")
    finally:
        signal.signal(signal.SIGHUP, usual)


@law(
    "of several processes one speaks: bad data is told once, and where one dies another says how to go on",
    "README: Many processes", *RESUME_NEEDS,
)  # fmt: skip
def test_of_many_processes_one_speaks():
    source, bad = Path(impl.__file__).resolve(), workshop() / "bad.jsonl"
    bad.write_text("no JSON\n")
    config = stage_config("one dies", "ppo")
    worse = stage_config("two read", "sft")
    worse = replace(worse, data=replace(worse.data, train=bad))
    for each, said in (
        (config, f"pmo: (another process has ended|interrupted); go on with --resume {config.folder}"),
        (worse, rf"pmo: {bad}: 1 of 1 records are unusable: .*"),
    ):
        result = with_torchrun(ONE_DIES, source.parent, source.stem, *flags_of(each))
        told = [line for line in result.stderr.splitlines() if line.startswith("pmo: ")]
        assert result.returncode != 0 and len(told) == 1 and re.fullmatch(said, told[0]), result.stderr[-3000:]
        assert "pmo.py" not in result.stderr.replace("launched.py", ""), result.stderr[-3000:]


# -----------------------------------------------------------------------------
# one query, many responses: read once, as if each had been read alone


def grouped_batch(sizes: tuple[int, ...] = (3, 1, 4, 2), share: bool = True):
    """Groups of responses of unequal lengths to queries of unequal lengths."""
    responses = some_batch(tuple((1, 1 + 5 * i % 7) for i in range(sum(sizes)))).responses
    queries = some_batch(tuple((2 + 4 * i % 9, 1) for i in range(len(sizes))), seed=1).queries
    return impl.Batch([query for query, n in zip(queries, sizes) for _ in range(n)], responses, share)


SHARED = "Liu et al. 2025, Prefix Grouper, arXiv 2506.05433"


@law(
    "log-probabilities, values and scores are the same whether responses share their query or each reads its own copy, in "
    "groups of any size, whatever the micro-batches, on absolute positions and on rotary ones",
    SHARED, *ENGINE_NEEDS, "ScalarModel", "response_logprobs",
)  # fmt: skip
def test_a_shared_query_changes_no_logprob_value_or_score():
    batch = grouped_batch()
    tokens = impl.lay_out(batch).inputs["input_ids"].ne(0).sum()
    assert tokens < 0.8 * impl.lay_out(replace(batch, share=False)).inputs["input_ids"].ne(0).sum()
    for family in FAMILIES:
        alone = everything_of(family, replace(batch, share=False), micro_batch_size=1)
        for size in (32, 5, 2, 1):
            for one, other in zip(everything_of(family, batch, micro_batch_size=size), alone):
                close(one, other, tolerance=1e-5)


@law(
    "a response's numbers do not depend on which siblings share its query, nor on their order or that of the groups",
    SHARED, *ENGINE_NEEDS, "ScalarModel",
)  # fmt: skip
def test_siblings_may_stand_in_any_order():
    batch, within, groups = grouped_batch(), [2, 0, 1, 3, 7, 5, 4, 6, 9, 8], [8, 9, 3, 4, 5, 6, 7, 0, 1, 2]
    for family in FAMILIES:
        before = everything_of(family, batch)
        for rows in (within, groups, [5, 9, 8], [1, 2]):
            for one, other in zip(everything_of(family, batch[rows]), before):
                other = other[rows]
                close(one, other if other.dim() == 1 else other[:, : one.shape[1]], tolerance=1e-5)


@law(
    "with shared queries an update starts at a ratio of 1 and has the gradient and the statistics that it has without, the "
    "value model's or the value head's too; so has a step of the reward model",
    "D14, D20; " + SHARED, *STEP_NEEDS, "accumulate", "reward_losses", "Rankings",
)  # fmt: skip
def test_a_shared_query_changes_no_gradient():
    def gradient(losses: Callable, minibatch: object, parameters: list[Tensor]) -> tuple[Tensor, dict]:
        for p in parameters:
            p.grad = None
        totals = impl.accumulate(engine(5), minibatch, losses)
        return torch.cat([p.grad.flatten() for p in parameters]), totals

    def check_same(losses: Callable, parts: list, parameters: list[Tensor]) -> None:
        (one, statistics), (other, others) = (gradient(losses, part, parameters) for part in parts)
        assert other.norm() > 1e-3 and (one - other).norm() < 1e-5 * other.norm()
        for name, value in others.items():
            assert statistics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name

    for family, head in itertools.product(FAMILIES, (False, True)):
        models, config = tiny_models(family, head), ppo_config(temperature=0.7)
        queries = grouped_batch().queries
        rollouts = [tiny_rollout(models, config, 5, queries=queries, share=share) for share in (True, False)]
        assert rollouts[0].batch.responses == rollouts[1].batch.responses
        for part in (rollouts[0], rollouts[0][[3, 4, 5, 6, 7]]):
            shares = ppo_losses(models, config)(part, part)
            assert shares["policy/approxkl"] <= 1e-8 and shares["policy/abs_log_ratio"] <= 1e-4
        rollouts[0] = replace(rollouts[1], batch=rollouts[0].batch)  # the same numbers, to the last bit
        move_away(models)
        check_same(ppo_losses(models, config), rollouts, parameters_of(models))
    scalar = tiny_scalar("neox")
    rankings = [some_rankings(share=share) for share in (True, False)]
    check_same(partial(impl.reward_losses, scalar), rankings, list(scalar.classifier.parameters()))


@law(
    "each distinct query is sampled from once, and samples are the same as where every response reads its own copy",
    "D25; " + SHARED, "sample", "Engine", "Batch",
)  # fmt: skip
def test_a_shared_query_changes_no_sample():
    queries, numbers_ = grouped_batch().queries, uniforms(10, 9)
    for family, size in itertools.product(FAMILIES, (32, 5, 3)):
        policy = tiny_policy(family, scale=0.2)
        plain = impl.sample(policy, queries, numbers_, 0.7, EOS, engine())
        with watching("head_at") as calls:
            shared = impl.sample(policy, queries, numbers_, 0.7, EOS, engine(sample_batch_size=size), share=True)
        assert shared == plain and len({tuple(response) for response in plain}) > 8
        if size == 32:
            rows = [len(args[1]) for args, _ in calls["head_at"]]
            assert rows[:2] == [4, 10]


@law(
    "a micro-batch holds no more responses than it may; only a group larger than that is split, into as few parts as it can be; "
    "what was compared is never split",
    "D20; " + SHARED, "micro_batches", "Batch", "Rankings",
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), size=st.integers(1, 7),
)  # fmt: skip
def test_groups_are_split_only_where_they_must_be(sizes, size):
    queries = [[i] for i, n in enumerate(sizes) for _ in range(n)]
    responses = [[0] * (1 + 3 * i % 5) for i in range(len(queries))]
    for share in (True, False):
        parts = impl.micro_batches(impl.Batch(queries, responses, share), size)
        assert sorted(itertools.chain(*parts)) == list(range(len(queries))) and max(map(len, parts)) <= size
        for i, n in enumerate(sizes) if share else ():
            held = [sum(queries[row] == [i] for row in part) for part in parts]
            assert sum(map(bool, held)) == math.ceil(n / size)
    rankings = impl.Rankings([impl.Ranking([i], [[0]] * (n + 1), [(0, n)]) for i, n in enumerate(sizes)])
    parts = impl.micro_batches(rankings, size)
    assert sorted(itertools.chain(*parts)) == list(range(len(sizes)))
    assert all(sum(sizes[i] + 1 for i in part) <= size for part in parts if len(part) > 1)


def tiny_stranger(family: str):
    """A decoder that reads several responses in one row otherwise than alone: ALiBi, states, a short window."""
    import transformers as hf

    common = {"vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": EOS, "pad_token_id": 0, "hidden_size": 16}
    config = {
        "bloom": lambda: hf.BloomConfig(n_layer=2, n_head=2, **common),
        "mamba": lambda: hf.MambaConfig(num_hidden_layers=2, state_size=4, **common),
        "lfm2": lambda: hf.Lfm2Config(
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, layer_types=["conv", "full_attention"], **common,
        ),
        "minimax": lambda: hf.MiniMaxConfig(
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, num_local_experts=2,
            head_dim=8, layer_types=["full_attention", "linear_attention"], **common,
        ),
        "mistral": lambda: hf.MistralConfig(
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, sliding_window=6, **common,
        ),
    }[family]()  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


@law(
    "a row that has ended is dropped when a quarter of those that are left have, which changes no sample; where a row has a "
    "state that is no key or value (LFM2's convolutions, MiniMax's linear attention) none is dropped",
    "README: speed; D25", "sample", "droppable", *ENGINE_NEEDS,
)  # fmt: skip
def test_rows_that_have_ended_are_dropped():
    queries, numbers_ = grouped_batch().queries * 2, uniforms(20, 12)
    for family in (*FAMILIES, "bloom", "mistral", "lfm2", "minimax"):
        policy = tiny_policy(family, scale=0.2) if family in FAMILIES else tiny_stranger(family)
        for eos in range(VOCAB) if family not in FAMILIES else (EOS,):  # one that it says now and then
            with watching("head_at") as calls:
                responses = impl.sample(policy, queries, numbers_, 1.0, eos, engine())
            lengths = [len(response) for response in responses]
            if 4 < sum(length < 12 for length in lengths) < 20:
                break
        assert len(set(lengths)) > 2, f"{family} ended as {lengths}: this shows nothing"
        alone = [impl.sample(policy, [q], numbers_[[i]], 1.0, eos, engine())[0] for i, q in enumerate(queries)]
        assert responses == alone, family
        rows = [len(args[1]) for args, _ in calls["head_at"]]
        still = [sum(length > t for length in lengths) for t in range(max(lengths))]
        assert len(rows) == len(still)
        if family in ("lfm2", "minimax"):
            assert set(rows) == {20}, family
        else:
            assert all(r == s or r > s > 0.75 * r for r, s in zip(rows, still)) and rows[-1] < 20, (family, rows, still)
            assert all(b == a or b <= 0.75 * a for a, b in itertools.pairwise(rows)), "not for every one that ends"


@law(
    "which models may share a query is found out by trying the longest: GPT-2, GPT-NeoX, Llama, and Mistral while its window "
    "holds a whole row may; BLOOM (ALiBi), Mamba and Mistral with a shorter window may not; a value head does as its policy",
    SHARED, "shares_queries", "ValueHead", "ScalarModel",
)  # fmt: skip
def test_models_that_cannot_share_are_found_out():
    data, queries = (
        impl.Data(response_tokens=4, comparison_tokens=5),
        [[1], [3, 1, 4], [2, 7, 1, 8, 2, 8], [6, 5, 3, 5]],
    )
    for family in FAMILIES:
        assert impl.shares_queries(tiny_policy(family), queries, data) and impl.shares_queries(
            tiny_scalar(family), queries, data
        )
        assert impl.shares_queries(tiny_policy(family), queries[:1], data)
    for family in ("bloom", "mamba", "mistral"):
        assert not impl.shares_queries(tiny_stranger(family), queries, data), family
    shorter = replace(data, response_tokens=2, comparison_tokens=2)
    assert impl.shares_queries(tiny_stranger("mistral"), queries[:2], shorter), "a window of six holds 3 + 2 tokens"
    assert not impl.shares_queries(tiny_stranger("mistral"), queries, shorter), "but not 6 + 2"
    compared = replace(shorter, comparison_tokens=5)
    assert not impl.shares_queries(tiny_stranger("mistral"), queries[:2], compared), "nor 3 + 5"
    assert impl.shares_queries(impl.ValueHead(16), queries, data)


@law(
    "a model that cannot share a query is used without: the run says so, once, and gives what --compute.no-share-queries gives",
    "README: Speed", *RUN_NEEDS, "shares_queries", "Run",
)  # fmt: skip
def test_a_model_that_cannot_share_is_used_without():
    tokenizer, folder = impl.load_tokenizer(finished_run() / "sft"), workshop() / "mistral"
    model = type(policy := tiny_stranger("mistral"))(type(policy.config)(**policy.config.to_dict() | {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None,
    }))  # fmt: skip
    impl.save_model(model, model.state_dict(), tokenizer, folder)
    config = stage_config("cannot share", "reward", "ppo", sft_model=str(folder))
    config = replace(config, ppo=replace(config.ppo, total_episodes=32, responses_per_query=4, sample_every=9))
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl.Run, "say", lambda run, text: said.append(text))
        found_out = impl.start(config)
        assert sum("cannot share a query" in text for text in said) == 2, "a policy and a scalar model"
        said.clear()
        compute = replace(config.compute, share_queries=False)
        told = impl.start(replace(config, folder=config.folder.with_name("may not share"), compute=compute))
    assert not any("cannot share" in text for text in said)
    assert metrics_of(found_out) == metrics_of(told)


@law(
    "with several responses per query a batch is whole groups of neighbours, each with its own noise; minibatches are made of "
    "whole groups, hold every rollout once per epoch and come in a new order; the first ratio is 1",
    "D14, D19; README: responses per query", *RUN_NEEDS, "ppo", "sample", "optimizer_step", "minibatches",
)  # fmt: skip
def test_minibatches_are_whole_groups():
    config = stage_config("groups", "ppo")
    config = replace(config, ppo=replace(config.ppo, total_episodes=32, responses_per_query=4, sample_every=9))
    calls = watched(config, "sample", "optimizer_step")
    drawn = [(args, responses) for args, responses in calls["sample"] if len(args[1]) == 16]
    assert len(drawn) == 2
    asked = [tuple(query) for args, _ in drawn for query in args[1]]
    assert len(set(asked)) == 8 and all(asked[i] == asked[i - i % 4] for i in range(32))
    for i, (args, responses) in enumerate(drawn):
        assert args[2].equal(impl.noise(1, "episodes", range(16 * i, 16 * i + 16), 16)) and args[6] is True
        rows = sorted(zip(args[1], responses))
        steps = [args[2].batch for args, _ in calls["optimizer_step"][4 * i : 4 * i + 4]]
        for step in steps:
            assert len(step) == 8 and all(step.queries[j] == step.queries[j - j % 4] for j in range(8))
        for epoch in (steps[:2], steps[2:]):
            assert sorted(row for step in epoch for row in zip(step.queries, step.responses)) == rows
    for record in metrics_of(config.folder):
        assert record["policy/first_approxkl"] <= 1e-8 and record["policy/first_abs_log_ratio"] <= 1e-4
    ppo = ppo_config(batch_size=24, num_minibatches=2, responses_per_query=4)
    epochs = [impl.minibatches(1, update, epoch, ppo) for update, epoch in itertools.product(range(2), range(2))]
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 4
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(24)) and list(map(len, epoch)) == [12, 12]
        assert all(rows[j] == rows[j - j % 4] + j % 4 and rows[j - j % 4] % 4 == 0 for rows in epoch for j in range(12))


@law(
    "--compute.share-queries changes no text and no metric but by rounding, and when it is off no row is shared",
    "README: Speed", *RUN_NEEDS, "lay_out",
)  # fmt: skip
def test_sharing_changes_a_run_by_rounding_alone():
    folders, shared = [], []
    for share in (True, False):
        config = stage_config(f"share {share}", "compare", "reward", "ppo", compute=impl.Compute(share_queries=share))
        # Nothing is clipped: for a token at the edge, rounding would decide whether it moves the model.
        wide = {"cliprange": 10.0, "cliprange_value": 100.0, "responses_per_query": 4, "sample_every": 9}
        config = replace(config, ppo=replace(config.ppo, **wide))
        config = replace(config, compare=impl.Compare(samples=3, posts=40, tie=0.0, temperature=0.7))
        layouts = [layout for _, layout in watched(config, "lay_out")["lay_out"]]
        shared.append(sum(len(layout.inputs) > 1 for layout in layouts) / len(layouts))
        folders.append(config.folder)
    assert shared[0] > 0.5 and shared[1] == 0
    one, other = (folder / "data" / "comparisons_train.jsonl" for folder in folders)
    assert one.read_text() == other.read_text()
    same_metrics(*folders, tolerance=1e-3)


# -----------------------------------------------------------------------------
# the family: what is credited (baselines), how far a step may go (objectives), and what is put beside it
#
# Expectations are exact: over all responses of the enumerated policy of "the functions together", whose rewards here are
# functions of state and token: the price of KL, and the score where a response ends.


def invented(mask: Tensor, **changes: Tensor):
    """A rollout of zeros, but for these."""
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    return replace(impl.Rollout(None, mask, zeros, zeros, zeros, zeros, zeros[:, 0], mask[:, 0]), **changes)


def enumerated_rewards(table: tuple[Tensor, ...], kl_coef: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (7, 2) and probabilities (7,) of all responses, and the rewards (7, 2) of their tokens."""
    logits, ref_logits, scores, *_ = table
    (logprobs, P), (ref_logprobs, _) = enumerate_policy(logits), enumerate_policy(ref_logits)
    return logprobs, P, impl.token_rewards(scores, impl.kl_estimate(logprobs, ref_logprobs), MASK, kl_coef)


def mean_over(weights: Tensor, x: Tensor) -> Tensor:
    return (weights * x).sum() / weights.sum()


def exact_values(P: Tensor, rewards: Tensor) -> Tensor:
    """V of each of the three states, straight from its definition: the mean reward-to-go over what may follow."""
    first = [mean_over(P, rewards.sum(1))]
    return torch.stack(first + [mean_over(P * (STATES[:, 1] == s) * MASK[:, 1], rewards[:, 1]) for s in (1, 2)])


@law(
    "every baseline that is not learned leaves the expected gradient that of E[score] − β KL: none (the reward-to-go), the mean "
    "of the batch's others, the mean of the query's others",
    "[3] section 2; Williams 1992; [9]", *TOGETHER, "credit", "PPO", "Rollout",
    table=tables, kl_coef=numbers(0, 1), baseline=st.sampled_from(["none", "batch", "group"]),
)  # fmt: skip
def test_the_gradient_is_unbiased_with_every_baseline(table, kl_coef, baseline):
    logits = table[0].clone().requires_grad_()
    logprobs, P, rewards = enumerated_rewards((logits, *table[1:]), kl_coef)
    config = impl.PPO(baseline=baseline, responses_per_query=2, whiten_advantages=False)
    expected_loss = 0.0
    for rows in map(list, itertools.product(range(7), repeat=2)):  # every batch of two responses
        rollout = impl.credit(invented(MASK[rows]), rewards.detach()[rows], config)
        losses = impl.policy_loss(logprobs[rows], logprobs[rows].detach(), rollout.advantages, 0.2)
        expected_loss = expected_loss + P.detach()[rows].prod() * losses.masked_fill(~MASK[rows], 0).sum() / 2
    (gradient,) = torch.autograd.grad(-expected_loss, logits)
    close(gradient, true_gradient(*table[:3], kl_coef))


@law(
    "without a learned baseline every token of a response is credited with its reward-to-go less the mean return of the other "
    "responses, those to its query or those of the batch; values learn nothing, and λ plays no part",
    "[9] eq. 7", "credit", "PPO", "Rollout", s=sequences("x", rows=3), gamma=positive,
)  # fmt: skip
def test_baselines_are_the_means_they_are_called(s, gamma):
    s = s[[i % len(s.lengths) for i in range(6)]]
    rewards, mask = s.dense("x"), s.mask()
    to_go = [rewards_to_go(row, gamma) for row in s.x]
    for baseline, groups in (("none", []), ("batch", [range(6)]), ("group", [range(3), range(3, 6)])):
        config = impl.PPO(baseline=baseline, responses_per_query=3, gamma=gamma, lam=0.5, whiten_advantages=False)
        expected = [list(row) for row in to_go]
        for group, i in ((members, i) for members in groups for i in members):
            others = [to_go[j][0] for j in group if j != i]
            expected[i] = [x - sum(others) / len(others) for x in to_go[i]]
        rollout = impl.credit(invented(mask, values=torch.ones_like(rewards)), rewards, config)
        close(rollout.advantages, padded(expected, mask.shape[1]))
        close(rollout.returns, padded(to_go, mask.shape[1]))
        assert not config.learns_values


@law(
    "the advantage is A = Q − V: with true values that is what λ = 0 gives, its mean over the policy's tokens is 0, and every "
    "other λ gives it in expectation over what follows",
    "[3] eq. 4 and proposition 1", *TOGETHER, "credit", table=tables, kl_coef=numbers(0, 1), lam=unit,
)  # fmt: skip
def test_the_advantage_is_q_minus_v(table, kl_coef, lam):
    _, P, rewards = enumerated_rewards(table, kl_coef)
    V = exact_values(P, rewards)
    Q = rewards.clone()
    for i, tokens in enumerate(RESPONSES):
        if len(tokens) == 2:
            same = torch.tensor([other[0] == tokens[0] for other in RESPONSES])
            Q[i, 0] = mean_over(P * same, rewards.sum(1))
    values = V[STATES].masked_fill(~MASK, 0)
    residual, _ = impl.gae(rewards, values, MASK, 1.0, 0.0)
    close(residual, (Q - values).masked_fill(~MASK, 0))
    advantages, _ = impl.gae(rewards, values, MASK, 1.0, lam)
    for a in range(3):
        following = P * torch.tensor([tokens[0] == a for tokens in RESPONSES])
        close(mean_over(following, advantages[:, 0]), mean_over(following, (Q - values)[:, 0]))
    close((P * advantages[:, 0]).sum(), 0.0)


@law(
    "at ratio 1 the bandit, where a whole response is one action with one ratio, has the gradient of Ψ = R(τ): the credit that "
    "every token gets when the score at the end is the only reward",
    "[3] eq. 1; [9] section 3", *TOGETHER, "credit", "shape_rewards", "PPO", "Rollout", table=tables,
)  # fmt: skip
def test_the_bandit_has_the_gradient_of_the_whole_return(table):
    scores, ended = table[2], torch.tensor([tokens[-1] == 2 for tokens in RESPONSES])
    config = impl.PPO(baseline="none", kl_in="loss", whiten_advantages=False, missing_eos_score=-2.0)
    rollout = invented(MASK, scores=scores, has_eos=ended)
    rollout = impl.credit(rollout, impl.shape_rewards(rollout, config), config)
    outcomes = torch.where(ended, scores, torch.tensor(-2.0).double())
    close(rollout.advantages, outcomes[:, None] * MASK)
    logits = table[0].clone().requires_grad_()
    logprobs, P = enumerate_policy(logits)
    whole = logprobs.sum(1, keepdim=True)
    of_tokens = impl.policy_loss(logprobs, logprobs.detach(), rollout.advantages, 0.2).sum(1)
    of_bandit = impl.policy_loss(whole, whole.detach(), outcomes[:, None], 0.2).squeeze(1)
    one, other = (
        torch.autograd.grad((P.detach() * x).sum(), logits, retain_graph=True)[0] for x in (of_tokens, of_bandit)
    )
    close(one, other)


@law(
    "with true values λ = 0 never has more variance than λ = 1, Monte Carlo less V (neither the reward-to-go against R(τ) nor a "
    "baseline against none can promise that)",
    "law of total variance; [3] section 3", *TOGETHER, "credit", table=tables, kl_coef=numbers(0, 1),
)  # fmt: skip
def test_td_with_true_values_has_the_lower_variance(table, kl_coef):
    _, P, rewards = enumerated_rewards(table, kl_coef)
    values = exact_values(P, rewards)[STATES].masked_fill(~MASK, 0)
    tokens = torch.nn.functional.one_hot(TOKENS, 3) - table[0].softmax(-1)[STATES]  # ∇log π by the logits of the state
    by_state = torch.nn.functional.one_hot(STATES, 3)[..., None] * tokens[:, :, None]  # (7, 2, 3, 3)
    found = []
    for lam in (0.0, 1.0):
        advantages, _ = impl.gae(rewards, values, MASK, 1.0, lam)
        gradients_ = (advantages[..., None, None] * by_state).sum(1).flatten(1)
        mean = P @ gradients_
        close(mean.view(3, 3), true_gradient(*table[:3], kl_coef))
        found.append((P @ (gradients_ - mean).square().sum(1)).item())
    assert found[0] <= found[1] + 1e-9 * (1 + found[1])


@law(
    "k3 with its arguments exchanged, over samples of the old policy, has the value and the gradient of KL(π_old ‖ π)",
    "[1] eq. 8; Schulman 2020", "kl_estimate", "logprobs_of", "update_kl", table=tables,
)  # fmt: skip
def test_exchanged_k3_is_the_kl_of_an_update(table):
    logits = table[1].clone().requires_grad_()
    (old, P), (new, _) = enumerate_policy(table[0]), enumerate_policy(logits)
    estimate = (P[:, None] * impl.kl_estimate(old, new, "k3").masked_fill(~MASK, 0)).sum()
    before, now = table[0].log_softmax(-1), logits.log_softmax(-1)
    visits = torch.stack([(P[:, None] * ((STATES == state) & MASK)).sum() for state in range(3)])
    exact = (visits * (before.exp() * (before - now)).sum(-1)).sum()
    close(estimate.detach(), exact.detach())
    close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (estimate, exact)))


@law(
    "the price of an update's KL is halved below target / 1.5 and doubled above 1.5 · target; the next update pays the new one",
    "[1] section 4", "adapted", "PPO", coef=st.floats(0.01, 10), kl=st.floats(1e-6, 1), target=st.floats(1e-4, 0.1),
)  # fmt: skip
def test_the_price_of_kl_adapts_as_in_the_paper(coef, kl, target):
    expected = coef * (0.5 if kl < target / 1.5 else 2 if kl > 1.5 * target else 1)
    assert impl.adapted(coef, kl, target) == expected
    config = ppo_config(objective="adaptive", penalty_coef=coef)
    assert config.after([]) == config.after([{"policy/update_kl": kl}]) == config
    assert config.after([{"policy/next_penalty_coef": expected}]) == replace(config, penalty_coef=expected)


@law(
    "conjugate gradients solve N equations in N steps, and come nearer in each, as the matrix measures distance",
    "Hestenes and Stiefel 1952, theorems 5:1 and 6:3", "conjugate_gradients", seed=st.integers(0, 999), n=st.integers(2, 6),
)  # fmt: skip
def test_conjugate_gradients_solve_n_equations_in_n_steps(seed, n):
    A, b = uniforms(n, n, seed).double() - 0.5, uniforms(1, n, seed + 1)[0].double()
    A, kept = A @ A.T + 0.1 * torch.eye(n), b.clone()
    errors = [
        impl.conjugate_gradients(lambda v: A @ v, b, steps) - torch.linalg.solve(A, b) for steps in range(1, n + 1)
    ]
    energies = [(e @ A @ e).item() for e in errors]
    assert energies[-1] < 1e-9 and all(a >= b for a, b in itertools.pairwise(energies)) and b.equal(kept)


@law(
    "a natural step gains, stays within δ and uses most of it, and what it gains grows as √δ; where no step gains, the policy "
    "stays as it is; no other objective takes one",
    "[6] appendix C", *STEP_NEEDS, "natural_step", "update_kl",
)  # fmt: skip
def test_a_natural_step_stays_within_the_trust_region():
    gains, config = [], ppo_config(objective="constraint")
    for delta in (4e-4, 1.6e-3, 6.4e-3):
        models = tiny_models("neox")
        models.policy.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))  # some have what no text needs
        rollout = tiny_rollout(models, config, rows=48)

        def surrogate(models=models, rollout=rollout) -> tuple[float, float]:
            """Mean of ρA over the tokens, and of KL(π_old ‖ π)."""
            with torch.no_grad():
                layout = impl.lay_out(rollout.batch)
                new = impl.response_logprobs(models.policy, layout, config.temperature)[layout.mask]
            ratio, A = (new - rollout.logprobs[layout.mask]).exp(), rollout.advantages[layout.mask]
            return (ratio * A).mean().item(), (ratio - 1 - ratio.log()).mean().item()

        before, _ = surrogate()
        told = impl.natural_step(models.policy, rollout, replace(config, target_kl=delta), engine(20))
        after, kl = surrogate()
        assert 0.8 * delta < kl <= 1.0001 * delta, (kl, delta)
        assert kl == pytest.approx(impl.update_kl(models.policy, rollout, config.temperature, engine()), rel=1e-3)
        assert told == {
            "policy/halvings": told["policy/halvings"],
            "policy/surrogate_gain": pytest.approx(after - before, abs=1e-5),
        }
        gains.append(after - before)
    assert gains[0] > 0 and all(1.8 < b / a < 2.2 for a, b in itertools.pairwise(gains)), gains
    of_rows = tiny_models("neox")  # the mean is the one asked for
    told = impl.natural_step(of_rows.policy, rollout, replace(config, average="sequence"), engine(20))
    with torch.no_grad():
        new = impl.response_logprobs(of_rows.policy, impl.lay_out(rollout.batch), config.temperature)
    gained = ((new - rollout.logprobs).exp() - 1).masked_fill(~rollout.mask, 0) * rollout.advantages
    means = [gained.sum(1) / rollout.mask.sum(1), gained.sum() / rollout.mask.sum()]
    assert told["policy/surrogate_gain"] == pytest.approx(means[0].mean().item(), abs=1e-5)
    assert abs(means[0].mean() - means[1]) > 1e-4
    read = impl.response_logprobs
    with pytest.MonkeyPatch.context() as patch:  # whatever stands in padding: exp(1000) is infinite
        patch.setattr(impl, "response_logprobs", lambda *args: read(*args) - 1000.0 * ~args[1].mask)
        again = impl.natural_step(tiny_models("neox").policy, rollout, replace(config, average="sequence"), engine(20))
    assert again == pytest.approx(told, rel=1e-5)
    start = [p.clone() for p in models.policy.parameters()]
    hopeless = replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    assert impl.natural_step(models.policy, hopeless, config, engine())["policy/surrogate_gain"] == 0
    assert all(p.equal(before) for p, before in zip(models.policy.parameters(), start))
    assert impl.natural_step(models.policy, rollout, ppo_config(), engine()) == {}
    assert all(p.equal(before) for p, before in zip(models.policy.parameters(), start))


@law(
    "whatever direction it is given, a step is taken only if it gains, and halved until the KL is within δ",
    "[6] appendix C: the line search, on both conditions", *STEP_NEEDS, "natural_step", "update_kl", "conjugate_gradients",
)  # fmt: skip
def test_the_line_search_holds_to_both_conditions():
    found, config = [], ppo_config(objective="constraint", target_kl=0.05)
    for seed in range(12):
        models = tiny_models("neox")
        rollout, start = tiny_rollout(models, config), [p.clone() for p in models.policy.parameters()]
        generator = torch.Generator().manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                impl, "conjugate_gradients", lambda product, b: 0.1 * torch.randn(len(b), generator=generator)
            )
            told = impl.natural_step(models.policy, rollout, config, engine())
        with torch.no_grad():
            new = impl.response_logprobs(models.policy, impl.lay_out(rollout.batch), config.temperature)
        ratio = (new - rollout.logprobs)[rollout.mask].exp()
        A, kl = rollout.advantages[rollout.mask], (ratio - 1 - ratio.log()).mean().item()
        assert told["policy/surrogate_gain"] == pytest.approx((ratio * A - A).mean().item(), abs=1e-5)
        assert kl <= 0.05001
        stayed = all(p.equal(before) for p, before in zip(models.policy.parameters(), start))
        assert told["policy/surrogate_gain"] > 0 or stayed
        found.append(told["policy/halvings"])
    assert 0 in found and 10 in found and set(found) & {1, 2, 3}, "the example should hold steps of every kind"


@law(
    "objectives are what they are called: ρA unclipped; less β times KL(π_old ‖ π), fixed or adapted; clipped; a constraint's "
    "own gradient is the unclipped one, and no optimizer moves its policy",
    "[1] eq. 6 to 8 and section 4; [6]", *STEP_NEEDS,
)  # fmt: skip
def test_objectives_are_what_they_are_called():
    config = ppo_config(vf_coef=0.0, penalty_coef=0.5)
    models = tiny_models("neox")
    rollout = tiny_rollout(models, config)
    shift = (uniforms(*rollout.logprobs.shape, 7) - 0.5).masked_fill(~rollout.mask, 0)
    old = replace(rollout, logprobs=rollout.logprobs - shift)
    r, A = shift.exp()[rollout.mask], rollout.advantages[rollout.mask]
    unclipped, k3 = -(r * A).mean().item(), (r - 1 - r.log()).mean().item()
    clipped = -torch.min(r * A, r.clamp(0.8, 1.2) * A).mean().item()
    assert abs(clipped - unclipped) > 1e-3 < k3
    for objective, expected in (
        ("clip", clipped), ("unclipped", unclipped), ("penalty", unclipped + 0.5 * k3), ("adaptive", unclipped + 0.5 * k3),
        ("constraint", unclipped),
    ):  # fmt: skip
        shares = ppo_losses(models, replace(config, objective=objective))(old, old)
        assert shares["loss"].item() == pytest.approx(expected, abs=1e-5), objective
        assert (shares["policy/clipfrac"] > 0) == (objective == "clip")
        gradients = torch.autograd.grad(shares["loss"], list(models.policy.parameters()), allow_unused=True)
        moved = any(gradient is not None for gradient in gradients)
        assert moved == (objective != "constraint"), "of a constraint the optimizer moves the values alone"
    check_splitting(ppo_losses(models, replace(config, objective="penalty")), old, [models.policy])


@law(
    "a constant average divides by the tokens there was room for, however many were written: longer responses weigh more, and "
    "every token the same",
    "Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv 2503.20783", *STEP_NEEDS,
)  # fmt: skip
def test_a_constant_average_divides_by_the_room():
    models, config = tiny_models("neox"), ppo_config(average="constant")
    rollout = tiny_rollout(models, config)
    assert rollout.room == 12 and rollout.mask.sum() < rollout.mask.numel() <= 8 * 12
    move_away(models)
    constant, token = (
        ppo_losses(models, replace(config, average=a))(rollout, rollout)["loss"] for a in ("constant", "token")
    )
    close(constant.detach(), token.detach() * rollout.mask.sum() / (8 * 12), tolerance=1e-5)
    short = rollout[[int(rollout.mask.sum(1).argmin())]]
    one, other = (ppo_losses(models, replace(config, average=a))(short, short)["loss"] for a in ("constant", "token"))
    close(one.detach(), other.detach() * short.mask.sum() / 12, tolerance=1e-5)


@law(
    "demonstrations add γ times SFT's loss of those shown, a mean over their tokens, however the minibatch is cut",
    "[8] eq. 2, PPO-ptx", *STEP_NEEDS, "language_model_losses",
)  # fmt: skip
def test_demonstrations_add_their_loss():
    models, config = tiny_models("neox"), ppo_config(ptx_coef=2.0)
    rollout = replace(
        tiny_rollout(models, config), shown=some_batch(tuple((1 + i % 4, 2 + i % 5) for i in range(8)), seed=9)
    )
    move_away(models)
    minibatch = rollout[[6, 1, 3, 0]]
    plain, mixed = (ppo_losses(models, config)(x, x)["loss"] for x in (replace(minibatch, shown=None), minibatch))
    nll, tokens = 0.0, 0
    for i in (6, 1, 3, 0):
        layout = impl.lay_out(rollout.shown[[i]])
        with torch.no_grad():
            nll -= impl.response_logprobs(models.policy, layout, 1.0).sum().item()
        tokens += layout.mask.sum().item()
    assert (mixed - plain).item() == pytest.approx(2 * nll / tokens, rel=1e-4)
    check_splitting(ppo_losses(models, config), minibatch, [models.policy, models.value_model])


@law(
    "an update's statistics: how far it went, KL(π_old ‖ π) per token after its last step; what the next one pays; and of the "
    "values the explained variance, 1 − E[(R − V)²] / Var(R), where values are learned",
    "[1] section 4; OpenAI baselines' explained_variance, which forgives a wrong level", *STEP_NEEDS, "update_statistics",
)  # fmt: skip
def test_update_statistics_are_what_their_names_say():
    models, config = tiny_models("neox"), ppo_config(temperature=0.7)
    rollout = tiny_rollout(models, config)
    R = rollout.returns[rollout.mask]
    move_away(models)
    layout = impl.lay_out(rollout.batch)
    with torch.no_grad():
        k1 = (rollout.logprobs - impl.response_logprobs(models.policy, layout, 0.7))[layout.mask]
    kl = ((-k1).exp() - 1 + k1).mean().item()
    assert kl > 1e-3

    def measured(rollout, config, machine) -> dict[str, float]:
        """What this law speaks of: the statistics but those of the rollout and of the steps."""
        steps = [{"policy/approxkl": 0.0, "policy/abs_log_ratio": 0.0}]
        others = impl.rollout_statistics(rollout, config) | impl.step_statistics(steps)
        moved = impl.update_kl(models.policy, rollout, config.temperature, machine)
        found = impl.update_statistics(rollout, steps, moved, config)
        assert others.items() <= found.items()
        return {name: value for name, value in found.items() if name not in others}

    for values in (rollout.values, rollout.returns, rollout.returns + 5, torch.zeros_like(rollout.values)):
        statistics = measured(replace(rollout, values=values), config, engine(3))
        explained = 1 - (R - values[rollout.mask]).square().mean().item() / R.var(correction=0).item()
        expected = {"policy/update_kl": kl, "val/explained_variance": explained}
        assert statistics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    alike = replace(rollout, returns=torch.ones_like(rollout.returns))
    assert math.isfinite(measured(alike, config, engine())["val/explained_variance"])
    config = replace(config, baseline="none", objective="adaptive", penalty_coef=0.5, target_kl=kl / 2)
    expected = {"policy/update_kl": kl, "policy/next_penalty_coef": 1.0}
    assert measured(rollout, config, engine()) == pytest.approx(expected, rel=1e-4)


CONSTRAINT = {"objective": "constraint", "target_kl": 0.003}
ADAPTIVE = {"objective": "adaptive", "target_kl": 1e-5}


def family_config(name: str, compute: object | None = None, **changes: object):
    """PPO and evaluation alone, three updates of another member of the family."""
    config = stage_config(f"family {name}", "ppo", "evaluate", compute=compute or impl.Compute())
    return replace(config, ppo=replace(config.ppo, **changes))


@law(
    "every baseline and every objective goes through a run, and its metrics show what it is: no values without a learned "
    "baseline, a price that adapts, a step within its constraint",
    "[1]; [3]; [6]; [8]; [9]; README: the family", *RUN_NEEDS, "ppo", "load_models",
)  # fmt: skip
def test_every_member_of_the_family_runs():
    members = {
        "ptx": {"ptx_coef": 0.5}, "constant": {"average": "constant"}, "adaptive": ADAPTIVE,  # whose bugs nothing else finds
        "value-head": {"baseline": "value-head"}, "group": {"baseline": "group", "responses_per_query": 4},
        "batch": {"baseline": "batch"}, "none": {"baseline": "none"}, "unclipped": {"objective": "unclipped"},
        "penalty": {"objective": "penalty", "penalty_coef": 0.5}, "value-model": {},
        "constraint": CONSTRAINT, "constraint, group": CONSTRAINT | {"baseline": "group", "responses_per_query": 4},
    }  # fmt: skip
    said: list[str] = []
    for name, changes in members.items():
        config = family_config(name, **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(impl.Run, "say", lambda run, text: said.append(text))
            calls = watched(config, "load_models", "optimizer_step")
        ((_, models),) = calls["load_models"]
        shown = [args[2].shown for args, _ in calls["optimizer_step"]]
        if name == "ptx":  # as many as episodes, and in 48 of 60 none twice, but in every epoch
            texts = Counter(tuple(query) for part in shown for query in part.queries)
            assert len(texts) == 48 and set(texts.values()) == {2}
        else:
            assert shown == [None] * 12
        updates = [record for record in metrics_of(config.folder) if record["stage"] == "ppo"]
        assert len(updates) == 3 and (config.folder / "eval.json").exists()
        learned = config.ppo.baseline in ("value-model", "value-head")
        assert (models.value_model is not None) == learned == ("val/explained_variance" in updates[0])
        assert all(update["policy/update_kl"] > 0 for update in updates), name
        prices = [update.get("policy/next_penalty_coef") for update in updates]
        assert prices == ([2.0, 4.0, 8.0] if name == "adaptive" else [None] * 3)
        natural = config.ppo.objective == "constraint"
        for update in updates if natural else ():
            assert 0 < update["policy/update_kl"] <= 0.003 * 1.001 and update["policy/surrogate_gain"] > 0
            assert update["policy/halvings"] < 10
        moved_before = updates[1]["policy/first_abs_log_ratio"] > 1e-4
        assert moved_before == natural, "natural steps come before the first minibatch"
    assert not any("ratio of a batch is not 1" in text for text in said)


@law(
    "the KL's reference is the SFT model, or another of the same tokenizer",
    "README: flags", *RUN_NEEDS, "load_models",
)  # fmt: skip
def test_another_reference_may_be_given():
    config = family_config("reference", ref_model=str(finished_run() / "base"), total_episodes=16)
    ((_, models),) = watched(config, "load_models")["load_models"]
    base = weights_of(finished_run() / "base")
    assert all(models.ref_policy.state_dict()[name].equal(weight) for name, weight in base.items())
    assert not any(p.requires_grad for p in models.ref_policy.parameters())
    assert metrics_of(config.folder)[0]["objective/kl"] > 0.01
    stranger, other = workshop() / "another reference", tiny_policy("neox", vocab=500)
    impl.save_model(other, other.state_dict(), tiny_tokenizer(), stranger)
    config = family_config("no reference", ref_model=str(stranger), total_episodes=16)
    assert "different tokenizers" in config_error(lambda: impl.start(config))


@law(
    "another round compares samples of the new policy and keeps the comparisons of before beside them",
    "[5] section 3.1; [8] section 3.5: steps 3 to 5 repeated", *RUN_NEEDS, "compare", "sample",
)  # fmt: skip
def test_a_round_adds_the_new_policys_comparisons():
    compare = impl.Compare(samples=3, policy="ppo", tie=0.0, temperature=0.7)
    config = stage_config("second round", "compare", "reward", "ppo", "evaluate", compare=compare)
    policy = watched(config, "sample")["sample"][0][0][0]
    assert policy.state_dict().keys() >= (ppo := weights_of(finished_run() / "ppo")).keys()
    assert all(policy.state_dict()[name].equal(weight) for name, weight in ppo.items())
    before, after = (
        [json.loads(line) for line in (folder / "data" / "comparisons_train.jsonl").read_text().splitlines()]
        for folder in (finished_run(), config.folder)
    )
    new = after[: -len(before)]
    assert after[-len(before) :] == before and len(new) > 60
    writers = Counter(tuple(sorted(text["policy"] for text in record["summaries"])) for record in new)
    assert set(writers) == {("ppo", "ppo"), ("other post", "ppo")}
    assert (
        max(Counter(r["info"]["post"] for r in new if all(s["policy"] == "ppo" for s in r["summaries"])).values()) == 3
    )
    valid = [json.loads(line) for line in (config.folder / "data" / "comparisons_valid.jsonl").read_text().splitlines()]
    assert all("sft" not in {text["policy"] for text in record["summaries"]} for record in valid)
    assert (config.folder / "eval.json").exists()


@law(
    "a sweep is one run for each value, in folders named by it, and one table, whose figures are those of the metrics and of "
    "eval.json",
    "[1] section 6", *RUN_NEEDS, "sweep", "outcome",
)  # fmt: skip
def test_a_sweep_makes_one_table_of_runs():
    config = replace(family_config("swept"), sweep=("ppo.objective", "clip", "penalty"))
    config = replace(config, ppo=replace(config.ppo, total_episodes=32))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        impl.sweep(config)
    title, *rows = said.getvalue().rstrip().splitlines()[-3:]
    assert title.split()[:2] == ["ppo.objective", "score"] and [row.split()[0] for row in rows] == ["clip", "penalty"]
    assert sorted(p.name for p in config.folder.parent.glob("family swept*") if p.is_dir()) == [
        "family swept-clip",
        "family swept-penalty",
    ]
    for row in rows:
        folder = config.folder.with_name(f"family swept-{row.split()[0]}")
        assert json.loads((folder / "config.json").read_text())["config"]["ppo"]["objective"] == row.split()[0]
        updates, figures = metrics_of(folder), json.loads((folder / "eval.json").read_text())["comparisons"]
        expected = [f"{sum(u['objective/scores'] for u in updates) / 2:.2f}", f"{updates[1]['objective/scores']:.2f}"]
        expected += [f"{updates[1]['objective/kl']:.2f}"]
        for pair in ("PPO T=0.01 against SFT T=0.01", "PPO T=0.7 against SFT T=0.7"):
            expected += [f"{mean:.3f} ± {(high - low) / 2:.3f}" for mean, low, high in figures[pair].values()]
        assert " ".join(row.split()[1:]) == " ".join(expected)


@law(
    "a value of a sweep that stops its run is told at the end, and the others are in the table",
    "[1] section 6", *RUN_NEEDS, "sweep",
)  # fmt: skip
def test_a_sweep_goes_on_where_one_value_stops():
    config = replace(family_config("stops"), sweep=("ppo.lr", "1e-3", "2", "1e-4"), stages=("ppo",))
    config = replace(config, ppo=replace(config.ppo, total_episodes=32))
    original = impl.optimizer_step

    def diverging(machine, optimizer, *of):
        impl.refuse(optimizer.param_groups[0]["lr"] > 1, "loss is nan", impl.Stopped)
        return original(machine, optimizer, *of)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(impl, "optimizer_step", diverging)
        message = config_error(lambda: impl.sweep(config))
    assert message.startswith("--sweep ppo.lr, 2: ppo, step 1: loss is nan; ") and "--resume" in message
    rows = [row.split() for row in said.getvalue().rstrip().splitlines()[-3:]]
    assert [(row[0], len(row) > 1) for row in rows] == [("1e-3", True), ("2", False), ("1e-4", True)]


@law(
    "a flag, a value or a folder that is refused is refused before the first run of a sweep",
    "[1] section 6", *RUN_NEEDS, "sweep",
)  # fmt: skip
def test_a_sweep_refuses_before_its_first_run():
    config = replace(family_config("refused sweep"), sweep=("ppo.objective", "clip", "penalty"))
    for wrong in (("ppo.nothing", "1"), ("ppo.objective", "clip", "nothing")):
        with contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
            impl.sweep(replace(config, sweep=wrong))
    impossible = replace(config, sweep=("ppo.batch-size", "16", "15"))
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises((SystemExit, impl.InputError)):
        impl.sweep(impossible)
    same = config_error(lambda: impl.sweep(replace(config, sweep=("ppo.kl-coef", "0.1", "0.1"))))
    assert "--sweep ppo.kl-coef" in same and "family refused sweep-0.1" in same
    there = config.folder.with_name("family refused sweep-penalty")  # the last value's
    there.mkdir()
    assert str(there) in config_error(lambda: impl.sweep(config))
    assert list(config.folder.parent.glob("family refused sweep*")) == [there]


@law(
    "a switch is swept by True and False; without PPO the table shows the other stages' own figures",
    "[1] section 6", *RUN_NEEDS, "sweep", "outcome",
)  # fmt: skip
def test_a_sweep_is_of_switches_and_of_other_stages_too():
    config = family_config("switched")
    config = replace(config, ppo=replace(config.ppo, total_episodes=16))
    switched = replace(config, sweep=("ppo.whiten-advantages", "True", "False"), stages=("ppo",))
    without = replace(config, folder=config.folder.with_name("sft swept"), sweep=("sft.lr", "0.001"), stages=("sft",))
    with contextlib.redirect_stdout(io.StringIO()) as said, watching("start") as calls:
        impl.sweep(switched)
        impl.sweep(replace(without, from_run=(finished_run(),)))
    assert [c.ppo.whiten_advantages for (c,), _ in calls["start"][:2]] == [True, False]
    title, row = said.getvalue().rstrip().splitlines()[-2:]
    loss = metrics_of(config.folder.with_name("sft swept-0.001"))[-1]["valid/loss"]
    assert title.split() == ["sft.lr", "sft", "valid/loss"] and row.split() == ["0.001", f"{loss:.3f}"]


IN_GROUPS = {"baseline": "group", "responses_per_query": 4, "ptx_coef": 0.5}


@law(
    "an adapted price, groups and demonstrations go on bit-identically after a kill",
    "D25; README: Resume", *RESUME_NEEDS,
)  # fmt: skip
def test_the_family_goes_on_after_a_kill():
    for name, changes in (("adaptive", ADAPTIVE), ("groups", IN_GROUPS)):
        config = family_config(f"killed {name}", every_step(), **changes)
        whole = impl.start(replace(config, folder=config.folder.with_name(f"whole {name}")))
        result = killed("rollout", 3, *flags_of(config))
        assert result.returncode == -9, result.stderr
        result = killed("log", 0, "--resume", config.folder)
        assert result.returncode == 0 and "going on after step 2 of 3" in result.stdout, result.stderr
        assert metrics_of(whole) == metrics_of(config.folder)
        for file in ("samples.jsonl", "eval.json", "eval.jsonl"):
            assert (whole / file).read_text() == (config.folder / file).read_text()
        assert all(x.equal(weights_of(config.folder / "ppo")[name]) for name, x in weights_of(whole / "ppo").items())


@law(
    "two processes give the run of one with an adapted price, with a natural step, and with groups and demonstrations; and "
    "all runs of a sweep",
    "D20, D25; README: Many processes", *RESUME_NEEDS,
)  # fmt: skip
def test_many_processes_give_the_family_of_one():
    constraint = CONSTRAINT | {"total_episodes": 16}  # more would add up rounding
    for name, changes in (("adaptive", ADAPTIVE), ("groups", IN_GROUPS), ("constraint", constraint)):
        small = impl.Compute(micro_batch_size=3, sample_batch_size=5)
        one = impl.start(config := family_config(f"one {name}", small, **changes))
        many = config.folder.with_name(f"two {name}")
        result = on_processes(2, "log", 0, *flags_of(replace(config, folder=many)))
        assert result.returncode == 0, result.stderr[-3000:]
        agrees_with(one, many, 1e-3 if name == "constraint" else 1e-4)
    config = stage_config("on two", "evaluate")
    result = on_processes(2, "log", 0, *flags_of(config), "--sweep", "evaluate.posts", 8, 9, 10)
    assert result.returncode == 0, result.stderr[-3000:]
    for posts in (8, 9, 10):
        folder = config.folder.with_name(f"{config.folder.name}-{posts}")
        assert json.loads((folder / "eval.json").read_text())["posts"] == posts


# -----------------------------------------------------------------------------
# on a GPU
#
# Where there is one, it is left alone but for laws that ask for it; where there is none, these are held on one that is
# not there. That shows a tensor in the wrong place; it shows no kernel, rounding, autocast, stream or memory.

from unittest import mock

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, THERE_IS_A_GPU = torch.device("cuda", 0), torch.cuda.is_available()


@pytest.fixture(autouse=True)
def elsewhere_unless_asked(request, monkeypatch):
    """Runs of --compute.device auto, also in other processes, stay on the CPU: its numbers are what laws are about."""
    if is_pmo and not getattr(request.function, "asks_for_a_gpu", False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


class Away(Tensor):
    """A tensor that says it is on a GPU and, like one there, meets only its own kind. Its numbers lie in `here`."""

    device = property(lambda self: CUDA)
    __tensor_flatten__ = lambda self: (["here"], None)  # noqa: E731, with this Module.to keeps tied weights tied
    __tensor_unflatten__ = staticmethod(lambda inner, *_: Away(inner["here"]))

    @staticmethod
    def __new__(cls, here: Tensor):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        self = Tensor._make_wrapper_subclass(cls, here.shape, **layout)
        self.here = here
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op._schema.name.removeprefix("aten::").strip("_")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name.startswith(("index_put", "unsafe_index")) or name == "index":  # a GPU's tensor takes the CPU's indices
            tensors = [args[0], *args[2:3]] if isinstance(args[0], cls) else tensors
        strangers = [x for x in tensors if not isinstance(x, cls)]
        if torch.Tag.pointwise in op.tags or name.startswith(("foreach", "index_put", "where", "masked_fill")):
            strangers = [x for x in strangers if x.dim() or (x is tensors[0] and op._schema.is_mutable)]  # scalars may
        if strangers and name != "copy":
            pytest.fail(f"Expected all tensors to be on the same device, but {op} got one from the CPU")
        result = op(*tree_map_only(cls, lambda x: x.here, args), **tree_map_only(cls, lambda x: x.here, kwargs))
        return return_and_correct_aliasing(op, args, kwargs, tree_map_only(Tensor, cls, result))


class Travel(TorchFunctionMode):
    """What moves between devices, or makes a tensor on one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, away = dict(kwargs or {}), bool(args) and isinstance(args[0], Away)
        if function in (Tensor.numpy, Tensor.__array__) and away:
            pytest.fail("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if function in (Tensor.tolist, Tensor.untyped_storage, Tensor.data_ptr) and away:
            return function(args[0].here)  # the latter two only tell whether two tensors share memory
        if function in (Tensor.cpu, Tensor.cuda):
            function, args = Tensor.to, (args[0], function.__name__)
        if function is Tensor.to:
            kwargs.pop("copy", None)
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            x = args[0] if dtype is None else function(args[0], dtype)
            if device is None or (device.type == "cuda") == away:
                return x
            return x.here.clone() if away else Away(x.detach().clone())
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            made = function(*args, **kwargs | {"device": "cpu"})
            return made if isinstance(made, Away) else Away(made)
        return function(*args, **kwargs)


@contextmanager
def a_gpu() -> Iterator[None]:
    """Inside, there is one. A mistake ends the test at once: no handler of pmo's may take it for something else."""
    answers = {"is_available": True, "device_count": 1, "set_device": None, "synchronize": None, "current_device": 0}
    answers |= {"get_device_name": "none", "max_memory_allocated": 0, "is_current_stream_capturing": False}
    answers |= {"is_bf16_supported": True, "get_rng_state": None, "set_rng_state": None}
    with contextlib.ExitStack() as stack, Travel():
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        yield


def gpu(test):
    """On this machine's GPU, or one that is not there."""
    if not test:
        return None  # pytest does not see the law anyway

    @functools.wraps(test)
    def run() -> None:
        with contextlib.nullcontext() if THERE_IS_A_GPU else a_gpu():
            test()

    run.asks_for_a_gpu = True
    return run


def smallest_config(compute, name: str = "smallest"):
    """Every stage, a few steps each."""
    tiny = tiny_config(name, compute=compute)
    return replace(
        tiny, data=replace(tiny.data, response_tokens=9, comparison_tokens=50), sft=impl.SFT(epochs=0.3),
        pretrain=replace(tiny.pretrain, epochs=0.3, layers=1), compare=impl.Compare(samples=2, posts=12, tie=0.0, temperature=0.7),
        reward=impl.Reward(epochs=0.3, batch_size=16, pretraining_pairs=8), evaluate=impl.Evaluate(posts=3),
        ppo=ppo_config(total_episodes=16, batch_size=8, num_minibatches=2, num_ppo_epochs=1, sample_every=1, responses_per_query=4),
    )  # fmt: skip


@law(
    "on a GPU that is not there tensors meet only their own kind, but for scalars and indices, as on one that is",
    "PyTorch's rules; else the next law would prove nothing", "Engine",
)  # fmt: skip
def test_the_gpu_that_is_not_there_refuses_what_a_gpu_refuses():
    with a_gpu():
        x, here = torch.ones(3, 2, device="cuda"), torch.ones(3, 2)
        assert x.device == CUDA and here.device.type == "cpu" and x.to("cpu").device.type == "cpu"
        mixed = [
            lambda: x + here, lambda: here + x, lambda: torch.cat([x, here]), lambda: x @ here.T, lambda: here[x[:, 0].long()],
            lambda: x.masked_fill(here > 0, 0), lambda: torch.where(here > 0, x, x), lambda: here.add_(x), lambda: x.numpy(),
            lambda: torch.nn.functional.embedding(torch.zeros(2, dtype=torch.long), x), lambda: here.scatter_add(0, x.long(), x),
        ]  # fmt: skip
        for mistake in mixed:
            with pytest.raises(pytest.fail.Exception):
                mistake()
        assert (x + torch.tensor(1.0)).device == CUDA and x[torch.tensor([0, 2])].cpu().equal(torch.ones(2, 2))
        assert here.copy_(x + x).equal(2 * torch.ones(3, 2)) and (x + x).tolist() == [[2.0, 2.0]] * 3
        layer = torch.nn.Linear(2, 1).to("cuda")
        layer(x).sum().backward()
        assert layer.weight.device == layer.weight.grad.device == CUDA


@law(
    "a run on a GPU that is not there has the metrics, samples, evaluation and weights of the CPU's, bit by bit; what processes "
    "would add up lies on the GPU, and no gradients lie there while it samples",
    "D25; README: GPU", *RUN_NEEDS, "Engine",
)  # fmt: skip
def test_a_run_is_the_same_on_a_gpu_that_is_not_there():
    rules()
    small = smallest_config(impl.Compute(precision="float32", micro_batch_size=5, checkpoint_minutes=0.0))
    rule = replace(small.ppo, reward_function="toy_rules:names_it", total_episodes=8)
    shared = replace(rule, kl_in="loss", average="sequence", whiten_rewards=True, baseline="value-head", ptx_coef=0.1)
    natural = replace(rule, objective="constraint", num_minibatches=1)

    def all_runs(device: str) -> list[Path]:
        runs, compute = workshop() / "runs", replace(small.compute, device=device)
        whole = impl.start(replace(small, folder=runs / f"whole {device}", compute=compute))
        quick = replace(small, from_run=(whole,), stages=("ppo",), compute=replace(compute, checkpoint_minutes=9.0))
        others = (("shared", shared), ("natural", natural))
        return [whole, *(impl.start(replace(quick, folder=runs / f"{name} {device}", ppo=ppo)) for name, ppo in others)]

    def checked(machine, tensors):
        assert machine.device.type == "cpu" or all(x.device == CUDA for x in tensors), "NCCL adds up GPU tensors only"

    def moved(machine, load, place=impl.Engine.place):
        """On a CPU, too, into memory of its own: products round by how the file's lay."""
        model = load()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return place(machine, lambda: model)

    def roomy(policy, *args: object, sample=impl.sample) -> list[list[int]]:
        assert all(parameter.grad is None for parameter in policy.parameters())
        return sample(policy, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop())
        patch.setattr(impl, "sample", roomy)
        patch.setattr(impl.Engine, "all_reduce", checked)
        patch.setattr(impl.Engine, "place", moved)
        with a_gpu():
            there = all_runs("cuda")
        here = all_runs("cpu")
    for one, other in zip(there, here):
        assert metrics_of(one) == metrics_of(other) != []
        assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
        for name in ("samples.jsonl", "eval.json", "eval.jsonl"):
            assert not (one / name).exists() or (one / name).read_text() == (other / name).read_text(), (
                f"{one.name}: {name}"
            )
        for model in (path.name for path in one.iterdir() if (path / "model.safetensors").exists()):
            for name, weight in weights_of(one / model).items():
                assert weight.equal(weights_of(other / model)[name]), f"{one.name}: {model}: {name}"


@gpu
@law(
    "on a GPU, in bfloat16, a run works and the mean |log ratio| before the first step stays below 0.02",
    "D14, D21", *RUN_NEEDS,
)  # fmt: skip
def test_a_run_on_the_gpu_in_bfloat16():
    folder = impl.start(smallest_config(impl.Compute(device="cuda", precision="bfloat16", micro_batch_size=5), "cuda"))
    updates = [record for record in metrics_of(folder) if record["stage"] == "ppo"]
    assert updates and all(record["policy/first_abs_log_ratio"] <= 0.02 for record in updates)
    assert {x.dtype for x in weights_of(folder / "ppo").values()} == {torch.float32}


@gpu
@law(
    "on a GPU in float32 log-probabilities, values and scores are the CPU's",
    "D5", *ENGINE_NEEDS, "ScalarModel",
)  # fmt: skip
def test_gpu_and_cpu_agree():
    batch, (policy, scalar) = some_batch(), (tiny_policy("neox"), tiny_scalar("neox"))

    def look(device: str) -> list[Tensor]:
        machine = impl.Engine.start(impl.Compute(device=device, precision="float32"))  # without TF32
        function = lambda x: [impl.response_logprobs(policy, x, 0.7), scalar.values(x), scalar.scores(x)]  # noqa: E731
        machine.place(lambda: policy), machine.place(lambda: scalar)
        return [x.cpu() for x in impl.map_rows(batch, machine, function)]

    for cpu, cuda in zip(look("cpu"), look("cuda")):
        close(cuda, cpu, tolerance=1e-3)


@law(
    "auto asks for bfloat16 where the GPU has it, and TF32 comes with it alone: --compute.precision float32 means float32",
    "README: GPU", "Engine", "Compute",
)  # fmt: skip
def test_float32_means_float32_on_a_gpu():
    seen, said = [], torch.get_float32_matmul_precision
    before = said()
    try:
        for precision, native, half in (
            ("auto", True, True), ("auto", False, False), ("bfloat16", False, True), ("float32", True, False),
        ):  # fmt: skip
            asked = lambda including_emulation=True, native=native: native or including_emulation  # noqa: E731
            with a_gpu(), mock.patch.object(torch.cuda, "is_bf16_supported", asked):
                machine = impl.Engine.start(impl.Compute(device="cuda", precision=precision))
            assert machine.bfloat16 == half and said() == "highest", "what checks a model needs all digits"
            with mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()), machine.autocast():
                assert said() == ("high" if half else "highest"), precision
            weight = torch.ones(1, requires_grad=True)
            weight.register_hook(lambda _: seen.append(said()))
            machine.backward(weight.sum())
            assert seen.pop() == ("high" if half else "highest") and said() == "highest"
        with impl.Engine.start(impl.Compute(device="cpu", precision="bfloat16")).autocast():
            assert said() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@law(
    "in bfloat16 logits are computed in float32 from the hidden states, so that the best two do not tie; gradients reach the "
    "head; the model is left as it was",
    "D14, D24: logits of 16 lie 1/8 apart in bfloat16", "response_logits", *ENGINE_NEEDS, family=families,
)  # fmt: skip
def test_the_head_computes_in_float32(family):
    policy, layout = tiny_policy(family), impl.lay_out(some_batch())
    head = policy.get_output_embeddings()
    with engine(bfloat16=True).autocast():
        logits, hidden = impl.response_logits(policy, layout)
        assert policy(**layout.inputs).logits.dtype == torch.bfloat16 and "forward" not in vars(head)
    assert logits.dtype == torch.float32
    close(logits, torch.nn.functional.linear(hidden.float(), head.weight), tolerance=1e-5)
    logits.square().sum().backward()
    assert head.weight.grad.abs().sum() > 0 and head.weight.grad.dtype == torch.float32
    scalar, values, dtypes = tiny_scalar(family), impl.ValueHead(16), set()
    for linear in (scalar.classifier.score, values.linear):
        linear.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    with engine(bfloat16=True).autocast():
        scalar.scores(layout), values(hidden)
    assert dtypes == {torch.float32}


@law(
    "in bfloat16 the cache of keys and values is bfloat16, lies in memory that is laid out at most twice where no row ends, "
    "never has room for more than all tokens, and the same are sampled as without that, with shared queries, too",
    "README: memory", "sample", "roomy_cache", *ENGINE_NEEDS, family=families, share=st.booleans(),
)  # fmt: skip
def test_the_cache_is_compact_and_samples_the_same(family, share):
    from transformers.cache_utils import DynamicLayer

    policy, queries = tiny_policy(family), [[1, 2, 3]] * 3 + [[4, 5, 6, 7, 8]] * 3
    draw = lambda eos=-1: impl.sample(policy, queries, uniforms(6, 9, 1), 0.7, eos, engine(bfloat16=True), share)  # noqa: E731
    dtypes, places, rooms, forward = set(), set(), [], type(policy).forward

    def watched(model, *rest, **options):
        output = forward(model, *rest, **options)
        dtypes.update(layer.keys.dtype for layer in output[cache].layers)
        places.update(layer.values.data_ptr() for layer in output[cache].layers[:1])
        rooms.extend(room.shape for layer in output[cache].layers if (room := layer.roomy_keys) is not None)
        return output

    cache = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
    watched.__signature__ = inspect.signature(forward)
    update = DynamicLayer.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(policy), "forward", watched)
        compacted = draw()
        assert dtypes == {torch.bfloat16} and DynamicLayer.update is update and len(places) <= 1 + share
        some = compacted[0][5]  # as an end: rows are dropped while others write on
        assert len(set(map(len, draw(some)))) > 1 and len({shape[0] for shape in rooms}) > 1 + share
        assert max(shape[2] for shape in rooms) == 5 + 9
        patch.setattr(impl, "roomy_cache", lambda tokens: contextlib.nullcontext())
        patch.setattr(DynamicLayer, "roomy_keys", None, raising=False)
        assert draw() == compacted and (torch.float32 in dtypes) == (family != "gpt2"), "GPT-2 rotates nothing"


# -----------------------------------------------------------------------------
# mutants: one-line bugs a competent person could write, each with the law that must catch it
#
# The bug is planted into a copy of pmo's source, in memory, and the law is held against the copy. A law that catches
# nothing is no law. Left out, because they change nothing anyone can see: the order of a sum; clamping an index that
# only padding reaches; the first pass of whiten's mean, which the second corrects.


@dataclass(frozen=True)
class Mutant:
    bug: str
    law: str
    old: str
    new: str


MUTANTS = [
    # maths
    Mutant("the response mask stops before EOS", "test_response_mask_ends_with_the_first_eos", "eos_before == 0", "is_eos.cumsum(1) == 0"),
    Mutant("a response without EOS is masked out", "test_response_mask_ends_with_the_first_eos", "is_eos.cumsum(1) - is_eos.long()", "is_eos.cumsum(1) - 1"),
    Mutant("the mask restarts after EOS", "test_response_mask_ignores_tokens_after_eos", "return eos_before == 0", "return (eos_before == 0) | ~is_eos & (eos_before > 1)"),
    Mutant("the score is read before the first pad, which is EOS", "test_the_score_is_read_at_the_first_eos", "response_mask(responses, eos_id).sum(1) - 1", "(responses != eos_id).sum(1) - 1"),
    Mutant("without EOS the score is read at the start", "test_the_score_is_read_at_the_first_eos", "response_mask(responses, eos_id).sum(1) - 1", "(responses == eos_id).int().argmax(1)"),
    Mutant("positions begin with 1", "test_left_padding_moves_no_position", "(mask.cumsum(1) - 1).clamp(min=0)", "mask.cumsum(1)"),
    Mutant("padding has position −1", "test_left_padding_moves_no_position", "(mask.cumsum(1) - 1).clamp(min=0)", "mask.cumsum(1) - 1"),
    Mutant("length masks are one too long", "test_length_mask_is_true_on_the_first_slots", "device=lengths.device) < lengths[:, None]", "device=lengths.device) <= lengths[:, None]"),
    Mutant("a missing EOS lowers the score", "test_missing_eos_replaces_the_score", "torch.full_like(scores, value))", "scores + value)"),
    Mutant("the EOS penalty hits finished responses", "test_missing_eos_replaces_the_score", "torch.where(has_eos, scores", "torch.where(~has_eos, scores"),
    Mutant("the EOS penalty is an average of two scores", "test_missing_eos_replaces_nan", "torch.where(has_eos, scores, torch.full_like(scores, value))", "has_eos * scores + ~has_eos * value"),
    Mutant("log-probabilities ignore the temperature", "test_logprobs_are_log_softmax_of_tempered_logits", "_at_least_float32(logits) / temperature\n    return -F", "_at_least_float32(logits)\n    return -F"),
    Mutant("log-probabilities multiply by the temperature", "test_logprobs_gradient_is_one_hot_minus_softmax", "_at_least_float32(logits) / temperature\n    return -F", "_at_least_float32(logits) * temperature\n    return -F"),
    Mutant("log-probabilities stay in bfloat16", "test_logprobs_and_entropy_of_half_precision_are_float32", "_at_least_float32(logits) / temperature\n    return -F", "logits / temperature\n    return -F"),
    Mutant("log-probabilities go through softmax", "test_logprobs_and_entropy_are_stable_for_huge_logits", 'return -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)', "return logits.softmax(-1).log().gather(-1, tokens[..., None]).squeeze(-1)"),
    Mutant("entropy ignores the temperature", "test_entropy_is_minus_the_expected_logprob", "(_at_least_float32(logits) / temperature).log_softmax", "_at_least_float32(logits).log_softmax"),
    Mutant("entropy of an impossible token is NaN", "test_entropy_ignores_impossible_tokens", "logprobs.clamp(min=torch.finfo(logprobs.dtype).min)", "logprobs"),
    Mutant("means divide by all slots", "test_masked_mean_is_the_mean_of_all_tokens", ".sum() / mask.sum()", ".sum() / mask.numel()"),
    Mutant("means multiply by the mask", "test_masked_mean_ignores_nan_outside_the_mask", "x.masked_fill(~mask, 0).sum() /", "(x * mask).sum() /"),
    Mutant("means are means of row means", "test_masked_mean_gradient_is_uniform_on_the_mask", "return x.masked_fill(~mask, 0).sum() / mask.sum()", "return (x.masked_fill(~mask, 0).sum(1) / mask.sum(1)).mean()"),
    Mutant("whitening uses the sample variance", "test_whiten_uses_the_population_variance", "masked_mean(centered.square(), mask).sqrt()", "(centered.square().sum() / (mask.sum() - 1).clamp(min=1)).sqrt()"),
    Mutant("whitening always shifts the mean", "test_whiten_without_shift_only_scales", "(centered if shift_mean else x)", "centered"),
    Mutant("whitening divides by the variance", "test_whiten_gives_mean_zero_and_variance_one", "masked_mean(centered.square(), mask).sqrt()", "masked_mean(centered.square(), mask)"),
    Mutant("whitening divides by the root mean square", "test_whiten_is_invariant_to_shift_and_scale", "masked_mean(centered.square(), mask).sqrt()", "masked_mean(x.square(), mask).sqrt()"),
    Mutant("whitening blows up constants", "test_whiten_leaves_constant_input_alone", "torch.where(std < 1e-6, torch.ones_like(std), std + 1e-8)", "std + 1e-8"),
    Mutant("whitening counts padding", "test_whiten_ignores_numbers_outside_the_mask", "std = masked_mean(centered.square(), mask).sqrt()", "std = centered.square().mean().sqrt()"),
    Mutant("whitening leaves numbers in padding", "test_whiten_ignores_numbers_outside_the_mask", "centered = (x - mean).masked_fill(~mask, 0)", "centered = x - mean"),
    Mutant("whitening modifies its input", "test_inputs_are_left_alone", "    x = x.masked_fill(~mask, 0)\n    mean = masked", "    x = x.masked_fill_(~mask, 0)\n    mean = masked"),
    Mutant("whitening works in float32", "test_float64_gives_float64", "    x = x.masked_fill(~mask, 0)\n    mean = masked", "    x = x.masked_fill(~mask, 0).float()\n    mean = masked"),
    Mutant("k1 has the wrong sign", "test_kl_estimate_k1_is_unbiased", "k1 = logprobs - ref_logprobs", "k1 = ref_logprobs - logprobs"),
    Mutant("k2 lacks its half", "test_kl_estimate_k2_has_its_gradient", "k1.square() / 2 if", "k1.square() if"),
    Mutant("k3 is that of the other direction", "test_kl_estimate_k3_is_unbiased", "torch.expm1(-k1) + k1", "torch.expm1(k1) - k1"),
    Mutant("k3 loses its digits near zero", "test_k3_keeps_its_digits_near_zero", "torch.expm1(-k1) + k1", "torch.exp(-k1) - 1 + k1"),
    Mutant("k2 and k3 are exchanged", "test_kl_estimate_k3_is_schulmans", 'if kind == "k2"', 'if kind == "k3"'),
    Mutant("k3 takes the mean ratio for 1", "test_kl_estimate_k3_has_its_gradient", "torch.expm1(-k1) + k1", "torch.expm1(-k1.detach()) + k1"),
    Mutant("k1 is detached from one side", "test_kl_estimate_k1_has_its_gradient", "return k1\n", "return k1 + k1.exp() - k1.exp().detach()\n"),
    Mutant("k2 is an absolute value", "test_kl_estimate_k2_is_schulmans", "k1.square() / 2 if", "-k1.abs() if"),
    Mutant("k1 is what stands in the loss", "test_kl_in_the_loss_has_a_gradient", 'kind: str = "k2"', 'kind: str = "k1"'),
    Mutant("the price of KL is squared", "test_kl_in_the_loss_has_a_gradient", "return kl_coef * kl_estimate(logprobs", "return kl_coef**2 * kl_estimate(logprobs"),
    Mutant("the score lands in the last column", "test_token_rewards_ignores_numbers_outside_the_mask", "last = mask.sum(1, keepdim=True) - 1", "last = torch.full_like(mask.sum(1, keepdim=True), mask.shape[1] - 1)"),
    Mutant("the score lands one slot after EOS", "test_score_is_paid_to_the_last_response_token", "last = mask.sum(1, keepdim=True) - 1", "last = mask.sum(1, keepdim=True).clamp(max=mask.shape[1] - 1)"),
    Mutant("the score is paid on every token", "test_score_is_paid_to_the_last_response_token", "penalties.scatter_add(1, last, scores[:, None].to(penalties.dtype))", "penalties + scores[:, None]"),
    Mutant("KL is a bonus", "test_score_is_paid_to_the_last_response_token", "(-kl_coef * kl)", "(kl_coef * kl)"),
    Mutant("KL is charged in padding", "test_token_rewards_ignores_numbers_outside_the_mask", "(-kl_coef * kl).masked_fill(~mask, 0)", "-kl_coef * kl"),
    Mutant("KL is not charged on EOS", "test_score_is_paid_to_the_last_response_token", "(-kl_coef * kl).masked_fill(~mask, 0)", "(-kl_coef * kl).masked_fill(~F.pad(mask, (0, 1))[:, 1:], 0)"),
    Mutant("the score replaces the last KL", "test_score_is_paid_to_the_last_response_token", "penalties.scatter_add(", "penalties.scatter("),
    Mutant("without KL there is no score", "test_score_is_paid_to_the_last_response_token", "return penalties.scatter_add(", "return penalties if not kl_coef else penalties.scatter_add("),
    Mutant("GAE bootstraps from padding", "test_gae_ignores_numbers_outside_the_mask", "values.masked_fill(~mask, 0)\n    next_value", "values\n    next_value"),
    Mutant("GAE multiplies by the mask", "test_gae_ignores_nan_outside_the_mask", "rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)", "rewards, values = rewards * mask, values * mask"),
    Mutant("GAE forgets γ in the residual", "test_gae_with_lambda_zero_is_the_td_residual", "gamma * next_value", "next_value"),
    Mutant("GAE forgets γ in the sum", "test_gae_is_the_discounted_sum_of_td_residuals", "gamma * lam * next_advantage", "lam * next_advantage"),
    Mutant("GAE forgets λ", "test_gae_is_the_weighted_average_of_n_step_estimators", "gamma * lam * next_advantage", "gamma * next_advantage"),
    Mutant("GAE lets the last advantage run on from the last value", "test_gae_of_one_token_is_reward_minus_value", "next_value = next_advantage = torch.zeros_like(values[:, 0])", "next_value, next_advantage = values[:, -1], torch.zeros_like(values[:, 0])"),
    Mutant("GAE never moves its next value", "test_gae_with_lambda_zero_is_the_td_residual", "        next_value = values[:, t]\n", ""),
    Mutant("GAE runs forwards", "test_gae_is_the_discounted_sum_of_td_residuals", "for t in reversed(range(values.shape[1])):", "for t in range(values.shape[1]):"),
    Mutant("returns are advantages plus rewards", "test_gae_returns_are_advantages_plus_values", "return advantages, advantages + values", "return advantages, advantages + rewards"),
    Mutant("returns are values", "test_gae_returns_are_advantages_plus_values", "return advantages, advantages + values", "return advantages, values"),
    Mutant("GAE whitens", "test_gae_is_the_discounted_sum_of_td_residuals", "return advantages, advantages + values", "return whiten(advantages, mask), advantages + values"),
    Mutant("Monte-Carlo returns are undiscounted", "test_gae_with_lambda_one_is_monte_carlo_minus_value", "delta = rewards[:, t] + gamma * next_value", "delta = rewards[:, t] + (gamma if lam < 1 else 1.0) * next_value"),
    Mutant("the clipped loss takes the better side", "test_clipping_case_3_bad_action_down_to_the_range_is_not_clipped", "-torch.min(ratio", "-torch.max(ratio"),
    Mutant("the loss is always clipped", "test_clipping_case_1_good_action_up_to_the_range_is_not_clipped", "-torch.min(ratio * advantages, clipped * advantages)", "-clipped * advantages"),
    Mutant("the loss is never clipped", "test_clipping_case_2_good_action_above_the_range_is_clipped", "-torch.min(ratio * advantages, clipped * advantages)", "-ratio * advantages"),
    Mutant("the ratio is upside down", "test_clipping_cases_1_and_3_have_the_full_gradient", "ratio = (logprobs - old_logprobs).exp()", "ratio = (old_logprobs - logprobs).exp()"),
    Mutant("only the upper side is clipped", "test_clipping_case_4_bad_action_below_the_range_is_clipped", "ratio.clamp(1 - cliprange, 1 + cliprange)", "ratio.clamp(max=1 + cliprange)"),
    Mutant("the clip range is halved", "test_clipping_case_1_good_action_up_to_the_range_is_not_clipped", "ratio.clamp(1 - cliprange, 1 + cliprange)", "ratio.clamp(1 - cliprange / 2, 1 + cliprange / 2)"),
    Mutant("the ratio is cut at 1.5", "test_wide_clip_range_gives_the_unclipped_surrogate", "ratio = (logprobs - old_logprobs).exp()", "ratio = (logprobs - old_logprobs).exp().clamp(max=1.5)"),
    Mutant("the objective is not negated", "test_clipping_case_1_good_action_up_to_the_range_is_not_clipped", "return -torch.min(ratio", "return torch.min(ratio"),
    Mutant("the policy loss is reduced", "test_policy_loss_depends_on_the_ratio_alone", "return -torch.min(ratio * advantages, clipped * advantages)", "return -torch.min(ratio * advantages, clipped * advantages).mean()"),
    Mutant("advantages lose their size", "test_clipping_case_4_bad_action_below_the_range_is_clipped", "return -torch.min(ratio * advantages", "advantages = advantages.sign()\n    return -torch.min(ratio * advantages"),
    Mutant("the ratio carries no gradient", "test_clipping_cases_1_and_3_have_the_full_gradient", "ratio = (logprobs - old_logprobs).exp()", "ratio = (logprobs - old_logprobs).exp().detach() + 0 * logprobs"),
    Mutant("values are clipped around 0", "test_value_loss_is_the_worse_of_clipped_and_unclipped", "values.clamp(old_values - cliprange_value, old_values + cliprange_value)", "values.clamp(-cliprange_value, cliprange_value)"),
    Mutant("a value's clip rounds", "test_a_value_inside_its_clip_is_not_counted", "values.clamp(old_values - cliprange_value, old_values + cliprange_value)", "old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)"),
    Mutant("the value loss takes the better side", "test_value_loss_gradient_stops_beyond_the_clip", "torch.max((values - returns)", "torch.min((values - returns)"),
    Mutant("the value loss lacks its half", "test_value_loss_is_the_worse_of_clipped_and_unclipped", "(clipped - returns).square()) / 2", "(clipped - returns).square())"),
    Mutant("values are clipped from above only", "test_value_loss_is_the_worse_of_clipped_and_unclipped", "values.clamp(old_values - cliprange_value, old_values + cliprange_value)", "values.clamp(max=old_values + cliprange_value)"),
    Mutant("aggregate ignores the count it is given", "test_aggregate_token_of_parts_adds_up_to_the_whole", "(mask.sum() if normalizer is None else normalizer)", "mask.sum()"),
    Mutant("aggregate ignores the count of rows", "test_aggregate_sequence_of_parts_adds_up_to_the_whole", "(len(rows) if normalizer is None else normalizer)", "len(rows)"),
    Mutant("the loss is a mean of micro-batches' means", "test_micro_batches_change_no_loss", '{"token": whole.sum(),', '{"token": mask.sum() * len(whole) / len(mask),'),
    Mutant("the loss is a sum over micro-batches", "test_micro_batches_change_no_loss", '{"token": whole.sum(),', '{"token": mask.sum(),'),
    Mutant("sequence means divide by the width", "test_aggregate_sequence_is_the_mean_of_row_means", "losses.sum(1) / mask.sum(1)", "losses.mean(1)"),
    Mutant("sequence means are sums", "test_aggregate_sequence_is_the_mean_of_row_means", "losses.sum(1) / mask.sum(1)", "losses.sum(1)"),
    Mutant("aggregate multiplies by the mask", "test_aggregate_token_ignores_nan_outside_the_mask", "losses = losses.masked_fill(~mask, 0)", "losses = losses * mask"),
    Mutant("the preferred text is pushed down", "test_preference_loss_is_bradley_terry", "F.logsigmoid(chosen - rejected)", "F.logsigmoid(rejected - chosen)"),
    Mutant("a pair is compared where the chosen text ends", "test_pair_loss_is_that_of_the_last_tokens", "at_last(rejected, n_rejected)", "at_last(rejected, n_chosen)"),
    Mutant("a pair is compared in the last column", "test_pair_loss_is_that_of_the_last_tokens", "at_last(chosen, n_chosen), at_last(rejected, n_rejected)", "chosen[:, -1], rejected[:, -1]"),
    Mutant("a pair is compared token by token, padding too", "test_pair_loss_is_that_of_the_last_tokens", "preference_loss(at_last(chosen, n_chosen), at_last(rejected, n_rejected), weights)", "preference_loss(chosen, rejected)"),
    Mutant("the preference loss overflows", "test_preference_loss_is_stable", "F.logsigmoid(chosen - rejected)", "torch.sigmoid(chosen - rejected).log()"),
    Mutant("the preference loss regularises the scores", "test_preference_loss_is_bradley_terry", "losses = -F.logsigmoid(chosen - rejected)\n", "losses = -F.logsigmoid(chosen - rejected) + chosen.square()\n"),
    Mutant("rewards skip KL for the first token", "test_gradient_is_unbiased_with_any_baseline", "(-kl_coef * kl).masked_fill(~mask, 0)", "(-kl_coef * kl).masked_fill(~mask, 0) * (torch.arange(kl.shape[1]) > 0)"),
    Mutant("logits are cut off at 2", "test_logprobs_and_entropy_depend_on_logit_differences_over_temperature", "_at_least_float32(logits) / temperature\n    return -F", "_at_least_float32(logits).clamp(max=2) / temperature\n    return -F"),
    Mutant("k1 is an absolute value", "test_kl_estimate_k1_is_schulmans", "k1 = logprobs - ref_logprobs", "k1 = (logprobs - ref_logprobs).abs()"),
    Mutant("means count what is outside", "test_masked_mean_ignores_numbers_outside_the_mask", "x.masked_fill(~mask, 0).sum() /", "x.nan_to_num().sum() /"),
    Mutant("whitening without a shift keeps its padding", "test_whiten_ignores_nan_outside_the_mask", "    x = x.masked_fill(~mask, 0)\n    mean = masked", "    mean = masked"),
    Mutant("rewards multiply by the mask", "test_token_rewards_ignores_nan_outside_the_mask", "(-kl_coef * kl).masked_fill(~mask, 0)", "(-kl_coef * kl) * mask"),
    Mutant("token means divide by all slots", "test_aggregate_token_is_the_mean_over_tokens", "(mask.sum() if normalizer is None else normalizer)", "(mask.numel() if normalizer is None else normalizer)"),
    Mutant("losses in padding count", "test_aggregate_token_ignores_numbers_outside_the_mask", "losses = losses.masked_fill(~mask, 0)", "losses = losses.nan_to_num()"),
    Mutant("padding lowers sequence means", "test_aggregate_sequence_ignores_numbers_outside_the_mask", "rows = losses.sum(1) / mask.sum(1)", "rows = losses.sum(1) / mask.shape[1]"),
    Mutant("sequence means multiply by the mask", "test_aggregate_sequence_ignores_nan_outside_the_mask", "losses = losses.masked_fill(~mask, 0)", "losses = losses * mask"),
    Mutant("half of the next value counts", "test_gradient_is_unbiased_for_every_lambda_with_true_values", "        next_value = values[:, t]\n", "        next_value = values[:, t] / 2\n"),
    Mutant("KL is charged twice", "test_gradient_is_zero_at_the_closed_form_optimum", "(-kl_coef * kl)", "(-2 * kl_coef * kl)"),
    Mutant("log-probabilities are smoothed", "test_logprobs_are_log_softmax_of_tempered_logits", "tokens.flatten(), reduction=\"none\")", "tokens.flatten(), reduction=\"none\", label_smoothing=0.1)"),
    Mutant("float64 logits are cut to float32", "test_float64_gives_float64", "return x if x.dtype == torch.float64 else x.float()", "return x.float()"),
    Mutant("k3 lacks its k1", "test_kl_estimate_k3_is_schulmans", "torch.expm1(-k1) + k1", "torch.expm1(-k1)"),
    Mutant("k1 is cut off at 10", "test_k1_of_very_different_policies", "k1 = logprobs - ref_logprobs", "k1 = (logprobs - ref_logprobs).clamp(-10, 10)"),
    Mutant("whitening takes the spread of the first row", "test_rows_may_stand_in_any_order", "std = masked_mean(centered.square(), mask).sqrt()", "std = masked_mean(centered[:1].square(), mask[:1]).sqrt()"),
    Mutant("whitening adds ε to the variance", "test_whiten_adds_epsilon_outside_the_root", "masked_mean(centered.square(), mask).sqrt()", "(masked_mean(centered.square(), mask) + 1e-8).sqrt()"),
    Mutant("whitening gives up at a spread of 0.01", "test_whiten_scales_up_a_small_spread", "torch.where(std < 1e-6,", "torch.where(std < 1e-2,"),
    Mutant("scores are cut off at 10", "test_large_scores_are_paid", "scores[:, None].to(penalties.dtype)", "scores.clamp(-10, 10)[:, None].to(penalties.dtype)"),
    Mutant("KL in the reward is cut off at 10", "test_large_kl_is_paid", "(-kl_coef * kl)", "(-kl_coef * kl.clamp(-10, 10))"),
    Mutant("scores go to the wrong rows", "test_token_rewards_and_gae_treat_each_response_alone", "scores[:, None].to(penalties.dtype)", "scores.roll(1)[:, None].to(penalties.dtype)"),
    Mutant("GAE lets half of a gradient through", "test_gae_lets_no_part_of_a_gradient_through", "        next_value = values[:, t]\n", "        next_value = values[:, t].detach()\n"),
    Mutant("the wrong policy of the ratio is detached", "test_old_logprobs_get_no_other_gradient", "ratio = (logprobs - old_logprobs).exp()", "ratio = (logprobs.detach() - old_logprobs).exp()"),
    Mutant("clipped tokens keep their gradient", "test_clipping_cases_2_and_4_have_no_gradient", "clipped = ratio.clamp(1 - cliprange, 1 + cliprange)", "clipped = ratio + (ratio.clamp(1 - cliprange, 1 + cliprange) - ratio).detach()"),
    Mutant("bad actions cost at most 5A", "test_policy_loss_of_extreme_ratios", "return -torch.min(ratio * advantages, clipped * advantages)", "loss = -torch.min(ratio * advantages, clipped * advantages)\n    return torch.where(advantages < 0, torch.min(loss, -5 * advantages), loss)"),
    Mutant("padding has a gradient of NaN", "test_masked_losses_are_finite_over_nan", "losses = losses.masked_fill(~mask, 0)", "losses = torch.where(mask, losses.exp().log(), 0)"),
    Mutant("policy losses are in float64", "test_float32_gives_float32", "ratio = (logprobs - old_logprobs).exp()", "ratio = (logprobs - old_logprobs).double().exp()"),
    Mutant("the value loss has half its gradient", "test_value_loss_gradient_inside_the_clip_is_the_error", "torch.max((values - returns).square(), (clipped", "torch.max((values - returns) * (values - returns).detach(), (clipped"),
    Mutant("token losses carry no gradient", "test_aggregate_token_gradient_of_parts_is_that_of_the_whole", "return losses.sum() / (mask", "return losses.detach().sum() / (mask"),
    Mutant("sequence losses carry no gradient", "test_aggregate_sequence_gradient_of_parts_is_that_of_the_whole", "rows = losses.sum(1) / mask.sum(1)", "rows = losses.sum(1).detach() / mask.sum(1)"),
    Mutant("the preference loss stops learning at a margin of 50", "test_preference_loss_gradient_is_stable", "F.logsigmoid(chosen - rejected)", "F.logsigmoid(rejected.detach().expand_as(chosen) * 0 + (chosen - rejected).clamp(-50))"),
    Mutant("a baseline divides by the whole group", "test_leave_one_out_is_the_mean_of_the_others", "groups) / (G - 1)", "groups) / G"),
    Mutant("a response is in its own baseline", "test_leave_one_out_is_the_mean_of_the_others", "((groups.sum(1, keepdim=True) - groups) / (G - 1))", "groups.mean(1, keepdim=True).expand_as(groups)"),
    Mutant("members of a group are no neighbours", "test_leave_one_out_is_the_mean_of_the_others", "groups = returns.view(-1, G)\n    return ((groups.sum(1, keepdim=True)", "groups = returns.view(G, -1)\n    return ((groups.sum(0, keepdim=True)"),
    Mutant("weighted pairs are averaged", "test_preference_loss_of_weighted_pairs_is_their_weighted_sum", "(losses * weights).sum()", "(losses * weights).mean()"),
    Mutant("pairs have no weights", "test_preference_loss_of_weighted_pairs_is_their_weighted_sum", "losses.mean() if weights is None else (losses * weights).sum()", "losses.mean()"),
    # data
    Mutant("posts are cut at their first newline", "test_truncation_is_by_paragraph_then_by_character", "return post[: newlines[fitting - 1]]", "return post[: newlines[0]]"),
    Mutant("posts are cut in mid-paragraph", "test_long_queries_lose_paragraphs_and_keep_the_rest", "    if fitting:\n", "    if False:\n"),
    Mutant("truncation keeps one character too many", "test_truncation_is_by_paragraph_then_by_character", "key=lambda cut: not fits(post[:cut])) - 1]", "key=lambda cut: not fits(post[:cut]))]"),
    Mutant("truncation of the impossible gives nothing", "test_truncation_that_cannot_succeed_is_an_error", 'refuse(not fits(""), "even an empty post does not fit: title and template are too long")', ""),
    Mutant("responses lack their space", "test_queries_and_responses_are_formatted_as_in_the_paper", 'else " " + text.strip() for', "else text.strip() for"),
    Mutant("responses lack EOS", "test_queries_and_responses_are_formatted_as_in_the_paper", "[[*tokens, self.eos_id] for", "[[*tokens] for"),
    Mutant("text can become EOS", "test_queries_and_responses_are_formatted_as_in_the_paper", '"split_special_tokens": not special', '"split_special_tokens": False'),
    Mutant("every epoch has the same order", "test_noise_is_addressed_by_the_episode", "rng(seed, purpose, epoch).permutation(n)", "rng(seed, purpose).permutation(n)"),
    Mutant("shuffles draw with replacement", "test_shuffles_use_every_example_once_per_epoch", "rng(seed, purpose, epoch).permutation(n)", "rng(seed, purpose, epoch).integers(0, n, n)"),
    Mutant("the seed is ignored", "test_noise_is_addressed_by_the_episode", "default_rng([seed, zlib", "default_rng([0, zlib"),
    Mutant("the choice is upside down", "test_the_choice_is_the_chosen_text", "texts[choice], texts[1 - choice]", "texts[1 - choice], texts[choice]"),
    Mutant("fields may be numbers", "test_any_record_is_parsed_or_refused", "refuse(not isinstance(text, str), f\"field '{name}' is missing or not text\")", "if not isinstance(text, str):\n        return text"),
    Mutant("articles are read as posts", "test_both_forms_of_the_data_are_read", 'if "article" in info and "post" not in info:', "if False:"),
    Mutant("broken records pass in silence", "test_broken_records_are_counted_or_refused", "refuse(bad > 0.01 * (bad + len(records)),", "refuse(False,"),
    Mutant("broken records are not reported", "test_broken_records_are_counted_or_refused", 'unusable += [f"line {number}: {error}"] if bad <= 3 else []', "bad -= 1"),
    Mutant("log-probabilities come one position late", "test_response_logprobs_are_the_plain_models", "torch.cat([before, place[:, :-1]], dim=1)", "torch.cat([before + 1, place[:, 1:]], dim=1)"),
    Mutant("ROUGE-L is recall", "test_rouge_l_is_the_f1_of_the_longest_common_subsequence", "2 * row[-1] / max(1, len(a) + len(b))", "row[-1] / max(1, len(b))"),
    Mutant("the labeler pays for words that fit every post", "test_the_labeler_judges_the_post_not_the_style", "max(0.0, math.log(0.1", "max(1.0, math.log(0.1"),
    Mutant("near-duplicates stay in the corpus", "test_the_corpus_has_no_near_duplicates", "if not keys & seen:", "if not keys <= seen:"),
    Mutant("titles are measured in characters", "test_a_title_without_room_gives_no_query", "return len(tokens(text)) <= self.data.query_tokens", "return len(post.title) + len(text) < self.data.query_tokens"),
    Mutant("the split depends on the seed", "test_the_splits_of_the_corpus_share_no_file", 'rng(0, "split")', 'rng(run.config.seed, "split")'),
    Mutant("words are not cut to stems", "test_the_labelers_score_is_the_formula_it_says", "[word[:6] for word in", "[word for word in"),
    Mutant("a library that is missing is read as another", "test_docstrings_become_posts", 'if spec is None and library != "python":  # not installed\n            continue', "if False:\n            continue"),
    Mutant("equal texts are a pair", "test_what_fits_is_kept_whole", "<= limit and a != b for", "<= limit for"),
    Mutant("half a sentence is a good summary", "test_the_corpus_has_no_near_duplicates", ' and summary[-1] == "."', ""),
    # models
    Mutant("the score is read before EOS", "test_values_are_read_before_and_scores_at_each_token", "return self(layout, layout.place)", "return self(layout, layout.place - 1)"),
    Mutant("the score is read in the last column", "test_padding_changes_no_logprob_value_or_score", "return at_last(self.outputs(layout), layout.mask.sum(1))", "return self.outputs(layout)[:, -1]"),
    Mutant("values see the action they judge", "test_values_are_read_before_and_scores_at_each_token", "return self(layout, layout.index)", 'return self(layout, (layout.index + 1).clamp(max=layout.inputs["input_ids"].shape[1] - 1))'),
    Mutant("padding attends as text", "test_ids_in_padding_do_not_matter", ".last_hidden_state[layout.row, index]", ".last_hidden_state\n        hidden = (hidden + hidden.mean(1, keepdim=True))[layout.row, index]"),
    Mutant("centring adds the mean", "test_centring_is_idempotent", "self.bias.sub_(mean_score)", "self.bias.add_(mean_score)"),
    Mutant("the offset is saved with the wrong sign", "test_saved_reward_model_gives_the_same_scores_in_transformers", "score_offset = -weights.pop(\"bias\")", "score_offset = weights.pop(\"bias\")"),
    Mutant("the offset is not loaded", "test_value_model_starts_as_the_reward_model", "torch.tensor([-offset])", "torch.tensor([0.0])"),
    Mutant("pad stays EOS", "test_saved_reward_model_gives_the_same_scores_in_transformers", "if pad is None or pad == eos or pad >= size:", "if pad is None or pad >= size:"),
    Mutant("the reward head starts too small", "test_reward_head_starts_with_the_papers_spread", "/ math.sqrt(head.weight.shape[1] + 1)", "/ (head.weight.shape[1] + 1)"),
    Mutant("dropout is on", "test_models_load_without_dropout_in_float32", "model.eval(), model.config.get_text_config()", "model.train(), model.config.get_text_config()"),
    Mutant("weights keep the checkpoint's precision", "test_models_load_without_dropout_in_float32", '{"dtype": torch.float32, "output', '{"dtype": "auto", "output'),
    Mutant("positions count padding", "test_sampling_does_not_depend_on_the_batch", "position_ids = positions(attention)", "position_ids = torch.arange(Q).expand_as(tokens)"),
    Mutant("the sampler attends to padding", "test_sampling_does_not_depend_on_the_batch", "[[0] * (Q - len(q)) + [1] * len(q) for q in queries]", "[[1] * Q for q in queries]"),
    Mutant("the sampler ignores the temperature", "test_sampling_frequencies_are_the_tempered_softmax", "(logits.float() / temperature).softmax", "logits.float().softmax"),
    Mutant("the sampler leaves out rare tokens", "test_rollout_distribution_is_the_scored_distribution", ".softmax(-1).cumsum(-1)", ".softmax(-1).pow(1.2).cumsum(-1)"),
    Mutant("noise 0 draws an impossible token", "test_impossible_tokens_are_never_sampled", "right=True)", "right=False)"),
    Mutant("responses go on after EOS", "test_sampled_responses_end_with_eos_or_are_full", "[response[: i + 1] for response, i in zip(responses.tolist(), last)]", "responses.tolist()"),
    Mutant("probabilities are summed with eight bits", "test_bfloat16_loses_no_rare_tokens", "(logits.float() / temperature).softmax", "(logits.bfloat16() / temperature).softmax"),
    Mutant("new weights do not depend on the seed", "test_a_seed_decides_new_weights", 'rng(seed, "small model", i)', 'rng(0, "small model", i)'),
    # stages
    Mutant("the value model's loss is forgotten", "test_ppo_loss_adds_up", "value_losses)[: 1 + separate]", "value_losses)[:1]"),
    Mutant("a value head's loss is forgotten", "test_ppo_loss_adds_up", '{"loss": loss + of_values["loss"]}', '{"loss": loss}'),
    Mutant("the value loss has full weight", "test_ppo_loss_adds_up", "config.vf_coef * loss}", "loss}"),
    Mutant("approxkl lacks its half", "test_ppo_loss_adds_up", "token_mean(log_ratio.square() / 2)", "token_mean(log_ratio.square())"),
    Mutant("clipfrac counts ratios, not clips", "test_ppo_loss_adds_up", "(losses > unclipped)", "(log_ratio.abs() > config.cliprange)"),
    Mutant("each micro-batch divides by its own tokens", "test_ppo_micro_batches_do_not_change_the_step", "token_mean = partial(minibatch_share, mask=part.mask, whole=whole.mask)", "token_mean = partial(minibatch_share, mask=part.mask, whole=part.mask)"),
    Mutant("SFT divides by the micro-batch's tokens", "test_sft_micro_batches_do_not_change_the_step", 'of_query, "token", whole.response_tokens)', 'of_query, "token", part.response_tokens)'),
    Mutant("reward losses of micro-batches are not shares", "test_reward_micro_batches_do_not_change_the_step", "weights, device=scores.device) / len(whole)", "weights, device=scores.device) / len(part)"),
    Mutant("SFT does not learn EOS", "test_sft_loss_is_over_response_tokens_and_eos", "losses, layout.mask & ~of_query,", "losses, F.pad(layout.mask, (0, 1))[:, 1:] & ~of_query,"),
    Mutant("Adam has its default eps", "test_optimizer_steps_are_adams_with_clipped_gradients", "eps=1e-5", "eps=1e-8"),
    Mutant("weights decay", "test_optimizer_steps_are_adams_with_clipped_gradients", "weight_decay=0.0", "weight_decay=0.01"),
    Mutant("gradients are not clipped", "test_optimizer_steps_are_adams_with_clipped_gradients", 'optimizer.param_groups[0]["max_grad_norm"] or math.inf', "math.inf"),
    Mutant("non-finite losses are stepped on", "test_non_finite_losses_stop_before_the_step", "refuse(not math.isfinite(statistics[name]), said", "refuse(False, said"),
    Mutant("warm-up starts at 0", "test_schedules_rise_and_fall", "min(1.0, (step + 1) / max", "min(1.0, step / max"),
    Mutant("a missing EOS costs nothing", "test_rewards_follow_the_flags", "scores = penalize_missing_eos(rollout.scores, rollout.has_eos, config.missing_eos_score)\n    kl =", "scores = rollout.scores\n    kl ="),
    Mutant("KL is charged twice", "test_rewards_follow_the_flags", 'config.kl_coef if config.kl_in == "reward" else 0.0', "config.kl_coef"),
    Mutant("reward whitening shifts the mean", "test_rewards_follow_the_flags", "whiten(rewards, rollout.mask, shift_mean=False)", "whiten(rewards, rollout.mask)"),
    Mutant("KL in the loss is k1", "test_kl_in_the_loss_adds_its_price", '("k1" if self.kl_in == "reward" else "k2")', '"k1"'),
    Mutant("the reference is the policy", "test_rollout_holds_what_each_model_said", "batch_logprobs(models.ref_policy, batch", "batch_logprobs(models.policy, batch"),
    Mutant("old log-probabilities are at temperature 1", "test_ratio_is_one_before_the_first_step", "return [logprobs_of(logits, layout.responses, temperature), entropy", "return [logprobs_of(logits, layout.responses, 1.0), entropy"),
    Mutant("rollouts keep numbers in padding", "test_rollout_holds_what_each_model_said", "part.masked_fill(~layout.mask, 0)", "part"),
    Mutant("objective/kl is a token mean", "test_rollout_statistics_are_what_their_names_say", "kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)", "kl = (rollout.logprobs - rollout.ref_logprobs).mean(1)"),
    Mutant("the verdict forgets its intervals", "test_the_verdict_claims_no_more_than_its_intervals", '"up" if low > neutral', '"up" if mean > neutral'),
    Mutant("standard deviations pass for standard errors", "test_the_verdict_claims_no_more_than_its_intervals", "float(1.96 * x.std() / math.sqrt(max(1, len(x) - 1)))", "float(1.96 * x.std())"),
    Mutant("ties count nothing", "test_ties_count_half", "(a > b) + (a == b) / 2", "(a > b) + (a == b) * 0.0"),
    Mutant("settings are not checked against each other", "test_contradictions_are_refused_with_both_numbers", "refuse(flags[whole] % flags[part] != 0, f", "refuse(False, f"),
    Mutant("the judge prefers the worse text", "test_comparisons_are_the_labelers", "int(scores[1] > scores[0])", "int(scores[1] < scores[0])"),
    Mutant("all samples of a post share their noise", "test_samples_of_a_post_are_independent", 'noise(seed, f"compare {split} {k}",', 'noise(seed, f"compare {split}",'),
    Mutant("the value model's bias does not train", "test_the_four_models_start_where_they_should", 'ScalarModel.load(run.path("reward"), train_bias=True)', 'ScalarModel.load(run.path("reward"))'),
    Mutant("KL is marked upside down", "test_evaluation_columns_belong_to_their_models", "(one - two).sum(1).cpu()", "(two - one).sum(1).cpu()"),
    Mutant("KL is marked at temperature 1", "test_evaluation_columns_belong_to_their_models", "(batch_logprobs(model, batch, warm, engine) for model", "(batch_logprobs(model, batch, 1.0, engine) for model"),
    Mutant("another post is the same post", "test_marks_are_what_they_are_called", "for response in batch.responses], far_away(posts)", "for response in batch.responses], posts"),
    Mutant("SFT and PPO change columns", "test_evaluation_columns_belong_to_their_models", 'policy_of(run, run.path(name.lower())) for name in ("SFT", "PPO")}', 'policy_of(run, run.path(name.lower())) for name in ("SFT", "PPO")}\n    policies = dict(zip(policies, reversed(policies.values())))'),
    Mutant("the validation posts are the test", "test_evaluation_columns_belong_to_their_models", '"test": data.test or data.valid', '"test": data.valid'),
    Mutant("an earlier run comes before this one", "test_a_runs_own_folder_comes_first", "(self.folder, *self.config.from_run) if own", "(*self.config.from_run, self.folder) if own"),
    Mutant("BOS is forgotten", "test_bos_where_the_tokenizer_has_one", "rows = [self.start + query for query in self.encode", "rows = [query for query in self.encode"),
    Mutant("accuracy is inverted", "test_reward_accuracies_are_shares_of_pairs", "wins = wins_of(scores[better], scores[worse])", "wins = wins_of(scores[worse], scores[better])"),
    Mutant("every shown text has the author's score", "test_shown_samples_belong_to_their_models", "[post], codec, engine, Batch(queries, responses))", '[post], codec, engine, Batch(queries, written["author"]))'),
    Mutant("shown texts change names", "test_shown_samples_belong_to_their_models", "models.ref_policy), (\"ppo\", models.policy))", "models.policy), (\"ppo\", models.ref_policy))"),
    Mutant("val/clipfrac compares a half with a whole", "test_ppo_loss_adds_up", "clipped = (2 * losses > (values", "clipped = (losses > (values"),
    Mutant("every update has the same noise", "test_every_update_sees_its_own_episodes", 'noise(seed, "episodes", episodes, T)', 'noise(seed, "episodes", range(config.batch_size), T)'),
    Mutant("every update has the same posts", "test_every_update_sees_its_own_episodes", "len(posts), episodes, config.responses_per_query)", "len(posts), range(config.batch_size), config.responses_per_query)"),
    Mutant("value targets come from whitened advantages", "test_every_update_sees_its_own_episodes", "        advantages = whiten(advantages, rollout.mask)\n", "        advantages = whiten(advantages, rollout.mask)\n        returns = advantages + rollout.values\n"),
    Mutant("own and exchanged summaries are swapped", "test_the_reward_model_sees_each_pair_once_the_right_way_round", "Ranking(query, [own, other], [(0, 1)])", "Ranking(query, [other, own], [(0, 1)])"),
    Mutant("comparisons are never trained on", "test_the_reward_model_sees_each_pair_once_the_right_way_round", "own.against_others() + [rankings[i] for i in order]", "own.against_others()"),
    Mutant("SFT ends at half its learning rate", "test_logged_learning_rates_follow_their_schedules", "schedule(step / len(steps))", "schedule(step / (2 * len(steps)))"),
    Mutant("the reward model's rate does not fall", "test_logged_learning_rates_follow_their_schedules", "warmup(step, len(steps)) * cosine(step / len(steps))", "warmup(step, len(steps))"),
    Mutant("test posts are trained on", "test_the_splits_of_the_corpus_share_no_file", "posts += unused.pop()", "posts += unused.pop() if len(posts) + 10 < (size or 10**9) else unused[-1]"),
    Mutant("win rates are the loser's", "test_the_report_names_the_winner_at_each_temperature", "compare_marks(marks[a], marks[b], prefer(a, b))", "compare_marks(marks[a], marks[b], prefer(b, a))"),
    Mutant("the verdict exchanges the temperatures", "test_the_report_names_the_winner_at_each_temperature", "lines.append(f\"    {pair}: {', '", "lines.append(f\"    {next(reversed(versus))}: {', '"),
    Mutant("repeating a word costs nothing", "test_the_labelers_score_is_the_formula_it_says", "len(word) > 3 and word in words[:i] for", "0 for"),
    Mutant("unsupported words cost nothing", "test_the_labelers_score_is_the_formula_it_says", "sum(self.rarity(word) for word in words if word not in about)", "0.0"),
    Mutant("repeating an article costs something", "test_the_labelers_score_is_the_formula_it_says", "len(word) > 3 and word in words[:i] for", "word in words[:i] for"),
    Mutant("the penalty has no bound", "test_the_labelers_score_is_the_formula_it_says", "- 0.2 * u / (1 + u)", "- 0.2 * u"),
    Mutant("posts may be nameless", "test_the_corpus_has_no_near_duplicates", "if not post.title or not sentence", "if not sentence"),
    Mutant("the title counts once", "test_the_labelers_score_is_the_formula_it_says", 'f"{text.title} {text.title} {text.post}"', 'f"{text.title} {text.post}"'),
    Mutant("to repeat a word pays", "test_the_labelers_score_is_the_formula_it_says", "self.weights(list(dict.fromkeys(words)))", "self.weights(words)"),
    Mutant("term frequency is not damped", "test_the_labelers_score_is_the_formula_it_says", "(1 + math.log(count)) * self", "count * self"),
    Mutant("comparisons are drawn at temperature 1", "test_comparisons_are_all_pairs_at_their_temperature", "uniforms, config.compare.temperature, codec.eos_id, run.engine, share)\n        drafts", "uniforms, 1.0, codec.eos_id, run.engine, share)\n        drafts"),
    Mutant("comparisons are always drawn at PPO's temperature", "test_comparisons_are_all_pairs_at_their_temperature", "uniforms, config.compare.temperature, codec", "uniforms, config.ppo.temperature, codec"),
    Mutant("only the best and the worst are compared", "test_comparisons_are_all_pairs_at_their_temperature", "enumerate(combinations(ranked, 2))", "enumerate([(ranked[0], ranked[-1])])"),
    Mutant("any difference is a preference", "test_comparisons_are_the_labelers", "if abs(scores[0] - scores[1]) <= tie or", "if scores[0] == scores[1] or"),
    Mutant("the warm-up asks for summaries", "test_what_is_asked_for_in_pretraining_and_sft", "codec.responses(repeated, posts)", "codec.responses([post.summary for post in posts], posts)"),
    Mutant("the warm-up ignores the prompt", "test_what_is_asked_for_in_pretraining_and_sft", "batch, 1.0, lambda", "batch, 0.0, lambda"),
    Mutant("the control exchanges nothing", "test_held_out_figures_are_the_saved_models", "held_out_loss(model, valid.exchanged(), run.engine)", "held_out_loss(model, valid, run.engine)"),
    Mutant("accuracy is measured on training pairs", "test_held_out_figures_are_the_saved_models", 'valid, kinds = read_rankings(run, "valid", codec)', 'valid, kinds = read_rankings(run, "train", codec)'),
    Mutant("a pair fits when one text does", "test_what_fits_is_kept_whole", "max(len(a), len(b)) <= limit and", "min(len(a), len(b)) <= limit and"),
    Mutant("kinds belong to other pairs", "test_what_fits_is_kept_whole", "return rankings, [kinds for pairs in compared.values() for _, _, kinds in pairs]", "return rankings, [comparison.kinds for comparison in comparisons]"),
    Mutant("the longest summary is left out", "test_what_fits_is_kept_whole", "len(response) <= limit for p,", "len(response) < limit for p,"),
    Mutant("the judge reads the test posts", "test_the_labeler_reads_training_posts_only", "labeler, warm = labeler_of(run),", "labeler, warm = Labeler(posts),"),
    Mutant("the shared head does not train the trunk", "test_only_a_shared_value_head_trains_the_policy", "value_model(hidden) if", "value_model(hidden.detach()) if"),
    Mutant("the margin is rejected minus chosen", "test_the_reward_models_margin_is_chosen_minus_rejected", '"margin": ((scores[better] - scores[worse])', '"margin": ((scores[worse] - scores[better])'),
    Mutant("comparisons need no room", "test_room_is_needed_for_responses_and_comparisons", "response = max(data.response_tokens, data.comparison_tokens)", "response = data.response_tokens"),
    Mutant("a rule sees the post's fields only", "test_a_rule_replaces_the_reward_model", "rule(post.post, text, copy.deepcopy(post.record))", "rule(post.post, text, post.fields())"),
    Mutant("a rule judges another post's response", "test_a_rule_replaces_the_reward_model", "asked, prompts = [posts[i] for i in picked],", "asked, prompts = posts,"),
    Mutant("the values of a rule start anywhere", "test_a_rule_replaces_the_reward_model", "        nn.init.zeros_(value_model.classifier.score.weight)\n", ""),
    Mutant("a judge is asked once", "test_judges_are_asked_in_both_orders", "judge(post, two, one)", "1 - judge(post, one, two)"),
    Mutant("a judge is asked again what it has answered", "test_judges_are_asked_in_both_orders", "if asked not in said:", "if asked:"),
    Mutant("any policy may be evaluated", "test_all_models_of_a_run_need_one_tokenizer", 'check_tokenizer(run, run.path("ppo"))', "pass"),
    Mutant("any reward model will do", "test_all_models_of_a_run_need_one_tokenizer", "check_tokenizer(run, folder)\n", "pass\n"),
    Mutant("the judge is always the labeler", "test_judges_are_asked_in_both_orders", '{"labeler": "labeler", "reward": "score"}.get(judge, "judge")', '"labeler"'),
    Mutant("a long title is an error", "test_titles_too_long_are_counted", 'if not post.prompt and fits("") else []', "if not post.prompt else []"),
    Mutant("a prompt that is too long is cut", "test_prompts_are_used_as_they_stand", 'if not post.prompt and fits("") else []', 'if fits("") else []'),
    Mutant("a prompt is put into the template", "test_prompts_are_used_as_they_stand", "p.post if p.prompt else filled", "p.post if False else filled"),
    Mutant("an answer gets a space", "test_prompts_are_used_as_they_stand", "text if post and post.prompt else", "text if False else"),
    Mutant("a conversation is plain text", "test_prompts_are_used_as_they_stand", "if isinstance(p.prompt, list) else row for", "if False else row for"),
    Mutant("a conversation begins with BOS twice", "test_prompts_are_used_as_they_stand", "return list(chain(*chain(*rows)))", "return self.start + list(chain(*chain(*rows)))"),
    Mutant("the answer's turn is not opened", "test_prompts_are_used_as_they_stand", "add_generation_prompt=True", "add_generation_prompt=False"),
    Mutant("a message can hold a special token", "test_prompts_are_used_as_they_stand", "special=i % 2 == 0, seam", "special=True, seam"),
    Mutant("special tokens of the template are text", "test_prompts_are_used_as_they_stand", "special=i % 2 == 0, seam", "special=i > 1 and i % 2 == 0, seam"),
    Mutant("special tokens behind a spelled one are text", "test_prompts_are_used_as_they_stand", "special=i % 2 == 0, seam", "special=i == 0, seam"),
    Mutant("a blank is glued before a response", "test_no_tokenizer_glues_a_blank_to_a_response", "self.encode(texts, seam=self.seam)", "self.encode(texts)"),
    Mutant("a response keeps its seam", "test_no_tokenizer_glues_a_blank_to_a_response", "[row[len(seam) :] for row in rows]", "rows"),
    Mutant("text is cleaned when decoded", "test_no_tokenizer_glues_a_blank_to_a_response", "(tokens, clean_up_tokenization_spaces=False)", "(tokens)"),
    Mutant("the first message is the answer", "test_records_of_every_form_are_read", 'field[-1]["content"]', 'field[0]["content"]'),
    Mutant("an implicit prompt ends with the first turn", "test_records_of_every_form_are_read", r'r"(.*\n\nAssistant:|', r'r"(.*?\n\nAssistant:|'),
    Mutant("an implicit prompt is cut in mid-word", "test_records_of_every_form_are_read", r"|.*(?=\s)|)", "|.*)"),
    Mutant("conversations may differ", "test_records_of_every_form_are_read", "elif not prompt and one[:-1] == other[:-1]:", "elif not prompt:"),
    Mutant("null is a prompt", "test_records_of_every_form_are_read", 'if record.get("prompt") is None and any', 'if "prompt" not in record and any'),
    Mutant("what was chosen is no demonstration", "test_records_of_every_form_are_read", 'answers.get("completion", answers.get("chosen", ""))', 'answers.get("completion", "")'),
    Mutant("TL;DR prompts are not taken apart", "test_both_forms_of_the_data_are_read", "if isinstance(prompt, str) and (match", "if False and (match"),
    Mutant("words are ASCII", "test_words_of_every_script_count", "[^\\W_{ALONE}]+", "[a-z0-9]+"),
    Mutant("Chinese has no words", "test_words_of_every_script_count", 'WORD = re.compile(rf"[{ALONE}]|', 'WORD = re.compile(rf"[{ALONE}]+|'),
    Mutant("the labeler reads ASCII alone", "test_words_of_every_script_count", "[^\\W\\d_{ALONE}]{{2,}}|[^\\W\\d_\\x00-\\x7f]", "[a-z]{{2,}}"),
    Mutant("who wrote nothing loses", "test_what_nobody_wrote_is_not_measured", '"win rate": wins[both]', '"win rate": wins'),
    Mutant("three posts tell a win rate", "test_what_nobody_wrote_is_not_measured", "enough = min(30, len(wins))", "enough = min(3, len(wins))"),
    Mutant("what cannot be measured is 0", "test_what_nobody_wrote_is_not_measured", "for post in of]] = np.nan", "for post in of]] = 0.0"),
    Mutant("an author who wrote nothing is judged", "test_what_nobody_wrote_is_not_measured", "np.where(written, x, np.nan)", "x"),
    Mutant("rounds forget a conversation", "test_samples_of_prompts_are_compared_as_they_are", 'info = {"prompt": post.prompt} if post.prompt else info', "pass"),
    Mutant("compared samples lose their blanks", "test_samples_of_prompts_are_compared_as_they_are", "whole=bool(posts[i // K].prompt)", "whole=False"),
    Mutant("the head is called without its scaling", "test_any_decoder_will_do", "logits = policy(**layout.inputs, use_cache=False).logits\n    return logits, entered[0]", "policy(**layout.inputs, use_cache=False)\n    return policy.get_output_embeddings()(entered[0]), entered[0]"),
    Mutant("the rollout's mask forgets EOS", "test_rollout_holds_what_each_model_said", "[len(response) for response in batch.responses], device=engine.device)", "[max(1, len(response) - 1) for response in batch.responses], device=engine.device)"),
    Mutant("hacking is seen where the labeler rises", "test_bad_signs_are_said_once", "label_rise < -0.02", "label_rise > 0.02"),
    Mutant("the second moment is the default's", "test_every_stage_has_the_optimizer_asked_for", "betas=(0.9, config.beta2)", "betas=(0.9, 0.999)"),
    Mutant("PPO forgets the second moment", "test_every_stage_has_the_optimizer_asked_for", "adamw(run.config.optimizer, (models.policy", "adamw(Optimizer(), (models.policy"),
    Mutant("a resumed run starts its stage anew", "test_a_checkpoint_restores_what_steps_change", 'if self.progress["stage"] == stage:', "if False:"),
    Mutant("work is dealt twice", "test_work_is_dealt_once", "groups[self.rank :: self.world]]", "groups[self.rank :]]"),
    Mutant("a process without work counts the first group", "test_work_is_dealt_once", "[(groups[0], False)]", "[(groups[0], True)]"),
    Mutant("other flags may resume", "test_resuming_something_else_is_refused", "refuse(bool(refused), f", "refuse(False, f"),
    Mutant("a checkpoint of another stage is used", "test_a_checkpoint_restores_what_steps_change", 'if self.progress["stage"] == stage:', 'if self.progress["stage"]:'),
    Mutant("a resumed run repeats a step", "test_a_checkpoint_restores_what_steps_change", '"step": self.step + 1, "model"', '"step": self.step, "model"'),
    Mutant("no other learning rate may resume", "test_divergence_names_stage_and_step", ' and not flag.endswith("lr")]', "]"),
    Mutant("the old learning rate goes on", "test_divergence_names_stage_and_step", 'group["initial_lr"] = rate', "pass"),
    Mutant("a bad checkpoint replaces a good one", "test_divergence_within_an_update_spares_the_checkpoint", "        raise run.ended_by(error) from None", '        run.save_progress(run.progress | {"stage": "ppo", "step": run.step})\n        raise run.ended_by(error) from None'),
    Mutant("a rollout of NaN is trained on", "test_a_rollout_that_is_not_finite_names_the_model", "if not getattr(rollout, name).isfinite().all():", "if False:"),
    Mutant("one process computes a group less", "test_work_is_dealt_once", "math.ceil(len(groups) / self.world) - len(mine)", "0 if mine else 1"),
    Mutant("logs are not cut", "test_a_checkpoint_restores_what_steps_change", 'os.truncate(self.folder / log, max(0, min((self.folder / log).stat().st_size, size)))', "pass"),
    Mutant("with one-token queries SFT's loss is NaN", "test_sft_loss_is_over_response_tokens_and_eos", "query_tokens = max(1, sum(len(query) - 1 for query in whole.queries))", "query_tokens = sum(len(query) - 1 for query in whole.queries)"),
    Mutant("statistics follow the loss's average", "test_ppo_loss_adds_up", 'partial(minibatch_share, mask=part.mask, whole=whole.mask)  #', 'partial(minibatch_share, mask=part.mask, whole=whole.mask, average=config.average, room=whole.room)  #'),
    Mutant("both clip ranges are one", "test_ppo_loss_adds_up", "part.returns, config.cliprange_value)", "part.returns, config.cliprange)"),
    Mutant("the mean |log ratio| has lost its bars", "test_ppo_loss_adds_up", "token_mean(log_ratio.abs())", "token_mean(log_ratio)"),
    Mutant("KL in the loss has no gradient", "test_kl_in_the_loss_adds_its_price", "share(kl_loss(logprobs, part.ref", "share(kl_loss(logprobs.detach(), part.ref"),
    Mutant("the KL estimator does nothing in the reward", "test_rewards_follow_the_flags", "rollout.ref_logprobs, config.kl_kind)", 'rollout.ref_logprobs, "k1")'),
    Mutant("an infinite gradient is stepped on", "test_non_finite_losses_stop_before_the_step", 'for name in ("loss", "grad_norm"):', 'for name in ("loss",):'),
    Mutant("only the first group's rate falls", "test_schedules_rise_and_fall", 'for group in optimizer.param_groups:\n        group["lr"]', 'for group in optimizer.param_groups[:1]:\n        group["lr"]'),
    Mutant("an update's statistics are its last step's", "test_an_updates_statistics_are_means_of_its_steps", "sum(step[name] for step in steps) / len(steps)", "steps[-1][name]"),
    Mutant("rollouts are read in micro-batches of their own", "test_rollouts_are_read_in_the_first_epochs_micro_batches", "engine, policy_and_value, groups)", "engine, policy_and_value)"),
    Mutant("rollouts are drawn at temperature 1", "test_every_update_sees_its_own_episodes", "sample(models.policy, prompts, uniforms, config.temperature,", "sample(models.policy, prompts, uniforms, 1.0,"),
    Mutant("γ and λ change places", "test_every_update_sees_its_own_episodes", "rollout.mask, config.gamma, config.lam)", "rollout.mask, config.lam, config.gamma)"),
    Mutant("advantages are whitened per minibatch", "test_ppo_whitens_advantages_over_the_batch", "optimizer_step(engine, optimizer, rollout[rows], *losses)", "optimizer_step(engine, optimizer, replace(rollout[rows], advantages=whiten(rollout[rows].advantages, rollout[rows].mask)), *losses)"),
    Mutant("comparisons are of the base model's samples", "test_comparisons_are_all_pairs_at_their_temperature", "policy_of(run, run.path(writer))", 'policy_of(run, run.path("base"))'),
    Mutant("the stranger's text is the post's own", "test_comparisons_are_all_pairs_at_their_temperature", "drafts[(i + 1) % len(posts)][0])", "drafts[i][1])"),
    Mutant("the better of two samples stands first", "test_comparisons_are_the_labelers", "(writer, worse), tie, (i + k) % 2 == 1)", "(writer, worse), tie, False)"),
    Mutant("one post's summary is exchanged with itself", "test_the_reward_model_sees_each_pair_once_the_right_way_round", "for query, own, other in rows if own != other]", "for query, own, other in rows]"),
    Mutant("chance is judged by the easy pairs", "test_a_reward_model_near_chance_is_warned_of", 'accuracies[SAME_POST if SAME_POST in accuracies else "all"]', 'accuracies["all"]'),
    Mutant("pairs of another post count as the same post's", "test_reward_accuracies_are_shares_of_pairs", "if not any(OTHER_POST in kind for kind in of)]", "if OTHER_POST not in of]"),
    Mutant("the labeler prefers the worse writer", "test_evaluation_columns_belong_to_their_models", "return wins_of(marks[a][row], marks[b][row])", "return wins_of(marks[b][row], marks[a][row])"),
    Mutant("humans' comparisons are called the labeler's", "test_the_report_names_the_winner_at_each_temperature", "given = config.data.comparisons_train or config.reward_model", "given = config.reward_model"),
    Mutant("a verdict is made of one post", "test_the_verdict_claims_no_more_than_its_intervals", "if posts < 30:", "if posts < 1:"),
    Mutant("curves begin at their second value", "test_curves_on_the_screen_are_those_of_the_updates", 'f"{curve[0]:.3g}"', 'f"{means[-1]:.3g}"'),
    Mutant("curves of the screen have one level", "test_curves_on_the_screen_are_those_of_the_updates", "int(7.999 * (mean", "int(0.999 * (mean"),
    Mutant("the picture is of the first run", "test_curves_are_drawn_of_each_run", "for update in logged(folder) if name", "for update in logged(folders[0]) if name"),
    Mutant("a refused run leaves its folder", "test_a_refused_run_leaves_no_folder", "if self.untouched and self.engine", "if False and self.engine"),
    Mutant("a refused run takes its data with it", "test_a_refused_run_leaves_no_folder", 'self.untouched &= name in ("config.json", STATE)', "pass"),
    Mutant("a summary's words are known", "test_invented_words_and_repetitions_are_counted", "chain.from_iterable(post.fields().values() for", "chain.from_iterable((post.title, post.post) for"),
    Mutant("a post's own words are invented", "test_invented_words_and_repetitions_are_counted", "not in self.known and word not in own", "not in self.known"),
    Mutant("twice is repetitive", "test_invented_words_and_repetitions_are_counted", "count >= 3 and", "count >= 2 and"),
    Mutant("any word is repetitive", "test_invented_words_and_repetitions_are_counted", "count >= 3 and self.rarity(word)", "count >= 3"),
    Mutant("length is no matter", "test_the_verdict_claims_no_more_than_its_intervals", "<= 0.1 * y[", "<= 1.0 * y["),
    Mutant("only whoever gives the SFT model hears of rates", "test_high_rates_for_a_given_model_are_said", "if rates and (config.model or config.sft_model):", "if rates and config.sft_model:"),
    Mutant("rates of stages that do not run are said", "test_high_rates_for_a_given_model_are_said", 'if each in config.stages and not config.is_given(each)]\n        rates', 'if each in config.stages]\n        rates'),
    Mutant("episodes are left out silently", "test_episodes_left_over_are_said", "config.ppo.total_episodes % config.ppo.batch_size)", "0)"),
    Mutant("curves are of another run", "test_ppo_ends_with_its_curves", "self.say(sparklines(logged(self.folder)))", "self.say(sparklines([]))"),
    Mutant("a share's interval is the normal one", "test_shares_have_wilsons_interval", "p * (1 - p) / n + z * z / (4 * n * n))", "p * (1 - p) / n)"),
    Mutant("scores without EOS count as hacking", "test_bad_signs_are_said_once", '("raw_scores", "labeler"))', '("scores", "labeler"))'),
    Mutant("the labeler watches a rule", "test_a_rule_replaces_the_reward_model", "labeler_of(run) if run.labeler_chose else None", "labeler_of(run)"),
    Mutant("a negative KL alarms nobody", "test_bad_signs_are_said_once", 'if last["objective/kl"] < -4 *', 'if last["objective/kl"] < -400 *'),
    Mutant("the KL's error is its deviation", "test_rollout_statistics_are_what_their_names_say", "((kl.var(correction=0) + 1) / len(kl)).sqrt()", "(kl.var(correction=0) + 1).sqrt()"),
    Mutant("the KL that stops is the step's", "test_bad_signs_are_said_once", '(kl := statistics["objective/kl"])', '(kl := statistics["policy/approxkl"])'),
    Mutant("a shown sample without EOS has the reward model's score", "test_shown_samples_belong_to_their_models", "score = penalize_missing_eos(score, has_eos, config.ppo.missing_eos_score).item()", "score = score.item()"),
    Mutant("minibatches of like length go from short to long", "test_minibatches_are_of_like_length", '.permutation(len(packs))]\n    return steps', ".permutation(len(packs)) * 0 + range(len(packs))]\n    return steps"),
    Mutant("minibatches hold rows of any length", "test_minibatches_are_of_like_length", "rows = sorted(window, key=lengths.__getitem__)", "rows = window"),
    Mutant("the time foretold forgets how much work a step is", "test_the_time_a_stage_takes_is_foretold", "work or [1] * total", "[1] * total"),
    Mutant("the time foretold counts the warm-up", "test_the_time_a_stage_takes_is_foretold", "                    if self.step == first:\n                        began = time.monotonic()\n", "                    if self.step == first:\n                        began = self.entered\n"),
    Mutant("SFT's epochs are whole ones", "test_what_is_asked_for_in_pretraining_and_sft", "max(1, round(config.epochs * len(batch))))]\n    steps", "round(config.epochs) * len(batch))]\n    steps"),
    Mutant("the held-out loss is a mean over padding", "test_held_out_figures_are_the_saved_models", "return -batch_logprobs(model, batch, 1.0, engine).sum().item() / batch.response_tokens", "return -batch_logprobs(model, batch, 1.0, engine).mean().item()"),
    Mutant("a part of a batch is an update", "test_contradictions_are_refused_with_both_numbers", "return self.total_episodes // self.batch_size", "return -(-self.total_episodes // self.batch_size)"),
    Mutant("stages may have nothing to do", "test_contradictions_are_refused_with_both_numbers", "refuse(not to_do, f", "refuse(False, f"),
    Mutant("infinite numbers are flags, too", "test_every_number_is_checked", "low <= value <= high and", "low <= value and"),
    Mutant("γ = 0 is refused", "test_every_number_is_checked", '{"tie", "kl-coef", "vf-coef", "gamma", "lam", ', '{"tie", "kl-coef", "vf-coef", "lam", '),
    Mutant("micro-batches and sample batches change sizes", "test_the_engine_is_the_one_asked_for", "compute.micro_batch_size, compute.sample_batch_size, compute.shard", "compute.sample_batch_size, compute.micro_batch_size, compute.shard"),
    Mutant("the commit hides edits", "test_the_commit_says_when_it_is_not_what_ran", '"--always", "--dirty", ', '"--always", '),
    Mutant("the clip of gradients may change on the way", "test_resuming_something_else_is_refused", 'if not flag.startswith("--compute.")', 'if not flag.startswith(("--compute.", "--optimizer.max"))'),
    Mutant("a checkpoint may hold code", "test_resuming_something_else_is_refused", "weights_only=True, mmap=True)", "weights_only=False)"),
    Mutant("a resumed run forgets its changed flags", "test_resuming_takes_up_the_runs_flags", 'return record | {"config": now["config"], "resumed"', 'return record | {"resumed"'),
    Mutant("a flag that was off is on again", "test_resuming_takes_up_the_runs_flags", "arguments.append(flag if value else", "arguments.append(flag if value or True else"),
    Mutant("minutes between checkpoints are seconds", "test_checkpoints_come_when_they_should", ">= 60 * self.config", ">= self.config"),
    Mutant("a second Ctrl-C is ignored", "test_checkpoints_come_when_they_should", "if self.interrupted or not self.in_steps:", "if not self.in_steps:"),
    Mutant("Ctrl-C after the steps waits", "test_checkpoints_come_when_they_should", "            finally:\n                self.in_steps = False", "            finally:\n                pass"),
    Mutant("files get their names before they are written", "test_files_are_on_the_disk_before_they_get_their_names", '    to_disk(part, *part.rglob("*"))\n', ""),
    Mutant("names may be lost", "test_files_are_on_the_disk_before_they_get_their_names", "    to_disk(target.parent)\n", ""),
    Mutant("a resumed run's warnings forget the updates before", "test_divergence_within_an_update_spares_the_checkpoint", 'run.codec("sft"), logged(run.folder)', 'run.codec("sft"), []'),
    Mutant("TensorBoard counts every update as the first", "test_tracking_writes_the_metrics", "add_scalar(tag, value, self.step)", "add_scalar(tag, value, 0)"),
    # whole runs
    Mutant("what is measured after the steps stands at the last", "test_a_run_logs_finite_numbers_and_ratio_one", "        self.step = total\n", ""),
    Mutant("the learning rate stays up", "test_a_run_logs_finite_numbers_and_ratio_one", "set_lr(optimizer, 1 - update / config.num_updates)", "set_lr(optimizer, 1.0)"),
    Mutant("the reference learns with the policy", "test_frozen_models_stay_frozen", "ref_policy = policy_of(run, config.ref_model or sft_folder).requires_grad_(False)", "ref_policy = policy"),
    Mutant("minibatches are the same in every epoch", "test_ppo_uses_every_rollout_once_per_epoch", 'rng(seed, "minibatches", update, epoch)', 'rng(seed, "minibatches", update)'),
    Mutant("advantages are never whitened", "test_ppo_whitens_advantages_over_the_batch", "    if config.whiten_advantages:\n", "    if False:\n"),
    Mutant("the reward model is not centred", "test_the_reward_model_of_a_run_is_centred", "    model.center(scores_of(model, summaries, engine).mean().item())\n", ""),
    Mutant("runs overwrite each other", "test_runs_never_share_a_folder", "free.mkdir(parents=True)\n", "free.mkdir(parents=True, exist_ok=True)\n"),
    # one query, many responses
    Mutant("a response sees its siblings", "test_a_shared_query_changes_no_logprob_value_or_score", "(owner[:, None] == 0) | (owner", "(owner[:, None] >= 0) | (owner"),
    Mutant("a response does not see its query", "test_a_shared_query_changes_no_logprob_value_or_score", "seen = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])", "seen = owner[:, None] == owner[:, :, None]"),
    Mutant("the query sees its responses", "test_a_shared_query_changes_no_logprob_value_or_score", "seen & torch.ones(W, W, dtype=torch.bool, device=device).tril()", "seen | (owner[:, :, None] == 0)"),
    Mutant("a response sees what follows", "test_a_shared_query_changes_no_logprob_value_or_score", "device=device).tril()", "device=device)"),
    Mutant("everything sees the padding behind it", "test_a_shared_query_changes_no_logprob_value_or_score", "dtype=torch.bool, device=device).tril()", "dtype=torch.bool, device=device).tril() | (owner[:, None] < 0)"),
    Mutant("positions run on through the row", "test_a_shared_query_changes_no_logprob_value_or_score", "positions[r] += range(len(query), len(query) + len(response))", "positions[r] += range(len(tokens[r]) - len(response), len(tokens[r]))"),
    Mutant("positions skip the query's last", "test_a_shared_query_changes_no_logprob_value_or_score", "positions[r] += range(len(query), len(query)", "positions[r] += range(len(query) + 1, 1 + len(query)"),
    Mutant("a first token is read behind its sibling", "test_a_shared_query_changes_no_logprob_value_or_score", "torch.cat([before, place[:, :-1]], dim=1)", "place - 1"),
    Mutant("siblings stand in the first one's row", "test_a_shared_query_changes_no_logprob_value_or_score", "row.append([r])", "row.append([r if owner == 1 else max(r - 1, 0)])"),
    Mutant("the order of siblings matters", "test_siblings_may_stand_in_any_order", "(owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])", "(owner[:, None] == 0) | (owner[:, None] >= owner[:, :, None] - 1)"),
    Mutant("micro-batches of groups are wholes of their own", "test_a_shared_query_changes_no_gradient", "token_mean = partial(minibatch_share, mask=part.mask, whole=whole.mask)", "token_mean = partial(minibatch_share, mask=part.mask, whole=part.mask.repeat(len(part.batch.groups()), 1))"),
    Mutant("the cache is the first query's", "test_a_shared_query_changes_no_sample", "keep_rows(cache, of)", "keep_rows(cache, torch.zeros_like(of))"),
    Mutant("cache rows come in another order", "test_a_shared_query_changes_no_sample", "keep_rows(cache, of)", "keep_rows(cache, of.flip(0))"),
    Mutant("who has ended writes on", "test_rows_that_have_ended_are_dropped", "if len(still) <= 0.75 * len(writer)", "if len(still) <= 0.05 * len(writer)"),
    Mutant("every end copies the cache", "test_rows_that_have_ended_are_dropped", "if len(still) <= 0.75 * len(writer)", "if len(still) < len(writer)"),
    Mutant("who is left writes for the first rows", "test_rows_that_have_ended_are_dropped", "responses[writer, t] = tokens[:, 0]", "responses[: len(writer), t] = tokens[:, 0]"),
    Mutant("who is left draws the first rows' noise", "test_rows_that_have_ended_are_dropped", "uniforms[writer, t, None]", "uniforms[: len(writer), t, None]"),
    Mutant("the cache's rows that go on are others", "test_rows_that_have_ended_are_dropped", "keep_rows(cache, still)", "keep_rows(cache, still.flip(0))"),
    Mutant("the first head looks one token ahead", "test_a_new_models_first_head_looks_back", "-theta.sin()])  # query", "theta.sin()])  # query"),
    Mutant("the first head looks hardly anywhere", "test_a_new_models_first_head_looks_back", "(4 * D**0.5 / (1 - theta.cos())", "(0.4 * D**0.5 / (1 - theta.cos())"),
    Mutant("natural steps gain by tokens, whatever is asked", "test_a_natural_step_stays_within_the_trust_region", "math.inf), config.average)", 'math.inf), "token")'),
    Mutant("rows that are left get room for all tokens again", "test_the_cache_is_compact_and_samples_the_same", "roomy_cache(T - t)", "roomy_cache(T)"),
    Mutant("PPO's labeler knows only posts that fit", "test_the_labeler_reads_training_posts_only", "labeler_of(run) if run.labeler_chose", "Labeler(posts) if run.labeler_chose"),
    Mutant("compared texts keep an EOS that is spelled out", "test_records_of_every_form_are_read", 'text.removesuffix("<|endoftext|>") for name', "text for name"),
    Mutant("posts with other answers are other posts", "test_posts_with_one_text_are_cut_once", 'post._replace(summary="", record=None)', 'post._replace(summary="")'),
    Mutant("posts with other summaries are other posts", "test_posts_with_one_text_are_cut_once", 'post._replace(summary="", record=None)', 'post._replace(record=None)'),
    Mutant("conversations are known by what they say", "test_stages_make_no_query_twice", 'str(post._replace(summary="", record=None))', 'str(post._replace(summary="", record=None, prompt=None))'),
    Mutant("what a rule imports when it is called is not found", "test_users_functions_fail_in_one_line", "sys.path.extend({here} - {*sys.path})", "pass"),
    Mutant("a sweep finds a taken folder when it comes to it", "test_a_sweep_refuses_before_its_first_run", 'refuse(folder.exists(), f"--folder {base}', 'refuse(False, f"--folder {base}'),
    Mutant("a switch is always on in a sweep", "test_a_sweep_is_of_switches_and_of_other_stages_too", '[turned_off(f"--{flag}")]', '[f"--{flag}"]'),
    Mutant("a sweep of SFT shows the loss of other posts", "test_a_sweep_is_of_switches_and_of_other_stages_too", '("sft", "valid/loss")', '("sft", "valid/loss_other_post")'),
    Mutant("without summaries nothing is advised", "test_records_of_all_kinds_are_read_or_told", "text + needed", "text"),
    Mutant("every stage makes its queries anew", "test_stages_make_no_query_twice", "self.first_codec = self.first_codec or Codec(", "self.first_codec = Codec("),
    Mutant("responses go to queries in turn", "test_a_shared_query_changes_no_sample", "of = torch.tensor([r for r, group in enumerate(groups) for _ in group], device=device)", "of = torch.arange(len(batch), device=device) % len(groups)"),
    Mutant("every response is sampled from a copy", "test_a_shared_query_changes_no_sample", "device, groups = policy.device, batch.groups()", "device, groups = policy.device, [[i] for i in range(len(batch))]"),
    Mutant("groups are cut anywhere", "test_groups_are_split_only_where_they_must_be", "[part for group in self.groups() for part in chunks(group, size)]", "[[row] for row in range(len(self))]"),
    Mutant("groups are never cut", "test_groups_are_split_only_where_they_must_be", "for part in chunks(group, size)]", "for part in [group]]"),
    Mutant("packs run over", "test_groups_are_split_only_where_they_must_be", "if size > room or not packs:", "if room <= 0 or not packs:"),
    Mutant("every pair of a query counts fully", "test_every_query_counts_once_in_the_reward_models_loss", "1 / len(r.pairs)) for", "1.0) for"),
    Mutant("pairs are looked up in their own ranking only", "test_every_query_counts_once_in_the_reward_models_loss", "(at + a, at + b, 1", "(a, b, 1"),
    Mutant("equal texts are read twice", "test_what_fits_is_kept_whole", "list(dict.fromkeys(text for better, worse, _ in pairs for text in (better, worse)))", "[text for better, worse, _ in pairs for text in (better, worse)]"),
    Mutant("every model may share", "test_a_model_that_cannot_share_is_used_without", "[net for net in nets if not shares_queries(net, queries, self.config.data)]", "[]"),
    Mutant("short queries are tried", "test_models_that_cannot_share_are_found_out", "sorted(queries, key=len)[-2:]", "sorted(queries, key=len)[:2]"),
    Mutant("one response alone is tried", "test_models_that_cannot_share_are_found_out", "plain, shared = (lay_out(replace(batch, share=share), device) for share in (False, True))", "plain, shared = (lay_out(replace(batch, share=False), device) for share in (False, True))"),
    Mutant("sharing cannot be switched off", "test_sharing_changes_a_run_by_rounding_alone", "if G == 1 or not self.config.compute.share_queries:", "if G == 1:"),
    Mutant("minibatches cut groups", "test_minibatches_are_whole_groups", "permutation(config.batch_size // G).tolist()\n    return chunks([query * G + g for query in order for g in range(G)], config", "permutation(config.batch_size).tolist()\n    return chunks(order, config"),
    Mutant("siblings share their noise", "test_minibatches_are_whole_groups", 'noise(seed, "episodes", episodes, T)', 'noise(seed, "episodes", [i // config.responses_per_query for i in episodes], T)'),
    Mutant("siblings are no neighbours", "test_minibatches_are_whole_groups", "[i for i in shuffled(seed, purpose, n, episodes.start // G, episodes.stop // G) for _ in range(G)]", "shuffled(seed, purpose, n, episodes.start // G, episodes.stop // G) * G"),
    # the family
    Mutant("the value model keeps its level", "test_the_four_models_start_where_they_should", "value_model.center(values.sum().item() / references.response_tokens)", "pass"),
    Mutant("the level is a mean over padding", "test_the_four_models_start_where_they_should", "value_model.center(values.sum().item() / references.response_tokens)", "value_model.center(values.mean().item())"),
    Mutant("the group's baseline is a mean with itself", "test_the_gradient_is_unbiased_with_every_baseline", "((groups.sum(1, keepdim=True) - groups) / (G - 1))", "groups.mean(1, keepdim=True).expand_as(groups)"),
    Mutant("the group's baseline is the batch's", "test_baselines_are_the_means_they_are_called", 'G = config.responses_per_query if config.baseline == "group" else len(returns)', "G = len(returns)"),
    Mutant("the reward-to-go is discounted by λ", "test_baselines_are_the_means_they_are_called", "rollout.mask, config.gamma, 1.0)", "rollout.mask, config.gamma, config.lam)"),
    Mutant("values stay in the reward-to-go", "test_baselines_are_the_means_they_are_called", "gae(rewards, torch.zeros_like(rewards), rollout.mask", "gae(rewards, rollout.values, rollout.mask"),
    Mutant("the residual forgets what follows", "test_the_advantage_is_q_minus_v", "gamma * next_value", "0.5 * gamma * next_value"),
    Mutant("a token is credited with its own reward", "test_the_bandit_has_the_gradient_of_the_whole_return", "rollout.mask, config.gamma, 1.0)", "rollout.mask, config.gamma, 0.0)"),
    Mutant("λ is its complement", "test_td_with_true_values_has_the_lower_variance", "gamma * lam * next_advantage", "gamma * (1 - lam) * next_advantage"),
    Mutant("an update's KL is that of the other direction", "test_exchanged_k3_is_the_kl_of_an_update", "torch.expm1(-k1) + k1", "torch.expm1(k1) - k1"),
    Mutant("the price of KL falls where it should rise", "test_the_price_of_kl_adapts_as_in_the_paper", "coef / 2 if kl < target / 1.5 else coef * 2 if", "coef * 2 if kl < target / 1.5 else coef / 2 if"),
    Mutant("there is no room around the target", "test_the_price_of_kl_adapts_as_in_the_paper", "if kl > target * 1.5 else", "if kl > target else"),
    Mutant("a new price is never paid", "test_the_price_of_kl_adapts_as_in_the_paper", 'last.get("policy/next_penalty_coef", self.penalty_coef)', "self.penalty_coef"),
    Mutant("every update pays the first price", "test_every_member_of_the_family_runs", "        config = config.after(history)\n", ""),
    Mutant("conjugate gradients descend straight", "test_conjugate_gradients_solve_n_equations_in_n_steps", "direction = residual + (residual @ residual) / (before @ before) * direction", "direction = residual"),
    Mutant("the step is that for half of δ", "test_a_natural_step_stays_within_the_trust_region", "(2 * config.target_kl / (x", "(config.target_kl / (x"),
    Mutant("the line search forgets the KL", "test_the_line_search_holds_to_both_conditions", "if gain > 0 and update_kl(policy, rollout, config.temperature, engine) <= config.target_kl:", "if gain > 0:"),
    Mutant("the line search forgets the gain", "test_the_line_search_holds_to_both_conditions", "if gain > 0 and update_kl", "if update_kl"),
    Mutant("differences are not divided by their step", "test_a_natural_step_stays_within_the_trust_region", "start + h * v)[1] / h", "start + h * v)[1]"),
    Mutant("the natural step descends", "test_a_natural_step_stays_within_the_trust_region", "conjugate_gradients(fisher, -gradient)", "conjugate_gradients(fisher, gradient)"),
    Mutant("a step in vain is kept", "test_a_natural_step_stays_within_the_trust_region", '    set_parameters(parameters, start)\n    return {"policy/halvings": 10', '    return {"policy/halvings": 10'),
    Mutant("a natural step's ratio alarms", "test_bad_signs_are_said_once", ' and "policy/halvings" not in last', ""),
    Mutant("unclipped is clipped", "test_objectives_are_what_they_are_called", 'config.cliprange if config.objective == "clip" else math.inf', "config.cliprange"),
    Mutant("the penalty is on KL(π ‖ π_old)", "test_objectives_are_what_they_are_called", 'kl_estimate(part.logprobs, logprobs, "k3")', 'kl_estimate(logprobs, part.logprobs, "k3")'),
    Mutant("adaptive pays nothing", "test_objectives_are_what_they_are_called", 'if config.objective in ("penalty", "adaptive"):', 'if config.objective == "penalty":'),
    Mutant("the optimizer moves a constrained policy", "test_objectives_are_what_they_are_called", "logprobs = logprobs.detach()", "logprobs = logprobs + 0"),
    Mutant("the constant is the longest response", "test_a_constant_average_divides_by_the_room", "len(whole) * room}", "whole.numel()}"),
    Mutant("nobody says how much room there is", "test_every_member_of_the_family_runs", "room=T, shown=shown)", "shown=shown)"),
    Mutant("demonstrations have a price of 1", "test_demonstrations_add_their_loss", "config.ptx_coef * language_model_losses", "1.0 * language_model_losses"),
    Mutant("demonstrations of micro-batches are wholes", "test_demonstrations_add_their_loss", "part.shown, whole.shown)", "part.shown, part.shown)"),
    Mutant("the same demonstrations are shown again", "test_every_member_of_the_family_runs", 'pick(seed, "shown", len(demonstrations), episodes)', 'pick(seed, "shown", len(demonstrations), range(config.batch_size))'),
    Mutant("explained variance forgives a wrong level", "test_update_statistics_are_what_their_names_say", "error = (returns - values).square().mean() /", "error = (returns - values).var(correction=0) /"),
    Mutant("an update's KL is at temperature 1", "test_update_statistics_are_what_their_names_say", "batch_logprobs(policy, rollout.batch, temperature, engine)", "batch_logprobs(policy, rollout.batch, 1.0, engine)"),
    Mutant("an update's KL is read backwards", "test_update_statistics_are_what_their_names_say", 'kl_estimate(rollout.logprobs, logprobs, "k3")', 'kl_estimate(logprobs, rollout.logprobs, "k3")'),
    Mutant("a wrong level of the values goes unsaid", "test_bad_signs_are_said_once", 'last.get("val/explained_variance", 0) < -3', 'last.get("val/explained_variance", 0) < -9'),
    Mutant("the level of the values is warned of for ever", "test_bad_signs_are_said_once", "if len(history) == 1 and last.get", "if last.get"),
    Mutant("the other reference is forgotten", "test_another_reference_may_be_given", "policy_of(run, config.ref_model or sft_folder)", "policy_of(run, sft_folder)"),
    Mutant("any reference will do", "test_another_reference_may_be_given", "check_tokenizer(run, config.ref_model)", "pass"),
    Mutant("a new round forgets the old", "test_a_round_adds_the_new_policys_comparisons", "records += read_records(earlier, dict)[0]", "pass"),
    Mutant("a new round asks the old policy", "test_a_round_adds_the_new_policys_comparisons", "policy_of(run, run.path(writer))", 'policy_of(run, run.path("sft"))'),
    Mutant("old comparisons are held out again", "test_a_round_adds_the_new_policys_comparisons", 'if writer == "ppo" and split == "train":', 'if writer == "ppo":'),
    Mutant("a sweep checks values as it comes to them", "test_a_sweep_refuses_before_its_first_run", 'runs = [tyro.cli(Config, args=args, default=replace(config, sweep=())) for args in given]', 'runs = (tyro.cli(Config, args=args, default=replace(config, sweep=())) for args in given)'),
    Mutant("a sweep's last scores are all of them", "test_a_sweep_makes_one_table_of_runs", '("at the end", "scores", 0.1)', '("at the end", "scores", 1.0)'),
    Mutant("a sweep's intervals are twice as wide", "test_a_sweep_makes_one_table_of_runs", "± {(high - low) / 2:.3f}", "± {high - low:.3f}"),
    Mutant("a sweep runs its first value only", "test_a_sweep_makes_one_table_of_runs", "start(replace(run, folder", "start(replace(runs[0], folder"),
    Mutant("a constraint goes with everything", "test_contradictions_are_refused_with_both_numbers", 'refuse(ppo.objective == "constraint" and not plain,', "refuse(False,"),
    Mutant("a constraint goes with eight bits", "test_contradictions_are_refused_with_both_numbers", "refuse(rounded, ", "refuse(False, "),
    Mutant("minibatches may cut groups", "test_contradictions_are_refused_with_both_numbers", "refuse(size % G != 0, ", "refuse(False, "),
    Mutant("a group of one has others", "test_contradictions_are_refused_with_both_numbers", 'refuse(ppo.baseline == "group" and G == 1,', "refuse(False,"),
    # on a GPU
    Mutant("masks are made on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "torch.arange(T, device=lengths.device) < lengths[:, None]", "torch.arange(T) < lengths[:, None]"),
    Mutant("tokens are laid out on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)", "return torch.tensor([row + [filler] * (width - len(row)) for row in rows])"),
    Mutant("the shared rows' mask is made on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "torch.ones(W, W, dtype=torch.bool, device=device).tril()", "torch.ones(W, W, dtype=torch.bool).tril()"),
    Mutant("the last token of queries is looked up on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "for query in batch.queries], device=device)\n    row, start", "for query in batch.queries])\n    row, start"),
    Mutant("the noise stays on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "uniforms, responses, cache = uniforms.to(device),", "uniforms, responses, cache = uniforms,"),
    Mutant("the noise is looked up on the GPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "batch[rows], uniforms[rows], temperature", "batch[rows], uniforms[torch.tensor(rows, device=engine.device)], temperature"),
    Mutant("rollouts' lengths stay on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "[len(response) for response in batch.responses], device=engine.device)", "[len(response) for response in batch.responses])"),
    Mutant("rollouts' ends stay on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "response[-1] == eos_id for response in batch.responses], device=engine.device)", "response[-1] == eos_id for response in batch.responses])"),
    Mutant("results of forward passes are gathered on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "part.new_zeros((len(batch), T)[: part.dim()])", "torch.zeros((len(batch), T)[: part.dim()])"),
    Mutant("a rule's scores stay on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "torch.tensor(scores, dtype=torch.float32, device=engine.device)", "torch.tensor(scores, dtype=torch.float32)"),
    Mutant("the reference stays on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "policy_of(run, config.ref_model or sft_folder)", "load_policy(config.ref_model or sft_folder)"),
    Mutant("the reward model stays on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "run.engine.place(lambda: ScalarModel.load(folder).requires_grad_(False))", "ScalarModel.load(folder).requires_grad_(False)"),
    Mutant("the value head stays on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "place(lambda: ValueHead(policy.get_output_embeddings().weight.shape[1]))", "ValueHead(policy.get_output_embeddings().weight.shape[1])"),
    Mutant("a new value model stays on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "value_model = place(lambda: ScalarModel.load(sft_folder, train_bias=True, new_head=drawn))", "value_model = ScalarModel.load(sft_folder, train_bias=True, new_head=drawn)"),
    Mutant("every process holds a whole model at once", "test_processes_that_share_weights_load_in_turn", "for _ in range(self.rank):\n            dist.barrier()", "pass"),
    Mutant("a model that cannot be loaded leaves the others waiting", "test_processes_that_share_weights_load_in_turn", "        finally:  # what cannot be loaded, none of them can\n", "        except ZeroDivisionError:\n"),
    Mutant("SFT counts query tokens on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "for query in part.queries], device=model.device)", "for query in part.queries])"),
    Mutant("pairs are weighed on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "weights = torch.tensor(weights, device=scores.device)", "weights = torch.tensor(weights)"),
    Mutant("the evaluation asks a GPU for numpy", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "torch.as_tensor(x).cpu().double()", "torch.as_tensor(x).double()"),
    Mutant("the evaluation's KL asks a GPU for numpy", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "(one - two).sum(1).cpu()", "(one - two).sum(1)"),
    Mutant("GAE starts on the CPU", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "next_value = next_advantage = torch.zeros_like(values[:, 0])", "next_value = next_advantage = torch.zeros(len(values))"),
    Mutant("the head rounds to eight bits", "test_the_head_computes_in_float32", "            return forward(_at_least_float32(entered[-1]))", "            pass\n        return forward(_at_least_float32(entered[-1]))"),
    Mutant("the head never comes back", "test_the_head_computes_in_float32", "        del head.forward  # the class's is back\n", "        pass\n"),
    Mutant("keys stay wide in the cache", "test_the_cache_is_compact_and_samples_the_same", "now + tokens, new.shape[-1]), dtype=dtype)", "now + tokens, new.shape[-1]))"),
    Mutant("values become as wide as rotated keys", "test_the_cache_is_compact_and_samples_the_same", "min(keys, values, key", "max(keys, values, key"),
    Mutant("the cache stays changed after sampling", "test_the_cache_is_compact_and_samples_the_same", "    finally:\n        DynamicLayer.update = update\n", "    finally:\n        pass\n"),
    Mutant("the cache is laid out anew for every token", "test_the_cache_is_compact_and_samples_the_same", "if room is None:", "if True:"),
    Mutant("backward passes are without TF32", "test_float32_means_float32_on_a_gpu", "        with self.tf32():\n            (loss", "        with nullcontext():\n            (loss"),
    Mutant("TF32 stays on after a forward pass", "test_float32_means_float32_on_a_gpu", "            torch.set_float32_matmul_precision(before)\n", "            pass\n"),
    Mutant("float32 means TF32", "test_float32_means_float32_on_a_gpu", '"high" if self.bfloat16 and self.device.type', '"high" if self.device.type'),
    Mutant("bfloat16 is emulated on old cards", "test_float32_means_float32_on_a_gpu", "is_bf16_supported(including_emulation=False)", "is_bf16_supported()"),
    Mutant("gradients lie beside the sampler's cache", "test_a_run_is_the_same_on_a_gpu_that_is_not_there", "        optimizer.zero_grad()  # the gradients' memory is for what the next update samples\n", ""),
    # what users bring
    Mutant("weights that are missing are drawn", "test_every_weight_of_a_folder_is_accounted_for", '"missing": missing - {new}, ', ""),
    Mutant("unknown weights are passed over", "test_every_weight_of_a_folder_is_accounted_for", '"unknown": unknown, ', ""),
    Mutant("misshapen weights are drawn", "test_every_weight_of_a_folder_is_accounted_for", '"misshapen": misshapen}', "}"),
    Mutant("weights may be NaN", "test_every_weight_of_a_folder_is_accounted_for", "for name, weight in state if not weight.isfinite().all()}", "for name, weight in state if False}"),
    Mutant("a reward model may get a new head", "test_every_weight_of_a_folder_is_accounted_for", " | ({new} - missing)", ""),
    Mutant("a policy may read ahead", "test_a_policy_samples_as_it_scores", 'refuse(not same, f"{folder}: not a causal', 'refuse(False, f"{folder}: not a causal'),
    Mutant("a policy may sample otherwise than it scores", "test_a_policy_samples_as_it_scores", 'refuse(not same, f"{folder}: sampling', 'refuse(False, f"{folder}: sampling'),
    Mutant("only the first step of sampling is compared", "test_a_policy_samples_as_it_scores", "same = (steps - alone).abs().max() <= 1e-3", "same = (steps - alone)[1, 0].abs().max() <= 9.0"),
    Mutant("router logits are asked for", "test_a_policy_samples_as_it_scores", "config.output_router_logits = False  #", "pass  #"),
    Mutant("EOS may have no embedding", "test_tokenizers_and_names_of_models_fit", '(("EOS", eos), ("the last token", max(of_text)))', '(("the last token", max(of_text)),)'),
    Mutant("a slip is looked up on the Hub", "test_tokenizers_and_names_of_models_fit", 'and not Path(str(folder).partition("/")[0]).exists()', ""),
    Mutant("NaN is saved", "test_only_finite_weights_and_own_settings_are_saved", "    check_finite(weights)\n", ""),
    Mutant("NaN is kept in a checkpoint", "test_only_finite_weights_and_own_settings_are_saved", "self.engine.once(check_finite, model)", "pass"),
    Mutant("the base's sampling flags are saved", "test_only_finite_weights_and_own_settings_are_saved", "if model.can_generate():", "if False:"),
    Mutant("two may write", "test_a_folder_has_one_writer", "fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    Mutant("a rule's directory stays", "test_users_functions_fail_in_one_line", "            reset(value)\n", "            pass\n"),
    Mutant("a judge that fails costs all summaries", "test_users_functions_fail_in_one_line", 'run.write("eval.jsonl", partial', 'partial(run.write, "eval.jsonl", partial'),
    Mutant("a rule may answer in words", "test_users_functions_fail_in_one_line", "if not isinstance(score, str) else math.nan", "if score is not None else math.nan"),
    Mutant("a rule may change a record", "test_users_functions_fail_in_one_line", "copy.deepcopy(post.record)", "post.record"),
    Mutant("a rule's last line is not looked for", "test_users_functions_fail_in_one_line", "for frame in trace if not", "for frame in trace[:1] if not"),
    Mutant("a rule may be a coroutine", "test_users_functions_fail_in_one_line", " or inspect.iscoroutinefunction(function)", ""),
    Mutant("a log may be a link", "test_a_runs_folder_is_input", "refuse((self.folder / name).is_symlink(), f", "refuse(False, f"),
    Mutant("data may change between kill and resume", "test_a_runs_folder_is_input", "if inputs.get(path) != was]", "if False]"),
    Mutant("a byte-order mark is text", "test_records_of_all_kinds_are_read_or_told", '"utf-8-sig" if number == 1 else "utf-8"', '"utf-8"'),
    Mutant("a blank line at the end is a record", "test_records_of_all_kinds_are_read_or_told", "if bad and isinstance(line, bytes) and line.isspace():", "if False:"),
    Mutant("two values of a sweep share a folder", "test_a_sweep_refuses_before_its_first_run", "refuse(len({*folders}) < len(folders),", "refuse(False,"),
    Mutant("policies may lack positions", "test_every_model_of_a_run_needs_room", "    check_room(policy, run.config.data)\n", ""),
    Mutant("reward models and judges may lack positions", "test_every_model_of_a_run_needs_room", "scorer.classifier, run.config.data)\n", "scorer.classifier, Data(query_tokens=2))\n"),
    Mutant("how a template spells a field is not looked at", "test_contradictions_are_refused_with_both_numbers", 'data.query_format.format(subreddit="", title="", post="")', "pass"),
    Mutant("a resumed run's values are flags of their own", "test_resuming_takes_up_the_runs_flags", '[f"{flag}={value}"]', "[flag, str(value)]"),
    Mutant("every bad line is remembered", "test_records_of_all_kinds_are_read_or_told", "if bad <= 3 else []", "if bad <= 300 else []"),
    Mutant("a kind may be no Unicode", "test_records_of_all_kinds_are_read_or_told", "kinds = [text_field({name: str(kind)}, name) for", "kinds = [str(kind) for"),
    Mutant("empty summaries are trained on", "test_records_of_all_kinds_are_read_or_told", "bool(p.summary.strip()) and len(response)", "len(response)"),
    Mutant("the second hangup ends at once", "test_a_terminal_that_closes_interrupts", "return  # a terminal that closes", "pass  # a terminal that closes"),
    Mutant("a terminal that is gone ends the step", "test_a_terminal_that_closes_interrupts", "suppress(*[OSError] * self.interrupted)", "suppress()"),
    # found by reading
    Mutant("a response loses its last token, EOS or not", "test_queries_and_responses_are_formatted_as_in_the_paper", "tokens = [token for token in response if token != self.eos_id]", "tokens = response[:-1]"),
    Mutant("of a post in few tokens the end is lost", "test_queries_and_responses_are_formatted_as_in_the_paper", "most, filled = 64 * self.data.query_tokens", "most, filled = 4 * self.data.query_tokens"),
    Mutant("an error removes the folder of a run that was resumed", "test_a_refused_run_leaves_no_folder", "False, False, not config.resume", "False, False, True"),
    Mutant("the evaluation reads all posts", "test_evaluation_columns_belong_to_their_models", '(x[: config.evaluate.posts] for x in read_prompts(run, "test", codec))', 'read_prompts(run, "test", codec)'),
    Mutant("after the first checkpoint one follows each step", "test_checkpoints_come_when_they_should", 'if name not in ("model", "optim")}\n        self.saved = time.monotonic()', 'if name not in ("model", "optim")}'),
    Mutant("of a folder the last file alone may not change", "test_a_runs_folder_is_input", ", marks.get(str(path), 0))", ")"),
    Mutant("made data may change between kill and resume", "test_a_runs_folder_is_input", 'for name in ("data", "base", "sft", "reward", "ppo")]:', 'for name in ("base", "sft", "reward", "ppo")]:'),
    Mutant("half a folder of a write that was killed stays", "test_files_are_on_the_disk_before_they_get_their_names", "    discard(part)\n    try:\n", "    try:\n"),
    Mutant("what stands in padding reaches exp()", "test_kl_in_the_loss_adds_its_price", "config.temperature).masked_fill(~part.mask, 0)  # [D13]", "config.temperature)"),
    Mutant("returns that are all alike explain nothing, infinitely", "test_update_statistics_are_what_their_names_say", "returns.var(correction=0).clamp(min=1e-8)", "returns.var(correction=0)"),
    Mutant("training ignores the precision", "test_the_engine_is_the_one_asked_for", "            with engine.autocast():\n                shares =", "            with nullcontext():\n                shares ="),
    Mutant("forward passes ignore the precision", "test_the_engine_is_the_one_asked_for", "        with engine.autocast():\n            parts =", "        with nullcontext():\n            parts ="),
    Mutant("scores are read in bfloat16", "test_the_head_computes_in_float32", "enabled=False):  # eight bits would tie scores and round values\n            return self.classifier.score(hidden.float())", "enabled=True):\n            return self.classifier.score(hidden)"),
    Mutant("a head's values are read in bfloat16", "test_the_head_computes_in_float32", "enabled=False):\n            return self.linear(hidden.float())", "enabled=True):\n            return self.linear(hidden)"),
    Mutant("references have no room left for their query", "test_room_is_needed_for_responses_and_comparisons", "positions_of(*readers) - codec.data.query_tokens", "positions_of(*readers)"),
    Mutant("references are as long as one of the readers can read", "test_room_is_needed_for_responses_and_comparisons", 'return min([getattr(config, "max_position', 'return max([getattr(config, "max_position'),
    Mutant("references are as long as the policy can read", "test_long_references_fit_those_who_read_them", "author_responses(codec, posts, *scorers.values())", 'author_responses(codec, posts, policies["SFT"])'),
    Mutant("a reference that is shown is as long as the policy can read", "test_long_references_fit_those_who_read_them", "author_responses(codec, [post], models.reward_model)", "author_responses(codec, [post], models.policy)"),
    Mutant("references that level the values are as long as the policy can read", "test_long_references_fit_those_who_read_them", "for i in some], value_model)", "for i in some], policy)"),
    Mutant("the pad id has no row in the embedding", "test_only_finite_weights_and_own_settings_are_saved", "if token != eos and token < size]", "if token != eos]"),
    Mutant("whether compared texts can share is not asked", "test_models_that_cannot_share_are_found_out", "[-2:], max(data.response_tokens, data.comparison_tokens)", "[-2:], data.response_tokens"),
    Mutant("a Hub prompt ends without a blank", "test_both_forms_of_the_data_are_read", "\\n\\nTL;DR:\\s*", "\\n\\nTL;DR:"),
    Mutant("of two texts the longer is their common beginning", "test_records_of_every_form_are_read", "if a != b), min(len(one), len(other)))", "if a != b), len(one))"),
    Mutant("conversations of one length have one prompt", "test_records_of_every_form_are_read", "elif not prompt and one[:-1] == other[:-1]:", "elif not prompt and len(one) == len(other) and one[0] == other[0]:"),
    Mutant("nohup does not help", "test_a_terminal_that_closes_interrupts", "for each in heard if signal.getsignal(each) is not signal.SIG_IGN}", "for each in heard}"),
    Mutant("an installed module comes before the user's", "test_users_functions_fail_in_one_line", "    sys.path.insert(0, here)\n", "    sys.path.append(here)\n"),
    Mutant("Ctrl-C is a fault of the user's function", "test_users_functions_fail_in_one_line", "except (KeyboardInterrupt, InputError):\n        raise", "except InputError:\n        raise"),
    Mutant("processes that do not know of each other are runs of their own", "test_the_engine_is_the_one_asked_for", "refuse(lost, ", "refuse(False, "),
    Mutant("a sweep resumes", "test_contradictions_are_refused_with_both_numbers", 'refuse(bool(self.sweep) and self.resume is not None, "--sweep makes', 'refuse(False, "--sweep makes'),
    Mutant("an ASCII terminal ends the run", "test_bad_input_gives_one_line_and_exit_code_2", 'sys.stdout.reconfigure(errors="replace")', "sys.stdout.reconfigure()"),
    Mutant("votes wait in memory", "test_judges_are_asked_in_both_orders", "file=file, flush=True)\n    return np", "file=file)\n    return np"),
    Mutant("a folder called labeler is the judge", "test_judges_are_asked_in_both_orders", 'if row == "judge" and Path(judge).is_dir():', "if Path(judge).is_dir():"),
    Mutant("the sweep's table has wins against the author", "test_the_report_names_the_winner_at_each_temperature", 'if "against SFT" in item[0]]', "]"),
    Mutant("a special token's spelling may be torn", "test_prompts_are_used_as_they_stand", 'refuse(bool({SEAM, END} & {*"".join(parts)}), torn)', "refuse(False, torn)"),
    Mutant("one value ends a sweep", "test_a_sweep_goes_on_where_one_value_stops", "except Stopped as error:  # what one", "except ConnectionError as error:  # what one"),
    Mutant("a value that stopped is forgotten", "test_a_sweep_goes_on_where_one_value_stops", "refuse(bool(stopped), ", "refuse(False, "),
    Mutant("a blind labeler says nothing", "test_the_labeler_reads_training_posts_only", "[few] * (len(posts) < 20)", "[few] * (len(posts) < 2)"),
    Mutant("a value model's high rate is not said", "test_high_rates_for_a_given_model_are_said", 'config.ppo.learns_values and config.ppo.value_lr == PPO.value_lr', 'False'),
    Mutant("the stranger's text always stands last", "test_comparisons_are_all_pairs_at_their_temperature", "stranger, tie, i % 2 == 0)", "stranger, tie, False)"),
    Mutant("a batch called all is all", "test_reward_accuracies_are_shares_of_pairs", "groups = ours | theirs | ours  #", "groups = ours | theirs  #"),
    Mutant("too little memory is a traceback", "test_bad_input_gives_one_line_and_exit_code_2", "except torch.OutOfMemoryError as error:", "except MemoryError as error:"),
    Mutant("weights that no step can change are trained", "test_every_weight_of_a_folder_is_accounted_for", "refuse(not any(p.requires_grad for p in model.parameters()), f", "refuse(False, f"),
    Mutant("who resumes a finished run leaves a lock there", "test_resuming_something_else_is_refused", "    refuse(not (folder / STATE).exists(), f\"--resume", "    refuse(False, f\"--resume"),
]  # fmt: skip


def planted(mutant: Mutant | None):
    """pmo with the bug in it, or without any, as a module; the file stays as it is."""
    source = Path(impl.__file__).read_text(encoding="utf-8")
    if mutant:
        found = source.count(mutant.old)
        assert found == 1, f"the line to break is there {found} times: {mutant.old!r}"
        source = source.replace(mutant.old, mutant.new)
    module = type(sys)("pmo_with_a_bug")
    module.__file__ = impl.__file__
    with mock.patch.dict(sys.modules, {module.__name__: module}):  # dataclasses look their module up
        exec(compile(source, impl.__file__, "exec"), module.__dict__)
    return module


# Half of the laws look at a tiny run, which a mutant must make anew, but for the stages that end before a function with
# the bug in it is called: those it would only repeat, bit by bit [D25].


@functools.cache
def run_by_stages() -> tuple[object, dict[int, int]]:
    """The tiny run of pmo as it is: a folder with copies of the run's, as each stage left it, and how many stages were
    finished when the function that begins in a line, or stands around it, was first called."""
    module, made, calls, finished = planted(None), tempfile.TemporaryDirectory(), {}, []
    leave, stages, own = module.Run.leave, module.Config().stages, {"config.json", "lock", "checkpoint.pt"}

    def leaving(run: object) -> None:
        leave(run)
        finished.append(run.stage)
        others = lambda folder, names: own & {*names} if Path(folder) == run.folder else ()  # noqa: E731
        shutil.copytree(run.folder, Path(made.name, "after", run.stage), ignore=others)

    def called(frame: object, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename == impl.__file__:
            calls.setdefault(frame.f_code.co_firstlineno, stages.index(finished[-1]) + 1 if finished else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "impl", module)
        patch.setattr(workshop, "folder", made, raising=False)
        patch.setattr(module.Run, "leave", leaving)
        usual = sys.getprofile()
        sys.setprofile(called)
        try:
            finished_run()
        finally:
            sys.setprofile(usual)
    return made, calls


@functools.cache
def functions_of(source: str) -> list[tuple[int, int, int]]:
    """Where the functions of a source begin, where what they do begins, and where it ends: inner ones first."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    first = [min([node.lineno, *(each.lineno for each in node.decorator_list)]) for node in nodes]
    return sorted(((at, node.body[0].lineno, node.end_lineno) for at, node in zip(first, nodes)), reverse=True)


def spared_stages(mutant: Mutant | None) -> tuple[str, ...]:
    """The stages of the tiny run that end before any function with the bug in it is called."""
    (_, calls), source, stages = run_by_stages(), Path(impl.__file__).read_text(encoding="utf-8"), impl.Config().stages
    if mutant is None:
        return stages
    at = source.index(mutant.old)
    first, last = (source[:place].count("\n") + 1 for place in (at, at + len(mutant.old.rstrip("\n"))))
    around = next(((begin, end) for begin, body, end in functions_of(source) if body <= first and last <= end), None)
    if around is None:  # whatever it is, it plays a part when the module is loaded
        return ()
    return stages[: min((done for line, done in calls.items() if around[0] <= line <= around[1]), default=len(stages))]


@contextmanager
def alone_with(module: object, spared: tuple[str, ...]) -> Iterator[None]:
    """Inside, pmo is this module, and nothing was made before, but for these stages of the tiny run."""
    introduce = module.Run.introduce

    def further(run: object) -> None:
        if run.folder == workshop() / "runs" / "whole" and spared:
            shutil.copytree(Path(run_by_stages()[0].name, "after", spared[-1]), run.folder, dirs_exist_ok=True)
            run.progress["finished"] = list(spared)
        introduce(run)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(module.Run, "introduce", further)
        patch.setitem(globals(), "impl", module)
        patch.setitem(sys.modules, module.__name__, module)  # where annotations are looked up
        patch.setattr(workshop, "folder", SimpleNamespace(name=folder), raising=False)
        yield


HOLDS: dict[str, bool] = {}  # laws that were tried without a bug, with nothing made before: do they need the run?


@functools.cache
def copied() -> object:
    """pmo without a bug, but loaded as those with one are: a law that fails for any copy would prove nothing."""
    return planted(None)


def hold_alone(name: str) -> Iterator[None]:
    with alone_with(copied(), impl.Config().stages):
        yield
        HOLDS[name] = (workshop() / "runs" / "whole").exists()


@pytest.fixture(autouse=True)
def alone(request):
    """Each of pmo's own laws begins with nothing made before, in its own test as with a bug planted."""
    own = is_pmo and request.node.name in LAWS and request.node.name not in contracts_laws()
    yield from hold_alone(request.node.name) if own else (None,)


@pmos_own
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_some_law_fails_when(mutant):
    broken = planted(mutant)
    # What fails without the bug, too, would prove nothing. Its own test says it, if that was run; a contract's law looks
    # at nothing that was made before.
    if mutant.law not in {**contracts_laws(), **HOLDS}:
        for _ in hold_alone(mutant.law):
            LAWS[mutant.law].hold(shrink=False)
    needs_the_run = HOLDS.get(mutant.law, False)
    # A law fails, or the mutant refuses what is right; a crash would prove nothing.
    with (
        alone_with(broken, spared_stages(mutant) if needs_the_run else ()),
        pytest.raises((AssertionError, pytest.fail.Exception, broken.InputError)),
    ):
        if needs_the_run:
            finished_run()  # before the law begins to watch
        LAWS[mutant.law].hold(shrink=False)


# -----------------------------------------------------------------------------
# benchmark: where the time of a PPO update goes, and how much of the machine it uses
# race: pmo and TRL in turn, one PPO update or one epoch of the reward model, on the same model, texts and settings


def tokens_in(batch: object) -> int:
    """Tokens that a forward pass over a batch, rollout or rankings must read: a shared query once."""
    return sum(tokens for _, _, tokens in batch.parts(10**9))


@contextmanager
def clocks() -> Iterator[Counter]:
    """Inside, an update's seconds, tokens and computed slots are counted by phase: sampling, forwards, training."""
    costs, phases = Counter(), [""]

    def timed(phase: str, function: Callable, tokens: Callable[[tuple, object], int]) -> Callable:
        def call(*args: object, **options: object) -> object:
            phases.append(phase)
            start = time.perf_counter()
            result = function(*args, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # or the next phase would wait for this one's kernels
            costs[f"seconds/{phase}"] += time.perf_counter() - start
            costs[f"tokens/{phase}"] += tokens(args, result)
            phases.pop()
            return result

        return call

    def counted(function: Callable, slots: Callable[[tuple, object], int]) -> Callable:
        def call(*args: object, **options: object) -> object:
            result = function(*args, **options)
            costs[f"slots/{phases[-1]}"] += slots(args, result)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for phase, name, tokens in (
            ("sampling", "sample", lambda args, result: sum(map(len, result))),
            ("forwards", "map_rows", lambda args, result: tokens_in(args[0])),
            ("training", "optimizer_step", lambda args, result: tokens_in(args[2])),
        ):
            patch.setattr(impl, name, timed(phase, getattr(impl, name), tokens))
        patch.setattr(impl, "lay_out", counted(impl.lay_out, lambda args, layout: layout.inputs["input_ids"].numel()))
        width = lambda args, rows: len(rows) * max(map(len, rows))  # noqa: E731
        patch.setattr(impl, "sample_block", counted(impl.sample_block, width))
        yield costs


def machine_limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations and bytes per second of a matrix product and of a copy, the fastest of five."""
    n, elements = (8192, 2**28) if device.type == "cuda" else (1536, 2**24)
    a = torch.randn(n, n, device=device, dtype=dtype)
    x, y = (torch.ones(elements, device=device) for _ in range(2))
    fastest: list[float] = []
    for work in (lambda: a @ a, lambda: y.copy_(x)):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        fastest.append(min(seconds))
    return 2 * n**3 / fastest[0], 8 * elements / fastest[1]


def benchmark(*flags: str) -> dict:
    """`python test_pmo.py benchmark [pmo's flags]`: medians of an update's phases, after the first, which warms up.

    Weights are --model's, or random; posts those of --data.train, or docstrings. Shares are of what a matrix product
    and a copy reach on this machine; what is counted is the work that the tokens need, padding left out."""
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    config = asked_for(*flags, "--stages", "ppo")
    run, updates = impl.Run(config), []
    if config.data.train is None:
        impl.corpus(run)
    if config.model is None:
        tokenizer = impl.train_tokenizer(
            impl.read_posts(run, "train"), config.data.query_format, config.pretrain.vocab_size
        )
        model = impl.small_model(config.pretrain, tokenizer, config.seed)
    else:
        tokenizer, model = impl.load_tokenizer(config.model), impl.load_policy(config.model)
    run.write("sft", partial(impl.save_model, model, model.state_dict(), tokenizer))
    scalar = impl.ScalarModel.load(run.path("sft"), new_head=impl.rng(config.seed, "reward head"))
    run.write("reward", partial(scalar.save, scalar.state_dict(), tokenizer))
    device, half = run.engine.device, run.engine.bfloat16
    flops, bandwidth = machine_limits(device, torch.bfloat16 if half else torch.float32)
    run.enter("ppo")
    with clocks() as costs, pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "show_sample", lambda *args: None)
        log = run.log
        run.log = lambda statistics: (updates.append(Counter(costs)), costs.clear(), log(statistics))
        impl.ppo(run)
    updates = updates[1:] or updates
    cost = {name: statistics.median(update[name] for update in updates) for name in updates[0]}
    # Two operations per weight and token forward, four more backward; attention's own are left out.
    head, ppo, shape = model.get_output_embeddings().weight.numel(), config.ppo, model.config
    body = model.num_parameters() - head * (1 if shape.tie_word_embeddings else 2)
    written, epochs, value = cost["tokens/sampling"], ppo.num_ppo_epochs, ppo.baseline == "value-model"
    read = cost["tokens/training"] / epochs  # queries and responses, once: policy (before and after) and reference
    operations = {
        "sampling": 2 * body * read + 2 * head * written,
        "forwards": 2 * body * read * (3 + value + (ppo.reward_function is None)) + 2 * 3 * head * written,
        "training": 6 * (body * read * (1 + value) + head * written) * epochs,
    }
    # A step of sampling reads the weights once, and for each row the keys and values of all that came before.
    steps = cost["slots/sampling"] / min(ppo.batch_size, run.engine.sample_batch_size)
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    cache = 2 * shape.num_hidden_layers * heads * (shape.hidden_size // shape.num_attention_heads)
    copies = ppo.responses_per_query if config.compute.share_queries else 1  # each response has its query's keys
    before = ((read - written) * copies + written / 2) / ppo.batch_size
    moved = ((body + head) * steps + cache * before * written) * (2 if half else 4)
    phases = {
        phase: {
            "seconds": (seconds := cost[f"seconds/{phase}"]), "tokens/s": cost[f"tokens/{phase}"] / seconds,
            "padding": 1 - cost[f"tokens/{phase}"] / cost[f"slots/{phase}"], "share of peak": work / seconds / flops,
        }
        for phase, work in operations.items()
    }  # fmt: skip
    phases["sampling"]["share of bandwidth"] = moved / cost["seconds/sampling"] / bandwidth
    print(impl.table([[f"{len(updates)} updates", *phases["sampling"]], *(
        [phase, *(f"{row[name]:.3g}" if name in row else "" for name in phases["sampling"])] for phase, row in phases.items()
    )]))  # fmt: skip
    total = sum(row["seconds"] for row in phases.values())
    print(f"{total:.2f} s per update, {model.num_parameters():,} parameters, {impl.peak_memory(device)}")
    print(f"a matrix product reaches {flops / 1e12:.3g} TFLOP/s here, a copy {bandwidth / 1e9:.3g} GB/s")
    return {"phases": phases, "seconds": total, "updates": len(updates), "flops": flops, "bandwidth": bandwidth}


RACES = {  # layers, width, heads, vocabulary; rows, shortest and longest query, response tokens, mean response
    "short": (6, 256, 8, 4096, 64, 58, 128, 48, None),
    "tldr": (6, 256, 8, 4096, 64, 192, 512, 53, 34),
    "410m": (24, 1024, 16, 50304, 256, 192, 512, 53, 34),
    "1b": (16, 2048, 8, 50304, 256, 192, 512, 53, 34),
}


def race(name: str = "short", option: str = "", micro: int = 16, rounds: int = 3) -> None:
    """Time pmo and TRL in turn, A B A B, in TRL's environment; print seconds, medians, their ratio and peak memory.

        python test_pmo.py race tldr            an update of PPO
        python test_pmo.py race tldr 4          the same with four responses per query: TRL gets each query four times
        python test_pmo.py race tldr 4 32       the same in micro-batches of 32 responses instead of 16
        python test_pmo.py race reward tldr     one epoch of the reward model, on the same pairs

    Queries have uniform lengths between the two of RACES; where a mean response is given, the EOS logit is raised so
    that responses end after about that many tokens, else none ends."""
    import transformers as hf

    size = (option or "tldr") if name == "reward" else name
    if size not in RACES:
        sys.exit(f"race: {size} is none of {', '.join(RACES)}, reward")
    hf.utils.logging.set_verbosity_error()
    try:
        both = contestants(size, 1 if name == "reward" else int(option or 1), int(micro))
        about, ours, theirs = reward_race(both) if name == "reward" else update_race(both)
    except ImportError as error:
        sys.exit(f"race: {error}; it needs trl 1.12 and its dependencies (README)")
    seconds: dict[str, list[float]] = {"pmo": [], "TRL": []}
    memory: dict[str, list[float]] = {"pmo": [], "TRL": []}
    with clocks() as costs:
        for side, run in [("pmo", ours), ("TRL", theirs)] * rounds:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), memory_peak() as peak:
                seconds[side].append(run())
            memory[side].append(peak[0])
            print(f"{side} {seconds[side][-1]:.1f} s", flush=True)
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values())]
    print(
        f"{' '.join([name, option]).strip()}: {both.policy.num_parameters() / 1e6:.1f}M parameters, {about()}; {place}"
    )
    print(f"medians {medians['pmo']:.1f} s and {medians['TRL']:.1f} s; TRL / pmo {statistics.median(ratios):.2f}")
    print(f"peak memory {max(memory['pmo']):.2f} GiB and {max(memory['TRL']):.2f} GiB")
    phases = ("sampling", "forwards", "training")
    print(", ".join(f"{phase} {costs[f'seconds/{phase}'] / rounds:.1f} s" for phase in phases))


@contextmanager
def memory_peak() -> Iterator[list[float]]:
    """Yields a list that receives the most GiB in use inside: of the GPU, else of this process, looked at all the time."""
    import ctypes
    import gc
    import threading

    gc.collect()
    peak, over = [0.0], threading.Event()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated() / 2**30
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the other side freed is not this one's

    def watch() -> None:
        pages = Path("/proc/self/statm")
        while pages.exists() and not over.wait(0.01):
            peak[0] = max(peak[0], int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def contestants(size: str, G: int, micro: int) -> SimpleNamespace:
    """Random models of a size of RACES, and queries: of each, G neighbours. Micro-batches are of `micro` rows."""
    import random

    import transformers as hf

    layers, width, heads, vocabulary, rows, shortest, longest, T, mean_response = RACES[size]
    if rows % G:
        sys.exit(f"race: {rows} rows are no groups of {G}")
    cuda, tokenizer = torch.cuda.is_available(), tiny_tokenizer()
    tokenizer.padding_side, eos = "left", tokenizer.eos_token_id
    config = hf.GPTNeoXConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        vocab_size=vocabulary, eos_token_id=eos, bos_token_id=eos, pad_token_id=tokenizer.pad_token_id, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):  # where a billion weights are drawn in a second
        policy, scalar = hf.GPTNeoXForCausalLM(config), hf.GPTNeoXForSequenceClassification(config)
    policy, scalar = policy.cpu(), scalar.cpu()
    numbers = random.Random(0)
    lengths = [numbers.randint(shortest, longest) for _ in range(rows // G)]
    queries = [[numbers.randrange(len(tokenizer), vocabulary) for _ in range(n)] for n in lengths]
    if mean_response:
        with torch.no_grad():  # one hidden unit is always 1, and only the EOS logit reads it
            norm, head = policy.gpt_neox.final_layer_norm, policy.get_output_embeddings().weight
            norm.weight[0], norm.bias[0], head[:, 0], head[eos] = 0.0, 1.0, 0.0, 0.0
            others = (policy(input_ids=torch.tensor([queries[0]])).logits[0, -1] / 0.7).logsumexp(0)
            head[eos, 0] = 0.7 * (others - math.log(mean_response))
    device = torch.device("cuda" if cuda else "cpu")
    return SimpleNamespace(
        policy=policy, scalar=scalar, tokenizer=tokenizer, queries=[query for query in queries for _ in range(G)], G=G,
        rows=rows, T=T, mean_response=mean_response, vocabulary=vocabulary, cuda=cuda, device=device, micro=micro,
        machine=engine(micro, device=device, bfloat16=cuda), numbers=numbers,
    )  # fmt: skip


def new_clock():
    """A callback of a transformers trainer that has its seconds, from the beginning to the last step."""
    import transformers as hf

    class Clock(hf.TrainerCallback):
        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.start

    return Clock()


def update_race(both: SimpleNamespace) -> tuple[Callable[[], str], Callable[[], float], Callable[[], float]]:
    """What was raced, and a function for each side that updates fresh models once and returns its seconds."""
    import copy

    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, scalar, queries, rows, T, machine = both.policy, both.scalar, both.queries, both.rows, both.T, both.machine
    ppo = ppo_config(
        total_episodes=rows, batch_size=rows, num_minibatches=1, num_ppo_epochs=4, kl_coef=0.05, lr=3e-6, value_lr=3e-6,
        responses_per_query=both.G,
    )  # fmt: skip
    share, written = both.G > 1, []

    def ours() -> float:
        models = [copy.deepcopy(model).to(both.device).eval() for model in (policy, scalar, policy, scalar)]
        models = impl.Models(models[0], impl.ScalarModel(models[1], True).to(both.device), models[2].requires_grad_(False),
                             impl.ScalarModel(models[3]).to(both.device).requires_grad_(False))  # fmt: skip
        optimizer = impl.adamw(impl.Optimizer(), (models.policy, ppo.lr), (models.value_model, ppo.lr))
        start = time.perf_counter()
        end_of_text, everything = both.tokenizer.eos_token_id if both.mean_response else -1, list(range(rows))
        responses = impl.sample(models.policy, queries, uniforms(rows, T), ppo.temperature, end_of_text, machine, share)
        batch = impl.Batch(queries, responses, share)
        scores = impl.scores_of(models.reward_model, batch, machine)
        rollout = impl.read_tokens(models, batch, scores, end_of_text, ppo.temperature, [everything], machine)
        rollout = impl.credit(rollout, impl.shape_rewards(rollout, ppo), ppo)
        for _ in range(ppo.num_ppo_epochs):
            impl.optimizer_step(machine, optimizer, rollout, *impl.ppo_losses(models, ppo))
        written.append(rollout.mask.sum().item() / rows)
        return time.perf_counter() - start

    def theirs() -> float:
        clock = new_clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = PPOTrainer(
                args=PPOConfig(
                    output_dir=folder, per_device_train_batch_size=both.micro, num_mini_batches=1, num_ppo_epochs=4,
                    gradient_accumulation_steps=rows // both.micro, total_episodes=rows, response_length=T,
                    temperature=0.7, learning_rate=3e-6, kl_coef=0.05, report_to="none", seed=1, save_strategy="no",
                    stop_token="eos" if both.mean_response else None, num_sample_generations=0, bf16=both.cuda,
                    use_cpu=not both.cuda,
                ),
                processing_class=both.tokenizer, model=copy.deepcopy(policy), ref_model=copy.deepcopy(policy),
                reward_model=copy.deepcopy(scalar), value_model=copy.deepcopy(scalar),
                train_dataset=Dataset.from_dict({"input_ids": queries}), callbacks=[clock],
            )  # fmt: skip
            trainer.train()
        return clock.seconds

    def about() -> str:
        of = f"{rows} rows, {both.G} to a query of {sum(map(len, queries)) / rows:.0f} tokens"
        return f"{of}, responses of {statistics.mean(written):.0f}"

    return about, ours, theirs


def reward_race(both: SimpleNamespace) -> tuple[Callable[[], str], Callable[[], float], Callable[[], float]]:
    """The same of one epoch over pairs of responses, in steps of as many pairs as a micro-batch holds."""
    import copy

    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    eos, longest = both.tokenizer.eos_token_id, both.T if both.mean_response is None else 2 * both.mean_response
    low, scalar = len(both.tokenizer), both.scalar

    def response() -> list[int]:
        n = both.numbers.randint(longest // 4, longest - 1)
        return [both.numbers.randrange(low, both.vocabulary) for _ in range(n)] + [eos]

    pairs = [impl.Ranking(query, [response(), response()], [(0, 1)]) for query in both.queries]
    machine = replace(both.machine, micro_batch_size=2 * both.micro)

    def ours() -> float:
        model = impl.ScalarModel(copy.deepcopy(scalar).to(both.device).eval()).to(both.device)
        optimizer = impl.adamw(impl.Optimizer(), (model, 3e-6))
        start = time.perf_counter()
        for rows in impl.chunks(range(len(pairs)), both.micro):
            step = impl.Rankings([pairs[i] for i in rows], share=True)
            impl.optimizer_step(machine, optimizer, step, partial(impl.reward_losses, model))
        return time.perf_counter() - start

    def theirs() -> float:
        clock, columns = new_clock(), {"chosen_ids": 0, "rejected_ids": 1}
        dataset = Dataset.from_dict({name: [p.query + p.responses[i] for p in pairs] for name, i in columns.items()})
        with tempfile.TemporaryDirectory() as folder:
            trainer = RewardTrainer(
                args=RewardConfig(
                    output_dir=folder, per_device_train_batch_size=both.micro, num_train_epochs=1, max_length=None,
                    learning_rate=3e-6, gradient_checkpointing=False, report_to="none", bf16=both.cuda, seed=1,
                    use_cpu=not both.cuda, save_strategy="no", logging_strategy="no",
                ),
                model=copy.deepcopy(scalar), processing_class=both.tokenizer, train_dataset=dataset, callbacks=[clock],
            )  # fmt: skip
            trainer.train()
        return clock.seconds

    def about() -> str:
        queries, responses = ([len(x) for x in xs] for xs in (both.queries, [r for p in pairs for r in p.responses]))
        return f"{len(pairs)} pairs, queries of {statistics.mean(queries):.0f} tokens, responses of {statistics.mean(responses):.0f}"

    return about, ours, theirs


# -----------------------------------------------------------------------------
# peers: released libraries as implementations of the contract, by adapters: PMO_IMPL=trl python test_pmo.py
#
# An adapter calls what its library offers as a function, and runs statements of a method's body as they stand in the
# installed source, so that a failure names a line of theirs. It fixes nothing; what is not there is missing.


@functools.cache
def lines_of(function: Callable, first: str, last: str):
    """The code of a function's statements, from the one that begins with `first` to the next that begins with `last`."""
    source, start = inspect.getsourcelines(function)
    tree = ast.increment_lineno(ast.parse(textwrap.dedent("".join(source))), start - 1)
    for node in ast.walk(tree):
        for body in (getattr(node, field, None) for field in ("body", "orelse")):
            texts = [ast.unparse(statement) for statement in body] if isinstance(body, list) else []
            starts = [i for i, text in enumerate(texts) if text.startswith(first)]
            ends = [i for i, text in enumerate(texts) if text.startswith(last) and starts and i >= starts[0]]
            if starts and ends:
                part = ast.Module(body[starts[0] : ends[0] + 1], type_ignores=[])
                return compile(part, inspect.getsourcefile(function), "exec")
    raise LookupError(f"{function.__qualname__} has no statements from {first!r} to {last!r}")


def statements(function: Callable, first: str, last: str, **names: object) -> SimpleNamespace:
    """Run these statements with these names and the module's own; all names afterwards."""
    names = vars(sys.modules[function.__module__]) | names
    exec(lines_of(function, first, last), names)
    return SimpleNamespace(**names)


def token_by_token(loss: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """The losses (B, T) of a function that returns their mean: it gets one token at a time."""
    losses = [loss(*(x.view(1, 1) for x in token)) for token in zip(*(x.flatten() for x in parts))]
    return torch.stack(losses).view(parts[0].shape)


def adapter(library, functions: dict[str, object]):
    """A module with those of these functions that are the contract's."""
    module = type(sys)(f"{library.__name__.partition('.')[0]} {importlib.metadata.version(IMPL)}")
    module.__file__ = library.__file__
    vars(module).update({name: function for name, function in functions.items() if name in CONTRACT})
    return module


def trl_as_implementation():
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.ppo import ppo_trainer as trl

    train, args = partial(statements, trl.PPOTrainer.train), SimpleNamespace
    masked_mean = trl.masked_mean

    def lengths(mask):  # what train() calls sequence_lengths is the index of the last token
        return {"sequence_lengths": mask.sum(1) - 1, "responses": mask.long()}

    def response_mask(responses, eos_id):
        pad_id = -1  # the most favourable choice: an id that cannot be sampled
        cut = trl.truncate_response(eos_id, pad_id, responses)
        names = {"sequence_lengths": trl.first_true_indices(cut == pad_id) - 1, "responses": responses}
        names |= dict.fromkeys(("logprobs", "ref_logprobs"), responses.float())
        return ~train("response_idxs =", "padding_mask =", **names).padding_mask

    def penalize_missing_eos(scores, has_eos, value):
        self = args(args=args(missing_eos_penalty=-value))
        there = "if self.args.missing_eos_penalty"
        return train(there, there, self=self, scores=scores.clone(), contain_eos_token=has_eos).scores

    def logprobs_of(logits, tokens, temperature):
        names = {"logits": logits.clone(), "args": args(temperature=temperature), "mb_responses": tokens}
        return train("logits /=", "new_logprobs = selective", **names).new_logprobs

    def entropy_of(logits, temperature):
        logits = train("logits /=", "logits /=", logits=logits.clone(), args=args(temperature=temperature)).logits
        return train("prob_dist =", "entropy =", logits=logits).entropy

    def whiten(x, mask, shift_mean=True):
        return torch.masked_fill(trl.masked_whiten(x, mask, shift_mean), ~mask, 0)  # as train() does

    def kl_estimate(logprobs, ref_logprobs, kind):
        if kind == "k2":
            raise NotImplementedError("TRL's PPO has k1 and k3")
        names = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "args": args(kl_estimator=kind)}
        return train("logr =", "kl =", **names).kl

    def token_rewards(scores, kl, mask, kl_coef):
        kl = torch.masked_fill(kl, ~mask, 0)  # its log-probabilities are all equal in padding
        names = {"kl": kl, "scores": scores, "sequence_lengths_p1": mask.sum(1), "args": args(kl_coef=kl_coef)}
        return train("non_score_reward =", "rewards[actual_start, actual_end] +=", **names, **lengths(mask)).rewards

    def gae(rewards, values, mask, gamma, lam):
        rewards = torch.masked_fill(rewards, ~mask, 0)  # its KL is 0 in padding
        names = {"values": values, "logprobs": values, "ref_logprobs": values, **lengths(mask)}
        values = train("response_idxs =", "values =", **names).values
        names = {"rewards": rewards, "values": values, "args": args(gamma=gamma, lam=lam), **lengths(mask)}
        result = train("lastgaelam =", "returns =", **names)
        return torch.masked_fill(result.advantages, ~mask, 0), torch.masked_fill(result.returns, ~mask, 0)

    def policy_loss(logprobs, old_logprobs, advantages, cliprange):
        names = {"new_logprobs": logprobs, "mb_logprobs": old_logprobs, "mb_advantage": advantages}
        return train("logprobs_diff =", "pg_loss_max =", **names, args=args(cliprange=cliprange)).pg_loss_max

    def value_loss(values, old_values, returns, cliprange_value):
        names = {"vpred": values, "mb_values": old_values, "mb_return": returns, "micro_batch_inds": ...}
        names |= {"args": args(cliprange_value=cliprange_value), "padding_mask_p1": torch.zeros(()).bool()}
        names["masked_mean"] = lambda x, mask: x  # the contract wants the loss of each token
        return train("vpredclipped =", "vf_loss =", **names).vf_loss

    return adapter(trl, locals())


def torchtune_as_implementation():
    from torchtune import rlhf
    from torchtune.rlhf import rewards as module
    from torchtune.rlhf.loss import PPOLoss

    masked_mean, whiten_there = module.masked_mean, module.whiten

    def response_mask(responses, eos_id):
        return ~rlhf.truncate_sequence_at_first_stop_token(responses.clone(), torch.tensor([eos_id]), -1)[0]

    def logprobs_of(logits, tokens, temperature):
        return rlhf.logits_to_logprobs(logits, tokens, temperature)

    def whiten(x, mask, shift_mean=True):
        return torch.masked_fill(whiten_there(x, mask, shift_mean), ~mask, 0)  # as estimate_advantages does

    def kl_estimate(logprobs, ref_logprobs, kind):
        if kind != "k1":
            raise NotImplementedError("torchtune's PPO has k1")
        return module.get_rewards_ppo(logprobs[:, 0], logprobs, ref_logprobs, 0.0)[1]

    def token_rewards(scores, kl, mask, kl_coef):
        kl = torch.masked_fill(kl, ~mask, 0)  # its log-probabilities are all equal in padding
        return module.get_rewards_ppo(scores, kl, torch.zeros_like(kl), kl_coef, mask.sum(1) - 1)[0]

    def gae(rewards, values, mask, gamma, lam):
        with pytest.MonkeyPatch.context() as patch:  # its advantages come whitened; that is whiten's matter
            patch.setattr(module, "whiten", lambda x, mask: x)
            values = torch.masked_fill(values, ~mask, 0)  # as its recipe does
            rewards = torch.masked_fill(rewards, ~mask, 0)
            return module.estimate_advantages(values, rewards, gamma, lam, mask)

    def policy_loss(logprobs, old_logprobs, advantages, cliprange):
        def loss(new: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
            zero = torch.zeros_like(new)
            return PPOLoss(cliprange, value_coeff=0.0)(old, new, advantage, zero, zero, zero)[0]

        return token_by_token(loss, logprobs, old_logprobs, advantages)

    def value_loss(values, old_values, returns, cliprange_value):
        def loss(value: Tensor, old: Tensor, target: Tensor) -> Tensor:
            zero = torch.zeros_like(value)
            return PPOLoss(0.2, cliprange_value, 1.0)(zero, zero, zero, old, value, target)[0]

        return token_by_token(loss, values, old_values, returns)

    return adapter(module, locals())


def torchrl_as_implementation():
    from torchrl.objectives import ClipPPOLoss, utils
    from torchrl.objectives.llm import grpo
    from torchrl.objectives.value import functional

    def kl_estimate(logprobs, ref_logprobs, kind):
        if kind != "k3":
            raise NotImplementedError("torchrl's GRPO has k3")
        there = partial(statements, grpo.GRPOLoss._kl_to_ref, "diff =", "kl_penalty =")

        def loss(new: Tensor, ref: Tensor) -> Tensor:
            return there(cur_log_prob=new, ref_log_prob=ref).kl_penalty

        return token_by_token(loss, logprobs, ref_logprobs)

    def gae(rewards, values, mask, gamma, lam):  # vectorized, as its GAE is unless told otherwise
        rewards, values = (torch.masked_fill(x, ~mask, 0)[..., None] for x in (rewards, values))
        after, ends = torch.cat([values[:, 1:], 0 * values[:, :1]], 1), ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
        results = functional.vec_generalized_advantage_estimate(gamma, lam, values, after, rewards, ends[..., None])
        return tuple(torch.masked_fill(x[..., 0], ~mask, 0) for x in results)

    def policy_loss(logprobs, old_logprobs, advantages, cliprange):
        about = SimpleNamespace(_asymmetric_clip=False, clip_epsilon=torch.tensor(cliprange, dtype=logprobs.dtype))
        about._clip_bounds = ClipPPOLoss._clip_bounds.fget(about)
        weight = logprobs - old_logprobs
        names = {"self": about, "log_weight": weight, "log_behav_weight": weight, "log_is_weight": None}
        return -statements(inspect.unwrap(ClipPPOLoss.forward), "gain1 =", "gain =", advantage=advantages, **names).gain

    def value_loss(values, old_values, returns, cliprange_value):
        plain = utils.distance_loss(returns, values, "l2")
        clip = torch.tensor(cliprange_value, dtype=values.dtype)
        return utils._clip_value_loss(old_values, values, clip, returns, plain, "l2")[0] / 2

    def aggregate(losses, mask, how, normalizer=None):
        if normalizer is not None:
            raise NotImplementedError("torchrl divides by the micro-batch's own count")
        about = SimpleNamespace(aggregation="token_mean" if how == "token" else "prompt_mean", reduction="mean")
        about._expand_loss_mask = grpo.GRPOLoss._expand_loss_mask
        about._reduce_loss = partial(grpo.GRPOLoss._reduce_loss, about)
        return grpo.GRPOLoss._aggregate_loss_value(about, losses[..., None], mask).squeeze()

    return adapter(functional, locals())


PEERS = {"trl": trl_as_implementation, "torchtune": torchtune_as_implementation, "torchrl": torchrl_as_implementation}
if IMPL in PEERS:
    try:
        impl = PEERS[IMPL]()
    except (ImportError, LookupError) as error:
        unusable(f"the adapter is for another version, or a dependency is missing: {error}")

FOUND_IN_PEERS = {  # what README's table says: version, and every law that fails (hardening and choices apart)
    "trl": ("1.12.0", """
        test_missing_eos_replaces_the_score test_missing_eos_replaces_nan
        test_entropy_ignores_impossible_tokens test_k3_keeps_its_digits_near_zero
        test_score_is_paid_to_the_last_response_token test_token_rewards_ignores_numbers_outside_the_mask
        test_gae_ignores_numbers_outside_the_mask test_token_rewards_and_gae_treat_each_response_alone
        test_gradient_is_unbiased_with_any_baseline test_gradient_is_unbiased_for_every_lambda_with_true_values
        test_gradient_is_zero_at_the_closed_form_optimum"""),
    "torchtune": ("0.6.1", """
        test_whiten_gives_mean_zero_and_variance_one test_whiten_is_invariant_to_shift_and_scale
        test_whiten_without_shift_only_scales"""),
    "torchrl": ("0.14.1", "test_gae_with_lambda_zero_is_the_td_residual"),
}  # fmt: skip


@pmos_own
@pytest.mark.parametrize("peer", PEERS)
def test_what_the_suite_finds_in_a_peer(peer, tmp_path):
    version, expected = FOUND_IN_PEERS[peer]
    if not importlib.util.find_spec(peer) or importlib.metadata.version(peer).partition("+")[0] != version:
        pytest.skip(f"{peer} {version} is not installed")
    command = [sys.executable, __file__, "--table", str(tmp_path / "found.json")]
    subprocess.run(command, capture_output=True, timeout=600, env={**os.environ, "PMO_IMPL": peer})
    laws = json.loads((tmp_path / "found.json").read_text())["laws"]
    assert {name for name, told in laws.items() if told["outcome"] == "fails"} == set(expected.split())


if __name__ == "__main__":  # the rest of the command lines ended further up
    race(*sys.argv[2:5]) if sys.argv[1] == "race" else benchmark(*sys.argv[2:])
