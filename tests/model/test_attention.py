"""Every backend against the manual one: the same numbers, forward and backward."""

import sys
import types
from itertools import pairwise

import pytest
import torch

from nanophi.model import backends
from nanophi.model.attention import AttentionPlan, attend, same_document
from nanophi.model.backends import (
    BACKENDS,
    choose_backend,
    flash_kernel,
    preferred_kernels,
    varlen,
)
from nanophi.model.phi import KVCache
from nanophi.model.speed import speed_up
from tests.conftest import tiny_model

BOUNDARIES = torch.tensor(
    [0, 5, 6, 16, 23, 32], dtype=torch.int32
)  # two rows of 16; a document of one token


def inputs(width=60, heads=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, 16, width, generator=generator, dtype=dtype).requires_grad_()
        for _ in range(3)
    ]


def stand_in(q, k, v, cu_seqlens, longest, scale):
    """What a flash kernel does, written out; it also checks what such kernels ask for."""
    assert q.shape == k.shape == v.shape == (32, 3, 64)
    assert q.shape[-1] % 8 == 0
    assert cu_seqlens.dtype == torch.int32
    assert longest >= cu_seqlens.diff().max()
    out = []
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores = torch.einsum("qhk,shk->hqs", q[a:b], k[a:b]) * scale
        hidden = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        out.append(
            torch.einsum(
                "hqs,shk->qhk", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[a:b]
            )
        )
    return torch.cat(out)


def by_hand(q, k, v):
    return attend(q, k, v, AttentionPlan("manual", visible=same_document(BOUNDARIES, 2, 16)))


@pytest.mark.parametrize("backend", ["sdpa", "documents", "varlen"])
def test_backends_agree_forward_and_backward(backend, monkeypatch):
    monkeypatch.setattr(backends, "flash_kernel", lambda: stand_in)
    results = []
    for name in ("manual", backend):
        q, k, v = inputs()
        mask = (
            {"cu_seqlens": BOUNDARIES}
            if name in ("documents", "varlen")
            else {"visible": same_document(BOUNDARIES, 2, 16)}
        )
        out = attend(q, k, v, AttentionPlan(name, **mask))
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (out * weights).sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    # the manual softmax is in fp32, as half precision needs it
    assert max((a - b).abs().max().item() for a, b in zip(*results, strict=True)) < 1e-6


def test_padded_heads_keep_the_true_scale():
    """60 dimensions run as 64; with the scale of 64 the result would differ by some percent."""
    q, k, v = inputs()
    assert (varlen(q, k, v, BOUNDARIES, stand_in) - by_hand(q, k, v)).abs().max() < 1e-6
    wrong = varlen(q, k, v, BOUNDARIES, lambda *a: stand_in(*a[:-1], 64**-0.5))
    assert (wrong - by_hand(q, k, v)).abs().max() > 1e-3


@pytest.mark.parametrize("api", ["flash_attn", "torch 2.11", "torch 2.10"])
def test_each_kernel_is_called_as_it_wants_to_be(api, monkeypatch):
    """Stand-ins with the signatures of the real functions."""

    def flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, longest_q, longest_k, softmax_scale=None, causal=False
    ):
        assert causal
        assert cu_q is cu_k
        return stand_in(q, k, v, cu_q, longest_q, softmax_scale)

    def newer(q, k, v, cu_q, cu_k, longest_q, longest_k, *, scale=None, window_size=(-1, -1)):
        assert window_size == (-1, 0)
        return stand_in(q, k, v, cu_q, longest_q, scale)

    def older(q, k, v, cu_q, cu_k, longest_q, longest_k, is_causal=False):
        assert is_causal
        return stand_in(q, k, v, cu_q, longest_q, q.shape[-1] ** -0.5)

    package = (
        types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
        if api == "flash_attn"
        else None
    )
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    torchs = types.SimpleNamespace(varlen_attn=older if api == "torch 2.10" else newer)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", torchs)
    flash_kernel.cache_clear()
    q, k, v = inputs()
    assert (varlen(q, k, v, BOUNDARIES) - by_hand(q, k, v)).abs().max() < 1e-6
    flash_kernel.cache_clear()


def test_without_any_kernel_there_is_none(monkeypatch):
    for name in ("flash_attn", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, name, None)
    flash_kernel.cache_clear()
    assert flash_kernel() is None
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16) == "sdpa"
    flash_kernel.cache_clear()


