import json
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixfleet_engine import weight_loader
from mixfleet_engine.checkpoint_mistral import rotary_halves_apart
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.weight_loader import WeightLoader
from mixfleet_engine.weights import open_checkpoint, weight_shapes
from support.packed_checkpoints import Packing, write_packed_checkpoint
from support.tiny_model import (
    ExpertStorage,
    MistralFiles,
    hf_tensors,
    mistral_tensors,
    tiny_config,
    write_hf_checkpoint,
    write_mistral_checkpoint,
)

SMALL = tiny_config(n_layers=1, num_experts=4)


def read_all(folder: Path, config: ModelConfig = SMALL) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder, config)
    loader = WeightLoader(checkpoint, config, dtype=torch.float32, device=torch.device("cpu"))
    return {name: loader.tensor(name) for name in weight_shapes(config)}


def expected_weights(config: ModelConfig = SMALL) -> dict[str, torch.Tensor]:
    """Mistral's names and Hugging Face's rotary order: the engine's own."""
    weights = mistral_tensors(config)
    for layer in range(config.n_layers):
        for part in "qk":
            name = f"layers.{layer}.attention.w{part}.weight"
            weights[name] = hf_tensors(config)[f"model.layers.{layer}.self_attn.{part}_proj.weight"]
    return weights


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].is_contiguous(), name


@pytest.mark.parametrize("num_files", [1, 3])
def test_hugging_face_layout_loads_every_weight(tmp_path: Path, num_files: int) -> None:
    assert_same(
        read_all(write_hf_checkpoint(tmp_path, SMALL, num_files=num_files)), expected_weights()
    )


@pytest.mark.parametrize("experts", ["per-expert", "stacked"])
@pytest.mark.parametrize("files", ["safetensors", "sharded-safetensors", "pth", "sharded-pth"])
def test_mistral_layout_loads_every_weight(
    tmp_path: Path, files: MistralFiles, experts: ExpertStorage
) -> None:
    folder = write_mistral_checkpoint(tmp_path, SMALL, files=files, experts=experts)
    assert_same(read_all(folder), expected_weights())


def test_rotary_pairs_move_half_a_head_apart() -> None:
    weight = torch.arange(12.0)[:, None]  # two heads of 6 rows
    moved = rotary_halves_apart(weight, head_dim=6)[:, 0].tolist()
    assert moved == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_shared_experts_are_stored_and_read_once(tmp_path: Path) -> None:
    config = tiny_config(n_layers=1, shared_experts=True)
    weights = read_all(write_hf_checkpoint(tmp_path, config), config)
    assert sum(".w1." in name for name in weights) == 1


def test_tied_embeddings_need_no_output_matrix(tmp_path: Path) -> None:
    config = tiny_config(n_layers=1, tie_word_embeddings=True)
    assert "output.weight" not in read_all(write_hf_checkpoint(tmp_path, config), config)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_of_any_dtype_are_converted(tmp_path: Path, stored: torch.dtype) -> None:
    weights = read_all(write_hf_checkpoint(tmp_path, SMALL, dtype=stored))
    original = hf_tensors(SMALL)["model.embed_tokens.weight"]
    assert torch.equal(weights["tok_embeddings.weight"], original.to(stored).float())


def test_a_loaded_weight_survives_its_file(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    weights = read_all(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert_same(weights, expected_weights())


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path, SMALL), SMALL)
    loader = WeightLoader(
        checkpoint,
        SMALL,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        progress=lambda done, total: calls.append((done, total)),
    )
    for name in weight_shapes(SMALL):
        loader.tensor(name)
    total = sum(tensor.numel() for tensor in hf_tensors(SMALL).values()) * 2
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (total, total)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_thread_that_reads_ahead_changes_no_weight(
    is_packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_packed:
        write_packed_checkpoint(tmp_path, Packing(method="awq"))
    else:
        write_hf_checkpoint(tmp_path, SMALL)
    config = ModelConfig.from_checkpoint(tmp_path)
    pinned_in: list[str] = []

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        pinned_in.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(weight_loader, "_pinned", pinned)
    monkeypatch.setattr(weight_loader, "READ_AHEAD_BYTES", 10_000)
    found = {}
    for reads_ahead in (False, True):
        loader = WeightLoader(
            open_checkpoint(tmp_path, config),
            config,
            dtype=torch.float32,
            device=torch.device("cpu"),
            reads_ahead=reads_ahead,
        )
        with closing(loader):
            # The order in which a model takes them is not quite that of the files.
            found[reads_ahead] = [loader.tensor(name) for name in in_an_order_of_its_own(config)]
    assert all(map(torch.equal, found[False], found[True]))
    assert len(pinned_in) >= len(found[True])
    assert set(pinned_in) == {"read-ahead"}


def in_an_order_of_its_own(config: ModelConfig) -> list[str]:
    names = list(weight_shapes(config))
    return [name for pair in zip(names[1::2], names[::2], strict=False) for name in pair]


def test_matrix_stacks_matrices(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path, SMALL), SMALL)
    loader = WeightLoader(checkpoint, SMALL, dtype=torch.float32, device=torch.device("cpu"))
    names = ("layers.0.attention.wk.weight", "layers.0.attention.wv.weight")
    found = loader.matrix(*names)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, torch.cat([expected_weights()[n] for n in names]))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the one file in `folder`, or take them out."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file) | {name: t for name, t in changes.items() if t is not None}
    save_file({n: t.clone() for n, t in tensors.items() if changes.get(n, t) is not None}, file)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    rewrite(folder, **{"model.layers.0.self_attn.o_proj.weight": None})
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.self_attn\.o_proj\.weight is missing"
    ):
        open_checkpoint(folder, SMALL)


