"""`ds-longft plan` from the command line: a config alone, no weights, no GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import AutoConfig

from ds_longft.cli import main
from ds_longft.config.read import load_run_config
from ds_longft.decide.search import Question, fastest, longest_of_each
from ds_longft.decide.setting import Gpu, Setting, shipped_gpus
from ds_longft.errors import EXIT_CONFIG, ConfigError
from ds_longft.model.load import load_config as load_model_config
from ds_longft.tools.plan.plan_text import not_ahead, recipe
from tests.unit.decide.shapes import LLAMA_8B, SMOLLM2, sizes


@pytest.fixture
def llama(tmp_path: Path) -> str:
    AutoConfig.for_model(**{**LLAMA_8B, "max_position_embeddings": 131072}).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_a_table_of_the_longest_lengths(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", llama, "--gpus", "2", "--gpu", "h200", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["longest"]
    by = {(r["sp"], r["recompute"]): r for r in rows}
    assert by[2, "sqrt"]["tokens"] > by[2, "full"]["tokens"] > by[2, "auto"]["tokens"] > by[1, "auto"]["tokens"]
    assert all(r["memory_gib"]["free"] > 0.05 * 139.8 for r in rows)
    assert main(["plan", "--model", llama, "--gpus", "1", "--gpu", "rtx4090"]) == 0
    table = capsys.readouterr().out
    assert "longest pack" in table
    rows = [line.strip("│ ").split("│") for line in table.splitlines() if line.startswith("│")]
    assert rows
    assert all(row[0].strip().isdigit() and len(row) == 7 for row in rows), "a row a line, in a file as well"
    assert "…" not in table


def test_a_recipe_that_the_run_config_reads(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "memory.png"
    assert main(["plan", "--model", llama, "--gpus", "8", "--length", "128K", "--png", str(png)]) == 0
    printed = capsys.readouterr()
    (tmp_path / "recipe.yaml").write_text(printed.out)
    config = load_run_config(["--config", str(tmp_path / "recipe.yaml")])
    assert config.data.max_length_tokens == 131072
    assert config.sp in (1, 2, 4, 8)
    assert config.model.rope.type == "none"
    assert "GiB" in printed.err
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("asked", [[], ["--objective", "dpo", "--full"], ["--host_gib", "200"]])
def test_a_planned_config_is_planned_as_it_was(
    llama: str, tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the search found for a length, written as a run config, is judged by the run's own rules: the same numbers."""
    machine = ["--gpus", "8", "--gpu", "h200"]
    assert main(["plan", llama, *machine, "--length", "64K", *asked]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["plan", llama, *machine, "--length", "64K", "--json", *asked]) == 0
    searched = json.loads(capsys.readouterr().out)
    assert main(["plan", str(path), *machine, "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    same = ("tokens", "sp", "dp", "ds_config", "recompute", "base", "offload_host_gib")
    assert {key: own[key] for key in same} == {key: searched[key] for key in same}
    assert own["peak_gib"] == pytest.approx(searched["peak_gib"], rel=0.02)
    assert own["step_s"] == pytest.approx(searched["step_s"], rel=0.02)
    assert main(["plan", str(path), *machine]) == 0
    shown = capsys.readouterr().out
    assert f"{path} fits on 8 x" in shown
    assert f"peak {own['peak_gib']:.1f} of" in shown


def test_an_epoch_of_tokenized_rows_has_hours(
    llama: str, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save_pretrained(llama)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "one two " * n}) + "\n" for n in (10, 20, 40)))
    words = [
        "--model.path", llama, "--model.random_weights", "true", "--data.train", str(tmp_path / "rows.jsonl"),
        "--data.max_length_tokens", "1K", "--data.cache_dir", str(tmp_path / "cache"), "--data.packing", "none",
    ]  # fmt: skip
    (tmp_path / "mine.yaml").write_text("{}")
    asked = [str(tmp_path / "mine.yaml"), *words]
    assert main(["plan", *asked, "--gpus", "1"]) == 0
    assert "how long an epoch takes is known once `ds-longft data tokenize" in capsys.readouterr().out
    assert main(["data", "tokenize", *asked]) == 0
    capsys.readouterr()
    assert main(["plan", *asked, "--gpus", "1"]) == 0
    said = capsys.readouterr().out
    full_s, mean_s = (float(re.search(rf"{before}([\d.e-]+) s {after}", said)[1]) for before, after in (  # type: ignore[index]
        ("tokens: ", "with"), ("an epoch is 3 steps of ", "on average"),
    ))  # fmt: skip
    assert 0 < mean_s <= full_s + 0.05


def test_a_gpu_of_one_size_needs_no_size() -> None:
    assert Gpu.load("H100") == Gpu.load("h100-80")
    with pytest.raises(ConfigError, match="a100-40, a100-80"):
        Gpu.load("a100")


