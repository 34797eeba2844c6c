"""Several processes over gloo against one process: not a token may differ.

The processes are torchrun's. What they run is in `support.rank_scenario` and `support.rank_probe`.
"""

import json
import os
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from mixfleet_engine.errors import NativeUnavailableError
from mixfleet_engine.loading import load_engine
from mixfleet_engine.ops.native.library import load_native
from support import rank_scenario
from support.rank_device import device_requests
from support.rank_probe import LENGTHS, NUM_ROWS, VOCAB, numbers
from support.rank_scenario import (
    MODEL,
    NUM_TOKENS,
    TOKENIZER,
    config_of,
    requests,
    run_scenario,
)
from support.tiny_model import write_hf_checkpoint, write_mistral_checkpoint

pytestmark = pytest.mark.slow

SUPPORT = Path(rank_scenario.__file__).parent.parent


def torchrun(world: int, module: str, *arguments: Path | str) -> None:
    """Run a module as ``world`` ranks; one thread each, and a warning is an error."""
    options = ("--standalone", "--nproc-per-node", str(world), "-m", module)
    paths = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, *map(str, arguments)],
        env=dict(os.environ) | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("world", "layout"), [(2, "hf"), (2, "mistral"), (4, "hf")])
def test_tokens_are_those_of_one_process(world: int, layout: str, tmp_path: Path) -> None:
    """Chunked prefill, late joiners, preemptions; greedy and seeded requests."""
    write = write_hf_checkpoint if layout == "hf" else write_mistral_checkpoint
    checkpoint = write(tmp_path / "tiny", MODEL)
    torchrun(world, "support.rank_scenario", checkpoint, tmp_path / "found", "float32", "cpu")
    shared = json.loads((tmp_path / "found").read_text())
    alone = load_engine(checkpoint, config_of("float32", "cpu"), tokenizer=TOKENIZER)
    expected = json.loads(json.dumps(run_scenario(alone)))
    assert alone.num_preemptions > 0
    assert shared["preemptions"] > 0
    assert shared["answers"] == shared["alone"] == expected
    assert sum(len(tokens) for tokens, _ in expected.values()) == NUM_TOKENS * len(requests())
    patterns = {"1": r"[a-c ]+", "2": r"([0-9]{3}, )+([0-9]{0,3},?)", "5": r"[^\x00-\x7f]+"}
    for name, pattern in patterns.items():
        text = bytes(expected[name][0]).decode(errors="ignore")
        assert re.fullmatch(pattern, text), text


def test_in_bf16_two_ranks_give_a_request_the_same_tokens_in_any_batch(tmp_path: Path) -> None:
    """Other tokens than one process gives: its sums are rounded elsewhere."""
    try:
        load_native()
    except NativeUnavailableError as error:
        pytest.skip(f"plain torch rounds by the number of rows: {error}")
    checkpoint = write_hf_checkpoint(tmp_path / "tiny", MODEL)
    torchrun(2, "support.rank_scenario", checkpoint, tmp_path / "found", "bfloat16", "native")
    found = json.loads((tmp_path / "found").read_text())
    assert found["answers"] == found["alone"]
    assert found["preemptions"] > 0
    assert sum(len(tokens) for tokens, _ in found["answers"].values()) == NUM_TOKENS * len(
        requests()
    )


def test_recorded_decodes_give_the_same_tokens_and_every_rank_replays_the_same(
    tmp_path: Path,
) -> None:
    checkpoint = write_hf_checkpoint(tmp_path / "tiny", MODEL)
    torchrun(2, "support.rank_device", checkpoint, tmp_path)
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone = load_engine(checkpoint, config_of("float32", "cpu"), tokenizer=TOKENIZER)
    expected = run_scenario(alone, device_requests())
    assert first["answers"] == json.loads(json.dumps(expected))
    assert first["preemptions"] > 0
    # NCCL wants that an exchange is recorded on all ranks or on none.
    assert first["exchanges"] == other["exchanges"]
    assert first["shapes"] == other["shapes"]
    num_replayed = sum(is_replayed for _, _, is_replayed in first["exchanges"])
    assert num_replayed > len(first["exchanges"]) / 2
    assert first["left"] == other["left"] == 0
    # Memory that ranks share takes turns, so each step must end where the next one begins.
    steps = "".join(name[0] for name, _, _ in first["exchanges"]).split("s")[1:]
    assert {step.count("a") for step in steps} == {2 * MODEL.n_layers}


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks has seen."""
    folder = tmp_path_factory.mktemp("probes")
    torchrun(3, "support.rank_probe", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def test_a_row_of_a_sum_does_not_depend_on_the_number_of_rows(probes: list[dict[str, Any]]) -> None:
    longest = probes[0]["sums"][-1]
    for num_rows, found in zip(NUM_ROWS, probes[0]["sums"], strict=True):
        assert found == longest[:num_rows]
    in_order = list(accumulate(numbers(rank, max(NUM_ROWS)) for rank in range(3)))[-1]
    assert longest == in_order.tolist()


def test_all_ranks_see_the_same_bits(probes: list[dict[str, Any]]) -> None:
    assert probes[0]["sums"] == probes[1]["sums"] == probes[2]["sums"]
    assert probes[0]["narrow"] == probes[1]["narrow"] == probes[2]["narrow"]
    assert probes[0]["added"] == probes[1]["added"] == probes[2]["added"]


def test_narrow_parts_are_summed_up_wide(probes: list[dict[str, Any]]) -> None:
    parts = [numbers(rank, 4).bfloat16().float() for rank in range(3)]
    assert probes[0]["narrow_dtype"] == "torch.float32"
    total = parts[0] + parts[1] + parts[2]
    assert torch.equal(torch.tensor(probes[0]["narrow"]), total)
    assert torch.equal(torch.tensor(probes[0]["added"]), numbers(3, 4) + total)


def test_only_the_first_rank_gets_the_logits_of_an_uneven_vocabulary(
    probes: list[dict[str, Any]],
) -> None:
    assert probes[0]["logits"] == [[float(n + row) for n in range(VOCAB)] for row in (0, 100)]
    assert probes[1]["logits"] == probes[2]["logits"] == []


def test_plans_of_any_length_arrive(probes: list[dict[str, Any]]) -> None:
    assert probes[1]["received"] == probes[2]["received"] == [True] * len(LENGTHS)


def test_the_lowest_number_wins_and_the_end_is_no_words(probes: list[dict[str, Any]]) -> None:
    assert [probe["lowest"] for probe in probes] == [98, 98, 98]
    assert [probe["lowest_loaded"] for probe in probes] == [48, 48, 48]
    assert [probe.get("end") for probe in probes] == [None, [], []]
