"""pmo: proximal policy optimisation (PPO) for language models, in one file.

A language model is trained from preferences in three stages: supervised fine-tuning (SFT), a reward model, PPO.

    python pmo.py                                    all of it, offline, in minutes, on a corpus every machine has
    python pmo.py --help                             every flag with its meaning, symbol and source
    PMO_IMPL=my_module pytest test_pmo.py            hold another implementation against the same laws

PPO in a dozen lines (`ppo`, below, is these lines with names):

    for update in range(num_updates):
        responses = sample(policy, queries, temperature)                # roll out, up to and including EOS
        scores = reward_model(queries, responses), read at EOS          # a penalty where EOS is missing
        rewards = -kl_coef * (logprobs - ref_logprobs), + score on the last token
        advantages, returns = gae(rewards, values);  advantages = whiten(advantages)
        for epoch in range(num_ppo_epochs):
            for minibatch in a fresh permutation of the rollouts:
                ratio = exp(new logprobs - old logprobs)
                loss = -min(ratio * A, clip(ratio, 0.8, 1.2) * A) + vf_coef * clipped squared value error
                step

Departures from the code of [4], each because of a fault or for a reason given at the place:
  1. the score is paid to the EOS action, not one slot after it;
  2. a loss is divided once, by the token count of the whole minibatch, so that micro-batches cannot change it;
  3. masks come from lengths, never from `token == pad_id`;
  4. rows are padded on the right for scoring and training, so positions are right on every architecture;
  5. old log-probabilities come from the same kind of forward pass as the update's, so the first ratio is 1;
  6. SFT can train on the response alone (a flag weighs the prompt), AdamW decays no weights, every statistic is masked;
  7. reward whitening only scales; advantage whitening runs over the whole batch.

Shapes: B rollouts, Q query tokens, T response tokens, V vocabulary, D width; () is a scalar.

References: [1] Schulman et al. 2017, PPO, arXiv 1707.06347 · [2] Lambert, The RLHF Book · [3] Schulman et al. 2016,
GAE, arXiv 1506.02438 · [4] Huang et al. 2024, The N+ Implementation Details of RLHF with PPO, arXiv 2403.17031 ·
[5] Stiennon et al. 2020, Learning to summarize from human feedback, arXiv 2009.01325 · [6] Schulman et al. 2015, TRPO,
arXiv 1502.05477 · [7] Lambert et al. 2024, Tulu 3, arXiv 2411.15124 · [8] Ouyang et al. 2022, InstructGPT, arXiv
2203.02155. Tags [D1] to [D25] number the details that make it work; README lists each with its test.

The file is named after an article that calls PPO *PMO* (proximal model optimisation). Its words, and the field's:
TRMO = TRPO, VMG = VPG, GIE = GAE, GRMO = GRPO, AIHF = RLHF, AIVO = RLVR, CDP = MDP, model = policy, decision = action,
word = token, observation = state, outcome = reward, future-outcome = reward-to-go, decision-value = Q,
influence = advantage, evaluator = value model (critic), feedback model = reward model, operational history =
trajectory, model ratio = importance ratio, time-weighting factor = discount.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# transformers and tokenizers are imported where they are used: `--help`, and copying the maths, need neither.


# -----------------------------------------------------------------------------
# config: what a run is. Every flag, its meaning, symbol and source; no code that acts.
#
# Defaults are those of the default run, minutes on two CPU cores. "Paper" is [4].


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and why."""


class Diverged(InputError):
    """Training has left the finite numbers."""


def refuse(condition: bool, message: str) -> None:
    if condition:
        raise InputError(message)


def require(config: object, section: str, least: int | None, *names: str) -> None:
    """Refuse settings below `least`; with None, those not above 0."""
    for name in names:
        value, bound = getattr(config, name), "above 0" if least is None else f"at least {least}"
        flag = f"--{section}.{name}".replace("_", "-")
        refuse(not (value > 0 if least is None else value >= least), f"{flag} is {value}, must be {bound}")


@dataclass(frozen=True)
class Data:
    """Text: what is summarised. Without files, the docstrings of installed libraries are."""

    train: Path | None = None
    """Posts with summaries for training: JSON Lines with subreddit, title, post, summary."""
    valid: Path | None = None
    """The same for validation: held-out loss, samples on the way."""
    test: Path | None = None
    """The same for the evaluation at the end. Default: the validation file."""
    comparisons_train: Path | None = None
    """Human comparisons (OpenAI's JSON Lines: info, summaries, choice). Without them the labeler compares samples."""
    comparisons_valid: Path | None = None
    """The same for the reward model's accuracy."""
    query_tokens: int = 64
    """Longest query; longer posts lose paragraphs from their end [D2]. Paper: 512."""
    response_tokens: int = 28
    """Longest summary, EOS included. Paper: 53."""
    comparison_tokens: int = 36
    """Longest summary in comparisons, EOS included. Paper: 169."""
    query_format: str = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    """Query template [D1]."""

    def __post_init__(self) -> None:
        refuse((self.train is None) != (self.valid is None), "--data.train and --data.valid need each other")
        refuse(self.test is not None and self.train is None, "--data.test needs --data.train and --data.valid")
        alone = (self.comparisons_train is None) != (self.comparisons_valid is None)
        refuse(alone, "--data.comparisons-train and --data.comparisons-valid need each other")
        require(self, "data", 2, "query_tokens", "response_tokens", "comparison_tokens")
        fields = [name for _, name, *_ in Formatter().parse(self.query_format) if name is not None]
        refuse("post" not in fields, "--data.query-format has no {post} in it")
        for name in fields:
            refuse(name not in ("subreddit", "title", "post"), f"--data.query-format: posts have no {{{name}}}")


@dataclass(frozen=True)
class Pretrain:
    """The base model, where no --model is given: a small GPT-NeoX (the architecture of Pythia [4]), from scratch."""

    epochs: float = 1.0
    """Passes over the training posts, next-token loss on everything. The response asked for is the title: it builds
    copying, without which a model this small learns the style of summaries but not to look at the post."""
    batch_size: int = 8
    """Posts per step."""
    lr: float = 3e-3
    """Learning rate, constant after a warm-up of 50 steps (a tenth of all steps, where those are fewer)."""
    vocab_size: int = 2048
    """V, entries of the byte-level BPE trained on the corpus."""
    layers: int = 3
    """Transformer blocks."""
    width: int = 128
    """D, size of the hidden states."""
    heads: int = 4
    """Attention heads."""

    def __post_init__(self) -> None:
        require(self, "pretrain", 1, "batch_size", "vocab_size", "layers", "width", "heads")
        require(self, "pretrain", None, "epochs", "lr")
        message = f"--pretrain.width {self.width} is not a multiple of --pretrain.heads {self.heads}"
        refuse(self.width % self.heads != 0, message)


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning on posts with summaries."""

    epochs: float = 1.5
    """Passes over the summaries. Paper: 1."""
    batch_size: int = 8
    """Examples per step. Paper: 128."""
    lr: float = 3e-3
    """Learning rate, cosine to 0 after the same warm-up as in pretraining. Paper: 3e-6, no warm-up."""
    prompt_weight: float = 0.3
    """Mean loss over the query's own tokens, times this, is added to the mean over the response's [D6]. A model as
    small as the default forgets how to copy without it; pretrained ones want 0. Paper's code: one mean over both."""

    def __post_init__(self) -> None:
        require(self, "sft", 1, "batch_size")
        require(self, "sft", None, "epochs", "lr")
        require(self, "sft", 0, "prompt_weight")


@dataclass(frozen=True)
class Compare:
    """Preferences where there are no humans: the labeler compares samples of the SFT model."""

    posts: int = 6000
    """Training posts to sample for, at most."""
    samples: int = 2
    """Samples per post at the PPO temperature; the labeler's best is compared with its worst, and its first with a
    sample for another post."""

    def __post_init__(self) -> None:
        require(self, "compare", 2, "posts", "samples")


@dataclass(frozen=True)
class Reward:
    """The reward model, from comparisons (Bradley-Terry) [5, section 3.4]."""

    epochs: float = 1.0
    """Passes over the comparisons. Paper: 1."""
    pretraining_pairs: int = 6000
    """First learn to prefer a post's own summary to another post's, on at most this many posts (preference model
    pretraining, Askell et al. 2021, arXiv 2112.00861). Paper: 0."""
    batch_size: int = 16
    """Pairs per step. Paper: 64."""
    lr: float = 7e-4
    """Learning rate, cosine to 0 after the same warm-up as in pretraining. Paper: 3e-6, no warm-up."""

    def __post_init__(self) -> None:
        require(self, "reward", 1, "batch_size")
        require(self, "reward", None, "epochs", "lr")
        require(self, "reward", 0, "pretraining_pairs")


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation against the reward model."""

    total_episodes: int = 6144
    """Responses sampled in all. Paper: 1,000,000."""
    batch_size: int = 256
    """Responses sampled per update. Paper: 512."""
    num_minibatches: int = 4
    """Optimizer steps per epoch over a batch. Paper: 1."""
    num_ppo_epochs: int = 2
    """Epochs over each batch, K in [1], a fresh permutation each [D19]. Paper: 4."""
    lr: float = 4e-4
    """Learning rate of the policy, linear to 0. Paper: 3e-6."""
    value_lr: float = 1e-3
    """Learning rate of the value model. Paper: 3e-6."""
    temperature: float = 0.7
    """Sampling temperature; log-probabilities use it too [D13]. Paper: 0.7."""
    kl_coef: float = 0.2
    """Beta, price of one nat of KL to the SFT model [D15; 5, section 3.4]. Paper: 0.05."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL (Schulman 2020). Default: k1 in the reward, k2 in the loss."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL is charged. In the loss k1 has no gradient in expectation. Paper: reward."""
    gamma: float = 1.0
    """Gamma, discount [D17]. Paper: 1."""
    lam: float = 0.95
    """Lambda of GAE [3; D17]. Paper: 0.95."""
    cliprange: float = 0.2
    """Epsilon of the clipped objective [1, eq. 7; D18]. Paper: 0.2."""
    cliprange_value: float = 0.2
    """Clip of the value around its rollout value [D18]. Paper: 0.2."""
    vf_coef: float = 0.1
    """Weight of the value loss [1, eq. 9; D18]. Paper: 0.1."""
    value_model: Literal["separate", "shared"] = "separate"
    """A model of its own that starts as the reward model [D10], or a head on the policy's trunk. Paper: separate."""
    whiten_rewards: bool = False
    """Scale the rewards to variance 1, mean unshifted [D16]. Paper: no."""
    whiten_advantages: bool = True
    """Advantages to mean 0, variance 1 over the batch [D16]. Paper: yes."""
    missing_eos_score: float = -3.0
    """Score of a response that does not end, in place of the model's [D12]. Paper: -1."""
    average: Literal["token", "sequence"] = "token"
    """Losses are means over all tokens, or over responses of their token means."""
    reward_function: str | None = None
    """A rule in place of the reward model (RLVR [7]): module:function(post, response, record) -> float, where record
    is the post's record in the data file. No comparisons, no reward model; the value model starts at 0."""
    max_kl: float | None = None
    """Stop when a batch's mean KL to the SFT model exceeds this many nats per response. Default: never."""
    sample_every: int = 5
    """Updates between printed samples."""

    @property
    def num_updates(self) -> int:
        return self.total_episodes // self.batch_size

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def kl_kind(self) -> Literal["k1", "k2", "k3"]:
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k2")

    def __post_init__(self) -> None:
        require(self, "ppo", 1, "batch_size", "num_minibatches", "num_ppo_epochs", "sample_every")
        require(self, "ppo", None, "lr", "value_lr", "temperature", "cliprange", "cliprange_value")
        require(self, "ppo", 0, "kl_coef", "vf_coef")
        refuse(
            self.batch_size % self.num_minibatches != 0,
            f"--ppo.batch-size {self.batch_size} is not a multiple of --ppo.num-minibatches {self.num_minibatches}",
        )
        refuse(
            self.total_episodes < self.batch_size,
            f"--ppo.total-episodes {self.total_episodes} is less than one batch, --ppo.batch-size {self.batch_size}",
        )
        for name in ("gamma", "lam"):
            refuse(not 0 <= getattr(self, name) <= 1, f"--ppo.{name} is {getattr(self, name)}, must lie in [0, 1]")


@dataclass(frozen=True)
class Evaluate:
    """Held-out evaluation of SFT and PPO [D24]."""

    posts: int = 512
    """Posts to summarise, at most."""
    temperature: float = 0.01
    """Sampling temperature, next to greedy. Paper: 0.01."""
    judge: str = "labeler"
    """Who says which summary is better: labeler; reward (what PPO was trained on); the folder of another reward model;
    or module:function(post, a, b) -> 1 if a is better, 0 if b, 0.5 if neither, asked in both orders."""

    def __post_init__(self) -> None:
        require(self, "evaluate", 1, "posts")
        require(self, "evaluate", None, "temperature")


@dataclass(frozen=True)
class Compute:
    """Where and how to compute."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """CUDA if there is a GPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward passes; weights are float32 always [D21]. auto: bfloat16 on a GPU, float32 on a CPU."""
    micro_batch_size: int = 32
    """Rows (pairs, for the reward model) per forward and backward pass; changes memory and speed only [D20]."""
    sample_batch_size: int = 256
    """Rows sampled together."""
    max_grad_norm: float = 1.0
    """Clip the gradient (of policy and value model together) to this norm; 0 never [D22]. Paper: none."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, of which two are kept until the stage ends; 0 after every step."""
    shard: bool = False
    """Give each process (torchrun) a share of all weights, gradients and optimizer states (FSDP2) instead of a copy:
    for models too large for one GPU."""
    adam_beta2: float = 0.97
    """AdamW's memory of squared gradients [D21]. Models from scratch learn to copy sooner with a short one; pretrained
    ones want 0.999. Paper: 0.999."""

    def __post_init__(self) -> None:
        require(self, "compute", 1, "micro_batch_size", "sample_batch_size")
        require(self, "compute", 0, "max_grad_norm", "checkpoint_minutes")
        refuse(not 0 <= self.adam_beta2 < 1, f"--compute.adam-beta2 is {self.adam_beta2}, must lie in [0, 1)")


