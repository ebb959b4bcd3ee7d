"""Configs of other trainers become ours, and what is not carried over is named key by key."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from trl import DPOConfig, ModelConfig, SFTConfig

from ds_longft.cli import main
from ds_longft.config.other_trainers import EXPLANATIONS, HOLDS_ANYWAY, KEYS_OF_OTHER_TOOLS, unknown_key
from ds_longft.config.read import load_run_config
from ds_longft.errors import ConfigError
from ds_longft.tools.migrate import migrated
from ds_longft.tools.migrate_defaults import TRL as TRL_DEFAULTS
from ds_longft.tools.migrate_defaults import TRL_DPO
from ds_longft.tools.migrate_keys import USUAL_OF_SOURCES

AXOLOTL = """
base_model: Qwen/Qwen3-8B
chat_template: qwen3
datasets:
  - {path: data/long.jsonl, type: chat_template, field_messages: messages, roles_to_train: [assistant]}
  - {path: org/set, name: main, split: train_sft, field_messages: dialog}
val_set_size: 0.02
output_dir: ./out
sequence_len: 65536
sample_packing: true
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
context_parallel_size: 4
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 1e-4
bf16: auto
flash_attention: true
warmup_ratio: 0.05
saves_per_epoch: 2
wandb_project: x
deepspeed: ds_configs/zero2.json
"""
LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen3-8B
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: one,two
template: qwen3
cutoff_len: 32768
preprocessing_num_workers: 16
output_dir: saves/x
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
num_train_epochs: 3.0
pref_beta: 0.2
pref_loss: orpo
lr_scheduler_type: cosine_with_restarts
report_to: none
"""
PEFT = "use_peft: true\nlora_target_modules: [q_proj]\nassistant_only_loss: true\n"
TRL = """
model_name_or_path: Qwen/Qwen3-8B
dataset_name: org/set
dataset_config: main
max_length: 16384
packing: true
learning_rate: 2.0e-5
num_train_epochs: 1
per_device_train_batch_size: 1
gradient_checkpointing: true
max_steps: -1
assistant_only_loss: true
adam_beta2: 0.95
rope_scaling: {type: yarn, factor: 4.0}
"""
SWIFT = """
model: Qwen/Qwen3-8B
tuner_type: lora
dataset: [org/set#500, my.jsonl]
max_length: 8192
lora_rank: 8
target_modules: all-linear
split_dataset_ratio: 0.01
warmup_ratio: 0.05
torch_dtype: bfloat16
galore_rank: 3
"""


def of(tmp_path: Path, text: str):
    (tmp_path / "theirs.yaml").write_text(text)
    ours, notes = migrated(tmp_path / "theirs.yaml")
    (tmp_path / "ours.yaml").write_text(ours)
    return load_run_config(["--config", str(tmp_path / "ours.yaml")]), [note for of in notes.values() for note in of]


def named(notes: list[str]) -> set[str]:
    return {note.partition(":")[0].partition(" is ")[0] for note in notes}


def test_axolotl(tmp_path: Path) -> None:
    run, notes = of(tmp_path, AXOLOTL)
    assert (run.model.path, run.sp, run.output_dir, run.data.max_length_tokens) == ("Qwen/Qwen3-8B", 4, "./out", 65536)
    assert (run.lora.r, run.lora.alpha, run.lora.targets) == (16, 32, ["q_proj", "v_proj"])
    assert [(s.path, s.subset, s.split) for s in run.data.train] == [
        ("data/long.jsonl", None, "train"),
        ("org/set", "main", "train_sft"),
    ]
    assert (run.data.eval_fraction, run.data.packing, run.log.wandb, run.log.project) == (
        0.02,
        "best_fit",
        "online",
        "x",
    )
    assert run.model.quantize == "nf4"
    assert (run.ds_config, run.optim.type, run.optim.warmup_ratio) == ("ds_configs/zero2_sp.json", "adamw", 0.05)
    assert named(notes) == {
        "chat_template", "datasets[].field_messages", "micro_batch_size", "saves_per_epoch", "deepspeed",
    }  # fmt: skip


def test_llama_factory(tmp_path: Path) -> None:
    run, notes = of(tmp_path, LLAMA_FACTORY)
    assert (run.objective, run.dpo.beta, run.data.workers, run.train.epochs) == ("dpo", 0.2, 16, 3)
    assert (run.lora.r, run.lora.alpha, run.lora.targets) == (8, 16, "all-linear")
    assert [s.path for s in run.data.train] == ["one", "two"]
    assert (run.train.save_every_steps, run.log.wandb, run.optim.schedule) == (500, "off", "cosine")
    assert named(notes) == {"dataset", "template", "lr_scheduler_type", "dpo.loss"}


