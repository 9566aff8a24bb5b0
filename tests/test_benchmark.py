"""The benchmark's table, on inputs too small to say anything about speed."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from mmseg_imbalance.benchmark import case, counting, losses, steps, subclasses, tables
from mmseg_imbalance.commands.benchmark import STEPS, main, parse
from mmseg_imbalance.ops import eager, strips
from mmseg_imbalance.ops.soft_stats import BACKENDS

LIBRARIES = ('monai', 'segmentation_models_pytorch', 'kornia')
TINY = ['--device', 'cpu', '--size', '24x40', '--classes', 5, '--rounds', 2, '--backend', 'eager', 'strips']


@pytest.fixture
def run(tmp_path):
    """The benchmark: its exit status and records, in order."""

    def start(*options):
        path = tmp_path / 'rows.json'
        status = main([*map(str, options), '--json', str(path)])
        return status, json.loads(path.read_text())['rows']

    return start


@pytest.fixture
def nothing_installed(monkeypatch):
    """No other library and no compiler."""

    def no_compiler(*args, **kwargs):
        raise RuntimeError('backend raised:\nno compiler found\nmore')

    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch, 'compile', no_compiler)


def by_name(records):
    return {record['loss'].removeprefix('resize + '): record for record in records}


def test_one_table_has_every_row_and_says_why_one_is_missing(run, nothing_installed, capsys):
    status, records = run(*TINY, '--batch', 1, 2, '--scale', 4, 1)
    assert status == 0
    names = [name for name, *_ in losses.COMPETITORS]
    assert [record['loss'].removeprefix('resize + ') for record in records] == 4 * [
        'F.cross_entropy',
        'CE + Dice in torch',
        'ours, eager',
        'ours, strips',
        *names,
    ]
    assert [record['logits'] for record in records[:: len(records) // 4]] == 2 * ['6x10', '24x40']
    assert {record['batch'] for record in records} == {'1x5x24x40', '2x5x24x40'}
    table = capsys.readouterr().out
    for record in records:
        assert record['loss'] in table
        assert (record['ms'] is None) == (record['skipped'] is not None)
        if record['ms']:
            assert record['time_ratio'] > 0
            assert record['off_by'] < 1e-4
    rows = by_name(records)
    assert rows['F.cross_entropy']['time_ratio'] == 1
    for name in ('ours, eager', 'ours, strips', 'framework CE + DiceLoss'):
        assert rows[name]['ms'] > 0
    for name, library in zip(('MONAI', 'SMP', 'kornia'), LIBRARIES, strict=True):
        assert library in rows[f'{name} DiceLoss + CE']['skipped']
    assert (
        rows['torch.compile of ours, eager']['skipped'] == 'RuntimeError: backend raised: no compiler found'
    )
    assert 'no compiler found' in table


def test_the_subclassified_loss_beside_cross_entropy_and_the_matrix_product(run):
    status, records = run(*TINY, '--scale', 4, 1, '--no-competitors', '--subclass')
    assert status == 0
    rows = {(record['logits'], record['loss']): record for record in records}
    clusters = [rows['6x10 subclass', f'clusters, {rule}'] for rule in ('ema', 'kmeans')]
    for row in (*clusters, rows['6x10 subclass', 'similarity']):
        assert row['off_by'] < 1e-4
        assert row['time_ratio'] > 0
    assert '3 subclasses, features 2x512x6x10' in clusters[0]['note']
    assert rows['6x10 subclass', 'WeightedCrossEntropyLoss']['time_ratio'] == 1
    assert ('24x40 subclass', 'similarity') not in rows
    for logits in ('6x10', '24x40'):
        assert rows[f'{logits} similarity', 'matrix product alone']['time_ratio'] == 1
        assert rows[f'{logits} similarity', 'similarity weights']['off_by'] < 1e-4


def test_the_losses_that_look_at_recall(run):
    status, records = run(*TINY, '--scale', 4, 1, '--no-losses', '--recall')
    assert status == 0
    losses = ['WeightedCrossEntropyLoss', 'RecallWeightedLoss', 'SkeletonRecallLoss']
    assert [record['loss'] for record in records] == 2 * losses
    for record in records:
        assert record['off_by'] < 1e-4
        assert record['ms'] > 0


@pytest.mark.parametrize(
    ('name', 'row'), [('cluster_weight', 'clusters, ema'), ('similarity_by_definition', 'similarity')]
)
def test_subclass_weights_that_are_off_get_no_speed(run, monkeypatch, name, row):
    formula = getattr(subclasses, name)

    def off(*args):
        weight = formula(*args)
        return weight + torch.linspace(0, 1, weight.numel()).view_as(weight)

    monkeypatch.setattr(subclasses, name, off)
    status, records = run(*TINY, '--scale', 4, '--no-competitors', '--subclass')
    assert status == 1
    assert by_name(records)[row]['ms'] is None


@pytest.mark.parametrize('factor', [1.01, float('nan')])
def test_numbers_that_are_off_get_no_speed(run, monkeypatch, capsys, factor):
    right = strips.soft_stats

    def off(*args):
        stats = right(*args)
        return replace(stats, intersection=stats.intersection * factor)

    monkeypatch.setattr(strips, 'soft_stats', off)
    status, records = run(*TINY, '--scale', 1, '--no-competitors')
    assert status == 1
    rows = by_name(records)
    assert rows['ours, strips']['ms'] is rows['ours, strips']['time_ratio'] is None
    assert rows['ours, strips']['off_by'] > 1e-3
    assert rows['ours, eager']['ms'] > 0
    assert 'off, so no speed' in capsys.readouterr().out


def test_a_competitor_that_is_off_gets_no_speed_but_fails_nothing(run, monkeypatch):
    off = ('theirs', lambda weight: lambda logits, target: logits.sum(), losses.ce_and_dice, '')
    monkeypatch.setattr(losses, 'COMPETITORS', [off])
    status, records = run(*TINY, '--scale', 1)
    assert status == 0
    assert by_name(records)['theirs']['ms'] is None


def test_a_backend_that_cannot_run_is_skipped_but_one_that_crashes_is_not(run, monkeypatch):
    def fail(*args):
        raise error('needs what this machine lacks')

    monkeypatch.setattr(eager, 'soft_stats', fail)
    error = RuntimeError
    status, records = run(*TINY, '--scale', 1, '--no-competitors')
    assert status == 0
    assert 'needs what this machine lacks' in by_name(records)['ours, eager']['skipped']
    error = AttributeError
    with pytest.raises(AttributeError):
        run(*TINY, '--scale', 1, '--no-competitors')


def test_bytes_and_exponentials_per_second(run):
    _, records = run(*TINY, '--batch', 1, '--scale', 4, 1, '--no-competitors', '--bandwidth')
    for record in records:
        seconds = record['ms'] / 1e3
        logits = 4 * 5 * (6 * 10 if record['logits'] == '6x10' else 24 * 40)
        moved = 3 * logits + 2 * 8 * 24 * 40
        assert record['GB/s'] == pytest.approx(moved / seconds / 1e9)
        assert 0 < record['bandwidth'] < 1
        assert record['Gexp/s'] == pytest.approx(2 * 5 * 24 * 40 / seconds / 1e9)


def test_without_mmsegmentation_the_functions_are_measured(run, monkeypatch):
    monkeypatch.setattr(losses, 'CombinedWeightedLoss', None)
    status, records = run(*TINY, '--scale', 4, 1, '--no-competitors')
    assert status == 0
    for record in records:
        assert record['off_by'] < 1e-4
        assert ('functions alone' in record['note']) == record['ours']


def test_markdown_and_plot_show_what_the_table_shows(run, nothing_installed, tmp_path):
    files = {name: tmp_path / f'table.{name}' for name in ('md', 'png')}
    _, records = run(*TINY, '--markdown', files['md'], '--plot', files['png'])
    title, _, names, rule, *lines = files['md'].read_text().splitlines()
    assert torch.__version__ in title
    assert names == '| batch | logits | loss | ms | time ratio | MB | memory ratio | off by | note |'
    assert len({line.count('|') for line in (names, rule, *lines)}) == 1
    for record, line in zip(records, lines, strict=True):
        batch, logits, loss, ms, *_ = (cell.strip() for cell in line.strip('|').split('|'))
        assert (batch, logits, loss) == (record['batch'], record['logits'], record['loss'])
        assert ms == ('-' if record['ms'] is None else f'{record["ms"]:.3g}')
    assert files['png'].stat().st_size > 10000


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_low_precision_logits(run, dtype):
    status, records = run(*TINY, '--dtype', dtype, '--no-competitors')
    assert status == 0
    assert [record['skipped'] for record in records] == [None] * len(records)
    assert all(record['ms'] for record in records)


@pytest.fixture
def small_steps(monkeypatch, tmp_path):
    """Training steps of the small configs, with two images and a backbone that nobody could load."""

    def shrink(name):
        path = tmp_path / Path(name).name
        path.write_text(f"""