STAGES = ("corpus", "pretrain", "sft", "compare", "reward", "ppo", "evaluate")
Stage = Literal["corpus", "pretrain", "sft", "compare", "reward", "ppo", "evaluate", "benchmark"]


@dataclass(frozen=True)
class Config:
    """PPO for language models: SFT, reward model, PPO, evaluation. Without flags: all of it on a CPU, in minutes."""

    stages: tuple[Stage, ...] = STAGES
    """Stages to run. corpus, pretrain and compare make what is not given: posts, a base model, comparisons. benchmark
    stands alone (or after corpus): it times PPO updates of an untrained model, and says where the time goes."""
    name: str | None = None
    """Name of the run; it writes to {out}/{name}, which must not exist. Default: run-001, run-002, ..."""
    out: Path = Path("runs")
    """Folder of all runs."""
    resume: bool = False
    """Go on with the run --name, which was interrupted, from its last checkpoint. All other flags as before; learning
    rates and --compute may change."""
    from_run: Path | None = None
    """Folder of an earlier run; stands in for the data and models that this run's stages do not make."""
    model: str | None = None
    """Pretrained causal language model to start from: a transformers folder or Hub name. Default: a small new one."""
    sft_model: str | None = None
    """SFT model, instead of this run's or --from-run's."""
    reward_model: str | None = None
    """Reward model (AutoModelForSequenceClassification, one label), instead of this run's or --from-run's."""
    ppo_model: str | None = None
    """Policy to evaluate, instead of this run's or --from-run's."""
    seed: int = 1
    """Seed of everything random but the corpus's split: shuffles, samples, new weights [D25]."""
    track: bool = False
    """Write TensorBoard curves too (needs `pip install pmo[track]`)."""
    data: Data = Data()
    pretrain: Pretrain = Pretrain()
    sft: SFT = SFT()
    compare: Compare = Compare()
    reward: Reward = Reward()
    ppo: PPO = PPO()
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        alone = "benchmark" not in self.stages or not set(self.stages) - {"corpus", "benchmark"}
        refuse(not alone, "--stages: benchmark trains nothing and stands alone, or after corpus")
        refuse(self.resume and self.name is None, "--resume needs --name: which run?")
        nested = self.name is not None and Path(self.name).name != self.name
        refuse(nested, f"--name {self.name} is not the name of a folder; --out says where it lies")
        refuse(self.seed < 0, f"--seed is {self.seed}, must be at least 0")
        both = self.ppo.reward_function is not None and self.reward_model is not None
        refuse(both, "--ppo.reward-function stands in for the reward model, but --reward-model is given too")

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


# -----------------------------------------------------------------------------
# maths: tensors in, tensors out. No model, no tokenizer, no randomness, no I/O.
#
# Every mask is bool (B, T), a prefix of True in each row. What stands outside a
# mask is ignored, NaN included, and comes back as 0. Inputs are never modified.


def response_mask(
    responses: Tensor,  # (B, T) the sampler's output, full width
    eos_id: int,
) -> Tensor:  # (B, T) bool
    """True up to and including the first EOS; all True in a row without one [D3, D4].

    What the sampler wrote after EOS is no part of the response, whatever it is. A pad id plays no role here.
    """
    is_eos = responses == eos_id
    eos_before = is_eos.cumsum(1) - is_eos.long()
    return eos_before == 0


def length_mask(
    lengths: Tensor,  # (B,)
    T: int,
) -> Tensor:  # (B, T) bool
    """True on the first `lengths[b]` slots of row b [D3]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def penalize_missing_eos(
    scores: Tensor,  # (B,)
    has_eos: Tensor,  # (B,) bool
    value: float,
) -> Tensor:  # (B,)
    """Replace (not lower) the score of a response that never ended [D12; 4, detail "EOS trick"]."""
    return torch.where(has_eos, scores, torch.full_like(scores, value))


def logprobs_of(
    logits: Tensor,  # (B, T, V)
    tokens: Tensor,  # (B, T)
    temperature: float,
) -> Tensor:  # (B, T)
    """log softmax(logits / temperature)[token], in float32 (float64 stays float64).

    The temperature is the one the tokens were sampled with: it defines the policy [D13; 4].
    """
    logits = _at_least_float32(logits) / temperature
    return -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def entropy_of(
    logits: Tensor,  # (B, T, V)
    temperature: float,
) -> Tensor:  # (B, T) nats
    """H = −Σᵥ πᵥ log πᵥ of the tempered distribution π = softmax(logits / temperature) [D13]."""
    logprobs = (_at_least_float32(logits) / temperature).log_softmax(-1)
    # The clamp turns 0 · (−∞), a token that cannot be sampled, into 0.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def masked_mean(
    x: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
) -> Tensor:  # ()
    """Mean of x over the True slots."""
    return x.masked_fill(~mask, 0).sum() / mask.sum()


def whiten(
    x: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    shift_mean: bool = True,
) -> Tensor:  # (B, T)
    """(x − mean) / (std + 1e-8) over the mask, population variance; `shift_mean=False` gives x / (std + 1e-8).

    Without the shift zero stays zero and signs stay, as whitened *rewards* should ([4]'s code adds the mean back
    instead). Input without spread (std < 1e-6) is left unscaled: dividing would only blow up rounding errors [D16].
    """
    x = x.masked_fill(~mask, 0)
    mean = masked_mean(x, mask)
    mean = mean + masked_mean(x - mean, mask)  # a second pass removes the rounding error of the first
    centered = (x - mean).masked_fill(~mask, 0)
    std = masked_mean(centered.square(), mask).sqrt()
    scale = torch.where(std < 1e-6, torch.ones_like(std), std + 1e-8)
    return (centered if shift_mean else x) / scale


def kl_estimate(
    logprobs: Tensor,  # (B, T) log π of sampled tokens
    ref_logprobs: Tensor,  # (B, T) log π_ref of the same tokens
    kind: Literal["k1", "k2", "k3"] = "k1",
) -> Tensor:  # (B, T)
    """Estimates of KL(π ‖ π_ref) from single samples of π [Schulman 2020, "Approximating KL Divergence"].

        k1 = log π − log π_ref        k2 = k1² / 2        k3 = π_ref / π − 1 + k1

    k1 and k3 are unbiased; k2 is biased, of low variance; k2 and k3 are never negative.
    """
    k1 = logprobs - ref_logprobs
    if kind == "k1":
        return k1
    return k1.square() / 2 if kind == "k2" else torch.expm1(-k1) + k1


def token_rewards(
    scores: Tensor,  # (B,)
    kl: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    kl_coef: float,
) -> Tensor:  # (B, T)
    """rₜ = −β klₜ on every response token, plus the score on the last one [D15; 5, §3.4; Ziegler et al. 2019, eq. 2].

    The last response token is the EOS action itself: it earned the score. [4]'s code pays one slot later.
    """
    penalties = (-kl_coef * kl).masked_fill(~mask, 0)
    last = mask.sum(1, keepdim=True) - 1
    return penalties.scatter_add(1, last, scores[:, None].to(penalties.dtype))


def gae(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T) V of the state before token t
    mask: Tensor,  # (B, T) bool
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:  # advantages (B, T), returns (B, T)
    """Generalised advantage estimation [3, eq. 11–16].

        δₜ = rₜ + γ Vₜ₊₁ − Vₜ        Aₜ = δₜ + γλ Aₜ₊₁        Rₜ = Aₜ + Vₜ

    The response ends the episode: V and A are 0 after its last token. λ = 0 gives the TD residual, λ = 1 the
    Monte-Carlo return minus V. Not whitened.
    """
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


def policy_loss(
    logprobs: Tensor,  # (B, T)
    old_logprobs: Tensor,  # (B, T) of the policy that sampled
    advantages: Tensor,  # (B, T)
    cliprange: float,
) -> Tensor:  # (B, T), unreduced
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε) A),  ρ = π / π_old [1, eq. 7].

    The minimum is pessimistic: the clip removes the gradient only where the step would gain from going further.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return -torch.min(ratio * advantages, clipped * advantages)


def value_loss(
    values: Tensor,  # (B, T)
    old_values: Tensor,  # (B, T) at rollout time
    returns: Tensor,  # (B, T)
    cliprange_value: float,
) -> Tensor:  # (B, T), unreduced
    """½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²) [3; 4; the clip is OpenAI baselines']."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return torch.max((values - returns).square(), (clipped - returns).square()) / 2


def aggregate(
    losses: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    how: Literal["token", "sequence"] = "token",
    normalizer: int | Tensor | None = None,
) -> Tensor:  # ()
    """One number: "token" is the mean over tokens, "sequence" the mean over rows of each row's token mean.

    `normalizer` is the count (of tokens, of rows) in the whole minibatch, over all its micro-batches and processes;
    results of the parts then add up to the result of the whole, and splitting never changes a gradient [D20].
    """
    losses = losses.masked_fill(~mask, 0)
    if how == "token":
        return losses.sum() / (mask.sum() if normalizer is None else normalizer)
    rows = losses.sum(1) / mask.sum(1)
    return rows.sum() / (len(rows) if normalizer is None else normalizer)


def preference_loss(
    chosen: Tensor,  # (B,)
    rejected: Tensor,  # (B,)
) -> Tensor:  # ()
    """−log σ(chosen − rejected), the mean over pairs (Bradley–Terry) [5, §3.4]."""
    return -F.logsigmoid(chosen - rejected).mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -----------------------------------------------------------------------------
# data: records, queries, responses, batches, the corpus and its labeler. No model, no device.


class Post(NamedTuple):
    """A text with the summary its author wrote, in the fields of the TL;DR data set [5]."""

    subreddit: str
    title: str
    post: str
    summary: str
    record: dict | None = None  # as it stood in the file: a reward function may need more than the four fields

    def fields(self) -> dict[str, str]:
        return {"subreddit": self.subreddit, "title": self.title, "post": self.post, "summary": self.summary}


class Comparison(NamedTuple):
    """Two summaries of a post, one preferred to the other."""

    post: Post
    chosen: str
    rejected: str
    kinds: tuple[str, ...]  # the policies that wrote them, the batch, the confidence: accuracy is reported by each


# The Hub's copies of the TL;DR data hold whole queries, in columns named prompt, completion, chosen, rejected.
HUB_PROMPT = re.compile(r"SUBREDDIT: r/(.*?)\n\nTITLE: (.*?)\n\nPOST: (.*)\n\nTL;DR:\s*", re.DOTALL)


def text_field(record: dict, name: str) -> str:
    text = record.get(name)
    refuse(not isinstance(text, str), f"field '{name}' is missing or not text")
    refuse(any("\ud800" <= character <= "\udfff" for character in text), f"field '{name}' is not valid Unicode")
    return text


def parse_post(record: dict) -> Post:
    """A record of OpenAI's tldr_3_filtered files, or prompt and completion as on the Hub."""
    if "prompt" not in record:
        return Post(*(text_field(record, name) for name in ("subreddit", "title", "post", "summary")), record)
    match = HUB_PROMPT.fullmatch(text_field(record, "prompt"))
    refuse(match is None, "field 'prompt' does not read SUBREDDIT: r/... TITLE: ... POST: ... TL;DR:")
    return Post(*match.groups(), text_field(record, "completion").removesuffix("<|endoftext|>"), record)


def parse_comparison(record: dict) -> Comparison | None:
    """A record of OpenAI's comparison files (info, summaries, choice), or prompt, chosen, rejected as on the Hub.

    None for a comparison of another task: OpenAI's validation files hold CNN/DM articles too.
    """
    if "prompt" in record:
        texts, choice, kinds = [text_field(record, "chosen"), text_field(record, "rejected")], 0, ["unknown"]
        post = parse_post({"prompt": record["prompt"], "completion": ""})
    else:
        info, summaries, choice = record.get("info"), record.get("summaries"), record.get("choice")
        refuse(not isinstance(info, dict), "field 'info' is missing or not an object")
        if "article" in info and "post" not in info:
            return None
        pair = isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(s, dict) for s in summaries)
        refuse(not pair, "field 'summaries' is not two objects")
        texts = [text_field(summary, "text") for summary in summaries]
        refuse(type(choice) is not int or choice not in (0, 1), f"field 'choice' is {choice!r}, must be 0 or 1")
        kinds = [" vs ".join(sorted(str(summary.get("policy", "unknown")) for summary in summaries))]
        kinds += [str(record["batch"])] if "batch" in record else []
        extra = record.get("extra")
        kinds += [f"confidence {extra['confidence']}"] if isinstance(extra, dict) and "confidence" in extra else []
        post = parse_post({**info, "summary": ""})
    refuse(not all(text.strip() for text in texts), "one of the two texts is empty")
    return Comparison(post, texts[choice], texts[1 - choice], tuple(kinds))


TOLERATED = 0.01  # share of unusable records; more are an error


def read_records(path: Path, parse: Callable[[dict], NamedTuple | None]) -> tuple[list, list[str]]:
    """Parsed records of a JSON Lines file (.gz too), and complaints about what was left out: file, line, field."""
    records, unusable, others, number = [], [], 0, 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line.decode("utf-8"))
                    refuse(not isinstance(record, dict), "not a JSON object")
                    parsed = parse(record)
                    if parsed is None:
                        others += 1
                    else:
                        records.append(parsed)
                except (ValueError, RecursionError) as error:
                    unusable.append(f"line {number}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {error}") from None
    complaints = [f"{path}: {others:,} of {number:,} records are of another task"] if others else []
    if unusable:
        complaints.append(f"{path}: {len(unusable):,} of {number:,} records are unusable: {'; '.join(unusable[:3])}")
    refuse(len(unusable) > TOLERATED * number, f"{' '.join(complaints[-1:])} (at most {TOLERATED:.0%} may be)")
    refuse(not records, f"{path}: no records")
    return records, complaints