def test_what_would_do_nothing_is_left_out_and_said(tmp_path: Path) -> None:
    """TRL ignores these; here a config that holds them is refused."""
    run, notes = of(tmp_path, TRL + "eval_steps: 50\nrun_name: mine\nreport_to: none\n")
    assert (run.train.eval_every_steps, run.log.name) == (None, None)
    assert named(notes) == {"train.eval_every_steps", "log.name"}
    run, notes = of(
        tmp_path, TRL + "eval_steps: 50\neval_dataset: b.jsonl\nrun_name: mine\nreport_to: [tensorboard, clearml]\n"
    )
    assert (run.train.eval_every_steps, run.log.name, run.log.trackers) == (50, "mine", ["tensorboard"])
    assert named(notes) == {"report_to"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("load_in_4bit: true", "nf4"), ("quantization_bit: 4", "nf4"), ("quant_bits: 8", "int8"), ("load_in_8bit: true", "int8"),
        ("load_in_8bit: false", "auto"), ("adapter: qlora", "nf4"),
    ],
)  # fmt: skip
def test_bases_in_fewer_bits(tmp_path: Path, theirs: str, ours: str) -> None:
    run, notes = of(tmp_path, f"model_name_or_path: a/b\nlora_r: 8\n{theirs}\n{PEFT}")
    assert (run.model.quantize, notes) == (ours, [])


@pytest.mark.parametrize(
    ("keys", "lora", "said"),
    [
        ("lora_r: 16\nassistant_only_loss: true", False, {"use_peft", "lora.r"}),
        ("lora_r: 16\nuse_peft: true\nassistant_only_loss: true", True, {"lora_target_modules"}),
        ("", False, {"assistant_only_loss"}),
        (PEFT, True, set()),
        ("beta: 0.1\nloss_type: sigmoid\n", False, {"objective"}),
    ],
)
def test_what_trl_means_by_leaving_a_key_out(tmp_path: Path, keys: str, lora: bool, said: set[str]) -> None:
    """lora_r without use_peft trains every weight there; PEFT's layers and all tokens are its defaults."""
    run, notes = of(tmp_path, f"model_name_or_path: a/b\ndataset_name: org/set\n{keys}\n")
    assert ((run.lora is not None), named(notes)) == (lora, said)


def test_trls_splits(tmp_path: Path) -> None:
    given = f"model_name_or_path: a/b\ndataset_name: org/set\n{PEFT}"
    run, notes = of(tmp_path, given + "dataset_train_split: train\ndataset_test_split: test\n")
    assert (run.data.train[0].split, notes) == ("train", [])
    run, notes = of(tmp_path, given + "dataset_train_split: long\ndataset_test_split: held\n")
    assert (run.data.train[0].split, named(notes)) == ("long", {"dataset_test_split"})


def test_trl_trains_every_weight_where_nothing_says_lora(tmp_path: Path) -> None:
    run, notes = of(tmp_path, TRL)
    assert run.lora is None
    assert (run.data.train[0].path, run.data.train[0].subset) == ("org/set", "main")
    assert (run.model.rope.type, run.model.rope.factor, run.optim.betas) == ("yarn", 4.0, (0.9, 0.95))
    assert (run.data.max_length_tokens, run.optim.learning_rate, run.train.max_steps) == (16384, 2e-5, None)
    assert notes == []


@pytest.mark.parametrize(
    ("keys", "loss"),
    [
        ("beta: 0.1", "sigmoid"), ("loss_type: [ipo]", "ipo"), ("loss_type: sigmoid", "sigmoid"),
    ],
)  # fmt: skip
def test_a_file_of_trl_dpo_is_known_by_its_keys(tmp_path: Path, keys: str, loss: str) -> None:
    run, notes = of(tmp_path, f"{TRL}{keys}\n")
    assert (run.objective, run.dpo.loss, run.dpo.beta) == ("dpo", loss, 0.1)
    assert any(note.startswith("objective: dpo, as dpo.") for note in notes)


