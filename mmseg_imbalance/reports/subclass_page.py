"""The HTML page of the subclasses of a trained model, and of what they are in a few validation images."""

from html import escape
from io import BytesIO
from pathlib import Path

from mmseg_imbalance.registry import DATASETS

import numpy as np
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from PIL import Image

from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.plots import draw_subclasses, subclass_colours
from mmseg_imbalance.reports.pictures import picture_tag
from mmseg_imbalance.subclass_maps import find_subclassified, subclass_maps, subclasses
from mmseg_imbalance.tables import names_and_colours
from mmseg_imbalance.trained import load_segmentor

STYLE = """
:root { --line: #dcdfe4; --faint: #6a7280; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2129; max-width: 1500px; }
body { margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .4rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, figcaption { color: var(--faint); margin: .2rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.classes { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: .9rem; }
.classes { margin-top: .9rem; }
table { border: 1px solid var(--line); border-radius: 6px; }
table { padding: .5rem .7rem; border-spacing: .35rem .15rem; }
caption { font-weight: 600; text-align: left; padding: 0 .1rem .15rem; }
th { font-weight: normal; font-size: .85rem; color: var(--faint); text-align: left; }
td { width: 33%; font-variant-numeric: tabular-nums; font-size: .9rem; white-space: nowrap; }
td.swatch { width: 1.1rem; min-width: 1.1rem; border-radius: 3px; }
.bar { display: block; height: 5px; background: #4878a8; border-radius: 2px; min-width: 1px; }
.weight { background: #d1783c; }
figure { margin: 1.2rem 0; }
figure img { display: block; width: 100%; border: 1px solid var(--line); border-radius: 6px; }
"""


def load(cfg, config, checkpoint_path):
    """The model in evaluation mode, its losses by name, the validation data set, and the checkpoint."""
    model, checkpoint = load_segmentor(cfg, config, checkpoint_path)
    losses = find_subclassified(model)
    if cfg.get('val_dataloader') is None:
        raise ValueError(f'{config} has no val_dataloader, whose images are shown')
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    # from where losses know the classes that num_subclasses names
    MessageHub.get_current_instance().update_info('dataset_meta', dataset.metainfo)
    return model, losses, dataset, checkpoint


def bar(value, most, text, kind=''):
    return f'<td>{text}<span class="bar {kind}" style="width:{100 * value / most:.1f}%"></span></td>'


def class_tables(classes, palette, state):
    """A table for each class, a row for each of its subclasses."""
    shades = subclass_colours(palette, state.weight)
    known = np.isfinite(state.weight)
    most = [x[known].max(initial=1e-6) for x in (state.mean_loss, state.weight)]
    for c, name in enumerate(classes[: len(state.exists)]):  # a head may have fewer classes than another
        yield f'<table><caption>{escape(name)}</caption>'
        yield '<tr><th></th><th>share</th><th>mean loss</th><th>weight</th></tr>'
        for k in np.flatnonzero(state.exists[c]):
            if not known[c, k]:
                yield '<tr><td class="swatch"></td><td>-</td><td>-</td><td>-</td></tr>'
                continue
            share, loss, weight = (x[c, k] for x in (state.share, state.mean_loss, state.weight))
            colour = '#' + bytes(shades[c, k]).hex()
            yield f'<tr><td class="swatch" style="background:{colour}"></td>'
            yield bar(share, 1, f'{share:.1%}')
            yield bar(loss, most[0], f'{loss:.3f}')
            yield bar(weight, most[1], f'{weight:.2f}', 'weight') + '</tr>'
        yield '</table>'


def page(model, losses, dataset, facts, images):
    """The lines of the page; ``facts`` by name head it."""
    number = max(2, *(head.out_channels for head, _ in losses.values()))
    classes, palette = names_and_colours(dataset.metainfo, number)
    states = {name: subclasses(loss) for name, (_, loss) in losses.items()}
    yield '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Subclasses</title>'
    yield f'<style>{STYLE}</style></head><body><h1>Subclasses</h1><dl>'
    for name, value in facts.items():
        yield f'<dt>{name}</dt><dd>{escape(str(value))}</dd>'
    yield '</dl>'
    for name, state in states.items():
        yield f'<h2>{escape(name)}</h2>'
        if state is None:
            yield '<p>SimilaritySubclassifiedLoss weighs by the logits of each image, without subclasses.</p>'
            continue
        yield '<p>Each row is a subclass: its share of the pixels of the class, the mean of -log p, '
        yield 'and the weight of each pixel. The heaviest is the darkest, here and in the images.</p>'
        yield '<div class="classes">'
        yield from class_tables(classes, palette, state)
        yield '</div>'
    chosen = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int)
    yield f'<h2>{len(chosen)} of {len(dataset)} validation images</h2>' if len(chosen) else ''
    for index in chosen:
        batch = pseudo_collate([dataset[int(index)]])
        caption = Path(batch['data_samples'][0].get('img_path', f'image {index}')).name
        for name, maps in subclass_maps(model, losses, batch, 0).items():
            file = BytesIO()
            Image.fromarray(draw_subclasses(maps, classes, palette, states[name])).save(file, 'PNG')
            yield f'<figure><figcaption>{escape(f"{caption}, {name}")}</figcaption>'
            yield f'{picture_tag(file.getvalue(), caption, "png")}</figure>'
    yield '</body></html>'


def write(cfg: Config, config: str, checkpoint: str, images: int, out: Path) -> None:
    """Write the page of a checkpoint.

    Args:
        cfg: the config, read.
        config: its path, named on the page and in errors.
        checkpoint: path of the checkpoint.
        images: how many images are shown.
        out: the file to write.

    Raises:
        ValueError: the config has no SubclassifiedLoss or no val_dataloader, or the checkpoint is of another.
    """
    model, losses, dataset, content = load(cfg, config, checkpoint)
    iteration = content.get('meta', {}).get('iter', 'unknown')
    facts = dict(config=config, checkpoint=checkpoint, iteration=iteration)
    text = '\n'.join(page(model, losses, dataset, facts, images))
    with write_atomically(out) as file:
        file.write(text)
