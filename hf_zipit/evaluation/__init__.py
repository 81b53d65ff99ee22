"""How good a model is: accuracies, metrics, task data for a Trainer and samples that were held out."""