_base_ = {str(REPOSITORY / 'configs' / name)!r}
model = dict(pretrained='open-mmlab://resnet50_v1c')
train_dataloader = dict(batch_size=2)
""")
        return path

    models = dict(segformer='segformer_mit-b0-small', deeplabv3='deeplabv3_r18-d8-small')
    small = {
        name: [shrink(f'{name}/{model}{kind}_1xb8-2k_camvid-240x180.py') for kind in ('', '-combined')]
        for name, model in models.items()
    }
    monkeypatch.setattr(steps, 'STEPS', small)


@pytest.mark.slow
@pytest.mark.parametrize(('dtype', 'step'), [('float32', 'deeplabv3'), ('bfloat16', 'segformer')])
def test_training_steps_of_the_frameworks_heads_and_of_ours(run, small_steps, dtype, step):
    options = ['--scale', '--rounds', 1, '--dtype', dtype, '--step-size', '32x32', '--step', step]
    status, records = run('--device', 'cpu', *options)
    assert status == 0
    assert [record['loss'] for record in records] == [
        'framework head, CE',
        'framework head, our CE + Dice',
        'Feature head, our CE + Dice',
        'the same, watched by ClassBalanceHook',
    ]
    for record in records:
        assert record['ms'] > 0
        assert (record['batch'], record['logits']) == ('2x3x32x32', f'{step} step')


@pytest.mark.slow
def test_training_steps_of_the_methods_of_a_suite(run, tmp_path):
    config = REPOSITORY / 'configs/experiments/segformer_efficientnet-lite0_1xb8-2k_camvid-240x180.py'
    suite = tmp_path / 'suite.py'
    suite.write_text(f"""
