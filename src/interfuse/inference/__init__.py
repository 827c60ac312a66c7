"""Going through data with a network: batches from anything, predictions, and the features of frozen networks on disk."""
