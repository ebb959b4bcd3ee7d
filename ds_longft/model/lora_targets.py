"""What of a model adapters are put on, in PEFT's words: names of linear layers, and names of weights.

In dense models both are what `lora.targets` says. In mixtures of experts PEFT (0.21) means something else by the same
names on each family: on some, `all-linear` and `gate_proj` stand for the stacked experts and the router, and the MLPs
that are linear layers stay without. Here `all-linear` is every linear layer but head and routers on each of them, and
the experts are adapted where `lora.experts` asks for it. Where PEFT would take a name for the experts', the layer is
named by its weight (`target_parameters`), which PEFT takes as it stands; files and arithmetic are the same.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import peft
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from ds_longft.config.run_config import LoraConfig
from ds_longft.errors import ModelError
from ds_longft.model.packed import packed_weights
from ds_longft.model.wrapped import is_wrapped, name_of

NOT_ADAPTED = {"jamba": ["dt_proj"], "falcon_h1": ["out_proj"], "nemotron_h": ["out_proj"]}
"""Linears whose weight is read without calling them: Jamba's forward does, the others' fused kernels do elsewhere."""


@dataclass(frozen=True)
class Targets:
    """As `peft.LoraConfig` takes them."""

    modules: str | list[str]
    parameters: list[str] | None = None
    excluded: str | list[str] | None = None  # modules that are called like one of `modules`


def targets_of(model: PreTrainedModel, lora: LoraConfig) -> Targets:
    """What `lora.targets` and `lora.experts` mean on this model.
    Raises ModelError: a name is no linear layer, or there are no experts.
    """
    head, decoder = model.get_output_embeddings(), ""
    if is_wrapped(model.config):
        decoder = name_of(model, model.get_decoder())
    inside = f"{decoder}." if decoder else ""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module is head or name.startswith(inside))
    }
    named = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    if lora.targets != "all-linear":
        check_names("lora.targets", named, list(linears))
    experts = {name: count for name, count in stacked_experts(model).items() if name.startswith(inside)}
    if lora.experts and not experts:
        raise ModelError(f"lora.experts is true, but {model.config.model_type} has no stacked experts: leave it out")
    if lora.targets == "all-linear":
        count = next(iter(experts.values()), None)
        chosen = [name for name, m in linears.items() if m is not head and not _routes(name, m, count)]
    else:
        chosen = [name for name in linears if any(name == n or name.endswith("." + n) for n in named)]
    taken = _taken_by_peft(model, {_leaf(name) for name in chosen}) if experts else set()
    modules = {_leaf(name) for name in chosen} - taken
    excluded = set(NOT_ADAPTED.get(model.config.get_text_config().model_type, ()))
    if lora.targets != "all-linear" and (refused := excluded & modules):
        raise ModelError(
            f"lora.targets names {', '.join(sorted(refused))}, whose weight {model.config.model_type} reads without "
            "calling the layer: an adapter there would do nothing. Leave it out"
        )
    if experts:
        excluded |= {_in_layer(name) for name in linears if _leaf(name) in modules and name not in chosen}
    # Towers may have layers of the same names: there each is named in full.
    parameters = {f"{name if inside else _in_layer(name)}.weight" for name in chosen if _leaf(name) in taken}
    if lora.experts:
        parameters |= {_in_layer(name) for name in experts}
    asked: str | list[str] = sorted(modules)
    if is_wrapped(model.config):
        asked = _inside(decoder, modules, name_of(model, head))
    elif not experts:
        asked = lora.targets if lora.targets == "all-linear" else named
    left_out: str | list[str] | None = sorted(excluded) or None
    if is_wrapped(model.config) and experts:  # PEFT makes plain names of the pattern where it knows a mixture's type
        outside = rf"(?!{re.escape(inside)}|{re.escape(name_of(model, head))}$).*"
        left_out = "|".join([outside, *(rf"(?:.*\.)?{re.escape(name)}" for name in sorted(excluded))])
    return Targets(asked, sorted(parameters) or None, left_out)


def _routes(name: str, linear: nn.Linear, experts: int | None) -> bool:
    """Whether a linear chooses the experts of a token: it has their number of outputs, and such a name."""
    return linear.out_features == experts and not {"router", "gate", "classifier"}.isdisjoint(name.split("."))


def _inside(decoder: str, names: set[str], head: str) -> str:
    """In a multimodal model a pattern of the text model's layers alone: PEFT would adapt layers of the same names in
    the towers too, where the adapter is loaded with them.
    """
    pattern = rf"{re.escape(decoder)}\.(?:.*\.)?(?:{'|'.join(sorted(map(re.escape, names)))})"
    return "|".join([pattern, *([re.escape(head)] if _leaf(head) in names else [])])


def stacked_experts(model: nn.Module) -> dict[str, int]:
    """Weights that hold all experts of a layer: name -> number of experts. Shapes under ZeRO-3 are DeepSpeed's."""
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in model.named_parameters() if id(p) not in convolutions}
    shapes |= {name: packed.shape for name, packed in packed_weights(model)}
    return {name: int(shape[0]) for name, shape in shapes.items() if len(shape) == 3}


def adapted_in_words(model: nn.Module) -> str:
    """Which layers of a mixture are adapted, and whether its experts are; "" of other models."""
    stacks = stacked_experts(model)
    if not stacks or not isinstance(model, peft.PeftModel):
        return ""
    adapted = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    experts = {m.parameter_name for m in adapted.values() if isinstance(m, ParamWrapper) and m.num_experts > 1}
    linears = {_leaf(n) for n, m in adapted.items() if not (isinstance(m, ParamWrapper) and m.num_experts > 1)}
    count = next(iter(stacks.values()))
    said = f"adapters on {', '.join(sorted(linears))}"
    if experts:
        return f"{said}, and on {', '.join(sorted(experts))} of each of a layer's {count} experts, not on routers"
    return f"{said}; not on the {count} experts of a layer (lora.experts: true adapts them), nor on routers"


def check_names(key: str, wanted: list[str], present: list[str]) -> None:
    """PEFT ignores a name that matches nothing as long as another one matches: a typo would train fewer layers."""
    unknown = [w for w in wanted if not any(name == w or name.endswith("." + w) for name in present)]
    if not unknown:
        return
    short = sorted({_leaf(name) for name in present})
    near = difflib.get_close_matches(unknown[0], short, n=1)
    raise ModelError(
        f"{key}: no layer of the model is called {', '.join(map(repr, unknown))}"
        + (f" (did you mean {near[0]!r}?)" if near else "")
        + f"; it has: {', '.join(short)}"
    )


def _taken_by_peft(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Names that PEFT takes for the experts' and the router's of this family, as earlier versions of it had them."""
    whole = names | {"gate_proj", "up_proj", "down_proj"}  # PEFT refuses a part of what was fused
    asked = peft.LoraConfig(target_modules=sorted(whole))
    convert_peft_config_for_transformers(asked, model=model, conversions=None)
    return names - set(asked.target_modules or ())


def _leaf(name: str) -> str:
    """model.layers.3.up_proj -> up_proj; of one in a list altup_projections.0, as 0 would name a layer too."""
    return re.findall(r"[^.]+(?:\.\d+)*$", name)[0]


def _in_layer(name: str) -> str:
    """model.layers.3.mlp.experts.down_proj -> mlp.experts.down_proj: the same of every layer."""
    return re.split(r"\.layers\.\d+\.", name)[-1]
