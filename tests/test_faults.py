"""What happens when something goes wrong: processes are killed, disks are full, files are bad, ranks die.

docs/faults.md has a row for each.
"""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Payload
from long_run import train
from mmengine.utils import digit_version
from ranks import free_port

from mmseg_imbalance import WeightedCrossEntropyLoss
from mmseg_imbalance.commands import main
from mmseg_imbalance.scores import load_image_scores

pytestmark = pytest.mark.slow

LIMIT = 30  # seconds in which all ranks have to end
CONFIGS = REPOSITORY / 'configs' / 'segformer'
DATA = '1xb8-2k_longtail-cityscapes-256x128'
# Imported by the processes that are to fail. FAULT says where; a file in MARKS tells that it is there.
FAULTY = """
import os, signal, time
from pathlib import Path
import numpy as np
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import HOOKS, TRANSFORMS

FAULT = os.environ.get('FAULT')

def mark():
    Path(os.environ['MARKS'], str(os.getpid())).touch()

def stop_before(function, fault):
    def stopping(*args, **kwargs):
        if FAULT == fault:
            if hasattr(args[0], 'write'):
                args[0].write(b'half')
                args[0].flush()
            mark()
            time.sleep(600)
        return function(*args, **kwargs)
    return stopping

np.savez = stop_before(np.savez, 'opened')
os.replace = stop_before(os.replace, 'written')

@TRANSFORMS.register_module()
class SlowAnnotations(LoadAnnotations):
    def transform(self, results):
        if FAULT == 'counting':
            mark()
            time.sleep(2)
        return super().transform(results)

@HOOKS.register_module()
class FaultHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if get_rank() != 1 or runner.iter != 2:
            return
        mark()
        if FAULT == 'nan':
            data_batch['inputs'] = [image * float('nan') for image in data_batch['inputs']]
        if FAULT == 'raise':
            raise ValueError('a fault of rank 1')
        if FAULT == 'die':
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def write_config(scenes, tmp_path):
    """Factory of a config file of a small run on the scenes, or on others, beside the module above."""
    (tmp_path / 'faulty.py').write_text(FAULTY)
    (tmp_path / 'marks').mkdir()

    def write(loss='combined', root=scenes, loader='LoadAnnotations', iterations=6, more='', faulty=True):
        imports = ['mmseg_imbalance', 'faulty'][: 1 + faulty]
        # nothing random: MMEngine does not save the state of random generators
        drop = 'backbone=dict(drop_path_rate=0.0), decode_head=dict(dropout_ratio=0.0)'
        pipeline = f"[dict(type='LoadImageFromFile'), dict(type={loader!r}), dict(type='PackSegInputs')]"
        loading = f'num_workers=0, persistent_workers=False, dataset=dict(data_root={str(root)!r}'
        path = tmp_path / 'config.py'
        path.write_text(f"""
_base_ = {str(CONFIGS / f'segformer_mit-b0-small-{loss}_{DATA}.py')!r}
custom_imports = dict(imports={imports!r}, allow_failed_imports=False)
train_dataloader = dict(batch_size=2, {loading}, pipeline={pipeline}))
val_dataloader = dict({loading}))
test_dataloader = val_dataloader
model = dict(data_preprocessor=dict(size=(64, 128)), {drop})
train_cfg = dict(max_iters={iterations}, val_interval={iterations})
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
randomness = dict(seed=0)
{more}""")
        return path

    return write


def start(*command, fault='', folder, **env):
    """The process of a command in the repository's folder, with the module above where it is imported."""
    known = dict(
        FAULT=fault,
        MARKS=str(folder / 'marks'),
        PYTHONPATH=os.pathsep.join([str(folder), str(REPOSITORY)]),
        PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
    )
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env=os.environ | known | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeed(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


def wait_for_marks(process, marks):
    for _ in range(3000):
        if any(marks.iterdir()):
            return
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.1)
    raise TimeoutError


