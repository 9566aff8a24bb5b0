"""Runs of a fraction of a second: a real runner, data set and head, predictions that a test has chosen."""

from pathlib import Path

from mmseg_imbalance.registry import MODELS

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import PixelData
from PIL import Image

CLASSES = ('road', 'pole', 'sky')
HEAD = dict(
    type='mmseg.FCNHead',
    in_channels=3,
    channels=4,
    num_convs=1,
    dropout_ratio=0,
    num_classes=3,
    loss_decode=dict(type='WeightedCrossEntropyLoss'),
)


@MODELS.register_module()
class ScriptedSegmentor(BaseModel):
    """Trains a head on the image itself; its predictions are `script[evaluation][image]`, else the labels."""

    def __init__(self, decode_head, auxiliary_head=None, data_preprocessor=None, script=None):
        super().__init__(dict(type='mmseg.SegDataPreProcessor', size=(6, 8)) | (data_preprocessor or {}))
        self.decode_head = MODELS.build(decode_head)
        if auxiliary_head is not None:
            self.auxiliary_head = MODELS.build(auxiliary_head)
        self.script = script
        self.evaluation = 0

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'loss':
            losses = {}
            for name in ('decode_head', 'auxiliary_head'):
                if hasattr(self, name):
                    head = getattr(self, name)
                    losses |= {f'{name}.{k}': v for k, v in head.loss([inputs], data_samples, None).items()}
            return losses
        for sample in data_samples:
            prediction = sample.gt_sem_seg.data
            if self.script is not None:
                chosen = self.script[self.evaluation][int(Path(sample.img_path).stem)]
                prediction = torch.tensor(np.array(chosen))[None]
            sample.pred_sem_seg = PixelData(data=prediction.long())
        return data_samples

    def val_step(self, data):
        outputs = super().val_step(data)
        if int(Path(outputs[-1].img_path).stem) == 1:  # the last of the images
            self.evaluation += 1
        return outputs


def write_images(folder, labels):
    """Two images and the (2, H, W) labels."""
    for kind in ('images', 'labels'):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, label in enumerate(np.asarray(labels, np.uint8)):
        Image.fromarray(np.repeat(label[..., None] * 40, 3, 2)).save(folder / 'images' / f'{number}.png')
        Image.fromarray(label).save(folder / 'labels' / f'{number}.png')
    return folder


def config(folder, evaluations=1, classes=CLASSES, **options):
    """The config of a run that validates after each of so many iterations."""

    def loader(**more):
        dataset = dict(
            type='mmseg.BaseSegDataset',
            data_root=str(folder),
            data_prefix=dict(img_path='images', seg_map_path='labels'),
            img_suffix='.png',
            metainfo=dict(classes=classes),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='mmseg.LoadAnnotations'),
                dict(type='mmseg.PackSegInputs'),
            ],
        )
        return dict(dataset=dataset, batch_size=1, num_workers=0, **more)

    cfg = Config(
        dict(
            default_scope='mmseg',
            model=dict(type='ScriptedSegmentor', decode_head=dict(HEAD, num_classes=max(2, len(classes)))),
            train_dataloader=loader(sampler=dict(type='InfiniteSampler', shuffle=False)),
            val_dataloader=loader(sampler=dict(type='DefaultSampler', shuffle=False)),
            val_evaluator=dict(type='ImbalanceIoUMetric'),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=evaluations, val_interval=1),
            val_cfg=dict(type='ValLoop'),
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=-1, save_last=False),
                logger=dict(type='LoggerHook', interval=1),
            ),
            custom_hooks=[dict(type='ClassBalanceHook', interval=100)],
            log_processor=dict(by_epoch=False),
            visualizer=dict(type='mmseg.SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')]),
            work_dir=str(Path(folder, 'work_dir')),
        )
    )
    cfg.merge_from_dict(options)
    return cfg


def run(cfg, name):
    """The runner before it has started; MMEngine's instances are global by name."""
    cfg.experiment_name = cfg.visualizer.name = name
    cfg.work_dir = str(Path(cfg.work_dir, name))  # two runs of a second would share their logs
    return Runner.from_cfg(cfg)


def log_of(runner):
    return Path(runner._log_dir, f'{runner.timestamp}.log').read_text(encoding='utf-8')
