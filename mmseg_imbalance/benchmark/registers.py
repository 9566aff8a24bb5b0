"""What the Triton kernels need of a GPU: compiled for one that need not be there, and nothing is run."""

import re
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import triton as compiler
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import PTXASError

from mmseg_imbalance.ops import triton as kernels
from mmseg_imbalance.ops.contract import Options

LABEL = (512, 1024)
TYPES = {
    torch.float32: 'fp32',
    torch.float16: 'fp16',
    torch.bfloat16: 'bf16',
    torch.int64: 'i64',
    torch.int32: 'i32',
    torch.uint8: 'u8',
}
# of a multiprocessor, by capability: bytes of shared memory, warps, programs
MULTIPROCESSORS = {
    80: (164 << 10, 64, 32),
    86: (100 << 10, 48, 16),
    89: (100 << 10, 48, 24),
    90: (228 << 10, 64, 32),
    100: (228 << 10, 64, 32),
    120: (100 << 10, 48, 24),
}
REGISTERS = 64 << 10  # of a multiprocessor
NUMBERS = ('registers', 'stack', 'shared', 'programs', 'bytes_int64', 'bytes_uint8')


@dataclass
class Kernel:
    """A compiled kernel: what a thread and a program of it need."""

    name: str
    capability: int
    warps: int
    registers: int  # of a thread
    stack: int  # bytes of a thread: what its registers do not hold
    shared: int  # bytes of a program
    code: str  # Triton's, which says how tiles are spread over threads

    @property
    def programs(self):
        """How many programs a multiprocessor holds at once."""
        shared, warps, programs = MULTIPROCESSORS[self.capability]
        # registers come in blocks of 256 a warp, shared memory in 128 bytes a program and 1 KB for the driver
        of_warp = -(-32 * self.registers // 256) * 256
        of_program = -(-(self.shared + 1024) // 128) * 128
        # four schedulers have a quarter of the registers each
        by_registers = 4 * (REGISTERS // 4 // of_warp) // self.warps
        return min(programs, warps // self.warps, by_registers, shared // of_program)


class Compiled:
    """In place of a kernel: compiles it for the arguments of a launch."""

    def __init__(self, kernel, capability, found):
        self.kernel, self.capability, self.found = kernel, capability, found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps, num_stages, maxnreg=None, **named):
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
        options = dict(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)
        done = compiler.compile(source, target=GPUTarget('cuda', self.capability, 32), options=options)
        name = self.kernel.__name__.strip('_').removesuffix('_kernel')
        usage, shared = resource_usage(done.asm['cubin']), done.metadata.shared
        kernel = Kernel(
            name, self.capability, num_warps, usage['REG'], usage['STACK'], shared, done.asm['ttgir']
        )
        self.found.append(kernel)


def resource_usage(cubin):
    """What cuobjdump, which comes with Triton, says of a compiled kernel, by name."""
    tool = Path(nvidia.__file__).parent / 'bin' / 'cuobjdump'
    with TemporaryDirectory() as folder:
        path = Path(folder) / 'kernel.cubin'
        path.write_bytes(cubin)
        command = [tool, '--dump-resource-usage', path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r'\b(REG|STACK):(\d+)', text)}


def compiled(capability, classes, logit_size, label_size, dtype, label_dtype=torch.int64, **options):
    """The kernels that a call would launch, forward and backward."""
    logits = torch.zeros(1, classes, *logit_size, dtype=dtype, requires_grad=True)
    target = torch.zeros(1, *label_size, dtype=label_dtype)
    found = []
    names = ('_forward_kernel', '_backward_kernel')
    instead = {name: Compiled(getattr(kernels, name), capability, found) for name in names}
    with patch.multiple(kernels, **instead):
        stats = kernels.soft_stats(logits, target, Options(**options))
        total = stats.nll + stats.intersection + stats.prediction
        if stats.marked_intersection is not None:
            total = total + stats.marked_intersection
        total.sum().backward()
    return found


def lines(capabilities, classes, scales, dtypes):
    """A line of the table for each kernel, or for both where they cannot be compiled."""
    if kernels.INTERPRETED:
        raise RuntimeError('the kernels are Python functions: unset TRITON_INTERPRET')
    for capability, number, dtype, scale in product(capabilities, classes, dtypes, scales):
        size = tuple(round(n / scale) for n in LABEL)
        case = dict(gpu=f'sm_{capability}', classes=str(number), logits=f'1/{scale:g}', dtype=str(dtype)[6:])
        try:
            found = compiled(capability, number, size, LABEL, dtype)
        except (RuntimeError, PTXASError) as error:  # an older Triton does not know a newer device
            reason = f'{type(error).__name__}: {error}'.splitlines()[0][:60]
            yield case | dict(kernel='none', **dict.fromkeys(NUMBERS, '-')) | dict(registers=reason)
            continue
        for kernel in found:
            numbers = (kernel.registers, kernel.stack, kernel.shared, kernel.programs)
            moved = least_bytes(kernel.name, number, scale, dtype)
            text = [*map(str, numbers), *(f'{moved + label:.3g}' for label in (8, 1))]
            yield case | dict(kernel=kernel.name) | dict(zip(NUMBERS, text, strict=True))


def least_bytes(name, classes, scale, dtype):
    """Bytes of logits, and of their gradient, that a kernel has to move for each pixel of the label."""
    return (1 if name == 'forward' else 2) * classes * dtype.itemsize / scale**2
