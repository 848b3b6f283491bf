"""Complex and sparse tensors as real numbers."""

from __future__ import annotations

import pytest
import torch

from detente.autograd.entries import dense, flat, real, unreal

CONJUGATED = torch.tensor([1 + 2j, 3 - 4j]).conj()
SPARSE = torch.sparse_coo_tensor(
    torch.tensor([[2, 0, 2]]), torch.tensor([1.0, 5.0, 2.0]), (4,), check_invariants=True
)


def test_a_plain_tensor_is_not_copied() -> None:
    tensor = torch.randn(2, 3).t()
    assert real(tensor) is tensor and dense(tensor) is tensor
    assert flat(tensor).tolist() == [value for row in tensor.tolist() for value in row]


def test_writing_to_the_real_view_writes_to_the_complex_tensor() -> None:
    tensor = torch.zeros(2, dtype=torch.complex128)
    real(tensor)[1, 1] = 7.0
    assert tensor.tolist() == [0j, 7j]


def test_a_lazy_conjugate_is_resolved() -> None:
    assert CONJUGATED.is_conj()
    assert real(CONJUGATED).tolist() == [[1.0, -2.0], [3.0, 4.0]]
    assert flat(CONJUGATED).tolist() == [1.0, -2.0, 3.0, 4.0]


def test_of_a_sparse_tensor_real_gives_the_stored_sums_and_dense_everything() -> None:
    assert real(SPARSE).tolist() == [5.0, 3.0]
    assert dense(SPARSE).tolist() == flat(SPARSE).tolist() == [5.0, 0.0, 3.0, 0.0]
    assert flat(SPARSE.to(torch.complex64)).tolist() == [5.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("tensor", [torch.tensor([1 + 2j]), torch.tensor([[1.0]]), torch.zeros(0)])
def test_unreal_undoes_real(tensor: torch.Tensor) -> None:
    assert torch.equal(unreal(real(tensor), tensor), tensor)
    assert unreal(real(tensor), tensor).dtype == tensor.dtype
