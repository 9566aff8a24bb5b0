"""The page of the results of suites: its numbers by hand, and what it may claim."""

import csv
import math
import re
import shutil
from io import BytesIO

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image
from scipy import stats

from mmseg_imbalance.commands.results import main
from mmseg_imbalance.reports.results import mean_and_half, read_results
from mmseg_imbalance.reports.results_page import plots, results_page, write_results
from mmseg_imbalance.suite import COLUMNS, append_row, read_rows

SEEDS = range(4)
BASE = [50.0, 52.0, 51.0, 49.0]
COMMITTED = REPOSITORY / 'docs' / 'results'


def row(method, seed, miou, tail, **more):
    return dict(
        suite='suite',
        dataset='camvid',
        schedule='converged',
        method=method,
        seed=seed,
        iterations=2000,
        commit='abc1234',
        hardware='a core',
        minutes=30.0,
        config=method,
        curve=f'500:{miou - 9} 1000:{miou - 3} 2000:{miou}',
    ) | {
        'mIoU': miou,
        'mIoU.tail': tail,
        'mIoU.body': 60.0 + seed,
        'mIoU.head': 90.0,
        'IoU.road': 90.0,
        'IoU.pole': tail,
        **more,
    }


def runs(method, mious, tails, **more):
    pairs = zip(mious, tails, strict=True)
    return [row(method, seed, miou, tail, **more) for seed, (miou, tail) in enumerate(pairs)]


def shifted(values, differences):
    return [round(value + d, 2) for value, d in zip(values, differences, strict=True)]


TAILS = [30.0, 31.0, 29.0, 33.0]
ROWS = [
    *runs('cross-entropy', BASE, TAILS),
    *runs('good', shifted(BASE, [5.0, 5.1, 4.9, 5.0]), shifted(TAILS, [9.0, 9.2, 9.1, 8.9])),
    *runs('bad', shifted(BASE, [-5.0, -5.1, -4.9, -5.0]), shifted(TAILS, [1.0, -1.0, 2.0, -2.5])),
    *runs('noisy', shifted(BASE, [2.0, 1.0, 3.0, 1.5]), shifted(TAILS, [2.0, -3.0, 1.0, 0.0])),
    row('once', 0, 80.0, 80.0),
]
for each in ROWS[4:8]:  # of good
    each['mIoU.head'] = each['IoU.road'] = 92.0 + each['seed'] / 10

FIRST = ','.join(COLUMNS)
OTHER = ','.join(str(ROWS[0][name]) for name in COLUMNS)


def write_rows(folder, rows, name='camvid'):
    for each in rows:
        append_row(folder / f'{name}.csv', each)
    return folder


@pytest.fixture
def regime(tmp_path):
    [found] = read_results(write_rows(tmp_path, ROWS))
    return found


def tables(page):
    """{(heading, first line of the header): rows of cells}, in order."""
    found, heading, header = {}, '', None
    for line in page.splitlines():
        if line.startswith('#'):
            heading = line.lstrip('# ')
        if not line.startswith('|'):
            header = None
        elif header is None:
            header = (heading, line)
            found[header] = []
        elif not line.startswith('| ---'):
            cells = line.replace('\N{NO-BREAK SPACE}', ' ').strip('|').split(' | ')
            found[header].append([cell.strip() for cell in cells])
    return found


def table(page, heading, column):
    [rows] = [r for (h, header), r in tables(page).items() if h.startswith(heading) and column in header]
    return {cells[0]: cells[1:] for cells in rows}


