"""How the terms of a loss are balanced against each other while training: learnt, or by their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmseg_imbalance.ops import sum_over_ranks
from mmseg_imbalance.options import check_at_least_0, check_choice, check_whole


class Balanced(NamedTuple):
    """What a balance answers: the terms' factors, (T,); what is added to the loss; what the log shows."""

    factors: Tensor
    offset: Tensor | float
    logged: dict[str, Tensor]  # (T,) each, by the word that follows the name of a term


class Uncertainty(nn.Module):
    """Factors exp(-s) of the terms, with s / 2 added to the loss; s are learnt log-variances, (T,).

    Args:
        factors: (T,), above 0: where exp(-s) starts.

    Source: Kendall et al. 2018, https://arxiv.org/abs/1705.07115, equation 10.
    """

    def __init__(self, factors: Sequence[float]) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(-torch.tensor([*factors]).log())

    def forward(self, terms: Sequence[Tensor], logits: Tensor) -> Balanced:
        s = self.log_variance.to(terms[0])
        return Balanced(torch.exp(-s), s.sum() / 2, dict(log_variance=s.detach()))


class GradNorm(nn.Module):
    """Factors w of the terms L such that each pulls at the logits as hard as its progress asks for.

    At an interval, w_i moves a tenth of the way to F u_i / sum_j u_j, u_i = r_i^asymmetry / g_i; the first
    time all the way. g_i is the norm of the gradient of L_i at the logits. r_i is L_i / L_i(0) over its mean:
    high where a term lags behind. At the end of the way the pulls w_i g_i stand as r_i^asymmetry do.

    g and L are means over all ranks. A measurement that is not finite, or in which a term has no gradient,
    changes nothing. Each one takes a backward pass of the loss for each term, of the loss alone: with 2 terms
    every 20 iterations a tenth of such a pass an iteration.

    Args:
        factors: (T,), at least 0, F their sum, which stays.
        asymmetry: at least 0; 0 gives all terms the same pull.
        interval: calls of the loss in training, one an iteration as a rule, from one measurement to the next;
            at least 1. Take 'fixed' with a head that calls its loss for several outputs (DAHead): the
            measurements would be of one or another of them.

    Source: Chen et al. 2018, https://arxiv.org/abs/1711.02257, equations 1 and 2, with asymmetry (alpha) 1.5.
    Differs: gradients at the logits, not at the last shared layer; a step to where their equation 2 leads, in
    place of one along its gradient in each iteration.
    """

    factors: Tensor
    first: Tensor

    def __init__(self, factors: Sequence[float], asymmetry: float = 1.5, interval: int = 20) -> None:
        super().__init__()
        check_at_least_0(asymmetry=asymmetry)
        check_whole(1, interval=interval)
        self.asymmetry = asymmetry
        self.interval = interval
        self.given = torch.tensor([*factors], dtype=torch.float32)
        self.register_buffer('factors', self.given.clone())
        self.register_buffer('first', torch.zeros(len(factors)))  # L(0); 0 before the first measurement
        self.calls = 0

    def start_anew(self) -> None:
        """Forget what has been measured: for a new training from a checkpoint of an earlier one."""
        self.factors.copy_(self.given)
        self.first.zero_()
        self.calls = 0

    def forward(self, terms: Sequence[Tensor], logits: Tensor) -> Balanced:
        if self.training and logits.requires_grad:
            if self.calls % self.interval == 0:
                self._measure(terms, logits)
            self.calls += 1
        factors = self.factors.to(terms[0], copy=True)
        return Balanced(factors, 0.0, dict(factor=factors))

    def _measure(self, terms: Sequence[Tensor], logits: Tensor) -> None:
        # gradients that a mean over the pixels makes small would vanish in half precision
        scale = logits[:, 0].numel()
        gradients = [torch.autograd.grad(term * scale, logits, retain_graph=True)[0] for term in terms]
        wide = torch.promote_types(logits.dtype, torch.float32)
        norms = [torch.linalg.vector_norm(gradient, dtype=wide).float() for gradient in gradients]
        values = torch.stack([term.detach().float() for term in terms])
        norms, values = sum_over_ranks(torch.stack([torch.stack(norms), values]))
        if self.factors.element_size() < 4:  # in a model of half precision small steps would be lost
            self.factors, self.first = self.factors.float(), self.first.float()
        fresh = self.first == 0
        first = torch.where(fresh, values, self.first)
        progress = values / first
        aim = (progress / progress.mean()) ** self.asymmetry / norms
        aim = aim / aim.sum() * self.factors.sum()
        moved = torch.where(fresh, aim, torch.lerp(self.factors, aim, 0.1))
        # a norm that overflowed would give a factor of 0
        sound = torch.isfinite(aim).all() & torch.isfinite(norms).all()
        self.factors.copy_(torch.where(sound, moved, self.factors))
        self.first.copy_(torch.where(sound, first, self.first))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calls)  # averaged models take tensors alone

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)


BALANCES = dict(fixed=None, uncertainty=Uncertainty, gradnorm=GradNorm)


def make_balance(balance: str | Mapping[str, Any], factors: Mapping[str, float]) -> nn.Module | None:
    """What balances terms that start with these factors: by its name, or as ``dict(type=name, ...)``.

    Returns:
        None where the factors are fixed.

    Raises:
        ValueError: an unknown name, an option out of its range, or fewer than two factors above 0.
        TypeError: an unknown option.
    """
    options = dict(balance) if isinstance(balance, Mapping) else dict(type=balance)
    name = options.pop('type', None)
    check_choice('balance', name, tuple(BALANCES))
    kind = BALANCES[name]
    known = ('asymmetry', 'interval') if kind is GradNorm else ()
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f'balance={name!r} has no option {unknown}; its options are {list(known)}')
    if kind is None:
        return None
    if len(factors) < 2 or min(factors.values()) == 0:
        raise ValueError(
            f'balance={name!r} starts from the factors of two terms or more, which must be above 0, got '
            f'{dict(factors)}'
        )
    return kind(list(factors.values()), **options)