def gone(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except FileNotFoundError:
        return True


def weights(*options):
    return [sys.executable, '-m', 'mmseg_imbalance', 'class-weights', *options]


def count(config, cache, capsys, *options):
    """What the command prints, without the progress and the log, and the log's warnings."""
    capsys.readouterr()
    assert main(['class-weights', str(config), '--cache-dir', str(cache), '--workers', '0', *options]) == 0
    return table(capsys.readouterr().out)


def table(output):
    return [line for line in output.splitlines() if line.startswith('│')]


# Counting and its cache


@pytest.mark.parametrize('moment', ['counting', 'opened', 'written'])
def test_killed_while_counting_the_next_run_counts_the_same(write_config, tmp_path, capsys, moment):
    config = write_config(loader='SlowAnnotations')
    command = weights(config, '--cache-dir', tmp_path / 'cache', '--out', tmp_path / 'weights.json')
    process = start(*command, fault=moment, folder=tmp_path)
    wait_for_marks(process, tmp_path / 'marks')
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob('cache/*.npz'))
    assert not (tmp_path / 'weights.json').exists()
    pids = [int(path.name) for path in (tmp_path / 'marks').iterdir()]
    for _ in range(300):  # no worker outlives it
        if all(map(gone, pids)):
            break
        time.sleep(0.1)
    assert all(map(gone, pids))
    again = table(succeed(start(*command, folder=tmp_path)))
    assert 'damaged' not in '\n'.join(again)
    assert len(list(tmp_path.glob('cache/*.npz'))) == 1
    undisturbed = start(*weights(config, '--cache-dir', tmp_path / 'other'), folder=tmp_path)
    assert again == table(succeed(undisturbed))
    assert len(again) == 19


@pytest.mark.parametrize('fault', ['full', 'no folder', 'missing'])
def test_a_cache_that_cannot_be_written_costs_a_warning(write_config, tmp_path, capsys, warned, fault):
    config = write_config(faulty=False)
    want = count(config, tmp_path / 'other', capsys)
    assert not warned
    cache = tmp_path / 'cache'
    if fault == 'no folder':
        cache.write_text('a file')
    if fault == 'missing':
        cache = cache / 'of' / 'nobody'
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == 'full':
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # no file gets longer
    try:
        assert count(config, cache, capsys) == want
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if fault == 'missing':
        assert not warned
        assert len(list(cache.iterdir())) == 1
    else:
        (message,) = warned
        assert re.search('not cached, .* cannot be written', message)
        assert not cache.is_dir() or not list(cache.iterdir())


def test_results_that_cannot_be_written_end_the_command_with_the_reason(write_config, tmp_path, capsys):
    config = str(write_config(faulty=False))
    for option, name in (('--out', '/dev/full'), ('--plot', f'{config}/chart.png')):
        with pytest.raises(SystemExit, match='1'):
            main(['class-weights', config, '--workers', '0', option, str(name)])
        assert 'Errno' in capsys.readouterr().err.splitlines()[-1]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def older(path):
    with np.load(path) as archive:
        values = {name: archive[name] for name in archive.files[1:]}
    with open(path, 'wb') as file:
        np.savez(file, **values)


def pickled(path):
    path.write_bytes(pickle.dumps(Payload(path.parent / 'run')))


def objects(path):
    with np.load(path) as archive:
        values = {name: archive[name] for name in archive.files}
    values |= {name: np.array([Payload(path.parent / 'run')]) for name in values}
    with open(path, 'wb') as file:
        np.savez(file, **values)


def folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize('damage', [cut, older, pickled, objects, folder, lambda path: path.write_bytes(b'')])
def test_a_damaged_cache_is_counted_again(write_config, tmp_path, capsys, warned, damage):
    config, cache = write_config(faulty=False), tmp_path / 'cache'
    want = count(config, cache, capsys)
    (path,) = cache.iterdir()
    damage(path)
    assert count(config, cache, capsys) == want
    assert re.search('damaged .*counting again', warned[0])
    assert not (cache / 'run').exists()
    warned.clear()
    assert count(config, cache, capsys) == want
    assert bool(warned) == (damage is folder)  # which nothing takes the place of


