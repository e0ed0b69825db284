"""The YAML files of the data hold every option that the code asks for, and their defaults work."""

from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from tasks.qtseg.augmentation import Augmentation, named
from tasks.qtseg.checking import check_set
from tasks.qtseg.data import load_images
from tasks.qtseg.demo import make_images
from tasks.qtseg.loading import SegmentationDataset, Store, make_loader
from tasks.qtseg.preprocessing import Preprocessing
from tests.qtseg.data.files import DEFAULTS, write_pairs


def composed(name: str) -> DictConfig:
    with initialize_config_module(config_module="conf", version_base="1.3"):
        return compose(name).data


def test_the_defaults_read_prepare_augment_and_load(tmp_path: Path) -> None:
    data = composed("data/segmentation2d")
    assert {name: data[name] for name in DEFAULTS} == DEFAULTS
    write_pairs(tmp_path, ["a", "b"])
    data.path = str(tmp_path)
    images = load_images(data)
    preprocessing, augment = Preprocessing.from_config(data), Augmentation.from_config(data.augment)
    assert preprocessing == Preprocessing() and augment == named("paper")
    store = Store(preprocessing, images.coding, data.cache)
    check_set(images, store)
    batch = next(iter(make_loader(SegmentationDataset(images.samples, store, augment), 2, workers=data.workers)))
    assert batch.images.shape == (2, 3, 512, 512)


def test_the_demo_adds_its_own_to_the_same_options(tmp_path: Path) -> None:
    data = composed("data/shapes2d")
    shapes = data.shapes2d
    table = make_images(tmp_path / "set", shapes.kind, 8, shapes.side, shapes.seed)
    data.path = str(table)
    assert len(load_images(data).samples) == 8 and data.kind == "shapes2d"
    assert Preprocessing.from_config(data).size == (128, 128)
    assert set(OmegaConf.to_container(composed("data/segmentation2d"))) < set(OmegaConf.to_container(data))  # type: ignore[arg-type]
