"""One self-contained HTML page from the artifacts of one or several runs."""