def write_records(records: Sequence[dict], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_json(record: dict, path: Path) -> None:
    path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def truncate_post(post: str, fits: Callable[[str], bool]) -> str:
    """Cut at the last newline while it does not fit; with none left, drop characters from the end [D2; 5, 4].

    `fits` must stay true when the text gets shorter: then the cut can be found by bisection, and a post of a
    megabyte takes twenty tests, not a million. InputError if not even the empty post fits.
    """
    if fits(post):
        return post
    refuse(not fits(""), "even an empty post does not fit: title and template are too long")
    newlines = [i for i, character in enumerate(post) if character == "\n"]
    fitting = bisect_left(newlines, True, key=lambda cut: not fits(post[:cut]))
    if fitting:
        return post[: newlines[fitting - 1]]
    longest = newlines[0] if newlines else len(post)
    return post[: bisect_left(range(longest), True, key=lambda cut: not fits(post[:cut])) - 1]


@dataclass(frozen=True)
class Codec:
    """Between text and token ids. Text never becomes a special token, not even text that spells one."""

    tokenizer: PreTrainedTokenizerBase
    data: Data = Data()

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids if texts else []

    @cached_property
    def start(self) -> list[int]:
        """BOS, for the tokenizers that put one before every text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a").input_ids[0] == bos else []

    def queries(self, posts: Sequence[Post]) -> list[list[int]]:
        """Formatted posts [D1], cut at a paragraph where they exceed `query_tokens` [D2]."""
        limit, queries = self.data.query_tokens, self.uncut(posts)
        refuse(not all(queries), "--data.query-format gives an empty query for a post without text")
        return [q if len(q) <= limit else self.cut_query(post) for post, q in zip(posts, queries)]

    def formatted(self, post: Post) -> str:
        return self.data.query_format.format(**post.fields())

    def uncut(self, posts: Sequence[Post]) -> list[list[int]]:
        return [self.start + query for query in self.encode([self.formatted(post) for post in posts])]

    def cut_query(self, post: Post) -> list[int]:
        def tokens(text: str) -> list[int]:
            return self.uncut([post._replace(post=text)])[0]

        return tokens(truncate_post(post.post, lambda text: len(tokens(text)) <= self.data.query_tokens))

    def check_title(self, post: Post) -> None:
        """InputError where template and title alone are too long for a query."""
        empty = post._replace(post="")
        if len(self.formatted(empty).encode()) >= self.data.query_tokens:  # fewer bytes are never more tokens
            tokens, limit = len(self.uncut([empty])[0]), self.data.query_tokens
            refuse(tokens > limit, f"template and title take {tokens} tokens, --data.query-tokens is {limit}")

    def responses(self, summaries: Sequence[str]) -> list[list[int]]:
        """One space, the summary, EOS [D1, D4]. Never cut: a cut response would lose its EOS."""
        return [[*tokens, self.eos_id] for tokens in self.encode([" " + summary.strip() for summary in summaries])]

    def text(self, response: Sequence[int]) -> str:
        """What a response says, without its EOS. Whatever else was written stays, special or not."""
        return self.tokenizer.decode([token for token in response if token != self.eos_id]).strip()


@dataclass(frozen=True)
class Batch:
    """Queries and responses as token ids. Lengths live in the rows; no pad id can be mistaken for anything [D3]."""

    queries: list[list[int]]
    responses: list[list[int]]  # up to and including EOS, where there is one

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        return Batch([self.queries[i] for i in rows], [self.responses[i] for i in rows])

    def __add__(self, other: Batch) -> Batch:
        return Batch(self.queries + other.queries, self.responses + other.responses)

    @property
    def lengths(self) -> list[int]:
        return [len(query) + len(response) for query, response in zip(self.queries, self.responses)]

    @property
    def response_tokens(self) -> int:
        return sum(map(len, self.responses))

    def whole_as_response(self) -> Batch:
        """The same rows, cut after their first token: every later token is then predicted, the query's too."""
        return Batch([q[:1] for q in self.queries], [q[1:] + r for q, r in zip(self.queries, self.responses)])

    def exchanged(self) -> Batch:
        """Every query with the response to another: a summarizer must find these much worse."""
        return Batch(self.queries, far_away(self.responses))


class Layout(NamedTuple):
    """A batch as tensors, for scoring and training."""

    tokens: Tensor  # (B, W) query, response, padding, contiguous
    index: Tensor  # (B, T) where the model has read everything before response token t
    responses: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool, True on response tokens


def lay_out(batch: Batch, device: torch.device | str = "cpu") -> Layout:
    """Pad on the right: causal models then need neither attention mask nor position ids [D5].

    No real token can see the padding behind it, so any valid id will do there [D3].
    """
    tokens = pad_right([q + r for q, r in zip(batch.queries, batch.responses)], device)
    responses = pad_right(batch.responses, device)
    T = responses.shape[1]
    mask = length_mask(torch.tensor([len(r) for r in batch.responses], device=device), T)
    before = torch.tensor([len(q) - 1 for q in batch.queries], device=device)
    index = before[:, None] + torch.arange(T, device=device)
    return Layout(tokens, index.clamp(max=tokens.shape[1] - 1), responses, mask)


def pad_right(rows: list[list[int]], device: torch.device | str) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def far_away(rows: list) -> list:
    """For each row the one half the list away: neighbours may come from one file, and be about one thing."""
    half = len(rows) // 2
    return rows[half:] + rows[:half]


def chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def micro_batches(lengths: Sequence[int], rows: Sequence[int], size: int) -> list[list[int]]:
    """Deal rows into groups of similar length: less padding, same result, since losses divide once [D20]."""
    return chunks(sorted(rows, key=lambda i: lengths[i]), size)


def rng(seed: int, purpose: str, *address: int) -> np.random.Generator:
    """Randomness by address: it depends on the seed, what it is for and where, on nothing drawn before [D25]."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *address])


def shuffled(seed: int, purpose: str, n: int, start: int, stop: int) -> list[int]:
    """Positions start to stop of an endless sequence of permutations of range(n), a fresh one each epoch [D19, D25]."""
    if stop <= start:
        return []
    epochs = range(start // n, (stop - 1) // n + 1)
    order = np.concatenate([rng(seed, purpose, epoch).permutation(n) for epoch in epochs])
    first = epochs.start * n
    return order[start - first : stop - first].tolist()


def noise(seed: int, purpose: str, episodes: Sequence[int], T: int) -> Tensor:  # (B, T) in [0, 1)
    """The numbers that decide what is sampled, addressed by the episode's global index [D25]."""
    return torch.from_numpy(np.stack([rng(seed, purpose, i).random(T, dtype=np.float32) for i in episodes]))


# The corpus of the default run: functions and classes document themselves in one line (the summary), then in
# paragraphs (the post). PEP 257 asks for exactly this, so the data set lies on every machine that can run this file.
LIBRARIES = ("python", "torch", "transformers", "numpy", "sympy", "networkx", "huggingface_hub")
NAME_OR_DOCSTRING = re.compile(r'\b(?:def|class)\s+(\w+)|:[ \t]*(?:#[^\n]*)?\n[ \t]*[rRuU]?"""(.*?)"""', re.DOTALL)
NOT_PROSE = re.compile(r">>>|\.\. |(examples?|references?|see also|notes?)\b|[^\n]*\n[-=~]{3,}", re.IGNORECASE)


def docstrings() -> Iterator[tuple[str, Post]]:
    """Pairs of file and post: subreddit = library, title = the name in words, summary = first line, post = the rest."""
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library) if library != "python" else None
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


def is_good_summary(summary: str) -> bool:
    return 20 <= len(summary) <= 80 and len(summary.split()) >= 4 and summary[0].isupper() and summary[-1] == "."


def build_corpus(documents: Iterator[tuple[str, Post]]) -> dict[str, list[Post]]:
    """Posts by file, without near-duplicates: the same summary but for identifiers, or the same first letters."""
    seen: set[str] = set()
    files: dict[str, list[Post]] = {}
    for file, post in documents:
        if not post.title or not is_good_summary(post.summary) or len(post.post.split()) < 8:
            continue
        words_alone = re.sub(r"`[^`]*`|\w*[A-Z0-9_]\w*|[^\w`]+|`", " ", post.summary[1:])
        keys = {" ".join(words_alone.split()), re.sub(r"\W+", "", post.post)[:60].lower()}
        if not keys & seen:
            body = truncate_post(post.post, lambda text: len(text) <= 240)
            files.setdefault(file, []).append(post._replace(post=body))
        seen |= keys
    return files


class Labeler:
    """The default run's stand-in for the human: which of two summaries is more about *this* post, and says only that?

    TF-IDF cosine between summary and post (title counted twice), less a penalty for each word that the post does not
    hold or that was said already. Words that fit every post weigh nothing in either, so style alone earns nothing.
    Document frequencies come from the training posts. Scores make comparisons and judge the end result; reward model
    and PPO never see them.
    """

    def __init__(self, posts: Sequence[Post]) -> None:
        self.posts = len(posts)
        self.seen_in = Counter(word for post in posts for word in set(self.words(post)))

    @staticmethod
    def words(text: str | Post) -> list[str]:
        if isinstance(text, Post):
            text = f"{text.title} {text.title} {text.post}"
        return [word[:6] for word in re.findall(r"[a-z]{2,}", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())]

    def rarity(self, word: str) -> float:
        """log(0.1 · N / df), and 0 for words in over a tenth of the posts."""
        return max(0.0, math.log(0.1 * (self.posts + 1) / (self.seen_in[word] + 1)))

    def weights(self, words: list[str]) -> dict[str, float]:
        """Unit vector of (1 + log tf) · rarity."""
        raw = {word: (1 + math.log(count)) * self.rarity(word) for word, count in Counter(words).items()}
        norm = math.sqrt(sum(x * x for x in raw.values())) or 1.0
        return {word: x / norm for word, x in raw.items()}

    def score(self, post: Post, summary: str) -> float:
        """Cosine − 0.2 · u / (1 + u), in (−0.2, 1].

        u counts unsupported and repeated words, each by its rarity: a word in no training post counts 1.
        """
        about, words = self.weights(self.words(post)), self.words(summary)
        cosine = sum(weight * about.get(word, 0.0) for word, weight in self.weights(words).items())
        unfit = sum(self.rarity(word) for i, word in enumerate(words) if word not in about or word in words[:i])
        u = unfit / max(1.0, math.log(0.1 * (self.posts + 1)))
        return cosine - 0.2 * u / (1 + u)


