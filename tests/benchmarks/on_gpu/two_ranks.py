"""Tensor parallelism with one GPU: two processes that exchange CUDA tensors by gloo, and NCCL alone
inside a graph."""

import multiprocessing
import socket
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from tests.benchmarks.on_gpu.bench import Bench, Rows, Wrong
from tests.benchmarks.on_gpu.families import Oracle, configs
from tests.benchmarks.on_gpu.greedy import Greedy
from tests.checkpoints import random_prompt
from worker.parallel.group import join_group, leave_group

CHECKPOINTS = ("llama", "bloom, 8 heads", "bigcode")
NUM_TOKENS = 8
ANSWER_TIMEOUT_S = 60.0


def two_ranks(bench: Bench) -> Rows:
    """Do two shards of a checkpoint answer as one does, in float32?"""
    prompts = [random_prompt(length, seed=length) for length in (5, 23, 12)]
    found: Rows = []
    for name in CHECKPOINTS[: bench.size(len(CHECKPOINTS), 1)]:
        with tempfile.TemporaryDirectory(prefix="tokenfleet-gpu-") as folder:
            Oracle(Path(folder), configs()[name], bench.device)
            alone = Greedy(Path(folder), bench.device, torch.float32).answer(prompts, NUM_TOKENS)
            together = _answers_of_two(Path(folder), str(bench.device), prompts)
        is_equal = [answer.tokens for answer in alone] == together
        found.append({"checkpoint": name, "same tokens": is_equal})
    if not all(row["same tokens"] for row in found):
        raise Wrong("two shards answer otherwise than one", found)
    return found


def nccl_capture(bench: Bench) -> Rows:
    """Can a graph hold an all-reduce of NCCL, and what does it cost?"""
    bench.need_cuda("NCCL")
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=bench.device)
    found: Rows = []
    for num_values in (4096, 64 * 4096):
        x = bench.randn(num_values)
        launched_us = bench.time_us(lambda: dist.all_reduce(x))  # noqa: B023
        captured_us = bench.time_us(bench.captured(lambda: dist.all_reduce(x)))  # noqa: B023
        found.append({"values": num_values, "us": launched_us, "us captured": captured_us})
    dist.destroy_process_group()
    return found


def _answers_of_two(folder: Path, device: str, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours, theirs = context.Pipe()
    ranks = [
        context.Process(
            target=_rank, args=(rank, port, folder, device, prompts, theirs), daemon=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    theirs.close()
    try:
        if not ours.poll(ANSWER_TIMEOUT_S):
            raise Wrong(f"two shards gave no answer in {ANSWER_TIMEOUT_S:.0f} s")
        return ours.recv()
    except EOFError as error:
        raise Wrong("a shard ended without an answer") from error
    finally:
        for rank in ranks:
            rank.join(10)
            rank.kill()


def _rank(
    rank: int,
    port: int,
    folder: Path,
    device: str,
    prompts: list[tuple[int, ...]],
    answers: Connection,
) -> None:
    torch.set_num_threads(1)
    # Gloo for both: NCCL refuses two ranks on one GPU.
    shard = join_group(rank, 2, ("127.0.0.1", port), has_cuda=False)
    found = Greedy(folder, torch.device(device), torch.float32, shard=shard).answer(
        prompts, NUM_TOKENS
    )
    if rank == 0:
        answers.send([answer.tokens for answer in found])
    leave_group()
