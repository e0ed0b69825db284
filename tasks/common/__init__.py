"""What two or more tasks need: the command line, runs, files, cross-validation, metrics, plots, reports."""