def rouge_l(summary: str, reference: str) -> float:
    """ROUGE-L F1: longest common subsequence of words, over the mean of both lengths [Lin 2004]."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (summary, reference))
    row = [0] * (len(b) + 1)
    for word in a:
        previous = row
        row = [0]
        for j, other in enumerate(b):
            row.append(previous[j] + 1 if word == other else max(previous[j + 1], row[j]))
    return 2 * row[-1] / max(1, len(a) + len(b))


# -----------------------------------------------------------------------------
# models: policy, scalar heads, forward passes, sampling. No losses, no training.


def train_tokenizer(posts: Sequence[Post], template: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE with an EOS and a pad token of its own; each fixed piece of the template is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for post in posts for text in (post.title, post.post, " " + post.summary)), trainer)
    # Without the space that ends a piece: it belongs to the next word, which then looks the same wherever it stands.
    bpe.add_tokens([literal.rstrip(" ") for literal, *_ in Formatter().parse(template) if literal.strip()])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|padding|>")


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
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPTNeoXForCausalLM(config)
    for i, (name, weight) in enumerate(model.named_parameters()):
        if weight.dim() == 2:
            noise = rng(seed, "small model", i).standard_normal(weight.shape, dtype=np.float32)
            weight.copy_((0.08 if "embed" in name else 0.05) * torch.from_numpy(noise))
    return model


def load_pretrained(auto: type, folder: str | Path, **options: object):
    """A transformers object from a folder or the Hub; whatever goes wrong becomes one line that names the folder."""
    looks_local = str(folder).startswith((".", "/", "~")) or str(folder).count("/") > 1
    refuse(looks_local and not Path(folder).is_dir(), f"{folder}: no such folder")
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # whatever a broken folder makes transformers raise
        raise InputError(f"{folder}: cannot load: {' '.join(str(error).split())[:200]}") from None


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, folder)
    refuse(tokenizer.eos_token_id is None, f"{folder}: the tokenizer has no EOS token, and responses must end with one")
    return tokenizer


def load_policy(folder: str | Path) -> PreTrainedModel:
    """A causal language model, weights in float32 [D21], dropout off: it stays in eval mode, always [D11]."""
    from transformers import AutoModelForCausalLM

    return load_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32).eval()


class ScalarModel(nn.Module):
    """One number per position, w·h + b, on a transformers decoder: reward model and value model.

    It wraps AutoModelForSequenceClassification with one label, whose head has no bias. A reward model's b is fixed at
    −offset (see `center`) and saved as `score_offset` in the folder's config [D9]; a value model's b is trained [D10].
    """

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
        from transformers import AutoModelForSequenceClassification

        options = {"num_labels": 1, "dtype": torch.float32, "output_loading_info": True}
        classifier, info = load_pretrained(AutoModelForSequenceClassification, folder, **options)
        if new_head is None:
            refuse(
                bool(info["missing_keys"]), f"{folder}: not a reward model, it has no {list(info['missing_keys'])[:1]}"
            )
        else:
            weight = classifier.score.weight
            noise = new_head.standard_normal(weight.shape) / math.sqrt(weight.shape[1] + 1)
            classifier.score.weight = nn.Parameter(torch.from_numpy(noise).float())
        return cls(classifier.eval(), train_bias)

    def values(self, layout: Layout) -> Tensor:  # (B, T) of the state before each response token
        return self(layout.tokens, layout.index)

    def scores(self, layout: Layout) -> Tensor:  # (B,) read at the last response token, EOS [D8]
        last = layout.index[:, :1] + layout.mask.sum(1, keepdim=True)
        return self(layout.tokens, last).squeeze(1)

    def forward(self, tokens: Tensor, index: Tensor) -> Tensor:  # (B, W), (B, T) -> (B, T)
        hidden = take(self.classifier.base_model(input_ids=tokens, use_cache=False).last_hidden_state, index)
        with torch.autocast(hidden.device.type, enabled=False):  # eight bits would tie scores and round values
            return self.classifier.score(hidden.float()).squeeze(-1) + self.bias

    @property
    def preferences_of(self) -> str | None:
        """Whose comparisons it learned, "humans" or "labeler", where its folder says so."""
        return getattr(self.classifier.config, "preferences_of", None)

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


def save_model(
    model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """A plain transformers folder with these weights, which are `Engine.weights(model)`. Its pad id is in range and not
    EOS, so that transformers' own sequence classification, which reads the last token that is not padding, reads the
    score at EOS [D3]."""
    eos, pad, size = tokenizer.eos_token_id, tokenizer.pad_token_id, model.config.vocab_size
    if pad is None or pad == eos or pad >= size:
        candidates = [token for token in tokenizer.all_special_ids if token != eos and token < size]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens([*candidates, 0 if eos != 0 else 1][0])
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = eos
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def take(hidden: Tensor, index: Tensor) -> Tensor:  # (B, W, D), (B, T) -> (B, T, D)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


@contextmanager
def head_at(policy: PreTrainedModel, index: Tensor) -> Iterator[list[Tensor]]:
    """Inside, the vocabulary head sees positions `index` (B, T) only; yields a list that receives its input (B, T, D).

    The head is the widest layer, and most positions are query. Selecting where the hidden states enter it, rather
    than calling it ourselves, keeps whatever else the model does to its logits (scaling, soft-capping).
    """
    entered: list[Tensor] = []

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entered.append(take(args[0], index))
        return (entered[-1], *args[1:])

    hook = policy.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield entered
    finally:
        hook.remove()


def response_logits(policy: PreTrainedModel, layout: Layout) -> tuple[Tensor, Tensor]:  # (B, T, V), (B, T, D)
    """Logits that predict each response token, and the hidden states they come from."""
    with head_at(policy, layout.index) as entered:
        logits = policy(input_ids=layout.tokens, use_cache=False).logits
    return logits, entered[0]


def logits_and_values(
    policy: PreTrainedModel, value_model: ScalarModel | ValueHead, layout: Layout
) -> tuple[Tensor, Tensor]:  # (B, T, V), (B, T)
    logits, hidden = response_logits(policy, layout)
    values = value_model(hidden) if isinstance(value_model, ValueHead) else value_model.values(layout)
    return logits, values


@torch.no_grad()
def map_rows(batch: Batch, engine: Engine, function: Callable[[Layout], Sequence[Tensor]]) -> list[Tensor]:
    """`function` of every row, in micro-batches of similar length, without gradient.

    It maps a layout to tensors (b,) or (b, t); the results come back in the batch's order, (B,) or (B, T), with 0 in
    padding whatever the function left there.
    """
    results: list[Tensor] = []
    T = max(map(len, batch.responses))
    with engine.timed("forwards"):
        for rows, counts in engine.deal(micro_batches(batch.lengths, range(len(batch)), engine.micro_batch_size)):
            layout = engine.lay_out(batch[rows])
            with engine.autocast():
                parts = function(layout)
            if not results:
                results = [part.new_zeros((len(batch), T)[: part.dim()]) for part in parts]
            for result, part in zip(results, parts if counts else ()):
                if part.dim() == 1:
                    result[rows] = part
                else:
                    result[rows, : part.shape[1]] = part.masked_fill(~layout.mask, 0)
    engine.add_up(results)
    return results


def scores_of(model: ScalarModel, batch: Batch, engine: Engine) -> Tensor:  # (B,)
    return map_rows(batch, engine, lambda layout: [model.scores(layout)])[0]


def response_logprobs(policy: PreTrainedModel, layout: Layout, temperature: float) -> Tensor:  # (B, T)
    return logprobs_of(response_logits(policy, layout)[0], layout.responses, temperature)


def sample(
    policy: PreTrainedModel,
    queries: list[list[int]],
    uniforms: Tensor,  # (B, T) in [0, 1)
    temperature: float,
    eos_id: int,
    engine: Engine,
) -> list[list[int]]:
    """A response per query from softmax(logits / temperature), nothing cut or warped, up to and including EOS."""
    blocks = engine.deal(chunks(range(len(queries)), engine.sample_batch_size))
    responses: dict[int, list[int]] = {}
    with engine.timed("sampling"), engine.autocast(), engine.gathered(policy):
        for rows, counts in blocks:
            block = sample_block(policy, [queries[i] for i in rows], uniforms[rows], temperature, eos_id, engine)
            responses |= zip(rows, block) if counts else ()
    responses = engine.gather(responses)
    return [responses[i] for i in range(len(queries))]


@torch.no_grad()
def sample_block(
    policy: PreTrainedModel, queries: list[list[int]], uniforms: Tensor, temperature: float, eos_id: int, engine: Engine
) -> list[list[int]]:
    """Token t of row b is where `uniforms[b, t]` falls in the cumulative distribution: the only randomness, so that a
    response does not depend on its neighbours [D25]. Here alone queries are padded on the left [D5]."""
    T, Q = uniforms.shape[1], max(map(len, queries))
    tokens = torch.tensor([[0] * (Q - len(q)) + q for q in queries], device=engine.device)
    attention = torch.tensor([[0] * (Q - len(q)) + [1] * len(q) for q in queries], device=engine.device)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    last = torch.full((len(queries), 1), Q - 1, device=engine.device)
    uniforms = uniforms.to(engine.device)
    ended = torch.zeros_like(last, dtype=torch.bool)
    cache, written = None, []
    cache_name = "cache" if "cache" in inspect.signature(policy.forward).parameters else "past_key_values"
    while len(written) < T and not ended.all():
        with head_at(policy, last):
            inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": positions}
            output = policy(**inputs, **{cache_name: cache}, use_cache=True)
        cache = output[cache_name]
        cumulative = (output.logits[:, -1].float() / temperature).softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        threshold = torch.minimum(uniforms[:, len(written), None] * total, total.nextafter(torch.zeros_like(total)))
        # Below the total, and with right=True above what it passes: a token of probability 0 is never chosen.
        tokens = torch.searchsorted(cumulative, threshold, right=True)
        written.append(tokens)
        ended |= tokens == eos_id
        positions = positions[:, -1:] + 1
        attention = torch.cat([attention, torch.ones_like(tokens)], dim=1)
        last = torch.zeros_like(last)
    responses = torch.cat(written, dim=1)
    lengths = response_mask(responses, eos_id).sum(1).tolist()
    engine.count(sum(lengths), responses.numel())
    return [response[:length] for response, length in zip(responses.tolist(), lengths)]


# -----------------------------------------------------------------------------
# stages: what a run does, in order. Each reads files and folders and writes files and folders.

# How every stage takes a step: a list of minibatches, each cut into micro-batches, a function that gives a
# micro-batch's share of the minibatch's loss and statistics, and one optimizer step for the sum.


def adamw(*groups: dict, beta2: float = 0.999) -> torch.optim.AdamW:
    """AdamW, eps 1e-5, no weight decay [D21; 4]. Each group names its parameters and learning rate."""
    groups = [group | {"initial_lr": group["lr"]} for group in groups]
    return torch.optim.AdamW(groups, betas=(0.9, beta2), eps=1e-5, weight_decay=0.0, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def warmup(step: int, steps: int) -> float:
    """Up to 1 over the first 50 steps, or the first tenth where that is less."""
    return min(1.0, (step + 1) / max(1, min(50, steps // 10)))


def cosine(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return (1 + math.cos(math.pi * progress)) / 2


def optimizer_step(
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    groups: list[list[int]],
    losses: Callable[[list[int]], dict[str, Tensor]],
) -> dict[str, float]:
    """One step on a minibatch given as micro-batches.

    `losses(rows)` returns the micro-batch's share of each statistic, "loss" among them, divided by the count of the
    whole minibatch: so gradients and statistics of the parts simply add up [D20].
    """
    with engine.timed("training"):
        optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        for rows, counts in engine.deal(groups):
            with engine.autocast():
                shares = losses(rows)
            engine.backward(shares["loss"] * counts)
            totals = {name: totals.get(name, 0.0) + share.detach() * counts for name, share in shares.items()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        engine.add_up([*totals.values()])
        totals["grad_norm"] = engine.finish_gradients(parameters)
        statistics = {name: float(total) for name, total in totals.items()}
        for name in ("loss", "grad_norm"):
            value = statistics[name]
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value}, so no step was taken; try a lower learning rate [D22]")
        optimizer.step()
    return statistics | {"lr": optimizer.param_groups[0]["lr"]}


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


def pretrain(run: Run) -> None:
    """A tokenizer and a base model that can copy, where the user brings no pretrained model."""
    config = run.config
    posts = run.posts("train")
    tokenizer = train_tokenizer(posts, config.data.query_format, config.pretrain.vocab_size)
    codec, model = Codec(tokenizer, config.data), small_model(config.pretrain, tokenizer, config.seed)
    model = run.engine.place(model)
    posts = run.posts("train", codec)
    titles = Batch(codec.queries(posts), codec.responses([post.title for post in posts]))
    train_language_model(run, "pretrain", model, titles, config.pretrain, 1.0, schedule=lambda progress: 1.0)
    run.write("base", partial(save_model, model, run.engine.weights(model), tokenizer))


def sft(run: Run) -> None:
    """Supervised fine-tuning: −log π(summary and EOS | query) [D4, D6]."""
    config, codec = run.config.sft, run.codec(run.base)
    model = run.engine.place(load_policy(run.base))
    check_room(model, run.config.data)
    train, valid = run.examples("train", codec), run.examples("valid", codec)
    train_language_model(run, "sft", model, train, config, config.prompt_weight, cosine)
    right = held_out_loss(model, valid, run.engine)
    wrong = held_out_loss(model, valid.exchanged(), run.engine)
    run.log({"valid/loss": right, "valid/loss_other_post": wrong})
    run.say(f"held-out loss {right:.3f} nats per token, {wrong:.3f} with another post's summary")
    run.write("sft", partial(save_model, model, run.engine.weights(model), codec.tokenizer))


def author_responses(codec: Codec, posts: Sequence[Post], model: PreTrainedModel) -> list[list[int]]:
    """The authors' summaries, however long, up to where the model has no more positions."""
    room = getattr(model.config, "max_position_embeddings", 10**9) - codec.data.query_tokens
    return [response[:room] for response in codec.responses([post.summary for post in posts])]


def check_room(model: PreTrainedModel, data: Data) -> None:
    """Refuse sequences longer than the model has positions for."""
    response = max(data.response_tokens, data.comparison_tokens)
    need, have = data.query_tokens + response, getattr(model.config, "max_position_embeddings", math.inf)
    flags = f"--data.query-tokens {data.query_tokens} and responses of {response}"
    refuse(need > have, f"{flags} need {need} positions, {model.config.name_or_path} has {have}")


def train_language_model(
    run: Run,
    stage: str,
    model: PreTrainedModel,
    batch: Batch,
    config: Pretrain | SFT,
    prompt_weight: float,
    schedule: Callable[[float], float],
) -> None:
    order = shuffled(run.config.seed, stage, len(batch), 0, max(1, round(config.epochs * len(batch))))
    steps = chunks(order, config.batch_size)
    millions, vocabulary = model.num_parameters() / 1e6, model.config.vocab_size
    run.say(
        f"{model.config.model_type}, {millions:.2f}M parameters, vocabulary {vocabulary:,}; {len(batch):,} examples"
    )
    optimizer = adamw({"params": model.parameters(), "lr": config.lr}, beta2=run.engine.adam_beta2)
    for step in run.steps(stage, len(steps), optimizer, model=model):
        set_lr(optimizer, warmup(step, len(steps)) * schedule(step / len(steps)))
        minibatch = batch[steps[step]]
        groups = micro_batches(minibatch.lengths, range(len(minibatch)), run.engine.micro_batch_size)
        losses = partial(language_model_losses, model, minibatch, prompt_weight, run.engine)
        run.log(optimizer_step(run.engine, optimizer, groups, losses))


def language_model_losses(
    model: PreTrainedModel, minibatch: Batch, prompt_weight: float, engine: Engine, rows: list[int]
) -> dict[str, Tensor]:
    """Shares of the minibatch's loss: mean over response tokens + prompt_weight · mean over query tokens [D6]."""
    part = minibatch[rows]
    layout = engine.lay_out(part.whole_as_response() if prompt_weight else part)
    losses = -response_logprobs(model, layout, temperature=1.0)
    query_lengths = torch.tensor([len(q) - 1 for q in part.queries], device=engine.device) * bool(prompt_weight)
    of_query = length_mask(query_lengths, losses.shape[1])
    response_loss = aggregate(losses, layout.mask & ~of_query, "token", minibatch.response_tokens)
    query_loss = aggregate(losses, of_query, "token", sum(len(q) - 1 for q in minibatch.queries))
    return {
        "loss": response_loss + prompt_weight * query_loss,
        "loss/response": response_loss,
        "loss/query": query_loss,
    }


def held_out_loss(model: PreTrainedModel, batch: Batch, engine: Engine) -> float:
    """Nats per response token."""
    (logprobs,) = map_rows(batch, engine, lambda layout: [response_logprobs(model, layout, temperature=1.0)])
    return -logprobs.sum().item() / batch.response_tokens


def compare(run: Run) -> None:
    """Comparisons where the user has none: the labeler judges samples of the SFT model."""
    config, seed = run.config, run.config.seed
    codec, policy = run.codec(run.sft_model), run.engine.place(load_policy(run.sft_model))
    check_room(policy, config.data)
    labeler = Labeler(run.posts("train"))
    for split, limit in (("train", config.compare.posts), ("valid", None)):
        posts = run.posts(split, codec)
        posts = [posts[i] for i in rng(seed, f"compare {split}").permutation(len(posts))[:limit]]
        queries = codec.queries(posts)
        drafts: list[list[str]] = []
        for k in run.steps(f"compare {split}", config.compare.samples):
            uniforms = noise(seed, f"compare {split} {k}", range(len(posts)), config.data.response_tokens)
            responses = sample(policy, queries, uniforms, config.ppo.temperature, codec.eos_id, run.engine)
            drafts.append([codec.text(response) for response in responses])
        records = []
        for i, post in enumerate(posts):
            ranked = sorted((draft[i] for draft in drafts), key=partial(labeler.score, post))
            stranger = drafts[0][(i + 1) % len(posts)]
            records += judge(labeler, post, ("sft", ranked[-1]), ("sft", ranked[0]), flip=i % 2 == 1)
            records += judge(labeler, post, ("sft", drafts[0][i]), ("other post", stranger), flip=i % 2 == 0)
        refuse(not records, f"the labeler saw no difference between any two samples for the {split} posts")
        run.write(f"data/comparisons_{split}.jsonl", partial(write_records, records))
        run.say(f"{len(records):,} {split} comparisons from {len(posts):,} posts, ties dropped")


