"""Runs a function on several processes joined by gloo, as ranks of a training run are."""

import gc
import multiprocessing
import os
import socket
import tempfile

import pytest
import torch
import torch.distributed as dist

# A server that has imported what takes seconds forks the ranks of every test: new processes, no wait.
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['pytest', 'mmseg.apis', 'mmseg_imbalance'])


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def _worker(rank, world_size, store, environment, function, args, queue):
    os.environ.clear()  # the server's, as it was when the first test asked for ranks
    os.environ.update(environment)
    from conftest import let_runs_start_at_once

    let_runs_start_at_once(pytest.MonkeyPatch())
    gc.freeze()
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{store}', rank=rank, world_size=world_size)
    try:
        queue.put((rank, function(*args)))
    except Exception as error:  # handed to the test, which looks at it
        queue.put((rank, error))
    dist.barrier()
    dist.destroy_process_group()


def runner_on_rank(text):
    """The runner of this rank before the training of a config."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    from mmseg_imbalance.compat import adapt_to_cpu

    cfg = Config.fromstring(text, '.py')
    cfg.launcher = 'pytorch'
    rank = str(dist.get_rank())
    os.environ.update(LOCAL_RANK=rank, RANK=rank, WORLD_SIZE=str(dist.get_world_size()))
    adapt_to_cpu(cfg)
    return Runner.from_cfg(cfg)


def trained_on_rank(text):
    runner = runner_on_rank(text)
    runner.train()
    return runner


def share_of_rank(function, *args):
    """What a function of a slice of the images makes of this rank's two of four."""
    return function(*args, slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))


def in_process(work):
    """A process that runs `work` and ends with 0 if it did not raise."""
    process = multiprocessing.get_context('fork').Process(target=work)
    process.start()
    return process


def on_ranks(world_size, function, *args, timeout=120):
    """What ``function(*args)`` returned, or the exception it raised, on each rank."""
    queue = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, 'store')  # a file: a port may be taken by another test's ranks
        workers = [
            CONTEXT.Process(
                target=_worker, args=(rank, world_size, store, dict(os.environ), function, args, queue)
            )
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        try:
            results = dict(queue.get(timeout=timeout) for _ in workers)
        finally:
            for worker in workers:
                worker.join(10)
                worker.kill()
    return [results[rank] for rank in range(world_size)]