@pytest.mark.parametrize("keys", ["loss_type: nll", "beta: 0.1\nnum_generations: 8", "beta: 0.2\nstage: sft"])
def test_nothing_else_of_trl_is_taken_for_dpo(tmp_path: Path, keys: str) -> None:
    run, _ = of(tmp_path, f"{TRL}{keys}\n")
    assert (run.objective, run.dpo.beta, run.dpo.loss) == ("sft", 0.1, "sigmoid")


def test_several_losses_at_once_are_said(tmp_path: Path) -> None:
    run, notes = of(tmp_path, TRL + "beta: 0.3\nloss_type: [sigmoid, sft]\n")
    assert (run.objective, run.dpo.beta) == ("dpo", 0.3)
    assert {"loss_type", "objective"} <= named(notes)


@pytest.mark.parametrize(
    "keys",
    [
        "parallelism_config: {sp_backend: deepspeed, sp_size: 4, cp_size: 1, dp_shard_size: 2}",
        'parallelism_config: \'{"sp_size": 1, "cp_size": 4}\'',
        "parallelism_config_cp_size: 1\nparallelism_config_sp_size: 4",
    ],
)
def test_gpus_that_share_a_sample_in_trl(tmp_path: Path, keys: str) -> None:
    run, notes = of(tmp_path, f"{TRL}{keys}\n")
    assert (run.sp, [note for note in notes if "parallelism" in note]) == (4, [])


def test_what_trl_s_dpo_takes_beside_beta(tmp_path: Path) -> None:
    more = "precompute_ref_log_probs: true\nuse_liger_kernel: false\npacking_strategy: bfd\nref_model: other/model\n"
    run, notes = of(tmp_path, TRL + more)
    assert (run.objective, run.dpo.reference, run.model.liger) == ("dpo", "precomputed", "off")
    assert any("`ds-longft data ref_logps`" in note for note in notes)
    assert {"objective", "precompute_ref_log_probs", "ref_model"} <= named(notes)
    assert not {"packing_strategy", "use_liger_kernel"} & named(notes)
    run, notes = of(tmp_path, TRL + "use_liger_kernel: true\npacking_strategy: wrapped\n")
    assert (run.objective, run.model.liger) == ("sft", "auto")
    assert "packing_strategy" in named(notes)


def test_steps_alone_end_a_run_of_trl(tmp_path: Path) -> None:
    """Its epochs are overridden, whichever line comes first."""
    for lines in ("max_steps: 700\n", "max_steps: 700\nnum_train_epochs: 2\n", "num_train_epochs: 2\nmax_steps: 700\n"):
        run, notes = of(tmp_path, f"model_name_or_path: a/b\nlora_r: 8\n{lines}")
        assert (run.train.max_steps, run.train.epochs) == (700, 700)
        assert "max_steps" in named(notes)


def test_a_script_is_answered_with_how_to_print_its_config(tmp_path: Path) -> None:
    (tmp_path / "sft.py").write_text("import trl\ntrl.SFTTrainer(model='a')\n")
    with pytest.raises(ConfigError, match=r"yaml.safe_dump\(training_args.to_dict\(\)\)"):
        migrated(tmp_path / "sft.py")


def test_what_a_script_prints_has_few_notes(tmp_path: Path) -> None:
    """`args.to_dict()` writes each of a hundred keys, most of them as they are anyway."""
    printed = yaml.safe_dump(SFTConfig(output_dir="x", bf16=False, max_length=4096).to_dict())
    run, notes = of(tmp_path, f"model_name_or_path: a/b\n{printed}")
    assert (run.data.max_length_tokens, run.seed, run.optim.schedule, run.optim.min_lr_ratio) == (4096, 42, "linear", 0)
    assert named(notes) == {"accelerator_config", "per_device_train_batch_size", "assistant_only_loss"}


def test_tokens_that_end_or_pad_are_explained(tmp_path: Path) -> None:
    _, notes = of(tmp_path, TRL + "eos_token: <|im_end|>\nspecial_tokens: {pad_token: <pad>}\n")
    assert named(notes) == {"eos_token", "special_tokens"}
    assert all("the chat template ends an answer" in note for note in notes)


def test_swift(tmp_path: Path) -> None:
    run, notes = of(tmp_path, SWIFT)
    assert [(s.path, s.limit) for s in run.data.train] == [("org/set", 500), ("my.jsonl", None)]
    assert (run.model.path, run.model.dtype, run.data.eval_fraction) == ("Qwen/Qwen3-8B", "bf16", 0.01)
    assert named(notes) == {"galore_rank"}


