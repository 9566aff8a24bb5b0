"""``mmseg-imbalance fit-bias``: a checkpoint whose argmax aims at the mIoU."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmseg_imbalance.commands.options import add_cfg_options, command_parser, read_config

DESCRIPTION = """\
Change one number per class in a trained model, the bias of its last layer, so
that its predictions have the highest mean IoU that it expects of them itself.
No label is used. Class weights of the training are taken back first. Testing
takes no more time; sliding windows and test time augmentation stay as they are."""
EXAMPLE = """\
CONFIG work_dirs/run/iter_2000.pth
CONFIG work_dirs/run/iter_2000.pth --images 500 --out corrected.pth"""


def _options() -> argparse.ArgumentParser:
    options = command_parser('fit-bias', DESCRIPTION, EXAMPLE)
    add = options.add_argument
    add('config', metavar='CONFIG', help='config file that it was trained with')
    add('checkpoint', metavar='CHECKPOINT', help='checkpoint file (.pth)')
    add('--out', metavar='FILE', help='checkpoint to write; default bias_CHECKPOINT beside it')
    add(
        '--split',
        choices=['train', 'val', 'test'],
        default='train',
        help='images to fit to, without their labels; default %(default)s',
    )
    add(
        '--images',
        type=int,
        default=300,
        metavar='N',
        help='drawn from the split, the same each time; default %(default)s',
    )
    add_cfg_options(options)
    return options


def main(argv: list[str] | None = None) -> int:
    options = _options()
    args = options.parse_args(argv)
    if args.images < 1:
        options.error(f'--images must be at least 1, got {args.images}')
    checkpoint = Path(args.checkpoint)
    out = Path(args.out) if args.out else checkpoint.with_name(f'bias_{checkpoint.name}')
    if out.resolve() == checkpoint.resolve():
        options.error(f'--out {out} is the checkpoint itself, which stays as it is; give another file')
    try:
        fit(read_config(args.config, args.cfg_options), args.config, checkpoint, out, args.split, args.images)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        options.exit(1, f'{options.prog}: {error}\n')
    return 0


def fit(cfg, config: str, checkpoint_path: Path, out: Path, split: str, images: int) -> None:
    """Write the corrected checkpoint and print what has changed."""
    import torch

    from mmseg_imbalance.class_bias import fit_class_bias
    from mmseg_imbalance.files import write_atomically
    from mmseg_imbalance.tables import bias_table, names_and_colours, table_text
    from mmseg_imbalance.trained import (
        belief_offset,
        classifying_head,
        load_segmentor,
        sampled_logits,
        split_with_test_pipeline,
    )

    model, checkpoint = load_segmentor(cfg, config, checkpoint_path)
    meta = checkpoint.setdefault('meta', {})
    if 'class_bias' in meta:
        raise ValueError(
            f'{checkpoint_path} was corrected before; take the checkpoint that the training wrote'
        )
    head = classifying_head(model, 'fit-bias')
    name = next(name for name, module in model.named_modules() if module is head.conv_seg)
    if head.conv_seg.bias is None:
        raise ValueError(f'{name} has no bias that could be changed')
    datasets = split_with_test_pipeline(cfg, split)
    offset = torch.from_numpy(belief_offset(cfg, head, checkpoint)).float()
    logits, drawn = sampled_logits(model, datasets, images)
    found = fit_class_bias(logits + offset.to(logits))
    change = offset + torch.from_numpy(found.bias)
    if head.out_channels == 1:  # the logit of class 1 against class 0, which has to reach the threshold
        threshold = torch.tensor(float(head.threshold))
        change = change[1:] - change[:1] + torch.logit(threshold)
    checkpoint['state_dict'][f'{name}.bias'] += change
    meta['class_bias'] = change.tolist()
    for part in ('optimizer', 'param_schedulers'):  # it is for testing: a training would undo the change
        checkpoint.pop(part, None)
    with write_atomically(out, 'wb') as file:
        torch.save(checkpoint, file)
    classes, _ = names_and_colours(datasets[0].metainfo, len(found.bias))
    print(table_text(bias_table(classes, found)))
    print(f'{out}: fitted to {drawn} images of {split}, {len(logits):,} pixels, without their labels')
