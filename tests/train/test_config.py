from __future__ import annotations

import json

import pytest
import yaml

from train.engine import ConfigError, TrainingConfig, parse
from train.engine.config import ALIASES, changed_settings, normalize
from train.language import LanguageConfig


def read(*argv: str) -> TrainingConfig:
    return parse(TrainingConfig, argv)


def test_dashes_underscores_and_equals_signs_are_one():
    assert read("--batch-size", "4") == read("--batch_size=4") == read("--batch_size", "4")


def test_the_originals_names_are_ours():
    old = parse(LanguageConfig, ["--learning_rate=0.1", "--output_dir", "x", "--save_steps", "7", "--max_seq_len", "9"])
    assert (old.lr, str(old.run_dir), old.save_every, old.seq_len) == (0.1, "x", 7, 9)
    assert set(ALIASES.values()) <= set(LanguageConfig.__dataclass_fields__)


def test_a_bare_mixed_precision_means_auto():
    assert normalize(["--mixed_precision", "--compile"]) == ["--mixed_precision", "auto", "--compile"]
    assert read("--mixed_precision").mixed_precision == "auto"
    assert read("--mixed_precision", "fp16").mixed_precision == "fp16"


def test_booleans_as_a_sweep_writes_them():
    assert read("--compile", "--tensorboard").compile
    assert not read("--no_compile").compile


def test_an_unknown_flag_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--batchsize", "4")
    assert stopped.value.code == 2 and "batchsize" in capsys.readouterr().err


def test_every_bad_value_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        read("--batch_size=0", "--lr=-1", "--ema_decay=1", "--max_cost=3", "--resume=nowhere")
    for name in ("batch_size", "lr", "ema_decay", "hourly_rate", "nowhere"):
        assert name in str(caught.value)


def test_flags_win_over_a_settings_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("learning_rate: 0.5\nbatch_size: 3\ncompile: true\n")
    config = read("--settings", str(file), "--batch_size", "5")
    assert (config.lr, config.batch_size, config.compile) == (0.5, 5, True)


def test_an_earlier_runs_config_is_a_settings_file(tmp_path):
    first = parse(
        LanguageConfig, ["--data", "a", "b", "--optimizer", "sgd", "--no-tiny"], fill=LanguageConfig.filled_in
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(first.to_dict()))
    again = parse(LanguageConfig, ["--settings", str(file)], fill=LanguageConfig.filled_in)
    assert again.to_dict() == first.to_dict()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lrr: 1", "did you mean lr"),
        ("- 1", "name: value"),
        ("a: [", "neither YAML nor JSON"),
        (None, "cannot be read"),
    ],
)
def test_bad_settings_files_are_sentences(tmp_path, text, sentence):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read("--settings", str(file))


def test_print_config_is_a_settings_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--lr", "0.25", "--print_config")
    assert stopped.value.code == 0
    file = tmp_path / "a.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["lr"] == 0.25
    assert read("--settings", str(file)).lr == 0.25


def test_only_what_moves_no_weight_may_change_on_resume():
    old, new = TrainingConfig().to_dict(), TrainingConfig(max_steps=9, wandb="off", lr=1.0, seed=3).to_dict()
    assert changed_settings(old, new) == ["lr: 0.0003 -> 1.0", "seed: 0 -> 3"]
