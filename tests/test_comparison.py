"""Comparing runs, from work dirs as MMEngine leaves them to the files of the command."""

import csv
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mmseg_imbalance.commands.compare import main
from mmseg_imbalance.intervals import jackknife, noise_of_mean
from mmseg_imbalance.reports import work_dirs
from mmseg_imbalance.reports.comparison import NOISE, compare
from mmseg_imbalance.reports.page import page, spread
from mmseg_imbalance.reports.sheets import markdown, sheets

CLASSES = ('road', 'sky', 'car', 'tree', 'pole', 'rider')
PIXELS = np.array([5000, 3000, 900, 600, 40, 10])
CONFIG = """
model = dict(decode_head=dict(loss_decode=dict(type={loss!r})), test_cfg=dict(mode='whole'))
train_cfg = dict(type='IterBasedTrainLoop', max_iters={limit}, val_interval=10)
train_dataloader = dict(batch_size=8, num_workers=2, dataset=dict(data_root='anywhere'))
randomness = dict(seed={seed})
load_from = {load_from!r}
work_dir = {work_dir!r}
"""


def image_rows(quality, seed, images=40):
    """Rows of so many images in which a share of the pixels of each class is found."""
    rng = np.random.default_rng(99)  # all runs are tested on the same images
    label = rng.poisson(np.minimum(PIXELS, 300), (images, len(CLASSES)))
    label[:, -1] *= rng.random(images) < 0.4  # the rarest is in some images only
    rng = np.random.default_rng(seed)
    intersect = rng.binomial(label, quality)
    pred = intersect + rng.binomial(label, 0.1)
    return dict(intersect=intersect, union=label + pred - intersect, pred=pred, label=label)


