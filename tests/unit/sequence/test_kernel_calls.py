"""How the GPU kernels are called and chosen, without a GPU.

The installable kernels are stood in for by functions with the signatures of the real ones (flash-attn-4 4.0.0b36,
flash-attn-3 of 2025-09, flash-attn 2.8.3) that compute with `math`: a call that binds and agrees passes the documents,
scale, window and softcap on rightly. Torch's own kernels are called on the meta device, where torch checks the schema.
The real ones run in tests/gpu.
"""

from __future__ import annotations

import inspect
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from ds_longft.batch import Documents
from ds_longft.errors import ModelError
from ds_longft.sequence import attention
from ds_longft.sequence.attention import SpAttention, _add_sinks, _Call, _sinks_gradient
from ds_longft.sequence.exchange import HeadShare
from ds_longft.sequence.kernels import (
    CUDNN_MIN_WORK,
    AttentionSpec,
    Saved,
    base,
    choose_kernel,
    flash_attn,
    kernel_by_name,
    table,
    torch_builtin,
)

CUDA = torch.device("cuda", 0)
MATH = kernel_by_name("math")
LEAST_TOKENS = math.isqrt(CUDNN_MIN_WORK // (16 * 128))
LENGTHS = [33, 1, 20]
ORDERS = {False}  # of adding to dq, that flash-attn-4 may be asked for now: any order, or (True) a fixed one


def pack(lengths: list[int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as views of one wider buffer, dout, and the borders."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(sum(lengths), 8, 16, generator=generator).to(device)
    q, k, v = wide.split([4, 2, 2], 1)
    dout = torch.randn(q.shape, generator=generator).to(device)
    return q, k, v, dout, torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def as_spec(scale: float, causal: bool, left: int | None, right: int | None, softcap: float | None) -> AttentionSpec:
    """The spec that FlashAttention's arguments mean."""
    assert causal
    assert right in (None, 0)
    window = None if left is None or left < 0 else left + 1
    return AttentionSpec(scale, window, softcap or None)


def lengths_of(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, longest: int | None, tokens: int) -> list[int]:
    """Document lengths, after checking that the arguments agree."""
    if cu_seqlens_q is None:
        assert cu_seqlens_k is None
        return [tokens]
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert longest == max(lengths)
    return lengths


def flash_attention_4() -> dict[str, ModuleType]:
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
        block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
        q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):  # fmt: skip
        assert return_lse
        spec = as_spec(softmax_scale, causal, window_size_left, window_size_right, softcap)
        lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, q.shape[-3])
        one = cu_seqlens_q is None  # [1, S, h, d], lse [1, h, S]
        out, lse = MATH.forward(
            *((q[0], k[0], v[0]) if one else (q, k, v)), Documents(cu_seqlens_q, tuple(lengths)), spec
        )
        if learnable_sink is not None:
            assert learnable_sink.dtype == torch.float32
            out, lse = _add_sinks(out, lse, learnable_sink)
        return (out[None], lse[None], None, None, None) if one else (out, lse, None, None, None)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
        learnable_sink=None,
    ):  # fmt: skip
        spec = as_spec(softmax_scale, causal, window_size_left, window_size_right, softcap)
        assert deterministic in ORDERS
        lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_k, k.shape[-3])
        if cu_seqlens_q is None:  # q may be the last of the queries: those before it give no gradient
            missing = k.shape[1] - q.shape[1]
            q, out, dout = (pad(x, (0, 0, 0, 0, missing, 0)) for x in (q, out, dout))
            lse = pad(lse, (missing, 0))
            grads = MATH.backward(
                dout[0], Saved(q[0], k[0], v[0], out[0], lse[0]), Documents(cu_seqlens_q, tuple(lengths)), spec
            )
            grads = (grads[0][None, missing:], grads[1][None], grads[2][None])
        else:
            grads = MATH.backward(dout, Saved(q, k, v, out, lse), Documents(cu_seqlens_q, tuple(lengths)), spec)
        if learnable_sink is None:
            return grads
        one = (x[0] if cu_seqlens_q is None else x for x in (dout, out, lse))
        return *grads, _sinks_gradient(*one, learnable_sink)

    return _modules("flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd)


def flash_attention_3() -> dict[str, ModuleType]:
    """As real custom ops: torch checks names and types against the schema."""
    t, optional = Tensor, Tensor | None

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        spec = as_spec(softmax_scale, causal, window_size_left, window_size_right, softcap)
        lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, q.shape[0])
        return *MATH.forward(q, k, v, Documents(cu_seqlens_q, tuple(lengths)), spec), q.new_empty(0), q.new_empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        spec = as_spec(softmax_scale, is_causal, window_size_left, window_size_right, softcap)
        lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, q.shape[0])
        grads = MATH.backward(dout, Saved(q, k, v, out, softmax_lse), Documents(cu_seqlens_q, tuple(lengths)), spec)
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            given.copy_(grad)
        return q.new_empty(0)

    numbers = {"max_seqlen_q": int | None, "max_seqlen_k": int | None, "softmax_scale": float | None, "causal": bool,
               "is_causal": bool, "window_size_left": int, "window_size_right": int, "attention_chunk": int,
               "softcap": float, "rotary_interleaved": bool, "num_splits": int, "pack_gqa": bool | None,
               "sm_margin": int, "deterministic": bool}  # fmt: skip
    always = {"q", "k", "v", "dout", "out", "softmax_lse"}
    for function, returns in ((_flash_attn_forward, tuple[t, t, t, t]), (_flash_attn_backward, t)):
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        function.__annotations__ = {n: numbers.get(n, t if n in always else optional) for n in names}
        function.__annotations__["return"] = returns
    forward = torch.library.custom_op("ds_longft_tests::fa3_forward", _flash_attn_forward, mutates_args=())
    backward = torch.library.custom_op(
        "ds_longft_tests::fa3_backward", _flash_attn_backward, mutates_args=("dq", "dk", "dv")
    )
    return _modules("flash_attn_interface", _flash_attn_forward=forward, _flash_attn_backward=backward)


