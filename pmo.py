"""pmo: proximal policy optimisation (PPO) for language models, in one file.

A language model is trained from preferences in three stages: supervised fine-tuning (SFT), a reward model, PPO.

    python pmo.py                                    all of it, offline, in minutes, on a corpus every machine has
    python pmo.py --help                             every flag with its meaning, symbol and source
    PMO_IMPL=my_module pytest test_pmo.py            hold another implementation against the same laws

PPO in a dozen lines (`ppo`, at the head of section 2, is these lines with names):

    for update in range(num_updates):
        responses = sample(policy, queries, temperature)                # 1. roll out, up to and including EOS
        scores = reward_model(queries, responses), read at EOS          # 2. one for each response
        logprobs, ref_logprobs, values of every response token          # 3. one forward pass of each model
        rewards = -kl_coef * (logprobs - ref_logprobs), + score on the last token                      # 4.
        advantages, returns = gae(rewards, values);  advantages = whiten(advantages)                   # 5.
        for epoch in range(num_ppo_epochs):
            for minibatch in a fresh permutation of the rollouts:                                      # 6.
                ratio = exp(new logprobs - old logprobs)
                loss = -min(ratio * A, clip(ratio, 0.8, 1.2) * A) + vf_coef * clipped squared value error
                step                                                                                   # 7.

That is [4]'s, and `run_tldr.sh` runs it. The default run samples eight responses to a query, and the mean return of the
other seven takes the place of the values (`--ppo.baseline group`): it does as well there, with one model less to train.

The file is to be read from its top. Sections 1 to 4 and the first half of 5, up to "here the method ends", are the
method; then comes the program around it:

    1 maths   2 PPO   3 SFT and reward model   4 models   5 data (batches, randomness, tokens; then files)
    6 evaluation   7 the default run (corpus, small model, labeler, comparisons)   8 config   9 runtime   10 main

To change what is credited (another baseline): `credit`; how far a step may go: `policy_loss`, called in
`policy_losses`, and `natural_step`; where the KL is paid: `shape_rewards` and `policy_losses`; what is scored:
`outcome_scores`; which models there are: `load_models`; flags: section 8.

Departures from the code of [4], each because of a fault or for a reason given at the place:
  1. the score is paid to the EOS action, not one slot after it;
  2. a loss is divided once, by the token count of the whole minibatch, so that micro-batches cannot change it;
  3. masks come from lengths, never from `token == pad_id`;
  4. rows are padded on the right for scoring and training, so positions are right on every architecture;
  5. old log-probabilities come from the update's own forward passes, so the first ratio is 1;
  6. SFT can train on the response alone (a flag weighs the prompt), AdamW decays no weights, every statistic is masked;
  7. reward whitening only scales; advantages are whitened over the batch; SFT's minibatches hold rows of like length;
  8. `objective/entropy` is the policy's entropy, not the negative log-probability of what it happened to sample.

Shapes: B rollouts, Q query tokens, T response tokens, V vocabulary, D width, W = Q + T; () is a scalar. Tags [D1] to
[D25] number the details that make it work; each stands where it is done, with what it says.

References: [1] Schulman et al. 2017, PPO, arXiv 1707.06347 · [2] Lambert, The RLHF Book · [3] Schulman et al. 2016,
GAE, arXiv 1506.02438 · [4] Huang et al. 2024, The N+ Implementation Details of RLHF with PPO, arXiv 2403.17031 ·
[5] Stiennon et al. 2020, Learning to summarize from human feedback, arXiv 2009.01325 · [6] Schulman et al. 2015, TRPO,
arXiv 1502.05477 · [7] Lambert et al. 2024, Tulu 3, arXiv 2411.15124 · [8] Ouyang et al. 2022, InstructGPT, arXiv
2203.02155 · [9] Ahmadian et al. 2024, Back to Basics (RLOO), arXiv 2402.14740. The file is named after an article that
calls PPO *PMO*; README translates its vocabulary.
"""

from __future__ import annotations

import copy
import gzip
import importlib.util
import inspect
import json
import math
import os
import re
import reprlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property, lru_cache, partial
from itertools import chain, combinations, groupby, zip_longest
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

# transformers and tokenizers are imported where they are used: `--help`, and copying the maths, need neither.


# -----------------------------------------------------------------------------
# 1 maths: tensors in, tensors out. No model, no tokenizer, no randomness, no I/O.
#
# Every mask is bool (B, T), a prefix of True in each row. What stands outside a
# mask is ignored, NaN included, and comes back as 0. Inputs are never modified.


def response_mask(responses: Tensor, eos_id: int) -> Tensor:  # (B, T) the sampler's output, full width -> (B, T) bool
    """True up to and including the first EOS; all True in a row without one [D3, D4].

    What the sampler wrote after EOS is no part of the response, whatever it is. A pad id plays no role here."""
    is_eos = responses == eos_id
    eos_before = is_eos.cumsum(1) - is_eos.long()
    return eos_before == 0


def length_mask(lengths: Tensor, T: int) -> Tensor:  # (B,) -> (B, T) bool
    """True on the first `lengths[b]` slots of row b [D3]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def penalize_missing_eos(scores: Tensor, has_eos: Tensor, value: float) -> Tensor:  # (B,), (B,) bool -> (B,)
    """Replace (not lower) the score of a response that never ended [D12; 4, detail "EOS trick"]."""
    return torch.where(has_eos, scores, torch.full_like(scores, value))


def logprobs_of(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:  # (B, T, V), (B, T) -> (B, T)
    """log softmax(logits / temperature)[token], in float32 (float64 stays float64).

    The temperature is the one the tokens were sampled with: it defines the policy [D13; 4]."""
    logits = _at_least_float32(logits) / temperature
    return -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def entropy_of(logits: Tensor, temperature: float) -> Tensor:  # (B, T, V) -> (B, T) nats
    """H = −Σᵥ πᵥ log πᵥ of the tempered distribution π = softmax(logits / temperature) [D13]."""
    logprobs = (_at_least_float32(logits) / temperature).log_softmax(-1)
    # The clamp turns 0 · (−∞), a token that cannot be sampled, into 0.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:  # (B, T), (B, T) bool -> ()
    """Mean of x over the True slots."""
    return x.masked_fill(~mask, 0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:  # (B, T), (B, T) bool -> (B, T)
    """(x − mean) / (std + 1e-8) over the mask, population variance; `shift_mean=False` gives x / (std + 1e-8).

    Without the shift zero stays zero and signs stay, as whitened *rewards* should ([4]'s code adds the mean back
    instead). Input without spread (std < 1e-6) is left unscaled: dividing would only blow up rounding errors [D16]."""
    x = x.masked_fill(~mask, 0)
    mean = masked_mean(x, mask)
    mean = mean + masked_mean(x - mean, mask)  # a second pass removes the rounding error of the first
    centered = (x - mean).masked_fill(~mask, 0)
    std = masked_mean(centered.square(), mask).sqrt()
    scale = torch.where(std < 1e-6, torch.ones_like(std), std + 1e-8)
    return (centered if shift_mean else x) / scale


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"] = "k1") -> Tensor:  # (B, T)
    """Estimates of KL(π ‖ π_ref) from single samples of π [Schulman 2020, "Approximating KL Divergence"].

        k1 = log π − log π_ref        k2 = k1² / 2        k3 = π_ref / π − 1 + k1

    k1 and k3 are unbiased; k2 is biased, of low variance; k2 and k3 are never negative."""
    k1 = logprobs - ref_logprobs
    if kind == "k1":
        return k1
    return k1.square() / 2 if kind == "k2" else torch.expm1(-k1) + k1


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float, kind: str = "k2") -> Tensor:  # (B, T), unreduced
    """β · KL as a loss: k2 has the gradient of KL(π ‖ π_ref), k3 that of KL(π_ref ‖ π), k1 has none in expectation."""
    return kl_coef * kl_estimate(logprobs, ref_logprobs, kind)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:  # (B,), (B, T) ... -> (B, T)
    """rₜ = −β klₜ on every response token, plus the score on the last one [D15; 5, §3.4; Ziegler et al. 2019, eq. 2].

    The last response token is the EOS action itself: it earned the score. [4]'s code pays one slot later."""
    penalties = (-kl_coef * kl).masked_fill(~mask, 0)
    last = mask.sum(1, keepdim=True) - 1
    return penalties.scatter_add(1, last, scores[:, None].to(penalties.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:  # (B, T)
    """Advantages and returns by generalised advantage estimation [3, eq. 11–16; D17]; Vₜ: of the state before token t.

        δₜ = rₜ + γ Vₜ₊₁ − Vₜ        Aₜ = δₜ + γλ Aₜ₊₁        Rₜ = Aₜ + Vₜ

    The response ends the episode: V and A are 0 after its last token. λ = 0 gives the TD residual, λ = 1 the
    Monte-Carlo return minus V. Not whitened."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    backwards = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        backwards.append(next_advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


def leave_one_out(returns: Tensor, G: int) -> Tensor:  # (B,) groups of G neighbours -> (B,)
    """Mean over the other members of each group: a baseline that knows nothing of the response itself [9, eq. 7].

    return − baseline = G / (G − 1) · (return − mean of the group)."""
    groups = returns.view(-1, G)
    return ((groups.sum(1, keepdim=True) - groups) / (G - 1)).flatten()


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> Tensor:  # (B, T)
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε) A),  ρ = π / π_old [1, eq. 7; D18]; without a clip (ε = ∞) −ρ A [1, eq. 6].

    Of each token, unreduced. The minimum is pessimistic: the clip removes the gradient only where the step would gain
    from going further."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return -torch.min(ratio * advantages, clipped * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float) -> Tensor:  # (B, T)
    """½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²) [3; 4; D18; the clip is OpenAI baselines'], unreduced."""
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)  # a near V stays V, to the bit
    return torch.max((values - returns).square(), (clipped - returns).square()) / 2


def aggregate(
    losses: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    how: Literal["token", "sequence"] = "token",
    normalizer: int | Tensor | None = None,
) -> Tensor:  # ()
    """One number: "token" is the mean over tokens, "sequence" the mean over rows of each row's token mean.

    `normalizer` is the count (of tokens, of rows) in the whole minibatch, over all its micro-batches and processes;
    results of the parts then add up to the result of the whole, and splitting never changes a gradient [D20]."""
    losses = losses.masked_fill(~mask, 0)
    if how == "token":
        return losses.sum() / (mask.sum() if normalizer is None else normalizer)
    rows = losses.sum(1) / mask.sum(1)
    return rows.sum() / (len(rows) if normalizer is None else normalizer)


def minibatch_share(
    losses: Tensor,  # (b, T) of a micro-batch
    mask: Tensor,  # (b, T) bool
    whole: Tensor,  # (B, U) bool, the mask of its minibatch
    average: Literal["token", "sequence", "constant"] = "token",
    room: int = 0,  # tokens that a response could have had, which "constant" divides by
) -> Tensor:  # ()
    """A micro-batch's share in the loss of its minibatch: shares add up to it, however it was cut [D20]."""
    count = {"token": whole.sum(), "sequence": len(whole), "constant": len(whole) * room}[average]
    return aggregate(losses, mask, "sequence" if average == "sequence" else "token", count)


def preference_loss(chosen: Tensor, rejected: Tensor, weights: Tensor | None = None) -> Tensor:  # (B,) each -> ()
    """−log σ(chosen − rejected), the mean over pairs (Bradley–Terry) [5, §3.4], or the sum weighted by `weights`."""
    losses = -F.logsigmoid(chosen - rejected)
    return losses.mean() if weights is None else (losses * weights).sum()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -----------------------------------------------------------------------------
# 2 PPO: the loop, and what it calls, in that order. Processes, clocks and checkpoints are the engine's and the run's.


def ppo(run: Run) -> None:
    """Proximal policy optimisation against the reward model [1; 4]. Steps are numbered as in the docstring above."""
    config, engine, seed, T = run.config.ppo, run.engine, run.config.seed, run.config.data.response_tokens
    codec, history = run.codec("sft"), logged(run.folder)  # of before, if resumed
    (posts, queries), (valid, _) = read_prompts(run, "train", codec), read_prompts(run, "valid", codec)
    models = load_models(run, codec, posts, queries)
    labeler = labeler_of(run) if run.labeler_chose else None
    demonstrations = read_examples(run, "train", codec) if config.ptx_coef else None
    share = run.can_share(queries, config.responses_per_query, *models)
    optimizer = adamw(run.config.optimizer, (models.policy, config.lr), (models.value_model, config.value_lr))
    for update in run.steps("ppo", config.num_updates, optimizer, **models.learned()):
        set_lr(optimizer, 1 - update / config.num_updates)  # linear to 0 [D21]
        config = config.after(history)
        episodes = range(update * config.batch_size, (update + 1) * config.batch_size)
        picked = pick(seed, "episodes", len(posts), episodes, config.responses_per_query)
        asked, prompts = [posts[i] for i in picked], [queries[i] for i in picked]
        epochs = [minibatches(seed, update, epoch, config) for epoch in range(config.num_ppo_epochs)]
        # 1. Sample responses to each query, up to and including EOS, or as long as there is room.
        uniforms = noise(seed, "episodes", episodes, T)
        responses = sample(models.policy, prompts, uniforms, config.temperature, codec.eos_id, engine, share)
        batch = Batch(prompts, responses, share)
        # 2. Score each response, as a whole: the reward model, read at EOS, or a rule.
        scores = outcome_scores(models.reward_model, asked, codec, engine, batch)
        # 3. Of every response token: its log-probability under the policy and under the reference, and the value.
        rollout = read_tokens(models, batch, scores, codec.eos_id, config.temperature, epochs[0], engine)
        # 4. A reward for every token: the price of KL, and at the last token the score.
        rewards = shape_rewards(rollout, config)
        # 5. What each token did better or worse than was expected.
        shown = demonstrations and demonstrations[pick(seed, "shown", len(demonstrations), episodes)]
        rollout = replace(credit(rollout, rewards, config), room=T, shown=shown)
        # 6. K epochs of minibatches, each in a new order, and 7. an optimizer step for each minibatch.
        natural = natural_step(models.policy, rollout, config, engine)
        losses = ppo_losses(models, config)
        steps = [optimizer_step(engine, optimizer, rollout[rows], *losses) for rows in chain(*epochs)]
        optimizer.zero_grad()  # the gradients' memory is for what the next update samples
        moved = update_kl(models.policy, rollout, config.temperature, engine)
        statistics = natural | update_statistics(rollout, steps, moved, config)
        history.append(statistics | label_statistics(labeler, asked, batch, codec))
        run.log(history[-1])
        run.warn(bad_signs(history))
        show_sample(run, update, valid, codec, models)
        if (kl := statistics["objective/kl"]) > (config.max_kl or math.inf):
            run.say(f"stopped: KL {kl:.2f} exceeds --ppo.max-kl {config.max_kl}")
            break
    run.write("ppo", partial(save_model, models.policy, engine.weights(models.policy), codec.tokenizer))


class Models(NamedTuple):
    """Policy and value model learn, the others are frozen. A rule may stand in for the reward model."""

    policy: PreTrainedModel
    value_model: ScalarModel | ValueHead | None  # None: the baseline is not learned
    ref_policy: PreTrainedModel
    reward_model: Scorer

    def learned(self) -> dict[str, nn.Module]:
        return {"policy": self.policy} | ({"value_model": self.value_model} if self.value_model is not None else {})


RewardFunction = Callable[[str, str, dict], float]  # a rule: of post, response, and the post's record in the data file
Scorer: TypeAlias = "ScalarModel | RewardFunction"
Minibatch: TypeAlias = "Batch | Rankings | Rollout"
Losses: TypeAlias = "Callable[[Minibatch, Minibatch], dict[str, Tensor]]"  # of a micro-batch and its minibatch


@dataclass(frozen=True)
class Rollout:
    """A batch of episodes: what was written, and what the models of that moment thought of it. 0 in padding."""

    batch: Batch
    mask: Tensor  # (B, T) bool
    logprobs: Tensor  # (B, T) of the policy that sampled
    ref_logprobs: Tensor  # (B, T)
    entropy: Tensor  # (B, T)
    values: Tensor  # (B, T)
    scores: Tensor  # (B,) the reward model's or the rule's
    has_eos: Tensor  # (B,) bool
    advantages: Tensor | None = None  # (B, T)
    returns: Tensor | None = None  # (B, T)
    shown: Batch | None = None  # demonstrations beside the episodes [8, PPO-ptx]
    room: int = 0  # tokens that a response could have had

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, rows: Sequence[int]) -> Rollout:
        """These episodes, as wide as their longest response."""
        T = max(len(self.batch.responses[i]) for i in rows)
        picked = {name: x[rows] for name, x in vars(self).items() if isinstance(x, Tensor | Batch)}
        trimmed = {name: x[:, :T] for name, x in picked.items() if isinstance(x, Tensor) and x.dim() == 2}
        return replace(self, **picked | trimmed)

    @cached_property
    def layout(self) -> Layout:
        return lay_out(self.batch, self.mask.device)

    def parts(self, size: int) -> list[tuple[list[int], int, int]]:
        return self.batch.parts(size)


def outcome_scores(scorer: Scorer, posts: Sequence[Post], codec: Codec, engine: Engine, batch: Batch) -> Tensor:  # (B,)
    """Scores of responses to posts: a reward model's, read at EOS, or what a rule verifies of their text [7]."""
    if isinstance(scorer, nn.Module):
        return scores_of(scorer, batch, engine)
    # One process asks the rule: it may cost, and need not say the same twice.
    scores = engine.once(verified, scorer, posts, [codec.text(response) for response in batch.responses])
    return torch.tensor(scores, dtype=torch.float32, device=engine.device)


def read_tokens(
    models: Models,
    batch: Batch,
    scores: Tensor,  # (B,)
    eos_id: int,
    temperature: float,
    first_epoch: list[list[int]],  # its minibatches
    engine: Engine,
) -> Rollout:
    """What policy, value model and reference say of responses that were just sampled.

    The policy reads them in the micro-batches of the first epoch: the same rows side by side, by the same kind of
    forward pass. Kernels round by shape, and the ratio before the first step should be 1, not nearly 1 [D14]."""
    size = engine.micro_batch_size
    groups = [[rows[i] for i in group] for rows in first_epoch for group in micro_batches(batch[rows], size)]

    def policy_and_value(layout: Layout) -> list[Tensor]:
        logits, hidden = response_logits(models.policy, layout)
        values = values_of(models.value_model, layout, hidden)
        return [logprobs_of(logits, layout.responses, temperature), entropy_of(logits, temperature), values]

    logprobs, entropy, values = map_rows(batch, engine, policy_and_value, groups)
    ref_logprobs = batch_logprobs(models.ref_policy, batch, temperature, engine)
    lengths = torch.tensor([len(response) for response in batch.responses], device=engine.device)
    has_eos = torch.tensor([response[-1] == eos_id for response in batch.responses], device=engine.device)
    mask = length_mask(lengths, logprobs.shape[1])
    rollout = Rollout(batch, mask, logprobs, ref_logprobs, entropy, values, scores, has_eos)
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        if not getattr(rollout, name).isfinite().all():
            raise Stopped(f"{name} of the rollout are not finite: that model's weights or activations are not [D22]")
    return rollout


def shape_rewards(rollout: Rollout, config: PPO) -> Tensor:  # (B, T)
    """Score at the last token, a fixed one where EOS is missing [D12], minus the price of KL [D15]; scaled if asked."""
    scores = penalize_missing_eos(rollout.scores, rollout.has_eos, config.missing_eos_score)
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, config.kl_kind)
    rewards = token_rewards(scores, kl, rollout.mask, config.kl_coef if config.kl_in == "reward" else 0.0)
    return whiten(rewards, rollout.mask, shift_mean=False) if config.whiten_rewards else rewards  # [D16]


def credit(rollout: Rollout, rewards: Tensor, config: PPO) -> Rollout:
    """With advantages Ψₜ of the policy gradient Σₜ ∇log π(aₜ|sₜ) Ψₜ [3, eq. 1], and the returns that values learn.

    A baseline that knows nothing of the response leaves the gradient unbiased. Without a learned one Ψ is the
    reward-to-go, less the same number for every token of a response. Whitening is over the batch's tokens [D16]."""
    if config.learns_values:
        advantages, returns = gae(rewards, rollout.values, rollout.mask, config.gamma, config.lam)
    else:
        advantages, returns = gae(rewards, torch.zeros_like(rewards), rollout.mask, config.gamma, 1.0)
    if config.baseline in ("group", "batch"):
        G = config.responses_per_query if config.baseline == "group" else len(returns)
        advantages = (returns - leave_one_out(returns[:, 0], G)[:, None]).masked_fill(~rollout.mask, 0)
    if config.whiten_advantages:
        advantages = whiten(advantages, rollout.mask)
    return replace(rollout, advantages=advantages, returns=returns)


