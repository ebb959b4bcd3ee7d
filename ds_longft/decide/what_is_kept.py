"""What waits for the backward pass, and where: layer inputs, attention outputs, outputs of linears.

`place` decides before the model is built, `spend` also in a run, of what a rehearsed step left free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ds_longft.decide.held import step_timeline
from ds_longft.decide.setting import GIB, Setting
from ds_longft.decide.simulated_step import bytes_away
from ds_longft.decide.tensors import AWAY, Keep, Sizes, by_layer
from ds_longft.model.facts import ModelFacts
from ds_longft.sequence.kept import LEAVING


def place(model: ModelFacts, setting: Setting, room: float) -> tuple[tuple[Keep, ...], float]:
    """Layer inputs and attention outputs: on the GPU what fits into `room` bytes, then on host, on disk, nowhere.

    Later layers stay on the GPU: what the first ones send away has the longest time to go and to come back. Inputs for
    the disk are those of layers at even distances, so that its writes have the whole pass to go in. Without host memory
    and disk everything that the policy keeps stays on the GPU. Also the bytes on this rank's host.
    """
    setting = setting.of_a_pass
    allowed, count = host_share(setting), model.layers
    disk = setting.disk_gib * GIB / (setting.local_world or setting.world)
    plain = (Keep(),) * count
    if not (allowed or disk) or setting.recompute == "none" or step_timeline(model, setting, plain).peak <= room:
        return plain, 0.0
    sizes, keeping = Sizes(model, setting), setting.recompute in ("keep_attention", "auto")
    inputs = segment_starts(model, setting) if setting.recompute in ("every_k", "sqrt") else range(count)
    away = [Keep(attention="", input="host" if i in inputs else "device") for i in range(count)]
    host = sizes.u * len(inputs)
    free = room - step_timeline(model, setting, tuple(away)).peak
    attentions = [of_layer.q + of_layer.lse for of_layer in by_layer(model, setting)]
    transit = LEAVING * max(attentions) if keeping else 0.0
    for i in reversed(inputs):  # the peak holds every input that stays
        if sizes.u > free - transit:
            break
        away[i] = replace(away[i], input="device")
        free, host = free - sizes.u, host - sizes.u
    over = [i for i in inputs if away[i].input == "host"]
    moved = min(len(over), math.ceil(max(0.0, host - allowed) / sizes.u), int(min(disk / sizes.u, len(over))))
    for n in range(moved):
        i = over[n * len(over) // moved]
        away[i] = replace(away[i], input="disk")
        host, disk = host - sizes.u, disk - sizes.u
    for i in reversed(range(count if keeping else 0)):
        attention = attentions[i]
        if attention <= free - transit:
            away[i] = replace(away[i], attention="device")
            free -= attention
        elif host + attention <= allowed and transit <= free:
            away[i] = replace(away[i], attention="host")
            host += attention
        elif attention <= disk and transit <= free:
            away[i] = replace(away[i], attention="disk")
            disk -= attention
    return tuple(away), host


def spend(
    costs: Sequence[Mapping[tuple[str, ...], float]], free: float, host_free: float
) -> tuple[list[dict[tuple[str, ...], str]], float, float]:
    """Which linears' outputs wait for the backward pass, and where: "device" or "host".

    A kept element saves the same time in every linear that reads the hidden states (2 * hidden size operations), so
    what counts is what fits. q, k and v come first, and stay on the device. Of the rest later layers come first.
    Device and host take turns, so that copies have the whole pass to go in: where 22 layers in a row (Llama-8B, eight
    documents of 16,384 tokens, two H200s) sent 4.0 GiB each in the time of 3.0 GiB, a step of 5.9 s waited for 0.5 s.
    The last layer stays on the device, it is wanted at once. Two layers' share of the host is on the GPU at a time.

    Args:
        costs: of each layer, names of a group of linears -> bytes that keeping its outputs takes.
        free: bytes on the device.
        host_free: bytes on this rank's host.

    Returns the places of each layer's groups, and the bytes spent on the device and on the host.
    """
    places: list[dict[tuple[str, ...], str]] = [{} for _ in costs]
    on_device = on_host = spread = 0.0
    groups = [(i, names, cost) for i in reversed(range(len(costs))) for names, cost in costs[i].items() if cost]
    groups.sort(key=lambda x: ("q_proj" not in x[1], -x[0], x[2]))
    movable = sum(cost for _, names, cost in groups if "q_proj" not in names)
    if host_free:
        free -= LEAVING * max((sum(c for n, c in layer.items() if "q_proj" not in n) for layer in costs), default=0.0)
    if free <= 0:
        return places, 0.0, 0.0
    still = max(0.0, free - sum(cost for _, names, cost in groups if "q_proj" in names))  # of the device, for the rest
    away = max(0.0, min(host_free, movable - still))
    for i, names, cost in groups:
        fixed = "q_proj" in names
        spread += 0.0 if fixed else cost
        fits, to_host = on_device + cost <= free, not fixed and on_host + cost <= host_free
        if to_host and (not fits or (on_host + cost) * (still + away) <= away * spread):
            places[i][names] = "host"
            on_host += cost
        elif fits:
            places[i][names] = "device"
            on_device += cost
    return places, on_device, on_host


def segment_starts(model: ModelFacts, setting: Setting) -> range:
    """First layers of the segments of `every_k` and `sqrt`."""
    size = setting.every if setting.recompute == "every_k" else max(1, round(model.layers**0.5))
    return range(0, model.layers, size)


def host_share(setting: Setting) -> float:
    """Bytes of host memory that a rank may use for kept tensors."""
    return setting.host_gib * GIB / (setting.local_world or setting.world)


def bytes_elsewhere(model: ModelFacts, setting: Setting, keep: Sequence[Keep], where: tuple[str, ...] = AWAY) -> float:
    """Bytes of what a rank keeps on the host or the disk."""
    layers = zip(by_layer(model, setting), keep, strict=True)
    return sum(sum(bytes_away(z, k, where)) for z, k in layers)
