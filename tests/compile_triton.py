"""Compiles the kernels that some calls would launch, for a device that need not be there."""

import math
import re
import sys
import types
from pathlib import Path

import torch

# the largest stack of a thread in bytes, the fewest forward programs on a multiprocessor
LIMITS = {'few classes': (0, 3), 'many classes': (63, 1)}
SHARED_MEMORY = 99 << 10  # bytes a block may use on the smaller devices of capability 8
LABEL = torch.zeros(1, 64, 128, dtype=torch.int64)
ALL_OPTIONS = dict(
    pixel_weight=LABEL.half(),
    logit_bias=torch.zeros(19),
    focal_gamma=2.0,
    square_prediction=True,
    with_log_prob=True,
    with_recall=True,
    group=LABEL,
    num_groups=100,
    align_corners=True,
    marked=LABEL.bool(),
)
SIZES = ((8, 16), (64, 128))  # the kernels are the same for all scales above 1
CASES = {
    'all options': [dict(classes=19, dtype=torch.float16, label_dtype=torch.uint8, **ALL_OPTIONS)],
    'few classes': [
        dict(classes=19, dtype=dtype, logit_size=size)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        for size in SIZES
    ],
    'many classes': [dict(classes=150, dtype=torch.bfloat16, label_dtype=torch.int32)],
}


def check(kernel, stack=math.inf, programs=1):
    """How tiles are spread over a warp, and what registers and shared memory hold."""
    if kernel.stack > stack or (kernel.name == 'forward' and kernel.programs < programs):
        raise RuntimeError(f'more stack than {stack} bytes, or fewer programs than {programs}')
    if kernel.shared > SHARED_MEMORY:
        raise RuntimeError(f'more than {SHARED_MEMORY} bytes of shared memory')
    lanes = dict(re.findall(r'(#\w+) = .*threadsPerWarp = (\[.*?\])', kernel.code))
    tiles = re.findall(r'tt.load .*tensor<\d+x(\d+)x!tt.ptr<\w+>, (#\w+)>', kernel.code)
    tiles = [layout for pixels, layout in tiles if int(pixels) >= 32]  # 16: cells, no pixels
    if not tiles or any(lanes[layout] != '[1, 32]' for layout in tiles):
        raise RuntimeError('a warp takes several classes of a pixel, not several pixels of a class')


if __name__ == '__main__':
    package = sys.modules['mmseg_imbalance'] = types.ModuleType('mmseg_imbalance')  # ops needs no framework
    package.__path__ = [str(Path(__file__).parents[1] / 'mmseg_imbalance')]
    from mmseg_imbalance.benchmark.registers import compiled

    capability, case = int(sys.argv[1]), sys.argv[2]
    for call in CASES[case]:
        for kernel in compiled(capability, **dict(logit_size=SIZES[0], label_size=SIZES[1]) | call):
            print(call['dtype'], call.get('logit_size', SIZES[0]), f'sm_{capability}', end=' ')
            print(kernel.name, kernel.registers, kernel.stack, kernel.shared, kernel.programs, flush=True)
            check(kernel, *LIMITS.get(case, ()))
