"""Sphinx's configuration of the documentation. `.ci/docs` builds it.

The source folder is the whole repository, so that a link between files means the same on the site and in a checkout.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import cupy_msda  # noqa: E402

project = "cupy_msda"
author = "cupy_msda contributors"
copyright = f"2026, {author}"
version = release = cupy_msda.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = ["docs/site_root/**", "**/.ipynb_checkpoints/**"]

myst_enable_extensions = ["attrs_block", "colon_fence"]
myst_heading_anchors = 4
# Notebooks are committed with their outputs, and tests run them.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"cupy_msda {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# The site's root leads to docs/index.html.
html_extra_path = ["site_root"]
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"
