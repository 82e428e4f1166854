"""The tables of the pages, a file for each subject; `TABLES` of each has them by name."""