def write_run(
    folder,
    loss='CE',
    seed=0,
    quality=0.5,
    limit=20,
    reached=None,
    tested=True,
    scored=True,
    name=None,
    extra='',
):
    """A work dir of a training of so many iterations and, below it, of its test."""
    reached = limit if reached is None else reached
    name = name or f'net_small-{loss.lower()}_data'
    session = folder / '20260101_000000'
    values = dict(loss=loss, limit=limit, seed=seed, work_dir=str(folder), load_from=None)
    (session / 'vis_data').mkdir(parents=True)
    (session / 'vis_data' / 'config.py').write_text(CONFIG.format(**values))
    (folder / f'{name}.py').write_text('')
    log = [dict(loss=1.0, time=0.5, memory=2048, iter=n, step=n) for n in range(5, reached + 1, 5)]
    (session / 'vis_data' / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in log))
    (session / f'{session.name}.log').write_text('    GPU 0,1: NVIDIA H100\n    GPU number: 2\n')
    if not tested:
        return folder
    rows = image_rows(quality, seed)
    total = {key: value.sum(0) for key, value in rows.items()}
    iou = 100 * total['intersect'] / total['union']
    metrics = dict(aAcc=50.0, mIoU=round(iou.mean(), 2), mAcc=50.0)
    metrics |= {f'IoU.{c}': round(value, 2) for c, value in zip(CLASSES, iou, strict=True)}
    test = folder / 'test' / '20260102_000000'
    (test / 'vis_data').mkdir(parents=True)
    (folder / 'test' / f'{name}.py').write_text('')
    values['load_from'] = str(folder / f'iter_{reached}.pth')
    (test / 'vis_data' / 'config.py').write_text(CONFIG.format(**values) + extra)
    (test / f'{test.name}.json').write_text(json.dumps(metrics))
    if scored:
        group = np.array(['head', 'head', 'body', 'body', 'tail', 'tail'])
        images = np.array([f'{n}.png' for n in range(len(rows['label']))])
        classes = np.array(CLASSES)
        np.savez(
            test / 'image_scores.npz', images=images, classes=classes, pixels=PIXELS, group=group, **rows
        )
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two configs of three seeds, of which the second finds more of the rare classes."""
    better = np.array([0.5, 0.5, 0.5, 0.5, 0.9, 0.9])
    first = [write_run(tmp_path / f'ce-{s}', 'CE', s) for s in range(3)]
    second = [write_run(tmp_path / f'dice-{s}', 'Dice', s + 3, better) for s in range(3)]
    return first, second


def in_markdown(comparison):
    return markdown(comparison, sheets(comparison))


def rows_of(work_dir):
    return np.load(work_dir / 'test' / '20260102_000000' / 'image_scores.npz')


def iou(work_dir):
    return rows_of(work_dir)['intersect'], rows_of(work_dir)['union']


def label(work_dir):
    return rows_of(work_dir)['label']


def test_seeds_of_one_config_are_one_group_and_another_loss_is_another(runs):
    first, second = runs
    comparison = compare([first[0], second[0], *first[1:], *second[1:]])
    assert [group.label for group in comparison.groups] == ['CE', 'Dice']
    assert [[run.work_dir for run in group.runs] for group in comparison.groups] == [first, second]
    assert not comparison.left_out


def test_means_deviations_and_parts_are_those_of_numpy(runs):
    comparison = compare([*runs[0], *runs[1]])
    assert comparison.classes == list(CLASSES)
    assert comparison.parts == dict(head=['road', 'sky'], body=['car', 'tree'], tail=['pole', 'rider'])
    assert comparison.shares['rider'] == pytest.approx(10 / PIXELS.sum())
    for group, dirs in zip(comparison.groups, runs, strict=True):
        each = []
        for work_dir in dirs:
            intersect, union = iou(work_dir)
            each.append(100 * intersect.sum(0) / union.sum(0))
        each = np.array(each)  # (runs, C)
        for c, name in enumerate(CLASSES):
            assert group.estimates[name].mean == pytest.approx(each[:, c].mean())
            assert group.estimates[name].std == pytest.approx(each[:, c].std(ddof=1))
        assert group.estimates['mIoU'].values == pytest.approx(each.mean(1))
        assert group.estimates['mIoU.tail'].std == pytest.approx(each[:, 4:].mean(1).std(ddof=1))


def test_without_the_pixels_of_images_the_interval_is_that_of_welchs_test(tmp_path):
    dirs = [
        write_run(tmp_path / f'{loss}-{s}', loss, s + 9 * n, scored=False)
        for n, (loss, seeds) in enumerate([('CE', 3), ('Dice', 2)])
        for s in range(seeds)
    ]
    a, b = (group.estimates['pole'] for group in compare(dirs).groups)
    interval = stats.ttest_ind(b.values, a.values, equal_var=False).confidence_interval(0.95)
    assert b.interval == pytest.approx([interval.low, interval.high])
    assert b.noise == 'seeds'
    assert a.difference is a.interval is None


def test_an_interval_over_images_and_seeds_is_wider_than_either_alone(runs):
    estimates = compare([*runs[0], *runs[1]]).groups[1].estimates
    a, b = ([iou(work_dir) for work_dir in dirs] for dirs in runs)
    known = [[jackknife(*areas, label(runs[0][0])) for areas in each] for each in (a, b)]
    for key, members in {'pole': [4], 'mIoU.tail': [4, 5], 'mIoU': list(range(6))}.items():
        estimate = estimates[key]
        assert estimate.noise == 'images and seeds'
        low, high = estimate.interval
        assert (low + high) / 2 == pytest.approx(estimate.difference)
        changes = [np.mean([run.change[:, members] for run in each], axis=0) for each in known]
        alone = noise_of_mean(changes[1] - changes[0], np.min([run.freedom[members] for run in known[0]], 0))
        assert high - low > 1.98 * 100 * alone.margin * (1 - 1e-2)


def test_a_real_gain_is_told_from_noise(runs):
    comparison = compare([*runs[0], *runs[1]])
    estimates = comparison.groups[1].estimates
    assert estimates['pole'].within_noise is False
    assert estimates['mIoU.tail'].within_noise is False
    assert estimates['road'].within_noise is True
    line = next(line for line in in_markdown(comparison).splitlines() if line.startswith('| road'))
    assert line.split('|')[-2].strip().endswith(NOISE)
    line = next(line for line in in_markdown(comparison).splitlines() if line.startswith('| pole'))
    assert re.fullmatch(r'\+\d\d\.\d\d', line.split('|')[-2].strip())


def test_single_runs_without_rows_of_images_leave_the_noise_unknown(tmp_path):
    dirs = [write_run(tmp_path / loss, loss, 0, 0.5, scored=False) for loss in ('CE', 'Dice')]
    (dirs[0] / 'class_weights.json').write_text(
        json.dumps(dict(classes=CLASSES, pixels=PIXELS.tolist(), weights=[1] * 6))
    )
    comparison = compare(dirs)
    assert comparison.groups[1].estimates['car'].within_noise is None
    assert 'noise unknown' in in_markdown(comparison)
    assert comparison.parts['tail'] == ['pole', 'rider']  # thirds, from the file of ClassWeightHook


def test_without_any_frequency_the_classes_keep_their_order_and_there_are_no_parts(tmp_path):
    dirs = [write_run(tmp_path / loss, loss, 0, 0.5, scored=False) for loss in ('CE', 'Dice')]
    comparison = compare(dirs)
    assert (comparison.classes, comparison.parts, comparison.shares) == (list(CLASSES), {}, {})
    assert any('how frequent' in note for note in comparison.notes)


def broken_result(folder):
    write_run(folder)
    next(folder.glob('test/*/*.json')).write_text('{"mIoU": 4')


def broken_config(folder):
    write_run(folder)
    (folder / '20260101_000000' / 'vis_data' / 'config.py').write_text('model = dict(')


def only_mean_iou(folder):
    write_run(folder)
    next(folder.glob('test/*/*.json')).write_text('{"mIoU": 40.0}')


def two_runs(folder):
    write_run(folder / 'a')
    write_run(folder / 'b')


def other_classes(folder):
    write_run(folder, scored=False)
    next(folder.glob('test/*/*.json')).write_text('{"mIoU": 40.0, "IoU.cat": 40.0}')


def former_checkpoint(folder):
    folder.mkdir()
    (folder / 'iter_20.pth').write_text('')
    os.utime(folder / 'iter_20.pth', (0, 0))
    write_run(folder, reached=10, tested=False)


def two_tests(folder):
    for name in 'ab':
        (write_run(folder / name) / '20260101_000000' / 'vis_data' / 'scalars.json').unlink()


def epochs(folder):
    write_run(folder, tested=False)
    session = folder / '20260101_000000' / 'vis_data'
    text = (session / 'config.py').read_text()
    (session / 'config.py').write_text(text.replace('max_iters=20', 'max_epochs=5'))
    lines = [dict(loss=1.0, epoch=n + 1, iter=9 * n + 9, step=9 * n + 9) for n in range(3)]
    (session / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def iterations_for_epochs(folder, named):
    """Three of five epochs of nine iterations each, with MMSegmentation's logger."""
    epochs(folder)
    session = folder / '20260101_000000' / 'vis_data'
    logger = 'default_hooks = dict(logger=dict(log_metric_by_epoch=False))'
    text = (session / 'config.py').read_text().replace('val_interval=10', 'val_interval=1')
    (session / 'config.py').write_text(text + logger)
    lines = []
    for n in (1, 2, 3):
        lines += [dict(loss=1.0, step=9 * n) | (dict(epoch=n) if named else {})]
        lines += [dict(mIoU=40.0, step=9 * n) | {f'IoU.{c}': 40.0 for c in CLASSES}]
    (session / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_each_config_is_read_once(tmp_path, monkeypatch):
    read = []
    config = work_dirs._config
    monkeypatch.setattr(work_dirs, '_config', lambda session: (read.append(session.name), config(session))[1])
    run = work_dirs.read_run(write_run(tmp_path / 'run'))
    assert read == ['20260101_000000', '20260102_000000']
    assert 'load_from' not in run.settings  # of the training, though the test has one
    assert run.checkpoint == str(tmp_path / 'run' / 'iter_20.pth')


@pytest.mark.parametrize(
    ('make', 'reason'),
    [
        (lambda folder: None, 'no such folder'),
        (lambda folder: folder.mkdir(), 'no run of MMEngine'),
        (lambda folder: write_run(folder, reached=10, tested=False), 'half-finished, 10 of 20 iters'),
        (lambda folder: write_run(folder, tested=False), 'neither validated nor tested'),
        (broken_result, 'is broken'),
        (broken_config, 'is broken: SyntaxError'),
        (only_mean_iou, 'ImbalanceIoUMetric'),
        (two_runs, 'several runs are in it'),
        (two_tests, 'several runs are in it'),
        (former_checkpoint, 'half-finished, 10 of 20 iters'),
        (epochs, 'half-finished, 2 of 5 epochs'),
        (lambda folder: iterations_for_epochs(folder, named=True), 'half-finished, 3 of 5 epochs'),
        (lambda folder: iterations_for_epochs(folder, named=False), 'half-finished, 3 of 5 epochs'),
        (lambda folder: folder.write_text(''), 'it is a file'),
        (other_classes, 'cat'),
    ],
)
def test_what_cannot_be_compared_is_listed_with_the_reason_and_stops_nothing(runs, tmp_path, make, reason):
    make(tmp_path / 'odd')
    comparison = compare([runs[0][0], tmp_path / 'odd', runs[1][0]])
    assert len(comparison.groups) == 2
    [(name, why)] = comparison.left_out
    assert name == str(tmp_path / 'odd')
    assert reason in why
    assert reason in in_markdown(comparison)


def test_a_broken_line_of_the_log_is_noted(tmp_path):
    folder = write_run(tmp_path / 'a')
    log = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.write_text(log.read_text() + '{"loss": 0.')
    comparison = compare([folder])
    assert len(comparison.groups) == 1
    assert any('line 5' in note for note in comparison.notes)


def test_what_was_resumed_adds_up_and_what_was_begun_anew_does_not(tmp_path):
    folder = write_run(tmp_path / 'a', quality=0.2)
    write_run(tmp_path / 'b', tested=False)
    second = (tmp_path / 'b' / '20260101_000000').rename(folder / '20260103_000000')
    [(_, reason)] = compare([folder, write_run(tmp_path / 'c')]).left_out
    assert 'neither validated nor tested' in reason
    assert 'the test 20260102_000000 is older than the training and is left out' in reason
    newer = folder / 'test' / '20260104_000000'
    (folder / 'test' / '20260102_000000').rename(newer)
    (newer / '20260102_000000.json').rename(newer / '20260104_000000.json')
    [group] = compare([folder]).groups
    assert group.runs[0].seconds == 20 * 0.5  # of the newer training alone

    config = second / 'vis_data' / 'config.py'
    config.write_text(config.read_text() + 'resume = True\n')
    log = second / 'vis_data' / 'scalars.json'
    log.write_text(log.read_text().split('\n', 2)[2])  # it went on after iteration 10
    [group] = compare([folder]).groups
    assert group.runs[0].seconds == (20 + 10) * 0.5  # iterations 11 to 20 twice

    log.write_text(log.read_text().split('\n', 1)[1])  # a single line, of iterations 16 to 20
    config.write_text(config.read_text() + 'default_hooks = dict(logger=dict(interval=5))\n')
    [group] = compare([folder]).groups
    assert group.runs[0].seconds == (20 + 5) * 0.5


def test_a_seed_without_image_scores_is_named_where_others_have_them(tmp_path):
    seeds = [write_run(tmp_path / f'{seed}', seed=seed) for seed in range(3)]
    note = 'there is no image_scores.npz of ImbalanceIoUMetric'
    assert not any(note in line for line in compare(seeds).notes)
    for file in seeds[1].rglob('image_scores.npz'):
        file.unlink()
    comparison = compare(seeds)
    assert [len(group.runs) for group in comparison.groups] == [2, 1]
    assert [line.partition(':')[0] for line in comparison.notes if note in line] == [str(seeds[1])]
    for file in tmp_path.rglob('image_scores.npz'):
        file.unlink()
    assert not any(note in line for line in compare(seeds).notes)  # where none has them, nothing is split


def test_a_test_that_adds_to_the_model_is_another_config(tmp_path):
    hook = "custom_hooks = [dict(type='DecisionHook', rule='rankseg-iou', remove_small=50)]\n"
    plain, cleaned = write_run(tmp_path / 'a'), write_run(tmp_path / 'b', seed=1, extra=hook)
    slide = write_run(tmp_path / 'c', seed=2, extra="model['test_cfg'] = dict(mode='slide')\n")
    groups = compare([plain, cleaned, slide]).groups
    assert [len(group.runs) for group in groups] == [1, 1, 1]
    sources = [group.runs[0].source for group in groups]
    assert sources[1] == 'test of iter_20.pth, rankseg-iou, small regions 50'
    assert sources[2] == 'test of iter_20.pth, sliding window'
    assert 'remove_small=50' in groups[1].name


def test_a_pretrained_run_is_another_config(tmp_path):
    scratch, pretrained = write_run(tmp_path / 'a'), write_run(tmp_path / 'b', seed=1)
    config = pretrained / '20260101_000000' / 'vis_data' / 'config.py'
    config.write_text(config.read_text().replace('load_from = None', "load_from = 'other.pth'"))
    assert len(compare([scratch, pretrained]).groups) == 2


def test_one_model_counts_once(tmp_path):
    run = write_run(tmp_path / 'a')
    comparison = compare([run, run / 'test', run, Path(f'{run}/../a')])
    assert [len(group.runs) for group in comparison.groups] == [1]
    copy = shutil.copytree(run, tmp_path / 'copy')  # its test is of the checkpoint beside the first
    assert 'of the same model' in compare([run, copy]).left_out[0][1]


def test_odd_content_does_not_stop_the_page(tmp_path):
    first, second = (write_run(tmp_path / loss, loss, scored=False) for loss in ('CE', 'Dice'))
    for run in (first, second):
        path = next(run.glob('test/*/*.json'))
        metrics = json.loads(path.read_text()) | {'mDice': math.nan, 'IoU.b$\\frac$ | <i>': 3.0}
        path.write_text(json.dumps(metrics))
        config = run / '20260101_000000' / 'vis_data' / 'config.py'
        config.write_text(config.read_text() + 'label_map = {0: 1}\n')
    main([str(first), str(second), '--out', str(tmp_path / 'out')])
    assert '&lt;i&gt;' in (tmp_path / 'out' / 'comparison.html').read_text()
    assert r'\|' in (tmp_path / 'out' / 'comparison.md').read_text()
    assert (
        json.loads((tmp_path / 'out' / 'comparison.json').read_text())['configs'][0]['runs'][0]['metrics'][
            'mDice'
        ]
        is None
    )


def test_a_class_that_some_seed_neither_sees_nor_predicts_has_no_verdict_from_it(tmp_path):
    dirs = [
        write_run(tmp_path / f'{loss}-{s}', loss, s, scored=False) for loss in ('CE', 'Dice') for s in (0, 1)
    ]
    for run in dirs[2:]:
        path = next(run.glob('test/*/*.json'))
        path.write_text(
            json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != 'IoU.rider'})
        )
    estimate = compare(dirs).groups[1].estimates['rider']
    assert math.isnan(estimate.difference)
    assert estimate.within_noise is None


