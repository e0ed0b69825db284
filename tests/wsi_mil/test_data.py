"""Labels and features joined into packed bags, and every way they can fail to fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError
from tasks.common.samplers import EpochSampler
from tasks.wsi_mil.data import BagDataset, FeatureCache, load_cohort, load_features, make_loader, pack
from tasks.wsi_mil.features import write_bag

DIM = 6


def settings(folder: Path, **changes: Any) -> DictConfig:
    base = {
        "features": str(folder / "features"), "labels": str(folder / "labels.csv"), "slide_column": None,
        "patient_column": None, "label_column": None, "classes": None, "target": "auto", "bag": "slide",
        "missing": "error", "cache": "auto",
    }  # fmt: skip
    return OmegaConf.create({**base, **changes})


def make(folder: Path, table: str, sizes: dict[str, int]) -> DictConfig:
    (folder / "labels.csv").write_text(table)
    rng = np.random.default_rng(0)
    for slide, size in sizes.items():
        coords = np.stack([np.arange(size) * 224, np.zeros(size)], 1)
        write_bag(folder / "features" / f"{slide}.h5", rng.normal(size=(size, DIM)).astype("float32"), coords)
    return settings(folder)


def test_numeric_ids_keep_their_zeros_and_suffixes_are_forgiven(tmp_path: Path) -> None:
    cohort = load_cohort(make(tmp_path, "slide_id,label\n007.svs,b\n08,a\n", {"007": 3, "08": 2}))
    assert [case.case_id for case in cohort.cases] == ["007", "08"]
    assert cohort.target.classes == ("a", "b")
    assert cohort.labels().tolist() == [1, 0]
    assert cohort.dim == DIM


def test_grades_are_ordered_as_numbers(tmp_path: Path) -> None:
    cfg = make(tmp_path, "slide_id,label\na,10\nb,9\nc,2\n", {"a": 1, "b": 1, "c": 1})
    cfg.target = "ordinal"
    assert load_cohort(cfg).target.classes == ("2", "9", "10")


def test_semicolons_and_excel_byte_order_marks_are_read(tmp_path: Path) -> None:
    cfg = make(tmp_path, "\ufeffslide_id;label\na;x\nb;y\n", {"a": 1, "b": 1})
    assert load_cohort(cfg).target.classes == ("x", "y")


def test_several_label_columns_make_a_multi_label_target(tmp_path: Path) -> None:
    cfg = make(tmp_path, "slide_id,er,pr\na,1,0\nb,0,0\n", {"a": 1, "b": 1})
    cfg.label_column = ["er", "pr"]
    cohort = load_cohort(cfg)
    assert cohort.target.kind == "multilabel"
    assert cohort.labels().tolist() == [[1, 0], [0, 0]]


def test_a_patients_slides_can_form_one_bag(tmp_path: Path) -> None:
    cfg = make(tmp_path, "slide_id,patient,label\na,p,x\nb,p,x\nc,q,y\n", {"a": 2, "b": 3, "c": 1})
    cfg.bag = "patient"
    cohort = load_cohort(cfg)
    assert [case.num_tiles for case in cohort.cases] == [5, 1]
    assert load_features(cohort.cases[0]).shape == (5, DIM)


@pytest.mark.parametrize(
    ("table", "sizes", "changes", "sentence"),
    [
        ("slide_id,label\na,x\nb,y\nc,x\n", {"a": 1, "b": 1}, {}, "1 of 3 slides have no feature file"),
        ("slide_id,label\na,x\nb,y\n", {"a": 1, "b": 1, "c": 1}, {}, "1 of 3 feature files .* have no label"),
        ("slide_id,label\na,x\nb,\n", {"a": 1, "b": 1}, {}, "have no label"),
        ("slide_id,label\na,x\na,y\n", {"a": 1}, {}, "slide a stands there more than once"),
        ("slide_id,label\n../../x,x\nb,y\n", {"b": 1}, {}, r"row 2: id '\.\./\.\./x' cannot be used"),
        ("slide_id,label\na,x\nb,y\n", {"a": 1, "b": 0}, {}, "no tiles in the features of b"),
        ("slide_id,label\na,x\nb,x\n", {"a": 1, "b": 1}, {}, "two classes"),
        ("name,label\na,x\n", {"a": 1}, {}, "data.slide_column="),
        ("slide_id,grade\na,x\n", {"a": 1}, {}, "data.label_column="),
        ("slide_id,label\na,x\nb,y\n", {"a": 1, "b": 1}, {"label_column": "labl"}, "Did you mean 'label'"),
        ("slide_id,label\na,x\nb,y\n", {"a": 1, "b": 1}, {"classes": ["x", "z"]}, "label y is not in data.classes"),
        ("slide_id,e,p\na,1,2\n", {"a": 1}, {"label_column": ["e", "p"]}, "use 0 and 1"),
        ("slide_id,label\na,x\nb,y\n", {"a": 1, "b": 1}, {"bag": "case"}, "data.bag 'case' is not known"),
        ("", {"a": 1}, {}, "is empty"),
    ],
)
def test_bad_tables_are_one_sentence(
    table: str, sizes: dict[str, int], changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    cfg = make(tmp_path, table, sizes)
    with pytest.raises(InputError, match=sentence):
        load_cohort(OmegaConf.merge(cfg, changes))


def test_slides_without_features_can_be_left_out(tmp_path: Path) -> None:
    cfg = make(tmp_path, "slide_id,label\na,x\nb,y\nc,x\n", {"a": 1, "b": 1, "d": 1})
    cfg.missing = "skip"
    assert [case.case_id for case in load_cohort(cfg).cases] == ["a", "b"]


def test_features_of_different_size_are_refused(tmp_path: Path) -> None:
    cfg = make(tmp_path, "slide_id,label\na,x\nb,y\n", {"a": 1})
    write_bag(tmp_path / "features" / "b.h5", np.zeros((2, DIM + 1), "float32"), np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"different size.*6: a; 7: b"):
        load_cohort(cfg)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused_naming_the_file(bad: float, tmp_path: Path) -> None:
    cfg = make(tmp_path, "slide_id,label\na,x\nb,y\n", {"a": 3})
    features = np.zeros((4, DIM), "float32")
    features[2, 1] = bad
    np.save(tmp_path / "features" / "b.npy", features)
    cohort = load_cohort(cfg)
    with pytest.raises(InputError, match=r"b\.npy: 1 of 4 tiles of slide 'b'"):
        load_features(cohort.select(["b"])[0])


def test_packing_joins_bags_without_padding(tmp_path: Path) -> None:
    cohort = load_cohort(make(tmp_path, "slide_id,label\na,x\nb,y\nc,x\n", {"a": 3, "b": 1, "c": 4}))
    dataset = BagDataset(cohort.cases)
    batch = pack([dataset[0], dataset[1], dataset[2]])
    assert batch.features.shape == (8, DIM)
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert batch.target.tolist() == [0, 1, 0]
    torch.testing.assert_close(batch.features[3:4], load_features(cohort.cases[1]))


def test_workers_and_cache_give_the_same_batches(tmp_path: Path) -> None:
    cohort = load_cohort(make(tmp_path, "slide_id,label\na,x\nb,y\nc,x\n", {"a": 3, "b": 1, "c": 4}))
    cached = make_loader(BagDataset(cohort.cases, None, FeatureCache()), 2, EpochSampler(3, 5))
    read = make_loader(BagDataset(cohort.cases, None, None), 2, EpochSampler(3, 5), workers=1)
    for one, other in zip(cached, read, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_order_of_an_epoch_follows_from_seed_and_epoch_alone() -> None:
    first, again = EpochSampler(20, 1), EpochSampler(20, 1)
    first.current_epoch = again.current_epoch = lambda: 3
    assert list(first) == list(again)
    again.current_epoch = lambda: 4
    assert list(first) != list(again)
    assert sorted(i for i, _ in first) == list(range(20))


def test_weighted_sampling_draws_the_rare_class_as_often_as_the_other() -> None:
    sampler = EpochSampler(4000, 1, [1.0] * 3600 + [9.0] * 400)
    rare = sum(index >= 3600 for index, _ in sampler)
    assert abs(rare - 2000) < 150


def test_a_limit_draws_other_tiles_each_epoch_and_the_same_when_repeated(tmp_path: Path) -> None:
    cohort = load_cohort(make(tmp_path, "slide_id,label\na,x\nb,y\n", {"a": 50, "b": 5}))
    dataset = BagDataset(cohort.cases, max_instances=10)
    drawn, again, other = dataset[(0, 1)][0], dataset[(0, 1)][0], dataset[(0, 2)][0]
    assert drawn.shape == (10, DIM)
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    assert dataset[(1, 1)][0].shape == (5, DIM)
