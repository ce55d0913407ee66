"""liger's fused cross-entropy against all logits at once. On a CPU its kernels run in Triton's interpreter, which must
be chosen before Triton is imported: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medusa.model import Backbone
from medusa.training.fused import choose_cross_entropy

CPU = torch.device("cpu")

COMPARE = """
import torch
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, GraniteConfig, LlamaConfig
from medusa.training.fused import LigerCrossEntropy

device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator().manual_seed(0)
cases = [(LlamaConfig(), lambda x: x), (GraniteConfig(logits_scaling=2.0), lambda x: x / 2.0)]
if device == "cuda":  # the interpreter does not run the kernel's soft-cap
    cases.append((Gemma2Config(final_logit_softcapping=5.0), lambda x: 5.0 * torch.tanh(x / 5.0)))
for config, cap in cases:
    features = torch.randn(37, 32, generator=generator).to(device).requires_grad_()
    weight = torch.randn(70, 32, generator=generator).to(device).requires_grad_()
    targets = torch.randint(0, 70, (37,), generator=generator).to(device)
    targets[::5] = -100
    sums = LigerCrossEntropy(config)(features, weight, targets)
    logits = cap(features @ weight.T)
    loss = cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(sums[0].float(), loss, rtol=1e-4, atol=1e-4)
    assert sums[1] == ((logits.argmax(-1) == targets) & (targets >= 0)).sum(), sums
    ours, theirs = (torch.autograd.grad(0.5 * x, [features, weight]) for x in (sums[0], loss))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
print("equal")
"""


def test_liger_equals_all_logits_at_once_with_gradients():
    pytest.importorskip("liger_kernel", reason="the optional extra `fused` is not installed")
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env=os.environ | interpreted | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_a_cpu_takes_the_projects_own_whatever_is_installed(tiny_llama):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    assert (
        choose_cross_entropy("auto", backbone, CPU) is None and choose_cross_entropy("chunked", backbone, CPU) is None
    )


def test_liger_is_asked_for_by_name_and_missed_by_name(tiny_llama, monkeypatch):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    monkeypatch.setattr("medusa.training.fused.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs liger-kernel: pip install 'medusa-on-ray\[fused\]'"):
        choose_cross_entropy("liger", backbone, CPU)
