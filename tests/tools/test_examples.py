"""The scripts of examples/ do what they say, each in a process of its own, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from published_model import PublishedModel

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(folder: Path, name: str, *arguments: str) -> str:
    return python(folder, str(ROOT / "examples" / name), *arguments)


def python(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests/support"), "GOMP_SPINCOUNT": "0"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sample_draws_four_pictures(tmp_path: Path) -> None:
    run(tmp_path, "sample.py")
    pictures = [Image.open(path) for path in sorted(tmp_path.iterdir())]
    assert [picture.size for picture in pictures] == [(64, 64)] * 4
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_stream_writes_a_frame_per_step(tmp_path: Path) -> None:
    said = run(tmp_path, "stream.py", "out.gif").splitlines()
    assert said[-1] == "step 20: 256 of 256 cells"
    with Image.open(tmp_path / "out.gif") as animation:
        assert (animation.format, animation.size) == ("GIF", (256, 256))
        assert animation.n_frames == len(said) == 20


def test_the_drop_in_decodes_by_fine_tuned_weights(tmp_path: Path) -> None:
    model = PublishedModel()
    said = run(tmp_path, "drop_in.py", "published_model:PublishedModel")
    assert said.startswith(f"2 pictures of {model.pos_embed.shape[1] - 1} tokens")
    model.head.weight.data = model.head.weight.data.flip(0)
    torch.save({"model": model.state_dict()}, tmp_path / "tuned.pth")
    assert run(tmp_path, "drop_in.py", "published_model:PublishedModel", "tuned.pth") != said


def test_operators_agree_with_plain_torch(tmp_path: Path) -> None:
    error, tokens = run(tmp_path, "operators.py").splitlines()
    assert float(error.split()[-1]) < 1e-5
    assert tokens.count(",") == 6


def test_the_python_of_readme_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    # The bundled model in place of the published one.
    code = code.replace('"lpd_l_256"', "").replace("golden retriever", "heart")
    python(tmp_path, "-c", code)
    steps = [f"step_{step:02d}.png" for step in range(1, 21)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dog.png", "fixed.png", "heart.png", *steps]


def test_the_python_of_the_guide_to_editing_runs(tmp_path: Path) -> None:
    """One block after the other, outside the checkout."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guide/editing.md").read_text(encoding="utf-8"), re.DOTALL)
    python(tmp_path, "-c", "".join(blocks))
    previews = [f"step_{step}.png" for step in range(1, 21)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["repaired.png", *previews])


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_shown_in_a_guide(name: str) -> None:
    code = (ROOT / "examples" / name).read_text(encoding="utf-8")
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs/guide").glob("*.md")]
    assert any(f"```python\n{code}```" in page for page in pages)
