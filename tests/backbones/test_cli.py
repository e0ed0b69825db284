"""``python -m backbones``: the table, one backbone in full, and what is said of wrong names."""

from __future__ import annotations

import pytest
import timm
import torch

from backbones.__main__ import MEASURED, main, measure


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_pattern_gives_one_line_for_each_match(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "metaformer*")
    lines = [line for line in out.splitlines() if line.startswith("metaformer")]
    assert [line.split()[0] for line in lines] == ["metaformer_base", "metaformer_small", "metaformer_tiny"]
    assert "16.7 M" in lines[2] and "mixers and gates" in lines[2]
    assert "4, 8, 16, 32" in lines[2] and "64, 128, 320, 512" in lines[2]


def test_a_wide_pattern_is_cut_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbones.__main__.MEASURED", 2)
    out = printed(capsys, "resnet1*")
    assert f"2 of {len(timm.list_models('resnet1*'))} that match" in out and "--all" in out
    assert MEASURED == 60


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("vit_tiny_patch16_224", "mixers"),
        ("swin_tiny_patch4_window7_224", "mixers"),
        ("resnet18", "gates"),
        ("convnext_tiny", "gates"),
        ("mixer_s32_224", "none"),
    ],
)
def test_a_network_is_measured_without_memory_for_its_weights(name: str, takes: str) -> None:
    row = measure(name)
    assert row.attention == takes and not row.fault
    with torch.device("meta"):
        assert row.parameters == sum(p.numel() for p in timm.create_model(name).parameters())


def test_one_is_shown_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "show", "convnext_tiny")
    for part in ("ConvNeXt", "28.6 M", "3 x 224 x 224", "gates: ", "ela", "backbones.create('convnext_tiny'"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "resnet8"], "'resnet18'"),
        (["show"], "show takes the name of one backbone"),
        (["no such pattern*"], "no backbone matches"),
        (["a*", "b*"], "one pattern at a time"),
        (["show", "package.module:Class"], "a class of your own"),
    ],
)
def test_faults_are_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    caught = capsys.readouterr()
    assert said in caught.err and caught.err.count("\n") == 1 and not caught.out
