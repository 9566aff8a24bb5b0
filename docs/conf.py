"""How Sphinx makes these pages: `make docs`."""

import re

from mmseg_imbalance.version import __version__

project = 'mmseg_imbalance'
author = 'The mmseg_imbalance authors'
copyright = author
version = release = __version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.autosummary', 'sphinx.ext.napoleon']
exclude_patterns = ['_build', '_templates']
templates_path = ['_templates']
html_theme = 'furo'
html_title = 'mmseg_imbalance'
html_static_path = ['_static']
html_css_files = ['wide.css']
html_show_copyright = False

myst_enable_extensions = ['colon_fence', 'deflist']
myst_heading_anchors = 3

# The API pages: docs/api/index.md names the modules, and Sphinx makes a page of each.
autosummary_generate = True
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
napoleon_custom_sections = [('Source', 'notes_style')]
default_role = 'code'

# every reference to this package has to lead somewhere; those to other packages are not looked up
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(?!mmseg_imbalance\.).*'), ('py:class', r'.*\.Number')]


def escape_formulas(app, what, name, obj, options, lines):
    """In our docstrings |x| is a norm and 'loss_' a name; in reStructuredText they would be references."""
    for i, line in enumerate(lines):
        texts = re.split('(``.*?``|`.*?`)', line)  # text and literals in turn
        texts[::2] = [re.sub(r'\||(?<=\w)_(?!\w)', r'\\\g<0>', text) for text in texts[::2]]
        lines[i] = ''.join(texts)


def setup(app):
    app.connect('autodoc-process-docstring', escape_formulas)
    # It looks members up on the class, which mmcv's cache_randomness cannot bear. We use none of its options.
    for listener in list(app.events.listeners['autodoc-skip-member']):
        if listener.handler.__module__ == 'sphinx.ext.napoleon':
            app.disconnect(listener.id)
