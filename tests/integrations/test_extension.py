"""The stand-in for the compiled extension: dtypes as autocast gives them, and names in any order of imports."""

import importlib
import itertools
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cupy_msda.torch import extension, ms_deform_attn
from cupy_msda.torch.integrations import import_stub
from tests.helpers.cases import Case
from tests.helpers.torch_calls import DEVICES, tensors_of

ROOT = Path(__file__).parent.parent.parent
CASE = Case("extension")
HALF, FULL, DOUBLE = torch.float16, torch.float32, torch.float64
# Of value, locations and weights, and of what is computed with.
DTYPES = [
    (HALF, FULL, HALF, FULL),
    (HALF, HALF, FULL, FULL),
    (torch.bfloat16, FULL, torch.bfloat16, FULL),
    (HALF, torch.bfloat16, torch.bfloat16, FULL),
    (HALF, HALF, HALF, HALF),
    (FULL, HALF, FULL, FULL),
    (FULL, DOUBLE, HALF, FULL),
    (DOUBLE, FULL, DOUBLE, DOUBLE),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes_agree_as_under_autocast_and_gradients_have_those_given(dtypes, device):
    *of_inputs, computed = dtypes
    value, shapes, starts, locations, weights, grad_output = (
        part.detach() for part in tensors_of(CASE, device, torch.float64)
    )
    value, locations, weights = (
        part.to(dtype) for part, dtype in zip((value, locations, weights), of_inputs, strict=True)
    )
    grad_output = grad_output.to(value.dtype)
    output = extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)
    grads = extension.ms_deform_attn_backward(value, shapes, starts, locations, weights, grad_output, 64)
    leaves = [value.requires_grad_(), *(part.to(computed).requires_grad_() for part in (locations, weights))]
    want = ms_deform_attn(leaves[0], shapes, starts, *leaves[1:])
    assert torch.equal(output, want)
    wanted = torch.autograd.grad(want, leaves, grad_output)
    if device == "cuda":  # sums of grad_value in any order
        torch.testing.assert_close(grads[0], wanted[0], rtol=1e-2, atol=1e-2)
    for grad, other, dtype in list(zip(grads, wanted, of_inputs, strict=True))[device == "cuda" :]:
        assert grad.dtype is dtype
        assert torch.equal(grad, other.to(dtype))


@pytest.mark.filterwarnings("ignore:cupy_msda")
def test_wrong_arguments_are_named_as_in_the_extension():
    value, shapes, starts, locations, weights, grad_output = (part.detach() for part in tensors_of(CASE))
    with pytest.raises(ValueError, match=r"^sampling_loc: "):
        extension.ms_deform_attn_forward(value, shapes, starts, locations[:1], weights, 64)
    with pytest.raises(TypeError, match=r"^attn_weight: "):
        extension.ms_deform_attn_forward(value, shapes, starts, locations, None, 64)
    with pytest.raises(TypeError, match=r"^grad_output: "):
        extension.ms_deform_attn_backward(value, shapes, starts, locations, weights, None, 64)
    with pytest.raises(TypeError, match=r"^grad_output: "):
        extension.ms_deform_attn_backward(value, shapes, starts, locations, weights, grad_output.half(), 64)


# What a package does with its extension when it is imported.
PACKAGES = {
    "nothing": "",
    "imports it": "from . import _C",
    "imports it if it is there": "try:\n    from . import _C\nexcept ImportError:\n    _C = None",
    "has a placeholder": "_C = 'placeholder'",
}
MISSING = object()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Makes packages on the path of imports; afterwards all are forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    before, finders = dict(sys.modules), list(sys.meta_path)

    def make(name, code, compiled):
        folder = tmp_path
        for part in name.split("."):
            folder = folder / part
            folder.mkdir()
            (folder / "__init__.py").touch()
        (folder / "__init__.py").write_text(code)
        if compiled:
            (folder / "_C.py").write_text("original = True")
        importlib.invalidate_caches()

    yield make
    assert sys.meta_path == finders
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def import_(name):
    return importlib.import_module(name)


def attribute_of(package):
    return vars(sys.modules[package]).get("_C", MISSING) if package in sys.modules else MISSING


