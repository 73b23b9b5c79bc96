"""The networks of the experiments. A model takes its normalizers as a field, so one model serves every row."""