def test_our_own_config_and_an_existing_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.yaml").write_text("model: {path: x}\n")
    with pytest.raises(ConfigError, match="no key of another trainer"):
        migrated(tmp_path / "mine.yaml")
    (tmp_path / "theirs.yaml").write_text(SWIFT)
    assert main(["migrate", str(tmp_path / "theirs.yaml"), "--out", str(tmp_path / "ours.yaml")]) == 0
    assert "galore_rank" in capsys.readouterr().out
    assert main(["migrate", str(tmp_path / "theirs.yaml"), "--out", str(tmp_path / "ours.yaml")]) == 64


def test_what_a_file_of_trl_leaves_out_is_written_as_trl_has_it(tmp_path: Path) -> None:
    run, _ = of(tmp_path, "model_name_or_path: a/b\nuse_peft: true\nlr_scheduler_type: cosine\n")
    assert (run.optim.min_lr_ratio, run.optim.betas, run.optim.learning_rate) == (0.0, (0.9, 0.999), 2e-5)
    assert (run.train.epochs, run.train.save_every_steps, run.seed, run.lora.dropout) == (3, 500, 42, 0.05)
    assert (run.data.max_length_tokens, run.data.overlong, run.optim.schedule) == (1024, "truncate", "cosine")
    text = (tmp_path / "ours.yaml").read_text()
    assert "Left out by you; differs here" in text
    assert "#   optim.min_lr_ratio: 0.0 (here 0.1)" in text
    assert "#   optim.schedule" not in text
    run, _ = of(tmp_path, "model_name_or_path: a/b\nbeta: 0.1\nuse_peft: true\nseed: 7\nlr_scheduler_type: constant\n")
    assert (run.optim.learning_rate, run.lora.dropout, run.seed, run.optim.min_lr_ratio) == (1e-6, 0.0, 7, 0.1)


def test_the_page_s_table_of_defaults_is_both_sides() -> None:
    """Ours as this project has them, TRL's as the installed TRL has them."""
    page = (Path(__file__).parents[3] / "docs/migrating.md").read_text()
    table = page.partition("## TRL's defaults")[2].partition("\n## ")[0]
    cells = [[c.strip(" `") for c in row.split("|")] for row in table.splitlines() if row.startswith("| `")]
    rows = {ours: (theirs, here) for _, ours, theirs, here, _ in cells}
    assert set(rows) == {default.ours for default in TRL_DEFAULTS}
    for default in TRL_DEFAULTS:
        theirs, here = rows[default.ours]
        assert theirs.partition("`")[0] == str(default.value)
        assert here == str(default.here) != str(default.value)
    sft, dpo, model = (
        SimpleNamespace(**{f.name: f.default for f in fields(kind)}) for kind in (SFTConfig, DPOConfig, ModelConfig)
    )
    assert [d.value for d in TRL_DPO if d.ours == "optim.learning_rate"] == [dpo.learning_rate]
    values = {d.ours: d.value for d in TRL_DEFAULTS}
    assert values == {
        "optim.learning_rate": sft.learning_rate, "optim.schedule": sft.lr_scheduler_type,
        "optim.betas": [sft.adam_beta1, sft.adam_beta2], "optim.warmup_ratio": sft.warmup_steps,
        "train.epochs": sft.num_train_epochs, "train.save_every_steps": sft.save_steps, "seed": sft.seed,
        "data.max_length_tokens": sft.max_length, "lora.dropout": model.lora_dropout,
        "optim.min_lr_ratio": 0.0, "data.overlong": "truncate",
    }  # fmt: skip


def test_defaults_of_other_trainers_than_trl(tmp_path: Path) -> None:
    run, _ = of(tmp_path, LLAMA_FACTORY.replace("lora_rank: 8\n", "").replace("cutoff_len: 32768\n", ""))
    assert (run.lora.r, run.lora.alpha, run.data.max_length_tokens, run.optim.learning_rate) == (8, 16, 2048, 5e-5)
    run, _ = of(tmp_path, AXOLOTL)
    assert (run.optim.betas, run.optim.min_lr_ratio, run.seed, run.optim.learning_rate) == ((0.9, 0.999), 0, 0, 1e-4)
    run, _ = of(tmp_path, SWIFT)
    assert (run.seed, run.train.epochs, run.optim.min_lr_ratio, run.optim.betas) == (42, 3, 0, (0.9, 0.95))


