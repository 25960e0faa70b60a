"""Sharded parameters (FSDP2) on two CPU processes; Accelerate itself shards on accelerators only."""

import multiprocessing
import os

import pytest
import torch
from torch import nn

from hf_rsheat.training.averaging import WeightAverage
from hf_rsheat.training.checkpoint import _save_optimizer, gather_optimizer, load_optimizer
from hf_rsheat.training.sharding import placed_like, whole

from .processes import free_port, rank_environment


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))


def steps(model, optimizer, average, first, last):
    for step in range(first, last):
        inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()  # the same on every process: averaging changes nothing
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)


def sharded(rank, port, folder):
    os.environ.update(rank_environment(rank, 2, port))
    torch.distributed.init_process_group("gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(network(), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = WeightAverage(model, 0.9)
    steps(model, optimizer, average, 0, 3)
    state, means = gather_optimizer(model, optimizer), average.state()
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    if rank == 0:
        _save_optimizer(folder, state)
    torch.distributed.barrier()
    again = fully_shard(network(), mesh=mesh)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(placed_like(parameter, weights[name]))
    other = torch.optim.AdamW(again.parameters(), lr=0.1)
    load_optimizer(folder, again, other)
    second = WeightAverage(again, 0.9)
    second.load_state(means)
    steps(again, other, second, 3, 5)
    result = {name: whole(value) for name, value in again.state_dict().items()} | second.state()
    if rank == 0:
        torch.save(result, folder / "result.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_optimiser_and_average_are_saved_whole_and_continue_as_one_process_would(tmp_path):
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    processes = [context.Process(target=sharded, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    model = network()
    optimizer, average = torch.optim.AdamW(model.parameters(), lr=0.1), WeightAverage(model, 0.9)
    steps(model, optimizer, average, 0, 5)
    expected = model.state_dict() | average.state()
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
