"""Jobs in shards: two workers on the shards of one job against one worker on the whole, and whether they agree.

    python -m benchmarks.shards --batches 320
    python -m benchmarks.shards agreement --splits 50

The first runs the real service (`python -m app up` with a broker) and real workers of one thread each;
the reference is the same job in one shard by one of those workers, and the two are interleaved. Times are
those of the jobs, from the first claim to the end, so they hold the start of the processes, the upload of
the states and the merge: a short job gains little. The second splits the same batches in many ways and
counts the splits whose document is that of one run to the byte; and tells what zstd would save of a state.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pyarrow
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.embedded import valkey
from app.embedded.processes import free_port
from app.registry.keys import generate_secret
from benchmarks.results import Ratio, publish
from gradient_blueprints import Client, Job, Scope
from gradient_blueprints.training.profiling import GradientProfiler, merge
from gradient_blueprints.training.profiling import document as documents
from gradient_blueprints.training.profiling.state import ProfileState
from gradient_blueprints.training.profiling.state_files import save_state

READY_SECONDS = 120.0
VOCABULARY = 4_096


def llama(hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


# --- agreement


def agreement(batches: int, splits: int) -> None:
    model = llama(hidden=128, layers=6)
    parts: list[ProfileState] = []
    for number in range(batches):
        with GradientProfiler(model, general="general", verify=False) as profiler:
            for domain in ("general", "bio"):
                draw = torch.Generator().manual_seed(2 * number + (domain == "bio"))
                ids = torch.randint(0, VOCABULARY, (4, 64), generator=draw)
                profiler.step({"input_ids": ids, "labels": ids}, domain=domain, key=number)
        parts.append(profiler.state())

    def document(shards: list[ProfileState]) -> str:
        gathered = GradientProfiler(model, general="general")
        gathered.absorb(*shards)
        return gathered.blueprint("split", 1.0).to_json()

    chosen = random.Random(0)  # noqa: S311 - a sample, not a secret
    divisions = []
    for _ in range(splits):
        shards = chosen.randint(2, min(8, batches))
        divisions.append([merge(parts[start::shards]) for start in range(shards)])
        chosen.shuffle(divisions[-1])
    for digits in (documents.SUMMED_DIGITS, documents.SIGNIFICANT_DIGITS):  # what is done, and what was given up
        documents.SUMMED_DIGITS = digits
        whole = document([merge(parts)])
        same = sum(document(division) == whole for division in divisions)
        print(f"{digits} digits of sums: {same} of {splits} splits give the document of one run", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        state = save_state(merge(parts), Path(folder) / "state").read_bytes()
    packed = len(pyarrow.Codec("zstd", compression_level=3).compress(state))
    print(f"a state of {len(state) / 1e6:.1f} MB, {packed / len(state):.1%} of it after zstd -3")


# --- speed


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *words])}
    whole_words = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    whole_words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=whole_words, unk_token="<unk>", eos_token="</s>")  # noqa: S106


def make_checkpoint(folder: Path) -> None:
    draw = random.Random(0)  # noqa: S311 - a sample, not a secret
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(3_000)]
    lines = [" ".join(draw.choices(words, k=12)) + ".\n" for _ in range(40_000)]
    (folder / "general.txt").write_text("".join(lines))
    tokenizer(words).save_pretrained(folder / "model")
    llama(hidden=256, layers=8).save_pretrained(folder / "model")


@contextmanager
def service(folder: Path, workers: int) -> Iterator[Client]:
    """The service and so many workers, of one thread each."""
    admin, worker, port = generate_secret(), generate_secret(), free_port()
    broker = valkey.start(folder / "broker", durable=False)
    given = {
        "BLUEPRINTS_BROKER_URL": broker.url,
        "BLUEPRINTS_ADMIN_KEY": admin,
        "BLUEPRINTS_WORKER_KEY": worker,
        "BLUEPRINTS_ALLOWED_ROOTS": str(folder),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
    url = f"http://127.0.0.1:{port}"
    running = []
    log = (folder / "log").open("wb")

    def start(*arguments: str, **more: str) -> None:
        command = [sys.executable, "-m", *arguments]
        running.append(subprocess.Popen(command, env=clean | given | more, stdout=log, stderr=log))

    try:
        start("app", "up", "--no-worker", "--data-dir", str(folder / "data"), "--port", str(port))
        deadline = time.monotonic() + READY_SECONDS
        while not _ready(url):
            if time.monotonic() > deadline:
                raise SystemExit((folder / "log").read_text())
            time.sleep(0.2)
        for _ in range(workers):
            start("worker", BLUEPRINTS_URL=url, BLUEPRINTS_API_KEY=worker)
        with Client(url, api_key=admin, cache=False) as client:
            client.create_lab("bench")
            key = client.create_key("bench", [Scope.PROFILE, Scope.READ]).secret
        with Client(url, api_key=key, cache=False) as client:
            yield client
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            process.wait()
        valkey.stop(broker)
        log.close()


def _ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=2, trust_env=False).is_success
    except httpx2.TransportError:
        return False


def speed(batches: int, rounds: int, workers: int) -> None:
    with tempfile.TemporaryDirectory(prefix="blueprints-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        make_checkpoint(folder)
        with service(folder, workers) as client:

            def run(shards: int) -> tuple[float, Job]:
                job = client.submit_checkpoint(
                    "bench",
                    0.8,
                    source=folder / "model",
                    data={"general": folder / "general.txt"},
                    batches=batches,
                    batch_size=4,
                    sequence_length=128,
                    shards=shards,
                )
                ended = client.wait_for_job(job.id)
                if ended.started_at is None or ended.finished_at is None or ended.digest is None:
                    raise SystemExit(f"{ended.state}: {ended.reason}")
                return (ended.finished_at - ended.started_at).total_seconds(), ended

            run(workers)  # every worker has started, and the files are in memory
            ratios = []
            for _ in range(rounds):
                (alone, whole), (together, split) = run(1), run(workers)
                ratios.append(alone / together)
                same = "the same" if whole.digest == split.digest else "another"
                print(f"1 worker {alone:.1f} s, {workers} workers {together:.1f} s: {ratios[-1]:.2f}x, {same} document")
            print(f"load of this machine {os.getloadavg()[0]:.1f}")
            work = f"a job in {workers} shards, times faster with {workers} workers of one thread"
            publish([Ratio(work, "one such worker, one shard", tuple(ratios), 1.7, at_least=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["speed", "agreement"], default="speed")
    parser.add_argument("--batches", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--splits", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.what == "agreement":
        agreement(arguments.batches or 16, arguments.splits)
    else:
        speed(arguments.batches or 320, arguments.rounds, arguments.workers)


if __name__ == "__main__":
    main()
