"""The penalties that a dispatch may ask the trainer for."""

import pytest
import torch
from rounds import gaussian
from torch.autograd import gradcheck

from fedloom.platform.penalties import PENALTIES, orthogonality


def off(gram):
    return gram - torch.diag(torch.diagonal(gram))


def test_it_is_half_the_squared_gram_entries_off_the_diagonal():
    """(1/2) sum_l ||off(A A^T)||^2 + ||off(B^T B)||^2; for two rows the entry a_1 a_2 stands there twice."""
    B = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    A = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]], dtype=torch.float64)

    assert orthogonality([(B, A)]) == pytest.approx((1 * 2 + 3 * 4) ** 2 + 2**2)
    assert orthogonality([(B, A), (B, A)]) == pytest.approx(2 * ((1 * 2 + 3 * 4) ** 2 + 2**2))
    assert orthogonality([]) == 0


def test_its_gradient_is_that_of_finite_differences():
    """Checked entry by entry, and against 2 off(A A^T) A and 2 B off(B^T B)."""
    B, A = gaussian(5, 3).requires_grad_(), gaussian(3, 7).requires_grad_()

    assert gradcheck(lambda B, A: orthogonality([(B, A)]), (B, A))
    orthogonality([(B, A)]).backward()
    torch.testing.assert_close(A.grad, 2 * off(A @ A.T).detach() @ A.detach())
    torch.testing.assert_close(B.grad, 2 * B.detach() @ off(B.T @ B).detach())


def test_it_is_zero_for_orthogonal_directions_of_any_norms():
    """Norms are free, or all importances would be pulled to one value."""
    sizes = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    B, A = torch.linalg.qr(gaussian(6, 3)).Q * sizes, torch.linalg.qr(gaussian(8, 3)).Q.T * sizes.flip(0)[:, None]

    assert orthogonality([(B, A)]) < 1e-25


def test_it_does_not_fight_the_start():
    """B = 0 costs nothing and has no gradient: only the rows of A are pulled apart."""
    B, A = torch.zeros(6, 3, requires_grad=True), gaussian(3, 8).float().requires_grad_()

    orthogonality([(B, A)]).backward()

    assert not B.grad.any()
    assert A.grad.any()


def test_descent_makes_the_rows_orthogonal():
    """Following the gradient alone takes the largest cosine of two rows to nothing."""
    B, A = gaussian(6, 3).requires_grad_(), gaussian(3, 8).requires_grad_()
    optimizer = torch.optim.SGD([B, A], lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        orthogonality([(B, A)]).backward()
        optimizer.step()

    for rows in (A.detach(), B.detach().T):
        unit = rows / rows.norm(dim=1, keepdim=True)
        assert off(unit @ unit.T).abs().max() < 1e-2


def test_penalties_are_found_by_name():
    assert PENALTIES["orthogonality"] is orthogonality
