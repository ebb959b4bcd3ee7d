"""What keeps a run from working is named before a model is loaded, all of it at once."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ds_longft.config.ds_json import DeepSpeedSettings
from ds_longft.config.model_json import read_model_config
from ds_longft.config.preflight import check_run, preflight, resolve_sp
from ds_longft.config.read import dump_config, load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.config.yaml_io import dump_yaml, load_yaml
from ds_longft.errors import EXIT_CONFIG, ConfigError

LLAMA = {"model_type": "llama", "num_attention_heads": 9, "hidden_size": 576, "max_position_embeddings": 8192}


def settings(sp: int | None = None) -> DeepSpeedSettings:
    return DeepSpeedSettings(engine={}, sp=sp, stage=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place with a model folder, a data file and a DeepSpeed JSON that pass every check."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    (model / "model.safetensors").write_bytes(b"")
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    return tmp_path


def config_in(folder: Path, **changes: Any) -> RunConfig:
    content: dict[str, Any] = {
        "ds_config": str(folder / "ds.json"),
        "output_dir": str(folder / "out"),
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(folder / "data.jsonl")], "max_length_tokens": 8192},
    }
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(content.get(key), dict) else value
    return RunConfig.model_validate(content)


def problems_of(config: RunConfig, *, world: int = 2, sp_of_json: int | None = None, **changes: Any) -> list[str]:
    """The problems of a config; `changes` go into the model's config.json, None takes a key away."""
    path = Path(config.model.path) / "config.json"
    if changes:
        content = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
        path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        check_run(
            config, world=world, local_world=world, ds=settings(sp_of_json), model_config=read_model_config(config)
        )
    assert caught.value.exit_code == EXIT_CONFIG
    return caught.value.problems


def test_a_good_run_passes(folder: Path) -> None:
    config = config_in(folder)
    check_run(config, world=8, local_world=8, ds=settings(), model_config=read_model_config(config))
    ds, sp = preflight(config, world=8, local_world=4, device="cpu")
    assert (ds.stage, sp) == (3, 4)
    assert ds.engine["train_batch_size"] == 8


def test_a_pattern_stands_for_files(folder: Path) -> None:
    for name in ("part_1.jsonl", "part_2.jsonl", "part[3].jsonl"):
        (folder / name).write_text("{}\n")
    for pattern in ("part_*.jsonl", "part[3].jsonl"):
        config = config_in(folder, data={"train": [str(folder / pattern)]})
        check_run(config, world=8, local_world=8, ds=settings(), model_config=read_model_config(config))


def test_a_hub_model_and_a_hub_set_wait_for_the_load(folder: Path) -> None:
    config = config_in(folder, model={"path": "Qwen/Qwen3-8B"}, data={"train": ["THUDM/LongAlign-10k"]})
    check_run(config, world=2, local_world=2, ds=settings(), model_config=read_model_config(config))


@pytest.mark.parametrize(
    ("sp", "of_json", "world", "local_world", "expected"),
    [
        ("auto", None, 8, 8, 8),
        ("auto", None, 16, 8, 8),
        ("auto", 4, 8, 8, 4),
        (2, None, 8, 8, 2),
        (2, 2, 8, 8, 2),
        (16, None, 16, 8, 16),
        ("auto", None, 1, 1, 1),
    ],
)
def test_sp_is_resolved(sp: Any, of_json: int | None, world: int, local_world: int, expected: int) -> None:
    assert resolve_sp(RunConfig(sp=sp), settings(of_json), world, local_world) == expected


