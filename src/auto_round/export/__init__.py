"""Export: names, dtypes and shapes of the tensors of an output folder, and the files beside them."""
