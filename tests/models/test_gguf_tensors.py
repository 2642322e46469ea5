"""Every number in a GGUF file is in the model that is made of it, or the file is refused by the tensor's name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import gguf_files
import tiny
from sglp_deploy.errors import UnsupportedModelError
from sglp_deploy.models import load_model
from sglp_deploy.models.gguf_facts import refuse_unread_tensors


def _file(folder: Path, more: dict[str, torch.Tensor]) -> Path:
    tiny.tokenizer().save_pretrained(folder)
    return gguf_files.write(folder / "m.gguf", gguf_files.named(tiny.model("llama")) | more, layers=6)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("blk.0.attn_q.bias", 128),  # of a Llama whose configuration has no place for it
        ("blk.3.attn_q_norm.weight", 32),
        ("blk.2.of_another_program.weight", 7),
        ("output.bias", tiny.VOCAB_SIZE),
        ("rope_factors_long.weight", 16),
    ],
)
def test_a_tensor_that_the_model_has_no_place_for_is_refused(name: str, size: int, tmp_path: Path) -> None:
    words = (
        rf"holds {size} numbers that are in no tensor of the model .*\({name}\); it would compute something else; give"
    )
    with pytest.raises(UnsupportedModelError, match=words):
        load_model(_file(tmp_path, {name: torch.ones(size)}))


def test_what_is_read_counts_once_whatever_is_tied(tmp_path: Path) -> None:
    (tmp_path / "tied").mkdir()
    (tmp_path / "own").mkdir()
    head = torch.arange(tiny.VOCAB_SIZE * 64, dtype=torch.float32).reshape(tiny.VOCAB_SIZE, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that say nothing
        tied = load_model(_file(tmp_path / "tied", {}))
        own = load_model(_file(tmp_path / "own", {"output.weight": head}))
    assert tied.module.config.tie_word_embeddings
    assert torch.equal(own.module.get_output_embeddings().weight, head)


def test_blocks_that_predict_further_tokens_are_named(tmp_path: Path) -> None:
    name = "blk.6.nextn.eh_proj.weight"
    with pytest.warns(UserWarning, match=f"not read, and taken to be without effect: .*{name}"):
        load_model(_file(tmp_path, {name: torch.ones(8)}))


def test_a_table_written_twice_counts_once_and_another_head_is_refused(tmp_path: Path) -> None:
    """As BLOOM's converter does it; transformers ties such a model whatever the file holds."""
    module = tiny.model("llama")
    table = module.get_input_embeddings().weight.detach()
    (tmp_path / "twice").mkdir()
    (tmp_path / "other").mkdir()
    assert refuse_unread_tensors(_file(tmp_path / "twice", {"output.weight": table}), module) == ()
    with pytest.raises(UnsupportedModelError, match=r"in no tensor of the model .*\(output\.weight\); it would"):
        refuse_unread_tensors(_file(tmp_path / "other", {"output.weight": table + 1}), module)
