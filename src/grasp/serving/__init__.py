"""A checkpoint elsewhere: exports to other formats and runtimes, and plug-ins of servers."""
