"""The step of every causal model type over two ranks, beside transformers' own: which types are proved."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

from transformers import AutoConfig

from ds_longft.config import proof
from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.model.rope import check_rope
from ds_longft.model.supported import OTHER_MODELS, check_class_supported, check_supported
from ds_longft.model.wrapped import is_wrapped, make, on_meta, text_class, whole_class
from tests.distributed.pool import WorkerPool
from tests.unit.sequence.zoo import ACCURACY, Way, ours, tiny, truth

WAYS = {"full": Way("keep_attention"), "lora": Way("full")}
PROVED_FILE = Path(proof.__file__).with_name(proof.FILE)
AGAINST = {
    "llama4": "its own forward fails on any input, for it reads `image_outputs` of its text model's output, which has "
    "none: compared with that forward where None is read there"
}
"""What stood for transformers' own step, where that cannot be had as it is."""
LARGEST = 60_000_000
"""Weights; a type whose smallest model is larger would take too long."""


def walk(rank: int, world: int, model_type: str) -> dict[str, str | float]:
    """What `model_type` is: {"proved": worst error}, {"refused": why}, {"wrong": where} or {"unknown": why no model}.

    Two documents over the ranks of one sp group, windows shorter than they are; loss and every gradient, of all weights
    and of adapters.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if model_type in OTHER_MODELS:  # some have no valid config by default
        return {"refused": f"{model_type} {OTHER_MODELS[model_type]}"}
    try:
        check_supported(AutoConfig.for_model(model_type))
    except ModelError as error:
        return {"refused": str(error)}
    except Exception:  # no valid default: the small one may be
        pass
    try:
        config = tiny(model_type)
        size = sum(p.numel() for p in on_meta(whole_class(config), config).parameters())
        if size > LARGEST:
            return {"unknown": f"its smallest model here has {size:,} weights"}
    except Exception as error:
        return {"unknown": _first_line(error)}
    layout, worst, remark = ParallelLayout.create(world), 0.0, {}
    try:
        check_supported(config)
        model = make(text_class(config), copy.deepcopy(config))
        of_text = type(model.get_decoder() if is_wrapped(config) else model)
        check_class_supported(of_text, config.get_text_config().model_type)
        check_rope(model, config)
    except ModelError as error:
        return {"refused": str(error)}
    for kind, way in WAYS.items():
        try:
            step = ours(config, way, lora=kind == "lora", layout=layout)
        except ModelError as error:
            if kind == "full":
                return {"refused": str(error)}
            remark = {"lora": str(error)}
            continue
        except Exception as error:
            return {"wrong": f"{kind}: {_first_line(error)}"}
        if rank:
            continue
        try:
            loss, gradient, name = step.errors(truth(config, lora=kind == "lora"))
        except Exception as error:
            return {"unknown": f"{kind}: {_first_line(error)}"}
        worst = max(worst, loss, gradient)
        if not worst <= ACCURACY:
            return {"wrong": f"{kind}: loss off by {loss:.1e}, {name} by {gradient:.1e} of the gradient"}
    text = {"text": config.get_text_config().model_type} if is_wrapped(config) else {}
    against = {"against": AGAINST[model_type]} if model_type in AGAINST else {}
    return {"proved": float(f"{worst:.1e}"), **text, **against, **remark}


def find(pool: WorkerPool, model_type: str) -> dict[str, str | float]:
    """`walk` on the ranks of a pool; a type that ends them is "unknown"."""
    try:
        found: dict[str, str | float] = pool.run(walk, model_type, timeout_s=600)[0]
    except AssertionError as error:
        said = str(error)
        return {"unknown": "its process dies" if "the process died" in said else said.splitlines()[-1][:200]}
    return found


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