def judge(labeler: Labeler, post: Post, a: tuple[str, str], b: tuple[str, str], flip: bool) -> list[dict]:
    """The labeler's comparison of two (policy, text) as a record of OpenAI's format; none of a tie or an empty text."""
    summaries = [b, a] if flip else [a, b]
    scores = [labeler.score(post, text) for _, text in summaries]
    if scores[0] == scores[1] or not all(text.strip() for _, text in summaries):
        return []
    info = {"subreddit": post.subreddit, "title": post.title, "post": post.post}
    candidates = [{"policy": policy, "text": text} for policy, text in summaries]
    return [{"info": info, "summaries": candidates, "choice": int(scores[1] > scores[0])}]


def reward(run: Run) -> None:
    """The reward model: −log σ(score of chosen − score of rejected) [5, §3.4], then centred [D9]."""
    config, engine, seed = run.config.reward, run.engine, run.config.seed
    codec = run.codec(run.sft_model)
    model = engine.place(ScalarModel.load(run.sft_model, new_head=rng(seed, "reward head")))
    check_room(model.classifier, run.config.data)
    model.classifier.config.preferences_of = "humans" if run.config.data.comparisons_train else "labeler"
    summaries = run.examples("train", codec)
    own = summaries[shuffled(seed, "pretraining", len(summaries), 0, min(len(summaries), config.pretraining_pairs))]
    chosen, rejected, _ = run.pairs("train", codec)
    order = shuffled(seed, "reward", len(chosen), 0, max(1, round(config.epochs * len(chosen))))
    order = [*range(len(own)), *(len(own) + i for i in order)]
    chosen, rejected = own + chosen, own.exchanged() + rejected
    lengths = list(map(max, chosen.lengths, rejected.lengths))
    steps = chunks(order, config.batch_size)
    trained = {"params": [p for p in model.parameters() if p.requires_grad], "lr": config.lr}
    optimizer = adamw(trained, beta2=engine.adam_beta2)
    for step in run.steps("reward", len(steps), optimizer, model=model):
        set_lr(optimizer, warmup(step, len(steps)) * cosine(step / len(steps)))
        groups = micro_batches(lengths, steps[step], engine.micro_batch_size)
        losses = partial(reward_losses, model, chosen, rejected, len(steps[step]), engine)
        run.log(optimizer_step(engine, optimizer, groups, losses))
    model.center(scores_of(model, summaries, engine).mean().item())
    accuracies = reward_accuracies(model, run.pairs("valid", codec), engine)
    run.log({f"valid/accuracy {kind}": accuracy for kind, (accuracy, _) in accuracies.items()})
    if accuracies["all"][0] < 0.55:
        run.warn(["the reward model is hardly better than chance; PPO would follow noise"])
    cells = [[kind, f"{accuracy:.3f}", f"{pairs:,}"] for kind, (accuracy, pairs) in accuracies.items()]
    run.say(table([["held-out pairs", "accuracy", "pairs"], *cells]))
    run.write("reward", partial(model.save, engine.weights(model), codec.tokenizer))


def reward_losses(
    model: ScalarModel, chosen: Batch, rejected: Batch, pairs: int, engine: Engine, rows: list[int]
) -> dict[str, Tensor]:
    """Shares of the minibatch's loss and accuracy; a tie counts half [D8]."""
    better, worse = model.scores(engine.lay_out(chosen[rows] + rejected[rows])).chunk(2)
    share = len(rows) / pairs
    return {
        "loss": preference_loss(better, worse) * share,
        "accuracy": win_rate(better, worse) * share,
        "margin": (better - worse).mean() * share,
    }


def wins_of(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """1 where a is higher, ½ for a tie."""
    return (a > b) + (a == b) / 2


def win_rate(a: Tensor, b: Tensor) -> Tensor:
    """Share of places where a > b; ties count ½."""
    return wins_of(a, b).mean()


def reward_accuracies(
    model: ScalarModel, pairs: tuple[Batch, Batch, list[tuple[str, ...]]], engine: Engine
) -> dict[str, tuple[float, int]]:
    """Share of pairs ranked as the judge ranked them, and their number: of all, and of each kind."""
    chosen, rejected, kinds = pairs
    better, worse = scores_of(model, chosen, engine), scores_of(model, rejected, engine)
    groups = {"all": range(len(kinds))}
    groups |= {kind: [i for i, of in enumerate(kinds) if kind in of] for kind in sorted(set(chain(*kinds)))}
    return {kind: (win_rate(better[rows], worse[rows]).item(), len(rows)) for kind, rows in groups.items()}


@dataclass(frozen=True)
class Models:
    """The four models of PPO; two learn, two are frozen. A rule may stand in for the reward model."""

    policy: PreTrainedModel
    value_model: ScalarModel | ValueHead
    ref_policy: PreTrainedModel
    reward_model: ScalarModel | RewardFunction


class Rollout(NamedTuple):
    """A batch of episodes: what was written, and what the models of that moment thought of it. 0 in padding."""

    batch: Batch
    mask: Tensor  # (B, T) bool
    logprobs: Tensor  # (B, T) of the policy that sampled, by a training forward pass [D14]
    ref_logprobs: Tensor  # (B, T)
    entropy: Tensor  # (B, T)
    values: Tensor  # (B, T)
    scores: Tensor  # (B,) the reward model's or the rule's
    has_eos: Tensor  # (B,) bool


def ppo(run: Run) -> None:
    """Proximal policy optimisation against the reward model [1; 4]."""
    config, engine, seed, T = run.config.ppo, run.engine, run.config.seed, run.config.data.response_tokens
    codec, models = run.codec(run.sft_model), load_models(run)
    posts, valid = run.posts("train", codec), run.posts("valid", codec)
    queries, labeler = codec.queries(posts), Labeler(posts)
    optimizer = adamw(
        {"params": models.policy.parameters(), "lr": config.lr},
        {"params": models.value_model.parameters(), "lr": config.value_lr},
        beta2=engine.adam_beta2,
    )
    run.say(
        f"{config.num_updates} updates of {config.batch_size} responses, "
        f"{config.num_ppo_epochs} epochs of {config.num_minibatches} minibatches"
    )
    history = run.logged("ppo")  # empty, but in a resumed run
    trained = {"policy": models.policy, "value_model": models.value_model}
    for update in run.steps("ppo", config.num_updates, optimizer, **trained):
        engine.statement()  # what came before is not this update's
        set_lr(optimizer, 1 - update / config.num_updates)
        episodes = range(update * config.batch_size, (update + 1) * config.batch_size)
        picked = shuffled(seed, "episodes", len(posts), episodes.start, episodes.stop)
        uniforms = noise(seed, "episodes", episodes, T)
        score = partial(outcome_scores, models.reward_model, [posts[i] for i in picked], codec, engine)
        rollout = roll_out(models, [queries[i] for i in picked], uniforms, score, codec.eos_id, config, engine)
        rewards = shape_rewards(rollout, config)
        advantages, returns = gae(rewards, rollout.values, rollout.mask, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, rollout.mask)
        steps = []
        for epoch in range(config.num_ppo_epochs):
            order = rng(seed, "minibatches", update, epoch).permutation(config.batch_size).tolist()
            for minibatch in chunks(order, config.minibatch_size):
                groups = micro_batches(rollout.batch.lengths, minibatch, engine.micro_batch_size)
                losses = partial(ppo_losses, models, rollout, advantages, returns, minibatch, config, engine)
                steps.append(optimizer_step(engine, optimizer, groups, losses))
        watched = [labeler.score(posts[i], codec.text(r)) for i, r in zip(picked, rollout.batch.responses)]
        statistics = rollout_statistics(rollout, config) | step_statistics(steps)
        history.append(statistics | {"objective/labeler": sum(watched) / len(watched)})
        run.log(history[-1] | engine.statement())
        run.warn(bad_signs(history))
        if update % config.sample_every == 0:
            show_sample(run, update, valid, codec, models)
        if config.max_kl is not None and statistics["objective/kl"] > config.max_kl:
            run.say(f"stopped: KL {statistics['objective/kl']:.2f} exceeds --ppo.max-kl {config.max_kl}")
            break
    run.write("ppo", partial(save_model, models.policy, engine.weights(models.policy), codec.tokenizer))


def load_models(run: Run) -> Models:
    """Policy and reference from SFT; value model from the reward model [D10], or, with a rule, from SFT with head 0."""
    place = run.engine.place  # each at once: sharded models should not wait whole for one another
    policy = place(load_policy(run.sft_model))
    ref_policy = place(load_policy(run.sft_model).requires_grad_(False))
    check_room(policy, run.config.data)
    reward_model = load_scorer(run)
    if run.config.ppo.value_model == "shared":
        value_model = ValueHead(policy.get_output_embeddings().weight.shape[1])
    elif isinstance(reward_model, ScalarModel):
        value_model = ScalarModel.load(run.reward_model, train_bias=True)
    else:
        value_model = ScalarModel.load(run.sft_model, train_bias=True, new_head=rng(run.config.seed, "value head"))
        nn.init.zeros_(value_model.classifier.score.weight)
    return Models(policy, place(value_model), ref_policy, reward_model)


def load_scorer(run: Run) -> ScalarModel | RewardFunction:
    """What PPO is trained on: a frozen reward model, or a rule [7]."""
    if run.config.ppo.reward_function is not None:
        return load_function("--ppo.reward-function", run.config.ppo.reward_function)
    return load_reward_model(run, run.reward_model)


def check_tokenizer(run: Run, folder: str | Path) -> None:
    """Refuse a model that reads other tokens than the SFT model writes."""
    same = load_tokenizer(folder).get_vocab() == load_tokenizer(run.sft_model).get_vocab()
    refuse(not same, f"{folder} and {run.sft_model} have different tokenizers; all models of a run need one")


def load_reward_model(run: Run, folder: str | Path) -> ScalarModel:
    check_tokenizer(run, folder)
    return run.engine.place(ScalarModel.load(folder).requires_grad_(False))


def load_function(flag: str, place: str) -> Callable:
    """module:function, from the working directory or installed."""
    module, _, name = place.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
        refuse(not callable(function), "it cannot be called")
        return function
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{flag} {place}, which should name module:function: {error}") from None
    finally:
        sys.path.pop(0)


RewardFunction = Callable[[str, str, dict], float]  # of post, response, record


def outcome_scores(
    scorer: ScalarModel | RewardFunction, posts: Sequence[Post], codec: Codec, engine: Engine, batch: Batch
) -> Tensor:  # (B,)
    """Scores of responses to posts: a reward model's, read at EOS, or what a rule verifies of their text [7]."""
    if isinstance(scorer, nn.Module):
        return scores_of(scorer, batch, engine)
    scores = []
    for post, response in zip(posts, batch.responses) if engine.rank == 0 else ():
        text = codec.text(response)
        score = scorer(post.post, text, post.record)
        try:
            scores.append(float(score))
        except (TypeError, ValueError):
            scores.append(math.nan)
        usable = math.isfinite(scores[-1])
        refuse(not usable, f"--ppo.reward-function returned {score!r}, not a finite number, for {text[:60]!r}")
    scores = engine.agree(scores)  # one process asks the rule: it may cost, and need not say the same twice
    return torch.tensor(scores, dtype=torch.float32, device=engine.device)


def roll_out(
    models: Models,
    queries: list[list[int]],
    uniforms: Tensor,  # (B, T)
    score: Callable[[Batch], Tensor],
    eos_id: int,
    config: PPO,
    engine: Engine,
) -> Rollout:
    """Sample a response to each query and look at it with all four models."""
    temperature = config.temperature
    batch = Batch(queries, sample(models.policy, queries, uniforms, temperature, eos_id, engine))

    def policy_and_value(layout: Layout) -> list[Tensor]:
        logits, values = logits_and_values(models.policy, models.value_model, layout)
        return [logprobs_of(logits, layout.responses, temperature), entropy_of(logits, temperature), values]

    def reference(layout: Layout) -> list[Tensor]:
        return [response_logprobs(models.ref_policy, layout, temperature)]

    logprobs, entropy, values = map_rows(batch, engine, policy_and_value)
    (ref_logprobs,) = map_rows(batch, engine, reference)
    lengths = torch.tensor([len(response) for response in batch.responses], device=engine.device)
    has_eos = torch.tensor([response[-1] == eos_id for response in batch.responses], device=engine.device)
    mask = length_mask(lengths, logprobs.shape[1])
    rollout = Rollout(batch, mask, logprobs, ref_logprobs, entropy, values, score(batch), has_eos)
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        finite = getattr(rollout, name).isfinite().all()
        if not finite:
            raise Diverged(f"{name} of the rollout are not finite: that model's weights or activations are not [D22]")
    return rollout


def shape_rewards(rollout: Rollout, config: PPO) -> Tensor:  # (B, T)
    """Score at EOS [D12] minus the price of KL [D15], scaled if asked [D16]."""
    scores = penalize_missing_eos(rollout.scores, rollout.has_eos, config.missing_eos_score)
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, config.kl_kind)
    rewards = token_rewards(scores, kl, rollout.mask, config.kl_coef if config.kl_in == "reward" else 0.0)
    return whiten(rewards, rollout.mask, shift_mean=False) if config.whiten_rewards else rewards


