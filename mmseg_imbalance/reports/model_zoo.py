"""The model-zoo pages, configs/*/README.md, made from the metafile.yaml and the configs beside each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from mmengine.config import Config

from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.reports.comparison import Comparison, Group
from mmseg_imbalance.reports.identity import OF_RUN, settings
from mmseg_imbalance.reports.work_dirs import Run
from mmseg_imbalance.tables import markdown_table

DATASETS = dict(ade20k='ADE20K', camvid='CamVid', cityscapes='Cityscapes')  # as MMSegmentation writes them
SUMMARIES = ('mIoU', 'mIoU.head', 'mIoU.body', 'mIoU.tail', 'mIoU_C_q5', 'aAcc')  # of the first table


def write_entries(comparison: Comparison, configs: Path) -> list[Path]:
    """Put the results of configs of this repository into their metafiles and write the pages anew.

    Returns:
        The files written.

    Raises:
        ValueError: a run is not of such a config, or was not carried out as the config says.
    """
    entries: dict[Path, list[dict]] = {}
    for group in comparison.groups:
        run = group.runs[0]
        path = next(configs.glob(f'[!_]*/{run.name}.py'), None)
        if path is None:
            raise ValueError(f'{run.work_dir} is of {run.name}, and there is no {configs}/*/{run.name}.py')
        config = Config.fromfile(str(path))
        for other in group.runs:
            _check(other, config)
        entries.setdefault(path.parent, []).append(_entry(group, comparison, path))
    written = []
    for family, new in entries.items():
        metafile = _metafile(family)
        names = {entry['Name'] for entry in new}
        metafile['Models'] = [entry for entry in metafile['Models'] if entry['Name'] not in names] + new
        metafile['Models'].sort(key=lambda entry: entry['Name'])
        text = yaml.safe_dump(metafile, sort_keys=False, width=100, allow_unicode=True)
        with write_atomically(family / 'metafile.yaml') as file:
            file.write(text)
        written += [family / 'metafile.yaml', write_page(family)]
    return written


def _check(run: Run, config: Config) -> None:
    """Refuse a run that was not carried out, to its end, as the config says."""
    says = settings(config, run.source.split()[0].replace('validation', 'val'))
    keys = sorted((says.keys() | run.settings.keys()) - {*OF_RUN})
    differing = [
        f'{k}={run.settings.get(k)} for {says.get(k)}' for k in keys if says.get(k) != run.settings.get(k)
    ]
    if named := re.search(r'_(\d+)xb(\d+)', run.name):  # so many GPUs, so many images on each
        batch = run.processes * run.config.train_dataloader.batch_size
        if batch != int(named[1]) * int(named[2]):
            differing.append(f'a batch of {batch} for {named[1]} x {named[2]}')
    if not run.complete:
        differing.append(f'{run.source} for that at the end')
    if differing:
        raise ValueError(
            f'{run.work_dir} is no result of {config.filename}: it has {", ".join(differing[:5])}'
        )


def _metafile(family: Path) -> dict:
    path = family / 'metafile.yaml'
    if path.exists():
        return yaml.safe_load(path.read_text(encoding='utf-8'))
    return dict(Collections=[dict(Name=family.name, Frameworks=['PyTorch'])], Models=[])


def _entry(group: Group, comparison: Comparison, config: Path) -> dict:
    """A model of an OpenMMLab metafile; numbers are means over the runs, in per cent."""
    run = group.runs[0]
    keys = {key: key for key in comparison.summaries} | {f'IoU.{name}': name for name in comparison.classes}
    estimates = {key: group.estimates[name] for key, name in keys.items()}
    metrics = {key: round(e.mean, 2) for key, e in estimates.items() if not math.isnan(e.mean)}
    if (std := group.estimates['mIoU'].std) is not None:
        metrics['mIoU std'] = round(std, 2)
    memory = [other.memory / 1024 for other in group.runs if other.memory is not None]
    metadata = {
        'Training Data': dataset_of(run.name),
        'Batch Size': run.processes * run.config.train_dataloader.batch_size,
        'Iterations': run.length,
        # as text: mim search takes no numbers in lists
        'Seeds': ['-' if other.seed is None else str(other.seed) for other in group.runs],
        'Training Resources': f'{run.processes}x {run.hardware}',
        'Memory (GB)': round(max(memory), 2) if memory else None,
    }
    return {
        'Name': run.name,
        'In Collection': _metafile(config.parent)['Collections'][0]['Name'],
        'Results': {'Task': 'Semantic Segmentation', 'Dataset': dataset_of(run.name), 'Metrics': metrics},
        'Config': f'configs/{config.parent.name}/{config.name}',
        'Metadata': {key: value for key, value in metadata.items() if value is not None},
        'Framework': 'PyTorch',
    }


def dataset_of(config: str) -> str:
    """The data set by the last field of a config's name, MODEL_SCHEDULE_DATASET-SIZE."""
    name = re.sub(r'-\d+x\d+$', '', config.rpartition('_')[2])
    return DATASETS.get(name, name)


