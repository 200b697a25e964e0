"""How the site is made: ``sphinx-build -n -W --keep-going -b html docs build/docs``.

Needed: ``pip install -e '.[docs]'``, and Graphviz, whose ``dot`` makes the drawing.  No step
needs the network.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

project = html_title = "sessionscope"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.graphviz"]
myst_heading_anchors = 3
default_role = "any"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
graphviz_output_format = "svg"

# What is of others: without the network there is nothing that a link could be made from.
nitpick_ignore_regex = [
    ("py:class", r"collections\.abc\..*|sqlalchemy\..*|Engine|Session|Table|WSGI.*|timedelta"),
    ("any", r"sqlalchemy\.Table|timedelta"),
    ("py:exc", r"sqlalchemy\..*"),
    ("py:class", "Action|Callback|CommitWhen|Context|Headers|Registry"),  # names for types
    ("py:class", r"sessionscope\.unit_of_work\.S"),  # a type variable
]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_copy_source = False
