"""The README's snippets run in their order, and every link between files of the repository leads somewhere."""

import re
from pathlib import Path

import pytest

from tests.helpers import backends

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SOURCES = [path for folder in ("cupy_msda", "cuda_src") for path in (ROOT / folder).rglob("*.*") if path.is_file()]


@pytest.mark.gpu_if_present
def test_snippets_run():
    assert len(SNIPPETS) == 10
    names = {}
    for snippet in SNIPPETS:
        if "import cupy\n" in snippet and not backends.GPU:
            continue
        exec(compile(snippet, str(README), "exec"), names)
    assert names["output"].shape == (2, 100, 256)
    assert names["value"].grad is not None
    names["extension"].uninstall()


def snippets_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["models.md", "jax.md"])
def test_snippets_of_a_page_run(page):
    names = {}
    for snippet in snippets_of(page):
        exec(compile(snippet, page, "exec"), names)
    if "extension" in names:
        names["extension"].uninstall("MultiScaleDeformableAttention", "groundingdino._C", "detrex._C")


def test_the_recipe_for_sparse4d_is_its_sum():
    """By loops over cameras, scales and points, with torch's grid_sample."""
    torch = pytest.importorskip("torch")
    names = {}
    exec(next(snippet for snippet in snippets_of("models.md") if "deformable_aggregation" in snippet), names)
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


def anchors_of(page):
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page):
    """(file, anchor or '') of each link of a page that stays in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?:|mailto:", target):
            name, _, anchor = target.partition("#")
            yield (page.parent / name if name else page), anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for path, anchor in links_of(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors_of(path), f"{path.name}#{anchor}"


def test_readme_links_what_a_reader_needs():
    linked = {path.resolve().relative_to(ROOT).as_posix() for path, _ in links_of(README)}
    plots = {f"benchmarks/results/{name}.png" for name in ("benchmark", "backward", "fused", "models", "overhead")}
    plots |= {f"benchmarks/results/{name}.png" for name in ("detector", "scaling")}
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "docs/demo.jpg"} | plots <= linked
    assert (ROOT / "LICENSE").is_file()


def test_links_of_sources_lead_to_headings():
    links = [
        (path.name, page, anchor)
        for path in SOURCES
        if path.suffix in (".py", ".cu", ".cuh")
        for page, anchor in re.findall(r"(docs/[\w/]+\.md)(?:#([\w-]+))?", path.read_text())
    ]
    assert len(links) > 10
    anchors = {page: anchors_of(ROOT / page) | {""} for page in {page for _, page, _ in links}}
    broken = [f"{source}: {page}#{anchor}" for source, page, anchor in links if anchor not in anchors[page]]
    assert not broken