@pytest.mark.parametrize(
    ("sp", "of_json", "world", "expected"),
    [
        (3, None, 8, "sp is 3, which does not divide the world of this run (ranks: 8): possible are 1, 2, 4, 8"),
        (16, None, 8, "sp is 16, which does not divide the world of this run (ranks: 8)"),
        ("auto", 3, 8, "sequence_parallel_size in ds_configs/zero3_sp.json is 3, which does not divide"),
        (4, 2, 8, "sp is 4, sequence_parallel_size in ds_configs/zero3_sp.json is 2: leave one of them out"),
    ],
)
def test_sp_that_cannot_be(sp: Any, of_json: int | None, world: int, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_sp(RunConfig(sp=sp), settings(of_json), world, 8)
    assert expected in caught.value.problems[0]


def test_more_ranks_than_heads_names_the_largest_sp(folder: Path) -> None:
    problems = problems_of(config_in(folder), world=16)
    expected = "sp is {}, but the model has 9 query heads to share among GPUs: the largest sp that works {}"
    assert problems == [expected.format(16, "with 16 ranks is 8, with 9 ranks 9")]
    assert problems_of(config_in(folder), world=18) == [expected.format(18, "is 9")]


def test_heads_of_layers_with_a_state_limit_sp_too(folder: Path) -> None:
    (problem,) = problems_of(config_in(folder), world=8, mamba_num_heads=6)
    assert "the model has 6 heads in layers with a state to share among GPUs" in problem
    assert "the largest sp that works with 8 ranks is 4, with 6 ranks 6" in problem


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"train": []}}, "data.train is empty"),
        ({"data": {"train": ["/no/where.jsonl"]}}, "data.train: there is no /no/where.jsonl"),
        ({"data": {"train": ["missing.parquet"]}}, "data.train: there is no missing.parquet"),
        ({"data": {"train": ["missing.csv"]}}, "data.train: there is no missing.csv"),
        ({"data": {"train": ["notes.docx"]}}, "data.train: there is no notes.docx"),
        ({"data": {"eval": ["./missing"]}}, "data.eval: there is no ./missing"),
        ({"data": {"train": ["/no/where_*.jsonl"]}}, "data.train: there is no /no/where_*.jsonl"),
        ({"data": {"chat_template": "missing.jinja"}}, "data.chat_template: there is no file missing.jinja"),
        ({"data": {"max_length_tokens": 8193}}, "data.max_length_tokens is 8193, the model's window is 8192 tokens"),
        ({"model": {"path": ""}}, "model.path is empty"),
        ({"model": {"path": "/no/model"}}, "model.path: there is no /no/model"),
        ({"model": {"path": "./no-model"}}, "model.path: there is no ./no-model"),
        ({"lora": {"targets": []}}, "lora.targets is empty"),
    ],
)
def test_each_mistake_is_named(changes: dict[str, Any], expected: str, folder: Path) -> None:
    problems = problems_of(config_in(folder, **changes))
    assert len(problems) == 1
    assert expected in problems[0]


@pytest.mark.parametrize(
    ("rope", "length", "expected"),
    [
        ({"type": "yarn"}, 8192, "model.rope.type is yarn, but data.max_length_tokens (8192) lies inside"),
        ({"type": "linear", "factor": 2.0}, 32768, "model.rope.factor 2 stretches the window of 8192 to 16384 tokens"),
        ({"type": "none", "factor": 2.0}, 8192, "model.rope.factor is 2, but model.rope.type is none"),
        ({"type": "yarn", "theta": 1e6}, 32768, "model.rope.theta is 1e+06, but model.rope.type is yarn"),
        ({"type": "llama3", "attention_factor": 1.0}, 32768, "attention_factor is for yarn only"),
    ],
)
def test_rope_that_does_not_fit(rope: dict[str, Any], length: int, expected: str, folder: Path) -> None:
    config = config_in(folder, model={"rope": rope}, data={"max_length_tokens": length})
    assert expected in problems_of(config)[0]


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "yarn"},
        {"type": "yarn", "factor": 4, "attention_factor": 1.0},
        {"type": "llama3"},
        {"type": "abf"},
        {"type": "abf", "theta": 1e6},
        {"type": "dynamic"},
    ],
)
def test_rope_that_fits(rope: dict[str, Any], folder: Path) -> None:
    config = config_in(folder, model={"rope": rope}, data={"max_length_tokens": 32768})
    check_run(config, world=2, local_world=2, ds=settings(), model_config=read_model_config(config))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_model_with_dynamic_rope_has_no_end(key: str, folder: Path) -> None:
    config = config_in(folder, data={"max_length_tokens": 32768})
    model_config = LLAMA | {key: {"type": "dynamic", "factor": 4.0}}
    check_run(config, world=2, local_world=2, ds=settings(), model_config=model_config)


