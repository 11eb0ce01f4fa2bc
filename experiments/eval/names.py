"""What tasks are called that are not lm-eval's multiple choice of the paper: definitions of studies name them."""

EMBEDDED_TASK = "wiki_continuation"
HUMANEVAL = "humaneval"
