"""Trains a config whose head is of MMDetection, and holds QueryClassLoss against MMDetection's own loss.

    python tests/query_heads.py CONFIG

Prints JSON: the filled weights, and (ours, theirs) for each decoder layer and iteration. The heads need no
compiled operator of MMCV on a CPU, but importing MMDetection asks for all of them. Where MMCV was built
without, they are stood in for, and one that is called says so.
"""

import importlib.machinery
import json
import sys
import types
from importlib.util import find_spec


class Operators(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)

        def operator(*args, **kwargs):
            raise RuntimeError(f'{name} of MMCV is not compiled')

        return operator


def train(path):
    """What is printed, of the config at this path."""
    from mmdet.models.losses import CrossEntropyLoss
    from mmengine.config import Config
    from mmengine.runner import Runner

    runner = Runner.from_cfg(Config.fromfile(path))
    loss = runner.model.decode_head.loss_cls
    values = []

    def compare(module, args, options, ours):
        cls_score, label, weight = args
        w = [*module.object_weight.values.tolist(), module.no_object_weight]
        theirs = CrossEntropyLoss(loss_weight=module.loss_weight, class_weight=w)
        factor = cls_score.new_tensor(w)[label].sum()
        values.append((ours.item(), theirs(cls_score, label, weight, avg_factor=factor).item()))

    loss.register_forward_hook(compare, with_kwargs=True)
    runner.train()
    weights = [*loss.object_weight.values.tolist(), loss.no_object_weight]
    return dict(weights=weights, loss_weight=loss.loss_weight, values=values)


if __name__ == '__main__':
    if find_spec('mmcv._ext') is None:
        sys.modules['mmcv._ext'] = operators = Operators('mmcv._ext')
        operators.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)
    print(json.dumps(train(sys.argv[1])))
