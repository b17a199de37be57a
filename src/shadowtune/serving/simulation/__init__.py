"""What a policy would have done with requests whose answers were recorded: accuracy, waiting, cost."""