def test_a_run_without_rows_of_images_may_know_a_class_that_the_baselines_rows_lack(runs, tmp_path):
    other = write_run(tmp_path / 'other', 'Focal', scored=False)
    path = next(other.glob('test/*/*.json'))
    path.write_text(json.dumps(json.loads(path.read_text()) | {'IoU.train': 3.0}))
    comparison = compare([runs[0][0], runs[1][0], other])
    assert comparison.groups[2].estimates['train'].values == [3.0]
    assert math.isnan(comparison.groups[0].estimates['train'].mean)
    assert 'train' in in_markdown(comparison)


def test_the_baseline_that_cannot_be_used_is_said(runs, tmp_path, capsys):
    comparison = compare([tmp_path / 'missing', runs[0][0]])
    assert any('is the baseline' in note for note in comparison.notes)
    with pytest.raises(SystemExit):
        main([str(runs[0][0]), '--baseline', str(tmp_path / 'missing')])
    assert 'no such folder' in capsys.readouterr().err


def test_an_evaluators_prefix_and_a_test_with_pictures_elsewhere_are_found(tmp_path):
    run = write_run(tmp_path / 'a')
    path = next(run.glob('test/*/*.json'))
    path.write_text(json.dumps({f'val/{key}': value for key, value in json.loads(path.read_text()).items()}))
    scores = path.parent / 'image_scores.npz'
    scores.rename(scores.with_name('image_scores_val.npz'))
    config = path.parent / 'vis_data' / 'config.py'
    config.rename(run / 'test' / 'net_small-ce_data.py')  # the copy of the runner
    [group] = compare([run]).groups
    assert not math.isnan(group.estimates['road'].mean)
    assert group.runs[0].scores is not None
    assert group.runs[0].source == 'test of iter_20.pth'