def test_a_mean_has_the_interval_of_students_t():
    mean, half = mean_and_half(BASE)
    low, high = stats.ttest_1samp(BASE, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    # by hand: standard deviation sqrt(5 / 3), 97.5 % quantile of 3 degrees of freedom 3.18245
    assert (mean, half) == pytest.approx((50.5, 3.182446 * math.sqrt(5 / 3) / 2))


@pytest.mark.parametrize(
    ('values', 'expected'),
    [([], math.nan), ([math.nan], math.nan), ([3.0], 3.0), ([0.0, 0.0], 0.0), ([3.0, math.nan], 3.0)],
)
def test_where_nothing_tells_the_noise_a_mean_has_no_interval(values, expected):
    assert mean_and_half(values) == pytest.approx((expected, None), nan_ok=True)


def test_the_table_of_means_is_over_seeds(regime):
    page = results_page([regime], 'results')
    means = table(page, 'camvid, converged', 'method | seeds | mIoU | tail | body')
    assert list(means) == ['cross-entropy', 'once', 'good', 'noisy', 'bad']  # by the difference in mIoU
    assert means['cross-entropy'] == ['4', '50.50 ± 2.05', '30.75 ± 2.72', '61.50 ± 2.05', '90.00']
    assert means['once'] == ['1', '80.00', '80.00', '60.00', '90.00']


def test_differences_are_paired_and_corrected_over_mIoU_and_tail(regime):
    differences = table(results_page([regime], 'results'), 'camvid, converged', '| p |')
    p = []
    for metric, base in (('mIoU', BASE), ('mIoU.tail', TAILS)):
        for method in ('good', 'noisy', 'bad'):
            ours = [float(r[metric]) for r in ROWS if r['method'] == method]
            p.append((stats.ttest_rel(ours, base).pvalue, metric, method))
    corrected, highest = {}, 0.0
    for rank, (value, metric, method) in enumerate(sorted(p)):  # Holm, of six tests
        highest = max(highest, min(1.0, value * (6 - rank)))
        corrected[metric, method] = highest
    for method in ('good', 'noisy', 'bad'):
        for metric, at in (('mIoU', 2), ('mIoU.tail', 4)):
            expected = corrected[metric, method]
            shown = '< 0.001' if expected < 0.001 else f'{expected:.3f}'
            assert differences[method][at] == shown
            assert regime.tests[metric][method].holm == pytest.approx(expected)
    good = stats.ttest_1samp([5.0, 5.1, 4.9, 5.0], 0).confidence_interval(0.95)
    assert differences['good'][:2] == ['4', f'**+5.00** ({good.low:+.2f}, {good.high:+.2f})']
    assert differences['good'][-1].startswith('+2.15 (')  # not bold: head is not tested
    assert regime.tests['mIoU']['noisy'].p < 0.05 < regime.tests['mIoU']['noisy'].holm
    assert differences['once'] == ['1', '+30.00', '-', '+50.00', '-', '+0.00', '+0.00']


def test_claims_are_those_below_5_per_cent_in_both_directions(regime):
    page = results_page([regime], 'results')
    found = {heading: rows for (heading, _), rows in tables(page).items()}
    verdicts = ('Better than cross-entropy', 'Worse than cross-entropy', 'Hints')
    assert [[cells[1] for cells in found[verdict]] for verdict in verdicts] == [['good'], ['bad'], ['noisy']]
    bold = [[cell.startswith('**') for cell in found[verdict][0][3:]] for verdict in verdicts]
    assert bold == [[True, False, True, False], [True, False, False, False], [False] * 4]
    assert '3 of 6 tests are below 0.05' in page


def test_what_is_within_noise_before_the_correction_is_not_proven(tmp_path):
    equal = runs('equal', shifted(BASE, [1.0, -1.1, 0.9, -1.0]), shifted(TAILS, [2.0, -2.2, 1.8, -1.9]))
    page = results_page(read_results(write_rows(tmp_path, ROWS[:4] + equal)), 'results')
    found = {heading: rows for (heading, _), rows in tables(page).items()}
    assert [cells[1] for cells in found['Not beyond noise']] == ['equal']
    assert page.count('None.') == 3


def test_a_method_that_gains_tail_and_loses_mIoU_is_on_both_sides(tmp_path):
    mixed = runs('mixed', shifted(BASE, [-5.0, -5.1, -4.9, -5.0]), shifted(TAILS, [9.0, 9.2, 9.1, 8.9]))
    page = results_page(read_results(write_rows(tmp_path, ROWS[:4] + mixed)), 'results')
    found = {heading: rows for (heading, _), rows in tables(page).items()}
    assert found['Better than cross-entropy'] == found['Worse than cross-entropy']
    assert found['Better than cross-entropy'][0][1] == 'mixed'


def test_one_seed_is_shown_and_nothing_is_claimed_from_it(tmp_path):
    rows = [row('cross-entropy', 0, 5.0, 5.0), row('ours', 0, 90.0, 90.0)]
    page = results_page(read_results(write_rows(tmp_path, rows)), 'results')
    assert '0 of 0 tests' in page
    means = table(page, 'camvid, converged', 'method | seeds | mIoU | tail | body')
    assert list(means) == ['cross-entropy', 'ours']
    assert 'at most one seed in common: ours (camvid, converged)' in page
    assert '**+' not in page
    assert page.count('None.') == 4


def test_only_common_seeds_are_paired_and_the_rest_is_named(tmp_path):
    rows = [r for r in ROWS if (r['method'], r['seed']) not in {('cross-entropy', 1), ('good', 3)}]
    [regime] = read_results(write_rows(tmp_path, rows))
    assert regime.tests['mIoU']['good'].seeds == [0, 2]
    assert regime.tests['mIoU']['good'].mean == pytest.approx((5.0 + 4.9) / 2)
    page = results_page([regime], 'results')
    assert '- good: no cross-entropy of seed 1, which is not in the differences.' in page
    assert table(page, 'camvid, converged', '| p |')['good'][0] == '2'
    assert table(page, 'camvid, converged', 'method | seeds | mIoU | tail | body')['good'][0] == '3'


def test_numbers_that_are_not_there_are_dashes(tmp_path):
    rows = [{k: v for k, v in r.items() if k != 'mIoU.body'} for r in ROWS]
    rows[4] |= {'mIoU.tail': math.nan}  # of good
    for each in rows[8:12]:  # of bad
        each['mIoU.tail'] = ''
    [regime] = read_results(write_rows(tmp_path, rows))
    page = results_page([regime], 'results')
    means = table(page, 'camvid, converged', 'method | seeds | mIoU | tail | body')
    assert means['bad'][2:4] == ['-', '-']
    assert means['good'][2].endswith(' (3 seeds)')
    assert table(page, 'camvid, converged', '| p |')['bad'][3:5] == ['-', '-']
    assert regime.tests['mIoU.tail']['good'].seeds == [1, 2, 3]
    assert 'nan' not in page


def test_the_same_rows_in_another_order_give_the_same_page(tmp_path):
    rows = [*ROWS, *(r | dict(schedule='short', iterations=500) for r in ROWS)]
    pages = set()
    for number in range(4):
        mixed = [rows[at] for at in np.random.default_rng(number).permutation(len(rows))]
        folder = write_rows(tmp_path / str(number), mixed)
        pages.add(results_page(read_results(folder), 'results'))
    [page] = pages
    headings = re.findall('^## (.*)', page, re.M)
    assert headings[-2:] == ['camvid, converged: 2,000 iterations', 'camvid, short: 500 iterations']
    assert f'**{2 * len(ROWS)} runs, {len(ROWS):.1f} hours of training**' in page  # half an hour each
    fitted = [row | dict(config=f'{row["config"]}+bias') for row in ROWS]
    page = results_page(read_results(write_rows(tmp_path / 'bias', fitted)), 'results')
    assert f'**{len(ROWS)} runs, 0.0 hours of training**' in page  # another method has trained these


def test_rows_of_another_commit_length_or_machine_are_named(tmp_path):
    rows = [r | dict(commit='def5678+') if r['method'] == 'good' else r for r in ROWS]
    rows[0] = rows[0] | dict(hardware='a GPU', iterations=1000)
    page = results_page(read_results(write_rows(tmp_path, rows)), 'results')
    assert (
        'Rows of different commits stand beside each other: '
        'abc1234 (cross-entropy; once; noisy; bad); def5678+ (good).'
    ) in page
    assert 'Files differed from the commit where it has a +: def5678+.' in page
    assert 'Rows of different length stand beside each other: 1000 (cross-entropy seed 0); 2000' in page
    assert 'different hardware: a GPU (cross-entropy seed 0); a core (cross-entropy seed 1, 2, 3; ' in page
    same = results_page(read_results(write_rows(tmp_path / 'same', ROWS)), 'results')
    assert 'different' not in same


def test_commits_that_differ_by_seed_alone_are_named_by_seed(tmp_path):
    rows = [r | dict(commit='def5678') if r['seed'] == 3 else r for r in ROWS if r['method'] != 'once']
    page = results_page(read_results(write_rows(tmp_path, rows)), 'results')
    assert 'beside each other: abc1234 (seed 0, 1, 2); def5678 (seed 3).' in page


def test_of_two_rows_of_a_run_the_last_counts(tmp_path):
    again = row('good', 0, 70.0, 70.0, config='other')
    [regime] = read_results(write_rows(tmp_path, [*ROWS, again]))
    assert regime.values('mIoU')['good'][0] == 70
    assert 'good, seed 0: there is an older row, with another config; the last counts' in regime.notes


def test_a_comparison_without_the_baseline_has_means_alone(tmp_path):
    write_rows(tmp_path, [r for r in ROWS if r['method'] != 'cross-entropy'])
    write_rows(tmp_path, [r | dict(dataset='other') for r in ROWS], 'other')
    first, second = read_results(tmp_path)
    assert first.tests == {}
    assert second.tests
    page = results_page([first, second], 'results')
    assert 'There is no run of cross-entropy here, so that nothing is compared' in page
    assert [plot.file for plot in plots(first)] == ['suite-camvid-converged-curve.png']


def test_classes_are_in_the_order_of_their_frequency_which_any_row_of_the_data_set_tells(tmp_path):
    known = {'Pixels.road': 100, 'Pixels.pole': 900, 'Pixels.sky': 50, 'IoU.sky': 1.0}
    thirds = dict(
        zip(('mIoU.head', 'mIoU.body', 'mIoU.tail'), ('IoU.pole', 'IoU.road', 'IoU.sky'), strict=True)
    )
    short = [r | dict(schedule='short', iterations=500) | known for r in ROWS]
    rows = [r | {part: (r | known)[name] for part, name in thirds.items()} for r in (*ROWS, *short)]
    converged, _ = read_results(write_rows(tmp_path, rows))
    assert converged.schedule == 'converged'
    assert converged.classes == ['pole', 'road', 'sky']
    page = results_page([converged], 'results')
    assert '- head: pole\n- body: road\n- tail: sky\n' in page
    assert 'most frequent class first' in page


def test_two_classes_are_a_head_and_a_tail(tmp_path):
    rows = [r | {'Pixels.road': 900, 'Pixels.pole': 100} for r in ROWS]
    regimes = read_results(write_rows(tmp_path / 'results', rows))
    assert '- head: road\n- tail: pole\n\n' in results_page(regimes, 'results')
    write_results(regimes, tmp_path / 'results')


def test_a_file_that_a_spreadsheet_has_saved_is_read_as_before(tmp_path):
    path = next(write_rows(tmp_path, ROWS).glob('*.csv'))
    before = read_rows(path)
    text = path.read_text(encoding='utf-8')
    empty = ',' * text.splitlines()[0].count(',')
    path.write_text('\ufeff' + f'{text}{empty}\n'.replace('\n', '\r\n'), encoding='utf-8', newline='')
    assert read_rows(path) == before


def test_plots_of_names_that_differ_by_other_characters_alone_lie_side_by_side(tmp_path):
    both = [r | dict(schedule=name) for name in ('lr+', 'lr-', '短い', '長い') for r in ROWS]
    regimes = read_results(write_rows(tmp_path / 'results', both))
    files = [plot.file for regime in regimes for plot in plots(regime)]
    assert len(files) == len(set(files)) == 12
    assert sum(file.startswith('suite-camvid-lr--') for file in files) == 6


def test_groups_that_are_no_thirds_are_not_called_thirds(tmp_path):
    pixels = {'Pixels.road': 1000, 'Pixels.pole': 10}
    thirds = [r | pixels | {'mIoU.head': r['IoU.road'], 'mIoU.tail': r['IoU.pole']} for r in ROWS]
    swapped = [r | {'mIoU.head': r['IoU.pole'], 'mIoU.tail': r['IoU.road']} for r in thirds]
    note = 'Head, body and tail are the groups that the metric was given, not thirds'
    for name, rows, own in (('thirds', thirds, False), ('swapped', swapped, True)):
        regimes = read_results(write_rows(tmp_path / name, rows))
        page = results_page(regimes, name)
        assert (note in page) == own
        assert ('- tail: pole' in page) == (not own)
        for plot in plots(regimes[0]):
            plot.draw(regimes[0])


def test_a_class_that_no_label_holds_makes_no_other_groups(tmp_path):
    names = 'abcdef'
    pixels = {f'Pixels.{name}': 10 ** (7 - at) for at, name in enumerate(names)}
    ious = {f'IoU.{name}': 90.0 - 10 * at for at, name in enumerate(names)} | {'IoU.d': 0.0}
    means = {'mIoU.head': 85.0, 'mIoU.body': 70.0, 'mIoU.tail': 45.0}  # d is predicted, but in no label
    rows = [{k: v for k, v in r.items() if k[:4] != 'IoU.'} | pixels | ious | means for r in ROWS]
    [regime] = read_results(write_rows(tmp_path, rows))
    assert regime.parts == dict(head=['a', 'b'], body=['c', 'd'], tail=['e', 'f'])
    assert not any('groups' in note for note in regime.notes)


def test_a_class_that_no_label_holds_is_left_out_of_the_means_of_all_runs(tmp_path):
    """Where it is predicted it has an IoU of 0, else none: no difference of the methods."""
    pixels = {f'Pixels.{name}': n for name, n in dict(road=900, car=60, pole=30, rider=10).items()}
    rows = []
    for seed, noise in enumerate((0.0, 1.0, 2.0)):
        ious = {'IoU.road': 90.0, 'IoU.car': 60.0 + noise, 'IoU.pole': 30.0}
        tail = {'mIoU.head': 75.0 + noise / 2, 'mIoU.body': 30.0}
        rows.append(row('cross-entropy', seed, 60 + noise / 3, math.nan, **pixels, **ious, **tail))
        ious['IoU.pole'] += 3 + noise / 2
        tail['mIoU.body'] = ious['IoU.pole']
        miou = (90 + 60 + noise + ious['IoU.pole'] + 0) / 4
        rows.append(row('lonely', seed, miou, 0.0, **pixels, **ious, **tail))
    for each in rows:
        each['IoU.rider'] = each['mIoU.tail']
    (regime,) = read_results(write_rows(tmp_path, rows))
    assert regime.differences('mIoU')['lonely'].mean == pytest.approx((3 + 3.5 + 4) / 3 / 3, abs=0.01)
    assert regime.differences('mIoU.body')['lonely'].mean == pytest.approx(3.5)
    assert math.isnan(regime.differences('mIoU.tail')['lonely'].mean)
    (note,) = [note for note in regime.notes if 'rider' in note]
    assert note.startswith('Left out of the means: rider')
    assert not any('curve' in plot.file for plot in plots(regime))
    bare = [{k: v for k, v in each.items() if k != 'mIoU.tail'} for each in rows]
    (regime,) = read_results(write_rows(tmp_path / 'bare', bare))
    assert all(test.p is None for test in regime.tests['mIoU.tail'].values())
    own = [{k: v for k, v in each.items() if k[:7] != 'Pixels.'} for each in rows]
    (regime,) = read_results(write_rows(tmp_path / 'groups', own))
    assert any(note.startswith('Left out of mIoU, not of the groups: rider') for note in regime.notes)
    assert regime.differences('mIoU')['lonely'].mean == pytest.approx((3 + 3.5 + 4) / 3 / 3, abs=0.01)


def test_rows_of_other_labels_are_named(tmp_path):
    rows = [r | {'Pixels.road': 1000, 'Pixels.pole': 10} for r in ROWS]
    [regime] = read_results(write_rows(tmp_path / 'same', rows))
    assert 'different labels' not in results_page([regime], 'same')
    rows[1]['Pixels.pole'] = 20
    [regime] = read_results(write_rows(tmp_path / 'other', rows))
    note = 'The runs were trained on different labels; pixels of pole: 10 ('
    assert note in results_page([regime], 'other')
    [regime] = read_results(write_rows(tmp_path / 'unknown', [*ROWS[:-1], rows[-1]]))
    assert 'different labels' not in results_page([regime], 'unknown')


def test_without_frequencies_classes_are_in_the_order_of_the_data_set(regime):
    assert regime.classes == ['road', 'pole']
    assert 'in the order of the data set' in results_page([regime], 'results')


def test_names_are_plain_text_in_markdown(tmp_path):
    rows = [r | dict(method='a|b *c* $d$') if r['method'] == 'good' else r for r in ROWS]
    regimes = read_results(write_rows(tmp_path / 'results', rows))
    assert r'| a\|b \*c\* \$d\$ | 4 |' in results_page(regimes, 'results')
    write_results(regimes, tmp_path / 'results')  # no formula in the plots


def test_the_command_writes_the_page_beside_the_rows_and_the_plots_among_them(tmp_path, capsys):
    folder = write_rows(tmp_path / 'results', ROWS)
    assert main([str(folder)]) == 0
    page = (tmp_path / 'results.md').read_text(encoding='utf-8')
    named = re.findall(r'!\[[^]]+\]\(results/([^)]+\.png)\)', page)
    assert named == [f'suite-camvid-converged-{kind}.png' for kind in ('methods', 'classes', 'curve')]
    assert sorted(named) == sorted(path.name for path in folder.glob('*.png'))
    assert capsys.readouterr().out.count('\n') == 4
    for name in named:
        picture = np.asarray(Image.open(folder / name).convert('L'))
        assert min(picture.shape) > 200
        assert picture.std() > 5  # something is drawn


def test_plots_show_the_differences_and_the_curves(regime):
    methods, classes, curves = (plot.draw(regime) for plot in plots(regime))
    for axes, metric in zip(methods.axes, ('mIoU', 'mIoU.tail'), strict=True):
        points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == 'o']
        assert points == [regime.tests[metric][name].mean for name in ('once', 'good', 'noisy', 'bad')]
        filled = [line.get_markerfacecolor() != 'white' for line in axes.lines if line.get_marker() == 'o']
        assert filled == [False, True, False, metric == 'mIoU']
    assert [text.get_text() for text in classes.axes[0].get_yticklabels()] == ['road', 'pole']
    mean = next(line for line in curves.axes[0].lines if line.get_label() == 'cross-entropy')
    assert mean.get_xydata().tolist() == [[500, 41.5], [1000, 47.5], [2000, 50.5]]
    for figure in (methods, classes, curves):
        figure.savefig(BytesIO())


