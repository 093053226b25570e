"""Two processes under the meter."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from gradient_blueprints.run_models import Tally
from gradient_blueprints.training.metered_run import MeteredRun
from gradient_blueprints.training.resources import JOULES_PER_KWH, ResourceMeter
from gradient_blueprints.training.stopping import MarginalReturn


def two_ranks(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.set_num_threads(1)
    with ResourceMeter(memory_watts=10, powercap=Path(folder) / "empty") as meter:
        distributed.barrier()
        time.sleep(0.3)
        meter.count(tokens=100 * (rank + 1))
    Path(folder, f"{rank}.json").write_text(meter.tally_of_ranks().model_dump_json())
    Path(folder, f"{rank}-own.json").write_text(meter.tally().model_dump_json())
    run = MeteredRun(meter, MarginalReturn(eta=0, window=1), "tokens")
    run.check(1, 3.0)
    Path(folder, f"{rank}-run.json").write_text(json.dumps(run.state_dict()))
    distributed.destroy_process_group()


def test_two_ranks_add_up_and_share_the_machine(tmp_path: Path) -> None:
    spawn(two_ranks, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    both, other, first, second = (
        Tally.model_validate_json((tmp_path / f"{name}.json").read_text()) for name in ("0", "1", "0-own", "1-own")
    )
    assert both == other
    assert both.tokens == 300
    wall = [tally.seconds or 0 for tally in (first, second)]
    rounding = 1 + 1e-12  # one time may lie within the other: their union is then a sum of its own parts
    assert max(wall) <= (both.seconds or 0) * rounding < sum(wall)
    resumed = MeteredRun(ResourceMeter(), MarginalReturn(eta=0, window=1), "tokens")
    resumed.load_state_dict(json.loads((tmp_path / "0-run.json").read_text()))
    resumed.meter.start().count(tokens=1)  # on fewer ranks than before, of which one has saved the state
    assert resumed.check(2, 2.0).ratio == 1
    resumed.meter.stop()
    assert (both.energy_kwh or 0) * JOULES_PER_KWH == pytest.approx(10 * (both.seconds or 0), rel=0.01)