def test_time_memory_and_hardware_are_read_from_the_logs(tmp_path):
    [group] = compare([write_run(tmp_path / 'a')]).groups
    [run] = group.runs
    assert run.seconds == pytest.approx(20 * 0.5)
    assert (run.memory, run.processes, run.hardware, run.length) == (2048, 2, 'NVIDIA H100', 20)
    assert run.source == 'test of iter_20.pth'


@pytest.mark.parametrize('steps', [(10, 20), (0, 0)])  # by iterations and with log_metric_by_epoch
def test_the_last_validation_stands_in_for_a_test(tmp_path, steps):
    folder = write_run(tmp_path / 'a', tested=False)
    log = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
    for step, value in zip(steps, (1.0, 2.0), strict=True):
        log.write_text(
            log.read_text() + json.dumps(dict(mIoU=value, **{'IoU.road': value}, step=step)) + '\n'
        )
    [group] = compare([folder]).groups
    assert group.estimates['road'].values == [2.0]
    assert group.runs[0].source == 'validation of iter_20.pth'
    assert group.runs[0].complete


def test_validations_between_two_lines_of_the_log_have_their_own_iterations(tmp_path):
    """With ``log_metric_by_epoch``, MMEngine's default, their step in the log is 0."""
    folder = write_run(tmp_path / 'a', limit=25, tested=False)
    session = folder / '20260101_000000'
    text = CONFIG.format(loss='CE', limit=25, seed=0, work_dir=str(folder), load_from=None)
    (session / 'vis_data' / 'config.py').write_text(text)
    train = dict(loss=1.0, time=0.5, memory=2048, iter=12, step=12)
    tests = [{'mIoU': n, 'IoU.road': n, 'step': 0} for n in (1.0, 2.0, 3.0)]  # after 10, 20 and 25
    lines = [tests[0], train, *tests[1:]]
    (session / 'vis_data' / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    [group] = compare([folder]).groups
    assert group.runs[0].source == 'validation of iter_25.pth'
    assert group.runs[0].complete


def test_of_two_evaluators_that_with_the_classes_is_taken(tmp_path):
    run = write_run(tmp_path / 'a')
    path = next(run.glob('test/*/*.json'))
    ours = {f'ours/{key}': value for key, value in json.loads(path.read_text()).items()}
    (path.parent / 'image_scores.npz').rename(path.parent / 'image_scores_ours.npz')
    other = dict(aAcc=1.0, mIoU=2.0)
    for both in (other | ours, ours | other):
        path.write_text(json.dumps(both))
        [group] = compare([run]).groups
        assert group.runs[0].metrics['mIoU'] == ours['ours/mIoU']
        assert group.estimates['mIoU'].mean == pytest.approx(ours['ours/mIoU'], abs=0.01)


def test_runs_of_one_config_name_that_differ_are_told_apart_by_what_differs(tmp_path):
    dirs = [write_run(tmp_path / str(limit), limit=limit) for limit in (20, 40)]
    labels = [group.name for group in compare(dirs).groups]
    assert labels == [f'net_small-ce_data [train_cfg.max_iters={limit}]' for limit in (20, 40)]


def test_other_images_give_no_interval_and_say_so(runs):
    path = next((runs[1][0]).glob('test/*/image_scores.npz'))
    rows = dict(np.load(path))
    rows['images'] = np.array([f'other{n}' for n in range(40)])
    np.savez(path, **rows)
    comparison = compare([runs[0][0], runs[1][0]])
    assert comparison.groups[1].estimates['mIoU'].interval is None
    assert comparison.groups[1].estimates['mIoU'].within_noise is None
    assert any('its images or their labels' in note for note in comparison.notes)


def test_an_image_whose_labels_are_all_gone_in_one_test_does_not_stop_the_comparison(runs):
    path = next((runs[1][0]).glob('test/*/image_scores.npz'))
    rows = dict(np.load(path))
    for name in ('label', 'union', 'intersect'):
        rows[name][0] = 0
    np.savez(path, **rows)
    comparison = compare([runs[0][0], runs[1][0]])
    assert comparison.groups[1].estimates['mIoU'].interval is None
    assert any('its images or their labels' in note for note in comparison.notes)


def test_the_command_writes_all_forms_of_one_comparison(runs, tmp_path, capsys):
    out = tmp_path / 'out'
    command = [*runs[0], *runs[1], tmp_path / 'missing', '--baseline', runs[1][0], '--out', out]
    main([str(part) for part in command])
    printed = capsys.readouterr().out
    assert 'no such folder' in printed
    assert NOISE in printed
    data = json.loads((out / 'comparison.json').read_text())
    assert data['baseline'] == 'Dice'
    assert data['left_out'][0]['work_dir'] == str(tmp_path / 'missing')
    rows = list(csv.DictReader((out / 'comparison.csv').open()))
    pole = {row['config']: row for row in rows if row['quantity'] == 'pole'}
    for config in data['configs']:
        assert float(pole[config['name']]['mean']) == config['estimates']['pole']['mean']
    assert '| pole |' in (out / 'comparison.md').read_text()
    html = (out / 'comparison.html').read_text()
    assert html.count('data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)', html)  # nothing from elsewhere
    assert html.index('Difference by class frequency') < html.index('IoU of each class')


def test_no_usable_run_is_one_clear_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / 'a'), str(tmp_path / 'b')])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.count('no such folder') == 2
    assert 'Traceback' not in message


