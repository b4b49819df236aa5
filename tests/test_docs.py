"""What the documents say that scripts make: images, the memory table, instruction counts."""

import json
import re
from dataclasses import fields
from xml.etree import ElementTree

import pytest
import torch

import papo_kernels
from benchmarks import memory_model
from docs.drawings import IMAGES, ROOT, draw_all
from papo_kernels import Compute, Objective, PolicyLossOutput, TokenWeights
from papo_kernels.aggregation import AGGREGATIONS
from papo_kernels.objective import KL_ESTIMATORS, RATIO_LEVELS, SURROGATES


def test_the_images_are_what_the_scripts_draw() -> None:
    drawn = draw_all()
    committed = {path.name: path.read_text() for path in IMAGES.glob("*.svg")}
    assert sorted(committed) == sorted(drawn)
    for name, image in drawn.items():
        assert committed[name] == image, f"{name}: run `make drawings`"
        ElementTree.fromstring(image)
    pages = "".join(p.read_text() for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert [name for name in drawn if f"images/{name})" not in pages] == [], "shown nowhere"


def test_the_manual_has_every_public_name_and_option() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    names = {name for name in papo_kernels.__all__ if name != "LazyLogits"}  # what a head gives
    for kind in (Compute, Objective):
        names |= {field.name for field in fields(kind)}
    names |= {*TokenWeights._fields, *PolicyLossOutput._fields}
    names |= {*SURROGATES, *KL_ESTIMATORS, *RATIO_LEVELS, *AGGREGATIONS}
    code = " ".join(re.findall(r"`([^`]+)`", page.replace("```", "")))
    words = set(re.findall(r"[A-Za-z_][\w-]*", code))
    assert {name.removesuffix("+") for name in names} - words == set()


def test_the_memory_table_is_what_the_model_gives() -> None:
    table = memory_model.table((8192, 32768), torch.bfloat16)
    page = (ROOT / "docs" / "head.md").read_text()
    assert table in page, "run: python -m benchmarks.memory_model"


@pytest.mark.parametrize(
    "page, name", [("README.md", "gpu-kernels"), ("docs/benchmarks.md", "cpu-kernels")]
)
def test_a_page_reads_its_charts_figures_out(page: str, name: str) -> None:
    alt = re.search(rf"!\[([^]]*)\]\((docs/)?images/{name}\.svg\)", (ROOT / page).read_text())
    chart = (IMAGES / f"{name}.svg").read_text()
    assert alt is not None
    figures = re.findall(r"\d[\d.,]*\d", alt[1])
    assert len(figures) > 12
    assert [figure for figure in figures if figure not in chart] == []


def test_the_instruction_counts_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "machine-code.json").read_text())
    counts, versions = record["counts"], record["versions"]
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert f"CUDA {versions['nvcc']}" in page
    assert f"Triton {versions['triton'].rsplit('.', 1)[0]}" in page
    older, newer = (counts[f"cuda resident<bf16, bf16> sm_{a}"] for a in ("90a", "100"))
    rows = [f"{older[loop]:.1f} | {newer[loop]:.1f}" for loop in older if loop != "registers"]
    triton = [
        f"{found[loop]:.1f}"
        for name, found in counts.items()
        for loop in ("scan", "gradient")
        if name.startswith("triton") and loop in found
    ]
    tables = page[page.index("| loop, bf16 |") : page.index("Registers are at most")]
    assert re.findall(r"\| ([\d.]+ \| [\d.]+) \|", tables) == rows
    tables = page[page.index("| | bf16 | fp16 |") : page.index("Registers, sm_80 to sm_100")]
    assert sorted(re.findall(r"\d+\.\d", tables)) == sorted(triton)
