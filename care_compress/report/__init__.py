"""One page that says how a run went: files of the run directory in, HTML and Markdown out."""
