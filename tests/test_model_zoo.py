"""The model-zoo pages hold what their metafiles hold, and these what was measured or quoted."""

import re
import shutil

import pytest
import yaml
from conftest import REPOSITORY
from test_comparison import write_run

from mmseg_imbalance.commands.compare import main
from mmseg_imbalance.reports.comparison import compare
from mmseg_imbalance.reports.model_zoo import dataset_of, write_entries, write_page

FAMILIES = sorted(path.parent for path in (REPOSITORY / 'configs').glob('[!_]*/metafile.yaml'))
ENTRIES = [entry for f in FAMILIES for entry in yaml.safe_load((f / 'metafile.yaml').read_text())['Models']]


def test_every_family_has_a_metafile():
    folders = {path for path in (REPOSITORY / 'configs').glob('[!_]*') if path.is_dir()}
    # whose results are the rows of suites, docs/results
    assert sorted(folders - {REPOSITORY / 'configs' / 'experiments'}) == FAMILIES


@pytest.mark.parametrize('family', FAMILIES, ids=lambda path: path.name)
def test_the_page_is_what_the_metafile_gives(family, tmp_path):
    copy = shutil.copytree(family, tmp_path / family.name)
    assert write_page(copy).read_text() == (family / 'README.md').read_text(), 'run mmseg-imbalance model-zoo'


@pytest.mark.parametrize('entry', ENTRIES, ids=lambda entry: entry['Name'])
def test_every_number_says_where_it_is_from(entry):
    assert (REPOSITORY / entry['Config']).exists()
    assert entry['Config'].endswith(f'/{entry["Name"]}.py')
    if 'Quoted From' in entry:
        assert entry['Quoted From']['URL'].startswith('https://')
    else:
        assert entry['Metadata']['Seeds']
        assert entry['Metadata']['Training Resources']


@pytest.fixture
def configs(tmp_path):
    """A folder of configs with two of one family, and runs of both, carried out as they say."""
    dirs = []
    for loss in ('CE', 'Dice'):
        name = f'net_small-{loss.lower()}_camvid-240x180'
        run = write_run(tmp_path / loss, loss, name=name)
        family = tmp_path / 'configs' / 'net'
        family.mkdir(parents=True, exist_ok=True)
        text = (run / '20260101_000000' / 'vis_data' / 'config.py').read_text()
        (family / f'{name}.py').write_text(text.replace('seed=0', 'seed=None').replace(str(run), 'other'))
        dirs.append(run)
    return tmp_path / 'configs', dirs


def test_results_become_entries_and_a_page(configs):
    folder, dirs = configs
    comparison = compare(dirs)
    written = write_entries(comparison, folder)
    assert [path.name for path in written] == ['metafile.yaml', 'README.md']
    metafile = yaml.safe_load((folder / 'net' / 'metafile.yaml').read_text())
    assert [entry['Name'] for entry in metafile['Models']] == sorted(
        group.name for group in comparison.groups
    )
    for entry, group in zip(metafile['Models'], comparison.groups, strict=True):
        assert entry['Results']['Dataset'] == 'CamVid'
        assert entry['Results']['Metrics']['IoU.pole'] == round(group.estimates['pole'].mean, 2)
        assert entry['Metadata'] | dict(Seeds=['0'], Iterations=20) == entry['Metadata']
        assert entry['Metadata']['Memory (GB)'] == 2.0
    page = (folder / 'net' / 'README.md').read_text()
    numbers = {f'{value:.2f}' for e in metafile['Models'] for value in e['Results']['Metrics'].values()}
    assert set(re.findall(r'\d+\.\d\d', page)) <= numbers | {'2.0'}
    assert 'Not measured' not in page
    assert page.count('| [net_small-ce_camvid-240x180](net_small-ce_camvid-240x180.py) |') == 2

    # again: replaced, not added
    write_entries(comparison, folder)
    assert yaml.safe_load((folder / 'net' / 'metafile.yaml').read_text()) == metafile


def test_a_run_that_departs_from_its_config_is_no_result_of_it(configs):
    folder, dirs = configs
    config = folder / 'net' / 'net_small-ce_camvid-240x180.py'
    config.write_text(config.read_text().replace('max_iters=20', 'max_iters=80'))
    with pytest.raises(ValueError, match=r'train_cfg\.max_iters=20 for 80'):
        write_entries(compare(dirs), folder)
    assert not (folder / 'net' / 'metafile.yaml').exists()


def test_a_cleaned_test_and_one_before_the_end_are_no_results(configs, tmp_path):
    folder, _ = configs
    hook = "custom_hooks = [dict(type='DecisionHook', rule='rankseg-iou', remove_small=50)]\n"
    cleaned = write_run(tmp_path / 'cleaned', name='net_small-ce_camvid-240x180', extra=hook)
    with pytest.raises(ValueError, match='remove_small=50'):
        write_entries(compare([cleaned]), folder)
    early = write_run(tmp_path / 'early', name='net_small-ce_camvid-240x180')
    text = next(early.glob('test/*/vis_data/config.py'))
    text.write_text(text.read_text().replace('iter_20', 'iter_10'))
    with pytest.raises(ValueError, match=r'iter_10\.pth for that at the end'):
        write_entries(compare([early]), folder)


def test_other_gpus_than_the_name_says_are_no_result(configs, tmp_path):
    folder, _ = configs
    config = folder / 'net' / 'net_8xb8-20_camvid-240x180.py'
    config.write_text((folder / 'net' / 'net_small-ce_camvid-240x180.py').read_text())
    run = write_run(tmp_path / 'two', name=config.stem)
    with pytest.raises(ValueError, match='a batch of 16 for 8 x 8'):
        write_entries(compare([run]), folder)


def test_a_run_of_no_config_here_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(write_run(tmp_path / 'a')), '--metafile'])
    assert 'there is no' in capsys.readouterr().err


def test_the_data_set_is_the_last_field_of_a_name():
    assert dataset_of('deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024') == 'Cityscapes'
    assert dataset_of('a_b_longtail-cityscapes-256x128') == 'longtail-cityscapes'