def test_runs_with_one_evaluation_have_no_curve(tmp_path):
    [regime] = read_results(write_rows(tmp_path, [r | dict(curve='2000:50.0') for r in ROWS]))
    assert not [plot for plot in plots(regime) if 'curve' in plot.file]


@pytest.mark.parametrize(
    ('content', 'arguments', 'message'),
    [
        (None, [], 'no rows of a suite in'),
        ('', [], 'no rows of a suite in'),
        (
            'class,pixels\nroad,3\n',
            [],
            "line 2: no row of mmseg-imbalance suite: there are no columns ['su",
        ),
        (
            f'{FIRST},road\n{OTHER},1,2\n',
            [],
            'it has more cells than the first line',
        ),
        (f'{FIRST},road\n{OTHER}\n', [], 'it has fewer cells than the first line'),
        (
            f'{FIRST}\n{OTHER.replace(",0,", ",0.0,", 1)}\n',
            [],
            'invalid literal for int()',
        ),
        (ROWS, ['--baseline', 'plain'], "no row is of the baseline 'plain', but of ['bad', 'cross-entropy',"),
    ],
)
def test_what_cannot_be_used_ends_with_one_clear_error(content, arguments, message, tmp_path, capsys):
    if isinstance(content, str):
        (tmp_path / 'camvid.csv').write_text(content)
    elif content:
        write_rows(tmp_path, content)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), *arguments])
    assert end.value.code == 1
    assert message in capsys.readouterr().err