@pytest.mark.parametrize("package", ["some_package", "outer.middle.inner"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("code", PACKAGES)
@pytest.mark.parametrize("steps", list(itertools.permutations(["package", "install", "name"])), ids=str)
def test_every_order_of_imports_finds_ours_and_can_be_undone(packages, package, compiled, code, steps):
    packages(package, PACKAGES[code], compiled)
    name = f"{package}._C"
    refused = False
    for step in steps:
        try:
            if step == "install":
                before = (sys.modules.get(name), attribute_of(package))
                extension.install(name)
                extension.install(name)
            else:
                import_(package if step == "package" else name)
        except ImportError:
            assert not compiled  # the package alone, which has no extension of its own
        except RuntimeError:
            assert getattr(sys.modules[name], "original", False)
            assert before == (sys.modules[name], attribute_of(package))
            refused = True
    if not refused:
        assert import_(name) is extension
        namespace = {}
        exec(f"import {name}\nfrom {package} import _C", namespace)
        assert namespace["_C"] is attribute_of(package) is sys.modules[name] is extension
    extension.uninstall(name)
    extension.uninstall(name)
    assert sys.modules.get(name) is not extension
    assert attribute_of(package) is not extension
    if compiled:  # what an import finds without us
        assert import_(name).original
        assert attribute_of(package).original
    else:
        with pytest.raises(ImportError):
            import_(name)


@pytest.mark.parametrize("imported_first", [False, True])
def test_a_package_keeps_what_it_had_under_the_name(packages, imported_first):
    packages("some_package", PACKAGES["has a placeholder"], False)
    if imported_first:
        import_("some_package")
    extension.install("some_package._C")
    assert import_("some_package._C") is extension
    extension.uninstall("some_package._C")
    assert attribute_of("some_package") == "placeholder"


def test_what_was_set_since_stays(packages):
    packages("some_package", "", False)
    package = import_("some_package")
    extension.install("some_package._C")
    package._C = "set since"
    extension.uninstall("some_package._C")
    assert package._C == "set since"
    assert "some_package._C" not in sys.modules


def test_a_name_in_a_missing_package_leaves_nothing():
    extension.install("no_such_package._C")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        import_("no_such_package._C")
    extension.uninstall("no_such_package._C")
    assert not [name for name in sys.modules if name.startswith("no_such_package")]


def test_a_blocked_import_is_blocked_again(monkeypatch):
    monkeypatch.setitem(sys.modules, "MultiScaleDeformableAttention", None)
    extension.install()
    assert import_("MultiScaleDeformableAttention") is extension
    extension.uninstall()
    assert sys.modules["MultiScaleDeformableAttention"] is None


def test_two_names_are_independent(packages):
    packages("some_package", "", False)
    extension.install()
    extension.install("some_package._C")
    extension.uninstall()
    assert import_("some_package._C") is extension
    assert "MultiScaleDeformableAttention" not in sys.modules
    extension.uninstall("some_package._C")


def test_our_own_name_stays():
    assert extension.install(extension.__name__) is extension
    extension.uninstall(extension.__name__)
    assert sys.modules[extension.__name__] is extension


@pytest.mark.parametrize("name", ["", "package.", ".name", "a-b", None], ids=repr)
def test_what_is_no_name_of_a_module_is_refused(name):
    with pytest.raises(ValueError, match=r"^name: expected the name of a module"):
        extension.install(name)


def caller(module_name, monkeypatch, held=MISSING, alias="MSDA"):
    """A module with an autograd function that calls the extension under a name of its own."""
    module = ModuleType(module_name)
    code = f"""
import torch

class MSDeformAttnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
        return {alias}.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step)
"""
    exec(code, vars(module))
    if held is not MISSING:
        setattr(module, alias, held)
    monkeypatch.setitem(sys.modules, module_name, module)
    return module


@pytest.mark.parametrize("held", [None, MISSING], ids=["None", "nothing"])
@pytest.mark.parametrize("alias", ["MSDA", "_C"])
def test_a_module_whose_import_has_failed_gets_the_stand_in(monkeypatch, held, alias):
    module = caller("late_caller", monkeypatch, held, alias)
    before = dict(vars(module))
    extension.install("some_detector_extension")
    arguments = tensors_of(CASE)[:-1]
    assert torch.equal(module.MSDeformAttnFunction.apply(*arguments, 64), ms_deform_attn(*arguments))
    extension.uninstall("some_detector_extension")
    assert vars(module) == before


def test_a_module_that_imports_the_functions_gets_them(monkeypatch):
    module = caller("late_caller", monkeypatch)
    code = """
class OtherDeformAttnFunction(MSDeformAttnFunction):
    @staticmethod
    def forward(ctx, *arguments):
        return ms_deform_attn_forward(*arguments)

    @staticmethod
    def backward(ctx, grad_output):
        return ms_deform_attn_backward(grad_output)
"""
    module.ms_deform_attn_forward = module.ms_deform_attn_backward = None
    exec(code, vars(module))
    extension.install("some_detector_extension")
    assert module.ms_deform_attn_forward is extension.ms_deform_attn_forward
    assert module.ms_deform_attn_backward is extension.ms_deform_attn_backward
    extension.uninstall("some_detector_extension")
    assert module.ms_deform_attn_forward is None


@pytest.mark.filterwarnings("error")
def test_other_names_of_a_forward_are_left(monkeypatch):
    module = ModuleType("late_caller")
    code = """
import torch

class MSDeformAttnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, step):
        import MultiScaleDeformableAttention as MSDA
        n = min(step, 64)
        MSDA.ms_deform_attn_forward(value, n)
        return torch.ops.detector.ms_deform_attn_forward(value, n)
"""
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, "late_caller", module)
    before = dict(vars(module))
    extension.install("some_detector_extension")
    assert vars(module) == before
    extension.uninstall("some_detector_extension")


def test_a_module_that_holds_another_extension_is_named(monkeypatch):
    other = ModuleType("compiled")
    module = caller("late_caller", monkeypatch, other)
    with pytest.warns(UserWarning, match=r"late_caller\.MSDA is <module 'compiled'>, imported before install"):
        extension.install("some_detector_extension")
    extension.uninstall("some_detector_extension")
    assert module.MSDA is other


def test_several_names_are_installed_by_one_call(packages):
    names = ("first_extension", "second_extension")
    assert extension.install(*names) is extension
    assert [import_(name) for name in names] == [extension, extension]
    extension.uninstall(*names)
    assert not set(names) & set(sys.modules)


def test_one_wrong_name_installs_nothing():
    with pytest.raises(ValueError, match="name: expected"):
        extension.install("first_extension", "a-b")
    with pytest.raises(ModuleNotFoundError):
        import_("first_extension")


def test_calls_are_counted():
    before = dict(extension.calls)
    value, shapes, starts, locations, weights, grad_output = (part.detach() for part in tensors_of(CASE))
    extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)
    extension.ms_deform_attn_backward(value, shapes, starts, locations, weights, grad_output, 64)
    assert {name: count - before.get(name, 0) for name, count in extension.calls.items()} == {
        "ms_deform_attn_forward": 1,
        "ms_deform_attn_backward": 1,
    }


