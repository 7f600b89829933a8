"""What a run leaves behind for its reader: the metrics log, the results, the curves and the model card."""
