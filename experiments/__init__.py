"""One file per published table or figure; what they share is in `experiments.common`."""
