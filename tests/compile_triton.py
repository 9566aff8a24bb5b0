"""Compiles the kernels that some calls would launch, for a device that need not be there."""

import re
import sys
import types
from pathlib import Path

import torch

package = sys.modules['mmseg_imbalance'] = types.ModuleType('mmseg_imbalance')  # ops needs no framework
package.__path__ = [str(Path(__file__).parents[1] / 'mmseg_imbalance')]

import triton as compiler  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mmseg_imbalance.ops import triton  # noqa: E402
from mmseg_imbalance.ops.contract import Options  # noqa: E402

TYPES = {
    torch.float32: 'fp32',
    torch.float16: 'fp16',
    torch.bfloat16: 'bf16',
    torch.int64: 'i64',
    torch.int32: 'i32',
    torch.uint8: 'u8',
}
SHARED_MEMORY = 99 << 10  # bytes a block may use on the smaller devices of capability 8


class Compiled:
    """In place of a kernel: compiles it for the arguments of a launch."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps, num_stages, **named):
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            value = values[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = '*' + TYPES[value.dtype]
            elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
                signature[parameter.name], constants[parameter.name] = 'constexpr', value
            else:
                signature[parameter.name] = 'fp32' if isinstance(value, float) else 'i32'
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        options = dict(num_warps=num_warps, num_stages=num_stages)
        done = compiler.compile(source, target=GPUTarget('cuda', self.capability, 32), options=options)
        print(self.kernel.__name__, f'sm_{self.capability}, {done.metadata.shared} bytes of shared memory')
        if done.metadata.shared > SHARED_MEMORY:
            raise RuntimeError(f'more than {SHARED_MEMORY} bytes')
        lanes = dict(re.findall(r'(#\w+) = .*threadsPerWarp = (\[.*?\])', done.asm['ttgir']))
        tiles = re.findall(r'tt.load .*tensor<\d+x\d+x!tt.ptr<\w+>, (#\w+)>', done.asm['ttgir'])
        if not tiles or any(lanes[layout] != '[1, 32]' for layout in tiles):
            raise RuntimeError('a warp takes several classes of a pixel, not several pixels of a class')


def compile_for(classes, logit_size, label_size, dtype, **options):
    logits = torch.zeros(1, classes, *logit_size, dtype=dtype, requires_grad=True)
    target = torch.zeros(1, *label_size, dtype=torch.uint8)
    defaults = dict(
        pixel_weight=None,
        ignore_index=255,
        logit_bias=None,
        focal_gamma=0.0,
        square_prediction=False,
        with_log_prob=False,
        with_recall=False,
        group=None,
        num_groups=0,
        align_corners=False,
        marked=None,
    )
    stats = triton.soft_stats(logits, target, Options(**defaults | options))
    total = stats.nll + stats.intersection + stats.prediction
    if stats.marked_intersection is not None:
        total = total + stats.marked_intersection
    total.sum().backward()


if __name__ == '__main__':
    for name in ('_forward_kernel', '_backward_kernel'):
        setattr(triton, name, Compiled(getattr(triton, name), capability=int(sys.argv[1])))
    label = torch.zeros(1, 64, 128, dtype=torch.int64)
    all_options = dict(
        pixel_weight=label.half(),
        logit_bias=torch.zeros(19),
        focal_gamma=2.0,
        square_prediction=True,
        with_log_prob=True,
        with_recall=True,
        group=label,
        num_groups=100,
        align_corners=True,
        marked=label.bool(),
    )
    if sys.argv[2] == 'all options':
        compile_for(19, (8, 16), (64, 128), torch.float16, **all_options)
    else:
        compile_for(150, (8, 16), (64, 128), torch.bfloat16)