def test_a_config_that_does_not_fit(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{path: {llama}}}\ndata: {{train: not here.jsonl, max_length_tokens: 128K}}\n")
    machine = [str(path), "--gpus", "1", "--gpu", "h100-80"]
    assert main(["plan", *machine, "--train.recompute", "none"]) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert "does not fit on 1 x" in said
    assert "train.recompute: full" in said
    assert main(["plan", *machine, "--length", "4K", "--train.recompute", "none"]) == 0
    shown = capsys.readouterr().out
    assert "4,096 tokens" in shown
    assert "ZeRO 3 asked (zero3_sp.json)" in shown, "as `check` says it"
    assert "; frozen weights stay whole on each GPU" in shown
    for more, text in (
        (["--documents", "2"], "are for a model alone"),
        (["--train.recomput", "none"], "train.recompute"),
        (["--sp", "64", "--gpus", "64"], "the model has heads for 32 GPUs"),
    ):
        assert main(["plan", *machine, *more]) == EXIT_CONFIG
        assert text in capsys.readouterr().err
    assert main(["plan", llama, "--lora.r", "8"]) == EXIT_CONFIG
    assert "--lora.r: a model takes the flags" in capsys.readouterr().err


def test_a_recipe_beyond_the_window_stretches_it(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", llama, "--gpus", "8", "--length", "256K"]) == 0
    (tmp_path / "recipe.yaml").write_text(printed := capsys.readouterr().out)
    config = load_run_config(["--config", str(tmp_path / "recipe.yaml")])
    assert "window is 131,072 tokens" in printed
    load_model_config(config.model, config.data.max_length_tokens, attn_implementation="eager")


def test_pairs_as_long_as_samples(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A pair's documents are each as long as is asked for: twice the tokens in a pack, unless it makes two passes."""

    def longest(*arguments: str) -> dict[tuple[int, str, str], int]:
        assert main(["plan", "--model", llama, "--gpus", "2", "--gpu", "h200", "--json", *arguments]) == 0
        rows = json.loads(capsys.readouterr().out)["longest"]
        rows = [r for r in rows if r["base"] == "resident"]  # streamed ones only where they are longer
        return {(r["sp"], r["recompute"], r.get("passes", "one")): r["max_length_tokens"] for r in rows}

    pairs, samples = longest("--objective", "dpo"), longest()
    for sp, recompute, _ in samples:
        one, two, sample = (pairs[sp, recompute, "one"], pairs[sp, recompute, "two"], samples[sp, recompute, "one"])
        assert one == pytest.approx(sample / 2, rel=0.01)
        assert two == sample  # LoRA switched off is the reference: nothing else lies in memory
    assert set(longest("--objective", "dpo", "--passes", "two")) == {key for key in pairs if key[2] == "two"}


def test_a_recipe_for_pairs(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpus", "8", "--length", "64K", "--objective", "dpo"]
    for more, reference in (
        ([], "adapter_off"),
        (["--full"], "model"),
        (["--reference", "precomputed"], "precomputed"),
    ):
        assert main(["plan", "--model", llama, *arguments, *more]) == 0
        printed = capsys.readouterr()
        (tmp_path / "recipe.yaml").write_text(printed.out)
        config = load_run_config(["--config", str(tmp_path / "recipe.yaml")])
        assert (config.objective, config.dpo.reference) == ("dpo", reference)
        assert config.dpo.passes in ("one", "two")
        assert (config.data.max_length_tokens, config.budget_tokens) == (65536, 131072)
        assert "pairs of 2 x 65,536 = 131,072 tokens" in printed.out
        assert ("data ref_logps" in printed.out) == (reference == "precomputed")
        assert f"dpo.passes: {'two' if config.dpo.passes == 'one' else 'one'}: " in printed.err
        assert f"dpo.reference: {'adapter_off' if reference == 'precomputed' else 'precomputed'}: " in printed.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--objective", "dpo", "--reference", "model"], "adapters are trained: adapter_off or precomputed"),
        (
            ["--objective", "dpo", "--full", "--reference", "adapter_off"],
            "every weight is trained: model or precomputed",
        ),
        (["--passes", "two"], "add --objective dpo"),
        (["--gpu", "h300"], "expected one of a100-40"),
        (["--gpus", "0", "--lora", "--full"], "--gpus is 0: at least 1"),
        (["--gpus", "1", "--gpu", "rtx4090", "--length", "1M"], "the longest that does is"),
        (["--gpus", "1", "--gpu", "rtx4090", "--full"], "does not fit"),
        (["--length", "long"], "give tokens"),
        (["--kernel", "flash"], "has rates for"),
        (["--lora_r", "0"], "--lora_r is 0: at least 1"),
        (["--documents", "100000", "--length", "8K"], "--documents is 100,000, --length 8,192 tokens"),
        (["--png", "memory.png"], "add --length"),
        (["--png", "/no/such/folder/memory.png", "--length", "8K"], "memory.png cannot be written: No such file"),
    ],
)
def test_mistakes(llama: str, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", llama, *arguments]) == EXIT_CONFIG
    assert expected in capsys.readouterr().err


def test_mistakes_are_listed_together(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", llama, "--gpus", "0", "--lora_r", "-1", "--length", "long"]) == EXIT_CONFIG
    assert "3 problems" in capsys.readouterr().err


def test_lengths_hold_a_token_of_each_document() -> None:
    """Documents of no token have no rate: the search for the longest pack once divided by it."""
    question = Question(sizes(SMOLLM2), Gpu.load("rtx4090"), 1, 0.0, documents=3000)
    setting, ds_config = next(question.settings(streamed=False))
    assert question.plan(setting, ds_config, 2999) is None
    found = question.plan(setting, ds_config, 3000)
    assert found is not None
    assert found.setting.lengths == (1,) * 3000


def test_what_was_asked_for_is_in_the_recipe(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", llama, "--gpus", "1", "--gpu", "h200", "--length", "8K"]

    def of_recipe(*more: str) -> tuple[str, str]:
        assert main([*arguments, *more]) == 0
        (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
        config = load_run_config(["--config", str(tmp_path / "recipe.yaml")])
        return config.model.kernel, config.model.liger

    assert of_recipe("--kernel", "cudnn", "--liger", "off") == ("cudnn", "off")
    assert of_recipe() == ("auto", "auto")


def test_a_live_reference_is_said_to_keep_weights_from_coming_ahead(
    llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", llama, "--gpus", "8", "--length", "8K", "--objective", "dpo"]
    for more, said in ((["--full"], True), (["--full", "--reference", "precomputed"], False), ([], False)):
        assert main([*arguments, *more]) == 0
        assert ("not ahead" in capsys.readouterr().err) == said


@pytest.mark.parametrize(("passes", "said"), [("one", True), ("two", False)])
def test_without_adapters_the_order_is_forgotten_in_one_pass_only(passes: Literal["one", "two"], said: bool) -> None:
    question = Question(sizes(LLAMA_8B), Gpu.load("h100-80"), 8, 0.0, pairs=True, reference="adapter_off")
    setting = Setting((8192,) * 2, 8, 8, resident=False, reference="adapter_off", passes=passes)
    plan = question.plan(setting, "ds_configs/zero3_sp.json", 8192)
    assert plan is not None
    assert bool(not_ahead(plan)) == said


def test_layers_with_a_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoConfig.for_model("qwen3_5_text", num_hidden_layers=4).save_pretrained(tmp_path)
    command = ["plan", "--model", str(tmp_path), "--gpus", "2", "--gpu", "h200"]
    assert main([*command, "--length", "64K"]) == 0
    shown = capsys.readouterr()
    assert "layers with a state 0." in shown.err  # seconds of their kernels
    assert "max_length_tokens: 65536" in shown.out
    assert "1 of 4 layers have softmax attention" in shown.err


def test_a_mixture_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoConfig.for_model("mixtral", num_hidden_layers=2, sliding_window=None).save_pretrained(tmp_path)
    command = ["plan", "--model", str(tmp_path), "--gpus", "2", "--gpu", "h200", "--length", "64K"]
    assert main([*command, "--lora_experts"]) == 0
    shown = capsys.readouterr()
    assert "experts: true" in shown.out
    assert "experts 0." in shown.err  # seconds of their products
    assert main([*command, "--lora_experts", "--full"]) == EXIT_CONFIG
    assert "--lora_experts is for adapters on the experts" in capsys.readouterr().err


def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == EXIT_CONFIG
    assert "--model is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", shipped_gpus())
def test_shipped_rates_are_complete(name: str) -> None:
    gpu = Gpu.load(name)
    assert gpu.source in ("measured", "datasheet")
    for kernel in gpu.attention_tflops.values():
        assert set(kernel) == {"forward", "backward"}
    assert 0 < gpu.sustained["gemm"] <= 1


def test_host_memory_is_used_up_before_a_length_is_refused() -> None:
    """Llama-8B on two H200s with 256 GiB beside them: 2,097,152 tokens, where whole layer inputs stop at 1.5 million."""
    question = Question(sizes(LLAMA_8B), Gpu.load("h200"), 2, 256.0)
    plan = fastest(question, 1 << 21)
    assert plan is not None
    assert (plan.setting.recompute, plan.ds_config) == ("every_k", "ds_configs/zero3_sp.json")
    assert 200 < 2 * plan.memory.host / 2**30 <= 256
    assert f"recompute_every: {plan.setting.every}" in recipe(plan, question, "m")
    longest = {p.setting.recompute: p.setting.tokens for p in longest_of_each(question) if p.setting.host_gib}
    assert longest["every_k"] > 1.2 * longest["sqrt"] > 1.5 * longest["full"]


def test_segments_are_not_tiled_under_zero_3() -> None:
    """`train.install` refuses that: a plan of it would not start."""
    question = Question(sizes(LLAMA_8B), Gpu.load("h200"), 2, 0.0, lora_r=None)
    for plan in longest_of_each(question):
        assert not (
            plan.setting.stage == 3 and plan.setting.recompute in ("every_k", "sqrt") and plan.setting.tile_tokens
        )