def test_the_committed_page_is_what_the_committed_rows_give(tmp_path):
    copy = shutil.copytree(COMMITTED, tmp_path / 'results')
    page = results_page(read_results(copy), 'results')
    advice = 'run mmseg-imbalance results docs/results'
    assert page == COMMITTED.with_suffix('.md').read_text(encoding='utf-8'), advice
    assert set(re.findall(r'\(results/([^)]+\.png)\)', page)) == {p.name for p in copy.glob('*.png')}, advice


def test_every_committed_row_says_where_it_is_from():
    for path in COMMITTED.glob('*.csv'):
        with open(path, newline='', encoding='utf-8') as file:
            for each in csv.DictReader(file):
                assert each['commit'], each
                assert each['hardware'], each
                assert float(each['minutes']) > 0, each


def test_seeds_of_other_configs_are_named(tmp_path):
    rows = [r | dict(config='old') if (r['method'], r['seed']) == ('good', 0) else r for r in ROWS]
    (regime,) = read_results(write_rows(tmp_path / 'results', rows))
    assert [note for note in regime.notes if 'not all seeds have the same config' in note] == [
        'good: not all seeds have the same config, so their mean is of different things. Run the suite again '
        'and take old rows out'
    ]
    (plain,) = read_results(write_rows(tmp_path / 'plain', ROWS))
    assert not any('the same config' in note for note in plain.notes)