loss = dict(_delete_=True, type='SkeletonRecallLoss', class_weight='auto', logit_adjustment=0.5)
datasets = dict(camvid={str(config)!r})
schedules = dict(short=2)
methods = {{
    'cross-entropy': dict(),
    'tubes': dict(model=dict(decode_head=dict(loss_decode=loss)), augment=[dict(type='SkeletonTubes')]),
    'cross-entropy, bias': dict(fit_bias='cross-entropy'),
    'paste': dict(augment=[dict(type='RareClassPaste')]),
}}
runs = [dict(dataset='camvid', schedule='short', seeds=1)]
""")
    options = ['--scale', '--rounds', 1, '--step-size', '64x64', '--suite', suite]
    status, records = run('--device', 'cpu', *options)
    assert status == 0
    # of another loader alone the step is the same, and what is not trained has none
    assert [record['loss'] for record in records] == ['cross-entropy', 'tubes']
    for record in records:
        assert record['ms'] > 0
        assert (record['batch'], record['logits']) == ('8x3x64x64', 'camvid step')


def test_counting_beside_decoding_the_same_files(run, capsys):
    status, records = run('--counting', '--images', 3, '--size', '32x64', '--workers', 0, 1, '--rounds', 2)
    assert status == 0
    assert [(record['logits'], record['loss']) for record in records] == [
        (f'{kind}, {workers} workers', name)
        for kind in counting.KINDS
        for workers in (0, 1)
        for name in ('decode alone', 'count_classes')
    ]
    for record in records:
        assert record['batch'] == '3 files 32x64'
        assert record['off_by'] == 0
        assert record['ms'] > 0
        assert record['MB'] is None
    assert 'memory' not in capsys.readouterr().out


def test_counts_that_are_off_get_no_speed(run, monkeypatch):
    right = counting.count_classes

    def off(*args, **options):
        return replace(right(*args, **options), pixels=1 + right(*args, **options).pixels)

    monkeypatch.setattr(counting, 'count_classes', off)
    status, records = run('--counting', '--images', 1, '--size', '32x64', '--workers', 0, '--rounds', 1)
    assert status == 1
    assert [record['ms'] is None for record in records] == [False, True, False, True]


def test_time_of_counting_is_per_file():
    rows = [case.Row('one', None, right=True, seconds=[3.0])]
    assert tables.record(case.Case('', '', rows, files=2), rows[0], None)['ms'] == 1500


def test_by_default_every_backend_takes_part():
    assert parse([]).backend == list(BACKENDS)
    assert tuple(steps.STEPS) == STEPS
    assert parse([]).size == [(512, 1024)]
    assert parse(['--counting']).size == [(1024, 2048)]


def test_wrong_options_end_with_one_line(capsys):
    for options in (
        ['--classes', '300'],
        ['--scale'],
        ['--no-losses'],
        ['--device', 'cpu', '--dtype', 'float16', '--step', 'segformer'],
    ):
        with pytest.raises(SystemExit) as end:
            main(options)
        assert end.value.code == 2
    assert 'at most 255' in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_cuda_rows_show_their_bandwidth(run):
    status, records = run('--device', 'cuda', '--size', '64x128', '--scale', 8, 1, '--rounds', 2)
    assert status == 0
    for record in records:
        assert (record['bandwidth'] is not None) == (record['ms'] is not None)


def test_registers_of_the_kernels_need_no_gpu(monkeypatch, capsys, tmp_path):
    registers = pytest.importorskip('mmseg_imbalance.benchmark.registers')
    kernels = [
        registers.Kernel(name, 90, 4, number, 0, 16384, '')
        for name, number in (('forward', 168), ('backward', 255))
    ]

    def compiled(capability, *args):
        if capability == 100:
            raise RuntimeError('no such GPU\nmore')
        return kernels

    monkeypatch.setattr(registers, 'compiled', compiled)
    monkeypatch.setattr(registers.kernels, 'INTERPRETED', True)
    with pytest.raises(RuntimeError, match='unset TRITON_INTERPRET'):
        main(['--registers', '90'])
    monkeypatch.setattr(registers.kernels, 'INTERPRETED', False)
    path = tmp_path / 'table.md'
    options = ['--registers', '90', '100', '--classes', '19', '--scale', '8', '--dtype', 'float16']
    assert main([*options, '--markdown', str(path)]) == 0
    text = path.read_text()
    # 168 registers: three of four warps; 19 halves over 64 pixels, twice in backward, and the label
    assert '| sm_90 | 19 | 1/8 | float16 | forward | 168 | 0 | 16384 | 3 | 8.59 | 1.59 |' in text
    assert '| backward | 255 | 0 | 16384 | 2 | 9.19 | 2.19 |' in text
    assert 'RuntimeError: no such GPU' in text
    assert 'forward' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('warps', 'registers', 'shared', 'programs'),
    [(4, 168, 0, 3), (4, 169, 0, 2), (8, 128, 0, 2), (4, 32, 100 << 10, 2), (4, 16, 0, 16), (1, 16, 0, 32)],
)
def test_programs_of_a_multiprocessor(warps, registers, shared, programs):
    module = pytest.importorskip('mmseg_imbalance.benchmark.registers')
    assert module.Kernel('forward', 90, warps, registers, 0, shared, '').programs == programs
