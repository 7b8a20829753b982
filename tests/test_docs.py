"""What the documentation says is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)  # the page writes a file
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "backend: aten" in capsys.readouterr().out


@pytest.mark.parametrize("section", ["torch.export", "AOTInductor", "ONNX"])
def test_code_of_the_page_on_export_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if section == "AOTInductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    if section == "ONNX":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)  # the page writes files
    text = (ROOT / "docs" / "export.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    (block,) = BLOCK.findall(text)
    exec(compile(block, "export.md", "exec"), {})
    assert list(tmp_path.iterdir())


def test_compare_code_runs() -> None:
    """In a process of its own, from top to bottom: what it compiles or warns of is no other test's."""
    page = (ROOT / "docs" / "compare.md").read_text()
    blocks = BLOCK.findall(page)
    rows = re.findall(r"^\| \[.*?\]\(#(.*?)\)", page, re.MULTILINE)
    headings = re.findall(r"^###? (.*)$", page, re.MULTILINE)
    assert rows == [h.lower().replace(" ", "-").replace(".", "") for h in headings], "a section for each row"
    assert len(blocks) == 1 + len(rows), "a snippet for each, after the imports"
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
    run = subprocess.run([sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + "\n".join(blocks)], **options)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("times as fast") == 2


def test_math_quotes_lines_that_exist() -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "math.md").read_text())
    assert len(blocks) > 10
    for block in blocks:
        name, *quoted = block.strip().splitlines()
        lines = {line.strip() for line in (ROOT / name.removeprefix("# ")).read_text().splitlines()}
        for line in quoted:
            assert line in lines, f"{name}: {line}"
