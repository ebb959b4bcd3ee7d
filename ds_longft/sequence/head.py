"""What a model's forward does around its output head: found by asking the model, for configs and remote code name it
as they like.

The chunked loss runs the decoder and the head itself and never the model's forward, so whatever that does in between or
after would be skipped. Here it is called once, with a decoder that hands out random hidden states and a head that hands
out random logits: no weight is read (ZeRO-3 may have partitioned them), and what reaches the head and what comes out of
the model tell the rest. Done here: a constant factor before or after the head (Granite, Cohere, MiniCPM) and a soft
cap of the logits (Gemma). Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ds_longft.errors import LongftError, ModelError

ROWS = 4
TINY, HUGE = 1e-6, 1e9
"""Logits where a soft cap is a straight line, and where it is flat."""

TOLERANCE = 1e-5
"""Relative; the model may compute in float32 here, whatever its weights are."""


@dataclass(frozen=True)
class HeadRule:
    """logits = cap * tanh(logit_scale / cap * head(hidden_scale * hidden)), the cap where there is one."""

    hidden_scale: float = 1.0
    logit_scale: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether logits are what comes out of the head."""
        return self.cap is None and self.logit_scale == 1

    def inputs(self, hidden: Tensor) -> Tensor:
        """What the model hands to its head."""
        return hidden if self.hidden_scale == 1 else hidden * self.hidden_scale

    def logits(self, logits: Tensor) -> Tensor:
        """What the model makes of the head's output."""
        if self.cap is not None:
            return torch.tanh(logits * (self.logit_scale / self.cap)) * self.cap
        return logits if self.logit_scale == 1 else logits * self.logit_scale


class _Decoded(BaseModelOutputWithPast):
    """A decoder's output, without what some models also return."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def head_rule(causal_lm: Any) -> HeadRule:
    """The rule of a transformers causal language model whose head is still its own.
    Raises ModelError: its forward does something else between decoder and logits, or cannot be called so.
    """
    config, name = causal_lm.config.get_text_config(), type(causal_lm).__name__
    device = next(causal_lm.parameters()).device
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, ROWS, config.hidden_size, generator=random, dtype=torch.float64).to(device)
    logits = torch.randn(1, ROWS, config.vocab_size, generator=random, dtype=torch.float64).to(device) * 10
    logits[..., 0], logits[..., 1] = TINY, HUGE
    reached: list[Tensor] = []

    def decode(*_: Any, **__: Any) -> _Decoded:
        return _Decoded(last_hidden_state=hidden)

    def project(x: Tensor, *_: Any, **__: Any) -> Tensor:
        reached.append(x)
        return logits.clone()

    ids = torch.zeros(1, ROWS, dtype=torch.long, device=device)
    decoder, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    # What holds the decoder and not the head: around it a multimodal model asks for its towers, which are left out. OPT
    # passes it by and calls its decoder.
    holders = (m for m in causal_lm.modules() if any(part is decoder for part in m.modules()))
    holder = next(m for m in holders if all(part is not head for part in m.modules()))
    embedding = causal_lm.get_input_embeddings()
    try:
        with (
            _replaced(embedding, lambda *_, **__: hidden),
            _replaced(holder, decode),
            _replaced(decoder, decode),
            _replaced(head, project),
            torch.enable_grad(),
        ):
            out = causal_lm.forward(input_ids=ids).logits
    except Exception as error:  # of any code that a model brings along
        said = str(error) if isinstance(error, LongftError) else f"{type(error).__name__}: {error}"
        raise ModelError(
            f"what {name}.forward does between decoder and logits cannot be told ({said.splitlines()[0]}), and the "
            "chunked loss does not call it"
        ) from error
    if len(reached) != 1:
        raise ModelError(
            f"{name}.forward calls its output head {len(reached)} times; the chunked loss is right where it does once"
        )
    # What requires a gradient was made with a weight that is trained: no constant.
    hidden_scale = None if reached[0].requires_grad else _factor(reached[0], hidden)
    rule = None if hidden_scale is None or out.requires_grad else _rule_of(logits, out, hidden_scale)
    if rule is None:
        where = "between decoder and head" if hidden_scale is None else "after its head"
        raise ModelError(
            f"{name}.forward does something {where} that is neither a constant factor nor a soft cap of the logits, "
            "and which the chunked loss would skip"
        )
    return rule


def _rule_of(logits: Tensor, out: Tensor, hidden_scale: float) -> HeadRule | None:
    """The rule that makes `out` of `logits`, None if there is none."""
    if out.shape != logits.shape:
        return None
    scale, flat = _near_one(float(out[0, 0, 0]) / TINY), float(out[0, 0, 1])
    cap = None if abs(flat - scale * HUGE) <= TOLERANCE * abs(flat) else abs(flat) or None
    rule = HeadRule(hidden_scale, scale, cap)
    return rule if _close(rule.logits(logits), out) else None


def _factor(x: Tensor, base: Tensor) -> float | None:
    """The constant with which x is `base` times it, None if there is none."""
    if x.shape != base.shape:
        return None
    factor = _near_one(float((x.double() * base).sum() / (base * base).sum()))
    return factor if _close(base * factor, x) else None


def _near_one(factor: float) -> float:
    """A factor that is 1 but for rounding is 1."""
    return 1.0 if abs(factor - 1) <= TOLERANCE else factor


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs.double(), rtol=TOLERANCE, atol=1e-9)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, this is the module's forward."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