# rows of the table of docs/what-helps.md by the name of the method in the suite
METHODS = {
    'Jaccard, weights fade': 'Jaccard, fading',
    'combined, weights fade': 'combined, fading',
    'combined, constant weights': 'combined, auto',
    "the same, `'ignore'`": 'combined, auto, present',
    "the same, `'batch'`": 'combined, auto, batch',
    "the same, `balance='gradnorm'`": 'combined, auto, gradnorm',
    'the same, `ce_weight=0.1`, `dice_weight=0.9`': 'combined, auto, Dice 0.9',
    "the same, `balance='uncertainty'`": 'combined, auto, uncertainty',
    'the same, `region_class_weight=None`': 'combined, auto, Dice without weights',
    'the same, weights come late': 'combined, deferred',
    'the same, `RareClassPaste`': 'combined, auto, paste',
    'the same, a fifth in `SimilaritySubclassifiedLoss`': 'combined, auto, similarity',
    'the same, a fifth in `SubclassifiedLoss`': 'combined, auto, clusters',
    'combined, no class weights': 'combined',
    'cross-entropy, constant weights': 'CE, sqrt_inv_freq',
    '`RecallWeightedLoss`': 'CE, recall',
    '`HardnessWeightedLoss`': 'hardness',
    '`SkeletonRecallLoss`': 'skeleton recall',
    'cross-entropy, `RareClassSampler`': 'CE, rare class sampling',
    'cross-entropy, repeat factors': 'CE, repeat factor sampling',
    'cross-entropy, `RareClassPaste`': 'CE, paste',
    'cross-entropy; bias': 'cross-entropy, bias',
    'combined, weights fade; bias': 'combined, fading, bias',
    'combined, constant weights; bias': 'combined, auto, bias',
}
DATA = {'CamVid': 'camvid', 'clothing': 'clothing', 'magn. tile': 'magnetic_tile', 'neu_seg': 'neu_seg'}


