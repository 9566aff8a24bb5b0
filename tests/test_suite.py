"""Suite files, the runs that they ask for, their rows; and a suite that is killed and goes on."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY
from mmengine.runner import find_latest_checkpoint
from test_comparison import write_run

from mmseg_imbalance.commands import main
from mmseg_imbalance.commands.suite import Execution, make_slots, seed_list
from mmseg_imbalance.files import locked
from mmseg_imbalance.hardware import cpu_name
from mmseg_imbalance.suite import (
    COLUMNS,
    Suite,
    SuiteRun,
    append_row,
    commit_of,
    evaluations,
    fingerprint,
    on_this_machine,
    prepare_resume,
    read_rows,
)

CAMVID = REPOSITORY / 'configs/experiments/segformer_efficientnet-lite0_1xb8-2k_camvid-240x180.py'
SUITE = f"""
datasets = dict(camvid={str(CAMVID)!r})
schedules = dict(short=2, long=4)
methods = {{
    'cross-entropy': dict(),
    'combined, auto': dict(
        model=dict(decode_head=dict(loss_decode=dict(
            _delete_=True, type='CombinedWeightedLoss', class_weight='auto'))),
        custom_hooks=[dict(type='ClassWeightHook')],
    ),
}}
runs = [
    dict(dataset='camvid', schedule='short', seeds=2),
    dict(dataset='camvid', schedule='long', seeds=1, methods=['combined, auto']),
]
"""


@pytest.fixture
def write(tmp_path):
    def make(text=SUITE, name='tiny'):
        path = tmp_path / f'{name}.py'
        path.write_text(text)
        return path

    return make


def test_runs_come_seed_by_seed_so_that_what_is_finished_can_be_compared(write):
    runs = [(run.schedule, run.method, run.seed) for run in Suite(write()).runs()]
    assert runs == [
        ('short', 'cross-entropy', 0),
        ('short', 'combined, auto', 0),
        ('short', 'cross-entropy', 1),
        ('short', 'combined, auto', 1),
        ('long', 'combined, auto', 0),
    ]
    assert [run.seed for run in Suite(write()).runs([1])] == [1, 1]


def test_a_run_that_two_groups_name_is_one_run(write):
    twice = SUITE.replace(
        'seeds=1, methods', 'seeds=1), dict(dataset="camvid", schedule="short", seeds=3, methods'
    )
    assert len(Suite(write(twice)).runs()) == 4 + 2 + 1


def test_the_config_of_a_run_is_the_baseline_with_schedule_seed_and_the_lines_of_the_method(write):
    suite = Suite(write())
    plain, combined = (suite.config(run) for run in suite.runs([0])[:2])
    assert (plain.train_cfg.max_iters, plain.train_cfg.val_interval) == (2, 2)
    assert plain.param_scheduler[1].end == 2
    assert plain.randomness.seed == 0
    assert plain.model.decode_head.loss_decode == dict(type='CrossEntropyLoss')
    assert plain.custom_hooks == [dict(type='RunHook')]
    loss = dict(type='CombinedWeightedLoss', class_weight='auto')
    assert combined.model.decode_head.pop('loss_decode') == loss
    assert combined.pop('custom_hooks') == [dict(type='ClassWeightHook')]
    plain.model.decode_head.pop('loss_decode')
    plain.pop('custom_hooks')
    assert combined.to_dict() == plain.to_dict()


def test_a_method_adds_transforms_and_those_that_mix_images_get_the_data_set_that_they_need(write):
    tubes, paste = dict(type='SkeletonTubes'), dict(type='RareClassPaste', prob=0.5)
    text = SUITE.replace(
        "'cross-entropy': dict(),",
        f"""'cross-entropy': dict(), 'tubes': dict(augment=[{tubes}]),
    'both': dict(augment=[{tubes}, {paste}], train_dataloader=dict(batch_size=3)),""",
    )
    suite = Suite(write(text))
    plain, tubed, both = (suite.config(run) for run in suite.runs([0])[:3])
    *before, pack = plain.train_dataloader.dataset.pipeline
    assert tubed.train_dataloader.dataset.pipeline == [*before, tubes, pack]
    outer = both.train_dataloader.dataset
    assert (outer.type, outer.pipeline) == ('MultiImageMixDataset', [tubes, paste, pack])
    assert outer.dataset == {**plain.train_dataloader.dataset, 'pipeline': before}
    assert both.train_dataloader.batch_size == 3
    on_this_machine(both, Path('/somewhere'), workers=0, float32=False, fused=False)
    assert both.train_dataloader.dataset.dataset.data_root == '/somewhere'
    assert 'data_root' not in both.train_dataloader.dataset


WRAPPED = f"""
_base_ = {str(CAMVID)!r}
inner = {{{{_base_.train_dataloader.dataset}}}}
train_dataloader = dict(dataset=dict(_delete_=True, **WRAPPER))
default_hooks = dict(logger=dict(log_metric_by_epoch=True))
"""


@pytest.fixture
def config_of_wrapped(write):
    def make(wrapper, augment):
        write(WRAPPED.replace('**WRAPPER', wrapper), 'wrapped')
        text = SUITE.replace(repr(str(CAMVID)), "'wrapped.py'")
        suite = Suite(
            write(text.replace("'cross-entropy': dict()", f"'cross-entropy': dict(augment={augment})"))
        )
        return suite.config(suite.runs()[0])

    return make


def test_a_baseline_that_mixes_images_gets_the_transforms_into_its_own_pipeline(config_of_wrapped):
    paste, pack = dict(type='RareClassPaste'), dict(type='PackSegInputs')
    cfg = config_of_wrapped(f"type='MultiImageMixDataset', dataset=inner, pipeline=[{pack}]", [paste])
    assert cfg.train_dataloader.dataset.pipeline == [paste, pack]
    assert cfg.train_dataloader.dataset.dataset == cfg.inner


@pytest.mark.parametrize(
    'wrapper', ["type='ConcatDataset', datasets=[inner]", "type='RepeatDataset', times=2, dataset=inner"]
)
def test_wrapped_data_lie_where_they_are_said_to_and_take_no_transforms(config_of_wrapped, wrapper):
    cfg = config_of_wrapped(wrapper, [])
    on_this_machine(cfg, Path('/somewhere'), workers=0, float32=False, fused=False)
    outer = cfg.train_dataloader.dataset
    assert (outer.get('dataset') or outer.datasets[0]).data_root == '/somewhere'
    assert 'data_root' not in outer
    assert cfg.default_hooks.logger.log_metric_by_epoch is False  # the curve is by iterations
    with pytest.raises(ValueError, match=f'no pipeline in train_dataloader.dataset, which is a {outer.type}'):
        config_of_wrapped(wrapper, [dict(type='SkeletonTubes')])


def test_data_below_two_folders_are_refused_before_they_are_taken_from_one(config_of_wrapped):
    two = "type='ConcatDataset', datasets=[inner, dict(type='CamVidDataset', data_root='elsewhere')]"
    with pytest.raises(ValueError, match=r"has data below \['data/camvid', 'elsewhere'\], but a suite takes"):
        config_of_wrapped(two, [])


def test_a_model_with_a_fitted_bias_is_tested_on_the_validation_images_as_others_are(write):
    """Rows of a test split would be compared with validations."""
    base = f'_base_ = {str(CAMVID)!r}'
    other = """
