"""What a model does around its head is found by calling it, and done as it does it or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from ds_longft.errors import ModelError
from ds_longft.sequence.head import HeadRule, head_rule
from tests.distributed.models import tiny_config, tiny_model


class Custom(LlamaForCausalLM):
    """A model's own code: what it does to hidden states, by its head, and to logits."""

    def before(self, hidden: Any) -> Any:
        return hidden

    def project(self, hidden: Any) -> Any:
        return self.lm_head(hidden)

    def after(self, logits: Any) -> Any:
        return logits

    def forward(self, input_ids: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, **kwargs)[0]
        return CausalLMOutputWithPast(logits=self.after(self.project(self.before(hidden))))


class MiniCpm(Custom):
    def before(self, hidden: Any) -> Any:
        return hidden / 3

    def after(self, logits: Any) -> Any:
        return (logits * 0.7).float()


class Capped(Custom):
    def after(self, logits: Any) -> Any:
        return 2 * (torch.tanh(logits / 3 / 30) * 30)


class Normed(Custom):
    def before(self, hidden: Any) -> Any:
        return self.model.norm(hidden)


class Shifted(Custom):
    def after(self, logits: Any) -> Any:
        return logits - logits.logsumexp(-1, keepdim=True)


class NormHead(Custom):
    def project(self, hidden: Any) -> Any:
        return F.linear(hidden, F.normalize(self.lm_head.weight).to(hidden.dtype))


class Learned(Custom):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(()))

    def after(self, logits: Any) -> Any:
        return logits * self.scale


class Demanding(Custom):
    def forward(self, input_ids: Any, prompts: Any) -> CausalLMOutputWithPast:  # type: ignore[override]
        raise AssertionError


def test_factors_and_caps_are_found() -> None:
    config = tiny_config()
    assert head_rule(Custom(config)) == HeadRule()
    found = head_rule(MiniCpm(config))
    assert (found.hidden_scale, found.logit_scale) == pytest.approx((1 / 3, 0.7), rel=1e-7)
    found = head_rule(Capped(config))
    assert (found.logit_scale, found.cap) == pytest.approx((2 / 3, 60), rel=1e-9)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
        ("granite", {"logits_scaling": 3.0}),
        ("opt", {"word_embed_proj_dim": 32, "dropout": 0.0}),  # its forward calls the decoder, not what holds it
        ("cohere2", {"logit_scale": 0.25, "sliding_window": 8}),
    ],
)
def test_the_rule_gives_the_logits_of_the_models_own_forward(family: str, changes: dict[str, Any]) -> None:
    model: Any = tiny_model(tiny_config(family, **changes), attn="eager", dtype=torch.float64)
    rule, ids = head_rule(model), torch.arange(3, 20)[None]
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    ours = rule.logits(model.get_output_embeddings()(rule.inputs(hidden)))
    torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-10, atol=1e-12)
    assert "forward" not in vars(model.get_decoder())
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Normed, "does something between decoder and head"),
        (Shifted, "does something after its head"),
        (Learned, "does something after its head"),
        (NormHead, "calls its output head 0 times"),
        (Demanding, r"cannot be told \(TypeError: .*prompts"),
    ],
)
def test_anything_else_is_refused(kind: type[Custom], said: str) -> None:
    model = kind(tiny_config())
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(ModelError, match=rf"{kind.__name__}\.forward.*{said}"):
        head_rule(model)
