"""What the documents say that scripts make: the images and the memory table."""

import re
from xml.etree import ElementTree

import torch

from benchmarks import memory_model
from docs.drawings import IMAGES, ROOT, draw_all


def test_the_images_are_what_the_scripts_draw() -> None:
    drawn = draw_all()
    committed = {path.name: path.read_text() for path in IMAGES.glob("*.svg")}
    assert sorted(committed) == sorted(drawn)
    for name, image in drawn.items():
        assert committed[name] == image, f"{name}: run `make drawings`"
        ElementTree.fromstring(image)


def test_the_memory_table_is_what_the_model_gives() -> None:
    table = memory_model.table((8192, 32768), torch.bfloat16)
    page = (ROOT / "docs" / "head.md").read_text()
    assert table in page, "run: python -m benchmarks.memory_model"


def test_the_readme_reads_the_charts_figures_out() -> None:
    readme = (ROOT / "README.md").read_text()
    alt = re.search(r"!\[([^]]*)\]\(docs/images/cpu-kernels\.svg\)", readme)
    chart = (IMAGES / "cpu-kernels.svg").read_text()
    assert alt is not None
    figures = re.findall(r"\d[\d.,]*\d", alt[1])
    assert len(figures) > 12
    assert [figure for figure in figures if figure not in chart] == []
