"""What building the package does beyond setuptools; pyproject.toml names it, nothing else imports it."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

# where OpenMMLab's mim looks for them in an installed package: mmseg_imbalance/.mim
SHIPPED = ('configs', 'tools', 'model-index.yml')
CHECKOUT_ALONE = ('wheel.py', 'bench_gpu.py')  # need the checkout's tests, or build the package
# what a source distribution holds besides, so that its tests and docs can be made from it
BESIDES = ('tests', 'docs', 'Makefile', 'CONTRIBUTING.md', 'CHANGELOG.md', 'CITATION.cff')


class BuildPy(build_py):
    """Puts configs and tools of the repository into the wheel, and into the source distribution."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the package is used from the checkout, and so are they
            return
        folder = Path(self.build_lib, 'mmseg_imbalance', '.mim')
        shutil.rmtree(folder, ignore_errors=True)  # of a former build
        for path in _files(SHIPPED):
            if path.name in CHECKOUT_ALONE:
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / path)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *map(str, _files(SHIPPED + BESIDES))]


def _files(names: tuple[str, ...]) -> list[Path]:
    found = [path for name in names for path in (Path(name), *Path(name).rglob('*')) if path.is_file()]
    return sorted(path for path in found if not {'__pycache__', '_build', 'generated'} & {*path.parts})
