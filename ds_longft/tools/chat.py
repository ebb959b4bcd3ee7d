"""`ds-longft chat RUN`: talk to a run's result in the terminal. For serving it to others see docs/serve.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ds_longft.errors import ConfigError

SERVE = "To serve it: ds-longft export {model} {model}-merged, then vllm serve {model}-merged"


def chat(
    model: str,
    *,
    question: str | None = None,
    text: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    before: bool = False,
    base: str | None = None,
) -> None:
    """Talk to a model: a line is a question, an empty line or Ctrl-D ends it. /new forgets what was said.

    One question and its answer alone: `--question "..."`, or from a pipe: `ds-longft chat runs/mine < question.txt`.

    Args:
        model: output folder of a run, adapter, model folder or hub id.
        question: answer this and end.
        text: file that the first question is about, put before it.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time.
        before: talk to the model that the run MODEL started from.
        base: the base model of an adapter, where it has moved.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"--max_new_tokens is {max_new_tokens}, --temperature is {temperature}: expected 1 or more, and 0 or more"
        )
    about = Path(text).expanduser().read_text(encoding="utf-8") + "\n\n" if text else ""
    from ds_longft.tools.evaluate.generate import end_ids
    from ds_longft.tools.evaluate.subject import find_subject, load_subject, one_device, subject_tokenizer

    subject = find_subject(model, before=before, base=base)
    tokenizer = subject_tokenizer(subject)
    print(f"ds-longft chat: loading {subject.shown} ...", file=sys.stderr, flush=True)  # stdout holds the answer alone
    loaded = load_subject(subject, one_device(), attention="sdpa")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": sorted(end_ids(loaded, tokenizer)), **sampling}
    if question is not None or not sys.stdin.isatty():
        asked = question if question is not None else sys.stdin.read()
        _answer(loaded, tokenizer, [{"role": "user", "content": about + asked}], options)
        return
    print(f"{subject.shown} on {loaded.device}. {SERVE.format(model=model)}")
    turns: list[dict[str, str]] = []
    while line := _line():
        if line == "/new":
            turns = []
            continue
        turns.append({"role": "user", "content": about + line})
        about = ""
        turns.append({"role": "assistant", "content": _answer(loaded, tokenizer, turns, options)})


def _answer(loaded: Any, tokenizer: Any, turns: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Print the answer as it is made; returns it."""
    import torch
    from transformers import TextStreamer

    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer("\n".join(turn["content"] for turn in turns))["input_ids"]
    prompt = torch.tensor([ids], device=loaded.device)  # [1, n]
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else options["eos_token_id"][0]
    with torch.no_grad():
        out = loaded.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, use_cache=True,
            pad_token_id=pad, **options,
        )  # fmt: skip
    answer: str = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return answer


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""
