"""Recipes are what users copy: each loads, is checked as far as it can be without its files, and says what it means."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from ds_longft.cli import main
from ds_longft.config.ds_file import load_ds_config
from ds_longft.config.ds_json import merge_ds_config
from ds_longft.config.preflight import check_run
from ds_longft.config.read import dump_config, load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.config.yaml_io import load_yaml
from ds_longft.decide.search import Plan, Question
from ds_longft.decide.setting import Gpu
from ds_longft.errors import ConfigError
from ds_longft.tools import quickstart
from ds_longft.tools.make_data.recipe import read_recipe
from tests.unit.decide.shapes import LLAMA_8B, LLAMA_70B, sizes
from tests.unit.tools.test_export import save_tokenizer

ROOT = Path(__file__).parents[2]
ALL = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "examples").glob("*/*.yaml"))]
RECIPES = [path for path in ALL if "sources" not in load_yaml(path.read_text())]  # run configs; the others are mixes
WINDOWS = {
    "sft_lora_128k": 131072,
    "lora_70b_128k": 131072,
    "qlora_8b_256k_24gb": 131072,
    "sft_lora_moe_128k": 262144,
    "sft_full_64k": 131072,
    "sft_agents_128k": 262144,
    "sft_lora_yarn": 40960,
    "sft_hybrid_256k": 262144,
    "sft_gemma3_text": 131072,
    "dpo_lora_64k": 131072,
    "stages_short_long_short": 131072,  # its second stage stretches
}  # of the models they name


def read(path: Path, *more: str) -> RunConfig:
    return load_run_config(["--config", str(path), *more])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = read(path)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert read(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    "path", [path for path in ALL if path not in RECIPES], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_a_mix_loads(path: Path) -> None:
    recipe = read_recipe(str(path))
    shares = [recipe.languages, *(source.languages or {} for source in recipe.sources)]
    assert {lang for share in shares for lang in share} <= {"zh"}
    assert read_recipe(str(path.relative_to(ROOT))).sources, "found from anywhere"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
@pytest.mark.parametrize("world", [1, 8])
def test_fits_its_json_and_its_model(path: Path, world: int, tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("{}\n")
    rows = str(tmp_path / "my.jsonl")
    held_out = rows if path.stem.startswith("quickstart") else "[]"  # others hold out a part, or name files of theirs
    config = read(path, "--data.train", rows, "--data.eval", held_out)
    ds = merge_ds_config(load_ds_config(config.ds_config), config, world=world, device="cuda", hidden_size=4096)
    model = {"model_type": "llama", "num_attention_heads": 24, "max_position_embeddings": WINDOWS.get(path.stem, 8192)}
    if path.stem.startswith("quickstart") or path.parent.name == "extend_smollm2":
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": "some/model"})})
    check_run(config, world=world, local_world=world, ds=ds, model_config=model)


GPUS = {
    "RTX 4090": "rtx4090", "RTX PRO 6000 (96)": "rtxpro6000", "H200": "h200", "H100 80 GB": "h100-80"
}  # fmt: skip
ROW = re.compile(r"#   (?:(\d) x )?([HR].+?) {2,}(?:(\d+) GiB +)?(\d+) s +([\d.]+).*? GiB(?: {2,}(.*))?")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qlora_8b_256k_24gb", "lora_70b_128k"])
def test_the_table_of_its_head_is_the_plan_of_today(name: str) -> None:
    """Of a sample as long as the recipe's, its base in host memory; the last column with the base on the GPUs."""
    path = ROOT / "recipes" / f"{name}.yaml"
    config = read(path)
    facts = sizes(LLAMA_8B if "8b" in name else LLAMA_70B)
    form = config.model.quantize.replace("auto", "")
    rows = [row for line in path.read_text().splitlines() if (row := ROW.match(line))]
    assert len(rows) == (1 if "8b" in name else 5)
    for row in rows:
        count, gpu, host_gib, step_s, peak_gib, there = row.groups()
        question = Question(facts, Gpu.load(GPUS[gpu]), int(count or 1), float(host_gib or 0), quantize=form)
        if host_gib is None:
            question = replace(question, host_gib=config.train.offload_host_gib + question.base_gib)

        def best(base: str, question: Question = question) -> Plan | None:
            ways = [way for way in question.settings(streamed=base == "host") if way[0].base == base]
            plans = [question.plan(*way, config.data.max_length_tokens) for way in ways]
            return min(filter(None, plans), key=lambda found: found.time.total_s, default=None)

        away = best("host")
        assert away is not None
        digits = len(peak_gib.partition(".")[2])
        assert (f"{away.time.total_s:.0f}", f"{away.memory.peak_gib:.{digits}f}") == (step_s, peak_gib), row[0]
        if host_gib is not None:
            plan = best("engine")
            assert there == (f"{plan.time.total_s:.0f} s" if plan else "does not fit"), row[0]