def test_labels_move_apart_as_little_as_it_takes():
    places = np.array([5.0, 0.0, 0.1, 0.2, 9.0])
    moved = spread(places, 1.0)
    ordered = np.sort(moved)
    assert np.diff(ordered).min() >= 1 - 1e-9
    assert np.argsort(moved).tolist() == np.argsort(places).tolist()
    assert moved[[0, 4]].tolist() == [5.0, 9.0]
    assert moved[1:4].mean() == pytest.approx(0.1)  # around where they were


def test_the_page_of_one_config_has_no_difference(tmp_path):
    out = tmp_path / 'out'
    main([str(write_run(tmp_path / 'a')), '--out', str(out)])
    assert 'Difference by class' not in (out / 'comparison.html').read_text()
    assert not math.isnan(
        json.loads((out / 'comparison.json').read_text())['configs'][0]['estimates']['mIoU']['mean']
    )
    assert Path(out, 'comparison.md').exists()


def change_rows(work_dir, **arrays):
    path = next(work_dir.glob('test/*/image_scores.npz'))
    np.savez(path, **dict(np.load(path)) | arrays)


def test_with_one_run_of_each_config_nothing_is_called_real(runs, tmp_path):
    out = tmp_path / 'out'
    main([str(runs[0][0]), str(runs[1][0]), '--out', str(out)])
    comparison = compare([runs[0][0], runs[1][0]])
    estimates = comparison.groups[1].estimates
    assert estimates['pole'].interval[0] > 0
    assert {e.within_noise for e in estimates.values()} == {True, None}
    text = (out / 'comparison.md').read_text()
    assert 'seeds unknown' in text
    assert 'how much another seed would change is not known' in text
    html = (out / 'comparison.html').read_text()
    assert not re.search('class="(up|down)"', html)
    both = compare([*runs[0], *runs[1]])
    assert re.search('class="(up|down)"', page(both, sheets(both))[0])


