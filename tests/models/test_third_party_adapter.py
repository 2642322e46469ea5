"""Another package's adapter, installed the way a package installs one, for a library of models we know nothing of."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from sglp_deploy.errors import ArtifactError, MissingDependencyError, UnsupportedModelError
from sglp_deploy.materialize import materialize, save_checkpoint
from sglp_deploy.models import Adapter, adapter_for, adapter_of_folder, layer_stack, load_model, source_of

# A library of residual towers, and its adapter.  The second layer of every tower must stay.
PLUGIN = '''
import copy, json
import torch
from torch import nn
from safetensors.torch import load_file, save_file
from sglp_deploy.models import ConfigChange, LayerStack
from sglp_deploy.errors import ArtifactError

class Floor(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lift = nn.Linear(width, width)
    def forward(self, x):
        return x + torch.tanh(self.lift(x))

class Tower(nn.Module):
    def __init__(self, floors, width):
        super().__init__()
        self.settings = {"floors": floors, "width": width}
        self.floors = nn.ModuleList(Floor(width) for _ in range(floors))
    def forward(self, x):
        for floor in self.floors:
            x = floor(x)
        return x

class TowerAdapter:
    name = "towers"
    def matches(self, module):
        return isinstance(module, Tower)
    def stacks(self, module):
        n = len(module.floors)
        names = tuple(f"floors.{i}" for i in range(n))
        prunable = tuple(i != 1 for i in range(n))
        return (LayerStack("floors", names, tuple(module.floors), prunable, {1: "it carries the lift"}),)
    def changes(self, module, stack, keep):
        return (ConfigChange("floors", stack.n_layers, len(keep), "number of floors"),)
    def kinds(self, module, stack):
        return (("floor",) * stack.n_layers,)
    def select(self, module, stack, keep):
        shared = {id(t): t for t in module.parameters()}
        chosen = nn.ModuleList(copy.deepcopy(stack.layers[i], dict(shared)) for i in keep)
        new = Tower(0, module.settings["width"])
        new.floors = chosen
        new.settings = {**module.settings, "floors": len(keep)}
        return new.eval()
    def facts(self, module):
        return dict(module.settings)
    def owns(self, folder):
        file = folder / "config.json"
        return file.is_file() and "floors" in json.loads(file.read_text())
    def save(self, module, folder):
        (folder / "config.json").write_text(json.dumps(module.settings))
        save_file(module.state_dict(), folder / "model.safetensors")
    def load(self, folder):
        module = Tower(**json.loads((folder / "config.json").read_text()))
        try:
            module.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        except RuntimeError as error:
            raise ArtifactError(f"the tower does not load; {error}; build it again") from error
        return module.eval()

class Greedy(TowerAdapter):
    """Says that everything is its own."""
    def matches(self, module):
        return True
    def owns(self, folder):
        return True

class Shapeless:
    name = "shapeless"

class Angry(TowerAdapter):
    def __init__(self):
        raise RuntimeError("no licence found")
'''


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, **entries: str) -> None:
    """A distribution on the path whose entry points name ``entries`` of the plugin."""
    folder.mkdir()
    info = folder / "their_towers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-towers\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[sglp_deploy.adapters]", *lines, ""]))
    (folder / "their_towers.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "their_towers", raising=False)


@pytest.fixture
def towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    _install(tmp_path / "site", monkeypatch, towers="their_towers:TowerAdapter")
    return importlib.import_module("their_towers")


def _tower(towers: Any, floors: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower: nn.Module = towers.Tower(floors, 4).eval()
    return tower


def test_a_third_party_adapter_finds_prunes_saves_and_loads_its_models(towers: Any, tmp_path: Path) -> None:
    tower, x = _tower(towers), torch.randn(3, 4)
    assert isinstance(adapter_for(tower), Adapter)
    assert adapter_for(tower).name == "towers"
    assert layer_stack(tower).names == ("floors.0", "floors.1", "floors.2", "floors.3", "floors.4")
    pruned = materialize(tower, tiny.plan_for(tower, (0, 1, 3)), source_of(tower, "a tower"))
    expected = x
    for floor in (0, 1, 3):  # by hand: the floors that stay, one after the other
        expected = expected + torch.tanh(tower.floors[floor].lift(expected))
    assert torch.equal(pruned.module(x), expected)
    out = save_checkpoint(pruned, tmp_path / "out")
    owner = adapter_of_folder(out)
    assert owner is not None
    assert owner.name == "towers"
    loaded = load_model(out)
    assert torch.equal(loaded.module(x), expected)
    assert loaded.tokenizer is None
    assert not loaded.module.training
    assert loaded.source.fingerprint == source_of(pruned.module, "").fingerprint
    assert load_model(out, dtype="bf16").module.floors[0].lift.weight.dtype is torch.bfloat16


def test_layers_a_third_party_pins_are_refused_with_its_reason(towers: Any) -> None:
    tower = _tower(towers)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 1 \(floors\.1\) cannot be removed; it carries the lift; keep"
    ):
        materialize(tower, tiny.plan_for(tower, (0, 2)), source_of(tower, "a tower"))


def test_what_a_third_party_writes_wrong_is_noticed(
    towers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = _tower(towers)
    pruned = materialize(tower, tiny.plan_for(tower, (0, 1, 3)), source_of(tower, "a tower"))
    write = towers.TowerAdapter.save

    def wrong(self: Any, module: Any, folder: Path) -> None:
        module = towers.TowerAdapter().select(module, layer_stack(module), (1, 0, 2))
        write(self, module, folder)

    monkeypatch.setattr(towers.TowerAdapter, "save", wrong)
    with pytest.raises(ArtifactError, match=r"4 tensors changed on the way to disk, first floors\.0\.lift\.bias"):
        save_checkpoint(pruned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_third_party_adapter_leaves_our_models_to_ours(towers: Any, tmp_path: Path) -> None:
    assert adapter_for(tiny.model("llama")).name == "transformers"
    folder = tiny.save_tiny(tmp_path / "llama")
    owner = adapter_of_folder(folder)
    assert owner is not None
    assert owner.name == "transformers"


def test_the_adapters_that_were_asked_are_named_third_parties_included(towers: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear is a model of none .*; asked: .*towers.*transformers"):
        adapter_for(nn.Linear(2, 2))


def test_a_third_party_may_not_take_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path / "site", monkeypatch, transformers="their_towers:Greedy")
    assert type(adapter_for(tiny.model("llama"))).__module__ == "sglp_deploy.models.transformers.adapter"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("their_towers:Angry", "RuntimeError: no licence found"),
        ("their_towers:Absent", r"AttributeError: module 'their_towers' has no attribute 'Absent'"),
        ("no_such_module:Thing", r"ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "their_towers:Shapeless",
            r"TypeError: it lacks matches, stacks, changes, kinds, select, facts, owns, save, load",
        ),
    ],
)
def test_a_broken_adapter_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, why: str
) -> None:
    _install(tmp_path / "site", monkeypatch, broken=target)
    with pytest.raises(MissingDependencyError) as caught:
        adapter_for(nn.Linear(2, 2))
    said = str(caught.value)
    assert said.startswith(f"the adapter 'broken' ({target}) cannot be loaded; ")
    assert why in said
    assert said.endswith("reinstall or remove the package it comes from")


def test_a_folder_no_adapter_owns_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"something": "else"}))
    assert adapter_of_folder(tmp_path) is None
    assert adapter_of_folder(tmp_path / "nowhere") is None