def test_several_jobs_share_one_cache_at_once(write_config, tmp_path):
    command = weights(write_config(), '--cache-dir', tmp_path / 'cache')
    jobs = [start(*command, folder=tmp_path) for _ in range(3)]
    outputs = [succeed(job) for job in jobs]
    assert len({tuple(table(output)) for output in outputs}) == 1
    assert len(table(outputs[0])) == 19
    assert not any('WARNING' in output and 'cache' in output for output in outputs)
    assert [path.suffix for path in (tmp_path / 'cache').iterdir()] == ['.npz']


def test_no_name_of_a_data_set_leaves_the_cache_folder(tmp_path, scenes, capsys):
    names = ['../../outside', str(tmp_path / 'absolute'), '..', 'a/b', 'con', 'x' * 300, '\n', '']
    names += [str(number) for number in range(19 - len(names))]
    config = tmp_path / 'config.py'
    config.write_text(f"""
default_scope = 'mmseg'
train_dataloader = dict(dataset=dict(type='BaseSegDataset', data_root={str(scenes)!r},
    data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
    img_suffix='_leftImg8bit.png', seg_map_suffix='_gtFine_labelTrainIds.png',
    metainfo=dict(classes={names!r}, dataset_type='../../outside'),
    pipeline=[dict(type='LoadAnnotations')]))
""")
    before = set(tmp_path.parent.rglob('*'))
    count(config, tmp_path / 'deep' / 'cache', capsys)
    new = set(tmp_path.parent.rglob('*')) - before - {tmp_path / 'deep', tmp_path / 'deep' / 'cache'}
    assert [path.parent for path in new] == [tmp_path / 'deep' / 'cache']


# Files that somebody else may have made


def test_no_file_that_is_read_is_unpickled(tmp_path, capsys):
    mark = tmp_path / 'run'
    for write in (pickled, lambda path: np.savez(path, images=np.array([Payload(mark)]))):
        path = tmp_path / 'image_scores.npz'
        write(path)
        with pytest.raises(ValueError, match='cannot be read as image scores'):
            load_image_scores(path)
    path = tmp_path / 'class_weights.json'
    pickled(path)
    with pytest.raises(ValueError, match='is not a file of mmseg-imbalance'):
        WeightedCrossEntropyLoss(class_weight=str(path))
    assert not mark.exists()


@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.6'), reason='before torch 2.6 all of it is unpickled'
)
@pytest.mark.parametrize('command', ['test', 'subclasses', 'train'])
def test_the_code_in_a_checkpoint_is_not_run(write_config, tmp_path, command):
    config, mark, checkpoint = write_config('subclass3'), tmp_path / 'run', tmp_path / 'work' / 'iter_1.pth'
    checkpoint.parent.mkdir()
    torch.save(dict(state_dict={}, meta=Payload(mark)), checkpoint)
    (tmp_path / 'work' / 'last_checkpoint').write_text(str(checkpoint))
    arguments = dict(
        test=[config, checkpoint, '--work-dir', tmp_path / 'test'],
        subclasses=[config, checkpoint, '--out', tmp_path / 'page.html'],
        train=[config, '--resume', '--work-dir', tmp_path / 'work'],
    )[command]
    process = start(sys.executable, '-m', 'mmseg_imbalance', command, *arguments, folder=tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert 'it holds more than weights and loading it could run code' in output
    assert not mark.exists()


# Training


def losses(work_dir):
    """Of each iteration, from the files of all sessions; a later one takes the place of a former."""
    files = sorted(work_dir.glob('2*/vis_data/scalars.json'))
    records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return {record['step']: record['loss'] for record in records if 'loss' in record}


SAMPLERS = {
    'InfiniteSampler': "dict(type='InfiniteSampler', shuffle=True)",
    'RareClassSampler': "dict(type='RareClassSampler', min_pixels=10)",
}


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_killed_while_training_it_goes_on_as_if_nothing_had_been(write_config, tmp_path, sampler):
    config = write_config(more=f"train_dataloader['sampler'] = dict(_delete_=True, **{SAMPLERS[sampler]})")
    command = [sys.executable, 'tools/train.py', config, '--work-dir']
    succeed(start(*command, tmp_path / 'undisturbed', folder=tmp_path))
    process = start(*command, tmp_path / 'killed', folder=tmp_path)
    for line in process.stdout:
        if 'Iter(train) [4/6]' in line:  # its checkpoint may be there or half there or not at all
            process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = succeed(start(*command, tmp_path / 'killed', '--resume', folder=tmp_path))
    assert re.search(r'resumed epoch: 0, iter: [34]', resumed)
    want, found = losses(tmp_path / 'undisturbed'), losses(tmp_path / 'killed')
    assert len(want) == 6
    assert found == want  # to the last bit
    files = [
        json.loads((tmp_path / run / 'class_weights.json').read_text()) for run in ('undisturbed', 'killed')
    ]
    assert files[0] == files[1]


# Several ranks


def end_of(process, marks):
    """Seconds from the fault to the end of all ranks, and what they printed."""
    wait_for_marks(process, marks)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=120)
    return time.monotonic() - begun, output