def flash_attention_2() -> dict[str, ModuleType]:
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0
        spec = as_spec(softmax_scale, causal, window_size_left, window_size_right, softcap)
        lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, q.shape[0])
        return *MATH.forward(q, k, v, Documents(cu_seqlens_q, tuple(lengths)), spec), q.new_empty(0), q.new_empty(0)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0
        spec = as_spec(softmax_scale, causal, window_size_left, window_size_right, softcap)
        lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_k, q.shape[0])
        grads = MATH.backward(dout, Saved(q, k, v, out, softmax_lse), Documents(cu_seqlens_q, tuple(lengths)), spec)
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            given.copy_(grad)
        return q.new_empty(0)

    return _modules("flash_attn.flash_attn_interface", _flash_attn_varlen_forward, _flash_attn_varlen_backward)


def _modules(path: str, *functions: Any, **named: Any) -> dict[str, ModuleType]:
    """The module at `path` holding the functions, and its parent packages."""
    parts = path.split(".")
    modules = {name: ModuleType(name) for name in (".".join(parts[: i + 1]) for i in range(len(parts)))}
    for module in modules.values():
        module.__path__ = []
    for function in functions:
        setattr(modules[path], function.__name__, function)
    for name, function in named.items():
        setattr(modules[path], name, function)
    return modules


STAND_INS = {
    "flash-attn-4": flash_attention_4(),
    "flash-attn-3": flash_attention_3(),
    "flash-attn-2": flash_attention_2(),
}


@pytest.fixture
def installed(monkeypatch):
    """A function that makes exactly the kernels it is given importable."""
    names = {name for modules in STAND_INS.values() for name in modules}

    def install(*kernels: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
        for kernel in kernels:
            for name, module in STAND_INS[kernel].items():
                monkeypatch.setitem(sys.modules, name, module)
        base.import_failure.cache_clear()
        table._choose.cache_clear()

    yield install
    base.import_failure.cache_clear()
    table._choose.cache_clear()


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("lengths", [LENGTHS, [54]], ids=["documents", "one document"])
@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(0.3),
        AttentionSpec(0.3, window=7),
        AttentionSpec(0.3, window=1),
        AttentionSpec(0.3, window=54),
        AttentionSpec(0.3, softcap=2.0),
    ],
    ids=str,
)
def test_installable_kernels_pass_everything_on(installed, name, lengths, spec):
    installed(name)
    q, k, v, dout, borders = pack(lengths)
    kernel = kernel_by_name(name)
    out, lse = kernel.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    expected, expected_lse = MATH.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    grads = kernel.backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec)
    for seen, grad in zip(
        grads, MATH.backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec), strict=True
    ):
        assert torch.equal(seen, grad)


