"""What stands in the place of PEFT's linear layers where a client trains something else than the two factors."""

import torch
from torch import Tensor, nn

from fedloom.platform.ties import Tie


class TiedA(nn.Module):
    """A = G R in the place of PEFT's linear layer A; G, (r, k), is its parameter."""

    def __init__(self, G: nn.Parameter, tie: Tie) -> None:
        """Take G, and the tie that says what R is."""
        super().__init__()
        self.G = G
        self._tie = tie

    @property
    def weight(self) -> Tensor:
        """The factor A, (r, d_in)."""
        return self._tie.factor_a(self.G)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x of shape (..., d_in)."""
        return nn.functional.linear(x, self.weight)


class TiedB(nn.Module):
    """B = L G^T in the place of PEFT's linear layer B; G is the parameter of A and none of its own."""

    def __init__(self, G: nn.Parameter, tie: Tie) -> None:
        """Take G, and the tie that says what L is."""
        super().__init__()
        self._shared = (G,)  # in a tuple, where torch does not look for parameters
        self._tie = tie

    @property
    def weight(self) -> Tensor:
        """The factor B, (d_out, r)."""
        return self._tie.factor_b(self._shared[0])

    def forward(self, z: Tensor) -> Tensor:
        """Apply it to z of shape (..., r)."""
        return nn.functional.linear(z, self.weight)


class CoredFactor(nn.Module):
    """B with a core before it, in the place of PEFT's linear layer B: z -> B diag(g_1 C_1, ..., g_h C_h) z."""

    def __init__(self, B: nn.Parameter, core: nn.Parameter) -> None:
        """Take B, (d_out, r), and the core, (h, r / h, r / h); the gains, (h, 1, 1), are 1."""
        super().__init__()
        self.weight = B
        self.core = core
        self.gain = nn.Parameter(torch.ones_like(core[:, :1, :1]))

    def folded_core(self) -> Tensor:
        """Return the blocks g_i C_i."""
        return self.gain * self.core

    def forward(self, z: Tensor) -> Tensor:
        """Apply it to z of shape (..., r)."""
        blocks = z.reshape(*z.shape[:-1], *self.core.shape[:2])
        return nn.functional.linear(
            torch.einsum("hpq,...hq->...hp", self.folded_core(), blocks).flatten(-2), self.weight
        )
