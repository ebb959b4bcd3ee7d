"""A model whose decoder layers' frozen weights lie in a home (`sequence/frozen.py`) from the start: no GPU and no host
ever holds more copies of it than its home does.

Rank 0 reads it, into host memory that the file system shares with its cache. The others build it without memory. Then
each layer is sent to every rank, which keeps its home's part of it; all other weights go to every rank whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_longft.decide.decisions import Run
from ds_longft.errors import LongftError
from ds_longft.model.load import fill_random, load_model, skeleton
from ds_longft.model.packed import how_packed
from ds_longft.model.supported import decoder_layers
from ds_longft.sequence.frozen import FrozenLayers, Home, HostHome, ShardHome, parts_of, size_of


class Rest(NamedTuple):
    """A tensor outside of the layers' parts, under all its names: tied ones stay one."""

    places: list[tuple[str, str]]  # path of a module, name in it
    parameter: bool
    shape: tuple[int, ...]
    dtype: torch.dtype


def load_frozen(run: Run, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, FrozenLayers]:
    """The model in `dtype` with its layers' frozen weights in the home that `run.base` names. Collective.

    Raises:
        ModelError: as `load_model`, of rank 0's reading, on every rank.
    """
    reads, error = dist.get_rank() == 0, None
    made_here = run.config.model.random_weights and device.type == "cuda"  # a layer at a time, on the GPU
    trained = run.config.lora.modules_to_save if run.config.lora is not None else ()
    described: list[Any] = [None, None, None, None]
    try:
        if reads and not made_here:
            model = load_model(
                run.config.model, run.hf_config, ds_engine_config=None, dtype=dtype, device=torch.device("cpu"),
                seed=run.config.seed,
            )  # fmt: skip
        elif reads:
            model = skeleton(run.config.model, run.hf_config, dtype)
        if reads:
            layers = decoder_layers(model)
            parts = [parts_of(layer, trained) for layer in layers]
            described = [parts, _rest(model, layers, trained), None, how_packed(model)]
    except LongftError as problem:
        described[2] = error = problem
    dist.broadcast_object_list(described, src=0)
    error = error or described[2]
    if error is not None:
        raise error
    parts, rest = described[:2]
    if not reads:
        model = skeleton(run.config.model, run.hf_config, dtype, described[3])
    layers = decoder_layers(model)
    frozen = FrozenLayers(layers, parts, _home(run, [size_of(of) for of in parts], device), device)
    torch.manual_seed(run.config.seed)
    for i, (layer, of) in enumerate(zip(layers, parts, strict=True)):
        if reads and made_here:
            fill_random(model, [*layer.modules()], device)
        memory = torch.zeros(size_of(of), dtype=torch.uint8, device=device)
        if reads:
            for part in of:
                part.seen_in(memory).copy_(getattr(layer.get_submodule(part.path), part.name).detach())
        dist.broadcast(memory, 0)
        frozen.put(i, memory)
    frozen.home.ready()
    inside = {id(module) for layer in layers for module in layer.modules()}
    if reads and made_here:
        fill_random(model, [module for module in model.modules() if id(module) not in inside], device)
    _spread(model, rest, reads, device)
    return model, frozen


def _home(run: Run, sizes: list[int], device: torch.device) -> Home:
    return HostHome(sizes, device, run.local_world) if run.base == "host" else ShardHome(sizes, device)


def _rest(model: nn.Module, layers: list[nn.Module], trained: Any) -> list[Rest]:
    """All other tensors of a model: embeddings, head, norm, frequencies, also those that are no buffers."""
    put = {(id(layer.get_submodule(part.path)), part.name) for layer in layers for part in parts_of(layer, trained)}
    found: dict[int, tuple[Tensor, bool, list[tuple[str, str]]]] = {}
    for path, module in model.named_modules():
        for holder, name, tensor in _tensors(module):
            if (id(module), name) not in put:
                own = found.setdefault(id(tensor), (tensor, holder is module._parameters, []))
                own[2].append((path, name))
    return [Rest(places, parameter, tuple(t.shape), t.dtype) for t, parameter, places in found.values()]


def _tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for holder in (module._parameters, module._buffers, vars(module)):
        for name, value in holder.items():
            if isinstance(value, Tensor):
                yield holder, name, value


def _spread(model: nn.Module, rest: list[Rest], reads: bool, device: torch.device) -> None:
    """Rank 0's tensors on every rank's device."""
    for each in rest:
        homes = [model.get_submodule(path) for path, _ in each.places]
        if reads:
            tensor = getattr(homes[0], each.places[0][1]).detach().to(device).contiguous()
        else:
            tensor = torch.empty(each.shape, dtype=each.dtype, device=device)
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)
        value = nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if each.parameter else tensor
        for module, (_, name) in zip(homes, each.places, strict=True):
            holder = next((h for h, own, _ in _tensors(module) if own == name), vars(module))
            holder[name] = value