def minibatches(seed: int, update: int, epoch: int, config: PPO) -> list[list[int]]:
    """All rollouts of a batch, each once, those of a query together, in an order that only this epoch has [D19]."""
    G = config.responses_per_query
    order = rng(seed, "minibatches", update, epoch).permutation(config.batch_size // G).tolist()
    return chunks([query * G + g for query in order for g in range(G)], config.batch_size // config.num_minibatches)


def ppo_losses(models: Models, config: PPO) -> list[Losses]:
    """Policy loss + c · value loss [1, eq. 9]. Two models' go backward one after the other: that adds up to the same
    gradients, and holds the activations of one at a time."""
    separate = isinstance(models.value_model, ScalarModel)
    return [partial(each, models, config) for each in (policy_losses, value_losses)[: 1 + separate]]


def policy_losses(models: Models, config: PPO, part: Rollout, whole: Rollout) -> dict[str, Tensor]:
    """The shares of a micro-batch in the policy's loss and statistics of its minibatch [1, eq. 7]."""
    logits, hidden = response_logits(models.policy, part.layout)
    # Zeroed padding first: what stands there must not meet exp() or a square, whose NaN gradients no mask removes.
    logprobs = logprobs_of(logits, part.layout.responses, config.temperature).masked_fill(~part.mask, 0)  # [D13]
    if config.objective == "constraint":
        logprobs = logprobs.detach()  # `natural_step` has moved the policy; what is left is to learn values
    cliprange = config.cliprange if config.objective == "clip" else math.inf
    losses = policy_loss(logprobs, part.logprobs, part.advantages, cliprange)

    token_mean = partial(minibatch_share, mask=part.mask, whole=whole.mask)  # whatever the loss is [D23]
    share = partial(token_mean, average=config.average, room=whole.room)
    loss = share(losses)
    if config.objective in ("penalty", "adaptive"):  # KL(π_old ‖ π) [1, eq. 8]
        loss = loss + config.penalty_coef * share(kl_estimate(part.logprobs, logprobs, "k3"))
    if whole.shown is not None:  # PPO-ptx [8, eq. 2]: the policy keeps its demonstrations likely
        loss = loss + config.ptx_coef * language_model_losses(models.policy, 0.0, part.shown, whole.shown)["loss"]
    if config.kl_in == "loss":  # [D15]
        loss = loss + share(kl_loss(logprobs, part.ref_logprobs, config.kl_coef, config.kl_kind))
    with torch.no_grad():
        log_ratio = logprobs - part.logprobs
        unclipped = -log_ratio.exp() * part.advantages
        statistics = {
            "loss/policy": share(losses),
            "policy/approxkl": token_mean(log_ratio.square() / 2),
            "policy/clipfrac": token_mean((losses > unclipped).float()),
            "policy/abs_log_ratio": token_mean(log_ratio.abs()),
            "val/ratio": token_mean(log_ratio.exp()),
        }
    shares = {"loss": loss} | statistics
    if isinstance(models.value_model, ValueHead):  # it reads the hidden states of the same forward pass
        of_values = value_losses(models, config, part, whole, hidden)
        shares |= of_values | {"loss": loss + of_values["loss"]}
    return shares


def value_losses(
    models: Models, config: PPO, part: Rollout, whole: Rollout, hidden: Tensor | None = None
) -> dict[str, Tensor]:
    """The same of the values, of a value model or of the policy's hidden states [1, eq. 9; D18]."""
    values = values_of(models.value_model, part.layout, hidden).masked_fill(~part.mask, 0)
    losses = value_loss(values, part.values, part.returns, config.cliprange_value)
    loss = minibatch_share(losses, part.mask, whole.mask, config.average, whole.room)
    clipped = (2 * losses > (values - part.returns).square()).float()
    statistics = {"loss/value": loss.detach(), "val/clipfrac": minibatch_share(clipped, part.mask, whole.mask)}
    return {"loss": config.vf_coef * loss} | statistics


def optimizer_step(
    engine: Engine, optimizer: torch.optim.Optimizer, minibatch: Minibatch, *losses: Losses
) -> dict[str, float]:
    """One step on a minibatch, in micro-batches of similar length. Every stage learns through this function.

    Each of `losses(part, whole)` returns the shares of the micro-batch `part` in statistics of the minibatch `whole`,
    "loss" among them: so gradients and statistics of the parts simply add up [D20]."""
    optimizer.zero_grad()
    totals = accumulate(engine, minibatch, *losses)
    totals["grad_norm"] = engine.finish_gradients(optimizer)
    statistics = {name: float(total) for name, total in totals.items()}
    for name in ("loss", "grad_norm"):  # [D22]
        said = f"{name} is {statistics[name]}, so no step was taken; try a lower learning rate (it may change) [D22]"
        refuse(not math.isfinite(statistics[name]), said, Stopped)
    optimizer.step()
    return statistics | {"lr": optimizer.param_groups[0]["lr"]}


def accumulate(engine: Engine, minibatch: Minibatch, *losses: Losses) -> dict[str, Tensor]:
    """The gradient of a minibatch's loss, and all its statistics: the sums over its micro-batches."""
    totals: dict[str, Tensor] = {}
    for rows, counts in engine.shard(micro_batches(minibatch, engine.micro_batch_size)):
        part = minibatch[rows]
        for shares_of in losses:
            with engine.autocast():
                shares = shares_of(part, minibatch)
            if shares["loss"].requires_grad:  # the policy's does not where `natural_step` has moved it
                engine.backward(shares["loss"] * counts)
            for name, share in shares.items():
                totals[name] = totals.get(name, 0.0) + share.detach() * counts
    engine.all_reduce([*totals.values()])
    return totals


def natural_step(policy: PreTrainedModel, rollout: Rollout, config: PPO, engine: Engine) -> dict[str, float]:
    """TRPO [6]: the step that gains most of E[ρA] within KL(π_old ‖ π) ≤ δ, to second order, then made true.

        x = F⁻¹ g by conjugate gradients        θ ← θ + √(2δ / xᵀFx) x, halved until the KL is below δ and E[ρA] rose

    F v is the change of the KL's gradient along v. As a difference it needs no second derivatives, which fused
    attention lacks: k3's gradient under samples of π_old is (ρ − 1) ∇log π, 0 at the start."""
    if config.objective != "constraint":
        return {}
    parameters = list(policy.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()

    def mean_of(loss_of: Callable[[Tensor, Rollout], Tensor], how: str, theta: Tensor) -> tuple[float, Tensor]:
        """Mean (of `PPO.average`'s kinds) of loss_of(logprobs, part) at theta, and its gradient (N,)."""

        def losses(part: Rollout, whole: Rollout) -> dict[str, Tensor]:
            logprobs = response_logprobs(policy, part.layout, config.temperature)  # ρ ≤ 1 in padding: nothing overflows
            return {"loss": minibatch_share(loss_of(logprobs, part), part.mask, whole.mask, how, whole.room)}

        set_parameters(parameters, theta)
        policy.zero_grad()
        loss = accumulate(engine, rollout, losses)["loss"].item()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]  # some may be unused
        engine.all_reduce(gradients)
        return loss, nn.utils.parameters_to_vector(gradients)

    def fisher(v: Tensor) -> Tensor:
        h = 0.01 / v.norm()
        return mean_of(lambda new, x: kl_estimate(x.logprobs, new, "k3"), "token", start + h * v)[1] / h

    surrogate = partial(mean_of, lambda new, x: policy_loss(new, x.logprobs, x.advantages, math.inf), config.average)
    loss, gradient = surrogate(start)
    x = conjugate_gradients(fisher, -gradient)
    step = (2 * config.target_kl / (x @ fisher(x))).sqrt() * x
    for halvings in range(10):
        gain = loss - surrogate(start + step / 2**halvings)[0]
        if gain > 0 and update_kl(policy, rollout, config.temperature, engine) <= config.target_kl:
            return {"policy/halvings": halvings, "policy/surrogate_gain": gain}
    set_parameters(parameters, start)
    return {"policy/halvings": 10, "policy/surrogate_gain": 0.0}


def adapted(coef: float, kl: float, target: float) -> float:
    """The price of the next update's KL: halved below target / 1.5, doubled above 1.5 · target [1, §4]."""
    return coef / 2 if kl < target / 1.5 else coef * 2 if kl > target * 1.5 else coef


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int = 10) -> Tensor:  # (N,)
    """x with F x ≈ b, where product(v) is F v: the best in span(b, F b, F² b, ...), without ever holding F, which is
    symmetric and positive definite [6, appendix C; Hestenes and Stiefel 1952]."""
    x, residual, direction = torch.zeros_like(b), b, b
    for _ in range(steps):
        image = product(direction)
        step = (residual @ residual) / (direction @ image)
        x, before, residual = x + step * direction, residual, residual - step * image
        direction = residual + (residual @ residual) / (before @ before) * direction
    return x


def set_parameters(parameters: list[Tensor], theta: Tensor) -> None:
    for parameter, part in zip(parameters, theta.split([p.numel() for p in parameters])):
        parameter.data.copy_(part.view_as(parameter))


def update_kl(policy: PreTrainedModel, rollout: Rollout, temperature: float, engine: Engine) -> float:
    """KL(π_old ‖ π) per token of the rollout: how far the update has gone."""
    logprobs = batch_logprobs(policy, rollout.batch, temperature, engine)
    return masked_mean(kl_estimate(rollout.logprobs, logprobs, "k3"), rollout.mask).item()


def rollout_statistics(rollout: Rollout, config: PPO) -> dict[str, float]:
    """What [4] logs of a rollout; `objective/` are means over responses of sums over their tokens [D23]."""
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    scores = penalize_missing_eos(rollout.scores, rollout.has_eos, config.missing_eos_score).mean().item()
    unwhitened = shape_rewards(rollout, replace(config, whiten_rewards=False)).sum(1).mean().item()
    return {
        "objective/scores": scores,
        "objective/raw_scores": rollout.scores.mean().item(),  # before those without EOS were replaced
        "objective/kl": kl.mean().item(),
        "objective/kl_error": ((kl.var(correction=0) + 1) / len(kl)).sqrt().item(),  # as if one more nat² had been seen
        "objective/entropy": rollout.entropy.sum(1).mean().item(),
        "objective/non_score_reward": unwhitened - scores,
        "objective/rlhf_reward": unwhitened,
        "policy/entropy": masked_mean(rollout.entropy, rollout.mask).item(),
        "val/num_eos_tokens": rollout.has_eos.sum().item(),
        "val/eos_rate": rollout.has_eos.float().mean().item(),
        "val/response_tokens": rollout.mask.sum(1).float().mean().item(),
    }


def update_statistics(rollout: Rollout, steps: list[dict[str, float]], kl: float, config: PPO) -> dict[str, float]:
    """Those of rollout and steps; how far the update went in the end (`kl`), and how good the values were."""
    statistics = step_statistics(steps) | rollout_statistics(rollout, config) | {"policy/update_kl": kl}
    if config.objective == "adaptive":
        statistics["policy/next_penalty_coef"] = adapted(config.penalty_coef, kl, config.target_kl)
    if config.learns_values:  # 1 where V is right, 0 where it is no better than a constant
        returns, values = rollout.returns[rollout.mask], rollout.values[rollout.mask]
        error = (returns - values).square().mean() / returns.var(correction=0).clamp(min=1e-8)
        statistics["val/explained_variance"] = 1 - error.item()
    return statistics


def label_statistics(labeler: Labeler | None, posts: Sequence[Post], batch: Batch, codec: Codec) -> dict[str, float]:
    """A look at what the reward model stands for, where it is known. Nothing is trained on it."""
    if labeler is None:
        return {}
    labels = [labeler.score(post, codec.text(response)) for post, response in zip(posts, batch.responses)]
    return {"objective/labeler": sum(labels) / len(labels)}


def step_statistics(steps: list[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of an update; `first_` is before the first step, where π is π_old [D14] but
    after a natural step."""
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    first = {f"policy/first_{name}": steps[0][f"policy/{name}"] for name in ("approxkl", "abs_log_ratio")}
    return means | first


def load_models(run: Run, codec: Codec, posts: Sequence[Post], queries: Sequence[list[int]]) -> Models:
    """Policy and reference from SFT; the value model from the reward model [D10], under a rule from SFT with w = 0."""
    config, place, sft_folder = run.config.ppo, run.engine.place, run.path("sft")
    policy = policy_of(run, sft_folder)
    if config.ref_model is not None:
        check_tokenizer(run, config.ref_model)
    ref_policy = policy_of(run, config.ref_model or sft_folder).requires_grad_(False)
    reward_model, value_model = load_scorer(run), None
    if config.baseline == "value-head":
        value_model = place(lambda: ValueHead(policy.get_output_embeddings().weight.shape[1]))
    elif config.baseline == "value-model" and isinstance(reward_model, ScalarModel):
        value_model = place(lambda: ScalarModel.load(run.path("reward"), train_bias=True))
        # No loss saw the reward model before EOS: its level there is an accident, which PPO would spend its start on
        # (value initialization bias, Yuan et al. 2025, arXiv 2503.01491). Over references, a thousand do, it is made 0.
        some = shuffled(run.config.seed, "references", len(posts), 0, min(len(posts), 1024))
        written = author_responses(codec, [posts[i] for i in some], value_model)
        references = Batch([queries[i] for i in some], written)
        (values,) = map_rows(references, run.engine, lambda layout: [value_model.values(layout)])
        value_model.center(values.sum().item() / references.response_tokens)
    elif config.baseline == "value-model":
        drawn = rng(run.config.seed, "value head")
        value_model = place(lambda: ScalarModel.load(sft_folder, train_bias=True, new_head=drawn))
        nn.init.zeros_(value_model.classifier.score.weight)
    return Models(policy, value_model, ref_policy, reward_model)


def policy_of(run: Run, folder: str | Path) -> PreTrainedModel:
    """On this process's device; refused where it has not the positions for the run's texts."""
    policy = run.engine.place(lambda: load_policy(folder))
    check_room(policy, run.config.data)
    return policy


def load_scorer(run: Run) -> Scorer:
    """What PPO is trained on: a frozen reward model, or a rule [7]."""
    if run.config.ppo.reward_function is not None:
        return load_function("--ppo.reward-function", run.config.ppo.reward_function)
    return load_reward_model(run, run.path("reward"))


def load_reward_model(run: Run, folder: str | Path) -> ScalarModel:
    check_tokenizer(run, folder)
    scorer = run.engine.place(lambda: ScalarModel.load(folder).requires_grad_(False))
    check_room(scorer.classifier, run.config.data)
    return scorer


# -----------------------------------------------------------------------------
# 3 SFT and reward model: what happens before PPO, by the same `optimizer_step`.


def sft(run: Run) -> None:
    """Supervised fine-tuning: −log π(summary and EOS | query), so that it learns to stop, too [D4, D6]."""
    codec = run.codec("base")
    model = policy_of(run, run.path("base"))
    train, valid = read_examples(run, "train", codec), read_examples(run, "valid", codec)
    train_language_model(run, "sft", model, train, run.config.sft.prompt_weight, cosine)
    right = held_out_loss(model, valid, run.engine)
    wrong = held_out_loss(model, valid.exchanged(), run.engine)
    run.log({"valid/loss": right, "valid/loss_other_post": wrong})
    run.say(f"held-out loss {right:.3f} nats per token, {wrong:.3f} with another post's summary")
    run.write("sft", partial(save_model, model, run.engine.weights(model), codec.tokenizer))


def train_language_model(
    run: Run, stage: str, model: PreTrainedModel, batch: Batch, prompt_weight: float, schedule: Callable[[float], float]
) -> None:
    """The loop of both stages that learn to write; `schedule` is of the share of steps that are done."""
    config: Pretrain | SFT = getattr(run.config, stage)
    run.say(f"{model.config.model_type}, {model.num_parameters() / 1e6:.2f}M parameters; {len(batch):,} examples")
    batch = batch[shuffled(run.config.seed, stage, len(batch), 0, max(1, round(config.epochs * len(batch))))]
    steps = of_like_length(batch.lengths(), [1] * len(batch), config.batch_size, run.config.seed, stage)
    optimizer = adamw(run.config.optimizer, (model, config.lr))
    losses = partial(language_model_losses, model, prompt_weight)
    for step in run.steps(stage, len(steps), optimizer, model=model):
        set_lr(optimizer, warmup(step, len(steps)) * schedule(step / len(steps)))
        run.log(optimizer_step(run.engine, optimizer, batch[steps[step]], losses))


def language_model_losses(model: PreTrainedModel, prompt_weight: float, part: Batch, whole: Batch) -> dict[str, Tensor]:
    """Shares of the minibatch's loss: mean over response tokens + prompt_weight · mean over query tokens [D6].

    EOS is a response token like any other [D4]. A query's first token is predicted from nothing, so it has no loss."""
    layout = lay_out(part.whole_as_response() if prompt_weight else part, model.device)
    losses = -response_logprobs(model, layout, temperature=1.0)
    if not prompt_weight:
        loss = aggregate(losses, layout.mask, "token", whole.response_tokens)
        return {"loss": loss, "loss/response": loss}
    query_lengths = torch.tensor([len(query) - 1 for query in part.queries], device=model.device)
    of_query = length_mask(query_lengths, losses.shape[1])
    query_tokens = max(1, sum(len(query) - 1 for query in whole.queries))  # all may be of one token: nothing to divide
    response_loss = aggregate(losses, layout.mask & ~of_query, "token", whole.response_tokens)
    query_loss = aggregate(losses, of_query, "token", query_tokens)
    loss = response_loss + prompt_weight * query_loss
    return {"loss": loss, "loss/response": response_loss, "loss/query": query_loss}


def held_out_loss(model: PreTrainedModel, batch: Batch, engine: Engine) -> float:
    """Nats per response token."""
    return -batch_logprobs(model, batch, 1.0, engine).sum().item() / batch.response_tokens


def reward(run: Run) -> None:
    """The reward model: −log σ(score of chosen − score of rejected) [5, §3.4], then centred [D9]."""
    config, engine, seed = run.config.reward, run.engine, run.config.seed
    codec = run.codec("sft")
    model = engine.place(lambda: ScalarModel.load(run.path("sft"), new_head=rng(seed, "reward head")))
    check_room(model.classifier, run.config.data)
    summaries, (rankings, _) = read_examples(run, "train", codec), read_rankings(run, "train", codec)
    valid, kinds = read_rankings(run, "valid", codec)  # now, not when all is trained
    share = run.can_share([ranking.query for ranking in rankings], 2, model)
    own = summaries[shuffled(seed, "pretraining", len(summaries), 0, min(len(summaries), config.pretraining_pairs))]
    order = shuffled(seed, "reward", len(rankings), 0, max(1, round(config.epochs * len(rankings))))
    rankings = Rankings(own.against_others() + [rankings[i] for i in order], share)
    lengths, pairs = rankings.lengths(), [len(ranking.pairs) for ranking in rankings.rankings]
    steps = of_like_length(lengths, pairs, config.batch_size, seed, "reward")
    optimizer = adamw(run.config.optimizer, (model, config.lr))
    losses = partial(reward_losses, model)
    tokens = [sum(lengths[i] for i in rows) for rows in steps]
    for step in run.steps("reward", len(steps), optimizer, tokens, model=model):
        set_lr(optimizer, warmup(step, len(steps)) * cosine(step / len(steps)))
        run.log(optimizer_step(engine, optimizer, rankings[steps[step]], losses))
    model.center(scores_of(model, summaries, engine).mean().item())
    accuracies = reward_accuracies(model, Rankings(valid, share), kinds, engine)
    run.log({f"valid/accuracy {kind}": accuracy for kind, (accuracy, _) in accuracies.items()})
    if accuracies[SAME_POST if SAME_POST in accuracies else "all"][0] < 0.55:
        run.warn(["the reward model is hardly better than chance; PPO would follow noise"])
    cells = [[kind, f"{accuracy:.3f}", f"{pairs:,}"] for kind, (accuracy, pairs) in accuracies.items()]
    run.say(table([["held-out pairs", "accuracy", "pairs"], *cells]))
    run.write("reward", partial(model.save, engine.weights(model), codec.tokenizer))


def reward_losses(model: ScalarModel, part: Rankings, whole: Rankings) -> dict[str, Tensor]:
    """Shares of the minibatch's loss and accuracy; a tie counts half [D8]. Each text is read once, in however many
    pairs it stands, and each query counts once, by however many pairs [8, §3.5]."""
    layout = lay_out(part.batch(), model.bias.device)
    outputs, n = model.outputs(layout), layout.mask.sum(1)
    scores, (better, worse, weights) = at_last(outputs, n), part.columns()
    weights = torch.tensor(weights, device=scores.device) / len(whole)
    return {
        "loss": pair_loss(outputs[better], outputs[worse], n[better], n[worse], weights),
        "accuracy": (wins_of(scores[better], scores[worse]) * weights).sum(),
        "margin": ((scores[better] - scores[worse]) * weights).sum(),
    }


def pair_loss(
    chosen: Tensor, rejected: Tensor, n_chosen: Tensor, n_rejected: Tensor, weights: Tensor | None = None
) -> Tensor:  # numbers at each token of texts (B, T), (B, U), their numbers of tokens (B,) -> ()
    """`preference_loss` of texts, however long each: it is their last tokens' numbers that are compared [D8]."""
    return preference_loss(at_last(chosen, n_chosen), at_last(rejected, n_rejected), weights)


def at_last(x: Tensor, lengths: Tensor) -> Tensor:  # (B, T), (B,) -> (B,)
    return x.gather(1, lengths[:, None] - 1).squeeze(1)


OTHER_POST, SAME_POST = "other post", "same post"  # a summary of another post, in comparisons: easily told apart


def reward_accuracies(
    model: ScalarModel, rankings: Rankings, kinds: list[tuple[str, ...]], engine: Engine
) -> dict[str, tuple[float, int]]:
    """Share of pairs ranked as the judge ranked them, and their number: of all, and of each kind.

    Where some pairs hold a summary of another post, the rest are a kind of their own: only they ask for judgement."""
    scores, (better, worse, _) = scores_of(model, rankings.batch(), engine), rankings.columns()
    wins = wins_of(scores[better], scores[worse])
    ours = {"all": list(range(len(kinds)))}
    hard = [i for i, of in enumerate(kinds) if not any(OTHER_POST in kind for kind in of)]
    ours |= {SAME_POST: hard} if 0 < len(hard) < len(kinds) else {}
    theirs = {kind: [i for i, of in enumerate(kinds) if kind in of] for kind in sorted(set(chain(*kinds)))}
    groups = ours | theirs | ours  # a kind of the data that is called "all" does not replace it
    return {kind: (wins[rows].mean().item(), len(rows)) for kind, rows in groups.items()}


def wins_of(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """1 where a is higher, ½ for a tie; the mean is a win rate."""
    return (a > b) + (a == b) / 2


def adamw(config: Optimizer, *learners: tuple[nn.Module | None, float]) -> torch.optim.AdamW:
    """AdamW, eps 1e-5, no weight decay [D21; 4], of the modules there are, each with a learning rate of its own."""
    groups = []
    for module, lr in learners:
        if module is None:  # values that are not learned
            continue
        parameters = [p for p in module.parameters() if p.requires_grad]
        groups.append({"params": parameters, "lr": lr, "initial_lr": lr, "max_grad_norm": config.max_grad_norm})
    return torch.optim.AdamW(groups, betas=(0.9, config.beta2), eps=1e-5, weight_decay=0.0, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def warmup(step: int, steps: int) -> float:
    """Up to 1 over the first 50 steps, or the first tenth where that is less."""
    return min(1.0, (step + 1) / max(1, min(50, steps // 10)))


def cosine(progress: float) -> float:
    """1 at the start, 0 at the end [D21]."""
    return (1 + math.cos(math.pi * progress)) / 2


def author_responses(codec: Codec, posts: Sequence[Post], *readers: Scorer) -> list[list[int]]:
    """The authors' summaries, however long, up to where one of the readers has no more positions."""
    room = positions_of(*readers) - codec.data.query_tokens
    return [response[:room] for response in codec.responses([post.summary for post in posts], posts)]


# -----------------------------------------------------------------------------
# 4 models: scalar heads, forward passes, sampling. No losses, no training. Folders of models: section 9.


class ScalarModel(nn.Module):
    """One number per position, w·h + b, on a transformers decoder: reward model and value model.

    It wraps AutoModelForSequenceClassification with one label, whose head has no bias. A reward model's b is fixed at
    −offset (see `center`), `score_offset` in the folder's config [D9]; a value model's b is trained [D10]."""

    def __init__(self, classifier: PreTrainedModel, train_bias: bool = False) -> None:
        super().__init__()
        self.classifier = classifier
        offset = float(getattr(classifier.config, "score_offset", 0.0))
        self.bias = nn.Parameter(torch.tensor([-offset]), requires_grad=train_bias)

    @classmethod
    def load(
        cls, folder: str | Path, train_bias: bool = False, new_head: np.random.Generator | None = None
    ) -> ScalarModel:
        """From a reward model's folder; with `new_head`, from any: w ~ N(0, std 1/√(D+1)) is then drawn [D7; 5]."""
        what, new = ("a reward model", None) if new_head is None else ("a policy", "score.weight")
        classifier = load_model("AutoModelForSequenceClassification", folder, what, new, num_labels=1)
        head = getattr(classifier, "score", None)
        refuse(not isinstance(head, nn.Linear), f"{folder}: not a reward model: no linear head on a decoder")
        if new_head is not None:
            noise = new_head.standard_normal(head.weight.shape) / math.sqrt(head.weight.shape[1] + 1)
            head.weight = nn.Parameter(torch.from_numpy(noise).float())
        return cls(classifier, train_bias)

    def values(self, layout: Layout) -> Tensor:  # (B, T) of the state before each response token
        return self(layout, layout.index)

    def outputs(self, layout: Layout) -> Tensor:  # (B, T) after each response token
        return self(layout, layout.place)

    def scores(self, layout: Layout) -> Tensor:  # (B,) read at the last response token, EOS [D8]
        return at_last(self.outputs(layout), layout.mask.sum(1))

    def forward(self, layout: Layout, index: Tensor) -> Tensor:  # (B, T) -> (B, T)
        hidden = self.classifier.base_model(**layout.inputs, use_cache=False).last_hidden_state[layout.row, index]
        with torch.autocast(hidden.device.type, enabled=False):  # eight bits would tie scores and round values
            return self.classifier.score(hidden.float()).squeeze(-1) + self.bias

    @torch.no_grad()
    def center(self, mean_score: float) -> None:
        """Move scores so that what scored `mean_score` on average now averages 0. Twice changes nothing [D9; 5]."""
        self.bias.sub_(mean_score)

    def save(self, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        weights = {name.removeprefix("classifier."): weight for name, weight in weights.items()}
        self.classifier.config.score_offset = -weights.pop("bias").item()
        save_model(self.classifier, weights, tokenizer, folder)


class ValueHead(nn.Module):
    """The alternative to a value model of its own: a linear head, zero at first, on the policy's hidden states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, T, D) -> (B, T)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)


@contextmanager
def head_at(policy: PreTrainedModel, row: Tensor, index: Tensor) -> Iterator[list[Tensor]]:
    """Inside, the vocabulary head sees positions `index` (B, T) of rows `row` (B, 1) only; yields a list that receives
    its input (B, T, D).

    The head is the widest layer, and most positions are query. Selecting where the hidden states enter it, rather
    than calling it ourselves, keeps whatever else the model does to its logits (scaling, soft-capping). It computes in
    float32: bfloat16 logits lie 1/8 apart at 16, which ties the best two now and then, and moves ratios by steps."""
    entered: list[Tensor] = []
    head = policy.get_output_embeddings()
    forward = head.forward

    def selected(hidden: Tensor) -> Tensor:
        entered.append(hidden[row, index])
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(_at_least_float32(entered[-1]))

    head.forward = selected
    try:
        yield entered
    finally:
        del head.forward  # the class's is back


def response_logits(policy: PreTrainedModel, layout: Layout) -> tuple[Tensor, Tensor]:  # (B, T, V), (B, T, D)
    """Logits that predict each response token, and the hidden states they come from."""
    with head_at(policy, layout.row, layout.index) as entered:
        logits = policy(**layout.inputs, use_cache=False).logits
    return logits, entered[0]


def values_of(value_model: ScalarModel | ValueHead | None, layout: Layout, hidden: Tensor | None) -> Tensor:  # (B, T)
    """Of the state before each response token. A head reads the policy's `hidden` states there, (B, T, D)."""
    if value_model is None:
        return torch.zeros(layout.mask.shape, device=layout.mask.device)
    return value_model(hidden) if isinstance(value_model, ValueHead) else value_model.values(layout)


def response_logprobs(policy: PreTrainedModel, layout: Layout, temperature: float) -> Tensor:  # (B, T)
    return logprobs_of(response_logits(policy, layout)[0], layout.responses, temperature)


@torch.no_grad()
def map_rows(
    batch: Batch, engine: Engine, function: Callable[[Layout], Sequence[Tensor]], groups: list[list[int]] | None = None
) -> list[Tensor]:
    """`function` of every row, in micro-batches (`groups`, else of similar length), without gradient.

    It maps a layout to tensors (b,) or (b, t); the results come back in the batch's order, (B,) or (B, T), with 0 in
    padding whatever the function left there."""
    results: list[Tensor] = []
    T = max(map(len, batch.responses))
    groups = groups or micro_batches(batch, engine.micro_batch_size)
    for rows, counts in engine.shard(groups):
        layout = lay_out(batch[rows], engine.device)
        with engine.autocast():
            parts = function(layout)
        if not results:
            results = [part.new_zeros((len(batch), T)[: part.dim()]) for part in parts]
        for result, part in zip(results, parts if counts else ()):
            if part.dim() == 1:
                result[rows] = part
            else:
                result[rows, : part.shape[1]] = part.masked_fill(~layout.mask, 0)
    engine.all_reduce(results)
    return results


def batch_logprobs(policy: PreTrainedModel, batch: Batch, temperature: float, engine: Engine) -> Tensor:  # (B, T)
    return map_rows(batch, engine, lambda layout: [response_logprobs(policy, layout, temperature)])[0]


def scores_of(model: ScalarModel, batch: Batch, engine: Engine) -> Tensor:  # (B,)
    return map_rows(batch, engine, lambda layout: [model.scores(layout)])[0]


def sample(
    policy: PreTrainedModel,
    queries: list[list[int]],
    uniforms: Tensor,  # (B, T) in [0, 1)
    temperature: float,
    eos_id: int,
    engine: Engine,
    share: bool = False,
) -> list[list[int]]:
    """A response to each query from softmax(logits / temperature), nothing cut or warped [D13], EOS included."""
    responses: dict[int, list[int]] = {}
    batch = Batch(queries, [[] for _ in queries], share)
    with engine.autocast(), engine.gathered(policy):
        for rows, counts in engine.shard(micro_batches(batch, engine.sample_batch_size)):
            block = sample_block(policy, batch[rows], uniforms[rows], temperature, eos_id)
            responses |= zip(rows, block) if counts else ()
    responses = engine.all_gather(responses)
    return [responses[i] for i in range(len(queries))]


@torch.no_grad()
def sample_block(
    policy: PreTrainedModel, batch: Batch, uniforms: Tensor, temperature: float, eos_id: int
) -> list[list[int]]:
    """Token t of row b is where `uniforms[b, t]` falls in the cumulative distribution: the only randomness, so that a
    response does not depend on its neighbours [D25].

    All rows write their next token in the same column, so here, and only here, queries are padded on the left, with an
    explicit mask and positions [D5]. A shared query is read once; its keys and values serve all its responses."""
    device, groups = policy.device, batch.groups()
    queries = [batch.queries[group[0]] for group in groups]
    Q, T = max(map(len, queries)), uniforms.shape[1]
    tokens = torch.tensor([[0] * (Q - len(q)) + q for q in queries], device=device)
    attention = torch.tensor([[0] * (Q - len(q)) + [1] * len(q) for q in queries], device=device)
    position_ids = positions(attention)
    uniforms, responses, cache = uniforms.to(device), torch.full(uniforms.shape, eos_id, device=device), None
    writer = torch.arange(len(batch), device=device)  # which response each row writes
    takes = inspect.signature(policy.forward).parameters
    cache_name = next((name for name in ("cache", "cache_params") if name in takes), "past_key_values")
    for t in range(T):
        row = torch.arange(len(tokens), device=device)[:, None]
        with head_at(policy, row, torch.full_like(row, tokens.shape[1] - 1)), roomy_cache(T - t):
            inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": position_ids}
            output = policy(**inputs, **{cache_name: cache}, use_cache=True)
        cache, logits = output[cache_name], output.logits[:, -1]
        if len(logits) < len(writer):  # from a row for each query to a row for each response
            of = torch.tensor([r for r, group in enumerate(groups) for _ in group], device=device)
            keep_rows(cache, of)
            logits, attention, position_ids = logits[of], attention[of], position_ids[of]
        cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        threshold = torch.minimum(uniforms[writer, t, None] * total, total.nextafter(torch.zeros_like(total)))
        # Below the total, and with right=True above what it passes: a token of probability 0 is never chosen. Where
        # weights became NaN it would be V, no token: `read_tokens` then says so, which a crash here would prevent.
        tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[1] - 1)
        responses[writer, t] = tokens[:, 0]
        position_ids = position_ids[:, -1:] + 1
        attention = torch.cat([attention, torch.ones_like(tokens)], dim=1)
        still = (responses[writer, : t + 1] != eos_id).all(1).nonzero()[:, 0]
        if len(still) == 0:
            break
        if len(still) <= 0.75 * len(writer) and droppable(cache):  # the rest need not write on behind their EOS
            keep_rows(cache, still)
            writer, tokens, attention, position_ids = (x[still] for x in (writer, tokens, attention, position_ids))
    last = score_index(responses, eos_id).tolist()
    return [response[: i + 1] for response, i in zip(responses.tolist(), last)]


def droppable(cache: object) -> bool:
    """Whether all that a cache keeps of a row is keys and values. What else it may hold, states of convolutions or of
    linear attention, is not cut to the rows that go on: then all rows must."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    return type(cache) is DynamicCache and {*map(type, cache.layers)} <= {DynamicLayer, DynamicSlidingWindowLayer}


def keep_rows(cache: Cache, rows: Tensor) -> None:
    """Only these go on. A layer's old room is given back before the next layer is copied."""
    for layer in cache.layers:
        layer.batch_select_indices(rows)
        layer.roomy_keys = layer.roomy_values = None


def positions(mask: Tensor) -> Tensor:  # (B, W), here True on each row's last tokens -> (B, W)
    """Positions of left-padded tokens: a row's first has position 0, wherever it stands; so has what is before [D5]."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def score_index(responses: Tensor, eos_id: int) -> Tensor:  # (B, T) the sampler's output, full width -> (B,)
    """Where the score is read: at the first EOS, else at the last token; what follows is ignored, more EOS too [D8]."""
    return response_mask(responses, eos_id).sum(1) - 1


@contextmanager
def roomy_cache(tokens: int) -> Iterator[None]:
    """Inside, transformers' usual cache has room for so many tokens more than the next ones: it would copy all keys and
    values for every token. It holds both in the narrower's precision: rotation makes float32 of bfloat16 keys, and
    attention would round them again every time."""
    from transformers.cache_utils import DynamicLayer

    update = DynamicLayer.update

    def written(layer: DynamicLayer, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        before, dtype = layer.get_seq_length(), min(keys, values, key=Tensor.element_size).dtype
        now = before + keys.shape[-2]
        for name, new in (("keys", keys), ("values", values)):
            room = getattr(layer, f"roomy_{name}", None)
            if room is None:  # at first; and where rows were multiplied, or dropped
                room = new.new_empty((*new.shape[:-2], now + tokens, new.shape[-1]), dtype=dtype)
                if before:
                    room[..., :before, :] = getattr(layer, name)
            room[..., before:now, :] = new
            vars(layer).update({name: room[..., :now, :], f"roomy_{name}": room})
        return layer.keys, layer.values

    DynamicLayer.update = written
    try:
        yield
    finally:
        DynamicLayer.update = update


@torch.no_grad()
def shares_queries(model: nn.Module, queries: list[list[int]], data: Data) -> bool:
    """Whether a model reads two responses behind one query as it reads each alone, as long as they may get.

    Positions that are no input (ALiBi), a state instead of attention, a window shorter than the row: there is no list
    of such models, so the longest queries are tried."""
    if isinstance(model, ValueHead):  # reads what the policy has read
        return True
    queries, T = sorted(queries, key=len)[-2:], max(data.response_tokens, data.comparison_tokens)
    texts = [(query[::-1] * T)[:T] for query in (queries[-1], queries[0], queries[-1])]
    batch = Batch([queries[-1], queries[-1], queries[0]], texts)
    device = next(model.parameters()).device
    plain, shared = (lay_out(replace(batch, share=share), device) for share in (False, True))
    read = model.values if isinstance(model, ScalarModel) else partial(response_logprobs, model, temperature=1.0)
    one = read(plain)
    try:
        other = read(shared)
    except Exception:  # whatever a model says to a mask it does not know
        return False
    return bool((one - other).abs().max() < 1e-3 * max(1.0, one.abs().max().item()))


# -----------------------------------------------------------------------------
# 5 data: batches, randomness, texts as tokens; then the files they come from. No model.


Prompt: TypeAlias = str | list[dict[str, str]]  # text, or a conversation: messages, each with a role and a content


class Post(NamedTuple):
    """A text with the summary its author wrote, in the fields of the TL;DR data set [5]; or a prompt and answer."""

    subreddit: str
    title: str
    post: str
    summary: str
    record: dict | None = None  # as it stood in the file: a reward function may need more than the four fields
    prompt: Prompt | None = None  # used as it stands: no template, no cutting, no space before the answer

    def fields(self) -> dict[str, str]:
        return {"subreddit": self.subreddit, "title": self.title, "post": self.post, "summary": self.summary}


class Comparison(NamedTuple):
    """Two summaries of a post, one preferred to the other."""

    post: Post
    chosen: str
    rejected: str
    kinds: tuple[str, ...]  # the policies that wrote them, the batch, the confidence: accuracy is reported by each


@dataclass(frozen=True)
class Batch:
    """Queries and responses as token ids. Lengths live in the rows; no pad id can be mistaken for anything [D3].

    Where it may `share`, responses to one query stand side by side, and the query is read once for all of them."""

    queries: list[list[int]]
    responses: list[list[int]]  # up to and including EOS, where there is one
    share: bool = False

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        return Batch([self.queries[i] for i in rows], [self.responses[i] for i in rows], self.share)

    @property
    def response_tokens(self) -> int:
        return sum(map(len, self.responses))

    def lengths(self) -> list[int]:
        """Tokens of each query with its response."""
        return [len(query) + len(response) for query, response in zip(self.queries, self.responses)]

    def groups(self) -> list[list[int]]:
        """Neighbours that share a query."""
        key = self.queries.__getitem__ if self.share else None
        return [list(group) for _, group in groupby(range(len(self)), key)]

    def parts(self, size: int) -> list[tuple[list[int], int, int]]:
        """Rows to hold together, neighbours that share a query, up to `size`; their number of responses, of tokens."""
        groups = [part for group in self.groups() for part in chunks(group, size)]
        widths = [len(self.queries[group[0]]) + sum(len(self.responses[i]) for i in group) for group in groups]
        return [(group, len(group), width) for group, width in zip(groups, widths)]

    def whole_as_response(self) -> Batch:
        """The same rows, cut after their first token: every later token is then predicted, the query's too."""
        return Batch([q[:1] for q in self.queries], [q[1:] + r for q, r in zip(self.queries, self.responses)])

    def exchanged(self) -> Batch:
        """Every query with the response to another: a summarizer must find these much worse."""
        return Batch(self.queries, far_away(self.responses))

    def against_others(self) -> list[Ranking]:
        """Every query with its own response, preferred to that to another, where they differ."""
        rows = zip(self.queries, self.responses, self.exchanged().responses)
        return [Ranking(query, [own, other], [(0, 1)]) for query, own, other in rows if own != other]


class Ranking(NamedTuple):
    """Different responses to a query, and which was preferred to which."""

    query: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]  # better and worse, as positions among the responses


@dataclass(frozen=True)
class Rankings:
    """Rankings as a batch, in which each response stands once, in however many pairs."""

    rankings: list[Ranking]
    share: bool = False

    def __len__(self) -> int:
        return len(self.rankings)

    def __getitem__(self, rows: Sequence[int]) -> Rankings:
        return Rankings([self.rankings[i] for i in rows], self.share)

    def lengths(self) -> list[int]:
        """Tokens of each query with its responses."""
        return [len(r.query) + sum(map(len, r.responses)) for r in self.rankings]

    def parts(self, size: int) -> list[tuple[list[int], int, int]]:
        """As of a Batch, but what was compared stays together."""
        return [([i], len(r.responses), length) for i, (r, length) in enumerate(zip(self.rankings, self.lengths()))]

    def batch(self) -> Batch:
        rows = [(r.query, response) for r in self.rankings for response in r.responses]
        return Batch([query for query, _ in rows], [response for _, response in rows], self.share)

    def columns(self) -> tuple[list[int], list[int], list[float]]:
        """Of every pair: the rows of its better and worse response in `batch`, and its weight, 1 over the number of
        pairs of its query, so that one which was compared more often does not count more [8, §3.5]."""
        first = np.cumsum([0, *(len(r.responses) for r in self.rankings)]).tolist()
        pairs = [(at + a, at + b, 1 / len(r.pairs)) for at, r in zip(first, self.rankings) for a, b in r.pairs]
        return tuple(map(list, zip(*pairs)))


class Layout(NamedTuple):
    """A batch as tensors, for scoring and training. Of R rows each holds a query and its responses, one after another.

    Where a row holds several, each attends to the query and to itself, and its positions go on from the query's end:
    everything is as if it stood alone behind the query (Liu et al. 2025, Prefix Grouper, arXiv 2506.05433)."""

    inputs: dict[str, Tensor]  # input_ids (R, W), no gaps; position_ids (R, W), attention_mask (R, 1, W, W) if need be
    row: Tensor  # (B, 1) in which a response stands
    index: Tensor  # (B, T) where the model has read everything before response token t
    place: Tensor  # (B, T) where it has read that token, too
    responses: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool, True on response tokens


def lay_out(batch: Batch, device: torch.device | str = "cpu") -> Layout:
    """Pad on the right: causal models then need neither attention mask nor position ids [D5], unless rows are shared.

    No real token can see the padding behind it, so any valid id will do there [D3]."""
    groups = batch.groups()
    tokens, positions, owners = [], [], []  # of each row; owner 0 is the query, 1, 2, ... its responses
    row, start = [], []  # of each response
    for r, group in enumerate(groups):
        query = batch.queries[group[0]]
        tokens.append(list(query))
        positions.append(list(range(len(query))))
        owners.append([0] * len(query))
        for owner, b in enumerate(group, start=1):
            response = batch.responses[b]
            row.append([r])
            start.append([len(tokens[r])])
            tokens[r] += response
            positions[r] += range(len(query), len(query) + len(response))
            owners[r] += [owner] * len(response)
    inputs = {"input_ids": pad_right(tokens, device)}
    W, responses = inputs["input_ids"].shape[1], pad_right(batch.responses, device)
    if len(groups) < len(batch):
        owner = pad_right(owners, device, filler=-1)
        seen = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])
        seen = seen & torch.ones(W, W, dtype=torch.bool, device=device).tril()
        # Added to the attention scores: eager attention takes no other mask.
        hidden = torch.zeros(seen.shape, device=device).masked_fill(~seen, torch.finfo(torch.float32).min)
        inputs |= {"position_ids": pad_right(positions, device), "attention_mask": hidden[:, None]}
    before = torch.tensor([[len(query) - 1] for query in batch.queries], device=device)
    row, start = torch.tensor(row, device=device), torch.tensor(start, device=device)
    lengths = torch.tensor([len(response) for response in batch.responses], device=device)
    place = (start + torch.arange(responses.shape[1], device=device)).clamp(max=W - 1)
    index = torch.cat([before, place[:, :-1]], dim=1)
    return Layout(inputs, row, index, place, responses, length_mask(lengths, responses.shape[1]))


def pad_right(rows: list[list[int]], device: torch.device | str, filler: int = 0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)


def far_away(rows: list) -> list:
    """For each row the one half the list away: neighbours may come from one file, and be about one thing."""
    half = len(rows) // 2
    return rows[half:] + rows[:half]


def chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def packed(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Neighbours together as long as their sizes do not exceed the limit; one that does stands alone."""
    packs, room = [], 0
    for i, size in enumerate(sizes):
        if size > room or not packs:
            packs, room = [*packs, []], limit
        packs[-1].append(i)
        room -= size
    return packs


def of_like_length(lengths: Sequence[int], sizes: Sequence[int], limit: int, seed: int, stage: str) -> list[list[int]]:
    """All rows, each once, as minibatches of up to `limit`, counted by `sizes`, with little padding: of sixteen that
    stand together rows of like length come into one, and the sixteen in a new order."""
    steps = []
    for i, window in enumerate(chunks(range(len(lengths)), 16 * limit)):
        rows = sorted(window, key=lengths.__getitem__)
        packs = packed([sizes[row] for row in rows], limit)
        steps += [[rows[j] for j in packs[k]] for k in rng(seed, f"{stage} minibatches", i).permutation(len(packs))]
    return steps


def micro_batches(batch: Minibatch, size: int) -> list[list[int]]:
    """Rows in groups of similar length, `size` responses each: less padding, same sums, as losses divide once [D20]."""
    parts = sorted(batch.parts(size), key=lambda part: part[2])
    packs = packed([responses for _, responses, _ in parts], size)
    return [[row for i in pack for row in parts[i][0]] for pack in packs]


def rng(seed: int, purpose: str, *address: int) -> np.random.Generator:
    """Randomness by address: it depends on the seed, what it is for and where, on nothing drawn before [D25]."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *address])


def shuffled(seed: int, purpose: str, n: int, start: int, stop: int) -> list[int]:
    """Positions start to stop of an endless sequence of permutations of range(n), a fresh one each epoch [D19, D25]."""
    epochs = range(start // n, (stop - 1) // n + 1)
    order = [i for epoch in epochs for i in rng(seed, purpose, epoch).permutation(n).tolist()]
    return order[start % n : start % n + stop - start]


def pick(seed: int, purpose: str, n: int, episodes: range, G: int = 1) -> list[int]:
    """Which of n things each episode is about: G neighbours share one."""
    return [i for i in shuffled(seed, purpose, n, episodes.start // G, episodes.stop // G) for _ in range(G)]


def noise(seed: int, purpose: str, episodes: Sequence[int], T: int) -> Tensor:  # (B, T) in [0, 1)
    """The numbers that decide what is sampled, addressed by the episode's global index [D25]."""
    return torch.from_numpy(np.stack([rng(seed, purpose, i).random(T, dtype=np.float32) for i in episodes]))


SEAM, END = "\ufdd0", "\ufdd1"  # code points that are no characters: where a text is cut before it is encoded


@dataclass(frozen=True)
class Codec:
    """Between text and token ids: what people wrote never becomes a special token, a chat template's may."""

    tokenizer: PreTrainedTokenizerBase
    data: Data

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    @cached_property
    def start(self) -> list[int]:
        """BOS, for the tokenizers that put one before every text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a").input_ids[0] == bos else []

    def encode(self, texts: list[str], special: bool = False, seam: Sequence[int] = ()) -> list[list[int]]:
        """Text that spells a special token becomes one only where it may. A seam before it is cut off again."""
        options = {"add_special_tokens": False, "split_special_tokens": not special}
        rows = self.tokenizer([SEAM * bool(seam) + text for text in texts], **options).input_ids if texts else []
        return [row[len(seam) :] for row in rows]

    @cached_property
    def seam(self) -> list[int]:
        """SEAM's ids, for tokenizers that glue a blank before a text, as SentencePiece's do, but not behind a SEAM."""
        alone, seam, behind = self.encode(["a", SEAM, SEAM + "a"])
        return seam if behind[: len(seam)] == seam and behind[len(seam) :] != alone else []

    @cached_property
    def spelled(self) -> re.Pattern:
        """Any special token, as a text may spell it."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or SEAM)

    def conversation(self, messages: list[dict[str, str]]) -> list[int]:
        """Up to where the answer begins, in the tokenizer's template, which alone has special tokens (BOS, too, if it
        wants one): what spells one in a message stands between SEAM and END, and stays text."""
        name = self.tokenizer.name_or_path
        refuse(not self.tokenizer.chat_template, f"{name}: no chat template, and the data's prompts are conversations")
        bare, plain = partial(re.sub, f"[{SEAM}{END}]", ""), partial(self.spelled.sub, rf"{SEAM}\g<0>{END}")
        messages = [{key: plain(bare(text)) for key, text in message.items()} for message in messages]
        with one_line(f"{name}: chat template, for {messages[-1]['content'][:60]!r}"):
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        parts = re.split(f"{SEAM}([^{SEAM}{END}]*){END}", text)  # every other is one that a message spells
        torn = f"{name}: chat template takes apart what spells a special token in {messages[-1]['content'][:60]!r}"
        refuse(bool({SEAM, END} & {*"".join(parts)}), torn)
        rows = [self.encode([part], special=i % 2 == 0, seam=self.seam if i else ()) for i, part in enumerate(parts)]
        return list(chain(*chain(*rows)))

    def uncut(self, posts: Sequence[Post]) -> list[list[int]]:
        """The template filled in [D1], or the prompt, however long; of a post beyond all measure only the beginning."""
        most, filled = 64 * self.data.query_tokens, self.data.query_format.format
        texts = [p.post if p.prompt else filled(**{k: v[:most] for k, v in p.fields().items()}) for p in posts]
        rows = [self.start + query for query in self.encode(texts)]
        return [self.conversation(p.prompt) if isinstance(p.prompt, list) else row for p, row in zip(posts, rows)]

    def queries(self, posts: Sequence[Post]) -> list[list[int]]:
        """Queries, cut at a paragraph where they exceed `query_tokens` [D2]; [] where a title or prompt alone does."""
        keys = [str(post._replace(summary="", record=None)) for post in posts]
        new = {key: post for key, post in zip(keys, posts) if key not in self.known}
        for (key, post), query in zip(new.items(), self.uncut([*new.values()])):
            self.known[key] = query if 0 < len(query) <= self.data.query_tokens else self.cut_query(post)
        return [self.known[key] for key in keys]

    @cached_property
    def known(self) -> dict[str, list[int]]:
        """Queries that were asked for: comparisons, and every stage, ask for them again."""
        return {}

    def cut_query(self, post: Post) -> list[int]:
        @lru_cache  # the empty post is asked for twice, and what fits at last
        def tokens(text: str) -> list[int]:
            return self.uncut([post._replace(post=text)])[0]

        def fits(text: str) -> bool:
            return len(tokens(text)) <= self.data.query_tokens

        return tokens(truncate_post(post.post, fits)) if not post.prompt and fits("") else []

    def responses(self, summaries: Sequence[str], posts: Sequence[Post] = ()) -> list[list[int]]:
        """One space, the summary, EOS [D1, D4]; to a prompt the answer, EOS. Never cut: that would lose EOS."""
        texts = [text if post and post.prompt else " " + text.strip() for text, post in zip_longest(summaries, posts)]
        return [[*tokens, self.eos_id] for tokens in self.encode(texts, seam=self.seam)]

    def text(self, response: Sequence[int], whole: bool = False) -> str:
        """What a response says, without its EOS, and blanks around it. Whatever else there is stays, special or not."""
        tokens = [token for token in response if token != self.eos_id]
        text = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text if whole else text.strip()


def truncate_post(post: str, fits: Callable[[str], bool]) -> str:
    """Cut at the last newline while it does not fit; with none left, drop characters from the end [D2; 5, 4].

    `fits` must stay true when the text gets shorter: then the cut can be found by bisection, and a post of a
    megabyte takes twenty tests, not a million. InputError if not even the empty post fits."""
    if fits(post):
        return post
    refuse(not fits(""), "even an empty post does not fit: title and template are too long")
    newlines = [i for i, character in enumerate(post) if character == "\n"]
    fitting = bisect_left(newlines, True, key=lambda cut: not fits(post[:cut]))
    if fitting:
        return post[: newlines[fitting - 1]]
    longest = newlines[0] if newlines else len(post)
    return post[: bisect_left(range(longest), True, key=lambda cut: not fits(post[:cut])) - 1]


# Here the method ends. What follows is the program around it: first the files that a run reads.


def read_posts(run: Run, split: str) -> list[Post]:
    data = run.config.data
    given = {"train": data.train, "valid": data.valid, "test": data.test or data.valid}[split]
    path = given or run.find(f"data/{split}.jsonl", "run stage corpus, or give --data.train")
    records, complaints = read_records(path, parse_post)
    run.note(complaints)
    return records


def read_prompts(run: Run, split: str, codec: Codec) -> tuple[list[Post], list[list[int]]]:
    """Posts with their queries, but for those whose title leaves no room for a post, and prompts that are too long."""
    posts = read_posts(run, split)
    queries = codec.queries(posts)
    why = f"template and title, or a prompt, take more than --data.query-tokens {codec.data.query_tokens}"
    rows = fitting(run, f"{split} posts", why, [bool(query) for query in queries], posts)
    return [posts[i] for i in rows], [queries[i] for i in rows]


def read_examples(run: Run, split: str, codec: Codec) -> Batch:
    """Posts with summaries, but for those that would lose their EOS to the length limit [D4]."""
    posts, queries = read_prompts(run, split, codec)
    written, limit = [post.summary for post in posts], codec.data.response_tokens
    batch = Batch(queries, codec.responses(written, posts))
    fits = [bool(p.summary.strip()) and len(response) <= limit for p, response in zip(posts, batch.responses)]
    why = f"empty, or longer than --data.response-tokens {limit}"
    needed = "; SFT and the centring of a reward model need some, or give --sft-model and --reward-model"
    return batch[fitting(run, f"{split} summaries", why, fits, posts, needed)]


def read_rankings(run: Run, split: str, codec: Codec) -> tuple[list[Ranking], list[tuple[str, ...]]]:
    """Comparisons, those of one post together, and of what kinds each pair is; but for those that do not fit."""
    data, limit = run.config.data, run.config.data.comparison_tokens
    given = {"train": data.comparisons_train, "valid": data.comparisons_valid}[split]
    path = given or run.find(f"data/comparisons_{split}.jsonl", "run stage compare, or give --data.comparisons-train")
    comparisons, complaints = read_records(path, parse_comparison)
    run.note(complaints)
    posts, chosen, rejected, kinds = zip(*comparisons)
    rows = list(zip(codec.queries(posts), codec.responses(chosen, posts), codec.responses(rejected, posts)))
    fits = [bool(query) and max(len(a), len(b)) <= limit and a != b for query, a, b in rows]
    why = f"title or prompt too long, a text longer than --data.comparison-tokens {limit}, or the same text twice"
    compared: dict[tuple, list] = {}  # query -> its pairs, with their kinds
    for i in fitting(run, f"{split} comparisons", why, fits, posts):
        query, better, worse = map(tuple, rows[i])
        compared.setdefault(query, []).append((better, worse, kinds[i]))
    rankings = []
    for query, pairs in compared.items():
        texts = list(dict.fromkeys(text for better, worse, _ in pairs for text in (better, worse)))
        places = [(texts.index(better), texts.index(worse)) for better, worse, _ in pairs]
        rankings.append(Ranking(list(query), list(map(list, texts)), places))
    return rankings, [kinds for pairs in compared.values() for _, _, kinds in pairs]


def fitting(run: Run, what: str, why: str, fits: list[bool], posts: Sequence[Post], needed: str = "") -> list[int]:
    """The rows that fit; the screen says how many others there are, and which is the first."""
    out = [i for i, fit in enumerate(fits) if not fit]
    if out:
        first = f"{posts[out[0]].title or posts[out[0]].post}"[:60]
        text = f"left out {len(out):,} of {len(fits):,} {what}: {why} (the first: {first!r})"
        refuse(len(out) == len(fits), text + needed)
        run.note([text])
    return [i for i, fit in enumerate(fits) if fit]


# The Hub's copies of the TL;DR data hold whole queries as prompts: these are taken apart, and may be cut.
HUB_PROMPT = re.compile(r"SUBREDDIT: r/(.*?)\n\nTITLE: (.*?)\n\nPOST: (.*)\n\nTL;DR:\s*", re.DOTALL)


def parse_post(record: dict) -> Post:
    """A record of OpenAI's tldr_3_filtered files; or a prompt with its completion, else what was chosen, else alone."""
    if record.get("prompt") is None and any(record.get(name) is not None for name in ("subreddit", "post")):
        return Post(*(text_field(record, name) for name in ("subreddit", "title", "post", "summary")), record)
    post, answers = parse_prompt(record)
    return post._replace(summary=answers.get("completion", answers.get("chosen", "")))


def parse_comparison(record: dict) -> Comparison:
    """A record of OpenAI's comparison files (info, summaries, choice), or chosen and rejected answers to a prompt.

    OpenAI's validation files hold news articles too, a kind of their own: how well preferences travel [4, 5]."""
    if record.get("info") is None and record.get("summaries") is None:
        post, answers = parse_prompt(record)
        summaries = [{"text": text_field(answers, name)} for name in ("chosen", "rejected")]
        choice, kinds = 0, ["unknown"]
    else:
        info, summaries, choice = (record.get(name) for name in ("info", "summaries", "choice"))
        refuse(not isinstance(info, dict), "field 'info' is missing or not an object")
        pair = isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(s, dict) for s in summaries)
        refuse(not pair, "field 'summaries' is not two objects")
        refuse(type(choice) is not int or choice not in (0, 1), f"field 'choice' is {choice!r}, must be 0 or 1")
        extra = record["extra"] if isinstance(record.get("extra"), dict) else {}
        confidence = None if extra.get("confidence") is None else f"confidence {extra['confidence']}"
        policies = " vs ".join(sorted(str(summary.get("policy", "unknown")) for summary in summaries))
        of = {"policy": policies, "batch": record.get("batch"), "confidence": confidence}
        kinds = [text_field({name: str(kind)}, name) for name, kind in of.items() if kind is not None]
        info = {name: value for name, value in info.items() if value is not None}  # the Hub's copies have all names
        if "article" in info and "post" not in info:
            info, kinds = {"subreddit": "news", "title": "", "post": info["article"]} | info, [*kinds, "news articles"]
        post = parse_post({**info, "summary": ""})
    texts = [text_field(summary, "text") for summary in summaries]
    refuse(not all(text.strip() for text in texts), "one of the two texts is empty")
    return Comparison(post, texts[choice], texts[1 - choice], tuple(kinds))


def parse_prompt(record: dict) -> tuple[Post, dict[str, str]]:
    """A prompt, and of its completion, chosen and rejected what there is: text, or messages of which the last answers.

    Where there is no prompt, chosen and rejected begin with it: all messages but the last; a text up to where the last
    answer begins, as in HH (Bai et al. 2022, arXiv 2204.05862), or else to the word where the two part."""
    given = [name for name in ("prompt", "completion", "chosen", "rejected") if record.get(name) is not None]
    fields = {name: prompt_field(record, name) for name in given}
    prompt, one, other = (fields.get(name, "") for name in ("prompt", "chosen", "rejected"))
    if not prompt and isinstance(one, str) and isinstance(other, str):
        common = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
        prompt = re.match(r"(.*\n\nAssistant:|.*(?=\s)|)", one[:common], re.DOTALL)[0]
        fields |= {"chosen": one[len(prompt) :], "rejected": other[len(prompt) :]}
    elif not prompt and one[:-1] == other[:-1]:
        prompt = one[:-1]
    refuse(not prompt, "field 'prompt' (or 'post') is missing, and 'chosen' and 'rejected' have no common beginning")
    texts = {name: field if isinstance(field, str) else field[-1]["content"] for name, field in fields.items()}
    answers = {name: text.removesuffix("<|endoftext|>") for name, text in texts.items()}  # the Hub's TL;DR has it
    if isinstance(prompt, str) and (match := HUB_PROMPT.fullmatch(prompt)):
        return Post(*match.groups(), "", record), answers
    text = prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return Post("", "", text, "", record, prompt), answers


def prompt_field(record: dict, name: str) -> Prompt:
    if not isinstance(record[name], list):
        return text_field(record, name)
    refuse({*map(type, record[name])} != {dict}, f"field '{name}' is neither text nor messages")
    return [{key: text_field(message, key) for key in ("role", "content")} for message in record[name]]


def text_field(record: dict, name: str) -> str:
    text = record.get(name)
    refuse(not isinstance(text, str), f"field '{name}' is missing or not text")
    refuse(not text.isascii() and re.search("[\ud800-\udfff]", text), f"field '{name}' is not valid Unicode")
    return text


def lines_of(path: Path) -> AbstractContextManager[Iterable[bytes | dict]]:
    """Lines of a JSON Lines file (.gz too), or rows of a Parquet file."""
    if path.suffix == ".parquet":
        refuse(importlib.util.find_spec("pyarrow") is None, f"{path} needs pyarrow: pip install pyarrow")
        return nullcontext(importlib.import_module("pyarrow.parquet").read_table(path).to_pylist())
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def read_records(path: Path, parse: Callable[[dict], NamedTuple]) -> tuple[list, list[str]]:
    """Parsed records of a file, and complaints about what was left out: file, line, field."""
    records, unusable, bad, line = [], [], 0, b""
    with one_line(str(path)), lines_of(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                record = line if isinstance(line, dict) else json.loads(line.decode(encoding))
                refuse(not isinstance(record, dict), "not a JSON object")
                records.append(parse(record))
            except (ValueError, RecursionError) as error:
                bad += 1
                unusable += [f"line {number}: {error}"] if bad <= 3 else []
            if bad > 10_000 + len(records):  # it may have no end
                break
    if bad and isinstance(line, bytes) and line.isspace():  # the last: many a program writes one
        bad, unusable = bad - 1, unusable[: bad - 1]
    complaint = f"{path}: {bad:,} of {bad + len(records):,} records are unusable: {'; '.join(unusable)}"
    refuse(bad > 0.01 * (bad + len(records)), f"{complaint} (at most 1% may be)")
    refuse(not records, f"{path}: no records")
    return records, [complaint] if unusable else []


def write_records(records: Sequence[dict], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_json(record: dict, path: Path) -> None:
    path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


# -----------------------------------------------------------------------------
# 6 evaluation: side by side, with controls [D24]; and what a person watches on the way.


Marks = dict[str, np.ndarray]  # what a writer's summaries got, (N,) each
Figures = dict[str, tuple[float, float, float]]  # name -> mean and both ends of its 95% interval


def evaluate(run: Run) -> None:
    """SFT, PPO and the author side by side, with the controls that keep the verdict honest [D24]."""
    config, engine, judge = run.config, run.engine, run.config.evaluate.judge
    codec = run.codec("sft")
    posts, queries = (x[: config.evaluate.posts] for x in read_prompts(run, "test", codec))
    check_tokenizer(run, run.path("ppo"))
    policies = {name: policy_of(run, run.path(name.lower())) for name in ("SFT", "PPO")}
    scorers = {"score": load_scorer(run)}
    row = {"labeler": "labeler", "reward": "score"}.get(judge, "judge")
    if row == "judge" and Path(judge).is_dir():
        scorers["judge"] = load_reward_model(run, judge)
    labeler, warm = labeler_of(run), config.ppo.temperature
    uniforms = noise(config.seed, "evaluate", range(len(posts)), config.data.response_tokens)
    written = np.array([bool(post.summary.strip()) for post in posts])
    texts, responses = {"author": [post.summary for post in posts]}, author_responses(codec, posts, *scorers.values())
    own = marks_of(posts, Batch(queries, responses), codec, labeler, scorers, engine)
    marks = {"author": {name: np.where(written, x, np.nan) for name, x in own.items()}}
    for name, policy in policies.items():
        for temperature in (config.evaluate.temperature, warm):
            responses = sample(policy, queries, uniforms, temperature, codec.eos_id, engine)
            writer, batch = f"{name} T={temperature}", Batch(queries, responses)
            texts[writer] = [codec.text(response) for response in responses]
            marks[writer] = marks_of(posts, batch, codec, labeler, scorers, engine)
            if temperature == warm:  # KL(π ‖ SFT) in nats, of the policy PPO sampled from: log π − log SFT on its own
                one, two = (batch_logprobs(model, batch, warm, engine) for model in (policy, policies["SFT"]))
                marks[writer]["kl"] = (one - two).sum(1).cpu().double().numpy()
    vote = load_function("--evaluate.judge", judge) if row not in own else None

    def prefer(a: str, b: str) -> np.ndarray:  # (N,)
        if vote is None:
            return wins_of(marks[a][row], marks[b][row])
        return engine.once(votes, vote, posts, texts[a], texts[b], run.folder / "votes.jsonl")

    report(run, posts, texts, marks, prefer)


def marks_of(
    posts: Sequence[Post], batch: Batch, codec: Codec, labeler: Labeler, scorers: dict[str, Scorer], engine: Engine
) -> Marks:
    """A writer's marks. "other post" is what the same texts get for a post they are not about: style alone."""
    texts, others = [codec.text(response) for response in batch.responses], far_away(posts)
    marks = {name: outcome_scores(scorer, posts, codec, engine, batch) for name, scorer in scorers.items()}
    marks |= {
        "labeler": [labeler.score(post, text) for post, text in zip(posts, texts)],
        "labeler, other post": [labeler.score(post, text) for post, text in zip(others, texts)],
        "rouge_l": [rouge_l(text, post.summary) for post, text in zip(posts, texts)],
        "rouge_l, other post": [rouge_l(text, post.summary) for post, text in zip(others, texts)],
        "invented words": [labeler.invented(post, text) for post, text in zip(posts, texts)],
        "repetitive": [labeler.is_repetitive(text) for text in texts],
        "eos": [response[-1] == codec.eos_id for response in batch.responses],
        "tokens": [len(response) for response in batch.responses],
    }
    marks = {name: torch.as_tensor(x).cpu().double().numpy() for name, x in marks.items()}
    for name, of in (("rouge_l", posts), ("rouge_l, other post", others)):  # NaN: nothing to measure by
        marks[name][[not WORD.search(post.summary) for post in of]] = np.nan
    return marks


def votes(
    judge: Callable[[str, str, str], float], posts: Sequence[Post], a: list[str], b: list[str], path: Path
) -> np.ndarray:  # (N,)
    """A judge's preference for a, the mean over both orders: who likes what stands first cancels out. What it said is
    kept in a file: a judge may cost, and fail on the last text."""
    path.touch()
    said = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(Exception):  # half a line of a run that was killed, or no vote at all: it is asked again
            *asked, vote = json.loads(line)
            said[tuple(asked)] = float(vote)
    with path.open("a", encoding="utf-8") as file:
        for asked in zip([post.post for post in posts], a, b):
            if asked not in said:
                post, one, two = asked
                with one_line("--evaluate.judge", judge, one):
                    given = judge(post, one, two), judge(post, two, one)
                    usable = all(vote in (0, 0.5, 1) for vote in given)
                    odd = f"--evaluate.judge returned {reprlib.repr(given)}; each should be 0, 0.5 or 1"
                    refuse(not usable, odd, Stopped)
                said[asked] = float(given[0] + 1 - given[1]) / 2
                print(json.dumps([*asked, said[asked]]), file=file, flush=True)
    return np.array([said[asked] for asked in zip([post.post for post in posts], a, b)], dtype=float)


def compare_marks(x: Marks, y: Marks, wins: np.ndarray) -> Figures:
    """One writer against another: share of wins, also where both are as long (to a tenth), and mean differences."""
    margins = (marks["labeler"] - marks["labeler, other post"] for marks in (x, y))
    gains = {"margin gain": np.subtract(*margins)}
    gains |= {f"{name} gain": x[name] - y[name] for name in ("rouge_l", "score")}
    there = {name: gain[~np.isnan(gain)] for name, gain in gains.items()}
    both = ~np.isnan(gains["score gain"])  # wrote something
    alike = both & (np.abs(x["tokens"] - y["tokens"]) <= 0.1 * y["tokens"])
    shares = {"win rate": wins[both], "same length": wins[alike]}
    enough = min(30, len(wins))  # of fewer nothing is said
    figures = {name: share_with_interval(won) for name, won in shares.items() if len(won) >= enough}
    return figures | {name: mean_with_interval(gain) for name, gain in there.items() if len(gain) >= enough}


def mean_with_interval(x: np.ndarray) -> tuple[float, float, float]:
    """Mean and both ends of its 95% interval (normal approximation over posts)."""
    mean, half = float(x.mean()), float(1.96 * x.std() / math.sqrt(max(1, len(x) - 1)))
    return mean, mean - half, mean + half


def share_with_interval(wins: np.ndarray) -> tuple[float, float, float]:
    """Mean of zeros, halves and ones with Wilson's 95% interval, which stays honest where all are won [Wilson 1927]."""
    p, n, z = float(wins.mean()), len(wins), 1.96
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)


def report(run: Run, posts: list[Post], texts: dict[str, list[str]], marks: dict[str, Marks], prefer: Callable) -> None:
    """Table, controls, samples, verdict; eval.json, and eval.jsonl with all summaries, before a judge may fail."""
    labeler = "the labeler that made the preferences" if run.labeler_chose else "word overlap, not those who chose"
    judges, judge = {"labeler": labeler, "reward": "what PPO was trained on"}, run.config.evaluate.judge
    judge = judges.get(judge, judge)
    cold, warm = (f"T={t}" for t in (run.config.evaluate.temperature, run.config.ppo.temperature))
    there = {writer: {name: x[~np.isnan(x)] for name, x in row.items()} for writer, row in marks.items()}
    means = {writer: {name: float(x.mean()) for name, x in row.items() if len(x)} for writer, row in there.items()}
    names = list(dict.fromkeys(chain(*means.values())))
    cells = [[name, *(f"{row[name]:.3f}" if name in row else "" for row in means.values())] for name in names]
    run.say(table([[f"{len(posts)} held-out posts", *means], *cells]))
    written = [{"summaries": {writer: summaries[i] for writer, summaries in texts.items()}} for i in range(len(posts))]
    run.write("eval.jsonl", partial(write_records, [post.fields() | record for post, record in zip(posts, written)]))
    pairs = [(f"PPO {cold}", f"SFT {cold}"), (f"PPO {warm}", f"SFT {warm}"), (f"PPO {warm}", f"SFT {cold}")]
    pairs += [(f"PPO {cold}", "author"), (f"SFT {cold}", "author")] if means["author"] else []
    versus = {f"{a} against {b}": compare_marks(marks[a], marks[b], prefer(a, b)) for a, b in pairs}
    cell = "{:+.3f} [{:+.3f}, {:+.3f}]".format
    names = list(dict.fromkeys(chain(*versus.values())))
    cells = [[pair, *(cell(*row[name]) if name in row else "" for name in names)] for pair, row in versus.items()]
    run.say(table([["mean [95% interval]", *names], *cells]))
    for i, post in enumerate(posts[:5]):
        run.say(headline(post))
        run.say("\n".join(f"    {writer:10} {texts[writer][i]}" for writer in ("author", f"SFT {cold}", f"PPO {cold}")))
    conclusion = verdict(versus, judge, len(posts))
    run.say(f"\n{conclusion}")
    record = {"posts": len(posts), "judge": judge, "means": means, "comparisons": versus, "verdict": conclusion}
    run.write("eval.json", partial(write_json, record))


def verdict(versus: dict[str, Figures], judge: str, posts: int) -> str:
    """What moved, where the interval leaves no doubt that it did; of a handful of posts nothing is claimed [D24]."""
    if posts < 30:
        return f"Judged by {judge}: {posts} posts are too few for a verdict."
    lines = [f"Judged by {judge}, in 95% intervals:"]
    for pair, figures in versus.items():
        words = []
        for name in (name for name in ("win rate", "margin gain", "rouge_l gain") if name in figures):
            neutral, (mean, low, high) = 0.5 * (name == "win rate"), figures[name]
            word = "up" if low > neutral else "down" if high < neutral else "not measurably different"
            words.append(f"{name.removesuffix(' gain')} {word}" + f" ({mean:.1%})" * (name == "win rate"))
        lines.append(f"    {pair}: {', '.join(words)}")
    return "\n".join(lines)


def table(rows: list[list[str]]) -> str:
    """Columns of equal width, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n" + "\n".join(lines)


# Thai, Lao, Burmese, Khmer, Japanese and Chinese have no blanks between words: each character counts as one.
ALONE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+")  # of letters and digits, in whatever script
STEM = re.compile(rf"[{ALONE}]|[^\W\d_{ALONE}]{{2,}}|[^\W\d_\x00-\x7f]")  # of letters alone, in English of two or more


def rouge_l(summary: str, reference: str) -> float:
    """ROUGE-L F1: longest common subsequence of words, over the mean of both lengths [Lin 2004]."""
    a, b = (WORD.findall(text.lower()) for text in (summary, reference))
    row = [0] * (len(b) + 1)
    for word in a:
        previous = row
        row = [0]
        for j, other in enumerate(b):
            row.append(previous[j] + 1 if word == other else max(previous[j + 1], row[j]))
    return 2 * row[-1] / max(1, len(a) + len(b))


def bad_signs(history: list[dict[str, float]]) -> Iterator[str]:
    """What the statistics of the updates so far warn of."""
    last, quarter = history[-1], len(history) // 4
    if last["policy/first_abs_log_ratio"] > 0.02 and "policy/halvings" not in last:  # a natural step comes before it
        yield "the first ratio of a batch is not 1: old log-probabilities do not come from the same computation [D14]"
    if last["objective/kl"] < -4 * last["objective/kl_error"]:
        yield "the KL to the SFT model is negative: responses are not samples of the policy that is said to write them"
    if last["val/eos_rate"] < 0.5:
        yield "fewer than half of the responses end: raise --data.response-tokens or lower --ppo.missing-eos-score"
    if len(history) == 1 and last.get("val/explained_variance", 0) < -3:
        yield "the values start far from the returns: PPO will first learn their level, and the policy suffer from it"
    if last["policy/clipfrac"] > 0.5:
        yield "over half of the tokens are clipped: the step is too large, lower --ppo.lr"
    if quarter >= 2 and "objective/labeler" in last:
        curves = ([update[f"objective/{name}"] for update in history] for name in ("raw_scores", "labeler"))
        score_rise, label_rise = ((sum(curve[-quarter:]) - sum(curve[:quarter])) / quarter for curve in curves)
        if score_rise > 0 and label_rise < -0.02:
            yield "scores rise while the labeler's fall: reward hacking, raise --ppo.kl-coef"


def show_sample(run: Run, update: int, posts: list[Post], codec: Codec, models: Models) -> None:
    """One validation post: the author's line, SFT's and the policy's next-to-greedy summaries, with their scores."""
    if update % run.config.ppo.sample_every != 0:
        return
    post, engine, config = posts[update % len(posts)], run.engine, run.config
    queries, uniforms = codec.queries([post]), noise(config.seed, "show", [update], config.data.response_tokens)
    written = {"author": author_responses(codec, [post], models.reward_model)} if post.summary.strip() else {}
    for name, policy in (("reference" if config.ppo.ref_model else "sft", models.ref_policy), ("ppo", models.policy)):
        written[name] = sample(policy, queries, uniforms, config.evaluate.temperature, codec.eos_id, engine)
    record = {"update": update} | post.fields()
    run.say(headline(post))
    for name, responses in written.items():
        score = outcome_scores(models.reward_model, [post], codec, engine, Batch(queries, responses))
        has_eos = torch.tensor([responses[0][-1] == codec.eos_id], device=score.device)
        score = penalize_missing_eos(score, has_eos, config.ppo.missing_eos_score).item()
        record |= {name: codec.text(responses[0]), f"{name}_score": score}
        run.say(f"    {name:7} {score:6.2f}  {record[name]}")
    run.append("samples.jsonl", record)


def headline(post: Post) -> str:
    """What a post is about, and its end, for the screen."""
    about = "" if post.prompt else f"r/{post.subreddit}, {post.title}: "
    return f"    {about}...{' '.join(post.post.split())[-80:]}"


SHOWN = {  # on the screen and in pictures, those of PPO first
    "objective/scores": "score",
    "objective/labeler": "labeler",
    "objective/kl": "kl",
    "policy/entropy": "entropy",
    "policy/clipfrac": "clipfrac",
    "policy/approxkl": "approxkl",
    "val/eos_rate": "eos",
    "val/response_tokens": "tokens",
    "loss/response": "loss",
    "accuracy": "accuracy",
}


def sparklines(history: list[dict[str, float]]) -> str:
    """PPO's curves for the screen: the first value, eight levels between the lowest and the highest, the last value."""
    rows = []
    for name, label in SHOWN.items():
        curve = [update[name] for update in history if name in update]
        if curve:
            means = [sum(part) / len(part) for part in chunks(curve, math.ceil(len(curve) / 60))]
            span = max(means) - min(means) or 1.0
            levels = ["▁▂▃▄▅▆▇█"[int(7.999 * (mean - min(means)) / span)] for mean in means]
            rows.append([label, f"{curve[0]:.3g}", "".join(levels), f"{curve[-1]:.3g}"])
    return table(rows)


def plot(folders: Sequence[Path], target: Path) -> None:
    """The same curves of one run, or of several in one picture."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(14, 6), layout="constrained")
    for axes, (name, label) in zip(picture.subplots(2, 4).flat, SHOWN.items()):
        for folder in folders:
            curve = [update[name] for update in logged(folder) if name in update]
            axes.plot(range(1, len(curve) + 1), curve, label=folder.name)
        axes.set(title=label, xlabel="update")
    picture.legend(*axes.get_legend_handles_labels(), loc="lower right")
    picture.savefig(target, format="png")


def logged(folder: Path, stage: str = "ppo") -> list[dict]:
    """What metrics.jsonl of a run holds of a stage."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    with one_line(f"{path} is not what a run writes"), open(path, encoding="utf-8") as lines:
        return [record for record in map(json.loads, lines) if record["stage"] == stage]


# -----------------------------------------------------------------------------
# 7 the default run: posts, a base model, preferences where the user brings none. Only the labeler is used above.


def corpus(run: Run) -> None:
    """Posts from docstrings, where the user brings none. A file goes to one split whole: its docstrings are alike."""
    files = build_corpus(docstrings())
    refuse(len(files) < 100, f"docstrings of {', '.join(LIBRARIES)}: only {len(files)} usable files")
    names = sorted(files)
    unused = [files[names[i]] for i in rng(0, "split").permutation(len(names))]
    for split, size in (("test", 512), ("valid", 512), ("train", None)):
        posts: list[Post] = []
        while unused and (size is None or len(posts) < size):
            posts += unused.pop()
        run.write(f"data/{split}.jsonl", partial(write_records, [post.fields() for post in posts[:size]]))
        run.say(f"{len(posts[:size]):,} {split} posts")


# PEP 257 asks of docstrings one line (the summary), then paragraphs (the post): data that every machine has.
LIBRARIES = ("python", "torch", "transformers", "numpy", "sympy", "networkx", "huggingface_hub")
NAME_OR_DOCSTRING = re.compile(r'\b(?:def|class)\s+(\w+)|:[ \t]*(?:#[^\n]*)?\n[ \t]*[rRuU]?"""(.*?)"""', re.DOTALL)
NOT_PROSE = re.compile(r">>>|\.\. |(examples?|references?|see also|notes?)\b|[^\n]*\n[-=~]{3,}", re.IGNORECASE)


def docstrings() -> Iterator[tuple[str, Post]]:
    """Pairs of file and post: subreddit = library, title = the name in words, summary = first line, post = the rest."""
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library) if library != "python" else None
        if spec is None and library != "python":  # not installed
            continue
        root = Path(sysconfig.get_path("stdlib") if spec is None else spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            place = path.relative_to(root)
            if {"site-packages", "dist-packages", "test", "tests"} & set(place.parts):
                continue
            name = ""
            for match in NAME_OR_DOCSTRING.finditer(path.read_text(encoding="utf-8", errors="ignore")):
                name = match[1] or name
                if match[2]:
                    first, *rest = re.split(r"\n\s*\n", inspect.cleandoc(match[2]))
                    body = "\n\n".join(part.strip() for part in rest if not NOT_PROSE.match(part.strip()))
                    title = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).replace("_", " ").lower()
                    yield f"{library}/{place}", Post(library, " ".join(title.split()), body, " ".join(first.split()))


def build_corpus(documents: Iterator[tuple[str, Post]]) -> dict[str, list[Post]]:
    """Posts by file, without near-duplicates: the same summary but for identifiers, or the same first letters."""
    seen: set[str] = set()
    files: dict[str, list[Post]] = {}
    for file, post in documents:
        summary, words = post.summary, len(post.summary.split())
        sentence = 20 <= len(summary) <= 80 and words >= 4 and summary[0].isupper() and summary[-1] == "."
        if not post.title or not sentence or len(post.post.split()) < 8:
            continue
        words_alone = re.sub(r"`[^`]*`|\w*[A-Z0-9_]\w*|[^\w`]+|`", " ", summary[1:])
        keys = {" ".join(words_alone.split()), re.sub(r"\W+", "", post.post)[:60].lower()}
        if not keys & seen:
            body = truncate_post(post.post, lambda text: len(text) <= 240)
            files.setdefault(file, []).append(post._replace(post=body))
        seen |= keys
    return files


def pretrain(run: Run) -> None:
    """A tokenizer and a base model that can copy, where the user brings no pretrained model."""
    config = run.config
    tokenizer = train_tokenizer(read_posts(run, "train"), config.data.query_format, config.pretrain.vocab_size)
    codec = Codec(tokenizer, config.data)
    model = run.engine.place(lambda: small_model(config.pretrain, tokenizer, config.seed))
    posts, queries = read_prompts(run, "train", codec)
    repeated = [f"{post.title}. {' '.join(post.post[:200].split()[:12])}" for post in posts]
    batch = Batch(queries, codec.responses(repeated, posts))
    train_language_model(run, "pretrain", model, batch, 1.0, lambda progress: 1.0)
    run.write("base", partial(save_model, model, run.engine.weights(model), tokenizer))


def train_tokenizer(posts: Sequence[Post], template: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE with an EOS and a pad token of its own; each fixed piece of the template is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*special.values()], **options)
    bpe.train_from_iterator((text[:10_000] for p in posts for text in (p.title, p.post, " " + p.summary)), trainer)
    # Without the space that ends a piece: it belongs to the next word, which then looks the same wherever it stands.
    bpe.add_tokens([literal.rstrip(" ") for literal, *_ in Formatter().parse(template) if literal.strip()])
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}assistant:"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=chat, **special)


@torch.no_grad()
def small_model(size: Pretrain, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A GPT-NeoX that learns from scratch in minutes, with the weights of `seed`."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
    )
    model = GPTNeoXForCausalLM(config)
    for i, (name, weight) in enumerate(model.named_parameters()):
        if weight.dim() == 2:
            noise = rng(seed, "small model", i).standard_normal(weight.shape, dtype=np.float32)
            weight.copy_((0.08 if "embed" in name else 0.05) * torch.from_numpy(noise))
    look_back(model.gpt_neox.layers[0].attention.query_key_value.bias, model.gpt_neox.rotary_emb.inv_freq, size)
    return model


def look_back(bias: Tensor, theta: Tensor, size: Pretrain) -> None:
    """A layer's first head starts by looking one token back: positions turn its query by (p − 1) θ, its keys by p θ.

    Copying takes such a head and, in a later layer, heads that look behind an earlier same token (induction heads,
    Olsson et al. 2022, arXiv 2209.11895). Left to chance the first formed in the second layer with most seeds, so the
    others in the third and last: then no layer is left in which a reward model can gather what was copied."""
    D, n = size.width // size.heads, len(theta)
    scale = (4 * D**0.5 / (1 - theta.cos()).sum()).sqrt()  # the tokens beside it get e⁻⁴ of its weight
    bias[: 2 * n] = scale * torch.cat([theta.cos(), -theta.sin()])  # query
    bias[D : D + n] = scale  # key


def compare(run: Run) -> None:
    """Comparisons where the user has none: the labeler judges samples of the SFT model."""
    config, seed, K, T = run.config, run.config.seed, run.config.compare.samples, run.config.data.response_tokens
    writer, tie, codec = config.compare.policy, config.compare.tie, run.codec("sft")
    policy = policy_of(run, run.path(writer))
    labeler = labeler_of(run)
    share = run.can_share(read_prompts(run, "valid", codec)[1], K, policy)
    for split, limit in (("train", config.compare.posts), ("valid", None)):
        posts, queries = read_prompts(run, split, codec)
        picked = rng(seed, f"compare {split}").permutation(len(posts))[:limit].tolist()
        posts, queries = [posts[i] for i in picked], [queries[i] for i in picked]
        uniforms = [noise(seed, f"compare {split} {k}", range(len(posts)), T) for k in range(K)]
        uniforms, prompts = torch.stack(uniforms, dim=1).flatten(0, 1), [query for query in queries for _ in range(K)]
        responses = sample(policy, prompts, uniforms, config.compare.temperature, codec.eos_id, run.engine, share)
        drafts = chunks([codec.text(text, whole=bool(posts[i // K].prompt)) for i, text in enumerate(responses)], K)
        records = []
        for i, post in enumerate(posts):
            ranked = sorted(drafts[i], key=partial(labeler.score, post))
            for k, (worse, better) in enumerate(combinations(ranked, 2)):
                records += compared_by(labeler, post, (writer, better), (writer, worse), tie, (i + k) % 2 == 1)
            stranger = (OTHER_POST, drafts[(i + 1) % len(posts)][0])
            records += compared_by(labeler, post, (writer, drafts[i][0]), stranger, tie, i % 2 == 0)
        remedy = "give more posts, --data.comparisons-train, or a lower --compare.tie"
        refuse(not records, f"the labeler sees no difference between any two samples for the {split} posts: {remedy}")
        if writer == "ppo" and split == "train":  # another round: what was compared before is kept
            remedy = "a new round of comparisons needs an earlier --from-run"  # not what a stage cut short left here
            earlier = run.find("data/comparisons_train.jsonl", remedy, own=False)
            records += read_records(earlier, dict)[0]
        run.write(f"data/comparisons_{split}.jsonl", partial(write_records, records))
        run.say(f"{len(records):,} {split} comparisons from {len(posts):,} posts, ties dropped")


def compared_by(
    labeler: Labeler, post: Post, a: tuple[str, str], b: tuple[str, str], tie: float, flip: bool
) -> list[dict]:
    """The labeler's comparison of two (policy, text) as OpenAI's record; none of an empty text, and none of a tie."""
    summaries = [b, a] if flip else [a, b]
    scores = [labeler.score(post, text) for _, text in summaries]
    if abs(scores[0] - scores[1]) <= tie or not all(text.strip() for _, text in summaries):
        return []
    info = {"subreddit": post.subreddit, "title": post.title, "post": post.post}
    info = {"prompt": post.prompt} if post.prompt else info
    candidates = [{"policy": policy, "text": text} for policy, text in summaries]
    return [{"info": info, "summaries": candidates, "choice": int(scores[1] > scores[0])}]


def labeler_of(run: Run) -> Labeler:
    """It knows the training posts alone."""
    posts = read_posts(run, "train")
    few = f"{len(posts)} training posts: under 20 the labeler takes no word of theirs for rare, and is nearly blind"
    run.warn([few] * (len(posts) < 20))
    return Labeler(posts)


class Labeler:
    """The default run's stand-in for the human: which of two summaries is more about *this* post, and says only that?

    TF-IDF cosine between the summary's words, each once, and the post (title counted twice), less a penalty for each
    word that the post does not hold, or, if longer, that was said already. Words that fit every post weigh nothing in
    either, so style alone earns nothing. Document frequencies come from the training posts. Scores make comparisons and
    judge the end result; reward model and PPO never see them."""

    def __init__(self, posts: Sequence[Post]) -> None:
        self.posts = posts
        self.seen_in = Counter(word for post in posts for word in set(self.words(post)))

    @cached_property
    def known(self) -> set[str]:
        """Every word of the training posts and summaries: only the evaluation asks for it."""
        texts = chain.from_iterable(post.fields().values() for post in self.posts)
        return {word for text in texts for word in STEM.findall(text.lower())}

    @staticmethod
    def words(text: str | Post) -> list[str]:
        if isinstance(text, Post):
            text = f"{text.title} {text.title} {text.post}"
        return [word[:6] for word in STEM.findall(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())]

    def rarity(self, word: str) -> float:
        """log(0.1 · N / df), and 0 for words in over a tenth of the posts."""
        return max(0.0, math.log(0.1 * (len(self.posts) + 1) / (self.seen_in[word] + 1)))

    def weights(self, words: list[str]) -> dict[str, float]:
        """Unit vector of (1 + log tf) · rarity."""
        raw = {word: (1 + math.log(count)) * self.rarity(word) for word, count in Counter(words).items()}
        norm = math.sqrt(sum(x * x for x in raw.values())) or 1.0
        return {word: x / norm for word, x in raw.items()}

    def score(self, post: Post, summary: str) -> float:
        """Cosine − 0.2 · u / (1 + u), in (−0.2, 1].

        u counts unsupported words by their rarity (one in no training post counts 1), and repetitions of words of four
        letters and more as 1 each."""
        about, words = self.weights(self.words(post)), self.words(summary)
        said_once = self.weights(list(dict.fromkeys(words)))
        cosine = sum(weight * about.get(word, 0.0) for word, weight in said_once.items())
        unsupported = sum(self.rarity(word) for word in words if word not in about)
        again = sum(len(word) > 3 and word in words[:i] for i, word in enumerate(words))
        u = unsupported / max(1.0, math.log(0.1 * (len(self.posts) + 1))) + again
        return cosine - 0.2 * u / (1 + u)

    def invented(self, post: Post, summary: str) -> float:
        """Share of a summary's words that neither its post nor any training post or summary has."""
        words, own = STEM.findall(summary.lower()), STEM.findall(f"{post.title} {post.post}".lower())
        return sum(word not in self.known and word not in own for word in words) / max(1, len(words))

    def is_repetitive(self, summary: str) -> bool:
        """Whether a summary says a word three times that at most a tenth of the posts hold."""
        return any(count >= 3 and self.rarity(word) for word, count in Counter(self.words(summary)).items())


# -----------------------------------------------------------------------------
# 8 config: what a run is. Every flag, its meaning, symbol and source; no code that acts.
#
# Defaults are those of the default run, minutes on two CPU cores. "Paper" is [4].


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and why."""


class Stopped(InputError):
    """Numbers that are not finite, a user's function that fails: once that is mended, the run can go on."""


def refuse(condition: bool, message: str, kind: type[InputError] = InputError) -> None:
    if condition:
        raise kind(message)


@dataclass(frozen=True)
class Data:
    """Text: what is summarised. Without files, the docstrings of installed libraries are."""

    train: Path | None = None  # To train on: subreddit, title, post and summary; or prompt and completion (README).
    valid: Path | None = None  # The same for validation: held-out loss, samples on the way.
    test: Path | None = None  # The same for the evaluation at the end. Default: the validation file.
    # Human comparisons: info, summaries, choice; or prompt, chosen, rejected. Default: the labeler compares samples.
    comparisons_train: Path | None = None
    comparisons_valid: Path | None = None  # The same for the reward model's accuracy.
    query_tokens: int = 64  # Longest query; posts lose paragraphs [D2], prompts are left out. Paper: 512.
    response_tokens: int = 28  # Longest summary, EOS included. Paper: 53.
    comparison_tokens: int = 36  # Longest summary in comparisons, EOS included. Paper: 169.
    query_format: str = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"  # Query template [D1].


@dataclass(frozen=True)
class Pretrain:
    """The base model, where no --model is given: a small GPT-NeoX (the architecture of Pythia [4]), from scratch."""

    # Passes over the training posts, next-token loss on everything. The response asked for repeats the title and the
    # post's first words: without copying a model this small learns the style of summaries, but not to look at the post.
    epochs: float = 1.25
    batch_size: int = 8  # Posts per step.
    # Learning rate, constant after a warm-up of 50 steps (a tenth of all steps, where those are fewer).
    lr: float = 3e-3
    vocab_size: int = 2048  # V, entries of the byte-level BPE trained on the corpus.
    layers: int = 3  # Transformer blocks.
    width: int = 128  # D, size of the hidden states.
    heads: int = 4  # Attention heads.


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning on posts with summaries."""

    epochs: float = 1.5  # Passes over the summaries. Paper: 1.
    batch_size: int = 8  # Examples per step. Paper: 128.
    lr: float = 3e-3  # Learning rate, cosine to 0 after the same warm-up as in pretraining. Paper: 3e-6, no warm-up.
    # Mean loss over the query's own tokens, times this, is added to the mean over the response's [D6]. A model as small
    # as the default forgets how to copy without it; pretrained ones want 0. Paper's code: one mean over both.
    prompt_weight: float = 0.3


@dataclass(frozen=True)
class Compare:
    """Preferences where there are no humans: the labeler compares samples of the SFT model."""

    posts: int = 5_000  # Training posts to sample for, at most.
    # K, samples per post; the labeler ranks them, every pair is a comparison [8, section 3.5], and the first sample is
    # compared with one for another post.
    samples: int = 4
    # Of these samples. Colder than PPO's, they have the loops of greedy summaries: so the reward model learns of them.
    temperature: float = 0.5
    tie: float = 0.05  # The labeler's scores that differ by no more than this are a tie: their order would be noise.
    # Whose samples: with ppo another round begins [5, section 3.1; 8]: the policy of --from-run is sampled, and its
    # comparisons are kept beside the new ones.
    policy: Literal["sft", "ppo"] = "sft"


@dataclass(frozen=True)
class Reward:
    """The reward model, from comparisons (Bradley-Terry) [5, section 3.4]."""

    epochs: float = 1.0  # Passes over the comparisons. Paper: 1.
    # First learn to prefer a post's own summary to another post's, on at most this many posts (preference model
    # pretraining, Askell et al. 2021, arXiv 2112.00861). Paper: 0.
    pretraining_pairs: int = 6000
    batch_size: int = 56  # Pairs per step, all pairs of a post in one step. Paper: 64.
    lr: float = 7e-4  # Learning rate, cosine to 0 after the same warm-up as in pretraining. Paper: 3e-6, no warm-up.


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation against the reward model."""

    total_episodes: int = 6144  # Responses sampled in all. Paper: 1,000,000.
    batch_size: int = 256  # Responses sampled per update. Paper: 512.
    responses_per_query: int = 8  # G, responses to each query of a batch; they share it. Paper: 1.
    num_minibatches: int = 4  # Optimizer steps per epoch over a batch. Paper: 1.
    num_ppo_epochs: int = 2  # Epochs over each batch, K in [1], a fresh permutation each [D19]. Paper: 4.
    lr: float = 4e-4  # Learning rate of the policy, linear to 0. Paper: 3e-6.
    value_lr: float = 1e-3  # Learning rate of a value model. Paper: 3e-6.
    temperature: float = 0.7  # Sampling temperature; log-probabilities use it too [D13]. Paper: 0.7.
    kl_coef: float = 0.15  # Beta, price of one nat of KL to the SFT model [D15; 5, section 3.4]. Paper: 0.05.
    # Estimator of the KL (Schulman 2020). Default: k1 in the reward, k2 in the loss.
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    # Where the KL is charged. In the loss k1 has no gradient in expectation. Paper: reward.
    kl_in: Literal["reward", "loss"] = "reward"
    gamma: float = 1.0  # Gamma, discount [D17]. Paper: 1.
    lam: float = 0.95  # Lambda of GAE, of learned baselines [3; D17]. Paper: 0.95.
    # What keeps a policy near the one that sampled [1, section 6.1]: the clip; nothing; a price on KL(old to new),
    # fixed, or adapted to --ppo.target-kl; a bound on it, by a natural-gradient step (TRPO [6]), after which the
    # optimizer moves learned values alone. Paper: clip.
    objective: Literal["clip", "unclipped", "penalty", "adaptive", "constraint"] = "clip"
    # KL(old to new) per token that an update may (constraint: delta [6]) or should (adaptive: d_targ [1]) reach.
    target_kl: float = 0.01
    penalty_coef: float = 1.0  # Price of that KL, beta of [1, eq. 8]; adaptive starts with it.
    cliprange: float = 0.2  # Epsilon of the clipped objective [1, eq. 7; D18]. Paper: 0.2.
    cliprange_value: float = 0.2  # Clip of a learned value around its rollout value [D18]. Paper: 0.2.
    # Weight of the loss of learned values [1, eq. 9; D18]. A value model has its own learning rate, and AdamW does not
    # see the scale of a loss: there it acts through the common gradient norm alone. Paper: 0.1.
    vf_coef: float = 0.1
    # What was to be expected, subtracted from the reward-to-go [3, section 2]. Learned: by a value model that starts as
    # the reward model [D10], or a head on the policy's trunk. Not learned: the mean return of the other responses to
    # the query (RLOO [9]; GRPO without its division by the deviation) or of the batch; nothing. Paper: value-model.
    # In the default run the mean of seven other responses does as well as a value model, with one model less to train.
    baseline: Literal["group", "batch", "none", "value-model", "value-head"] = "group"
    whiten_rewards: bool = False  # Scale the rewards to variance 1, mean unshifted [D16]. Paper: no.
    whiten_advantages: bool = True  # Advantages to mean 0, variance 1 over the batch [D16]. Paper: yes.
    missing_eos_score: float = -3.0  # Score of a response that does not end, in place of the model's [D12]. Paper: -1.
    # Losses are means over all tokens, or over responses of their token means, or sums over a constant, the number of
    # tokens there is room for, so that a token weighs the same in every batch (Dr. GRPO). Paper: token.
    average: Literal["token", "sequence", "constant"] = "token"
    # Price of the loss of demonstrations, those of SFT, one for each response (PPO-ptx, gamma of [8, eq. 2]). Paper: 0.
    ptx_coef: float = 0.0
    ref_model: str | None = None  # The reference of the KL, where it is not the SFT model.
    # A rule in place of the reward model (RLVR [7]): module:function(post, response, record) -> float, where record is
    # the post's record in the data file. No comparisons, no reward model; the value model starts at 0.
    reward_function: str | None = None
    # Stop when a batch's mean KL to the SFT model exceeds this many nats per response. Default: never.
    max_kl: float | None = None
    sample_every: int = 5  # Updates between printed samples.

    @property
    def num_updates(self) -> int:
        return self.total_episodes // self.batch_size

    @property
    def learns_values(self) -> bool:
        return self.baseline in ("value-model", "value-head")

    @property
    def kl_kind(self) -> Literal["k1", "k2", "k3"]:
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k2")

    def after(self, updates: list[dict[str, float]]) -> PPO:
        """With the price of KL(old to new) that the last update, if there was one, asks for [1, eq. 8]."""
        last = updates[-1] if updates else {}
        return replace(self, penalty_coef=last.get("policy/next_penalty_coef", self.penalty_coef))


@dataclass(frozen=True)
class Evaluate:
    """Held-out evaluation of SFT and PPO [D24]."""

    posts: int = 512  # Posts to summarise, at most.
    temperature: float = 0.01  # Sampling temperature, next to greedy. Paper: 0.01.
    # Who says which summary is better: labeler; reward (what PPO was trained on); the folder of another reward model;
    # or module:function(post, a, b) -> 1 if a is better, 0 if b, 0.5 if neither, asked in both orders.
    judge: str = "labeler"


@dataclass(frozen=True)
class Optimizer:
    """AdamW, in every stage that learns: eps 1e-5, no weight decay [D21]."""

    # Memory of squared gradients. Models from scratch learn to copy sooner with a short one, pretrained ones want what
    # the paper has: 0.999.
    beta2: float = 0.97
    # Clip the gradient (of policy and value model together) to this norm; 0 never [D22]. Paper: none.
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Compute:
    """Where and in what pieces to compute. Nothing here changes results but for rounding; --resume may change all."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # CUDA if there is a GPU.
    # Of forward passes; weights are float32 always [D21]. auto: bfloat16 on a GPU that has it, else float32. bfloat16
    # leaves heads and losses in float32, on a GPU in TF32's matrix products; float32 is float32 everywhere.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Responses per forward and backward pass; changes memory and speed only [D20].
    micro_batch_size: int = 32
    sample_batch_size: int = 256  # Responses sampled together.
    # Read a query once for all responses to it in a micro-batch. The memory of attention grows with the square of query
    # and responses together; a smaller micro-batch splits them. A model that cannot is found out, and used without.
    share_queries: bool = True
    checkpoint_minutes: float = 10.0  # Minutes between checkpoints; 0 after every step.
    # Give each process (torchrun) a share of all weights, gradients and optimizer states (FSDP2) instead of a copy: for
    # models too large for one GPU.
    shard: bool = False


Stage = Literal["corpus", "pretrain", "sft", "compare", "reward", "ppo", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Config:
    """PPO for language models: SFT, reward model, PPO, evaluation. Without flags: all of it on a CPU, in minutes."""

    # Stages to run, in this order. corpus, pretrain and compare make what is not given: posts, a base model,
    # comparisons.
    stages: tuple[Stage, ...] = STAGES
    folder: Path | None = None  # Folder of the run, which must not exist. Default: runs/run-001, runs/run-002, ...
    # Folder of an interrupted run, to go on from its last checkpoint. Its flags hold; learning rates and --compute may
    # be given anew.
    resume: Path | None = None
    # Folders of earlier runs; they stand in for the data and models that this run's stages do not make.
    from_run: tuple[Path, ...] = ()
    # Pretrained causal language model to start from: a transformers folder or Hub name. Default: a small new one.
    model: str | None = None
    sft_model: str | None = None  # SFT model, instead of this run's or --from-run's.
    # Reward model (AutoModelForSequenceClassification, one label), instead of this run's or --from-run's.
    reward_model: str | None = None
    ppo_model: str | None = None  # Policy to evaluate, instead of this run's or --from-run's.
    # A flag without its dashes, and values (of a switch True, False), as in ppo.objective clip unclipped penalty:
    # the run is repeated with each, in folders FOLDER-VALUE, and a table compares what came of it.
    sweep: tuple[str, ...] = ()
    seed: int = 1  # Seed of everything random but the corpus's split: shuffles, samples, new weights [D25].
    track: bool = False  # Write TensorBoard curves too (needs pip install tensorboard).
    data: Data = Data()
    pretrain: Pretrain = Pretrain()
    sft: SFT = SFT()
    compare: Compare = Compare()
    reward: Reward = Reward()
    ppo: PPO = PPO()
    evaluate: Evaluate = Evaluate()
    optimizer: Optimizer = Optimizer()
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        check_numbers(self)
        data, ppo, flags = self.data, self.ppo, flags_of(asdict(self))
        for one, other in (("--data.train", "--data.valid"), ("--data.comparisons-train", "--data.comparisons-valid")):
            refuse((flags[one] is None) != (flags[other] is None), f"{one} and {other} need each other")
        refuse(data.test is not None and data.train is None, "--data.test needs --data.train and --data.valid")
        fields = {name for _, name, *_ in Formatter().parse(data.query_format) if name is not None}
        refuse("post" not in fields, "--data.query-format has no {post} in it")
        for name in fields - {"subreddit", "title", "post"}:
            refuse(True, f"--data.query-format: posts have no {{{name}}}")
        with one_line(f"--data.query-format {data.query_format!r}"):
            data.query_format.format(subreddit="", title="", post="")
        for whole, part in (("--pretrain.width", "--pretrain.heads"), ("--ppo.batch-size", "--ppo.num-minibatches")):
            refuse(flags[whole] % flags[part] != 0, f"{whole} {flags[whole]} is not a multiple of {part} {flags[part]}")
        size, G = ppo.batch_size // ppo.num_minibatches, ppo.responses_per_query
        batch = f"--ppo.batch-size {ppo.batch_size}"
        minibatch = f"{batch} in --ppo.num-minibatches {ppo.num_minibatches} is {size} responses in each"
        refuse(size % G != 0, f"{minibatch}, not a multiple of --ppo.responses-per-query {G}")
        few = f"--ppo.total-episodes {ppo.total_episodes} is less than one batch, {batch}"
        refuse(ppo.total_episodes < ppo.batch_size, few)
        alone = "--ppo.baseline group is the mean of a query's other responses, but --ppo.responses-per-query is 1"
        refuse(ppo.baseline == "group" and G == 1, f"{alone}: give 2 or more, or --ppo.baseline value-model")
        refuse(ppo.baseline == "batch" and ppo.batch_size == 1, "--ppo.baseline batch needs --ppo.batch-size 2 or more")
        plain = ppo.baseline != "value-head" and ppo.kl_in == "reward" and not ppo.ptx_coef and not self.compute.shard
        needs = "another --ppo.baseline than value-head, --ppo.kl-in reward, no --ppo.ptx-coef and no --compute.shard"
        refuse(ppo.objective == "constraint" and not plain, f"--ppo.objective constraint needs {needs}")
        both = ppo.reward_function is not None and self.reward_model is not None
        refuse(both, "--ppo.reward-function stands in for the reward model, but --reward-model is given too")
        again = self.compare.policy == "ppo" and not self.from_run
        refuse(again, "--compare.policy ppo needs --from-run, a run whose policy and comparisons there are")
        refuse(len(self.sweep) == 1, f"--sweep {' '.join(self.sweep)}: a flag needs values")
        refuse(bool(self.sweep) and self.resume is not None, "--sweep makes runs of its own; --resume goes on with one")
        asked, order = " ".join(self.stages), [stage for stage in STAGES if stage in self.stages]
        refuse(list(self.stages) != order, f"--stages {asked}: they run in the order {' '.join(STAGES)}, once each")
        to_do = [stage for stage in self.stages if not self.is_given(stage)]
        refuse(not to_do, f"--stages {asked}: nothing to do, all that they make is given by other flags")
        refuse(bool(self.from_run) and order == [*STAGES], "--from-run needs --stages: which, from what it holds?")

    def is_given(self, stage: str) -> bool:
        """Whether the user brings what this stage would make."""
        scored = self.reward_model is not None or self.ppo.reward_function is not None
        return {
            "corpus": self.data.train is not None,
            "pretrain": self.model is not None or self.sft_model is not None,
            "sft": self.sft_model is not None,
            "compare": self.data.comparisons_train is not None or scored,
            "reward": scored,
            "ppo": self.ppo_model is not None,
        }.get(stage, False)


def flags_of(section: dict, prefix: str = "--") -> dict[str, object]:
    """--section.flag -> value, of a config as a nested dictionary."""
    flags: dict[str, object] = {}
    for name, value in section.items():
        flag = prefix + name.replace("_", "-")
        flags |= flags_of(value, f"{flag}.") if isinstance(value, dict) else {flag: value}
    return flags


def turned_off(flag: str) -> str:
    """--section.no-flag, of a switch --section.flag."""
    return re.sub(r"[^.-][^.]*$", r"no-\g<0>", flag)


MAY_BE_0 = {"seed", "beta2", "max-grad-norm", "prompt-weight", "pretraining-pairs", "checkpoint-minutes"}
MAY_BE_0 |= {"tie", "kl-coef", "vf-coef", "gamma", "lam", "penalty-coef", "ptx-coef"}
AT_LEAST_2 = ("--data.query-tokens", "--data.response-tokens", "--data.comparison-tokens")
AT_LEAST_2 += ("--compare.posts", "--compare.samples")
AT_MOST_1 = ("--ppo.gamma", "--ppo.lam", "--optimizer.beta2")


def check_numbers(config: Config) -> None:
    """Every number is above 0 and finite; some may be 0, some must not exceed 1, and a score may be anything."""
    for flag, value in flags_of(asdict(config)).items():
        if type(value) in (int, float):
            name = flag.rpartition(".")[2].removeprefix("--")
            low = -1e9 if name == "missing-eos-score" else 2 if flag in AT_LEAST_2 else 0
            high = 1 if flag in AT_MOST_1 else 1e9
            positive = low == 0 and name not in MAY_BE_0
            fits = low <= value <= high and (abs(value) >= 1e-12 or (value == 0 and not positive))
            bounds = f"{'above 0' if positive else f'at least {low:g}'} and at most {high:g}"
            refuse(not fits, f"{flag} is {value}, must be {bounds}")


# -----------------------------------------------------------------------------
# 9 runtime: devices and processes; the run's folder, log and checkpoints; models and functions that users bring.


@dataclass(frozen=True)
class Engine:
    """Where and in what pieces models run.

    Several processes (torchrun) share the work: groups of rows are dealt out whole, gradients and results summed. Each
    holds all weights, or with --compute.shard a share of them. The groups, and all randomness, are those of one
    process: so are the results, up to the order of sums."""

    device: torch.device = torch.device("cpu")
    bfloat16: bool = False
    micro_batch_size: int = 32
    sample_batch_size: int = 256
    fsdp: bool = False
    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls, compute: Compute) -> Engine:
        available = torch.cuda.is_available()
        refuse(compute.device == "cuda" and not available, "--compute.device cuda: PyTorch sees no CUDA device")
        device = torch.device("cuda" if available and compute.device != "cpu" else "cpu")
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        bfloat16 = native if compute.precision == "auto" else compute.precision == "bfloat16"
        if device.type == "cuda":
            processes, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            refuse(processes > there, f"{processes} processes need a GPU each: there are {there}")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if dist.is_torchelastic_launched() and not dist.is_initialized():  # started by torchrun
            patience = timedelta(hours=12)  # while process 0 alone writes a large checkpoint, or asks a slow judge
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        many = dist.is_initialized()
        lost = not many and int(os.environ.get("WORLD_SIZE", 1)) > 1
        refuse(lost, "WORLD_SIZE asks for several processes: start them with torchrun, or each is a run of its own")
        refuse(compute.shard and not many, "--compute.shard spreads weights over processes: start them with torchrun")
        rank, world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        return cls(device, bfloat16, compute.micro_batch_size, compute.sample_batch_size, compute.shard, rank, world)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with self.tf32(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            yield

    @contextmanager
    def tf32(self) -> Iterator[None]:
        """Inside, where a GPU computes in bfloat16, products of float32 use its matrix units, too: TF32 rounds factors
        to 11 bits. Only inside: what compares a model's two ways of reading needs all 24."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.bfloat16 and self.device.type == "cuda" else before)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def place(self, load: Callable[[], nn.Module]) -> nn.Module:
        """The model, on this process's device: whole; or its share of every weight, by FSDP2, block by block. Those who
        will hold shares load one after another, so that a machine has memory for one whole model, not for all."""
        if not self.fsdp:
            return load().to(self.device)
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.world,))
        for _ in range(self.rank):
            dist.barrier()
        try:
            model = load()
            lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
            for block in max(lists, key=len, default=()):  # the longest list of modules: the transformer's blocks
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
            return model
        finally:  # what cannot be loaded, none of them can
            for _ in range(self.rank, self.world):
                dist.barrier()

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Inside, a model that was called once stays whole, so that processes can call it differently often."""
        shards = [module for module in model.modules() if self.fsdp and hasattr(module, "reshard")]
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
        yield
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights by name; of a sharded model, gathered on the CPU of process 0. Every process must ask."""
        if not self.fsdp:
            return model.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        once = dict(chain(model.named_parameters(), model.named_buffers()))  # tied weights have several names
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {name: weight for name, weight in state.items() if name in once}

    def backward(self, loss: Tensor) -> None:
        """FSDP2 averages gradients over the processes; shares of a loss should add up."""
        with self.tf32():
            (loss * self.world if self.fsdp else loss).backward()

    def finish_gradients(self, optimizer: torch.optim.Optimizer) -> Tensor:  # ()
        """Sum gradients over the processes, unless FSDP2 did, and clip their norm [D22]; the norm before."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not self.fsdp:
            self.all_reduce([p.grad for p in parameters if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(parameters, optimizer.param_groups[0]["max_grad_norm"] or math.inf)
        return norm.full_tensor() if self.fsdp else norm

    def shard(self, groups: list[list[int]]) -> list[tuple[list[int], bool]]:
        """This process's groups, and whether they count: all compute equally many, and what fills up does not count."""
        mine = [(rows, True) for rows in groups[self.rank :: self.world]]
        return mine + [(groups[0], False)] * (math.ceil(len(groups) / self.world) - len(mine))

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the processes, in place."""
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)

    def all_gather(self, mine: dict) -> dict:
        """The union of all processes' dictionaries."""
        if self.world == 1:
            return mine
        parts: list[dict] = [{} for _ in range(self.world)]
        dist.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}

    def once(self, function: Callable[..., object], *args: object) -> object:
        """What process 0 gets from it, a value or an error, in all of them; all wait for it."""
        if self.world == 1:
            return function(*args)
        results: list = [None]
        try:
            results = [function(*args)] if self.rank == 0 else results
        except (InputError, OSError) as error:
            results = [error]
        dist.broadcast_object_list(results)
        refuse(isinstance(results[0], Exception), f"{results[0]}", type(results[0]))
        return results[0]


LOGS = ("metrics.jsonl", "samples.jsonl")
LOCK = "lock"  # held by the process that writes
STATE = "checkpoint.pt"  # how far a run has come; gone when it is finished


class Run:
    """A run's folder: its data and models, its log, and how far it has come."""

    def __init__(self, config: Config) -> None:
        self.config, self.engine = config, Engine.start(config.compute)
        check_places(config)
        rounded = config.ppo.objective == "constraint" and self.engine.bfloat16
        refuse(rounded, "--ppo.objective constraint needs --compute.precision float32: it takes differences")
        self.stage, self.step = "", 0
        self.started = self.entered = self.saved = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.interrupted, self.in_steps, self.untouched = False, False, not config.resume
        self.said: set[str] = set()
        self.first_codec: Codec | None = None
        self.bar = tqdm(disable=True)
        # What is finished, how long the logs are; within a stage its name, the next step, and "model" and "optim".
        self.progress: dict = {"finished": [], "stage": "", "step": 0}
        inputs = self.engine.once(fingerprints, config)
        self.folder = config.resume or self.engine.once(fresh_folder, config.folder)
        record, changes = continued(self.folder, config) if config.resume else (provenance(config), [])
        self.engine.once(self.lock)
        self.note(changes)
        if config.resume:
            self.load_progress()
            others = [path for path, was in self.progress.get("inputs", {}).items() if inputs.get(path) != was]
            refuse(bool(others), f"--resume {self.folder}: {' '.join(others)} is not what it was when the run began")
        else:
            self.save_progress({"inputs": inputs})
        self.write("config.json", partial(write_json, record))
        self.writer = None
        if config.track and self.engine.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder)

    # where things are

    def write(self, name: str, function: Callable[[Path], None]) -> None:
        """Let `function` write a file or folder of this run, whole or not at all; process 0 writes, the others wait."""
        self.untouched &= name in ("config.json", STATE)
        self.engine.once(write_whole, self.folder / name, function)

    def lock(self) -> None:
        """One process at a time writes here. The system takes the lock from one that ends, however it ends."""
        import fcntl

        for name in (*LOGS, LOCK):
            refuse((self.folder / name).is_symlink(), f"{self.folder / name} is a link: it would be written to")
        self.locked = open(self.folder / LOCK, "a+")  # noqa: SIM115, as long as the run has it open
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.locked.seek(0)
            holder = self.locked.read().strip()
            refuse(holder != str(os.getpid()), f"{self.folder} is in use by process {holder}")
        self.locked.truncate(0)
        print(os.getpid(), file=self.locked, flush=True)

    def find(self, name: str, remedy: str, own: bool = True) -> Path:
        """A file or subfolder of this run, or of --from-run, to read from; or of --from-run alone."""
        folders = (self.folder, *self.config.from_run) if own else self.config.from_run
        there = [folder / name for folder in folders if (folder / name).exists()]
        refuse(not there, f"no {name} in {' or '.join(map(str, folders))}: {remedy}")
        return there[0]

    def path(self, name: str) -> str | Path:
        """Where the base, sft, reward or ppo model is: given, or made by this run or an earlier one."""
        flag, stage = ("model", "pretrain") if name == "base" else (f"{name}-model", name)
        given = getattr(self.config, flag.replace("-", "_"))
        return given or self.find(name, f"run stage {stage}, or give --{flag} or --from-run")

    def codec(self, model: str) -> Codec:
        """The first that was asked for: all models of a run need one tokenizer, and no query is to be made twice."""
        self.first_codec = self.first_codec or Codec(load_tokenizer(self.path(model)), self.config.data)
        return self.first_codec

    def can_share(self, queries: list[list[int]], G: int, *models: nn.Module) -> bool:
        """Whether responses to one query may share it: the user did not object, and the models do not mind."""
        if G == 1 or not self.config.compute.share_queries:
            return False
        nets = [model for model in models if isinstance(model, nn.Module)]  # a rule reads text
        minds = [net for net in nets if not shares_queries(net, queries, self.config.data)]
        self.note(f"{type(net).__name__} cannot share a query: each response reads its own copy" for net in minds)
        return not minds

    @property
    def labeler_chose(self) -> bool:
        """Whether the labeler made the comparisons that the reward model stands for."""
        config, folders = self.config, (self.folder, *self.config.from_run)
        given = config.data.comparisons_train or config.reward_model or config.ppo.reward_function
        return not given and any((folder / "data" / "comparisons_train.jsonl").exists() for folder in folders)

    # what a person sees, and what stays

    def say(self, text: str) -> None:
        if self.engine.rank == 0:
            with suppress(*[OSError] * self.interrupted):  # the terminal may be gone, and the step is still to be saved
                tqdm.write(text, file=sys.stdout)

    def note(self, texts: Iterable[str]) -> None:
        """Once each."""
        for text in texts:
            if text not in self.said:
                self.said.add(text)
                self.say(text)

    def warn(self, texts: Iterable[str]) -> None:
        self.note(f"warning: {text}" for text in texts)

    def log(self, statistics: dict[str, float]) -> None:
        """One line of metrics.jsonl; the numbers that matter on the screen."""
        for name, value in statistics.items():
            refuse(not math.isfinite(value), f"{name} is {value} [D22]", Stopped)
        seconds = round(time.monotonic() - self.started, 3)
        self.append("metrics.jsonl", {"stage": self.stage, "step": self.step, "seconds": seconds} | statistics)
        for name, value in statistics.items() if self.writer else ():
            tag = name if self.stage == "ppo" and "/" in name else f"{self.stage}/{name}"
            self.writer.add_scalar(tag, value, self.step)
        shown = "  ".join(f"{label} {statistics[name]:.3g}" for name, label in SHOWN.items() if name in statistics)
        self.bar.set_postfix_str(shown, refresh=False)
        if self.stage == "ppo":
            self.say(f"{self.step + 1:4d}  {shown}  {seconds - self.entered + self.started:.0f} s")

    def append(self, name: str, record: dict) -> None:
        if self.engine.rank == 0:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    # steps, and how far the run has come

    def enter(self, stage: str) -> None:
        self.stage, self.step, self.entered, self.saved = stage, 0, time.monotonic(), time.monotonic()
        self.say(f"\n== {stage}")

    def leave(self) -> None:
        """The stage is finished: a resumed run will not repeat it."""
        if self.stage == "ppo":
            self.say(sparklines(logged(self.folder)))
        self.seconds[self.stage] = round(time.monotonic() - self.entered, 1)
        self.save_progress({"finished": [*self.progress["finished"], self.stage], "stage": "", "step": 0})
        self.say(f"{self.stage}: {self.seconds[self.stage]:.0f} s")

    def steps(
        self, stage: str, total: int, optimizer: torch.optim.Optimizer, work: Sequence[int] = (), **models: nn.Module
    ) -> Iterator[int]:
        """Step numbers. The loop can be interrupted, and go on later: steps change optimizer and models alone. What
        `work` each is, if not all the same, tells how long it will take."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

        models, first = nn.ModuleDict(models), 0
        if self.progress["stage"] == stage:
            first, rates = self.progress["step"], [group["initial_lr"] for group in optimizer.param_groups]
            state = {"model_state_dict": self.progress.pop("model"), "optim_state_dict": self.progress.pop("optim")}
            with one_line(f"{self.folder / STATE} is not usable"):
                refuse(not 0 < first <= total, f"{self.folder / STATE} is not usable: step {first} of {total}")
                set_state_dict(models, optimizer, **state, options=StateDictOptions(full_state_dict=True))
            for group, rate in zip(optimizer.param_groups, rates):
                group["initial_lr"] = rate  # the flag's, which may have changed
            self.say(f"going on after step {first:,} of {total:,}")
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # so that any number of processes can go on
        hidden = None if self.engine.rank == 0 else True
        early = 1 + max(1, (total - first) // 20)
        with tqdm(total=total, initial=first, desc=stage, disable=hidden, leave=False) as self.bar:
            self.in_steps, self.untouched = True, False
            try:
                for self.step in range(first, total):
                    yield self.step
                    self.bar.update()
                    if self.step == first:
                        began = time.monotonic()
                    elif self.step + 1 == first + early:  # the next few tell how long all will take: the first warms up
                        work, seconds = work or [1] * total, time.monotonic() - began
                        seconds *= sum(work[first:]) / sum(work[first + 1 : first + early])
                        self.say(f"{total - first:,} steps, about {seconds:.0f} s")
                    due = time.monotonic() - self.saved >= 60 * self.config.compute.checkpoint_minutes
                    due, interrupted = self.engine.once(lambda due=due: (due, self.interrupted))
                    if due or interrupted:
                        model, optim = get_state_dict(models, optimizer, options=whole)
                        self.engine.once(check_finite, model)
                        self.save_progress({"stage": stage, "step": self.step + 1, "model": model, "optim": optim})
                    if interrupted:
                        raise KeyboardInterrupt
            finally:
                self.in_steps = False
        self.step = total

    def save_progress(self, progress: dict) -> None:
        """In one file, which is replaced whole: a kill at any moment leaves the old one or the new one."""
        paths = {name: self.folder / name for name in LOGS if (self.folder / name).exists()}
        to_disk(*paths.values())
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        progress = self.progress | {"sizes": sizes} | progress
        self.write(STATE, partial(torch.save, progress))
        self.progress = {name: value for name, value in progress.items() if name not in ("model", "optim")}
        self.saved = time.monotonic()

    def load_progress(self) -> None:
        """Begin where the checkpoint was written, and forget what was logged later: it will be logged again."""
        path = self.folder / STATE
        with one_line(f"{path} is not usable, --from-run can use what is finished"):  # weights_only: no code runs
            state = self.progress = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            sizes = [state["sizes"].get(name, 0) for name in LOGS]
            parts = [state[name] for name in ("model", "optim") if state["stage"]] + [state.get("inputs", {})]
            usual = {*map(type, parts)} == {dict} and {*map(type, (state["step"], *sizes))} == {int}
            refuse(not usual or not {*state["finished"]} <= {*STAGES}, f"{path} is not usable: it has another form")
        for log, size in zip(LOGS, sizes) if self.engine.rank == 0 else ():
            if (self.folder / log).exists():
                os.truncate(self.folder / log, max(0, min((self.folder / log).stat().st_size, size)))

    def stop(self, number: int = 0, *_: object) -> None:
        """A signal: finish the step and save, where one can; elsewhere, or the second time, end at once."""
        if self.interrupted and number == signal.SIGHUP:
            return  # a terminal that closes may say so twice
        if self.interrupted or not self.in_steps:
            raise KeyboardInterrupt
        self.interrupted = True
        self.say("interrupted: finishing this step")

    def introduce(self) -> None:
        config, engine = self.config, self.engine
        place = f"{torch.get_num_threads()} threads" if engine.device.type == "cpu" else torch.cuda.get_device_name()
        self.say(f"pmo: {' > '.join(stage for stage in config.stages if not config.is_given(stage))}")
        precision = "bfloat16" if engine.bfloat16 else "float32"
        self.say(f"{engine.world} x {engine.device.type} ({place}), {precision}, seed {config.seed}, in {self.folder}")
        if "ppo" in config.stages and (left := config.ppo.total_episodes % config.ppo.batch_size):
            self.say(f"note: --ppo.total-episodes {config.ppo.total_episodes}: the last {left} are no whole batch")
        learning = [each for each in ("sft", "reward", "ppo") if each in config.stages and not config.is_given(each)]
        rates = [f"--{each}.lr" for each in learning if getattr(config, each).lr == getattr(Config, each).lr]
        if "ppo" in learning and config.ppo.learns_values and config.ppo.value_lr == PPO.value_lr:
            rates.append("--ppo.value-lr")
        if rates and (config.model or config.sft_model):
            self.say(f"note: {', '.join(rates)}: for small models from scratch; a pretrained one wants a hundredth")
        for folder in config.from_run:
            was, now = stored(folder)["config"].get("data", {}), asdict(config.data)
            for name in ("query_tokens", "response_tokens", "query_format"):
                if was.get(name) != now[name]:
                    self.say(f"note: {folder} had {name} {was.get(name)!r}, this run has {now[name]!r}")

    def ended_by(self, error: InputError) -> InputError:
        """What is said of it: how to go on. Where nothing was made, no folder is left behind."""
        if self.untouched and self.engine.rank == 0:
            discard(self.folder)
        if self.untouched or not isinstance(error, Stopped):
            return error
        goes_on = f"once that is mended, --resume {self.folder} goes on from before"
        step = "" if self.stage in ("corpus", "compare", "evaluate") else f", step {self.step + 1}"
        return Stopped(f"{self.stage}{step}: {error}; {goes_on}")

    def finish(self) -> None:
        if importlib.util.find_spec("matplotlib") and logged(self.folder):
            self.write("curves.png", partial(plot, [self.folder]))
        if self.writer:
            self.writer.close()
        if self.engine.rank == 0:
            discard(self.folder / STATE)
            discard(self.folder / LOCK)
        self.say("\ntime: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items()))
        self.say(f"peak memory: {peak_memory(self.engine.device)}")
        self.say(f"written to {self.folder}: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


def check_places(config: Config) -> None:
    """Files, folders and functions that flags name: a slip should not wait for the stage that needs it."""
    for folder in config.from_run:
        refuse(not folder.is_dir(), f"--from-run {folder}: no such folder")
    for flag, value in given(config).items():
        refuse(isinstance(value, Path) and not value.is_file(), f"{flag} {value}: no such file")
        if isinstance(value, str):
            check_name(value)
    no_tensorboard = config.track and importlib.util.find_spec("tensorboard") is None
    refuse(no_tensorboard, "--track needs TensorBoard: pip install tensorboard")
    judge = config.evaluate.judge
    if judge not in ("labeler", "reward") and not Path(judge).is_dir():
        load_function("--evaluate.judge", judge)
    if config.ppo.reward_function is not None:
        load_function("--ppo.reward-function", config.ppo.reward_function)


def given(config: Config) -> dict[str, Path | str]:
    """What flags name: files of data, as paths, and models, as text."""
    flags, data = flags_of(asdict(config)), flags_of({"data": asdict(config.data)})
    files = {flag: value for flag, value in data.items() if isinstance(value, Path)}
    return files | {flag: value for flag, value in flags.items() if value and flag.endswith("model")}


def fingerprints(config: Config) -> dict[str, int]:
    """Of all that a run is given: one that goes on should find it as it was."""
    marks, paths = {}, [*map(Path, given(config).values())]
    for path in paths + [each / name for each in config.from_run for name in ("data", "base", "sft", "reward", "ppo")]:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.stat().st_size:
                marks[str(path)] = zlib.crc32(np.memmap(file, mode="r"), marks.get(str(path), 0))
    return marks


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


def write_whole(target: Path, function: Callable[[Path], None]) -> None:
    target.parent.mkdir(exist_ok=True)
    part = target.with_name(target.name + ".part")
    discard(part)
    try:
        function(part)
    except Exception as error:  # torch.save and safetensors make something else of a full disk's OSError
        full = "os error 28" in str(error) or shutil.disk_usage(target.parent).free < 2**20
        refuse(full and not isinstance(error, InputError), f"[Errno 28] No space left on device: {part}", Stopped)
        raise
    to_disk(part, *part.rglob("*"))
    if target.is_dir():
        discard(target)
    part.replace(target)
    to_disk(target.parent)


def discard(path: Path) -> None:
    """Remove a file or folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def to_disk(*paths: Path) -> None:
    """Have files and folders written to the disk itself: renaming then survives a power cut too."""
    for each in paths:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def fresh_folder(folder: Path | None) -> Path:
    """Make the folder asked for, or the next free runs/run-001; a run never writes into another's folder."""
    try:
        free = folder or next(f for i in range(1, 10**6) if not (f := Path(f"runs/run-{i:03d}")).exists())
        free.mkdir(parents=True)
        return free
    except FileExistsError:
        if folder is None:  # another run was faster
            return fresh_folder(None)
        raise InputError(f"--folder {folder} exists: choose another, or remove it") from None
    except OSError as error:
        raise InputError(f"--folder {folder or 'runs'}: cannot write there ({error.strerror})") from None


def stored(folder: Path) -> dict:
    """config.json of a run."""
    with one_line(f"{folder} is not the folder of a run"):
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        flags_of({**record["config"], **record["config"]["data"]})
        return record | {"resumed": [*record.get("resumed", [])]}


def continued(folder: Path, config: Config) -> tuple[dict, list[str]]:
    """What config.json will say of a run that goes on, and what has changed: --compute may, and learning rates."""
    record, now = stored(folder), json.loads(json.dumps(provenance(config), default=str))
    refuse(not (folder / STATE).exists(), f"--resume {folder} has no {STATE}, so it is finished; --from-run can use it")
    was, flags = flags_of(record["config"]), flags_of(now["config"])
    changed = [flag for flag in flags if flags[flag] != was.get(flag) and flag not in ("--folder", "--resume")]
    told = {flag: f"{flag} was {was.get(flag)}, is {flags[flag]}" for flag in changed}
    refused = [told[flag] for flag in changed if not flag.startswith("--compute.") and not flag.endswith("lr")]
    refuse(bool(refused), f"--resume {folder} was started with other flags: {'; '.join(refused)}")
    resumed = [*record["resumed"], now | {"config": told}]
    return record | {"config": now["config"], "resumed": resumed}, [f"note: {text}" for text in told.values()]


def arguments_of(folder: Path) -> list[str]:
    """The command line of a run, as its config.json has it."""
    arguments = []
    for flag, value in flags_of(stored(folder)["config"]).items():
        if isinstance(value, bool):
            arguments.append(flag if value else turned_off(flag))
        elif value not in (None, []) and flag not in ("--folder", "--resume"):  # "=": a value may begin with a dash
            arguments += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return arguments


def provenance(config: Config) -> dict:
    """All flags, the time, versions, and the commit when this file lies in a git checkout."""
    import transformers

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    said = subprocess.run(git, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    now, commit = datetime.now().astimezone().isoformat(timespec="seconds"), said.strip() or None
    return {"config": asdict(config), "started": now, "versions": versions, "commit": commit, "argv": sys.argv}


def load_policy(folder: str | Path) -> PreTrainedModel:
    """A causal language model that samples as it scores: else PPO draws from one policy and trains another, and no
    figure can tell. So some left-padded, cached steps of `sample_block` are compared with one pass over a row alone."""
    policy, queries, seen = load_model("AutoModelForCausalLM", folder, "a policy"), [[1, 2, 3, 4, 5], [2, 3]], []
    with one_line(f"{folder}: cannot be sampled from"), torch.no_grad():
        hook = policy.get_output_embeddings().register_forward_hook(lambda module, args, logits: seen.append(logits))
        responses = sample_block(policy, Batch(queries, [[], []]), torch.full((2, 4), 0.5), 1.0, eos_id=-1)
        for query, response in zip(queries, responses):
            response_logits(policy, lay_out(Batch([query], [response])))
        hook.remove()
        steps, alone = torch.cat(seen[:4], dim=1), torch.cat(seen[4:])
        same = (steps - alone).abs().max() <= 1e-3 * alone.abs().max()
    refuse(not same, f"{folder}: sampling, cached and padded on the left, gives other logits than reading a row alone")
    return policy


def load_model(auto: str, folder: str | Path, what: str, new: str | None = None, **options: object) -> PreTrainedModel:
    """A decoder in float32 [D21], dropout off: it stays in eval mode, always [D11].

    transformers draws weights that a folder lacks, and passes over those it does not know. Here each must have its
    place, but for the head `new`, which is to be drawn, and the one it replaces."""
    refuse(Path(folder, "adapter_config.json").is_file(), f"{folder}: an adapter: merge it into its model first")
    options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_pretrained(auto, folder, **options)
    model, config = model.eval(), model.config.get_text_config()
    missing, unknown = (set(info[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    if new and hasattr(model, "score"):
        trunk = "" if missing - {new} else model.base_model_prefix  # the head that is replaced stands beside it
        unknown = {name for name in unknown if name.startswith(trunk)} | ({new} - missing)
    misshapen, state = {name for name, *_ in info["mismatched_keys"]}, model.state_dict().items()
    faults = {"missing": missing - {new}, "unknown": unknown, "misshapen": misshapen}
    faults["not finite"] = {name for name, weight in state if not weight.isfinite().all()}
    said = [f"{len(names)} {fault} ({min(names)})" for fault, names in faults.items() if names]
    refuse(bool(said), f"{folder}: not {what}; of its weights {', '.join(said)}")
    refuse(not any(p.requires_grad for p in model.parameters()), f"{folder}: none of its weights can be trained")
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # no loss here has a use for them, and sampling fails on them
    rows = torch.tensor([range(1, 9), [1, 2, 3, 4, 6, 7, 8, 9]]) % config.vocab_size
    with one_line(f"{folder}: cannot be run"), torch.no_grad():
        one, other = model.base_model(input_ids=rows, use_cache=False)[0][:, :4]
    same = (one - other).abs().max() <= 1e-3 * one.abs().max()  # rows side by side may round differently
    refuse(not same, f"{folder}: not a causal model: what it reads first changes with what comes later")
    return model


def load_pretrained(auto: str, folder: str | Path, **options: object):
    """A transformers object from a folder or the Hub; whatever goes wrong becomes one line that names the folder."""
    import transformers

    check_name(folder)
    with one_line(f"{folder}: cannot load"):
        return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=False, **options)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """With an EOS, and tokens that the folder's model knows."""
    tokenizer, config = (load_pretrained(auto, folder) for auto in ("AutoTokenizer", "AutoConfig"))
    eos, size = tokenizer.eos_token_id, config.get_text_config().vocab_size
    refuse(eos is None, f"{folder}: the tokenizer has no EOS token, and responses must end with one")
    of_text = {*tokenizer.get_vocab().values()} - {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    refuse(not of_text, f"{folder}: has no tokenizer, or an empty one")
    for what, token in (("EOS", eos), ("the last token", max(of_text))):
        refuse(token >= size, f"{folder}: {what} is {token}, beyond the {size} rows of the model's embedding")
    return tokenizer


def check_name(folder: str | Path) -> None:
    """A folder, or owner/name on the Hub; but a slip in a folder's name should not download a stranger's model."""
    hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(folder)) and not Path(str(folder).partition("/")[0]).exists()
    refuse(not hub and not Path(folder).is_dir(), f"{folder}: no such folder")


def check_room(model: PreTrainedModel, data: Data) -> None:
    """Refuse sequences longer than the model has positions for."""
    response = max(data.response_tokens, data.comparison_tokens)
    need = data.query_tokens + response
    have = positions_of(model)
    flags = f"--data.query-tokens {data.query_tokens} and responses of {response}"
    refuse(need > have, f"{flags} need {need} positions, {model.config.name_or_path} has {have}")


def positions_of(*models: nn.Module | Scorer) -> int:
    """Tokens that a text may have for all of them; a rule reads any text."""
    nets = [getattr(model, "classifier", model) for model in models]
    configs = [net.config.get_text_config() for net in nets if isinstance(net, nn.Module)]
    return min([getattr(config, "max_position_embeddings", 10**9) for config in configs], default=10**9)


def check_tokenizer(run: Run, folder: str | Path) -> None:
    """Refuse a model that reads other tokens than the SFT model writes: texts of the run tell."""
    sft, posts = run.path("sft"), read_posts(run, "valid")[:100]
    codecs = [Codec(load_tokenizer(each), run.config.data) for each in (folder, sft)]
    one, other = ([c.eos_id, c.uncut(posts), c.responses([post.summary for post in posts], posts)] for c in codecs)
    refuse(one != other, f"{folder} and {sft} have different tokenizers; all models of a run need one")


def save_model(
    model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """A plain transformers folder with these weights, which are `Engine.weights(model)`. Its pad id is in range and not
    EOS, so that transformers' own sequence classification, which reads the last token that is not padding, reads the
    score at EOS [D3]. Of generation it says these ids alone: flags of the base may mislead, or forbid the saving."""
    check_finite(weights)
    eos, pad, size = tokenizer.eos_token_id, tokenizer.pad_token_id, model.config.get_text_config().vocab_size
    if pad is None or pad == eos or pad >= size:
        candidates = [token for token in tokenizer.all_special_ids if token != eos and token < size]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens([*candidates, 0 if eos != 0 else 1][0])
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, eos
    if model.can_generate():
        ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model.generation_config = type(model.generation_config)(eos_token_id=eos, **ids)
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def check_finite(weights: dict[str, Tensor]) -> None:
    """What a last step has spoilt is not kept: the run can go on from before [D22]."""
    for name, weight in weights.items():
        said = f"{name} is not finite; try a lower learning rate (it may change) [D22]"
        refuse(not weight.isfinite().all(), said, Stopped)


def load_function(flag: str, place: str) -> Callable:
    """module:function, from the working directory or installed."""
    flag, (module, _, name), here = f"{flag} {place}", place.partition(":"), str(Path.cwd())
    refuse(not re.fullmatch(r"\w+(\.\w+)*:\w+", place), f"{flag} should name module:function")
    sys.path.insert(0, here)
    try:
        with one_line(flag):
            function = getattr(importlib.import_module(module), name)
    finally:  # last from now on: for what it imports when it is called, but no file there is taken for a library
        sys.path.remove(here)
        sys.path.extend({here} - {*sys.path})
    refuse(not callable(function) or inspect.iscoroutinefunction(function), f"{flag} cannot be called")
    with one_line(flag, function), suppress(ValueError):  # what a builtin takes may not be known
        inspect.signature(function).bind("post", "response", "record")
    return function


def verified(rule: RewardFunction, posts: Sequence[Post], texts: list[str]) -> list[float]:
    scores = []
    for post, text in zip(posts, texts):
        with one_line("--ppo.reward-function", rule, text):
            score = rule(post.post, text, copy.deepcopy(post.record))
            number = math.nan
            with suppress(TypeError, ValueError, OverflowError):
                number = float(score) if not isinstance(score, str) else math.nan
            said = f"--ppo.reward-function returned {reprlib.repr(score)}, not a finite number, for {text[:60]!r}"
            refuse(not abs(number) <= torch.finfo(torch.float32).max, said, Stopped)
            scores.append(number)
    return scores


READ = os.getcwd, torch.is_grad_enabled, torch.get_default_dtype, torch.get_num_threads  # what others may change
RESET = os.chdir, torch.set_grad_enabled, torch.set_default_dtype, torch.set_num_threads
NOT_THEIRS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).resolve()), __file__, "<")


@contextmanager
def one_line(what: str, function: Callable | None = None, text: str = "") -> Iterator[None]:
    """Inside runs code of others, as a user's `function` asked about a text. Whatever it raises becomes one line, with
    the user's line that led to it; what it changed about the process is undone."""
    before = [read() for read in READ]
    try:
        yield
    except (KeyboardInterrupt, InputError):
        raise
    except BaseException as error:  # sys.exit(0), too: the run would end as if it were finished
        code, trace = getattr(function, "__code__", None), traceback.extract_tb(error.__traceback__)
        places = [(code.co_filename, code.co_firstlineno)] if code else []
        places += [(frame.filename, frame.lineno) for frame in trace if not frame.filename.startswith(NOT_THEIRS)]
        places += [(error.filename, error.lineno)] if isinstance(error, SyntaxError) else []
        said = " ".join(traceback.format_exception_only(error)[-1].split())[:200]
        said += "".join(f" ({Path(str(file)).name}, line {line})" for file, line in places[-1:])
        raise Stopped(f"{what}: {said}" + f", for {text[:60]!r}" * bool(function and text)) from None
    finally:
        for reset, value in zip(RESET, before):
            reset(value)


# -----------------------------------------------------------------------------
# 10 main: flags in, run out.


def start(config: Config) -> Path:
    """Run the stages that are asked for, and not given; returns the run's folder."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    work = dict(zip(STAGES, (corpus, pretrain, sft, compare, reward, ppo, evaluate)))
    run = Run(config)
    alone = threading.current_thread() is threading.main_thread()  # which alone hears signals; under nohup not all
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if alone else ()
    before = {each: signal.signal(each, run.stop) for each in heard if signal.getsignal(each) is not signal.SIG_IGN}
    try:
        run.introduce()
        for stage in config.stages:
            if not config.is_given(stage) and stage not in run.progress["finished"]:
                run.enter(stage)
                work[stage](run)
                run.leave()
    except InputError as error:
        raise run.ended_by(error) from None
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError(f"another process has ended; go on with --resume {run.folder}") from None
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with --resume {run.folder}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    run.finish()
    return run.folder


def sweep(config: Config) -> None:
    """The same run with each value of one flag, side by side [as 1, §6]."""
    flag, *values = config.sweep
    switches = {"True": [f"--{flag}"], "False": [turned_off(f"--{flag}")]}
    given = [switches.get(value, [f"--{flag}", value]) for value in values]
    runs = [tyro.cli(Config, args=args, default=replace(config, sweep=())) for args in given]
    base, names = config.folder or Path("runs") / flag, [re.sub(r"[^\w.+-]+", "-", value) for value in values]
    folders = [base.with_name(f"{base.name}-{name}") for name in names]  # a value may be a path
    refuse(len({*folders}) < len(folders), f"--sweep {flag}: two values, one folder: {' '.join(map(str, folders))}")
    first = os.environ.get("RANK", "0") == "0"
    for folder in folders if first else ():  # all of them now, not the last one after hours
        refuse(folder.exists(), f"--folder {base}: {folder} exists; choose another, or remove it")
    stopped = []
    for value, run, folder in zip(values, runs, folders):
        try:
            start(replace(run, folder=folder))
        except Stopped as error:  # what one value does is a finding; the others are still to be seen
            if dist.is_initialized():  # but other processes may not have stopped
                raise
            stopped.append(f"--sweep {flag}, {value}: {error}")
    if first:
        rows = [{flag: value} | outcome(folder) for value, folder in zip(values, folders)]
        names = list(dict.fromkeys(chain(*rows)))
        print(table([names, *([row.get(name, "") for name in names] for row in rows)]))
        if importlib.util.find_spec("matplotlib") and any(map(logged, folders)):
            write_whole(base.with_name(f"{base.name}-curves.png"), partial(plot, folders))
    refuse(bool(stopped), "\npmo: ".join(stopped), Stopped)


def outcome(folder: Path) -> dict[str, str]:
    """A run in a line. Of PPO's scores [1]'s two: the mean over all updates, for fast learning; and over the last."""
    cells, updates = {}, logged(folder)
    columns = (("score", "scores", 1.0), ("at the end", "scores", 0.1), ("kl", "kl", 0.1))
    for title, name, share in columns if updates else ():
        part = updates[-math.ceil(share * len(updates)) :]
        cells[title] = f"{sum(update[f'objective/{name}'] for update in part) / len(part):.2f}"
    for stage, name in (("sft", "valid/loss"), ("reward", "valid/accuracy all")):
        cells |= {f"{stage} {name}": f"{record[name]:.3f}" for record in logged(folder, stage) if name in record}
    if (folder / "eval.json").exists():
        record = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        against = [item for item in record["comparisons"].items() if "against SFT" in item[0]]
        for pair, figures in against[:2]:  # both at one temperature
            for name, (mean, low, high) in figures.items():
                cells[f"{name} {pair.split()[1]}"] = f"{mean:.3f} ± {(high - low) / 2:.3f}"
    return cells


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character should not end a run
    inspect.getsource = lru_cache(inspect.getsource)  # tyro asks twice, and Python < 3.13 parses all of this each time
    try:
        config = tyro.cli(Config)
        if config.resume:  # the flags it was started with, then those given now, which override them
            config = tyro.cli(Config, args=[*arguments_of(config.resume), *sys.argv[1:]])
        (sweep if config.sweep else start)(config)
        if dist.is_initialized():
            dist.barrier()  # one that closes while another still speaks to it can take that one down
            dist.destroy_process_group()
    except (InputError, OSError) as error:  # OSError: a disk that is full or read-only
        if isinstance(error, ConnectionError) or os.environ.get("LOCAL_RANK", "0") == "0":  # the rest is everybody's
            print(f"pmo: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        remedies = "--compute.micro-batch-size, --compute.sample-batch-size, or with several processes --compute.shard"
        print(f"pmo: too little memory; see {remedies} (they may change with --resume): {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"pmo: interrupted; {error}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
