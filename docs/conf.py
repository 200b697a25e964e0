"""How the site is made: ``sphinx-build -n -W --keep-going -b html docs build/docs``.

Needed: ``pip install -e '.[docs]'``, and Graphviz, whose ``dot`` makes the drawing.  No step
needs the network.
"""

import sys
from pathlib import Path
from types import ModuleType

# The modules lie flat in the repository and are shown by the names that they are installed by.
library = ModuleType("sessionscope")
library.__path__ = [str(Path(__file__).resolve().parent.parent)]
sys.modules["sessionscope"] = library

project = html_title = "sessionscope"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.graphviz"]
myst_heading_anchors = 2
default_role = "any"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
graphviz_output_format = "svg"

# What is of others: without the network there is nothing that a link could be made from.
nitpick_ignore_regex = [
    ("py:class", r"collections\.abc\..*|sqlalchemy\..*|Engine|Session|WSGI.*"),
    ("py:class", "Callback|CommitWhen|Headers|Registry"),  # names for types, within a module
]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_copy_source = False
