"""What a task is: labels, loss, metric, head and drawing, one file for each."""
