"""Tables and plots of the quantization ladder of arXiv 2601.04719."""
