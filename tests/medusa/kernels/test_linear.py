"""Packed products: torch's own to rounding, the same whatever the number of rows, and never of old weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from medusa.kernels import linear as kernel
from medusa.kernels.linear import MIN_WORK, PackedLinear, linear, pack

can_pack = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def layer(columns=96, rows=640, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=bias)


def inputs(*shape, columns=96):
    return torch.randn(*shape, columns, generator=torch.Generator().manual_seed(1))


@can_pack
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (3, 8), (2, 3, 5), (700,)])
def test_a_packed_layer_gives_what_torch_gives(shape, bias):
    plain, packed = layer(bias=bias), layer(bias=bias)
    pack(packed)
    x = inputs(*shape)
    assert x.numel() * 640 >= MIN_WORK
    torch.testing.assert_close(packed(x), plain(x))
    assert packed(x).shape == (*shape, 640)


@can_pack
def test_a_row_does_not_depend_on_the_rows_beside_it():
    packed = layer()
    pack(packed)
    x = inputs(64)
    whole = packed(x)
    for rows in (5, 8, 16, 33):
        assert torch.equal(packed(x[:rows]), whole[:rows])


@can_pack
def test_new_weights_copied_in_are_seen():
    packed, other = layer(), layer(seed=9)
    pack(packed)
    x = inputs(64)
    packed(x)
    packed.load_state_dict(other.state_dict())
    torch.testing.assert_close(packed(x), other(x))
    packed.weight.mul_(2.0)
    torch.testing.assert_close(packed(x), 2 * (other(x) - other.bias) + other.bias)


@can_pack
def test_a_weight_tied_to_an_embedding_stays_tied():
    embedding, head = nn.Embedding(640, 96), layer(bias=False)
    head.weight = embedding.weight
    head.requires_grad_(False)
    pack(nn.ModuleList([embedding, head]))
    assert head.weight is embedding.weight
    x = inputs(64)
    torch.testing.assert_close(head(x), x @ embedding.weight.T)
    torch.testing.assert_close(linear(x, embedding.weight), head(x))  # by the weight alone, too


def test_gradients_are_torchs_own():
    packed = layer()
    pack(packed)
    x = inputs(64)
    with torch.enable_grad():
        loss = packed(x.requires_grad_()).square().sum()
    loss.backward()
    assert x.grad is not None and packed.weight.grad is not None


def test_names_parameters_and_state_stay_as_they_were():
    plain = nn.Sequential(layer(), nn.ReLU())
    packed = copy.deepcopy(plain)
    pack(packed)
    pack(packed)  # again: nothing more
    assert isinstance(packed[0], nn.Linear)
    assert list(packed.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(packed)
    x = inputs(64)
    torch.testing.assert_close(copied(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_alone(dtype):
    other = layer().to(dtype)
    pack(other)
    assert type(other) is nn.Linear


def test_subclasses_that_may_compute_otherwise_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(96, 640)
    pack(doubled)
    assert type(doubled) is Doubled


@can_pack
def test_large_models_are_not_held_twice(monkeypatch):
    monkeypatch.setattr(kernel, "MAX_BYTES", 2 * 96 * 640 * 4)
    two, three = nn.ModuleList([layer(), layer()]), nn.ModuleList([layer(), layer(), layer()])
    pack(two)
    pack(three)
    assert {type(module) for module in two} == {PackedLinear}
    assert {type(module) for module in three} == {nn.Linear}


def test_an_unpacked_weight_is_multiplied_as_torch_does():
    plain, x = layer(), inputs(64)
    assert torch.equal(linear(x, plain.weight, plain.bias), functional.linear(x, plain.weight, plain.bias))