@pytest.mark.parametrize(
    ("model_config", "expected"),
    [
        ({"model_type": "qwen4_next", "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "qwen3_next", "layer_types": ["indexed_attention", "full_attention"]}, "indexed_attention"),
        ({"model_type": "falcon_mamba"}, "falcon_mamba has recurrent layers"),
        ({"model_type": "zamba3", "layers_block_type": ["mamba", "attention"]}, "zamba3 has layers of type mamba"),
        ({"model_type": "glm5", "text_config": {"layer_types": ["indexed_attention"]}}, "indexed_attention"),
        ({"model_type": "bert"}, "bert is an encoder"),
        ({"model_type": "xlm-roberta"}, "xlm-roberta is an encoder"),
        ({"model_type": "modernbert"}, "modernbert is an encoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder"),
    ],
)
def test_models_that_cannot_be_split_are_named(model_config: dict[str, Any], expected: str, folder: Path) -> None:
    problems = problems_of(config_in(folder), **model_config)
    assert expected in problems[0]
    assert problems[0].startswith("model.path: ")


@pytest.mark.parametrize(
    "model_config",
    [
        {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]},
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "phi3"},
        {"model_type": "gemma2"},
    ],
)
def test_models_that_can_be_split_pass(model_config: dict[str, Any], folder: Path) -> None:
    config = config_in(folder)
    check_run(config, world=2, local_world=2, ds=settings(), model_config=LLAMA | model_config)


def test_weights_must_be_safetensors_unless_random(folder: Path) -> None:
    (folder / "model/model.safetensors").rename(folder / "model/pytorch_model.bin")
    assert "should hold *.safetensors, seen only pytorch_model.bin" in problems_of(config_in(folder))[0]
    config = config_in(folder, model={"random_weights": True})
    check_run(config, world=2, local_world=2, ds=settings(), model_config=read_model_config(config))


def test_a_folder_without_config_or_tokenizer(folder: Path) -> None:
    (folder / "model/tokenizer.json").unlink()
    assert "holds no tokenizer" in problems_of(config_in(folder))[0]
    (folder / "model/config.json").unlink()
    assert "should hold config.json, but seen none" in problems_of(config_in(folder))[0]
    (folder / "model/adapter_config.json").write_text("{}")
    assert "it holds an adapter" in problems_of(config_in(folder))[0]


def test_model_path_that_is_a_file(folder: Path) -> None:
    config = config_in(folder, model={"path": str(folder / "model/config.json")})
    assert "is a file, expected the folder around it" in problems_of(config)[0]


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_broken_model_config(content: str, folder: Path) -> None:
    (folder / "model/config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model.path: .*config.json"):
        read_model_config(config_in(folder))
    with pytest.raises(ConfigError, match="1 problem"):
        preflight(config_in(folder), world=1, local_world=1, device="cpu")


def test_output_dir_that_is_or_lies_under_a_file(folder: Path) -> None:
    for path in (folder / "data.jsonl", folder / "data.jsonl/runs/1"):
        problems = problems_of(config_in(folder, output_dir=str(path)))
        assert f"output_dir is {path}, but {folder / 'data.jsonl'} is a file" in problems[0]


def test_a_cache_that_cannot_be_made_is_said_before_anything(folder: Path) -> None:
    given = folder / "data.jsonl" / "cache"
    (problem,) = problems_of(config_in(folder, data={"cache_dir": str(given)}))
    assert problem == f"data.cache_dir is {given}, but {folder / 'data.jsonl'} is a file: give another folder"


def test_a_tracker_that_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    (problem,) = problems_of(config_in(folder, log={"trackers": ["mlflow"]}))
    assert problem.startswith("log: the tracker mlflow is not installed: pip install")


def test_output_dir_without_the_right_to_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # the superuser may write anywhere
    assert "output_dir" in problems_of(config_in(folder))[0]
    assert "cannot be made" in problems_of(config_in(folder))[0]


