"Sphinx's settings for the pages of the book; `make book` copies this file beside the chapters."
project, author, copyright = 'asamoe', 'the asamoe authors', '2026 onwards, the asamoe authors'
extensions = ['myst_nb']
root_doc = 'nbs/index'
exclude_patterns = ['static', '**/.ipynb_checkpoints']
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header', 'toc.not_included', 'misc.highlighting_failure']

nb_execution_mode = 'off'                       # the chapters are executed before, from records
nb_merge_streams = True
nb_render_markdown_format = 'gfm'                # tables that a cell wrote
nb_ipywidgets_js = {}                           # nothing comes from another server
myst_enable_extensions = ['dollarmath', 'amsmath', 'html_image']
myst_heading_anchors = 3
myst_heading_slug_func = 'asamoe.book.pages.slug'
mathjax_path = 'vendor/tex-svg.js'

html_theme = 'furo'
html_title = 'asamoe'
html_favicon = 'static/favicon.svg'
html_static_path = ['static']
html_css_files, html_js_files = ['book.css'], ['book.js']
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
pygments_style, pygments_dark_style = 'a11y-light', 'a11y-dark'