def markdown_rows(file, first):
    """The rows of the table of a page whose header begins so, each by the header's cells."""
    lines = (REPOSITORY / file).read_text(encoding='utf-8').splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(f'| {first} |'))
    split = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[start : start + 40]]
    end = next(at for at, cells in enumerate(split) if not cells)
    return [dict(zip(split[0], cells, strict=True)) for cells in split[2:end]]


def regime_of(regimes, data, iterations):
    return next(r for r in regimes if (r.dataset, r.iterations) == (DATA[data], int(iterations)))


def test_the_table_of_what_helps_is_that_of_the_committed_rows():
    regimes = read_results(COMMITTED)
    first, *rows = markdown_rows('docs/what-helps.md', 'method')
    columns = [name for name in first if name.rpartition(' ')[0] in DATA]
    assert len(columns) == len(regimes)
    shown = {row['method']: [row[name] for name in columns] for row in rows}
    expected = {name: [] for name in shown}
    baseline = []
    for column in columns:
        regime = regime_of(regimes, *column.rsplit(' ', 1))
        both = [regime.values(metric)['cross-entropy'] for metric in ('mIoU', 'mIoU.tail')]
        means = [f'{np.mean(list(values.values())):.1f}' for values in both]
        baseline.append(' / '.join(means) + ('' if len(both[0]) == 3 else f' ({len(both[0])})'))
        for name in shown:
            tests = [regime.differences(metric).get(METHODS[name]) for metric in ('mIoU', 'mIoU.tail')]
            seeds = len(tests[0].seeds) if tests[0] else 0
            cells = [
                f'**{test.mean:+.1f}**' if test.holm is not None and test.holm < 0.05 else f'{test.mean:+.1f}'
                for test in tests
                if seeds > 1
            ]
            number = '' if seeds in (0, 1, 3) else f' ({seeds})'
            expected[name].append(' / '.join(cells) + number)
    assert [first[name] for name in columns] == baseline
    assert shown == expected


