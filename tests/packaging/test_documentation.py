"""The pages' snippets run, their links lead somewhere, and they name what the sources have."""

import ast
import importlib
import re

import pytest

from cupy_msda import __main__ as command_line
from tests.helpers import backends, pages

ROOT, DOCS = pages.ROOT, pages.DOCS
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
SOURCES = [path for folder in ("cupy_msda", "cuda_src") for path in (ROOT / folder).rglob("*.*") if path.is_file()]
# These have tests of their own: what they show needs a compiler, a folder or processes.
ELSEWHERE = ("deployment.md", "several_gpus.md")
GUIDES = [page for page in sorted(DOCS.glob("*.md")) if pages.snippets(page) and page.name not in ELSEWHERE]
PUBLIC = (
    "cupy_msda",
    "cupy_msda.torch",
    "cupy_msda.torch.transformers",
    "cupy_msda.torch.mmcv",
    "cupy_msda.torch.extension",
    "cupy_msda.jax",
    "cupy_msda.plot",
)


@pytest.fixture
def clean_modules():
    """Whatever a guide installs in the place of other modules is taken away again."""
    yield
    extension = importlib.import_module("cupy_msda.torch.extension")
    extension.uninstall("MultiScaleDeformableAttention", "groundingdino._C", "detrex._C")


@pytest.mark.gpu_if_present
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_snippets_of_a_page_run_in_their_order(page, clean_modules, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib").use("Agg")
    names = {}
    for snippet in pages.snippets(page, gpu=backends.GPU):
        for name in ("jax", "mmcv"):
            if re.search(rf"import {name}\b|torch\.{name}\b", snippet):
                pytest.importorskip(name)
        exec(compile(snippet, str(page), "exec"), names)
    if "served" in names:
        names["served"].undo()


def test_only_code_that_is_replaced_is_not_run():
    replaced = {page.name: len(re.findall(r"^<!-- before -->$", page.read_text(), re.MULTILINE)) for page in PAGES}
    assert {name: count for name, count in replaced.items() if count} == {"migrating.md": 3}


def test_the_recipe_for_sparse4d_is_its_sum():
    """By loops over cameras, scales and points, with torch's grid_sample."""
    torch = pytest.importorskip("torch")
    names = {}
    exec(next(one for one in pages.snippets(DOCS / "models.md") if "deformable_aggregation" in one), names)
    N, Q, P, cameras, scales, groups, C = 2, 5, 3, 2, 2, 2, 8
    shape = torch.tensor([[[4, 6], [2, 3]]] * cameras)
    start = torch.tensor([[0, 24], [30, 54]])
    torch.manual_seed(0)
    features = torch.randn(N, 60, C, dtype=torch.float64)
    location = 1.4 * torch.rand(N, Q, P, cameras, 2, dtype=torch.float64) - 0.2
    weights = torch.rand(N, Q, P, cameras, scales, groups, dtype=torch.float64)
    want = torch.zeros(N, Q, C, dtype=torch.float64)
    for camera in range(cameras):
        at = location[:, :, :, camera]
        inside = ((at > 0) & (at < 1)).all(-1)
        for scale in range(scales):
            height, width = shape[camera, scale].tolist()
            first = int(start[camera, scale])
            level = features[:, first : first + height * width].mT.unflatten(2, (height, width))
            sampled = torch.nn.functional.grid_sample(level, 2 * at - 1, align_corners=False)  # [N, C, Q, P]
            weight = (weights[:, :, :, camera, scale] * inside[..., None]).repeat_interleave(C // groups, -1)
            want += (sampled.permute(0, 2, 3, 1) * weight).sum(2)
    have = names["deformable_aggregation"](features, shape, start, location, weights)
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for path, anchor in pages.links(page):
        assert path.exists(), path
        assert not anchor or anchor in pages.anchors(path), f"{path.name}#{anchor}"


def test_links_of_sources_lead_to_headings():
    links = [
        (path.name, page, anchor)
        for path in SOURCES
        if path.suffix in (".py", ".cu", ".cuh")
        for page, anchor in re.findall(r"(docs/[\w/]+\.md)(?:#([\w-]+))?", path.read_text())
    ]
    assert len(links) > 10
    anchors = {page: pages.anchors(ROOT / page) | {""} for page in {page for _, page, _ in links}}
    broken = [f"{source}: {page}#{anchor}" for source, page, anchor in links if anchor not in anchors[page]]
    assert not broken


def variables_read():
    """Names of environment variables that the sources read: literals given to a reader, or in a constant that is."""
    found = set()
    for path in (ROOT / "cupy_msda").rglob("*.py"):
        text = path.read_text()
        if not ("os.environ" in text or "variables.setting(" in text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and re.fullmatch(r"[A-Z]+(?:_[A-Z]+)+", str(node.value)):
                found.add(node.value)
    return found


def test_the_table_of_variables_is_that_of_the_sources():
    listed = {row[0].strip("`") for row in pages.table(DOCS / "environment.md", "# Environment variables")}
    assert listed == variables_read()
    assert {"CUPY_MSDA_CPU", "CUPY_CACHE_DIR"} <= listed


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_api_reference(module):
    if ".torch" in module or ".jax" in module:
        pytest.importorskip(module.split(".")[1])
    if module.endswith((".mmcv", ".transformers")):
        pytest.importorskip(module.split(".")[2])
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None) or [
        name for name, item in vars(found).items() if not name.startswith("_") and is_of(found, item)
    ]
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    section = text[text.index(f".. currentmodule:: {module}\n") :].partition("currentmodule:: ")[2]
    section = section.partition(".. currentmodule::")[0]
    documented = set(re.findall(r"^\.\. auto(?:function|class|data):: (\w+)$", section, re.MULTILINE))
    assert set(names) == documented


def is_of(module, item):
    """Whether a function or class is defined in this module."""
    return callable(item) and getattr(item, "__module__", None) == module.__name__


def test_every_command_is_in_the_api_reference():
    (choices,) = (action.choices for action in command_line._parser()._actions if action.choices)
    text = (DOCS / "api" / "commands.md").read_text()
    assert [name for name in choices if f"## {name}\n" not in text] == []
