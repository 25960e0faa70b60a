"""The layer of RS4D: a Mamba mixer that reads the tokens in several orders. All is `(batch, tokens, channels)`."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .channels_last import apply_linear, apply_linear_halves
from .configuration_rs4d import RS4DConfig
from .selective_scan import selective_scan

MIN_TIME_STEP, MAX_TIME_STEP = 1e-3, 1e-1


class TokenOrder:
    """A way to read a sequence of tokens, and back."""

    def __init__(self, name: str, tokens: int, device: torch.device) -> None:
        self.name = name
        if name == "shuffle":
            self.permutation = torch.randperm(tokens, device=device)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, channels)` in this order."""
        if self.name == "reverse":
            return x.flip(1)
        return x[:, self.permutation] if self.name == "shuffle" else x

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """Back into the original order."""
        return x[:, self.permutation.argsort()] if self.name == "shuffle" else self.apply(x)


class RS4DMixer(nn.Module):
    """Mamba mixer (arXiv 2312.00752) over several orders of the same tokens, with the same weights for all.

    Equal to running the mixer once per order and joining the outputs. But what treats every token alike - both
    projections to and from the inner width, and the gate - is computed once, since it commutes with any order.
    """

    def __init__(self, config: RS4DConfig) -> None:
        super().__init__()
        inner, state, rank = config.inner_size, config.state_size, config.time_step_rank
        self.splits, self.scan_backend = (rank, state, state), config.scan_backend
        self.order_names = config.orders
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        orders = len(self.order_names)
        # One weight per order from the mean outputs of all orders.
        self.gate = nn.Linear(orders * config.hidden_size, orders, bias=False) if config.has_gate else None

    @torch.no_grad()
    def init_weights(self) -> None:
        """Rates 1 .. state_size (S4D-real) and time steps log-uniform in [0.001, 0.1], as in Mamba."""
        inner, state = self.A_log.shape
        rates = torch.arange(1, state + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, rates.log().expand(inner, -1))
        init.ones_(self.D)
        bound = self.dt_proj.in_features**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        span = math.log(MAX_TIME_STEP / MIN_TIME_STEP)
        time_step = MIN_TIME_STEP * torch.exp(torch.rand(inner, device=self.A_log.device) * span)
        init.copy_(self.dt_proj.bias, time_step + torch.log(-torch.expm1(-time_step)))  # inverse of softplus

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        """Causal depthwise convolution and SiLU, `(batch, tokens, inner)`."""
        x = F.pad(x, (0, 0, self.conv1d.kernel_size[0] - 1, 0)).transpose(1, 2).unsqueeze(2)
        # As an image of one row: only the 2-D convolution has a kernel for channels-last memory, ten times faster here.
        x = F.conv2d(x, self.conv1d.weight.unsqueeze(2), self.conv1d.bias, groups=self.conv1d.groups)
        return F.silu(x).squeeze(2).transpose(1, 2)

    def _scan(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, inner)` in reading order to the states' readout of the same shape, without the gate."""
        x = self._convolve(x)
        low_rank, B, C = apply_linear(self.x_proj, x).split(self.splits, dim=-1)
        y = selective_scan(
            x.transpose(1, 2),
            F.linear(low_rank, self.dt_proj.weight).transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            D=self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            backend=self.scan_backend,
        )
        return y.transpose(1, 2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, hidden)` in and out."""
        x, z = apply_linear_halves(self.in_proj, hidden_states)
        orders = [TokenOrder(name, x.shape[1], x.device) for name in self.order_names]
        if len(orders) > 1:
            x = torch.cat([order.apply(x) for order in orders])
        y = self._scan(x).unflatten(0, (len(orders), -1))
        outputs = [order.undo(part) for order, part in zip(orders, y, strict=True)]
        z = F.silu(z)
        if len(outputs) == 1:
            joined = outputs[0]
        elif self.gate is None:
            joined = sum(outputs[1:], outputs[0]) / len(outputs)
        else:
            means = torch.cat([self.out_proj((output * z).mean(1)) for output in outputs], dim=-1)
            weights = self.gate(means).softmax(-1)
            joined = sum(weights[:, None, i, None] * output for i, output in enumerate(outputs))
        return apply_linear(self.out_proj, joined * z)


class RS4DLayer(GradientCheckpointingLayer):
    """Residual mixer. The norm before it is shared by all layers, so it is handed in."""

    def __init__(self, config: RS4DConfig) -> None:
        super().__init__()
        self.mixer = RS4DMixer(config)

    def forward(self, hidden_states: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        """`(batch, tokens, hidden)` in and out."""
        return hidden_states + self.mixer(norm(hidden_states))
