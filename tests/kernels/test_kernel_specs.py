"""Each KernelSpec and its CUDA source say the same: parameters, configuration and shared memory."""

import dataclasses
import re

import pytest

from cupy_msda.cuda import kernels
from cupy_msda.cuda.index_width import Sizes
from cupy_msda.cuda.kernel_spec import AxisGroup
from cupy_msda.cuda.specs import KERNELS
from tests.helpers import specialisations

# A specialisation of each kernel.
SPECS = {spec.kernel: spec for spec in specialisations.budgeted().values()}
# Kernels with a fixed amount of dynamic shared memory.
SHARED_MEMORY = [kernel for kernel, spec in SPECS.items() if spec.shared_bytes]


def signature(kernel):
    """Name and type of each parameter of the CUDA function, without qualifiers."""
    text = re.search(rf"__global__[^{{]*?\b{SPECS[kernel].function}\(([^)]*)\)", code_of(kernel))[1]
    found = []
    for parameter in text.split(","):
        words = re.sub(r"__\w+__|\bconfig::|\bmsda::", " ", parameter).replace("*", "* ").split()
        type_ = " ".join(words[:-1]).replace(" *", "*")
        found.append((words[-1].rstrip("_"), type_))
    return found


def code_of(kernel):
    """The source without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", kernels.source(kernel), flags=re.DOTALL)


@pytest.mark.parametrize("kernel", KERNELS)
def test_parameters_are_those_of_the_cuda_function(kernel):
    assert [(one.name, one.type) for one in KERNELS[kernel].parameters] == signature(kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_array_says_how_its_elements_are_counted(kernel):
    spec = SPECS[kernel]
    arrays = {parameter.name for parameter in spec.parameters if parameter.is_array}
    counted, long = spec.indices(Sizes(1, 1, 1)).keys(), set(spec.long_arrays)
    assert not counted & long
    assert arrays <= counted | long
    assert long <= arrays


def test_a_swapped_parameter_is_seen():
    names = [name for name, _ in signature("cast")]
    assert names == ["source", "target", "count"]
    assert [name for name, _ in signature("cast")] != ["target", "source", "count"]


def members_of(kernel):
    """Names of the members of the configuration, as the source spells them."""
    return {re.sub("_dtype$", "_t", name) for name in SPECS[kernel].config()}


@pytest.mark.parametrize("kernel", KERNELS)
def test_config_has_what_the_source_uses_and_no_more(kernel):
    assert members_of(kernel) == set(re.findall(r"\bconfig::(\w+)", code_of(kernel)))


@pytest.mark.parametrize("kernel", SHARED_MEMORY)
def test_the_compiler_checks_the_shared_memory(kernel):
    assert re.search(r"static_assert\([^;]*\bconfig::shared_bytes\b", code_of(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_source_is_one_text_with_each_file_once(kernel):
    text = kernels.program(SPECS[kernel])
    assert "#include" not in text
    assert "#pragma once" not in text
    assert text.count("struct config {") == 1
    assert text.count(f" {SPECS[kernel].function}(") == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_macro_comes_from_the_command_line(kernel):
    assert not [option for option in kernels.OPTIONS if option.startswith("-D")]
    used, defined = (
        set(re.findall(pattern, code_of(kernel))) for pattern in (r"\b(MSDA_\w+)", r"#\s*define (MSDA_\w+)")
    )
    assert used == defined


def test_config_cuh_says_what_each_member_means():
    text = (kernels.source_folder() / kernels.CONFIGURATION).read_text()
    documented = re.findall(r"(?:enum : [a-z ]+ \{|using) (\w+) = [^;]*;|constexpr int (\w+)\(int level\)", text)
    documented = [name or function for name, function in documented]
    needed = {member for kernel in KERNELS for member in members_of(kernel)}
    assert sorted(documented) == sorted(needed)


def test_every_source_file_belongs_to_a_kernel():
    files = {str(path.relative_to(kernels.source_folder())) for path in kernels.source_folder().rglob("*.cu")}
    assert files == {spec.file for spec in KERNELS.values()}


def test_names_of_axes_are_different_within_a_kernel():
    def names(group):
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            yield from names(value) if isinstance(value, AxisGroup) else [field.name]

    for spec in SPECS.values():
        assert len(list(names(spec))) == len(spec.axes())
        assert not spec.axes().keys() & (spec.derived().keys() | spec.fixed.keys())


def test_specialisations_of_a_kernel_have_different_names():
    specs = set(specialisations.budgeted().values())
    assert len({str(spec) for spec in specs}) == len(specs)


def test_an_axis_is_changed_in_whatever_group_it_is():
    spec = SPECS["forward"]
    changed = spec.with_axes(warps=1, lane_groups=4)
    assert (changed.block.warps, changed.lane_groups, changed.threads) == (1, 4, 32)
    assert changed.with_axes(**{name: spec.axes()[name] for name in ("warps", "lane_groups")}) == spec
    with pytest.raises(TypeError, match="ForwardSpec: expected axes of it, got wraps"):
        spec.with_axes(wraps=1)


def test_config_spells_each_kind_of_axis():
    axes = {"P": 0, "points": (1, 2), "value_dtype": "bfloat16", "pixel_stride": 2**31, "ragged": True}
    text = kernels.prelude(SPECS["forward"].with_axes(**axes))
    for line in (
        "using value_t = bfloat16;",
        "static __device__ constexpr int points(int level) { constexpr int of[L] = {1, 2}; return of[level]; }",
        "enum : int { P = 0 };",
        "enum : long long { pixel_stride = 2147483648 };",
        "enum : bool { ragged = true };",
    ):
        assert line in text


def test_metadata_takes_two_words():
    assert SPECS["forward"].words() == (1, 2, *(1,) * 10)
