"""Runs a function on several processes joined by gloo, as ranks of a training run are."""

import multiprocessing
import socket

import torch.distributed as dist


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def _worker(rank, world_size, port, function, args, queue):
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=world_size)
    try:
        queue.put((rank, function(*args)))
    except Exception as error:  # handed to the test, which looks at it
        queue.put((rank, error))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world_size, function, *args, timeout=120):
    """What ``function(*args)`` returned, or the exception it raised, on each rank."""
    port = free_port()
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    workers = [
        context.Process(target=_worker, args=(rank, world_size, port, function, args, queue))
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