def ppo_losses(
    models: Models,
    rollout: Rollout,
    advantages: Tensor,  # (B, T)
    returns: Tensor,  # (B, T)
    minibatch: list[int],
    config: PPO,
    engine: Engine,
    rows: list[int],
) -> dict[str, Tensor]:
    """A micro-batch's shares of the minibatch's loss and statistics [1, eq. 9; D20]."""
    layout = engine.lay_out(rollout.batch[rows])
    T = layout.mask.shape[1]
    logits, values = logits_and_values(models.policy, models.value_model, layout)
    # Zeroed padding first: what stands there must not meet exp() or a square, whose NaN gradients no mask removes.
    logprobs = logprobs_of(logits, layout.responses, config.temperature).masked_fill(~layout.mask, 0)
    values = values.masked_fill(~layout.mask, 0)
    old_logprobs, old_values = rollout.logprobs[rows, :T], rollout.values[rows, :T]
    policy_losses = policy_loss(logprobs, old_logprobs, advantages[rows, :T], config.cliprange)
    value_losses = value_loss(values, old_values, returns[rows, :T], config.cliprange_value)

    count = rollout.mask[minibatch].sum() if config.average == "token" else len(minibatch)
    share = partial(aggregate, mask=layout.mask, how=config.average, normalizer=count)
    loss = share(policy_losses) + config.vf_coef * share(value_losses)
    if config.kl_in == "loss":
        loss = loss + config.kl_coef * share(kl_estimate(logprobs, rollout.ref_logprobs[rows, :T], config.kl_kind))
    with torch.no_grad():
        log_ratio = logprobs - old_logprobs
        unclipped = -log_ratio.exp() * advantages[rows, :T]
        return {
            "loss": loss,
            "loss/policy": share(policy_losses),
            "loss/value": share(value_losses),
            "policy/approxkl": share(log_ratio.square() / 2),
            "policy/clipfrac": share((policy_losses > unclipped).float()),
            "val/clipfrac": share((2 * value_losses > (values - returns[rows, :T]).square()).float()),
            "val/ratio": share(log_ratio.exp()),
            "policy/abs_log_ratio": share(log_ratio.abs()),
        }


def rollout_statistics(rollout: Rollout, config: PPO) -> dict[str, float]:
    """What [4] logs of a rollout; `objective/` are means over responses of sums over their tokens [D23]."""
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1).mean().item()
    scores = penalize_missing_eos(rollout.scores, rollout.has_eos, config.missing_eos_score).mean().item()
    unwhitened = shape_rewards(rollout, replace(config, whiten_rewards=False)).sum(1).mean().item()
    return {
        "objective/scores": scores,
        "objective/kl": kl,
        "objective/entropy": rollout.entropy.sum(1).mean().item(),
        "objective/non_score_reward": unwhitened - scores,
        "objective/rlhf_reward": unwhitened,
        "policy/entropy": masked_mean(rollout.entropy, rollout.mask).item(),
        "val/num_eos_tokens": rollout.has_eos.sum().item(),
        "val/eos_rate": rollout.has_eos.float().mean().item(),
        "val/response_tokens": rollout.mask.sum(1).float().mean().item(),
        "val/longest_response": rollout.mask.sum(1).max().item(),
    }


def bad_signs(history: list[dict[str, float]]) -> Iterator[str]:
    """What the statistics of the updates so far warn of."""
    last, quarter = history[-1], len(history) // 4
    if last["policy/first_abs_log_ratio"] > 0.02:
        yield "the first ratio of a batch is not 1: old log-probabilities do not come from the same computation [D14]"
    if last["val/eos_rate"] < 0.5:
        yield "fewer than half of the responses end: raise --data.response-tokens or lower --ppo.missing-eos-score"
    if last["policy/clipfrac"] > 0.5:
        yield "over half of the tokens are clipped: the step is too large, lower --ppo.lr"
    if quarter >= 2:
        means = [
            {name: sum(update[f"objective/{name}"] for update in part) / quarter for name in ("scores", "labeler")}
            for part in (history[:quarter], history[-quarter:])
        ]
        if means[1]["scores"] > means[0]["scores"] and means[1]["labeler"] < means[0]["labeler"] - 0.02:
            yield "scores rise while the labeler's fall: reward hacking, raise --ppo.kl-coef"