def write_page(family: Path) -> Path:
    """The README.md of a folder of configs, from its metafile."""
    path = family / 'README.md'
    with write_atomically(path) as file:
        file.write('\n'.join(_page(family)))
    return path


def _page(family: Path) -> Iterator[str]:
    metafile = _metafile(family)
    collection, models = metafile['Collections'][0], metafile['Models']
    yield f'# {collection["Name"]}\n'
    if 'Paper' in collection:
        yield f'> [{collection["Paper"]["Title"]}]({collection["Paper"]["URL"]})\n'
    yield (
        'Written by `mmseg-imbalance model-zoo` from `metafile.yaml` and the configs of this folder. Every '
        'number was measured with `mmseg-imbalance compare --metafile` or is quoted from where its row says. '
        'IoU in per cent, means over the seeds ± their standard deviation; head, body and tail are thirds of '
        'the classes by training pixels.\n'
    )
    for dataset in dict.fromkeys(model['Results']['Dataset'] for model in models):
        listed = [model for model in models if model['Results']['Dataset'] == dataset]
        yield f'## {dataset}\n'
        used = {key for model in listed for key in model['Results']['Metrics']}
        shown = [key for key in (*SUMMARIES, 'mIoU(ms+flip)') if key in used]
        yield from markdown_table(
            ['config', 'iterations', *shown, 'memory (GB)', 'measured'],
            ([_link(m), *_about(m, shown)] for m in listed),
        )
        classes = list(
            dict.fromkeys(key for m in listed for key in m['Results']['Metrics'] if key[:4] == 'IoU.')
        )
        if classes:
            measured = [m for m in listed if classes[0] in m['Results']['Metrics']]
            yield from markdown_table(
                ['IoU', *(key.removeprefix('IoU.') for key in classes)],
                ([_link(m), *(_number(m, key) for key in classes)] for m in measured),
            )
    have = {model['Name'] for model in models}
    rest = [config.stem for config in sorted(family.glob('*.py')) if config.stem not in have]
    if rest:
        yield '## Not measured yet\n'
        yield from (f'- [{name}]({name}.py)' for name in rest)
        yield ''


def _link(model: dict) -> str:
    return f'[{model["Name"]}]({model["Name"]}.py)'


def _about(model: dict, shown: list[str]) -> list[str]:
    metadata = model['Metadata']
    if 'Quoted From' in model:
        where = f'quoted from [{model["Quoted From"]["Title"]}]({model["Quoted From"]["URL"]})'
    else:
        where = f'seeds {", ".join(map(str, metadata["Seeds"]))}; {metadata.get("Training Resources", "-")}'
    numbers = [_number(model, key) for key in shown]
    return [str(metadata.get('Iterations', '-')), *numbers, str(metadata.get('Memory (GB)', '-')), where]


def _number(model: dict, key: str) -> str:
    metrics = model['Results']['Metrics']
    if key not in metrics:
        return '-'
    std = f' ± {metrics["mIoU std"]:.2f}' if key == 'mIoU' and 'mIoU std' in metrics else ''
    return f'{metrics[key]:.2f}{std}'
