"""Run configs from YAML and command line: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.messages import all_keys
from ds_longft.config.other_trainers import KEYS_OF_OTHER_TOOLS
from ds_longft.config.read import dump_config, load_run_config
from ds_longft.config.run_config import LogConfig, LoraConfig, RunConfig
from ds_longft.config.yaml_io import load_yaml
from ds_longft.errors import EXIT_CONFIG, ConfigError


def config_of(yaml_text: str, folder: Path, *argv: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml_text, encoding="utf-8")
    return load_run_config(["--config", str(path), *argv])


def problems_of(yaml_text: str, folder: Path, *argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_of(yaml_text, folder, *argv)
    assert caught.value.exit_code == EXIT_CONFIG
    return caught.value.problems


def test_nothing_given_is_the_defaults() -> None:
    assert load_run_config([]) == RunConfig()


def test_command_line_wins_over_yaml_key_by_key(tmp_path: Path) -> None:
    config = config_of("lora: {r: 8, alpha: 4}\nseed: 3\n", tmp_path, "--lora.r", "64", "--train.max_steps=5")
    assert config.lora == LoraConfig(r=64, alpha=4)
    assert (config.seed, config.train.max_steps) == (3, 5)


def test_the_command_line_switches_a_section_of_the_file_on_and_off(tmp_path: Path) -> None:
    assert config_of("lora: null\n", tmp_path, "--lora.r", "64").lora == LoraConfig(r=64)
    assert config_of("lora: {r: 8}\n", tmp_path, "--lora", "null").lora is None


def test_a_recipe_may_be_tried_for_fewer_steps_than_its_warmup() -> None:
    """A run says that the peak is not reached (`train.run`), and goes on: `--train.max_steps 2` is how recipes are tried."""
    assert load_run_config(["--optim.warmup_steps", "5", "--train.max_steps", "2"]).optim.warmup_steps == 5


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--data.max_length_tokens", "128K"], "data.max_length_tokens", 131072),
        (["--data.max_length_tokens", "1M"], "data.max_length_tokens", 1 << 20),
        (["--sp", "4"], "sp", 4),
        (["--sp", "auto"], "sp", "auto"),
        (["--lora", "null"], "lora", None),
        (["--optim.max_grad_norm", "null"], "optim.max_grad_norm", None),
        (["--optim.betas", "0.9,0.999"], "optim.betas", (0.9, 0.999)),
        (["--lora.targets", "all-linear"], "lora.targets", "all-linear"),
        (["--lora.targets", "q_proj,v_proj"], "lora.targets", ["q_proj", "v_proj"]),
        (["--model.trust_remote_code", "false"], "model.trust_remote_code", False),
        (["--train.resume", "120"], "train.resume", 120),
        (
            ["--data.train", "a.jsonl,b.jsonl"],
            "data.train",
            [SourceConfig(path="a.jsonl"), SourceConfig(path="b.jsonl")],
        ),
        (["--data.train", '[{"path": "a", "limit": 3}]'], "data.train", [SourceConfig(path="a", limit=3)]),
        (["--local_rank=3", "--seed", "1"], "seed", 1),
        (["--local-rank=3", "--seed", "1"], "seed", 1),
        (["--model.path", "2024"], "model.path", "2024"),
        (["--train.epochs", "010"], "train.epochs", 10),
        (["--seed", "1", "--seed=2"], "seed", 2),
        (
            ["--data.train", "a.jsonl", "--data.train", "b.jsonl"],
            "data.train",
            [SourceConfig(path="a.jsonl"), SourceConfig(path="b.jsonl")],
        ),
    ],
)
def test_values_of_the_command_line(argv: list[str], key: str, value: Any) -> None:
    found: Any = load_run_config(argv)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lora: null", "lora", None),
        ("lora:", "lora", None),
        ("log: {name: 2026-11-23, wandb: online}", "log.name", "2026-11-23"),
        ("log: {wandb: off}", "log.wandb", "off"),  # YAML 1.1 would read false
        ("optim: {learning_rate: 1e-5}", "optim.learning_rate", 1e-5),  # YAML 1.1 would read text
        ("data: {max_length_tokens: 64K}", "data.max_length_tokens", 65536),
        ("data: {train: [a.jsonl]}", "data.train", [SourceConfig(path="a.jsonl")]),
        ("data: {train: a.jsonl}", "data.train", [SourceConfig(path="a.jsonl")]),
        ("train: {epochs: 010}", "train.epochs", 10),  # YAML 1.1 would read 8
        ("seed: +7", "seed", 7),
        ("seed: 1_000", "seed", 1000),
        (
            "x: &x {r: 4}\nlora: {<<: *x, alpha: 8}".replace("x: &x {r: 4}\nlora: {<<: *x", "lora: {<<: {r: 4}"),
            "lora.r",
            4,
        ),
        ("optim: &o {eps: 1.0e-6}\ntrain: {verify_first: true}", "train.verify_first", True),
        ("train: {verify_first: 1}", "train.verify_first", True),
        ("output_dir: runs/ü mlaut", "output_dir", "runs/ü mlaut"),
        ("", "seed", 0),
    ],
)
def test_values_of_yaml(text: str, key: str, value: Any, tmp_path: Path) -> None:
    found: Any = config_of(text, tmp_path)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--train.max_step", "5"], "unknown key train.max_step: did you mean train.max_steps?"),
        (["--max_steps", "5"], "unknown key max_steps: did you mean train.max_steps?"),
        (["--learning-rate=3"], "unknown key learning-rate: did you mean optim.learning_rate?"),
        (["--lora.lora_r", "5"], "unknown key lora.lora_r: did you mean lora.r?"),
        (["--cutoff_len", "5"], "unknown key cutoff_len: did you mean data.max_length_tokens?"),
        (["--data.max_seq_length", "5"], "unknown key data.max_seq_length: did you mean data.max_length_tokens?"),
        (["--context_parallel_size", "5"], "unknown key context_parallel_size: did you mean sp?"),
        (
            ["--per_device_train_batch_size", "2"],
            "unknown key per_device_train_batch_size: a micro batch is always one pack",
        ),
        (["--fp16", "true"], "unknown key fp16: weights are bf16 or fp32"),
        (["--zzzzzz"], "unknown key zzzzzz: --help lists every key"),
        (["stray"], "'stray' on the command line belongs to no key"),
        (["--seed", "1", "stray"], "'stray' on the command line belongs to no key"),
        (
            ["--train.max_steps"],
            "train.max_steps: no value given on the command line, expected a whole number above 0 or null",
        ),
        (["--data.train", "[{bad"], "data.train: value cannot be read on the command line"),
        (["--model", "Qwen"], "model: value cannot be read on the command line, expected a section (keys path"),
        (["--train.epochs", "0"], "train.epochs: seen '0', expected a number above 0"),
        (["--train.keep_checkpoints", "1.5"], "train.keep_checkpoints: seen '1.5', expected a whole number at least 1"),
        (["--lora.dropout", "1"], "lora.dropout: seen '1', expected a number at least 0 and below 1"),
        (
            ["--data.pack_tokens", "128Q"],
            "data.pack_tokens: seen '128Q', expected a token count such as 131072 or 128K or null",
        ),
        (
            ["--train.recompute", "sqr"],
            "train.recompute: seen 'sqr', expected none, full, every_k, sqrt, keep_attention or auto: did you mean sqrt?",
        ),
        (["--train.recompute", "sqr"], "did you mean sqrt?"),
        (["--optim.betas", "0.9"], "optim.betas: seen [0.9], expected a list of 2: a number"),
        (["--optim.learning_rate", "inf"], "optim.learning_rate: seen 'inf'"),
        (["--train.hang_minutes", "nan"], "train.hang_minutes: seen 'nan'"),
        (["--optim.betas", "2,3"], "optim.betas"),
        (["--seed", "-1"], "seed: seen '-1', expected a whole number"),
        (["--lora.alpha", "0"], "lora.alpha: seen '0', expected a number above 0"),
        (["--data.train", ""], "data.train"),
        (["--lora", "none"], "lora: seen 'none', expected a section (keys r, alpha"),
        (["--sp", "many"], "sp: seen 'many', expected a whole number above 0 or auto"),
        (["--sp", "0"], "sp: seen '0', expected a whole number above 0 or auto"),
        (["--train.resume", "0"], "train.resume: seen '0', expected auto or never or a whole number above 0"),
        (["--model.trust_remote_code", "true"], "model.trust_remote_code needs model.revision"),
        (["--data.eval", "a.jsonl", "--data.eval_fraction", "0.1"], "data.eval and data.eval_fraction are both set"),
        (["--lora", "null", "--lora.r", "4"], "lora is null and --lora.r is given on the same command line"),
        (["--lora.r=4", "--lora=null"], "lora is null and --lora.r is given on the same command line"),
        (["--config", "/nowhere/run.yaml"], "cannot read /nowhere/run.yaml: No such file or directory"),
    ],
)
def test_bad_command_lines_name_the_key(argv: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(argv)
    assert caught.value.exit_code == EXIT_CONFIG
    assert expected in "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sp_size: 4", "unknown key sp_size: did you mean sp?"),
        ("train: {max_step: 4}", "unknown key train.max_step: did you mean train.max_steps?"),
        ("train.max_steps: 4", "unknown key 'train.max_steps': in YAML nest it"),
        ("data: {train: [{path: a, limt: 3}]}", "unknown key data.train[0].limt: did you mean data.train[0].limit?"),
        ("data: {train: [a, {format: text}]}", "data.train[1].path: missing, expected text"),
        ("data: {train: 3}", "data.train: seen 3, expected a list of: a path or a section (keys path"),
        ("data: {train: ''}", "data.train: seen '', expected a list of: a path or a section (keys path"),
        ("seed: 1:30", "seed: seen '1:30', expected a whole number"),  # YAML 1.1 would read 90
        ("train: {max_minutes: 12:30}", "train.max_minutes: seen '12:30', expected a number"),
        ("train: {max_minutes: 1:30:00.5}", "train.max_minutes: seen '1:30:00.5', expected a number"),
        ("seed: 0x10", "seed: seen '0x10', expected a whole number"),
        ("seed: 0b1", "seed: seen '0b1', expected a whole number"),
        ("optim: {learning_rate: true}", "optim.learning_rate: seen true, expected a number above 0"),
        ("optim: {betas: [true, 0.9]}", "optim.betas: seen [True, 0.9], expected a list of 2: a number"),
        ("train: {resume: true}", "train.resume: seen true, expected auto or never or a whole number above 0"),
        ("seed: false", "seed: seen false, expected a whole number"),
        ("data: {max_length_tokens: true}", "data.max_length_tokens: seen true, expected a token count"),
        ("data: {train: [{path: a, limit: true}]}", "data.train[0].limit: seen true, expected a whole number"),
        ("seed: !!int abc", "line 1, column 7: 'abc' is no whole number"),
        ("optim: {eps: !!float abc}", "is not valid YAML: could not convert string to float: 'abc'"),
        ("seed: 1\n1: 2", "run.yaml: key 1 is no text, expected a word"),
        ("? \n: 2", "run.yaml: key null is no text, expected a word"),
        ("data: {train: [{2.5: a}]}", "run.yaml: key 2.5 of data.train[0] is no text, expected a word"),
        ("true: 2", "run.yaml: key true is no text, expected a word"),
        ("lora: {<<: 3}", "expected a mapping or list of mappings for merging"),
        ("lora: " + 100_000 * "[", "nested too deeply"),
        ("lora: " + 100 * "[" + 100 * "]", "nested too deeply"),
        ("data: {train: &a [*a]}", "nested too deeply"),
        ("data: &a\n  train: *a", "nested too deeply"),
        ("model: {kernel: flash}", "model.kernel: seen 'flash', expected auto, flash-attn-4, flash-attn-3, cudnn"),
        ("model: Qwen", "model: seen 'Qwen', expected a section (keys path"),
        ("optim: null", "optim: seen null, expected a section (keys type"),
        ("lora: {targets: 3}", "lora.targets: seen 3, expected text or a list of: text"),
        ("seed: 1\nsp: 2\nseed: 3", "line 3, column 1: key 'seed' stands twice"),
        ("seed: 1\n{[1, 2]: 3}: 4", "is a list or a section, expected a word"),
        ("data:\n  train: [a", "is not valid YAML: line 2"),
        ("a: b: c", "is not valid YAML: line 1, column 5"),
        ("- 1", "holds list at its top"),
        ("data: {eval: [a], eval_fraction: 0.1}", "data.eval and data.eval_fraction are both set"),
    ],
)
def test_bad_yaml_names_the_key(text: str, expected: str, tmp_path: Path) -> None:
    problems = problems_of(text, tmp_path)
    assert expected in "\n".join(problems)
    assert len(problems) == 1


def test_two_configs_are_refused(tmp_path: Path) -> None:
    """The last one would count, and the first not at all."""
    (tmp_path / "a.yaml").write_text("seed: 1")
    (tmp_path / "b.yaml").write_text("sp: 2")
    with pytest.raises(ConfigError) as caught:
        load_run_config(["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert caught.value.problems == ["--config is given twice on the command line: one file holds a run's keys"]


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    text = "sp_size: 4\nlora: {r: 0}\ndata: {pack_tokens: 1K, eval_fraction: 2}\ntrain: {resume: 3}\n"
    problems = "\n".join(problems_of(text, tmp_path, "--train.max_step", "5", "--cutoff_len", "3"))
    for key in ("sp_size", "lora.r", "data.eval_fraction", "train.max_step", "cutoff_len"):
        assert key in problems


def test_rules_across_keys_are_checked_beside_unknown_keys(tmp_path: Path) -> None:
    problems = "\n".join(problems_of("sp_size: 4\ndata: {eval: [a.jsonl], eval_fraction: 0.1}\n", tmp_path))
    assert "sp_size" in problems
    assert "data.eval_fraction" in problems


def test_a_flag_without_its_value_hides_no_other_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(["--data.train", "[{bad", "--train.epochs", "0", "--train.max_steps", "--sp_size=4", "--seed"])
    problems = "\n".join(caught.value.problems)
    for text in (
        "data.train: value cannot be read", "train.epochs: seen '0'", "train.max_steps: no value given",
        "unknown key sp_size", "seed: no value given",
    ):  # fmt: skip
        assert text in problems
    assert len(caught.value.problems) == 5


def test_rules_across_keys_are_checked_beside_wrong_values(tmp_path: Path) -> None:
    problems = problems_of("lora: {r: 0}\nseed: -1\ndata: {eval: [a.jsonl], eval_fraction: 0.1}\n", tmp_path)
    assert [p.split()[0] for p in problems] == ["seed:", "lora.r:", "data.eval"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--model.trust_remote_code", "true", "--model.revision"],
        ["--model.trust_remote_code", "true", "--model.revison", "0" * 40],
        ["--dpo.beta", "0.2", "--objective", "dop"],
        ["--objective", "dpo", "--dpo.reference", "model", "--lora", "off"],
        ["--objective", "dpo", "--dpo.reference", "adapter_off", "--lora", "null", "--lora.r", "4"],
        ["--dpo.beta", "0.2", "--config", "/nowhere/run.yaml"],
    ],
)
def test_a_default_in_place_of_a_wrong_value_is_not_complained_of(argv: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(argv)
    assert len(caught.value.problems) == 1


def test_what_preflight_finds_stands_beside_the_other_problems() -> None:
    def preflight(config: RunConfig) -> None:
        assert config.seed == 7
        raise ConfigError([f"output_dir {config.output_dir} cannot be made", f"sp is {config.sp}: too many"])

    with pytest.raises(ConfigError) as caught:
        load_run_config(
            ["--seed", "7", "--sp", "many", "--output_dir", "/x", "--data.eval", "a", "--data.eval_fraction", "0.1"],
            preflight,
        )
    problems = caught.value.problems
    assert [p.split()[0] for p in problems] == ["sp:", "data.eval", "output_dir"]


def test_preflight_is_left_to_the_caller_where_nothing_is_wrong() -> None:
    def preflight(config: RunConfig) -> None:
        raise ConfigError("never asked")

    assert load_run_config(["--seed", "7"], preflight).seed == 7


def test_a_binary_file_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_run_config(["--config", str(path)])


def test_help_prints_every_key_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_run_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    missing = [key for key in all_keys() if f"--{key} " not in text and f"--{key}\n" not in text]
    assert not missing
    assert "Older checkpoints are deleted" in text
    assert "example:" in text


def test_suggested_keys_exist() -> None:
    assert set(KEYS_OF_OTHER_TOOLS.values()) <= set(all_keys())


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    st.builds(
        RunConfig,
        output_dir=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
        sp=st.one_of(st.just("auto"), st.integers(1, 64)),
        lora=st.one_of(st.none(), st.builds(LoraConfig, targets=st.sampled_from(["all-linear", ["q_proj", "v_proj"]]))),
        data=st.fixed_dictionaries({"train": st.lists(st.just({"path": "off", "limit": 3}), max_size=2)}),
        optim=st.fixed_dictionaries({"learning_rate": st.floats(1e-12, 1e6)}),
        log=st.fixed_dictionaries(
            {
                "wandb": st.just("offline"),
                "name": st.sampled_from([None, "null", "1e-4", "yes", "a: b", "0123", "2026-11-23"]),
            }
        ),
    )
)
def test_dumped_config_reads_back_equal(config: RunConfig) -> None:
    assert RunConfig.model_validate(load_yaml(dump_config(config))) == config


@pytest.mark.parametrize("word", ["010", "09", "1:30", "0x10", "1_000", "true", "yes", "2026-11-23", "1e5", "<<", "~"])
def test_words_that_look_like_something_else_stay_words(word: str) -> None:
    config = RunConfig(log=LogConfig(name=word, wandb="offline"))
    assert load_yaml(dump_config(config))["log"]["name"] == word


def test_dumped_config_runs_again(tmp_path: Path) -> None:
    config = load_run_config(["--lora", "null", "--data.train", "a.jsonl", "--data.max_length_tokens", "128K"])
    assert config_of(dump_config(config), tmp_path) == config


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("plot_loss", "leave it out"),
        ("do_train", "leave it out"),
        ("logging_steps", "leave it out"),
        ("overwrite_output_dir", "train.resume: never"),
    ],
)
def test_keys_of_other_trainers_that_set_nothing_here(key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_run_config([f"--{key}", "true"])