def test_the_readme_expects_what_the_committed_rows_give():
    regimes, of = read_results(COMMITTED), {'constant': 'combined, auto', 'fading': 'combined, fading'}
    data = ''
    for row in markdown_rows('README.md', 'data, iterations'):
        data = row['data, iterations'] or data
        parts = data.replace('magnetic_tile', 'magn. tile').partition(':')[0].split(', ')
        regime = regime_of(regimes, parts[0], parts[-1])
        method = of.get(row['weights'], 'Jaccard, fading')
        for column, metric in (('mIoU', 'mIoU'), ('tail', 'mIoU.tail')):
            values, test = regime.values(metric), regime.differences(metric)[method]
            means = [np.mean([values[name][s] for s in test.seeds]) for name in ('cross-entropy', method)]
            assert row[column] == '{:.1f} → {:.1f}'.format(*means), (data, method)
            significant, said = test.holm < 0.05, row['significant']
            assert significant == bool(re.match(rf'yes|(.*; )?{column}\b(?! p)', said)), (data, method)
            if p := re.search(rf'{column} p ([\d.]+)', said):
                shown = p[1]
            elif p := re.match(r'no: p (0\.\d+)(?:, (0\.\d+))?', said):  # one of both, or of each
                shown = p[2] if p[2] and column == 'tail' else p[1]
            else:
                continue
            assert shown == f'{test.holm:.2f}', (data, method)