def test_the_installed_transformers_averages_means_under_sp_as_the_page_says() -> None:
    source = (Path(str(find_spec("transformers").origin)).parent / "trainer.py").read_text()
    asked = re.search(r'sp_backend == "deepspeed" and pc.sp_enabled:\n +(.*)', source)
    assert asked is not None
    assert asked[1] == "self.model_accepts_loss_kwargs = False"
    page = (Path(__file__).parents[3] / "docs/migrating.md").read_text()
    table = page.partition("## TRL's sequence parallelism and this")[2]
    (n, a), (m, b) = [
        (int(x.replace(",", "")), float(y)) for x, y in re.findall(r"^\| \d \| ([\d,]+) \| ([\d.]+)", table, re.M)
    ]
    assert f"= {(n * a + m * b) / (n + m):.2f} | loss ({a} + {b}) / 2 = {(a + b) / 2} |" in table
    assert f"weighs {m // n} times" in table


@pytest.mark.parametrize("key", ["sequence_parallel_degree", "context_parallel_size"])
def test_gpus_that_share_a_sample(tmp_path: Path, key: str) -> None:
    run, notes = of(tmp_path, f"base_model: a/b\nadapter: lora\n{key}: 4\n")
    assert (run.sp, notes) == (4, [])
    assert unknown_key(key, ["sp"]).endswith("did you mean sp?")


def test_every_key_that_the_page_names_is_known(tmp_path: Path) -> None:
    """The tables by hand of docs/migrating.md."""
    page = (Path(__file__).parents[3] / "docs/migrating.md").read_text().partition("<!-- keys")[0]
    words = [w for row in page.splitlines() if row[:3] == "| `" for w in re.findall(r"`(.*?)`", row.split("|")[1])]
    keys = [w.partition(":")[0] for w in words if re.fullmatch(r"[a-z_]+(: .*)?", w)]
    assert {"sequence_parallel_degree", "type", "train_on_inputs"} <= set(keys)
    known = {*KEYS_OF_OTHER_TOOLS, *EXPLANATIONS, *HOLDS_ANYWAY, *USUAL_OF_SOURCES}
    special = "".join(f"{key}: x\n" for key in dict.fromkeys(keys) if key not in known)
    assert special
    _, notes = of(tmp_path, f"model_name_or_path: a/b\n{special}")
    assert [note for note in notes if "has nothing like it here" in note] == []


@pytest.mark.parametrize(
    ("text", "whose"),
    [(AXOLOTL, "Axolotl"), (LLAMA_FACTORY, "LLaMA-Factory"), (TRL, "TRL"), (SWIFT, "ms-swift")],
)
def test_a_file_of_another_trainer_is_answered_in_one_line(tmp_path: Path, text: str, whose: str) -> None:
    (file := tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_run_config(str(file))
    (line,) = raised.value.problems
    assert line.startswith(
        f"this looks like a config of {whose}: ds-longft migrate {file} --out mine.yaml carries it over"
    )
    file.write_text("model: {path: a}\nadapter: lora\nbase_model: b\n")  # ours, with two strange keys
    with pytest.raises(ConfigError) as raised:
        load_run_config(str(file))
    assert len(raised.value.problems) > 1


def test_notes_stand_by_weight(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    more = "evals_per_epoch: 2\nheads_k_stride: 1\nliger_rope: true\nplugins: [liger]\nwandb_entity: us\n"
    (tmp_path / "theirs.yaml").write_text(AXOLOTL + more + "train_on_inputs: true\n")
    _, notes = migrated(tmp_path / "theirs.yaml")
    changes, by_hand, not_needed = ("\n".join(of) for of in notes.values())
    assert "train_on_inputs: True is not there" in changes
    assert "micro_batch_size: 2 rows" in changes
    assert "evals_per_epoch: 2 is not carried over: set train.eval_every_steps; without it before the first" in by_hand
    assert "set train.save_every_steps; without it at the end only" in by_hand
    assert "set WANDB_ENTITY=us" in by_hand
    assert not_needed.count("its own kernels; nothing to set") == 3
    assert main(["migrate", str(tmp_path / "theirs.yaml")]) == 0
    printed = capsys.readouterr().out
    heads = [printed.index(f"# {head}:\n#   - ") for head in notes]
    assert list(notes) == ["changes what is trained", "set by hand", "not needed here"]
    assert heads == sorted(heads)