def test_an_exception_that_the_caller_swallows_is_told_once(monkeypatch):
    monkeypatch.setattr(extension, "_warned", set())
    value, shapes, starts, locations, weights, _ = (part.detach() for part in tensors_of(CASE))

    def as_in_mask2former():
        try:
            return extension.ms_deform_attn_forward(value, shapes, starts, locations[:1], weights, 64)
        except Exception:
            return "the slow path"

    with pytest.warns(UserWarning, match=r"ms_deform_attn_forward raised ValueError: sampling_loc: .*a slow path"):
        assert as_in_mask2former() == "the slow path"
    with warnings.catch_warnings(action="error"):
        assert as_in_mask2former() == "the slow path"


def test_a_gpu_that_cannot_be_used_is_told_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(extension, "cuda_unavailable", lambda: "CuPy is missing")
    with pytest.warns(UserWarning, match="tensors on a GPU will be refused: CuPy is missing"):
        extension.install()
    extension.uninstall()


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A folder of installed packages, and what a Python that starts with it prints for some code."""
    monkeypatch.setattr(import_stub, "folder", lambda: tmp_path)

    def run(code):
        command = [sys.executable, "-c", f"import site; site.addsitedir({str(tmp_path)!r})\n{code}"]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    return run


IMPORT = "import MultiScaleDeformableAttention as MSDA; print(MSDA.__name__)"


def test_a_stub_makes_the_name_importable_in_new_processes(environment, tmp_path, capsys):
    assert extension.main(["MultiScaleDeformableAttention", "json._C"]) == 0
    assert "installed: MultiScaleDeformableAttention, json._C" in capsys.readouterr().out
    assert environment(IMPORT).stdout == "cupy_msda.torch.extension\n"
    assert environment("import json._C; print(json._C.__name__)").stdout == "cupy_msda.torch.extension\n"
    assert (
        environment("import sys; print('torch' in sys.modules, 'cupy_msda' in sys.modules)").stdout == "False False\n"
    )


def test_a_stub_is_removed_again(environment, tmp_path, capsys):
    extension.main(["MultiScaleDeformableAttention", "some_detector._C"])
    extension.main(["--remove", "some_detector._C"])
    assert import_stub.installed(tmp_path) == ("MultiScaleDeformableAttention",)
    extension.main(["--remove"])
    assert not list(tmp_path.iterdir())
    assert "ModuleNotFoundError" in environment(IMPORT).stderr
    capsys.readouterr()
    extension.main([])
    assert capsys.readouterr().out == "installed: no name\n"


def test_a_stub_refuses_what_is_no_name(environment, capsys):
    with pytest.raises(SystemExit):
        extension.main(["a-b"])
    assert "expected the name of a module" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(environment, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(import_stub, "folder", lambda: tmp_path / "missing")
    with pytest.raises(SystemExit):
        extension.main(["MultiScaleDeformableAttention"])
    assert "use a virtual environment" in capsys.readouterr().err


def test_a_name_that_a_stub_has_imported_is_not_blocked_afterwards(monkeypatch):
    monkeypatch.setitem(sys.modules, "stubbed_extension", extension)
    extension.install("stubbed_extension")
    extension.uninstall("stubbed_extension")
    assert sys.modules.get("stubbed_extension", extension) is not None