def test_a_class_that_no_run_of_the_baseline_finds_has_a_noise(tmp_path):
    """Three IoUs of 0 deviate by 0; that does not make any difference a real one."""
    lost = np.array([0.5, 0.5, 0.5, 0.5, 0, 0])
    first = [write_run(tmp_path / f'ce-{s}', 'CE', s, lost) for s in range(3)]
    hardly = [
        write_run(tmp_path / f'a-{s}', 'Dice', s, [0.5, 0.5, 0.5, 0.5, q, 0])
        for s, q in enumerate([0, 0.001, 0.02])
    ]
    found = [
        write_run(tmp_path / f'b-{s}', 'Focal', s, [0.5, 0.5, 0.5, 0.5, q, 0])
        for s, q in enumerate([0.5, 0.6, 0.55])
    ]
    base, little, much = (group.estimates for group in compare([*first, *hardly, *found]).groups)
    assert base['pole'].std == 0
    assert little['pole'].difference > 0
    assert little['pole'].within_noise is True
    assert much['pole'].within_noise is False
    assert little['rider'].within_noise is None  # all are 0


def test_a_false_alarm_of_a_class_that_no_label_holds_costs_no_mean(runs):
    """The classes of a mean are those of the truth, for all runs."""
    a, b = runs[0][0], runs[1][0]
    for work_dir in (a, b):
        rows = dict(rows_of(work_dir))
        for key in ('intersect', 'union', 'pred', 'label'):
            rows[key][:, 5] = 0  # no rider in any label
        if work_dir == b:
            rows['union'][0, 5] = rows['pred'][0, 5] = 1  # one pixel
        change_rows(work_dir, **rows)
    comparison = compare([a, b])
    for group, work_dir in zip(comparison.groups, (a, b), strict=True):
        intersect, union = iou(work_dir)
        each = 100 * intersect.sum(0)[:5] / union.sum(0)[:5]
        assert group.estimates['mIoU'].mean == pytest.approx(each.mean())
        assert group.estimates['mIoU.tail'].mean == pytest.approx(each[4])
        assert math.isnan(group.estimates['rider'].mean)
    assert any("['rider'] are in no mean" in note for note in comparison.notes)


