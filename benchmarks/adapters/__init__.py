"""One small program per library, run by that library's own Python: problem in, timings out."""
