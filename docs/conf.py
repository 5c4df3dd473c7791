"""Configuration of Sphinx."""

from __future__ import annotations

from megatron_adalrs import __version__

project = "megatron_adalrs"
author = "the authors of megatron_adalrs"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated_tables"]
exclude_patterns = ["_build", "requirements.txt"]
html_theme = "furo"
html_title = f"megatron_adalrs {version}"
html_show_copyright = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_mock_imports = ["deepspeed"]  # its import compiles and probes devices; no public docstring needs it
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"  # docstrings write `name` as Markdown does