def test_a_class_in_one_image_has_no_interval(runs):
    for work_dir in (*runs[0], *runs[1]):
        rows = dict(rows_of(work_dir))
        for key in ('intersect', 'union', 'pred', 'label'):
            rows[key][1:, 5] = 0
            rows[key][0, 5] = dict(intersect=work_dir in runs[1], union=9, pred=5, label=5)[key]
        change_rows(work_dir, **rows)
    estimate = compare([*runs[0], *runs[1]]).groups[1].estimates
    assert estimate['rider'].difference > 0
    assert estimate['rider'].interval is estimate['rider'].within_noise is None
    assert estimate['mIoU'].noise == 'images and seeds'


def test_frames_of_one_block_are_left_out_together(runs, capsys):
    first, second = runs
    plain = compare([*first, *second])
    assert (plain.images, plain.blocks) == (40, 40)
    names = [f'{n // 5}.png' for n in range(40)]
    for work_dir in (*first, *second):
        change_rows(work_dir, blocks=np.array(names))
    tested_so = compare([*first, *second])
    by_option = compare([*first, *second], blocks=5)
    assert (tested_so.images, tested_so.blocks) == (40, 8)
    estimates = [c.groups[1].estimates['mIoU'] for c in (plain, tested_so, by_option)]
    assert estimates[1] == estimates[2] != estimates[0]
    assert '40 images in 8 blocks' in in_markdown(tested_so)
    main([str(path) for path in (*first, *second, '--blocks', '^[12]')])
    assert '40 images in 20 blocks' in capsys.readouterr().out  # 11 of 1.png, 11 of 2.png, 18 others
    with pytest.raises(SystemExit):
        main([str(first[0]), str(second[0]), '--blocks', 'nowhere'])
    assert "blocks finds 'nowhere' in no path of an image" in capsys.readouterr().err