def test_preflight_reports_json_model_and_run_together(folder: Path) -> None:
    (folder / "ds.json").write_text('{"train_batch_size": 99, "scheduler": {"type": "x"}}')
    config = config_in(folder, sp=3, data={"train": []}, output_dir=str(folder / "data.jsonl"))
    with pytest.raises(ConfigError) as caught:
        preflight(config, world=4, local_world=4, device="cpu")
    text = "\n".join(caught.value.problems)
    for key in ("train_batch_size", "scheduler", "sp is 3", "data.train", "output_dir"):
        assert key in text


def test_one_start_names_wrong_keys_rules_across_keys_and_what_preflight_finds(folder: Path) -> None:
    (folder / "ds.json").write_text('{"train_batch_size": 99}')
    text = dump_config(config_in(folder, data={"train": ["/no/where.jsonl"], "eval": [str(folder / "data.jsonl")]}))
    (folder / "run.yaml").write_text(text)
    machine = partial(preflight, world=16, local_world=16, device="cpu")
    with pytest.raises(ConfigError) as caught:
        load_run_config(
            [
                "--config",
                str(folder / "run.yaml"),
                "--lora.r",
                "0",
                "--train.max_step",
                "5",
                "--data.eval_fraction",
                "0.1",
            ],
            machine,
        )
    found = "\n".join(caught.value.problems)
    for text in (
        "lora.r: seen '0'",
        "unknown key train.max_step",
        "data.eval and data.eval_fraction are both set",
        "train_batch_size is 99",
        "the model has 9 query heads",
        "there is no /no/where.jsonl",
    ):
        assert text in found
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("model.path", "[a]"),
        ("model", "a"),
        ("data.train", "7"),
        ("data.train", "[{path: a, limit: 0}]"),
        ("optim.learning_rate", "-1"),
        ("train.gradient_accumulation_steps", "0"),
        ("model.rope.theta", "-1"),
    ],
)
def test_preflight_says_nothing_of_the_default_in_place_of_a_wrong_value(key: str, wrong: str, folder: Path) -> None:
    content = config_in(folder, sp=2, model={"rope": {"type": "abf", "theta": 1e6}}).model_dump(mode="json")
    content["optim"]["learning_rate"] = 1e-5
    content["train"]["gradient_accumulation_steps"] = 4
    (folder / "ds.json").write_text('{"train_batch_size": 16, "optimizer": {"params": {"lr": 1e-5}}}')
    preflight(RunConfig.model_validate(content), world=4, local_world=4, device="cpu")
    *sections, leaf = key.split(".")
    place = content
    for section in sections:
        place = place[section]
    place[leaf] = load_yaml(wrong)
    (folder / "run.yaml").write_text(dump_yaml(content))
    with pytest.raises(ConfigError) as caught:
        load_run_config(
            ["--config", str(folder / "run.yaml")], partial(preflight, world=4, local_world=4, device="cpu")
        )
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(key)


def test_preflight_without_a_json(folder: Path) -> None:
    with pytest.raises(ConfigError, match="ds_config: cannot read"):
        preflight(config_in(folder, ds_config=str(folder / "none.json")), world=1, local_world=1, device="cpu")


def test_checking_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, ds_longft.config.preflight, ds_longft.config.read, ds_longft.cli\n"
        "print([m for m in ('torch', 'deepspeed', 'transformers', 'datasets') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_yarn_as_model_cards_write_it_is_a_window_of_factor_times_the_original(kind: str, folder: Path) -> None:
    scaling = {"rope_scaling": {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}
    too_long = config_in(folder, data={"max_length_tokens": 32769})
    assert "the model's window is 32768 tokens" in problems_of(too_long, **scaling)[0]
    fits = config_in(folder, data={"max_length_tokens": 32768})
    check_run(fits, world=2, local_world=2, ds=settings(), model_config=read_model_config(fits))


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    """Before a process starts."""
    (folder / "rows.xlsx").write_text("question,answer\n1,2\n")
    (problem,) = problems_of(config_in(folder, data={"train": [str(folder / "rows.xlsx")]}))
    assert "rows.xlsx has an unknown ending: expected .json, .jsonl" in problem


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    (problem,) = problems_of(config_in(folder, model={"revision": "main"}))
    assert "model.revision is main, but model.path is a folder" in problem
