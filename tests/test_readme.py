"""What the README shows is run as it stands; only the budget is made smaller."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
MODELS = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

config = ViTConfig(image_size=16, patch_size=4, hidden_size=16, intermediate_size=32,
                   num_hidden_layers=2, num_attention_heads=2, num_labels=3)
torch.manual_seed(0)
base = ViTForImageClassification(config)
base.save_pretrained("models/base")
for seed, name in enumerate(["cars", "dogs"]):
    torch.manual_seed(seed + 1)
    expert = ViTForImageClassification(config)
    expert.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in base.state_dict().items()})
    x = torch.randn(60, 3, 16, 16)
    y = expert(pixel_values=x).logits.argmax(-1)
    expert.save_pretrained(f"models/{name}")
    save_file({"x": x, "y": y}, f"{name}.safetensors")
"""
TASKS = """
from pathlib import Path
import bmm
from safetensors.torch import load_file

def make():
    found = []
    for name in ("cars", "dogs"):
        d = load_file(Path(__file__).parent / f"{name}.safetensors")
        x, y = d["x"], d["y"]
        found.append(bmm.Task(name, validation=({"pixel_values": x[:30]}, y[:30]),
                              test=({"pixel_values": x[30:]}, y[30:]), calibration={"pixel_values": x[:20]}))
    return found
"""


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(command, cwd, timeout=400):
    done = subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_commands_are_targets_of_the_makefile():
    commands = re.findall(r"^make (\w+)", blocks(section("Two commands"), "console")[0], re.MULTILINE)
    assert commands == ["tune", "test"]
    makefile = (ROOT / "Makefile").read_text()
    for name in commands:
        assert f"\n{name}:" in makefile
    assert "bmm tune --anchor tsv --budget 50" in makefile


@pytest.mark.slow
def test_python_section_runs(tmp_path):
    code = "\n".join(blocks(section("Python"), "python"))
    (tmp_path / "code.py").write_text(code)
    out = run([sys.executable, "code.py"], tmp_path)
    assert out.count("torch.Size([16, 8])") == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("readme")
    run([sys.executable, "-c", MODELS], where)
    (where / "tasks.py").write_text(TASKS)
    return where


@pytest.mark.slow
def test_commands_for_your_own_models_run(folder):
    text = blocks(section("Your own models"), "console")[0].replace("\\\n", " ")
    lines = [line.split("#")[0].split() for line in text.splitlines() if line.strip()]
    assert [line[1] for line in lines] == ["inspect", "tune"]
    for line in lines:
        out = run(["5" if word == "50" else word for word in line], folder)
        assert "cars" in out
    assert {"model", "report.md", "result.json", "study.db"} <= {p.name for p in (folder / "runs/mine").iterdir()}
    files = {p.name for p in (folder / "runs/mine/model").iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "bmm_recipe.yaml"} <= files


@pytest.mark.slow
def test_recipe_of_the_readme_runs(folder):
    recipe = yaml.safe_load(blocks(section("Your own models"), "yaml")[0])
    assert recipe.pop("budget") == 50
    skip = recipe.pop("skip")
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe | {"out": "runs/yaml"}))
    out = run(["bmm", "tune", "--recipe", "mine.yaml", "--budget", "4", "--json", "-q"], folder)
    assert len(json.loads(out)["trials"]) == 4
    merged = run(["bmm", "inspect", "models/base", "models/cars", "--skip", skip[0], "--json"], folder)
    assert "classifier" not in merged


@pytest.mark.slow
def test_pipeline_example_runs(tmp_path):
    out = run([sys.executable, str(ROOT / "examples" / "pipeline.py"), str(tmp_path / "p")], tmp_path)
    assert "gap closed" in out
    assert "torch.Size([1, 5])" in out


def test_every_command_is_listed():
    from bmm_cli.main import COMMANDS

    assert set(re.findall(r"^\| `bmm (\w+)", section("Commands"), re.MULTILINE)) == set(COMMANDS)