def test_wrong_shape_names_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    rewrite(folder, **{"model.norm.weight": torch.ones(65)})
    message = r"model\.norm\.weight has shape \[65\], expected \[64\]"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder, SMALL)


def test_wrong_shape_of_stacked_experts_names_the_stored_tensor(tmp_path: Path) -> None:
    folder = write_mistral_checkpoint(tmp_path, SMALL, experts="stacked")
    rewrite(folder, **{"layers.0.block_sparse_moe.w2": torch.ones(64, 384)})
    message = r"layers\.0\.block_sparse_moe\.w2 has shape \[64, 384\], expected \[384, 64\]"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder, SMALL)


def test_config_of_other_sizes_is_refused(tmp_path: Path) -> None:
    folder = write_mistral_checkpoint(tmp_path, SMALL)
    with pytest.raises(CheckpointError, match=r"expected \[600, 64\]"):
        open_checkpoint(folder, tiny_config(n_layers=1, num_experts=4, vocab_size=600))


def test_tensors_that_nobody_knows_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, **{inv_freq: torch.ones(8)})
    open_checkpoint(folder, SMALL)
    assert caplog.text == "", "old checkpoints carry the rotary table, which is recomputed"
    rewrite(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    open_checkpoint(folder, SMALL)
    assert "q_proj.bias" in caplog.text


@pytest.mark.parametrize("layout", ["hf", "mistral", "pth"])
def test_a_truncated_file_is_named(tmp_path: Path, layout: str) -> None:
    if layout == "hf":
        file = write_hf_checkpoint(tmp_path, SMALL) / "model.safetensors"
    elif layout == "mistral":
        file = write_mistral_checkpoint(tmp_path, SMALL) / "consolidated.safetensors"
    else:
        file = write_mistral_checkpoint(tmp_path, SMALL, files="pth") / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=file.name):
        open_checkpoint(tmp_path, SMALL)


def test_a_pth_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = write_mistral_checkpoint(tmp_path, SMALL, files="pth")
    torch.save({"norm.weight": Path("/tmp")}, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        open_checkpoint(folder, SMALL)


@pytest.mark.parametrize("content", [[1, 2], {"norm.weight": 3}])
def test_a_pth_file_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    folder = write_mistral_checkpoint(tmp_path, SMALL, files="pth")
    torch.save(content, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="named tensors"):
        open_checkpoint(folder, SMALL)


def test_copies_of_a_tensor_in_several_pth_files_must_agree(tmp_path: Path) -> None:
    folder = write_mistral_checkpoint(tmp_path, SMALL, files="pth")
    norm = mistral_tensors(SMALL)["norm.weight"]
    torch.save({"norm.weight": norm}, folder / "consolidated.01.pth")
    assert_same(read_all(folder), expected_weights())
    torch.save({"norm.weight": norm + 1}, folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: norm\.weight differs"):
        read_all(folder)


def test_a_tensor_in_two_safetensors_files_is_refused(tmp_path: Path) -> None:
    folder = write_mistral_checkpoint(tmp_path, SMALL, files="sharded-safetensors")
    save_file({"norm.weight": torch.ones(64)}, folder / "consolidated-00009.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight is in another file too"):
        open_checkpoint(folder, SMALL)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_named(tmp_path: Path, index: str) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL, num_files=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="broken index"):
        open_checkpoint(folder, SMALL)


@pytest.mark.parametrize("named", ["model-00009.safetensors", "../secret.safetensors"])
def test_an_index_that_names_a_file_not_in_the_folder_is_refused(
    tmp_path: Path, named: str
) -> None:
    (tmp_path / "secret.safetensors").touch()
    folder = write_hf_checkpoint(tmp_path / "model", SMALL, num_files=2)
    index = {"weight_map": {"lm_head.weight": named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not in the folder"):
        open_checkpoint(folder, SMALL)


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_a_folder_without_weights_says_which_files_it_wants(tmp_path: Path, layout: str) -> None:
    write = write_hf_checkpoint if layout == "hf" else write_mistral_checkpoint
    folder = write(tmp_path, SMALL)
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"neither .*\.safetensors"):
        open_checkpoint(folder, SMALL)