FAULTS = {
    'die': (r'exitcode\s*: -9|Signal 9 \(SIGKILL\)', 'combined'),
    'raise': ('ValueError: a fault of rank 1', 'combined'),
    'nan': ('not been finite in 10 iterations in a row, up to iteration 12', 'combined'),
    'nan in subclasses': ('the losses, are not finite on at least one rank', 'subclass3'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_of_one_rank_ends_all_with_its_error(write_config, tmp_path, fault):
    message, loss = FAULTS[fault]
    hooks = "custom_hooks = [dict(type='ClassWeightHook', num_workers=0), dict(type='FaultHook')]"
    config = write_config(loss, iterations=40, more=f'{hooks}\ndefault_hooks["checkpoint"]["interval"] = 100')
    command = ['bash', 'tools/dist_train.sh', config, 2, '--work-dir', tmp_path / 'work']
    process = start(*command, fault=fault.split()[0], folder=tmp_path, PORT=free_port())
    seconds, output = end_of(process, tmp_path / 'marks')
    assert process.returncode == 1
    assert re.search(message, output), output[-4000:]
    assert seconds < LIMIT


def test_ranks_that_no_launcher_watches_end_too(write_config, tmp_path):
    more = "custom_hooks = [dict(type='ClassWeightHook', num_workers=0), dict(type='FaultHook')]"
    config = write_config(iterations=40, more=more)
    known = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    ranks = [
        start(
            sys.executable,
            'tools/train.py',
            config,
            '--launcher=pytorch',
            '--work-dir',
            tmp_path / 'work',
            fault='die',
            folder=tmp_path,
            **known,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    seconds, output = end_of(ranks[0], tmp_path / 'marks')
    ranks[1].communicate(timeout=60)
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGKILL]
    assert re.search('Connection (closed|reset) by peer', output), output[-4000:]
    assert seconds < LIMIT


def test_a_bad_file_that_one_rank_finds_ends_all_with_its_name(write_config, scenes, tmp_path):
    root = tmp_path / 'spoilt'
    shutil.copytree(scenes, root)
    labels = sorted((root / 'gtFine' / 'train').rglob('*.png'))
    labels[1].write_bytes(labels[1].read_bytes()[:100])  # ranks count alternate files
    (tmp_path / 'marks' / '0').touch()  # it may be found at any time
    config = write_config(root=root)
    command = ['bash', 'tools/dist_train.sh', config, 2, '--work-dir', tmp_path / 'work']
    process = start(*command, folder=tmp_path, PORT=free_port())
    _, output = end_of(process, tmp_path / 'marks')
    assert process.returncode == 1
    for rank in range(2):
        assert re.search(rf'rank{rank}\]: ValueError: .*{labels[1].name}: cannot be read', output), output[
            -4000:
        ]


# For long


def test_memory_stays_where_it_is_with_every_hook_on(tmp_path):
    memory, _ = train(tmp_path, 300)
    assert memory[2] < 1.02 * memory[1]