def step_statistics(steps: list[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of an update; `first_` is before the first step, where π is still π_old [D14]."""
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    first = {f"policy/first_{name}": steps[0][f"policy/{name}"] for name in ("approxkl", "abs_log_ratio")}
    return means | first


def headline(post: Post) -> str:
    """What a post is about, and its end, for the screen."""
    return f"    r/{post.subreddit}, {post.title}: ...{' '.join(post.post.split())[-80:]}"


def show_sample(run: Run, update: int, posts: list[Post], codec: Codec, models: Models) -> None:
    """One validation post: the author's line, SFT's and the policy's next-to-greedy summaries, with scores."""
    post = posts[update % len(posts)]
    queries = codec.queries([post])
    uniforms = noise(run.config.seed, "show", [update], run.config.data.response_tokens)
    written = {"author": author_responses(codec, [post], models.policy)}
    for name, policy in (("sft", models.ref_policy), ("ppo", models.policy)):
        written[name] = sample(policy, queries, uniforms, run.config.evaluate.temperature, codec.eos_id, run.engine)
    record = (
        {"update": update} | post.fields() | {name: codec.text(responses[0]) for name, responses in written.items()}
    )
    run.say(headline(post))
    for name, responses in written.items():
        score = outcome_scores(models.reward_model, [post], codec, run.engine, Batch(queries, responses)).item()
        record[f"{name}_score"] = score
        run.say(f"    {name:7} {score:6.2f}  {record[name]}")
    run.save("samples.jsonl", record)


def evaluate(run: Run) -> None:
    """SFT, PPO and the author side by side, with the controls that keep the verdict honest [D24]."""
    config, engine, judge = run.config, run.engine, run.config.evaluate.judge
    codec = run.codec(run.sft_model)
    posts = run.posts("test", codec)[: config.evaluate.posts]
    queries = codec.queries(posts)
    check_tokenizer(run, run.ppo_model)
    sft_policy, ppo_policy = (engine.place(load_policy(folder)) for folder in (run.sft_model, run.ppo_model))
    for policy in (sft_policy, ppo_policy):
        check_room(policy, config.data)
    scorers = {"score": load_scorer(run)}
    if Path(judge).is_dir():
        scorers["judge"] = load_reward_model(run, judge)
    exam = Exam(posts, queries, codec, Labeler(run.posts("train")), scorers, sft_policy, config.ppo.temperature, engine)
    uniforms = noise(config.seed, "evaluate", range(len(posts)), config.data.response_tokens)
    marks = {"author": exam.marks(author_responses(codec, posts, sft_policy))}
    texts = {"author": [post.summary for post in posts]}
    for name, policy in (("SFT", sft_policy), ("PPO", ppo_policy)):
        for temperature in (config.evaluate.temperature, config.ppo.temperature):
            responses = sample(policy, queries, uniforms, temperature, codec.eos_id, engine)
            texts[f"{name} T={temperature}"] = [codec.text(response) for response in responses]
            on_policy = policy if temperature == config.ppo.temperature else None
            marks[f"{name} T={temperature}"] = exam.marks(responses, on_policy)

    row = {"labeler": "labeler", "reward": "score"}.get(judge, "judge")
    vote = load_function("--evaluate.judge", judge) if row not in marks["author"] else None

    def prefer(a: str, b: str) -> np.ndarray:  # (N,)
        if vote is None:
            return wins_of(marks[a][row], marks[b][row])
        return engine.agree(votes(vote, posts, texts[a], texts[b]) if engine.rank == 0 else None)

    chose = getattr(scorers["score"], "preferences_of", None) == "labeler"
    labeler = "the labeler that made the preferences" if chose else "word overlap, not those who chose"
    known = {"labeler": labeler, "reward": "what PPO was trained on"}
    report(run, posts, texts, marks, prefer, known.get(judge, judge))


@dataclass(frozen=True)
class Exam:
    """What every writer is marked on: the same posts, by the same judges."""

    posts: list[Post]
    queries: list[list[int]]
    codec: Codec
    labeler: Labeler
    scorers: dict[str, ScalarModel | RewardFunction]
    sft_policy: PreTrainedModel
    temperature: float
    engine: Engine

    def marks(self, responses: list[list[int]], policy: PreTrainedModel | None = None) -> dict[str, np.ndarray]:
        """Marks (N,) of a writer's responses: "other post" is style without summary; kl needs samples of `policy`."""
        batch, texts = Batch(self.queries, responses), [self.codec.text(response) for response in responses]
        others = far_away(self.posts)

        def log_ratio(layout: Layout) -> list[Tensor]:
            one, two = (response_logprobs(p, layout, self.temperature) for p in (policy, self.sft_policy))
            return [one - two]

        marks = {
            name: outcome_scores(x, self.posts, self.codec, self.engine, batch) for name, x in self.scorers.items()
        }
        marks |= {
            "labeler": [self.labeler.score(post, text) for post, text in zip(self.posts, texts)],
            "labeler, other post": [self.labeler.score(post, text) for post, text in zip(others, texts)],
            "rouge_l": [rouge_l(text, post.summary) for post, text in zip(self.posts, texts)],
            "rouge_l, other post": [rouge_l(text, post.summary) for post, text in zip(others, texts)],
            "kl": map_rows(batch, self.engine, log_ratio)[0].sum(1) if policy else [math.nan],
            "eos": [response[-1] == self.codec.eos_id for response in responses],
            "tokens": [len(response) for response in responses],
        }
        return {name: torch.as_tensor(x).cpu().double().numpy() for name, x in marks.items()}


def votes(judge: Callable[[str, str, str], float], posts: Sequence[Post], a: list[str], b: list[str]) -> np.ndarray:
    """A judge's preference for a, the mean over both orders: who likes what stands first cancels out."""
    result = []
    for post, one, two in zip(posts, a, b):
        given = judge(post.post, one, two), judge(post.post, two, one)
        refuse(not set(given) <= {0, 0.5, 1}, f"--evaluate.judge returned {given[0]!r}, {given[1]!r}; not 0, 0.5 or 1")
        result.append((given[0] + 1 - given[1]) / 2)
    return np.array(result, dtype=float)


def mean_and_interval(x: np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95% interval (normal approximation over posts)."""
    return float(x.mean()), float(1.96 * x.std() / math.sqrt(len(x)))


def compare_marks(
    x: dict[str, np.ndarray], y: dict[str, np.ndarray], wins: np.ndarray
) -> dict[str, tuple[float, float]]:
    """One writer against another on the same posts: share of wins, mean and interval of each difference."""
    margins = (marks["labeler"] - marks["labeler, other post"] for marks in (x, y))
    return {
        "win rate": mean_and_interval(wins),
        "margin gain": mean_and_interval(np.subtract(*margins)),
        "rouge_l gain": mean_and_interval(x["rouge_l"] - y["rouge_l"]),
        "score gain": mean_and_interval(x["score"] - y["score"]),
    }


def report(
    run: Run,
    posts: list[Post],
    texts: dict[str, list[str]],
    marks: dict[str, dict[str, np.ndarray]],
    prefer: Callable[[str, str], np.ndarray],
    judge: str,
) -> None:
    """Table, controls, samples, verdict; eval.json, and eval.jsonl with all summaries for an outside judge."""
    cold, warm = (f"T={t}" for t in (run.config.evaluate.temperature, run.config.ppo.temperature))
    means = {writer: {name: float(x.mean()) for name, x in row.items()} for writer, row in marks.items()}
    cells = [
        [name, *(f"{row[name]:.3f}" if row[name] == row[name] else "" for row in means.values())]
        for name in means["author"]
    ]
    run.say(table([[f"{len(posts)} held-out posts", *means], *cells]))
    pairs = [(f"PPO {cold}", f"SFT {cold}"), (f"PPO {warm}", f"SFT {warm}"), (f"PPO {warm}", f"SFT {cold}")]
    pairs += [(f"PPO {cold}", "author"), (f"SFT {cold}", "author")]
    versus = {f"{a} against {b}": compare_marks(marks[a], marks[b], prefer(a, b)) for a, b in pairs}
    cells = [[name, *(f"{mean:+.3f} ± {half:.3f}" for mean, half in row.values())] for name, row in versus.items()]
    run.say(table([["95% intervals", *versus[f"PPO {cold} against SFT {cold}"]], *cells]))
    for i in range(min(5, len(posts))):
        run.say(headline(posts[i]))
        run.say("\n".join(f"    {writer:10} {texts[writer][i]}" for writer in ("author", f"SFT {cold}", f"PPO {cold}")))
    conclusion = verdict(*(versus[f"PPO {t} against SFT {t}"] for t in (cold, warm)), cold, warm, judge)
    run.say(f"\n{conclusion}")
    numbers = {writer: {name: x for name, x in row.items() if x == x} for writer, row in means.items()}
    records = [
        post.fields() | {"summaries": {writer: summaries[i] for writer, summaries in texts.items()}}
        for i, post in enumerate(posts)
    ]
    run.write("eval.jsonl", partial(write_records, records))
    record = {"posts": len(posts), "judge": judge, "means": numbers, "comparisons": versus, "verdict": conclusion}
    run.write("eval.json", partial(write_json, record))


def table(rows: list[list[str]]) -> str:
    """Columns of equal width, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n" + "\n".join(lines)


Figures = dict[str, tuple[float, float]]  # name -> mean and half-width, as `compare_marks` gives them


def verdict(at_cold: Figures, at_warm: Figures, cold: str, warm: str, judge: str) -> str:
    """Two sentences that claim no more than the intervals allow."""

    def moved(figures: Figures, name: str, neutral: float, up: str, same: str, down: str) -> str:
        mean, half = figures[name]
        return up if mean - half > neutral else down if mean + half < neutral else same

    def compared(figures: Figures) -> str:
        better = moved(figures, "win rate", 0.5, "is preferred to", "cannot be told from", "is worse than")
        about = moved(figures, "margin gain", 0.0, "more", "no more", "less")
        win, half = figures["win rate"]
        return f"{better} SFT ({win:.1%} ± {half:.1%} of posts) and is {about} about this post rather than any"

    rouge = moved(at_cold, "rouge_l gain", 0.0, "rose", "did not move measurably", "fell")
    return (
        f"By {judge}, PPO at {cold} {compared(at_cold)}; at {warm} it {compared(at_warm)}. "
        f"ROUGE-L with the author's line, which nobody optimised, {rouge} at {cold}."
    )


def benchmark(run: Run) -> None:
    """What PPO updates cost, by phase, and how much of the machine they use; weights are --model's or random."""
    config, engine = run.config, run.engine
    refuse(engine.world > 1, "the benchmark counts the work of one process")
    posts = run.posts("train")
    if config.model is None:
        tokenizer = train_tokenizer(posts, config.data.query_format, config.pretrain.vocab_size)
        model = small_model(config.pretrain, tokenizer, config.seed)
    else:
        tokenizer, model = load_tokenizer(config.model), load_policy(config.model)
    run.write("sft", partial(save_model, model, model.state_dict(), tokenizer))
    if config.ppo.reward_function is None:
        scalar = ScalarModel.load(run.sft_model, new_head=rng(config.seed, "reward head"))
        run.write("reward", partial(scalar.save, scalar.state_dict(), tokenizer))
        del scalar
    del model
    peak, bandwidth = machine_limits(engine)
    ppo(run)
    model = load_policy(run.sft_model)
    updates = run.logged("benchmark")
    updates = updates[1:] or updates  # the first one warms up
    cost = {name: float(np.median([u[name] for u in updates])) for name in updates[0] if "/" in name}
    operations, moved = work_of_an_update(model, cost, config.ppo, engine)
    phases = {
        phase: {
            "seconds": cost[f"time/{phase}"],
            "tokens_per_second": cost[f"tokens/{phase}"] / cost[f"time/{phase}"],
            "padding": cost[f"padding/{phase}"],
            "share_of_peak_flops": flop / cost[f"time/{phase}"] / peak,
            "share_of_bandwidth": moved / cost[f"time/{phase}"] / bandwidth if phase == "sampling" else math.nan,
        }
        for phase, flop in operations.items()
    }
    cells = [[phase, *(f"{x:.3g}" if x == x else "" for x in row.values())] for phase, row in phases.items()]
    run.say(table([["median of an update", *phases["sampling"]], *cells]))
    total = sum(row["seconds"] for row in phases.values())
    measured = f"{peak / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:.3g} GB/s"
    run.say(f"{total:.2f} s per update; a matrix product and a copy reach {measured} here")
    del phases["forwards"]["share_of_bandwidth"], phases["training"]["share_of_bandwidth"]
    record = {"phases": phases, "seconds": total, "updates": len(updates), "flops": peak, "bandwidth": bandwidth}
    record |= {"parameters": model.num_parameters(), "peak_memory": peak_memory(engine.device)}
    run.write("benchmark.json", partial(write_json, record))


def work_of_an_update(
    model: PreTrainedModel, cost: dict[str, float], config: PPO, engine: Engine
) -> tuple[dict[str, float], float]:
    """Operations that each phase needs for its tokens, padding not counted, and bytes that sampling must read."""
    # Two operations per weight and token forward, four more backward; attention's own are left out.
    head, shape = model.get_output_embeddings().weight.numel(), model.config
    body = model.num_parameters() - head * (1 if shape.tie_word_embeddings else 2)
    value, scored = config.value_model == "separate", config.reward_function is None
    written, rows, epochs = cost["tokens/sampling"], config.batch_size, config.num_ppo_epochs
    read = cost["tokens/training"] / epochs  # queries and responses, once
    operations = {
        "sampling": 2 * body * read + 2 * head * written,
        "forwards": 2 * body * read * (2 + value + scored) + 2 * 2 * head * written,
        "training": 6 * (body * read * (1 + value) + head * written) * epochs,
    }
    # A step of sampling reads the weights once, and for each row the keys and values of all that came before.
    steps = math.ceil(rows / engine.sample_batch_size) * cost["val/longest_response"]
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = heads * (getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)
    context = (read - written / 2) / rows
    numbers = (body + head) * steps + 2 * shape.num_hidden_layers * width * context * written
    return operations, numbers * (2 if engine.bfloat16 else 4)


def machine_limits(engine: Engine) -> tuple[float, float]:
    """Operations and bytes per second of a matrix product and a copy, the fastest of five."""
    big, on = (8192, 2**28) if engine.device.type == "cuda" else (2048, 2**25), engine.device
    a = torch.randn(big[0], big[0], device=on, dtype=torch.bfloat16 if engine.bfloat16 else torch.float32)
    x, y = (torch.ones(big[1], device=on) for _ in range(2))
    seconds: dict[str, list[float]] = {"product": [], "copy": []}
    for _ in range(5):
        for name, work in (("product", lambda: a @ a), ("copy", lambda: y.copy_(x))):
            with engine.timed(name):
                work()
            seconds[name].append(engine.costs.pop(f"time/{name}"))
    return 2 * big[0] ** 3 / min(seconds["product"]), 2 * 4 * big[1] / min(seconds["copy"])


# -----------------------------------------------------------------------------
# runtime: devices and processes, folders, log, screen, checkpoints. No algorithm.


@dataclass
class Engine:
    """Where and in what pieces models run, and what that cost: seconds, tokens, padding by phase (of process 0).

    Several processes (torchrun) share the work: groups of rows are dealt out whole, gradients and results summed. Each
    holds all weights, or with --compute.shard a share of them. The groups, and all randomness, are those of one
    process: so are the results, up to the order of sums.
    """

    device: torch.device = torch.device("cpu")
    bfloat16: bool = False
    micro_batch_size: int = 32
    sample_batch_size: int = 256
    max_grad_norm: float = 1.0
    adam_beta2: float = 0.999
    shard: bool = False
    rank: int = 0
    world: int = 1
    phase: str = ""
    costs: Counter = field(default_factory=Counter)  # since the start
    stated: Counter = field(default_factory=Counter)  # what earlier statements held

    @classmethod
    def start(cls, compute: Compute) -> Engine:
        available = torch.cuda.is_available()
        refuse(compute.device == "cuda" and not available, "--compute.device cuda: PyTorch sees no CUDA device")
        device = torch.device("cuda" if available and compute.device != "cpu" else "cpu")
        bfloat16 = compute.precision == "bfloat16" or (compute.precision == "auto" and device.type == "cuda")
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True  # what is not bfloat16 may use the matrix units too
            local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            refuse(local >= there, f"process {local} has no GPU of its own: there are {there}")
            torch.cuda.set_device(local)
        if dist.is_torchelastic_launched() and not dist.is_initialized():  # started by torchrun
            patience = timedelta(hours=12)  # while process 0 alone writes a large checkpoint, or asks a slow judge
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        sizes = (compute.micro_batch_size, compute.sample_batch_size, compute.max_grad_norm, compute.adam_beta2)
        many = dist.is_initialized()
        refuse(compute.shard and not many, "--compute.shard spreads weights over processes: start them with torchrun")
        rank, world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        return cls(device, bfloat16, *sizes, shard=compute.shard, rank=rank, world=world)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def place(self, model: nn.Module) -> nn.Module:
        """The model on this process's device: whole, or its share of every weight, by FSDP2.

        Of a sharded model only the transformer block that computes is whole.
        """
        if not self.shard:
            return model.to(self.device)
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.world,))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for block in max(lists, key=len, default=()):  # the longest list of modules: the transformer's blocks
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Inside, a model that was called once stays whole, so that processes can call it differently often."""
        shards = [module for module in model.modules() if self.shard and hasattr(module, "reshard")]
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
        yield
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights by name; of a sharded model, gathered on the CPU of process 0. Every process must ask."""
        if not self.shard:
            return model.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        once = dict(chain(model.named_parameters(), model.named_buffers()))  # tied weights have several names
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {name: weight for name, weight in state.items() if name in once}

    def backward(self, loss: Tensor) -> None:
        """FSDP2 averages gradients over the processes; shares of a loss should add up."""
        (loss * self.world if self.shard else loss).backward()

    def finish_gradients(self, parameters: list[Tensor]) -> Tensor:  # ()
        """Sum gradients over the processes, unless FSDP2 did, and clip their norm [D22]; the norm before."""
        if not self.shard:
            self.add_up([p.grad for p in parameters if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)
        return norm.full_tensor() if self.shard else norm

    def deal(self, groups: list[list[int]]) -> list[tuple[list[int], bool]]:
        """This process's groups. All compute equally many, as sums and shards need all: the first fills up, and there
        does not count."""
        mine = [(rows, True) for rows in groups[self.rank :: self.world]]
        return mine + [(groups[0], False)] * (math.ceil(len(groups) / self.world) - len(mine))

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the processes, in place."""
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)

    def gather(self, mine: dict) -> dict:
        """The union of all processes' dictionaries."""
        if self.world == 1:
            return mine
        parts: list[dict] = [{} for _ in range(self.world)]
        dist.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}

    def agree(self, value: object) -> object:
        """Process 0's value, in all of them; all wait for it."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """What happens inside counts as this phase: sampling, forwards or training."""
        self.phase, start = phase, time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # or the next phase would wait for this one's kernels
        self.costs[f"time/{phase}"] += time.perf_counter() - start

    def lay_out(self, batch: Batch) -> Layout:
        layout = lay_out(batch, self.device)
        self.count(sum(batch.lengths), layout.tokens.numel())
        return layout

    def count(self, tokens: int, slots: int) -> None:
        self.costs[f"tokens/{self.phase}"] += tokens
        self.costs[f"slots/{self.phase}"] += slots

    def statement(self) -> dict[str, float]:
        """Costs since the last statement; padding is a share of all slots computed."""
        costs, self.stated = self.costs - self.stated, Counter(self.costs)
        slots = {name: costs.pop(name) for name in list(costs) if name.startswith("slots/")}
        padding = {f"padding/{name[6:]}": 1 - costs[f"tokens/{name[6:]}"] / n for name, n in slots.items()}
        return {name: round(cost, 3) for name, cost in costs.items()} | padding


class Run:
    """A run's folder, log and screen."""

    def __init__(self, config: Config) -> None:
        self.config, self.engine = config, Engine.start(config.compute)
        missing = config.from_run is not None and not config.from_run.is_dir()
        refuse(missing, f"--from-run {config.from_run}: no such folder")
        for name, path in asdict(config.data).items():
            flag = f"--data.{name}".replace("_", "-")
            refuse(isinstance(path, Path) and not path.is_file(), f"{flag} {path}: no such file")
        judge = config.evaluate.judge
        for flag, function in (
            ("--ppo.reward-function", config.ppo.reward_function),
            ("--evaluate.judge", None if judge in ("labeler", "reward") or Path(judge).is_dir() else judge),
        ):
            if function is not None:
                load_function(flag, function)  # a slip in a name should not wait for the stage that uses it
        self.finished: list[str] = []  # stages
        self.sizes = dict.fromkeys(LOGS, 0)  # of the logs, in bytes, when the last stage had finished
        self.saved = self.started = self.entered = time.monotonic()
        self.stage, self.step, self.stopping, self.can_stop = "", 0, False, False
        self.trained: tuple[nn.ModuleDict, torch.optim.Optimizer] | None = None  # what this stage's steps change
        self.checkpoint: dict | None = None  # of the stage that is to go on
        self.seconds: dict[str, float] = {}
        self.said: set[str] = set()
        if config.resume:
            self.folder = config.out / config.name
            record = self.reopen()
        else:
            self.folder = self.engine.agree(fresh_folder(config.out, config.name) if self.engine.rank == 0 else None)
            record = provenance(config)
        self.write("config.json", partial(write_json, record))
        (self.folder / "checkpoint").mkdir(exist_ok=True)
        self.writer = None
        if config.track and self.engine.rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("--track needs TensorBoard: pip install 'pmo[track]'") from None
            self.writer = SummaryWriter(self.folder)
        self.bar = tqdm(disable=True)

    # where things are

    def write(self, name: str, function: Callable[[Path], None]) -> None:
        """Let `function` write a file or folder of this run, whole or not at all; process 0 writes, the others wait."""
        target = self.folder / name
        if self.engine.rank == 0:
            target.parent.mkdir(exist_ok=True)
            part = target.with_name(target.name + ".part")
            discard(part)
            function(part)
            if target.is_dir():
                discard(target)
            part.replace(target)
        self.engine.agree(None)

    def find(self, name: str, remedy: str) -> Path:
        """A file or subfolder of this run or of --from-run, to read from."""
        for folder in (self.folder, self.config.from_run):
            if folder is not None and (folder / name).exists():
                return folder / name
        earlier = f" or {self.config.from_run} (a run's folder holds what its own stages made)"
        raise InputError(f"no {name} in {self.folder}{earlier if self.config.from_run else ''}: {remedy}")

    @property
    def base(self) -> str | Path:
        return self.config.model or self.find("base", "run stage pretrain, or give --model or --from-run")

    @property
    def sft_model(self) -> str | Path:
        return self.config.sft_model or self.find("sft", "run stage sft, or give --sft-model or --from-run")

    @property
    def reward_model(self) -> str | Path:
        return self.config.reward_model or self.find("reward", "run stage reward, or give --reward-model or --from-run")

    @property
    def ppo_model(self) -> str | Path:
        return self.config.ppo_model or self.find("ppo", "run stage ppo, or give --ppo-model or --from-run")

    def codec(self, folder: str | Path) -> Codec:
        return Codec(load_tokenizer(folder), self.config.data)

    def posts(self, split: str, codec: Codec | None = None) -> list[Post]:
        """Posts of a split; with a codec, those whose title leaves room for a post: the others count as unusable."""
        data = self.config.data
        given = {"train": data.train, "valid": data.valid, "test": data.test or data.valid}[split]

        def parse(record: dict) -> Post:
            post = parse_post(record)
            if codec is not None:
                codec.check_title(post)
            return post

        return self.read(given or self.find(f"data/{split}.jsonl", "run stage corpus, or give --data.train"), parse)

    def read(self, path: Path, parse: Callable[[dict], NamedTuple | None]) -> list:
        records, complaints = read_records(path, parse)
        for complaint in complaints:
            self.say_once(complaint)
        return records

    def examples(self, split: str, codec: Codec) -> Batch:
        """Posts with summaries; one that would lose its EOS to the length limit is left out, and counted [D4]."""
        posts = self.posts(split, codec)
        batch = Batch(codec.queries(posts), codec.responses([post.summary for post in posts]))
        limit = self.config.data.response_tokens
        rows = [i for i, response in enumerate(batch.responses) if len(response) <= limit]
        if len(rows) < len(batch):
            self.say_once(
                f"left out {len(batch) - len(rows):,} of {len(batch):,} {split} summaries: more than {limit} tokens"
            )
        refuse(not rows, f"no {split} summary fits --data.response-tokens {limit}")
        return batch[rows]

    def pairs(self, split: str, codec: Codec) -> tuple[Batch, Batch, list[tuple[str, ...]]]:
        """Chosen, rejected, and of what kinds; pairs that do not fit are left out, and counted."""
        data = self.config.data
        given = {"train": data.comparisons_train, "valid": data.comparisons_valid}[split]
        path = given or self.find(
            f"data/comparisons_{split}.jsonl", "run stage compare, or give --data.comparisons-train"
        )

        def parse(record: dict) -> Comparison | None:
            comparison = parse_comparison(record)
            if comparison is not None:
                codec.check_title(comparison.post)
            return comparison

        comparisons = self.read(path, parse)
        queries = codec.queries([comparison.post for comparison in comparisons])
        chosen = Batch(queries, codec.responses([comparison.chosen for comparison in comparisons]))
        rejected = Batch(queries, codec.responses([comparison.rejected for comparison in comparisons]))
        longest = map(max, map(len, chosen.responses), map(len, rejected.responses))
        rows = [i for i, length in enumerate(longest) if length <= data.comparison_tokens]
        if len(rows) < len(queries):
            self.say_once(f"left out {len(queries) - len(rows):,} of {len(queries):,} {split} comparisons: too long")
        refuse(not rows, f"{path}: no comparison fits --data.comparison-tokens {data.comparison_tokens}")
        return chosen[rows], rejected[rows], [comparisons[i].kinds for i in rows]

    # what a person sees, and what stays

    def enter(self, stage: str) -> None:
        self.stage, self.entered, self.saved = stage, time.monotonic(), time.monotonic()
        self.say(f"\n== {stage}")
        if self.config.resume:
            self.checkpoint = self.newest_checkpoint()
            self.cut_logs(self.checkpoint["sizes"] if self.checkpoint else self.sizes)

    def leave(self) -> None:
        """The stage is finished: a resumed run will not repeat it."""
        self.trained = None
        self.seconds[self.stage] = round(time.monotonic() - self.entered, 1)
        self.finished.append(self.stage)
        self.sizes = self.sizes_of_logs()
        self.write("checkpoint/finished.json", partial(write_json, {"stages": self.finished, "sizes": self.sizes}))
        self.remove_checkpoints(but=0)
        self.engine.agree(None)

    def steps(
        self, title: str, total: int, optimizer: torch.optim.Optimizer | None = None, **models: nn.Module
    ) -> Iterator[int]:
        """Step numbers, with a progress bar on a terminal and a line at the end.

        Optimizer and models are all that steps change: with them, the loop can be interrupted, and later go on.
        """
        start, before, first = time.monotonic(), Counter(self.engine.costs), 0
        self.trained = (nn.ModuleDict(models), optimizer) if optimizer else None
        if self.trained and self.checkpoint is not None:
            first = self.checkpoint["step"]
            self.restore(self.checkpoint)
            self.checkpoint = None
            self.say(f"going on after step {first:,} of {total:,}")
        with tqdm(
            total=total, initial=first, desc=title, disable=None if self.engine.rank == 0 else True, leave=False
        ) as self.bar:
            self.can_stop = self.trained is not None
            try:
                for self.step in range(first, total):
                    yield self.step
                    self.bar.update()
                    due = time.monotonic() - self.saved >= 60 * self.config.compute.checkpoint_minutes
                    due, stopping = self.engine.agree((due, self.stopping)) if self.trained else (False, False)
                    if due or stopping:
                        self.save_checkpoint(self.step + 1)
                        self.remove_checkpoints(but=2)
                    if stopping:
                        raise KeyboardInterrupt
            finally:
                self.can_stop = False
        self.step = total
        spent = (self.engine.costs - before).items()
        phases = ", ".join(f"{name[5:]} {cost:.0f} s" for name, cost in spent if name.startswith("time/"))
        self.say(f"{title}: {total - first:,} steps in {time.monotonic() - start:.0f} s ({phases})")

    # checkpoints: all that a stage's steps change, and how long the logs were then

    def save_checkpoint(self, step: int) -> None:
        """From which a resumed run goes on with this step."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # so that any number of processes can go on
        state = dict(zip(("models", "optimizer"), get_state_dict(*self.trained, options=whole)))
        state |= {"step": step, "sizes": self.sizes_of_logs()}
        self.write(self.checkpoint_name(step), partial(torch.save, state))
        self.saved = time.monotonic()

    def rescue(self) -> str:
        """After an optimizer step that was refused: save the weights without it, unless a checkpoint was just saved.

        A resumed run begins the step anew; in PPO that is the whole update, of which the weights may hold a part.
        """
        if self.trained is None:
            return "nothing was being trained"
        path = self.folder / self.checkpoint_name(self.step)
        if not self.engine.agree(path.exists()):
            self.save_checkpoint(self.step)
        return (
            f"the weights without it are saved: {self.how_to_go_on()}; the learning rates may change. If that fails in "
            f"the same step, the weights were bad already: remove {path}; the one before it, if any, is then used"
        )

    def restore(self, state: dict) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        models, optimizer = self.trained
        rates = [group["initial_lr"] for group in optimizer.param_groups]  # the flags', which may have changed
        values = {"model_state_dict": state["models"], "optim_state_dict": state["optimizer"]}
        set_state_dict(models, optimizer, **values, options=StateDictOptions(full_state_dict=True))
        for group, rate in zip(optimizer.param_groups, rates):
            group["initial_lr"] = rate

    def newest_checkpoint(self) -> dict | None:
        """The newest usable checkpoint of this stage; torch.load with weights_only runs no code."""
        state, broken = None, []
        for path in self.checkpoints():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                break
            except Exception as error:  # whatever a broken file makes torch.load say
                self.say_once(
                    f"{path} is not usable ({' '.join(str(error).split())[:80]}); taking the one before, if any"
                )
                broken.append(path)
        self.engine.agree(None)
        for path in broken if self.engine.rank == 0 else ():
            path.rename(path.with_suffix(".broken"))
        return state

    def checkpoint_name(self, step: int) -> str:
        return f"checkpoint/{self.stage}-{step:08d}.pt"

    def checkpoints(self) -> list[Path]:
        """This stage's, the newest first."""
        return sorted((self.folder / "checkpoint").glob(f"{self.stage}-*.pt"), reverse=True)

    def remove_checkpoints(self, but: int) -> None:
        """All but the newest."""
        for old in self.checkpoints()[but:] if self.engine.rank == 0 else ():
            old.unlink()

    def reopen(self) -> dict:
        """What config.json will say of a run that goes on, if its flags are the same, or may change."""
        try:
            record = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            before, now = flags_of(record["config"]), flags_of(json.loads(json.dumps(asdict(self.config), default=str)))
            del now["--name"], now["--resume"]
            earlier = record.get("resumed", [])
            before |= {flag: value for resumed in earlier for flag, (_, value) in resumed["config"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"--resume: {self.folder} is not the folder of a run: {error}") from None
        gone = not (self.folder / "checkpoint").is_dir()
        refuse(gone, f"--resume: {self.folder} has no checkpoint folder, so it is finished; --from-run can use it")
        changed = {flag: (before.get(flag), now[flag]) for flag in now if now[flag] != before.get(flag)}
        changes = [f"{flag} was {was}, is {value}" for flag, (was, value) in changed.items() if not may_change(flag)]
        refuse(bool(changes), f"--resume: {self.folder} was started with other flags: {'; '.join(changes)}")
        for flag, (was, value) in changed.items():
            self.say(f"note: {flag} was {was}, is {value}")
        path = self.folder / "checkpoint" / "finished.json"
        if path.exists():
            finished = json.loads(path.read_text(encoding="utf-8"))
            self.finished, self.sizes = finished["stages"], finished["sizes"]
        resumed = provenance(self.config) | {"config": changed}
        return record | {"resumed": [*earlier, resumed]}

    def sizes_of_logs(self) -> dict[str, int]:
        return {name: path.stat().st_size if (path := self.folder / name).exists() else 0 for name in LOGS}

    def cut_logs(self, sizes: dict[str, int]) -> None:
        """Forget what was logged after the checkpoint: it will be logged again."""
        for name, size in sizes.items() if self.engine.rank == 0 else ():
            if (self.folder / name).exists():
                os.truncate(self.folder / name, size)

    def how_to_go_on(self) -> str:
        return f"go on with the same flags and --name {self.folder.name} --resume"

    def stop(self, *_: object) -> None:
        """SIGINT or SIGTERM: finish the step and save, where one can; elsewhere, or the second time, end at once."""
        if self.stopping or not self.can_stop:
            raise KeyboardInterrupt
        self.stopping = True
        self.say("interrupted: finishing this step")

    def log(self, statistics: dict[str, float]) -> None:
        """One line of metrics.jsonl; the numbers that matter on the screen."""
        for name, value in statistics.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value} [D22]")
        seconds = round(time.monotonic() - self.started, 3)
        self.save("metrics.jsonl", {"stage": self.stage, "step": self.step, "seconds": seconds} | statistics)
        for name, value in statistics.items() if self.writer else ():
            tag = name if self.stage == "ppo" and "/" in name else f"{self.stage}/{name}"
            self.writer.add_scalar(tag, value, self.step)
        shown = "  ".join(f"{label} {statistics[name]:.3g}" for name, label in SHOWN.items() if name in statistics)
        self.bar.set_postfix_str(shown, refresh=False)
        if self.stage == "ppo":
            self.say(f"{self.step + 1:4d}  {shown}  {seconds - self.entered + self.started:.0f} s")

    def save(self, name: str, record: dict) -> None:
        if self.engine.rank:
            return
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def logged(self, stage: str) -> list[dict]:
        """What metrics.jsonl holds of a stage."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if record["stage"] == stage]

    def say(self, text: str) -> None:
        if self.engine.rank == 0:
            tqdm.write(text, file=sys.stdout)

    def warn(self, warnings: Iterable[str]) -> None:
        """Once each."""
        for warning in warnings:
            self.say_once(f"warning: {warning}")

    def say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    def introduce(self) -> None:
        config, engine = self.config, self.engine
        place = f"{torch.get_num_threads()} threads" if engine.device.type == "cpu" else torch.cuda.get_device_name()
        self.say(f"pmo: {' > '.join(stage for stage in config.stages if not config.is_given(stage))}")
        precision = "bfloat16" if engine.bfloat16 else "float32"
        processes = f"{engine.world} processes, " if engine.world > 1 else ""
        self.say(
            f"{engine.device.type} ({place}), {precision}, {processes}seed {config.seed}, writing to {self.folder}"
        )

        if config.from_run and (config.from_run / "config.json").is_file():
            record = json.loads((config.from_run / "config.json").read_text(encoding="utf-8"))
            earlier = record.get("config", {}).get("data")
            refuse(earlier is None, f"--from-run {config.from_run} is not the folder of a run")
            for name in ("query_tokens", "response_tokens", "query_format"):
                was, now = earlier[name], getattr(config.data, name)
                if was != now:
                    self.say(f"note: {config.from_run} had {name} {was!r}, this run has {now!r}")

    def finish(self) -> None:
        if self.writer:
            self.writer.close()
        if self.engine.rank == 0:
            discard((self.folder / "checkpoint").rename(self.folder / "checkpoint.part"))
        self.say("\ntime: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items()))
        self.say(f"peak memory: {peak_memory(self.engine.device)}")
        self.say(f"written to {self.folder}: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory"
    if importlib.util.find_spec("resource") is None:  # Windows
        return "unknown"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


SHOWN = {
    "loss/response": "loss",
    "accuracy": "accuracy",
    "objective/scores": "score",
    "objective/labeler": "labeler",
    "objective/kl": "kl",
    "policy/entropy": "entropy",
    "policy/clipfrac": "clipfrac",
    "policy/approxkl": "approxkl",
    "val/eos_rate": "eos",
}


LOGS = ("metrics.jsonl", "samples.jsonl")


def discard(path: Path) -> None:
    """Remove a file or folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fresh_folder(out: Path, name: str | None) -> Path:
    """Make {out}/{name}, or the next free {out}/run-001; a run never writes into another's folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = {path.name for path in out.iterdir()}
        name = name or next(f"run-{i:03d}" for i in range(1, 10**6) if f"run-{i:03d}" not in taken)
        (out / name).mkdir()
    except OSError as error:
        if name is not None and (out / name).exists():
            raise InputError(f"{out / name} exists: choose another --name, or remove it") from None
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from None
    return out / name


def flags_of(section: dict, prefix: str = "") -> dict[str, object]:
    """--section.flag -> value, of a config as a nested dictionary."""
    flags: dict[str, object] = {}
    for name, value in section.items():
        flags |= (
            flags_of(value, f"{name}.") if isinstance(value, dict) else {f"--{prefix}{name}".replace("_", "-"): value}
        )
    return flags


def may_change(flag: str) -> bool:
    """Flags that a resumed run need not repeat: where and in what pieces to compute; the rates, if it diverged."""
    computing = flag.startswith("--compute.") and flag != "--compute.adam-beta2"
    return computing or flag.endswith("lr")


def provenance(config: Config) -> dict:
    """All flags, the time, versions, and the commit when this file lies in a git checkout."""
    import transformers

    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = (
        subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if shutil.which("git") else ""
    )
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"config": asdict(config), "started": now, "versions": versions, "commit": commit or None, "argv": sys.argv}


# -----------------------------------------------------------------------------
# main: flags in, run out.


def start(config: Config) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run = Run(config)
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, run.stop) for number in signals}
    try:
        run.introduce()
        for stage in config.stages:
            if not config.is_given(stage) and stage not in run.finished:
                run.enter(stage)
                globals()[stage](run)
                run.leave()
    except Diverged as error:
        where = f"{run.stage}, step {run.step + 1}"
        raise Diverged(f"{where}: {error}; {run.rescue()}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(run.how_to_go_on()) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    run.finish()
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character should not end a run
    try:
        start(tyro.cli(Config))
    except (InputError, OSError) as error:  # OSError: a disk that is full or read-only
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