def test_auto_chooses_by_device_and_dtype(monkeypatch):
    monkeypatch.setattr(backends, "flash_kernel", lambda: stand_in)
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_backend("auto", cpu, torch.bfloat16) == "documents"
    assert choose_backend("auto", cuda, torch.bfloat16) == "varlen"
    assert choose_backend("auto", cuda, torch.float32) == "sdpa"
    assert choose_backend("auto", cuda, torch.bfloat16, dropout=0.1) == "sdpa"
    assert choose_backend("manual", cuda, torch.bfloat16) == "manual"
    capability[:] = [7, 5]  # a T4 has tensor cores for fp16, and no flash kernel runs on it
    assert choose_backend("auto", cuda, torch.float16) == "sdpa"


@pytest.mark.parametrize(
    ("capability", "cudnn", "masked", "taken"),
    [
        (9, 91900, False, True),
        (9, 91900, True, False),
        (9, 91002, False, False),
        (10, 91900, True, False),
    ],
)
def test_cudnn_trains_where_it_is_right(capability, cudnn, masked, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    with preferred_kernels(torch.device("cuda"), masked):
        assert torch.backends.cuda.cudnn_sdp_enabled() == taken
        assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("capability", [9, 10])
def test_cudnn_reads_no_prompts(capability, monkeypatch):
    """It would make a new plan for each length."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    with torch.no_grad(), preferred_kernels(torch.device("cuda"), masked=False):
        assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("backend", sorted(BACKENDS.keys() - {"varlen", "causal"}))
def test_a_packed_batch_is_its_documents(backend):
    """Logits and gradients of a packed row are those of the documents alone, on every backend."""
    ids = torch.arange(7, 39).view(2, 16)
    model, alone = tiny_model(), tiny_model()
    model.attention = backend
    packed = model(ids, BOUNDARIES).flatten(0, 1)
    pieces = [alone(ids.flatten()[a:b][None])[0] for a, b in pairwise(BOUNDARIES)]
    assert (packed - torch.cat(pieces)).abs().max() < 1e-5
    packed.logsumexp(-1).sum().backward()
    torch.cat(pieces).logsumexp(-1).sum().backward()
    gradients = zip(model.parameters(), alone.parameters(), strict=True)
    assert max((a.grad - b.grad).abs().max().item() for a, b in gradients) < 1e-5


def test_causal_lets_the_documents_of_a_row_see_each_other():
    ids = torch.arange(7, 39).view(2, 16)
    model = tiny_model()
    model.attention = "causal"
    assert torch.equal(model(ids, BOUNDARIES), model(ids))


def test_varlen_is_plain_causal_where_nothing_is_packed():
    """Sampling during bf16 training on a GPU would have ended in an AttributeError: there are no
    boundaries to mark.
    """
    ids = torch.arange(7, 39).view(2, 16)
    model, manual = tiny_model(), tiny_model()
    model.attention, manual.attention = "varlen", "manual"
    assert (model(ids) - manual(ids)).abs().max() < 1e-5
    cache = KVCache(model.cfg, 2, 16, model.lm_head.weight)
    assert (model(ids, cache=cache) - manual(ids)).abs().max() < 1e-5


def test_in_half_precision_the_branches_share_one_copy_of_their_input():
    """Autocast would make one for each of q, k, v and fc1, and backward keeps them all: a fifth of
    the activations.
    """
    model, kept = tiny_model().train(), {}
    speed_up(model)

    def saved(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(saved, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.hidden(torch.arange(7, 31).view(2, 12))
    inputs = [
        x
        for x in kept.values()
        if x.shape == (24, model.cfg.hidden_size) and x.dtype == torch.bfloat16
    ]
    assert (
        len(inputs) == 2 * model.cfg.num_hidden_layers
    )  # of the four matrices that read it, and of the dense one


def test_recomputing_changes_no_number():
    ids = torch.arange(7, 39).view(2, 16)
    gradients = []
    for recompute in (False, True):
        model = tiny_model().train()
        speed_up(model, recompute=recompute)
        model(ids, BOUNDARIES).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [60, 64])
def test_flash_on_a_device_is_the_manual_path(width):
    if flash_kernel() is None:
        pytest.skip("neither flash-attn nor torch's varlen attention is here")
    q, k, v = (x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in inputs(width))
    boundaries = BOUNDARIES.cuda()
    got = varlen(q, k, v, boundaries)
    want = attend(q, k, v, AttentionPlan("manual", visible=same_document(boundaries, 2, 16)))
    assert (got - want).abs().max() < 2e-2
    for a, b in zip(
        torch.autograd.grad(got.sum(), (q, k, v)),
        torch.autograd.grad(want.sum(), (q, k, v)),
        strict=True,
    ):
        assert (a - b).abs().max() < 5e-2
