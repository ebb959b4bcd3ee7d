"""Where an evaluation's weights lie: whole on each GPU, shared, or streamed from host memory; whether all fits there.

Told before a weight is loaded, by the sizes that training is planned with. Nothing is kept for a backward pass: beside
the weights lie keys and values of what is read, states, and the tensors of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig

from ds_longft.decide.held import SLOTS, STREAMED
from ds_longft.decide.memory import SPARE_SHARE
from ds_longft.decide.setting import GIB, Setting
from ds_longft.decide.tensors import Sizes, bytes_of_layers, made_dense
from ds_longft.decide.where_base_lies import HOST_SHARE
from ds_longft.errors import ConfigError
from ds_longft.model.facts import ModelFacts
from ds_longft.model.load_packed import base_format
from ds_longft.ranks.node_memory import node_memory_gib
from ds_longft.tools.evaluate.processes import Processes
from ds_longft.tools.evaluate.subject import Subject, subject_config
from ds_longft.train.device_memory import total_and_outside_torch

Place = Literal["resident", "sharded", "host"]
"""As `model.base` has them."""

ELEMENT_BYTES = 2  # bfloat16
MLP_TILE_TOKENS = 8192
"""Of a prompt at a time in a gated MLP: its features, 14,336 in a Llama-8B, are the widest thing a GPU holds."""


@dataclass(frozen=True)
class Asked:
    """The most that is read at a time."""

    tokens: int  # of all texts
    texts: int = 1
    answer_tokens: int = 0  # of each; 0: nothing is kept


@dataclass(frozen=True)
class Room:
    """What is there, and what is asked of it."""

    facts: ModelFacts
    config: PretrainedConfig  # of the text model
    sp: int
    world: int
    quantize: str  # format of the weights, "" where they are dense
    memory_gib: float  # of each GPU
    host_gib: float  # of the node

    @classmethod
    def of(cls, subject: Subject, processes: Processes) -> Room:
        """On GPUs. Collective: that of the fullest."""
        hf_config, layout = subject_config(subject, "eager"), processes.layout
        form = base_format(hf_config, subject.base)
        total, outside = total_and_outside_torch(processes.device)
        memory_gib = processes.least((total - outside) / GIB)
        facts, text = ModelFacts.from_config(hf_config), hf_config.get_text_config()
        return cls(facts, text, layout.sp, layout.world, form.name if form else "", memory_gib, node_memory_gib())

    def place(self, asked: Asked, where: Place | Literal["auto"]) -> Place:
        """Where the weights are to lie; `auto`: at the first place beside which all that is asked fits.

        Raises:
            ConfigError: it fits nowhere, or not as was wished, with what would help.
        """
        open_to_us: list[Place] = ["resident", "sharded", "host"]
        if not self.world == self.sp > 1:
            open_to_us.remove("sharded")
        for place in open_to_us if where == "auto" else [where]:
            if self._fits(asked, place):
                return place
        place = open_to_us[-1] if where == "auto" else where
        parts = self.needed_gib(asked, place)
        helps = {
            "more GPUs for each text (--sp)": self.sp < self.facts.most_ranks,
            "fewer texts at a time (--batch_tokens)": asked.texts > 1,
            "weights that lie elsewhere (--weights auto)": where != "auto",
            "fewer bits (--quantize nf4)": not self.quantize,
        }
        raise ConfigError(
            f"{asked.tokens:,} tokens of {asked.texts} text(s), and {asked.answer_tokens:,} more of each, take "
            f"{sum(parts.values()):.1f} GiB of each GPU, and {self._usable:.1f} can be used ("
            + ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items())
            + f"; weights {place}, {self._host_gib(place):.1f} GiB of the host's {self.host_gib:.0f}). What helps: "
            + (", ".join(name for name, does in helps.items() if does) or "shorter texts")
        )

    def needed_gib(self, asked: Asked, place: Place) -> dict[str, float]:
        """GiB on the fullest GPU."""
        parts = {
            "weights": self._weights(place),
            "keys, values and states": self._kept(asked) if asked.answer_tokens else 0.0,
            "one layer's work": self._work(asked),
        }
        return {name: size / GIB for name, size in parts.items()}

    @property
    def _usable(self) -> float:
        return self.memory_gib * (1 - SPARE_SHARE)

    def _fits(self, asked: Asked, place: Place) -> bool:
        on_gpu = sum(self.needed_gib(asked, place).values()) <= self._usable
        return on_gpu and self._host_gib(place) <= HOST_SHARE * self.host_gib

    def _host_gib(self, place: Place) -> float:
        return bytes_of_layers(self.facts, self._setting(1)) / GIB if place == "host" else 0.0

    def _setting(self, tokens: int) -> Setting:
        return Setting(
            (tokens,), self.sp, self.world, lora_r=None, stage=0, quantize=self.quantize,
            element_bytes=ELEMENT_BYTES, tile_tokens=MLP_TILE_TOKENS,
        )  # fmt: skip

    def _weights(self, place: Place) -> float:
        facts, setting = self.facts, self._setting(1)
        layers = bytes_of_layers(facts, setting)
        whole = ELEMENT_BYTES * (facts.weights - facts.layers_weights) + made_dense(facts, setting)
        if place not in STREAMED:
            return whole + layers
        slots = SLOTS * layers * facts.largest_layer / facts.layers_weights
        return whole + slots + (layers / self.world if place == "sharded" else 0.0)

    def _kept(self, asked: Asked) -> float:
        facts = self.facts
        tokens = -(-asked.tokens // self.sp) + asked.texts * asked.answer_tokens
        latent = getattr(self.config, "kv_lora_rank", None)  # of all heads (DeepSeek)
        of_token = latent + self.config.qk_rope_head_dim if latent else 2 * facts.kv_heads * facts.head_dim
        keys = sum(each.attends for each in facts.by_layer) * tokens * of_token * ELEMENT_BYTES
        of_states = (s.heads * s.keys * s.values for each in facts.by_layer if (s := each.state))
        return float(keys + 4 * asked.texts * sum(of_states) / self.sp)

    def _work(self, asked: Asked) -> float:
        """The largest of all layers' attention, state and MLP, and the logits."""
        setting, e, most = self._setting(asked.tokens), ELEMENT_BYTES, 0.0
        for kind in self.facts.kinds:
            x = Sizes(kind, setting)
            inputs = 2 * x.u + x.q + 2 * x.k  # the stream, normed, and what is made of it
            attention = inputs + x.q + x.k + x.send + 2 * x.qs + 2 * x.kr + 2 * x.ks * x.repeated + x.lse
            state = 2 * x.u + x.state.projected + x.state.given + x.state.out + x.state.forward if x.state else 0.0
            tile = x.tile or 1.0
            mlp = 3 * x.u + 3 * x.f * tile
            experts = 0.0
            if kind.experts:
                rows = kind.experts_used * setting.local_tokens * e
                experts = 2 * x.u + rows * (2 * kind.hidden + 3 * kind.expert_inter)
            most = max(most, attention, state, mlp, experts)
        return most + asked.texts * self.facts.vocab * (8 + e)
