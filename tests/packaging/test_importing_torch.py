"""``cupy_msda.torch``: an attribute that imports torch when it is used, and a hint where torch is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HINT = "pip install 'torch>=2.4'"
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def output_of(code):
    done = run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_attribute_imports_torch_when_it_is_used():
    code = (
        "import cupy_msda, sys; before = 'torch' in sys.modules; function = cupy_msda.torch.ms_deform_attn;"
        "import cupy_msda.torch as module; print(before, 'torch' in sys.modules, module.ms_deform_attn is function)"
    )
    assert output_of(code) == "False True True"


@pytest.mark.parametrize(
    "statement",
    [
        "import cupy_msda.torch",
        "from cupy_msda import torch",
        "from cupy_msda.torch import ms_deform_attn",
        "import cupy_msda.torch.extension",
        "import cupy_msda.torch.transformers",
    ],
)
def test_an_import_without_torch_names_the_command(statement):
    done = run(WITHOUT_TORCH + statement)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ModuleNotFoundError: cupy_msda.torch needs torch")
    assert HINT in done.stderr.strip().splitlines()[-1]


def test_the_attribute_without_torch_is_missing_and_names_the_command():
    code = WITHOUT_TORCH + "import cupy_msda; print(hasattr(cupy_msda, 'torch')); cupy_msda.torch"
    done = run(code)
    assert done.stdout.strip() == "False"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("AttributeError: ")
    assert HINT in last


def test_another_missing_module_is_not_blamed_on_torch():
    code = (
        "import sys, types; torch = types.ModuleType('torch'); sys.modules['torch'] = torch;"
        "torch.__getattr__ = lambda name: (_ for _ in ()).throw(ModuleNotFoundError('no part', name='part'));"
        "import cupy_msda; cupy_msda.torch"
    )
    last = run(code).stderr.strip().splitlines()[-1]
    assert last == "ModuleNotFoundError: no part"


def test_other_attributes_are_missing_as_usual():
    code = "import cupy_msda; print(hasattr(cupy_msda, 'torhc'), 'torch' in dir(cupy_msda)); cupy_msda.torhc"
    done = run(code)
    assert done.stdout.strip() == "False False"
    assert done.stderr.strip().endswith("AttributeError: module 'cupy_msda' has no attribute 'torhc'")
