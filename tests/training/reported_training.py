"""A small training that reports to a registry; killed half-way and resumed.

python -m tests.training.reported_training FOLDER URL KEY
"""

from __future__ import annotations

import json
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from gradient_blueprints import Client
from gradient_blueprints.run_journal import find_journal
from gradient_blueprints.run_models import Resource
from gradient_blueprints.training.trainer_callback import CapabilityCallback
from tests.training.metered_training import Hang, make_trainer

REPORT = {"task": "rows/loss", "model_id": "tiny", "settings": {"rate": 5e-5}}


def run(folder: Path, url: str, key: str, *, resumed: bool) -> None:
    torch.set_num_threads(1)
    client = Client(url, api_key=key, cache=False)
    callback = CapabilityCallback(gamma="tokens", client=client, report=REPORT)
    trainer = make_trainer(folder, callback, 12, eval_steps=2, save_steps=4, seed=5)
    if not resumed:
        trainer.add_callback(Hang())
    trainer.train(resume_from_checkpoint=resumed)


def main(folder: Path, url: str, key: str) -> None:
    processes = get_context("fork")  # of a process that has imported everything and used nothing
    training = processes.Process(target=run, args=(folder, url, key), kwargs={"resumed": False})
    training.start()
    journal, saved = folder / "run.jsonl", folder / "checkpoint-4" / "rng_state.pth"
    kept = None
    while training.is_alive() and not (kept is not None and len(kept.points) >= 3 and saved.is_file()):
        time.sleep(0.02)
        kept = find_journal(journal)
    training.kill()
    training.join()
    kept = find_journal(journal)
    assert kept is not None
    with journal.open("ab") as file:
        file.write(b'{"point": {"ste')  # as if the kill had come in the middle of a line
    killed = {"exit": training.exitcode, "id": str(kept.run.id), "tokens": kept.points[-1].gamma[Resource.TOKENS]}
    (folder / "killed.json").write_text(json.dumps(killed | {"points": len(kept.points)}))
    again = processes.Process(target=run, args=(folder, url, key), kwargs={"resumed": True})
    again.start()
    again.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