@pytest.mark.parametrize("lengths", [LENGTHS, [54]], ids=["documents", "one document"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("trained", [False, True])
def test_flash_attention_4_takes_sinks_itself(installed, monkeypatch, lengths, window, trained):
    """The step of the kernel's own sinks is that of sinks added behind `math`; frozen ones ask for no gradient."""
    installed("flash-attn-4")
    q, k, v, dout, borders = pack(lengths)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    share, steps = HeadShare(range(4), range(2), None), []
    for name in ("flash-attn-4", "math"):
        call = _Call(
            Documents(borders, tuple(lengths)), kernel_by_name(name), AttentionSpec(0.3, window), None, (share,), share
        )
        if name == "flash-attn-4":  # nothing may be added behind it
            monkeypatch.setattr(attention, "_add_sinks", None)
            monkeypatch.setattr(attention, "_sinks_gradient", None)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        given = sinks.clone().requires_grad_(trained)
        out = SpAttention.apply(*inputs, given, call, None)
        out.backward(dout)
        monkeypatch.undo()
        installed("flash-attn-4")
        steps.append((out.detach(), *(x.grad for x in inputs), given.grad if trained else given))
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("queries", [8, 33, 54])
@pytest.mark.parametrize("lengths", [LENGTHS, [54]], ids=["documents", "one document"])
@pytest.mark.parametrize("mask", [{}, {"window": 7}, {"softcap": 2.0}], ids=str)
def test_a_fixed_order_is_asked_for_long_documents_in_parts(installed, monkeypatch, queries, lengths, mask):
    installed("flash-attn-4")
    monkeypatch.setattr(flash_attn, "REPEATABLE_QUERIES", queries)
    monkeypatch.setattr(sys.modules[__name__], "ORDERS", {True})
    q, k, v, dout, borders = pack(lengths)
    spec = AttentionSpec(0.3, repeatable=True, **mask)
    out, lse = MATH.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    grads = kernel_by_name("flash-attn-4").backward(
        dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec
    )
    expected = MATH.backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("lengths", [LENGTHS, [54]], ids=["documents", "one document"])
def test_memory_efficient_attention_is_called_for_each_kv_head(monkeypatch, lengths):
    """What torch's kernel reads by fixed strides is contiguous, and its log-sum-exp a multiple of 32 tokens long."""

    def forward(
        query, key, value, *, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        custom_mask_type, compute_log_sumexp, scale,
    ):  # fmt: skip
        assert (dropout_p, custom_mask_type, compute_log_sumexp) == (0.0, 1, True)
        out, lse = MATH.forward(
            query[0], key[0], value[0], Documents(cu_seqlens_q, (query.shape[1],)), AttentionSpec(scale)
        )
        return out[None], pad(lse, (0, -lse.shape[1] % 32), value=torch.nan)[None], None, None

    def backward(
        grad_out_, query, key, value, *, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, logsumexp,
        dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, scale,
    ):  # fmt: skip
        length = query.shape[1]
        assert max_seqlen_q == max_seqlen_k == length
        assert out.is_contiguous()
        assert logsumexp.shape == (1, query.shape[2], -(-length // 32) * 32)
        assert logsumexp[..., length:].isinf().all()
        saved = Saved(query[0], key[0], value[0], out[0], logsumexp[0, :, :length])
        return *(
            g[None] for g in MATH.backward(grad_out_[0], saved, Documents(None, (length,)), AttentionSpec(scale))
        ), None

    for function, op in (("forward", forward), ("backward", backward)):  # on meta torch 2.13 drops `out`
        schema = getattr(torch.ops.aten, f"_efficient_attention_{function}").default._schema.arguments
        given = inspect.signature(op).parameters.keys()
        assert {a.name for a in schema if not a.has_default_value()} <= given <= {a.name for a in schema}
    ops = SimpleNamespace(_efficient_attention_forward=forward, _efficient_attention_backward=backward)
    monkeypatch.setattr(torch_builtin, "aten", ops)
    q, k, v, dout, borders = pack(lengths)
    kernel, spec = kernel_by_name("mem-efficient"), AttentionSpec(0.3)
    out, lse = kernel.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    torch.testing.assert_close((out, lse), MATH.forward(q, k, v, Documents(borders, tuple(lengths)), spec))
    saved = Saved(q, k, v, out, lse)
    torch.testing.assert_close(
        kernel.backward(dout, saved, Documents(borders, tuple(lengths)), spec),
        MATH.backward(dout, saved, Documents(borders, tuple(lengths)), spec),
    )


@pytest.mark.parametrize("name", ["cudnn", "varlen"])
@pytest.mark.parametrize("lengths", [[33, 5, 20], [58]], ids=["documents", "one document"])
def test_torch_kernels_bind_to_torchs_schemas(name, lengths):
    q, k, v, dout, borders = (x.bfloat16() if x.is_floating_point() else x for x in pack(lengths, "meta"))
    kernel, spec = kernel_by_name(name), AttentionSpec(0.3)
    out, lse = kernel.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    assert out.shape == q.shape
    assert lse.shape == (q.shape[1], q.shape[0])
    grads = kernel.backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.fixture
def hopper(monkeypatch):
    """A machine with one Hopper GPU and a CUDA build of torch, as far as the choice can see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def choose(name="auto", dtype=torch.bfloat16, heads=16, head_dim=128, spec=None, lengths=(100_000,)):
    return choose_kernel(
        name, device=CUDA, dtype=dtype, heads=heads, head_dim=head_dim, spec=spec or AttentionSpec(0.1), lengths=lengths
    )


@pytest.mark.usefixtures("hopper")
def test_the_newest_flash_attention_installed_is_chosen(installed):
    installed("flash-attn-2", "flash-attn-3", "flash-attn-4")
    assert choose()[0].name == "flash-attn-4"
    installed("flash-attn-2", "flash-attn-3")
    assert choose()[0].name == "flash-attn-3"
    installed("flash-attn-2")
    kernel, reason = choose(spec=AttentionSpec(0.1, window=4096, softcap=30.0))
    assert kernel.name == "flash-attn-2"
    assert "flash-attn-4 not installed" in reason


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("lengths", "heads", "expected"),
    [
        ((LEAST_TOKENS,), 16, "cudnn"),
        ((LEAST_TOKENS - 1,), 16, "varlen"),
        ((2 * LEAST_TOKENS - 1,), 4, "varlen"),  # a quarter of the heads, under a larger sp: twice the length
        ((2 * LEAST_TOKENS,), 4, "cudnn"),
        ((131072, *[300] * 60), 16, "cudnn"),  # one document holds nearly all of the work
        ([2048] * 64, 16, "varlen"),
    ],
)
def test_cudnn_or_one_launch_by_where_the_work_lies(installed, lengths, heads, expected):
    installed()
    kernel, reason = choose(lengths=lengths, heads=heads)
    assert kernel.name == expected
    assert ("too little" in reason) == (expected == "varlen")
    installed("flash-attn-2")  # of the same speed as torch's own
    assert choose(lengths=lengths, heads=heads)[0].name == {"varlen": "flash-attn-2"}.get(expected, expected)


@pytest.mark.usefixtures("hopper")
def test_what_torchs_gpu_kernels_refuse(installed):
    installed()
    assert choose(head_dim=256)[0].name == "varlen"
    assert choose(spec=AttentionSpec(0.1, window=4096))[0].name == "varlen"
    assert choose(spec=AttentionSpec(0.1, window=4096), lengths=(4096,))[0].name == "varlen"
    assert choose(spec=AttentionSpec(0.1, window=100_000))[0].name == "cudnn"  # a window that hides nothing
    assert choose(head_dim=512)[0].name == "mem-efficient"
    assert choose(head_dim=512, spec=AttentionSpec(0.1, window=4096))[0].name == "math"
    assert choose(spec=AttentionSpec(0.1, softcap=30.0))[0].name == "math"
    assert choose(dtype=torch.float32)[0].name == "math"
    assert choose(head_dim=100)[0].name == "math"
    with pytest.raises(ModelError, match=r"cudnn has no sliding window.*fit.*: varlen, math;"):
        choose("cudnn", spec=AttentionSpec(0.1, window=4096))


def test_an_older_gpu_prefers_one_launch(installed, hopper, monkeypatch):
    installed("flash-attn-4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    kernel, reason = choose()
    assert kernel.name == "varlen"
    assert "flash-attn-4 needs compute capability 9.0, this GPU has (8, 0)" in reason


@pytest.mark.usefixtures("hopper")
def test_a_flash_attention_3_with_the_old_signature_is_refused(installed):
    installed("flash-attn-3")
    module = sys.modules["flash_attn_interface"]
    current = module._flash_attn_forward
    module._flash_attn_forward = lambda *args, window_size=(-1, -1): None
    try:
        with pytest.raises(ModelError, match="too old"):
            choose("flash-attn-3")
    finally:
        module._flash_attn_forward = current
