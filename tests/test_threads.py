import threading

import pytest
import torch

from mmseg_imbalance.ops import soft_stats, strips, threads


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setattr(strips, 'STRIP_NUMBERS', 500)
    before = torch.get_num_threads()
    threads._pool.cache_clear()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
    threads._pool.cache_clear()


@pytest.mark.parametrize('started', [0, 1, 2])
def test_where_a_thread_cannot_start_one_does_it_all(make_batch, monkeypatch, three_threads, started):
    logits, target = make_batch()
    expected = soft_stats(logits, target, backend='eager')
    before = set(threading.enumerate())
    left, start = [started], threading.Thread.start

    def start_few(thread):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, 'start', start_few)
    with pytest.warns(UserWarning, match=r"cannot start 3 threads \(can't start new thread\).*ulimit"):
        found = soft_stats(logits, target, backend='strips')
    torch.testing.assert_close(found.nll, expected.nll)
    assert torch.get_num_threads() == 3
    assert set(threading.enumerate()) <= before  # none waits for others, which would keep Python from ending
    leaf = logits.requires_grad_()
    soft_stats(leaf, target, backend='strips').nll.sum().backward()  # a second warning would be an error
    assert leaf.grad.isfinite().all()


def test_the_number_of_threads_may_change_between_the_passes(make_batch, three_threads):
    logits, target = make_batch()
    spoilt = logits.masked_fill((target == 255)[:, None], float('nan'))
    leaf, plain = spoilt.requires_grad_(), logits.clone().requires_grad_()
    stats = soft_stats(leaf, target, backend='strips')
    torch.set_num_threads(1)
    stats.nll.sum().backward()
    soft_stats(plain, target, backend='eager').nll.sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


def test_threads_share_the_parts_and_this_one_keeps_its_number(make_batch, three_threads):
    seen = set()

    def name_of(part):
        seen.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        return part

    assert list(threads.each(name_of, range(20), on_cpu=True)) == list(range(20))
    assert all(name.startswith('soft_stats') for name in seen)
    assert torch.get_num_threads() == 3
    assert list(threads.each(lambda part: part, range(2), on_cpu=False)) == [0, 1]