test_dataloader = dict(dataset=dict(data_prefix=dict(img_path='images/test')))
test_evaluator = dict(blocks=3)
"""
    none = 'test_dataloader, test_evaluator, test_cfg = None, None, None'
    prints = set()
    for text in (base, base + other, f'{base}\n{none}'):
        write(text, 'mine')
        suite = Suite(write(SUITE.replace(repr(str(CAMVID)), "'mine.py'")))
        cfg = suite.config(suite.runs()[0])
        assert cfg.test_dataloader.dataset.data_prefix.img_path == 'images/val'
        assert cfg.test_dataloader == cfg.val_dataloader
        assert cfg.test_evaluator == cfg.val_evaluator
        on_this_machine(cfg, Path('/somewhere'), workers=0, float32=False, fused=False)
        assert cfg.test_dataloader.dataset.data_root == '/somewhere'
        prints.add(fingerprint(cfg))
    assert len(prints) == 1
    write(f'{base}\nval_dataloader = None', 'mine')
    with pytest.raises(ValueError, match=r'mine\.py has no val_dataloader: a suite needs one'):
        suite.config(suite.runs()[0])


def test_a_method_that_changes_the_model_of_another_has_its_config_and_comes_after_it(write):
    text = SUITE.replace(
        "'cross-entropy': dict(),", "'cross-entropy': dict(), 'CE + bias': dict(fit_bias='cross-entropy'),"
    )
    suite = Suite(write(text))
    plain, changed = suite.runs()[:2]
    assert (changed.method, suite.trained_as(changed.method)) == ('CE + bias', 'cross-entropy')
    assert changed.of('cross-entropy') == plain
    assert suite.config(changed).to_dict() == suite.config(plain).to_dict()
    with pytest.raises(ValueError, match="model of 'cross-entropy', which has to train one"):
        Suite(write(text.replace("methods=['combined, auto']", "methods=['CE + bias']")))
    again = text.replace(
        "'combined, auto': dict(", "'again': dict(fit_bias='CE + bias'), 'combined, auto': dict("
    )
    with pytest.raises(ValueError, match="model of 'CE \\+ bias', which has to train one"):
        Suite(write(again))


def test_the_fingerprint_is_that_of_the_run_and_not_of_the_machine(write):
    suite = Suite(write())
    run, other = suite.runs()[:2]
    cfg = suite.config(run)
    before = fingerprint(cfg)
    assert fingerprint(suite.config(run)) == before != fingerprint(suite.config(other))
    on_this_machine(cfg, Path('/somewhere'), workers=3, float32=True, fused=True)
    amp = suite.config(run).optim_wrapper.to_dict()
    assert (amp.pop('type'), amp.pop('dtype'), amp.pop('loss_scale')) == ('AmpOptimWrapper', 'bfloat16', 1.0)
    amp['optimizer']['fused'] = True
    assert cfg.optim_wrapper == dict(type='OptimWrapper', **amp)
    assert cfg.train_dataloader.dataset.data_root == '/somewhere'
    assert (cfg.val_dataloader.num_workers, cfg.val_dataloader.persistent_workers) == (3, True)


@pytest.mark.parametrize(
    ('old', 'new', 'error', 'words'),
    [
        ('schedules', 'plans', ValueError, 'does not set schedules'),
        (
            "dataset='camvid', schedule='long'",
            "dataset='camvid', schedule='huge'",
            ValueError,
            "'huge' is none of",
        ),
        (
            "dataset='camvid', schedule='long'",
            "dataset='kitti', schedule='long'",
            ValueError,
            "'kitti' is none of",
        ),
        ("methods=['combined, auto']", "methods=['focal']", ValueError, "'focal' is none of"),
        ('short=2', 'short="2"', ValueError, "at least 1, got short='2'"),
        ('seeds=1', 'seed=1', ValueError, 'an entry of runs has'),
        ('seeds=1', 'seeds=[0, 1]', ValueError, 'seeds is their number'),
        ("'cross-entropy'", "'Combined auto'", ValueError, 'shares with'),
        ("'cross-entropy'", "'交叉熵'", ValueError, 'lacks'),
        (
            'schedules = dict(short=2, long=4)',
            'schedules = [2, 4]',
            ValueError,
            r'schedules is a dict .* \[2, 4\]',
        ),
        ("'cross-entropy': dict()", "'cross-entropy': 'CE'", ValueError, "methods is a dict .* got 'CE'"),
        ("'cross-entropy'", '1', ValueError, 'methods is a dict .* got 1'),
        (
            "methods=['combined, auto']",
            "methods='combined, auto'",
            ValueError,
            "a list of names, got 'combined",
        ),
        (
            "dataset='camvid', schedule='long'",
            "dataset=['camvid'], schedule='long'",
            ValueError,
            'is none of',
        ),
        (repr(str(CAMVID)), '7', ValueError, 'datasets is a dict of the paths of configs .* got 7'),
        ('runs = [', 'runs = ["all", ', ValueError, "runs is a list of dicts, got 'all'"),
        (str(CAMVID), 'gone.py', FileNotFoundError, "'camvid' has no config"),
    ],
)
def test_a_suite_file_that_is_wrong_is_refused(write, old, new, error, words):
    assert old in SUITE
    with pytest.raises(error, match=words):
        Suite(write(SUITE.replace(old, new)))


def test_a_suite_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no suite file .*nothing\.py'):
        Suite(tmp_path / 'nothing.py')


def test_a_suite_that_extends_that_of_the_repository_finds_its_configs(write):
    whole = REPOSITORY / 'configs/experiments/suite.py'
    extended = Suite(write(f'_base_ = {str(whole)!r}\nschedules = dict(short=3)'))
    assert extended.datasets == Suite(whole).datasets
    assert extended.schedules['short'] == 3


def test_a_method_that_is_changed_has_no_option_of_the_baselines_loss(write, tmp_path):
    baseline = tmp_path / 'baseline.py'
    loss = "loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4)"
    baseline.write_text(f'_base_ = {str(CAMVID)!r}\nmodel = dict(decode_head=dict({loss}))')
    first = write(SUITE.replace(str(CAMVID), str(baseline)))
    changed = "dict(_delete_=True, type='WeightedDiceLoss')"
    second = write(
        f'_base_ = {str(first)!r}\n'
        f"methods = {{'combined, auto': dict(model=dict(decode_head=dict(loss_decode={changed})))}}",
        'second',
    )
    suite = Suite(second)
    run = next(run for run in suite.runs() if run.method == 'combined, auto')
    assert suite.config(run).model.decode_head.loss_decode == dict(type='WeightedDiceLoss')


def test_the_suite_of_the_repository_is_whole():
    suite = Suite(REPOSITORY / 'configs/experiments/suite.py')
    configs = {run.method: suite.config(run) for run in suite.runs([0])}
    assert set(configs) == set(suite.methods)
    trained = [method for method in configs if suite.trained_as(method) == method]
    assert len({fingerprint(configs[method]) for method in trained}) == len(trained) == len(configs) - 3
    assert len({run.name for run in suite.runs()}) == len(suite.runs())


@pytest.mark.parametrize(('text', 'seeds'), [('0-4', [0, 1, 2, 3, 4]), ('3', [3]), ('0,2-3', [0, 2, 3])])
def test_seeds_are_written_as_ranges_and_lists(text, seeds):
    assert seed_list(text) == seeds


def test_seeds_that_are_no_list_are_refused(write, capsys):
    with pytest.raises(SystemExit):
        main(['suite', str(write()), '--data', '.', '--work-dir', '.', '--seeds', 'all'])
    assert "'all' is no list of seeds" in capsys.readouterr().err


def test_a_row_brings_columns_that_earlier_rows_lack(tmp_path):
    path = tmp_path / 'results' / 'camvid.csv'
    common = dict.fromkeys(COLUMNS, '1')
    append_row(path, common | dict(method='Jaccard, power 0.5', mIoU=50.5))
    append_row(path, common | {'method': 'focal', 'mIoU': 49.0, 'IoU.road': 90.0})
    assert read_rows(path) == [
        common | {'method': 'Jaccard, power 0.5', 'mIoU': '50.5', 'IoU.road': ''},
        common | {'method': 'focal', 'mIoU': '49.0', 'IoU.road': '90.0'},
    ]
    assert read_rows(tmp_path / 'none.csv') == []


def test_cores_are_shared_by_the_jobs(monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    monkeypatch.setattr('mmseg_imbalance.hardware.cores', lambda: 8)
    assert [slot.environment for slot in make_slots(None)] == [dict(OMP_NUM_THREADS='1')] * 8
    assert [slot.environment for slot in make_slots(2)] == [dict(OMP_NUM_THREADS='4')] * 2
    assert make_slots(2)[0].hardware == f'{cpu_name()}, 4 cores'


@pytest.mark.parametrize(
    ('visible', 'gpus'),
    [(None, ['0', '1', '0', '1']), ('4,5', ['4', '5', '4', '5']), ('', ['0', '1', '0', '1'])],
)
def test_gpus_are_shared_by_the_jobs_and_are_those_that_the_user_has(monkeypatch, visible, gpus):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setattr('torch.cuda.get_device_name', lambda number: f'GPU of kind {number}')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert [slot.environment['CUDA_VISIBLE_DEVICES'] for slot in make_slots(4)] == gpus
    assert [slot.hardware for slot in make_slots(None)] == ['GPU of kind 0', 'GPU of kind 1']


def test_a_number_of_jobs_below_1_is_refused(write, capsys):
    for jobs in ('0', '-1', 'two'):
        with pytest.raises(SystemExit):
            main(['suite', str(write()), '--data', '.', '--work-dir', '.', '--jobs', jobs])
        assert 'is no number of jobs' in capsys.readouterr().err


def test_a_work_dir_is_of_one_suite_at_a_time(write, tmp_path, capsys):
    with locked(tmp_path), pytest.raises(SystemExit):
        main(['suite', str(write()), '--data', '.', '--work-dir', str(tmp_path)])
    assert 'another suite runs in' in capsys.readouterr().err


def test_rows_in_the_work_dir_itself_are_refused_as_its_lock_would_wait_for_itself(write, tmp_path, capsys):
    folder = str(tmp_path)
    with pytest.raises(SystemExit):
        main(['suite', str(write()), '--data', '.', '--work-dir', folder, '--results', f'{folder}/x/..'])
    assert 'are the same folder' in capsys.readouterr().err


def test_rows_of_several_processes_are_all_there(tmp_path):
    code = (
        'import sys; from pathlib import Path; from mmseg_imbalance.suite import COLUMNS, append_row\n'
        'for n in range(20): append_row(Path(sys.argv[1]), dict.fromkeys(COLUMNS, n) | {sys.argv[2]: n})'
    )
    path = tmp_path / 'rows.csv'
    writers = [subprocess.Popen([sys.executable, '-c', code, path, name]) for name in 'ab']
    assert [writer.wait(120) for writer in writers] == [0, 0]
    rows = read_rows(path)
    for name in 'ab':
        assert sorted(int(row[name]) for row in rows if row[name]) == list(range(20))


def test_a_training_that_was_ended_in_its_last_evaluation_goes_back_one_checkpoint(tmp_path):
    for step in (100, 200):
        (tmp_path / f'iter_{step}.pth').write_text('')
    log = tmp_path / 'session' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('{"mIoU": 10.0, "step": 100}\n{"mIoU": 2')  # cut off by the kill
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_200.pth'))
    prepare_resume(tmp_path, 300)
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_200.pth')
    prepare_resume(tmp_path, 200)
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_100.pth')
    assert not (tmp_path / 'iter_200.pth').exists()
    prepare_resume(tmp_path, 100)  # evaluated
    assert (tmp_path / 'iter_100.pth').exists()
    assert evaluations(tmp_path) == {100: 10.0}


def test_a_training_whose_folder_was_moved_is_resumed(tmp_path):
    (tmp_path / 'iter_100.pth').touch()
    (tmp_path / 'last_checkpoint').write_text('/where/it/was/iter_100.pth')
    prepare_resume(tmp_path, 300)
    assert find_latest_checkpoint(str(tmp_path)) == str(tmp_path / 'iter_100.pth')


def test_a_training_whose_last_checkpoint_was_removed_goes_on_from_an_earlier_one_or_begins_anew(tmp_path):
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_300.pth'))
    for step in (200, 100):  # the newer file is the one that was written later
        (tmp_path / f'iter_{step}.pth').touch()
        os.utime(tmp_path / f'iter_{step}.pth', (step, step))
    prepare_resume(tmp_path, 300)
    assert find_latest_checkpoint(str(tmp_path)) == str(tmp_path / 'iter_200.pth')
    for step in (200, 100):
        (tmp_path / f'iter_{step}.pth').unlink()
    prepare_resume(tmp_path, 300)
    assert not (tmp_path / 'last_checkpoint').exists()


def test_evaluations_of_an_evaluator_with_a_prefix_are_found(tmp_path):
    log = tmp_path / 'session' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('{"mIoU": 1.0, "ours/mIoU": 10.0, "ours/IoU.sky": 10.0, "step": 100}\n')
    assert evaluations(tmp_path) == {100: 10.0}


def test_the_commit_says_where_files_differ_from_it(tmp_path):
    def git(*arguments):
        subprocess.run(['git', '-C', tmp_path, *arguments], check=True, capture_output=True)

    assert commit_of(tmp_path) == ''
    git('init')
    (tmp_path / 'file').write_text('one')
    git('add', 'file')
    git('-c', 'user.name=n', '-c', 'user.email=e', 'commit', '-m', 'one')
    clean = commit_of(tmp_path)
    assert len(clean) == 7
    (tmp_path / 'file').write_text('two')
    assert commit_of(tmp_path) == f'{clean}+'


@pytest.fixture
def quick(write, camvid, tmp_path):
    """The command line of a suite of small runs, of two and of twelve iterations."""
    text = SUITE.replace('long=4', 'long=12').replace('seeds=2', 'seeds=1')
    small = dict(train_dataloader=dict(batch_size=2), model=dict(backbone=dict(pretrained=False)))
    text += f"""