SIZES = {  # of the checkpoints that they name
    "sft_lora_moe_128k": AutoConfig.for_model(
        "qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        vocab_size=151936, max_position_embeddings=262144,
    ),
    "sft_gemma3_text": AutoConfig.for_model(
        "gemma3",
        text_config={
            "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "max_position_embeddings": 131072,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_models_made_of_many_parts_are_checked_and_planned(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mixture with adapters on experts, and the text model of a wrapper: `ds-longft check` and `plan` of the recipe."""
    SIZES[name].save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "my.jsonl").write_text('{"text": "one two"}\n')
    given = [
        "--model.path",
        str(tmp_path),
        "--model.random_weights",
        "true",
        "--data.train",
        str(tmp_path / "my.jsonl"),
    ]
    recipe = str(ROOT / "recipes" / f"{name}.yaml")
    assert main(["check", recipe, *given, "--gpus", "8"]) == 0, capsys.readouterr().err
    experts = ["--lora_experts"] if name == "sft_lora_moe_128k" else []
    plan = ["plan", str(tmp_path), "--gpus", "8", "--gpu", "h200", "--length", "128K", *experts]
    assert main(plan) == 0, capsys.readouterr().err
    assert re.search(r"\d+ GiB", capsys.readouterr().out)


def test_the_128k_recipe_needs_its_window(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("{}\n")
    config = read(RECIPES[0].with_name("sft_lora_128k.yaml"), "--data.train", str(tmp_path / "my.jsonl"))
    model = {"model_type": "llama", "num_attention_heads": 32, "max_position_embeddings": 65536}
    with pytest.raises(ConfigError, match="window is 65536"):
        check_run(config, world=8, local_world=8, ds=None, model_config=model)


def test_each_stage_begins_where_the_one_before_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands in the head of the recipe, as they stand there: short, long beyond the window, short."""
    monkeypatch.chdir(ROOT)
    head = Path("recipes/stages_short_long_short.yaml").read_text().splitlines()
    stages = [load_run_config(shlex.split(line)[3:]) for line in head if line.startswith("#   ds-longft train ")]
    assert [stage.data.max_length_tokens for stage in stages] == [32768, 131072, 32768]
    assert [stage.model.rope.type for stage in stages] == ["none", "abf", "none"], "a run's model keeps its RoPE"
    assert [stage.model.path for stage in stages[1:]] == [stage.output_dir for stage in stages[:-1]]
    window = {"model_type": "qwen3", "num_attention_heads": 16, "max_position_embeddings": 32768}
    for stage in stages:
        (tmp_path / "my.jsonl").write_text("{}\n")
        argv = ["--data.train", str(tmp_path / "my.jsonl"), "--model.path", "some/model"]
        (tmp_path / "stage.yaml").write_text(dump_config(stage))
        check_run(read(tmp_path / "stage.yaml", *argv), world=4, local_world=4, ds=None, model_config=window)
        window["max_position_embeddings"] = max(window["max_position_embeddings"], stage.data.max_length_tokens)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_bare_command_is_a_recipe(has_gpu: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # found from anywhere
    config = load_run_config(["--config", quickstart.recipe(has_gpu=has_gpu)])
    folder = Path(quickstart.CACHE)
    assert Path(config.model.path) == folder / quickstart.MODEL
    for source in config.data.train + config.data.eval:
        assert Path(source.path).parent == folder
        match = quickstart.CODE_SET.fullmatch(Path(source.path).name)
        assert match is not None
        assert int(match[2]) == config.data.max_length_tokens


def test_prepare_leaves_other_configs_alone(tmp_path: Path) -> None:
    config = load_run_config(["--model.path", str(tmp_path / "model"), "--data.train", str(tmp_path / "my.jsonl")])
    quickstart.prepare(config, str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