def test_one_video_tells_nothing_of_others(runs):
    comparison = compare([*runs[0], *runs[1]], blocks='png')
    assert any('all 40 are of one block' in note for note in comparison.notes)
    estimate = comparison.groups[1].estimates['pole']
    assert estimate.noise == 'seeds'
    assert 'over seeds alone: it holds for the tested images' in in_markdown(comparison)


def test_a_run_with_one_class_more_than_the_baseline_is_compared_on_the_classes_of_both(runs, tmp_path):
    other = write_run(tmp_path / 'other', 'Focal', seed=7)
    rows = dict(rows_of(other))
    for key in ('intersect', 'union', 'pred', 'label'):
        rows[key] = np.concatenate([rows[key], np.full((40, 1), 7)], 1)
    rows |= dict(
        classes=np.array([*CLASSES, 'train']),
        pixels=np.append(PIXELS, 5),
        group=np.append(rows['group'], 'tail'),
    )
    change_rows(other, **rows)
    comparison = compare([runs[0][0], other])
    assert comparison.classes == [*CLASSES, 'train']
    assert comparison.parts['tail'] == ['pole', 'rider']
    estimates = [group.estimates for group in comparison.groups]
    assert math.isnan(estimates[0]['train'].mean)
    assert estimates[1]['train'].mean == 100
    assert estimates[1]['mIoU'].mean == pytest.approx(np.mean([estimates[1][name].mean for name in CLASSES]))
    assert estimates[1]['mIoU'].noise == 'images'
    assert any("['train'] are in no mean" in note for note in comparison.notes)


def test_what_was_tested_is_on_the_page(runs):
    text = in_markdown(compare([runs[0][0], runs[1][0]]))
    shown = re.findall(r'40 images [0-9a-f]{6}', text)
    assert len(shown) == 2
    assert len(set(shown)) == 1