small = {small!r}
small['default_hooks'] = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
methods['cross-entropy'] = small
methods['combined, auto'] = {{**small, **methods['combined, auto']}}
methods['combined, auto']['model'] = {{**small['model'], **methods['combined, auto']['model']}}
methods['combined + bias'] = dict(fit_bias='combined, auto')
"""
    data = tmp_path / 'data'
    data.mkdir()
    (data / 'camvid').symlink_to(camvid)
    work_dir = tmp_path / 'runs'
    command = ['-m', 'mmseg_imbalance', 'suite', write(text), '--data', data, '--work-dir', work_dir]
    return [sys.executable, *map(str, command), '--jobs', '1'], work_dir


@pytest.mark.slow
def test_a_suite_that_is_killed_goes_on_where_it_was_and_finished_runs_are_skipped(quick):
    command, work_dir = quick
    rows = work_dir / 'results' / 'camvid.csv'
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    folder = work_dir / 'camvid/long/combined-auto/seed0'
    deadline = time.monotonic() + 300
    while not (folder / 'last_checkpoint').exists():  # written when a checkpoint is whole
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(read_rows(rows)) == 3

    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '4 runs, 3 of them finished before' in done.stdout
    assert 'resumed epoch: 0' in (folder / 'output.txt').read_text()
    with open(rows) as file:
        found = list(csv.DictReader(file))
    assert [(row['schedule'], row['method'], row['seed'], row['iterations']) for row in found] == [
        ('short', 'cross-entropy', '0', '2'),
        ('short', 'combined, auto', '0', '2'),
        ('short', 'combined + bias', '0', '2'),
        ('long', 'combined, auto', '0', '12'),
    ]
    corrected = found.pop(2)
    assert corrected['config'] == f'{found[1]["config"]}+bias'
    assert 0 <= float(corrected['mIoU']) <= 100
    assert corrected['mIoU'] != found[1]['mIoU']
    assert corrected['Pixels.pole'] == found[1]['Pixels.pole']
    for row in found:
        assert 0 <= float(row['mIoU']) <= 100
        assert 0 <= float(row['IoU.pole']) <= 100
        assert row['curve'] == f'{row["iterations"]}:{row["mIoU"]}'
        assert row['hardware']
        assert float(row['minutes']) >= 0  # two iterations may be less than a hundredth
    assert float(found[-1]['minutes']) > 0

    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert '4 runs, 4 of them finished before' in again.stdout
    assert len(read_rows(rows)) == 4


def wait_for_a_training(work_dir):
    deadline = time.monotonic() + 300
    # not empty: the training itself has written to it
    while not any(output.stat().st_size for output in work_dir.glob('camvid/*/*/*/output.txt')):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_suite_that_is_ended_leaves_no_training_behind(quick):
    command, work_dir = quick
    process = subprocess.Popen(command, cwd=REPOSITORY)
    wait_for_a_training(work_dir)
    process.terminate()
    assert process.wait(60) == 143
    with locked(work_dir, wait=False):  # which a training would hold, see the next test
        pass


@pytest.mark.slow
def test_a_training_that_a_killed_suite_leaves_behind_keeps_the_work_dir(quick):
    command, work_dir = quick
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    try:
        wait_for_a_training(work_dir)
        process.kill()
        process.wait()
        with pytest.raises(BlockingIOError), locked(work_dir, wait=False):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_runs_train_side_by_side_but_no_model_twice_and_the_end_is_estimated(
    write, tmp_path, monkeypatch, capsys
):
    text = SUITE.replace(
        "'cross-entropy': dict(),", "'cross-entropy': dict(), 'CE + bias': dict(fit_bias='cross-entropy'),"
    )
    (tmp_path / 'data' / 'camvid').mkdir(parents=True)
    now, running, together = [0.0], [], []

    class Process:
        """A command of a minute."""

        def __init__(self, command, **options):
            self.until, self.returncode = now[0] + 60, None
            self.work_dir = (
                Path(command[command.index('--work-dir') + 1]) if '--work-dir' in command else None
            )
            running.append(self)
            together.append([each.work_dir for each in running])

        def poll(self):
            if now[0] >= self.until and self.returncode is None:
                self.returncode = 0
                running.remove(self)
            return self.returncode

    monkeypatch.setattr('mmseg_imbalance.suite.commit_of', lambda _: 'abc1234')
    monkeypatch.setattr('mmseg_imbalance.commands.suite.subprocess.Popen', Process)
    monkeypatch.setattr('mmseg_imbalance.commands.suite.time.sleep', lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr('mmseg_imbalance.commands.suite.time.monotonic', lambda: now[0])
    run = SimpleNamespace(complete=True, metrics=dict(mIoU=50.0), seconds=60, class_pixels={})
    monkeypatch.setattr('mmseg_imbalance.reports.work_dirs.read_run', lambda folder: run)
    options = dict(data=tmp_path / 'data', work_dir=tmp_path / 'runs', results=tmp_path / 'rows')
    args = SimpleNamespace(suite=str(write(text)), jobs=2, seeds=None, only=None, **options)
    assert Execution(args, None).all() == 0

    rows = read_rows(tmp_path / 'rows' / 'camvid.csv')
    assert len({(row['schedule'], row['method'], row['seed']) for row in rows}) == len(rows) == 7
    assert {len(folders) for folders in together} == {1, 2}
    trained = [[folder for folder in folders if folder] for folders in together]
    assert all(len(folders) == len(set(folders)) for folders in trained)
    ends = [line for line in capsys.readouterr().out.splitlines() if 'the rest takes' in line]
    # two minutes of one slot are 4 of the 12 iterations; the second end is at the same time as the first
    assert [line.rpartition('the rest takes ')[2] for line in (*ends[:2], ends[-1])] == [
        '5 minutes',
        '2 minutes',
        '0 minutes',
    ]


def test_a_row_that_cannot_be_added_ends_no_other_training(tmp_path, capsys):
    folder, results = write_run(tmp_path / 'run'), tmp_path / 'results'
    results.mkdir()
    (results / 'camvid.csv').write_text(f'{",".join(COLUMNS)}\nsuite,camvid\n')  # cut off
    run = SuiteRun('suite', 'camvid', 'short', 'focal', 0)
    execution = SimpleNamespace(
        failed=0,
        left=20,
        trained=0,
        results=results,
        prints={run: 'config'},
        suite=SimpleNamespace(iterations=lambda _: 20),
        iterations=lambda _: 20,
        folder=lambda _: folder,
    )
    ended = SimpleNamespace(returncode=0)
    slot = SimpleNamespace(run=run, process=ended, commit='abc1234', hardware='a core', started=0.0)
    Execution.end(execution, slot)
    assert (execution.failed, execution.trained, slot.process) == (1, 0, None)
    output = capsys.readouterr().out
    assert 'its row could not be added' in output
    assert 'camvid.csv, line 2: no row of mmseg-imbalance suite: it has fewer cells' in output


def test_no_run_and_no_data_are_errors_that_say_what_there_is(write, tmp_path, capsys):
    for arguments, words in (
        (['--only', 'kitti/*'], "no run is asked for; those of .* are ['camvid/short/cross-entropy'"),
        (['--only', 'camvid/*'], f'no folder {tmp_path / "none" / "camvid"}; --data holds one per data set'),
    ):
        with pytest.raises(SystemExit):
            main(
                [
                    'suite',
                    str(write()),
                    '--data',
                    str(tmp_path / 'none'),
                    '--work-dir',
                    str(tmp_path),
                    *arguments,
                ]
            )
        error = capsys.readouterr().err
        assert all(part in error for part in words.split('.*'))


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(quick):
    command, work_dir = quick
    suite = Path(command[command.index('suite') + 1])
    broken = "methods['cross-entropy']['optim_wrapper'] = dict(optimizer=dict(lr=-1.0))"
    suite.write_text(f'{suite.read_text()}\n{broken}')
    done = subprocess.run([*command, '--only', '*/short/*'], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'camvid/short/cross-entropy/seed0 failed, status 1' in done.stdout
    assert 'Invalid learning rate' in (work_dir / 'camvid/short/cross-entropy/seed0/output.txt').read_text()
    methods = [row['method'] for row in read_rows(work_dir / 'results' / 'camvid.csv')]
    assert methods == ['combined, auto', 'combined + bias']
